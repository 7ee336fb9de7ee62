"""Bad input to `query` and `report` is answered as bad input to `estimate` is; see `refusals`.

One table of cases serves one worker, where each is run in this process, and two real ones, which
refuse a few every time and all of them in the tests that are marked slow.
"""

import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.refusals import (
    BINARY,
    PROMPT_SECONDS,
    SAID,
    Case,
    contents,
    in_this_process,
    on_real_workers,
    on_two_workers_in_turn,
    require_refusal,
    require_sentence,
    table,
)
from helpers.workshop import (
    CONTEXT,
    VOCABULARY,
    rewrite_manifest,
    save_tiny_gpt2,
    save_tiny_llama,
    texts,
    tiny_tokenizer,
    write_jsonl,
    write_yaml,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ekfac_dist import Factors, InfluenceScores, cli, influence_scores, load_factors
from ekfac_dist.errors import ConfigError, DataError, StoreError, UserError
from ekfac_dist.factors.layout import MANIFEST, eigenbasis_file, spectrum_file
from ekfac_dist.report.page import write_report
from ekfac_dist.runtime.files import file_sha256

NUM_ROWS = 12
MODULE = "model.layers.1.mlp.up_proj"
INPUT = eigenbasis_file("model.layers.1.mlp.gate_proj.input")  # up_proj reads it too
OUTPUT = eigenbasis_file(f"{MODULE}.output")
SPECTRUM = spectrum_file(MODULE)
QUERIES = [
    {"prompt": "Which one sends ", "completion": "every gradient?"},
    {"text": "A worker waits for the last batch."},
]


@dataclass(frozen=True)
class Good:
    """What every case begins with, made once.

    Attributes:
        directory: Holds all of it.
        model: A model.
        data: Its training text.
        store: Its factors.
        scores: The results of a query.
    """

    directory: Path
    model: Path
    data: Path
    store: Path
    scores: Path


@dataclass
class Setting:
    """A good query in a directory of its own, for a case to spoil.

    Attributes:
        directory: Holds all that is made.
        good: What cases share; `store` and `model` are copies that may be spoilt.
        config: Goes to the YAML file.
        options: Follow `--config FILE` on the command line.
    """

    directory: Path
    good: Good
    config: dict[str, Any] = field(default_factory=dict)
    options: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.directory.mkdir(exist_ok=True)
        self.config = {
            "factors": self.good.store,
            "queries": write_jsonl(self.path("queries.jsonl"), QUERIES),
            "model": {},
            "data": {},
            "damping": {},
            "scores": {"top_k": 3},
            "batch_tokens": 256,
            "output": self.path("scores"),
        }

    def path(self, name: str) -> Path:
        return self.directory / name

    def store(self) -> Path:
        """A copy of the good store."""
        self.config["factors"] = copy = self.path("factors")
        shutil.copytree(self.good.store, copy)
        return copy

    def manifest(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Rewrites the manifest of a copy of the good store."""
        rewrite_manifest(self.store(), change)

    def model(self) -> Path:
        """A copy of the good model."""
        self.config["model"]["name"] = copy = self.path("model")
        shutil.copytree(self.good.model, copy)
        return copy

    def lines(self, *lines: str | bytes) -> None:
        """Writes the file of queries."""
        written = [line.encode() if isinstance(line, str) else line for line in lines]
        self.path("queries.jsonl").write_bytes(b"".join(line + b"\n" for line in written))

    def queries(self, *queries: Any) -> None:
        """Writes queries behind a good one, so that the first of them stands in line 2."""
        self.lines(*map(json.dumps, [QUERIES[0], *queries]))

    def candidates(self, content: str | bytes) -> None:
        """Writes a file of candidates, and names it."""
        self.config["scores"]["candidates"] = path = self.path("rows.txt")
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def rows(self, rows: list[dict[str, Any]]) -> None:
        """Writes other training data, and names it."""
        self.config["data"]["source"] = write_jsonl(self.path("rows.jsonl"), rows)

    def arguments(self) -> list[str]:
        write_yaml(self.path("config.yaml"), self.config)
        return ["query", "--config", str(self.path("config.yaml")), *self.options]


def relist(directory: Path, file: str) -> None:
    """Makes a manifest list a file as it now is."""
    path = directory / file
    listing = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    rewrite_manifest(directory, lambda m: m["files"].update({file: listing}))


def flip(path: Path, position: int) -> None:
    """Flips one bit."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


CASES: list[Case] = []
case = table(CASES)

# One for each kind of bad input: two real workers refuse these every time, the others when asked.
STAND_FOR_ALL = (
    "a store that is missing",
    "a manifest that is cut short",
    "a spectrum with a flipped bit",
    "a model of other weights",
    "one query that makes activations infinite",
    "one sequence that makes activations infinite",
    "data that has vanished",
    "a query that is no JSON",
    "a query longer than the model reads",
    "top_k above the data",
    "candidates that are [0, 12]",
    "a damping that is negative",
    "no damping where the spectrum has zeros",
    "an unknown option",
    "a wrong type on the command line",
    "an output that holds finished results",
)


# -- the store -------------------------------------------------------------------------------------


@case("a store that is missing", "nowhere is no directory", "output of an `estimate` run")
def _(setting: Setting) -> None:
    setting.config["factors"] = setting.path("nowhere")


@case("a store that is a file", r"queries\.jsonl is no directory", "output of an `estimate` run")
def _(setting: Setting) -> None:
    setting.config["factors"] = setting.path("queries.jsonl")


@case("a store that is a directory of something else", r"no manifest\.json", "`estimate` run")
def _(setting: Setting) -> None:
    setting.config["factors"] = setting.good.model


@case("results instead of a store", "format 'ekfac_dist/scores/1'", "reads 'ekfac_dist/1'")
def _(setting: Setting) -> None:
    setting.config["factors"] = setting.good.scores


@case("a store that is incomplete", "incomplete: its run did not finish", "Run `estimate` again")
def _(setting: Setting) -> None:
    setting.manifest(lambda m: m.update(complete=False))


@case("a store of another format", "format 'ekfac_dist/2'", "reads 'ekfac_dist/1'")
def _(setting: Setting) -> None:
    setting.manifest(lambda m: m.update(format="ekfac_dist/2"))


for what, content in (("cut short", '{"format": "ekfac'), ("binary", BINARY), ("nothing", "")):

    @case(f"a manifest that is {what}", r"manifest\.json is not JSON")
    def _(setting: Setting, content: str | bytes = content) -> None:
        path = setting.store() / MANIFEST
        path.write_bytes(content.encode() if isinstance(content, str) else content)


@case("a manifest that is a list", r"manifest\.json is no JSON object")
def _(setting: Setting) -> None:
    (setting.store() / MANIFEST).write_text("[]")


for key in ("model", "data", "fisher", "modules", "files", "config"):

    @case(f"a manifest without {key}", rf"manifest\.json lacks {key}\.", "Copy the store again")
    def _(setting: Setting, key: str = key) -> None:
        setting.manifest(lambda m: m.pop(key))


for key, entry in (
    ("model", "fingerprint"),
    ("data", "fingerprint"),
    ("data", "num_sequences"),
    ("fisher", "labels"),
    ("fisher", "refit"),
    ("fisher", "seed"),
    ("config", "model"),
    ("config", "data"),
):

    @case(f"a manifest whose {key} has no {entry}", r"manifest\.json", key, entry, "damaged")
    def _(setting: Setting, key: str = key, entry: str = entry) -> None:
        setting.manifest(lambda m: m[key].pop(entry))


@case("a manifest of no modules", r"manifest\.json", "no modules", "damaged")
def _(setting: Setting) -> None:
    setting.manifest(lambda m: m.update(modules={}))


for what, change in (
    ("that is a list", lambda entries: entries.update({MODULE: []})),
    ("that is null", lambda entries: entries.update({MODULE: None})),
    ("without a size", lambda entries: entries[MODULE].pop("in_features")),
    ("whose size is text", lambda entries: entries[MODULE].update(in_features="16")),
    ("whose size is negative", lambda entries: entries[MODULE].update(out_features=-24)),
    ("of an unknown kind", lambda entries: entries[MODULE].update(kind="hovercraft")),
    ("whose bias is a number", lambda entries: entries[MODULE].update(bias=3)),
    ("whose input is a list", lambda entries: entries[MODULE].update(input=["a", "b"])),
):

    @case(f"a manifest with a module {what}", f"entry for module {MODULE}", "not whole", "again")
    def _(setting: Setting, change: Callable[[dict], object] = change) -> None:
        setting.manifest(lambda m: change(m["modules"]))


@case("a module of another size than the model's", "up_proj is linear 16→25", "it is .* 16→24")
def _(setting: Setting) -> None:
    setting.manifest(lambda m: m["modules"][MODULE].update(out_features=25))


@case("a module whose factor is not there", "does not list eigenbasis/elsewhere")
def _(setting: Setting) -> None:
    setting.manifest(lambda m: m["modules"][MODULE].update(input="elsewhere"))


@case("a factor outside the store", "does not list", r"\.\./secret")
def _(setting: Setting) -> None:
    setting.manifest(lambda m: m["modules"][MODULE].update(input="../../secret"))


@case("a manifest that lists files elsewhere", r"\.\./secret", "must list files in")
def _(setting: Setting) -> None:
    setting.manifest(lambda m: m["files"].update({"../secret": {"bytes": 1, "sha256": ""}}))


@case("a manifest of a run that this version does not know", "manifest", "configuration", "lora")
def _(setting: Setting) -> None:
    setting.manifest(lambda m: m["config"]["model"].update(lora=True))


@case("a manifest whose data has an impossible limit", r"data\.max_tokens is 'many'")
def _(setting: Setting) -> None:
    setting.manifest(lambda m: m["config"]["data"].update(max_tokens="many"))


for what, file in (
    ("an input basis", INPUT),
    ("an output basis", OUTPUT),
    ("a spectrum", SPECTRUM),
):

    @case(f"{what} that is missing", re.escape(file), "missing, though the manifest lists it")
    def _(setting: Setting, file: str = file) -> None:
        (setting.store() / file).unlink()

    @case(f"{what} that is cut short", re.escape(file), r"\d bytes; .* says \d+: it is damaged")
    def _(setting: Setting, file: str = file) -> None:
        path = setting.store() / file
        path.write_bytes(path.read_bytes()[:-1])

    @case(f"{what} with a flipped bit", re.escape(file), "damaged: its SHA-256", "fit .* again")
    def _(setting: Setting, file: str = file) -> None:
        flip(setting.store() / file, -1)

    @case(f"{what} that is a directory", re.escape(file), "damaged|missing")
    def _(setting: Setting, file: str = file) -> None:
        path = setting.store() / file
        path.unlink()
        path.mkdir()

    @case(f"{what} of another tensor", re.escape(file), "holds no tensor")
    def _(setting: Setting, file: str = file) -> None:
        store = setting.store()
        save_file({"other": torch.zeros(3)}, store / file)
        relist(store, file)

    @case(f"{what} of another shape", re.escape(file), r"shape \[3, 3\]", "say")
    def _(setting: Setting, file: str = file) -> None:
        store = setting.store()
        save_file({name: torch.zeros(3, 3) for name in ("eigenvectors", "lambda")}, store / file)
        relist(store, file)


# -- the model -------------------------------------------------------------------------------------


@case(
    "a model of other weights",
    "factors of .*tiny",
    "LlamaForCausalLM",
    "fingerprint",
    "weights differ",
)
def _(setting: Setting) -> None:
    setting.config["model"]["name"] = save_tiny_llama(setting.path("other"), seed=1)


@case(
    "a model of another head",
    "differs from it outside the tracked modules",
    r"1 of 15 weights .*: lm_head\.weight\.",
    r"model\.allow_changes",
)
def _(setting: Setting) -> None:
    change_head(setting.model())


def change_head(model: Path) -> None:
    """Changes one row of a model's head."""
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"][5] += 0.5
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@case("a model of another activation", "hidden_act in its configuration is 'relu'; .* with 'silu'")
def _(setting: Setting) -> None:
    path = setting.model() / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "relu"}))


