"""Golden samples: what a model is given before it may run, and what it must answer.

They are an .npz, so a zip of headers written in Python's syntax: three parsers that were not made
for hostile bytes. Nothing is believed that an entry or a header says about its own size before it
is compared with the bytes that are there, and nothing is unpickled.
"""

import io
import math
import zipfile
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import GraphError
from fleetprune.manifest import Manifest

MAX_GOLDEN: Final = 64 * 1024 * 1024  # bytes of golden samples once unpacked
MAX_ENTRIES: Final = 16
_MAX_HEADER: Final = 1024  # characters; ours have 118
_ENCRYPTED: Final = 1  # bit of an entry's flags
_PACKED: Final = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # LZMA allocates what its header says


def load_golden(path: Path, manifest: Manifest) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Read golden samples: no pickles, no zip bombs, no surprises in shape.

    Returns:
        `x` (n, *input_shape) and `y` (n, classes), float32, finite, n >= 1.

    Raises:
        GraphError: They are anything else.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(_content(path))) as archive:
            _check_entries(archive)
            x, y = (_read(archive, name) for name in ("x", "y"))
    except GraphError:
        raise
    except Exception as e:  # zipfile, zlib and numpy's header parser have a class for each failure
        raise GraphError(f"golden samples: {' '.join(str(e).split())[:200]}") from e
    if len(x.shape) == 0 or len(x) == 0 or x.shape[1:] != manifest.input_shape:
        raise GraphError(f"golden samples: x is {x.shape}, expected (n, *{manifest.input_shape})")
    if y.ndim != 2 or len(y) != len(x):
        raise GraphError(f"golden samples: y is {y.shape}, expected ({len(x)}, classes)")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise GraphError("golden samples: values that are not finite")
    return x, y


def _content(path: Path) -> bytes:
    """The whole file: read from disk, zipfile would allocate what the file says of its parts."""
    size = path.stat().st_size
    if size > MAX_GOLDEN:
        raise GraphError(f"golden samples: a file of {size} bytes, expected at most {MAX_GOLDEN}")
    return path.read_bytes()


def _check_entries(archive: zipfile.ZipFile) -> None:
    entries = archive.infolist()
    if len(entries) > MAX_ENTRIES:
        raise GraphError(f"golden samples: {len(entries)} entries, expected at most {MAX_ENTRIES}")
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > MAX_GOLDEN:
        raise GraphError(
            f"golden samples: {unpacked} bytes unpacked, expected at most {MAX_GOLDEN}"
        )
    for entry in entries:
        if entry.compress_type not in _PACKED or entry.flag_bits & _ENCRYPTED:
            raise GraphError(
                f"golden samples: an entry is packed by method {entry.compress_type} with flags "
                f"{entry.flag_bits:#x}, expected stored or deflated and not encrypted"
            )


def _read(archive: zipfile.ZipFile, name: str) -> NDArray[np.float32]:
    """One array; its header must say exactly what follows it."""
    if f"{name}.npy" not in archive.namelist():
        raise GraphError(f"golden samples: there is no array {name}")
    file = io.BytesIO(archive.read(f"{name}.npy"))
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise GraphError(f"golden samples: {name} is an array of format {version}, expected (1, 0)")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(
        file, max_header_size=_MAX_HEADER
    )
    if dtype != np.float32:
        raise GraphError(f"golden samples: {name} is {dtype}, expected float32")
    body = file.read()
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(body):
        raise GraphError(f"golden samples: {name} of shape {shape} in {len(body)} bytes")
    flat = np.frombuffer(body, dtype).astype(np.float32)
    return flat.reshape(shape[::-1]).T if by_columns else flat.reshape(shape)
