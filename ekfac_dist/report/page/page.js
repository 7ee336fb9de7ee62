// The report: which of its queries is shown. Its address is #query=0&list=top&sequence=17.

function titleOf(query, number) {
  const [first] = query.members;
  if (query.group !== null) return `${number + 1} · group ${spelled(query.group)}`;
  const { prompt, completion } = first;
  const before = prompt.length > 48 ? `…${prompt.slice(-48)}` : prompt;
  const after = cut(completion);
  const rather = first.against ? ` rather than ${spelled(cut(first.against.completion))}` : "";
  return `${number + 1} · ${spelled(before)}${before && " → "}${spelled(after)}${rather}`;
}

function drawQuery() {
  byId("query").replaceChildren(...queryNodes(queryNow(), ({ line }) => `Line ${line}`));
  byId("query-select").value = String(state.query);
  byId("query-count").textContent = `${state.query + 1} of ${data.queries.length}`;
  byId("query-back").disabled = state.query === 0;
  byId("query-on").disabled = state.query === data.queries.length - 1;
}

function goTo(query) {
  showQuery(query);
  drawQuery();
}

page.named = () => [`query=${state.query}`];
page.keys = { "[": () => goTo(state.query - 1), "]": () => goTo(state.query + 1) };
page.read = () => {
  const asked = new URLSearchParams(location.hash.slice(1));
  const query = Number(asked.get("query") || 0);
  const known = Number.isInteger(query) && query >= 0 && query < data.queries.length ? query : 0;
  readPlaces(asked, known);
  drawQuery();
};

byId("query-select").append(
  ...data.queries.map((query, q) => make("option", { value: q }, titleOf(query, q)))
);
document.querySelector("nav.queries").classList.toggle("single", data.queries.length === 1);
byId("query-select").addEventListener("change", (event) => goTo(Number(event.target.value)));
byId("query-back").addEventListener("click", () => goTo(state.query - 1));
byId("query-on").addEventListener("click", () => goTo(state.query + 1));
page.read();
