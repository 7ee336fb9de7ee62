"""Bad input is answered with one sentence and exit status 2, promptly, and nothing is lost.

One table of cases serves one worker, where each is run in this process, and two real ones, where a
few stand for each way of failing and the whole table is marked slow.
"""

import json
import re
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers.refusals import (
    BINARY,
    SAID,
    Case,
    Run,
    in_this_process,
    on_real_workers,
    require_refusal,
    table,
)
from helpers.workshop import (
    CONTEXT,
    VOCABULARY,
    save_tiny,
    save_tiny_llama,
    texts,
    tiny_tokenizer,
    write_jsonl,
    write_yaml,
)
from safetensors.torch import load_file, save_file
from transformers import MambaConfig

from ekfac_dist import cli, load_factors


@dataclass
class Setting:
    """A good run in a directory of its own, for a case to spoil.

    Attributes:
        directory: Holds all that is made.
        good_model: A model that many cases share; `model` is a copy that may be spoilt.
        config: Goes to the YAML file.
        options: Follow `--config FILE` on the command line.
    """

    directory: Path
    good_model: Path
    config: dict[str, Any] = field(default_factory=dict)
    options: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        data = write_jsonl(self.path("text.jsonl"), [{"text": text} for text in texts(12)])
        self.config = {
            "model": {"name": self.good_model},
            "data": {"source": data, "max_tokens": 64},
            "factors": {},
            "batch_tokens": 256,
            "output": self.path("factors"),
        }

    def path(self, name: str) -> Path:
        return self.directory / name

    def model(self) -> Path:
        """A copy of the good model."""
        self.config["model"]["name"] = copy = self.path("model")
        shutil.copytree(self.good_model, copy)
        return copy

    def source(self, name: str, content: bytes | str | None = None) -> Path:
        """Names the data, and writes it."""
        self.config["data"]["source"] = path = self.path(name)
        if content is not None:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def rows(self, rows: list[dict[str, Any]]) -> None:
        write_jsonl(self.source("rows.jsonl"), rows)

    def output(self) -> Path:
        """The output directory, made."""
        self.path("factors").mkdir()
        return self.path("factors")

    def arguments(self) -> list[str]:
        write_yaml(self.path("config.yaml"), self.config)
        return ["estimate", "--config", str(self.path("config.yaml")), *self.options]


CASES: list[Case] = []
case = table(CASES)

# One for each kind of bad input: these run on two real workers every time, the others when asked.
STAND_FOR_ALL = (
    "a model whose MLPs are not found",
    "one sequence that makes activations infinite",
    "an empty .jsonl file",
    "a wrong type on the command line",
    "an output that holds another run",
)


# -- the model -------------------------------------------------------------------------------------


@case("a model directory that is missing", "no model directory", "nowhere")
def _(setting: Setting) -> None:
    setting.config["model"]["name"] = setting.path("nowhere")


@case("a hub id that cannot be had", "Model nobody/nothing", "could not be loaded")
def _(setting: Setting) -> None:
    setting.config["model"]["name"] = "nobody/nothing"


@case("a model that is a file", "is the file", "text.jsonl", "directory")
def _(setting: Setting) -> None:
    setting.config["model"]["name"] = setting.path("text.jsonl")


@case("a directory that is no model", "without a config.json", "papers", "saved Hugging Face model")
def _(setting: Setting) -> None:
    setting.config["model"]["name"] = setting.path("papers")
    setting.path("papers").mkdir()
    setting.path("papers/notes.txt").write_text("no model")


@case("a model configuration that is not JSON", "model", "config.json")
def _(setting: Setting) -> None:
    setting.model().joinpath("config.json").write_text("{model_type: llama")


@case("a model of a type that nobody knows", "model", "hovercraft")
def _(setting: Setting) -> None:
    config = setting.model() / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "hovercraft"}))


@case(
    "a model that is no causal language model",
    "model",
    "type 'vit'",
    "no causal language model",
    "give one",
)
def _(setting: Setting) -> None:
    config = setting.model() / "config.json"
    config.write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))


