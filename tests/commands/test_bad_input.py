"""Bad input is answered with one sentence and exit status 2, promptly, and nothing is lost.

One table of cases serves one worker, where each is run in this process, and two real ones, where a
few stand for each way of failing and the whole table is marked slow.
"""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers.refusals import (
    BINARY,
    PROMPT_SECONDS,
    SAID,
    WEIGHTS,
    Case,
    Change,
    Command,
    Ended,
    Run,
    case,
    config,
    cut,
    each,
    ended_in_turn,
    here,
    in_this_process,
    infinite,
    link,
    lose_tokenizer,
    model_file,
    named,
    on_real_workers,
    options,
    require_refusal,
    rows,
    tensors,
    with_entries,
    without,
    write,
)
from helpers.workshop import CONTEXT, VOCABULARY, save_tiny, save_tiny_llama, texts, write_jsonl
from safetensors.torch import load_file
from transformers import MambaConfig, XLMConfig

from ekfac_dist import cli, load_factors


class Estimate(Command):
    name = "estimate"

    def begin(self) -> None:
        data = write_jsonl(self.path("text.jsonl"), [{"text": text} for text in texts(12)])
        self.config = {
            "model": {"name": self.good / "tiny"},
            "data": {"source": data, "max_tokens": 64},
            "factors": {},
            "batch_tokens": 256,
            "output": self.path("factors"),
        }


# One for each kind of bad input: these run on two real workers every time, the others when asked.
STAND_FOR_ALL = (
    "factors shared out among more workers than there are",
    "a model whose MLPs are not found",
    "one sequence that makes activations infinite",
    "an empty .jsonl file",
    "a wrong type on the command line",
    "an output that holds another run",
)


# fmt: off
# Tables: a row's name and what it changes, and behind them the words that the sentence must hold.


# -- the model -------------------------------------------------------------------------------------


def other_model(name: str, save: Any, **changes: Any) -> Change:
    """Another model than the good one."""
    return config("model.name", lambda command: save(command.path(name), **changes))


def save_without_mlps(directory: Path) -> Path:
    """A causal language model that has linear modules but no MLP blocks."""
    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4, time_step_rank=2
    )
    return save_tiny(directory, config)


def save_writing_into_a_cache(directory: Path) -> Path:
    """A model whose layers cannot be computed again in the backward."""
    config = XLMConfig(
        vocab_size=VOCABULARY,
        emb_dim=16,
        n_layers=2,
        n_heads=2,
        max_position_embeddings=CONTEXT,
        mask_token_id=0,
        causal=True,
    )
    return save_tiny(directory, config)


def pickle(weights: Path) -> None:
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()


VIT = json.dumps({"model_type": "vit", "architectures": ["ViTModel"]})
UP, GATE, DOWN = (
    f"model.layers.{layer}.mlp.{name}.weight"
    for layer, name in ((1, "up_proj"), (1, "gate_proj"), (0, "down_proj"))
)
# The token of '#' occurs in sequence 7 alone, so one worker alone meets it.
ALONE = [f"{text} # is here alone" if k == 7 else text for k, text in enumerate(texts(12))]

