"""What each chart shows, in words, for those who do not see it and those in a hurry."""

from collections.abc import Sequence
from statistics import median

from fleetprune_sim.history import DeviceRow
from fleetprune_sim.report import words
from fleetprune_sim.report.comparison import Comparison, Row
from fleetprune_sim.report.figures import Spread, mean_of
from fleetprune_sim.report.partition_table import label_counts
from fleetprune_sim.report.runs import Run
from fleetprune_sim.report.table import Table
from fleetprune_sim.report.tables import NO_ZEROS, POINTS


def of_rounds(comparison: Comparison) -> str:
    """Where the curves end."""
    parts = []
    for name in comparison.classes:
        finals = {
            row.variant.label: last.mean
            for row in comparison.rows
            if (last := row.cells[name].spread("validation")) is not None
        }
        if finals:
            first = max(finals, key=lambda label: finals[label])
            parts.append(f"{name} {words.percent(finals[first])}{_of(first, comparison)}")
    most = max((len(r.curve) for row in comparison.rows for c in row.cells.values()
                for r in c.results), default=0)  # fmt: skip
    thinned = f" {POINTS} of {most} evaluations are drawn." if most > POINTS else ""
    return f"Highest at the end: {words.joined(parts)}. Accuracy on the validation set.{thinned}"


def of_bytes(comparison: Comparison) -> str:
    """How much was moved."""
    totals = []
    for row in comparison.rows:
        moved = Spread.of(
            run.summary.traffic.up_bytes + run.summary.traffic.down_bytes
            for run in row.variant.runs
        )
        totals.append(_each(row, words.byte_size(mean_of(moved)), comparison))
    return f"The whole fleet's upload and download over the training: {words.joined(totals)}."


def of_time(comparison: Comparison) -> str:
    """How long it took."""
    totals = [
        _each(row, words.duration(mean_of(row.virtual_s)), comparison) for row in comparison.rows
    ]
    return f"The whole training, by the fleet's own clock: {words.joined(totals)}."


def of_pareto(table: Table, cost: str, comparison: Comparison) -> str:
    """Which models nothing beats."""
    at = {name: i for i, name in enumerate(table.columns)}
    # Classes that were given the same model are one point.
    front: dict[tuple[float, float, str], list[str]] = {}
    for row in table.rows:
        if row[at[f"{cost}_front"]]:
            key = _float(row[at[cost]]), _float(row[at["accuracy"]]), str(row[at["variant"]])
            front.setdefault(key, []).append(str(row[at["class"]]))
    models = "; ".join(
        f"{' · '.join(_named(label, classes, comparison))} {words.percent(accuracy)}"
        for (_, accuracy, label), classes in sorted(front.items())
    )
    said = f"No other model is at least as accurate for as little: {models}." if front else ""
    if any(table.column("high")[i] > low for i, low in enumerate(table.column("low"))):
        said += " Lines through points: one standard deviation over seeds."
    if any(table.column(f"{cost}_side")):
        said += " Points that would cover each other stand side by side."
    if not all(table.column("within_budget")):
        said += " Faint: over its class's budget."
    if NO_ZEROS in table.column("counted"):
        said += (
            " Hollow: the same file with its zeros left out, which a runtime gains only if it can "
            "skip them; not part of the front."
        )
    return said


def of_keep(table: Table, row: Row) -> str:
    """How narrow the models are."""
    mine = table.where("variant", row.variant.label)
    parts = []
    for name in dict.fromkeys(mine.column("class")):
        of_class = mine.where("class", name)
        kept, dense = sum(of_class.column("units")), sum(of_class.column("dense"))
        if dense:
            parts.append(f"{name} {words.percent(kept / dense, 0)}")
    return (
        f"Units that {row.variant.label} keeps, in all groups together: {words.joined(parts)}. "
        "Grey: the dense model."
    )