@case("a model without a tokenizer", "tokenizer", "model", "beside the model")
def _(setting: Setting) -> None:
    for file in setting.model().glob("tokenizer*"):
        file.unlink()


@case("pickled weights only", "only pickled weights", "pytorch_model.bin", "safetensors")
def _(setting: Setting) -> None:
    weights = setting.model() / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()


@case("no weights at all", "no safetensors weights", "model")
def _(setting: Setting) -> None:
    setting.model().joinpath("model.safetensors").unlink()


@case("weights that are cut short", "weights", "damaged", "model")
def _(setting: Setting) -> None:
    weights = setting.model() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


@case("weights that are no safetensors", "weights", "damaged", "model")
def _(setting: Setting) -> None:
    setting.model().joinpath("model.safetensors").write_bytes(BINARY)


@case("weights that are not all there", "lack 1 of its parameters", "up_proj", "random")
def _(setting: Setting) -> None:
    weights = setting.model() / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})


@case("weights of another shape", "model", "down_proj")
def _(setting: Setting) -> None:
    weights = setting.model() / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(16, 7)
    save_file(tensors, weights, metadata={"format": "pt"})


@case("a model whose MLPs are not found", "No MLP linear", "Mamba", r"model\.modules", r"\*\.")
def _(setting: Setting) -> None:
    setting.config["model"]["name"] = save_model_without_mlps(setting.path("mamba"))


@case("a tokenizer that knows more than the model", "token id", "100 tokens", "tokenizer")
def _(setting: Setting) -> None:
    setting.config["model"]["name"] = save_tiny_llama(setting.path("small"), vocab_size=100)


@case("globs that match nothing", r"\*\.mpl\.\*", "none of", "linear", "such as")
def _(setting: Setting) -> None:
    setting.config["model"]["modules"] = ["*.mlp.*", "*.mpl.*"]


@case("a glob that matches no linear module", r"'\*norm'", "LlamaRMSNorm", "such as")
def _(setting: Setting) -> None:
    setting.options = ["--model.modules", "['*norm']"]


@case("no globs at all", "model.modules", "empty", "null")
def _(setting: Setting) -> None:
    setting.config["model"]["modules"] = []


@case(
    "a weight that is not finite",
    "NaN or infinity",
    "input of module model.layers.1.mlp.down_proj",  # what the gate gives is what this one reads
    "covariance pass",
    r"sequence \d+ ",
    begun=True,
)
def _(setting: Setting) -> None:
    weights = setting.model() / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.gate_proj.weight"][3, 5] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})


@case(
    "one sequence that makes activations infinite",
    "NaN or infinity",
    "input of module model.layers.0.mlp.gate_proj",
    "sequence 7 ",
    begun=True,
)
def _(setting: Setting) -> None:
    """The token of '#' occurs in sequence 7 alone, so one worker alone meets it."""
    token = tiny_tokenizer()("#")["input_ids"][1]
    weights = setting.model() / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"][token] = float("inf")
    save_file(tensors, weights, metadata={"format": "pt"})
    written = texts(12)
    written[7] += " # is here alone"
    setting.rows([{"text": text} for text in written])


# -- the data --------------------------------------------------------------------------------------


@case("a data file that is missing", "no file", "elsewhere.jsonl")
def _(setting: Setting) -> None:
    setting.source("elsewhere.jsonl")


@case("a data set that the hub cannot give", "nobody/no-data", "hub")
def _(setting: Setting) -> None:
    setting.config["data"]["source"] = "nobody/no-data"


@case("a data file of an unknown ending", "text.docx", "'.docx'", ".jsonl", ".txt")
def _(setting: Setting) -> None:
    setting.source("text.docx", "some text")


@case("a directory that is no data set", "papers", "save_to_disk")
def _(setting: Setting) -> None:
    setting.source("papers").mkdir()


