// Draws the charts of the report from the JSON in the page, by Observable Plot. Every text goes in as text.
"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("data").textContent);
  const DASHES = [null, "6 3", "2 3", "9 3 2 3", "14 4", "5 2 1 2 1 2"];
  const SYMBOLS = ["circle", "square", "triangle", "diamond", "star", "cross"];
  const FEW = 25; // a line of so many points shows each of them
  const colour = (number) => `var(--c${number})`;
  const HALO = { stroke: "var(--card)", strokeWidth: 4, strokeLinejoin: "round" };

  function short(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e9)) return value.toExponential(1);
    return Number(value.toPrecision(size >= 1000 ? 6 : 3)).toLocaleString("en-US");
  }

  // Moves labels at the ends of lines apart, so that none covers another.
  const apart = (options) =>
    Plot.initializer(options, (data, facets, channels, scales) => {
      const places = Array.from(channels.y.value, (value) => scales.y(value));
      let last = -Infinity;
      for (const i of d3.sort(facets[0], (i) => places[i])) last = places[i] = Math.max(places[i], last + 13);
      return { channels: { y: { value: places } } };
    });

  // Dashed horizontal lines, each with its label above its left end or, where bars would hide it, beside its right end.
  const levels = (chart, place = { frameAnchor: "left", dx: 4, dy: -7 }) => [
    Plot.ruleY(chart.levels, { y: "value", strokeDasharray: "5 4", strokeOpacity: 0.7 }),
    Plot.text(chart.levels, { ...HALO, y: "value", text: "label", textAnchor: "start", fill: "currentColor", ...place }),
  ];

  // The ends of an axis; of values that are all equal, with some room.
  function reach(values) {
    const [low, high] = d3.extent(values);
    const room = low === high ? Math.abs(low) / 10 || 1 : 0;
    return [low - room, high + room];
  }

  const tip = (rows, options) => Plot.tip(rows, Plot.pointer({ ...options, maxRadius: 60, fontSize: 12, stroke: "var(--soft)" }));

  // Ranges of steps that a verdict names: shaded, with dashed edges and a label.
  function ranges(chart, [low, high]) {
    return chart.ranges.flatMap((range, number) => {
      const [first, last] = [Math.max(low, range.first - 0.5), Math.min(high, range.last + 0.5)];
      const share = ((first + last) / 2 - low) / (high - low || 1);
      const anchor = share < 0.3 ? "start" : share > 0.7 ? "end" : "middle";
      const at = { start: first, end: last, middle: (first + last) / 2 }[anchor];
      return [
        Plot.rectX([range], { x1: first, x2: last, fill: "var(--warn)", fillOpacity: 0.16 }),
        Plot.ruleX([first, last], { stroke: "var(--warn)", strokeDasharray: "3 3" }),
        Plot.text([range], { ...HALO, x: at, text: "label", frameAnchor: "top", dy: 2 + 14 * number, textAnchor: anchor, lineAnchor: "top", fill: "var(--warn)", fontWeight: 600 }),
      ];
    });
  }

  function drawLines(chart, base) {
    const rows = chart.series.flatMap((series) => series.points.map(([x, y]) => ({ x, y, series })));
    const seen = rows.filter((row) => row.y !== null);
    const domain = reach([...rows.map((row) => row.x), ...chart.band.map(([x]) => x)]);
    const heights = reach([...seen.map((row) => row.y), ...chart.levels.map((level) => level.value), ...chart.band.flatMap(([, ...ends]) => ends)]);
    const isStep = chart.x.startsWith("step");
    const ends = chart.series.map((series) => ({ series, last: series.points.findLast(([, y]) => y !== null) }));
    const marks = [...ranges(chart, domain)];
    if (chart.band.length === 1) {
      marks.push(Plot.ruleX(chart.band, { x: "0", y1: "1", y2: "2", stroke: colour(0) }));
    } else {
      marks.push(Plot.areaY(chart.band, { x: "0", y1: "1", y2: "2", fill: colour(0), fillOpacity: 0.18 }));
    }
    marks.push(...levels(chart));
    for (const series of chart.series) {
      const { points } = series;
      const style = { x: "0", y: "1", curve: chart.steps ? "step-after" : "linear" };
      if (chart.steps) marks.push(Plot.areaY(points, { ...style, fill: colour(series.colour), fillOpacity: 0.12 }));
      marks.push(Plot.lineY(points, { ...style, stroke: colour(series.colour), strokeWidth: 1.8, strokeDasharray: DASHES[series.dash] }));
      const alone = (_, i) => (points[i - 1]?.[1] ?? null) === null && (points[i + 1]?.[1] ?? null) === null;
      const dotted = chart.steps ? [] : points.length <= FEW ? points : points.filter(alone);
      marks.push(Plot.dot(dotted, { x: "0", y: "1", r: 2.6, fill: colour(series.colour), symbol: SYMBOLS[series.dash] }));
    }
    if (!chart.steps) {
      const text = ({ series, last }) => `${series.mark} ${short(last[1])}`.trim();
      const at = { x: (end) => end.last[0], y: (end) => end.last[1], dx: 6, textAnchor: "start" };
      marks.push(Plot.text(ends.filter((end) => end.last), apart({ ...HALO, ...at, text, fontWeight: 600, fill: (end) => colour(end.series.colour) })));
    }
    const title = (row) => `${row.series.label}\n${isStep ? "step " : ""}${short(row.x)}: ${short(row.y)}`;
    marks.push(tip(seen, { x: "x", y: "y", title }));
    const ticks = d3.ticks(...domain, base.width / 90).filter((tick) => !isStep || Number.isInteger(tick));
    return Plot.plot({ ...base, x: { label: chart.x, domain, ticks }, y: { label: chart.y, domain: heights, grid: true, ticks: 4, nice: true }, marks });
  }

  function drawBars(chart, base) {
    const rows = chart.parts.flatMap((part, number) =>
      part.values.map((value, i) => ({ part, number, value, category: chart.categories[i] })));
    const title = (row) => `${row.part.label}\n${chart.x.startsWith("step") ? "step " : ""}${row.category}: ${short(row.value)}`;
    const tops = chart.notes.map((note, i) => ({ note, category: chart.categories[i], y: d3.sum(chart.parts, (part) => part.values[i]) }));
    const every = Math.ceil((chart.categories.length * (d3.max(chart.categories, (text) => text.length) * 7 + 8)) / (base.width - 120));
    const marks = [
      Plot.barY(rows, { x: "category", y: "value", z: "number", fill: (row) => colour(row.number), stroke: "var(--card)", title, tip: { fontSize: 12, stroke: "var(--soft)" } }),
      Plot.text(tops, { ...HALO, x: "category", y: "y", text: "note", dy: -8, fill: "var(--soft)" }),
      ...levels(chart, { frameAnchor: "right", dx: 4 }),
      Plot.ruleY([0]),
    ];
    const ticks = chart.categories.filter((_, i) => i % every === 0);
    return Plot.plot({ ...base, x: { label: chart.x, type: "band", domain: chart.categories, ticks }, y: { label: chart.y, grid: true, ticks: 4 }, marks });
  }

  function drawDots(chart, base) {
    const marks = [];
    if (chart.sized) marks.push(Plot.line([[0, 0], [1, 1]], { strokeDasharray: "5 4", strokeOpacity: 0.7 }));
    const seen = [];
    for (const series of chart.series) {
      const { points } = series;
      const most = d3.max(points, (point) => point[2]) || 1;
      const rows = points.map(([x, y, third], i) => ({ x, y, third, series, age: chart.sized ? 0.75 : 0.3 + (0.7 * (i + 1)) / points.length }));
      seen.push(...rows);
      const fill = colour(series.colour);
      if (chart.joined) marks.push(Plot.line(rows, { x: "x", y: "y", stroke: fill, strokeOpacity: 0.6, strokeDasharray: DASHES[series.dash] }));
      marks.push(Plot.dot(rows, { x: "x", y: "y", r: chart.sized ? (row) => 3 + 6 * Math.sqrt(row.third / most) : 3.2, fill, fillOpacity: "age", symbol: SYMBOLS[series.dash] }));
      if (!chart.sized) {
        const ends = rows.length > 1 ? [rows[0], rows[rows.length - 1]] : rows;
        marks.push(Plot.text(ends, { ...HALO, x: "x", y: "y", text: (row) => `${series.mark} ${chart.third} ${row.third}`.trim(), dy: -10, fill, fontWeight: 600 }));
      } else if (series.mark) {
        marks.push(Plot.text(rows.slice(-1), { ...HALO, x: "x", y: "y", text: () => series.mark, dy: -12, fill, fontWeight: 600 }));
      }
    }
    for (const series of chart.frontiers) {
      marks.push(Plot.line(series.points, { x: "0", y: "1", curve: "step-after", stroke: chart.frontiers.length > 1 ? colour(series.colour) : "currentColor", strokeWidth: 1.4, strokeDasharray: DASHES[series.dash] }));
    }
    const several = chart.series.length > 1;
    const title = (row) => `${several ? `${row.series.label}, ` : ""}${chart.third} ${short(row.third)}\nx: ${short(row.x)}\ny: ${short(row.y)}`;
    marks.push(tip(seen, { x: "x", y: "y", title }));
    const whole = chart.sized ? { domain: [0, 1] } : { nice: true };
    return Plot.plot({ ...base, x: { label: chart.x, ticks: base.width / 90, ...whole }, y: { label: chart.y, grid: true, ticks: 5, ...whole }, r: { type: "identity" }, marks });
  }

  const DRAW = { lines: drawLines, bars: drawBars, dots: drawDots };

  function draw() {
    for (const [id, chart] of Object.entries(charts)) {
      const place = document.getElementById(id);
      const margins = { marginLeft: 48, marginRight: chart.kind === "dots" || chart.steps ? 20 : 58, marginTop: 26, marginBottom: 38 };
      const style = { background: "none", fontSize: "11px", overflow: "visible" };
      const scales = { color: { type: "identity" }, opacity: { type: "identity" } };
      const drawn = DRAW[chart.kind](chart, { ...margins, ...scales, style, width: Math.max(240, place.clientWidth), height: chart.height });
      drawn.setAttribute("aria-hidden", "true"); // the place says in words what is drawn
      place.replaceChildren(drawn);
    }
  }

  // The head and the rows of the table behind a chart.
  function numbers(chart) {
    if (chart.kind === "bars") {
      return [[chart.x, ...chart.parts.map((part) => part.label)], chart.categories.map((name, i) => [name, ...chart.parts.map((part) => short(part.values[i]))])];
    }
    if (chart.kind === "dots") {
      const rows = chart.series.flatMap((series) => series.points.map(([x, y, third]) => [series.label, ...[third, x, y].map(short)]));
      return [["series", chart.third, chart.x, chart.y], rows];
    }
    const columns = chart.series.map((series) => new Map(chart.steps ? series.points.slice(1, -2) : series.points));
    const xs = d3.sort(new Set(columns.flatMap((column) => [...column.keys()])));
    return [[chart.x, ...chart.series.map((series) => series.label)], xs.map((x) => [short(x), ...columns.map((column) => short(column.get(x)))])];
  }

  function element(tag, parent, text) {
    const made = parent.appendChild(document.createElement(tag));
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function showNumbers({ target: details }) {
    if (!details.open || details.querySelector("table")) return;
    const [head, rows] = numbers(charts[details.dataset.chart]);
    const box = element("div", details);
    Object.assign(box, { className: "scroll", tabIndex: 0, role: "region", ariaLabel: details.querySelector("summary").textContent });
    const table = element("table", box);
    const top = element("tr", element("thead", table));
    for (const name of head) element("th", top, name).scope = "col";
    const body = element("tbody", table);
    for (const row of rows) {
      const line = element("tr", body);
      for (const cell of row) element("td", line, cell);
    }
  }

  function showEvaluation({ target: select }) {
    const card = select.closest(".samples");
    for (const one of card.querySelectorAll("[data-step]")) one.hidden = one.dataset.step !== select.value;
    for (const head of card.querySelectorAll(".later")) head.textContent = select.selectedOptions[0].textContent;
  }

  draw();
  let width = document.body.clientWidth;
  window.addEventListener("resize", () => {
    if (document.body.clientWidth !== width) draw();
    width = document.body.clientWidth;
  });
  for (const details of document.querySelectorAll("details.numbers")) details.addEventListener("toggle", showNumbers);
  for (const select of document.querySelectorAll("select.evaluation")) select.addEventListener("change", showEvaluation);
  const reload = document.getElementById("reload");
  if (reload) setInterval(() => reload.checked && location.reload(), 5000);
})();
