"""The state of training after a round, as one file that holds arrays and nothing else."""

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import RegistryError

_SCHEMA = 1
Tensors = Mapping[str, NDArray[np.float32]]
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Everything that the next round starts from; the mask is stored under its version."""

    round: int
    mask_version: int
    params: Tensors
    """Dense parameters by name, in the mask's order of units."""
    stats: Mapping[str, Tensors] = field(default_factory=dict)
    """Per class its BatchNorm statistics, in that class's shape."""
    ledger: Arrays = field(default_factory=dict)
    """`Ledger.arrays()`."""
    extra: Arrays = field(default_factory=dict)
    """What else a strategy carries over, for instance averaged weights."""

    def to_bytes(self) -> bytes:
        """An uncompressed .npz; equal snapshots give equal bytes."""
        arrays: dict[str, NDArray[Any]] = {
            "header": np.array([_SCHEMA, self.round, self.mask_version], np.int64)
        }
        arrays |= {f"params/{name}": a for name, a in self.params.items()}
        for cls, tensors in self.stats.items():
            arrays[f"stats/{cls}"] = np.empty(0)  # a class without BatchNorm is still a class
            arrays |= {f"stats/{cls}/{name}": a for name, a in tensors.items()}
        arrays |= {f"ledger/{name}": a for name, a in self.ledger.items()}
        arrays |= {f"extra/{name}": a for name, a in self.extra.items()}
        out = io.BytesIO()
        np.savez(out, allow_pickle=False, **arrays)
        return out.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what `to_bytes` wrote; RegistryError for anything else. Nothing is unpickled."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                arrays: dict[str, NDArray[Any]] = dict(file.items())
            schema, round_, mask_version = (int(n) for n in arrays.pop("header"))
        except (ValueError, KeyError, OSError, EOFError, TypeError, zipfile.BadZipFile) as e:
            raise RegistryError(f"snapshot of {len(data)} bytes does not decode: {e}") from e
        if schema != _SCHEMA:
            raise RegistryError(f"snapshot of schema {schema}, expected {_SCHEMA}")
        parts: dict[str, dict[str, NDArray[Any]]] = {"params": {}, "ledger": {}, "extra": {}}
        stats: dict[str, dict[str, NDArray[np.float32]]] = {}
        for key, array in arrays.items():
            kind, _, name = key.partition("/")
            if kind == "stats":
                device_class, _, tensor = name.partition("/")
                tensors = stats.setdefault(device_class, {})
                if tensor:
                    tensors[tensor] = array
            elif kind in parts and name:
                parts[kind][name] = array
            else:
                raise RegistryError(f"snapshot holds an unknown array {key!r}")
        return cls(round_, mask_version, parts["params"], stats, parts["ledger"], parts["extra"])
