"""What a call of `func` did: every linear map's input, output, and place in the graph of gradients.

A cache has tensors only. Which parameters they belong to is known because the linear maps were
looked at while they ran: a pair is the call whose output it has. The place in the graph is noted
before anything that comes after, an activation in place included, can move it.

Every module that a call runs is put into evaluation mode first, so that nothing drops out.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from transformers.pytorch_utils import Conv1D

from ekfac_dist.errors import ModelError
from ekfac_dist.models.capture.prepare import precisely
from ekfac_dist.models.modules import linear_modules, only_input


def lives_in_a_transform(tensor: Tensor) -> bool:
    """Whether a tensor is one of `torch.func`'s own, which end with its transform."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


@torch.no_grad()
def maps_linearly(module: Any, given: Tensor, output: Tensor) -> bool:
    """Whether a linear map's output is its weight times its input, plus its bias."""
    weight_OI = module.weight.mT if isinstance(module, Conv1D) else module.weight
    shape = (output.shape[-1], given.shape[-1])
    if weight_OI.shape != shape or not weight_OI.is_floating_point():
        return False
    # An input of another dtype than the weight has been converted, as by autocast.
    dtype = torch.promote_types(given.dtype, weight_OI.dtype)
    with precisely(given.device):
        mapped = given.to(dtype) @ weight_OI.to(dtype).T
        if module.bias is not None:
            mapped = mapped + module.bias
    difference = (mapped - output).norm()
    allowed = rounding(given, weight_OI, output) * (mapped.norm() + output.norm())
    return not bool(difference > allowed)


def rounding(*tensors: Tensor) -> float:
    """The square root of the coarsest rounding that went in; a GPU may multiply more coarsely."""
    eps = [torch.finfo(tensor.dtype).eps for tensor in tensors]
    return max(*eps, 2.0**-10 if tensors[0].is_cuda else 0.0) ** 0.5


@dataclass(frozen=True)
class Use:
    """One call of a linear map.

    Attributes:
        module: The linear map.
        input: What it was called with, and that tensor's version then.
        output: What it gave.
        edge: Where the output's gradient arrives; None if it takes none.
        weight: The weight that it had: a function of flat parameters has others than the module's.
        is_linear: Whether the output was seen to be W a + b; None if it was not looked at.
    """

    module: nn.Module
    input: tuple[Tensor, int]
    output: Tensor
    edge: GradientEdge | None
    weight: Tensor
    is_linear: bool | None


class Recording:
    """Looks at linear maps while `ihvp_at_x_ekfac` fits.

    Attributes:
        owners: By cache, the module whose decorated forward filled it.
        uses: Every call of a linear map within the last call of `func`, in order.
    """

    def __init__(self) -> None:
        self.owners: dict[int, nn.Module] = {}
        self.uses: list[Use] = []
        self._open = False
        self._closely = False
        self._modes: dict[int, tuple[nn.Module, bool]] = {}

    @contextmanager
    def evaluating(self, known: Iterable[nn.Module]) -> Iterator[None]:
        """Within it every module that runs is in evaluation mode; after it all are as they were.

        Args:
            known: Models that will run; they are put into evaluation mode at once.
        """
        handle = nn.modules.module.register_module_forward_pre_hook(self._evaluate)
        try:
            for model in known:
                for part in model.modules():
                    self._evaluate(part)
            yield
        finally:
            handle.remove()
            for part, mode in self._modes.values():
                part.training = mode
            self._modes.clear()

    def _evaluate(self, module: nn.Module, args: Any = ()) -> None:
        if module.training:
            self._modes.setdefault(id(module), (module, True))
            module.training = False

    @contextmanager
    def call(self, *, closely: bool) -> Iterator[None]:
        """Within it, one call of `func` is looked at; a forward repeated later is not.

        Args:
            closely: Whether to see to it that linear maps are linear, which costs as much as them.
        """
        self.uses.clear()
        self._open = True
        self._closely = closely
        try:
            yield
        finally:
            self._open = False

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Within it, every linear map of a module is looked at."""
        handles = []
        try:
            for part in linear_modules(module).values():
                # First of all hooks: another's may give an output that is not the linear map's.
                handles.append(
                    part.register_forward_hook(self._hook, with_kwargs=True, prepend=True)
                )
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def of(self, module: nn.Module, cache: object) -> Iterator[None]:
        """Within it, a module's forward fills a cache."""
        self.owners[id(cache)] = module
        with self.watching(module):
            yield

    def see(self, module: nn.Module, given: Tensor, output: Tensor) -> Tensor:
        """Looks at one call.

        Args:
            module: The linear map.
            given: Its input.
            output: Its output.

        Returns:
            The output to go on with. It is another tensor where the output takes no gradient yet
            (it becomes the graph's start, so parameters may be frozen), or is a view, which an
            activation in place would cut out of the graph.

        Raises:
            ModelError: The call is inside a transform of `torch.func`.
        """
        if lives_in_a_transform(output):
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
        if self._open and not any(use.output is output for use in self.uses):
            part: Any = module
            is_linear = maps_linearly(part, given, output) if self._closely else None
            read = (given, given._version)
            self.uses.append(Use(module, read, output, edge, part.weight, is_linear))
        return output

    def use_of(self, hidden: Tensor) -> Use | None:
        """The call that gave a hidden vector; None if no linear map did."""
        return next((use for use in self.uses if use.output is hidden), None)

    def times(self, module: nn.Module) -> int:
        """How often a linear map was called so that gradients flow through it."""
        return sum(use.module is module and use.edge is not None for use in self.uses)

    def _hook(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        return self.see(module, only_input(args, kwargs), output)
