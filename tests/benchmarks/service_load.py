"""Many clients ask a running service at once; every answer is right, or a refusal to wait.

    ekfac-dist serve --factors F --index I &
    .venv/bin/python tests/benchmarks/service_load.py [--url URL] [--clients 50] [--seconds 120]

Each client asks one of a few questions after another, every second time as a stream, every tenth
time leaving before its answer has come. An answer is right if it is the answer to that question
that was given when nobody else asked: the same sequences, scores to a relative 1e-4. Prints how
many of each outcome there were, the times to the first ranking and to the answer, and the service's
memory at the beginning, in the middle and at the end. Status 1 if any answer was wrong, anything
but 200 and 429 came back, or memory grew by more than a tenth in the second half.
"""

import argparse
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

QUESTIONS = [
    {"prompt": "The capital of France is", "completion": " Paris"},
    {"prompt": "The longest river in Africa is the", "completion": " Nile"},
    {"prompt": "def main():", "completion": " pass", "top_k": 5},
    {"prompt": "The opposite of hot is", "completion": " cold", "damping": 0.3, "top_k": 10},
    {"prompt": "Two and two make", "completion": " four", "rescore": 0},
]


@dataclass
class Load:
    """What all clients share.

    Attributes:
        url: Of the service.
        headers: Of every request.
        expected: The answer to each question.
        until: When clients stop, by `time.monotonic`.
        outcomes: How often each came.
        seconds: Seconds to the first ranking, and to the answer, of streams.
    """

    url: str
    headers: dict[str, str]
    expected: list[dict[str, Any]]
    until: float
    outcomes: Counter = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"ranking": [], "answer": []})
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, outcome: str) -> None:
        with self.lock:
            self.outcomes[outcome] += 1


def rows_of(answer: dict[str, Any]) -> list[tuple[int, float]]:
    return [(row["index"], row["score"]) for name in ("top", "bottom") for row in answer[name]]


def is_right(answer: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether an answer has the same scores, and so the same sequences but for ties."""
    found, wanted = rows_of(answer), rows_of(expected)
    largest = max((abs(score) for _, score in wanted), default=0.0)
    return len(found) == len(wanted) and all(
        abs(one[1] - other[1]) <= 1e-4 * largest for one, other in zip(found, wanted, strict=True)
    )


def ask(client: httpx.Client, load: Load, number: int, draw: random.Random) -> None:
    """Asks one question, and counts what came of it."""
    streams, leaves = draw.random() < 0.5, draw.random() < 0.1
    headers = load.headers | ({"accept": "text/event-stream"} if streams else {})
    start, name = time.monotonic(), ""
    with client.stream(
        "POST", f"{load.url}/v1/influence", json=QUESTIONS[number], headers=headers
    ) as response:
        if response.status_code == 429:
            load.count("429")
            assert int(response.headers["retry-after"]) >= 1
            time.sleep(draw.uniform(0.05, 0.5))
            return
        if response.status_code != 200:
            response.read()
            load.count(f"{response.status_code}: {response.text[:80]}")
            return
        if not streams:
            answer = json.loads(response.read())
        else:
            for line in response.iter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                    if name in load.seconds:
                        with load.lock:
                            load.seconds[name].append(time.monotonic() - start)
                    if leaves and name in ("queued", "ranking"):
                        load.count("left")
                        return
                elif line.startswith("data: ") and name in ("answer", "error"):
                    answer = json.loads(line.removeprefix("data: "))
    if streams and name != "answer":
        load.count(f"{name}: {str(answer)[:80]}")
        return
    load.count("right" if is_right(answer, load.expected[number]) else "wrong")


def be_a_client(load: Load, seed: int) -> None:
    draw = random.Random(seed)
    with httpx.Client(timeout=600) as client:
        while time.monotonic() < load.until:
            try:
                ask(client, load, draw.randrange(len(QUESTIONS)), draw)
            except Exception as error:
                load.count(f"{type(error).__name__}: {str(error)[:80]}")


def resident_bytes(url: str, headers: dict[str, str]) -> float:
    for line in httpx.get(f"{url}/metrics", headers=headers).text.splitlines():
        if line.startswith("ekfac_dist_resident_bytes "):
            return float(line.split()[1])
    raise LookupError("ekfac_dist_resident_bytes")


def percentiles(values: list[float]) -> str:
    ordered = sorted(values)
    if not ordered:
        return "none"
    return ", ".join(
        f"{share:.0%} {ordered[min(len(ordered) - 1, int(share * len(ordered)))]:.2f} s"
        for share in (0.5, 0.9, 0.99)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--token", default=os.environ.get("EKFAC_DIST_TOKEN"))
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=120.0)
    options = parser.parse_args()
    url = options.url.rstrip("/")
    headers = {} if options.token is None else {"authorization": f"Bearer {options.token}"}
    expected = []
    for question in QUESTIONS:
        response = httpx.post(f"{url}/v1/influence", json=question, headers=headers, timeout=600)
        response.raise_for_status()
        expected.append(response.json())
    load = Load(url, headers, expected, time.monotonic() + options.seconds)
    clients = [
        threading.Thread(target=be_a_client, args=(load, seed)) for seed in range(options.clients)
    ]
    memory = [resident_bytes(url, headers)]
    for client in clients:
        client.start()
    time.sleep(options.seconds / 2)
    memory.append(resident_bytes(url, headers))
    for client in clients:
        client.join()
    memory.append(resident_bytes(url, headers))
    for outcome, number in load.outcomes.most_common():
        print(f"{number:8d}  {outcome}")
    for name, values in load.seconds.items():
        print(f"{name:9} {percentiles(values)}")
    print("memory    " + ", ".join(f"{value / 1e6:.0f} MB" for value in memory))
    is_flat = memory[2] <= 1.1 * memory[1]
    return 0 if set(load.outcomes) <= {"right", "429", "left"} and is_flat else 1


if __name__ == "__main__":
    sys.exit(main())
