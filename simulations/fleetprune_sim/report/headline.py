"""The result in a few sentences."""

from collections.abc import Sequence

from fleetprune_sim.report import words
from fleetprune_sim.report.budgets import left_to_devices
from fleetprune_sim.report.comparison import Comparison, Row
from fleetprune_sim.report.leads import behind, lead_in_mean


def about(comparison: Comparison) -> str:
    """What was run, and how far it can be relied on."""
    by_seeds: dict[tuple[int, ...], list[str]] = {}
    for row in comparison.rows:
        by_seeds.setdefault(row.variant.seeds, []).append(row.variant.label)
    parts = [
        f"{words.joined(labels)}{', each' if len(labels) > 1 else ''} with {words.numbered(seeds)}"
        for seeds, labels in by_seeds.items()
    ]
    n = sum(len(row.variant.runs) for row in comparison.rows)
    said = f"{words.counted(n, 'simulated run')} of {comparison.task}: {'; '.join(parts)}."
    return f"{said} {words.reliance(comparison)}".strip()


def headline(comparison: Comparison) -> str:
    """The result: what each class gets at what cost, and what it takes on the wire."""
    best = comparison.best
    reached, macs_shares, byte_shares = [], [], []
    for name, cell in best.cells.items():
        accuracy = cell.spread("accuracy")
        share, file = cell.spread("macs_share"), cell.spread("bytes_share")
        if accuracy is not None and share is not None and file is not None:
            reached.append(f"{name} {words.percent(accuracy.mean)}")
            macs_shares.append(f"{100 * share.mean:.0f}")
            byte_shares.append(f"{100 * file.mean:.0f}")
    left_out = [name for name, cell in best.cells.items() if not cell.served]
    said = f"On {comparison.task}, {best.variant.label} "
    if reached:
        said += (
            f"gives {words.joined(reached)} accuracy on the test set, at "
            f"{words.joined(macs_shares)}{words.PER_CENT} of the dense model's MACs and "
            f"{words.joined(byte_shares)}{words.PER_CENT} of its bytes"
        )
    if left_out:
        said += f"{', and' if reached else ''} leaves {words.joined(left_out)} without a model"
    elif not reached:
        said += "was not judged on a test set"
    if best.up_factor is not None:
        factor = best.up_factor.mean
        less = f"{factor:.1f} times less" if factor >= 1 else f"{1 / factor:.1f} times more"
        said += f"; its devices upload {less} than dense float32 updates would take"
    return f"{said}.{_behind(comparison)}"


def verdict(comparison: Comparison) -> str:
    """Whether budgets are kept, and how the runner-up does."""
    best = comparison.best
    over = [name for name in comparison.classes if not best.cells[name].within]
    others = [row for row in comparison.rows if row is not best]
    open_limits = left_to_devices(comparison)
    if over:
        said = f"{best.variant.label} does not keep the budget of {words.joined(over)}."
    else:
        aside = ", latency aside" if open_limits else ""
        said = f"It keeps every budget{aside}{_as_others(others)}."
    if open_limits:
        said += f" Whether {words.joined(open_limits)} is fast enough, only the device can tell."
    mean, rivals = best.mean("accuracy"), [r for r in others if r.within and r.mean("accuracy")]
    if mean is not None and not over and rivals:
        rival = max(rivals, key=_mean_accuracy)
        said += (
            f" Of these it is the most accurate, {words.percent(mean.mean)} in the mean of the "
            f"classes; next is {rival.variant.label} with {words.percent(_mean_accuracy(rival))}"
            f"{_gap(best, rival)}."
        )
    better = [
        f"{row.variant.label} ({words.percent(_mean_accuracy(row))})"
        for row in others
        if row.served == best.served and _mean_accuracy(row) > _mean_accuracy(best)
    ]
    return said + f" More accurate, but over some budget: {words.joined(better)}." * bool(better)


def _behind(comparison: Comparison) -> str:
    """In which classes another method is better."""
    parts = []
    for label, classes in behind(comparison).items():
        by = [f"{100 * ahead:.1f} points on {name}" for name, ahead in classes.items()]
        parts.append(f"{label} by {words.joined(by)}")
    return f" It is behind {'; behind '.join(parts)}." if parts else ""


def _as_others(others: Sequence[Row]) -> str:
    """How many of them keep every budget too."""
    n, of = sum(row.within for row in others), len(others)
    if not others:
        return ""
    if n == 0:
        return ", the only method that does"
    if n < of:
        return f", as {'does' if n == 1 else 'do'} {n} of the {of} other methods"
    every = {1: "does the other method", 2: "do both other methods"}
    return f", as {every.get(n, f'do all {n} other methods')}"


def _mean_accuracy(row: Row) -> float:
    mean = row.mean("accuracy")
    return mean.mean if mean else -1.0


def _gap(best: Row, rival: Row) -> str:
    """How sure the lead is, as far as the spread over seeds says."""
    found = lead_in_mean(best, rival)
    if found is None or found.error is None:
        return ""
    sure = "" if found.clear else ", a lead within the spread of the seeds"
    return f" ({100 * found.by:.1f} points less{sure})"
