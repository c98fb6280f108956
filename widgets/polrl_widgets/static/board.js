// Shows what a Board sends. Everything is drawn on canvases by sketch.js, which stands before this file; plotly takes a
// chart over while somebody points at it, to zoom and to read values, and rests between its drawings.
const REST = 6; // plotly rests this many times as long as it drew
const LONELY = 120; // ms until it goes on drawing without a new message, whose frame it would rather share
const ANSWER = 120; // ms that pictures leave to the answer to a slider's move
const HOLD = 500; // ms that they wait at the most while a slider keeps moving
const ACK_EVERY = 2000; // ms between two messages to the kernel: each interrupts the training, and JupyterLab tells of it
const ACK_SOON = 700; // ms where many messages have come
const MANY = 8;
const ASK_EVERY = 2000; // ms between two requests for everything, until it comes
const SKETCH_EVERY = 400; // ms between two drawings, which the training pays for on two cores; words may come faster
const MAX_MARKS = 60; // of one kind, as on the Python side
const CHART_WIDTH = 300; // narrowest chart, px
const POINTED = 150; // ms after the pointer began to move there until plotly takes over
const LEFT = 1500; // ms until it hands back
const FETCH_EVERY = 8000; // ms between two requests for it, while somebody points: a busy page may lose it

function make(tag, className, parent, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// "test_accuracy", "train_accuracy" share their last word, which the title says already: a legend does without.
function shortNames(names) {
  const tails = new Set(names.map((name) => name.split("_").slice(1).pop()));
  const drop = names.length > 1 && tails.size === 1 && !tails.has(undefined);
  return names.map((name) => (drop ? name.split("_").slice(0, -1) : name.split("_")).join(" "));
}

// A legend of the page's own, in the heading: plotly's takes room from the picture and moves it.
function makeLegend(caption, items) {
  const legend = make("span", "polrl-legend", caption);
  for (const { name, dash, color } of items) {
    const sample = make("i", `polrl-dash polrl-dash-${dash ?? "solid"}`);
    if (color) sample.style.borderColor = color;
    make("span", "", legend, name).prepend(sample);
  }
  return legend;
}

const cssName = (name) => name.replace(/[^\w-]/g, "-");
const keyOf = (...parts) => parts.join("\u0000");
// a DataView may begin anywhere in its buffer; typed arrays need aligned bytes
const bytesOf = (view) => view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength);

// ---------------------------------------------------------------------------------------------- the data

// What the page knows of a run: filled by messages, read by every display of the widget.
class Store {
  constructor() {
    this.n = 0;
    this.whole = false;
    this.setup = { charts: [], tracks: [], marks: [], hidden: [], palette: ["#0072B2"], ghost: "#888888", sliders: {} };
    this.clear();
  }

  clear() {
    this.series = new Map();
    this.views = new Map();
    this.words = new Map();
    this.message = { text: "", level: "info" };
  }

  curve(track, metric) {
    const key = keyOf(track, metric);
    if (!this.series.has(key)) this.series.set(key, { x: [], y: [] });
    return this.series.get(key);
  }

  // Take one message in; return what changed, or null if an earlier one is missing.
  take(content, buffers) {
    if (!content.whole && content.n !== this.n + 1) return null;
    this.n = content.n;
    if (content.whole) this.clear();
    const changed = { setup: Boolean(content.setup), metrics: new Set(), marks: false, views: [] };
    if (content.setup) this.adopt(content.setup);
    if (content.message) this.message = content.message;
    for (const [track, words] of Object.entries(content.words)) this.words.set(track, words);
    if (content.marks) {
      changed.marks = true;
      for (const mark of content.marks) this.addMark(mark);
    }
    this.takePoints(content.series, new Float64Array(bytesOf(buffers[0])), changed);
    this.takeViews(content.views, buffers.slice(1), changed);
    return changed;
  }

  adopt(setup) {
    this.setup = setup;
    const known = new Map(setup.tracks.map((track) => [track.id, track]));
    for (const key of this.series.keys()) if (!known.has(key.split("\u0000")[0])) this.series.delete(key);
    for (const key of this.words.keys()) if (!known.has(key)) this.words.delete(key);
    for (const [key, view] of this.views) {
      if (!known.has(view.track) || known.get(view.track).ghost || setup.hidden.includes(view.name)) this.views.delete(key);
    }
  }

  addMark(mark) {
    const marks = this.setup.marks;
    marks.push(mark);
    const alike = marks.filter((other) => other.kind === mark.kind);
    if (alike.length > MAX_MARKS) marks.splice(marks.indexOf(alike[0]), 1);
  }

  takePoints(series, points, changed) {
    let at = 0;
    for (const [track, metric, count, reset] of series) {
      const curve = this.curve(track, metric);
      if (reset) curve.x.length = curve.y.length = 0;
      for (let i = 0; i < count; i++) curve.x.push(points[at + i]);
      for (let i = 0; i < count; i++) curve.y.push(points[at + count + i]);
      at += 2 * count;
      changed.metrics.add(metric);
    }
  }

