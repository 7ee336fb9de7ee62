"""Experts that are modules in a list, each called with only the tokens that are routed to it.

The only trace of which tokens those are is the indexing that selected them, and it is read from the
autograd graph: `tokens[index]` saves its index there.
"""

from typing import Any

import torch
from torch import Tensor, nn

# Graph nodes that are visited at most, from an expert's input back to the indexing.
_MAX_NODES = 200
_INDEXING = ("IndexBackward0", "IndexSelectBackward0")


def in_expert_list(model: nn.Module, name: str) -> str:
    """Name of the list of experts that a module is in; "" if it is in none."""
    parts = name.split(".")
    for k in range(1, len(parts)):
        if parts[k - 1].endswith("experts"):
            list_name = ".".join(parts[:k])
            if isinstance(model.get_submodule(list_name), (nn.ModuleList, nn.ModuleDict)):
                return list_name
    return ""


def picked_positions(tensor: Tensor, num_positions: int) -> Tensor | None:
    """The positions whose vectors an expert's input holds, read from the autograd graph.

    Args:
        tensor: [..., n, I]: vectors selected by an index from [..., num_positions, H], and
            processed position by position since.
        num_positions: All positions of the batch.

    Returns:
        Flat indices [n], int64; None if the graph does not show them.
    """
    num_picked = tensor.shape[:-1].numel()
    open_nodes, visited = [tensor.grad_fn], set()
    positions: Tensor | None = None
    while open_nodes:
        node: Any = open_nodes.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if len(visited) > _MAX_NODES:
            return None
        node_positions = _node_positions(node, num_positions)
        if node_positions is None and node.name() in _INDEXING:
            return None  # indexes what was indexed before
        if node_positions is None:
            if not node.next_functions:
                return None  # reaches a leaf without passing an indexing
            open_nodes += [parent for parent, _ in node.next_functions]
        elif len(node_positions) != num_picked or (
            positions is not None and not torch.equal(node_positions, positions)
        ):
            return None
        else:
            positions = node_positions
    return positions


def _node_positions(node: Any, num_positions: int) -> Tensor | None:
    """The positions that a graph node's indexing selects; None for any other node."""
    if node.name() not in _INDEXING:
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