@case("a model of another shape", r"gate_proj is linear 16→24", "here|this", "16→32")
def _(setting: Setting) -> None:
    setting.config["model"]["name"] = save_tiny_llama(setting.path("other"), intermediate_size=32)


@case("a model with biases", "gate_proj is linear 16→24;", "16→24 with a bias")
def _(setting: Setting) -> None:
    setting.config["model"]["name"] = save_tiny_llama(setting.path("other"), mlp_bias=True)


@case("a model that lacks a module", r"module model\.layers\.1\.mlp\.\w+ this Llama.* lacks")
def _(setting: Setting) -> None:
    setting.config["model"]["name"] = save_tiny_llama(setting.path("other"), num_hidden_layers=1)


@case("a model of another class", r"factors of .*tiny \(Llama", "GPT2LMHeadModel lacks")
def _(setting: Setting) -> None:
    setting.config["model"]["name"] = save_tiny_gpt2(setting.path("other"))


for group, name in (("model", "name"), ("data", "source")):

    @case(f"a manifest whose {group} has no {name}", rf"{group}\.{name} is not given", "set it")
    def _(setting: Setting, group: str = group, name: str = name) -> None:
        setting.manifest(lambda m: m["config"][group].pop(name))


@case("a model that has vanished", "no model directory", "gone", "model.name")
def _(setting: Setting) -> None:
    gone = str(setting.path("gone"))
    setting.manifest(lambda m: m["config"]["model"].update(name=gone))


@case("a model directory that is missing", "no model directory", "nowhere")
def _(setting: Setting) -> None:
    setting.config["model"]["name"] = setting.path("nowhere")


@case("a model that has lost its tokenizer", "tokenizer", "model", "beside the model")
def _(setting: Setting) -> None:
    for file in setting.model().glob("tokenizer*"):
        file.unlink()


@case("a query of tokens that the model does not know", "token id", "300 tokens", "tokenizer")
def _(setting: Setting) -> None:
    """The rows have bytes alone, whose ids are small; the query has merged tokens."""
    cut_vocabulary(setting.model(), 300)
    setting.config["model"]["allow_changes"] = True
    setting.rows([{"text": "Z Q Z"}, {"text": "Q Q Z"}, {"text": "X Z"}])


@case("data of tokens that the model does not know", "token id", "300 tokens", "tokenizer")
def _(setting: Setting) -> None:
    cut_vocabulary(setting.model(), 300)
    setting.config["model"]["allow_changes"] = True
    setting.lines('{"text": "Z Q"}')


