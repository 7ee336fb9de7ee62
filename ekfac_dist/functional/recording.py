"""Observes linear maps while `func` runs: their inputs, outputs and gradient edges.

A cache holds tensors only. To find the parameters that a pair belongs to, every linear map is
observed while it runs, and a pair is matched to the call that returned its hidden vector. The
output's gradient edge (its place in the autograd graph) is read at once, before a later operation,
such as an activation in place, can change it.

Every module that runs is put into evaluation mode first, so that dropout is off.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from transformers.pytorch_utils import Conv1D

from ekfac_dist.curvature.float32_products import precisely
from ekfac_dist.errors import ModelError
from ekfac_dist.models.modules import linear_modules, only_input


def is_in_transform(tensor: Tensor) -> bool:
    """Whether a tensor was made inside a transform of `torch.func` and is invalid after it."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


@torch.no_grad()
def maps_linearly(module: Any, inputs: Tensor, output: Tensor) -> bool:
    """Whether a linear map's output is its weight times its input plus its bias, to rounding."""
    weight_OI = module.weight.mT if isinstance(module, Conv1D) else module.weight
    shape = (output.shape[-1], inputs.shape[-1])
    if weight_OI.shape != shape or not weight_OI.is_floating_point():
        return False
    # Autocast converts an input whose dtype differs from the weight's.
    dtype = torch.promote_types(inputs.dtype, weight_OI.dtype)
    with precisely(inputs.device):
        expected = inputs.to(dtype) @ weight_OI.to(dtype).T
        if module.bias is not None:
            expected = expected + module.bias
    difference = (expected - output).norm()
    tolerance = relative_tolerance(inputs, weight_OI, output)
    return not bool(difference > tolerance * (expected.norm() + output.norm()))


def relative_tolerance(*tensors: Tensor) -> float:
    """The square root of the largest machine epsilon of some tensors' dtypes.

    On a GPU it is at least that of 10 mantissa bits, the precision of TF32.
    """
    eps = [torch.finfo(tensor.dtype).eps for tensor in tensors]
    return max(*eps, 2.0**-10 if tensors[0].is_cuda else 0.0) ** 0.5


@dataclass(frozen=True)
class LinearCall:
    """One observed call of a linear map.

    Attributes:
        module: The linear map.
        input: Its input [..., I], and the version counter of that tensor at the call.
        output: Its output [..., O].
        edge: The gradient edge of the output; None if it takes no gradient.
        weight: The weight used in the call. With flat parameters it is not the module's own one.
        is_linear: Whether the output is W a + b; None if that was not checked.
    """

    module: nn.Module
    input: tuple[Tensor, int]
    output: Tensor
    edge: GradientEdge | None
    weight: Tensor
    is_linear: bool | None


class Recording:
    """Observes linear maps while `ihvp_at_x_ekfac` fits.

    Attributes:
        owners: The module whose decorated forward fills a cache, by the cache's `id`.
        linear_calls: Every call of a linear map within the last call of `func`, in order.
    """

    def __init__(self) -> None:
        self.owners: dict[int, nn.Module] = {}
        self.linear_calls: list[LinearCall] = []
        self._is_open = False
        self._checks_linearity = False
        self._in_training: dict[int, nn.Module] = {}

    @contextmanager
    def evaluating(self, models: Iterable[nn.Module]) -> Iterator[None]:
        """Context in which every module that runs is in evaluation mode; restores modes at its end.

        Args:
            models: Models known to run, which are put into evaluation mode at once.
        """
        handle = nn.modules.module.register_module_forward_pre_hook(self._evaluate)
        try:
            for model in models:
                for module in model.modules():
                    self._evaluate(module)
            yield
        finally:
            handle.remove()
            for module in self._in_training.values():
                module.training = True
            self._in_training.clear()

    def _evaluate(self, module: nn.Module, args: Any = ()) -> None:
        if module.training:
            self._in_training.setdefault(id(module), module)
            module.training = False

    @contextmanager
    def call(self, *, checks_linearity: bool) -> Iterator[None]:
        """Context of one call of `func`, whose linear maps are listed in `linear_calls`.

        Forwards after its end, such as those of gradient checkpointing, are not listed.

        Args:
            checks_linearity: Whether to check that outputs are W a + b, which costs as much as the
                linear maps themselves.
        """
        self.linear_calls.clear()
        self._is_open = True
        self._checks_linearity = checks_linearity
        try:
            yield
        finally:
            self._is_open = False

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Context with hooks on every linear map inside a module, which observe its calls."""
        handles = []
        try:
            for linear in linear_modules(module).values():
                # Before all other hooks, which may replace the linear map's output.
                handles.append(
                    linear.register_forward_hook(self._observe_hook, with_kwargs=True, prepend=True)
                )
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def filling(self, module: nn.Module, cache: object) -> Iterator[None]:
        """Context of a module's decorated forward, which fills a cache."""
        self.owners[id(cache)] = module
        with self.watching(module):
            yield

    def observe(self, module: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        """Records one call of a linear map.

        Args:
            module: The linear map.
            inputs: Its input [..., I].
            output: Its output [..., O].

        Returns:
            The output that the forward has to continue with. It is a new tensor where the output
            takes no gradient yet (it becomes a leaf of the graph, so parameters may be frozen), or
            is a view, which an activation in place would cut out of the graph.

        Raises:
            ModelError: If the call is inside a transform of `torch.func`.
        """
        if is_in_transform(output):
            raise ModelError(
                "func calls the model inside a transform of torch.func (vmap, grad, …), where "
                "hidden vectors cannot be recorded; call it on the whole batch instead."
            )
        edge = None
        if torch.is_grad_enabled():
            if not output.requires_grad:
                output = output.detach().requires_grad_().clone()
            elif output._is_view():
                output = output.clone()
            edge = get_gradient_edge(output)
        if self._is_open and not any(call.output is output for call in self.linear_calls):
            linear: Any = module
            is_linear = maps_linearly(linear, inputs, output) if self._checks_linearity else None
            versioned = (inputs, inputs._version)
            self.linear_calls.append(
                LinearCall(module, versioned, output, edge, linear.weight, is_linear)
            )
        return output

    def call_with_output(self, hidden: Tensor) -> LinearCall | None:
        """The call that returned a hidden vector; None if no linear map did."""
        return next((call for call in self.linear_calls if call.output is hidden), None)

    def num_calls(self, module: nn.Module) -> int:
        """How many calls of a linear map take gradients, within the last call of `func`."""
        return sum(call.module is module and call.edge is not None for call in self.linear_calls)

    def _observe_hook(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        return self.observe(module, only_input(args, kwargs), output)
