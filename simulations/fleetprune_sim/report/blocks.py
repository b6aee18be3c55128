"""What a page is made of: sections with figures and tables, before they are HTML."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from fleetprune_sim.report.table import Table


@dataclass(frozen=True)
class Plot:
    """One chart of a figure."""

    title: str
    """Above it, where a figure has several."""
    label: str
    """Said instead of it to those who do not see it."""
    spec: str
    """Name of its specification."""
    where: Mapping[str, str] = field(default_factory=dict)
    """Rows that it draws: a value per column."""


@dataclass(frozen=True)
class Legend:
    """Names and how they are drawn."""

    title: str
    colors: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, str] = field(default_factory=dict)
    shades: Mapping[str, float] = field(default_factory=dict)
    """How strong one colour is."""


@dataclass(frozen=True)
class Figure:
    """Charts of one table, under one heading."""

    name: str
    title: str
    says: str
    """The finding in words."""
    table: Table
    plots: Sequence[Plot]
    specs: Mapping[str, Any]
    legends: Sequence[Legend] = ()
    more: Sequence[Table] = ()
    """Further files to download."""
    wide: bool = False
    """One chart over the whole width."""


class Standing(Enum):
    """How a row of a table stands out."""

    BEST = "★"
    """Nothing within the budget is more accurate."""
    OVER = "☆"
    """More accurate still, but over the budget."""


@dataclass(frozen=True)
class Mark:
    """A table's cell that says yes or no."""

    good: bool | None
    text: str


Cells = list[str | Mark]


@dataclass(frozen=True)
class Grid:
    """A table for people."""

    name: str
    title: str
    says: str
    head: Sequence[str]
    groups: Sequence[tuple[str, Sequence[Sequence[str | Mark]]]]
    """Rows under a common heading; the first cell of a row is its own heading."""
    table: Table | None = None
    """The same for scripts."""
    folded: bool = False
    standing: Mapping[tuple[int, int], Standing] = field(default_factory=dict)
    """Rows that stand out, by the number of their group and their own in it."""
    prose: bool = False
    """Cells are words, not figures."""

    def by_class(self) -> "Grid":
        """Of a single method: a row per class."""
        rows = [[title, *row[1:]] for title, (row,) in self.groups]
        return replace(self, head=["class", *self.head[1:]], groups=[("", rows)])


@dataclass(frozen=True)
class Section:
    """Under one heading."""

    title: str
    blocks: Sequence[Figure | Grid]
    columns: int = 1
    """Where there is room."""