  takeViews(views, buffers, changed) {
    let at = 0;
    for (const view of views) {
      view.data = view.arrays.map(([name, shape]) => {
        const bytes = bytesOf(buffers[at++]);
        const values = view.kind === "ImageGrid" ? new Uint8ClampedArray(bytes) : new Float32Array(bytes);
        return { name, shape, values };
      });
      const key = keyOf(view.name, view.track);
      this.views.set(key, view);
      changed.views.push(key);
    }
  }
}

// ---------------------------------------------------------------------------------------------- the look

// The colours of the front end, as the style sheet resolves them.
function readTheme(el) {
  const style = getComputedStyle(el);
  const [r, g, b] = (style.color.match(/[\d.]+/g) ?? [0, 0, 0]).map(Number);
  const faded = (alpha) => `rgba(${r},${g},${b},${alpha})`;
  return {
    font: style.color,
    muted: faded(0.68),
    grid: faded(0.12),
    axis: faded(0.3),
    mark: faded(0.55),
    paper: style.backgroundColor,
    family: style.fontFamily,
    dark: r + g + b > 384,
  };
}

function baseLayout(theme, words) {
  const axis = {
    gridcolor: theme.grid,
    linecolor: theme.axis,
    tickfont: { size: 10.5, color: theme.muted },
    zeroline: false,
    showline: true,
    ticks: "",
    nticks: 6,
    exponentformat: "power",
    automargin: false,
  };
  const titled = (text) => (text ? { text, font: { size: 11, color: theme.muted }, standoff: 4 } : { text: "" });
  return {
    autosize: true,
    margin: { l: words.y_label ? 56 : 44, r: 10, t: 8, b: words.x_label ? 36 : 24 },
    font: { family: theme.family, size: 11, color: theme.font },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    hoverlabel: { bgcolor: theme.paper, bordercolor: theme.axis, font: { color: theme.font, size: 11 } },
    showlegend: false,
    xaxis: { ...axis, title: titled(words.x_label) },
    yaxis: { ...axis, title: titled(words.y_label) },
    uirevision: "kept",
  };
}

// A button of plotly's bar that saves the chart with its title, legend and background.
function exportButton(plotly, title, theme) {
  const click = (gd) => {
    const layout = { ...gd.layout, paper_bgcolor: theme().paper, showlegend: true };
    layout.title = { text: title, font: { size: 15 } };
    layout.margin = { l: 64, r: 16, t: 44, b: 44 };
    layout.legend = { orientation: "h", y: -0.15 };
    const filename = `polrl ${title}`.replace(/\W+/g, "-");
    plotly.downloadImage({ data: gd.data, layout }, { format: "png", width: 900, height: 520, scale: 2, filename });
  };
  return { name: "png", title: "Save as PNG", icon: plotly.Icons.camera, click };
}

const DASHES = ["solid", "dot", "dash", "dashdot", "longdash"];

// ---------------------------------------------------------------------------------------------- views

// Images on one canvas, scaled by whole pixels; words beside the rows and above the columns.
function drawImages(body, view, width) {
  const [rows, columns, height, cell, channels = 1] = view.data[0].shape;
  const gap = 1;
  const wide = columns * (cell + gap) - gap;
  const high = rows * (height + gap) - gap;
  if (!body.canvas) {
    body.replaceChildren();
    body.classList.add("polrl-images");
    make("div", "polrl-corner", body);
    body.heads = make("div", "polrl-columns", body);
    body.sides = make("div", "polrl-rows", body);
    body.canvas = make("canvas", "", body);
  }
  const { canvas, heads, sides } = body;
  if (canvas.width !== wide || canvas.height !== high || body.width !== width) {
    body.width = width;
    canvas.width = wide;
    canvas.height = high;
    const room = Math.min((width - 90) / wide, 200 / high);
    const scale = room >= 1 ? Math.min(8, Math.floor(room)) : room;
    canvas.style.width = heads.style.width = `${wide * scale}px`;
    canvas.style.height = sides.style.height = `${high * scale}px`;
    heads.replaceChildren(...view.column_labels.map((word) => make("span", "", null, word)));
    sides.replaceChildren(...view.row_labels.map((word) => make("span", "", null, word)));
  }
  const pixels = view.data[0].values;
  const context = canvas.getContext("2d");
  const image = context.createImageData(wide, high);
  const out = new Uint32Array(image.data.buffer);
  let at = 0;
  for (let row = 0; row < rows; row++)
    for (let column = 0; column < columns; column++)
      for (let i = 0; i < height; i++) {
        let to = (row * (height + gap) + i) * wide + column * (cell + gap);
        for (let j = 0; j < cell; j++, at += channels, to++) {
          const red = pixels[at];
          const green = channels === 3 ? pixels[at + 1] : red;
          const blue = channels === 3 ? pixels[at + 2] : red;
          out[to] = (255 << 24) | (blue << 16) | (green << 8) | red;
        }
      }
  context.putImageData(image, 0, 0);
}

