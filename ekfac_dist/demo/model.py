"""Trains a tokenizer and a small Llama model on given texts.

The model has the parts of a full-sized one (attention, gated MLPs, a byte-level BPE tokenizer with
special tokens, safetensors on disk); it is only smaller. This module knows no corpus and no
factors.
"""

import math
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ekfac_dist.errors import ConfigError, DataError, OutputError
from ekfac_dist.runtime.progress import Progress

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
WARMUP_STEPS = 20
FINAL_LEARNING_RATE_SHARE = 0.05  # of the highest learning rate
HELD_OUT_BLOCKS = 32  # most blocks that the reported losses are computed on


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of the model.

    Args:
        hidden: Width of the residual stream.
        mlp: Width inside an MLP block.
        layers: Number of layers.
        heads: Number of attention heads; it divides `hidden`.
        context: Longest sequence in tokens, and length of the training blocks.
    """

    hidden: int = 192
    mlp: int = 512
    layers: int = 4
    heads: int = 6
    context: int = 256


@dataclass(frozen=True)
class Training:
    """Summary of a training run.

    Attributes:
        loss_from: Mean loss on held-out text before the first step, in nats per token.
        loss_to: Mean loss on held-out text after the last step, in nats per token.
        steps: Number of steps.
        seconds: Duration of the steps in seconds.
    """

    loss_from: float
    loss_to: float
    steps: int
    seconds: float


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer, which puts a BOS token before every text.

    Args:
        texts: Texts to learn the merges from.
        vocab_size: Size of the vocabulary, including the 256 bytes and 3 special tokens.

    Raises:
        ConfigError: If the vocabulary is too small for the bytes and the special tokens.
    """
    if vocab_size < 259:
        raise ConfigError(
            f"vocab_size is {vocab_size}; 256 bytes and 3 special tokens need 259 or more."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A",
                pair=f"{BOS} $A {BOS} $B",
                special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD
    )


def train_model(
    directory: str | Path,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    held_out: Sequence[str],
    *,
    shape: ModelShape | None = None,
    seconds: float | None = 60.0,
    max_steps: int = 2000,
    batch_blocks: int = 4,
    learning_rate: float = 2e-3,
    seed: int = 0,
    show_progress: bool = True,
) -> Training:
    """Trains a model from random weights and saves it with its tokenizer.

    The directory is complete if it exists. With `seconds=None` equal arguments give equal models on
    the same machine; with a time limit the number of steps depends on the machine's speed.

    Args:
        directory: Directory to save to; it must not exist.
        tokenizer: A tokenizer from `train_tokenizer`.
        texts: Texts to train on.
        held_out: Texts that the reported losses are computed on.
        shape: Sizes of the model; None for the defaults.
        seconds: Time limit of the steps in seconds; None for no limit.
        max_steps: Largest number of steps.
        batch_blocks: Blocks of `shape.context` tokens in a step.
        learning_rate: Highest learning rate of AdamW, reached after warm-up.
        seed: Seed of the initial weights and of the order of the blocks.
        show_progress: Whether to show a progress bar.

    Raises:
        ConfigError: If `max_steps` is below 1.
        DataError: If there is too little text for one batch, or for one held-out block.
        OutputError: If the directory exists or cannot be written.
    """
    directory = Path(directory)
    shape = shape or ModelShape()
    if max_steps < 1:
        raise ConfigError(f"max_steps is {max_steps}; it must be 1 or more.")
    if directory.exists():
        raise OutputError(f"{directory} exists; give a directory that is new.")
    blocks_BT = _packed_blocks(tokenizer, texts, shape.context)
    held_out_BT = _packed_blocks(tokenizer, held_out, shape.context)[:HELD_OUT_BLOCKS]
    if len(blocks_BT) < batch_blocks or not len(held_out_BT):
        raise DataError(
            f"the text gives {len(blocks_BT)} blocks of {shape.context} tokens to train on and "
            f"{len(held_out_BT)} held-out ones; {batch_blocks} and 1 are needed: give more text."
        )
    with _whole_or_not_at_all(directory) as partial, _seeded(seed):
        model = _new_model(tokenizer, shape)
        loss_from = _mean_loss(model, held_out_BT)
        batches = _batches(blocks_BT, batch_blocks, seed)
        schedule = _Schedule(learning_rate, seconds, max_steps)
        _train(model, batches, schedule, show_progress)
        loss_to = _mean_loss(model, held_out_BT)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return Training(loss_from, loss_to, schedule.steps, schedule.elapsed)


