"""What passes through the tracked modules: inputs and output-gradients, real positions only.

Parameters are frozen, so no weight gradient is ever computed. The output of a module below which
nothing requires a gradient becomes the start of the graph, so the backward stops at the lowest
tracked module. An input is seen in the forward, an output-gradient in the backward, each once: a
forward that gradient checkpointing repeats inside the backward is not looked at again, and the hook
that it leaves on a repeated output never fires.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ekfac_dist.data.batches import Batch, CapturedPositions, Grid
from ekfac_dist.errors import ModelError
from ekfac_dist.models.capture.expert_lists import in_expert_list, picked_positions
from ekfac_dist.models.capture.experts import Listener, Routed, fused_experts, listening
from ekfac_dist.models.capture.labels import LabelRule, LossGradient
from ekfac_dist.models.capture.packing import attending_within
from ekfac_dist.models.capture.rotary import (
    changing_embeddings,
    frequencies_kept,
    reset_frequencies,
)
from ekfac_dist.models.capture.tasks import CAUSAL_LM, Task
from ekfac_dist.models.modules import (
    EXPERT,
    TrackedModule,
    is_quantised,
    linear_modules,
    only_input,
    require_usable,
    same_tensor,
)
from ekfac_dist.models.sharding import is_sharded, reshard

_CHUNKS = "chunk_size_feed_forward"
_NOISE = re.compile("drop|jitter|noise")  # names of what makes two forwards differ


class Observer(Protocol):
    """What is done with captured rows: a batch's real positions, sequence by sequence.

    An expert's rows are of the tokens that were routed to it; where there is none, nothing is said.
    """

    def on_input(self, module: TrackedModule, rows_Mi: Tensor, batch: CapturedPositions) -> None:
        """Takes an input, without the bias coordinate, from the first module that reads it."""

    def on_gradient(self, module: TrackedModule, rows_MO: Tensor, batch: CapturedPositions) -> None:
        """Takes the gradient of the summed loss with respect to a module's output."""


class NullObserver:
    """The observer that does nothing with what passes through."""

    def on_input(self, module: TrackedModule, rows_Mi: Tensor, batch: CapturedPositions) -> None:
        """Does nothing."""

    def on_gradient(self, module: TrackedModule, rows_MO: Tensor, batch: CapturedPositions) -> None:
        """Does nothing."""


@contextmanager
def prepared(model: nn.Module) -> Iterator[None]:
    """Freezes a model's parameters, turns all noise off, and restores both on the way out.

    Modules of a model in training mode keep their mode where gradient checkpointing needs it, if
    they have no noise of their own. MLPs that are applied in chunks of positions are applied to all
    at once: the same numbers, and each module is used once.
    """
    reshard(model)  # what is gathered shows neither how it is sharded nor its flags
    require_usable(model)
    with frequencies_kept(model), _frozen(model):
        yield


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Freezes parameters and turns noise off; restores both."""
    needed = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    chunked: list[Any] = [m for m in model.modules() if getattr(m, _CHUNKS, 0)]
    chunks = [getattr(module, _CHUNKS) for module in chunked]
    try:
        for parameter, _ in needed:
            parameter.requires_grad_(False)
        for module in chunked:
            setattr(module, _CHUNKS, 0)
        checkpointing = _checkpointing(model) if model.training else []
        model.eval()
        for module in checkpointing:
            module.training = True
        yield
    finally:
        reshard(model)
        for parameter, flag in needed:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
        for module, size in zip(chunked, chunks, strict=True):
            setattr(module, _CHUNKS, size)


def start_graph(module: nn.Module, args: Any, output: Any) -> Any:
    """A forward hook by which the graph begins at a module's output, where none has begun."""
    if not isinstance(output, Tensor) or output.requires_grad:
        return output
    return output.detach().requires_grad_().clone()


def _checkpointing(model: nn.Module) -> list[nn.Module]:
    """Modules that have to be in training mode for their gradient checkpointing to work.

    None if one of them has noise of its own: its modules are in evaluation mode, but it is not. Nor
    where experts are in lists: what is read of the graph would be computed again.
    """
    if any(in_expert_list(model, name) for name in linear_modules(model)):
        return []
    found = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for module in found:
        settings = getattr(module, "config", None)
        named = vars(module) | (vars(settings) if settings is not None else {})
        noises = [value for name, value in named.items() if _NOISE.search(name)]
        if any(isinstance(value, (int, float)) and value > 0 for value in noises):
            return []
    return found


