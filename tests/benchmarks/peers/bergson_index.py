"""bergson's gradient index and its answers, run by the Python of an environment that has it.

    bergson_index.py WORK --phase build --projection 16 [--leave_out q_proj,…]
    bergson_index.py WORK --phase ask --projection 16 [--leave_out q_proj,…]

`index.py` calls this, and makes WORK/model, WORK/train and WORK/queries, as `evaluation_scores.py`
does. The index is that of `bergson build`: a random projection of each side of every gradient. To
ask, the queries' gradients are computed the same way, in one run over all of them, and searched for
by its `Attributor`, which holds the whole index in memory. Nothing is preconditioned.

It prints one line of JSON: seconds without imports, the bytes of the index, the peak of this
process, and the file with `scores` [queries, sequences].
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from bergson.build import build
from bergson.config.config import DataConfig, DistributedConfig, IndexConfig, PreprocessConfig
from bergson.data import column_offsets, load_gradients
from bergson.query.attributor import Attributor
from peer_files import print_report
from safetensors.torch import save_file


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--phase", required=True, choices=["build", "ask"])
    parser.add_argument("--projection", type=int, default=16, help="rows and columns of a gradient")
    parser.add_argument("--leave_out", default=None, help="modules, with commas")
    parser.add_argument("--batch_tokens", type=int, default=2048, help="a batch, padding included")
    return parser.parse_args()


def path_of(args, name):
    return args.work / "bergson" / f"index-{name}"


def make(args, name):
    """An index of a set of rows."""
    path = path_of(args, name)
    shutil.rmtree(path, ignore_errors=True)
    config = IndexConfig(
        run_path=str(path),
        model=str(args.work / "model"),
        precision="fp32",
        data=DataConfig(dataset=str(args.work / name)),
        token_batch_size=args.batch_tokens,
        projection_dim=args.projection,
        loss_reduction="sum",
        include_bias=True,
        filter_modules=args.leave_out,
        distributed=DistributedConfig(nproc_per_node=1),
    )
    build(config, PreprocessConfig())


def ask(args):
    """A file with the scores of all queries."""
    make(args, "queries")
    path = path_of(args, "queries")
    sizes = json.loads((path / "info.json").read_text())["grad_sizes"]
    rows = torch.from_numpy(load_gradients(path).copy()).float()
    queries = {name: rows[:, low:high] for name, (low, high) in column_offsets(sizes).items()}
    values, indices = Attributor(path_of(args, "train")).search(queries, None)
    scores = torch.empty_like(values).scatter_(1, indices, values)
    file = args.work / "bergson" / "index-scores.safetensors"
    save_file({"scores": scores}, file)
    return str(file)


def main():
    args = arguments()
    start = time.perf_counter()
    written = make(args, "train") if args.phase == "build" else ask(args)
    seconds = time.perf_counter() - start
    files = [one for one in path_of(args, "train").rglob("*") if one.is_file()]
    num_bytes = sum(one.stat().st_size for one in files)
    print_report("bergson", "cpu", scores=written, seconds=seconds, index_bytes=num_bytes)


if __name__ == "__main__":
    main()
