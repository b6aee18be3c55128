"""Which settings are to be found out, and what stands for them until they are."""

from collections.abc import Mapping
from typing import Any

from fleetprune.patterns import Granularity

AUTO = "auto"
GRANULARITY = "pruning.granularity"
FIRST_CRITERION = "training.first_criterion"
CRITERION = "training.criterion"
KEYS = (GRANULARITY, FIRST_CRITERION, CRITERION)
"""All settings that may be `AUTO`."""


def take_asked(raw: dict[str, Any]) -> tuple[str, ...]:
    """Take every `AUTO` out of a fleet's description; what is left can be read.

    Args:
        raw: As in `fleet.toml`; the defaults take the places of what is taken out.

    Returns:
        Those of `KEYS` that were `AUTO`.
    """
    asked = tuple(key for key in KEYS if _at(raw, key) == AUTO)
    for key in asked:
        table, _, name = key.partition(".")
        del raw[table][name]
    pruning = raw.get("pruning")
    if GRANULARITY in asked and isinstance(pruning, dict) and _about_weights(pruning):
        # The default would be refused beside them.
        pruning["granularity"] = Granularity.HYBRID.value
    return asked


def put_asked(raw: dict[str, Any], asked: tuple[str, ...]) -> None:
    """Write `AUTO` into a fleet's description again."""
    for key in asked:
        table, _, name = key.partition(".")
        raw.setdefault(table, {})[name] = AUTO


def _at(raw: Mapping[str, Any], key: str) -> Any:
    table, _, name = key.partition(".")
    found = raw.get(table)
    return found.get(name) if isinstance(found, Mapping) else None


def _about_weights(pruning: Mapping[str, Any]) -> bool:
    """Whether the table says something of single weights."""
    return pruning.get("pattern", "1x1") != "1x1" or bool(pruning.get("dense_layers"))
