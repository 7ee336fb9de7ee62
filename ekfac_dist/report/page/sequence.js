// The chosen sequence: its scores, and its tokens as a heat map.

const sequence = {
  box: byId("tokens"),
  tokens: [],
  runs: { starts: [], of: [] },
  details: null,
  layer: null, // the layer whose scores colour the tokens; null for the sum of all
  active: -1, // index of the token under the pointer or keyboard focus
  toNats: null, // nats per unit of score; null without the training set's size

  show(list, place, positive) {
    const index = list.index[place];
    const pair = list.pair[place];
    const score = list.score[place];
    this.tokens = data.sequences[index];
    this.runs = runsOf(this.tokens);
    this.details = data.detailsOf(pair);
    this.toNats = null;
    if (data.inNats) {
      this.toNats = data.normalize !== "none" && score ? list.nats[place] / score : 1 / data.training_size;
    }
    this.active = -1;
    tooltip.hide();
    byId("sequence-title").textContent = `Sequence #${index}`;
    this.tell(list, place, positive);
    byId("sequence-note").hidden = list.note[place] === null;
    byId("sequence-note").textContent = list.note[place] === null ? "" : `Nats: ${list.note[place]}.`;
    this.flag(pair);
    byId("layers").hidden = !this.details;
    for (const node of document.querySelectorAll(".tools label, #legend")) {
      node.hidden = !this.details;
    }
    this.write();
    this.paint();
    layers.show();
  },

  // Where the sequence stands in the list.
  tell(list, place, positive) {
    const index = list.index[place];
    const score = list.score[place];
    byId("sequence-facts").replaceChildren(
      ...facts(
        ["Rank", `${place + 1} of the ${list.index.length} most ${positive ? "positive" : "negative"}`],
        [scoreName(), approximately(list, place)],
        [`Share of all ${score < 0 ? "negative" : "positive"} scores`, signedShare(list.share[place])],
        data.inNats ? ["Nats, first order", signed(list.nats[place])] : null,
        scanned(list, place) ? ["Score in the scan", signed(list.scan_score[place])] : null,
        ["Tokens", grouped.format(this.tokens.length)],
        index in data.origins ? ["Part of row", data.origins[index].join(", from token ")] : null,
        this.details ? [`${percent(data.carried)} held by`, carriers(data.pairs[list.pair[place]])] : null
      )
    );
  },

  // Says of the sequence shown that it is in none of the lists any more.
  tellUnlisted() {
    byId("sequence-facts").replaceChildren(
      ...facts(["Rank", "not among the listed ones, by exact scores"],
        ["Tokens", grouped.format(this.tokens.length)])
    );
  },

  // A score in nats as (name, value); null without the training set's size.
  inNats(score, digits = 3) {
    return data.inNats ? ["Nats, first order", signed(score * this.toNats, digits)] : null;
  },

  // Of token t's run: its first token, the token after its last, its text and its node.
  start(t) {
    return this.runs.starts[this.runs.of[t]];
  },

  end(t) {
    return this.runs.starts[this.runs.of[t] + 1] ?? this.tokens.length;
  },

  text(t) {
    return this.tokens[this.start(t)];
  },

  node(t) {
    return this.box.children[this.runs.of[t]];
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
    this.box.replaceChildren(
      ...this.runs.starts.map((t) => {
        const text = this.tokens[t];
        const blank = /^ +$/.test(text);
        const without = this.details && !this.positions(t).length;
        const kind = without ? "token unscored" : blank ? "token blank" : "token";
        const attributes = { class: kind, "data-t": t };
        if (this.details) Object.assign(attributes, { id: `token-${t}`, role: "option" });
        return make("span", attributes, ...visible(text));
      })
    );
    byId("tokens-note").textContent = this.details
      ? data.ofOutputs
        ? "Each token is shaded by what training on its prediction does: a highlighted token is the " +
          "one that is predicted, from all before it. One without a label, such as a prompt's, has no score."
        : "Position t reads token t and predicts token t + 1: a highlighted token is the one before " +
          "the prediction that it affects. Through attention it can affect later ones too."
      : data.noDetails;
  },

  // The positions whose scores the run that begins at a token has.
  positions(start) {
    const found = [];
    for (let t = start; t < this.end(start); t += 1) {
      const position = positionOf(t);
      if (position >= 0 && position < this.tokens.length - 1) found.push(position);
    }
    return found;
  },

  // The score of the run that begins at a token.
  value(start) {
    const { layer, details } = this;
    return this.positions(start).reduce(
      (sum, p) => sum + (layer === null ? details.positions[p] : details.at(layer, p)), 0);
  },

  limit() {
    return largest(this.runs.starts.map((t) => this.value(t)));
  },

  paint() {
    if (!this.details) return;
    const limit = this.limit();
    for (const t of this.runs.starts) {
      this.node(t).style.backgroundColor = colour.css(this.value(t), limit);
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

  // Marks a token's run, shows the tooltip beside it, and marks its columns in the layers' map.
  point(token) {
    this.unpoint();
    if (!this.details || token < 0 || token >= this.tokens.length) return;
    const t = this.start(token);
    const node = this.node(t);
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
    const positions = this.positions(t);
    layers.mark(null, positions.length ? positions[0] : null, positions.length);
  },

  lines(t) {
    const last = this.tokens.length - 1;
    const end = this.end(t);
    const many = end - t > 1;
    const name = [many ? "Tokens" : "Token", spelled(brief(this.tokens[t]))];
    const positions = this.positions(t);
    const place = many ? `${t} to ${end - 1}` : t;
    const where = data.ofOutputs ? ["Number", `${place} of ${last}`] : ["Position", `${place} of ${last}`];
    if (!positions.length) {
      const why = data.ofOutputs ? "the first token is not predicted" : "the last token predicts nothing";
      return [name, where, ["Score", `none: ${why}`]];
    }
    const value = this.value(t);
    const all = this.details.positions.reduce((sum, one) => sum + Math.abs(one), 0);
    return [
      name,
      [this.layer === null ? "Score" : `Layer ${data.shortNames[this.layer]}`,
        signed(value, this.layer === null ? 4 : 2)],
      this.inNats(value),
      this.layer === null ? ["Of all |scores|", percent(all ? Math.abs(value) / all : 0)] : null,
      data.ofOutputs
        ? t > 0 ? ["Predicted after", spelled(brief(this.text(t - 1)))] : null
        : end > last ? null : ["Predicts", spelled(brief(this.tokens[end]))],
      many ? ["Read together", `${plural(end - t, "token")}, scores summed`] : null,
      where,
    ].filter((line) => line);
  },

  unpoint() {
    if (this.active >= 0) this.node(this.active)?.classList.remove("active");
    this.active = -1;
    this.box.removeAttribute("aria-activedescendant");
    tooltip.hide();
    layers.mark(null, null);
  },

  // As `point`, and scrolls the token into view; for the keyboard.
  read(t) {
    if (!this.details) return;
    if (document.activeElement !== this.box) this.box.focus({ preventScroll: true });
    this.point(Math.max(0, Math.min(this.tokens.length - 1, t)));
    this.node(this.active).scrollIntoView({ block: "nearest" });
    tooltip.move();
  },

  // The first token of the run nearest to the active one in the line above (-1) or below (1).
  nextLine(step) {
    const from = this.node(this.active).getClientRects()[0];
    const { starts, of } = this.runs;
    let [best, line, distance] = [this.active, null, Infinity];
    for (let run = of[this.active] + step; run >= 0 && run < starts.length; run += step) {
      const at = this.box.children[run].getClientRects()[0];
      if (!at || Math.abs(at.top - from.top) < from.height / 2) continue;
      if (line !== null && Math.abs(at.top - line) > from.height / 2) break;
      line = at.top;
      if (Math.abs(at.left - from.left) < distance) {
        [best, distance] = [starts[run], Math.abs(at.left - from.left)];
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
    ArrowRight: () => (t < 0 ? 0 : sequence.end(t)),
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
