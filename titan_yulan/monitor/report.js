"use strict";
// Pure parts first: they need no page.

function niceTicks(low, high, count) {
  if (!(high > low)) return [low];
  const raw = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find((m) => m * power >= raw * 0.75) * power;
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step);
  return ticks.map((value) => Number(value.toPrecision(12)));
}

function logTicks(low, high, count) {
  const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9), decades = last - first + 1;
  if (decades >= 3) {
    const every = Math.ceil(decades / Math.max(2, count));
    const ticks = [];
    for (let p = first; p <= last; p += every) ticks.push(10 ** p);
    return ticks;
  }
  for (const factors of [[1, 2, 3, 5, 7], [1, 2, 5], [1, 3]]) {
    const ticks = [];
    for (let p = first - 1; p <= last + 1; p++)
      for (const m of factors) if (m * 10 ** p >= low * 0.999 && m * 10 ** p <= high * 1.001) ticks.push(Number((m * 10 ** p).toPrecision(3)));
    if (ticks.length < 2) break;
    if (ticks.length <= count + 2) return ticks;
  }
  return niceTicks(low, high, count);
}

// index of the value of a rising list that is nearest to x
function nearest(list, x) {
  let low = 0, high = list.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (list[middle] < x) low = middle + 1; else high = middle;
  }
  return low > 0 && x - list[low - 1] <= list[low] - x ? low - 1 : low;
}

// y of the broken line through (xs, ys) at x; beyond its ends, that of the end
function interpolate(xs, ys, x) {
  if (x <= xs[0]) return xs[0] > 0 ? (ys[0] * Math.max(0, x)) / xs[0] : ys[0];
  const last = xs.length - 1;
  if (x >= xs[last]) return xs[last] > 0 ? (ys[last] * x) / xs[last] : ys[last];
  let i = nearest(xs, x);
  if (xs[i] > x) i--;
  return ys[i] + ((x - xs[i]) / (xs[i + 1] - xs[i])) * (ys[i + 1] - ys[i]);
}

function short(value) {
  const size = Math.abs(value);
  for (const [unit, word] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (size >= unit) return `${Number((value / unit).toPrecision(4))}${word}`;
  if (size !== 0 && size < 1e-4) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(4)));
}

const exact = (value) =>
  value === null || value === undefined ? "–" : Number.isInteger(value) ? value.toLocaleString("en") : String(value);

// sum of each place of several lists; what is null counts as 0
function total(lists, length) {
  const sum = new Array(length).fill(0);
  for (const list of lists) for (let i = 0; i < length; i++) sum[i] += list[i] ?? 0;
  return sum;
}

if (typeof document !== "undefined") start();
else module.exports = { niceTicks, logTicks, nearest, interpolate, short, exact, total };

