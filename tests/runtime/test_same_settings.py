"""Every setting of every command is compared between workers, by name; paths are not."""

import shutil

import pytest
import torch
from helpers.refusals import SAID, on_two_workers_in_turn
from helpers.workshop import (
    rewrite_manifest,
    run_here,
    save_tiny_llama,
    texts,
    write_jsonl,
)
from safetensors.torch import load_file, save_file

from ekfac_dist.config import (
    DataConfig,
    EstimateConfig,
    ModelConfig,
    QueryConfig,
    dotted,
    field_types,
)
from ekfac_dist.errors import LaunchError
from ekfac_dist.runtime import same_settings as agreement
from ekfac_dist.runtime.processes import World
from ekfac_dist.runtime.same_settings import PATHS, require_same_settings

ESTIMATE = EstimateConfig(
    model=ModelConfig(name="m", adapter="a"), data=DataConfig(source="d"), output="o"
)
QUERY = QueryConfig(factors="f", queries="q", output="o")
QUERY.scores.candidates = "rows.txt"
QUERY.damping.modules = {"*": 0.3}
FIELDS = [(config, name) for config in (ESTIMATE, QUERY) for name in field_types(type(config))]


class Two(World):
    """Worker 0 of two, of which the other has something else."""

    def __init__(self, other) -> None:
        super().__init__(0, 2, 0, torch.device("cpu"), "gloo")
        self.other = other

    def gather(self, value):
        return [value, self.other(value) if isinstance(value, dict) else value]

    def announce_failure(self, error, store=None, *, leaves=True):
        return True


@pytest.mark.parametrize(("config", "name"), FIELDS)
def test_every_field_of_a_configuration_is_compared_but_for_paths(config, name):
    settings = dotted(config.as_dict())
    key = next(key for key in settings if key == name or key.startswith(f"{name}."))
    other = "another" if isinstance(settings[key], str) else -1

    def changed(value):
        seen = {}
        require_same_settings(Two(lambda v: seen.update(v) or v), settings | {key: other})
        return seen

    if name in PATHS and isinstance(settings[key], str):
        require_same_settings(Two(changed), settings)
        return
    with pytest.raises(LaunchError) as caught:
        require_same_settings(Two(changed), settings)
    assert f"({key}: {other!r} and {settings[key]!r})" in str(caught.value)


def test_software_and_the_launchers_sharding_are_compared(monkeypatch):
    for name in (
        "the version of torch",
        "the version of transformers",
        "the version of ekfac_dist",
    ):
        with pytest.raises(LaunchError, match=rf"\({name}: '9' and '"):
            require_same_settings(Two(lambda v, name=name: {**v, name: "9"}), {})
    with pytest.raises(LaunchError, match="fsdp_version: 2 and 0"):
        require_same_settings(Two(lambda v: {**v, "the launcher's fsdp_version": 2}), {})
    monkeypatch.setattr(
        agreement,
        "software",
        lambda: dict.fromkeys((*agreement.NUMERIC_SOFTWARE, "accelerate"), "1"),
    )
    require_same_settings(Two(lambda v: v), {})


def test_a_number_that_is_none_is_no_difference():
    require_same_settings(Two(lambda v: {**v, "a": float("nan")}), {"a": float("nan")})
    require_same_settings(Two(lambda v: {**v, "a": 1.0}), {"a": 1})


def test_a_path_that_is_given_to_one_alone_is_a_difference():
    with pytest.raises(LaunchError, match=r"\(data.source: None and 'given'\)"):
        require_same_settings(Two(lambda v: {**v, "data.source": None}), {"data.source": "x"})


# -- real workers ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model and texts."""
    root = tmp_path_factory.mktemp("agreement")
    save_tiny_llama(root / "model")
    write_jsonl(root / "text.jsonl", [{"text": text} for text in texts(9)])
    write_jsonl(root / "other.jsonl", [{"text": text} for text in texts(9, seed=3)])
    (root / "broken.yaml").write_text("model: [")
    return root


def ends_of(root, runs):
    """By a run's name, exit status and standard error of each of two workers."""
    output = root / f"ends-{next(iter(runs))}"
    output.mkdir()
    lines = [[list(map(str, one)) for one in ranks] for ranks in runs.values()]
    found = on_two_workers_in_turn(lines, output, timeout=240)
    return {name: (found[0][k], found[1][k]) for k, name in enumerate(runs)}


def fit(root):
    source = ["--model.name", root / "model", "--data.source", root / "text.jsonl"]
    return ["estimate", *source, "--save_minutes", "null", "--output", root / "factors"]