MODELS = [
    case("a model directory that is missing", config("model.name", here("nowhere")),
         "no model directory … nowhere"),
    case("a hub id that cannot be had", config("model.name", "nobody/nothing"),
         "Model nobody/nothing … could not be loaded"),
    case("a model that is a file", config("model.name", here("text.jsonl")),
         "is the file … text.jsonl … directory"),
    case("a directory that is no model",
         (config("model.name", here("papers")), write("papers/notes.txt", "no model")),
         "without a config.json … papers … saved Hugging Face model"),
    case("a model configuration that is not JSON", model_file("config.json", "{model_type: llama"),
         "model … config.json"),
    case("a model of a type that nobody knows",
         model_file("config.json", with_entries(model_type="hovercraft")), "model … hovercraft"),
    case("a model that is no causal language model", model_file("config.json", VIT),
         "model … type 'vit' … no causal language model … give one"),
    case("a model without a tokenizer", lose_tokenizer, "tokenizer … model … beside the model"),
    case("pickled weights only", model_file(WEIGHTS, pickle),
         "only pickled weights … pytorch_model.bin … safetensors"),
    case("no weights at all", model_file(WEIGHTS, Path.unlink), "no safetensors weights … model"),
    case("weights that are cut short", model_file(WEIGHTS, cut(1000)), "weights … damaged … model"),
    case("weights that are no safetensors", model_file(WEIGHTS, BINARY),
         "weights … damaged … model"),
    case("weights that are not all there", tensors(lambda held: held.pop(UP)),
         "lack 1 of its parameters … up_proj … random"),
    case("weights of another shape", tensors(lambda held: held.update({DOWN: torch.zeros(16, 7)})),
         "model … down_proj"),
    case("a model whose MLPs are not found", other_model("mamba", save_without_mlps),
         r"No MLP linear … Mamba … model\.modules … \*\."),
    case("a tokenizer that knows more than the model",
         other_model("small", save_tiny_llama, vocab_size=100),
         "token id … 100 tokens … tokenizer"),
    case("globs that match nothing", config("model.modules", ["*.mlp.*", "*.mpl.*"]),
         r"\*\.mpl\.\* … none of … linear … such as"),
    case("a glob that matches no linear module", options("--model.modules", "['*norm']"),
         r"'\*norm' … LlamaRMSNorm … such as"),
    case("layers that cannot be computed again",
         (other_model("xlm", save_writing_into_a_cache),
          options("--model.gradient_checkpointing", "true")),
         "something else when it is computed again … Leave gradient checkpointing off"),
    case("no globs at all", config("model.modules", []), "model.modules … empty … null"),
    case("a weight that is not finite", tensors(lambda held: held[GATE][3, 5].fill_(torch.nan)),
         "NaN or infinity … input of module model.layers.1.mlp.down_proj",  # it reads the gate's
         r"covariance pass … sequence \d+ ", begun=True),
    case("one sequence that makes activations infinite",
         (infinite("#"), rows([{"text": text} for text in ALONE])),
         "NaN or infinity … input of module model.layers.0.mlp.gate_proj … sequence 7 ",
         begun=True),
]


# -- the data --------------------------------------------------------------------------------------


def source(name: str, content: bytes | str) -> tuple[Change, Change]:
    """A file that holds the data."""
    return config("data.source", here(name)), write(name, content)


def saved(data: Dataset | DatasetDict) -> Change:
    """A saved data set is the data."""

    def change(command: Command) -> None:
        command.set("data.source", command.path("saved"))
        data.save_to_disk(command.path("saved"))

    return change


def write_no_rows(command: Command) -> None:
    no_rows = Dataset.from_dict({"text": [""]}).select([])
    no_rows.to_parquet(command.path("rows.parquet"))


def damage_saved(command: Command) -> None:
    next(command.path("saved").glob("*.arrow")).write_bytes(BINARY)


FOUR = Dataset.from_dict({"text": texts(4)})
FOUR_TO_TRAIN_ON = Dataset.from_dict({"text": texts(4)}, split=datasets.Split.TRAIN)
ENDINGS = ("jsonl", "json", "csv", "parquet", "txt")
ONLY_PROMPTS = [{"prompt": "only a prompt", "text": text} for text in ("", None, "")]

