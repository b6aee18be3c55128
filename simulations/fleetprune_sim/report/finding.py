"""Where runs are: in the folders a user names, and in their sub-folders."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fleetprune.errors import DataError
from fleetprune_sim.history import FILE
from fleetprune_sim.report.runs import SUMMARY, Run, read_run

WARM_UP = "dense.pt"
"""Beside the history of a training that only made the model that other runs begin with."""
DEPTH = 4
"""Levels of sub-folders that are looked into."""


@dataclass(frozen=True)
class Found:
    """What is in the folders."""

    runs: tuple[Run, ...]
    unfinished: tuple[Path, ...]
    """Folders of runs that have a history but no summary yet."""
    problems: tuple[str, ...]
    """One line each."""


def find_runs(places: Sequence[Path]) -> Found:
    """All runs in some folders, each once, in the order of the folders and of their names."""
    runs: list[Run] = []
    unfinished: list[Path] = []
    problems: list[str] = []
    seen: set[Path] = set()
    for place in places:
        folders = list(_folders(place)) if place.is_dir() else []
        if not folders:
            problems.append(_nothing(place))
        for folder in folders:
            if folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            if not (folder / SUMMARY).exists():
                unfinished.append(folder)
                continue
            try:
                runs.append(read_run(folder))
            except DataError as e:
                problems.append(str(e))
    return Found(tuple(runs), tuple(unfinished), tuple(problems))


def _folders(place: Path) -> Iterator[Path]:
    """Folders with a history; nothing below such a folder is looked at.

    Warm-ups are no runs to compare, unless a user names one.
    """
    for name, below, files in os.walk(place):
        folder = Path(name)
        if FILE in files:
            if WARM_UP not in files or folder == place:
                yield folder
            below.clear()
        elif len(folder.relative_to(place).parts) >= DEPTH:
            below.clear()
        below.sort()


def _nothing(place: Path) -> str:
    if not place.exists():
        return f"{place}: no such folder"
    if not place.is_dir():
        return f"{place}: not a folder"
    if (place / SUMMARY).exists():
        return f"{place}: {SUMMARY} without {FILE} is not a simulated run"
    return (
        f"{place}: no run in it or in {DEPTH} levels of sub-folders, "
        f"expected a folder with {SUMMARY} and {FILE}"
    )