def cut_vocabulary(model: Path, number: int) -> None:
    """Leaves a model only its first tokens."""
    config = json.loads((model / "config.json").read_text()) | {"vocab_size": number}
    (model / "config.json").write_text(json.dumps(config))
    tensors = load_file(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:number].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@case(
    "one query that makes activations infinite",
    "NaN or infinity",
    "query 1",
    "input of module model.layers.0.mlp.gate_proj",
)
def _(setting: Setting) -> None:
    make_infinite(setting.model(), "#")
    setting.config["model"]["allow_changes"] = True
    setting.queries({"text": "One # is here."})


@case("one sequence that makes activations infinite", "NaN or infinity", "sequence 1 ", "module")
def _(setting: Setting) -> None:
    make_infinite(setting.model(), "#")
    setting.config["model"]["allow_changes"] = True
    setting.rows([{"text": "All is good."}, {"text": "One # is here."}, {"text": "All is good."}])


def make_infinite(model: Path, character: str) -> None:
    """Makes the embedding of one character's token infinite."""
    tensors = load_file(model / "model.safetensors")
    token = tiny_tokenizer()(character)["input_ids"][1]
    tensors["model.embed_tokens.weight"][token] = float("inf")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


# -- the training data -----------------------------------------------------------------------------


@case("data that has vanished", r"no file .*gone\.jsonl", r"data\.source")
def _(setting: Setting) -> None:
    gone = str(setting.path("gone.jsonl"))
    setting.manifest(lambda m: m["config"]["data"].update(source=gone))


@case("a data file that is missing", r"no file .*elsewhere\.jsonl")
def _(setting: Setting) -> None:
    setting.config["data"]["source"] = setting.path("elsewhere.jsonl")


@case("a column that has vanished", "no column 'txt'", "columns are text")
def _(setting: Setting) -> None:
    setting.manifest(lambda m: m["config"]["data"].update(text="txt"))


@case("a column that the fitted data does not have", "no column 'txt'", "columns are text")
def _(setting: Setting) -> None:
    setting.config["data"]["text"] = "txt"


@case("other data without the column", "no column 'text'", "columns are body")
def _(setting: Setting) -> None:
    setting.rows([{"body": text} for text in texts(3)])


@case("a prompt column that does not exist", "no column 'question'")
def _(setting: Setting) -> None:
    setting.config["data"]["prompt"] = "question"


@case("other data that holds no text", "'text' holds 17", "must hold text")
def _(setting: Setting) -> None:
    setting.rows([{"text": 17}])


@case("other data without a label", "None of the 2 sequences has a label")
def _(setting: Setting) -> None:
    setting.rows([{"text": ""}, {"text": None}])


@case("data longer than the model reads", f"reads {CONTEXT}", f"max_tokens to {CONTEXT} or less")
def _(setting: Setting) -> None:
    setting.rows([{"text": "a long text " * 200}])
    setting.config["data"]["max_tokens"] = 10 * CONTEXT
    setting.config["scores"]["top_k"] = 1


@case("factors fitted from Python, whose data has no name", r"data\.source", "list")
def _(setting: Setting) -> None:
    """As `estimate_factors` writes them from a list of examples."""
    setting.manifest(lambda m: m["config"]["data"].update(source="list"))


# -- the queries -----------------------------------------------------------------------------------


@case("a queries file that is missing", "queries .*gone.jsonl cannot be read", "No such", "Give a")
def _(setting: Setting) -> None:
    setting.config["queries"] = setting.path("gone.jsonl")


@case("a queries file that is a directory", "queries .* cannot be read", "directory", "Give a")
def _(setting: Setting) -> None:
    setting.config["queries"] = setting.directory


for what, content in (("empty", b""), ("of blank lines", b"\n  \n\t\n\n")):

    @case(f"a queries file that is {what}", r"queries\.jsonl holds no query", '"completion"')
    def _(setting: Setting, content: bytes = content) -> None:
        setting.path("queries.jsonl").write_bytes(content)


@case("a query that is no JSON", r"queries\.jsonl, line 4: is not JSON", "column 10", '"text"')
def _(setting: Setting) -> None:
    """Blank lines count."""
    setting.lines('{"text": "good"}', "", '{"text": "good too"}', '{"text": bad}')


@case("a query that breaks off", "line 2: is not JSON")
def _(setting: Setting) -> None:
    setting.lines('{"text": "good"}', '{"text": "not wh')


@case("a query nested too deeply", "line 2: is not JSON")
def _(setting: Setting) -> None:
    setting.lines('{"text": "good"}', "[" * 200_000)


@case("queries in one JSON list over several lines", "line 1: is not JSON", "each line must be")
def _(setting: Setting) -> None:
    setting.path("queries.jsonl").write_text(json.dumps(QUERIES, indent=1))


for value, kind in (([QUERIES[0]], "list"), ("text", "str"), (17, "int"), (None, "NoneType")):

    @case(f"a query that is {kind}", rf"line 2: is {kind}, not an object", "each line must be")
    def _(setting: Setting, value: object = value) -> None:
        setting.queries(value)


@case("a query of other fields", "line 2: has question and answer", "each line must be")
def _(setting: Setting) -> None:
    setting.queries({"question": "What?", "answer": "That."})


@case("a query of no fields", "line 2: has no text", "each line must be")
def _(setting: Setting) -> None:
    setting.queries({})


@case("a query with a prompt alone", "line 2: has prompt;", "each line must be")
def _(setting: Setting) -> None:
    setting.queries({"prompt": "What?"})


@case("a query with a completion alone", "line 2: has completion;", "each line must be")
def _(setting: Setting) -> None:
    setting.queries({"completion": "That."})


@case("a query with a prompt and text", "line 2: has prompt and text;", "each line must be")
def _(setting: Setting) -> None:
    setting.queries({"prompt": "What?", "text": "That."})


@case("a query with all fields", "line 2: has prompt and completion and text;")
def _(setting: Setting) -> None:
    setting.queries({"prompt": "What?", "completion": "That.", "text": "That."})


for query, says in (
    ({"text": 17}, "text is 17"),
    ({"text": ["a"]}, r"text is \['a'\]"),
    ({"prompt": 17, "completion": "That."}, "prompt is 17"),
    ({"prompt": "What?", "completion": {"a": 1}}, r"completion is \{'a': 1\}"),
    ({"text": "That.", "group": 3}, "group is 3"),
):

    @case(f"a query whose {says}", f"line 2: {says}; it must be text")
    def _(setting: Setting, query: dict = query) -> None:
        setting.queries(query)


@case("a query of an empty completion", "line 2: completion is empty", "must hold")
def _(setting: Setting) -> None:
    setting.queries({"prompt": "What?", "completion": ""})


@case("a query of an empty text", "line 2: text is empty", "must hold")
def _(setting: Setting) -> None:
    setting.queries({"text": ""})


@case("a query of half a character", "line 2: text", r"\\ud800", "surrogate")
def _(setting: Setting) -> None:
    setting.lines(json.dumps(QUERIES[0]), '{"text": "half \\ud800 of it"}')


@case("queries that are not UTF-8", r"queries\.jsonl, line 2: is not UTF-8")
def _(setting: Setting) -> None:
    setting.lines(json.dumps(QUERIES[0]), '{"text": "café"}'.encode("latin-1"))


