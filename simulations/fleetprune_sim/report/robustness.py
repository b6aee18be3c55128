"""What is left of accuracy under corruptions: per variant and class, and before the cut."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fleetprune_sim.report.comparison import Cell, Comparison, Row
from fleetprune_sim.report.figures import Spread
from fleetprune_sim.report.table import Table, rounded
from fleetprune_sim.robustness import CLEAN

BEFORE = "before the cut"


@dataclass(frozen=True)
class Stand:
    """How one model stands corruptions, in one or several seeds."""

    by_seed: Mapping[int, Mapping[str, float]]
    """Of each seed the accuracy by corruption."""

    @property
    def corruptions(self) -> list[str]:
        """Names of all that it has met, `CLEAN` among them."""
        return list(dict.fromkeys(name for found in self.by_seed.values() for name in found))

    def accuracy(self, corruption: str) -> dict[int, float | None]:
        """Of every seed."""
        return {seed: found.get(corruption) for seed, found in self.by_seed.items()}

    def lost(self, corruption: str) -> dict[int, float | None]:
        """Of every seed, how much less accurate it is than on the same samples without any."""
        return {
            seed: found[CLEAN] - found[corruption] if {CLEAN, corruption} <= found.keys() else None
            for seed, found in self.by_seed.items()
        }


def of_class(cell: Cell) -> Stand:
    """Of the models that a class was given."""
    return Stand({r.seed: r.robustness for r in cell.results if r.robustness})


def before_cut(row: Row) -> Stand:
    """Of the trained models that a variant has cut."""
    befores = {run.summary.seed: run.summary.before for run in row.variant.runs}
    return Stand({seed: b.robustness for seed, b in befores.items() if b and b.robustness})


def befores(comparison: Comparison) -> list[tuple[Stand, list[Row]]]:
    """Trained models that were cut, each once, with the variants that have cut them."""
    found: list[tuple[Stand, list[Row]]] = []
    for row in comparison.rows:
        stand = before_cut(row)
        same = next((rows for known, rows in found if known == stand), None)
        if same is not None:
            same.append(row)
        elif stand.by_seed:
            found.append((stand, [row]))
    return found


def new_head(row: Row) -> str | None:
    """The layer that was new to the trained models of a variant, so that nobody judged them."""
    heads = [run.summary.new_head for run in row.variant.runs if run.summary.before is None]
    return next((head for head in heads if head is not None), None)


def new_headed(comparison: Comparison) -> list[Row]:
    """Variants that have cut models with a new head, and none that could be judged."""
    return [
        row for row in comparison.rows if new_head(row) is not None and not before_cut(row).by_seed
    ]


def corruptions(comparison: Comparison) -> list[str]:
    """Names of those that any model has met."""
    names = dict.fromkeys(name for _, stand in _all(comparison) for name in stand.corruptions)
    return [name for name in names if name != CLEAN]


def robustness(comparison: Comparison) -> Table:
    """A line per model and corruption, averaged over seeds; a model without a class was cut."""
    columns = ("task", "method", "variant", "model", "class", "corruption", "seeds",
               "accuracy_mean", "accuracy_sd", "lost_mean", "lost_sd")  # fmt: skip
    rows = []
    for (row, name), stand in _all(comparison):
        model = BEFORE if name is None else "shipped"
        about = comparison.task, row.variant.method, row.variant.label, model, name
        for corruption in (CLEAN, *corruptions(comparison)):
            accuracy = Spread.of(stand.accuracy(corruption).values())
            lost = Spread.of(stand.lost(corruption).values())
            if accuracy is not None:
                figures = [
                    f for s in (accuracy, lost) for f in ((s.mean, s.sd) if s else (None, None))
                ]
                rows.append((*about, corruption, accuracy.n, *(rounded(f, 6) for f in figures)))
    return Table("robustness", columns, tuple(rows))


def _all(comparison: Comparison) -> Iterator[tuple[tuple[Row, str | None], Stand]]:
    """Every model that was looked at; without a class: one that was cut."""
    for row in comparison.rows:
        if (stand := before_cut(row)).by_seed:
            yield (row, None), stand
    for name in comparison.classes:
        for row in comparison.rows:
            if (stand := of_class(row.cells[name])).by_seed:
                yield (row, name), stand
