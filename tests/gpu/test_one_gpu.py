"""The same factors on a CUDA device as on the CPU. Run with: bash launch/test.sh -m gpu."""

from pathlib import Path

import pytest
import torch
from helpers.dense import dense_E, relative
from helpers.networks import KINDS, build, examples
from helpers.workshop import logged, run_cli, save_tiny_llama, texts, write_jsonl
from safetensors.torch import load_file

from ekfac_dist import estimate_factors, influence_scores, load_factors
from ekfac_dist.curvature.covariance import multiplies_wide
from ekfac_dist.curvature.eigenbasis import decompose
from ekfac_dist.errors import NonFiniteError
from ekfac_dist.fit import eigenbasis
from ekfac_dist.functional import cache_linears, ihvp_at_x_ekfac

pytestmark = pytest.mark.gpu
LAUNCHERS = Path(__file__).parents[2] / "launch" / "accelerate"


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("labels", ["data", "sampled"])
def test_a_fit_on_the_gpu_equals_one_on_the_cpu(family, labels):
    data = examples(prompts=True)
    settings = {"labels": labels, "accumulate": "float64", "batch_tokens": 24}
    on_cpu = estimate_factors(build(family), data, **settings)
    on_gpu = estimate_factors(build(family).cuda(), data, **settings)
    for name, module in on_cpu.modules.items():
        assert relative(dense_E(on_gpu, name), dense_E(on_cpu, name)) < 1e-8
        gradient = torch.randn(module.num_outputs, module.input_size, dtype=torch.float64)
        solved = on_gpu.solve({name: gradient.cuda()})[name]
        assert solved.is_cuda
        assert relative(solved.cpu(), on_cpu.solve({name: gradient})[name]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_on_the_gpu_is_near_the_exact_factors(dtype):
    data = examples(16)
    exact = estimate_factors(build("llama"), data, labels="data", accumulate="float64")
    low = estimate_factors(build("llama").to("cuda", dtype), data, labels="data")
    for name in exact.modules:
        traces = [f.module(name).lambda_OI.sum().item() for f in (low, exact)]
        assert traces[0] == pytest.approx(traces[1], rel=0.05)


def test_nan_is_named_though_the_gpu_is_not_waited_for():
    model = build("llama").cuda()
    model.get_submodule("model.layers.1.mlp.down_proj").weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"NaN or infinity in .* at sequence"):
        estimate_factors(model, examples(16), batch_tokens=24)


def test_products_of_sixteen_bit_rows_are_wide():
    for dtype in (torch.bfloat16, torch.float16):
        assert multiplies_wide(torch.device("cuda"), dtype)


def test_a_decomposition_that_fails_on_the_gpu_is_made_on_the_cpu(monkeypatch):
    right = torch.linalg.eigh

    def fails_on_the_gpu(matrix):
        if matrix.is_cuda:
            raise torch.linalg.LinAlgError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR")
        return right(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails_on_the_gpu)
    rows = torch.randn(50, 20, dtype=torch.float64)
    basis = decompose("f", rows.T @ rows, 50, torch.device("cuda"))
    assert basis.attempts == 3
    assert basis.residual < 1e-12


def test_sums_and_weights_leave_the_gpu_while_factors_are_decomposed(monkeypatch):
    model, eigh, held, weights = build("llama").cuda(), torch.linalg.eigh, [], []
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    own = torch.cuda.memory_allocated()

    def look(matrix):
        assert matrix.is_cuda
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated() - matrix.nbytes)
        weights.extend(weight.untyped_storage().nbytes() for weight in model.parameters())
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", look)
    data = examples(16)
    fit = estimate_factors(model, data, labels="data", accumulate="float64")
    assert held
    assert max(held) < own  # `before` alone, and no sums
    assert not any(weights)
    for name, weight in model.state_dict().items():
        assert weight.is_cuda
        assert torch.equal(weight, before[name])
    monkeypatch.undo()
    on_cpu = estimate_factors(build("llama"), data, labels="data", accumulate="float64")
    for name in on_cpu.modules:
        assert relative(dense_E(fit, name), dense_E(on_cpu, name)) < 1e-8