const BLUE = [0, 114, 178];
const RED = [213, 94, 0];

// Tokens as text, each on a tint of its number.
function drawTokens(body, view) {
  const { low, high, diverging } = view;
  const lines = view.lines.map((tokens, row) => {
    const line = make("div", "polrl-line");
    tokens.forEach((token, i) => {
      const value = view.data[row].values[i];
      const middle = diverging ? (low + high) / 2 : low;
      const share = (value - middle) / Math.max(Math.abs((value < middle ? low : high) - middle), 1e-12);
      const tint = share < 0 ? RED : BLUE;
      const span = make("span", "polrl-token", line, token);
      span.style.background = `rgba(${tint},${0.6 * Math.min(1, Math.abs(share))})`;
      span.title = `${token} ${value.toPrecision(3)}`;
    });
    return line;
  });
  body.classList.add("polrl-tokens");
  body.replaceChildren(...lines);
}

function ramp(theme, diverging) {
  const opaque = theme.paper && theme.paper !== "rgba(0, 0, 0, 0)"; // it has none while it is out of the page
  const paper = opaque ? theme.paper : theme.dark ? "#111111" : "#ffffff";
  if (diverging) return [[0, "#D55E00"], [0.5, paper], [1, "#0072B2"]];
  return [[0, paper], [0.5, theme.dark ? "#00578a" : "#7fb8d8"], [1, theme.dark ? "#9fd8f7" : "#00426b"]];
}

// Traces and layout of the views that plotly draws.
function viewFigure(view, theme, colors) {
  const layout = baseLayout(theme, view);
  if (view.x_range) layout.xaxis.range = view.x_range;
  if (view.y_range) layout.yaxis.range = view.log_y ? view.y_range.map(Math.log10) : view.y_range;
  if (view.log_x) layout.xaxis.type = "log";
  if (view.log_y) layout.yaxis.type = "log";
  const named = view.data.filter((array) => array.name !== "");
  const color = (i) => colors[i % colors.length];
  const draw = {
    Bars: () => {
      layout.bargap = 0.25;
      return named.map((a, i) => ({ type: "bar", x: view.labels, y: a.values, marker: { color: color(i) } }));
    },
    Histogram: () => {
      layout.yaxis.rangemode = "tozero";
      return named.map((a, i) => ({
        type: "scatter", mode: "lines", x: view.data[0].values, y: [...a.values, a.values.at(-1)],
        fill: "tozeroy", fillcolor: `${color(i)}33`, line: { shape: "hv", width: 1.5, color: color(i) },
      }));
    },
    Lines: () => named.map((a, i) => ({
      type: "scatter", mode: "lines", x: view.data[0].values, y: a.values, line: { width: 1.8, color: color(i) },
    })),
    Points: () => named.map((a, i) => ({
      type: "scatter", mode: "markers", marker: { size: 4, opacity: 0.65, color: color(i) },
      x: a.values.filter((_, k) => k % 2 === 0), y: a.values.filter((_, k) => k % 2 === 1),
    })),
    Heatmap: () => {
      const [rows, columns] = view.data[0].shape;
      const z = Array.from({ length: rows }, (_, r) => view.data[0].values.subarray(r * columns, (r + 1) * columns));
      const ends = view.data[0].values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
      const reach = Math.max(...ends.map(Math.abs));
      layout.yaxis.autorange = "reversed";
      layout.xaxis.showgrid = layout.yaxis.showgrid = false;
      const ticks = (axis, words) => words.length && Object.assign(axis, { tickvals: words.map((_, i) => i), ticktext: words });
      ticks(layout.xaxis, view.column_labels);
      ticks(layout.yaxis, view.row_labels);
      layout.margin.l = Math.max(layout.margin.l, 12 + 5.6 * Math.max(0, ...view.row_labels.map((word) => word.length)));
      return [{
        type: "heatmap", z, colorscale: ramp(theme, view.diverging), xgap: rows * columns < 900 ? 1 : 0,
        ygap: rows * columns < 900 ? 1 : 0, zmin: view.low ?? (view.diverging ? -reach : ends[0]),
        zmax: view.high ?? (view.diverging ? reach : ends[1]),
        colorbar: { thickness: 8, outlinewidth: 0, tickfont: { size: 10, color: theme.muted }, nticks: 4, xpad: 6 },
      }];
    },
  }[view.kind]();
  draw.forEach((trace, i) => (trace.name = named[i]?.name ?? ""));
  return [draw, layout];
}

// ---------------------------------------------------------------------------------------------- one picture

