"""bergson's scores of an evaluation, beside ours: rows for `evaluate`, with their time and memory.

    python tests/benchmarks/peers/evaluation_scores.py evaluate.yaml runs/bergson \\
        --environments runs/peers

`evaluate.yaml` is the configuration of an evaluation that has trained its models. For each of its
seeds bergson gets that model and, token for token, the sequences and labelled queries of the
evaluation, and tracks the modules that we track. OUTPUT/<row>-<seed>.safetensors hold `scores`
[queries, sequences] float32 in the order of the data, higher for more helpful.
OUTPUT/seed-<seed>.json says how far both agree, with seconds and memory. What is printed last goes
into `evaluate.yaml`:

    scores: {"bergson EK-FAC 0.1": "runs/bergson/ekfac-0.1-{seed}.safetensors", …}

Rows are its EK-FAC at each of `--dampings`, and its conjugate gradients from there at each of
`--cg_dampings`; both are multiples of mean(Λ), in bergson as here. Each stage is a process of its
own (see `bergson_scores.py`), as are our fit and scores of the same (see `ours.py`). With
`--labels data` nothing is sampled on either side, so EK-FAC of both is one formula; a difference
then is rounding.

bergson cuts batches by tokens, and allows no more of them than the model reads: where positions
are rotary, a copy of the model says that it reads more. A stage that is done is not run again,
unless with other settings; for other labels or modules, give another OUTPUT.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from model_shapes import processor
from peer_batches import Batch
from peer_environments import peer_python
from peer_files import NO_LABEL, save_rows
from peer_sides import HERE, MAX_TOKENS, Settings, run
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from ekfac_dist import load_factors
from ekfac_dist.arguments import command_parser, parse_config
from ekfac_dist.config import EvaluateConfig
from ekfac_dist.evaluate.inputs import read_inputs
from ekfac_dist.evaluate.measures import spearman
from ekfac_dist.report.tables import table
from ekfac_dist.runtime.processes import World

LINEAR = (nn.Linear, Conv1D)


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("config", help="the evaluation's .yaml file")
    parser.add_argument("output", type=Path)
    parser.add_argument("--environments", type=Path, required=True, help="directory of the peers'")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="none: all that it has")
    parser.add_argument("--dampings", type=float, nargs="+", default=[0.001, 0.1, 10])
    parser.add_argument("--cg_dampings", type=float, nargs="*", default=[0.1, 1, 10])
    parser.add_argument(
        "--our_dampings", type=float, nargs="*", default=[0.1], help="of --dampings"
    )
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--documents", type=int, default=256, help="of each query's Gauss–Newton")
    parser.add_argument("--labels", default="sampled", choices=["sampled", "data"])
    parser.add_argument("--all_modules", action="store_true", help="attention too, bergson alone")
    parser.add_argument("--batch_tokens", type=int, default=4096, help="of both")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


# --- what both are given --------------------------------------------------------------------------


def read_config(file):
    """The configuration of an evaluation."""
    parser = command_parser("evaluate", "")
    parser.add_class_arguments(EvaluateConfig)
    return parse_config(parser, EvaluateConfig, ["--config", file])


def rows_of(sequences):
    """Rows with `input_ids` and `labels`, of sequences as our passes read them."""
    rows = []
    for k in range(len(sequences)):
        inputs = torch.from_numpy(sequences[k].inputs).long()
        targets = torch.from_numpy(sequences[k].targets).long()
        # Each ends with its last label, and its first token is none.
        ids = torch.cat([inputs, targets[-1:]])
        rows.append(
            {"input_ids": ids, "labels": nn.functional.pad(targets, (1, 0), value=NO_LABEL)}
        )
    return rows


def copy_model(source, target):
    """Copies a model and its tokenizer; with rotary positions, one that says it reads more."""
    shutil.copytree(source, target)
    file = target / "config.json"
    config = json.loads(file.read_text())
    if (config.get("rope_parameters") or {}).get("rope_type") != "default":
        return
    config["max_position_embeddings"] = MAX_TOKENS
    file.write_text(json.dumps(config))
    file = target / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": MAX_TOKENS}))


def prepare_work(work, model, train, queries):
    """Writes what `ours.py` and `bergson_scores.py` read, once."""
    if work.is_dir():
        return
    partial = work.with_name(f".{work.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    copy_model(model, partial / "model")
    save_rows(partial / "data.safetensors", train=train, queries=queries, fit=train)
    for name, rows in (("train", train), ("queries", queries)):
        columns = {key: [row[key].tolist() for row in rows] for key in ("input_ids", "labels")}
        columns["length"] = [len(ids) for ids in columns["input_ids"]]
        Dataset.from_dict(columns).save_to_disk(partial / name)
    partial.rename(work)


def left_out(work):
    """Names of the linear maps that we do not track, as bergson calls them."""
    model = AutoModelForCausalLM.from_pretrained(work / "model").base_model
    prefix = f"{model.base_model_prefix or 'model'}."
    tracked = {name.removeprefix(prefix) for name in load_factors(work / "ours").modules}
    linear = {name for name, module in model.named_modules() if isinstance(module, LINEAR)}
    if not tracked <= linear:
        sys.exit(f"bergson has no modules named {', '.join(sorted(tracked - linear))}")
    return sorted(linear - tracked)


# --- stages ---------------------------------------------------------------------------------------


class Stages:
    """Runs the stages of one seed, once each.

    Args:
        args: The command's.
        work: The seed's folder.
    """

    def __init__(self, args, work):
        self.args, self.work, self.reports = args, work, {}
        batch = Batch(args.batch_tokens)
        self.settings = Settings(args.environments, "cpu", args.threads, workers=1, batch=batch)

    def __call__(self, name, command, after):
        """The report of a stage; it is run unless this, and what it stands on, has been done."""
        chain = [[str(word) for word in command], *(self.reports[one]["chain"] for one in after)]
        file = self.work / f"{name}.json"
        done = json.loads(file.read_text()) if file.is_file() else {}
        if done.get("chain") != chain:
            done = run(chain[0], self.settings, self.work / f"{name}.log") | {"chain": chain}
            file.write_text(json.dumps(done))
        self.reports[name] = done
        print(f"{self.work.name}, {name}: {done['seconds']:.1f} s", flush=True)
        return done

    def ours(self, name, *more, after=()):
        """A stage of ours."""
        command = [sys.executable, HERE / "ours.py", self.work, *more]
        return self(name, [*command, "--batch_tokens", self.args.batch_tokens], after)

    def bergson(self, name, stage, *more, after=()):
        """A stage of bergson's."""
        python = peer_python(self.args.environments, "bergson")
        command = [python, HERE / "bergson_scores.py", self.work, "--stage", stage]
        return self(name, [*command, *more], after)


