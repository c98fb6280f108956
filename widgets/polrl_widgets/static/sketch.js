// Draws a figure, described as plotly would take it, on a canvas: the few kinds of trace that a board uses, in a
// hundredth of plotly's time. Plotly takes a chart over when somebody points at it.

const SUPERSCRIPT = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
const DENSE = 150; // points of a line
const DASH = { solid: [], dot: [2, 3], dash: [7, 4], dashdot: [7, 3, 2, 3], longdash: [12, 4] };

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

function powerOfTen(exponent) {
  if (exponent >= -3 && exponent <= 3) return String(Number((10 ** exponent).toPrecision(1)));
  return `10${[...String(exponent)].map((sign) => SUPERSCRIPT[sign]).join("")}`;
}

function tickText(value, step) {
  if (Math.abs(value) < step * 1e-6) return "0";
  const size = Math.max(Math.abs(value), step);
  for (const [unit, letter] of [[1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= unit) return `${Number((value / (letter === "k" ? 1e3 : unit)).toPrecision(6))}${letter}`;
  }
  if (step < 1e-4) return Number(value.toPrecision(3)).toExponential().replace("e", "·10^").replace("+", "");
  return value.toFixed(Math.max(0, -Math.floor(Math.log10(step) + 1e-9)));
}

// One axis: from values to pixels. `spec` is plotly's; the ends of a logarithmic range are exponents, as there.
class Axis {
  constructor(spec, arrays, { pad, zero }) {
    this.spec = spec;
    this.log = spec.type === "log";
    const scale = this.log ? Math.log10 : (v) => v;
    let [low, high] = [Infinity, -Infinity];
    if (spec.range) [low, high] = spec.range;
    else {
      for (const values of arrays) {
        for (let i = 0; i < values.length; i++) {
          const v = values[i];
          if (!isNumber(v) || (this.log && v <= 0)) continue;
          if (v < low) low = v;
          if (v > high) high = v;
        }
      }
      if (low > high) [low, high] = this.log ? [0.1, 10] : [0, 1];
      [low, high] = [scale(low), scale(high)];
      const toZero = !this.log && (zero || spec.rangemode === "tozero");
      if (toZero) [low, high] = [Math.min(low, 0), Math.max(high, 0)];
      if (low === high) [low, high] = toZero && low === 0 ? [0, 1] : [low - (Math.abs(low) * 0.1 || 1), high + (Math.abs(high) * 0.1 || 1)];
      const room = (high - low) * pad;
      if (!(toZero && low === 0)) low -= room;
      if (!(toZero && high === 0)) high += room;
    }
    [this.low, this.high] = spec.autorange === "reversed" ? [high, low] : [low, high];
    this.scale = scale;
  }

  place(from, to) {
    this.from = from;
    this.factor = (to - from) / (this.high - this.low);
    return this;
  }

  at(value) {
    return this.from + (this.scale(value) - this.low) * this.factor;
  }

  ticks(most) {
    const { tickvals, ticktext } = this.spec;
    if (tickvals) return tickvals.map((value, i) => [this.at(value), ticktext[i]]);
    const [low, high] = [Math.min(this.low, this.high), Math.max(this.low, this.high)];
    if (this.log) return this.logTicks(low, high);
    const raw = (high - low) / most;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw * 0.999);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-6); i * step <= high + step * 1e-6; i++) found.push([this.at(i * step), tickText(i * step, step)]);
    return found;
  }

  // 1, 2, 5 over few decades, else whole decades.
  logTicks(low, high) {
    const every = high - low < 2.5 ? 0 : Math.ceil((high - low) / 6);
    const found = [];
    for (let exponent = Math.floor(low); exponent <= high; exponent++) {
      for (const digit of every ? [1] : [1, 2, 5]) {
        const place = exponent + Math.log10(digit);
        if (place < low || place > high || (every && exponent % every)) continue;
        const text = digit === 1 ? powerOfTen(exponent) : String(Number((digit * 10 ** exponent).toPrecision(1)));
        found.push([this.from + (place - this.low) * this.factor, text]);
      }
    }
    return found;
  }
}

class Sketch {
  constructor(canvas, theme) {
    this.canvas = canvas;
    this.theme = theme;
  }

