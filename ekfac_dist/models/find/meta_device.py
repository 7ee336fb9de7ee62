"""A model without its weights: its modules, and what a step with it would hold and compute.

It is built from its configuration on the meta device, where a forward computes no number. What it
shows all the same: which linear maps read one tensor, and what autograd keeps for the backward.
What only numbers show, such as which modules mix positions, is taken from names here; a run looks
again, at the model itself.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ekfac_dist.config import ModelConfig
from ekfac_dist.errors import ModelError, first_line
from ekfac_dist.models.capture.experts import experts_computed_by, fused_experts, matrices
from ekfac_dist.models.capture.packing import attention_configs
from ekfac_dist.models.capture.saved_tensors import StepMemory, noting_saved_tensors
from ekfac_dist.models.find.discovery import Discovery, discovered
from ekfac_dist.models.find.trace import Trace, few_tokens
from ekfac_dist.models.load.pretrained import without_weights
from ekfac_dist.models.modules import EXPERT, TrackedModule, linear_modules, only_input

IMPLEMENTATION = "ekfac_dist_sketch"


@dataclass(frozen=True)
class StepEstimate(StepMemory):
    """What a forward and backward of some tokens hold and compute, without what is summed.

    Attributes:
        forward: Operations of the forward, two for each multiply-add.
        below: Those of them that come before a module, by its name.
        routed: Which part of the positions each expert sees if all see as many, by the name of
            their collection.
    """

    forward: int
    below: Mapping[str, int]
    routed: Mapping[str, float]

    def operations(self, modules: Sequence[TrackedModule]) -> int:
        """Of the forward, and of the backward of activations down to the lowest of some modules."""
        return 2 * self.forward - min(self.below.get(_traced(module), 0) for module in modules)


def model_without_weights(config: ModelConfig) -> nn.Module:
    """The model of a configuration on the meta device, frozen; only config.json is read.

    Raises:
        ModelError: There is no such causal language model, or it cannot be built without weights.
    """
    for field in ("adapter", "quantization"):
        if getattr(config, field) is not None:
            raise ModelError(
                f"model.{field} is {getattr(config, field)!r}, which cannot be planned; plan the "
                "model without it."
            )
    return without_weights(config)


def discover_by_shape(model: nn.Module, globs: Sequence[str] | None) -> Discovery:
    """The modules that `discover` would track, as far as a model without numbers shows.

    Raises:
        ModelError: As `discover`; or the model cannot run without numbers.
    """
    experts = fused_experts(model)
    found = Trace({name: [] for name in [*linear_modules(model), *experts]}, heard=set(experts))

    def see(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            found.inputs[name].append((only_input(args, kwargs), 0))

        return hook

    with ExitStack() as stack:
        for name in found.inputs:
            module = model.get_submodule(name)
            handle = module.register_forward_pre_hook(see(name), with_kwargs=True)
            stack.callback(handle.remove)
        _run(model, 2, 5)
    return discovered(model, globs, found, few_tokens(model, torch.device("cpu")))


def step(
    model: nn.Module, modules: Sequence[TrackedModule], num_sequences: int, num_tokens: int
) -> StepEstimate:
    """What a step of some sequences holds, the graph beginning at the lowest of some modules.

    Args:
        model: A model on the meta device.
        modules: The tracked modules.
        num_sequences: B.
        num_tokens: T.
    """
    counter = FlopCounterMode(display=False)
    below: dict[str, int] = {}

    def start_graph(name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            below.setdefault(name, counter.get_total_flops())
            return None if output.requires_grad else output.detach().requires_grad_().clone()

        return hook

    routed: dict[str, float] = {}

    def share(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            hidden, chosen = args[:2]
            routed[name] = chosen.numel() / (
                hidden.shape[0] * len(module.get_parameter("down_proj"))
            )

        return hook

    with ExitStack() as stack:
        for name in dict.fromkeys(map(_traced, modules)):
            hook = start_graph(name)
            handle = model.get_submodule(name).register_forward_hook(hook, prepend=True)
            stack.callback(handle.remove)
        for name, experts in fused_experts(model).items():
            stack.callback(experts.register_forward_hook(share(name)).remove)
        kept = stack.enter_context(noting_saved_tensors(model))
        stack.enter_context(counter)
        logits = _run(model, num_sequences, num_tokens)
    return StepEstimate(
        activation_bytes=kept.num_bytes,
        logit_bytes=logits.nbytes,
        itemsize=logits.dtype.itemsize,
        forward=counter.get_total_flops(),
        below=below,
        routed=routed,
    )


def _traced(module: TrackedModule) -> str:
    return module.fused[0] if module.kind == EXPERT else module.name


@torch.enable_grad()
def _run(model: nn.Module, num_sequences: int, num_tokens: int) -> Tensor:
    """The logits of tokens without numbers."""
    tokens = torch.zeros(num_sequences, num_tokens, dtype=torch.int64, device="meta")
    # With a mask, so that nothing looks for padding among the tokens.
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    fused = [c for c in attention_configs(model) if c._attn_implementation != "eager"]
    # Some models do something of their own with each attention that they know (Falcon).
    for configs in (fused, []) if fused else ([],):
        try:
            with _computing_by_shape(model, configs):
                return model(**inputs, use_cache=False).logits
        except Exception as error:
            fault = error
    raise ModelError(
        f"{type(model).__name__} cannot be planned, for its forward depends on numbers: "
        f"{first_line(fault)}. `estimate --dry-run` lists its modules."
    ) from fault


@contextmanager
def _computing_by_shape(model: nn.Module, configs: Sequence[Any]) -> Iterator[None]:
    """Within it attention keeps what a fused one does, and tokens are routed evenly.

    Args:
        model: The model.
        configs: By which modules choose the attention that is replaced.
    """
    before = [config._attn_implementation for config in configs]
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attend)
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _route_evenly)
    try:
        for config in configs:
            config._attn_implementation = IMPLEMENTATION
        with experts_computed_by(IMPLEMENTATION, fused_experts(model).values()):
            yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


class _Attention(torch.autograd.Function):
    """Keeps what fused attention keeps: queries, keys, values and outputs."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Products that nobody looks at, for their operations to be counted.
        groups = query.shape[1] // key.shape[1]
        weights = query @ key.repeat_interleave(groups, 1).transpose(-1, -2)
        output = weights @ value.repeat_interleave(groups, 1)
        ctx.save_for_backward(query, key, value, output)
        return output


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None


def _route_evenly(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Every expert gets its share of the tokens."""
    up, down = matrices(self)
    num_experts = self.down_proj.shape[0]
    rows = -(-top_k_index.numel() // num_experts)
    outputs = []
    for expert in range(num_experts):
        hidden = hidden_states[: min(rows, len(hidden_states))]
        hidden = _times(self, expert, up, hidden)
        hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
        outputs.append(_times(self, expert, down, hidden) * top_k_weights[: len(hidden), :1])
    return torch.cat(outputs)[: len(hidden_states)].to(hidden_states.dtype)


def _times(experts: Any, expert: int, matrix: str, rows: Tensor) -> Tensor:
    weight = getattr(experts, matrix)[expert]
    output = torch.nn.functional.linear(rows, weight.T if experts.is_transposed else weight)
    return output if output.requires_grad else output.detach().requires_grad_().clone()