// A canvas that is always there, and plotly in its place while somebody points at it or has zoomed in.
class Stage {
  constructor(body, figure, panel, title) {
    Object.assign(this, { body, figure, panel, title, zoomed: false, taken: false, pointed: false });
    body.classList.add("polrl-stage");
    this.canvas = make("canvas", "", body);
    this.sketch = new Sketch(this.canvas, panel.theme);
    figure.quick = true;
    for (const name of ["pointermove", "pointerdown"]) body.addEventListener(name, (event) => this.point(event));
    body.addEventListener("pointerleave", () => {
      this.pointed = false;
      this.later(() => this.zoomed || this.release(), LEFT);
    });
  }

  // Somebody points: not where a pointer is at rest and the page scrolls under it.
  point({ type, movementX, movementY }) {
    if (this.pointed || (type === "pointermove" && !movementX && !movementY)) return;
    this.pointed = true;
    this.later(() => this.take(), POINTED);
  }

  later(act, wait) {
    clearTimeout(this.timer);
    this.timer = setTimeout(act, wait);
  }

  draw(traces, layout, finish = () => {}) {
    this.last = () => this.draw(traces, layout, finish);
    this.body.figure = { traces, layout }; // what is shown, for tests
    if (this.taken) {
      finish(layout);
      layout.datarevision = this.revision = (this.revision ?? 0) + 1;
      shelf().plotly.react(this.plot, traces, layout, this.config);
    } else {
      this.sketch.theme = this.panel.theme;
      this.sketch.draw(traces, layout);
    }
  }

  take() {
    if (this.taken || this.panel.closed || !this.last || !this.body.matches(":hover")) return;
    const { plotly } = shelf();
    if (!plotly) { // until it has come, or the pointer has left
      this.panel.fetchPlotly();
      this.later(() => this.take(), POINTED);
      return;
    }
    this.taken = true;
    this.figure.quick = false;
    this.plot = make("div", "polrl-plotly", this.body);
    const bar = [[exportButton(plotly, this.title, () => this.panel.theme)], ["zoom2d", "pan2d", "resetScale2d"]];
    this.config = { displaylogo: false, responsive: false, displayModeBar: "hover", modeBarButtons: bar };
    this.last();
    this.canvas.style.visibility = "hidden";
    this.plot.on("plotly_relayout", (change) => {
      this.zoomed = Object.keys(change).some((key) => key.includes(".range")) && !change["xaxis.autorange"];
    });
  }

  release() {
    if (!this.taken) return;
    shelf().plotly.purge(this.plot);
    this.plot.remove();
    this.canvas.style.visibility = "";
    this.taken = false;
    this.figure.quick = true;
    this.last();
  }

}

// ---------------------------------------------------------------------------------------------- one display

class Panel {
  constructor(store, el, painted, tell) {
    this.store = store;
    this.painted = painted;
    this.tell = tell;
    this.el = make("div", "polrl-board", el);
    this.rows = make("div", "polrl-tracks", this.el);
    this.timeline = this.buildTimeline();
    this.message = make("div", "polrl-message", this.el);
    this.message.setAttribute("role", "status");
    this.grid = make("div", "polrl-charts", this.el);
    this.gallery = make("div", "polrl-views", this.el);
    this.charts = new Map();
    this.boxes = new Map();
    this.queue = new Map(); // figure -> function that draws it by plotly, oldest first
    this.quick = new Map(); // the same for what is drawn without plotly
    this.hidden = new Map(); // the same for what is scrolled out of sight
    this.theme = readTheme(this.el);
    this.watch();
    this.refresh();
  }

  watch() {
    this.sight = new IntersectionObserver((entries) => entries.forEach((entry) => {
      entry.target.away = !entry.isIntersecting;
      const draw = this.hidden.get(entry.target);
      if (entry.isIntersecting && draw) this.enqueue(entry.target, draw);
    }));
    this.size = new ResizeObserver(() => {
      this.retheme(); // the first time the display hangs in the page and has colours
      this.arrange();
    });
    this.size.observe(this.el);
    this.colors = new MutationObserver(() => [0, 100, 400, 1500, 5000, 15000].forEach((ms) => setTimeout(() => this.retheme(), ms)));
    for (const node of [document.body, document.documentElement]) {
      this.colors.observe(node, { attributes: true, attributeFilter: ["class", "style", "data-jp-theme-light",
        "data-jp-theme-name", "data-vscode-theme-kind", "theme"] });
    }
    this.scheme = matchMedia("(prefers-color-scheme: dark)");
    this.onScheme = () => this.retheme();
    this.scheme.addEventListener("change", this.onScheme);
    // While a slider moves, its answer comes first: pictures wait a moment, but are drawn at least every HOLD ms.
    this.onMove = (event) => {
      if (event.type === "pointermove" && !event.buttons) return;
      if (!event.target.closest?.(".noUi-target")) return;
      const place = shelf();
      const until = performance.now() + ANSWER;
      place.freeAt = Math.max(place.freeAt, Math.min(until, (place.drawnAt ?? 0) + HOLD));
      place.quickAt = Math.min(until, (place.sketchedAt ?? 0) + HOLD);
    };
    for (const name of ["keydown", "pointerdown", "pointermove"]) document.addEventListener(name, this.onMove, true);
  }

