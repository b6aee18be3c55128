"""A tensor of the graph, and its two memory layouts.

*Plain* is row-major (N, C, ...). *Blocked* is onnxruntime's NCHWc: channels are padded with zeros
to `padded`, a multiple of the block size B, and lie in memory as (N, padded / B, H, W, B), while
the tensor's nominal ONNX shape is (N, padded, H, W). A reshape to five axes therefore shows what
is really in memory, and costs nothing.

A value starts in the layout in which it was computed; the other is added when it is asked for.
What stands in the padding channels is finite but otherwise arbitrary: every consumer multiplies
it by a zero weight or cuts it off.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from numpy.typing import NDArray

from fleetprune_coordinator.graphs.writer import NCHWC, GraphWriter, onnx_type


@dataclass(eq=False, slots=True)
class Value:
    """A tensor: logical shape, dtype, and the name it has in each layout (None: not yet there)."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    plain: str | None = None
    blocked: str | None = None
    constant: NDArray[Any] | None = None

    @property
    def only_blocked(self) -> bool:
        """Whether a blocked form exists, and getting the plain one would cost a pass."""
        return self.blocked is not None and self.plain is None and self.constant is None


def four_axes(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """(N, C, H, W) of a tensor with 2, 3 or 4 axes; the missing ones are 1."""
    if len(shape) == 4:
        n, c, h, w = shape
        return n, c, h, w
    if len(shape) == 3:
        n, c, w = shape
        return n, c, 1, w
    n, c = shape
    return n, c, 1, 1


class Layouts:
    """Moves values between layouts."""

    def __init__(self, writer: GraphWriter, block: int) -> None:
        self.writer = writer
        self.block = block

    def padded(self, channels: int) -> int:
        """Channels rounded up to a whole block."""
        return -(-channels // self.block) * self.block

    def pad_vector(self, name: str, channels: int) -> str:
        """(channels,) -> (padded,), with zeros behind."""
        missing = self.padded(channels) - channels
        return name if not missing else self.writer.op("Pad", name, self.writer.ints(0, missing))

    def cut_vector(self, name: str, channels: int) -> str:
        """(padded,) -> (channels,)."""
        if self.padded(channels) == channels:
            return name
        w = self.writer
        return w.op("Slice", name, w.ints(0), w.ints(channels), w.ints(0))

    def plain(self, value: Value) -> str:
        """The value's name in plain layout."""
        if value.plain is None:
            if value.constant is not None:
                value.plain = self.writer.constant(value.constant)
            else:
                value.plain = self._unblock(value)
        return value.plain

    def blocked(self, value: Value) -> str:
        """The value's name in blocked layout."""
        if value.blocked is None:
            value.blocked = self._block(value)
        return value.blocked

    def _unblock(self, value: Value) -> str:
        w, name = self.writer, value.blocked
        if name is None:
            raise ValueError("value without any name")
        _, c, h, width = four_axes(value.shape)
        if h * width == 1 and self.padded(c) == c:
            return w.op("Reshape", name, w.ints(*value.shape))  # the layouts coincide
        if value.dtype != "float32":
            name = w.op("Cast", name, to=onnx_type("float32"))
        name = w.op("ReorderOutput", name, domain=NCHWC, channels=c)
        if value.dtype != "float32":
            name = w.op("Cast", name, to=onnx_type(value.dtype))
        return name if len(value.shape) == 4 else w.op("Reshape", name, w.ints(*value.shape))

    def _block(self, value: Value) -> str:
        w, name = self.writer, self.plain(value)
        n, c, h, width = four_axes(value.shape)
        padded = self.padded(c)
        if len(value.shape) != 4:
            name = w.op("Reshape", name, w.ints(n, c, h, width))
        if value.dtype != "float32":
            name = w.op("Cast", name, to=onnx_type("float32"))
        if padded != c:
            name = w.op("Pad", name, w.ints(0, 0, 0, 0, 0, padded - c, 0, 0))
        if h * width > 1:
            name = w.op("ReorderInput", name, domain=NCHWC)
        if value.dtype != "float32":
            name = w.op("Cast", name, to=onnx_type(value.dtype))
        return name

    def memory(self, name: str, shape: Sequence[int]) -> str:
        """The blocked tensor of logical `shape` shown as it lies in memory: (N, P/B, H, W, B)."""
        n, c, h, width = four_axes(shape)
        b = self.block
        return self.writer.op(
            "Reshape", name, self.writer.ints(n, self.padded(c) // b, h, width, b)
        )

    def elements(self, shape: Sequence[int]) -> int:
        """Elements of the blocked tensor of logical `shape`, padding included."""
        n, c, h, width = four_axes(shape)
        return prod((n, self.padded(c), h, width))
