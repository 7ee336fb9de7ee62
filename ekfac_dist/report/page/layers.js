// The chosen sequence by layer: a bar for each layer's score, and a map of layers × tokens.

const layers = {
  bars: byId("bars"),
  map: byId("map"),
  canvas: byId("map").querySelector("canvas"),
  cross: byId("map").querySelector(".cross"),
  axis: byId("map").querySelector(".axis"),
  cell: null, // [layer, position] under the keyboard focus
  bar: 0,

  get rowHeight() {
    return Math.max(9, Math.min(22, Math.floor(440 / data.layers.length)));
  },

  // Offers the layers to colour tokens by; one that was chosen stays so if there is one like it.
  offer() {
    const select = byId("layer-select");
    const offered = [...select.options].slice(1).map((option) => option.title);
    if (offered.length && offered.join() === data.layers.join()) return;
    select.replaceChildren(
      make("option", { value: "" }, "all"),
      ...data.layers.map((name, k) => make("option", { value: k, title: name }, data.shortNames[k]))
    );
    if (sequence.layer >= data.layers.length) sequence.layer = null;
    select.value = sequence.layer === null ? "" : String(sequence.layer);
    this.bar = 0;
  },

  show() {
    this.cell = null;
    this.mark(null, null);
    if (!sequence.details) return;
    this.drawBars();
    this.drawMap();
  },

  drawBars() {
    const scores = sequence.details.layers;
    const low = Math.min(0, ...scores);
    const span = Math.max(0, ...scores) - low || 1;
    const every = Math.ceil(13 / this.rowHeight);
    this.bars.replaceChildren(
      ...data.layers.map((name, k) => {
        const bar = make("span", { class: `fill ${scores[k] < 0 ? "minus" : "plus"}` });
        bar.style.left = `${(100 * (Math.min(0, scores[k]) - low)) / span}%`;
        bar.style.width = `${(100 * Math.abs(scores[k])) / span}%`;
        const zero = make("span", { class: "zero" });
        zero.style.left = `${(-100 * low) / span}%`;
        const row = make(
          "div",
          {
            class: "bar-row",
            role: "option",
            id: `bar-${k}`,
            "data-layer": k,
            "aria-selected": sequence.layer === k,
            "aria-label": `Layer ${name}, score ${signed(scores[k])}`,
          },
          make("span", { class: "name" }, k % every === 0 ? data.shortNames[k] : ""),
          make("span", { class: "track" }, zero, bar)
        );
        row.style.height = `${this.rowHeight}px`;
        return row;
      })
    );
  },

  // Each device pixel shows the largest absolute score of the tokens that fall on it.
  drawMap() {
    if (!sequence.details) return;
    const positions = sequence.tokens.length - 1;
    const height = this.rowHeight * data.layers.length;
    const width = Math.max(1, Math.round(this.map.clientWidth * devicePixelRatio));
    const image = new ImageData(width, data.layers.length);
    const hues = { true: colour.channels("plus"), false: colour.channels("minus") };
    const { at, limit } = sequence.details;
    for (let k = 0; k < data.layers.length; k += 1) {
      for (let x = 0; x < width; x += 1) {
        const begin = Math.floor((x * positions) / width);
        const end = Math.max(begin + 1, Math.floor(((x + 1) * positions) / width));
        let value = 0;
        for (let t = begin; t < end; t += 1) {
          const here = at(k, t);
          if (Math.abs(here) > Math.abs(value)) value = here;
        }
        const pixel = [...hues[value > 0], 255 * colour.depth(value, limit)];
        image.data.set(pixel, 4 * (k * width + x));
      }
    }
    const flat = make("canvas", { width, height: data.layers.length });
    flat.getContext("2d").putImageData(image, 0, 0);
    this.canvas.width = width;
    this.canvas.height = Math.round(height * devicePixelRatio);
    this.canvas.style.height = `${height}px`;
    const context = this.canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(flat, 0, 0, width, this.canvas.height);
    this.drawAxis(positions);
    byId("layers-note").textContent =
      "Bars: each layer's part of the score. Map: each layer's part at each position, first one " +
      `left${data.ofOutputs ? ", of the token that it predicts" : ""}; ` +
      `its deepest colour is ±${unsigned(limit, 2)}, values rounded to two digits. ` +
      "Choose a layer to colour the tokens above by it.";
  },

  drawAxis(positions) {
    const steps = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000];
    const room = Math.max(2, Math.floor(this.map.clientWidth / 70));
    const step = steps.find((size) => positions / size <= room) || 20000;
    const ticks = [];
    for (let t = 0; t < positions; t += step) {
      const tick = make("span", {}, String(t));
      tick.style.left = `${(100 * (t + 0.5)) / positions}%`;
      if (t + 0.5 < positions * 0.97) ticks.push(tick);
    }
    this.axis.replaceChildren(...ticks);
  },

  // Draws a frame around a cell, or around `number` whole columns where `layer` is null.
  mark(layer, position, number = 1) {
    this.cross.hidden = position === null;
    if (this.cross.hidden) return;
    const style = this.cross.style;
    const width = this.map.clientWidth / (sequence.tokens.length - 1);
    style.left = `${position * width}px`;
    style.width = `${Math.max(2, width * number)}px`;
    style.top = layer === null ? "0" : `${layer * this.rowHeight}px`;
    style.height = `${(layer === null ? data.layers.length : 1) * this.rowHeight}px`;
  },

  point(layer, position) {
    const token = tokenOf(position);
    this.cell = [layer, position];
    sequence.box.querySelector(".active")?.classList.remove("active");
    sequence.active = token;
    sequence.node(token).classList.add("active");
    this.mark(layer, position);
    const value = sequence.details.at(layer, position);
    const [start, end] = [sequence.start(token), sequence.end(token)];
    const lines = [
      ["Layer", data.shortNames[layer]],
      ["Score", signed(value, 2)],
      sequence.inNats(value, 2),
      data.ofOutputs
        ? ["Predicted after", spelled(brief(sequence.text(token - 1)))]
        : ["Predicts", spelled(brief(sequence.text(token + 1)))],
      end - start > 1 ? ["Token", `${token - start + 1} of ${end - start} read together`] : null,
      ["Position", String(position)],
    ].filter((line) => line);
    tooltip.show(
      () => this.cross.getBoundingClientRect(),
      make("p", { class: "quoted" }, ...visible(brief(sequence.text(token)), true)),
      make("dl", {}, ...facts(...lines))
    );
    const named = ["Token", spelled(brief(sequence.text(token)))];
    return [named, ...lines].map((line) => line.join(" ")).join(", ");
  },

  readBar(layer) {
    this.bar = layer;
    const score = sequence.details.layers[layer];
    const row = byId(`bar-${layer}`);
    for (const other of this.bars.querySelectorAll(".active")) other.classList.remove("active");
    row.classList.add("active");
    this.bars.setAttribute("aria-activedescendant", row.id);
    const modules = data.modules
      .map((name, m) => [name, sequence.details.modules[m], data.module_layers[m]])
      .filter((module) => module[2] === layer)
      .map(([name, value]) => [name.startsWith(`${data.layers[layer]}.`)
        ? name.slice(data.layers[layer].length + 1) : name, signed(value)]);
    tooltip.show(
      () => row.getBoundingClientRect(),
      make("p", {}, data.layers[layer]),
      make("dl", {}, ...facts(["Score", signed(score)],
        sequence.inNats(score), ...modules))
    );
  },

  unpoint() {
    for (const node of this.bars.querySelectorAll(".active")) node.classList.remove("active");
    this.bars.removeAttribute("aria-activedescendant");
    sequence.unpoint();
  },

  choose(layer) {
    const select = byId("layer-select");
    select.value = sequence.layer === layer ? "" : String(layer);
    select.dispatchEvent(new Event("change"));
  },
};

