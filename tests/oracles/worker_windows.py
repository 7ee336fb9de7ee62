"""Started on W workers by test_windows.py: fits and scores with every windowed family."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from helpers.families import tiny_model
from helpers.workshop import leave
from test_windows import BUDGET, FIT, LENGTHS, WINDOWED, sequences

from ekfac_dist import estimate_factors, influence_scores


def main(output: Path) -> None:
    """Stores each family's factors, and its scores with their details."""
    accelerator = Accelerator(cpu=True)
    for family, settings in WINDOWED.items():
        model = tiny_model(family, **settings)
        data, queries = sequences(LENGTHS, 0), sequences((21, 6), 1)
        factors = estimate_factors(model, data, output=output / family, **FIT)
        found = influence_scores(
            model, factors, queries, data, top_k=3, per_token="top", batch_tokens=BUDGET
        )
        details = found.details
        result = [found.scores, details.rows, details.columns, details.module_scores]
        if accelerator.is_main_process:
            torch.save([torch.as_tensor(part) for part in result], output / f"{family}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
