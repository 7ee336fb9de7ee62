"""Mixtures of experts: every expert's matrices against dense autograd, in float64."""

import pytest
import torch
from helpers.dense import dense_E, relative
from helpers.dense_families import dense_of
from helpers.families import WITH_EXPERTS, config_classes, tiny_config, tiny_model
from helpers.networks import examples
from helpers.scan_paths import force_path
from helpers.workshop import VOCABULARY, run_cli, save_tiny, texts, write_jsonl
from safetensors import safe_open
from torch import nn

from ekfac_dist import estimate_factors, influence_scores, load_factors
from ekfac_dist.errors import ModelError
from ekfac_dist.models.modules import EXPERT

EXACT = 1e-10
FIT = {"labels": "data", "accumulate": "float64", "batch_tokens": 24}


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_every_expert_is_as_dense_autograd_has_it(family, tmp_path):
    model, data = tiny_model(family), examples(prompts=True)
    # Each sequence alone, as the oracle has it: some of these compute norms in float32.
    alone = FIT | {"batch_tokens": 1}
    factors = estimate_factors(model, data, output=tmp_path / "store", **alone)
    coverage = factors.manifest["coverage"]
    skipped = {name for name, why in coverage["skipped"].items() if "no counted position" in why}
    assert set(coverage["skipped"]) == skipped
    dense = dense_of(model, factors, data)
    assert set(dense) == set(factors.modules) | skipped
    assert all(dense[name].M == 0 for name in skipped)
    experts = [module for module in factors.modules.values() if module.kind == EXPERT]
    assert experts
    for name, module in factors.modules.items():
        for factor, expected in ((module.input, dense[name].A), (module.output, dense[name].S)):
            path = tmp_path / "store" / "covariance" / f"{factor}.safetensors"
            with safe_open(path, framework="pt") as file:
                count = int(file.metadata()["count"])
                assert count == dense[name].M
                assert relative(file.get_tensor("sum") / count, expected) < EXACT
        fitted = factors.module(name)
        Q = torch.kron(fitted.basis_OO, fitted.basis_II)
        diagonal = torch.diag(Q.T @ dense[name].F @ Q)
        assert relative(fitted.lambda_OI.flatten(), diagonal) < EXACT
    assert (
        coverage["tracked_mlp_parameters"]
        + sum(dense[name].gradients[0].numel() for name in skipped)
        == coverage["mlp_parameters"]
    )


@pytest.mark.parametrize("family", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_counts_of_experts_sum_to_positions_times_experts_per_token(family, tmp_path):
    model, data = tiny_model(family), examples(20)
    factors = estimate_factors(model, data, output=tmp_path / "store", **FIT)
    positions = factors.manifest["data"]["num_positions"]
    for layer in range(2):
        counts = 0
        for name, module in factors.modules.items():
            if f"layers.{layer}." in name and name.endswith("down_proj"):
                path = tmp_path / "store" / "covariance" / f"{module.input}.safetensors"
                with safe_open(path, framework="pt") as file:
                    counts += int(file.metadata()["count"])
        assert counts == positions * model.config.num_experts_per_tok


def test_batches_and_padding_change_nothing():
    model, data = tiny_model("MixtralForCausalLM"), examples(20)
    one, other = (
        estimate_factors(model, data, **(FIT | {"batch_tokens": tokens})) for tokens in (1, 200)
    )
    assert list(one.modules) == list(other.modules)
    for name in one.modules:
        assert relative(dense_E(one, name), dense_E(other, name)) < 1e-9


class ListedExperts(nn.Module):
    """The same experts as a list of modules, as they used to be."""

    def __init__(self, fused):
        super().__init__()
        self.act_fn = fused.act_fn
        self.experts = nn.ModuleList()
        for up, down in zip(fused.gate_up_proj, fused.down_proj, strict=True):
            expert = nn.Module()
            expert.gate_up_proj = nn.Linear(*up.shape[::-1], bias=False).double()
            expert.down_proj = nn.Linear(*down.shape[::-1], bias=False).double()
            with torch.no_grad():
                expert.gate_up_proj.weight.copy_(up)
                expert.down_proj.weight.copy_(down)
            self.experts.append(expert)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        total = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self.experts):
            # Every expert sees every token, and a token that was not routed to it has no weight.
            gate, up = expert.gate_up_proj(hidden_states).chunk(2, -1)
            weight = (top_k_weights * (top_k_index == number)).sum(-1, keepdim=True)
            total = total + weight * expert.down_proj(self.act_fn(gate) * up)
        return total


