// Query by query: the LDS of each query by two methods, as points and as a table. The rest of the
// page needs no script.

const data = JSON.parse(byId("data").textContent);
const TICK = 0.2;

const fixed = (value) => value.toFixed(3).replace("-", "−");
const signedFixed = (value) => (value > 0 ? "+" : "") + fixed(value);

// Nodes of a query group's text: its name, and the texts of its queries.
function textOf({ group, members }) {
  const nodes = group === null ? [] : [...visible(group, true), ": "];
  members.forEach(({ prompt, completion, against }, k) => {
    if (k) nodes.push(" · ");
    nodes.push(...visible(brief(prompt, 200), true), prompt === "" ? "" : " → ",
      make("span", { class: "completion" }, ...visible(brief(completion, 200), true)),
      ...(against == null ? [] : [" rather than ",
        make("span", { class: "completion" }, ...visible(brief(against, 200), true))]));
  });
  return nodes;
}

const pairView = {
  active: null, // index of the query that is read
  width: 0,

  get rows() {
    return [byId("across"), byId("up")].map((box) => data.rows[Number(box.value)]);
  },

  // Queries from the highest to the lowest difference.
  get order() {
    const [across, up] = this.rows.map((row) => row.by_query);
    const difference = (k) => up[k] - across[k];
    return data.queries.map((_, k) => k).sort((a, b) => difference(b) - difference(a) || a - b);
  },

  show() {
    this.active = null;
    tooltip.hide();
    this.table();
    this.draw();
  },

  table() {
    const [across, up] = this.rows;
    byId("name-across").textContent = spelled(across.name);
    byId("name-up").textContent = spelled(up.name);
    const rows = this.order.map((k) =>
      make("tr", { id: `query-${k}`, "data-query": k },
        make("th", { scope: "row" }, make("span", { class: "quiet" }, `${k + 1} `), ...textOf(data.queries[k])),
        ...[fixed(across.by_query[k]), fixed(up.by_query[k]), signedFixed(up.by_query[k] - across.by_query[k])]
          .map((text) => make("td", { class: "figure" }, text))));
    byId("query-rows").replaceChildren(...rows);
    const differences = data.queries.map((_, k) => up.by_query[k] - across.by_query[k]);
    const above = differences.filter((value) => value > 0).length;
    const below = differences.filter((value) => value < 0).length;
    byId("pair-text").textContent =
      `Up: ${spelled(up.name)}, LDS ${up.text}. Across: ${spelled(across.name)}, LDS ${across.text}. ` +
      `Of ${grouped.format(differences.length)} queries ${grouped.format(above)} are above the line of ` +
      `equal LDS and ${grouped.format(below)} below.`;
  },

  draw() {
    const width = Math.min(byId("scatter").clientWidth, 420);
    if (!width) return;
    this.width = byId("scatter").clientWidth;
    const [across, up] = this.rows.map((row) => row.by_query);
    const plot = frame(width, width);
    const first = Math.floor(Math.min(0, ...across, ...up) / TICK);
    const last = Math.ceil(Math.max(TICK, ...across, ...up) / TICK);
    const [low, high] = [first * TICK, last * TICK];
    const x = (value) => plot.left + ((value - low) / (high - low)) * plot.width;
    const y = (value) => plot.bottom - ((value - low) / (high - low)) * plot.height;
    for (let k = first; k <= last; k += 1) {
      const text = (k * TICK).toFixed(1).replace("-", "−");
      plot.grid(y(k * TICK), text);
      plot.below(x(k * TICK), text);
    }
    const [nameAcross, nameUp] = this.rows.map((row) => brief(spelled(row.name), 40));
    plot.svg.append(
      draw("text", { x: plot.left, y: plot.top - 2 }, `↑ ${nameUp}`),
      draw("text", { x: plot.left + plot.width, y: plot.bottom - 6, "text-anchor": "end" }, `${nameAcross} →`));
    plot.svg.append(draw("path", { class: "even", d: `M${x(low)} ${y(low)}L${x(high)} ${y(high)}` }));
    data.queries.forEach((_, k) => {
      plot.svg.append(draw("circle", {
        id: `point-${k}`, "data-query": k, cx: x(across[k]), cy: y(up[k]), r: 5,
        role: "option", "aria-selected": "false", "aria-label": this.said(k),
      }));
    });
    plot.place("scatter", "LDS of each query by the two methods");
    plot.svg.setAttribute("role", "presentation");
    this.mark(this.active);
  },

  said(k) {
    const [across, up] = this.rows;
    const { members } = data.queries[k];
    return `Query ${k + 1}, ${spelled(brief(members[0].prompt + members[0].completion))}: ` +
      `${fixed(up.by_query[k])} up, ${fixed(across.by_query[k])} across`;
  },

  mark(k) {
    this.active = k;
    for (const node of document.querySelectorAll("#by-query .active")) {
      node.classList.remove("active");
      if (node.tagName === "circle") node.setAttribute("aria-selected", "false");
    }
    byId("scatter").removeAttribute("aria-activedescendant");
    if (k === null) return;
    byId(`query-${k}`).classList.add("active");
    const point = byId(`point-${k}`);
    if (!point) return;
    point.classList.add("active");
    point.setAttribute("aria-selected", "true");
    byId("scatter").setAttribute("aria-activedescendant", point.id);
  },

  // Marks a query and shows its texts and values beside its point.
  read(k) {
    this.mark(k);
    const [across, up] = this.rows;
    tooltip.show(
      () => byId(`point-${k}`)?.getBoundingClientRect(),
      make("p", {}, ...textOf(data.queries[k])),
      make("dl", {}, ...facts(
        [spelled(across.name), fixed(across.by_query[k])],
        [spelled(up.name), fixed(up.by_query[k])],
        ["Difference", signedFixed(up.by_query[k] - across.by_query[k])]))
    );
  },

  leave() {
    this.mark(null);
    tooltip.hide();
  },
};

