"""Every causal-LM class of `transformers` that can be built tiny: covered, partly covered, refused.

bash launch/test.sh -m slow -k every_causal_lm -s        prints the table
"""

from collections import Counter

import pytest
import torch
import transformers
from helpers.families import config_classes, tiny_config, tiny_model

from ekfac_dist.errors import ModelError
from ekfac_dist.models.capture.prepare import prepared
from ekfac_dist.models.find.discovery import discover

LARGEST = 3_000_000


def built(name):
    """A tiny model, or why there is none."""
    config_class = config_classes()[name]
    try:
        with torch.device("meta"):
            whole = getattr(transformers, name)(tiny_config(config_class))
        size = sum(parameter.numel() for parameter in whole.parameters())
        if size > LARGEST:
            return f"cannot be made tiny: {size:,} parameters"
        return tiny_model(name)
    except Exception as error:  # a configuration that our small sizes do not suit
        return f"not built: {type(error).__name__}"


def outcome(model):
    """What discovery says of a model."""
    try:
        with prepared(model):
            coverage = discover(model, None, torch.device("cpu")).coverage
    except ModelError as error:
        return "refused", str(error)
    except Exception as error:
        # The model's own forward may fail at such sizes, or in float64; then so it does without us.
        with pytest.raises(type(error)), torch.no_grad():
            model(input_ids=torch.arange(10).view(2, 5), use_cache=False)
        return "does not run", type(error).__name__
    share = coverage.tracked_mlp_parameters / coverage.mlp_parameters
    if coverage.tracked_mlp_parameters == coverage.mlp_parameters:
        assert all(why.startswith("taken for part of a norm") for why in coverage.skipped.values())
        return "covered", "100 %"
    assert coverage.skipped
    return "partly covered", f"{share:.1%}, {sorted(coverage.skipped)[0]} and others left out"


@pytest.mark.slow
def test_every_causal_lm_is_covered_or_says_why_not():
    found = {}
    for name in sorted(config_classes()):
        model = built(name)
        found[name] = ("not built", model) if isinstance(model, str) else outcome(model)
    counts = Counter(kind for kind, _ in found.values())
    print(f"\n{dict(counts)}")
    for name, (kind, why) in found.items():
        if kind != "covered":
            print(f"{name:45} {kind:15} {why[:200]}")
    assert counts["covered"] >= 149
    assert counts["partly covered"] + counts["refused"] <= 26
