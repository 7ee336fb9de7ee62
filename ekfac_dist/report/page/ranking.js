// The ranked list. Only the visible rows are in the document, so a list of a thousand is drawn as
// fast as one of ten. A `place` is an index in the query's list.

const ranking = {
  box: byId("rows"),
  space: byId("canvas-rows"),
  list: null, // the query's list, as columns (`Ranked` in report/page_data.py)
  positive: true,
  shown: [], // places that pass the filter
  chosen: -1, // place of the chosen sequence
  drawn: new Map(),
  most: 0,
  texts: new Map(),
  height: 0, // of a row, in pixels

  set(list, positive, filter) {
    this.list = list;
    this.positive = positive;
    this.most = largest(list.score);
    const wanted = filter.toLowerCase();
    this.shown = list.index.map((_, place) => place);
    if (wanted) this.shown = this.shown.filter((place) => this.text(place).includes(wanted));
    this.height = parseFloat(getComputedStyle(this.box).getPropertyValue("--row-height"));
    this.clear();
    this.space.style.height = `${this.shown.length * this.height}px`;
    this.box.setAttribute("aria-rowcount", this.shown.length + 1);
    this.box.scrollTop = 0;
    const all = list.index.length;
    const sign = positive ? "positive" : "negative";
    byId("ranking-count").textContent = wanted
      ? `${grouped.format(this.shown.length)} of ${grouped.format(all)}`
      : `${grouped.format(all)} most ${sign}`;
    this.draw();
  },

  // Shows other lists of the same query; a sequence that was in view stays where it was.
  renew(list, positive, filter, index) {
    const { scrollTop, clientHeight } = this.box;
    const line = this.shown.indexOf(this.chosen);
    const offset = line * this.height - scrollTop;
    const inView = line >= 0 && offset > -this.height && offset < clientHeight;
    this.set(list, positive, filter);
    this.select(list.index.indexOf(index));
    const now = this.shown.indexOf(this.chosen);
    this.box.scrollTop = inView && now >= 0 ? now * this.height - offset : scrollTop;
    this.draw();
  },

  // Draws the row of a sequence that has other scores now, and the measures beside all scores.
  update(place) {
    this.most = largest(this.list.score);
    const old = this.drawn.get(place);
    if (old) {
      const row = this.row(place, this.shown.indexOf(place));
      row.style.top = old.style.top;
      old.replaceWith(row);
      this.drawn.set(place, row);
    }
    for (const [other, row] of this.drawn) {
      row.querySelector(".measure").style.width = this.measure(other);
    }
  },

  measure(place) {
    return `${(100 * Math.abs(this.list.score[place])) / (this.most || 1)}%`;
  },

  text(place) {
    const index = this.list.index[place];
    if (!this.texts.has(index)) {
      this.texts.set(index, data.sequences[index].join("").toLowerCase());
    }
    return this.texts.get(index);
  },

  clear() {
    this.drawn.clear();
    this.space.replaceChildren();
    if (!this.shown.length) {
      const why = this.list.index.length ? "No sequence contains this." : "This list is empty.";
      this.space.append(make("p", { class: "note empty" }, why));
    }
  },

  draw() {
    const { height } = this;
    const first = Math.max(0, Math.floor(this.box.scrollTop / height) - 4);
    const last = Math.ceil((this.box.scrollTop + this.box.clientHeight) / height) + 4;
    const wanted = new Set(this.shown.slice(first, last));
    if (this.shown.includes(this.chosen)) wanted.add(this.chosen); // the focused row stays in the document
    for (const [place, row] of this.drawn) {
      if (wanted.has(place)) continue;
      row.remove();
      this.drawn.delete(place);
    }
    for (const place of wanted) {
      if (this.drawn.has(place)) continue;
      const line = this.shown.indexOf(place);
      const row = this.row(place, line);
      row.style.top = `${line * height}px`;
      this.drawn.set(place, row);
      this.space.append(row);
    }
  },

  row(place, line) {
    const { index, score, share, nats, note, pair } = this.list;
    const detail = pair[place] === null ? null : data.pairs[pair[place]];
    const cell = (name, ...content) => make("span", { class: name, role: "gridcell" }, ...content);
    const measure = make("span", { class: `measure ${score[place] < 0 ? "minus" : "plus"}` });
    measure.style.width = this.measure(place);
    return make(
      "div",
      {
        class: "row",
        role: "row",
        id: `row-${place}`,
        "data-place": place,
        "aria-rowindex": line + 2,
        "aria-selected": place === this.chosen,
      },
      cell("rank", String(place + 1)),
      cell("score", measure, make("span", {}, approximately(this.list, place))),
      cell("share", signedShare(share[place])),
      data.inNats ? cell("nats", signed(nats[place], 3), beyond(note[place])) : null,
      cell("which", detail && detail.few ? badge(detail) : null,
        this.list.exact?.[place] ? exactMark() : null, `#${index[place]}`),
      cell("excerpt", ...excerpt(data.sequences[index[place]], detail))
    );
  },

  // Selects a row and scrolls to it.
  choose(place) {
    const line = this.shown.indexOf(place);
    if (line < 0) {
      this.select(place);
      return;
    }
    const { height } = this;
    const head = this.box.firstElementChild.offsetHeight;
    const top = line * height;
    const seen = this.box.clientHeight - head;
    if (top < this.box.scrollTop) this.box.scrollTop = top;
    else if (top + height > this.box.scrollTop + seen) this.box.scrollTop = top + height - seen;
    this.select(place);
  },

  select(place) {
    this.drawn.get(this.chosen)?.setAttribute("aria-selected", "false");
    this.chosen = place;
    if (!this.shown.includes(place)) {
      this.box.removeAttribute("aria-activedescendant");
      return;
    }
    this.draw();
    this.drawn.get(place).setAttribute("aria-selected", "true");
    this.box.setAttribute("aria-activedescendant", `row-${place}`);
  },

  // The place a number of rows below the chosen one (above if negative), within the list.
  further(rows) {
    const line = this.shown.indexOf(this.chosen);
    const next = line < 0 ? 0 : Math.max(0, Math.min(this.shown.length - 1, line + rows));
    return this.shown.length ? this.shown[next] : -1;
  },

  page() {
    return Math.max(1, Math.floor(this.box.clientHeight / this.height) - 1);
  },
};

