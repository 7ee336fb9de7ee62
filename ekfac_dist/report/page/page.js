// The state of the page: the chosen query and sequence, the address that has them, and the keys.

const state = { query: 0, list: "top", place: -1 };
const phone = matchMedia("(max-width: 860px)");
const NAMES = { none: "Score", cosine: "Cosine", relatif_l: "RelatIF ℓ", relatif_theta: "RelatIF θ" };
const scoreName = NAMES[data.normalize] || "Score";
const SHOWN_MEMBERS = 3;

const queryNow = () => data.queries[state.query];
const listNow = () => queryNow()[state.list];

// -- the query -------------------------------------------------------------------------------------

function titleOf(query, number) {
  const [first] = query.members;
  if (query.group !== null) return `${number + 1} · group ${spelled(query.group)}`;
  const { prompt, completion } = first;
  const before = prompt.length > 48 ? `…${prompt.slice(-48)}` : prompt;
  const after = cut(completion);
  const rather = first.against ? ` rather than ${spelled(cut(first.against.completion))}` : "";
  return `${number + 1} · ${spelled(before)}${before && " → "}${spelled(after)}${rather}`;
}

const cut = (text) => (text.length > 60 ? `${text.slice(0, 60)}…` : text);

// A query's text with a line about it; what a contrast is against has the same prompt.
function sideNodes(prompt, { completion, tokens, is_label: isLabel, nats }, kind, start) {
  const labels = isLabel.filter((one) => one).length;
  const each = labels > 1 ? `, ${unsigned(nats / labels, 3)} for each` : "";
  return [
    make("div", { class: "quote", tabindex: "0", role: "group", "aria-label": start },
      prompt === "" ? null : make("span", { class: "prompt" }, ...visible(prompt)),
      make("span", { class: kind }, ...visible(completion))),
    make("p", { class: "note" },
      `${start}: ${plural(tokens.length, "token")}, ${grouped.format(labels)} of them predicted; ` +
      `−log p = ${unsigned(nats)}${each}.`),
  ];
}

function memberNode(member) {
  const { prompt, line, nats, against } = member;
  const nodes = sideNodes(prompt, member, "completion", `Line ${line}`);
  if (against) {
    nodes.push(
      make("p", { class: "rather" }, "rather than"),
      ...sideNodes(prompt, against, "against", `Line ${line}, against`),
      make("p", { class: "note" },
        `Scores are of the difference, log p(completion) − log p(against) = ${signed(against.nats - nats)}.`)
    );
  }
  return make("div", { class: "member" }, ...nodes);
}

function drawQuery() {
  const query = queryNow();
  const members = query.members.map(memberNode);
  const group = query.members.length > 1 || query.group !== null;
  const head = group
    ? `${query.group === null ? "A group" : `Group “${spelled(query.group)}”`}: the gradients of ` +
      `${grouped.format(query.members.length)} queries, summed`
    : null;
  const rest = members.slice(SHOWN_MEMBERS);
  const agreement = [
    query.spearman === null ? "" : `Rank correlation of the scan with exact scores, over ` +
      `sequences spread evenly: ${query.spearman.toFixed(3)}.`,
    query.overlap === null ? "" : `${percent(query.overlap)} of these lists stood in the scan's ` +
      `own lists, among what was scored again.`,
  ].filter(Boolean).join(" ") || null;
  byId("query").replaceChildren(
    make("h2", { class: "unseen" }, "Query"),
    head ? make("p", { class: "group" }, head) : "",
    ...members.slice(0, SHOWN_MEMBERS),
    rest.length
      ? make("details", {}, make("summary", {}, `${grouped.format(rest.length)} more`), ...rest)
      : "",
    make("p", { class: "key quiet" },
      make("span", { class: "prompt" }, "prompt"), " ",
      make("span", { class: "completion" }, "completion, whose likelihood is explained"),
      ...(query.members.some(({ against }) => against)
        ? [" ", make("span", { class: "against" }, "against, whose likelihood is subtracted")]
        : []),
      agreement ? ` · ${agreement}` : "")
  );
  byId("query-select").value = String(state.query);
  byId("query-count").textContent = `${state.query + 1} of ${data.queries.length}`;
  byId("query-back").disabled = state.query === 0;
  byId("query-on").disabled = state.query === data.queries.length - 1;
}

// -- choosing --------------------------------------------------------------------------------------

function showQuery(number, list = state.list) {
  state.query = Math.max(0, Math.min(data.queries.length - 1, number));
  drawQuery();
  spread.chosen = null;
  spread.show(queryNow());
  showList(list);
}

function showList(list) {
  state.list = list;
  for (const name of ["top", "bottom"]) {
    byId(`list-${name}`).setAttribute("aria-pressed", String(name === list));
  }
  ranking.chosen = -1;
  ranking.set(listNow(), list === "top", byId("filter").value);
  choose(ranking.further(0));
}

function choose(place) {
  state.place = place;
  ranking.choose(place);
  const any = place >= 0;
  byId("sequence").classList.toggle("nothing", !any);
  if (any) sequence.show(listNow(), place, state.list === "top");
  else byId("sequence-title").textContent = "No sequence chosen";
  const line = ranking.shown.indexOf(place);
  byId("step-back").disabled = line <= 0;
  byId("step-on").disabled = !any || line === ranking.shown.length - 1;
  spread.mark(any ? (listNow().scan_score || listNow().score)[place] : null);
  if (any) {
    const { score, index } = listNow();
    say(`Rank ${place + 1}, sequence ${index[place]}, score ${signed(score[place])}`);
  }
  writeAddress();
}

