// The chosen sequence: what is known of it, and its tokens as a heat map.

const sequence = {
  box: byId("tokens"),
  tokens: [],
  details: null,
  layer: null, // colours the tokens; null is all layers together
  active: -1, // the token that the keyboard or the pointer is at
  toNats: 0, // nats per unit of score

  show(list, place, positive) {
    const index = list.index[place];
    const pair = list.pair[place];
    const [score, nats] = [list.score[place], list.nats[place]];
    this.tokens = data.sequences[index];
    this.details = detailsOf(pair);
    this.toNats = data.normalize !== "none" && score ? nats / score : 1 / data.training_size;
    this.active = -1;
    tooltip.hide();
    byId("sequence-title").textContent = `Sequence #${index}`;
    byId("sequence-facts").replaceChildren(
      ...facts(
        ["Rank", `${place + 1} of the ${list.index.length} most ${positive ? "positive" : "negative"}`],
        [scoreName, signed(score)],
        ["Nats", signed(nats)],
        list.scan_score ? ["Score in the scan", signed(list.scan_score[place])] : null,
        ["Tokens", grouped.format(this.tokens.length)],
        this.details ? [`${percent(data.carried)} held by`, carriers(data.pairs[pair])] : null
      )
    );
    this.flag(pair);
    byId("layers").hidden = !this.details;
    for (const node of document.querySelectorAll(".tools label, #legend")) {
      node.hidden = !this.details;
    }
    this.write();
    this.paint();
    layers.show();
  },

  flag(pair) {
    const box = byId("sequence-flag");
    box.hidden = pair === null || !data.pairs[pair].few;
    if (box.hidden) return;
    const { carriers: number, strongest } = data.pairs[pair];
    const button = make("button", { type: "button", class: "link" }, "Show the strongest");
    button.addEventListener("click", () => this.read(strongest));
    box.replaceChildren(
      make("span", { class: "badge" }, plural(number, "token")),
      ` Few tokens carry nearly all of this score: ${plural(number, "token")} of ` +
        `${this.tokens.length - 1} hold ${percent(data.carried)} of the sum of the absolute ` +
        "token scores. Look at them before you trust the sequence as a whole. ",
      button
    );
  },

  write() {
    const last = this.tokens.length - 1;
    this.box.replaceChildren(
      ...this.tokens.map((text, t) => {
        const blank = /^ +$/.test(text);
        const kind = t === last && this.details ? "token last" : blank ? "token blank" : "token";
        const attributes = { class: kind, "data-t": t };
        if (this.details) Object.assign(attributes, { id: `token-${t}`, role: "option" });
        return make("span", attributes, ...visible(text));
      })
    );
    byId("tokens-note").textContent = this.details
      ? "Position t reads token t and predicts token t + 1: a highlighted token is the one before " +
        "the prediction that it affects. Through attention it can affect later ones too."
      : "This run kept no token scores for this sequence. Run query with --scores.per_token top to see " +
        "which tokens and layers its score comes from.";
  },

  value(t) {
    return this.layer === null ? this.details.tokens[t] : this.details.at(this.layer, t);
  },

  limit() {
    let most = 0;
    for (let t = 0; t < this.tokens.length - 1; t += 1) {
      most = Math.max(most, Math.abs(this.value(t)));
    }
    return most;
  },

  paint() {
    if (!this.details) return;
    const limit = this.limit();
    for (let t = 0; t < this.tokens.length - 1; t += 1) {
      this.box.children[t].style.backgroundColor = colour.css(this.value(t), limit);
    }
    const ticks = [-1, -0.5, 0, 0.5, 1].map((depth) => {
      const tick = make("span", {}, signed(colour.valueAt(depth, limit), 2));
      tick.style.left = `${50 + 50 * depth}%`;
      return tick;
    });
    const legend = byId("legend");
    legend.querySelector(".ticks").replaceChildren(...ticks);
    legend.setAttribute(
      "aria-label",
      `Colours from ${signed(-limit, 2)} (orange) over 0 (none) to ${signed(limit, 2)} (blue)`
    );
  },

  // Points at a token: the tooltip beside it, its column in the layers' map.
  point(t) {
    this.unpoint();
    if (!this.details || t < 0 || t >= this.tokens.length) return;
    const node = this.box.children[t];
    this.active = t;
    node.classList.add("active");
    this.box.setAttribute("aria-activedescendant", node.id);
    const lines = this.lines(t);
    node.setAttribute("aria-label", lines.map(([name, value]) => `${name} ${value}`).join(", "));
    tooltip.show(
      () => node.getClientRects()[0],
      make("p", { class: "quoted" }, ...visible(brief(this.tokens[t]), true)),
      make("dl", {}, ...facts(...lines.slice(1)))
    );
    layers.mark(null, t);
  },

  lines(t) {
    const last = this.tokens.length - 1;
    const name = ["Token", spelled(brief(this.tokens[t]))];
    const where = ["Position", `${t} of ${last}`];
    if (t === last) return [name, where, ["Score", "none: the last token predicts nothing"]];
    const value = this.value(t);
    const all = this.details.tokens.reduce((sum, one) => sum + Math.abs(one), 0);
    return [
      name,
      [this.layer === null ? "Score" : `Layer ${shortNames[this.layer]}`,
        signed(value, this.layer === null ? 4 : 2)],
      ["Nats", signed(value * this.toNats, 3)],
      this.layer === null ? ["Of all |scores|", percent(all ? Math.abs(value) / all : 0)] : null,
      ["Predicts", spelled(brief(this.tokens[t + 1]))],
      where,
    ].filter((line) => line);
  },

  unpoint() {
    if (this.active >= 0) this.box.children[this.active]?.classList.remove("active");
    this.active = -1;
    this.box.removeAttribute("aria-activedescendant");
    tooltip.hide();
    layers.mark(null, null);
  },

  // Points at a token and brings it into view, for the keyboard.
  read(t) {
    if (!this.details) return;
    if (document.activeElement !== this.box) this.box.focus({ preventScroll: true });
    this.point(Math.max(0, Math.min(this.tokens.length - 1, t)));
    this.box.children[this.active].scrollIntoView({ block: "nearest" });
    tooltip.move();
  },

  // The token nearest above (-1) or below (1) the active one.
  nextLine(step) {
    const from = this.box.children[this.active].getClientRects()[0];
    let [best, line, distance] = [this.active, null, Infinity];
    for (let t = this.active + step; t >= 0 && t < this.tokens.length; t += step) {
      const at = this.box.children[t].getClientRects()[0];
      if (!at || Math.abs(at.top - from.top) < from.height / 2) continue;
      if (line !== null && Math.abs(at.top - line) > from.height / 2) break;
      line = at.top;
      if (Math.abs(at.left - from.left) < distance) {
        [best, distance] = [t, Math.abs(at.left - from.left)];
      }
    }
    return best;
  },
};

