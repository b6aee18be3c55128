"""What a real run writes into its summary is in the documentation, key by key."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetprune_sim.report.runs import read_run
from fleetprune_sim.study import Order, carry_out

ROOT = Path(__file__).parents[2]
TASK = "tests.simulations.tiny_task:task"
FREE = {"settings", "groups", "keep"}
"""Tables whose keys are the user's, or are documented where they are set."""


def documented() -> dict[str, set[str]]:
    """Keys by the table that they are in; "" for the file itself."""
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    section = text.split("## The keys of `summary.json`")[1]
    found: dict[str, set[str]] = {"": set()}
    for name, says in re.findall(r"^\| (`.*?`) \| (.*) \|$", section, re.MULTILINE):
        for key in re.findall(r"`([^`]+)`", name):
            found[key.removesuffix("[]")] = set(re.findall(r"`([^`]+)`", says))
            if "." not in key:
                found[""].add(key.removesuffix("[]"))
    return found


def keys(value: dict, place: str = "") -> Iterator[tuple[str, str]]:
    """Of every table in a summary its place and its keys."""
    for key, inner in value.items():
        yield place, key
        below = f"{place}.{key}".strip(".")
        if key == "classes":
            for entry in inner.values():
                yield from keys(entry, "classes.NAME")
        elif isinstance(inner, dict) and key not in FREE:
            yield from keys(inner, below)


@pytest.mark.parametrize(
    ("method", "warm"), [("nested", 0), ("nested", 1), ("feddst", 0), ("exclude", 0)]
)
def test_every_key_of_a_real_summary_is_documented(tmp_path, method, warm):
    once = {"training.rounds": 1}
    order = Order(tmp_path / "run", None, TASK, method, seed=0, changes=once, warm_rounds=warm)
    summary = carry_out(order, lambda news: None)
    known = documented()
    known[""].add("classes")  # `classes.NAME` is in it
    assert [f"{at}: {key}" for at, key in keys(summary) if key not in known[at]] == []
    assert set(known) >= {"classes.NAME", "classes.NAME.artifact", "virtual", "devices"}
    # And what was documented is what the report reads.
    assert read_run(tmp_path / "run").summary.method == method


def test_nothing_is_documented_that_is_not_written(tmp_path):
    order = Order(tmp_path / "run", None, TASK, "feddst", seed=0, changes={"training.rounds": 1})
    written = dict.fromkeys(key for _, key in keys(carry_out(order, lambda news: None)))
    assert documented()[""] - written.keys() == set()