@case("a column that does not exist", "no column 'txt'", "text")
def _(setting: Setting) -> None:
    setting.config["data"]["text"] = "txt"


@case("a prompt column that does not exist", "no column 'question'", "text")
def _(setting: Setting) -> None:
    setting.config["data"]["prompt"] = "question"


@case("a column of numbers", "'text'", "17", "int", "must hold text")
def _(setting: Setting) -> None:
    setting.rows([{"text": 17}, {"text": 18}])


@case("a split that a file does not have", "no split 'test'", "text.jsonl")
def _(setting: Setting) -> None:
    setting.config["data"]["split"] = "test"


@case("a split that cannot be read", r"data\.split is 'train\[:10'", r"train\[:1000\]")
def _(setting: Setting) -> None:
    setting.config["data"]["split"] = "train[:10"


@case("a subset of a file", r"data\.subset is 'english'", "text.jsonl", "only hub data sets")
def _(setting: Setting) -> None:
    setting.config["data"]["subset"] = "english"


@case("a split that a saved data set dictionary does not have", "no split 'test'", "train, dev")
def _(setting: Setting) -> None:
    rows = Dataset.from_dict({"text": texts(4)})
    DatasetDict(train=rows, dev=rows).save_to_disk(setting.source("saved"))
    setting.config["data"]["split"] = "test"


@case("a split that a saved data set is not of", "no split 'test'", "train")
def _(setting: Setting) -> None:
    rows = Dataset.from_dict({"text": texts(4)}, split=datasets.Split.TRAIN)
    rows.save_to_disk(setting.source("saved"))
    setting.config["data"]["split"] = "test"


for ending in ("jsonl", "json", "csv", "parquet", "txt"):

    @case(f"an empty .{ending} file", f"text.{ending}", "is empty")
    def _(setting: Setting, ending: str = ending) -> None:
        setting.source(f"text.{ending}", b"")


for name, content in (
    ("list.json", "[]"),
    ("head.csv", "text\n"),
    ("blank.jsonl", "\n\n"),
    ("object.json", "{}"),
):

    @case(f"data without rows in {name}", name, "no rows")
    def _(setting: Setting, name: str = name, content: str = content) -> None:
        setting.source(name, content)


@case("data without rows in rows.parquet", "rows.parquet", "no rows")
def _(setting: Setting) -> None:
    Dataset.from_dict({"text": [""]}).select([]).to_parquet(setting.source("rows.parquet"))


for ending in ("jsonl", "json", "csv", "parquet", "txt"):

    @case(f"a .{ending} file that holds binary", f"text.{ending}", "not what its ending|not UTF-8")
    def _(setting: Setting, ending: str = ending) -> None:
        setting.source(f"text.{ending}", BINARY)


@case("a .parquet file that holds JSON", "text.parquet", "not what its ending .parquet says")
def _(setting: Setting) -> None:
    setting.source("text.parquet", '{"text": "this is JSON"}\n')


@case("a .jsonl file that holds plain text", "text.jsonl", "not what its ending .jsonl says")
def _(setting: Setting) -> None:
    setting.source("text.jsonl", "This is a text.\nIt is no JSON.\n")


@case("a .json file that holds a number", "text.json", "not what its ending .json says|no column")
def _(setting: Setting) -> None:
    setting.source("text.json", "3")


@case("a column of more than one type", "'text'", "holds 3", "must hold text")
def _(setting: Setting) -> None:
    setting.source("text.jsonl", '{"text": 3}\n{"text": "three"}\n')


@case("a .jsonl file that breaks off", "text.jsonl", "not what its ending .jsonl says")
def _(setting: Setting) -> None:
    setting.source("text.jsonl", '{"text": "whole"}\n{"text": "not wh')


@case("a saved data set that is damaged", "saved", "no readable saved data set")
def _(setting: Setting) -> None:
    Dataset.from_dict({"text": texts(4)}).save_to_disk(setting.source("saved"))
    next(setting.path("saved").glob("*.arrow")).write_bytes(BINARY)