def test_a_factor_for_which_the_gpu_has_no_room_is_decomposed_on_the_cpu_and_that_is_said(
    monkeypatch,
):
    eigh = torch.linalg.eigh

    def look(matrix):
        assert not matrix.is_cuda
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", look)
    monkeypatch.setattr(eigenbasis, "free_bytes", lambda device: 1000)
    with logged() as lines:
        estimate_factors(build("llama").cuda(), examples(16))
    assert any("on the cpu instead of cuda:0: it needs" in line for line in lines)


def test_the_command_line_fits_on_one_gpu(tmp_path):
    model = save_tiny_llama(tmp_path / "model")
    data = write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in texts(20)])
    done = run_cli(
        [
            "launch",
            "--config_file",
            LAUNCHERS / "one_gpu.yaml",
            *("estimate", "--model.name", model, "--data.source", data),
            *("--output", tmp_path / "store"),
        ],
        env={"ACCELERATE_USE_CPU": "false"},
    )
    assert done.returncode == 0, done.stderr
    assert "cuda" in done.stdout
    assert load_factors(tmp_path / "store").manifest["complete"] is True


@pytest.mark.parametrize("options", [{}, {"normalize": "cosine"}, {"rank": 3, "rescore": 6}])
@pytest.mark.parametrize("family", KINDS)
def test_scores_on_the_gpu_equal_those_on_the_cpu(family, options):
    train, queries = examples(12, seed=1, prompts=True), examples(4, seed=2, prompts=True)
    factors = estimate_factors(build(family), train, labels="data", accumulate="float64")
    options = {"top_k": 3, "per_token": "top", "per_module": True, "batch_tokens": 24, **options}
    on_cpu = influence_scores(build(family), factors, queries, train, **options)
    on_gpu = influence_scores(build(family).cuda(), factors, queries, train, **options)
    assert relative(on_gpu.module_scores, on_cpu.module_scores) < 1e-8
    assert relative(on_gpu.details.token_scores, on_cpu.details.token_scores) < 1e-8


def test_an_index_made_and_read_on_the_gpu_scores_as_on_the_cpu(tmp_path):
    model = save_tiny_llama(tmp_path / "model", dtype=torch.float64)
    write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in texts(20)])
    write_jsonl(tmp_path / "queries.jsonl", [{"text": text} for text in texts(2, seed=1)])
    given = ["--model.name", model, "--data.source", tmp_path / "text.jsonl"]
    fit = ["estimate", *given, "--model.dtype", "float64", "--factors.labels", "data"]
    done = run_cli([*fit, "--output", tmp_path / "store"], env={"ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr
    found = []
    for use_cpu in ("true", "false"):
        index, scores = tmp_path / f"index-{use_cpu}", tmp_path / f"scores-{use_cpu}"
        store = ["--factors", tmp_path / "store"]
        kept = ["--index.rank", "64", "--index.dtype", "float64"]
        ask = ["--index", index, "--queries", tmp_path / "queries.jsonl"]
        for command in (
            ["index", *store, *kept, "--output", index],
            ["query", *store, *ask, "--scores.rescore", "20", "--output", scores],
        ):
            done = run_cli(command, env={"ACCELERATE_USE_CPU": use_cpu})
            assert done.returncode == 0, done.stderr
            assert ("cuda" in done.stdout) == (use_cpu == "false")
        found.append(load_file(scores / "scores.safetensors"))
    assert relative(found[1]["scores"], found[0]["scores"]) < 1e-6
    assert relative(found[1]["exact_scores"], found[0]["exact_scores"]) < 1e-6


def test_a_function_on_the_gpu_gives_what_it_gives_on_the_cpu():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(6, 9), torch.nn.GELU(), torch.nn.Linear(9, 4)
    ).double()
    x, y = torch.randn(30, 6, dtype=torch.float64), torch.randint(4, (30,))

    def func(x, y):
        return torch.nn.functional.cross_entropy(net(x), y, reduction="none")

    v = torch.randn(3, sum(p.numel() for p in net.parameters()), dtype=torch.float64)
    with cache_linears(net) as caches:
        options = {"batch_size": 8, "mlp_cache": caches, "damping": 0.01}
        on_cpu = ihvp_at_x_ekfac(func, x, y, **options)(v)
        net.cuda()
        on_gpu = ihvp_at_x_ekfac(func, x.cuda(), y.cuda(), **options)
    assert on_gpu(v.cuda()).is_cuda
    assert relative(on_gpu(v.cuda()).cpu(), on_cpu) < 1e-8
    assert relative(on_gpu(v), on_cpu) < 1e-8