@case("queries that are binary", r"queries\.jsonl, line 1: is not (UTF-8|JSON)")
def _(setting: Setting) -> None:
    setting.lines(BINARY)


@case(
    "a query longer than the model reads",
    r"queries\.jsonl, line 2: has \d\d\d+ tokens",
    f"reads {CONTEXT} at most",
    "shorten",
)
def _(setting: Setting) -> None:
    setting.queries({"prompt": "a long text " * 200, "completion": "it is."})


@case("a completion with nothing to predict", "line 2: ", "'s'", "nothing to predict", "longer")
def _(setting: Setting) -> None:
    """Without a token that begins every text, the first has none before it."""
    tiny_tokenizer(bos=False).save_pretrained(setting.model())
    setting.queries({"prompt": "", "completion": "s"})


# -- the scores ------------------------------------------------------------------------------------


@case("top_k above the data", r"scores\.top_k is 13", "only 12 sequences", "12 or less")
def _(setting: Setting) -> None:
    setting.config["scores"]["top_k"] = NUM_ROWS + 1


@case("bottom_k above the data", r"scores\.bottom_k is 13", "only 12 sequences", "12 or less")
def _(setting: Setting) -> None:
    setting.config["scores"]["bottom_k"] = NUM_ROWS + 1


@case("top_k above the candidates", r"scores\.top_k is 3", "only 2 sequences", "2 or less")
def _(setting: Setting) -> None:
    setting.config["scores"]["candidates"] = [1, 2]


@case("rescore above the data", r"scores\.rescore is 13", "only 12 sequences", "12 or less")
def _(setting: Setting) -> None:
    setting.config["scores"] |= {"rank": 2, "rescore": NUM_ROWS + 1}


@case("rescore without a rank", r"scores\.rescore", "exact already", r"scores\.rank")
def _(setting: Setting) -> None:
    setting.config["scores"]["rescore"] = 5


@case("rescore below top_k", r"scores\.rescore is 2", "lists of 3", "at least as many")
def _(setting: Setting) -> None:
    setting.config["scores"] |= {"rank": 2, "rescore": 2}


@case("rescore below bottom_k", r"scores\.rescore is 4", "lists of 5", "at least as many")
def _(setting: Setting) -> None:
    setting.config["scores"] |= {"rank": 2, "rescore": 4, "bottom_k": 5}


for name in ("top_k", "rank", "training_size"):
    for value in (0, -2):

        @case(f"scores.{name} of {value}", f"scores.{name} is {value}", "1 or more")
        def _(setting: Setting, name: str = name, value: int = value) -> None:
            setting.config["scores"][name] = value


for name in ("bottom_k", "rescore"):

    @case(f"scores.{name} of -1", f"scores.{name} is -1", "0 or more")
    def _(setting: Setting, name: str = name) -> None:
        setting.config["scores"] |= {"rank": 2, name: -1}


for value in (0, -4.0, float("nan"), float("inf")):

    @case(f"a query memory of {value}", rf"scores\.query_memory_gb is {value}", "above 0")
    def _(setting: Setting, value: float = value) -> None:
        setting.config["scores"]["query_memory_gb"] = value


for value in (0, -256):

    @case(f"batch_tokens of {value}", f"batch_tokens is {value}", "1 or more")
    def _(setting: Setting, value: int = value) -> None:
        setting.options = [f"--batch_tokens={value}"]


for name, value, known in (
    ("scores.normalize", "softmax", "relatif_theta"),
    ("scores.per_token", "some", "top"),
    ("model.dtype", "float8", "bfloat16"),
):

    @case(f"{name} of {value}", name.rpartition(".")[2], value, known)
    def _(setting: Setting, name: str = name, value: str = value) -> None:
        setting.options = [f"--{name}={value}"]

    @case(f"{name} of {value} in the file", name.rpartition(".")[2], value, known)
    def _(setting: Setting, name: str = name, value: str = value) -> None:
        group, _, leaf = name.partition(".")
        setting.config[group][leaf] = value


# -- the candidates --------------------------------------------------------------------------------


for rows, says in (
    ([0, NUM_ROWS], "holds 12, but the data has rows 0 to 11"),
    ([3, -1], "holds -1, but the data has rows 0 to 11"),
    ([10**30], "holds 10{30}, but the data has rows 0 to 11"),
    ([1, 4, 2, 4], "holds 4 more than once; give each row once"),
    ([], "is empty; give at least one row"),
):

    @case(f"candidates that are {rows}", rf"scores\.candidates {says}")
    def _(setting: Setting, rows: list[int] = rows) -> None:
        setting.config["scores"]["candidates"] = rows

    @case(f"candidates in a file that are {rows}", rf"scores\.candidates {says}")
    def _(setting: Setting, rows: list[int] = rows) -> None:
        setting.candidates("".join(f"{row}\n" for row in rows))


@case(
    "candidates that are not all numbers",
    r"scores\.candidates is \[1, 'two'\]; it must be a list of whole numbers or text or null",
)
def _(setting: Setting) -> None:
    setting.config["scores"]["candidates"] = [1, "two"]


@case(
    "candidates that are no list",
    r"scores\.candidates is 1\.5; it must be a list of whole numbers or text or null",
)
def _(setting: Setting) -> None:
    setting.config["scores"]["candidates"] = 1.5


@case("a candidate that is a fraction", "holds 2.5; rows are whole numbers")
def _(setting: Setting) -> None:
    setting.candidates("[1, 2.5]")


@case("a candidate that is true", "holds True; rows are whole numbers")
def _(setting: Setting) -> None:
    setting.candidates("[1, true]")


@case("a candidates file that is missing", "candidates .*rows.json cannot be read", "No such file")
def _(setting: Setting) -> None:
    setting.config["scores"]["candidates"] = setting.path("rows.json")


@case("a candidates file of nobody's home", "candidates ~nobody-here/rows.json cannot be read")
def _(setting: Setting) -> None:
    setting.config["scores"]["candidates"] = "~nobody-here/rows.json"


for what, content in (
    ("words", "1\ntwo\n"),
    ("an object", '{"rows": [1, 2]}'),
    ("a list that breaks off", "[1, 2"),
    ("a list nested too deeply", "[" * 200_000),
    ("binary", BINARY),
    ("a number of too many digits", "9" * 5000),
):

    @case(f"a candidates file that holds {what}", "candidates .*rows.txt are no list", "JSON list")
    def _(setting: Setting, content: str | bytes = content) -> None:
        setting.candidates(content)


@case("a candidate without a label", "holds 1, but that row has no label", "leave it out")
def _(setting: Setting) -> None:
    setting.rows([{"text": "All is good."}, {"text": ""}, {"text": "All is good."}])
    setting.config["scores"] |= {"candidates": [0, 1], "top_k": 1}


# -- the damping -----------------------------------------------------------------------------------


@case("a damping that is negative", "damping is -0.1", "0 or more")
def _(setting: Setting) -> None:
    setting.config["damping"]["value"] = -0.1


for value in (float("nan"), float("inf")):

    @case(f"a damping of {value}", f"damping is {value}", "0 or more")
    def _(setting: Setting, value: float = value) -> None:
        setting.config["damping"]["value"] = value


@case("a damping of text", r"damping\.value is strong; it must be a number")
def _(setting: Setting) -> None:
    setting.config["damping"]["value"] = "strong"