// Left and right go through the points, from the lowest to the highest across.
function step(key) {
  const [across, up] = pairView.rows.map((row) => row.by_query);
  const order = data.queries.map((_, k) => k)
    .sort((a, b) => across[a] - across[b] || up[a] - up[b] || a - b);
  const place = order.indexOf(pairView.active);
  const last = order.length - 1;
  const places = {
    ArrowRight: Math.min(place + 1, last),
    ArrowLeft: place < 0 ? last : Math.max(place - 1, 0),
    Home: 0,
    End: last,
  };
  return key in places ? order[places[key]] : null;
}

if (data.rows.length) {
  ["across", "up"].forEach((id, k) => {
    const box = byId(id);
    box.append(...data.rows.map((row, r) => make("option", { value: r }, spelled(row.name))));
    box.value = String(data.pair[k]);
    box.addEventListener("change", () => pairView.show());
  });
  const queryOf = (event) => event.target.closest("[data-query]")?.dataset.query;
  byId("scatter").addEventListener("pointerover", (event) => {
    const query = queryOf(event);
    if (query === undefined) pairView.leave();
    else pairView.read(Number(query));
  });
  byId("scatter").addEventListener("pointerleave", () => pairView.leave());
  byId("scatter").addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "Escape") pairView.leave();
    const query = step(event.key);
    if (query === null) return;
    event.preventDefault();
    pairView.read(query);
  });
  byId("scatter").addEventListener("blur", () => pairView.leave());
  byId("query-rows").addEventListener("pointerover", (event) => {
    const query = queryOf(event);
    if (query !== undefined) pairView.mark(Number(query));
  });
  byId("query-rows").addEventListener("pointerleave", () => pairView.mark(null));
  pairView.show();
  new ResizeObserver(() => {
    if (byId("scatter").clientWidth !== pairView.width) pairView.draw();
  }).observe(byId("scatter"));
}
