"""What a call of `func` did: every linear map's input, output, and place in the graph of gradients.

A cache has tensors only. Which parameters they belong to is known because the linear maps were
looked at while they ran: a pair is the call whose output it has. The place in the graph is noted
before anything that comes after, an activation in place included, can move it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ekfac_dist.errors import ModelError
from ekfac_dist.models.modules import linear_modules, only_input


def lives_in_a_transform(tensor: Tensor) -> bool:
    """Whether a tensor is one of `torch.func`'s own, which end with its transform."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Evaluation mode, so that nothing drops out; on the way out every mode is as it was."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, mode in reversed(modes):
            part.training = mode


@dataclass(frozen=True)
class Use:
    """One call of a linear map.

    Attributes:
        module: The linear map.
        input: What it was called with, and that tensor's version then.
        output: What it gave.
        edge: Where the output's gradient arrives; None if it takes none.
    """

    module: nn.Module
    input: tuple[Tensor, int]
    output: Tensor
    edge: GradientEdge | None


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

    @contextmanager
    def call(self) -> Iterator[None]:
        """Within it, one call of `func` is looked at; a forward repeated later is not."""
        self.uses.clear()
        self._open = True
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
                handles.append(part.register_forward_hook(self._hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def of(self, module: nn.Module, cache: object) -> Iterator[None]:
        """Within it, a module's forward fills a cache."""
        self.owners[id(cache)] = module
        with evaluating([module]), self.watching(module):
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
            self.uses.append(Use(module, (given, given._version), output, edge))
        return output

    def use_of(self, hidden: Tensor) -> Use | None:
        """The call that gave a hidden vector; None if no linear map did."""
        return next((use for use in self.uses if use.output is hidden), None)

    def times(self, module: nn.Module) -> int:
        """How often a linear map was called."""
        return sum(use.module is module for use in self.uses)

    def _hook(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        return self.see(module, only_input(args, kwargs), output)