for value in (-1.0, float("nan")):

    @case(f"a module's damping of {value}", rf"damping of \*\.up_proj is {value}", "0 or more")
    def _(setting: Setting, value: float = value) -> None:
        setting.config["damping"]["modules"] = {"*.up_proj": value}


@case("a damping of modules that is null", "damping of modules is None", "by name or glob")
def _(setting: Setting) -> None:
    setting.config["damping"]["modules"] = None


@case("a damping for a module that is not there", r"given for '\*\.upp_proj'", "no tracked module")
def _(setting: Setting) -> None:
    setting.config["damping"]["modules"] = {"*.down_proj": 0.2, "*.upp_proj": 0.3}


@case(
    "no damping where the spectrum has zeros",
    f"Module {MODULE}: damping is 0 and Λ has zeros",
    "above 0",
)
def _(setting: Setting) -> None:
    change_spectrum(setting.store(), lambda lambda_OI: lambda_OI[0].zero_())
    setting.config["damping"]["value"] = 0


@case(
    "no damping of one module where its spectrum has zeros",
    f"Module {MODULE}: damping is 0 and Λ has zeros",
    "above 0",
)
def _(setting: Setting) -> None:
    change_spectrum(setting.store(), lambda lambda_OI: lambda_OI[0].zero_())
    setting.config["damping"]["modules"] = {MODULE: 0}


@case(
    "a relative damping where the spectrum is zero",
    f"Module {MODULE}: ",
    "Λ is zero everywhere",
    r"damping\.relative|absolute",
)
def _(setting: Setting) -> None:
    change_spectrum(setting.store(), lambda lambda_OI: lambda_OI.zero_())


@case("a spectrum of NaN", f"Module {MODULE}: ", "Λ", "NaN", "again")
def _(setting: Setting) -> None:
    change_spectrum(setting.store(), lambda lambda_OI: lambda_OI[0].fill_(float("nan")))


@case("a spectrum that is negative", f"Module {MODULE}: ", "Λ", "negative", "again")
def _(setting: Setting) -> None:
    change_spectrum(setting.store(), lambda lambda_OI: lambda_OI[0].fill_(-1e3))


def change_spectrum(store: Path, change: Callable[[torch.Tensor], object]) -> None:
    """Changes a module's Λ, and the manifest with it."""
    spectrum = load_file(store / SPECTRUM)["lambda"].clone()
    change(spectrum)
    save_file({"lambda": spectrum}, store / SPECTRUM)
    relist(store, SPECTRUM)


# -- the configuration -----------------------------------------------------------------------------


for name in ("factors", "queries", "output"):

    @case(f"no {name}", f"{name} is not given", f"--{name}")
    def _(setting: Setting, name: str = name) -> None:
        del setting.config[name]


@case("an unknown option", r"no option --scores\.topk;", r"did you mean --scores\.top_k\?")
def _(setting: Setting) -> None:
    setting.options = ["--scores.topk", "3"]


@case("an option under no group", r"no option --top_k;", r"did you mean --scores\.top_k\?")
def _(setting: Setting) -> None:
    setting.options = ["--top_k", "3"]


@case(
    "an unknown field in the file", r"unknown field scores\.topk;", r"did you mean scores\.top_k\?"
)
def _(setting: Setting) -> None:
    setting.config["scores"]["topk"] = 3


@case("a field under no group in the file", "unknown field rank;", r"did you mean scores\.rank\?")
def _(setting: Setting) -> None:
    setting.config["rank"] = 8


@case("a field of estimate's in the file", r"unknown field model\.modules", "config.yaml")
def _(setting: Setting) -> None:
    setting.config["model"]["modules"] = ["*.mlp.*"]


@case("a group that is a value", "field damping is 0.1", "fields of its own")
def _(setting: Setting) -> None:
    setting.config["damping"] = 0.1


for name, value, says in (
    ("scores.top_k", "many", "is many; it must be a whole number or null"),
    ("scores.rank", 2.5, "is 2.5; it must be a whole number or null"),
    ("scores.per_module", "perhaps", "is perhaps; it must be true or false"),
    ("scores.query_memory_gb", "much", "is much; it must be a number"),
    ("damping.relative", "perhaps", "is perhaps; it must be true or false"),
    ("damping.modules", [0.1], r"is \[0.1\]; it must be a group of names, each with a number"),
    ("damping.modules", {"*": "strong"}, "is strong; it must be a number"),
    ("batch_tokens", 10.5, "is 10.5; it must be a whole number"),
    ("data.max_tokens", "many", "is many; it must be a whole number or null"),
    ("factors", [1], r"is \[1\]; it must be text or null"),
):

    @case(f"{name} of {value}, a wrong type", f"{re.escape(name)} {says}")
    def _(setting: Setting, name: str = name, value: object = value) -> None:
        group, _, leaf = name.rpartition(".")
        (setting.config[group] if group else setting.config)[leaf] = value


@case("a wrong type on the command line", r"scores\.top_k is three; it must be a whole number")
def _(setting: Setting) -> None:
    setting.options = ["--scores.top_k", "three"]


@case("sequences of one token", r"data\.max_tokens is 1", "2 tokens or more")
def _(setting: Setting) -> None:
    setting.config["data"]["max_tokens"] = 1


# -- the output ------------------------------------------------------------------------------------


@case("an output that is a file", "scores exists and is no directory", "give another")
def _(setting: Setting) -> None:
    setting.path("scores").write_text("the only copy")


@case("an output that holds something", r"it holds thesis\.tex", "new or empty")
def _(setting: Setting) -> None:
    setting.path("scores").mkdir()
    setting.path("scores/thesis.tex").write_text("the only copy")


@case("an output that holds finished results", "exists already", "new or empty")
def _(setting: Setting) -> None:
    shutil.copytree(setting.good.scores, setting.path("scores"))


@case("an output that is the factor store", "exists already", "new or empty")
def _(setting: Setting) -> None:
    setting.config["output"] = setting.store()


@case("an output that is a dangling link", "scores exists and is no directory", "give another")
def _(setting: Setting) -> None:
    setting.path("scores").symlink_to(setting.path("gone"))


@case("an output below a file", "cannot be made", r"queries\.jsonl is no directory", "another")
def _(setting: Setting) -> None:
    setting.config["output"] = setting.path("queries.jsonl") / "scores"


@case("an output where nothing can be made", "/proc/scores cannot be made", "Give a")
def _(setting: Setting) -> None:
    setting.config["output"] = "/proc/scores"


@case("an output below a dangling link", "made/scores cannot be made", "Give a")
def _(setting: Setting) -> None:
    setting.path("made").symlink_to(setting.path("gone"))
    setting.config["output"] = setting.path("made/scores")


@case("an empty output and a store that is missing", "gone is no directory", "`estimate` run")
def _(setting: Setting) -> None:
    """The directory was there, so it stays."""
    setting.path("scores").mkdir()
    setting.config["factors"] = setting.path("gone")


@case("an output of too long a name", "cannot be made", "too long", "Give a")
def _(setting: Setting) -> None:
    setting.config["output"] = setting.path("made/first") / ("s" * 300)


