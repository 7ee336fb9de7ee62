"""What the service counts, in Prometheus' text format; its own registry."""

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """The service's counters; every method may be called in any thread.

    Attributes:
        requests: Requests, by route and status.
        questions: Questions and completions, by what became of them.
        waiting: Questions and completions that wait.
        seconds: Seconds of each stage of a question: waiting, ranking, exact.
        sequences: Sequences of the index that rankings went over.
    """

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "ekfac_dist_requests", "Requests.", ("route", "status"), registry=registry
        )
        self.questions = Counter(
            "ekfac_dist_questions",
            "Questions and completions, by what became of them.",
            ("kind", "outcome"),
            registry=registry,
        )
        self.waiting = Gauge(
            "ekfac_dist_waiting", "Questions and completions that wait.", registry=registry
        )
        self.seconds = Histogram(
            "ekfac_dist_seconds",
            "Seconds of each stage of a question.",
            ("stage",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.sequences = Counter(
            "ekfac_dist_sequences_scanned",
            "Sequences of the index that rankings went over.",
            registry=registry,
        )
        memory = Gauge(
            "ekfac_dist_resident_bytes", "Memory that worker 0 holds.", registry=registry
        )
        process = psutil.Process()
        memory.set_function(lambda: float(process.memory_info().rss))

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)
