"""Figures and findings in words."""

from collections.abc import Sequence

from fleetprune_sim.demo_state import scaled, size
from fleetprune_sim.report.comparison import Comparison, Row
from fleetprune_sim.report.figures import Spread

NONE = "–"
_BLANK = "\u00a0"
"""Does not end a line, so that a unit stays with its figure."""
PER_CENT = f"{_BLANK}%"
_UNITS = ((86_400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


def percent(share: float | None, digits: int = 1) -> str:
    """`91.2 %`."""
    return NONE if share is None else f"{100 * share:.{digits}f}{PER_CENT}"


def percent_spread(spread: Spread | None) -> str:
    """`91.2 ± 0.3`, without the sign of per cent."""
    if spread is None:
        return NONE
    sd = "" if spread.sd is None else f" ± {100 * spread.sd:.1f}"
    return f"{100 * spread.mean:.1f}{sd}"


def points(spread: Spread | None) -> str:
    """A difference of accuracies: `+1.2 ± 0.3`, in percentage points."""
    if spread is None:
        return NONE
    sd = "" if spread.sd is None else f" ± {100 * spread.sd:.1f}"
    return f"{100 * spread.mean:+.1f}{sd}".replace("-", "−")


def delta(comparison: Comparison, row: Row, device_class: str) -> str:
    """Points above the baseline, with the number of pairs where some seeds have no partner."""
    found = comparison.delta(row, device_class)
    if found is None:
        return NONE
    return points(found) + ("" if found.n == len(row.variant.runs) else f" ({found.n})")


def times(factor: float | None) -> str:
    """`12.3 ×`."""
    return NONE if factor is None else _whole(f"{factor:.1f} ×")


def macs(count: float | None) -> str:
    """`1.2 M`."""
    return NONE if count is None else _whole(scaled(count, ("", "k", "M", "G", "T")))


def byte_size(count: float | None) -> str:
    """`1.2 MB`."""
    return NONE if count is None else _whole(size(count))


def duration(seconds: float | None) -> str:
    """In the largest unit of which there is at least one: `3.4 h`."""
    if seconds is None:
        return NONE
    length, unit = next((u for u in _UNITS if seconds >= u[0]), _UNITS[-1])
    return _whole(f"{seconds / length:.1f} {unit}")


def joined(parts: Sequence[str], between: str = ", ") -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, (between.join(parts[:-1]), *parts[-1:])))


def counted(n: int, one: str, many: str = "") -> str:
    """`1 seed`, `3 seeds`."""
    return f"{n} {one if n == 1 else many or one + 's'}"


def headline(comparison: Comparison) -> str:
    """The result: what each class gets at what cost, and what it takes on the wire."""
    best = comparison.best
    reached, macs_shares, byte_shares = [], [], []
    for name, cell in best.cells.items():
        accuracy = cell.spread("accuracy")
        share, file = cell.spread("macs_share"), cell.spread("bytes_share")
        if accuracy is not None and share is not None and file is not None:
            reached.append(f"{name} {percent(accuracy.mean)}")
            macs_shares.append(f"{100 * share.mean:.0f}")
            byte_shares.append(f"{100 * file.mean:.0f}")
    left_out = [name for name, cell in best.cells.items() if not cell.served]
    said = f"On {comparison.task}, {best.variant.label} "
    if reached:
        said += (
            f"gives {joined(reached)} accuracy on the test set, at {joined(macs_shares)}{PER_CENT}"
            f" of the dense model's MACs and {joined(byte_shares)}{PER_CENT} of its bytes"
        )
    if left_out:
        said += f"{', and' if reached else ''} leaves {joined(left_out)} without a model"
    elif not reached:
        said += "was not judged on a test set"
    if best.up_factor is not None:
        factor = best.up_factor.mean
        less = f"{factor:.1f} times less" if factor >= 1 else f"{1 / factor:.1f} times more"
        said += f"; its devices upload {less} than dense float32 updates would take"
    return f"{said}."


def verdict(comparison: Comparison) -> str:
    """Whether budgets are kept, and how the runner-up does."""
    best = comparison.best
    over = [name for name in comparison.classes if not best.cells[name].within]
    others = [row for row in comparison.rows if row is not best]
    if over:
        said = f"{best.variant.label} does not keep the budget of {joined(over)}."
    elif others:
        n, of = sum(row.within for row in others), len(others)
        if n == 0:
            as_others = "the only method that does"
        elif n < of:
            as_others = f"as {'does' if n == 1 else 'do'} {n} of the {of} other methods"
        else:
            as_others = "as does the other method" if n == 1 else f"as do all {n} other methods"
        said = f"It keeps every budget, {as_others}."
    else:
        said = "It keeps every budget."
    mean, rivals = best.mean("accuracy"), [r for r in others if r.within and r.mean("accuracy")]
    if mean is not None and not over and rivals:
        rival = max(rivals, key=_mean_accuracy)
        said += (
            f" Of these it is the most accurate, {percent(mean.mean)} in the mean of the classes; "
            f"next is {rival.variant.label} with {percent(_mean_accuracy(rival))}"
            f"{_gap(best, rival)}."
        )
    better = [
        f"{row.variant.label} ({percent(_mean_accuracy(row))})"
        for row in others
        if row.served == best.served and _mean_accuracy(row) > _mean_accuracy(best)
    ]
    return said + (f" More accurate, but over some budget: {joined(better)}." if better else "")


def spread_note(comparison: Comparison) -> str:
    """What means and deviations are taken over."""
    seeds = sorted({len(row.variant.runs) for row in comparison.rows})
    if seeds == [1]:
        return "One seed: nothing here says how much is chance."
    how_many = counted(seeds[0], "seed") if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    return f"Means ± sample standard deviations over {how_many}."


def _whole(figure: str) -> str:
    """A figure with its unit."""
    return figure.replace(" ", _BLANK)


def _mean_accuracy(row: Row) -> float:
    mean = row.mean("accuracy")
    return mean.mean if mean else -1.0


def _gap(best: Row, rival: Row) -> str:
    """How sure the lead is, as far as the spread over seeds says."""
    mine, theirs = best.mean("accuracy"), rival.mean("accuracy")
    if mine is None or theirs is None or mine.sd is None or theirs.sd is None:
        return ""
    lead = 100 * (mine.mean - theirs.mean)
    noise = 100 * (mine.sd**2 / mine.n + theirs.sd**2 / theirs.n) ** 0.5
    sure = "" if lead > 2 * noise else ", a lead within the spread of the seeds"
    return f" ({lead:.1f} points less{sure})"
