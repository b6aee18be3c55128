"""Sizes of one convolution, seen as two-dimensional, and the part of its input that is read."""

from collections.abc import Sequence
from dataclasses import dataclass

from fleetprune_coordinator.graphs.lowering import Lowering
from fleetprune_coordinator.graphs.values import Value, four_axes

Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """A convolution of (N, C, H, W) with (O, C / groups, kh, kw) to (N, O, Ho, Wo).

    One-dimensional convolutions have H = kh = 1. Output row i reads the input rows
    i * stride - pad + k * dilation, for k in 0..kh; columns likewise.
    """

    batch: int
    channels: int
    size: Pair
    outputs: int
    out_size: Pair
    kernel: Pair
    stride: Pair
    pad: Pair
    dilation: Pair
    groups: int

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """(O, C / groups, kh, kw)."""
        return (self.outputs, self.channels // self.groups, *self.kernel)

    @property
    def depthwise(self) -> bool:
        """Whether each channel is convolved by itself."""
        return self.groups == self.channels == self.outputs and self.groups > 1

    @property
    def pointwise(self) -> bool:
        """Whether it is a matrix product per position: 1x1, dense."""
        return self.groups == 1 and self.kernel == (1, 1)

    @property
    def extent(self) -> Pair:
        """Rows and columns of the padded input that are really read."""
        rows, columns = (
            (o - 1) * s + d * (k - 1) + 1
            for o, s, d, k in zip(
                self.out_size, self.stride, self.dilation, self.kernel, strict=True
            )
        )
        return rows, columns

    @property
    def pad_end(self) -> Pair:
        """Rows and columns to add behind, so that exactly `extent` is there; negative: to cut."""
        rows, columns = (
            e - n - p for e, n, p in zip(self.extent, self.size, self.pad, strict=True)
        )
        return rows, columns

    @property
    def output_padding(self) -> Pair:
        """Input rows and columns behind the last one that is read, as ConvTranspose counts."""
        rows, columns = (
            n + 2 * p - e for e, n, p in zip(self.extent, self.size, self.pad, strict=True)
        )
        return rows, columns


def conv_geometry(
    x: Sequence[int],
    w: Sequence[int],
    y: Sequence[int],
    *,
    stride: Sequence[int],
    pad: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Geometry:
    """The geometry of a Conv1d or Conv2d from the shapes of input, weight and output."""
    n, c, height, width = four_axes(x)
    _, o, out_height, out_width = four_axes(y)
    return Geometry(
        batch=n,
        channels=c,
        size=(height, width),
        outputs=o,
        out_size=(out_height, out_width),
        kernel=_pair(w[2:], 1),
        stride=_pair(stride, 1),
        pad=_pair(pad, 0),
        dilation=_pair(dilation, 1),
        groups=groups,
    )


def _pair(sizes: Sequence[int], missing: int) -> Pair:
    first, second = (missing, *sizes) if len(sizes) == 1 else sizes
    return first, second


def plain4(low: Lowering, value: Value) -> str:
    """The value in plain layout with four axes."""
    name = low.plain(value)
    if len(value.shape) == 4:
        return name
    n, c, w = value.shape
    return low.op("Reshape", name, low.ints(n, c, 1, w))


def read_part(low: Lowering, geometry: Geometry, name: str) -> str:
    """The padded input, (.., .., *extent): exactly the rows and columns that are read.

    Args:
        low: The graph.
        geometry: The convolution.
        name: A plain tensor (.., .., H, W).
    """
    (top, left), (bottom, right) = geometry.pad, geometry.pad_end
    if max(top, left, bottom, right) > 0:
        pads = (0, 0, top, left, 0, 0, max(bottom, 0), max(right, 0))
        name = low.op("Pad", name, low.ints(*pads))
    if min(bottom, right) < 0:
        name = low.op("Slice", name, low.ints(0, 0), low.ints(*geometry.extent), low.ints(2, 3))
    return name