@contextmanager
def precisely(device: torch.device) -> Iterator[None]:
    """Computes as written: neither autocast nor a fast float32 of the caller's reaches the sums."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


class Capture:
    """Hooks on the tracked modules of a prepared model, for as long as the context lasts.

    Args:
        model: A prepared model.
        modules: The tracked modules, in model order.
        observer: What is done with the rows.
        dtype: What rows are converted to, float32 or float64; None: they stay as the model has
            them, which may be lower.
        task: What is asked of the model.
        device: Where rows are wanted, if the model is spread over several; None: where they are.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[TrackedModule],
        observer: Observer,
        dtype: torch.dtype | None,
        task: Task = CAUSAL_LM,
        device: torch.device | None = None,
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
        self._with_input: set[str] = set()
        self._with_gradient: set[str] = set()
        self._shared: dict[str, tuple[Tensor, int]] = {}
        self._readers = Counter(module.input for module in modules)
        self._readers_left: Counter[str] = Counter()
        self._scale = 1.0
        self._rotary = changing_embeddings(model)
        self._in_lists = {m.name for m in modules if in_expert_list(model, m.name)}

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Within it what passes through is shown to nobody; all else is done as ever."""
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
            routed = self._in_lists or any(module.kind == EXPERT for module in self.modules)
            quantised = any(map(is_quantised, linear_modules(self.model).values()))
            if self._in_lists or quantised or (routed and is_sharded(self.model)):
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
            which = self._routed(module, tensor, grid)
            if not which.num_positions:
                return None  # padding alone
            return self._on_forward(module, tensor, output, which)

        hooked = self.model.get_submodule(module.name)
        # Before other hooks, which may change the output: the gradient is of what is computed here.
        handle = hooked.register_forward_hook(hook, with_kwargs=True, prepend=True)
        self._stack.callback(handle.remove)

    def _start_graph_below(self) -> None:
        """Starts the graph at the embeddings.

        Which rows an expert in a list was given is read off it; a quantised weight may be packed in
        another way, for good, when its input takes no gradient; and the layers that a sharded
        model's backward goes through must not depend on the experts that a worker's tokens reach.
        """

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            return output if self._batch is None else start_graph(module, args, output)

        for module in self.model.modules():
            if isinstance(module, nn.Embedding):
                self._stack.callback(module.register_forward_hook(hook).remove)

    def _listen(self) -> None:
        tracked = {module.fused: module for module in self.modules if module.kind == EXPERT}

        def listener(collection: str) -> Listener:
            def hear(routed: Routed) -> Tensor:
                module = tracked.get((collection, routed.expert, routed.matrix))
                if module is None or self._batch is None:
                    return routed.outputs
                return self._on_expert(module, routed, self._batch.grid(module.name))

            return hear

        collections = fused_experts(self.model)
        self._stack.enter_context(
            listening({experts: listener(name) for name, experts in collections.items()})
        )

    @torch.enable_grad()
    def run(self, batch: Batch, rule: LabelRule) -> LossGradient:
        """One forward and backward of a batch's summed losses.

        Args:
            batch: The batch, on the model's device.
            rule: Where the labels come from.

        Raises:
            ModelError: A module was used twice, or not at all, or no gradient reached it; or rows
                do not match the batch's positions.
        """
        self._batch = batch
        self._with_input.clear()
        self._with_gradient.clear()
        self._in_forward = True
        self._readers_left = self._readers.copy()
        reset_frequencies(self._rotary)
        try:
            # As written: a compiled forward would compile what looks at it, too.
            with (
                torch.compiler.set_stance("force_eager"),
                attending_within(self.model, batch),
            ):
                start, result = self.task.loss_gradient(self.model, batch, rule)
                self._in_forward = False
                everywhere = {module.name for module in self.modules if module.kind != EXPERT}
                everywhere -= self._in_lists
                self._require_all(everywhere - self._with_input, "was not used in this forward")
                if start.requires_grad:
                    self._scale = result.scale
                    with torch.autocast(start.device.type, enabled=False):  # it is for forwards
                        torch.autograd.backward(start, result.gradient)
            self._require_all(
                self._with_input - self._with_gradient | everywhere - self._with_gradient,
                "received no gradient: its output does not reach the loss through differentiable "
                "operations (reentrant gradient checkpointing does this; set use_reentrant=False)",
            )
            return result
        finally:
            self._in_forward = False
            self._shared.clear()
            self._batch = None

    def _require_all(self, missing: set[str], fault: str) -> None:
        for module in self.modules:
            if module.name in missing:
                raise ModelError(f"Module {module.name} {fault}. Leave it out with model.modules.")

    def _routed(self, module: TrackedModule, tensor: Tensor, grid: Grid) -> CapturedPositions:
        """The rows that a module is called with: every position, or an expert's own tokens."""
        if module.name not in self._in_lists:
            return grid
        positions = picked_positions(tensor, grid.size)
        if positions is not None:
            return grid.routed(positions)
        if tensor.numel() == grid.size * module.num_inputs:
            return grid
        raise ModelError(
            f"Module {module.name} has {tensor.shape[:-1].numel()} rows for a batch of "
            f"{grid.shape[0]} × {grid.shape[1]} positions, and how they were picked cannot be seen "
            "(it can where it was by tokens[index]). Leave it out with model.modules."
        )

    def _on_expert(self, module: TrackedModule, routed: Routed, grid: Grid) -> Tensor:
        if routed.num_tokens != grid.size:
            raise ModelError(
                f"Module {module.name} has {routed.num_tokens} tokens to choose from for a batch "
                f"of {grid.shape[0]} × {grid.shape[1]} positions; which is which position cannot "
                "be told. Leave it out with model.modules."
            )
        rows = grid.routed(routed.tokens)
        if not rows.num_positions:
            return routed.outputs  # padding alone
        found = self._on_forward(module, routed.inputs, routed.outputs, rows)
        return routed.outputs if found is None else found

    def _on_forward(
        self, module: TrackedModule, tensor: Tensor, output: Tensor, which: CapturedPositions
    ) -> Tensor | None:
        if self._in_forward:
            self._see_input(module, tensor, which)
        if not torch.is_grad_enabled():
            return None
        if not output.requires_grad:
            # A clone, since an activation in place may not overwrite a leaf of the graph.
            output = output.detach().requires_grad_().clone()
        elif output._is_view():
            # An activation in place would cut a view, and the hook on it, out of the graph.
            output = output.clone()

        def on_gradient(gradient: Tensor) -> None:
            self._see_gradient(module, gradient, which)

        output.register_hook(on_gradient)
        return output

    def _see_input(self, module: TrackedModule, tensor: Tensor, which: CapturedPositions) -> None:
        if module.name in self._with_input:
            raise ModelError(
                f"Module {module.name} is used twice in one forward; its uses share one weight and "
                "cannot be told apart. Leave it out with model.modules."
            )
        self._with_input.add(module.name)
        shared = self._shared.get(module.input)
        if self._readers_left[module.input] == self._readers[module.input]:  # the first to read it
            # Held only until the last module that shares it has read it.
            self._shared[module.input] = (tensor, tensor._version)
            with torch.no_grad(), precisely(self.device or tensor.device):
                rows = self._rows(module, "input", tensor.detach(), module.num_inputs, which)
                self.observer.on_input(module, rows, which)
        elif shared is None or not same_tensor(shared, (tensor, tensor._version)):
            raise ModelError(
                f"Module {module.name} shared its input with another when the model was traced, "
                "and does not now; its forward depends on the data. Leave it out with "
                "model.modules."
            )
        self._readers_left[module.input] -= 1
        if not self._readers_left[module.input]:
            self._shared.pop(module.input, None)

    @torch.no_grad()
    def _see_gradient(
        self, module: TrackedModule, gradient: Tensor, which: CapturedPositions
    ) -> None:
        if module.name in self._with_gradient:
            raise ModelError(f"Module {module.name} received two gradients in one backward.")
        self._with_gradient.add(module.name)
        with precisely(self.device or gradient.device):
            rows = self._rows(module, "output", gradient, module.num_outputs, which)
            if self._scale != 1.0:
                rows = rows.to(self.dtype or torch.float32) / self._scale
            self.observer.on_gradient(module, rows, which)

    def _rows(
        self, module: TrackedModule, side: str, tensor: Tensor, size: int, which: CapturedPositions
    ) -> Tensor:
        rows = tensor.reshape(-1, size)
        if isinstance(which, Grid) and rows.shape[0] != which.size:
            raise ModelError(
                f"Module {module.name} has {rows.shape[0]} {side} rows for a batch of "
                f"{which.shape[0]} × {which.shape[1]} positions; which row is which position "
                "cannot be told. Leave it out with model.modules."
            )
        if which.real is not None:
            rows = rows[which.real.to(rows.device)]
        return rows.to(self.device, self.dtype or rows.dtype)