@case(
    "sequences that all have no label",
    "None of the 3 sequences has a label",
    "one token",
    "all prompt",
)
def _(setting: Setting) -> None:
    setting.config["data"]["prompt"] = "prompt"
    setting.rows([{"prompt": "only a prompt", "text": text} for text in ("", None, "")])


@case(
    "a text longer than the model reads", f"model reads {CONTEXT}", "data.max_tokens", "positions"
)
def _(setting: Setting) -> None:
    setting.rows([{"text": "a long text " * 200}])
    setting.config["data"]["max_tokens"] = 10 * CONTEXT


# -- the configuration -----------------------------------------------------------------------------


@case("a configuration file that is missing", "no-such.yaml", "cannot be read", "No such file")
def _(setting: Setting) -> None:
    setting.options = ["--config", str(setting.path("no-such.yaml"))]


@case("a configuration that is not named", "configuration ''", "cannot be read")
def _(setting: Setting) -> None:
    setting.options = ["--config"]


@case("a configuration that is a directory", "cannot be read", "directory")
def _(setting: Setting) -> None:
    setting.options = ["--config", str(setting.directory)]


@case("a configuration that is no YAML", "broken.yaml", "not YAML", "line 2")
def _(setting: Setting) -> None:
    setting.path("broken.yaml").write_text("model:\n  name: [gpt2\noutput: out\n")
    setting.options = ["--config", str(setting.path("broken.yaml"))]


@case("a configuration that holds binary", "binary.yaml", "not YAML")
def _(setting: Setting) -> None:
    setting.path("binary.yaml").write_bytes(BINARY)
    setting.options = ["--config", str(setting.path("binary.yaml"))]


for name, content in (("blank", ""), ("list", "- model\n- data\n"), ("text", "gpt2\n")):

    @case(f"a configuration that is a {name}", f"{name}.yaml", "no fields")
    def _(setting: Setting, name: str = name, content: str = content) -> None:
        setting.path(f"{name}.yaml").write_text(content)
        setting.options = ["--config", str(setting.path(f"{name}.yaml"))]


@case(
    "an unknown field in the file",
    "config.yaml",
    "unknown field data.max_token;",
    r"did you mean data\.max_tokens\?",
)
def _(setting: Setting) -> None:
    setting.config["data"]["max_token"] = 64


@case("a field under no group in the file", "unknown field refit", r"did you mean factors\.refit\?")
def _(setting: Setting) -> None:
    setting.config["refit"] = "none"


@case("an unknown group in the file", "unknown field factor;", r"did you mean factors\?")
def _(setting: Setting) -> None:
    setting.config["factor"] = {"refit": "none"}


@case("a group that is a value", "field model", "gpt2", "fields of its own")
def _(setting: Setting) -> None:
    setting.config["model"] = "gpt2"


@case("an unknown option", "no option --data.max_token;", r"did you mean --data\.max_tokens\?")
def _(setting: Setting) -> None:
    setting.options = ["--data.max_token", "64"]


@case("an option like no other", r"no option --zzz\.")
def _(setting: Setting) -> None:
    setting.options = ["--zzz=1"]


@case("an option without its value", "--batch_tokens: expected one argument", "--help")
def _(setting: Setting) -> None:
    setting.options = ["--batch_tokens"]


@case("an argument that belongs nowhere", "stray")
def _(setting: Setting) -> None:
    setting.options = ["stray"]


for name, value, wanted in (
    ("data.max_tokens", "many", "a whole number"),
    ("data.max_sequences", [1, 2], "a whole number or null"),
    ("batch_tokens", 10.5, "a whole number"),
    ("factors.seed", "seven", "a whole number"),
    ("factors.partitions", "some", "a whole number or auto"),
    ("factors.keep_covariance", "perhaps", "true or false"),
    ("model.modules", {"a": 1}, "a list of texts or null"),
    ("model.name", [1], "text or null"),
):

    @case(
        f"{name} of a wrong type in the file",
        re.escape(f"{name} is {value}; it must be {wanted}"),
    )
    def _(setting: Setting, name: str = name, value: object = value) -> None:
        group, _, leaf = name.rpartition(".")
        (setting.config[group] if group else setting.config)[leaf] = value


