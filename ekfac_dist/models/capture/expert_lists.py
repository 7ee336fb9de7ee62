"""Experts that are modules in a list, each called with the tokens routed to it alone.

Which tokens those are is said by nothing but how the rows were picked out of all positions, and
that is read off the autograd graph: `tokens[index]` leaves its index there.
"""

from typing import Any

import torch
from torch import Tensor, nn

# Steps up the graph from an expert's matrix to where its rows were picked.
_FARTHEST = 200
_PICKING = ("IndexBackward0", "IndexSelectBackward0")


def in_expert_list(model: nn.Module, name: str) -> str:
    """Name of the list of experts that a module is in; "" if in none."""
    parts = name.split(".")
    for k in range(1, len(parts)):
        if parts[k - 1].endswith("experts"):
            found = ".".join(parts[:k])
            if isinstance(model.get_submodule(found), (nn.ModuleList, nn.ModuleDict)):
                return found
    return ""


def picked_positions(tensor: Tensor, num_positions: int) -> Tensor | None:
    """Which of all positions the rows of a tensor were picked from.

    Args:
        tensor: [..., n, I]: rows picked out of [..., num_positions, H] by an index, and what was
            computed of them row by row since.
        num_positions: How many there are.

    Returns:
        Their flat numbers [n], int64; None where that cannot be seen.
    """
    num_rows = tensor.shape[:-1].numel()
    todo, seen = [tensor.grad_fn], set()
    found: Tensor | None = None
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if len(seen) > _FARTHEST:
            return None
        picked = _picked(node, num_positions)
        if picked is None and node.name() in _PICKING:
            return None  # rows of rows
        if picked is None:
            if not node.next_functions:
                return None  # a way past all indices
            todo += [before for before, _ in node.next_functions]
        elif len(picked) != num_rows or (found is not None and not torch.equal(picked, found)):
            return None
        else:
            found = picked
    return found


def _picked(node: Any, num_positions: int) -> Tensor | None:
    """The positions that a step of the graph picks; None of a step that picks none."""
    if node.name() not in _PICKING:
        return None
    if node.name() == "IndexSelectBackward0":
        indices = [None] * node._saved_dim + [node._saved_index]
    else:
        indices = list(node._saved_indices)
    sizes = list(node._saved_self_sym_sizes)
    while indices and indices[0] is None and sizes[0] == 1:
        indices, sizes = indices[1:], sizes[1:]
    indices = [index for index in indices if index is not None]
    if len(indices) == 1 and indices[0].dtype == torch.bool:
        mask = indices[0]
        return mask.flatten().nonzero().squeeze(-1) if mask.numel() == num_positions else None
    if len(indices) == 1 and indices[0].ndim == 1 and sizes[0] == num_positions:
        return indices[0] % num_positions
    if len(indices) == 2 and sizes[0] * sizes[1] == num_positions:
        return (indices[0] % sizes[0] * sizes[1] + indices[1] % sizes[1]).flatten()
    return None
