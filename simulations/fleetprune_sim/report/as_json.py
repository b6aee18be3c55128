"""A comparison for scripts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fleetprune_sim.report.comparison import Cell, Comparison, Row
from fleetprune_sim.report.figures import Spread
from fleetprune_sim.report.robustness import Stand, before_cut, new_head, of_class
from fleetprune_sim.report.table import rounded
from fleetprune_sim.report.variants import fleet_differences

SCHEMA = 1
FIGURES = ("accuracy", "own_accuracy", "macs", "macs_share", "bytes", "bytes_share", "up_factor")


def comparisons_json(
    comparisons: Sequence[Comparison], unfinished: Sequence[Path]
) -> dict[str, Any]:
    """All tasks: per variant and class each figure's mean, sample deviation and number of seeds."""
    return {
        "schema": SCHEMA,
        "tasks": [_task(c) for c in comparisons],
        "unfinished": [str(folder) for folder in unfinished],
    }


def _task(comparison: Comparison) -> dict[str, Any]:
    baseline = comparison.baseline
    return {
        "task": comparison.task,
        "baseline": None if baseline is None else baseline.variant.label,
        "targets": {name: rounded(t, 9) for name, t in comparison.targets.items()},
        "fleet_differs_in": fleet_differences([row.variant for row in comparison.rows]),
        "variants": [_variant(comparison, row) for row in comparison.rows],
    }


def _variant(comparison: Comparison, row: Row) -> dict[str, Any]:
    return {
        "label": row.variant.label,
        "method": row.variant.method,
        "settings": dict(row.variant.own),
        "seeds": list(row.variant.seeds),
        "virtual_s": _spread(row.virtual_s),
        "up_factor": _spread(row.up_factor),
        "before": _before(row),
        "new_head": new_head(row),
        "mean_over_classes": {
            "classes": row.served,
            "accuracy": _spread(row.mean("accuracy")),
            "own_accuracy": _spread(row.mean("own_accuracy")),
            "delta": _spread(comparison.mean_delta(row)),
        },
        "classes": {
            name: _class(comparison, row, name, cell)
            for name, cell in row.cells.items()
            if cell.results
        },
    }


def _class(comparison: Comparison, row: Row, name: str, cell: Cell) -> dict[str, Any]:
    return {
        **{figure: _spread(cell.spread(figure)) for figure in FIGURES},
        "runs": len(cell.results),
        "runs_within_budget": cell.kept,
        "seconds_to_target": _spread(cell.seconds_to(comparison.targets[name])),
        "delta": _spread(comparison.delta(row, name)),
        "robustness": _stand(of_class(cell)),
    }


def _before(row: Row) -> dict[str, Any] | None:
    """The trained models that were cut."""
    befores = [run.summary.before for run in row.variant.runs]
    accuracy = Spread.of(b.accuracy for b in befores if b is not None)
    if accuracy is None:
        return None
    return {"accuracy": _spread(accuracy), "robustness": _stand(before_cut(row))}


def _stand(stand: Stand) -> dict[str, Any]:
    """By corruption the accuracy, and what is lost of that on the same samples without any."""
    return {
        name: {
            "accuracy": _spread(Spread.of(stand.accuracy(name).values())),
            "lost": _spread(Spread.of(stand.lost(name).values())),
        }
        for name in stand.corruptions
    }


def _spread(spread: Spread | None) -> dict[str, Any] | None:
    if spread is None:
        return None
    return {"mean": rounded(spread.mean, 9), "sd": rounded(spread.sd, 9), "n": spread.n}
