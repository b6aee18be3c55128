"""Figures in words."""

from collections.abc import Sequence
from math import floor, log10

from fleetprune_sim.demo_state import scaled, size
from fleetprune_sim.report.comparison import Comparison, Row
from fleetprune_sim.report.figures import Spread

NONE = "–"
NEW_HEAD = "new head: nothing to compare with"
"""Of a trained model, part of which began anew."""
_BLANK = "\u00a0"
"""Does not end a line, so that a unit stays with its figure."""
PER_CENT = f"{_BLANK}%"
ENOUGH_SEEDS = 3
"""Below this, a deviation is itself too uncertain to be relied on."""
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


def lost(spread: Spread | None) -> str:
    """Accuracy that something costs: `6.2 ± 0.4`, in percentage points; below 0 it is a gain."""
    if spread is None:
        return NONE
    sd = "" if spread.sd is None else f" ± {100 * spread.sd:.1f}"
    mean = round(100 * spread.mean, 1) + 0.0  # no "-0.0"
    return f"{mean:.1f}{sd}".replace("-", "−")


def delta(comparison: Comparison, row: Row, device_class: str) -> str:
    """Points above the baseline, with the number of pairs where some seeds have no partner."""
    return _of_pairs(comparison.delta(row, device_class), row)


def mean_delta(comparison: Comparison, row: Row) -> str:
    """The same in the mean over classes."""
    return _of_pairs(comparison.mean_delta(row), row)


def _of_pairs(found: Spread | None, row: Row) -> str:
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


def milliseconds(ms: float) -> str:
    """`12.3 ms`, `0.057 ms`: never so short that nothing is left."""
    if ms >= 100 or ms == 0:
        return _whole(f"{ms:,.0f} ms")
    digits = max(0, 2 - floor(log10(ms)))
    exact = f"{ms:.{digits}f}"
    return _whole(f"{exact.rstrip('0').rstrip('.') if '.' in exact else exact} ms")


def joined(parts: Sequence[str], between: str = ", ") -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, (between.join(parts[:-1]), *parts[-1:])))


def counted(n: int, one: str, many: str = "") -> str:
    """`1 seed`, `3 seeds`."""
    return f"{n} {one if n == 1 else many or one + 's'}"


def numbered(seeds: Sequence[int]) -> str:
    """`seed 3`, `seeds 0, 2 and 5`, `seeds 0 to 4`."""
    many = "seed" if len(seeds) == 1 else "seeds"
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{many} {seeds[0]} to {seeds[-1]}"
    return f"{many} {joined([str(seed) for seed in seeds])}"


def spread_note(comparison: Comparison) -> str:
    """What means and deviations are taken over."""
    seeds = _numbers_of_seeds(comparison)
    if seeds == [1]:
        return reliance(comparison)
    how_many = counted(seeds[0], "seed") if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    said = f"Means ± sample standard deviations over {how_many}."
    return f"{said} {reliance(comparison)}".strip()


def reliance(comparison: Comparison) -> str:
    """A warning where seeds are few."""
    seeds = _numbers_of_seeds(comparison)
    if seeds == [1]:
        return "One seed: nothing here says how much is chance."
    few = f"With fewer than {ENOUGH_SEEDS} seeds, a spread is a guess."
    return few if seeds[0] < ENOUGH_SEEDS else ""


def _numbers_of_seeds(comparison: Comparison) -> list[int]:
    return sorted({len(row.variant.runs) for row in comparison.rows})


def _whole(figure: str) -> str:
    """A figure with its unit."""
    return figure.replace(" ", _BLANK)