// -- on a small screen the sequence covers the page ------------------------------------------------

const isOpen = () => document.body.classList.contains("open");

function open() {
  if (state.place < 0) return;
  if (phone.matches && !isOpen()) {
    document.body.classList.add("open");
    byId("sequence").scrollTop = 0;
    history.pushState(null, "", address());
    layers.drawMap();
  }
  byId(phone.matches ? "sequence" : "tokens").focus({ preventScroll: true });
}

function close() {
  if (isOpen()) history.back();
  else ranking.box.focus({ preventScroll: true });
  tooltip.hide();
}

// -- the address: #query=0&list=top&sequence=17 ----------------------------------------------------

function address() {
  const parts = [`query=${state.query}`, `list=${state.list}`];
  if (state.place >= 0 && (!phone.matches || isOpen())) {
    parts.push(`sequence=${listNow().index[state.place]}`);
  }
  return `#${parts.join("&")}`;
}

function writeAddress() {
  if (location.hash !== address()) history.replaceState(null, "", address());
}

function readAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const query = Number(asked.get("query") || 0);
  const list = asked.get("list") === "bottom" ? "bottom" : "top";
  const known = Number.isInteger(query) && query >= 0 && query < data.queries.length ? query : 0;
  const index = asked.get("sequence");
  const wasOpen = isOpen();
  const opens = phone.matches && index !== null;
  document.body.classList.toggle("open", opens);
  if (wasOpen && !opens && known === state.query && list === state.list) {
    ranking.draw();
    ranking.box.focus({ preventScroll: true });
    return;
  }
  const place = data.queries[known][list].index.indexOf(Number(index));
  showQuery(known, list);
  if (index !== null && place >= 0) choose(place);
}

// -- wiring ----------------------------------------------------------------------------------------

byId("score-name").textContent = scoreName;
byId("query-select").append(
  ...data.queries.map((query, q) => make("option", { value: q }, titleOf(query, q)))
);
document.querySelector("nav.queries").classList.toggle("single", data.queries.length === 1);
byId("layer-select").append(
  make("option", { value: "" }, "all"),
  ...data.layers.map((name, k) => make("option", { value: k, title: name }, shortNames[k]))
);

byId("query-select").addEventListener("change", (event) => showQuery(Number(event.target.value)));
byId("query-back").addEventListener("click", () => showQuery(state.query - 1));
byId("query-on").addEventListener("click", () => showQuery(state.query + 1));
byId("list-top").addEventListener("click", () => showList("top"));
byId("list-bottom").addEventListener("click", () => showList("bottom"));
byId("filter").addEventListener("input", () => showList(state.list));
byId("step-back").addEventListener("click", () => choose(ranking.further(-1)));
byId("step-on").addEventListener("click", () => choose(ranking.further(1)));
byId("close").addEventListener("click", close);
byId("layer-select").addEventListener("change", (event) => {
  sequence.layer = event.target.value === "" ? null : Number(event.target.value);
  sequence.paint();
  for (const row of layers.bars.children) {
    row.setAttribute("aria-selected", String(Number(row.dataset.layer) === sequence.layer));
  }
});
byId("colour-select").addEventListener("change", (event) => {
  colour.root = event.target.value === "root";
  sequence.paint();
  layers.drawMap();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => layers.drawMap());
phone.addEventListener("change", () => {
  document.body.classList.remove("open");
  ranking.set(listNow(), state.list === "top", byId("filter").value);
  choose(state.place);
});

ranking.box.addEventListener("click", (event) => {
  const row = event.target.closest("[data-place]");
  if (!row) return;
  choose(Number(row.dataset.place));
  if (phone.matches) open();
});

addEventListener("popstate", readAddress);
addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, select, textarea");
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") {
    if (event.target === byId("filter") && byId("filter").value) return; // Escape clears the filter
    event.preventDefault();
    close();
    return;
  }
  if (typing) {
    if (event.target === byId("filter") && ["Enter", "ArrowDown"].includes(event.key)) {
      event.preventDefault();
      ranking.box.focus();
    }
    return;
  }
  const inRows = ranking.box.contains(event.target);
  const step = (rows) => () => choose(ranking.further(rows));
  const keys = {
    j: step(1),
    k: step(-1),
    "[": () => showQuery(state.query - 1),
    "]": () => showQuery(state.query + 1),
    n: () => showList(state.list === "top" ? "bottom" : "top"),
    "/": () => {
      if (isOpen()) return;
      byId("filter").focus();
      byId("filter").select();
    },
  };
  const rowKeys = {
    ArrowDown: step(1),
    ArrowUp: step(-1),
    ArrowLeft: keys["["],
    ArrowRight: keys["]"],
    PageDown: step(ranking.page()),
    PageUp: step(-ranking.page()),
    Home: step(-Infinity),
    End: step(Infinity),
    Enter: open,
  };
  const action = (inRows && rowKeys[event.key]) || keys[event.key];
  if (!action) return;
  event.preventDefault();
  action();
});

readAddress();