def our_scores(args, stages):
    """Fits and scores with ours: {row: scores}."""
    fit = "ours, fit"
    stages.ours(fit, "--labels", args.labels)
    scores = {}
    for damping in args.our_dampings:
        chosen = ["--phase", "scores", "--damping", damping]
        done = stages.ours(f"ours, score {damping:g}", *chosen, after=[fit])
        scores[f"ekfac-{damping:g}"] = load_file(done["scores"])["scores"]
    return scores


def bergson_scores(args, stages, leave_out):
    """Fits and scores with bergson; yields each row and its scores."""
    passes = ["--batch_tokens", args.batch_tokens]
    passes += ["--leave_out", ",".join(leave_out)] if leave_out else []
    queries, fit, apply = "bergson, queries", "bergson, fit", "bergson, apply"
    stages.bergson(queries, "queries", *passes)
    stages.bergson(fit, "fit", *passes, "--labels", args.labels)
    stages.bergson(apply, "apply", "--dampings", *args.dampings, after=[queries, fit])

    def score(name, row, dampings, *more, after):
        chosen = ["--dampings", *dampings, *passes, *more]
        done = stages.bergson(f"bergson, {name}", "score", *chosen, after=after)
        for damping, file in done["scores"].items():
            yield f"{row}-{damping}", load_file(file)["scores"]

    yield from score("score", "ekfac", args.dampings, after=[apply])
    solve = [*passes, "--iterations", args.iterations, "--documents", args.documents]
    for damping in args.cg_dampings:
        refine = f"bergson, refine {damping:g}"
        stages.bergson(refine, "refine", "--dampings", damping, *solve, after=[queries, fit])
        named = f"score refined {damping:g}"
        yield from score(named, "cg", [damping], "--refined", after=[refine])


