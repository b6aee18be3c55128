"""Reads a pickle of plain data and byte arrays without running what it names.

A pickle is a program: loading one as Python does runs whatever its author wanted. CIFAR-10 comes
as pickles, so they are read by this module, which allows the few instructions that plain data
needs, knows three names, stands its own classes in for them, and refuses every other.
"""

import io
import math
import pickle
import pickletools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import DataError

# fmt: off
ALLOWED = frozenset({
    "PROTO", "FRAME", "STOP", "MARK", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD",
    "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET",
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINUNICODE", "SHORT_BINUNICODE",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS",
    "EMPTY_DICT", "SETITEM", "SETITEMS",
})
"""Instructions that plain data and arrays need in any version of the format."""
# fmt: on


class _Type:
    """Stands for `numpy.dtype`; knows unsigned bytes only."""

    def __init__(self, name: object, *_: object) -> None:
        self.name = name.decode("latin-1") if isinstance(name, bytes) else name

    def __setstate__(self, state: object) -> None:
        """Byte order and fields, of which a byte has none."""


class _Array:
    """Stands for `numpy.ndarray` and for the function that makes an empty one."""

    def __init__(self, *_: object) -> None:
        self.values: NDArray[np.uint8] | None = None

    def __setstate__(self, state: object) -> None:
        """Take (version, shape, type, column by column?, bytes)."""
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("an array without shape, type and bytes")
        _, shape, kind, by_column, raw = state
        if not isinstance(kind, _Type) or kind.name not in ("u1", "|u1"):
            raise pickle.UnpicklingError("an array that is not of unsigned bytes")
        if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
            raise pickle.UnpicklingError("an array without a shape")
        if not isinstance(raw, bytes) or len(raw) != math.prod(shape):
            raise pickle.UnpicklingError("an array whose shape does not fit its bytes")
        flat = np.frombuffer(raw, np.uint8)
        self.values = flat.reshape(shape, order="F") if by_column else flat.reshape(shape)


_KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[Any]:
        """One of the known names; never an import."""
        found = _KNOWN.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return found


def load_plain(name: str, data: bytes) -> dict[bytes, Any]:
    """Read a pickled dict of bytes, numbers, lists and arrays of unsigned bytes.

    Args:
        name: Of the file, for messages.
        data: Its content, unverified.

    Returns:
        The dict; what Python 2 wrote as strings are bytes, its keys too.

    Raises:
        DataError: It holds or names anything else, or is damaged.
    """
    try:
        _check_instructions(data)
        found = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as e:  # damaged pickles raise a dozen unrelated classes
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise DataError(
            f"{name} is no pickle of plain data and byte arrays: {reason}; download it again"
        ) from e
    if not isinstance(found, dict):
        raise DataError(f"{name} holds a {type(found).__name__}, expected a dict")
    return {key: v.values if isinstance(v, _Array) else v for key, v in found.items()}


def _check_instructions(data: bytes) -> None:
    for instruction, argument, _ in pickletools.genops(data):
        if instruction.name not in ALLOWED:
            raise pickle.UnpicklingError(f"it has the instruction {instruction.name}")
        # Python makes a table of this size before it looks at what is to go there.
        if instruction.name == "LONG_BINPUT" and (argument or 0) > len(data):
            raise pickle.UnpicklingError(f"it numbers a value {argument}")
