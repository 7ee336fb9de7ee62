// Answers of the service as the components of the report take them; see `useData`.

const WHY_NO_DETAILS = {
  asking: "The exact score of this sequence has not come yet, nor what its tokens and layers have of it.",
  done:
    "Only the sequences at either end of the index's ranking were scored exactly; this one's tokens and " +
    "layers are not known. Ask with more of them scored exactly.",
  cancelled: "The question was cancelled before this sequence was scored exactly.",
  failed: "The answer ended before this sequence was scored exactly.",
};

function resultsOf(answer, status) {
  const results = {
    layers: answer.layers,
    modules: answer.modules,
    module_layers: answer.module_layers,
    training_size: answer.training_size,
    normalize: answer.question.normalise,
    tokens: answer.question.tokens,
    scan_rank: answer.index.rank,
    carried: Number(document.body.dataset.carried),
    sequences: {},
    origins: {},
    pairs: [],
    pairOf: new Map(), // by a sequence's index
    detailsOf: (pair) => (pair === null ? null : results.pairs[pair].details),
    noDetails: WHY_NO_DETAILS[status],
  };
  for (const [index, detail] of Object.entries(answer.details)) addDetail(results, Number(index), detail);
  const { query, agreement } = answer;
  results.queries = [{
    group: null,
    members: [query],
    top: rankedOf(results, answer.top),
    bottom: rankedOf(results, answer.bottom),
    distribution: answer.distribution,
    spearman: null, // nothing is spread evenly
    spearmanTop: agreement ? agreement.spearman_top : null,
    overlap: agreement ? agreement.overlap : null,
  }];
  return results;
}

// Puts an exact score and its parts in the place of the index's.
function addSequence(results, { row, detail }) {
  const pair = addDetail(results, row.index, detail);
  results.sequences[row.index] = row.tokens;
  const [query] = results.queries;
  for (const list of [query.top, query.bottom]) {
    const place = list.index.indexOf(row.index);
    if (place < 0) continue;
    list.score[place] = row.score;
    list.share[place] = row.share;
    list.scan_score[place] = row.scan_score;
    list.exact[place] = row.exact;
    list.pair[place] = pair;
  }
}

// A list's rows as columns (`Ranked` in report/page_data.py); `exact` says which scores are.
function rankedOf(results, rows) {
  for (const row of rows) {
    results.sequences[row.index] = row.tokens;
    if (Number.isInteger(row.document)) results.origins[row.index] = [row.document, row.first_token];
  }
  return {
    index: rows.map((row) => row.index),
    score: rows.map((row) => row.score),
    share: rows.map((row) => row.share),
    nats: null,
    note: rows.map(() => null),
    scan_score: rows.map((row) => row.scan_score),
    exact: rows.map((row) => row.exact),
    pair: rows.map((row) => results.pairOf.get(row.index) ?? null),
  };
}

// The new entry of `pairs`. Scores are kept as float32, since a visit keeps many answers.
function addDetail(results, index, detail) {
  const modules = Float32Array.from(detail.module_scores);
  const cells = detail.layer_token_scores.map((scores) => Float32Array.from(scores));
  const pair = results.pairs.length;
  results.pairs.push({
    positions: detail.token_scores.length,
    carriers: detail.carriers,
    few: detail.few,
    strongest: detail.strongest,
    details: {
      positions: Float32Array.from(detail.token_scores),
      modules,
      layers: layerScores(modules, results.module_layers, results.layers.length),
      limit: cells.reduce((most, scores) => Math.max(most, largest(scores)), 0),
      at: (layer, position) => cells[layer][position],
    },
  });
  results.pairOf.set(index, pair);
  return pair;
}
