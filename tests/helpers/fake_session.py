"""A session without a model, whose scores are drawn from the question, for tests of the service.

Each thing that it says of a question follows from its texts alone: `scan_scores` and `exact_scores`
say what an answer must hold. Tests stop it at a gate, and let it fail.
"""

import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from ekfac_dist.errors import DataError
from ekfac_dist.influence.asking import Question, Ranking, ScanStopped
from ekfac_dist.influence.lists import choose_for_rescoring, exact_lists, make_lists
from ekfac_dist.influence.results import BOTTOM, DETAILS, QUERIES, SCORES, SEQUENCES, TOP
from ekfac_dist.influence.results_in_memory import ResultsInMemory, ResultsToMemory
from ekfac_dist.influence.scores import Details, InfluenceScores
from ekfac_dist.runtime.processes import World

LAYERS = ("model.layers.0", "model.layers.1")
MODULES = {f"{layer}.mlp.{name}": layer for layer in LAYERS for name in ("up_proj", "down_proj")}
HOSTILE = "</script><script>alert(1)</script>\u202e\x00\r\n\ndata: x\ud800"


def one_worker() -> World:
    return World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), backend="none")


def _seed(text: str) -> int:
    return zlib.crc32(text.encode("utf-8", "surrogatepass"))


def text_of(index: int) -> str:
    words = [f" w{(index * 7 + k) % 50}" for k in range(5 + index % 4)]
    return "".join(words) + (HOSTILE if index % 10 == 3 else "")


def tokens_of(index: int) -> list[str]:
    text = text_of(index)
    return [text[k : k + 4] for k in range(0, len(text), 4)]


