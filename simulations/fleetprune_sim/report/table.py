"""A table: what a chart draws, and what its CSV file holds."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Value = str | int | float | bool | None


@dataclass(frozen=True)
class Table:
    """Rows under column names."""

    name: str
    """Also of its CSV file."""
    columns: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]

    @classmethod
    def of(
        cls, name: str, columns: Sequence[str], records: Iterable[Mapping[str, Value]]
    ) -> "Table":
        """A table of records; a column that a record lacks is empty."""
        return cls(name, tuple(columns), tuple(tuple(r.get(c) for c in columns) for r in records))

    def column(self, name: str) -> list[Any]:
        """The values of one column."""
        at = self.columns.index(name)
        return [row[at] for row in self.rows]

    def where(self, name: str, value: Value) -> "Table":
        """The rows with a value in a column."""
        at = self.columns.index(name)
        return Table(self.name, self.columns, tuple(r for r in self.rows if r[at] == value))

    def csv(self) -> str:
        """The table as a CSV file; what is not known is an empty field."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        # Truth values as in JSON, and as the page's own script writes them.
        writer.writerows(
            [str(v).lower() if isinstance(v, bool) else v for v in row] for row in self.rows
        )
        return text.getvalue()


def rounded(value: float | None, digits: int) -> float | None:
    """A figure without digits that mean nothing and cost room."""
    return None if value is None else round(value, digits)
