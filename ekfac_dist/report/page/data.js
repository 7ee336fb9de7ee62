// The results, as packed by report/page_data.py. Arrays are decoded when their sequence is shown.

const data = JSON.parse(byId("data").textContent);
const arrays = byId("arrays").textContent;
for (const names of ["layers", "modules"]) data[names] = data[names].map(spelled);
const inNats = data.training_size !== null;
// A token has the score of the position with its own number, which reads it; or, where scores are of
// losses, of the position before, which predicts it.
const ofOutputs = data.tokens === "outputs";
const positionOf = (token) => (ofOutputs ? token - 1 : token);
const tokenOf = (position) => (ofOutputs ? position + 1 : position);
const decoded = new Map();
const KEPT_DECODED = 16;

// The arrays of a pair (its index in `data.pairs`): positions' scores [L], module scores, layer
// scores, and a function of (layer, position) that returns their score. Null for null, a sequence without
// token scores.
function detailsOf(pair) {
  if (pair === null) return null;
  if (decoded.has(pair)) return decoded.get(pair);
  const { start, length, positions } = data.pairs[pair];
  const raw = atob(arrays.slice(start, start + length));
  const bytes = Uint8Array.from(raw, (character) => character.charCodeAt(0));
  const floats = new Float32Array(bytes.buffer, 0, positions + data.modules.length + 1);
  const modules = floats.subarray(positions, positions + data.modules.length);
  const limit = floats[floats.length - 1];
  const cells = new Int8Array(bytes.buffer, floats.byteLength);
  const layers = new Float64Array(data.layers.length);
  modules.forEach((score, m) => {
    layers[data.module_layers[m]] += score;
  });
  const details = {
    positions: floats.subarray(0, positions),
    modules,
    layers,
    limit,
    at: (layer, position) => {
      const root = cells[layer * positions + position] / 127;
      return limit * root * Math.abs(root);
    },
  };
  decoded.set(pair, details);
  if (decoded.size > KEPT_DECODED) decoded.delete(decoded.keys().next().value);
  return details;
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

// Names of layers without their common prefix: 11 for model.layers.11.
const shortNames = (() => {
  const names = data.layers;
  if (names.length < 2) return names.map((name) => name.split(".").pop());
  let same = 0;
  while (names.every((name) => same < name.length && name[same] === names[0][same])) same += 1;
  const cut = names[0].lastIndexOf(".", same - 1) + 1;
  return names.map((name) => name.slice(cut));
})();

const largest = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