def scan_scores(completion: str, num_sequences: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(_seed(completion))
    return torch.randn(num_sequences, generator=generator) * 10


def exact_scores(completion: str, num_sequences: int) -> torch.Tensor:
    return scan_scores(completion, num_sequences) * 1.25 + 0.5


@dataclass
class FakeSession:
    """The session.

    Attributes:
        num_sequences: Sequences of the index.
        world: The workers.
        scans: The completions of each scan.
        exact_calls: (completion, columns) of each call.
        gate: Each scan and each exact call waits for it.
        arrived: Is set when one waits there.
        failures: What a completion makes `rank` raise.
        exact_seconds: Duration of an exact call.
        shard_seconds: Duration of a shard of a scan.
        num_stopped: How many scans were left early.
    """

    num_sequences: int = 60
    world: World = field(default_factory=one_worker)
    scans: list[list[str]] = field(default_factory=list)
    exact_calls: list[tuple[str, list[int]]] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    arrived: threading.Event = field(default_factory=threading.Event)
    failures: dict[str, Callable[[], Exception]] = field(default_factory=dict)
    exact_seconds: float = 0.0
    shard_seconds: float = 0.0
    num_stopped: int = 0

    def __post_init__(self):
        self.gate.set()
        self.info = {
            "model": {"name": "tiny", "dtype": "float32", "whole": "9f2c"},
            "factors": {"path": "runs/tiny", "num_sequences": 60, "labels": "sampled"},
            "index": {
                "path": "runs/index",
                "rank": 1,
                "dtype": "bfloat16",
                "num_sequences": self.num_sequences,
                "bytes": 1234,
            },
            "layers": list(LAYERS),
            "modules": list(MODULES),
            "damping": {"value": 0.1},
        }

    def _wait(self):
        self.arrived.set()
        assert self.gate.wait(30)

    def check(self, question: Question) -> None:
        if "impossible" in (question.query.completion or ""):
            raise DataError("The question: has no token to predict; give a longer one.")

    def rank(self, questions, go_on=lambda: True):
        names = [question.query.completion for question in questions]
        self.scans.append(names)
        for _ in range(3):  # shards
            self._wait()
            time.sleep(self.shard_seconds)
            if not go_on():
                self.num_stopped += 1
                raise ScanStopped
        for name in names:
            if name in self.failures:
                raise self.failures[name]()
        return [self._ranking(question) for question in questions]

    def _ranking(self, question: Question) -> Ranking:
        scores = InfluenceScores(
            scores=scan_scores(question.query.completion, self.num_sequences)[None],
            indices=np.arange(self.num_sequences),
            members=((0,),),
            training_size=None,
            normalize=question.normalize,
            tokens=question.tokens,
            norms=torch.ones(self.num_sequences),
            query_norms=torch.ones(1),
            modules=tuple(MODULES),
            layers=LAYERS,
            layer_of=np.array([LAYERS.index(layer) for layer in MODULES.values()]),
            damping=dict.fromkeys(MODULES, 0.1),
            query_losses=[1.25],
            against_losses=[None if question.query.against is None else 2.5],
        )
        columns = np.arange(self.num_sequences)
        lengths = question.top_k, question.bottom_k
        top, bottom = make_lists(scores.scores[0], columns, scores.indices, lengths)
        scores.top, scores.bottom = [top], [bottom]
        ranking = Ranking(scores, queries=None, seconds=0.01)
        ranking.question = question
        return ranking

    def to_rescore(self, ranking):
        order = ranking.scores.scores[0].argsort(descending=True, stable=True).tolist()
        number, both = ranking.question.rescore, []
        for k in range(number):
            both += [order[k]] + ([order[-1 - k]] if ranking.question.bottom_k else [])
        return list(dict.fromkeys(both))

    def exact(self, ranking, columns, go_on=lambda: True):
        completion = ranking.question.query.completion
        self.exact_calls.append((completion, list(columns)))
        self._wait()
        time.sleep(self.exact_seconds)
        all_scores = exact_scores(completion, self.num_sequences)
        offsets, parts, modules = [0], [], []
        for column in columns:
            length = len(tokens_of(column)) - 1
            weights = torch.linspace(1, 2, len(LAYERS) * length).reshape(len(LAYERS), length)
            part = all_scores[column] * weights / weights.sum()
            parts.append(part)
            modules.append(torch.stack([s * part[k].sum() for k in (0, 1) for s in (0.25, 0.75)]))
            offsets.append(offsets[-1] + length)
        return Details(
            np.zeros(len(columns), np.int64),
            np.array(columns),
            np.array(offsets),
            torch.cat(parts, 1),
            torch.stack(modules),
        )

    def finish(self, ranking, details):
        scores, question = self._ranking(ranking.question).scores, ranking.question
        joined = Details.join(list(details))
        columns = np.sort(joined.columns)
        exact = exact_scores(question.query.completion, self.num_sequences)[columns]
        lengths = question.top_k, question.bottom_k
        chosen = choose_for_rescoring(scores, 0, question.rescore, lengths)
        (top, bottom), rescored = exact_lists(scores, 0, columns, exact, chosen, lengths)
        scores.top, scores.bottom, scores.rescored = [top], [bottom], [rescored]
        scores.details = joined
        return scores

    def sequence(self, index):
        if not 0 <= index < self.num_sequences:
            raise KeyError(index)
        tokens = tokens_of(index)
        return {
            "index": index,
            "text": text_of(index),
            "tokens": tokens,
            "is_label": [False] + [True] * (len(tokens) - 1),
        }

    def complete(self, prompt, messages, max_tokens, temperature, seed):
        self._wait()
        if prompt == "too long":
            raise DataError("The prompt has more tokens than the model reads; shorten it.")
        return {
            "text": " on and on",
            "tokens": [" on", " and", " on"][:max_tokens],
            "finish": "end",
        }

    def results(self, ranking, scores) -> ResultsInMemory:
        sink, question = ResultsToMemory(), ranking.question
        sink.lines(QUERIES, [{"query": 0, "group": None, "members": [_member(question.query)]}])
        tensors = {"scores": scores.scores, "indices": torch.from_numpy(scores.indices)}
        if scores.rescored:
            tensors["exact_scores"] = scores.rescored[0].exact_scores
        sink.tensors(SCORES, tensors)
        listed = set()
        for file, (one,) in ((TOP, scores.top), (BOTTOM, scores.bottom)):
            shares = scores.in_shares(one.scores, 0).tolist()
            lines = []
            for k, index in enumerate(one.indices.tolist()):
                line = {"query": 0, "rank": k + 1, "index": index, "score": float(one.scores[k])}
                line |= {"share": shares[k], "nats": None, "text": text_of(index)}
                if scores.rescored:
                    line["scan_score"] = float(scores.scores[0, one.columns[k]])
                lines.append(line)
                listed.add(index)
            sink.lines(file, lines)
        sink.lines(SEQUENCES, [self.sequence(index) for index in sorted(listed)])
        if scores.details is not None:
            details = scores.details
            sink.tensors(
                DETAILS,
                {
                    "pair_query": torch.from_numpy(details.rows),
                    "pair_index": torch.from_numpy(scores.indices[details.columns]),
                    "offsets": torch.from_numpy(details.offsets),
                    "token_scores": details.token_scores,
                    "layer_token_scores": details.layer_token_scores,
                    "module_scores": details.module_scores,
                },
            )
        sink.finish(_manifest(scores))
        return sink.results


def _member(query) -> dict:
    def side(completion):
        tokens = [*query.prompt.split(), completion]
        labels = [False] * (len(tokens) - 1) + [True]
        return {"tokens": tokens, "is_label": labels, "split_token": None}

    member = {"line": 0, "prompt": query.prompt, "completion": query.completion, "nats": 1.25}
    member |= side(query.completion)
    if query.against is not None:
        member["against"] = {"completion": query.against, "nats": 2.5, **side(query.against)}
    return member


def _manifest(scores) -> dict:
    scan = {"rank": 1, "rescored": 0, "ends": ["top", "bottom"], "spearman_top": []}
    scan |= {"spearman": [], "overlap": []}
    if scores.rescored:
        (again,) = scores.rescored
        scan |= {"rescored": len(again.columns), "spearman_top": [again.spearman_top]}
        scan |= {"spearman": [again.spearman], "overlap": [again.overlap]}
    return {
        "model": {"name": "tiny", "class": "LlamaForCausalLM", "dtype": "float32"},
        "factors": {"labels": "sampled", "fisher": "true Fisher", "seed": 0},
        "data": {
            "source": "corpus.jsonl",
            "num_sequences": len(scores.indices),
            "num_scored": len(scores.indices),
        },
        "scores": {
            "sign": "positive: more likely",
            "scale": "score = …",
            "share": "score / sum",
            "normalize": scores.normalize,
            "training_size": None,
        },
        "damping": {"kind": "relative", "value": 0.1, "modules": {}, "absolute": scores.damping},
        "scan": scan,
        "layers": list(scores.layers),
        "modules": dict(MODULES),
        "num_queries": 1,
        "top_k": len(scores.top[0].columns),
        "bottom_k": len(scores.bottom[0].columns),
        "per_token": "top",
        "tokens": scores.tokens,
        "workers": 1,
        "seconds": 1.0,
        "software": {"torch": torch.__version__},
        "config": {},
    }
