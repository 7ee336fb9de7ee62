"""Seconds from a command's start to its first batch, and the imports that take most of them.

    python tests/benchmarks/start_up.py                  five rounds, some four minutes on 2 cores
    python tests/benchmarks/start_up.py --rounds 1

The model is a random Llama of two layers, and the data a few sentences, so that what is left is
what every run has: imports, checks, and the meeting of the workers. Commands are run as on a
terminal. `imported` is when the line about the workers comes: all is imported, and they have met;
`first batch` is when the first pass shows its bar. Both are medians, in seconds since the start,
and beside them are those of the processor time that all processes of the command had taken by then,
which depends less on what else the machine does. Of commands without a pass only the end is shown.
A first round, which is not counted, warms the caches of files and of tokenised data.

The imports are those of one fit by `python -X importtime`, each without the imports that it makes
itself; what Transformers looks up at the first use of a name counts for the module that uses it.
`floor` is a process that imports PyTorch, Transformers' models and datasets, without the garbage
collector, as a fit does, and nothing else: what it takes is their own.
"""

import argparse
import os
import pty
import re
import statistics
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

import psutil

from ekfac_dist.report.tables import table

sys.path.append(str(Path(__file__).parents[1]))  # where the tests' helpers are
from helpers.workshop import cpu_launcher_config, save_tiny_llama, texts, write_jsonl, write_yaml

PROGRAM = [sys.executable, "-m", "ekfac_dist"]
FLOOR = """
import gc
gc.disable()
import torch, transformers.modeling_utils, datasets
print("floor", flush=True)
"""
IMPORTED = re.compile(rb"^(workers  |floor)", re.MULTILINE)
FIRST_BATCH = re.compile(rb"\d+%\|")  # of a bar
NUM_IMPORTS = 10


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def processor_seconds(process):
    """Seconds of a process and its children, those that have ended too."""
    total = 0.0
    for each in [process, *process.children(recursive=True)]:
        try:
            times = each.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
        total += times.children_user + times.children_system
    return total


def watched(command):
    """When a command says what, by name: (seconds, processor seconds) since its start."""
    start = time.perf_counter()
    end, its_end = pty.openpty()
    termios.tcsetwinsize(its_end, (40, 100))  # without room there is no bar
    process = psutil.Popen(command, stdin=subprocess.DEVNULL, stdout=its_end, stderr=its_end)
    os.close(its_end)
    moments, text = {}, b""
    while True:
        try:
            read = os.read(end, 65536)
        except OSError:  # the other end is closed
            break
        text += read
        for name, pattern in (("imported", IMPORTED), ("first batch", FIRST_BATCH)):
            if name not in moments and pattern.search(text):
                moments[name] = time.perf_counter() - start, processor_seconds(process)
    os.close(end)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{text.decode()}")
    moments["end"] = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
    return moments


def commands(directory):
    """The commands that are watched, by name, each as a function of a new directory's path."""
    data = write_jsonl(directory / "text.jsonl", [{"text": text} for text in texts(16)])
    queries = [{"prompt": "small", "completion": " large"}]
    queries = write_jsonl(directory / "queries.jsonl", queries)
    fit = write_yaml(
        directory / "estimate.yaml",
        {
            "model": {"name": save_tiny_llama(directory / "model")},
            "data": {"source": data, "max_tokens": 32},
        },
    )
    store = str(directory / "store")
    estimate = ["estimate", "--config", str(fit), "--output"]
    query = ["query", "--factors", store, "--queries", str(queries), "--output"]
    launch = ["launch", "--config_file", str(cpu_launcher_config(directory / "cpu.yaml", 2))]
    watched([*PROGRAM, *estimate, store])
    return {
        "fit": lambda output: [*PROGRAM, *estimate, output],
        "fit, 2 workers": lambda output: [*PROGRAM, *launch, *estimate, output],
        "query": lambda output: [*PROGRAM, *query, output],
        "inspect": lambda _: [*PROGRAM, "inspect", store],
        "estimate --help": lambda _: [*PROGRAM, "estimate", "--help"],
        "floor": lambda _: [sys.executable, "-c", FLOOR],
    }


def imports(command):
    """The imports of a command, the longest first: (seconds, module)."""
    command = [command[0], "-X", "importtime", *command[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = re.findall(r"^import time: +(\d+) \| +\d+ \| +(\S+)$", done.stderr, re.MULTILINE)
    return sorted(((int(own) / 1e6, name) for own, name in lines), reverse=True)


def main():
    args = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        named = commands(directory)
        measured = {name: [] for name in named}
        for number in range(args.rounds + 1):
            for name, command in named.items():
                moments = watched(command(str(directory / f"{name} {number}")))
                if number > 0:
                    measured[name].append(moments)
        longest = imports(named["fit"](str(directory / "imports")))
    rows = []
    for name, runs in measured.items():
        cells = [name]
        for moment in ("imported", "first batch", "end"):
            pairs = [run[moment] for run in runs if moment in run]
            cells += [
                f"{statistics.median(values):.2f}" for values in zip(*pairs, strict=True)
            ] or ["", ""]
        rows.append(cells)
    headings = ["seconds", "imported", "CPU", "first batch", "CPU", "end", "CPU"]
    print(table(headings, rows))
    print()
    print(f"{len(longest)} imports, {sum(own for own, _ in longest):.2f} seconds; the longest:")
    rows = [[name, f"{own:.2f}"] for own, name in longest[:NUM_IMPORTS]]
    print(table(["module", "seconds"], rows))


if __name__ == "__main__":
    main()
