// The report's results, as packed by report/page_data.py. Arrays are decoded when their sequence is
// shown.

const islands = {
  results: JSON.parse(byId("data").textContent),
  arrays: byId("arrays").textContent,
  decoded: new Map(),
  kept: 16, // decoded pairs

  detailsOf(pair) {
    if (pair === null) return null;
    if (!this.decoded.has(pair)) {
      this.decoded.set(pair, this.decode(this.results.pairs[pair]));
      if (this.decoded.size > this.kept) this.decoded.delete(this.decoded.keys().next().value);
    }
    return this.decoded.get(pair);
  },

  decode({ start, length, positions }) {
    const { layers: names, modules: { length: numModules }, module_layers: moduleLayers } = this.results;
    const raw = atob(this.arrays.slice(start, start + length));
    const bytes = Uint8Array.from(raw, (character) => character.charCodeAt(0));
    const floats = new Float32Array(bytes.buffer, 0, positions + numModules + 1);
    const modules = floats.subarray(positions, positions + numModules);
    const limit = floats[floats.length - 1];
    const cells = new Int8Array(bytes.buffer, floats.byteLength);
    return {
      positions: floats.subarray(0, positions),
      modules,
      layers: layerScores(modules, moduleLayers, names.length),
      limit,
      at: (layer, position) => {
        const root = cells[layer * positions + position] / 127;
        return limit * root * Math.abs(root);
      },
    };
  },
};

useData({
  ...islands.results,
  detailsOf: (pair) => islands.detailsOf(pair),
  noDetails:
    "This run kept no token scores for this sequence. Run query with --scores.per_token top to see " +
    "which tokens and layers its score comes from.",
});