  close() {
    this.closed = true;
    for (const observer of [this.sight, this.size, this.colors]) observer.disconnect();
    this.scheme.removeEventListener("change", this.onScheme);
    for (const name of ["keydown", "pointerdown", "pointermove"]) document.removeEventListener(name, this.onMove, true);
    for (const { stage } of this.stages()) stage.release();
    this.el.remove();
  }

  *stages() {
    for (const part of [...this.charts.values(), ...this.boxes.values()]) if (part.stage) yield part;
  }

  // Plotly comes when it is first wanted: it is large, and takes the page a second to start.
  fetchPlotly() {
    const place = shelf();
    if (place.begun || performance.now() < (place.askedAt ?? -Infinity) + FETCH_EVERY) return;
    place.askedAt = performance.now();
    this.tell({ type: "library" });
  }

  retheme() {
    const theme = readTheme(this.el);
    if (this.closed || JSON.stringify(theme) === JSON.stringify(this.theme)) return;
    this.theme = theme;
    this.refresh();
  }

  color(track) {
    if (track.ghost) return this.store.setup.ghost;
    const { palette } = this.store.setup;
    const color = palette[track.color % palette.length];
    return color === "ink" ? this.theme.font : color;
  }

  // Rebuild everything from the store.
  refresh() {
    this.buildTracks();
    this.buildCharts();
    this.update({ metrics: null, views: [...this.store.views.keys()] });
    for (const [key, box] of this.boxes) {
      if (this.store.views.has(key)) continue;
      box.figure.remove();
      this.boxes.delete(key);
    }
    this.arrange();
  }

  // Show a change: words now, drawings in turn.
  update({ metrics, views, marks }) {
    this.writeWords();
    for (const chart of this.charts.values()) {
      if (metrics === null || marks || chart.spec.metrics.some((metric) => metrics.has(metric))) {
        this.enqueue(chart.figure, () => this.drawChart(chart));
      }
    }
    for (const key of views) {
      const view = this.store.views.get(key);
      if (view) this.enqueue(this.box(key, view).figure, () => this.drawView(key));
    }
    this.wake();
  }

  enqueue(figure, draw) {
    const wait = figure.away && figure.drawn; // what is out of sight is drawn once, and again when it comes back
    (wait ? this.hidden : figure.quick ? this.quick : this.queue).set(figure, draw);
    if (!wait) this.hidden.delete(figure);
    this.wake();
  }

  wake() {
    this.waking ??= requestAnimationFrame(() => this.tick());
  }

  tick() {
    this.waking = null;
    if (this.closed || !this.el.isConnected) return;
    this.painted();
    if (this.quick.size) this.sketch();
    // Plotly draws in a task of its own: the words of this frame are painted before it begins.
    if (this.queue.size) setTimeout(() => this.drawNext());
  }

  sketch() {
    const wait = Math.max(shelf().quickAt, (this.sketchedAt ?? 0) + SKETCH_EVERY) - performance.now();
    if (wait > 0) {
      clearTimeout(this.waiting);
      this.waiting = setTimeout(() => this.wake(), wait);
      return;
    }
    for (const [figure, draw] of this.quick) {
      this.quick.delete(figure);
      draw();
      figure.drawn = true;
    }
    shelf().sketchedAt = this.sketchedAt = performance.now();
  }

  rest() {
    clearTimeout(this.resting);
    this.resting = setTimeout(() => this.wake(), Math.max(LONELY, shelf().freeAt - performance.now()));
  }

  // One chart or view; what has waited longest comes first.
  drawNext() {
    const begun = performance.now();
    if (this.closed || !this.queue.size) return;
    if (begun < shelf().freeAt) return void this.rest(); // another board may just have drawn
    const [figure, draw] = this.queue.entries().next().value;
    this.queue.delete(figure);
    draw();
    figure.drawn = true;
    const ended = performance.now();
    shelf().freeAt = ended + Math.min(600, REST * (ended - begun));
    shelf().drawnAt = ended;
    if (this.queue.size) this.rest();
  }

  // -- the way back

  // A slider over the steps done so far: dragged back and let go, it rewinds.
  buildTimeline() {
    const row = make("label", "polrl-timeline", this.el, "rewind");
    const slider = make("input", "", row);
    const words = make("output", "", row);
    Object.assign(slider, { type: "range", min: 0, max: 0, value: 0, step: 1 });
    slider.setAttribute("aria-label", "drag back to an earlier step and go on from there");
    slider.addEventListener("input", () => {
      row.held = true;
      put(words, `to step ${Number(slider.value).toLocaleString("en-US")}`);
    });
    slider.addEventListener("change", () => {
      row.held = false;
      put(words, "");
      this.tell({ type: "rewind", step: Number(slider.value) });
    });
    return Object.assign(row, { slider });
  }

