"""A tokenizer and a small Llama, trained here and now on the texts that are given.

The model is no toy in its parts (attention, gated MLPs, a byte-level BPE tokenizer with special
tokens, safetensors on disk); it is only small. This module knows no corpus and no factors.
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
FINAL_LEARNING_RATE_SHARE = 0.05
HELD_OUT_BLOCKS = 32


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of the model.

    Args:
        hidden: Width of the residual stream.
        mlp: Width inside an MLP block.
        layers: Number of layers.
        heads: Number of attention heads; it divides `hidden`.
        context: Longest sequence in tokens, and the length of the blocks trained on.
    """

    hidden: int = 192
    mlp: int = 512
    layers: int = 4
    heads: int = 6
    context: int = 256


@dataclass(frozen=True)
class Training:
    """What a training did.

    Attributes:
        loss_from: Mean loss on held-out text before the first step, in nats per token.
        loss_to: The same after the last step.
        steps: Steps taken.
        seconds: Time that the steps took.
    """

    loss_from: float
    loss_to: float
    steps: int
    seconds: float


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer, which puts a BOS token before every text.

    Args:
        texts: Text to learn the merges from.
        vocab_size: Size of the vocabulary, the 256 bytes and 3 special tokens included.

    Raises:
        ConfigError: The vocabulary is too small for the bytes and the special tokens.
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
    """Trains a model from nothing and saves it, with its tokenizer, whole or not at all.

    With `seconds=None` the same arguments give the same model on the same machine; with a time
    budget the number of steps is the machine's.

    Args:
        directory: Where to save; it must not exist.
        tokenizer: Tokenizer of `train_tokenizer`.
        texts: Texts to train on.
        held_out: Texts that the reported losses are of.
        shape: Sizes of the model; None: the defaults.
        seconds: Time budget of the steps; None: no such limit.
        max_steps: Most steps to take.
        batch_blocks: Blocks of `shape.context` tokens per step.
        learning_rate: Highest learning rate of AdamW, after warm-up and before decay.
        seed: Seed of the initial weights and of the order of the blocks.
        show_progress: Whether to show a bar.

    Raises:
        ConfigError: `max_steps` is below 1.
        DataError: There is too little text for one batch, or for one held-out block.
        OutputError: The directory exists or cannot be written.
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
    """How far training is, by steps or by time, whichever is further."""

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
        by_time = self.elapsed / self.seconds if self.seconds is not None else 0.0
        return min(1.0, max(self.steps / self.max_steps, by_time))

    @property
    def rate(self) -> float:
        """The learning rate of the next step: linear warm-up, then half a cosine down."""
        warm = min(1.0, (self.steps + 1) / WARMUP_STEPS)
        down = 0.5 * (1 + math.cos(math.pi * self.share_done))
        return self.learning_rate * warm * max(down, FINAL_LEARNING_RATE_SHARE)


def _train(
    model: LlamaForCausalLM, batches: Iterator[Tensor], schedule: _Schedule, show_progress: bool
) -> None:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=schedule.learning_rate,
        betas=(0.9, 0.95),
    )
    model.train()
    # Whole thousandths, because how many steps fit into the time is not known beforehand.
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
    """All texts' tokens end to end, each closed by EOS, cut into blocks [B, context]."""
    if not texts:
        return torch.empty(0, context, dtype=torch.long)
    ids: list[int] = []
    for text_ids in tokenizer(list(texts))["input_ids"]:
        ids += [*text_ids, tokenizer.eos_token_id]
    num_blocks = len(ids) // context
    return torch.tensor(ids[: num_blocks * context]).view(num_blocks, context)


def _batches(blocks_BT: Tensor, batch_blocks: int, seed: int) -> Iterator[Tensor]:
    """Batches of blocks in a new random order each time round, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(blocks_BT), generator=generator)
        for chosen in order.split(batch_blocks):
            if len(chosen) == batch_blocks:
                yield blocks_BT[chosen]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds torch for a block and puts the caller's random state back after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def _whole_or_not_at_all(directory: Path) -> Iterator[Path]:
    """Gives a block a partial directory to fill, which takes its name when the block is done."""
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