class RoutedList(ListedExperts):
    """The list as it is mostly written: each expert is called with its own tokens alone."""

    def __init__(self, fused, pick):
        super().__init__(fused)
        self.pick = pick

    def forward(self, hidden_states, top_k_index, top_k_weights):
        total = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self.experts):
            tokens, places = torch.where(top_k_index == number)
            if len(tokens):
                order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
                tokens, places = tokens[order], places[order]
                gate, up = expert.gate_up_proj(self.pick(hidden_states, tokens)).chunk(2, -1)
                rows = expert.down_proj(self.act_fn(gate) * up).view(len(tokens), -1)
                total.index_add_(0, tokens, rows * top_k_weights[tokens, places, None])
        return total


PICKS = {
    "tokens[index]": lambda rows, index: rows[index],
    "tokens[None, index]": lambda rows, index: rows[None, index],
    "index_select": lambda rows, index: rows.index_select(0, index),
}


@pytest.mark.parametrize("pick", PICKS)
def test_fused_and_listed_experts_agree(pick):
    """Factors, counts and scores of a list of modules that see their own tokens alone."""
    train, queries = examples(12, prompts=True), examples(3, seed=4)
    fused, listed = tiny_model("MixtralForCausalLM"), tiny_model("MixtralForCausalLM")
    for layer in listed.model.layers:
        layer.mlp.experts = RoutedList(layer.mlp.experts, PICKS[pick])
    found = []
    for model in (fused, listed):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        factors = estimate_factors(model, train, **FIT)
        answer = influence_scores(
            model, factors, queries, train, per_token="all", top_k=2, batch_tokens=30
        )
        found.append((factors, answer))
    (one, one_answer), (other, other_answer) = found
    for name, module in one.modules.items():
        head, _, tail = name.partition(".experts.")
        same = f"{head}.experts.experts.{tail}"
        assert other.modules[same].input_size == module.input_size
        assert relative(other.module(same).lambda_OI.sum(), one.module(name).lambda_OI.sum()) < 1e-9
        assert relative(dense_E(other, same), dense_E(one, name)) < 1e-9
    assert len(other.modules) == len(one.modules)
    assert relative(other_answer.scores, one_answer.scores) < 1e-9
    assert relative(other_answer.token_scores, one_answer.token_scores) < 1e-9


def test_rows_that_were_picked_in_an_unknown_way_are_refused():
    model = tiny_model("MixtralForCausalLM")
    for layer in model.model.layers:
        layer.mlp.experts = RoutedList(
            layer.mlp.experts, lambda rows, index: torch.stack([rows[k] for k in index.tolist()])
        )
    with pytest.raises(ModelError, match="how they were picked cannot be seen"):
        estimate_factors(model, examples(6))


def test_listed_experts_agree_with_gradient_checkpointing_in_training_mode():
    model, data = tiny_model("MixtralForCausalLM"), examples(8)
    for layer in model.model.layers:
        layer.mlp.experts = RoutedList(layer.mlp.experts, PICKS["tokens[index]"])
    plain = estimate_factors(model, data, **FIT)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    again = estimate_factors(model, data, **FIT)
    for name in plain.modules:
        assert relative(again.module(name).lambda_OI, plain.module(name).lambda_OI) < 1e-12


