"""What a training or inference graph says about itself, and how a machine checks it.

Every graph carries a `GraphMeta` as JSON in its metadata, under the key "fleetprune". Its
`verification` names inputs by a formula (`reference_feeds`), and holds what torch computed from
them in float64. A device runs the graph once on these inputs before it trusts it: a graph made
for another processor's memory layout computes wrong numbers without any error.

The formula hashes the index of each element, in integers, so both sides get the same bits.
"""

from collections.abc import Mapping
from math import prod
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fleetprune.errors import GraphError

METADATA_KEY = "fleetprune"
"""Key of the metadata entry that holds the JSON."""

PROJECTIONS = 3
"""Fixed directions onto which each output is projected."""

_UNIT = 3.0**0.5
"""Swing that gives uniform noise a variance of one."""


MAX_ELEMENTS = 2**26
"""Of all reference inputs together: what a frame of `MAX_FRAME` bytes holds of float32."""

_Elements = Annotated[int, Field(ge=0, le=MAX_ELEMENTS)]
_Float = Annotated[float, Field(ge=-1e38, le=1e38)]  # the sum of two is a float32


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Run(NamedTuple):
    """Consecutive elements of a flat state vector, `centre - swing <= element < centre + swing`."""

    size: _Elements
    centre: _Float
    swing: _Float


class ReferenceInput(_Plain):
    """Shape of one reference input, and below which integer its elements are (0: float32)."""

    shape: tuple[_Elements, ...] = Field(min_length=1, max_length=8)
    high: int = Field(default=0, ge=0, le=2**32 - 1)


class Expectation(_Plain):
    """What one output should be.

    A vector is compared by its products with `PROJECTIONS` fixed vectors, so that a few numbers
    stand for all its elements; a scalar is compared as it is.
    """

    output: str
    values: tuple[float, ...]
    scale: float = Field(gt=0)
    """Size of a typical projection: the unit in which `tolerance` is meant."""


class Verification(_Plain):
    """Reference inputs by formula, and the outputs that torch computes from them in float64."""

    x: ReferenceInput
    y: ReferenceInput | None = None
    live: int = 0
    """Leading samples with a weight above 0; the rest stand for the padding of a short batch."""
    params: tuple[Run, ...] = ()
    stats: tuple[Run, ...] = ()
    expected: tuple[Expectation, ...] = ()
    """Empty where the graph draws random numbers (Dropout): then outputs must only be finite."""
    tolerance: float = 0.02
    """Largest error, in units of `Expectation.scale`.

    A ReLU whose input rounds across zero moves a gradient by up to 1 %; a wrong memory layout
    moves it by its own size.
    """

    @property
    def elements(self) -> int:
        """Of all inputs that `reference_feeds` makes, but for one number per sample or class."""
        inputs = (self.x,) if self.y is None else (self.x, self.y)
        runs = (*self.params, *self.stats)
        return sum(prod(i.shape) for i in inputs) + sum(run.size for run in runs)


class GraphMeta(_Plain):
    """What one ONNX graph is, and how to check it."""

    kind: Literal["train_step", "observe", "infer"]
    schema_version: int = Field(default=1, alias="schema")
    block: int = 0
    """Channels per memory block that the graph's operators assume; 0: any machine can run it."""
    batch: int | None = None
    """Samples per call; None: any."""
    parameters: int = 0
    """Length of `params` and `momentum` (0 for infer: the weights are in the file)."""
    statistics: int = 0
    """Length of `stats`; 0: there is no such input."""
    units: int = 0
    """Length of the output `scores`; 0: there is none."""
    criterion: str = ""
    """What the output `scores` holds, by its name in `criteria`."""
    observed: int = 0
    """Length of the outputs `sumsq` and `zeros`, where they are; 0: there is neither."""
    ranges: int = 0
    """Length of the output `ranges`; 0: there is none."""
    classes: _Elements = 0
    """Length of the input `prior`; 0: there is no such input."""
    momentum: float = 0.0
    verification: Verification

    model_config = ConfigDict(
        frozen=True, extra="ignore", allow_inf_nan=False, populate_by_name=True
    )

    def to_json(self) -> str:
        """The text that goes into the graph's metadata."""
        return self.model_dump_json(by_alias=True, exclude_defaults=False)


def parse_graph_meta(text: str) -> GraphMeta:
    """Read a graph's metadata entry.

    Args:
        text: `session.get_modelmeta().custom_metadata_map[METADATA_KEY]`.

    Raises:
        GraphError: It is not the JSON of a `GraphMeta`, or of a newer schema.
    """
    try:
        meta = GraphMeta.model_validate_json(text)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "text"
        raise GraphError(f"graph metadata, {where}: {first['msg']}") from e
    if meta.verification.elements > MAX_ELEMENTS:
        raise GraphError(
            f"graph metadata with {meta.verification.elements} elements of reference inputs, "
            f"expected at most {MAX_ELEMENTS}"
        )
    if meta.schema_version != 1:
        raise GraphError(f"graph metadata of schema {meta.schema_version}, expected 1")
    return meta