const badge = ({ carriers }) =>
  make("span", { class: "badge", title: `${plural(carriers, "token")} hold ${percent(data.carried)} of it` },
    plural(carriers, "token"));

const exactMark = () =>
  make("span", { class: "exact", role: "img", "aria-label": "scored exactly", title: "scored exactly" }, "✓");

// Mark for an impossible value in nats, with the reason as its title.
const beyond = (note) => (note === null ? null : make("span", { class: "beyond", title: note }, " !"));

// The text around its strongest token; the beginning of the text where that is not known.
function excerpt(tokens, detail) {
  const piece = (text) => visible(text, true);
  if (!detail) return piece(ends(tokens, 0, 220).text);
  const strong = detail.strongest;
  const before = ends(tokens.slice(0, strong).reverse(), 0, 48, true);
  return [
    before.cut ? "…" : "",
    ...piece(before.text),
    make("b", {}, ...piece(ends([tokens[strong]], 0, 60).text)),
    ...piece(ends(tokens, strong + 1, 160).text),
  ];
}

// The first `size` characters of the joined tokens from index `from` on, or the last ones of
// reversed tokens; `cut` says whether there are more.
function ends(tokens, from, size, reversed = false) {
  const found = [];
  let length = 0;
  for (let t = from; t < tokens.length && length < size; t += 1) {
    found.push(tokens[t]);
    length += tokens[t].length;
  }
  const characters = [...(reversed ? found.reverse() : found).join("")];
  const cut = characters.length > size || from + found.length < tokens.length;
  return { text: characters.slice(...(reversed ? [-size] : [0, size])).join(""), cut };
}

// A score as text; in a list that says which scores are exact, the others have a sign before them.
const approximately = (list, place) =>
  `${list.exact?.[place] === false ? "≈ " : ""}${signed(list.score[place])}`;

// Whether a sequence was scored again after the scan; and its score in the scan, or its only one.
const scanned = (list, place) => (list.scan_score?.[place] ?? null) !== null;
const scanScore = (list, place) => (scanned(list, place) ? list.scan_score : list.score)[place];

ranking.box.addEventListener("scroll", () => ranking.draw(), { passive: true });
