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
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.refusals import (
    BINARY,
    PROMPT_SECONDS,
    SAID,
    Case,
    Change,
    Command,
    Tensors,
    case,
    change_file,
    config,
    contents,
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
    require_sentence,
    rows,
    tensors,
    with_entries,
    without,
    write,
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


CONTRAST = {"prompt": "The capital is", "completion": " Paris", "against": " Rome"}


class Query(Command):
    """A query to the store `factors` of the good directory."""

    name = "query"

    def begin(self) -> None:
        self.config = {
            "factors": self.good / "factors",
            "queries": write_jsonl(self.path("queries.jsonl"), QUERIES),
            "model": {},
            "data": {},
            "damping": {},
            "scores": {"top_k": 3},
            "refine": {},
            "batch_tokens": 256,
            "output": self.path("scores"),
        }

    def listed(self) -> Path:
        """A directory of files that a manifest lists, to be spoilt: a copy of the good store."""
        return self.copy("factors", "factors", "factors")


class Report(Command):
    """A report of a copy of the good results."""

    def begin(self) -> None:
        self.results = shutil.copytree(self.good / "scores", self.path("scores"))
        self.output = self.path("page.html")

    def listed(self) -> Path:
        return self.results

    def arguments(self) -> list[str]:
        return ["report", str(self.results), "--output", str(self.output)]


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
    "a shard above the workers",
    "more refine.sequences than the data",
    "a refinement in 16 bits",
    "a damping that is negative",
    "no damping where the spectrum has zeros",
    "an unknown option",
    "a wrong type on the command line",
    "an output that holds finished results",
)


# fmt: off
# Tables: a row's name and what it changes, and behind them the words that the sentence must hold.


# -- the store, or results: files and the manifest that lists them ---------------------------------


def listed_file(name: str, change: bytes | str | Callable[[Path], object]) -> Change:
    """A file that a manifest lists: its content, or what is done to it."""
    return lambda command: change_file(command.listed() / name, change)


def listed_anew(name: str, change: bytes | str | Callable[[Path], object]) -> Change:
    """The same, and the manifest lists it as it is then."""

    def spoil(command: Query | Report) -> None:
        directory = command.listed()
        change_file(directory / name, change)
        relist(directory, name)

    return spoil


def relist(directory: Path, file: str) -> None:
    """Makes a manifest list a file as it now is."""
    path = directory / file
    listing = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    rewrite_manifest(directory, lambda m: m["files"].update({file: listing}))


def flip(position: int) -> Callable[[Path], object]:
    """Flips one bit of the byte at that position."""

    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        path.write_bytes(content)

    return change


def manifest(change: Callable[[dict[str, Any]], object]) -> Change:
    return lambda command: rewrite_manifest(command.listed(), change)


def entries(*keys: str, **new: Any) -> Change:
    """What a manifest has in the group that the keys lead to."""
    return manifest(lambda m: reduce(getitem, keys, m).update(new))


def lacks(*keys: str) -> Change:
    """A manifest without the entry that the keys lead to."""
    return manifest(lambda m: reduce(getitem, keys[:-1], m).pop(keys[-1]))


def gone(group: str, name: str, path: str) -> Change:
    """A fit of something that has been there and no longer is."""
    return lambda command: entries("config", group, **{name: str(command.path(path))})(command)


def spectrum(change: Callable[[torch.Tensor], object]) -> Change:
    """A module's Λ, and the manifest with it."""
    return listed_anew(SPECTRUM, lambda path: change_spectrum(path, change))


def change_spectrum(path: Path, change: Callable[[torch.Tensor], object]) -> None:
    lambda_OI = load_file(path)["lambda"].clone()
    change(lambda_OI)
    save_file({"lambda": lambda_OI}, path)


def into_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def holding(names: str, *shape: int) -> Callable[[Path], object]:
    """Other tensors in a file."""
    return lambda path: save_file({name: torch.zeros(shape) for name in names.split()}, path)


def damaged(what: str, file: str) -> list[Case]:
    """What can have become of one file of a store."""
    name = re.escape(file)
    return [
        case(f"{what} that is missing", listed_file(file, Path.unlink),
             f"{name} … missing, though the manifest lists it"),
        case(f"{what} that is cut short", listed_file(file, cut(1)),
             rf"{name} … \d bytes; .* says \d+: it is damaged"),
        case(f"{what} with a flipped bit", listed_file(file, flip(-1)),
             f"{name} … damaged: its SHA-256 … fit .* again"),
        case(f"{what} that is a directory", listed_file(file, into_directory),
             f"{name} … damaged|missing"),
        case(f"{what} of another tensor", listed_anew(file, holding("other", 3)),
             f"{name} … holds no tensor"),
        case(f"{what} of another shape", listed_anew(file, holding("eigenvectors lambda", 3, 3)),
             rf"{name} … shape \[3, 3\] … say"),
    ]


SECRET = {"../secret": {"bytes": 1, "sha256": ""}}