  draw(traces, layout) {
    const { canvas } = this;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (!width || !height) return;
    const ratio = globalThis.devicePixelRatio || 1;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    const pen = (this.pen = canvas.getContext("2d"));
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    const heat = traces.find((trace) => trace.type === "heatmap");
    const { l, r, t, b } = layout.margin;
    const box = { left: l, right: width - r - (heat ? 44 : 0), top: t, bottom: height - b };
    const bars = traces.filter((trace) => trace.type === "bar");
    const [x, y] = heat ? this.heatAxes(heat, layout) : this.axes(traces, bars, layout);
    x.place(box.left, box.right);
    y.place(box.bottom, box.top);
    this.frame(x, y, box, layout, heat);
    pen.save();
    pen.beginPath();
    pen.rect(box.left, box.top - 2, box.right - box.left, box.bottom - box.top + 4);
    pen.clip();
    if (heat) this.heat(heat, x, y);
    bars.forEach((trace, i) => this.bars(trace, i, bars.length, x, y));
    const share = new Axis({ range: [0, 1] }, [], {}).place(box.bottom, box.top);
    for (const trace of traces) if (trace.type === "scatter") this.scatter(trace, x, trace.yaxis === "y2" ? share : y, box);
    pen.restore();
    if (heat) this.scaleBar(heat, box);
  }

  axes(traces, bars, layout) {
    const own = traces.filter((trace) => trace.yaxis !== "y2");
    const dots = own.some((trace) => trace.type === "scatter" && trace.mode?.includes("markers"));
    const x = bars.length
      ? new Axis({ ...layout.xaxis, range: [-0.5, bars[0].x.length - 0.5], tickvals: bars[0].x.map((_, i) => i), ticktext: bars[0].x }, [], {})
      : new Axis(layout.xaxis, traces.map((trace) => trace.x), { pad: dots ? 0.03 : 0 });
    const filled = own.some((trace) => trace.fill) || bars.length > 0;
    return [x, new Axis(layout.yaxis, own.map((trace) => trace.y), { pad: 0.06, zero: filled })];
  }

  heatAxes(heat, layout) {
    const [rows, columns] = [heat.z.length, heat.z[0]?.length ?? 0];
    const place = (spec, count) => new Axis({ ...spec, range: spec.autorange === "reversed" ? [-0.5, count - 0.5] : [-0.5, count - 0.5] }, [], {});
    return [place(layout.xaxis, columns), place(layout.yaxis, rows)];
  }

  write(text, x, y, align, size, color = this.theme.muted) {
    this.pen.font = `${size}px ${this.theme.family}`;
    this.pen.fillStyle = color;
    this.pen.textAlign = align;
    this.pen.fillText(text, x, y);
  }

  // Grid, axes, numbers and titles.
  frame(x, y, box, layout, heat) {
    const { pen, theme } = this;
    pen.textBaseline = "middle";
    pen.lineWidth = 1;
    pen.setLineDash([]);
    pen.strokeStyle = theme.grid;
    pen.beginPath();
    let free = -Infinity;
    for (const [place, text] of x.ticks(Math.max(2, Math.floor((box.right - box.left) / 62)))) {
      if (place < box.left - 1 || place > box.right + 1) continue;
      if (layout.xaxis.showgrid !== false && !x.spec.tickvals) {
        pen.moveTo(Math.round(place) + 0.5, box.top);
        pen.lineTo(Math.round(place) + 0.5, box.bottom);
      }
      pen.font = `10.5px ${theme.family}`;
      const half = pen.measureText(text).width / 2;
      if (place - half < free) continue; // no label over its neighbour
      this.write(text, Math.min(place, this.canvas.clientWidth - half - 1), box.bottom + 10, "center", 10.5);
      free = place + half + 5;
    }
    let last = Infinity;
    for (const [place, text] of y.ticks(Math.max(2, Math.floor((box.bottom - box.top) / 30)))) {
      if (place < box.top - 1 || place > box.bottom + 1) continue;
      if (layout.yaxis.showgrid !== false && !heat) {
        pen.moveTo(box.left, Math.round(place) + 0.5);
        pen.lineTo(box.right, Math.round(place) + 0.5);
      }
      if (Math.abs(place - last) < 11) continue;
      this.write(text, box.left - 5, place, "right", 10.5);
      last = place;
    }
    pen.stroke();
    pen.strokeStyle = theme.axis;
    pen.beginPath();
    pen.moveTo(box.left + 0.5, box.top);
    pen.lineTo(box.left + 0.5, box.bottom + 0.5);
    pen.lineTo(box.right, box.bottom + 0.5);
    pen.stroke();
    const titles = [layout.xaxis.title?.text, layout.yaxis.title?.text];
    if (titles[0]) this.write(titles[0], (box.left + box.right) / 2, this.canvas.clientHeight - 8, "center", 11);
    if (titles[1]) {
      pen.save();
      pen.translate(9, (box.top + box.bottom) / 2);
      pen.rotate(-Math.PI / 2);
      this.write(titles[1], 0, 0, "center", 11);
      pen.restore();
    }
  }