DATA = [
    case("a data file that is missing", config("data.source", here("elsewhere.jsonl")),
         "no file … elsewhere.jsonl"),
    case("a data set that the hub cannot give", config("data.source", "nobody/no-data"),
         "nobody/no-data … hub"),
    case("a data file of an unknown ending", source("text.docx", "some text"),
         "text.docx … '.docx' … .jsonl … .txt"),
    case("a directory that is no data set",
         (config("data.source", here("papers")), lambda command: command.path("papers").mkdir()),
         "papers … save_to_disk"),
    case("a column that does not exist", config("data.text", "txt"), "no column 'txt' … text"),
    case("a prompt column that does not exist", config("data.prompt", "question"),
         "no column 'question' … text"),
    case("a column of numbers", rows([{"text": 17}, {"text": 18}]),
         "'text' … 17 … int … must hold text"),
    case("a split that a file does not have", config("data.split", "test"),
         "no split 'test' … text.jsonl"),
    case("a split that cannot be read", config("data.split", "train[:10"),
         r"data\.split is 'train\[:10' … train\[:1000\]"),
    case("a subset of a file", config("data.subset", "english"),
         r"data\.subset is 'english' … text.jsonl … only hub data sets"),
    case("a split that a saved data set dictionary does not have",
         (saved(DatasetDict(train=FOUR, dev=FOUR)), config("data.split", "test")),
         "no split 'test' … train, dev"),
    case("a split that a saved data set is not of",
         (saved(FOUR_TO_TRAIN_ON), config("data.split", "test")),
         "no split 'test' … train"),
    *(
        case(f"an empty .{ending} file", source(f"text.{ending}", b""),
             f"text.{ending} … is empty")
        for ending in ENDINGS
    ),
    *(
        case(f"data without rows in {name}", source(name, content), f"{name} … no rows")
        for name, content in (
            ("list.json", "[]"),
            ("head.csv", "text\n"),
            ("blank.jsonl", "\n\n"),
            ("object.json", "{}"),
        )
    ),
    case("data without rows in rows.parquet",
         (config("data.source", here("rows.parquet")), write_no_rows),
         "rows.parquet … no rows"),
    *(
        case(f"a .{ending} file that holds binary", source(f"text.{ending}", BINARY),
             f"text.{ending} … not what its ending|not UTF-8")
        for ending in ENDINGS
    ),
    case("a .parquet file that holds JSON", source("text.parquet", '{"text": "this is JSON"}\n'),
         "text.parquet … not what its ending .parquet says"),
    case("a .jsonl file that holds plain text",
         source("text.jsonl", "This is a text.\nIt is no JSON.\n"),
         "text.jsonl … not what its ending .jsonl says"),
    case("a .json file that holds a number", source("text.json", "3"),
         "text.json … not what its ending .json says|no column"),
    case("a column of more than one type", source("text.jsonl", '{"text": 3}\n{"text": "three"}\n'),
         "'text' … holds 3 … must hold text"),
    case("a .jsonl file that breaks off",
         source("text.jsonl", '{"text": "whole"}\n{"text": "not wh'),
         "text.jsonl … not what its ending .jsonl says"),
    case("a saved data set that is damaged",
         (saved(FOUR), damage_saved),
         "saved … no readable saved data set"),
    case("sequences that all have no label", (config("data.prompt", "prompt"), rows(ONLY_PROMPTS)),
         "None of the 3 sequences has a label … one token … all prompt"),
    case("a text longer than the model reads",
         (rows([{"text": "a long text " * 200}]), config("data.max_tokens", 10 * CONTEXT)),
         f"model reads {CONTEXT} … data.max_tokens … positions"),
]


# -- the configuration -----------------------------------------------------------------------------


def configuration(name: str, content: bytes | str) -> tuple[Change, Change]:
    """A file that is read after the good one."""
    return write(name, content), options("--config", here(name))