def test_listed_experts_that_nothing_reached_are_left_out():
    model = tiny_model("MixtralForCausalLM")
    for layer in model.model.layers:
        layer.mlp.experts = RoutedList(layer.mlp.experts, PICKS["tokens[index]"])
    factors = estimate_factors(model, [{"input_ids": torch.tensor([3, 4])}], **FIT)
    skipped = factors.manifest["coverage"]["skipped"]
    assert len(factors.modules) == len(skipped) == 8
    assert set(skipped.values()) == {"no counted position was routed to this expert"}


def test_experts_with_a_forward_of_their_own_are_told_of():
    model = tiny_model("Qwen2MoeForCausalLM")
    for layer in model.model.layers:
        experts, listed = layer.mlp.experts, ListedExperts(layer.mlp.experts)
        experts.forward = listed.forward
    coverage = estimate_factors(model, examples(6)).manifest["coverage"]
    reasons = {why for name, why in coverage["skipped"].items() if ".experts." in name}
    assert reasons == {
        "these experts compute with a forward of their own, which cannot be looked into"
    }


@pytest.mark.parametrize("partitions", [1, 4, 16])
def test_a_group_of_experts_that_nothing_reached_is_passed_over(partitions):
    data = [{"input_ids": torch.tensor([3, 4])}]
    model = tiny_model("MixtralForCausalLM")
    factors = estimate_factors(model, data, partitions=partitions, **FIT)
    assert len(factors.modules) == 8
    unreached = next(iter(factors.manifest["coverage"]["skipped"]))
    with pytest.raises(ModelError, match="Nothing is left to fit"):
        estimate_factors(model, data, modules=[unreached], **FIT)


def test_experts_that_no_gradient_reaches_do_not_block_queries():
    """Prompt positions of the last layer have none, so their experts' Λ would be zero."""
    data = examples(6)
    for example in data:
        example["labels"] = example["input_ids"].clone()
        example["labels"][:-1] = -100
    left_out = 0
    for seed in (2, 3):
        sizes = {"num_experts_per_tok": 1, "num_local_experts": 8}
        model = tiny_model("MixtralForCausalLM", seed=seed, **sizes)
        factors = estimate_factors(model, data, **FIT)
        skipped = factors.manifest["coverage"]["skipped"]
        left_out += sum("no gradient reaches" in why for why in skipped.values())
        assert all(factors.module(name).lambda_OI.any() for name in factors.modules)
        assert torch.isfinite(
            influence_scores(model, factors, data[:2], data, top_k=2).scores
        ).all()
    assert left_out


def test_fused_experts_have_the_gradients_of_a_list_of_modules():
    """The list's A counts every token, so the bases differ; S·M, tr Λ and gradients do not."""
    model, data = tiny_model("MixtralForCausalLM"), examples(12)
    fused = estimate_factors(model, data, **FIT)
    other = tiny_model("MixtralForCausalLM")
    for layer in other.model.layers:
        layer.mlp.experts = ListedExperts(layer.mlp.experts)
    listed = estimate_factors(other, data, **FIT)
    assert len(listed.modules) == 16
    for name in fused.modules:
        head, _, tail = name.partition(".experts.")
        same = f"{head}.experts.experts.{tail}"
        traces = [f.module(n).lambda_OI.sum() for f, n in ((fused, name), (listed, same))]
        assert relative(*traces) < 1e-9