STORES = [
    case("a store that is missing", config("factors", here("nowhere")),
         "nowhere is no directory … output of an `estimate` run"),
    case("a store that is a file", config("factors", here("queries.jsonl")),
         r"queries\.jsonl is no directory … output of an `estimate` run"),
    case("a store that is a directory of something else",
         config("factors", lambda command: command.good / "tiny"),
         r"no manifest\.json … `estimate` run"),
    case("results instead of a store", config("factors", lambda command: command.good / "scores"),
         "format 'ekfac_dist/scores/1' … reads 'ekfac_dist/1'"),
    case("a store that is incomplete", entries(complete=False),
         "incomplete: its run did not finish … Run `estimate` again"),
    case("a store of another format", entries(format="ekfac_dist/2"),
         "format 'ekfac_dist/2' … reads 'ekfac_dist/1'"),
    *(
        case(f"a manifest that is {what}", listed_file(MANIFEST, content),
             r"manifest\.json is not JSON")
        for what, content in (
            ("cut short", '{"format": "ekfac'),
            ("binary", BINARY),
            ("nothing", ""),
        )
    ),
    case("a manifest that is a list", listed_file(MANIFEST, "[]"),
         r"manifest\.json is no JSON object"),
    *(
        case(f"a manifest without {key}", lacks(key),
             rf"manifest\.json lacks {key}\. … Copy the store again")
        for key in ("model", "data", "fisher", "modules", "files", "config")
    ),
    *(
        case(f"a manifest whose {key} has no {entry}", lacks(key, entry),
             rf"manifest\.json … {key} … {entry} … damaged")
        for key, names in (
            ("model", "fingerprint"),
            ("data", "fingerprint num_sequences"),
            ("fisher", "labels refit seed"),
            ("config", "model data"),
        )
        for entry in names.split()
    ),
    case("a manifest of no modules", entries(modules={}), r"manifest\.json … no modules … damaged"),
    *(
        case(f"a manifest with a module {what}", change,
             f"entry for module {MODULE} … not whole … again")
        for what, change in (
            ("that is a list", entries("modules", **{MODULE: []})),
            ("that is null", entries("modules", **{MODULE: None})),
            ("without a size", lacks("modules", MODULE, "in_features")),
            ("whose size is text", entries("modules", MODULE, in_features="16")),
            ("whose size is negative", entries("modules", MODULE, out_features=-24)),
            ("of an unknown kind", entries("modules", MODULE, kind="hovercraft")),
            ("whose bias is a number", entries("modules", MODULE, bias=3)),
            ("whose input is a list", entries("modules", MODULE, input=["a", "b"])),
        )
    ),
    case("a module of another size than the model's", entries("modules", MODULE, out_features=25),
         "up_proj is linear 16→25 … it is .* 16→24"),
    case("a module whose factor is not there", entries("modules", MODULE, input="elsewhere"),
         "does not list eigenbasis/elsewhere"),
    case("a factor outside the store", entries("modules", MODULE, input="../../secret"),
         r"does not list … \.\./secret"),
    case("a manifest that lists files elsewhere", entries("files", **SECRET),
         r"\.\./secret … must list files in"),
    case("a manifest of a run that this version does not know",
         entries("config", "model", lora=True), "manifest … configuration … lora"),
    case("a manifest whose data has an impossible limit",
         entries("config", "data", max_tokens="many"), r"data\.max_tokens is 'many'"),
    *damaged("an input basis", INPUT),
    *damaged("an output basis", OUTPUT),
    *damaged("a spectrum", SPECTRUM),
]


# -- the model -------------------------------------------------------------------------------------


def other_model(save: Callable[..., Path] = save_tiny_llama, **changes: Any) -> Change:
    """A model that the factors were not fitted for."""
    return config("model.name", lambda command: save(command.path("other"), **changes))


def lines(*lines: bytes | str) -> Change:
    """The lines of the file of queries."""
    written = [line.encode() if isinstance(line, str) else line for line in lines]
    return write("queries.jsonl", b"".join(line + b"\n" for line in written))


def queries(*queries: Any) -> Change:
    """Queries behind a good one, so that the first of them stands in line 2."""
    return lines(*map(json.dumps, [QUERIES[0], *queries]))


CHANGES_ALLOWED = config("model.allow_changes", True)


def change_head(held: Tensors) -> None:
    """One row of a model's head."""
    held["lm_head.weight"][5] += 0.5


def cut_vocabulary(number: int) -> tuple[Change, ...]:
    """A model that has only its first tokens."""

    def cut_rows(held: Tensors) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            held[name] = held[name][:number].clone()

    def set_size(command: Query) -> None:
        with_entries(vocab_size=number)(command.path("model/config.json"))

    return tensors(cut_rows), set_size, CHANGES_ALLOWED


# The rows have bytes alone, whose ids are small; the good queries have merged tokens.
BYTES_ALONE = [{"text": text} for text in ("Z Q Z", "Q Q Z", "X Z")]
GOOD, ONE_IS_BAD = {"text": "All is good."}, {"text": "One # is here."}

MODELS = [
    case("a model of other weights", other_model(seed=1),
         "factors of .*tiny … LlamaForCausalLM … fingerprint … weights differ"),
    case("a model of another head", tensors(change_head),
         "differs from it outside the tracked modules",
         r"1 of 15 weights .*: lm_head\.weight\. … model\.allow_changes"),
    case("a model of another activation",
         model_file("config.json", with_entries(hidden_act="relu")),
         "hidden_act in its configuration is 'relu'; .* with 'silu'"),
    case("a model of another shape", other_model(intermediate_size=32),
         "gate_proj is linear 16→24 … here|this … 16→32"),
    case("a model with biases", other_model(mlp_bias=True),
         "gate_proj is linear 16→24; … 16→24 with a bias"),
    case("a model that lacks a module", other_model(num_hidden_layers=1),
         r"module model\.layers\.1\.mlp\.\w+ this Llama.* lacks"),
    case("a model of another class", other_model(save_tiny_gpt2),
         r"factors of .*tiny \(Llama … GPT2LMHeadModel lacks"),
    *(
        case(f"a manifest whose {group} has no {name}", lacks("config", group, name),
             rf"{group}\.{name} is not given … set it")
        for group, name in (("model", "name"), ("data", "source"))
    ),
    case("a model that has vanished", gone("model", "name", "gone"),
         "no model directory … gone … model.name"),
    case("a model directory that is missing", config("model.name", here("nowhere")),
         "no model directory … nowhere"),
    case("a model that has lost its tokenizer", lose_tokenizer,
         "tokenizer … model … beside the model"),
    case("a query of tokens that the model does not know",
         (*cut_vocabulary(300), rows(BYTES_ALONE)), "token id … 300 tokens … tokenizer"),
    case("data of tokens that the model does not know",
         (*cut_vocabulary(300), write("queries.jsonl", '{"text": "Z Q"}\n')),
         "token id … 300 tokens … tokenizer"),
    case("one query that makes activations infinite",
         (infinite("#"), CHANGES_ALLOWED, queries(ONE_IS_BAD)),
         "NaN or infinity … query 1 … input of module model.layers.0.mlp.gate_proj"),
    case("one sequence that makes activations infinite",
         (infinite("#"), CHANGES_ALLOWED, rows([GOOD, ONE_IS_BAD, GOOD])),
         "NaN or infinity … sequence 1  … module"),
]


