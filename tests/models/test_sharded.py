"""Models whose weights FSDP2 shards over the workers: the same factors, and the same ends."""

import functools
import json
import re
import signal
from pathlib import Path

import pytest
import transformers
from helpers.dense import counts_in, dense_E, relative
from helpers.families import tiny_config
from helpers.long_runs import arguments, content, running, wait_for, worker
from helpers.networks import build
from helpers.workshop import (
    VOCABULARY,
    run_cli,
    run_workers,
    save_tiny,
    save_tiny_llama,
    texts,
    write_jsonl,
)
from safetensors.torch import load_file, save_file
from worker_sharded import FITS

from ekfac_dist import load_factors
from ekfac_dist.errors import ModelError
from ekfac_dist.factors.layout import MANIFEST
from ekfac_dist.models.load.fsdp import ModelLayout
from ekfac_dist.models.sharding import layers

HERE = Path(__file__).parent
LAUNCHER = HERE.parents[1] / "launch" / "accelerate" / "fsdp.yaml"
# The fits of the default run.
FEW = (
    *("conv1d, tied", "per token, blocks", "experts", "embeddings and head apart"),
    *("encoder-decoder", "layers computed again", "shared out", "an empty shard, shared out"),
)
# What that makes the launcher tell its workers.
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """The same fits of sharded and of whole models, by the number of workers and the fits."""

    @functools.cache
    def of(workers, fits):
        root = tmp_path_factory.mktemp("sharded")
        for kind in ("whole", "sharded"):
            (root / kind).mkdir()
        done = run_workers(HERE / "worker_sharded.py", workers, root, *fits, timeout=360)
        assert done.returncode == 0, done.stderr
        return root

    return of


@pytest.mark.parametrize(
    ("workers", "fits", "fit"),
    [
        pytest.param(workers, fits, fit, marks=marks, id=f"{workers}-{fit}")
        for workers, fits, marks in (
            (2, FEW, ()),
            (2, tuple(fit for fit in FITS if fit not in FEW), pytest.mark.slow),
            (3, tuple(FITS), pytest.mark.slow),
        )
        for fit in fits
    ],
)
def test_a_sharded_model_has_the_factors_of_the_whole_one(stores, workers, fits, fit):
    root = stores(workers, fits)
    # Sums of gradients of an encoder, and of rows that owners sum, are in another order.
    if fit != "encoder-decoder" and "shared out" not in fit:
        one, other = (content(root / kind / fit) for kind in ("sharded", "whole"))
        if fit.endswith("computed again"):  # which the manifests tell
            del one[MANIFEST], other[MANIFEST]
        assert one == other
        return
    sharded, whole = (load_factors(root / kind / fit) for kind in ("sharded", "whole"))
    assert sharded.manifest["modules"] == whole.manifest["modules"]
    for key in ("fingerprint", "narrower_fingerprints", "class"):
        assert sharded.manifest["model"][key] == whole.manifest["model"][key]
    assert sharded.manifest["data"] == whole.manifest["data"]
    for name, module in whole.modules.items():
        assert relative(dense_E(sharded, name), dense_E(whole, name)) < 1e-12
        assert counts_in(sharded, "covariance", module) == counts_in(whole, "covariance", module)


def test_layers_that_share_weights_are_refused():
    model = build("llama")
    ModelLayout.of(model).require_separate_layers(layers(model))
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    with pytest.raises(ModelError, match=r"0\.mlp\.up_proj\.weight and .* are one parameter"):
        ModelLayout.of(model).require_separate_layers(layers(model))


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    """A model and data, and what whole models make of them."""
    root = tmp_path_factory.mktemp("sharded-command")
    save_tiny_llama(root / "model")
    write_jsonl(root / "text.jsonl", [{"text": text} for text in texts(61)])
    done = run_cli(arguments(root, root / "whole"), workers=2, timeout=120)
    assert done.returncode == 0, done.stderr
    return root


def test_the_command_shards_as_the_launchers_configuration_says(setting, tmp_path):
    launched = ["launch", "--config_file", LAUNCHER, "--num_processes", "2"]
    command = [*launched, *arguments(setting, tmp_path / "store")]
    done = run_cli(command, timeout=120, env={"ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr
    assert "sharded over 2 workers" in done.stdout
    assert content(tmp_path / "store") == content(setting / "whole")


@pytest.mark.slow
def test_a_sharded_models_modules_are_listed(setting, tmp_path):
    listed = run_cli([*arguments(setting, tmp_path / "none"), "--dry-run"], workers=2, env=FSDP)
    assert listed.returncode == 0, listed.stderr
    assert "model.layers.1.mlp.down_proj" in listed.stdout


@pytest.mark.slow
def test_a_preempted_run_with_a_sharded_model_goes_on(setting, tmp_path):
    store = tmp_path / "store"
    with running(setting, store, env=FSDP) as process:
        assert wait_for(lambda: any(store.glob("state/refit-1/*/part.json")), process)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr
    assert len(re.findall("SIGTERM", stderr)) >= 1
    assert "Traceback" not in stderr
    done = run_cli(arguments(setting, store), workers=2, env=FSDP, timeout=120)
    assert done.returncode == 0, done.stderr
    assert content(store) == content(setting / "whole")


def test_what_is_not_finite_is_told_once_and_by_name(setting, tmp_path):
    save_tiny_llama(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 2] = float("nan")
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    done = run_cli(
        [*arguments(setting, tmp_path / "store"), "--model.name", tmp_path / "model"],
        workers=2,
        env=FSDP,
    )
    assert done.returncode == 2, done.stderr
    said = re.findall(r"ekfac-dist: error: (.*)", done.stderr)
    assert len(said) == 1
    assert "model.layers.1.mlp.down_proj" in said[0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params is true"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (
                ({"FSDP_VERSION": "1"}, "fsdp_version: 2"),
                (
                    {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
                    "fsdp_activation_checkpointing is true",
                ),
            )
        ),
    ],
)
def test_what_cannot_be_sharded_is_refused(setting, tmp_path, changes, says):
    done = run_cli(arguments(setting, tmp_path / "store"), workers=2, env=FSDP | changes)
    assert done.returncode == 2, done.stderr
    said = re.findall(r"ekfac-dist: error: (.*)", done.stderr)
    assert len(said) == 1
    assert says in said[0]


