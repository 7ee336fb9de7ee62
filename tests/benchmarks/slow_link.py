"""What a slow network costs passes with factors that two workers share out. Needs root.

    python tests/benchmarks/slow_link.py            some 4 minutes on 2 cores

Two workers of one thread are each in a network namespace of its own, with a link between them. The
first passes run on the link as it is; then each pass's link is given, by `tc`'s token bucket, the
rate at which the rows that a worker sends in it take half as long as the pass took. So half of the
time would be added if nothing was sent while the model computes. Both are repeated in turns; shown
are the medians, and what a worker waits for (see `timed_passes.py`). A random-weight Llama in
float32 (hidden 768, MLP 2048), sequences of 256 tokens.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from timed_passes import PASSES, PassTimes, parts_table

from ekfac_dist.report.tables import table

sys.path.append(str(Path(__file__).parents[1]))  # where the tests' helpers are
sys.path.append(str(Path(__file__).parent / "peers"))  # where the shared modules are
from helpers.hosts import ADDRESSES, two_hosts
from helpers.workshop import leave
from model_shapes import Shape, processor
from peer_sides import make_rows

TOKENS, VOCABULARY = 256, 4096
PORT = 29_400
AS_IS, SLOWED = "as it is", "slowed"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--mlp", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--batch_tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--share", type=float, default=0.5, help="of the time, on the link")
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


class Link:
    """This worker's end of the link; its rate is that of what it sends."""

    def __init__(self):
        self.is_slow = False

    def slow(self, bytes_per_second):
        """Limits it."""
        rate = f"{int(8 * bytes_per_second)}bit"
        # Twice what a clock of 250 Hz lets through in a tick, and a queue of 50 ms.
        burst = str(max(65_536, int(2 * bytes_per_second / 250)))
        limit = ["tbf", "rate", rate, "burst", burst, "latency", "50ms"]
        subprocess.run(["tc", "qdisc", "replace", "dev", "veth", "root", *limit], check=True)
        self.is_slow = True

    def free(self):
        """Ends the limit."""
        if self.is_slow:
            subprocess.run(["tc", "qdisc", "del", "dev", "veth", "root"], check=True)
            self.is_slow = False

    @staticmethod
    def sent_bytes():
        """Bytes that have left so far, headers included."""
        return int(Path("/sys/class/net/veth/statistics/tx_bytes").read_text())


def worker(args):
    """One worker's part: the times of its passes, by the link's state, and the rates."""
    times, link = PassTimes(), Link()
    generator = torch.Generator().manual_seed(1)
    model = Shape(args.hidden, args.mlp, args.layers, VOCABULARY).model(TOKENS)
    rows = make_rows(args.sequences, (TOKENS, TOKENS), VOCABULARY, generator)
    settings = {"shard": 2, "batch_tokens": args.batch_tokens}
    times.fit(model, rows[: 4 * args.batch_tokens // TOKENS], args.folder, **settings)  # warms up
    rates, found = {}, {AS_IS: [], SLOWED: []}
    sent = {}

    def set_rate(world, name, sums):
        link.slow(rates[name])
        sent[name] = link.sent_bytes()

    def end_rate(world, name, sums):
        sent[name] = link.sent_bytes() - sent[name]
        link.free()

    for _ in range(args.rounds):
        found[AS_IS].append(times.fit(model, rows, args.folder, **settings))
        for name in PASSES:
            seconds = statistics.median(each[name]["seconds"] for each in found[AS_IS])
            rates[name] = found[AS_IS][0][name]["sent"] / (args.share * seconds)
        times.before_pass, times.after_pass = set_rate, end_rate
        found[SLOWED].append(times.fit(model, rows, args.folder, **settings))
        times.before_pass = times.after_pass = lambda *args: None
        for name in PASSES:
            found[SLOWED][-1][name] |= {"rate": rates[name], "link": sent[name]}
    return found


def start(namespace, rank, folder):
    """Starts this script as one of two workers."""
    variables = {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": ADDRESSES[0],
        "MASTER_PORT": str(PORT),
        "GLOO_SOCKET_IFNAME": "veth",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "TQDM_DISABLE": "1",
    }
    command = ["ip", "netns", "exec", namespace, sys.executable, __file__]
    command += [*sys.argv[1:], "--folder", folder]
    return subprocess.Popen(command, env={**os.environ, **variables})


def tables(reports):
    """Medians of both links, and the mean seconds of a worker by part."""
    lines, seconds = [], {}
    for name in PASSES:
        for link in (AS_IS, SLOWED):
            of_rounds = zip(*(report[link] for report in reports), strict=True)
            longest = [max(each[name]["seconds"] for each in one) for one in of_rounds]
            seconds[link] = statistics.median(longest)
        slowed = [each[name] for report in reports for each in report[SLOWED]]
        on_link = statistics.median(each["sent"] / each["rate"] for each in slowed)
        lines.append(
            [
                name,
                f"{statistics.mean(each['sent'] for each in slowed) / 1e6:.0f}",
                f"{statistics.mean(each['link'] for each in slowed) / 1e6:.0f}",
                f"{statistics.mean(each['rate'] for each in slowed) / 1e6:.1f}",
                f"{on_link:.2f}",
                f"{seconds[AS_IS]:.2f}",
                f"{seconds[SLOWED]:.2f}",
                f"{seconds[SLOWED] / seconds[AS_IS]:.2f}",
            ]
        )
    header = ["pass", "rows, MB", "on the link", "its MB/s", "rows alone, s"]
    whole = table([*header, "as it is, s", "slowed, s", "ratio"], lines)
    columns = {
        f"{name}, {link}": [each[name] for report in reports for each in report[link]]
        for name in PASSES
        for link in (AS_IS, SLOWED)
    }
    return f"{whole}\n\n{parts_table(columns)}"


def main():
    args = arguments()
    if args.folder is not None:
        report = worker(args)
        Path(args.folder, f"{os.environ['RANK']}.json").write_text(json.dumps(report))
        torch.distributed.barrier()
        leave()
    with tempfile.TemporaryDirectory() as folder, two_hosts() as names:
        workers = [start(name, rank, folder) for rank, name in enumerate(names)]
        try:
            statuses = [each.wait() for each in workers]
        finally:
            for each in workers:
                each.kill()
        if any(statuses):
            sys.exit(f"The workers ended with {statuses}.")
        reports = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(2)]
    print(f"{Shape(args.hidden, args.mlp, args.layers, VOCABULARY)}; {processor()}")
    print(
        f"{args.sequences} sequences of {TOKENS} tokens, steps of {args.batch_tokens}; "
        f"{args.rounds} rounds\n\n{tables(reports)}"
    )


if __name__ == "__main__":
    main()
