"""Random-weight models of a given shape, the least work of a fit, the device's name and speed.

The least operations of a pass, in multiply-add pairs, for each counted position and tracked module
of I inputs and O outputs:

    forward, and backward of activations     2·I·O   (also of every other linear map)
    covariance     I²/2 once for each shared input, and O²/2
    refit          for each sequence of T positions the cheapest order of
                   min(T, O)·I² once for each shared input, min(T, I)·O², and T·I·O

Attention scores, norms, activations and the softmax are not counted: they are overhead here.
"""

import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM


@dataclass(frozen=True)
class Shape:
    """Sizes of a model with gated MLPs.

    Attributes:
        heads: Of attention; None: one for each 64 of the hidden size.
        key_value_heads: None: as many as heads.
        qwen: Whether it is a Qwen 2 with tied embeddings, not a Llama.
    """

    hidden: int
    mlp: int
    layers: int
    vocabulary: int
    heads: int | None = None
    key_value_heads: int | None = None
    qwen: bool = False

    @property
    def num_heads(self):
        """Heads of attention."""
        return self.heads or max(1, self.hidden // 64)

    @property
    def key_value_size(self):
        """Outputs of the key projection, and of the value projection."""
        return self.hidden * (self.key_value_heads or self.num_heads) // self.num_heads

    def model(self, max_tokens):
        """A model of this shape with random float32 weights, the same each time."""
        torch.manual_seed(0)
        kind, config = (
            (Qwen2ForCausalLM, Qwen2Config) if self.qwen else (LlamaForCausalLM, LlamaConfig)
        )
        sizes = config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.key_value_heads or self.num_heads,
            max_position_embeddings=max_tokens,
            tie_word_embeddings=self.qwen,
        )
        return kind(sizes)

    def __str__(self):
        return (
            f"{'Qwen 2' if self.qwen else 'Llama'}, hidden {self.hidden}, MLP {self.mlp}, "
            f"{self.layers} layers, vocabulary {self.vocabulary}"
        )


def least_operations(shape, positions, refit="per_sequence"):
    """Operations (two for each multiply-add) of each pass: {pass: (model's, curvature's)}.

    Args:
        shape: The model's.
        positions: Counted positions of each sequence.
        refit: "per_sequence" or "per_token".
    """
    h, m, layers = shape.hidden, shape.mlp, shape.layers
    total = sum(positions)
    attention = 2 * h * h + 2 * h * shape.key_value_size
    # All linear maps forward; backward all but those below the first MLP and its first linears.
    linears = layers * (attention + 3 * h * m) + h * shape.vocabulary
    model = total * (2 * linears - attention - 2 * h * m)
    covariance = total * layers * (2 * h * h + 3 * m * m) / 2
    squares = 0
    for length in positions:
        if refit == "per_token":
            squares += layers * length * (2 * h * h + 3 * m * m + 3 * h * m)
            continue
        gate_and_up = min(length, 2 * m) * h * h + 2 * min(length, h) * m * m + 2 * length * h * m
        down = min(length, h) * m * m + min(length, m) * h * h + length * h * m
        squares += layers * (gate_and_up + down)
    return {"covariance": (2 * model, 2 * covariance), "refit": (2 * model, 2 * squares)}


def gemm_rate(device, dtype=torch.float32, size=None, seconds=2.0):
    """Operations a second, two for each multiply-add, of a square product: the best.

    Args:
        size: Rows; None: 2048 on a CPU, 8192 on a GPU.
    """
    size = size or (2048 if device == "cpu" else 8192)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def processor():
    """The CPU: its name, its numbers, which tell it where a virtual machine hides the name."""
    lines = (line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines())
    first = {}
    for key, *value in lines:
        first.setdefault(key.strip(), "".join(value).strip())
    if "model name" not in first:
        return platform.machine()
    widest = "AVX-512" if "avx512f" in first["flags"].split() else "no AVX-512"
    return f"{first['model name']} (family {first['cpu family']}, model {first['model']}, {widest})"