@pytest.mark.slow
def test_queries_are_answered_with_a_sharded_model_as_with_a_whole_one(setting, tmp_path):
    asked = [{"prompt": "The worker", "completion": " reads a batch"}, {"text": "Every sum."}]
    queries = write_jsonl(tmp_path / "queries.jsonl", asked)
    found = {}
    for name, env, shard in (("whole", {}, 1), ("sharded", FSDP, 1), ("both", FSDP, 2)):
        given = ["query", "--factors", setting / "whole", "--queries", queries]
        given += ["--scores.shard", str(shard), "--output", tmp_path / name]
        done = run_cli(given, workers=2, env=env, timeout=120)
        assert done.returncode == 0, done.stderr
        assert f"shard         {shard}: " in done.stdout
        found[name] = load_file(tmp_path / name / "scores.safetensors")["scores"].double()
    for name in ("sharded", "both"):
        assert relative(found[name], found["whole"]) < 1e-5


@pytest.mark.slow
def test_another_model_is_refused_once_and_by_name_though_it_is_sharded(setting, tmp_path):
    queries = write_jsonl(tmp_path / "queries.jsonl", [{"prompt": "a", "completion": "b"}])
    save_tiny_llama(tmp_path / "model", seed=5)
    done = run_cli(
        [
            *("query", "--factors", setting / "whole", "--queries", queries),
            *("--model.name", tmp_path / "model", "--output", tmp_path / "scores"),
        ],
        workers=2,
        env=FSDP,
    )
    assert done.returncode == 2, done.stderr
    said = re.findall(r"ekfac-dist: error: (.*)", done.stderr)
    assert len(said) == 1
    assert "the given LlamaForCausalLM (float32) has" in said[0]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_ends_a_sharded_run_which_goes_on(setting, tmp_path, rank):
    store = tmp_path / "store"
    with running(setting, store, env=FSDP) as process:
        assert wait_for(lambda: any(store.glob("state/covariance-1/*/part.json")), process)
        found = worker(process, rank)
        assert found is not None
        found.kill()
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    said = re.findall(r"ekfac-dist: error: .*", stderr)
    assert said[-1].endswith(f"worker {rank} was ended by SIGKILL")
    assert "Traceback" not in stderr
    done = run_cli(arguments(setting, store), workers=2, env=FSDP, timeout=120)
    assert done.returncode == 0, done.stderr
    assert content(store) == content(setting / "whole")


def with_tied_configuration(folder):
    model = save_tiny_llama(folder, seed=3)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return model


def rwkv(folder):
    config = tiny_config(transformers.RwkvConfig)
    config.vocab_size, config.rescale_every = VOCABULARY, 1
    return save_tiny(folder, config)


@pytest.mark.slow
@pytest.mark.parametrize("save", [with_tied_configuration, rwkv])
def test_what_loading_changes_is_so_on_every_worker(setting, tmp_path, save):
    """Weights that were not tied, whatever the configuration says; weights that would be halved."""
    model = save(tmp_path / "model")
    for kind, env in (("whole", {}), ("sharded", FSDP)):
        given = [*arguments(setting, tmp_path / kind), "--model.name", model]
        given += ["--data.max_tokens", "32"]
        done = run_cli(given, workers=2, env=env, timeout=120)
        assert done.returncode == 0, done.stderr
    assert content(tmp_path / "sharded") == content(tmp_path / "whole")


@pytest.mark.slow
def test_a_failure_of_one_worker_alone_is_said_once_and_ends_the_others(setting, tmp_path):
    # A folder where a saved state has to go keeps worker 1, and no other, from saving it.
    store = tmp_path / "store"
    spoilt = tmp_path / "sitecustomize.py"
    spoilt.write_text(
        "import os, sys\n"
        "if os.environ.get('RANK') == '1' and 'ekfac_dist' in ' '.join(sys.orig_argv):\n"
        "    from ekfac_dist.fit import saved_parts\n"
        "    from ekfac_dist.errors import OutputError\n"
        "    from ekfac_dist.fit import checkpoints\n"
        "    def fail(*a, **k): raise OutputError('No room is left.')\n"
        "    checkpoints.write_part = fail\n"
    )
    env = FSDP | {"PYTHONPATH": str(tmp_path)}
    done = run_cli(arguments(setting, store), workers=2, env=env, timeout=90)
    assert done.returncode == 2, done.stderr
    said = re.findall(r"ekfac-dist: error: (.*)", done.stderr)
    assert said == ["worker 1 of 2: No room is left."]
    assert "Traceback" not in done.stderr