  scatter(trace, x, y, box) {
    const { pen } = this;
    pen.globalAlpha = trace.opacity ?? 1;
    const mode = trace.mode ?? "lines";
    if (mode.includes("lines")) this.line(trace, x, y, box);
    if (mode.includes("markers")) this.dots(trace, x, y);
    if (mode === "text") {
      const lower = pen.textBaseline;
      pen.textBaseline = "top";
      trace.x.forEach((at, i) => this.write(trace.text[i], x.at(at) + 3, y.at(trace.y[i]) + 1, "left", trace.textfont.size, trace.textfont.color));
      pen.textBaseline = lower;
    }
    pen.globalAlpha = 1;
  }

  line(trace, x, y, box) {
    const { pen } = this;
    const steps = trace.line.shape === "hv";
    const path = new Path2D();
    // Many points in one column of pixels are one stroke from the lowest to the highest of them.
    const thin = trace.x.length > 3 * (box.right - box.left);
    let [open, column, low, high, first, lastX, lastY] = [false, NaN, 0, 0, NaN, NaN, NaN];
    for (let i = 0; i < trace.x.length; i++) {
      const value = trace.y[i];
      const [px, py] = isNumber(value) && isNumber(trace.x[i]) ? [x.at(trace.x[i]), y.at(value)] : [NaN, NaN];
      if (!Number.isFinite(px) || !Number.isFinite(py)) {
        open = false;
        continue;
      }
      if (open && thin && Math.floor(px) === column) {
        if (py < low || py > high) path.lineTo(px, py);
        [low, high] = [Math.min(low, py), Math.max(high, py)];
        [lastX, lastY] = [px, py];
        continue;
      }
      if (open && steps) path.lineTo(px, lastY);
      if (open) path.lineTo(px, py);
      else {
        path.moveTo(px, py);
        first = px;
      }
      [open, column, low, high, lastX, lastY] = [true, Math.floor(px), py, py, px, py];
    }
    if (trace.fill === "tozeroy" && Number.isFinite(lastX)) {
      const area = new Path2D(path);
      area.lineTo(lastX, y.at(0));
      area.lineTo(first, y.at(0));
      pen.fillStyle = trace.fillcolor;
      pen.fill(area);
    }
    pen.strokeStyle = trace.line.color;
    // Without a graphics card a line of one pixel is drawn five to ten times as fast as a wider one with round joints,
    // and where points are dense it looks no different.
    const dense = trace.x.length > DENSE;
    pen.lineJoin = dense ? "bevel" : "round";
    pen.lineWidth = dense ? 1 : (trace.line.width ?? 1.5);
    pen.setLineDash(DASH[trace.line.dash ?? "solid"] ?? []);
    pen.stroke(path);
    pen.setLineDash([]);
  }

  dots(trace, x, y) {
    const { pen } = this;
    const radius = (trace.marker.size ?? 4) / 2;
    const round = trace.x.length <= 400; // squares are faster, and look alike at this size
    pen.globalAlpha *= trace.marker.opacity ?? 1;
    pen.fillStyle = trace.marker.color ?? trace.line?.color;
    pen.beginPath();
    for (let i = 0; i < trace.x.length; i++) {
      const [px, py] = [x.at(trace.x[i]), y.at(trace.y[i])];
      if (!Number.isFinite(px) || !Number.isFinite(py)) continue;
      if (round) {
        pen.moveTo(px + radius, py);
        pen.arc(px, py, radius, 0, 7);
      } else pen.rect(px - radius, py - radius, 2 * radius, 2 * radius);
    }
    pen.fill();
  }