  writeTimeline() {
    const { timeline } = this;
    timeline.hidden = !this.store.setup.timeline;
    if (timeline.hidden || timeline.held) return;
    timeline.slider.max = Math.max(0, ...[...this.tracks.keys()].map((id) => this.store.words.get(id)?.step ?? 0));
    timeline.slider.value = timeline.slider.max;
  }

  // -- words

  buildTracks() {
    const shown = this.store.setup.tracks.filter((track) => !track.ghost);
    this.tracks = new Map();
    this.rows.replaceChildren();
    for (const track of shown) {
      const row = make("div", "polrl-track", this.rows);
      row.dataset.track = track.id;
      const swatch = make("span", "polrl-swatch", row);
      swatch.style.borderTopColor = this.color(track);
      swatch.style.borderTopStyle = { solid: "solid", dot: "dotted" }[track.dash] ?? "dashed";
      make("span", "polrl-label", row, track.label);
      const count = (name, unit) => {
        const item = make("span", "polrl-count", row);
        const value = make("span", name, item, "0");
        make("span", "polrl-unit", item, unit);
        return value;
      };
      const words = { step: count("polrl-step", "steps"), ups: count("polrl-ups", "updates/s") };
      for (const name of ["phase", "state", "device"]) words[name] = make("span", `polrl-${name}`, row);
      words.applied = make("div", "polrl-applied", row);
      words.values = new Map();
      this.tracks.set(track.id, words);
    }
    this.writeWords(); // no empty words in between
  }

  writeWords() {
    for (const [id, parts] of this.tracks) {
      const words = this.store.words.get(id);
      if (!words) continue;
      put(parts.step, words.step.toLocaleString("en-US"));
      parts.step.dataset.value = words.step;
      put(parts.ups, words.ups === null ? "–" : words.ups.toFixed(words.ups < 10 ? 1 : 0));
      for (const name of ["phase", "state", "device"]) put(parts[name], words[name]);
      parts.state.dataset.state = words.state;
      for (const [name, text] of Object.entries(words.applied)) {
        if (!parts.values.has(name)) {
          const pair = make("span", "polrl-pair", parts.applied);
          make("span", "polrl-unit", pair, name);
          parts.values.set(name, make("span", `polrl-value polrl-applied-${cssName(name)}`, pair));
        }
        put(parts.values.get(name), text);
      }
    }
    this.writeTimeline();
    put(this.message, this.store.message.text);
    this.message.dataset.level = this.store.message.level;
  }

  // -- charts

  buildCharts() {
    const specs = this.store.setup.charts;
    if (this.specs === (this.specs = JSON.stringify(specs))) return;
    for (const { stage } of this.charts.values()) stage.release();
    this.grid.replaceChildren();
    this.charts.clear();
    for (const spec of specs) {
      const figure = make("figure", `polrl-chart polrl-chart-${cssName(spec.id)}`, this.grid);
      const caption = make("figcaption", "", figure);
      make("span", "polrl-title", caption, spec.title);
      make("span", "polrl-unit", caption, [spec.y_label, spec.log && "log", "by step"].filter(Boolean).join(", "));
      if (spec.metrics.length > 1) {
        makeLegend(caption, shortNames(spec.metrics).map((name, i) => ({ name, dash: DASHES[i % DASHES.length] })));
      }
      const plot = make("div", "polrl-plot", figure);
      plot.setAttribute("role", "img");
      plot.setAttribute("aria-label", `${spec.title}: ${spec.metrics.join(", ")} by training step`);
      this.charts.set(spec.id, { spec, figure, stage: new Stage(plot, figure, this, spec.title) });
      this.sight.observe(figure);
    }
  }

  traces(spec) {
    const { tracks } = this.store.setup;
    const ordered = [...tracks.filter((t) => t.ghost), ...tracks.filter((t) => !t.ghost)];
    const several = ordered.length > 1;
    return ordered.flatMap((track) => spec.metrics.map((metric, i) => {
      const { x, y } = this.store.curve(track.id, metric);
      const name = [several && track.label, (spec.metrics.length > 1 || !several) && metric].filter(Boolean).join(" · ");
      return {
        type: "scatter", x, y, name, mode: x.length > 24 ? "lines" : "lines+markers", marker: { size: 4 },
        line: { color: this.color(track), width: track.ghost ? 1 : 1.5, dash: i ? DASHES[i % DASHES.length] : track.dash },
        opacity: track.ghost ? 0.6 : 1, hoverinfo: track.ghost ? "skip" : "all",
        hovertemplate: track.ghost ? undefined : "%{y:.4~g}",
      };
    }));
  }

