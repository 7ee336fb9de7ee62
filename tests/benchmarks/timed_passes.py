"""Fits whose two passes are timed by part, for benchmarks of factors that are shared out.

A fit is that of `estimate_factors`, with a trivial eigenbasis in the place of the decompositions,
which would take longest: a pass takes as long, whatever the values of the eigenvectors are. Of each
pass are taken, on each worker, the seconds of its parts, which do not overlap:

    sums         products that are added to the running sums
    copies       captured rows into memory of their own, and into what is sent
    sending      the calls that begin to send
    waiting      for rows that have not arrived
    in step      all that the workers tell each other, and the wait of whoever is early
    model        the rest: forward and backward

and, beside these, the CPU seconds of the thread that computes, which other programs on the machine
change little, those of the process's other threads, which are gloo's, and the bytes that are sent.
"""

import functools
import os
import statistics
import time
from collections import defaultdict
from pathlib import Path

import psutil
import torch

from ekfac_dist import estimate_factors
from ekfac_dist.curvature.eigenbasis import Eigenbasis
from ekfac_dist.fit import eigenbasis, group
from ekfac_dist.fit.covariance import CovarianceSums
from ekfac_dist.fit.refit import LambdaSums
from ekfac_dist.passes import exchange
from ekfac_dist.passes.context import PassContext
from ekfac_dist.passes.exchange import RowExchange
from ekfac_dist.report.tables import table
from ekfac_dist.runtime.collectives import Collectives

PASSES = ("covariance", "refit")
ROW_ORDER = "order of rows"
REST = "model"
PARTS = {
    "sums": [
        (sums, name)
        for sums in (CovarianceSums, LambdaSums)
        for name in ("on_input", "on_gradient")
    ],
    "copies": [(RowExchange, "_send"), (RowExchange, "_show"), (exchange, "owned")],
    "sending": [(Collectives, "all_to_all")],
    "waiting": [(Collectives, "wait")],
    "in step": [(Collectives, name) for name in ("gather", "share", "wait_for_all")],
}


class PassTimes:
    """The seconds of the parts of this worker's passes; made once in a process, before any fit.

    Attributes:
        before_pass: Called by all workers with the world, the pass's name and its running sums.
        after_pass: The same, after it.
    """

    def __init__(self):
        self.before_pass = self.after_pass = lambda world, name, sums: None
        self._passes = {}
        self._running = [REST]  # the parts that are being run, innermost last
        self._seconds = defaultdict(float)
        self._since = 0.0
        self._sent = 0
        for part, functions in PARTS.items():
            for owner, name in functions:
                self._time(part, owner, name)
        self._noted_row_order = PassContext.noted_row_order
        PassContext.noted_row_order = lambda *given: self._timed_row_order(*given)
        all_to_all = Collectives.all_to_all

        def counting(world, arriving, leaving, *sizes):
            self._sent += leaving.nbytes
            return all_to_all(world, arriving, leaving, *sizes)

        Collectives.all_to_all = counting
        eigenbasis.decompose = trivial_basis
        self._run_pass, group.run_pass = group.run_pass, self._timed_pass

    def fit(self, model, rows, folder, **settings):
        """Fits factors as `estimate_factors` does.

        Args:
            model: The model.
            rows: The data.
            folder: A folder that all workers see; a store that is in it is replaced.
            settings: For `estimate_factors`.

        Returns:
            Of each pass the seconds by part, `seconds` in all, `cpu`, `gloo` and `sent`; beside
            them, as `ROW_ORDER`, the seconds of the step that finds the order of rows.
        """
        output = Path(folder) / "store"
        self._passes = {}
        settings = {"labels": "data", "save_minutes": None, "keep_covariance": False, **settings}
        estimate_factors(model, rows, output=output, overwrite=True, **settings)
        return self._passes

    def _time(self, part, owner, name):
        timed = getattr(owner, name)  # of a class method, the method of the class

        @functools.wraps(timed)
        def inside(*args, **kwargs):
            self._enter(part)
            try:
                return timed(*args, **kwargs)
            finally:
                self._leave()

        setattr(owner, name, staticmethod(inside) if hasattr(timed, "__self__") else inside)

    def _enter(self, part):
        self._count()
        # What is called to be in step belongs to it.
        last = self._running[-1]
        self._running.append(last if last == "in step" else part)

    def _leave(self):
        self._count()
        self._running.pop()

    def _count(self):
        now = time.perf_counter()
        self._seconds[self._running[-1]] += now - self._since
        self._since = now

    def _timed_row_order(self, context, modules):
        context.world.barrier()
        start = time.perf_counter()
        order = self._noted_row_order(context, modules)
        self._passes[ROW_ORDER] = time.perf_counter() - start
        return order

    def _timed_pass(self, name, context, modules, sums, *args, **kwargs):
        self.before_pass(context.world, name, sums)
        context.world.barrier()
        before, cpu_before = _seconds_of_other_threads(), time.thread_time()
        self._seconds.clear()
        self._sent, self._since = 0, time.perf_counter()
        start = self._since
        result = self._run_pass(name, context, modules, sums, *args, **kwargs)
        self._count()
        seconds = time.perf_counter() - start
        self._passes[name] = {
            **dict.fromkeys((REST, *PARTS), 0.0),
            **self._seconds,
            "seconds": seconds,
            "cpu": time.thread_time() - cpu_before,
            "gloo": _seconds_of_other_threads() - before,
            "sent": self._sent,
        }
        self.after_pass(context.world, name, sums)
        return result


def parts_table(columns):
    """A table of the parts of passes.

    Args:
        columns: By heading the times of a pass, of all workers and rounds; means are shown.
    """
    names = {part: part for part in (REST, *PARTS)}
    names |= {"cpu": "CPU, this thread", "gloo": "CPU, gloo's threads"}
    rows = [
        [shown, *(f"{statistics.mean(one[part] for one in of):.2f}" for of in columns.values())]
        for part, shown in names.items()
    ]
    return table(["seconds of a worker", *columns], rows)


def _seconds_of_other_threads():
    """CPU seconds of all threads of this process but the main one."""
    threads = psutil.Process().threads()
    return sum(t.user_time + t.system_time for t in threads if t.id != os.getpid())


def trivial_basis(name, sum_nn, count, device):
    """An eigenbasis of the same shape, without a decomposition; see `decompose`."""
    size = len(sum_nn)
    vectors = torch.eye(size, dtype=torch.float64)
    return Eigenbasis(vectors, torch.ones(size, dtype=torch.float64), 0.0, 0.0, 0.0, 1, device)