function start() {
  const data = JSON.parse(document.getElementById("data").textContent);
  const main = data.tables.steps;
  const NS = "http://www.w3.org/2000/svg";
  const view = { unit: "step", zoom: null, cursor: null }; // cursor: steps
  const drawn = [];
  const BAD = ["bad step", "failure", "hang", "damaged checkpoint", "no group", "slow rank"];
  const TURN = ["restart", "rollback", "stop"];
  const markClass = (kind) => (BAD.includes(kind) ? "bad" : TURN.includes(kind) ? "turn" : "");

  const svg = (name, attributes, parent, text) => {
    const node = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  };
  const html = (name, attributes, parent, text) => {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  };

  const toX = (step) => (view.unit === "step" ? step : interpolate(main.step, main.tokens, step));
  const toStep = (x) => (view.unit === "step" ? x : interpolate(main.tokens, main.step, x));
  const whole = () => {
    const first = data.phases[0], last = data.phases[data.phases.length - 1];
    return view.unit === "step" ? [first.first_step, last.last_step] : [first.first_tokens, last.last_tokens];
  };
  const range = () => (view.zoom ? view.zoom.map(toX) : whole());
  const phaseAt = (step) => data.phases.find((phase) => step > phase.first_step && step <= phase.last_step) ?? data.phases[0];

  // a colour for each of eight, then the same with dashes; layers lie on a scale from pale to strong
  const colour = (series) => {
    if (series.layer) {
      const [index, count] = series.layer, place = count < 2 ? 3 : (3 * index) / (count - 1), low = Math.min(2, Math.floor(place));
      return `color-mix(in oklab, var(--s${low + 1}) ${Math.round((place - low) * 100)}%, var(--s${low}))`;
    }
    return `var(--c${series.color % 8})`;
  };
  const dashes = (series) => (series.layer ? "" : ["", "6 3", "2 2", "8 2 2 2"][Math.floor(series.color / 8) % 4]);
  const paint = (node, series, what) => {
    node.style[what] = colour(series);
    if (what === "stroke" && dashes(series)) node.style.strokeDasharray = dashes(series);
    return node;
  };

  function redrawAll() {
    for (const one of drawn) one.draw();
    resetButton.disabled = !view.zoom;
  }
  function zoomTo(from, to) {
    const [low, high] = whole().map(toStep);
    const steps = [Math.max(low, Math.min(from, to)), Math.min(high, Math.max(from, to))];
    if (steps[1] - steps[0] < Math.max(1, (high - low) / 1e5)) return;
    view.zoom = steps[0] <= low && steps[1] >= high ? null : steps;
    redrawAll();
  }
  function setCursor(step, owner) {
    view.cursor = step;
    for (const one of drawn) one.showCursor(step, one === owner);
  }

  // Everything that charts and the timeline share: size, x axis, bands, cursor, zoom, keys.
  class Panel {
    constructor(parent, title, unit) {
      this.figure = html("figure", {}, parent);
      this.caption = html("figcaption", {}, this.figure);
      const head = html("h3", {}, this.caption, title);
      if (unit) html("span", { class: "unit" }, head, ` ${unit}`);
      this.buttons = html("span", {}, this.caption);
    }
    mount(label) {
      this.svg = svg("svg", { class: "plot", tabindex: 0, role: "group", "aria-label": label, focusable: "true" }, this.figure);
      this.spoken = html("div", { class: "hidden", "aria-live": "polite" }, this.figure);
      this.readout = html("div", { class: "readout", hidden: "" }, this.figure);
      this.listen();
      drawn.push(this);
      new ResizeObserver(() => { if (this.figure.clientWidth !== this.seen) this.draw(); }).observe(this.figure);
    }
    frame(height, left) {
      this.seen = this.figure.clientWidth;
      this.width = Math.max(200, this.svg.clientWidth || 600);
      this.height = height;
      this.box = { left, right: this.width - 12, top: 16, bottom: height - 34 };
      this.svg.setAttribute("viewBox", `0 0 ${this.width} ${height}`);
      this.svg.style.height = `${height}px`;
      this.svg.replaceChildren();
      [this.low, this.high] = range();
      const { right, top, bottom } = this.box;
      this.x = (value) => left + ((value - this.low) / (this.high - this.low || 1)) * (right - left);
      this.unX = (pixel) => this.low + ((pixel - left) / (right - left)) * (this.high - this.low);
      const clip = `clip${drawn.indexOf(this)}`;
      // a little more than the frame, for the dots at its edges
      svg("rect", { x: left - 4, y: top - 4, width: right - left + 8, height: bottom - top + 8 }, svg("clipPath", { id: clip }, svg("defs", {}, this.svg)));
      this.back = svg("g", { "clip-path": `url(#${clip})` }, this.svg);
      this.bands(top, bottom);
      this.inside = svg("g", { "clip-path": `url(#${clip})` }, this.svg);
      for (const tick of niceTicks(this.low, this.high, (right - left) / 90)) {
        svg("line", { class: "axis", x1: this.x(tick), x2: this.x(tick), y1: bottom, y2: bottom + 4 }, this.svg);
        svg("text", { x: this.x(tick), y: bottom + 16, "text-anchor": "middle" }, this.svg, short(tick));
      }
      svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }, this.svg);
      svg("text", { x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, this.svg, view.unit === "step" ? "step" : "tokens");
      this.over = svg("g", {}, this.svg);
    }
    bands(top, bottom) {
      let written = -Infinity;
      data.phases.forEach((phase, index) => {
        const ends = view.unit === "step" ? [phase.first_step, phase.last_step] : [phase.first_tokens, phase.last_tokens];
        const [from, to] = ends.map((end) => Math.max(this.box.left, Math.min(this.box.right, this.x(end))));
        if (to <= from) return;
        if (index % 2 === 0) svg("rect", { class: "band", x: from, y: top, width: to - from, height: bottom - top }, this.back);
        const room = phase.name.length * 6.2 + 6;
        if (to - from > room && (from + to - room) / 2 > written) {
          svg("text", { class: "phase", x: (from + to) / 2, y: top - 5, "text-anchor": "middle" }, this.svg, phase.name);
          written = (from + to + room) / 2;
        }
      });
    }
    marks(top, bottom) {
      const seen = new Set();
      for (const mark of data.marks) {
        const kind = markClass(mark.kind), x = this.x(toX(mark.step)), place = `${kind}${Math.round(x)}`;
        if (!kind || x < this.box.left || x > this.box.right || seen.has(place)) continue;
        seen.add(place);
        svg("line", { class: `mark ${kind}`, x1: x, x2: x, y1: top, y2: bottom }, this.inside);
      }
    }
    listen() {
      let from = null;
      const at = (event) => {
        const bounds = this.svg.getBoundingClientRect();
        const pixel = ((event.clientX - bounds.left) / bounds.width) * this.width;
        return Math.max(this.box.left, Math.min(this.box.right, pixel));
      };
      this.svg.addEventListener("pointerdown", (event) => {
        if (event.button !== 0) return;
        from = at(event);
        this.svg.setPointerCapture(event.pointerId);
        setCursor(this.snap(toStep(this.unX(from))), this);
      });
      this.svg.addEventListener("pointermove", (event) => {
        const now = at(event);
        if (from !== null && Math.abs(now - from) > 4) {
          this.over.querySelector(".select")?.remove();
          const { top, bottom } = this.box;
          svg("rect", { class: "select", x: Math.min(from, now), y: top, width: Math.abs(now - from), height: bottom - top }, this.over);
        }
        setCursor(this.snap(toStep(this.unX(now))), this);
      });
      this.svg.addEventListener("pointerup", (event) => {
        const now = at(event), begin = from;
        from = null;
        this.over.querySelector(".select")?.remove();
        if (begin !== null && Math.abs(now - begin) > 8) zoomTo(toStep(this.unX(begin)), toStep(this.unX(now)));
      });
      this.svg.addEventListener("pointercancel", () => { from = null; this.over.querySelector(".select")?.remove(); });
      // a finger that is lifted leaves too; its read-out stays until another place is tapped
      this.svg.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") setCursor(null, this); });
      this.svg.addEventListener("blur", () => setCursor(null, this));
      this.svg.addEventListener("dblclick", () => { view.zoom = null; redrawAll(); });
      this.svg.addEventListener("keydown", (event) => this.key(event));
    }
    key(event) {
      const places = this.places(), [low, high] = range().map(toStep);
      const inside = places.filter((step) => step >= low && step <= high);
      const now = view.cursor === null ? -1 : nearest(inside, view.cursor), last = inside.length - 1;
      const centre = view.cursor ?? (low + high) / 2;
      const jump = event.shiftKey ? 10 : 1;
      const moves = { ArrowRight: Math.min(last, now + jump), ArrowLeft: Math.max(0, now < 0 ? last : now - jump), Home: 0, End: last };
      if (event.key in moves && inside.length) {
        setCursor(inside[moves[event.key]], this);
        this.spoken.textContent = this.readout.innerText;
      } else if (event.key === "+" || event.key === "=") zoomTo(centre - (centre - low) / 2, centre + (high - centre) / 2);
      else if (event.key === "-") zoomTo(centre - (centre - low) * 2, centre + (high - centre) * 2);
      else if (event.key === "0" || event.key === "Escape") { view.zoom = null; redrawAll(); }
      else if (event.key === "l" && this.toggleLog) this.toggleLog();
      else return;
      event.preventDefault();
    }
    snap(step) {
      const places = this.places();
      return places.length ? places[nearest(places, step)] : step;
    }
    showCursor(step, own) {
      this.over?.querySelectorAll(".cursor").forEach((node) => node.remove());
      this.readout.hidden = true;
      if (step === null || !this.box) return;
      const x = this.x(toX(step));
      if (x < this.box.left - 1 || x > this.box.right + 1) return;
      svg("line", { class: "cursor", x1: x, x2: x, y1: this.box.top, y2: this.box.bottom }, this.over);
      if (own) this.tell(step, x);
    }
    tell(step, x) {
      this.readout.replaceChildren();
      const tokens = Math.round(interpolate(main.step, main.tokens, step));
      html("div", {}, this.readout, `step ${exact(step)} · ${short(tokens)} tokens · ${phaseAt(step).name}`);
      const rows = this.rows(step);
      const table = html("table", {}, this.readout);
      for (const { series, name, text } of rows.slice(0, 10)) {
        const row = html("tr", {}, table), head = html("th", {}, row);
        if (series) head.append(swatch(series), " ");
        head.append(name);
        html("td", {}, row, text);
      }
      if (rows.length > 10) html("div", {}, this.readout, `and ${rows.length - 10} more`);
      this.readout.hidden = false;
      const plot = this.svg.getBoundingClientRect(), frame = this.figure.getBoundingClientRect();
      const place = plot.left - frame.left + (x * plot.width) / this.width;
      // beside the cursor, on the side with more room, but never outside the figure
      const left = x > this.width / 2 ? place - this.readout.offsetWidth - 12 : place + 12;
      this.readout.style.left = `${Math.max(2, Math.min(frame.width - this.readout.offsetWidth - 4, left))}px`;
      this.readout.style.top = `${plot.top - frame.top + this.box.top + 4}px`;
    }
    eventsNear(step) {
      const reach = Math.abs(toStep(this.unX(4)) - toStep(this.unX(0)));
      return data.marks.filter((mark) => Math.abs(mark.step - step) <= reach);
    }
  }

  function swatch(series) {
    const node = svg("svg", { width: 18, height: 10, "aria-hidden": "true" });
    if (series.mark === "points") paint(svg("circle", { cx: 9, cy: 5, r: 3.5 }, node), series, "fill");
    else paint(svg("line", { x1: 0, x2: 18, y1: 5, y2: 5, "stroke-width": series.mark === "raw" ? 1 : 3, opacity: series.mark === "raw" ? 0.5 : 1 }, node), series, "stroke");
    return node;
  }

  class Chart extends Panel {
    constructor(chart, parent) {
      super(parent, chart.title, chart.unit && `(${chart.unit})`);
      this.chart = chart;
      if (chart.wide) this.figure.classList.add("broad");
      this.log = chart.log;
      this.stack = chart.kind === "stack";
      if (!this.stack) {
        this.logButton = html("button", { type: "button", class: "plain" }, this.buttons);
        this.logButton.addEventListener("click", () => this.toggleLog());
      }
      this.legend();
      this.mount(`${chart.title}: arrow keys read values, plus and minus zoom, 0 shows all, l changes the axis`);
      if (chart.note) html("p", { class: "note" }, this.figure, chart.note);
    }
    toggleLog() { this.log = !this.log; this.draw(); }
    legend() {
      if (this.chart.series.length < 2) return;
      const box = html("div", { class: "legend" }, this.figure), names = new Map();
      for (const series of this.chart.series) names.set(series.name, [...(names.get(series.name) ?? []), series]);
      for (const [name, group] of names) {
        const button = html("button", { type: "button", "aria-pressed": String(group[0].shown) }, box);
        button.append(swatch(group[0]), name);
        button.addEventListener("click", () => {
          const shown = !group[0].shown;
          for (const series of group) series.shown = shown;
          button.setAttribute("aria-pressed", String(shown));
          this.draw();
        });
      }
    }
    shown() { return this.chart.series.filter((series) => series.shown); }
    places() { return data.tables[this.chart.series[0].table].step; }
    xs(series) { return data.tables[series.table][view.unit === "step" ? "step" : "tokens"]; }
    extent() {
      if (this.stack) return [0, 1];
      let low = Infinity, high = -Infinity;
      for (const series of this.shown()) {
        const xs = this.xs(series);
        xs.forEach((x, i) => {
          if (x < this.low || x > this.high) return;
          for (const value of [series.y[i], series.low?.[i], series.high?.[i]]) {
            if (value === null || value === undefined || (this.log && value <= 0)) continue;
            low = Math.min(low, value); high = Math.max(high, value);
          }
        });
      }
      if (low > high) return this.log ? [0.1, 1] : [0, 1];
      if (this.log) return low === high ? [low / 2, high * 2] : [low / 1.08, high * 1.08];
      const pad = (high - low) * 0.05 || Math.abs(high) * 0.1 || 1;
      return [low >= 0 && low - pad < 0 ? 0 : low - pad, high + pad];
    }
    draw() {
      if (!this.figure.clientWidth) return;
      if (this.logButton) {
        this.logButton.textContent = this.log ? "y: log" : "y: linear";
        this.logButton.setAttribute("aria-label", `y axis is ${this.log ? "logarithmic" : "linear"}; change`);
      }
      this.frame(this.width < 420 ? 220 : 260, 52);
      const { left, right, top, bottom } = this.box, [low, high] = this.extent();
      const scale = this.log ? Math.log : (value) => value, a = scale(low), b = scale(high);
      this.y = (value) => bottom - ((scale(value) - a) / (b - a)) * (bottom - top);
      for (const tick of this.log ? logTicks(low, high, 5) : niceTicks(low, high, 5)) {
        svg("line", { class: "grid-line", x1: left, x2: right, y1: this.y(tick), y2: this.y(tick) }, this.back);
        svg("text", { x: left - 6, y: this.y(tick) + 4, "text-anchor": "end" }, this.svg, this.stack ? `${Math.round(tick * 100)}%` : short(tick));
      }
      if (this.stack) this.areas(); else for (const series of this.shown()) this.curve(series);
      this.marks(top, bottom);
      this.svg.append(this.over);
      this.showCursor(view.cursor, false);
    }
    visible(series) {
      const xs = this.xs(series);
      let first = 0, last = xs.length - 1;
      while (first < last && xs[first + 1] < this.low) first++;
      while (last > first && xs[last - 1] > this.high) last--;
      return [xs, first, last];
    }
    curve(series) {
      const [xs, first, last] = this.visible(series), fine = (v) => v !== null && v !== undefined && !(this.log && v <= 0);
      if (series.mark === "points") {
        const group = svg("g", { "data-series": series.name, class: "points" }, this.inside);
        for (let i = first; i <= last; i++)
          if (fine(series.y[i])) paint(svg("circle", { cx: this.x(xs[i]).toFixed(1), cy: this.y(series.y[i]).toFixed(1), r: 3 }, group), series, "fill");
        return;
      }
      if (series.low) {
        let there = "", back = "";
        for (let i = first; i <= last; i++) {
          if (!fine(series.low[i]) || !fine(series.high[i])) continue;
          const x = this.x(xs[i]).toFixed(1);
          there += `${there ? "L" : "M"}${x} ${this.y(series.high[i]).toFixed(1)}`;
          back = `L${x} ${this.y(series.low[i]).toFixed(1)}${back}`;
        }
        // many ranges above one another would hide the lines
        const opacity = Math.min(0.16, 0.4 / this.shown().length);
        if (there) paint(svg("path", { d: `${there}${back}Z`, class: "range", "fill-opacity": opacity }, this.inside), series, "fill");
      }
      let path = "", pen = "M", alone = [];
      for (let i = first; i <= last; i++) {
        if (!fine(series.y[i])) { pen = "M"; continue; }
        path += `${pen}${this.x(xs[i]).toFixed(1)} ${this.y(series.y[i]).toFixed(1)}`;
        if (pen === "M" && !fine(series.y[i + 1])) alone.push(i);
        pen = "L";
      }
      const attributes = { d: path || "M0 0", class: `curve ${series.mark}`, "data-series": series.name };
      paint(svg("path", attributes, this.inside), series, "stroke");
      for (const i of alone) // a value between two that are missing has no line
        paint(svg("circle", { cx: this.x(xs[i]).toFixed(1), cy: this.y(series.y[i]).toFixed(1), r: 1.4 }, this.inside), series, "fill");
    }
    areas() {
      const xs = this.xs(this.chart.series[0]), shown = this.shown(), hidden = this.chart.series.filter((series) => !series.shown);
      const layers = shown.map((series) => [series, series.y]);
      if (hidden.length) layers.push([null, total(hidden.map((series) => series.y), xs.length)]);
      let below = new Array(xs.length).fill(0);
      const start = Math.min(whole()[0], xs[0]);
      for (const [series, values] of layers) {
        const above = below.map((value, i) => value + (values[i] ?? 0));
        // a value holds for the steps since the one before, so areas have steps and no slopes
        let up = "", down = "", from = this.x(start);
        for (let i = 0; i < xs.length; i++) {
          const to = this.x(xs[i]).toFixed(1);
          up += `${i ? "L" : "M"}${from} ${this.y(above[i]).toFixed(1)}H${to}`;
          down = `L${to} ${this.y(below[i]).toFixed(1)}H${from}${down}`;
          from = to;
        }
        const area = svg("path", { d: `${up}${down}Z`, class: "area", "data-series": series ? series.name : "the rest" }, this.inside);
        area.style.fill = series ? colour(series) : "var(--rest)";
        area.style.fillOpacity = 0.85;
        area.style.stroke = "var(--card)";
        area.style.strokeWidth = 0.5;
        below = above;
      }
    }
    rows(step) {
      const rows = [], x = toX(step), reach = (this.high - this.low) * 0.015;
      for (const series of this.shown()) {
        const xs = this.xs(series), i = nearest(xs, x);
        if (series.mark === "points" && Math.abs(xs[i] - x) > reach) continue;
        if (series.y[i] === null || series.y[i] === undefined) { rows.push({ series, name: series.name, text: "–" }); continue; }
        const spread = series.low && series.low[i] !== series.high[i] ? ` (${exact(series.low[i])} to ${exact(series.high[i])})` : "";
        const at = data.tables[series.table].step[i], where = at !== step ? ` at ${exact(at)}` : "";
        rows.push({ series, name: `${series.name}${where}`, text: this.stack ? `${(100 * series.y[i]).toFixed(2)}%` : exact(series.y[i]) + spread });
      }
      if (this.stack) rows.sort((a, b) => parseFloat(b.text) - parseFloat(a.text));
      const events = this.eventsNear(step).filter((mark) => markClass(mark.kind));
      return [...rows, ...events.slice(0, 4).map((mark) => ({ name: mark.kind, text: `step ${exact(mark.step)}` }))];
    }
  }

  class Timeline extends Panel {
    constructor(parent) {
      super(parent, "What happened, by kind", "");
      this.kinds = [...new Set(data.marks.map((mark) => mark.kind))].sort((a, b) => markClass(b).length - markClass(a).length || a.localeCompare(b));
      this.mount("Events: arrow keys go through them");
      const list = html("details", {}, this.figure);
      html("summary", {}, list, `All ${data.marks.length} as a table`);
      const table = html("table", {}, html("div", { class: "wide" }, list));
      for (const mark of data.marks) {
        const row = html("tr", {}, table);
        html("th", { scope: "row" }, row, `${mark.exact ? "" : "after "}step ${exact(mark.step)}`);
        for (const text of [mark.time, mark.text]) html("td", { style: "text-align: left; white-space: normal" }, row, text);
      }
    }
    places() { return [...new Set(data.marks.map((mark) => mark.step))]; }
    draw() {
      if (!this.figure.clientWidth) return;
      this.frame(this.kinds.length * 20 + 52, Math.min(130, Math.max(...this.kinds.map((kind) => kind.length)) * 6.4 + 10));
      this.kinds.forEach((kind, lane) => {
        const y = this.box.top + lane * 20 + 12;
        svg("text", { x: this.box.left - 6, y: y + 4, "text-anchor": "end" }, this.svg, kind);
        for (const mark of data.marks) {
          if (mark.kind !== kind) continue;
          const x = this.x(toX(mark.step));
          if (x < this.box.left - 1 || x > this.box.right + 1) continue;
          const shape = mark.exact ? `M${x} ${y - 6}l5 6l-5 6l-5 -6Z` : `M${x - 4} ${y - 5}l9 5l-9 5Z`;
          svg("path", { class: `tick ${markClass(kind)}`, d: shape, "data-kind": kind }, this.svg);
        }
      });
      this.svg.append(this.over);
      this.showCursor(view.cursor, false);
    }
    rows(step) {
      return this.eventsNear(step).map((mark) => ({ name: `${mark.exact ? "" : "after "}${exact(mark.step)}`, text: mark.text.slice(0, 120) }));
    }
  }

  // the toolbar
  const toolbar = document.getElementById("toolbar");
  const choice = html("span", { class: "switch" }, toolbar);
  const units = ["step", "tokens"].map((unit) => {
    const button = html("button", { type: "button", "aria-pressed": String(unit === view.unit) }, choice, unit === "step" ? "steps" : "tokens");
    button.addEventListener("click", () => {
      view.unit = unit;
      for (const [other, name] of units) other.setAttribute("aria-pressed", String(name === unit));
      redrawAll();
    });
    return [button, unit];
  });
  const resetButton = html("button", { type: "button", class: "plain", id: "reset", disabled: "" }, toolbar, "show all");
  resetButton.addEventListener("click", () => { view.zoom = null; redrawAll(); });
  html("span", { class: "hint" }, toolbar, "Drag across a chart to zoom all of them; hover, or focus a chart and use the arrow keys, to read values.");

  if (data.marks.length) new Timeline(document.getElementById("timeline"));
  else document.getElementById("events").remove();
  for (const section of document.querySelectorAll("[data-charts]")) {
    const charts = data.charts.filter((chart) => chart.section === section.dataset.charts);
    for (const chart of charts.filter((chart) => !chart.folded)) new Chart(chart, section.querySelector(".grid"));
    const more = section.querySelector(".more");
    more?.addEventListener("toggle", () => {
      const grid = more.querySelector(".grid");
      if (grid.childElementCount) return;
      for (const chart of charts.filter((chart) => chart.folded)) new Chart(chart, grid);
      redrawAll();
    });
  }
  redrawAll();
  addEventListener("beforeprint", redrawAll);
}