# -- the runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    directory = tmp_path_factory.mktemp("good")
    good = Good(directory, *(directory / n for n in ("tiny", "text.jsonl", "factors", "scores")))
    save_tiny_llama(good.model)
    write_jsonl(good.data, [{"text": text} for text in texts(NUM_ROWS)])
    queries = write_jsonl(directory / "queries.jsonl", QUERIES)
    fit = {"model.name": good.model, "data.source": good.data, "output": good.store}
    ask = {"factors": good.store, "queries": queries, "output": good.scores, "scores.top_k": 3}
    for command, given in (("estimate", fit), ("query", ask)):
        options = [f"--{name}={value}" for name, value in given.items()]
        with contextlib.redirect_stdout(io.StringIO()):
            assert cli.main([command, *options]) == 0
    return good


@pytest.fixture(scope="module")
def good_contents(good: Good) -> dict[str, str]:
    return contents(good.directory)


@pytest.fixture
def setting(tmp_path: Path, good: Good, good_contents: dict[str, str]) -> Iterator[Setting]:
    yield Setting(tmp_path, good)
    assert contents(good.directory) == good_contents


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_worker_refuses(case: Case, setting: Setting, capfd: pytest.CaptureFixture) -> None:
    require_refusal(case, setting, lambda arguments: in_this_process(arguments, capfd))


def refused_by_two_workers(cases: list[Case], directory: Path, good: Good) -> None:
    """Requires that two workers refuse each of these in turn, and answer a good query after it."""
    settings = [Setting(directory / str(number), good) for number in range(len(cases) + 1)]
    for case, setting in zip(cases, settings, strict=False):
        case.spoil(setting)
    runs = [setting.arguments() for setting in settings]
    before = [contents(setting.directory) for setting in settings]
    shared = contents(good.directory)
    ends = on_two_workers_in_turn(runs, directory, timeout=5 * PROMPT_SECONDS)
    for number, case in enumerate(cases):
        (status, said), (other_status, other_said) = (mine[number] for mine in ends)
        assert status == other_status, f"{case.name}: {said} {other_said}"
        require_sentence(case, status, said + other_said)
        assert contents(settings[number].directory) == before[number], case.name
    assert contents(good.directory) == shared
    assert [mine[-1][0] for mine in ends] == [0, 0], ends[0][-1]
    assert (settings[-1].path("scores") / MANIFEST).is_file()


def test_two_workers_refuse(tmp_path: Path, good: Good) -> None:
    refused_by_two_workers([c for c in CASES if c.name in STAND_FOR_ALL], tmp_path, good)


@pytest.mark.slow
def test_two_workers_refuse_as_well(tmp_path: Path, good: Good) -> None:
    refused_by_two_workers([c for c in CASES if c.name not in STAND_FOR_ALL], tmp_path, good)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_processes_of_their_own_end_with_status_2(workers: int, setting: Setting) -> None:
    case = next(case for case in CASES if case.name == "a query that is no JSON")
    require_refusal(case, setting, lambda arguments: on_real_workers(arguments, workers))


def test_the_cases_that_stand_for_all_exist() -> None:
    assert set(STAND_FOR_ALL) <= {case.name for case in CASES}