const carriers = ({ carriers: number, positions }) => `${grouped.format(number)} of ${positions} tokens`;

sequence.box.addEventListener("pointerover", (event) => {
  const node = event.target.closest(".token");
  if (node && event.pointerType === "mouse") sequence.point(Number(node.dataset.t));
});
sequence.box.addEventListener("pointerleave", (event) => {
  if (event.pointerType === "mouse") sequence.unpoint();
});
sequence.box.addEventListener("click", (event) => {
  const node = event.target.closest(".token");
  if (node) sequence.point(Number(node.dataset.t));
  else sequence.unpoint();
});
sequence.box.addEventListener("focus", () => {
  if (sequence.details && sequence.active < 0 && sequence.box.matches(":focus-visible")) {
    sequence.read(0);
  }
});
sequence.box.addEventListener("blur", () => sequence.unpoint());
sequence.box.addEventListener("keydown", (event) => {
  if (!sequence.details || event.ctrlKey || event.metaKey || event.altKey) return;
  const t = sequence.active;
  const moves = {
    ArrowRight: () => t + 1,
    ArrowLeft: () => t - 1,
    ArrowDown: () => (t < 0 ? 0 : sequence.nextLine(1)),
    ArrowUp: () => (t < 0 ? 0 : sequence.nextLine(-1)),
    Home: () => 0,
    End: () => sequence.tokens.length - 1,
  };
  if (!moves[event.key]) return;
  event.preventDefault();
  event.stopPropagation();
  sequence.read(moves[event.key]());
});