@case("a wrong type on the command line", r"data\.max_tokens is twelve; it must be a whole number")
def _(setting: Setting) -> None:
    setting.options = ["--data.max_tokens", "twelve"]


for name in ("data.max_tokens", "data.max_sequences", "batch_tokens", "factors.partitions"):
    for value in (0, -3):

        @case(f"{name} of {value}", f"{name} is {value}", "1 or more")
        def _(setting: Setting, name: str = name, value: int = value) -> None:
            setting.options = [f"--{name}={value}"]


@case("sequences of one token", r"data\.max_tokens is 1", "2 tokens or more")
def _(setting: Setting) -> None:
    setting.config["data"]["max_tokens"] = 1


@case("a negative seed", r"factors\.seed is -1", "from 0 to")
def _(setting: Setting) -> None:
    setting.config["factors"]["seed"] = -1


for name, value, known in (
    ("model.dtype", "float8", "bfloat16"),
    ("factors.labels", "true", "sampled"),
    ("factors.refit", "per_word", "per_token"),
    ("factors.accumulate", "bfloat16", "float64"),
    ("factors.eigen", "rank1", "rank0"),
    ("factors.blocks", "0", "1 or more"),
):

    @case(f"{name} of {value}", name.rpartition(".")[2], value, known)
    def _(setting: Setting, name: str = name, value: str = value) -> None:
        setting.options = [f"--{name}={value}"]


for name in ("model.name", "data.source", "output"):

    @case(f"no {name}", f"{name} is not given", f"--{name}")
    def _(setting: Setting, name: str = name) -> None:
        group, _, leaf = name.rpartition(".")
        del (setting.config[group] if group else setting.config)[leaf]


# -- the output ------------------------------------------------------------------------------------


def manifest(**entries: Any) -> str:
    return json.dumps({"format": "ekfac_dist/1", **entries})


@case("an output that holds a finished run", "finished", "another directory")
def _(setting: Setting) -> None:
    output = setting.output()
    output.joinpath("manifest.json").write_text(manifest(complete=True, files={}))
    output.joinpath("spectrum").mkdir()
    output.joinpath("spectrum/a.safetensors").write_bytes(BINARY)


@case("an output that holds another run", "another run", "unfinished", "another directory")
def _(setting: Setting) -> None:
    output = setting.output()
    output.joinpath("manifest.json").write_text(manifest(complete=False, config={"seed": 7}))
    output.joinpath("covariance").mkdir()
    output.joinpath("covariance/a.safetensors").write_bytes(BINARY)


@case("an output of another format", r"no ekfac_dist/1 store", "new or empty")
def _(setting: Setting) -> None:
    setting.output().joinpath("manifest.json").write_text('{"format": "a web application"}')


@case("an output whose manifest is damaged", "manifest", "not JSON", "another directory")
def _(setting: Setting) -> None:
    setting.output().joinpath("manifest.json").write_text('{"format": "ekfac_d')


@case("an output whose manifest holds binary", "manifest", "not JSON", "another directory")
def _(setting: Setting) -> None:
    setting.output().joinpath("manifest.json").write_bytes(BINARY)


@case("an output that holds foreign files", "no factor store", "thesis.tex", "new or empty")
def _(setting: Setting) -> None:
    setting.output().joinpath("thesis.tex").write_text("the only copy")


@case("an output that is a file", "factors is a file", "directory")
def _(setting: Setting) -> None:
    setting.path("factors").write_text("the only copy")


@case("an output that is a dangling link", "factors", "cannot be made", "directory")
def _(setting: Setting) -> None:
    setting.path("factors").symlink_to(setting.path("gone"))


