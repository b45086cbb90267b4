"""The report's style sheet: system fonts, light and dark, one column on a phone."""

CSS = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1b1f24; --soft: #57606a; --rule: #d8dee4;
  --grid: #e7eaee; --c0: #0067a8; --c1: #b84a00; --c2: #8b949e; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1318; --card: #181d24; --ink: #e6edf3; --soft: #9aa4af;
  --rule: #30363d; --grid: #262c34; --c0: #56b4e9; --c1: #f0a13c; --c2: #6e7681; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.45; font-size: 15px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 36px 0 12px; padding-bottom: 6px; border-bottom: 1px solid var(--rule); }
h3 { font-size: 15px; margin: 0 0 2px; }
h2 small, header p { color: var(--soft); font-weight: 400; font-size: 14px; margin: 4px 0 0; }
nav { margin-top: 10px; display: flex; gap: 18px; }
a { color: var(--c0); }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 14px; }
.grid { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr));
  margin-top: 14px; }
.grid p { margin: 0 0 8px; color: var(--soft); font-size: 13px; }
figure.card { margin: 0; }
figure.card p { min-height: 57px; } /* three lines, so that the charts of a row start level */
svg { display: block; width: 100%; height: auto; font-family: inherit; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: 7px 12px 7px 0; border-top: 1px solid var(--grid); }
thead th { color: var(--soft); font-weight: 500; font-size: 13px; border-top: 0; }
tbody th { font-weight: 500; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.words { text-align: right; overflow-wrap: anywhere; }
td.note { color: var(--soft); }
.headline { overflow-x: auto; }
.headline table { width: auto; min-width: min(100%, 480px); }
.headline td, .headline th + th { padding-left: 14px; }
.samples { margin-top: 14px; }
.samples table { table-layout: fixed; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 15em; overflow-y: auto; }
.scores { color: var(--soft); font-size: 13px; margin-top: 4px; font-variant-numeric: tabular-nums; }
details { margin-top: 36px; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font-size: 13px; margin-bottom: 0; }
svg .gridline { stroke: var(--grid); stroke-width: 1; }
svg .tick, svg .note { font-size: 10.5px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .label { font-size: 11px; fill: var(--soft); }
svg .value { font-size: 11px; font-weight: 600; }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
svg .thin { stroke-width: 1.2; }
svg .ref { stroke: var(--ink); stroke-width: 1.1; stroke-dasharray: 5 4; opacity: 0.65; }
svg .reflabel { font-size: 10.5px; fill: var(--ink); }
svg .reflabel, svg .value { paint-order: stroke; stroke: var(--card); stroke-width: 3; stroke-linejoin: round; }
svg .band { opacity: 0.16; }
svg .edge { stroke: var(--card); stroke-width: 1; }
svg .s0 { stroke: var(--c0); } svg .s1 { stroke: var(--c1); } svg .s2 { stroke: var(--c2); }
svg .f0, svg .t0 { fill: var(--c0); } svg .f1, svg .t1 { fill: var(--c1); } svg .f2, svg .t2 { fill: var(--c2); }
@media (max-width: 640px) {
  main { padding: 16px 10px 32px; }
  figure.card p { min-height: 0; }
  .samples thead { display: none; }
  .samples table, .samples tbody, .samples tr, .samples td { display: block; }
  .samples tr { border-top: 1px solid var(--rule); padding: 8px 0; }
  .samples td { border: 0; padding: 4px 0; }
  .samples td::before { content: attr(data-label); color: var(--soft); font-size: 12px; }
}
@media print { .text { max-height: none; } figure.card, tr { break-inside: avoid; } }
"""
