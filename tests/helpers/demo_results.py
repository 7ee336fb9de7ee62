"""Stores and scores as a demo's commands leave them, without the commands."""

import json
from pathlib import Path

from ekfac_dist.factors.layout import CHECKSUM, FORMAT, MANIFEST_KEYS, manifest_checksum
from ekfac_dist.influence import results
from ekfac_dist.influence.results import ResultsWriter


def write_store(config, **changes):
    manifest = {"format": FORMAT, "complete": True, **{key: {} for key in MANIFEST_KEYS}}
    store = Path(config["output"])
    store.mkdir(exist_ok=True)
    manifest |= {"config": config, **changes}
    manifest[CHECKSUM] = manifest_checksum(manifest)
    (store / "manifest.json").write_text(json.dumps(manifest))


def write_scores(config, places=lambda query, rank: 10 * query + rank, **changes):
    """Results in which row `places(query, rank)` is on that rank of that query."""
    queries = [json.loads(line) for line in Path(config["queries"]).read_text().splitlines()]
    writer = ResultsWriter(config["output"])
    writer.lines(
        results.QUERIES,
        [
            {"query": number, "group": None, "members": [{**query, "nats": 1.0}]}
            for number, query in enumerate(queries)
        ],
    )
    writer.lines(
        results.TOP,
        [
            {
                "query": q,
                "rank": rank,
                "index": places(q, rank),
                "score": -rank,
                "share": -rank / 50,
            }
            for q in range(len(queries))
            for rank in range(1, 8)
        ],
    )
    writer.finish({"config": {**config, **changes}})
