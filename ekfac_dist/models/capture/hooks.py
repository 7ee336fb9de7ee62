"""Hooks that show the inputs and output-gradients of the tracked modules, counted positions only.

    forward    hook on a module       its input, when the first module that reads it is called
    backward   hook on its output     the gradient of the batch's summed losses

Parameters are frozen, so no weight gradient is ever computed. Where nothing before a module's
output requires a gradient, that output becomes the start of the graph, so that the backward stops
at the lowest tracked module.

With `LayerCheckpointing`, a layer is computed twice: the first time, the outputs of its modules are
hooked; the second time, in the backward, their inputs are observed. Where a model checkpoints by
itself, inputs are observed in the forward: the repeated one is not observed again, and the hook
that it leaves on its output never fires.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ekfac_dist.curvature.float32_products import precisely
from ekfac_dist.data.batches import NO_POSITIONS, Batch, Grid, RoutedParts, RoutedPositions
from ekfac_dist.errors import ModelError
from ekfac_dist.models.capture.checkpointing import ADVICE, LayerCall, LayerCheckpointing
from ekfac_dist.models.capture.expert_lists import in_expert_list, picked_positions
from ekfac_dist.models.capture.experts import Listener, Routed, fused_experts, listening
from ekfac_dist.models.capture.labels import LabelRule, LossGradient
from ekfac_dist.models.capture.observers import (
    CapturedGroup,
    NullObserver,
    Observer,
    SharedInputs,
    show_gradients,
    show_inputs,
)
from ekfac_dist.models.capture.packing import attending_within
from ekfac_dist.models.capture.prepare import start_graph
from ekfac_dist.models.capture.rotary import changing_embeddings, reset_frequencies
from ekfac_dist.models.capture.tasks import CAUSAL_LM, Task
from ekfac_dist.models.capture.tracked_calls import TrackedCall
from ekfac_dist.models.modules import (
    EXPERT,
    TrackedModule,
    is_quantised,
    linear_modules,
    only_input,
    same_tensor,
)
from ekfac_dist.models.sharding import is_sharded


class Capture:
    """Hooks on the tracked modules of a prepared model; removed when the context ends.

    Args:
        model: A prepared model.
        modules: The tracked modules, in model order.
        observer: What is done with inputs and output-gradients.
        dtype: What those are converted to, float32 or float64; None leaves them in the model's
            dtype, which may be lower.
        task: What the model is asked, and what its loss is.
        device: Where they are moved to; None leaves them where they are, on several devices if
            the model is spread over several.
        checkpointing: Computes layers again in the backward; None: their activations are kept.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[TrackedModule],
        observer: Observer,
        dtype: torch.dtype | None,
        task: Task = CAUSAL_LM,
        device: torch.device | None = None,
        checkpointing: LayerCheckpointing | None = None,
    ) -> None:
        self.device = device
        self.model = model
        self.task = task
        self.modules = modules
        self.observer = observer
        self.dtype = dtype
        self._stack = ExitStack()
        self._batch: Batch | None = None
        self._in_forward = False
        self._checkpointing = checkpointing
        # The first module, in model order, that reads each input.
        self._readers = {module.input: module for module in reversed(modules)}
        self._called: set[str] = set()
        self._positions_of_input: dict[str, Grid | RoutedPositions] = {}
        # Positions of the last layer of experts, by the tokens and experts that they are of.
        self._last_routed: tuple[tuple[np.ndarray | None, tuple[int, ...]], RoutedParts | None]
        self._last_routed = (None, ()), None
        self._observed: dict[str, TrackedCall] = {}  # the calls whose inputs were observed
        self._with_gradient: set[str] = set()
        # Each shared input with its version, until the last module that shares it has read it.
        self._inputs = SharedInputs[tuple[Tensor, int]](modules)
        self._scale = 1.0
        self._rotary = changing_embeddings(model)
        self._in_lists = {m.name for m in modules if in_expert_list(model, m.name)}

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Shows nothing to the observer; forwards and backwards are otherwise the same."""
        observer, self.observer = self.observer, NullObserver()
        try:
            yield
        finally:
            self.observer = observer

    def __enter__(self) -> "Capture":
        try:
            for module in self.modules:
                if module.kind != EXPERT:
                    self._hook(module)
            has_experts = self._in_lists or any(module.kind == EXPERT for module in self.modules)
            quantised = any(map(is_quantised, linear_modules(self.model).values()))
            if self._in_lists or quantised or (has_experts and is_sharded(self.model)):
                self._start_graph_below()
            self._listen()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _hook(self, module: TrackedModule) -> None:
        def hook(hooked: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            if self._batch is None:
                return None
            grid, tensor = self._batch.grid(module.name), only_input(args, kwargs)
            if module.name in self._in_lists and self._is_first_of_two:
                # Where autograd saved nothing, the graph shows no positions.
                return self._on_forward(TrackedCall.of(module, grid), tensor, output)
            positions = self._positions(module, tensor, grid)
            if not positions.num_positions:
                return None  # padding alone
            return self._on_forward(TrackedCall.of(module, positions), tensor, output)

        hooked = self.model.get_submodule(module.name)
        # Before the user's hooks, which may change the output: the gradient is that of W x + b.
        handle = hooked.register_forward_hook(hook, with_kwargs=True, prepend=True)
        self._stack.callback(handle.remove)

    def _start_graph_below(self) -> None:
        """Starts the graph at the embeddings instead of at the lowest tracked module.

        For experts in lists, because their positions are read from the graph; for quantised
        weights, because some libraries pack them differently, for good, when the input requires no
        gradient; and for sharded models with experts, because the layers of the backward, each a
        collective, must not depend on which experts a worker's tokens reach.
        """

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            return output if self._batch is None else start_graph(module, args, output)

        for module in self.model.modules():
            if isinstance(module, nn.Embedding):
                self._stack.callback(module.register_forward_hook(hook).remove)

    def _listen(self) -> None:
        tracked: dict[tuple[str, str], dict[int, TrackedModule]] = {}
        for module in self.modules:
            if module.kind == EXPERT:
                collection, expert, matrix = module.fused
                tracked.setdefault((collection, matrix), {})[expert] = module

        def listener(collection: str) -> Listener:
            def hear(routed: Routed) -> Tensor:
                modules = tracked.get((collection, routed.matrix))
                if modules is None or self._batch is None:
                    return routed.outputs
                return self._on_experts(modules, routed, self._batch.grid(collection))

            return hear

        collections = fused_experts(self.model)
        self._stack.enter_context(
            listening({experts: listener(name) for name, experts in collections.items()})
        )

    @torch.enable_grad()
    def run(self, batch: Batch, rule: LabelRule) -> LossGradient:
        """Runs one forward and backward of a batch's summed losses.

        Args:
            batch: The batch, on the model's device.
            rule: Where the labels come from.

        Returns:
            The losses, and the gradient that the backward started with.

        Raises:
            ModelError: If a module was used twice or not at all, or received no gradient, or if its
                input does not have one vector for each position of the batch.
        """
        with self._forward_of(batch):
            with self._checkpointing.active() if self._checkpointing else nullcontext():
                start, result = self.task.loss_gradient(self.model, batch, rule)
                self._in_forward = False
                self._require_all(self._everywhere - self._called, "was not used in this forward")
                if start.requires_grad:
                    self._scale = result.scale
                    with torch.autocast(start.device.type, enabled=False):  # meant for forwards
                        torch.autograd.backward(start, result.gradient)
            reached = self._called - self._in_lists
            reached |= self._everywhere | {*self._positions_of_input}
            self._require_all(
                reached - self._with_gradient,
                "received no gradient: its output does not reach the loss through differentiable "
                "operations (reentrant gradient checkpointing does this; set use_reentrant=False)",
            )
            return result

    @contextmanager
    def _forward_of(self, batch: Batch) -> Iterator[None]:
        """While it lasts, the hooks see a batch, whose forward comes first."""
        self._batch = batch
        self._called.clear()
        self._positions_of_input.clear()
        self._observed.clear()
        self._with_gradient.clear()
        self._in_forward = True
        reset_frequencies(self._rotary)
        try:
            # Eager: a compiled forward would compile the hooks, too.
            with (
                torch.compiler.set_stance("force_eager"),
                attending_within(self.model, batch),
            ):
                yield
        finally:
            self._in_forward = False
            self._inputs.clear()
            self._batch = None

    @property
    def _everywhere(self) -> set[str]:
        """The modules that every forward uses: all but experts."""
        return {m.name for m in self.modules if m.kind != EXPERT} - self._in_lists

    def _require_all(self, missing: set[str], fault: str) -> None:
        for module in self.modules:
            if module.name in missing:
                raise ModelError(f"Module {module.name} {fault}. Leave it out with model.modules.")

    def _positions(
        self, module: TrackedModule, tensor: Tensor, grid: Grid
    ) -> Grid | RoutedPositions:
        """The positions of a module's input: all of the batch's, or those routed to an expert."""
        if module.name not in self._in_lists:
            return grid
        flat_positions = picked_positions(tensor, grid.size)
        if flat_positions is not None:
            parts = grid.routed(flat_positions.cpu().numpy(), tensor.device)
            return parts.of_expert.get(0, NO_POSITIONS)
        if tensor.numel() == grid.size * module.num_inputs:
            return grid
        raise ModelError(
            f"Module {module.name} has {tensor.shape[:-1].numel()} rows for a batch of "
            f"{grid.shape[0]} × {grid.shape[1]} positions, and how they were picked cannot be seen "
            "(it can where it was by tokens[index]). Leave it out with model.modules."
        )

    def _on_experts(self, modules: dict[int, TrackedModule], routed: Routed, grid: Grid) -> Tensor:
        if routed.num_tokens != grid.size:
            name = next(iter(modules.values())).name
            raise ModelError(
                f"Module {name} has {routed.num_tokens} tokens to choose from for a batch "
                f"of {grid.shape[0]} × {grid.shape[1]} positions; which is which position cannot "
                "be told. Leave it out with model.modules."
            )
        key = routed.tokens, tuple(modules)
        (tokens, experts), parts = self._last_routed
        if tokens is not routed.tokens or experts != key[1] or parts is None:
            # Else they are of the experts' first matrices.
            device = routed.inputs.device
            parts = grid.routed(routed.tokens, device, routed.sizes, key[1])
            self._last_routed = key, parts
        if not parts.of_expert:
            return routed.outputs  # padding alone
        call = TrackedCall.of_experts(modules, parts, routed.sizes.tolist())
        output = self._on_forward(call, routed.inputs, routed.outputs)
        return routed.outputs if output is None else output

    @property
    def _layer_call(self) -> LayerCall | None:
        """The call of a checkpointed layer that is being computed."""
        return None if self._checkpointing is None else self._checkpointing.call

    @property
    def _is_first_of_two(self) -> bool:
        """Whether a layer is computed in the forward that is computed again in the backward."""
        return self._layer_call is not None and not self._layer_call.is_repeated

    def _on_forward(self, call: TrackedCall, tensor: Tensor, output: Tensor) -> Tensor | None:
        """Observes the input, hooks the output; gives the output to go on with (None: as it is)."""
        layer_call = self._layer_call
        if self._in_forward:
            for module in call.modules:
                self._require_first_use(module)
        if layer_call.is_repeated if layer_call is not None else self._in_forward:
            self._observe_input(call, tensor)
        if not torch.is_grad_enabled():
            return None
        if not output.requires_grad:
            # A clone: an in-place activation may not overwrite a leaf of the graph.
            output = output.detach().requires_grad_().clone()
        elif output._is_view():
            # An in-place activation would cut a view, and the hook on it, out of the graph.
            output = output.clone()

        if layer_call is None or not layer_call.is_repeated:
            output = self._watch(call, output, layer_call)
        return output

    def _watch(self, call: TrackedCall, output: Tensor, layer_call: LayerCall | None) -> Tensor:
        """Observes the gradient of an output once the backward has reached it.

        Returns:
            The output to go on with.
        """

        def on_gradient(gradient: Tensor) -> None:
            if layer_call is not None:
                layer_call.repeat()
            self._observe_gradient(call, gradient)

        output.register_hook(on_gradient)
        return output

    def _require_first_use(self, module: TrackedModule) -> None:
        if module.name in self._called:
            raise ModelError(
                f"Module {module.name} is used twice in one forward; its uses share one weight and "
                "cannot be told apart. Leave it out with model.modules."
            )
        self._called.add(module.name)

    def _observe_input(self, call: TrackedCall, tensor: Tensor) -> None:
        self._observed[call.name] = call
        for module, positions in zip(call.modules, call.positions, strict=True):
            self._positions_of_input[module.name] = positions
        versioned = (tensor, tensor._version)
        if call.modules[0] not in self._inputs:  # the first modules that read it
            for module in call.modules:
                self._inputs.put(module, versioned)
            size = call.modules[0].num_inputs
            with torch.no_grad(), precisely(self.device or tensor.device):
                acts_Mi = self._captured(call, "input", tensor.detach(), size)
                readers = [self._readers[module.input] for module in call.modules]
                show_inputs(self.observer, CapturedGroup(readers, acts_Mi, call.positions))
        for module in call.modules:
            if not same_tensor(self._inputs.take(module), versioned):
                raise ModelError(
                    f"Module {module.name} shared its input with another when the model was "
                    "traced, and does not now; its forward depends on the data. Leave it out with "
                    "model.modules."
                )

    @torch.no_grad()
    def _observe_gradient(self, call: TrackedCall, gradient: Tensor) -> None:
        # Positions of experts in lists are known only once a layer is computed again.
        observed = self._observed.get(call.name)
        if observed is None and call.name in self._in_lists:
            return  # padding alone
        if observed is None:
            raise ModelError(
                f"Module {call.name} was not used when its layer was computed again. {ADVICE}"
            )
        for module in observed.modules:
            if module.name in self._with_gradient:
                raise ModelError(f"Module {module.name} received two gradients in one backward.")
            self._with_gradient.add(module.name)
        with precisely(self.device or gradient.device):
            size = observed.modules[0].num_outputs
            grads_MO = self._captured(observed, "output", gradient, size)
            if self._scale != 1.0:
                grads_MO = grads_MO.to(self.dtype or torch.float32) / self._scale
            group = CapturedGroup(observed.modules, grads_MO, observed.positions)
            show_gradients(self.observer, group)

    def _captured(self, call: TrackedCall, side: str, tensor: Tensor, size: int) -> Tensor:
        """A call's input or output-gradient at counted positions [M, size]."""
        rows, positions = tensor.reshape(-1, size), call.positions[0]
        if isinstance(positions, Grid) and rows.shape[0] != positions.size:
            raise ModelError(
                f"Module {call.name} has {rows.shape[0]} {side} rows for a batch of "
                f"{positions.shape[0]} × {positions.shape[1]} positions; which row is which "
                "position cannot be told. Leave it out with model.modules."
            )
        if call.real is not None:
            rows = rows[call.real.to(rows.device)]
        return rows.to(self.device, self.dtype or rows.dtype)
