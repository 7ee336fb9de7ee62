// What the components show: a run's results, or an answer. `useData` puts others in their place.

// The fields are those of `PageData` in report/page_data.py without its arrays, and
//   detailsOf(pair)  the scores of an entry of `pairs`, by its index: of positions [L], of modules, of
//                    layers, the largest |score| of a layer and position, and a function of both that
//                    returns it; null for null, a sequence without token scores
//   noDetails        why a sequence has no token scores, in sentences
let data = null;

function useData(results) {
  const layerNames = results.layers.map(spelled);
  data = {
    ...results,
    layers: layerNames,
    modules: results.modules.map(spelled),
    shortNames: withoutPrefix(layerNames),
    inNats: results.training_size !== null,
    // A token has the score of the position with its own number, which reads it; or, where scores
    // are of losses, of the position before, which predicts it.
    ofOutputs: results.tokens === "outputs",
  };
  ranking.texts.clear();
  layers.offer();
}

const positionOf = (token) => (data.ofOutputs ? token - 1 : token);
const tokenOf = (position) => (data.ofOutputs ? position + 1 : position);

// Layers' scores are the sums of their modules'.
function layerScores(modules, moduleLayers, number) {
  const sums = new Float64Array(number);
  modules.forEach((score, m) => {
    sums[moduleLayers[m]] += score;
  });
  return sums;
}

// Runs are tokens that can be read only together: the first has their text, the others have "".
// Returns the index of each run's first token, and of each token the index of its run.
function runsOf(tokens) {
  const starts = [];
  const of = tokens.map((text, t) => {
    if (text !== "" || t === 0) starts.push(t);
    return starts.length - 1;
  });
  return { starts, of };
}

// Names without their common prefix: 11 for model.layers.11.
function withoutPrefix(names) {
  if (names.length < 2) return names.map((name) => name.split(".").pop());
  let same = 0;
  while (names.every((name) => same < name.length && name[same] === names[0][same])) same += 1;
  const cut = names[0].lastIndexOf(".", same - 1) + 1;
  return names.map((name) => name.slice(cut));
}

const largest = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
