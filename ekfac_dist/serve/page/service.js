// The service's page: the question that is shown, how far its answer is, and its address,
// #q=…&list=top&sequence=17.

let shown = null; // the question that is shown
let drawnResults = null; // its results, as far as the components have them

// -- the answer ------------------------------------------------------------------------------------

function show(asked, places = new URLSearchParams()) {
  shown = asked;
  drawnResults = null;
  state.list = places.get("list") === "bottom" ? "bottom" : "top";
  shown.places = places; // of its address, for when there are results
  tooltip.hide();
  document.body.classList.remove("open");
  drawAnswer();
  drawStatus();
}

function showNothing() {
  [shown, drawnResults] = [null, null];
  byId("status").hidden = byId("answer").hidden = true;
}

function drawAnswer() {
  const { results, places } = shown;
  byId("answer").hidden = results === null;
  if (results === null || results === drawnResults) return;
  drawFacts(shown.answer);
  if (drawnResults === null) {
    drawnResults = results;
    useData(results);
    readPlaces(places, 0);
  } else {
    drawnResults = results;
    renew(results);
  }
  byId("query").replaceChildren(...queryNodes(queryNow(), () => "Asked"));
}

// Follows an event of the question that is shown.
function follow(event, data) {
  if (event === "sequence") updateSequence(data.row.index);
  else if (event === "end" && drawnResults) {
    useData(drawnResults);
    if (state.place >= 0 && !sequence.details) updateSequence(listNow().index[state.place]);
    writeAddress();
  } else if (event === "ranking" || event === "answer") drawAnswer();
  drawStatus();
}

function drawFacts({ question, index, meaning, num_sequences: number, refined }) {
  const { value, relative, scale } = question.damping;
  const mean = { mean: "mean(Λ)", trimmed: "trimmed mean(Λ)", geometric: "geometric mean(Λ)" };
  byId("answer-facts").replaceChildren(...facts(
    ["Damping", `λ = ${value}${relative ? ` × ${mean[scale]}` : ""}`],
    ["Normalisation", question.normalise === "none" ? "none" : NAMES[question.normalise]],
    ["Index", `rank ${index.rank}, ${index.dtype}`],
    ["Tokens", question.tokens === "outputs"
      ? "shaded by what the loss of predicting each does" : "shaded by what reading each adds"],
    refined === null ? null : ["Refined", refined]
  ));
  byId("answer-meaning").replaceChildren(...facts(
    ["Sign", meaning.sign], ["Scale", meaning.scale], ["Share", meaning.share],
    ["Marks", "≈ the index's score, which is approximate; ✓ an exact one"]));
  byId("spread-title").textContent = `All ${grouped.format(number)} scores of this question`;
}

// -- how far it is -----------------------------------------------------------------------------------

function drawStatus() {
  const { status, text, count, results, id } = shown;
  const asking = status === "asking";
  byId("status").hidden = false;
  byId("status").className = `status ${status}`;
  const sentence = spelled(text);
  if (byId("status-text").textContent !== sentence) byId("status-text").textContent = sentence;
  const bar = byId("status-bar");
  bar.hidden = !asking;
  if (count) [bar.value, bar.max] = count;
  else bar.removeAttribute("value");
  byId("status-count").textContent =
    asking && count ? `${grouped.format(count[0])} of ${grouped.format(count[1])}` : "";
  const wasAtCancel = document.activeElement === byId("cancel");
  byId("cancel").hidden = !asking;
  byId("export").hidden = status !== "done" || id === null || results === null;
  byId("export-note").textContent = "";
  if (wasAtCancel && !asking) {
    (byId("export").hidden ? field("prompt") : byId("export")).focus({ preventScroll: true });
  }
  drawTime();
}

function drawTime() {
  const seconds = shown?.status === "asking" ? (performance.now() - shown.began) / 1000 : null;
  byId("status-time").textContent = seconds === null ? "" : `${seconds.toFixed(1)} s`;
}