  // Marks are curves on a hidden axis from 0 to 1: one line for many marks, which shapes would draw one by one. Words
  // are a trace of their own, because plotly loses labels of a trace in which some are empty.
  markTraces() {
    const { tracks, marks } = this.store.setup;
    const shown = tracks.filter((track) => !track.ghost);
    const kinds = { knob: "dot", phase: "solid", fork: "dash", rewind: "dash" };
    const base = { type: "scatter", yaxis: "y2", showlegend: false, name: "", opacity: 0.75 };
    // Words at one step are said once, together.
    const atStep = new Map();
    for (const mark of marks) {
      if (mark.kind === "knob" || !shown.some((track) => track.id === mark.track)) continue;
      const first = atStep.get(mark.step);
      if (!first) atStep.set(mark.step, { ...mark, words: new Set([mark.text]) });
      else first.words.add(mark.text);
    }
    const spoken = [...atStep.values()].map(({ words, ...mark }) => ({ ...mark, text: [...words].join(", ") }));
    return shown.flatMap((track) => {
      const color = shown.length > 1 ? this.color(track) : this.theme.mark;
      const prefix = shown.length > 1 ? `${track.label}: ` : "";
      const own = marks.filter((mark) => mark.track === track.id);
      const lines = Object.entries(kinds).map(([kind, dash]) => [dash, own.filter((mark) => mark.kind === kind)]);
      const named = spoken.filter((mark) => mark.track === track.id);
      return [
        ...lines.filter(([, some]) => some.length).map(([dash, some]) => ({
          ...base, mode: "lines", line: { width: 1, dash, color },
          x: some.flatMap(({ step }) => [step, step, null]), y: some.flatMap(() => [0, 1, null]),
          text: some.flatMap(({ text }) => [prefix + text, prefix + text, ""]), hovertemplate: "%{text}<extra></extra>",
        })),
        ...(named.length ? [{
          ...base, mode: "text", hoverinfo: "skip", x: named.map(({ step }) => step), y: named.map(() => 1),
          text: named.map(({ text }) => text), textposition: "bottom right", textfont: { size: 10, color: this.theme.muted },
        }] : []),
      ];
    });
  }

  // Ticks of a logarithmic axis: 1, 2, 5 over few decades, else whole decades.
  logTicks(spec) {
    let [low, high] = [Infinity, 0];
    for (const { id } of this.store.setup.tracks) {
      for (const metric of spec.metrics) {
        for (const y of this.store.curve(id, metric).y) if (y > 0) [low, high] = [Math.min(low, y), Math.max(high, y)];
      }
    }
    const decades = Math.log10(high / low);
    return decades < 2.5 || !Number.isFinite(decades) ? "D2" : Math.ceil(decades / 6);
  }

  drawChart({ spec, stage }) {
    const layout = baseLayout(this.theme, {});
    layout.xaxis.rangemode = "tozero";
    if (spec.log) layout.yaxis.type = "log";
    stage.draw([...this.traces(spec), ...this.markTraces()], layout, () => {
      if (spec.log) Object.assign(layout.yaxis, { tickformat: "~g", dtick: this.logTicks(spec) });
      layout.hovermode = "x unified";
      layout.yaxis2 = { overlaying: "y", range: [0, 1], visible: false, fixedrange: true };
    });
  }

  // -- views

  box(key, view) {
    if (!this.boxes.has(key)) {
      const figure = make("figure", `polrl-view polrl-view-${cssName(view.name)} polrl-${view.kind.toLowerCase()}`);
      const caption = make("figcaption", "", figure);
      figure.quick = true;
      const box = { figure, title: make("span", "polrl-title", caption), owner: make("span", "polrl-unit", caption) };
      box.body = make("div", "polrl-body", figure);
      box.body.setAttribute("role", "img");
      if (view.kind !== "ImageGrid" && view.kind !== "Tokens") box.stage = new Stage(box.body, figure, this, view.title);
      this.boxes.set(key, box);
      const names = [...new Set([...this.store.views.values()].map((other) => other.name))];
      figure.style.order = names.indexOf(view.name); // the same view of several tracks side by side
      this.gallery.append(figure);
      this.sight.observe(figure);
    }
    return this.boxes.get(key);
  }

  drawView(key) {
    const view = this.store.views.get(key);
    const box = this.boxes.get(key);
    if (!view || !box) return;
    const tracks = this.store.setup.tracks.filter((track) => !track.ghost);
    const track = tracks.find((other) => other.id === view.track);
    put(box.title, view.title);
    put(box.owner, tracks.length > 1 && track ? track.label : "");
    box.body.setAttribute("aria-label", view.alt);
    if (view.kind === "ImageGrid") return drawImages(box.body, view, this.gallery.clientWidth);
    if (view.kind === "Tokens") return drawTokens(box.body, view);
    const palette = this.store.setup.palette.filter((color) => color !== "ink");
    const [traces, layout] = viewFigure(view, this.theme, palette);
    const items = traces.length > 1 ? traces.map(({ name }, i) => ({ name, color: palette[i % palette.length] })) : [];
    if (box.items !== (box.items = JSON.stringify(items))) {
      box.legend?.remove();
      box.legend = makeLegend(box.title.parentNode, items);
    }
    box.stage.draw(traces, layout);
  }

