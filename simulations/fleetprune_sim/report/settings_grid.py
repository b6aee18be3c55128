"""The tables of what the runs were told, for people."""

from fleetprune_sim.report import words
from fleetprune_sim.report.blocks import Grid
from fleetprune_sim.report.comparison import Comparison
from fleetprune_sim.report.setting_words import meaning, short, value
from fleetprune_sim.report.table import Table
from fleetprune_sim.report.variants import differing, fleet_differences


def settings(comparison: Comparison) -> list[Grid]:
    """What the runs were told: what differs, what is the same."""
    variants = [row.variant for row in comparison.rows]
    labels = [v.label for v in variants]
    apart = differing([v.settings for v in variants])
    table = Table(
        "settings",
        ("setting", *labels),
        tuple(
            (name, *(v.settings.get(name) for v in variants))
            for name in dict.fromkeys(n for v in variants for n in v.settings)
        ),
    )
    same = [
        [short(name), value(text), meaning(name)]
        for name, text in sorted(variants[0].settings.items())
        if name not in apart
    ]
    head = ["setting", "value", "what it is"]
    if len(variants) == 1:
        says = f"Of {words.numbered(variants[0].seeds)}; named as in fleet.toml."
        return [
            Grid("settings", "Settings", says, head, [("", same)], table, folded=True, prose=True)
        ]
    seeds = [
        "seeds",
        *(", ".join(map(str, v.seeds)) for v in variants),
        "what all that is drawn begins with",
    ]
    rows = [
        [short(name), *(value(v.settings.get(name)) for v in variants), meaning(name)]
        for name in apart
    ]
    says = "Settings as fleet.toml names them. All else is the same for all methods; see below."
    if fleet := fleet_differences(variants):
        says += (
            f" Read with care: {words.joined([short(name) for name in fleet])} differ, so the "
            "methods did not meet the same fleet."
        )
    return [
        Grid(
            "settings", "Where the methods differ", says, ["setting", *labels, "what it is"],
            [("", [seeds, *rows])], table, prose=True,
        ),
        Grid(
            "shared-settings", "Settings of every run", "", head, [("", same)], folded=True,
            prose=True,
        ),
    ]  # fmt: skip