@pytest.mark.parametrize("exists", [False, True])
def test_an_output_without_permission_is_refused(
    exists: bool, setting: Setting, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions are told by the system; the tests may run as one who has them all."""
    if exists:
        setting.path("scores").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    says = "scores cannot be (written|made: .* is no directory that can be written)"
    case = Case("", lambda setting: None, (says, "ive another directory"))
    require_refusal(case, setting, lambda arguments: in_this_process(arguments, capfd))


def test_what_the_cases_spoil_is_good(setting: Setting, capfd: pytest.CaptureFixture) -> None:
    setting.model()
    setting.store()
    setting.candidates("0\n3\n5\n7\n")
    status, stdout, stderr = in_this_process(setting.arguments(), capfd)
    assert status == 0, stderr
    assert SAID not in stderr
    assert "12 of 12 sequences" in stdout
    assert "4 of them scored" in stdout
    assert json.loads((setting.path("scores") / MANIFEST).read_text())["complete"] is True


def test_a_rank_above_the_matrices_is_reduced_and_said(
    setting: Setting, capfd: pytest.CaptureFixture
) -> None:
    setting.config["scores"]["rank"] = 20
    status, stdout, stderr = in_this_process(setting.arguments(), capfd)
    assert status == 0, stderr
    assert "rank          20 is more than 6 of 6 modules have: reduced there, to 16 in" in stdout
    scan = json.loads((setting.path("scores") / MANIFEST).read_text())["scan"]
    assert scan["rank"] == 20
    assert set(scan["ranks"].values()) == {16}


def test_other_data_than_the_fitted_is_scored_and_said(
    setting: Setting, capfd: pytest.CaptureFixture
) -> None:
    setting.rows([{"text": text} for text in texts(4, seed=1)])
    status, stdout, stderr = in_this_process(setting.arguments(), capfd)
    assert status == 0, stderr
    assert "not the sequences that the factors were fitted on" in stdout


def test_a_relative_damping_needs_no_spectrum_without_zeros(
    setting: Setting, capfd: pytest.CaptureFixture
) -> None:
    change_spectrum(setting.store(), lambda lambda_OI: lambda_OI[0].zero_())
    status, _, stderr = in_this_process(setting.arguments(), capfd)
    assert status == 0, stderr


# -- the report ------------------------------------------------------------------------------------


@dataclass
class Report:
    """A good report in a directory of its own, for a case to spoil.

    Attributes:
        directory: Holds all that is made.
        results: A copy of good results.
        output: The page.
    """

    directory: Path
    results: Path
    output: Path

    def arguments(self) -> list[str]:
        return ["report", str(self.results), "--output", str(self.output)]


REPORTS: list[Case] = []
report_case = table(REPORTS)


@report_case("results that are missing", "gone/manifest.json cannot be read", "`query` run")
def _(report: Report) -> None:
    report.results = report.directory / "gone"


@report_case("results that are a file", "cannot be read: Not a directory", "`query` run")
def _(report: Report) -> None:
    report.results = report.results / "top.jsonl"


@report_case("a directory that holds no results", "cannot be read: No such file", "`query` run")
def _(report: Report) -> None:
    (report.results / MANIFEST).unlink()


@report_case("a factor store", "format 'ekfac_dist/1'", "reads 'ekfac_dist/scores/1'", "`query`")
def _(report: Report) -> None:
    rewrite_manifest(report.results, lambda m: m.update(format="ekfac_dist/1"))


@report_case("results of another format", "format 'ekfac_dist/scores/2'", "`query`")
def _(report: Report) -> None:
    rewrite_manifest(report.results, lambda m: m.update(format="ekfac_dist/scores/2"))


@report_case("results that are incomplete", "incomplete: its run did not finish", "`query` again")
def _(report: Report) -> None:
    rewrite_manifest(report.results, lambda m: m.update(complete=False))


for what, content in (("cut short", b'{"format'), ("binary", BINARY), ("deep", b"[" * 200_000)):

    @report_case(f"a manifest of results that is {what}", r"manifest\.json is not JSON")
    def _(report: Report, content: bytes = content) -> None:
        (report.results / MANIFEST).write_bytes(content)


@report_case("a manifest of results that is a list", "format None", "`query`")
def _(report: Report) -> None:
    (report.results / MANIFEST).write_text("[]")


for what, files in (("no files", None), ("a list", []), ("text", "all")):

    @report_case(f"a manifest of results with {what} for files", r"manifest\.json", "files")
    def _(report: Report, files: object = files) -> None:
        rewrite_manifest(report.results, lambda m: m.update(files=files))


for what, name, listing in (
    ("as nothing", "top.jsonl", None),
    ("without a hash", "top.jsonl", {"bytes": 3}),
    ("elsewhere", "../top.jsonl", {"bytes": 1, "sha256": ""}),
):

    @report_case(f"a manifest that lists results {what}", r"manifest\.json lists", re.escape(name))
    def _(report: Report, name: str = name, listing: object = listing) -> None:
        rewrite_manifest(report.results, lambda m: m["files"].update({name: listing}))


for key in ("factors", "scores", "damping", "scan", "modules", "software", "config"):

    @report_case(f"a manifest of results without {key}", key, "`query` again")
    def _(report: Report, key: str = key) -> None:
        rewrite_manifest(report.results, lambda m: m.pop(key))


for file in ("queries.jsonl", "scores.safetensors", "top.jsonl", "details.safetensors"):

    @report_case(f"results without {file}", re.escape(file), "missing, though the manifest")
    def _(report: Report, file: str = file) -> None:
        (report.results / file).unlink()

    @report_case(f"results with a flipped bit in {file}", re.escape(file), "changed", "`query` ag")
    def _(report: Report, file: str = file) -> None:
        flip(report.results / file, -3)

    @report_case(f"results whose {file} holds other things", "`query` again|cannot be read")
    def _(report: Report, file: str = file) -> None:
        (report.results / file).write_bytes(BINARY)
        relist(report.results, file)


for file in ("queries.jsonl", "scores.safetensors", "top.jsonl"):

    @report_case(f"results whose {file} is not listed", re.escape(file), "`query` again")
    def _(report: Report, file: str = file) -> None:
        rewrite_manifest(report.results, lambda m: m["files"].pop(file))


@report_case("a line of results that lacks a field", r"lacks something", "`query` again")
def _(report: Report) -> None:
    (report.results / "top.jsonl").write_text("{}\n")
    relist(report.results, "top.jsonl")


@report_case("a page that exists", r"page\.html exists already", "another file, or remove it")
def _(report: Report) -> None:
    report.output.write_text("the only copy")


@report_case("a page that is a dangling link", r"page\.html exists already", "another file")
def _(report: Report) -> None:
    report.output.symlink_to(report.directory / "gone")


@report_case("a page in no folder", "no folder .*gone", "Make it, or give another")
def _(report: Report) -> None:
    report.output = report.directory / "gone/page.html"


@report_case("a page below a file", "no folder", "Make it, or give another")
def _(report: Report) -> None:
    report.output = report.results / "top.jsonl/page.html"


@report_case("a page where nothing can be made", "/proc/page.html cannot be written", "Give an")
def _(report: Report) -> None:
    report.output = Path("/proc/page.html")


@pytest.mark.parametrize("case", REPORTS, ids=lambda case: case.name)
def test_a_report_is_refused(
    case: Case, tmp_path: Path, good: Good, capfd: pytest.CaptureFixture
) -> None:
    pytest.importorskip("jinja2")
    results = shutil.copytree(good.scores, tmp_path / "scores")
    report = Report(tmp_path, results, tmp_path / "page.html")
    require_refusal(case, report, lambda arguments: in_this_process(arguments, capfd))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["report"], "scores"),
        (["report", "gone", "--outptu", "page.html"], "no option --outptu; did you mean --output"),
        (["report", "gone", "page.html"], "page.html"),
        (["query"], "factors is not given; set it in the YAML file or as --factors"),
        (["queri"], "no command 'queri'.*did you mean query"),
    ],
)
def test_commands_refuse(arguments: list[str], says: str, capfd: pytest.CaptureFixture) -> None:
    status, _, stderr = in_this_process(arguments, capfd)
    require_sentence(Case(" ".join(arguments), lambda _: None, (says,)), status, stderr)


# -- from Python -----------------------------------------------------------------------------------


@dataclass
class Call:
    """A good call of `influence_scores`, some of whose arguments a test replaces."""

    model: nn.Module
    factors: Factors
    tokenizer: PreTrainedTokenizerFast

    def __call__(self, **changes: Any) -> InfluenceScores:
        arguments = {
            "model": self.model,
            "factors": self.factors,
            "queries": QUERIES,
            "train": [{"text": text} for text in texts(NUM_ROWS)],
            "tokenizer": self.tokenizer,
            "top_k": 2,
            **changes,
        }
        return influence_scores(**arguments)


@pytest.fixture(scope="module")
def call(good: Good) -> Call:
    model = AutoModelForCausalLM.from_pretrained(good.model)
    return Call(model, load_factors(good.store, model), tiny_tokenizer())


def tokens(*ids: int, **more: Any) -> dict[str, Any]:
    return {"input_ids": torch.tensor(ids), **more}


def test_a_good_call_is_answered(call: Call) -> None:
    assert call().scores.shape == (len(QUERIES), NUM_ROWS)
    assert call(queries=[tokens(5, 6, 7)]).scores.shape == (1, NUM_ROWS)


# Arguments that are replaced, and what is raised.
CALLS: list[tuple[dict[str, Any], type[UserError], str]] = [
    # queries
    ({"queries": []}, DataError, "no queries; give at least one"),
    ({"tokenizer": None}, ConfigError, "queries are text, but there is no tokenizer"),
    ({"queries": ["text"]}, DataError, "Query 0 is str; give mappings"),
    ({"queries": [QUERIES[0], [1, 2]]}, DataError, "Query 1 is list; give mappings"),
    ({"queries": [QUERIES[0], tokens(1, 2)]}, DataError, "query 1: has "),
    ({"queries": [QUERIES[0], {"prompt": "a"}]}, DataError, "query 1: has prompt; "),
    ({"queries": [{"text": 3}]}, DataError, "query 0: text is 3; it must be text"),
    ({"queries": [{"text": ""}]}, DataError, "query 0: text is empty"),
    (
        {"queries": [tokens(5, 6), tokens(5, 6, labels=torch.tensor([5, -100]))]},
        DataError,
        r"Query 1 \(from 0\) has no label",
    ),
    ({"queries": [tokens(5)]}, DataError, "None of the 1 sequences has a label|has no label"),
    ({"queries": [tokens(5, -6)]}, DataError, "token id below 0"),
    ({"queries": [tokens(5, VOCABULARY)]}, DataError, "knows 321 tokens"),
    ({"queries": [tokens(*range(1, CONTEXT + 9))]}, DataError, "128 at most; shorten"),
    ({"queries": [{"text": "word " * 200}]}, DataError, "query 0.*128 at most; shorten it"),
    ({"queries": [{"input_ids": "text"}]}, DataError, "input_ids is no sequence of whole"),
    # training sequences
    ({"train": []}, DataError, "no sequences|no training sequences"),
    ({"train": ["text"]}, DataError, "holds a str without 'input_ids'"),
    ({"train": [{"text": "a b"}, {"txt": "a b"}]}, DataError, "sequence 1.*text"),
    ({"train": [{"text": "a b"}, {"text": 3}]}, DataError, "sequence 1.*text"),
    ({"train": [{"text": "a b"}, "a b"]}, DataError, "sequence 1"),
    ({"train": [{"text": ""}]}, DataError, "None of the 1 sequences has a label"),
    ({"train": [{"text": "word " * 200}]}, DataError, "128 at most; give max_tokens=128"),
    (
        {"queries": [tokens(5, 6)], "tokenizer": None},
        ConfigError,
        "training sequences are text, but there is no tokenizer",
    ),
    # which scores
    ({"normalize": "softmax"}, ConfigError, "normalize is 'softmax'; it must be one of none"),
    ({"per_token": "tpo"}, ConfigError, "per_token is 'tpo'; it must be one of none, top"),
    ({"per_token": True}, ConfigError, "per_token is True"),
    ({"top_k": 13}, ConfigError, "top_k is 13, but only 12 sequences"),
    ({"top_k": 0}, ConfigError, "top_k is 0; it must be a whole number of 1 or more"),
    ({"top_k": "3"}, ConfigError, "top_k is '3'; it must be a whole number"),
    ({"bottom_k": 13}, ConfigError, "bottom_k is 13, but only 12 sequences"),
    ({"bottom_k": "3"}, ConfigError, "bottom_k is '3'; it must be a whole number"),
    ({"bottom_k": 2.5}, ConfigError, "bottom_k is 2.5; it must be a whole number"),
    ({"rank": 0}, ConfigError, "rank is 0; it must be a whole number of 1 or more"),
    ({"rank": 2.0}, ConfigError, "rank is 2.0; it must be a whole number of 1 or more"),
    ({"rescore": 3}, ConfigError, "scores are exact already"),
    ({"rescore": None, "rank": 2}, ConfigError, "rescore is None; it must be a whole number"),
    ({"rescore": "all", "rank": 2}, ConfigError, "rescore is 'all'; it must be a whole"),
    ({"rescore": 1, "rank": 2}, ConfigError, "rescore is 1, but lists of 2 are asked for"),
    ({"training_size": 0}, ConfigError, "training_size is 0"),
    ({"query_memory_gb": 0}, ConfigError, "query_memory_gb is 0; it must be a finite"),
    ({"query_memory_gb": "4"}, ConfigError, "query_memory_gb is '4'; it must be a finite"),
    ({"query_memory_gb": float("inf")}, ConfigError, "query_memory_gb is inf; it must be"),
    ({"batch_tokens": 0}, ConfigError, "batch_tokens is 0; it must be a whole number"),
    ({"max_tokens": 0}, ConfigError, "max_tokens is 0"),
    ({"max_tokens": -3}, ConfigError, "max_tokens is -3"),
    ({"candidates": []}, DataError, "candidates is empty"),
    ({"candidates": [0, 12]}, DataError, "holds 12, but the data has rows 0 to 11"),
    ({"candidates": [-1]}, DataError, "holds -1, but the data has rows"),
    ({"candidates": [2, 2]}, DataError, "holds 2 more than once"),
    ({"candidates": [0.5]}, DataError, "holds 0.5; rows are whole numbers"),
    ({"candidates": [True]}, DataError, "holds True; rows are whole numbers"),
    # damping
    ({"damping": -0.1}, ConfigError, "damping is -0.1; it must be a number of 0 or more"),
    ({"damping": float("nan")}, ConfigError, "damping is nan; it must be a number"),
    ({"damping": "strong"}, ConfigError, "damping is 'strong'; it must be a number"),
    ({"damping": None}, ConfigError, "damping"),
    ({"damping": {}}, ConfigError, "damping has no value for module model.layers.0"),
    ({"damping": {"*.up_proj": 0.1}}, ConfigError, "damping has no value for module model"),
    ({"damping": {"*": 0.1, "*.x": 0.1}}, ConfigError, r"damping.*given for '\*\.x', which is no"),
    ({"damping": {"*": -1}}, ConfigError, r"damping of \* is -1; it must be a number"),
]


@pytest.mark.parametrize(("changes", "error", "says"), CALLS, ids=[says for _, _, says in CALLS])
def test_a_bad_call_is_refused(
    changes: dict[str, Any], error: type[UserError], says: str, call: Call
) -> None:
    with pytest.raises(error, match=says) as raised:
        call(**changes)
    assert type(raised.value) is error
    assert re.search(r"[.?…]$", str(raised.value))


def test_factors_of_another_model_are_refused(call: Call, tmp_path: Path) -> None:
    for directory, said, changes in (
        ("weights", "its weights differ", {"seed": 1}),
        ("shape", r"is linear 16→24; in this LlamaForCausalLM it is", {"intermediate_size": 32}),
        ("fewer", "LlamaForCausalLM lacks", {"num_hidden_layers": 1}),
    ):
        save_tiny_llama(tmp_path / directory, **changes)
        other = AutoModelForCausalLM.from_pretrained(tmp_path / directory)
        with pytest.raises(StoreError, match=said):
            call(model=other)


def test_a_store_that_is_damaged_after_it_was_opened_is_refused(
    call: Call, good: Good, tmp_path: Path
) -> None:
    factors = load_factors(shutil.copytree(good.store, tmp_path / "factors"))
    flip(tmp_path / "factors" / OUTPUT, -1)
    with pytest.raises(StoreError, match="damaged: its SHA-256"):
        call(factors=factors)


def test_a_refused_model_comes_back_as_it_was(call: Call) -> None:
    call.model.train()
    for parameter in call.model.parameters():
        parameter.requires_grad_(True)
    for changes in ({"top_k": 13}, {"damping": {}}):
        with pytest.raises(ConfigError):
            call(**changes)
    assert call.model.training
    assert all(parameter.requires_grad for parameter in call.model.parameters())
    assert not any(module._forward_hooks for module in call.model.modules())


# -- what is accepted, and told -------------------------------------------------------------------


def test_a_change_that_is_meant_is_told_in_every_result(
    good: Good, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    setting = Setting(tmp_path / "changed", good)
    change_head(setting.model())
    setting.config["model"]["allow_changes"] = True
    status, stdout, stderr = in_this_process(setting.arguments(), capfd)
    assert status == 0, stderr
    told = "1 of 15 weights outside the tracked modules have other numbers"
    assert stdout.count(f"model differs {told}") == 2  # before the work, and beside the scores
    model = json.loads((setting.path("scores") / MANIFEST).read_text())["model"]
    assert len(model["differs"]) == 1
    assert model["differs"][0].startswith(told)
    assert model["not_compared"] == []
    fitted = json.loads((good.store / MANIFEST).read_text())["model"]
    assert model["whole"] != fitted["whole"]
    write_report(setting.path("scores"), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert f"not the one that the factors were fitted for: {told}" in page


def test_what_could_not_be_compared_is_told_in_every_result(
    good: Good, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    setting = Setting(tmp_path / "older", good)
    setting.manifest(lambda m: [m["model"].pop(k) for k in ("whole", "untracked", "configuration")])
    status, stdout, stderr = in_this_process(setting.arguments(), capfd)
    assert status == 0, stderr
    assert len(re.findall(r"not compared  .* is of an earlier version", stdout)) == 2
    model = json.loads((setting.path("scores") / MANIFEST).read_text())["model"]
    assert "earlier version" in model["not_compared"][0]
    assert model["differs"] == []
    write_report(setting.path("scores"), tmp_path / "page.html")
    assert "is of an earlier version, which kept" in (tmp_path / "page.html").read_text()