  // As many columns as fit, with rows of about equal length.
  arrange() {
    const width = this.el.clientWidth;
    if (!width || !this.charts.size) return;
    const most = Math.max(1, Math.floor(width / CHART_WIDTH));
    const columns = Math.ceil(this.charts.size / Math.ceil(this.charts.size / most));
    this.grid.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;
    if (width === this.lastWidth) return;
    this.lastWidth = width;
    for (const { stage } of this.stages()) if (stage.taken) shelf().plotly.Plots.resize(stage.plot);
    for (const chart of this.charts.values()) this.enqueue(chart.figure, () => this.drawChart(chart));
    for (const [key, { figure }] of this.boxes) this.enqueue(figure, () => this.drawView(key));
  }
}

// ---------------------------------------------------------------------------------------------- slider names

// Keep the accessible names of the sliders below one element, those displayed later included.
class SliderNames {
  constructor() {
    this.roots = new Map();
  }

  follow({ root, names }) {
    this.names = names;
    if (!root) return;
    for (const el of document.querySelectorAll(`.${CSS.escape(root)}`)) {
      if (!this.roots.has(el)) {
        const observer = new MutationObserver(() => this.apply(el));
        observer.observe(el, { childList: true, subtree: true, characterData: true, attributeFilter: ["aria-valuetext"] });
        this.roots.set(el, observer);
      }
      this.apply(el);
    }
    for (const [el, observer] of this.roots) {
      if (el.isConnected) continue;
      observer.disconnect();
      this.roots.delete(el);
    }
  }

  apply(root) {
    const set = (node, name, value) => node.getAttribute(name) !== value && node.setAttribute(name, value);
    for (const [css, name] of Object.entries(this.names)) {
      for (const slider of root.querySelectorAll(`.${CSS.escape(css)}`)) {
        const text = slider.querySelector(".widget-readout")?.textContent;
        for (const handle of slider.querySelectorAll(".noUi-handle")) {
          set(handle, "aria-label", name);
          if (text) set(handle, "aria-valuetext", text);
        }
        for (const input of slider.querySelectorAll("input, select, [contenteditable]")) set(input, "aria-label", name);
      }
    }
  }

  close() {
    for (const observer of this.roots.values()) observer.disconnect();
  }
}

// ---------------------------------------------------------------------------------------------- the widget

// What a board asks the page to do beside drawing.
const ACTS = {
  download({ name, mime }, buffers) {
    const url = URL.createObjectURL(new Blob([bytesOf(buffers[0])], { type: mime }));
    Object.assign(document.createElement("a"), { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  },
  copy({ text }) {
    navigator.clipboard?.writeText(text).catch(() => {}); // the text can be seen and copied by hand as well
  },
};

export default () => {
  const store = new Store();
  const panels = new Set();
  const sliders = new SliderNames();
  let [told, ackAt, ackTimer] = [0, 0, null];

  return {
    initialize({ model }) {
      let askedAt = -Infinity;
      const hello = (again = 0) => {
        if (performance.now() < askedAt + ASK_EVERY / 2) return;
        askedAt = performance.now();
        model.send({ type: "hello", again });
      };
      // A page that is loaded while the kernel is at work may lose its first question, or the answer. And a page so
      // busy that it took two seconds to come this far is deaf: anywidget has given the model up, whose messages no
      // longer arrive, though its own are sent. The kernel tells by the count, and opens the board anew.
      let again = 0;
      const asking = setInterval(() => (store.n ? clearInterval(asking) : hello((again += 1))), ASK_EVERY);
      // The kernel pauses a lab that no page has shown for a while: a page that is open, but hidden, says so.
      const alive = setInterval(() => panels.size && document.hidden && model.send({ type: "alive" }), 10_000);
      model.on("msg:custom", (content, buffers) => {
        if (content.act) return ACTS[content.act](content, buffers);
        const changed = store.take(content, buffers);
        if (!changed) return hello();
        if (changed.setup) sliders.follow(store.setup.sliders);
        for (const panel of panels) changed.setup ? panel.refresh() : panel.update(changed);
      });
      hello();
      return () => {
        clearInterval(alive);
        clearInterval(asking);
        sliders.close();
      };
    },

    render({ model, el }) {
      const tell = () => {
        ackTimer = null;
        if (store.n <= told) return;
        ackAt = performance.now();
        model.send({ type: "painted", n: (told = store.n) });
      };
      const painted = () => {
        const pause = store.n - told < MANY ? ACK_EVERY : ACK_SOON;
        if (pause === ACK_SOON) clearTimeout(ackTimer);
        else if (ackTimer !== null) return;
        ackTimer = setTimeout(tell, ackAt + pause - performance.now());
      };
      const panel = new Panel(store, el, painted, (event) => model.send(event));
      if (!panels.size) model.send({ type: "back" });
      panels.add(panel);
      const timer = setInterval(() => store.setup.sliders.root && sliders.follow(store.setup.sliders), 1000);
      return () => {
        clearInterval(timer);
        panels.delete(panel);
        panel.close();
        if (!panels.size) model.send({ type: "gone" });
      };
    },
  };
};