CONFIGURATIONS = [
    case("a configuration file that is missing", options("--config", here("no-such.yaml")),
         "no-such.yaml … cannot be read … No such file"),
    case("a configuration that is not named", options("--config"),
         "configuration '' … cannot be read"),
    case("a configuration that is a directory", options("--config", here("")),
         "cannot be read … directory"),
    case("a configuration that is no YAML",
         configuration("broken.yaml", "model:\n  name: [gpt2\noutput: out\n"),
         "broken.yaml … not YAML … line 2"),
    case("a configuration that holds binary", configuration("binary.yaml", BINARY),
         "binary.yaml … not YAML"),
    *(
        case(f"a configuration that is a {name}", configuration(f"{name}.yaml", content),
             f"{name}.yaml … no fields")
        for name, content in (("blank", ""), ("list", "- model\n- data\n"), ("text", "gpt2\n"))
    ),
    case("an unknown field in the file", config("data.max_token", 64),
         r"config.yaml … unknown field data.max_token; … did you mean data\.max_tokens\?"),
    case("a field under no group in the file", config("refit", "none"),
         r"unknown field refit … did you mean factors\.refit\?"),
    case("an unknown group in the file", config("factor", {"refit": "none"}),
         r"unknown field factor; … did you mean factors\?"),
    case("a group that is a value", config("model", "gpt2"),
         "field model … gpt2 … fields of its own"),
    case("an unknown option", options("--data.max_token", "64"),
         r"no option --data.max_token; … did you mean --data\.max_tokens\?"),
    case("an option like no other", options("--zzz=1"), r"no option --zzz\."),
    case("an option without its value", options("--batch_tokens"),
         "--batch_tokens: expected one argument … --help"),
    case("an argument that belongs nowhere", options("stray"), "stray"),
    *(
        case(f"{name} of a wrong type in the file", config(name, value),
             re.escape(f"{name} is {value}; it must be {wanted}"))
        for name, value, wanted in (
            ("data.max_tokens", "many", "a whole number"),
            ("data.max_sequences", [1, 2], "a whole number or null"),
            ("batch_tokens", 10.5, "a whole number"),
            ("factors.seed", "seven", "a whole number"),
            ("factors.partitions", "some", "a whole number or auto"),
            ("factors.shard", "x", "a whole number or auto"),
            ("factors.keep_covariance", "perhaps", "true or false"),
            ("model.gradient_checkpointing", "sometimes", "true or false or auto"),
            ("model.modules", {"a": 1}, "a list of texts or null"),
            ("model.name", [1], "text or null"),
        )
    ),
    case("a wrong type on the command line", options("--data.max_tokens", "twelve"),
         r"data\.max_tokens is twelve; it must be a whole number"),
    *(
        case(f"{name} of {value}", options(f"--{name}={value}"), f"{name} is {value} … 1 or more")
        for name in (
            "data.max_tokens", "data.max_sequences", "batch_tokens", "factors.partitions",
            "factors.shard",
        )
        for value in (0, -3)
    ),
    case("factors shared out among more workers than there are", options("--factors.shard", "5"),
         r"factors\.shard is 5, but the number of workers is \d, which is less; give 1 … or auto"),
    case("a model.gradient_checkpointing of 1", options("--model.gradient_checkpointing", "1"),
         r"model\.gradient_checkpointing is 1; it must be true or false or auto"),
    case("sequences of one token", config("data.max_tokens", 1),
         r"data\.max_tokens is 1 … 2 tokens or more"),
    case("a negative seed", config("factors.seed", -1), r"factors\.seed is -1 … from 0 to"),
    *(
        case(f"{name} of {value}", options(f"--{name}={value}"), name.split(".")[1], value, known)
        for name, value, known in (
            ("model.dtype", "float8", "bfloat16"),
            ("factors.labels", "true", "sampled"),
            ("factors.refit", "per_word", "per_token"),
            ("factors.accumulate", "bfloat16", "float64"),
            ("factors.eigen", "rank1", "rank0"),
            ("factors.blocks", "0", "1 or more"),
        )
    ),
    *(
        case(f"no {name}", without(name), f"{name} is not given … --{name}")
        for name in ("model.name", "data.source", "output")
    ),
]


# -- the output ------------------------------------------------------------------------------------


def manifest(**entries: Any) -> Change:
    """An output that was there, with a manifest."""
    return write("factors/manifest.json", json.dumps({"format": "ekfac_dist/1", **entries}))


OUTPUTS = [
    case("an output that holds a finished run",
         (manifest(complete=True, files={}), write("factors/spectrum/a.safetensors", BINARY)),
         "finished … another directory"),
    case("an output that holds another run",
         (manifest(complete=False, config={"seed": 7}),
          write("factors/covariance/a.safetensors", BINARY)),
         "another run … unfinished … another directory"),
    case("an output of another format", manifest(format="a web application"),
         r"no ekfac_dist/1 store … new or empty"),
    case("an output whose manifest is damaged",
         write("factors/manifest.json", '{"format": "ekfac_d'),
         "manifest … not JSON … another directory"),
    case("an output whose manifest holds binary", write("factors/manifest.json", BINARY),
         "manifest … not JSON … another directory"),
    case("an output that holds foreign files", write("factors/thesis.tex", "the only copy"),
         "no factor store … thesis.tex … new or empty"),
    case("an output that is a file", write("factors", "the only copy"),
         "factors is a file … directory"),
    case("an output that is a dangling link", link("factors", "gone"),
         "factors … cannot be made … directory"),
    case("an output below a file", config("output", here("text.jsonl/factors")),
         "text.jsonl/factors … cannot be made … another directory"),
    case("an output where nothing can be made", config("output", "/proc/factors"),
         "/proc/factors … cannot be made … Give a"),
    case("an output of no name", config("output", ""), "output … not given"),
]

