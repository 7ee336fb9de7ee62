"""Whether a fit has enough data: what half of it changes, by module, as the manifest has it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ekfac_dist.curvature.damping import DEFAULT
from ekfac_dist.curvature.halves import NUM_VECTORS, SEED
from ekfac_dist.curvature.score_change import DAMPINGS, HalfOfLambda, ScoreChange
from ekfac_dist.models.modules import TrackedModule

# Predicted correlation of scores with those of a fit on twice as many sequences, below which more
# sequences are said to change the answer.
ENOUGH = 0.98


def record_of(lambdas: Mapping[str, HalfOfLambda | None]) -> dict[str, Any]:
    """What the journal keeps of each module's Λ; the changes of scores are in order of damping."""
    return {
        name: half
        and {
            "difference": half.difference,
            "scores": [[each.signal, each.first, each.second] for each in half.scores.values()],
        }
        for name, half in lambdas.items()
    }


@dataclass
class Halves:
    """What half of the data changes.

    Attributes:
        factors: ‖δ‖ / ‖X‖ of each factor, by name; None where it is not known.
        lambdas: Of each module what `record_of` gives.
    """

    factors: dict[str, float | None] = field(default_factory=dict)
    lambdas: dict[str, dict[str, Any] | None] = field(default_factory=dict)

    def entry(self, modules: Sequence[TrackedModule]) -> dict[str, Any]:
        """The manifest's entry.

        Args:
            modules: The tracked modules.
        """
        of_all = {
            str(damping): sum((self._change(module, k) for module in modules), ScoreChange())
            for k, damping in enumerate(DAMPINGS)
            if all(self.lambdas.get(module.name) for module in modules)
        }
        return {
            "vectors": NUM_VECTORS,
            "seed": SEED,
            "scores": {
                damping: {"half": change.correlation(), "twice": change.correlation(2)}
                for damping, change in of_all.items()
            },
            "modules": {
                module.name: {
                    "input": self.factors.get(module.input),
                    "output": self.factors.get(module.output),
                    "lambda": (self.lambdas.get(module.name) or {}).get("difference"),
                    "scores": self._change(module, DAMPINGS.index(DEFAULT)).correlation(),
                }
                for module in modules
            },
        }

    def _change(self, module: TrackedModule, number: int) -> ScoreChange:
        """The change of a module's scores at a damping; nothing if it is not known."""
        record = self.lambdas.get(module.name)
        return ScoreChange.of_module(*record["scores"][number]) if record else ScoreChange()


def advice(entry: Mapping[str, Any]) -> str | None:
    """A sentence where more sequences would change the answer; None where not, or not known.

    Args:
        entry: The manifest's entry.
    """
    doubled = entry["scores"].get(str(DEFAULT), {}).get("twice")
    if doubled is None or doubled >= ENOUGH:
        return None
    return (
        "more sequences would change the answer: scores from twice as many would correlate with "
        f"these at about {doubled:.2f}"
    )