  bars(trace, place, count, x, y) {
    const { pen } = this;
    const wide = (0.75 / count) * Math.abs(x.factor);
    pen.fillStyle = trace.marker.color;
    for (let i = 0; i < trace.y.length; i++) {
      if (!isNumber(trace.y[i])) continue;
      const left = x.at(i) + (place - count / 2) * wide;
      const [top, bottom] = [y.at(trace.y[i]), y.at(0)];
      pen.fillRect(left, Math.min(top, bottom), Math.max(wide - (count > 1 ? 0.5 : 0), 0.5), Math.abs(bottom - top));
    }
  }

  heat(trace, x, y) {
    const [rows, columns] = [trace.z.length, trace.z[0]?.length ?? 0];
    if (!rows || !columns) return;
    const cells = (this.cells ??= document.createElement("canvas"));
    [cells.width, cells.height] = [columns, rows];
    const pen = cells.getContext("2d");
    const image = pen.createImageData(columns, rows);
    const color = colorScale(trace.colorscale);
    const reach = trace.zmax - trace.zmin || 1;
    for (let row = 0, to = 0; row < rows; row++)
      for (let column = 0; column < columns; column++, to += 4) {
        const value = trace.z[row][column];
        if (!Number.isFinite(value)) continue; // transparent
        image.data.set(color((value - trace.zmin) / reach), to);
      }
    pen.putImageData(image, 0, 0);
    this.pen.imageSmoothingEnabled = false;
    const [left, right, top, bottom] = [x.at(-0.5), x.at(columns - 0.5), y.at(-0.5), y.at(rows - 0.5)];
    this.pen.save();
    if (bottom < top) {
      this.pen.translate(0, top + bottom);
      this.pen.scale(1, -1);
    }
    this.pen.drawImage(cells, left, Math.min(top, bottom), right - left, Math.abs(bottom - top));
    this.pen.restore();
    if (!trace.xgap) return;
    this.pen.strokeStyle = this.theme.paper;
    this.pen.lineWidth = trace.xgap;
    this.pen.beginPath();
    for (let column = 1; column < columns; column++) this.pen.rect(x.at(column - 0.5), Math.min(top, bottom), 0, Math.abs(bottom - top));
    for (let row = 1; row < rows; row++) this.pen.rect(left, y.at(row - 0.5), right - left, 0);
    this.pen.stroke();
  }

  // What the colours of a heatmap mean.
  scaleBar(trace, box) {
    const { pen } = this;
    const left = box.right + 8;
    const color = colorScale(trace.colorscale);
    const gradient = pen.createLinearGradient(0, box.bottom, 0, box.top);
    for (let i = 0; i <= 8; i++) gradient.addColorStop(i / 8, `rgb(${color(i / 8).slice(0, 3)})`);
    pen.fillStyle = gradient;
    pen.fillRect(left, box.top, 8, box.bottom - box.top);
    const axis = new Axis({ range: [trace.zmin, trace.zmax] }, [], {}).place(box.bottom, box.top);
    if (trace.zmax > trace.zmin) for (const [place, text] of axis.ticks(3)) this.write(text, left + 11, place, "left", 10);
  }
}

// From a share between 0 and 1 to [r, g, b, a], between the stops of plotly's colour scale.
function colorScale(stops) {
  const parsed = stops.map(([at, color]) => [at, parseColor(color)]);
  return (share) => {
    const at = Math.min(1, Math.max(0, share));
    const upper = Math.max(1, parsed.findIndex(([stop]) => stop >= at));
    const [[a, from], [b, to]] = [parsed[upper - 1], parsed[upper]];
    const mix = (at - a) / (b - a);
    return [0, 1, 2].map((i) => Math.round(from[i] + (to[i] - from[i]) * mix)).concat(255);
  };
}

function parseColor(color) {
  if (!color.startsWith("#")) return color.match(/[\d.]+/g).slice(0, 3).map(Number);
  const digits = color.length === 4 ? [...color.slice(1)].map((digit) => digit + digit) : color.slice(1).match(/../g);
  return digits.map((pair) => parseInt(pair, 16));
}

