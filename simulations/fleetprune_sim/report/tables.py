"""The tables behind a comparison's charts, and those for scripts."""

from collections.abc import Iterator, Sequence

from fleetprune_sim.report.comparison import Cell, Comparison, Row
from fleetprune_sim.report.cost_axis import sides
from fleetprune_sim.report.figures import Spread
from fleetprune_sim.report.front import on_front
from fleetprune_sim.report.table import Table, Value, rounded

Record = dict[str, Value]

POINTS = 100
"""Most evaluations that are drawn of one curve."""
SHIPPED, NO_ZEROS = "as shipped", "zeros left out"


def figures(comparison: Comparison) -> Table:
    """One line per variant and class, averaged over seeds: the comparison itself."""
    spreads = ("accuracy", "own_accuracy", "macs", "macs_share", "bytes", "bytes_share")
    columns = ["task", "method", "variant", "class", "devices", "seeds"]
    for name in (*spreads, "up_factor", "seconds_to_target", "delta"):
        columns += [f"{name}_mean", f"{name}_sd", f"{name}_n"]
    columns += ["target", "runs_within_budget"]
    records = []
    for row, name, cell in _cells(comparison):
        target = comparison.targets[name]
        record: Record = {
            **_about(comparison, row),
            "class": name,
            "devices": cell.results[0].devices,
            "seeds": len(cell.results),
            "target": rounded(target, 5),
            "runs_within_budget": cell.kept,
        }
        for figure in (*spreads, "up_factor"):
            record |= _three(figure, cell.spread(figure))
        record |= _three("seconds_to_target", cell.seconds_to(target))
        record |= _three("delta", comparison.delta(row, name))
        records.append(record)
    return Table.of("figures", columns, records)


def per_seed(comparison: Comparison) -> Table:
    """One line per run and class: what the averages are made of."""
    figures = (
        "seed", "devices", "accuracy", "own_accuracy", "validation", "macs", "macs_share", "bytes",
        "bytes_share", "sparse_macs", "sparse_bytes", "within_budget", "client_rounds", "up_bytes",
        "down_bytes", "up_factor", "energy_j",
    )  # fmt: skip
    columns = ("task", "method", "variant", "class", *figures, "seconds_to_target")
    records = []
    for row, name, cell in _cells(comparison):
        for result in cell.results:
            record: Record = {**_about(comparison, row), "class": name}
            for figure in figures:
                value = getattr(result, figure)
                record[figure] = rounded(value, 6) if isinstance(value, float) else value
            target = comparison.targets[name]
            seconds = None if target is None else result.seconds_to(target)
            record["seconds_to_target"] = rounded(seconds, 3)
            records.append(record)
    return Table.of("seeds", columns, records)


def curves(comparison: Comparison) -> Table:
    """Validation accuracy on its way, averaged over seeds, at rounds that all of them judged."""
    columns = (
        "variant",
        "class",
        "round",
        "seeds",
        "accuracy",
        "low",
        "high",
        "bytes",
        "virtual_s",
    )
    records = []
    for row, name, cell in _cells(comparison):
        judged = [{m.round: m for m in r.curve} for r in cell.results if r.curve]
        common = sorted(set.intersection(*(set(j) for j in judged))) if judged else []
        for number in _thinned(common):
            moments = [j[number] for j in judged]
            accuracy = Spread.of(m.accuracy for m in moments)
            spent = Spread.of(m.bytes for m in moments)
            seconds = Spread.of(m.seconds for m in moments)
            assert accuracy is not None and spent is not None and seconds is not None
            half = accuracy.sd or 0.0
            records.append(
                Record(
                    {
                        "variant": row.variant.label,
                        "class": name,
                        "round": number,
                        "seeds": accuracy.n,
                        "accuracy": round(accuracy.mean, 5),
                        "low": round(max(0.0, accuracy.mean - half), 5),
                        "high": round(min(1.0, accuracy.mean + half), 5),
                        "bytes": round(spent.mean),
                        "virtual_s": round(seconds.mean, 2),
                    }
                )
            )
    return Table.of("accuracy", columns, records)


def pareto(comparison: Comparison) -> Table:
    """Accuracy on the test set against what a model costs; fronts are of the shipped figures.

    `side` is how many steps beside its place a point is drawn, so that none covers another.
    """
    columns = ("variant", "class", "counted", "seeds", "accuracy", "low", "high", "macs", "bytes",
               "within_budget", "macs_front", "bytes_front", "macs_side", "bytes_side")  # fmt: skip
    records = list(_points(comparison))
    shipped = [r for r in records if r["counted"] == SHIPPED]
    for cost in ("macs", "bytes"):
        front = on_front([(_number(r[cost]), _number(r["accuracy"])) for r in shipped])
        for record, marked in zip(shipped, front, strict=True):
            record[f"{cost}_front"] = marked
        known = [r for r in records if r[cost] is not None]
        places = [(_number(r[cost]), _number(r["accuracy"])) for r in known]
        ranks = [0 if r[f"{cost}_front"] else 1 if r["within_budget"] else 2 for r in known]
        beside = sides(places, ranks)
        for record, side in zip(known, beside, strict=True):
            record[f"{cost}_side"] = side
    return Table.of("pareto", columns, records)