# --- what is shown --------------------------------------------------------------------------------


def agreement(theirs, ours):
    """How far scores agree, over each query's sequences: mean and least rank correlation, and more.

    Returns:
        {"mean", "least": Spearman's, "error": ‖theirs − ours‖ / ‖ours‖, "slope": theirs over ours}.
    """
    ranks = spearman(theirs.T.numpy(), ours.T.numpy())
    theirs, ours = theirs.double(), ours.double()
    return {
        "mean": float(ranks.mean()),
        "least": float(ranks.min()),
        "error": ((theirs - ours).norm() / ours.norm()).item(),
        "slope": ((theirs * ours).sum() / ours.square().sum()).item(),
    }


def agreement_table(found):
    rows = [
        [
            row,
            f"{one['mean']:.4f}",
            f"{one['least']:.4f}",
            f"{one['slope']:.4f}",
            f"{one['error']:.1e}",
        ]
        for row, one in found.items()
    ]
    return table(["bergson to ours", "Spearman, mean", "least", "slope", "error"], rows)


def cost_table(reports):
    """Seconds of the work, of its processor, and of the whole command; its peak memory."""
    keys = ("seconds", "cpu_seconds", "whole_seconds")
    rows = [
        [name, *(f"{one[key]:.1f}" for key in keys), f"{one['all_peak_bytes'] / 1e6:.0f}"]
        for name, one in reports.items()
    ]
    return table(["stage", "seconds", "of CPU", "with imports", "peak MB"], rows)


def by_group(scores, members):
    """Scores of query groups, which are sums of those of their queries."""
    return torch.stack([scores[list(group)].sum(0) for group in members])


def compare(args, seed, model, data, members):
    """All of one seed, printed; what is known of it.

    Args:
        args: The command's.
        seed: The seed.
        model: The directory of its model.
        data: Rows of the training sequences, and of the queries.
        members: The queries of each query group.
    """
    work = args.output / "work" / f"seed-{seed}"
    prepare_work(work, model, *data)
    stages = Stages(args, work)
    ours = {} if args.all_modules else our_scores(args, stages)
    leave_out = [] if args.all_modules else left_out(work)
    found = {}
    for row, scores in bergson_scores(args, stages, leave_out):
        save_file({"scores": by_group(scores, members)}, args.output / f"{row}-{seed}.safetensors")
        if row in ours:
            found[row] = agreement(scores, ours[row])
    tables = [agreement_table(found)] if found else []
    tables.append(cost_table(stages.reports))
    print(f"\nseed {seed}", *tables, "", sep="\n\n")
    return {"agreement": found, "stages": stages.reports, "left_out": leave_out}


def main():
    args = arguments()
    disable_progress_bar()
    config = read_config(args.config)
    args.output = args.output.resolve()
    inputs = read_inputs(config, World.start())
    data = rows_of(inputs.sequences), rows_of(inputs.query_sequences)
    settings = {name: str(value) for name, value in vars(args).items()}
    for seed in args.seeds or config.seeds:
        model = Path(str(config.output)) / f"seed-{seed}" / "model"
        if not model.is_dir():
            sys.exit(f"{model} is missing; run the evaluation first")
        found = compare(args, seed, model, data, inputs.queries.members)
        found |= {"settings": settings, "processor": processor()}
        (args.output / f"seed-{seed}.json").write_text(json.dumps(found, indent=1))
    rows = [("EK-FAC", "ekfac", damping) for damping in args.dampings]
    rows += [("EK-FAC + CG", "cg", damping) for damping in args.cg_dampings]
    print("scores:")
    for name, kind, damping in rows:
        print(
            f'  "bergson {name} {damping:g}": {args.output}/{kind}-{damping:g}-{{seed}}.safetensors'
        )


if __name__ == "__main__":
    main()