@case("an output below a file", "text.jsonl/factors", "cannot be made", "another directory")
def _(setting: Setting) -> None:
    setting.config["output"] = setting.path("text.jsonl") / "factors"


@case("an output where nothing can be made", "/proc/factors", "cannot be made", "Give a")
def _(setting: Setting) -> None:
    setting.config["output"] = "/proc/factors"


@case("an output of no name", "output", "not given")
def _(setting: Setting) -> None:
    setting.config["output"] = ""


# -- the runs --------------------------------------------------------------------------------------


def save_model_without_mlps(directory: Path) -> Path:
    """A causal language model that has linear modules but no MLP blocks."""
    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4, time_step_rank=2
    )
    return save_tiny(directory, config)


@pytest.fixture(scope="module")
def good_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("good") / "tiny")


@pytest.fixture
def setting(tmp_path: Path, good_model: Path) -> Setting:
    return Setting(tmp_path, good_model)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_worker_refuses(case: Case, setting: Setting, capfd: pytest.CaptureFixture) -> None:
    require_refusal(case, setting, lambda arguments: in_this_process(arguments, capfd))


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in STAND_FOR_ALL], ids=lambda case: case.name
)
def test_two_workers_refuse(case: Case, setting: Setting) -> None:
    require_refusal(case, setting, lambda arguments: on_real_workers(arguments, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name not in STAND_FOR_ALL], ids=lambda case: case.name
)
def test_two_workers_refuse_as_well(case: Case, setting: Setting) -> None:
    require_refusal(case, setting, lambda arguments: on_real_workers(arguments, 2))


def test_the_cases_that_stand_for_all_exist() -> None:
    assert set(STAND_FOR_ALL) <= {case.name for case in CASES}


def test_a_process_of_its_own_ends_with_status_2(setting: Setting) -> None:
    case = next(case for case in CASES if case.name == "a model directory that is missing")
    require_refusal(case, setting, lambda arguments: on_real_workers(arguments, 1))


def test_what_the_cases_spoil_is_good(setting: Setting, capfd: pytest.CaptureFixture) -> None:
    status, stdout, stderr = in_this_process(setting.arguments(), capfd)
    assert status == 0, stderr
    assert "12 of 12 sequences" in stdout
    assert SAID not in stderr


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sequences_without_labels_are_skipped_and_counted(
    workers: int, setting: Setting, capfd: pytest.CaptureFixture
) -> None:
    setting.config["data"]["prompt"] = "prompt"
    setting.rows(
        [
            {"prompt": "say what a worker does: ", "text": "it sums."},
            {"prompt": "only a prompt", "text": ""},
            {"prompt": "", "text": ""},
            {"prompt": "a long prompt " * 50, "text": "that leaves no room"},
            {"prompt": "what a batch is: ", "text": "it has no padding."},
        ]
    )
    arguments = setting.arguments()
    run = on_real_workers(arguments, 2) if workers == 2 else in_this_process(arguments, capfd)
    status, stdout, stderr = run
    assert status == 0, stderr
    assert "2 of 5 sequences (3 left out: no label)" in stdout
    assert "1 sequences cut to 64 tokens" in stdout
    data = json.loads(setting.path("factors/manifest.json").read_text())["data"]
    assert (data["num_sequences"], data["num_rows"], data["num_unlabelled"]) == (2, 5, 3)
    assert data["num_truncated"] == 1


def test_an_unfinished_run_is_not_gone_on_with_by_another_model_but_begun_anew_if_asked_to(
    setting: Setting, capfd: pytest.CaptureFixture
) -> None:
    name = "one sequence that makes activations infinite"
    next(case for case in CASES if case.name == name).spoil(setting)
    assert in_this_process(setting.arguments(), capfd)[0] == 2
    shutil.copytree(setting.good_model, setting.path("model"), dirs_exist_ok=True)
    setting.path("factors/covariance/left.safetensors").write_bytes(b"begun, not finished")
    status, _, stderr = in_this_process(setting.arguments(), capfd)
    assert status == 2
    assert re.search("began with another model .*; give another directory, or begin anew", stderr)
    assert in_this_process([*setting.arguments(), "--overwrite"], capfd)[0] == 0
    assert json.loads(setting.path("factors/manifest.json").read_text())["complete"] is True
    assert not setting.path("factors/covariance/left.safetensors").exists()


