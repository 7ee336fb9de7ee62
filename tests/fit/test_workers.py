"""1, 2 and 3 real workers, unequal and empty shards: the same factors."""

import re
from pathlib import Path

import pytest
import torch
import worker_fits
from helpers.dense import dense_E, relative
from helpers.halves import assert_same_halves
from helpers.workshop import run_workers
from worker_fits import FITS

from ekfac_dist import load_factors
from ekfac_dist.errors import StoreError

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The fits by one worker."""
    root = tmp_path_factory.mktemp("alone")
    worker_fits.fit_all(root)
    return root


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def by_many(request, tmp_path_factory):
    """The number of workers, and the same fits by them."""
    root = tmp_path_factory.mktemp("workers")
    done = run_workers(HERE / "worker_fits.py", request.param, root, timeout=120)
    assert done.returncode == 0, done.stderr
    return request.param, root


@pytest.mark.parametrize("fit", FITS)
def test_any_number_of_workers_fits_the_same_factors(alone, by_many, fit):
    workers, root = by_many
    one, many = load_factors(alone / fit), load_factors(root / fit)
    tolerance = 1e-5 if FITS[fit][2]["accumulate"] == "float32" else 1e-10
    assert many.manifest["passes"]["covariance"]["workers"] == workers
    for key in ("num_sequences", "num_positions", "num_labels", "fingerprint"):
        assert many.manifest["data"][key] == one.manifest["data"][key]
    assert many.manifest["modules"] == one.manifest["modules"]
    assert_same_halves(many, one, 100 * tolerance)
    for name, module in one.modules.items():
        assert relative(dense_E(many, name), dense_E(one, name)) < tolerance
        for factor in (module.input, module.output):
            (count, of_many), (expected, of_one) = covariance(many, factor), covariance(one, factor)
            assert count == expected
            assert relative(of_many, of_one) < tolerance


def covariance(factors, factor):
    reader, n = factors._source, factors_size(factors, factor)
    file = f"covariance/{factor}.safetensors"
    return int(reader.header(file)["count"]), reader.tensor(file, "sum", (n, n))


def factors_size(factors, factor):
    for module in factors.modules.values():
        if module.input == factor:
            return module.input_size
        if module.output == factor:
            return module.num_outputs
    raise AssertionError(factor)


def test_factors_in_memory_are_on_every_worker(alone, by_many):
    workers, root = by_many
    one = load_factors(alone / next(iter(FITS)))
    for rank in range(workers):
        traces = torch.load(root / f"memory-{rank}.pt", weights_only=True)
        for name, trace in traces.items():
            assert trace == pytest.approx(one.module(name).lambda_OI.sum().item(), rel=1e-10)


@pytest.mark.parametrize(
    ("workers", "eigen"),
    [
        pytest.param(1, "rank0", marks=pytest.mark.slow),
        pytest.param(2, "rank0", marks=pytest.mark.slow),
        (2, "sharded"),
    ],
)
def test_a_decomposition_that_fails_is_told_on_every_worker(tmp_path, workers, eigen):
    done = run_workers(HERE / "worker_failure.py", workers, tmp_path / "store", eigen)
    assert done.returncode == 0, done.stderr
    said = dict(re.findall(r"WORKER (\d): (.*)", done.stdout))
    assert len(said) == workers
    for sentence in said.values():
        assert "model.layers.0.mlp.gate_proj.input" in sentence or eigen == "sharded"
        assert re.search(r"The factor model\.layers\.\d\.mlp\.\w+_proj\.(in|out)put", sentence)
        assert "did not converge" in sentence
    with pytest.raises(StoreError, match="incomplete"):
        load_factors(tmp_path / "store")


@pytest.fixture(scope="module")
def misuse(tmp_path_factory):
    """What each of 2 workers said at each step of worker_misuse.py."""
    output = tmp_path_factory.mktemp("misuse")
    done = run_workers(HERE / "worker_misuse.py", 2, output, timeout=120)
    assert done.returncode == 0, done.stderr
    said = {}
    for rank, step, sentence in re.findall(r"WORKER (\d) ([\w ]+): (.*)", done.stdout):
        said.setdefault(step, {})[int(rank)] = sentence
    return said, output


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        ("infinity", r"worker \d of 2: NaN or infinity in .* at sequence 17 of the data"),
        ("afterwards", "None"),
        ("another seed", r"Worker 1 has other arguments than worker 0 \(seed: 1 and 0\)"),
        ("another model", "Worker 1 has other model weights"),
        ("another head", "Worker 1 has other model weights outside the tracked modules"),
        (
            "another configuration",
            r"Worker 1 has other settings of the model .*\(rms_norm_eps: 1.0",
        ),
        ("other minutes", r"Worker 1 has other arguments .*\(save_minutes: 11 and 10\)"),
        ("another task", r"Worker 1 has other arguments .*\(the task's fingerprint: '"),
        ("other data", "Worker 1 has other data"),
        ("another shard", r"Worker 1 has other arguments than worker 0 \(shard: 2 and 1\)"),
        ("other checkpointing", r"Worker 1 has .* \(gradient_checkpointing: True and False\)"),
        ("a shard of three", r"shard is 3, but the number of workers is 2, .* give 1, 2 or auto"),
        ("a shard of none", "factors.shard is 0; it must be a whole number of 1 or more"),
        ("a shard in words", "factors.shard is 'two'; it must be a whole number"),
        ("checkpointing of one", "model.gradient_checkpointing is 1; give true, false or auto"),
        (
            "output on one",
            r"Worker 1 has other arguments than worker 0 \(output: None and 'given'\)",
        ),
        ("afterwards again", "None"),
        ("a prepared model", "None"),
        ("a plain model", "None"),
    ],
)
def test_a_mistake_on_one_worker_is_told_on_every_worker_and_the_group_lives_on(
    misuse, step, sentence
):
    said, _ = misuse
    assert set(said[step]) == {0, 1}
    assert said[step][0] == said[step][1]
    assert re.match(sentence, said[step][0]), said[step][0]


def test_a_wrong_shard_begins_no_store(misuse):
    _, output = misuse
    assert (output / "both").exists()
    assert not any((output / name).exists() for name in ("three", "none", "two"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shard", "fault"), [(2, "which it does not divide"), (4, "which is less")]
)
def test_three_workers_refuse_a_wrong_shard_before_a_store_is_begun(tmp_path, shard, fault):
    store = tmp_path / "store"
    done = run_workers(HERE / "worker_wrong_shard.py", 3, store, str(shard))
    assert done.returncode == 0, done.stderr
    said = dict(re.findall(r"WORKER (\d): (.*)", done.stdout))
    sentence = f"shard is {shard}, but the number of workers is 3, {fault}; give 1, 3 or auto."
    assert said == {f"{rank}": f"2 {sentence}" for rank in range(3)}
    assert not store.exists()


def test_a_module_that_only_some_batches_use_is_told_where_rows_travel(misuse):
    said, _ = misuse
    sentence = "Module model.layers.0.mlp.gate_proj was not used in this forward. Leave it out"
    assert set(said["a module that some batches skip"]) == {0, 1}
    for of_worker in said["a module that some batches skip"].values():
        assert sentence in of_worker


def test_a_model_that_accelerate_prepared_has_the_factors_of_the_plain_one(misuse):
    _, output = misuse
    prepared, plain = (load_factors(output / name) for name in ("prepared", "plain"))
    assert list(prepared.modules) == list(plain.modules)
    for name in plain.modules:
        assert relative(dense_E(prepared, name), dense_E(plain, name)) < 1e-5