# -- the training data -----------------------------------------------------------------------------

DATA = [
    case("data that has vanished", gone("data", "source", "gone.jsonl"),
         r"no file .*gone\.jsonl … data\.source"),
    case("a data file that is missing", config("data.source", here("elsewhere.jsonl")),
         r"no file .*elsewhere\.jsonl"),
    case("a column that has vanished", entries("config", "data", text="txt"),
         "no column 'txt' … columns are text"),
    case("a column that the fitted data does not have", config("data.text", "txt"),
         "no column 'txt' … columns are text"),
    case("other data without the column", rows([{"body": text} for text in texts(3)]),
         "no column 'text' … columns are body"),
    case("a prompt column that does not exist", config("data.prompt", "question"),
         "no column 'question'"),
    case("other data that holds no text", rows([{"text": 17}]), "'text' holds 17 … must hold text"),
    case("other data without a label", rows([{"text": ""}, {"text": None}]),
         "None of the 2 sequences has a label"),
    case("data longer than the model reads",
         (rows([{"text": "a long text " * 200}]),
          config("data.max_tokens", 10 * CONTEXT), config("scores.top_k", 1)),
         f"reads {CONTEXT} … max_tokens to {CONTEXT} or less"),
    # As `estimate_factors` writes them from a list of examples.
    case("factors fitted from Python, whose data has no name",
         entries("config", "data", source="list"), r"data\.source … list"),
]


# -- the queries -----------------------------------------------------------------------------------

QUERY_CASES = [
    case("a queries file that is missing", config("queries", here("gone.jsonl")),
         "queries .*gone.jsonl cannot be read … No such … Give a"),
    case("a queries file that is a directory", config("queries", here("")),
         "queries .* cannot be read … directory … Give a"),
    *(
        case(f"a queries file that is {what}", write("queries.jsonl", content),
             r'queries\.jsonl holds no query … "completion"')
        for what, content in (("empty", b""), ("of blank lines", b"\n  \n\t\n\n"))
    ),
    # Blank lines count.
    case("a query that is no JSON",
         lines('{"text": "good"}', "", '{"text": "good too"}', '{"text": bad}'),
         r'queries\.jsonl, line 4: is not JSON … column 10 … "text"'),
    case("a query that breaks off", lines('{"text": "good"}', '{"text": "not wh'),
         "line 2: is not JSON"),
    case("a query nested too deeply", lines('{"text": "good"}', "[" * 200_000),
         "line 2: is not JSON"),
    case("queries in one JSON list over several lines",
         write("queries.jsonl", json.dumps(QUERIES, indent=1)),
         "line 1: is not JSON … each line must be"),
    *(
        case(f"a query that is {kind}", queries(value),
             f"line 2: is {kind}, not an object … each line must be")
        for value, kind in (
            ([QUERIES[0]], "list"),
            ("text", "str"),
            (17, "int"),
            (None, "NoneType"),
        )
    ),
    case("a query of other fields", queries({"question": "What?", "answer": "That."}),
         "line 2: has question and answer … each line must be"),
    case("a query of no fields", queries({}), "line 2: has no text … each line must be"),
    case("a query with a prompt alone", queries({"prompt": "What?"}),
         "line 2: has prompt; … each line must be"),
    case("a query with a completion alone", queries({"completion": "That."}),
         "line 2: has completion; … each line must be"),
    case("a query with a prompt and text", queries({"prompt": "What?", "text": "That."}),
         "line 2: has prompt and text; … each line must be"),
    case("a query with all fields",
         queries({"prompt": "What?", "completion": "That.", "text": "That."}),
         "line 2: has prompt and completion and text;"),
    *(
        case(f"a query whose {says}", queries(query), f"line 2: {says}; it must be text")
        for query, says in (
            ({"text": 17}, "text is 17"),
            ({"text": ["a"]}, r"text is \['a'\]"),
            ({"prompt": 17, "completion": "That."}, "prompt is 17"),
            ({"prompt": "What?", "completion": {"a": 1}}, r"completion is \{'a': 1\}"),
            ({"text": "That.", "group": 3}, "group is 3"),
        )
    ),
    *(
        case(f"a contrast whose {what}", queries({**CONTRAST, **fields}), f"line 2: {says}")
        for what, fields, says in (
            ("against is empty", {"against": ""}, "against is '' … or be left out"),
            ("against is blank", {"against": " \n"}, r"against is ' \\n' … or be left out"),
            ("against is a number", {"against": 17}, "against is 17; it must be text"),
            ("against is a list", {"against": ["a"]}, r"against is \['a'\]; it must be text"),
            ("sides are the same", {"against": CONTRAST["completion"]},
             "against is what the query is about, ' Paris' … another text"),
        )
    ),
    case("a text that is against another", queries({"text": "That.", "against": "This."}),
         "line 2: has text and against, … two completions of one prompt … as \"prompt\""),
    case("an against alone", queries({"against": "This."}), "line 2: has against; … each line"),
    case("a contrast longer than the model reads",
         queries({**CONTRAST, "against": " a long text" * 200}),
         rf"queries\.jsonl, line 2, against: has \d\d\d+ tokens … reads {CONTEXT} at most"),
    case("an against with nothing to predict",
         queries({"prompt": "a to", "completion": " and more", "against": "ken"}),
         "line 2, against:  … 'ken' … nothing to predict … end the prompt where"),
    case("a query of an empty completion", queries({"prompt": "What?", "completion": ""}),
         "line 2: completion is empty … must hold"),
    case("a query of an empty text", queries({"text": ""}), "line 2: text is empty … must hold"),
    case("a query of half a character",
         lines(json.dumps(QUERIES[0]), '{"text": "half \\ud800 of it"}'),
         r"line 2: text … \\ud800 … surrogate"),
    case("queries that are not UTF-8",
         lines(json.dumps(QUERIES[0]), '{"text": "café"}'.encode("latin-1")),
         r"queries\.jsonl, line 2: is not UTF-8"),
    case("queries that are binary", lines(BINARY), r"queries\.jsonl, line 1: is not (UTF-8|JSON)"),
    case("a query longer than the model reads",
         queries({"prompt": "a long text " * 200, "completion": "it is."}),
         rf"queries\.jsonl, line 2: has \d\d\d+ tokens … reads {CONTEXT} at most … shorten"),
    # Without a token that begins every text, the first has none before it.
    case("a completion with nothing to predict",
         (lambda command: tiny_tokenizer(bos=False).save_pretrained(command.model()),
          queries({"prompt": "", "completion": "s"})),
         "line 2:  … 's' … nothing to predict … longer"),
]


