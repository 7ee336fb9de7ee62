"""What is computed twice, in other batches, must be the same, or the run ends with a sentence."""

import pytest
import torch
from helpers.families import tiny_model
from helpers.networks import build, examples

from ekfac_dist import estimate_factors, influence_scores
from ekfac_dist.errors import ModelError
from ekfac_dist.influence.scan import DetailSums
from ekfac_dist.models.capture.batch_checks import BatchChecks


@pytest.mark.parametrize("rank", [None, 2])
def test_details_that_are_not_the_scans_end_the_run(rank, monkeypatch):
    model, data = build("llama"), examples(9)
    factors = estimate_factors(model, data, labels="data")
    ask = {"top_k": 2, "per_token": "top", "rank": rank}
    influence_scores(model, factors, data[:2], data, **ask)
    use = DetailSums.score

    def in_another_way(self, module, acts_MI, grads_MO, batch):
        use(self, module, acts_MI, grads_MO * 1.01, batch)

    monkeypatch.setattr(DetailSums, "score", in_another_way)
    with pytest.raises(ModelError, match=r"query 0.*difference 0\.0\d+.*batch_tokens: 1"):
        influence_scores(model, factors, data[:2], data, **ask)
    influence_scores(model, factors, data[:2], data, **(ask | {"per_token": "none"}))


def test_a_window_that_no_check_before_has_seen_ends_the_run(monkeypatch):
    """The scan packs short sequences alone; the details pack long ones with them, past a chunk."""
    model = tiny_model("Llama4ForCausalLM", attention_chunk_size=8)
    generator = torch.Generator().manual_seed(0)
    lengths = (22, 5, 8, 22, 6, 22, 8, 6, 22, 7)
    data = [{"input_ids": torch.randint(1, 29, (n,), generator=generator)} for n in lengths]
    factors = estimate_factors(model, data, labels="data", batch_tokens=42)
    monkeypatch.setattr(BatchChecks, "can_pack", lambda self: True)

    def ask():
        for k in range(1, 10):  # until an odd number of long sequences is listed with short ones
            options = {"top_k": k, "bottom_k": 0, "per_token": "top", "batch_tokens": 42}
            influence_scores(model, factors, data[:2], data, **options)

    with pytest.raises(ModelError, match="not those of the scan"):
        ask()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "MixtralForCausalLM"])
def test_rounding_ends_no_run(family, dtype):
    model = (build(family) if family == "llama" else tiny_model(family, hidden_size=16)).to(dtype)
    data = examples(12, longest=20)
    factors = estimate_factors(model.float(), data, labels="data")
    model.to(dtype)
    scores = influence_scores(
        model, factors, data[:3], data, top_k=3, per_token="top", batch_tokens=64
    )
    assert scores.details is not None
