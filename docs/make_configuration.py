"""Makes docs/configuration.md: hand-written text, and a table of each group of fields.

    .venv/bin/python docs/make_configuration.py           writes the page
    .venv/bin/python docs/make_configuration.py --print   prints it

Names, defaults and meanings come from the dataclasses in ekfac_dist/config/ and their docstrings,
which are the one place for them. Only the text between the tables is written here.
"""

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from ekfac_dist.config import (
    EstimateConfig,
    EvaluateConfig,
    IndexConfig,
    PlanConfig,
    QueryConfig,
    ServeConfig,
)

PAGE = Path(__file__).parent / "configuration.md"

HEAD = """\
# Configuration

*What can be set for `estimate`, `plan`, `query`, `evaluate` and `serve`, how, and what is set by
default.*

<!-- Made by docs/make_configuration.py from ekfac_dist/config/; do not edit this page. -->

A configuration is a YAML file. Every field can also be given, or overridden, on the command line by
its dotted name:

```
ekfac-dist estimate --config configs/gpt2.yaml --data.source corpus.jsonl --output runs/gpt2
```

Values on the command line are written as in YAML: `--model.modules '["*.mlp.*"]'`,
`--save_minutes null`. An unknown field is refused, and the nearest known one is named. A `~` in a
YAML file stands for the home directory in `output`, in `estimate`'s `model.name` and `data.source`,
in `query`'s `factors` and `queries`, and in `serve`'s `factors` and `index`.
`ekfac-dist COMMAND --help` prints the tables below, and `--print_config` the whole configuration
that a command would run with. A field without a default must be given.

`configs/` has examples with comments: [gpt2.yaml](../configs/gpt2.yaml),
[pythia-1.4b.yaml](../configs/pythia-1.4b.yaml), [llama-3-8b.yaml](../configs/llama-3-8b.yaml),
[demo.yaml](../configs/demo.yaml), and [query.yaml](../configs/query.yaml) for queries. Those for
GPT-2, Pythia and Llama state the sizes of model, factors and store; `plan` adds what a step and an
unfinished run take.

## Fields of estimate
"""

MODEL = """\
### Which model

A model is a directory that `save_pretrained` wrote, or a hub id, with safetensors weights; pickled
weights are refused. `pip install -e '.[peft]'` adds what adapters need, `pip install -e
'.[quantized]'` what `model.quantization` needs, `pip install -e '.[gguf]'` what `model.gguf` needs.
[Models](models.md) says which modules are tracked.
"""

DATA = """\
### Which text

Files are read by their ending; a directory is one that `save_to_disk` of `datasets` wrote. A space
between a prompt and its text belongs to the text. Sequences without a label are left out and
counted. A local file is known by its content, not by its path or its time of change.

Instead of `data.text`, a row holds one of

- several columns: `data.template: '{title}: {text}'`;
- a chat: `data.messages` names a column of `[{"role": …, "content": …}]`, rendered by the model's
  chat template; the labels are on the last turn, the assistant's, as in
  [queries](queries.md#query-files);
- tokens, as the model was trained on them: `data.tokens` names a column of lists of ids (JSON,
  Parquet, a saved data set), or is any name for the rows of a `.npy` file. A row is a sequence.
  `data.label_mask` names a column with a 0 for each token without a label, and a 1 for the others.
  If a row packs documents that did not see each other, `data.documents` names a column of the
  places of their first tokens, such as `[0, 17, 60]`: each is then a sequence of its own.

Of documents longer than `data.max_tokens` only the beginning is read. With `data.window: S`, a
window of `data.max_tokens` begins every S tokens, so that windows overlap, and each token carries a
label in one of them only. A window is a sequence: numbers of sequences, drawn labels and
`scores.candidates` count windows, and lists name a window's row and the place of its first token.
"""

FACTORS = """\
### What is fitted

[Method](method.md) explains labels, Λ and precision; [Long runs](long-runs.md) partitions and
memory; [Many workers](distributed.md#factors-larger-than-a-gpu-shard) shard and eigen.
"""

PLAN = """\
## Fields of plan

`plan` takes the fields of `estimate`, of which only `model.name` must be given, `index.rank`
and `index.dtype` [as of `index`](#fields-of-index), for what an index would take, and:
"""

QUERY = """\
## Fields of query

[Queries](queries.md) explains what a query is, what the scores mean, and what is written.
"""

QUERY_MODEL = """\
### Which model answers

By default the one that the factors were fitted for. A null field takes the value of the fit, except
`model.device_map`, which belongs to the machine.
"""

QUERY_DATA = """\
### Which training sequences

By default those that the factors were fitted on. Without `data.source` a null field takes the
value of the fit; with it, the default that it has in `estimate`.
"""

DAMPING = """\
### Damping
"""

SCORES = """\
### Scores

Either of `scores.low_rank` and `scores.rank` asks for a scan of low rank.
"""

REFINE = """\
### Refinement

Of `query`; [Queries](queries.md#refinement) says what it does and what it costs.
"""