# -- the scores ------------------------------------------------------------------------------------

RANK = config("scores.rank", 2)

SCORES = [
    case("top_k above the data", config("scores.top_k", NUM_ROWS + 1),
         r"scores\.top_k is 13 … only 12 sequences … 12 or less"),
    case("bottom_k above the data", config("scores.bottom_k", NUM_ROWS + 1),
         r"scores\.bottom_k is 13 … only 12 sequences … 12 or less"),
    case("top_k above the candidates", config("scores.candidates", [1, 2]),
         r"scores\.top_k is 3 … only 2 sequences … 2 or less"),
    case("losses of tokens without scores of any",
         (config("scores.tokens", "outputs"), config("scores.per_token", "none")),
         r"scores\.tokens is outputs … scores\.per_token is none … top or all"),
    case("rescore above the data", (RANK, config("scores.rescore", NUM_ROWS + 1)),
         r"scores\.rescore is 13 … only 12 sequences … 12 or less"),
    case("rescore without a rank", config("scores.rescore", 5),
         r"scores\.rescore … exact already … scores\.rank"),
    case("rescore below top_k", (RANK, config("scores.rescore", 2)),
         r"scores\.rescore is 2 … lists of 3 … at least as many"),
    case("rescore below bottom_k",
         (RANK, config("scores.rescore", 4), config("scores.bottom_k", 5)),
         r"scores\.rescore is 4 … lists of 5 … at least as many"),
    *(
        case(f"scores.{name} of {value}", config(f"scores.{name}", value),
             f"scores.{name} is {value} … 1 or more")
        for name in ("top_k", "rank", "training_size")
        for value in (0, -2)
    ),
    *(
        case(f"scores.{name} of -1", (RANK, config(f"scores.{name}", -1)),
             f"scores.{name} is -1 … 0 or more")
        for name in ("bottom_k", "rescore")
    ),
    *(
        case(f"a query memory of {value}", config("scores.query_memory_gb", value),
             rf"scores\.query_memory_gb is {value} … above 0")
        for value in (0, -4.0, float("nan"), float("inf"))
    ),
    *(
        case(f"a shard of {value}", config("scores.shard", value),
             rf"scores\.shard is {value} … 1 or more")
        for value in (0, -2)
    ),
    case("a shard above the workers", config("scores.shard", 3),
         r"scores\.shard is 3 … number of workers is … which is less; give 1 … or auto"),
    *(
        case(f"batch_tokens of {value}", options(f"--batch_tokens={value}"),
             f"batch_tokens is {value} … 1 or more")
        for value in (0, -256)
    ),
    *(
        case(f"{name} of {value}{where}", change, f"{name.split('.')[1]} … {value} … {known}")
        for name, value, known in (
            ("scores.normalize", "softmax", "relatif_theta"),
            ("scores.per_token", "some", "top"),
            ("scores.tokens", "both", "outputs"),
            ("model.dtype", "float8", "bfloat16"),
        )
        for where, change in (
            ("", options(f"--{name}={value}")),
            (" in the file", config(name, value)),
        )
    ),
]


# -- the refinement --------------------------------------------------------------------------------

REFINED, BY_STEPS = config("refine.method", "cg"), config("refine.method", "astra")