def hashed(size: int, seed: int) -> NDArray[np.uint32]:
    """The hash of each index (MurmurHash3's 32-bit finaliser): the same bits everywhere.

    Args:
        size: Number of elements.
        seed: Picks one of many such sequences.

    Returns:
        (size,) uint32.
    """
    h = np.arange(size, dtype=np.uint32) + np.uint32(seed * 0x9E3779B9 & 0xFFFFFFFF)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    h ^= h >> np.uint32(16)
    return h


def noise(size: int, seed: int) -> NDArray[np.float64]:
    """`hashed` as (size,) float64 in [-1, 1)."""
    return hashed(size, seed) / 2.0**31 - 1.0


def _tensor(spec: ReferenceInput, seed: int) -> NDArray[Any]:
    size = prod(spec.shape)
    if spec.high:
        return (hashed(size, seed) % np.uint32(spec.high)).astype(np.int64).reshape(spec.shape)
    return (_UNIT * noise(size, seed)).astype(np.float32).reshape(spec.shape)


def _state(runs: tuple[Run, ...], seed: int) -> NDArray[np.float32]:
    sizes = [run.size for run in runs]
    centre = np.repeat([run.centre for run in runs], sizes)
    swing = np.repeat([run.swing for run in runs], sizes)
    return (centre + swing * noise(int(sum(sizes)), seed)).astype(np.float32)


def reference_feeds(meta: GraphMeta) -> dict[str, NDArray[Any]]:
    """The inputs on which a graph is checked.

    Returns:
        By input name, as the graph takes them: x, and for training y, sw, lr (1.0), params,
        momentum (zeros), stats and prior.
    """
    v = meta.verification
    feeds: dict[str, NDArray[Any]] = {"x": _tensor(v.x, seed=1)}
    if meta.kind == "infer":
        return feeds
    batch = v.x.shape[0]
    weights = 1.0 + 0.5 * noise(batch, seed=2)
    feeds["sw"] = np.where(np.arange(batch) < v.live, weights, 0.0).astype(np.float32)
    feeds["params"] = _state(v.params, seed=3)
    if v.stats:
        feeds["stats"] = _state(v.stats, seed=4)
    if meta.kind == "train_step":
        if v.y is None:
            raise GraphError("metadata of a train_step graph without a description of y")
        feeds["y"] = _tensor(v.y, seed=5)
        feeds["lr"] = np.array(1.0, np.float32)
        feeds["momentum"] = np.zeros_like(feeds["params"])
        if meta.classes:
            feeds["prior"] = noise(meta.classes, seed=6).astype(np.float32)
    return feeds


def expectation(output: str, value: NDArray[Any], size: NDArray[Any]) -> Expectation:
    """What `check_outputs` will compare with.

    Args:
        output: The graph's output.
        value: Its right value, of any shape, float64.
        size: Its norm is the scale; `value` itself, unless that cancels to about zero.
    """
    scale = float(np.linalg.norm(size)) or 1.0
    return Expectation(output=output, values=_project(value), scale=scale)


def _project(value: NDArray[Any]) -> tuple[float, ...]:
    flat = np.asarray(value, np.float64).ravel()
    if flat.size == 1:
        return (float(flat[0]),)
    return tuple(float(flat @ noise(flat.size, seed=100 + k)) for k in range(PROJECTIONS))


def check_outputs(meta: GraphMeta, outputs: Mapping[str, NDArray[Any]]) -> None:
    """Compare what a graph made of `reference_feeds` with what torch makes of them.

    Raises:
        GraphError: An output is missing, not finite, or off by more than the tolerance.
    """
    for name, value in outputs.items():
        if not np.isfinite(value).all():
            raise GraphError(f"{meta.kind} graph: output {name} is not finite on this machine")
    for want in meta.verification.expected:
        if want.output not in outputs:
            raise GraphError(f"{meta.kind} graph has no output {want.output}")
        got = _project(outputs[want.output])
        if len(got) != len(want.values):
            raise GraphError(f"{meta.kind} graph: output {want.output} has another size")
        error = max(abs(a - b) for a, b in zip(got, want.values, strict=True)) / want.scale
        if error > meta.verification.tolerance:
            raise GraphError(
                f"{meta.kind} graph computes wrong numbers on this machine: {want.output} is off "
                f"by {error:.1e}, tolerated is {meta.verification.tolerance:.1e}"
            )