@pytest.mark.parametrize("family", ["MixtralForCausalLM", "GptOssForCausalLM"])
@pytest.mark.parametrize("options", [{}, {"rank": 200}, {"normalize": "cosine"}])
def test_scores_are_those_of_dense_gradients(family, options, monkeypatch):
    model = tiny_model(family)
    train, queries = examples(10, prompts=True), examples(4, seed=5, prompts=True)
    factors = estimate_factors(model, train, **FIT)
    answer = influence_scores(
        model, factors, queries, train, top_k=3, per_token="top", batch_tokens=30, **options
    )
    of_train, of_queries = (dense_of(model, factors, data) for data in (train, queries))
    expected, own = 0, [0, 0]
    for name in factors.modules:
        E = of_train[name].E()
        damped = E + 0.1 * of_train[name].lam().mean() * torch.eye(len(E), dtype=E.dtype)
        G, Q = (
            torch.stack([g.flatten() for g in dense[name].gradients])
            for dense in (of_train, of_queries)
        )
        solved = torch.linalg.solve(damped, G.T)
        expected = expected + Q @ solved
        own[0] = own[0] + (Q * torch.linalg.solve(damped, Q.T).T).sum(-1)
        own[1] = own[1] + (G * solved.T).sum(-1)
    if options.get("normalize") == "cosine":
        expected = expected / (own[0][:, None] * own[1]).sqrt()
    assert relative(answer.scores.double(), expected) < 1e-6
    for path in ("by position", "by sequence"):
        with monkeypatch.context() as patch:
            force_path(patch, path)
            found = influence_scores(model, factors, queries, train, batch_tokens=30, **options)
        assert relative(found.scores.double(), expected) < 1e-6, path
    details = answer.details
    assert len(details.rows) >= 12
    for pair, (row, column) in enumerate(zip(details.rows, details.columns, strict=True)):
        part = slice(details.offsets[pair], details.offsets[pair + 1])
        by_token = details.token_scores[part].sum().item()
        assert by_token == pytest.approx(answer.scores[row, column].item(), rel=1e-5)
        assert details.module_scores[pair].sum().item() == pytest.approx(by_token, rel=1e-5)


def test_each_token_has_the_score_of_its_own_experts():
    """A token's part in a score is g of its experts with their preconditioned gradients."""
    model = tiny_model("MixtralForCausalLM")
    train, queries = examples(6), examples(2, seed=5)
    factors = estimate_factors(model, train, **FIT)
    options = {"top_k": 6, "per_token": "top", "bottom_k": 0}
    together = influence_scores(model, factors, queries, train, batch_tokens=64, **options)
    alone = influence_scores(model, factors, queries, train, batch_tokens=1, **options)
    assert torch.equal(torch.tensor(together.details.columns), torch.tensor(alone.details.columns))
    found, expected = (a.details.layer_token_scores for a in (together, alone))
    assert found.ndim == 2
    assert relative(found, expected) < 1e-6


def test_experts_that_nothing_reached_are_told_of_and_left_out(tmp_path):
    model = tiny_model("MixtralForCausalLM")
    data = [{"input_ids": torch.tensor([3, 4])}]  # one position, and two of four experts for it
    factors = estimate_factors(model, data, output=tmp_path / "store", **FIT)
    coverage = factors.manifest["coverage"]
    unreached = [name for name, why in coverage["skipped"].items() if "no counted" in why]
    assert len(unreached) == len(factors.modules) == 8
    assert set(unreached).isdisjoint(factors.modules)
    assert coverage["tracked_mlp_parameters"] * 2 == coverage["mlp_parameters"]
    answer = influence_scores(model, factors, data, examples(5), top_k=2)
    assert torch.isfinite(answer.scores).all()
    again = load_factors(tmp_path / "store", model=model)
    assert list(again.modules) == list(factors.modules)


@pytest.mark.slow
def test_two_workers_fit_the_experts_that_one_fits(tmp_path):
    config = tiny_config(config_classes()["MixtralForCausalLM"], vocab_size=VOCABULARY)
    model = save_tiny(tmp_path / "model", config)
    data = write_jsonl(tmp_path / "text.jsonl", [{"text": t} for t in texts(20, words=(2, 8))])
    stores = []
    for workers in (1, 2):
        stores.append(tmp_path / f"store{workers}")
        done = run_cli(
            [
                *("estimate", "--model.name", model, "--data.source", data),
                *("--model.dtype", "float64", "--factors.accumulate", "float64"),
                *("--batch_tokens", "100", "--output", stores[-1]),
            ],
            workers=workers,
        )
        assert done.returncode == 0, done.stderr
    one, two = map(load_factors, stores)
    assert list(one.modules) == list(two.modules)
    assert sum(module.kind == EXPERT for module in one.modules.values()) > 8
    for name in one.modules:
        assert relative(two.module(name).lambda_OI, one.module(name).lambda_OI) < 1e-6