REFINEMENTS = [
    case("a refinement by an unknown method", options("--refine.method=newton"),
         "refine.method … newton … astra"),
    case("a refinement by an unknown method in the file", config("refine.method", "newton"),
         "refine.method … newton … astra"),
    case("more refine.sequences than the data", (REFINED, config("refine.sequences", NUM_ROWS + 1)),
         r"refine\.sequences is 13 … has 12 sequences; give 12 or fewer"),
    case("a larger refine.batch than the data", (BY_STEPS, config("refine.batch", NUM_ROWS + 1)),
         r"refine\.batch is 13 … has 12 sequences; give 12 or fewer"),
    *(
        case(f"refine.{name} of {value}", (change, config(f"refine.{name}", value)),
             rf"refine\.{name} is {value} … {known}")
        for change, name, value, known in (
            (REFINED, "sequences", 0, "1 or more"),
            (REFINED, "iterations", -1, "1 or more"),
            (REFINED, "tolerance", -0.5, "finite number of 0 or more"),
            (REFINED, "tolerance", float("nan"), "finite number of 0 or more"),
            (REFINED, "seed", -1, "0 or more"),
            (REFINED, "seed", 2**63, "below 2.63"),
            (BY_STEPS, "batch", 0, "1 or more"),
            (BY_STEPS, "step_size", -0.1, "from 0 to below"),
            (BY_STEPS, "momentum", 1.0, "from 0 to below 1"),
        )
    ),
    *(
        case(f"refine.{name} with {method}",
             (config("refine.method", method), config(f"refine.{name}", value)),
             rf"refine\.{name} is {value}, but refine\.method is {method}; it belongs to {other}")
        for method, name, value, other in (
            ("astra", "sequences", 4, "cg"),
            ("astra", "tolerance", 0.5, "cg"),
            ("cg", "batch", 4, "astra"),
            ("cg", "step_size", 0.5, "astra"),
            ("none", "momentum", 0.5, "astra"),
        )
    ),
    *(
        case(f"refined scores with {name} {value}", (REFINED, config(f"scores.{name}", value)),
             rf"scores\.{name} is .*{value}.*refine\.method is cg … set scores\.{name}: {advice}")
        for name, value, advice in (
            ("normalize", "cosine", "none"),
            ("normalize", "relatif_l", "none"),
            ("self_influence", "true", "false"),
            ("shard", 2, "1"),
        )
    ),
    case("a refinement in 16 bits", (REFINED, config("model.dtype", "bfloat16")),
         r"refine\.method is cg … bfloat16 … too coarse … model\.dtype: float32"),
]


# -- the candidates --------------------------------------------------------------------------------


def candidates(content: bytes | str) -> tuple[Change, Change]:
    """A file of candidates."""
    return write("rows.txt", content), config("scores.candidates", here("rows.txt"))


CANDIDATES = [
    *(
        case(f"candidates {where}are {rows}", change, rf"scores\.candidates {says}")
        for rows, says in (
            ([0, NUM_ROWS], "holds 12, but the data has rows 0 to 11"),
            ([3, -1], "holds -1, but the data has rows 0 to 11"),
            ([10**30], "holds 10{30}, but the data has rows 0 to 11"),
            ([1, 4, 2, 4], "holds 4 more than once; give each row once"),
            ([], "is empty; give at least one row"),
        )
        for where, change in (
            ("that ", config("scores.candidates", rows)),
            ("in a file that ", candidates("".join(f"{row}\n" for row in rows))),
        )
    ),
    case("candidates that are not all numbers", config("scores.candidates", [1, "two"]),
         r"scores\.candidates is \[1, 'two'\]; it must be a list of whole numbers or text or null"),
    case("candidates that are no list", config("scores.candidates", 1.5),
         r"scores\.candidates is 1\.5; it must be a list of whole numbers or text or null"),
    case("a candidate that is a fraction", candidates("[1, 2.5]"),
         "holds 2.5; rows are whole numbers"),
    case("a candidate that is true", candidates("[1, true]"), "holds True; rows are whole numbers"),
    case("a candidates file that is missing", config("scores.candidates", here("rows.json")),
         "candidates .*rows.json cannot be read … No such file"),
    case("a candidates file of nobody's home",
         config("scores.candidates", "~nobody-here/rows.json"),
         "candidates ~nobody-here/rows.json cannot be read"),
    *(
        case(f"a candidates file that holds {what}", candidates(content),
             "candidates .*rows.txt are no list … JSON list")
        for what, content in (
            ("words", "1\ntwo\n"),
            ("an object", '{"rows": [1, 2]}'),
            ("a list that breaks off", "[1, 2"),
            ("a list nested too deeply", "[" * 200_000),
            ("binary", BINARY),
            ("a number of too many digits", "9" * 5000),
        )
    ),
    case("a candidate without a label",
         (rows([GOOD, {"text": ""}, GOOD]),
          config("scores.candidates", [0, 1]), config("scores.top_k", 1)),
         "holds 1, but that row has no label … leave it out"),
]


# -- the damping -----------------------------------------------------------------------------------

FIRST_ROW_OF_ZEROS = spectrum(lambda lambda_OI: lambda_OI[0].zero_())

DAMPINGS = [
    case("a damping that is negative", config("damping.value", -0.1),
         "damping is -0.1 … 0 or more"),
    *(
        case(f"a damping of {value}", config("damping.value", value),
             f"damping is {value} … 0 or more")
        for value in (float("nan"), float("inf"))
    ),
    case("a damping of text", config("damping.value", "strong"),
         r"damping\.value is strong; it must be a number"),
    *(
        case(f"a module's damping of {value}", config("damping.modules", {"*.up_proj": value}),
             rf"damping of \*\.up_proj is {value} … 0 or more")
        for value in (-1.0, float("nan"))
    ),
    case("a damping of modules that is null", config("damping.modules", None),
         "damping of modules is None … by name or glob"),
    case("a damping for a module that is not there",
         config("damping.modules", {"*.down_proj": 0.2, "*.upp_proj": 0.3}),
         r"given for '\*\.upp_proj' … no tracked module"),
    case("no damping where the spectrum has zeros",
         (FIRST_ROW_OF_ZEROS, config("damping.value", 0)),
         f"Module {MODULE}: damping is 0 and Λ has zeros … above 0"),
    case("no damping of one module where its spectrum has zeros",
         (FIRST_ROW_OF_ZEROS, config("damping.modules", {MODULE: 0})),
         f"Module {MODULE}: damping is 0 and Λ has zeros … above 0"),
    case("a relative damping where the spectrum is zero", spectrum(torch.Tensor.zero_),
         rf"Module {MODULE}:  … Λ is zero everywhere … damping\.relative|absolute"),
    case("a spectrum of NaN", spectrum(lambda lambda_OI: lambda_OI[0].fill_(torch.nan)),
         f"Module {MODULE}:  … Λ … NaN … again"),
    case("a spectrum that is negative", spectrum(lambda lambda_OI: lambda_OI[0].fill_(-1e3)),
         f"Module {MODULE}:  … Λ … negative … again"),
]


