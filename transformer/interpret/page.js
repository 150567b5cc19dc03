// The views of an attention page. A map is a matrix of weights: a row for each query, a column for each key.
"use strict";
(async () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { rows, columns, layers, heads } = data;
  const T = rows.length, S = columns.length;
  const $ = (selector, root = document) => root.querySelector(selector);
  const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
  // Text only ever becomes text.
  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };

  // ---- weights

  // The weight of each 16-bit code, and how strongly it is drawn: by its square root, so that faint ones are seen.
  const weightOf = new Float64Array(65536), strengthOf = new Float32Array(65536);
  for (let code = 1; code < 65536; code++) {
    weightOf[code] = 2 ** (data.octaves * (code - 65535) / 65534);
    strengthOf[code] = Math.sqrt(weightOf[code]);
  }

  async function decode(text) {
    const deflated = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
    const stream = new Blob([deflated]).stream().pipeThrough(new DecompressionStream("deflate"));
    const planes = new Uint8Array(await new Response(stream).arrayBuffer());
    const codes = new Uint16Array(T * S);
    let top = 0;
    for (let i = 0; i < codes.length; i++) {
      codes[i] = planes[i] | planes[codes.length + i] << 8;
      if (codes[i] > top) top = codes[i];
    }
    return { codes, top, at: (t, s) => weightOf[codes[t * S + s]] };
  }

  const decoded = new Map();
  function mapOf(text) {
    if (!decoded.has(text)) decoded.set(text, decode(text));
    return decoded.get(text);
  }

  function number(weight) {
    if (weight === 0) return "0";
    if (weight < weightOf[2]) return "< " + weightOf[2].toExponential(1);
    return weight < 1e-4 ? weight.toExponential(2) : weight.toPrecision(3);
  }

  // ---- colours

  let ramp;
  function readColors() {
    const stops = getComputedStyle(document.documentElement).getPropertyValue("--ramp").trim().split(/\s+/)
      .map(hex => [1, 3, 5].map(start => parseInt(hex.slice(start, start + 2), 16)));
    ramp = Array.from({ length: 256 }, (_, index) => {
      const place = index / 255 * (stops.length - 1), low = Math.min(Math.floor(place), stops.length - 2);
      return stops[low].map((value, channel) => Math.round(value + (place - low) * (stops[low + 1][channel] - value)));
    });
  }
  const ink = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // A map at one pixel a cell, its strongest weight in the strongest colour. What is exactly 0 stays clear.
  function picture(map) {
    const canvas = make("canvas", { width: S, height: T });
    const image = new ImageData(S, T);
    const scale = 255 / (strengthOf[map.top] || 1);
    const pixels = new DataView(image.data.buffer), colors = ramp.map(([red, green, blue]) => (red << 24 | green << 16 | blue << 8 | 255) >>> 0);
    for (let i = 0; i < map.codes.length; i++)
      if (map.codes[i]) pixels.setUint32(4 * i, colors[Math.round(strengthOf[map.codes[i]] * scale)]);
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  }

  // A canvas of so many CSS pixels, sharp on any screen.
  function sized(canvas, width, height) {
    const ratio = Math.min(window.devicePixelRatio || 1, 16000 / Math.max(width, height, 1));
    canvas.width = Math.max(1, Math.round(width * ratio));
    canvas.height = Math.max(1, Math.round(height * ratio));
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    return context;
  }

  // ---- the tooltip next to the pointer

  const tip = $("#tip");
  function showTip(x, y, weight, t, s) {
    $("b", tip).textContent = number(weight);
    $(".query", tip).textContent = `query ${rows[t]} (${t})`;
    $(".key", tip).textContent = `key ${columns[s]} (${s})`;
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const left = x + 16 + width > innerWidth ? x - 16 - width : x + 16;
    tip.style.left = `${clamp(left, 4, Math.max(4, innerWidth - width - 4))}px`;
    tip.style.top = `${clamp(y + 16 + height > innerHeight ? y - 16 - height : y + 16, 4, innerHeight - height - 4)}px`;
  }
  const hideTip = () => { tip.hidden = true; };

  // ---- heat map

  const FONT = "11px ui-monospace, monospace", APART = 11;
  const measure = document.createElement("canvas").getContext("2d");
  measure.font = FONT;

  function shortened(label, width) {
    if (measure.measureText(label).width <= width) return label;
    const letters = [...label];
    while (letters.length > 1 && measure.measureText(letters.join("") + "…").width > width) letters.pop();
    return letters.join("") + "…";
  }
  const longest = (labels, most) => Math.ceil(Math.min(most, Math.max(...labels.map(label => measure.measureText(label).width))));

  // Every n-th label, n = 1, 2, 5, 10 ..., so that they stay apart.
  function stride(cell) {
    for (let power = 1; ; power *= 10)
      for (const base of [1, 2, 5]) if (base * power * cell >= APART) return base * power;
  }

  class HeatMap {
    constructor(section, name) {
      this.section = section;
      section.append($("#heat").content.cloneNode(true));
      this.box = $(".scroll", section);
      this.cells = $(".cells", section);
      this.canvas = $("canvas", this.cells);
      this.cursor = $(".cursor", section);
      this.zoom = $("input", section);
      this.cells.setAttribute("aria-label", `${name}. Move with the arrow keys; each cell's weight is read out.`);
      this.place = null;
      this.zoom.addEventListener("input", () => { this.chosen = this.zoom.valueAsNumber; this.draw(); });
      this.cells.addEventListener("pointermove", event => this.point(event));
      this.cells.addEventListener("pointerdown", event => this.point(event));
      this.cells.addEventListener("pointerleave", () => this.leave());
      this.cells.addEventListener("blur", () => this.leave());
      this.cells.addEventListener("keydown", event => this.key(event));
    }

    async show(text) {
      const wanted = this.wanted = text;
      const map = await mapOf(text);
      if (wanted !== this.wanted) return;
      this.map = map;
      this.draw();
    }

    draw() {
      if (!this.map || this.section.hidden) return;
      const most = innerWidth < 560 ? 64 : 130;
      this.left = longest(rows, most) + 16;
      this.top = Math.max(longest(columns, most) + 16, 34);
      const room = this.section.clientWidth - this.left - 16;
      const largest = Math.max(1, Math.floor(8000 / Math.max(T, S)));
      this.zoom.max = Math.min(40, largest);
      const fit = Math.floor(Math.min(room / S, Math.max(420, innerHeight * .8 - this.top) / T));
      this.cell = this.chosen ?? clamp(fit, Math.min(2, largest), Math.min(30, largest));
      this.zoom.value = this.cell;
      $(".corner", this.section).style.cssText = `width:${this.left}px;height:${this.top}px`;
      // A narrow map keeps room for both words in its corner.
      for (const word of this.section.querySelectorAll(".corner span")) word.hidden = this.left < 58;
      const context = sized(this.canvas, S * this.cell, T * this.cell);
      context.imageSmoothingEnabled = false;
      context.drawImage(picture(this.map), 0, 0, S * this.cell, T * this.cell);
      this.drawAxes();
      this.drawLegend();
    }

    drawLegend() {
      const context = $(".legend canvas", this.section).getContext("2d");
      for (let x = 0; x < 256; x++) {
        // Evenly in weights, so that the ends are 0 and the largest.
        context.fillStyle = `rgb(${ramp[Math.round(Math.sqrt(x / 255) * 255)]})`;
        context.fillRect(x, 0, 1, 1);
      }
      $(".legend .largest", this.section).textContent = number(weightOf[this.map.top]);
    }

    drawAxes() {
      // The outermost labels stay inside, however thin the cells.
      const middle = (index, count) => clamp((index + .5) * this.cell, APART / 2, Math.max(count * this.cell - APART / 2, APART / 2));
      const { cell, left, top } = this, step = stride(cell), [t, s] = this.place ?? [-1, -1];
      const axis = (canvas, width, height, count, active, put) => {
        const context = sized(canvas, width, height);
        context.font = FONT;
        context.textBaseline = "middle";
        for (let index = 0; index < count; index += step) {
          // What the active label would touch makes way for it.
          if (active >= 0 && index !== active && Math.abs(index - active) * cell < APART) continue;
          context.fillStyle = ink("--soft");
          if (index !== active) put(context, index);
        }
        if (active >= 0) {
          context.fillStyle = ink("--accent");
          put(context, active);
        }
      };
      axis($(".left", this.section), left, T * cell, T, t, (context, index) => {
        context.textAlign = "right";
        context.fillText(shortened(rows[index], left - 14), left - 7, middle(index, T));
      });
      axis($(".top", this.section), S * cell, top, S, s, (context, index) => {
        context.save();
        context.translate(middle(index, S), top - 7);
        context.rotate(-Math.PI / 2);
        context.fillText(shortened(columns[index], top - 14), 0, 0);
        context.restore();
      });
    }

    point(event) {
      const box = this.canvas.getBoundingClientRect();
      const t = clamp(Math.floor((event.clientY - box.top) / this.cell), 0, T - 1);
      const s = clamp(Math.floor((event.clientX - box.left) / this.cell), 0, S - 1);
      this.go(t, s, event.clientX, event.clientY);
    }

    key(event) {
      const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -S], End: [0, S], PageUp: [-10, 0], PageDown: [10, 0] };
      if (event.key === "Escape") return this.leave();
      const move = moves[event.key];
      if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      const [t, s] = this.place ?? [-Math.max(move[0], 0), -Math.max(move[1], 0)];
      const next = [clamp(t + move[0], 0, T - 1), clamp(s + move[1], 0, S - 1)];
      this.go(...next);
      this.cursor.scrollIntoView({ block: "nearest", inline: "nearest" });
      const box = this.cursor.getBoundingClientRect();
      showTip(box.right, box.bottom, this.map.at(...next), ...next);
    }

    go(t, s, x, y) {
      if (!this.map) return;
      const moved = !this.place || this.place[0] !== t || this.place[1] !== s;
      this.place = [t, s];
      if (moved) {
        const { cell } = this;
        this.cursor.style.cssText = `left:${s * cell}px;top:${t * cell}px;width:${cell}px;height:${cell}px;scroll-margin:${this.top + 12}px 12px 12px ${this.left + 12}px`;
        this.cursor.hidden = false;
        this.drawAxes();
      }
      if (x !== undefined) showTip(x, y, this.map.at(t, s), t, s);
    }

    leave() {
      this.place = null;
      this.cursor.hidden = true;
      hideTip();
      if (this.map && !this.section.hidden) this.drawAxes();
    }
  }

  // ---- lines from token to token

  const lines = {
    section: $("#lines"), pinned: null, over: null, map: null,
    sides: { rows: [], columns: [] },

    build() {
      for (const [side, labels] of [["rows", rows], ["columns", columns]]) {
        const list = $(`#lines .${side}`);
        labels.forEach((label, index) => {
          const button = make("button", {}, make("span", { textContent: label, title: label }), make("small"));
          button.setAttribute("aria-pressed", "false");
          const on = () => { this.over = { side, index }; this.draw(); };
          const off = () => { this.over = null; this.draw(); };
          button.addEventListener("pointerenter", on);
          button.addEventListener("pointerleave", off);
          button.addEventListener("focus", () => { if (button.matches(":focus-visible")) on(); });
          button.addEventListener("blur", off);
          button.addEventListener("click", () => {
            const same = this.pinned?.side === side && this.pinned.index === index;
            this.pinned = same ? null : { side, index };
            this.draw();
          });
          this.sides[side].push(button);
          list.append(make("li", {}, button));
        });
      }
    },

    async show(text) {
      const wanted = this.wanted = text;
      const map = await mapOf(text);
      if (wanted !== this.wanted) return;
      this.map = map;
      this.draw();
    },

    draw() {
      if (!this.map || this.section.hidden) return;
      const canvas = $("canvas", this.section), focus = this.over ?? this.pinned;
      const height = 24;
      canvas.style.width = "100%";
      const wide = canvas.clientWidth;
      const context = sized(canvas, wide, Math.max(T, S) * height);
      const weight = (t, s) => !focus || (focus.side === "rows" ? focus.index === t : focus.index === s) ? this.map.at(t, s) : 0;
      const strongest = [];
      for (let t = 0; t < T; t++) for (let s = 0; s < S; s++) if (weight(t, s) >= (focus ? .002 : .02)) strongest.push([weight(t, s), t, s]);
      strongest.sort((a, b) => a[0] - b[0]);
      context.strokeStyle = ink("--accent");
      for (const [w, t, s] of strongest.slice(-4000)) {
        context.globalAlpha = focus ? .25 + .75 * Math.sqrt(w) : Math.min(1, .04 + .8 * w * w + .15 * w);
        context.lineWidth = focus ? .8 + 4 * w : .6 + 2 * w;
        context.beginPath();
        context.moveTo(4, (t + .5) * height);
        context.bezierCurveTo(wide / 2, (t + .5) * height, wide / 2, (s + .5) * height, wide - 4, (s + .5) * height);
        context.stroke();
      }
      for (const [side, buttons] of Object.entries(this.sides)) {
        buttons.forEach((button, index) => {
          const chosen = focus?.side === side && focus.index === index;
          const other = focus && focus.side !== side;
          const w = !other ? 0 : side === "columns" ? this.map.at(focus.index, index) : this.map.at(index, focus.index);
          const pressed = this.pinned?.side === side && this.pinned.index === index;
          button.setAttribute("aria-pressed", String(pressed));
          button.style.setProperty("--weight", w);
          button.classList.toggle("lit", w >= .02);
          button.classList.toggle("chosen", Boolean(chosen));
          button.classList.toggle("dim", Boolean(other ? w < .002 : focus && !chosen));
          $("small", button).textContent = other && w >= .002 ? number(w) : "";
        });
      }
    },
  };

  // ---- all heads

  const grid = {
    section: $("#grid"), built: false, buttons: [],

    async draw() {
      if (this.section.hidden) return;
      if (!this.built) this.build();
      // As many heads in a row as fit, and as many in the last one, nearly, as in the others.
      const fit = Math.max(1, Math.floor(this.section.clientWidth / 72));
      this.section.style.setProperty("--across", Math.ceil(heads.length / Math.ceil(heads.length / fit)));
      for (const { button, canvas, layer, head } of this.buttons) {
        button.toggleAttribute("aria-current", layer === state.layer && head === state.head);
        const side = Math.round(150 * Math.min(2, window.devicePixelRatio || 1));
        if (canvas.theme === ramp) continue;
        const map = await mapOf(data.maps[layer][head]);
        canvas.width = canvas.height = side;
        const context = canvas.getContext("2d");
        context.imageSmoothingEnabled = Math.max(T, S) > side;
        context.imageSmoothingQuality = "high";
        context.drawImage(picture(map), 0, 0, side, side);
        canvas.theme = ramp;
      }
    },

    build() {
      this.built = true;
      layers.forEach((layerName, layer) => {
        const thumbs = make("div", { className: "thumbs" });
        heads.forEach((headName, head) => {
          const canvas = make("canvas");
          const button = make("button", { className: "panel" }, canvas, make("span", { textContent: `head ${headName}` }));
          button.setAttribute("aria-label", `Layer ${layerName}, head ${headName}: ${described(layer, head)}`);
          button.title = described(layer, head);
          button.addEventListener("click", () => open(layer, head));
          this.buttons.push({ button, canvas, layer, head });
          thumbs.append(button);
        });
        this.section.append(make("h2", { textContent: `Layer ${layerName}` }), thumbs);
      });
    },
  };

  function described(layer, head) {
    const distance = data.distance ? `, mean distance ${data.distance[layer][head].toFixed(1)} tokens` : "";
    return `entropy ${data.entropy[layer][head].toFixed(2)} bits${distance}`;
  }

  // ---- measures

  function buildMeasures() {
    $("#measures-hint").textContent = "Entropy, in bits: how widely a query spreads its attention; 0 is one single key."
      + (data.distance ? " Mean distance: how many tokens away it looks. Both are averages over the queries." : " It is an average over the queries.");
    const measures = [["Entropy (bits)", data.entropy, 2]];
    if (data.distance) measures.push(["Mean distance (tokens)", data.distance, 1]);
    const entries = layers.flatMap((_, layer) => heads.map((_, head) => ({ layer, head, values: measures.map(measure => measure[1][layer][head]) })));
    const most = measures.map((_, index) => Math.max(1e-9, ...entries.map(entry => entry.values[index])));
    const body = $("#measures tbody"), header = $("#measures thead tr");
    for (const entry of entries) {
      const link = make("button", { textContent: `Layer ${layers[entry.layer]}, head ${heads[entry.head]}` });
      link.addEventListener("click", () => open(entry.layer, entry.head));
      entry.row = make("tr", {}, make("td", {}, link));
      entry.values.forEach((value, index) => {
        const bar = make("i");
        bar.style.width = `${100 * value / most[index]}%`;
        entry.row.append(make("td", {}, make("div", { className: "number" }, make("span", { textContent: value.toFixed(measures[index][2]) }), make("div", {}, bar))));
      });
    }
    const sorters = [["Head", entry => entry.layer * heads.length + entry.head], ...measures.map(([name], index) => [name, entry => entry.values[index]])];
    const sort = (column, direction) => {
      const key = sorters[column][1];
      entries.sort((a, b) => direction * (key(a) - key(b)));
      body.append(...entries.map(entry => entry.row));
      [...header.children].forEach((cell, index) => cell.setAttribute("aria-sort", index !== column ? "none" : direction > 0 ? "ascending" : "descending"));
    };
    sorters.forEach(([name], column) => {
      const cell = make("th", { scope: "col" }, make("button", { textContent: name }));
      cell.firstChild.addEventListener("click", () => sort(column, cell.getAttribute("aria-sort") === "ascending" ? -1 : 1));
      header.append(cell);
    });
    sort(0, 1);
  }

  // ---- what is shown

  const state = { view: "map", layer: 0, head: 0 };
  const views = ["map", "lines", "grid", "measures", "rollout"];
  const heat = new HeatMap($("#map"), "Attention weights");
  const rolled = new HeatMap($("#rollout"), "Attention rollout");

  function render() {
    for (const view of views) {
      const tab = $(`#tab-${view}`), current = view === state.view;
      tab.setAttribute("aria-selected", String(current));
      tab.tabIndex = current ? 0 : -1;
      $(`#${view}`).hidden = !current;
    }
    $("#pick-layer").hidden = !["map", "lines", "rollout"].includes(state.view);
    $("label[for=layer]").textContent = state.view === "rollout" ? "After layer" : "Layer";
    $("#pick-head").hidden = !["map", "lines"].includes(state.view);
    const most = state.view === "rollout" ? data.rollout.length - 1 : layers.length - 1;
    for (const option of $("#layer").options) option.disabled = option.index > most;
    $("#layer").value = Math.min(state.layer, Math.max(most, 0));
    $("#head").value = state.head;
    for (const [name, last] of [["layer", most], ["head", heads.length - 1]]) {
      const [back, forth] = $(`#pick-${name}`).querySelectorAll("button"), value = Number($(`#${name}`).value);
      back.disabled = value <= 0;
      forth.disabled = value >= last;
    }
    hideTip();
    const text = data.maps[state.layer][state.head];
    if (state.view === "map") heat.show(text);
    if (state.view === "lines") lines.show(text);
    if (state.view === "grid") grid.draw();
    if (state.view === "rollout" && data.rollout.length) rolled.show(data.rollout[Number($("#layer").value)]);
  }

  function set(change) {
    Object.assign(state, change);
    render();
  }

  function open(layer, head) {
    set({ view: "map", layer, head });
    $("#tab-map").focus({ preventScroll: true });
    scrollTo({ top: 0 });
  }

  const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
  const size = data.distance ? count(T, "token") : `${count(T, "query token")} × ${count(S, "key token")}`;
  $("#summary").textContent = `${count(layers.length, "layer")} · ${count(heads.length, "head")} · ${size}`;

  layers.forEach((name, index) => $("#layer").append(make("option", { value: index, textContent: name })));
  heads.forEach((name, index) => $("#head").append(make("option", { value: index, textContent: name })));
  for (const name of ["layer", "head"]) {
    $(`#${name}`).addEventListener("change", event => set({ [name]: Number(event.target.value) }));
    $(`#pick-${name}`).querySelectorAll("button").forEach((button, index) =>
      button.addEventListener("click", () => set({ [name]: Number($(`#${name}`).value) + 2 * index - 1 })));
  }
  for (const view of views) {
    const tab = $(`#tab-${view}`);
    tab.addEventListener("click", () => set({ view }));
    tab.addEventListener("keydown", event => {
      const there = views.filter(name => !$(`#tab-${name}`).hidden), place = there.indexOf(view);
      const next = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: there.length - 1 }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      set({ view: there[(next + there.length) % there.length] });
      $(`#tab-${state.view}`).focus();
    });
  }

  // Rollout needs rows and columns to be the same tokens.
  $("#tab-rollout").hidden = !data.distance;
  const through = data.rollout.length;
  $("#rollout-hint").textContent = !through
    ? "Rollout follows tokens through the layers from layer 0 on, which is not among those captured."
    : "How much of each input token reaches each position after the chosen layer: the captured heads’ average and the residual connection, half each, multiplied from layer 0 on (Abnar & Zuidema 2020)."
      + (through < layers.length ? ` Layers with a gap before them have none: it ends at layer ${layers[through - 1]}.` : "");
  if (!through) for (const part of [...$("#rollout").children].slice(1)) part.remove();

  readColors();
  lines.build();
  buildMeasures();
  render();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readColors(); render(); });
  let waiting;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(render, 80); });
})();
