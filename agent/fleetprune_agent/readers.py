"""The forms in which a device's samples come: `.npz` folders, CSV windows, a Python function."""

import csv
import importlib
import zipfile
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import DataError
from fleetprune_agent.config import CsvData, DataConfig, NpzData
from fleetprune_agent.data import Samples, checked


def load_samples(config: DataConfig) -> Samples:
    """Read the device's samples; DataError if there is nothing usable."""
    if isinstance(config, NpzData):
        return read_npz(config.path)
    if isinstance(config, CsvData):
        return read_csv(config)
    return read_function(config.function)


def read_npz(path: Path) -> Samples:
    """Read one `.npz` file or all of a folder, in the order of their names.

    Each has `x` (n, *shape) and, in all files or in none, `y` (n,) integers. Arrays of Python
    objects are refused: reading them would run code.

    Raises:
        DataError: A file cannot be read or holds something else.
    """
    parts = [_npz_part(file) for file in _files(path, ".npz")]
    return _concatenate(parts)


def _npz_part(file: Path) -> Samples:
    arrays: dict[str, NDArray[np.generic]] = {}
    try:
        with file.open("rb") as stream:  # of our own: numpy leaves it open if it is no archive
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile) or "x" not in archive:
                raise DataError(f"{file}: no array called x")
            for key in ("x", "y"):
                if key in archive:
                    arrays[key] = archive[key]
    except ValueError as e:
        raise DataError(
            f"{file}: not a plain .npz file, or it holds pickled Python objects, "
            "which are refused: save it with numpy.savez and numeric arrays"
        ) from e
    except (OSError, EOFError, zipfile.BadZipFile) as e:
        raise DataError(f"{file}: cannot be read as .npz ({e})") from e
    return checked(arrays["x"], arrays.get("y"), lambda i: f"{file} index {i}", str(file))


@dataclass
class _Window:
    row: int
    """Line of the file on which it begins."""
    values: "array[float]" = field(default_factory=lambda: array("d"))
    steps: list[float] = field(default_factory=list)
    labels: Counter[str] = field(default_factory=Counter)


def read_csv(config: CsvData) -> Samples:
    """Read sensor windows from one CSV file or all of a folder, in the order of their names.

    A row is one time step of one window. A sample is (columns, steps), its label the one that
    most of its rows have (the first met among equals).

    Raises:
        DataError: A column is missing, a cell is not a finite number, a label is unknown, or
            windows differ in length.
    """
    return _concatenate([_csv_part(file, config) for file in _files(config.path, ".csv")])


def _csv_part(file: Path, config: CsvData) -> Samples:
    windows = _csv_windows(file, config)
    if not windows:
        raise DataError(f"{file}: no samples (no row below the header)")
    names, parts = list(windows), list(windows.values())
    steps = len(parts[0].steps)
    x = np.empty((len(parts), len(config.columns), steps), np.float32)
    for i, (name, window) in enumerate(windows.items()):
        if len(window.steps) != steps:
            raise DataError(
                f"{file} row {window.row}: window {name} has {len(window.steps)} steps, "
                f"but window {names[0]} has {steps}"
            )
        values = np.frombuffer(window.values).reshape(steps, -1)
        x[i] = values[np.argsort(window.steps, kind="stable")].T
    y = None
    if config.label is not None:
        y = np.array([_label(file, w, config.labels) for w in parts], np.int64)
    rows = [w.row for w in parts]
    return checked(x, y, lambda i: f"{file} row {rows[i]}, window {names[i]}", str(file))


def _csv_windows(file: Path, config: CsvData) -> dict[str, _Window]:
    """Rows of each window, in the order in which the windows begin."""
    needed = [*config.columns, config.window]
    needed += [c for c in (config.step, config.label) if c is not None]
    windows: dict[str, _Window] = {}
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            header = reader.fieldnames or []
            if missing := [c for c in needed if c not in header]:
                raise DataError(f"{file}: no column {missing[0]}, it has {', '.join(header)}")
            for row in reader:
                line = reader.line_num
                name = row[config.window] or ""
                window = windows.setdefault(name, _Window(line))
                window.values.extend(_number(file, line, c, row[c]) for c in config.columns)
                step = float(len(window.steps))
                if config.step is not None:
                    step = _number(file, line, config.step, row[config.step])
                window.steps.append(step)
                if config.label is not None:
                    window.labels[row[config.label] or ""] += 1
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise DataError(f"{file}: cannot be read as CSV ({e})") from e
    return windows


def _number(file: Path, line: int, column: str, text: str | None) -> float:
    try:
        value = float(text or "")
    except ValueError as e:
        raise DataError(f"{file} row {line}: {column} is {text!r}, expected a number") from e
    if not np.isfinite(value):
        raise DataError(f"{file} row {line}: {column} is {text!r}, expected a finite number")
    return value


def _label(file: Path, window: _Window, labels: Sequence[str]) -> int:
    text = window.labels.most_common(1)[0][0]
    if labels:
        if text not in labels:
            raise DataError(
                f"{file} row {window.row}: label {text!r}, expected one of {', '.join(labels)}"
            )
        return labels.index(text)
    if not text.isascii() or not text.isdigit():
        raise DataError(
            f"{file} row {window.row}: label {text!r} is no class number: "
            "name the classes in the setting data.labels"
        )
    return int(text)


def read_function(name: str) -> Samples:
    """Call `module:function` of this machine, which returns (x, y) or (x, None).

    Raises:
        DataError: It cannot be imported or called, or returns something else.
    """
    module, _, function = name.partition(":")
    try:
        make: Callable[[], object] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as e:
        raise DataError(f"{name}: cannot be imported ({e})") from e
    try:
        made = make()
    except Exception as e:  # whatever the owner's own code raises
        raise DataError(f"{name}: raised {type(e).__name__}: {e}") from e
    if not isinstance(made, tuple) or len(made) != 2:
        raise DataError(f"{name}: returned {type(made).__name__}, expected a tuple (x, y)")
    return checked(made[0], made[1], lambda i: f"{name} index {i}", name)


def _files(path: Path, suffix: str) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    files = sorted(p for p in path.iterdir() if p.suffix == suffix and p.is_file())
    if not files:
        raise DataError(f"{path}: no {suffix} files in it")
    return files


def _concatenate(parts: Sequence[Samples]) -> Samples:
    """One `Samples` of several, each of which keeps its own names."""
    first = parts[0]
    if len(parts) == 1:
        return first
    for part in parts[1:]:
        if part.shape != first.shape:
            raise DataError(
                f"{part.where(0)}: sample of shape {part.shape}, "
                f"but {first.where(0)} has {first.shape}"
            )
        if (part.y is None) != (first.y is None):
            has, lacks = (first, part) if part.y is None else (part, first)
            raise DataError(f"{lacks.where(0)}: no labels, but {has.where(0)} has them")
    ends = np.cumsum([len(p) for p in parts])
    names = [p.where for p in parts]  # alone: `parts` would keep all samples in memory twice

    def where(i: int) -> str:
        k = int(np.searchsorted(ends, i, side="right"))
        return names[k](i - int(ends[k - 1]) if k else i)

    y = [p.y for p in parts if p.y is not None]
    return Samples(np.concatenate([p.x for p in parts]), np.concatenate(y) if y else None, where)
