"""One stage of bergson's scores of an evaluation, run by the Python of an environment that has it.

    bergson_scores.py WORK --stage queries
    bergson_scores.py WORK --stage fit
    bergson_scores.py WORK --stage apply --dampings 0.1 1
    bergson_scores.py WORK --stage refine --dampings 1 --documents 256
    bergson_scores.py WORK --stage score --dampings 1 [--refined]

`evaluation_scores.py` calls this, and makes WORK/model, WORK/train and WORK/queries: `datasets`
directories with `input_ids`, `labels` and `length`, which bergson takes as they are; -100 is no
label there too. What a stage leaves is in WORK/bergson. It prints one line of JSON: seconds without
imports, the peak of this process, and for a score the file. The stages are those of its command
`hessian`, by the same functions and in the same order, one process each so that memory is known of
each:

    queries   a gradient for each query, of its summed loss, kept whole (`query.aggregation none`)
    fit       covariances, eigenbases, corrected eigenvalues; labels are sampled unless told
    apply     (E + damping · mean(Λ))⁻¹ of each query's gradient
    refine    the same, and conjugate gradients from there on the Gauss–Newton of some documents,
              for each query its own; by default as was published, 20 steps and 256 documents
    score     dot products with each document's gradient

bergson has no seed for its labels; torch's is set here.
"""

import argparse
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from bergson.build import build_query
from bergson.config.config import (
    AstraConfig,
    DataConfig,
    DistributedConfig,
    HessianConfig,
    HessianPipelineConfig,
    IndexConfig,
    InversionConfig,
    PreprocessConfig,
    QuerySetConfig,
    ScoreConfig,
)
from bergson.data import load_scores
from bergson.hessians import pipeline
from bergson.hessians.apply_hessian import EkfacConfig, apply_worker
from bergson.hessians.astra import Astra
from bergson.hessians.hessian_approximations import approximate_hessians
from bergson.score.score import score_dataset
from peer_files import print_report, status_bytes
from safetensors.torch import save_file


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    stages = ["queries", "fit", "apply", "refine", "score"]
    parser.add_argument("--stage", required=True, choices=stages)
    parser.add_argument("--leave_out", default=None, help="modules, with commas")
    parser.add_argument("--batch_tokens", type=int, default=4096, help="a batch, padding included")
    parser.add_argument("--labels", default="sampled", choices=["sampled", "data"])
    parser.add_argument("--seed", type=int, default=0, help="of sampled labels, and of documents")
    parser.add_argument("--dampings", type=float, nargs="+", default=[0.1], help="of mean(Λ)")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--documents", type=int, default=256, help="of the Gauss–Newton")
    parser.add_argument("--refined", action="store_true", help="score what was refined")
    return parser.parse_args()


class Run:
    """Where everything is, and with which settings.

    Args:
        args: The command's.
    """

    def __init__(self, args):
        self.args = args
        self.folder = args.work / "bergson"
        self.queries = self.folder / "query"
        # bergson looks for factors in hessian/<method> of a pipeline's directory.
        self.factors = self.folder / "hessian" / "kfac"
        self.hessian = HessianConfig(
            method="kfac", ev_correction=True, use_dataset_labels=args.labels == "data"
        )

    def solutions(self, damping, refined):
        """Directory of the preconditioned queries."""
        return self.folder / f"{'refined' if refined else 'applied'}-{damping:g}"

    def index(self, path):
        """bergson's settings of a pass that writes into a directory, which it wants to make."""
        shutil.rmtree(path, ignore_errors=True)
        return self.settings(path)

    def settings(self, path):
        """bergson's settings of a directory."""
        return IndexConfig(
            run_path=str(path),
            model=str(self.args.work / "model"),
            precision="fp32",
            data=DataConfig(dataset=str(self.args.work / "train")),
            token_batch_size=self.args.batch_tokens,
            loss_reduction="sum",
            include_bias=True,
            filter_modules=self.args.leave_out,
            distributed=DistributedConfig(nproc_per_node=1),
        )


def build_queries(run):
    queries = QuerySetConfig(dataset=str(run.args.work / "queries"), aggregation="none")
    build_query(run.index(run.queries), queries, PreprocessConfig())


def fit(run):
    torch.manual_seed(run.args.seed)
    approximate_hessians(run.index(run.factors), run.hessian)


def apply(run):
    for damping in run.args.dampings:
        paths = EkfacConfig(
            hessian_method_path=str(run.factors),
            gradient_path=str(run.queries),
            run_path=str(run.solutions(damping, refined=False)),
            ev_correction=True,
        )
        apply_worker(0, 0, 1, paths, InversionConfig(damping_factor=damping))


def refine(run):
    args = run.args
    read_row = Astra._read_row

    def copied_row(*where):
        return {name: row.clone() for name, row in read_row(*where).items()}

    # On a CPU in float32 its rows are views of a file that is mapped read-only, into which it
    # writes: the process ends with a segmentation fault.
    Astra._read_row = copied_row
    astra = AstraConfig(
        solver="cg", num_steps=args.iterations, batch_size=args.documents, seed=args.seed
    )
    apply(run)
    for damping in args.dampings:
        inversion = InversionConfig(damping_factor=damping)
        pipeline._run_astra(
            run.settings(run.folder),
            run.hessian,
            HessianPipelineConfig(inversion_cfg=inversion, astra=astra),
            str(run.queries),
            str(run.solutions(damping, refined=False)),
            str(run.solutions(damping, refined=True)),
        )


def score(run):
    """Scores all training documents: {damping: file with `scores` [queries, sequences]}."""
    files = {}
    for damping in run.args.dampings:
        solutions = run.solutions(damping, run.args.refined)
        path = run.folder / f"scores-{solutions.name}"
        # Higher is more helpful: a document's loss and the query's fall together.
        config = ScoreConfig(query_path=str(solutions), higher_is_better=True)
        score_dataset(run.index(path), config, PreprocessConfig())
        scores = torch.from_numpy(np.array(load_scores(path)[:]))
        file = path.with_name(f"{path.name}.safetensors")
        save_file({"scores": scores.T.float().contiguous()}, file)
        files[f"{damping:g}"] = str(file)
    return files


STAGES = {"queries": build_queries, "fit": fit, "apply": apply, "refine": refine, "score": score}


def main():
    args = arguments()
    report = {"bytes_before": status_bytes("VmRSS")}
    start, cpu_start = time.perf_counter(), time.process_time()
    written = STAGES[args.stage](Run(args))
    report["seconds"] = time.perf_counter() - start
    report["cpu_seconds"] = time.process_time() - cpu_start
    print_report("bergson", "cpu", scores=written, **report)


if __name__ == "__main__":
    main()