def spent(comparison: Comparison) -> Table:
    """What the training took of a device of each class: energy, traffic, time to the target."""
    columns = ("variant", "class", "seeds", "devices", "energy_j_per_device", "up_bytes_per_device",
               "down_bytes_per_device", "up_bytes", "down_bytes", "target", "seconds_to_target",
               "seeds_that_reached_it", "seeds_with_a_model")  # fmt: skip
    records = []
    for row, name, cell in _cells(comparison):
        target = comparison.targets[name]
        reached = cell.seconds_to(target)
        record: Record = {
            "variant": row.variant.label,
            "class": name,
            "seeds": len(cell.results),
            "devices": cell.results[0].devices,
            "target": rounded(target, 5),
            "seconds_to_target": rounded(reached.mean, 2) if reached else None,
            "seeds_that_reached_it": reached.n if reached else 0,
            "seeds_with_a_model": sum(r.served for r in cell.results),
        }
        for figure, digits in (("energy_j", 3), ("up_bytes", 0), ("down_bytes", 0)):
            each = Spread.of(getattr(r, figure) / max(1, r.devices) for r in cell.results)
            total = cell.spread(figure)
            record[f"{figure}_per_device"] = rounded(each.mean, digits) if each else None
            record[figure] = rounded(total.mean, digits) if total else None
        records.append(record)
    return Table.of("spent", columns, records)


def keep_counts(comparison: Comparison) -> Table:
    """Units that each class's model has, averaged over seeds, beside the dense model's."""
    records = []
    for row in comparison.rows:
        for name in comparison.classes:
            keeps = [
                (run.summary.classes[name].keep, run.summary.groups)
                for run in row.variant.runs
                if name in run.summary.classes and run.summary.classes[name].model
            ]
            for group in keeps[0][1] if keeps else ():
                units = Spread.of(keep.get(group) for keep, _ in keeps)
                if units is not None:
                    dense = keeps[0][1][group]
                    records.append(
                        Record(
                            {
                                "variant": row.variant.label,
                                "class": name,
                                "group": group,
                                "units": rounded(units.mean, 2),
                                "dense": dense,
                            }
                        )
                    )
    return Table.of("units", ("variant", "class", "group", "units", "dense"), records)


def _points(comparison: Comparison) -> Iterator[Record]:
    for row, name, cell in _cells(comparison):
        accuracy = cell.spread("accuracy")
        if accuracy is None:
            continue
        half = accuracy.sd or 0.0
        for counted, macs, size in (
            (SHIPPED, cell.spread("macs"), cell.spread("bytes")),
            (NO_ZEROS, cell.spread("sparse_macs"), cell.spread("sparse_bytes")),
        ):
            if macs is not None or size is not None:
                yield {
                    "variant": row.variant.label,
                    "class": name,
                    "counted": counted,
                    "seeds": accuracy.n,
                    "accuracy": round(accuracy.mean, 5),
                    "low": round(max(0.0, accuracy.mean - half), 5),
                    "high": round(min(1.0, accuracy.mean + half), 5),
                    "macs": round(macs.mean) if macs else None,
                    "bytes": round(size.mean) if size else None,
                    "within_budget": cell.within,
                    "macs_front": False,
                    "bytes_front": False,
                    "macs_side": 0,
                    "bytes_side": 0,
                }


def _cells(comparison: Comparison) -> Iterator[tuple[Row, str, Cell]]:
    for name in comparison.classes:
        for row in comparison.rows:
            if row.cells[name].results:
                yield row, name, row.cells[name]


def _about(comparison: Comparison, row: Row) -> Record:
    method, label = row.variant.method, row.variant.label
    return {"task": comparison.task, "method": method, "variant": label}


def _three(name: str, spread: Spread | None) -> Record:
    return {
        f"{name}_mean": rounded(spread.mean, 6) if spread else None,
        f"{name}_sd": rounded(spread.sd, 6) if spread else None,
        f"{name}_n": spread.n if spread else 0,
    }


def _thinned(rounds: Sequence[int]) -> list[int]:
    """At most `POINTS` of them, evenly spaced, the first and the last among them."""
    if len(rounds) <= POINTS:
        return list(rounds)
    step = (len(rounds) - 1) / (POINTS - 1)
    return [rounds[round(i * step)] for i in range(POINTS)]


def _number(value: Value) -> float:
    assert isinstance(value, int | float)
    return float(value)