const cellUnder = (event) => {
  const box = layers.canvas.getBoundingClientRect();
  const positions = sequence.tokens.length - 1;
  const layer = Math.floor((event.clientY - box.top) / layers.rowHeight);
  const position = Math.floor(((event.clientX - box.left) / box.width) * positions);
  const inside = layer >= 0 && layer < data.layers.length && position >= 0 && position < positions;
  return inside ? [layer, position] : null;
};

layers.bars.addEventListener("pointerover", (event) => {
  const row = event.target.closest(".bar-row");
  if (row) layers.readBar(Number(row.dataset.layer));
});
layers.bars.addEventListener("click", (event) => {
  const row = event.target.closest(".bar-row");
  if (row) layers.choose(Number(row.dataset.layer));
});
layers.bars.addEventListener("focus", () => {
  if (sequence.details && layers.bars.matches(":focus-visible")) layers.readBar(layers.bar);
});
layers.bars.addEventListener("keydown", (event) => {
  const last = data.layers.length - 1;
  const moves = { ArrowDown: layers.bar + 1, ArrowUp: layers.bar - 1, Home: 0, End: last };
  if (event.key === "Enter" || event.key === " ") layers.choose(layers.bar);
  else if (event.key in moves) layers.readBar(Math.max(0, Math.min(last, moves[event.key])));
  else return;
  event.preventDefault();
  event.stopPropagation();
});

for (const kind of ["pointermove", "pointerdown"]) {
  layers.map.addEventListener(kind, (event) => {
    const cell = sequence.details && cellUnder(event);
    if (cell) layers.point(...cell);
  });
}
layers.map.addEventListener("focus", () => {
  if (sequence.details && layers.map.matches(":focus-visible")) say(layers.point(0, 0));
});
layers.map.addEventListener("keydown", (event) => {
  const moves = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
  if (!(event.key in moves) || !sequence.details) return;
  event.preventDefault();
  event.stopPropagation();
  const within = (value, size) => Math.max(0, Math.min(size - 1, value));
  const [layer, position] = layers.cell || [0, 0];
  const [down, right] = moves[event.key];
  say(layers.point(within(layer + down, data.layers.length),
    within(position + right, sequence.tokens.length - 1)));
});
for (const box of [layers.bars, layers.map]) {
  box.addEventListener("blur", () => layers.unpoint());
  box.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse") layers.unpoint();
  });
}
let drawnWidth = 0;
new ResizeObserver(() => {
  if (layers.map.clientWidth === drawnWidth) return;
  drawnWidth = layers.map.clientWidth;
  layers.drawMap();
}).observe(layers.map);
