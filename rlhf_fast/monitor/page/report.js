// Draws the charts of the report from the JSON in the page, by Observable Plot. Every text goes in as text.
"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("data").textContent);
  const DASHES = [null, "6 3", "2 3", "9 3 2 3", "14 4", "5 2 1 2 1 2"]; // as in report.css
  const SYMBOLS = ["circle", "square", "triangle", "diamond", "star", "cross"];
  const FEW = 25; // a line of so many points shows each of them
  const LEAST_WIDTH = 240;
  const HALO = { stroke: "var(--card)", strokeWidth: 4 };
  const TIP = { fontSize: 12, stroke: "var(--soft)" };
  const colour = (number) => `var(--c${number})`;
  const isOfSteps = (chart) => chart.x.startsWith("step");

  function short(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e9)) return value.toExponential(1);
    return Number(value.toPrecision(size >= 1000 ? 6 : 3)).toLocaleString("en-US");
  }

  // The ends of an axis; with some room for values that hardly differ, so that noise does not look like a change.
  function reach(values) {
    const [low, high] = d3.extent(values);
    const size = Math.max(Math.abs(low), Math.abs(high));
    const room = high - low > size / 100 ? 0 : size / 20 || 1;
    return [low - room, high + room];
  }

  // Moves labels at the ends of lines apart, so that none covers another or the axis below.
  const apart = (options) =>
    Plot.initializer(options, (data, facets, channels, scales, { height, marginBottom }) => {
      const places = Array.from(channels.y.value, (value) => scales.y(value));
      const order = d3.sort(facets[0], (i) => places[i]);
      let above = -Infinity;
      for (const i of order) above = places[i] = Math.max(places[i], above + 13);
      let below = height - marginBottom + 13;
      for (const i of order.reverse()) below = places[i] = Math.min(places[i], below - 13);
      return { channels: { y: { value: places } } };
    });

  const nearest = (rows, title) => Plot.tip(rows, Plot.pointer({ x: "x", y: "y", title, maxRadius: 60, ...TIP }));

  // Dashed horizontal lines, each with its label above its left end or, where bars would hide it, beside its right end.
  const levels = ({ levels }, place = { frameAnchor: "left", dx: 4, dy: -7 }) => [
    Plot.ruleY(levels, { y: "value", strokeDasharray: "5 4", strokeOpacity: 0.7 }),
    Plot.text(levels, { ...HALO, y: "value", text: "label", textAnchor: "start", fill: "currentColor", ...place }),
  ];

  // Steps that a verdict names: shaded, with dashed edges and a label.
  function range({ first, last, label }, number, [low, high]) {
    const [start, end] = [Math.max(low, first - 0.5), Math.min(high, last + 0.5)];
    const middle = (start + end) / 2;
    const share = (middle - low) / (high - low);
    const textAnchor = share < 0.3 ? "start" : share > 0.7 ? "end" : "middle";
    const x = { start, middle, end }[textAnchor];
    const at = { x: () => x, frameAnchor: "top", lineAnchor: "top", dy: 2 + 14 * number, textAnchor };
    return [
      Plot.rectX([0], { x1: start, x2: end, fill: "var(--warn)", fillOpacity: 0.16 }),
      Plot.ruleX([start, end], { stroke: "var(--warn)", strokeDasharray: "3 3" }),
      Plot.text([label], { ...HALO, ...at, fill: "var(--warn)", fontWeight: 600 }),
    ];
  }

  function line(chart, { points, colour: number, dash }) {
    const style = { x: "0", y: "1", curve: chart.steps ? "step-after" : "linear" };
    const stroke = { stroke: colour(number), strokeWidth: 1.8, strokeDasharray: DASHES[dash] };
    const drawn = Plot.lineY(points, { ...style, ...stroke });
    if (chart.steps) return [Plot.areaY(points, { ...style, fill: colour(number), fillOpacity: 0.12 }), drawn];
    const isGap = (i) => (points[i]?.[1] ?? null) === null;
    const dotted = points.length <= FEW ? points : points.filter((_, i) => isGap(i - 1) && isGap(i + 1));
    const dot = { x: "0", y: "1", r: 2.6, fill: colour(number), symbol: SYMBOLS[dash] };
    return [drawn, Plot.dot(dotted, dot)];
  }

  function lastValues(chart) {
    const lasts = chart.series.map((series) => ({ series, last: series.points.findLast(([, y]) => y !== null) }));
    return Plot.text(lasts.filter(({ last }) => last), apart({
      ...HALO,
      x: ({ last }) => last[0],
      y: ({ last }) => last[1],
      text: ({ series, last }) => `${series.mark} ${short(last[1])}`.trim(),
      fill: ({ series }) => colour(series.colour),
      fontWeight: 600,
      textAnchor: "start",
      dx: 6,
    }));
  }

  function interval(band) {
    const style = { x: "0", y1: "1", y2: "2" };
    if (band.length === 1) return Plot.ruleX(band, { ...style, stroke: colour(0) }); // an area needs two points
    return Plot.areaY(band, { ...style, fill: colour(0), fillOpacity: 0.18 });
  }

  function drawLines(chart, base) {
    const rows = chart.series.flatMap((series) => series.points.map(([x, y]) => ({ x, y, series })));
    const seen = rows.filter((row) => row.y !== null);
    const drawn = [...seen.map((row) => row.y), ...chart.levels.map((level) => level.value)];
    const heights = reach([...drawn, ...chart.band.flatMap(([, low, high]) => [low, high])]);
    const [first, last] = d3.extent([...rows.map((row) => row.x), ...chart.band.map(([x]) => x)]);
    const domain = first === last ? [first - 1, last + 1] : [first, last];
    const ofSteps = isOfSteps(chart);
    const ticks = d3.ticks(...domain, base.width / 90).filter((tick) => !ofSteps || Number.isInteger(tick));
    const tickFormat = ofSteps ? (tick) => tick.toLocaleString("en-US") : undefined;
    const marks = [
      ...chart.ranges.flatMap((one, number) => range(one, number, domain)),
      interval(chart.band),
      ...levels(chart),
      ...chart.series.flatMap((series) => line(chart, series)),
      chart.steps ? null : lastValues(chart),
      nearest(seen, (row) => `${row.series.label}\n${ofSteps ? "step " : ""}${short(row.x)}: ${short(row.y)}`),
    ];
    const y = { label: chart.y, domain: heights, grid: true, ticks: 4, nice: true };
    return Plot.plot({ ...base, x: { label: chart.x, domain, ticks, tickFormat }, y, marks });
  }

  function drawBars(chart, base) {
    const rows = chart.parts.flatMap((part, number) =>
      part.values.map((value, i) => ({ part, number, value, category: chart.categories[i] })));
    const height = (_, i) => d3.sum(chart.parts, (part) => part.values[i]);
    const at = { x: (_, i) => chart.categories[i], y: height, dy: -8 };
    const of = isOfSteps(chart) ? "step " : "";
    const title = (row) => `${row.part.label}\n${of}${row.category}: ${short(row.value)}`;
    const fill = (row) => colour(row.number);
    const longest = d3.max(chart.categories, (text) => text.length) * 7 + 8;
    const every = Math.ceil((chart.categories.length * longest) / (base.width - 120));
    const ticks = chart.categories.filter((_, i) => i % every === 0);
    const marks = [
      Plot.barY(rows, { x: "category", y: "value", z: "number", fill, stroke: "var(--card)", title, tip: TIP }),
      Plot.text(chart.notes, { ...HALO, ...at, fill: "var(--soft)" }),
      ...levels(chart, { frameAnchor: "right", dx: 4 }),
      Plot.ruleY([0]),
    ];
    const x = { label: chart.x, type: "band", domain: chart.categories, ticks };
    return Plot.plot({ ...base, x, y: { label: chart.y, grid: true, ticks: 4 }, marks });
  }

  // The dots of one series, and the labels of the first and the last.
  function dots(chart, { points, colour: number, dash, mark }) {
    const most = d3.max(points, (point) => point[2]) || 1;
    const rows = points.map(([x, y, third], i) => ({ x, y, third, age: 0.3 + (0.7 * (i + 1)) / points.length }));
    const [at, fill] = [{ x: "x", y: "y" }, colour(number)];
    const text = { ...HALO, ...at, fill, fontWeight: 600 };
    const shape = { ...at, fill, symbol: SYMBOLS[dash] };
    if (chart.sized) {
      const r = ({ third }) => 3 + 6 * Math.sqrt(third / most);
      return [
        Plot.dot(rows, { ...shape, r, fillOpacity: 0.75 }),
        Plot.text(rows.slice(-1), { ...text, text: () => mark, dy: -14 }),
      ];
    }
    const ends = rows.filter((_, i) => i === 0 || i === rows.length - 1);
    const joint = { ...at, stroke: fill, strokeOpacity: 0.6, strokeDasharray: DASHES[dash] };
    return [
      chart.joined ? Plot.line(rows, joint) : null,
      Plot.dot(rows, { ...shape, r: 3.2, fillOpacity: "age" }),
      Plot.text(ends, { ...text, text: ({ third }) => `${mark} ${chart.third} ${third}`.trim(), dy: -10 }),
    ];
  }

  function frontier({ points, colour: number, dash, mark }) {
    const stroke = mark ? colour(number) : "currentColor";
    const style = { curve: "step-after", strokeWidth: 1.4, strokeDasharray: DASHES[dash] };
    return Plot.line(points, { x: "0", y: "1", stroke, ...style });
  }

  function drawDots(chart, base) {
    const seen = chart.series.flatMap((series) => series.points.map(([x, y, third]) => ({ x, y, third, series })));
    const diagonal = { strokeDasharray: "5 4", strokeOpacity: 0.7 };
    const whole = chart.sized ? { domain: [0, 1] } : { nice: true };
    const marks = [
      chart.sized ? Plot.line([[0, 0], [1, 1]], diagonal) : null,
      ...chart.series.flatMap((series) => dots(chart, series)),
      ...chart.frontiers.map(frontier),
      nearest(seen, (row) => {
        const head = `${row.series.mark} ${chart.third} ${short(row.third)}`.trim();
        return `${head}\nx: ${short(row.x)}\ny: ${short(row.y)}`;
      }),
    ];
    const x = { label: chart.x, ticks: base.width / 90, ...whole };
    const y = { label: chart.y, grid: true, ticks: 5, ...whole };
    return Plot.plot({ ...base, x, y, r: { type: "identity" }, marks });
  }

  const DRAW = { lines: drawLines, bars: drawBars, dots: drawDots };

  function draw() {
    const style = { background: "none", fontSize: "11px", overflow: "visible" };
    const scales = { color: { type: "identity" }, opacity: { type: "identity" } };
    for (const [id, chart] of Object.entries(charts)) {
      const place = document.getElementById(id);
      const marginRight = chart.kind === "dots" || chart.steps ? 20 : 58; // for labels beside the chart
      const margins = { marginLeft: 48, marginRight, marginTop: 26, marginBottom: 38 };
      const size = { width: Math.max(LEAST_WIDTH, place.clientWidth), height: chart.height };
      const drawn = DRAW[chart.kind](chart, { ...margins, ...scales, ...size, style });
      drawn.setAttribute("aria-hidden", "true"); // the place says in words what is drawn
      place.replaceChildren(drawn);
    }
  }

  // The head and the rows of the table behind a chart.
  function numbers({ kind, x, y, third, series, parts, categories, steps }) {
    if (kind === "bars") {
      const rows = categories.map((name, i) => [name, ...parts.map((part) => short(part.values[i]))]);
      return [[x, ...parts.map((part) => part.label)], rows];
    }
    if (kind === "dots") {
      const cells = (label) => ([x, y, third]) => [label, short(third), short(x), short(y)];
      const rows = series.flatMap(({ label, points }) => points.map(cells(label)));
      return [["series", third, x, y], rows];
    }
    const columns = series.map(({ points }) => new Map(steps ? points.slice(1, -2) : points));
    const places = d3.sort(new Set(columns.flatMap((column) => [...column.keys()])));
    const rows = places.map((place) => [short(place), ...columns.map((column) => short(column.get(place)))]);
    return [[x, ...series.map(({ label }) => label)], rows];
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
    const ariaLabel = details.querySelector("summary").textContent;
    Object.assign(box, { className: "scroll", tabIndex: 0, role: "region", ariaLabel });
    const table = element("table", box);
    const top = element("tr", element("thead", table));
    for (const name of head) element("th", top, name).scope = "col";
    const body = element("tbody", table);
    for (const row of rows) {
      const cells = element("tr", body);
      for (const cell of row) element("td", cells, cell);
    }
  }

  function showEvaluation({ target: select }) {
    const card = select.closest(".samples");
    for (const one of card.querySelectorAll("[data-step]")) one.hidden = one.dataset.step !== select.value;
    for (const head of card.querySelectorAll(".later")) head.textContent = select.selectedOptions[0].textContent;
  }

  const onEach = (selector, event, act) => {
    for (const one of document.querySelectorAll(selector)) one.addEventListener(event, act);
  };

  draw();
  let width = document.body.clientWidth;
  window.addEventListener("resize", () => {
    if (document.body.clientWidth !== width) draw();
    width = document.body.clientWidth;
  });
  onEach("details.numbers", "toggle", showNumbers);
  onEach("select.evaluation", "change", showEvaluation);
  const reload = document.getElementById("reload");
  if (reload) setInterval(() => reload.checked && location.reload(), 5000);
})();
