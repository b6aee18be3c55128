"""Which class loses how much more than an uncut model under which corruption, in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from scipy.special import stdtr

from fleetprune_sim.report import words
from fleetprune_sim.report.comparison import Comparison, paired
from fleetprune_sim.report.figures import Spread, mean_of
from fleetprune_sim.report.leads import CLEAR, LEAST, Lead, lead
from fleetprune_sim.report.robustness import (
    Stand,
    before_cut,
    corruptions,
    new_headed,
    of_class,
)

WELL = 2
"""How many times as many clear differences as chance makes are taken for more than chance."""


@dataclass(frozen=True)
class Difference:
    """How much more one class's model loses than the one that it is compared with."""

    device_class: str
    corruption: str
    more: Spread
    """by pairs of seeds, where there are some; below 0 it loses less"""
    clear: bool
    """Whether it is more than chance, as far as the seeds say; see `leads`."""
    chance: float | None
    """How likely seeds alone make it look so; None: a single seed, which says nothing."""


def finding(comparison: Comparison) -> str:
    """What corruptions cost the best method, and whether more than they cost an uncut model."""
    best, names = comparison.best, corruptions(comparison)
    mine = {n: stand for n, cell in best.cells.items() if (stand := of_class(cell)).by_seed}
    if not mine:
        return ""
    said = [_dearest(best.variant.label, _once(mine), names)]
    if best in new_headed(comparison):
        said.append(f"{words.NEW_HEAD.capitalize()} before the cut.")
    if (against := _reference(comparison, mine)) is not None:
        reference, stand, classes = against
        found = differences(_once({name: mine[name] for name in classes}), stand, names)
        said += [_compared(best.variant.label, reference, found)] if found else []
    return " ".join(said)


def _once(mine: Mapping[str, Stand]) -> dict[str, Stand]:
    """Of classes that were given the same model a single one, under all their names."""
    found: list[tuple[list[str], Stand]] = []
    for name, stand in mine.items():
        same = next((names for names, known in found if known == stand), None)
        if same is None:
            found.append(([name], stand))
        else:
            same.append(name)
    every = len(mine) > 1 and len(found) == 1
    return {"every class" if every else " + ".join(names): stand for names, stand in found}


def differences(
    mine: Mapping[str, Stand], reference: Stand, names: Sequence[str]
) -> list[Difference]:
    """Of every class under every corruption, the largest first."""
    found = []
    for device_class, stand in mine.items():
        for name in names:
            own, theirs = stand.lost(name), reference.lost(name)
            ahead = lead(own, theirs)
            if ahead is None:
                continue
            pairs = paired(own, theirs)
            by_pairs = pairs is not None and pairs.sd is not None
            more = pairs if pairs is not None and by_pairs else Spread(ahead.by, None, 1)
            free = more.n - 1 if by_pairs else len(own) + len(theirs) - 2
            chance = None if ahead.error is None else 2 * float(stdtr(free, -CLEAR))
            clear = Lead(abs(ahead.by), ahead.error).clear
            found.append(Difference(device_class, name, more, clear, chance))
    return sorted(found, key=lambda d: d.more.mean, reverse=True)


def _reference(
    comparison: Comparison, mine: Mapping[str, Stand]
) -> tuple[str, Stand, list[str]] | None:
    """What the best method's models are compared with, and which of its classes are.

    It is the trained model that they were cut from; without one, the widest model there is, and
    then those classes whose models are narrower.
    """
    if (before := before_cut(comparison.best)).by_seed:
        return "the model before the cut", before, list(mine)
    macs = {
        (i, name): mean_of(cell.spread("macs")) or 0.0
        for i, row in enumerate(comparison.rows)
        for name, cell in row.cells.items()
        if of_class(cell).by_seed
    }
    widest = max(macs, key=lambda at: macs[at])  # of equals the first: the best method's own
    narrower = [name for name in mine if macs[0, name] < macs[widest]]
    if not narrower:
        return None
    row, name = comparison.rows[widest[0]], widest[1]
    whose = "its" if row is comparison.best else f"{row.variant.label}'s"
    return f"{whose} widest model ({name})", of_class(row.cells[name]), narrower


def _dearest(label: str, mine: Mapping[str, Stand], names: Sequence[str]) -> str:
    """The corruption that costs most in the mean of the classes."""
    costs = {
        name: {c: cost for c, s in mine.items() if (cost := Spread.of(s.lost(name).values()))}
        for name in names
    }
    means = {name: fmean(c.mean for c in each.values()) for name, each in costs.items() if each}
    if not means or max(means.values()) < LEAST:
        return f"No corruption costs {label} accuracy."
    worst = max(means, key=lambda name: means[name])
    parts = [f"{name} {words.lost(cost)}" for name, cost in costs[worst].items()]
    return f"{label} loses most under {worst}: {words.joined(parts)} points."


def _compared(label: str, reference: str, found: Sequence[Difference]) -> str:
    """What is more than chance, out of how many differences; of each model the largest."""
    clear = [d for d in found if d.clear]
    if not clear:
        top = found[0]
        most = f": at most {_points([top])} under {top.corruption}" if top.more.mean > 0 else ""
        return f"Compared with {reference}, {label} does not clearly lose more{most}."
    parts = [
        f"{what} under {name}: {_points([d for d in some if d.corruption == name])}"
        for what, some in (
            ("more", _first([d for d in clear if d.more.mean > 0])),
            ("less", _first([d for d in reversed(clear) if d.more.mean < 0])),
        )
        for name in dict.fromkeys(d.corruption for d in some)
    ]
    chances = [d.chance for d in found if d.chance is not None]
    expected = sum(chances)
    verb, but, those, end = "clearly loses", "", "clear", ""
    if not chances:
        verb, those = "loses", "a point or more"
    elif len(clear) >= WELL * expected:
        end = f"; chance alone makes about {expected:.2g} look so"
    else:
        verb, but = "seems to lose", "But "
        end = f", and chance alone makes about {expected:.2g} look so"
    of = f"{'of' if but else 'Of'} {words.counted(len(found), 'difference')}"
    are = f"{len(clear)} {'is' if len(clear) == 1 else 'are'}"
    return (
        f"Compared with {reference}, {label} {verb} {'; '.join(parts)}. "
        f"{but}{of} {are} {those}{end}."
    )


def _first(found: Sequence[Difference]) -> list[Difference]:
    """Of each model the first."""
    firsts: dict[str, Difference] = {}
    for difference in found:
        firsts.setdefault(difference.device_class, difference)
    return list(firsts.values())


def _points(found: Sequence[Difference]) -> str:
    """How far apart they are, whichever way."""
    costs = [replace(d.more, mean=abs(d.more.mean)) for d in found]
    parts = [f"{d.device_class} {words.lost(c)}" for d, c in zip(found, costs, strict=True)]
    return f"{words.joined(parts)} points"
