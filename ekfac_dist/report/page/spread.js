// The distribution of all sequences' scores: a histogram, scores by rank, and the tails' shares.

const spread = {
  query: null,
  chosen: null, // the chosen sequence's score
  width: 0,

  show(query) {
    this.query = query;
    const d = query.distribution;
    byId("spread-text").textContent =
      `${grouped.format(d.num_positive)} positive and ${grouped.format(d.num_negative)} negative; ` +
      `mean ${signed(d.mean, 3)}, median ${signed(d.median, 3)}, standard deviation ` +
      `${unsigned(d.deviation, 3)}, from ${signed(d.least, 3)} to ${signed(d.most, 3)}.` +
      (data.normalize === "none" ? "" : ` Scores are normalised (${data.normalize}).`) +
      (data.scan_rank === null ? "" : ` They are the scan's, of rank ${data.scan_rank}: approximate.`);
    this.tails(d);
    this.draw();
  },

  mark(score) {
    this.chosen = score;
    this.draw();
  },

  draw() {
    const width = byId("histogram").clientWidth;
    if (!this.query || !width) return;
    this.width = width;
    this.histogram(this.query.distribution, width);
    this.curve(this.query.distribution, width);
  },

  histogram(d, width) {
    const plot = frame(width, 190);
    const most = Math.log10(Math.max(...d.counts, 1)) + 0.3;
    const end = d.first_edge + d.bin_width * d.counts.length;
    const x = (value) => plot.left + ((value - d.first_edge) / (end - d.first_edge)) * plot.width;
    // Bars are 0.3 decades higher than log10(count), or those of a single sequence would have no
    // height.
    const y = (count) => plot.bottom - (count ? (Math.log10(count) + 0.3) / most : 0) * plot.height;
    for (let power = 0; 10 ** power <= Math.max(...d.counts); power += 1) {
      plot.grid(y(10 ** power), compact.format(10 ** power));
    }
    d.counts.forEach((count, k) => {
      if (!count) return;
      const from = d.first_edge + k * d.bin_width;
      const bar = draw("rect", {
        x: x(from),
        y: y(count),
        width: Math.max(1, x(from + d.bin_width) - x(from) - 1),
        height: plot.bottom - y(count),
        class: from + d.bin_width / 2 < 0 ? "minus" : "plus",
      });
      const to = signed(from + d.bin_width, 3);
      bar.dataset.tip = `${plural(count, "sequence")}: ${signed(from, 3)} to ${to}`;
      plot.svg.append(bar);
    });
    for (const value of new Set([d.least, d.most])) plot.below(x(value), signed(value, 2));
    if (d.least < 0 && d.most > 0) plot.below(x(0), "0");
    if (this.chosen !== null) {
      const at = Math.max(plot.left, Math.min(plot.left + plot.width, x(this.chosen)));
      plot.svg.append(draw("path", { class: "here", d: `M${at} ${plot.bottom}V${plot.top - 4}` }));
    }
    plot.place("histogram", "Histogram of the scores of all sequences");
  },

  curve(d, width) {
    const plot = frame(width, 190);
    const points = [...d.positive_curve, ...d.negative_curve];
    if (!points.length) {
      byId("curve").replaceChildren(make("p", { class: "note" }, "Every score is zero."));
      return;
    }
    const values = points.map((point) => Math.log10(point[1]));
    const high = Math.ceil(Math.max(...values));
    const lowest = Math.max(Math.floor(Math.min(...values)), high - 6); // at most six decades
    const low = Math.min(lowest, high - 1);
    const ranks = Math.max(1, Math.log10(Math.max(...points.map((point) => point[0]))));
    const x = (rank) => plot.left + (Math.log10(rank) / ranks) * plot.width;
    const y = (value) => plot.bottom - ((Math.log10(value) - low) / (high - low)) * plot.height;
    for (let power = low; power <= high; power += Math.ceil((high - low) / 4)) {
      plot.grid(y(10 ** power), `1e${power}`.replace("-", "−"));
    }
    for (let power = 0; power <= ranks; power += 1) {
      plot.below(x(10 ** power), compact.format(10 ** power));
    }
    for (const [name, points] of [["plus", d.positive_curve], ["minus", d.negative_curve]]) {
      const shown = points.filter((point) => Math.log10(point[1]) >= low);
      if (!shown.length) continue;
      const path = shown.map(([rank, value]) => `${x(rank)} ${y(value)}`).join("L");
      plot.svg.append(draw("path", { class: `line ${name}`, d: `M${path}` }));
      for (const [rank, value] of shown) {
        const dot = draw("circle", { cx: x(rank), cy: y(value), r: 6, class: "catch" });
        const score = signed(name === "plus" ? value : -value, 3);
        dot.dataset.tip = `rank ${grouped.format(rank)}: ${score}`;
        plot.svg.append(dot);
      }
    }
    plot.place("curve", "Scores by rank: positive ones and the size of the negative ones");
    byId("curve").append(
      make("p", { class: "key quiet" },
        make("span", { class: "swatch plus" }), "positive ",
        make("span", { class: "swatch minus" }), "negative, without the sign")
    );
  },

  tails(d) {
    const head = make("tr", {}, ...["Strongest", "of positive", "of negative"].map(
      (name) => make("th", { scope: "col" }, name)));
    const rows = d.tails.map(({ fraction, count, positive, negative }) =>
      make("tr", {},
        make("th", { scope: "row" }, `${percent(fraction)} `,
          make("span", { class: "quiet" }, `(${grouped.format(count)})`)),
        make("td", {}, ...share(positive, "plus")),
        make("td", {}, ...share(negative, "minus"))));
    byId("tails").replaceChildren(
      make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)),
      make("p", { class: "note" },
        "The share of the sum of all positive (negative) scores that the highest (lowest) so many " +
        "of the scored sequences hold. A large share in few sequences is a heavy tail.")
    );
  },
};

function share(value, name) {
  const bar = make("span", { class: `fill ${name}` });
  bar.style.width = `${100 * (value || 0)}%`;
  return [make("span", { class: "value" }, value === null ? "–" : `${(100 * value).toFixed(1)} %`), make("span", { class: "track" }, bar)];
}

showTips(byId("spread"));
new ResizeObserver(() => {
  if (byId("histogram").clientWidth !== spread.width) spread.draw();
}).observe(byId("histogram"));