def test_overwriting_goes_on_with_an_unfinished_run_of_the_same_and_says_what_it_does(
    setting: Setting, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", interrupt)
        assert in_this_process(setting.arguments(), capfd)[0] == 130
    setting.options = ["--overwrite"]
    status, stdout, _ = in_this_process(setting.arguments(), capfd)
    assert status == 0
    assert re.search(r"goes on +\d+ files are in place", stdout)
    assert "replaces" not in stdout
    status, stdout, _ = in_this_process(setting.arguments(), capfd)
    assert status == 0
    assert "goes on" not in stdout
    assert re.search("replaces +the store in .*factors, once something of this run is", stdout)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, good_model: Path) -> Path:
    """A finished store, for a case to be told to overwrite."""
    setting = Setting(tmp_path_factory.mktemp("finished"), good_model)
    assert cli.main(setting.arguments()) == 0
    return setting.path("factors")


def leaves_the_store(case: Case, setting: Setting, finished: Path, run: Run) -> None:
    shutil.copytree(finished, setting.path("factors"))
    setting.options.append("--overwrite")
    require_refusal(replace(case, begun=False), setting, run)
    load_factors(setting.path("factors"))


OVERWRITES = [
    case
    for case in CASES
    if case.name
    in (
        "a model directory that is missing",
        "weights that are cut short",
        "a data file that is missing",
        "sequences that all have no label",
        "a weight that is not finite",
    )
]


@pytest.mark.parametrize("case", OVERWRITES, ids=lambda case: case.name)
def test_a_run_that_fails_leaves_the_store_that_it_was_to_overwrite_as_it_was(
    case: Case, setting: Setting, finished: Path, capfd: pytest.CaptureFixture
) -> None:
    leaves_the_store(case, setting, finished, lambda given: in_this_process(given, capfd))


@pytest.mark.slow
@pytest.mark.parametrize("case", OVERWRITES, ids=lambda case: case.name)
def test_two_workers_that_fail_leave_the_store_that_they_were_to_overwrite_as_it_was(
    case: Case, setting: Setting, finished: Path
) -> None:
    leaves_the_store(case, setting, finished, lambda given: on_real_workers(given, 2))


# -- the other commands ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["estimat"], "no command 'estimat'.*did you mean estimate"),
        (["launch"], "no command to run.*estimate"),
        (["launch", "--num_processes", "2"], "no command to run.*estimate"),
        (["launch", "train.py", "estimate"], "can run estimate, query, not 'train.py'"),
        (["launch", "--config_file", "gone.yaml", "estimate"], "no launcher.* gone.yaml"),
        (["launch", "--no_such_option", "1", "estimate"], "launcher refuses.*--no_such_option"),
        (["inspect"], "store"),
        (["inspect", "gone"], "gone is no directory.*estimate"),
        (["inspect", "gone", "--verfy"], "no option --verfy; did you mean --verify"),
        (["demo", "--workers", "0"], "workers is 0.*1 or more"),
        (["demo", "--workers", "few"], "workers is few.*whole number"),
    ],
)
def test_other_commands_refuse(
    arguments: list[str], says: str, capfd: pytest.CaptureFixture
) -> None:
    status, _, stderr = in_this_process(arguments, capfd)
    assert status == 2
    assert len(stderr.splitlines()) == 1
    assert re.search(says, stderr)


def test_no_command_is_answered_with_the_commands(capfd: pytest.CaptureFixture) -> None:
    status, stdout, _ = in_this_process([], capfd)
    assert status == 2
    assert "estimate" in stdout
