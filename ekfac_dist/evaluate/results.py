"""The format of `results.json`, the results of an evaluation, with its writer and its reader.

    format     "ekfac_dist-evaluation/1"
    config     the whole configuration
    model      class, num_parameters
    data       num_sequences, num_positions, num_queries
    queries    of each query group: group (its name, or null), members (line, prompt, completion,
               against), gold (the columns of the sequences that say it)
    plain      key of the row of plain EK-FAC at its best damping; null without LDS or such a row
    ceiling    an estimate: LDS of one seed's losses for another's; null with one seed
    rows       of each method, choice of modules and damping: key, method, name, damping, tracked,
               seconds of its scores by seed, and what was measured:
                 lds         an estimate, and by_query
                 over_plain  an estimate: its LDS above that of the row `plain`
                 over_equal  the same above plain EK-FAC at the row's own damping, of other rows
                 removal     an estimate in nats, and by_query of the first queries
                 tail_patch  an estimate in nats
                 recall      mrr and recall10, estimates, and num_queries, of those with gold
    seeds      of each seed: seed, fit_seconds; steps, first_loss and last_loss (mean nats per
               token in the first and last epoch) of the training of the model, if it was trained;
               models and bank_seconds of the subsets of LDS, removal_models and removal_seconds
               of the removals
    workers    number of workers
    processor  name of the processor of worker 0
    software   versions

An estimate is {mean, low, high}, the ends of its 95 % interval. A protocol that was not asked for
leaves no entry. Damping multiplies mean(Λ); null where a method has none. All queries are query
groups, in the order of their first queries.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ekfac_dist.errors import OutputError
from ekfac_dist.runtime.files import write_whole

FORMAT = "ekfac_dist-evaluation/1"
RESULTS = "results.json"
# The page and the plot of the results, which `report` makes.
PAGE, PLOT = "evaluation.html", "lds.svg"
SEED = "seed-"  # what the names of seeds' directories begin with


def is_evaluation(path: str | Path) -> bool:
    """Whether a directory is one that `evaluate` writes into."""
    return os.path.lexists(Path(path) / RESULTS) or any(Path(path).glob(f"{SEED}*"))


def write_results(output: str | Path, results: Mapping[str, Any]) -> None:
    """Writes the results of an evaluation; earlier ones are replaced.

    Raises:
        OutputError: If they cannot be written.
    """
    text = json.dumps(results, indent=1, ensure_ascii=False)
    write_whole(Path(output) / RESULTS, [text.encode() + b"\n"])


def read_results(output: str | Path) -> dict[str, Any]:
    """The results of an evaluation.

    Raises:
        OutputError: If there are none, or the file is damaged.
    """
    path = Path(output) / RESULTS
    try:
        text = path.read_text(encoding="utf-8")
        results = json.loads(text, parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError(
            f"{path} cannot be read; give the output directory of a finished `evaluate` run."
        ) from error
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise OutputError(f"{path} is no result of `evaluate`; give its output directory.")
    return results


def _refuse_constant(name: str) -> None:
    """Refuses NaN and infinities, which Python's reader would take."""
    raise ValueError(f"{name} is no JSON")