EVALUATE = """\
## Fields of evaluate

[Evaluation](evaluation.md) explains what is measured. `model`, `data` and `factors` are those of
[`estimate`](#which-model); a model is trained in float32 or float64, whole, on one device.
"""

TRAINING = """\
### The recipe
"""

PROTOCOLS = """\
### Protocols
"""

SERVE = """\
## Fields of serve

[The service](service.md) says how it is asked. `model`, `data` and `damping` are those of
[`query`](#which-model-answers); the damping is that of questions that give none.
"""

INDEX = """\
## Fields of index

[The gradient index](gradient-index.md) says what it keeps. `model` and `data` are those of
[`query`](#which-model-answers). `--add` is no field: it adds the sequences that the data has beyond
those of a finished index.
"""

REFINED = """\
### Refined methods

Of the methods `ekfac_cg` and `ekfac_astra`, as [of queries](#refinement).
"""


def page() -> str:
    """The whole page."""
    estimate, query, evaluate = EstimateConfig, QueryConfig, EvaluateConfig
    own = set(_names(PlanConfig)) - set(_names(estimate))
    parts = [
        HEAD,
        table(estimate),
        MODEL,
        table(_class_of(estimate, "model"), "model."),
        DATA,
        table(_class_of(estimate, "data"), "data."),
        FACTORS,
        table(_class_of(estimate, "factors"), "factors."),
        PLAN,
        table(PlanConfig, only=own),
        QUERY,
        table(query),
        QUERY_MODEL,
        table(_class_of(query, "model"), "model."),
        QUERY_DATA,
        table(_class_of(query, "data"), "data."),
        DAMPING,
        table(_class_of(query, "damping"), "damping."),
        SCORES,
        table(_class_of(query, "scores"), "scores."),
        REFINE,
        table(_class_of(query, "refine"), "refine."),
        INDEX,
        table(IndexConfig),
        table(_class_of(IndexConfig, "index"), "index."),
        EVALUATE,
        table(evaluate),
        TRAINING,
        table(_class_of(evaluate, "training"), "training."),
        PROTOCOLS,
        table(_class_of(evaluate, "lds"), "lds."),
        table(_class_of(evaluate, "removal"), "removal."),
        table(_class_of(evaluate, "tail_patch"), "tail_patch."),
        REFINED,
        table(_class_of(evaluate, "cg"), "cg."),
        table(_class_of(evaluate, "astra"), "astra."),
        SERVE,
        table(ServeConfig),
    ]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def table(config_class: type, prefix: str = "", only: set[str] | None = None) -> str:
    """A table of a configuration class's own fields; groups of fields have tables of their own.

    Args:
        config_class: A dataclass with a docstring in Google's style.
        prefix: What dotted names begin with.
        only: Names of the wanted fields; None: all.
    """
    types, meanings = get_type_hints(config_class), _meanings(config_class)
    lines = ["| field | default | values | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(types[field.name]) or (only and field.name not in only):
            continue
        required = f"{prefix}{field.name}" in _REQUIRED.get(config_class.__name__, ())
        cells = [
            f"`{prefix}{field.name}`",
            "" if required else _default(field),
            ", ".join(kind for kind in _kinds(types[field.name]) if not required or kind != "null"),
            meanings[field.name].replace("|", "\\|"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# Their dataclasses have a default, so that a missing one is told in a sentence.
_REQUIRED = {
    "EstimateConfig": ("output",),
    "ModelConfig": ("model.name",),
    "DataConfig": ("data.source",),
    "QueryConfig": ("factors", "queries", "output"),
    "IndexConfig": ("factors", "output"),
    "EvaluateConfig": ("queries", "output"),
    "ServeConfig": ("factors", "index"),
}


def _names(config_class: type) -> list[str]:
    return [field.name for field in dataclasses.fields(config_class)]


def _class_of(config_class: type, group: str) -> type:
    return get_type_hints(config_class)[group]


def _meanings(config_class: type) -> dict[str, str]:
    """What the docstring says of each field: `name: text`, continued in deeper lines."""
    _, _, arguments = (config_class.__doc__ or "").partition("Args:\n")
    found = {}
    for name, text in re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", arguments, re.MULTILINE):
        found[name] = " ".join(text.split())
    return found


def _default(field: Any) -> str:
    has_value = field.default is not dataclasses.MISSING
    value = field.default if has_value else field.default_factory()
    return f"`{yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}`"


_TYPES = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true, false",
    type(None): "null",
}


def _kinds(kind: Any) -> Iterator[str]:
    """A type in words: each of its values, or kinds of them."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        yield from arguments
    elif kind in _TYPES:
        yield _TYPES[kind]
    elif origin is list and get_origin(arguments[0]) is Literal:
        yield f"list of {', '.join(get_args(arguments[0]))}"
    elif origin is list:
        yield f"list of {_TYPES[arguments[0]]}s"
    elif origin is dict:
        yield f"names or globs, each with a {' or '.join(_kinds(arguments[1]))}"
    else:  # a union
        for part in arguments:
            yield from _kinds(part)


if __name__ == "__main__":
    if sys.argv[1:] == ["--print"]:
        print(page(), end="")
    else:
        PAGE.write_text(page(), encoding="utf-8")