def require_refused(ends, says):
    """Every worker ends with status 2; worker 0 speaks for all."""
    (status, told), (other_status, other_told) = ends
    assert (status, other_status) == (2, 2)
    assert told.count(SAID) == 1
    assert SAID not in other_told
    assert says in told


FITS = {
    "a seed": "has other settings than worker 0 (factors.seed: 1 and 0)",
    "minutes": "(save_minutes: 2.0 and 1.0)",
    "a listing on one": "(--dry-run: True and False)",
    "a listing": "(model.modules: ['*.1.*'] and ['*.0.*'])",
    "overwriting on one": "(--overwrite: True and False)",
    "another command": "(the command: 'ekfac-dist query' and 'ekfac-dist estimate')",
    "a configuration that is broken on one": "broken.yaml is not YAML",
    "other data": "has other data, by fingerprint,",
}


@pytest.fixture(scope="module")
def fits(root):
    """How each fit ended whose workers were given something else."""
    line = fit(root)
    query = ["query", "--factors", root, "--queries", root, "--output", root / "scores"]
    runs = {
        "a seed": [[*line, "--factors.seed", r] for r in "01"],
        "minutes": [[*line, "--save_minutes", r] for r in "12"],
        "a listing on one": [line, [*line, "--dry-run"]],
        "a listing": [[*line, "--dry-run", "--model.modules", f"['*.{r}.*']"] for r in "01"],
        "overwriting on one": [line, [*line, "--overwrite"]],
        "another command": [line, query],
        "a configuration that is broken on one": [line, [*line, "--config", root / "broken.yaml"]],
        "other data": [line, [*line, "--data.source", root / "other.jsonl"]],
    }
    found = ends_of(root, runs)
    assert not (root / "factors").exists()
    return found


@pytest.mark.parametrize("run", FITS)
def test_workers_of_a_fit_that_were_given_something_else_are_refused_by_its_name(fits, run):
    require_refused(fits[run], FITS[run])


QUERIES = {
    "a damping": "(damping.value: 0.2 and 0.1)",
    "factors": "has other factors, by fingerprint,",
    "queries": "has other queries, by fingerprint,",
    "candidates": "has other candidates than worker 0 ([1, 2, 4] and [1, 2, 3])",
    "a head": "has other model weights outside the tracked modules, by fingerprint,",
}


@pytest.fixture(scope="module")
def queries(root):
    """How each query ended whose workers were given something else."""
    done = run_here([*fit(root), "--output", root / "store"])
    assert done.returncode == 0, done.stderr
    write_jsonl(root / "queries.jsonl", [{"text": "A worker waits."}])
    write_jsonl(root / "questions.jsonl", [{"text": "A worker reads."}])
    (root / "rows.txt").write_text("1\n2\n3\n")
    (root / "lines.txt").write_text("1\n2\n4\n")
    shutil.copytree(root / "store", root / "mixed")
    rewrite_manifest(root / "mixed", lambda m: m["fisher"].update(seed=1))
    shutil.copytree(root / "model", root / "headed")
    weights = load_file(root / "model" / "model.safetensors")
    weights["lm_head.weight"][0] += 1
    save_file(weights, root / "headed" / "model.safetensors", metadata={"format": "pt"})
    line = ["query", "--factors", root / "store", "--queries", root / "queries.jsonl"]
    line += ["--output", root / "scores", "--scores.top_k", "1", "--model.allow_changes", "true"]
    runs = {
        "a damping": [[*line, "--damping.value", f"0.{r}"] for r in "12"],
        "factors": [line, [*line, "--factors", root / "mixed"]],
        "queries": [line, [*line, "--queries", root / "questions.jsonl"]],
        "candidates": [
            [*line, "--scores.candidates", root / name] for name in ("rows.txt", "lines.txt")
        ],
        "a head": [[*line, "--model.name", root / name] for name in ("model", "headed")],
        "nothing": [line, [*line, "--output", root / "elsewhere"]],
    }
    return ends_of(root, runs)


@pytest.mark.slow
@pytest.mark.parametrize("run", QUERIES)
def test_workers_of_a_query_that_were_given_something_else_are_refused_by_its_name(queries, run):
    require_refused(queries[run], QUERIES[run])


@pytest.mark.slow
def test_where_outputs_lie_may_differ(queries, root):
    assert [status for status, _ in queries["nothing"]] == [0, 0]
    assert (root / "scores" / "manifest.json").exists()
    assert not (root / "elsewhere").exists()