// -- asking ------------------------------------------------------------------------------------------

function ask(question, places) {
  const asked = new Asked(question);
  visit.add(asked);
  show(asked, places);
  asked.run((event, data) => {
    if (shown === asked) follow(event, data);
  });
}

function askForm() {
  if (!form.check()) return;
  const question = form.question();
  const key = keyOf(question);
  const running = visit.asked.get(key)?.status === "asking";
  if (named().get("q") !== key) history.pushState(null, "", `#q=${key}`);
  if (running) show(visit.asked.get(key));
  else ask(question);
  byId("status").scrollIntoView({ block: "nearest" });
}

const named = () => new URLSearchParams(location.hash.slice(1));

page.named = () => [`q=${shown.key}`];
page.isShown = () => drawnResults !== null;
page.grows = () => shown.status === "asking";
page.read = () => {
  const places = named();
  const key = places.get("q");
  if (key !== null && key === shown?.key) {
    if (shown.results) readPlaces(places, 0);
    return;
  }
  document.body.classList.remove("open");
  const question = key === null ? null : questionOf(key);
  byId("ask-note").textContent = "";
  if (question === null) {
    showNothing();
    if (key !== null) byId("ask-note").textContent = "The address holds no question that can be read.";
    return;
  }
  form.fill(question);
  const asked = form.question(); // without what the form has no field for
  const kept = visit.asked.get(keyOf(asked));
  if (kept) show(kept, places);
  else if (!visit.running) ask(asked, places);
  else {
    showNothing();
    byId("ask-note").textContent = "Another question is being answered. Ask this one when you like.";
  }
};

// -- the report as a file ----------------------------------------------------------------------------

async function saveReport() {
  const note = byId("export-note");
  const { id } = shown;
  note.textContent = "The report is made …";
  try {
    const response = await client.send(`v1/influence/${encodeURIComponent(id)}/report`, { accept: "text/html" });
    const url = URL.createObjectURL(await reached(response.blob()));
    make("a", { href: url, download: `influence-${id}.html` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
    note.textContent = "Saved.";
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    note.textContent = error.status === 404
      ? "The service does not keep this answer any more. Ask again, then save it."
      : spelled(error.message);
  }
}

// -- what the service is -----------------------------------------------------------------------------

async function tellService() {
  let info;
  try {
    info = await client.json("v1/info");
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    byId("subtitle").textContent = spelled(error.message);
    return;
  }
  const name = info.model?.name;
  const number = info.index?.num_sequences;
  if (name) {
    byId("model").replaceChildren(...visible(name, true));
    document.title = `Influence on ${spelled(name)}`;
  }
  if (number) {
    byId("subtitle").textContent =
      `Ask which of ${grouped.format(number)} training sequences made it say something, by EK-FAC influence`;
  }
  if (info.model?.chats) byId("chat-part").hidden = false;
  if (info.damping?.value) field("damping").placeholder = String(info.damping.value);
  byId("service-groups").replaceChildren(...Object.entries(info).flatMap(groupNodes));
}

function groupNodes([name, value]) {
  const plain = value === null || typeof value !== "object";
  if (plain || Array.isArray(value)) return [];
  const entries = Object.entries(value)
    .map(([key, one]) => [spelled(key), spelled(typeof one === "string" ? one : JSON.stringify(one))]);
  const title = name[0].toUpperCase() + name.slice(1);
  return [make("section", {}, make("h3", {}, spelled(title)), make("dl", {}, ...facts(...entries)))];
}

// -- wiring ------------------------------------------------------------------------------------------

form.box.addEventListener("submit", (event) => {
  event.preventDefault();
  askForm();
});
form.box.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  askForm();
});
byId("cancel").addEventListener("click", () => shown.cancel());
byId("export").addEventListener("click", saveReport);
setInterval(drawTime, 200);
form.adapt();
form.changed();
tellService();
page.read();