def of_weights(row: Row) -> str:
    """How many of the weights of these units are left; nothing where all are."""
    shares: dict[str, list[float]] = {}
    for run in row.variant.runs:
        for name, found in run.summary.classes.items():
            made = found.artifact
            if made is not None and made.nonzero_params is not None and made.params:
                shares.setdefault(name, []).append(made.nonzero_params / made.params)
    left = {name: mean_of(Spread.of(values)) for name, values in shares.items()}
    if all(share is None or share >= 1 for share in left.values()):
        return ""
    parts = [f"{name} {words.percent(share, 0)}" for name, share in left.items() if share]
    return f" Of their weights, those that are not zero: {words.joined(parts)}."


def of_partition(run: Run, shown: int) -> str:
    """How unevenly samples and labels are spread."""
    sizes = [d.samples for d in run.devices]
    shares = [share for d in run.devices if (share := _largest_share(d)) is not None]
    said = f"{words.counted(len(sizes), 'device')} with {min(sizes):,}"
    if min(sizes) == max(sizes):
        said += " samples each"
    else:
        said += f" to {max(sizes):,} samples, {median(sizes):,.0f} in the median"
    if shares:
        said += (
            f"; of these, {words.percent(median(shares), 0)} have the device's most frequent label"
        )
    drawn = "" if shown == len(sizes) else f" {shown} devices are drawn, evenly chosen by name."
    seed = f"Seed {run.summary.seed}"
    return (
        f"{said}. {seed}; the stronger the colour, the larger a label's share of a device.{drawn}"
    )


def of_energy(comparison: Comparison) -> str:
    """Who pays most."""
    parts = []
    for row in comparison.rows:
        energy = Spread.of(run.summary.virtual.energy_j for run in row.variant.runs)
        parts.append(_each(row, f"{energy.mean:,.0f}\u00a0J" if energy else words.NONE, comparison))
    return f"Energy of all devices together, by the simulated hardware: {words.joined(parts)}."


def of_reaching(comparison: Comparison) -> str:
    """Who never got there."""
    targets = [
        f"{name} {words.percent(target)}"
        for name, target in comparison.targets.items()
        if target is not None
    ]
    missed, some = [], False
    for name, target in comparison.targets.items():
        served = [row for row in comparison.rows if row.cells[name].served]
        reached = {row.variant.label: row.cells[name].seconds_to(target) for row in served}
        if never := [label for label, spread in reached.items() if spread is None]:
            missed.append(f"{name} by {words.joined(never)}")
        some |= any(
            s and s.n < len(row.variant.runs)
            for s, row in zip(reached.values(), served, strict=True)
        )
    said = (
        "Virtual time until accuracy on the validation set first reached its target: "
        f"{words.joined(targets)}."
    )
    said += f" Never reached: {'; '.join(missed)}." if missed else ""
    several = max(len(row.variant.runs) for row in comparison.rows) > 1
    said += " Beside each bar: in how many of the seeds, which it averages." if several else ""
    return said + (" Faint: not in all of them." if some else "")


def of_traffic(comparison: Comparison, direction: str) -> str:
    """What the whole fleet sent or received."""
    parts = []
    for row in comparison.rows:
        total = Spread.of(
            getattr(run.summary.traffic, f"{direction}_bytes") for run in row.variant.runs
        )
        parts.append(_each(row, words.byte_size(mean_of(total)), comparison))
    what = {"up": "uploaded", "down": "downloaded"}[direction]
    return f"All devices together {what}: {words.joined(parts)}."


def _named(label: str, classes: Sequence[str], comparison: Comparison) -> list[str]:
    """A method and the classes that it gives one and the same model."""
    every = len(classes) > 1 and len(classes) == len(comparison.classes)
    which = "every class" if every else " + ".join(classes)
    return [which] if len(comparison.rows) == 1 else [label, which]


def _each(row: Row, figure: str, comparison: Comparison) -> str:
    return figure if len(comparison.rows) == 1 else f"{row.variant.label} {figure}"


def _of(label: str, comparison: Comparison) -> str:
    return "" if len(comparison.rows) == 1 else f" ({label})"


def _largest_share(device: DeviceRow) -> float | None:
    counts = label_counts(device)
    return max(counts) / sum(counts) if counts and sum(counts) else None


def _float(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)