# -- the configuration -----------------------------------------------------------------------------

CONFIGURATIONS = [
    *(
        case(f"no {name}", without(name), f"{name} is not given … --{name}")
        for name in ("factors", "queries", "output")
    ),
    case("an unknown option", options("--scores.topk", "3"),
         r"no option --scores\.topk; … did you mean --scores\.top_k\?"),
    case("an option under no group", options("--top_k", "3"),
         r"no option --top_k; … did you mean --scores\.top_k\?"),
    case("an unknown field in the file", config("scores.topk", 3),
         r"unknown field scores\.topk; … did you mean scores\.top_k\?"),
    case("a field under no group in the file", config("rank", 8),
         r"unknown field rank; … did you mean scores\.rank\?"),
    case("a field of estimate's in the file", config("model.modules", ["*.mlp.*"]),
         r"unknown field model\.modules … config.yaml"),
    case("a group that is a value", config("damping", 0.1),
         "field damping is 0.1 … fields of its own"),
    *(
        case(f"{name} of {value}, a wrong type", config(name, value), f"{re.escape(name)} {says}")
        for name, value, says in (
            ("scores.top_k", "many", "is many; it must be a whole number or null"),
            ("scores.rank", 2.5, "is 2.5; it must be a whole number or null"),
            ("scores.per_module", "perhaps", "is perhaps; it must be true or false"),
            ("scores.shard", "some", "is some; it must be a whole number or auto"),
            ("scores.query_memory_gb", "much", "is much; it must be a number"),
            ("damping.relative", "perhaps", "is perhaps; it must be true or false"),
            ("damping.modules", [0.1],
             r"is \[0.1\]; it must be a group of names, each with a number"),
            ("damping.modules", {"*": "strong"},
             r"is \{.\*.: .strong.\}; it must be a group of names, each with a number"),
            ("batch_tokens", 10.5, "is 10.5; it must be a whole number"),
            ("data.max_tokens", "many", "is many; it must be a whole number or null"),
            ("factors", [1], r"is \[1\]; it must be text or null"),
        )
    ),
    case("a wrong type on the command line", options("--scores.top_k", "three"),
         r"scores\.top_k is three; it must be a whole number"),
    case("sequences of one token", config("data.max_tokens", 1),
         r"data\.max_tokens is 1 … 2 tokens or more"),
]


# -- the output ------------------------------------------------------------------------------------


def make_output(command: Query) -> None:
    command.path("scores").mkdir()


def write_into_store(command: Query) -> None:
    command.set("output", command.listed())


OUTPUTS = [
    case("an output that is a file", write("scores", "the only copy"),
         "scores exists and is no directory … give another"),
    case("an output that holds something", write("scores/thesis.tex", "the only copy"),
         r"it holds thesis\.tex … new or empty"),
    case("an output that holds finished results",
         lambda command: command.copy("scores", "scores", "output"),
         "exists already … new or empty"),
    case("an output that is the factor store", write_into_store, "exists already … new or empty"),
    case("an output that is a dangling link", link("scores", "gone"),
         "scores exists and is no directory … give another"),
    case("an output below a file", config("output", here("queries.jsonl/scores")),
         r"cannot be made … queries\.jsonl is no directory … another"),
    case("an output where nothing can be made", config("output", "/proc/scores"),
         "/proc/scores cannot be made … Give a"),
    case("an output below a dangling link",
         (link("made", "gone"), config("output", here("made/scores"))),
         "made/scores cannot be made … Give a"),
    # The directory was there, so it stays.
    case("an empty output and a store that is missing",
         (make_output, config("factors", here("gone"))), "gone is no directory … `estimate` run"),
    case("an output of too long a name", config("output", here(f"made/first/{'s' * 300}")),
         "cannot be made … too long … Give a"),
]

CASES = [
    *(*STORES, *MODELS, *DATA, *QUERY_CASES, *SCORES, *REFINEMENTS),
    *(*CANDIDATES, *DAMPINGS, *CONFIGURATIONS, *OUTPUTS),
]
# fmt: on


# -- the runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its training text and factors, and the results of a query, which no test changes."""
    good = tmp_path_factory.mktemp("good")
    fit = {
        "model.name": save_tiny_llama(good / "tiny"),
        "data.source": write_jsonl(good / "text.jsonl", [{"text": t} for t in texts(NUM_ROWS)]),
        "output": good / "factors",
    }
    ask = {
        "factors": good / "factors",
        "queries": write_jsonl(good / "queries.jsonl", QUERIES),
        "output": good / "scores",
        "scores.top_k": 3,
    }
    for command, given in (("estimate", fit), ("query", ask)):
        words = [f"--{name}={value}" for name, value in given.items()]
        with contextlib.redirect_stdout(io.StringIO()):
            assert cli.main([command, *words]) == 0
    return good


@pytest.fixture(scope="module")
def good_contents(good: Path) -> dict[str, str]:
    return contents(good)


@pytest.fixture
def command(tmp_path: Path, good: Path, good_contents: dict[str, str]) -> Iterator[Query]:
    yield Query(tmp_path, good)
    assert contents(good) == good_contents


@each(CASES)
def test_one_worker_refuses(case: Case, command: Query, capfd: pytest.CaptureFixture) -> None:
    require_refusal(case, command, lambda arguments: in_this_process(arguments, capfd))


def refused_by_two_workers(cases: list[Case], directory: Path, good: Path) -> None:
    """Requires that two workers refuse each of these in turn, and answer a good query after it."""
    shared = contents(good)
    for ended in ended_in_turn(
        cases, lambda path: Query(path, good), directory, timeout=5 * PROMPT_SECONDS
    ):
        ended.require_refusal()
    assert contents(good) == shared
    assert (directory / str(len(cases)) / "scores" / MANIFEST).is_file()


