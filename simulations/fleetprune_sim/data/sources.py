"""Where the user's copies of data sets lie, and what is kept of them once they are parsed."""

import gzip
import hashlib
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import DataError

VARIABLE = "FLEETPRUNE_DATA"
Arrays = dict[str, NDArray[Any]]


def data_folder(environment: Mapping[str, str] | None = None) -> Path | None:
    """The folder that `VARIABLE` names, whether or not it exists; None if it names none.

    Args:
        environment: Variables to look in; the process's own by default.
    """
    folder = (os.environ if environment is None else environment).get(VARIABLE, "")
    return Path(folder) if folder else None


def required_folder(what: str, where: str, environment: Mapping[str, str] | None = None) -> Path:
    """As `data_folder`, for a data set that is looked for in no other folder.

    Args:
        what: Subject and verb of the message: "the recordings are".
        where: Says where the data set is to be had.
        environment: Variables to look in; the process's own by default.

    Raises:
        DataError: `VARIABLE` names no folder, or one that does not exist.
    """
    folder = data_folder(environment)
    if folder is None:
        raise DataError(
            f"{what} looked for in the folder that {VARIABLE} names, which is not set: {where}"
        )
    if problem := folder_problem(folder):
        raise DataError(f"{problem}: {where}")
    return folder


def folder_problem(folder: Path) -> str:
    """What is wrong with the folder that `VARIABLE` names; "" if it is there."""
    if folder.is_dir():
        return ""
    what = "is no folder" if folder.exists() else "does not exist"
    return f"{folder}, which {VARIABLE} names, {what}"


@contextmanager
def read_errors(source: Path) -> Iterator[None]:
    """Turn what a missing or damaged file raises into a one-line DataError that names it.

    Args:
        source: The file that is being read.
    """
    try:
        yield
    except EOFError as e:
        raise DataError(
            f"{source} ends too early: the download was interrupted, download it again"
        ) from e
    except (gzip.BadGzipFile, zlib.error, zipfile.BadZipFile, tarfile.TarError) as e:
        raise DataError(f"{source} is damaged ({e}): download it again") from e
    except OSError as e:
        raise DataError(f"{e.filename or source} cannot be read: {e.strerror or e}") from e


def kept(cache: Path | None, name: str, parse: Callable[[], Arrays]) -> Arrays:
    """What `parse` returns, from the cache where it was written there before.

    Args:
        cache: Folder for parsed data sets, made if needed; None: parse.
        name: Of the data set and its state, see `fingerprint`.
        parse: Reads the source.

    Raises:
        DataError: The cache cannot be written, or what `parse` raises.
    """
    if cache is None:
        return parse()
    file = cache / f"{name}.npz"
    if file.is_file():
        try:
            with file.open("rb") as f, np.load(f, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            file.unlink(missing_ok=True)  # cut short by a crash: parse again
    arrays = parse()
    part = cache / f"{name}.{os.getpid()}.part.npz"  # several runs may share a cache
    try:
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(part, **arrays)  # type: ignore[arg-type]  # the stubs take names for options
        part.replace(file)
    except OSError as e:
        raise DataError(f"{e.filename or part} cannot be written: {e.strerror or e}") from e
    return arrays


def fingerprint(source: Path, *how: object) -> str:
    """Names this state of a data set: 16 hexadecimal digits.

    Args:
        source: The file or folder; its place, size and time of change are taken in, of a folder
            those of all files below it.
        how: Everything that decides how it is parsed.
    """
    files = sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
    digest = hashlib.sha256(f"{source.resolve()} {how}".encode())
    for file in files:
        state = file.stat()
        digest.update(f"\n{file} {state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]