CASES = [*MODELS, *DATA, *CONFIGURATIONS, *OUTPUTS]
# fmt: on


# -- the runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("good") / "tiny").parent


@pytest.fixture
def command(tmp_path: Path, good: Path) -> Estimate:
    return Estimate(tmp_path, good)


@each(CASES)
def test_one_worker_refuses(case: Case, command: Estimate, capfd: pytest.CaptureFixture) -> None:
    require_refusal(case, command, lambda arguments: in_this_process(arguments, capfd))


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, good: Path) -> dict[str, Ended]:
    """How two workers ended, one after another, by the name of the case."""
    directory = tmp_path_factory.mktemp("in turn")
    cases = [named(CASES, name) for name in STAND_FOR_ALL]
    ends = ended_in_turn(
        cases, lambda path: Estimate(path, good), directory, timeout=2 * PROMPT_SECONDS
    )
    return {end.case.name: end for end in ends}


@each(CASES, STAND_FOR_ALL)
def test_two_workers_refuse(case: Case, ended: dict[str, Ended]) -> None:
    ended[case.name].require_refusal()


def test_two_workers_of_the_launcher_end_with_status_2(command: Estimate) -> None:
    case = named(CASES, "one sequence that makes activations infinite")
    require_refusal(case, command, lambda arguments: on_real_workers(arguments, 2))


