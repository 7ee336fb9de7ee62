"""Factors on the device that computes with them: kept there if there is room, else sent ahead.

Every batch needs every eigenvector matrix, and Λ where norms are wanted, always in the same order.
So what stays on the device is chosen once, and everything else is sent for each batch again: while
the device computes with one, what followed it and the one before the last time is on its way.

    needed by a batch    Q_A 1   Q_A 2   Q_A 3   …   Q_S 3   Q_S 2   Q_S 1
    there is room for    kept    kept    sent        sent    kept    kept

Where rows are rotated faster so, eigenvectors are split on the device, and kept so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ekfac_dist.curvature.blocks import Blocks, on, rotate_rows
from ekfac_dist.curvature.split_matrices import RowBasis, SplitMatrix, whole
from ekfac_dist.data.batches import to_device
from ekfac_dist.factors.factors import Factors, ModuleFactors
from ekfac_dist.models.modules import TrackedModule

Key = tuple[str, str]  # what it is, and the name of the factor or the module that it is of
EIGENVECTORS, LAMBDA = "eigenvectors", "lambda"


@dataclass
class _Sent:
    """Tensors on their way to the device.

    Attributes:
        tensors: The tensors on the device.
        arrival: On a GPU, the event after which they may be used.
    """

    tensors: list[Tensor]
    arrival: torch.cuda.Event | None = None


class DeviceFactors:
    """Factors on a device, in the dtype of the gradients.

    Args:
        factors: The factors, on the host.
        device: The device.
        dtype: Float32 or float64.
        budget: Bytes that may stay on the device.
        splits: Whether eigenvectors are split, for rows in bfloat16.

    Attributes:
        splits: As given.
        num_sent: How often a tensor was sent, or converted.
    """

    def __init__(
        self,
        factors: Factors,
        device: torch.device,
        dtype: torch.dtype,
        budget: float,
        *,
        splits: bool = False,
    ) -> None:
        self.splits = splits
        self._factors, self._device, self._dtype = factors, device, dtype
        self._left = budget
        self._kept: dict[Key, RowBasis] = {}
        self._not_kept: set[Key] = set()
        self._sources: dict[Key, Callable[[], Sequence[Tensor]]] = {}
        self._next: dict[tuple[Key | None, Key], Key] = {}  # what followed two, the last time
        self._last_two: tuple[Key | None, Key] | None = None
        self._ahead: tuple[Key, _Sent] | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.num_sent = 0

    @property
    def bytes_left(self) -> float:
        """Bytes that may yet come to stay on the device; 0 where the factors are there already."""
        return self._left

    def input_basis(self, module: TrackedModule) -> Blocks:
        """The blocks of Q_A of a module's input factor."""
        return whole(self._input_basis(module))

    def output_basis(self, module: TrackedModule) -> Blocks:
        """The blocks of Q_S of a module's output factor."""
        return whole(self._output_basis(module))

    def rotated_input(self, module: TrackedModule, acts_Mi: Tensor) -> Tensor:
        """A module's input, without the bias coordinate, in the eigenbasis [M, I]."""
        return rotate_rows(acts_Mi, self._input_basis(module), bias=module.bias)

    def rotated_gradient(self, module: TrackedModule, grads_MO: Tensor) -> Tensor:
        """A module's output-gradient in the eigenbasis [M, O]: a new tensor."""
        return rotate_rows(grads_MO, self._output_basis(module))

    def lambda_of(self, module: TrackedModule) -> Tensor:
        """Λ of a module [O, I]."""
        key = LAMBDA, module.name
        return whole(self._at(key, lambda: [self._host(module.name).lambda_OI]))[0]

    def _input_basis(self, module: TrackedModule) -> RowBasis:
        return self._at((EIGENVECTORS, module.input), lambda: self._host(module.name).blocks_II)

    def _output_basis(self, module: TrackedModule) -> RowBasis:
        return self._at((EIGENVECTORS, module.output), lambda: self._host(module.name).blocks_OO)

    def _host(self, name: str) -> ModuleFactors:
        return self._factors.module(name)

    def _at(self, key: Key, source: Callable[[], Sequence[Tensor]]) -> RowBasis:
        """Some tensors on the device, whose transfer may have begun already.

        Args:
            key: What they are.
            source: Gives them on the host.
        """
        self._sources[key] = source
        if self._last_two is not None:
            self._next[self._last_two] = key
        self._last_two = (self._last_two[1] if self._last_two is not None else None), key
        tensors = self._kept.get(key)
        if tensors is None:
            arrived = self._arrived(key)
            is_split = self.splits and key[0] == EIGENVECTORS
            tensors = [SplitMatrix.of(tensor) for tensor in arrived] if is_split else arrived
            num_bytes = sum(tensor.nbytes for tensor in tensors)
            if key not in self._not_kept and num_bytes <= self._left:
                self._kept[key] = tensors
                self._left -= num_bytes
            else:
                self._not_kept.add(key)
        following = self._next.get(self._last_two)
        if following is not None and following not in self._kept and self._ahead is None:
            self._ahead = following, self._send(self._sources[following]())
        return tensors

    def _arrived(self, key: Key) -> list[Tensor]:
        """Tensors that are not kept, once they are on the device."""
        ahead, self._ahead = self._ahead, None
        sent = ahead[1] if ahead is not None and ahead[0] == key else None
        if sent is None:
            sent = self._send(self._sources[key]())
        if sent.arrival is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(sent.arrival)
            for tensor in sent.tensors:
                tensor.record_stream(stream)  # its memory is not used again before
        return sent.tensors

    def _send(self, tensors: Sequence[Tensor]) -> _Sent:
        """Begins to send tensors to the device; only those that are not there as they should be."""
        if all(t.device == self._device and t.dtype == self._dtype for t in tensors):
            return _Sent(list(tensors))
        self.num_sent += 1
        if self._stream is None:
            return _Sent(on(tensors, self._device, self._dtype))
        with torch.cuda.stream(self._stream):
            arriving = [to_device(tensor.to(self._dtype), self._device) for tensor in tensors]
            arrival = torch.cuda.Event()
            arrival.record(self._stream)
        return _Sent(arriving, arrival)
