"""What a step takes where the head's logits are never held whole: peak memory and time.

    python tests/benchmarks/chunked_head.py                    a minute or two on 2 cores, 4 GB
    python tests/benchmarks/chunked_head.py --tokens 4096

A Llama of the shape of SmolLM2-135M with random weights, and its vocabulary of 49,152; steps are a
forward and a backward of sequences of 256 tokens, as in a pass, without running sums. Both kinds of
head run in turns in one process; shown are the medians of the seconds, and the peak of anonymous
memory above what there was before the step.
"""

import argparse
import ctypes
import statistics
import sys
import time
from pathlib import Path

import torch
from peak_memory import PeakMemory
from transformers import LlamaConfig, LlamaForCausalLM

from ekfac_dist.data.sequences import Sequence, collate
from ekfac_dist.models.capture.chunked_head import CHUNK_ELEMENTS
from ekfac_dist.models.capture.chunked_head_checks import in_chunks
from ekfac_dist.models.capture.hooks import Capture
from ekfac_dist.models.capture.labels import COVARIANCE_PASS, LabelRule
from ekfac_dist.models.capture.observers import NullObserver
from ekfac_dist.models.capture.prepare import prepared
from ekfac_dist.models.capture.tasks import CAUSAL_LM
from ekfac_dist.models.find.discovery import discover
from ekfac_dist.report.tables import table

sys.path.append(str(Path(__file__).parent / "peers"))  # where the shared modules are
from model_shapes import processor

LENGTH, VOCABULARY = 256, 49_152


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--labels", default="sampled", choices=["sampled", "data"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    return parser.parse_args()


def make_model(args):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=args.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(getattr(torch, args.dtype))


def make_batch(tokens):
    generator = torch.Generator().manual_seed(1)
    sequences = []
    for index in range(tokens // LENGTH):
        ids = torch.randint(0, VOCABULARY, (LENGTH + 1,), generator=generator).numpy()
        sequences.append(Sequence(index, ids[:-1], ids[1:].copy()))
    return collate(sequences)


def step(capture, batch, rule):
    """Seconds of a step, and the peak of its memory, in bytes."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what an earlier step has left
    watch = PeakMemory()
    watch.start()
    start = time.perf_counter()
    capture.run(batch, rule)
    return time.perf_counter() - start, watch.end()


def main():
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    model, batch = make_model(args), make_batch(args.tokens)
    rule = LabelRule(args.labels, 0, COVARIANCE_PASS)
    with prepared(model):
        modules = discover(model, None, torch.device("cpu")).modules
        chunked = in_chunks(model, modules, make_batch(LENGTH))
        assert chunked is not None, "the head in chunks does not compute the same"
        heads = {"whole": CAUSAL_LM, f"{CHUNK_ELEMENTS // VOCABULARY} positions": chunked}
        found = {name: [] for name in heads}
        for number in range(args.rounds + 1):
            for name, task in heads.items():
                with Capture(model, modules, NullObserver(), None, task) as capture:
                    # The first round warms up.
                    found[name] += [step(capture, batch, rule)][: number and 1]
    whole = [statistics.median(values) for values in zip(*found["whole"], strict=True)]
    rows = []
    for name, steps in found.items():
        seconds, peak = (statistics.median(values) for values in zip(*steps, strict=True))
        one = [f"{peak / 1e6:.0f}", f"{peak / whole[1]:.2f}"]
        rows.append([name, *one, f"{seconds:.2f}", f"{seconds / whole[0]:.2f}"])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"SmolLM2-135M's shape, {parameters / 1e6:.0f} M parameters, vocabulary {VOCABULARY:,}, "
        f"{args.dtype}; {args.labels} labels; steps of {args.tokens} tokens, whose logits are "
        f"{args.tokens * VOCABULARY * model.dtype.itemsize / 1e6:.0f} MB; {args.rounds} rounds\n"
        f"{processor()}, {torch.get_num_threads()} threads\n"
    )
    print(table(["logits held", "peak, MB", "ratio", "seconds", "ratio"], rows))


if __name__ == "__main__":
    main()
