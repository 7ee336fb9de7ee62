"""A model without its weights: its modules, and the memory and operations of a step.

The model is built from its configuration on the meta device, where a forward computes shapes only.
They show which linear maps read the same tensor, and what autograd saves for the backward. What
only values show, such as which modules mix positions, is inferred from names here; a run determines
it with the real model.
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
from ekfac_dist.models.capture.checkpointing import LayerCheckpointing
from ekfac_dist.models.capture.chunked_head import logit_bytes
from ekfac_dist.models.capture.experts import experts_computed_by, fused_experts, matrices
from ekfac_dist.models.capture.labels import GRADIENT_SCALES
from ekfac_dist.models.capture.packing import attention_configs
from ekfac_dist.models.capture.saved_tensors import StepMemory, noting_saved_tensors
from ekfac_dist.models.find.discovery import Discovery, discovered
from ekfac_dist.models.find.trace import Trace, few_tokens
from ekfac_dist.models.load.pretrained import without_weights
from ekfac_dist.models.modules import EXPERT, TrackedModule, linear_modules, only_input
from ekfac_dist.models.sharding import layers

IMPLEMENTATION = "ekfac_dist_meta_device"


@dataclass(frozen=True, kw_only=True)
class StepEstimate(StepMemory):
    """Memory and operations of one step's forward and backward, without running sums.

    Attributes:
        forward: Operations of the forward; a multiply-add counts as two.
        below: {module: operations of the forward before it}.
        repeated: (operations of the forward before it, its own) for each call of a layer that is
            computed again in the backward.
    """

    forward: int
    below: Mapping[str, int]
    repeated: Sequence[tuple[int, int]] = ()

    def operations(self, modules: Sequence[TrackedModule]) -> int:
        """Operations of the forward, and of the backward down to the lowest of the modules."""
        lowest = min(self.below.get(_called_module(module), 0) for module in modules)
        repeated = sum(own for before, own in self.repeated if before + own >= lowest)
        return 2 * self.forward - lowest + repeated


def model_without_weights(config: ModelConfig) -> nn.Module:
    """The configured model on the meta device, frozen; only config.json is read.

    Raises:
        ModelError: If there is no such causal language model, or it cannot be built so.
    """
    for field in ("adapter", "quantization"):
        if getattr(config, field) is not None:
            raise ModelError(
                f"model.{field} is {getattr(config, field)!r}, which cannot be planned; plan the "
                "model without it."
            )
    return without_weights(config)


def discover_by_shape(model: nn.Module, globs: Sequence[str] | None) -> Discovery:
    """The modules that `discover` would track, as far as shapes and names show.

    Args:
        model: A model on the meta device.
        globs: Patterns of module names; None for every MLP linear.

    Raises:
        ModelError: As `discover`; or if the model's forward depends on values.
    """
    experts = fused_experts(model)
    traced = Trace(
        {name: [] for name in [*linear_modules(model), *experts]}, observable_experts=set(experts)
    )

    def recorder(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            traced.inputs[name].append((only_input(args, kwargs), 0))

        return hook

    with ExitStack() as stack:
        for name in traced.inputs:
            module = model.get_submodule(name)
            handle = module.register_forward_pre_hook(recorder(name), with_kwargs=True)
            stack.callback(handle.remove)
        _logits_by_shape(model, 2, 5)
    return discovered(model, globs, traced, few_tokens(model, torch.device("cpu")))


def estimate_step(
    model: nn.Module,
    modules: Sequence[TrackedModule],
    num_sequences: int,
    num_tokens: int,
    *,
    checkpoints: bool = False,
) -> StepEstimate:
    """Memory and operations of a step, whose graph begins at the lowest tracked module.

    Args:
        model: A model on the meta device.
        modules: The tracked modules.
        num_sequences: B.
        num_tokens: T.
        checkpoints: Whether layers keep their inputs alone, and are computed again.
    """
    counter = FlopCounterMode(display=False)
    below: dict[str, int] = {}

    def start_graph(name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            below.setdefault(name, counter.get_total_flops())
            return None if output.requires_grad else output.detach().requires_grad_().clone()

        return hook

    routed: dict[str, float] = {}

    def routed_fraction(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            hidden, expert_indices = args[:2]
            routed[name] = expert_indices.numel() / (
                hidden.shape[0] * len(module.get_parameter("down_proj"))
            )

        return hook

    with ExitStack() as stack:
        for name in dict.fromkeys(map(_called_module, modules)):
            hook = start_graph(name)
            handle = model.get_submodule(name).register_forward_hook(hook, prepend=True)
            stack.callback(handle.remove)
        for name, experts in fused_experts(model).items():
            stack.callback(experts.register_forward_hook(routed_fraction(name)).remove)
        saved = stack.enter_context(noting_saved_tensors(model))
        repeated = stack.enter_context(_counting_layers(model, counter)) if checkpoints else []
        if checkpoints:
            stack.enter_context(LayerCheckpointing(model, modules, saved).active())
        stack.enter_context(counter)
        logits = _logits_by_shape(model, num_sequences, num_tokens)
    held_logits = logit_bytes(model, modules, logits)
    is_scaled = logits.dtype in GRADIENT_SCALES
    return StepEstimate(
        activation_bytes=saved.num_bytes,
        logit_bytes=held_logits,
        are_logits_whole=held_logits == logits.nbytes,
        itemsize=logits.dtype.itemsize,
        checkpoints=checkpoints,
        forward=counter.get_total_flops(),
        below=below,
        repeated=repeated,
        gradient_itemsize=torch.float32.itemsize if is_scaled else logits.dtype.itemsize,
        # All experts of a collection see the same number here.
        routed={m.name: routed.get(m.fused[0], 1.0) for m in modules if m.kind == EXPERT},
    )


@contextmanager
def _counting_layers(model: nn.Module, counter: FlopCounterMode) -> Iterator[list[tuple[int, int]]]:
    """While it lasts, lists (operations before it, its own) for each call of a layer."""
    counts: list[tuple[int, int]] = []
    before: list[int] = []

    def enter(module: nn.Module, args: Any) -> None:
        before.append(counter.get_total_flops())

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        start = before.pop()
        counts.append((start, counter.get_total_flops() - start))

    with ExitStack() as stack:
        for layer in layers(model).values():
            stack.callback(layer.register_forward_pre_hook(enter).remove)
            stack.callback(layer.register_forward_hook(leave).remove)
        yield counts


def _called_module(module: TrackedModule) -> str:
    """Name of the module that a forward calls: for an expert, that of its collection."""
    return module.fused[0] if module.kind == EXPERT else module.name


@torch.enable_grad()
def _logits_by_shape(model: nn.Module, num_sequences: int, num_tokens: int) -> Tensor:
    """Logits [B, T, V] without values, of tokens without values."""
    tokens = torch.zeros(num_sequences, num_tokens, dtype=torch.int64, device="meta")
    # With a mask, so that the model does not search the tokens for padding.
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    fused = [c for c in attention_configs(model) if c._attn_implementation != "eager"]
    # Some models accept only the attention implementations that they know (Falcon).
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
    """While it lasts, attention and experts compute on the meta device.

    Attention saves what fused attention saves, and tokens are routed evenly to experts.

    Args:
        model: The model.
        configs: The configurations of the attention to replace.
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
    """Saves what fused attention saves: queries, keys, values and outputs."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # These products are computed for their operations to be counted.
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
    """Attention [B, T, H, D] from queries, keys and values [B, H, T, D]."""
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None


def _route_evenly(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Mixture of experts in which every expert gets the same number of tokens."""
    up, down = matrices(self)
    num_experts = self.down_proj.shape[0]
    tokens_per_expert = -(-top_k_index.numel() // num_experts)
    outputs = []
    for expert in range(num_experts):
        hidden = hidden_states[: min(tokens_per_expert, len(hidden_states))]
        hidden = _multiply(self, expert, up, hidden)
        hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
        outputs.append(_multiply(self, expert, down, hidden) * top_k_weights[: len(hidden), :1])
    return torch.cat(outputs)[: len(hidden_states)].to(hidden_states.dtype)


def _multiply(experts: Any, expert: int, matrix: str, inputs: Tensor) -> Tensor:
    """One expert's matrix times its inputs; starts the graph if none has begun."""
    weight = getattr(experts, matrix)[expert]
    output = torch.nn.functional.linear(inputs, weight.T if experts.is_transposed else weight)
    return output if output.requires_grad else output.detach().requires_grad_().clone()