class _Schedule:
    """Progress and learning rate of training, which ends at a number of steps or a time limit."""

    def __init__(self, learning_rate: float, seconds: float | None, max_steps: int) -> None:
        self.learning_rate = learning_rate
        self.seconds = seconds
        self.max_steps = max_steps
        self.steps = 0
        self.elapsed = 0.0
        self._start = time.monotonic()

    def step(self) -> None:
        self.steps += 1
        self.elapsed = time.monotonic() - self._start

    @property
    def share_done(self) -> float:
        """Fraction of training that is done, by steps or by time, whichever is larger."""
        time_share = self.elapsed / self.seconds if self.seconds is not None else 0.0
        return min(1.0, max(self.steps / self.max_steps, time_share))

    @property
    def rate(self) -> float:
        """The learning rate of the next step: linear warm-up and cosine decay."""
        warmup = min(1.0, (self.steps + 1) / WARMUP_STEPS)
        decay = 0.5 * (1 + math.cos(math.pi * self.share_done))
        return self.learning_rate * warmup * max(decay, FINAL_LEARNING_RATE_SHARE)


def _train(
    model: LlamaForCausalLM, batches: Iterator[Tensor], schedule: _Schedule, show_progress: bool
) -> None:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=schedule.learning_rate,
        betas=(0.9, 0.95),
    )
    model.train()
    # Progress in thousandths, because the number of steps within the time limit is not known.
    with Progress(
        "training", total=1000, unit="‰", show_rate=False, enabled=show_progress
    ) as progress:
        while schedule.share_done < 1:
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate
            batch_BT = next(batches)
            loss = model(input_ids=batch_BT, labels=batch_BT, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress.update(int(1000 * schedule.share_done) - progress.done)
    model.eval()


def _new_model(tokenizer: PreTrainedTokenizerFast, shape: ModelShape) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return LlamaForCausalLM(config).float().eval()


@torch.no_grad()
def _mean_loss(model: LlamaForCausalLM, blocks_BT: Tensor) -> float:
    losses = [
        model(input_ids=batch_BT, labels=batch_BT, use_cache=False).loss.item() * len(batch_BT)
        for batch_BT in blocks_BT.split(8)
    ]
    return sum(losses) / len(blocks_BT)


def _packed_blocks(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], context: int
) -> Tensor:
    """The texts' tokens, an EOS after each text, joined and cut into blocks [B, context]."""
    if not texts:
        return torch.empty(0, context, dtype=torch.long)
    ids: list[int] = []
    for text_ids in tokenizer(list(texts))["input_ids"]:
        ids += [*text_ids, tokenizer.eos_token_id]
    num_blocks = len(ids) // context
    return torch.tensor(ids[: num_blocks * context]).view(num_blocks, context)


def _batches(blocks_BT: Tensor, batch_blocks: int, seed: int) -> Iterator[Tensor]:
    """Yields batches of blocks without end, in a new random order in each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(blocks_BT), generator=generator)
        for indices in order.split(batch_blocks):
            if len(indices) == batch_blocks:
                yield blocks_BT[indices]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Context in which torch is seeded; restores the caller's random state at its end."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def _whole_or_not_at_all(directory: Path) -> Iterator[Path]:
    """Context with a temporary directory, which is renamed to the given one at its end."""
    partial = directory.with_name(f".{directory.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
        partial.mkdir(parents=True)
        yield partial
        partial.rename(directory)
    except OSError as error:
        raise OutputError(
            f"{directory} cannot be written: {error.strerror or error}. Give a directory that can "
            "be written and has room."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