def test_two_workers_refuse(tmp_path: Path, good: Path) -> None:
    refused_by_two_workers([c for c in CASES if c.name in STAND_FOR_ALL], tmp_path, good)


@pytest.mark.slow
def test_two_workers_refuse_as_well(tmp_path: Path, good: Path) -> None:
    refused_by_two_workers([c for c in CASES if c.name not in STAND_FOR_ALL], tmp_path, good)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_processes_of_their_own_end_with_status_2(workers: int, command: Query) -> None:
    case = named(CASES, "a query that is no JSON")
    require_refusal(case, command, lambda arguments: on_real_workers(arguments, workers))


def test_the_cases_that_stand_for_all_exist() -> None:
    assert set(STAND_FOR_ALL) <= {case.name for case in CASES}


@pytest.mark.parametrize("exists", [False, True])
def test_an_output_without_permission_is_refused(
    exists: bool, command: Query, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions are told by the system; the tests may run as one who has them all."""
    if exists:
        make_output(command)
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    says = "scores cannot be (written|made: .* is no directory that can be written)"
    refusal = case("", (), says, "ive another directory")
    require_refusal(refusal, command, lambda arguments: in_this_process(arguments, capfd))


def test_what_the_cases_spoil_is_good(command: Query, capfd: pytest.CaptureFixture) -> None:
    command.model()
    command.listed()
    case("", candidates("0\n3\n5\n7\n"), "").spoil(command)
    status, stdout, stderr = in_this_process(command.arguments(), capfd)
    assert status == 0, stderr
    assert SAID not in stderr
    assert "12 of 12 sequences" in stdout
    assert "4 of them scored" in stdout
    assert json.loads((command.path("scores") / MANIFEST).read_text())["complete"] is True


def test_a_rank_above_the_matrices_is_reduced_and_said(
    command: Query, capfd: pytest.CaptureFixture
) -> None:
    config("scores.rank", 20)(command)
    status, stdout, stderr = in_this_process(command.arguments(), capfd)
    assert status == 0, stderr
    assert "rank          20 is more than 6 of 6 modules have: reduced there, to 16 in" in stdout
    scan = json.loads((command.path("scores") / MANIFEST).read_text())["scan"]
    assert scan["rank"] == 20
    assert set(scan["ranks"].values()) == {16}


def test_other_data_than_the_fitted_is_scored_and_said(
    command: Query, capfd: pytest.CaptureFixture
) -> None:
    rows([{"text": text} for text in texts(4, seed=1)])(command)
    status, stdout, stderr = in_this_process(command.arguments(), capfd)
    assert status == 0, stderr
    assert "not the sequences that the factors were fitted on" in stdout


def test_a_relative_damping_needs_no_spectrum_without_zeros(
    command: Query, capfd: pytest.CaptureFixture
) -> None:
    FIRST_ROW_OF_ZEROS(command)
    status, _, stderr = in_this_process(command.arguments(), capfd)
    assert status == 0, stderr


# fmt: off
# -- the report ------------------------------------------------------------------------------------


def results(name: str) -> Change:
    """A path below the good results is given for them."""
    return lambda report: setattr(report, "results", report.results / name)


def page(path: str) -> Change:
    """Where the page is to be written."""
    return lambda report: setattr(report, "output", report.path(path))


def damaged_results(file: str) -> list[Case]:
    """What can have become of one file of results."""
    name = re.escape(file)
    return [
        case(f"results without {file}", listed_file(file, Path.unlink),
             f"{name} … missing, though the manifest"),
        case(f"results with a flipped bit in {file}", listed_file(file, flip(-3)),
             f"{name} … changed … `query` ag"),
        case(f"results whose {file} holds other things", listed_anew(file, BINARY),
             "`query` again|cannot be read"),
    ]


REPORTS = [
    case("results that are missing", results("../gone"),
         "gone/manifest.json cannot be read … `query` run"),
    case("results that are a file", results("top.jsonl"),
         "cannot be read: Not a directory … `query` run"),
    case("a directory that holds no results", listed_file(MANIFEST, Path.unlink),
         "cannot be read: No such file … `query` run"),
    case("a factor store", entries(format="ekfac_dist/1"),
         "format 'ekfac_dist/1' … reads 'ekfac_dist/scores/1' … `query`"),
    case("results of another format", entries(format="ekfac_dist/scores/2"),
         "format 'ekfac_dist/scores/2' … `query`"),
    case("results that are incomplete", entries(complete=False),
         "incomplete: its run did not finish … `query` again"),
    *(
        case(f"a manifest of results that is {what}", listed_file(MANIFEST, content),
             r"manifest\.json is not JSON")
        for what, content in (
            ("cut short", '{"format'),
            ("binary", BINARY),
            ("deep", "[" * 200_000),
        )
    ),
    case("a manifest of results that is a list", listed_file(MANIFEST, "[]"),
         "format None … `query`"),
    *(
        case(f"a manifest of results with {what} for files", entries(files=files),
             r"manifest\.json … files")
        for what, files in (("no files", None), ("a list", []), ("text", "all"))
    ),
    *(
        case(f"a manifest that lists results {what}", entries("files", **{name: listing}),
             rf"manifest\.json lists … {re.escape(name)}")
        for what, name, listing in (
            ("as nothing", "top.jsonl", None),
            ("without a hash", "top.jsonl", {"bytes": 3}),
            ("elsewhere", "../top.jsonl", {"bytes": 1, "sha256": ""}),
        )
    ),
    *(
        case(f"a manifest of results without {key}", lacks(key), f"{key} … `query` again")
        for key in ("factors", "scores", "damping", "scan", "modules", "software", "config")
    ),
    *damaged_results("queries.jsonl"),
    *damaged_results("scores.safetensors"),
    *damaged_results("top.jsonl"),
    *damaged_results("details.safetensors"),
    *(
        case(f"results whose {file} is not listed", lacks("files", file),
             f"{re.escape(file)} … `query` again")
        for file in ("queries.jsonl", "scores.safetensors", "top.jsonl")
    ),
    case("a line of results that lacks a field", listed_anew("top.jsonl", "{}\n"),
         "lacks something … `query` again"),
    case("a page that exists", write("page.html", "the only copy"),
         r"page\.html exists already … another file, or remove it"),
    case("a page that is a dangling link", link("page.html", "gone"),
         r"page\.html exists already … another file"),
    case("a page in no folder", page("gone/page.html"),
         "no folder .*gone … Make it, or give another"),
    case("a page below a file", page("scores/top.jsonl/page.html"),
         "no folder … Make it, or give another"),
    case("a page where nothing can be made", page("/proc/page.html"),
         "/proc/page.html cannot be written … Give an"),
]
# fmt: on


@each(REPORTS)
def test_a_report_is_refused(
    case: Case, tmp_path: Path, good: Path, capfd: pytest.CaptureFixture
) -> None:
    pytest.importorskip("jinja2")
    report = Report(tmp_path, good)
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
    require_sentence(case(" ".join(arguments), (), says), status, stderr)


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
def call(good: Path) -> Call:
    model = AutoModelForCausalLM.from_pretrained(good / "tiny")
    return Call(model, load_factors(good / "factors", model), tiny_tokenizer())


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
    ({"queries": [{**CONTRAST, "against": ""}]}, DataError, "query 0: against is ''"),
    ({"queries": [{**CONTRAST, "against": tokens(3)}]}, DataError, "query 0: against is .*text"),
    ({"queries": [tokens(5, 6, against=" Rome")]}, DataError, "another example, with fields as"),
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
    ({"tokens": "loss"}, ConfigError, "tokens is 'loss'; it must be one of inputs, outputs"),
    ({"tokens": "outputs"}, ConfigError, "per_token is none, so no position has a score"),
    ({"top_k": 13}, ConfigError, "top_k is 13, but only 12 sequences"),
    ({"top_k": 0}, ConfigError, "top_k is 0; it must be a whole number of 1 or more"),
    ({"top_k": "3"}, ConfigError, "top_k is '3'; it must be a whole number"),
    ({"bottom_k": 13}, ConfigError, "bottom_k is 13, but only 12 sequences"),
    ({"bottom_k": "3"}, ConfigError, "bottom_k is '3'; it must be a whole number"),
    ({"bottom_k": 2.5}, ConfigError, "bottom_k is 2.5; it must be a whole number"),
    ({"rank": 0}, ConfigError, "rank is 0; it must be a whole number of 1 or more"),
    ({"rank": 2.0}, ConfigError, "rank is 2.0; it must be a whole number of 1 or more"),
    ({"rescore": 3}, ConfigError, "scores are exact already"),
    ({"rescore": 1.5, "rank": 2}, ConfigError, "rescore is 1.5; it must be a whole number"),
    ({"rescore": "all", "rank": 2}, ConfigError, "rescore is 'all'; it must be a whole"),
    ({"rescore": 1, "rank": 2}, ConfigError, "rescore is 1, but lists of 2 are asked for"),
    ({"training_size": 0}, ConfigError, "training_size is 0"),
    ({"query_memory_gb": 0}, ConfigError, "query_memory_gb is 0; it must be a finite"),
    ({"query_memory_gb": "4"}, ConfigError, "query_memory_gb is '4'; it must be a finite"),
    ({"query_memory_gb": float("inf")}, ConfigError, "query_memory_gb is inf; it must be"),
    ({"shard": 0}, ConfigError, "shard is 0; it must be a whole number of 1 or more"),
    ({"shard": "all"}, ConfigError, "shard is 'all'; it must be a whole number"),
    ({"shard": 2}, ConfigError, "the number of workers is 1, which is less; give 1 or auto"),
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
    call: Call, good: Path, tmp_path: Path
) -> None:
    factors = load_factors(shutil.copytree(good / "factors", tmp_path / "factors"))
    flip(-1)(tmp_path / "factors" / OUTPUT)
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
    good: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    command = Query(tmp_path / "changed", good)
    case("", (tensors(change_head), CHANGES_ALLOWED), "").spoil(command)
    status, stdout, stderr = in_this_process(command.arguments(), capfd)
    assert status == 0, stderr
    told = "1 of 15 weights outside the tracked modules have other numbers"
    assert stdout.count(f"model differs {told}") == 2  # before the work, and beside the scores
    model = json.loads((command.path("scores") / MANIFEST).read_text())["model"]
    assert len(model["differs"]) == 1
    assert model["differs"][0].startswith(told)
    assert model["not_compared"] == []
    fitted = json.loads((good / "factors" / MANIFEST).read_text())["model"]
    assert model["whole"] != fitted["whole"]
    write_report(command.path("scores"), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert f"not the one that the factors were fitted for: {told}" in page


def test_what_could_not_be_compared_is_told_in_every_result(
    good: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    command = Query(tmp_path / "older", good)
    earlier = ("whole", "untracked", "configuration")
    manifest(lambda m: [m["model"].pop(key) for key in earlier])(command)
    status, stdout, stderr = in_this_process(command.arguments(), capfd)
    assert status == 0, stderr
    assert len(re.findall(r"not compared  .* is of an earlier version", stdout)) == 2
    model = json.loads((command.path("scores") / MANIFEST).read_text())["model"]
    assert "earlier version" in model["not_compared"][0]
    assert model["differs"] == []
    write_report(command.path("scores"), tmp_path / "page.html")
    assert "is of an earlier version, which kept" in (tmp_path / "page.html").read_text()
