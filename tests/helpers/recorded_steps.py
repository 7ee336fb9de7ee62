"""What an observer sees in one step, in order, with and without layers that are computed again."""

from dataclasses import dataclass, field

import torch

from ekfac_dist.models.capture.checkpointing import LayerCheckpointing
from ekfac_dist.models.capture.hooks import Capture
from ekfac_dist.models.capture.labels import LabelRule
from ekfac_dist.models.capture.tasks import CAUSAL_LM

DATA = LabelRule("data", 0, 0)


@dataclass
class Recorder:
    """Keeps what it sees, and in which order."""

    rows: dict = field(default_factory=dict)
    modules: dict = field(default_factory=dict)
    positions: dict = field(default_factory=dict)

    @property
    def order(self):
        return list(self.rows)

    def on_input(self, module, rows, positions):
        self._keep(("input", module.input), module, rows, positions)

    def on_gradient(self, module, rows, positions):
        assert ("input", module.input) in self.rows
        self._keep(("gradient", module.name), module, rows, positions)

    def _keep(self, key, module, rows, positions):
        assert key not in self.rows
        self.rows[key] = rows.clone()
        self.modules[key] = module
        self.positions[key] = (tuple(positions.indices), tuple(positions.lengths))


def step(model, modules, batch, *, checkpoints, task=CAUSAL_LM, rule=DATA, dtype=None, saved=None):
    """One forward and backward of a prepared model: what was seen, and losses with gradient."""
    seen = Recorder()
    checkpointing = LayerCheckpointing(model, modules, saved) if checkpoints else None
    with Capture(model, modules, seen, dtype, task, checkpointing=checkpointing) as capture:
        return seen, capture.run(batch, rule)


def assert_seen_alike(model, modules, batch, **options):
    """With layers computed again, everything is seen as without, bit for bit; gives both."""
    plain, result = step(model, modules, batch, checkpoints=False, **options)
    again, other = step(model, modules, batch, checkpoints=True, **options)
    assert plain.rows.keys() == again.rows.keys()
    for key, rows in plain.rows.items():
        assert torch.equal(again.rows[key], rows), key
        assert again.rows[key].dtype == rows.dtype
        assert again.modules[key] == plain.modules[key]
        assert again.positions[key] == plain.positions[key]
    assert torch.equal(result.losses, other.losses)
    return plain, again
