"""Results as a `query` run writes them, with invented scores, for tests of what reads them.

made = Made(num_queries=2, num_sequences=300)
made.write(tmp_path / "scores")

Everything is drawn from a seed: heavy-tailed scores, a few tokens that carry most of each.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ekfac_dist.influence.results import (
    BOTTOM,
    DETAILS,
    QUERIES,
    SCORES,
    SEQUENCES,
    TOP,
    ResultsWriter,
)

WORDS = (
    "the",
    "of",
    "gradient",
    "worker",
    "river",
    "sold",
    "Paris",
    ",",
    ".",
    "1889",
    "was",
    "ing",
)
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def words(number: int, seed: int) -> list[str]:
    """Tokens, most of which begin with a space."""
    draw = random.Random(seed)
    return [draw.choice((" ", " ", "")) + draw.choice(WORDS) for _ in range(number)]


@dataclass
class Made:
    """What the results hold.

    Attributes:
        num_queries: Rows of scores.
        num_sequences: Scored sequences.
        listed: Sequences in each of the two lists.
        num_layers: Layers, with three modules each.
        num_tokens: Tokens of a sequence, one more than it has positions.
        per_token: "top" or "none".
        of: What positions' scores are of, "inputs" or "outputs"; None: not
            told, as by earlier versions.
        normalize: As in the manifest.
        rescored: Sequences that a second stage scored; 0 is one exact stage.
        group: The group's name if rows are groups of three queries.
        tokens: Tokens of the sequence with that index, in place of drawn ones.
        prompt: Of every query.
        completion: Of every query.
        against: Completion that every query is against; None: no contrasts.
        model: Name of the model.
        training_size: As in the manifest; None: no nats.
        loss: −log p of the first query; of each further one 1 more.
    """

    num_queries: int = 2
    num_sequences: int = 60
    listed: int = 8
    num_layers: int = 4
    num_tokens: int = 25
    per_token: str = "top"
    of: str | None = "inputs"
    normalize: str = "none"
    rescored: int = 0
    group: str | None = None
    tokens: dict[int, list[str]] = field(default_factory=dict)
    prompt: str = "The tower was built in"
    completion: str = " Paris"
    against: str | None = None
    model: str = "tiny"
    training_size: int | None = None
    loss: float = 1.25

    def make(self) -> None:
        """Makes scores, lists, sequences and details."""
        torch.manual_seed(0)
        shape = (self.num_queries, self.num_sequences)
        self.scores_QN = torch.randn(shape) * (1.2 * torch.randn(shape)).exp() * 20
        order = self.scores_QN.argsort(dim=1, descending=True, stable=True)
        self.top = order[:, : self.listed].tolist()
        self.bottom = order.flip(1)[:, : self.listed].tolist()
        indices = sorted({i for one in self.top + self.bottom for i in one})
        self.sequences = {i: self.tokens.get(i) or words(self.num_tokens, i) for i in indices}
        if self.per_token != "none":
            self.details = self._details()

    def write(self, path: Path) -> Path:
        """Makes the results, and writes them."""
        self.make()
        writer = ResultsWriter(path)
        writer.lines(QUERIES, [self._query(q) for q in range(self.num_queries)])
        writer.tensors(
            SCORES, {"scores": self.scores_QN, "indices": torch.arange(self.num_sequences)}
        )
        writer.lines(TOP, self._lines(self.top))
        writer.lines(BOTTOM, self._lines(self.bottom))
        writer.lines(
            SEQUENCES,
            [{"index": i, "text": "".join(t), "tokens": t} for i, t in self.sequences.items()],
        )
        if self.per_token != "none":
            writer.tensors(DETAILS, self.details)
        writer.finish(self._manifest())
        return path

    def nats(self, query: int, index: int) -> float:
        scale = 0.5 if self.normalize != "none" else 1.0
        return float(self.scores_QN[query, index]) * scale / self.training_size

    def share(self, query: int, index: int) -> float:
        score, row = self.scores_QN[query, index].double(), self.scores_QN[query].double()
        return float(score / row[row.sign() == score.sign()].abs().sum())

    def _query(self, query: int) -> dict:
        member = {
            "prompt": self.prompt,
            "completion": self.completion,
            "tokens": [*self.prompt.split(), self.completion],
            "is_label": [False] * len(self.prompt.split()) + [True],
            "nats": self.loss + query,
        }
        if self.against is not None:
            other = {"completion": self.against, "tokens": [*self.prompt.split(), self.against]}
            other |= {"is_label": member["is_label"], "nats": self.loss + query + 2}
            member["against"] = other
        number = 3 if self.group else 1
        members = [{"line": query * number + k + 1, **member} for k in range(number)]
        return {"query": query, "group": self.group, "members": members}

    def _lines(self, lists: list[list[int]]) -> list[dict]:
        lines = []
        for query, indices in enumerate(lists):
            for rank, index in enumerate(indices, start=1):
                score = float(self.scores_QN[query, index])
                line = {"query": query, "rank": rank, "index": index, "score": score}
                line |= {"share": self.share(query, index), "nats": None}
                line |= {"text": "".join(self.sequences[index])}
                if self.training_size is not None:
                    line["nats"] = self.nats(query, index)
                    members = 3 if self.group else 1
                    if line["nats"] > members * (self.loss + query):
                        line["note"] = "too far for first order"
                lines.append(line | ({"scan_score": 0.9 * score} if self.rescored else {}))
        return lines

    def _details(self) -> dict[str, torch.Tensor]:
        """Token scores that sum to the score; every third sequence's stand on two tokens."""
        self.pairs = [
            (q, i)
            for q in range(self.num_queries)
            for i in dict.fromkeys(self.top[q] + self.bottom[q])
        ]
        num_modules = self.num_layers * len(PROJECTIONS)
        offsets, blocks, modules = [0], [], []
        for number, (q, i) in enumerate(self.pairs):
            length = len(self.sequences[i]) - 1
            spikes = (torch.randn(length) + 0.4) * torch.randn(length).exp()
            if number % 3 == 0 and length > 2:
                spikes = 0.001 * spikes
                spikes[torch.tensor([length // 3, length // 2])] = torch.tensor([3.0, 2.0])
            depth = torch.linspace(0.2, 1.0, self.num_layers)[:, None] * torch.randn(
                self.num_layers, length
            ).mul(0.6).add(1)
            block = depth * spikes
            block *= self.scores_QN[q, i] / block.sum()
            if block.sum(0).abs().sum() > 40 * self.scores_QN[q, i].abs():
                block = torch.full_like(block, float(self.scores_QN[q, i]) / block.numel())
            parts = torch.tensor([0.5, 0.2, 0.3])
            modules.append((block.sum(1)[:, None] * parts).reshape(1, -1))
            blocks.append(block)
            offsets.append(offsets[-1] + length)
        layer_scores = torch.cat([torch.zeros(self.num_layers, 0), *blocks], dim=1)
        return {
            "pair_query": torch.tensor([q for q, _ in self.pairs], dtype=torch.int64),
            "pair_index": torch.tensor([i for _, i in self.pairs], dtype=torch.int64),
            "offsets": torch.tensor(offsets),
            "token_scores": layer_scores.sum(0),
            "layer_token_scores": layer_scores,
            "module_scores": torch.cat([torch.zeros(0, num_modules), *modules]),
        }

    def _manifest(self) -> dict:
        layers = [f"model.layers.{k}" for k in range(self.num_layers)]
        modules = {f"{layer}.mlp.{name}": layer for layer in layers for name in PROJECTIONS}
        return {
            "model": {
                "name": self.model,
                "class": "LlamaForCausalLM",
                "dtype": "float32",
                "fingerprint": "9f2c",
            },
            "factors": {
                "path": "runs/tiny",
                "labels": "sampled",
                "fisher": "true Fisher",
                "seed": 0,
                "refit": "per_sequence",
                "num_sequences": self.num_sequences,
            },
            "data": {
                "source": "corpus.jsonl",
                "split": "train",
                "text": "text",
                "prompt": None,
                "max_tokens": self.num_tokens,
                "fingerprint": "77aa",
                "num_sequences": self.num_sequences,
                "num_scored": self.num_sequences,
            },
            "num_queries": self.num_queries,
            "scores": {
                "sign": "Positive: more of this sequence in the training data makes the query's "
                "completion more likely.",
                "scale": "A score is ∇log p(query)ᵀ (F + λ)⁻¹ ∇log p(sequence); summed over "
                "modules.",
                "share": "score / sum of |scores| of all sequences with the same sign",
                "normalize": self.normalize,
                "training_size": self.training_size,
            },
            "damping": {
                "kind": "relative",
                "value": 0.1,
                "modules": {},
                "absolute": {name: 1.5e-4 * (k + 1) for k, name in enumerate(modules)},
            },
            "scan": {
                "rank": 32 if self.rescored else None,
                "rescored": self.rescored,
                "ends": ["top", "bottom"],
                "spearman_top": [0.9] * (self.num_queries if self.rescored else 0),
                "spearman": [0.987] * (self.num_queries if self.rescored else 0),
                "overlap": [0.9] * (self.num_queries if self.rescored else 0),
            },
            "layers": layers,
            "modules": modules,
            "top_k": self.listed,
            "bottom_k": self.listed,
            "per_token": self.per_token,
            **({} if self.of is None else {"tokens": self.of}),
            "workers": 2,
            "seconds": 12.5,
            "software": {"torch": "2.13.0", "transformers": "5.23.0"},
            "config": {"factors": "runs/tiny", "damping": {"value": 0.1}, "top_k": self.listed},
        }
