// The results, as report/page_data.py packed them. Arrays are decoded when a sequence is shown.

const data = JSON.parse(byId("data").textContent);
const arrays = byId("arrays").textContent;
for (const names of ["layers", "modules"]) data[names] = data[names].map(spelled);
const inNats = data.training_size !== null;
const decoded = new Map();
const KEPT_DECODED = 16;

// Token scores [L], module scores, layer scores, and the value of a layer at a token; null where
// the run kept no token scores for this sequence.
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
    tokens: floats.subarray(0, positions),
    modules,
    layers,
    limit,
    at: (layer, token) => {
      const root = cells[layer * positions + token] / 127;
      return limit * root * Math.abs(root);
    },
  };
  decoded.set(pair, details);
  if (decoded.size > KEPT_DECODED) decoded.delete(decoded.keys().next().value);
  return details;
}

// Tokens that can be read only together are a run: its text stands at the first, "" at the others.
// The first token of each run, and the run of each token.
function runsOf(tokens) {
  const starts = [];
  const of = tokens.map((text, t) => {
    if (text !== "" || t === 0) starts.push(t);
    return starts.length - 1;
  });
  return { starts, of };
}

// A layer's name without what all of them begin with: model.layers.11 is 11.
const shortNames = (() => {
  const names = data.layers;
  if (names.length < 2) return names.map((name) => name.split(".").pop());
  let same = 0;
  while (names.every((name) => same < name.length && name[same] === names[0][same])) same += 1;
  const cut = names[0].lastIndexOf(".", same - 1) + 1;
  return names.map((name) => name.slice(cut));
})();

const largest = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