@pytest.mark.slow
@each(CASES, {case.name for case in CASES}.difference(STAND_FOR_ALL))
def test_two_workers_refuse_as_well(case: Case, command: Estimate) -> None:
    require_refusal(case, command, lambda arguments: on_real_workers(arguments, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shard", "fault"), [("2", "which it does not divide"), ("4", "which is less")]
)
def test_three_workers_with_a_wrong_shard_are_told_what_would_do(
    shard: str, fault: str, command: Estimate
) -> None:
    wrong = case(
        f"a shard of {shard}",
        options("--factors.shard", shard),
        rf"factors\.shard is {shard}, but the number of workers is 3, {fault}; "
        r"give 1, 3 or auto\.",
    )
    require_refusal(wrong, command, lambda arguments: on_real_workers(arguments, 3))


def test_the_cases_that_stand_for_all_exist() -> None:
    assert set(STAND_FOR_ALL) <= {case.name for case in CASES}


def test_a_process_of_its_own_ends_with_status_2(command: Estimate) -> None:
    case = named(CASES, "a model directory that is missing")
    require_refusal(case, command, lambda arguments: on_real_workers(arguments, 1))


def test_what_the_cases_spoil_is_good(command: Estimate, capfd: pytest.CaptureFixture) -> None:
    status, stdout, stderr = in_this_process(command.arguments(), capfd)
    assert status == 0, stderr
    assert "12 of 12 sequences" in stdout
    assert SAID not in stderr


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sequences_without_labels_are_skipped_and_counted(
    workers: int, command: Estimate, capfd: pytest.CaptureFixture
) -> None:
    config("data.prompt", "prompt")(command)
    rows(
        [
            {"prompt": "say what a worker does: ", "text": "it sums."},
            {"prompt": "only a prompt", "text": ""},
            {"prompt": "", "text": ""},
            {"prompt": "a long prompt " * 50, "text": "that leaves no room"},
            {"prompt": "what a batch is: ", "text": "it has no padding."},
        ]
    )(command)
    arguments = command.arguments()
    run = on_real_workers(arguments, 2) if workers == 2 else in_this_process(arguments, capfd)
    status, stdout, stderr = run
    assert status == 0, stderr
    assert "2 of 5 sequences (3 left out: no label)" in stdout
    assert "1 sequences cut to 64 tokens" in stdout
    data = json.loads(command.path("factors/manifest.json").read_text())["data"]
    assert (data["num_sequences"], data["num_rows"], data["num_unlabelled"]) == (2, 5, 3)
    assert data["num_truncated"] == 1


def test_an_unfinished_run_is_not_gone_on_with_by_another_model_but_begun_anew_if_asked_to(
    command: Estimate, capfd: pytest.CaptureFixture
) -> None:
    named(CASES, "one sequence that makes activations infinite").spoil(command)
    assert in_this_process(command.arguments(), capfd)[0] == 2
    shutil.copytree(command.good / "tiny", command.path("model"), dirs_exist_ok=True)
    command.path("factors/covariance/left.safetensors").write_bytes(b"begun, not finished")
    status, _, stderr = in_this_process(command.arguments(), capfd)
    assert status == 2
    assert re.search("began with another model .*; give another directory, or begin anew", stderr)
    assert in_this_process([*command.arguments(), "--overwrite"], capfd)[0] == 0
    assert json.loads(command.path("factors/manifest.json").read_text())["complete"] is True
    assert not command.path("factors/covariance/left.safetensors").exists()


def test_overwriting_goes_on_with_an_unfinished_run_of_the_same_and_says_what_it_does(
    command: Estimate, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", interrupt)
        assert in_this_process(command.arguments(), capfd)[0] == 130
    command.options = ["--overwrite"]
    status, stdout, _ = in_this_process(command.arguments(), capfd)
    assert status == 0
    assert re.search(r"goes on +\d+ files are in place", stdout)
    assert "replaces" not in stdout
    status, stdout, _ = in_this_process(command.arguments(), capfd)
    assert status == 0
    assert "goes on" not in stdout
    assert re.search("replaces +the store in .*factors, once something of this run is", stdout)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, good: Path) -> Path:
    """A finished store, for a case to be told to overwrite."""
    command = Estimate(tmp_path_factory.mktemp("finished"), good)
    assert cli.main(command.arguments()) == 0
    return command.path("factors")


def leaves_the_store(case: Case, command: Estimate, finished: Path, run: Run) -> None:
    shutil.copytree(finished, command.path("factors"))
    command.options.append("--overwrite")
    require_refusal(replace(case, begun=False), command, run)
    load_factors(command.path("factors"))


OVERWRITES = (
    "a model directory that is missing",
    "weights that are cut short",
    "a data file that is missing",
    "sequences that all have no label",
    "a weight that is not finite",
)


@each(CASES, OVERWRITES)
def test_a_run_that_fails_leaves_the_store_that_it_was_to_overwrite_as_it_was(
    case: Case, command: Estimate, finished: Path, capfd: pytest.CaptureFixture
) -> None:
    leaves_the_store(case, command, finished, lambda given: in_this_process(given, capfd))


@pytest.mark.slow
@each(CASES, OVERWRITES)
def test_two_workers_that_fail_leave_the_store_that_they_were_to_overwrite_as_it_was(
    case: Case, command: Estimate, finished: Path
) -> None:
    leaves_the_store(case, command, finished, lambda given: on_real_workers(given, 2))


# -- the other commands ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["estimat"], "no command 'estimat'.*did you mean estimate"),
        (["launch"], "no command to run.*estimate"),
        (["launch", "--num_processes", "2"], "no command to run.*estimate"),
        (
            ["launch", "train.py", "estimate"],
            "can run estimate, query, index, evaluate, serve, not 'train.py'",
        ),
        (["launch", "--config_file", "gone.yaml", "estimate"], "no launcher.* gone.yaml"),
        (["launch", "--no_such_option", "1", "estimate"], "launcher refuses.*--no_such_option"),
        (["inspect"], "required: store"),
        (["inspect", "--plot", "spectra.png"], "required: store"),
        (["inspect", "--verify", "gone", "other"], "Unrecognized arguments: other"),
        (["inspect", "gone"], "gone is no directory.*estimate"),
        (["inspect", "gone", "--verfy"], "no option --verfy; did you mean --verify"),
        (["report", "gone", "other"], "Unrecognized arguments: other"),
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
