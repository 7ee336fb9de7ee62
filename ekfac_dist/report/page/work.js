// The lists and the chosen sequence: which of them is shown, the address that has them, and the keys.

// `isPicked` says whether the chosen sequence is the reader's choice, and not just the list's first.
const state = { query: 0, list: "top", place: -1, isPicked: false };
const phone = matchMedia("(max-width: 860px)");
const NAMES = { none: "Score", cosine: "Cosine", relatif_l: "RelatIF ℓ", relatif_theta: "RelatIF θ" };
const scoreName = () => NAMES[data.normalize] || "Score";

const queryNow = () => data.queries[state.query];
const listNow = () => queryNow()[state.list];

// What a page does besides: `named` are the parts of its address before list and sequence, `read`
// follows an address, `keys` are its own; `isShown` says whether there are lists to act on, `grows`
// whether other ones will follow.
const page = { named: () => [], read: () => {}, keys: {}, isShown: () => true, grows: () => false };

// -- choosing --------------------------------------------------------------------------------------

function showQuery(number, list = state.list) {
  state.query = Math.max(0, Math.min(data.queries.length - 1, number));
  byId("score-name").textContent = scoreName();
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
  state.isPicked = false;
  choose(ranking.further(0));
}

// Chooses for the reader.
function pick(place) {
  state.isPicked = true;
  choose(place);
}

function choose(place) {
  state.place = place;
  ranking.choose(place);
  const any = place >= 0;
  byId("sequence").classList.toggle("nothing", !any);
  if (any) sequence.show(listNow(), place, state.list === "top");
  else byId("sequence-title").textContent = "No sequence chosen";
  mark();
  if (any) {
    const { score, index } = listNow();
    say(`Rank ${place + 1}, sequence ${index[place]}, score ${signed(score[place])}`);
  }
  writeAddress();
}

// Shows where the chosen sequence is among the others.
function mark() {
  const any = state.place >= 0;
  const line = ranking.shown.indexOf(state.place);
  byId("step-back").disabled = line <= 0;
  byId("step-on").disabled = !ranking.shown.length || line === ranking.shown.length - 1;
  spread.mark(any ? scanScore(listNow(), state.place) : null);
}

// -- results that grow -----------------------------------------------------------------------------

// A sequence of the shown query has other scores now, or scores of its tokens.
function updateSequence(index) {
  const place = listNow().index.indexOf(index);
  if (place < 0) return;
  ranking.update(place);
  if (place !== state.place) return;
  sequence.show(listNow(), place, state.list === "top");
  mark();
}

// Shows other results of the shown query. The sequence that the reader has chosen stays chosen, its
// row where it was, and its tokens as they were; also if it is not listed any more. Without a choice
// the list's first is shown.
function renew(results) {
  const positive = state.list === "top";
  const index = state.place < 0 ? null : listNow().index[state.place];
  const { scrollTop } = ranking.box;
  useData(results);
  spread.show(queryNow());
  ranking.renew(listNow(), positive, byId("filter").value, index);
  state.place = ranking.chosen;
  const first = ranking.shown[0] ?? -1;
  if (index === null || (!state.isPicked && state.place !== first)) {
    choose(first);
    ranking.box.scrollTop = scrollTop;
  } else if (state.place < 0) sequence.tellUnlisted();
  else if (sequence.details) sequence.tell(listNow(), state.place, positive);
  else sequence.show(listNow(), state.place, positive);
  mark();
  writeAddress();
}

// -- on a small screen the sequence covers the page ------------------------------------------------

const isOpen = () => document.body.classList.contains("open");

function open() {
  if (state.place < 0) return;
  state.isPicked = true;
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

// -- the address: …&list=top&sequence=17 -----------------------------------------------------------

function address() {
  const parts = [...page.named(), `list=${state.list}`];
  const isLasting = state.isPicked || !page.grows();
  if (state.place >= 0 && isLasting && (!phone.matches || isOpen())) {
    parts.push(`sequence=${listNow().index[state.place]}`);
  }
  return `#${parts.join("&")}`;
}

function writeAddress() {
  if (location.hash !== address()) history.replaceState(null, "", address());
}

// Follows an address to one of the queries shown: its list and sequence.
function readPlaces(asked, query) {
  const list = asked.get("list") === "bottom" ? "bottom" : "top";
  const index = asked.get("sequence");
  const wasOpen = isOpen();
  const opens = phone.matches && index !== null;
  document.body.classList.toggle("open", opens);
  if (wasOpen && !opens && query === state.query && list === state.list) {
    ranking.draw();
    ranking.box.focus({ preventScroll: true });
    return;
  }
  const place = data.queries[query][list].index.indexOf(Number(index));
  showQuery(query, list);
  if (index !== null && place >= 0) pick(place);
}

// -- wiring ----------------------------------------------------------------------------------------

byId("list-top").addEventListener("click", () => showList("top"));
byId("list-bottom").addEventListener("click", () => showList("bottom"));
byId("filter").addEventListener("input", () => showList(state.list));
byId("step-back").addEventListener("click", () => pick(ranking.further(-1)));
byId("step-on").addEventListener("click", () => pick(ranking.further(1)));
byId("sequence").addEventListener("focusin", () => {
  state.isPicked = true; // what is being read is not replaced
});
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
  if (!page.isShown()) return;
  document.body.classList.remove("open");
  ranking.set(listNow(), state.list === "top", byId("filter").value);
  choose(state.place);
});

ranking.box.addEventListener("click", (event) => {
  const row = event.target.closest("[data-place]");
  if (!row) return;
  pick(Number(row.dataset.place));
  if (phone.matches) open();
});

addEventListener("popstate", () => page.read());
addEventListener("keydown", (event) => {
  if (!page.isShown() || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("form, dialog")) return; // a page's own, with keys of their own
  const typing = event.target.closest("input, select, textarea");
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
  const step = (rows) => () => pick(ranking.further(rows));
  const keys = {
    ...page.keys,
    j: step(1),
    k: step(-1),
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
