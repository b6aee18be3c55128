"""What a user sees, rendered to text at 80 and at 120 columns."""

import json

import pytest
from rich.console import Console

from fleetprune_sim.demo_config import CLASSES, DEVICES
from fleetprune_sim.demo_state import (
    MAKING_GRAPHS,
    DeviceState,
    EventReader,
    FleetState,
    apply,
    describe,
    scaled,
    size,
    strangers,
)
from fleetprune_sim.demo_view import class_table, closing, live

DENSE_MACS = 1_234_567


def example() -> dict:
    """A summary as the coordinator writes it, with the devices that the demo adds."""
    classes = {}
    for group in CLASSES:
        classes[group.name] = {
            "devices": 2,
            "budget": {
                "flash_bytes": None,
                "ram_bytes": None,
                "macs": int(DENSE_MACS * group.macs_share),
                "latency_ms": None,
            },
            "artifact": {
                "path": f"releases/{group.name}/model.onnx",
                "sha256": group.name * 4,
                "bytes": int(214_533 * group.macs_share),
                "params": 1000,
                "macs": int(DENSE_MACS * group.macs_share) - 1,
                "peak_activation_bytes": 1000,
                "latency_ms": 0.1234,
            },
            "accuracy": 0.97 * group.macs_share**0.01,
            "within_budget": True,
            "traffic": {"up_bytes": 246_912, "down_bytes": 15_308_642},
        }
    return {
        "schema": 1,
        "task": "digits",
        "method": "nested",
        "rounds": 20,
        "wall_s": 43.2,
        "dense": {"params": 51_000, "bytes": 214_533, "macs": DENSE_MACS, "accuracy": 0.9721},
        "traffic": {"up_bytes_per_client_round": 8_123.0, "dense_up_bytes_per_client_round": 2e5},
        "classes": classes,
        "devices": [{"id": d, "class": c, "installed_sha256": c * 4} for d, c in DEVICES.items()],
    }


def beginning() -> FleetState:
    return FleetState(
        {d: DeviceState(g.name, g.trains) for g in CLASSES for d in g.devices}, rounds=20
    )


ROUND = {
    "event": "round",
    "round": 7,
    "of": 20,
    "loss": 0.5123,
    "seconds": 1.2,
    "bytes_up": 1_234_567,
    "bytes_down": 9_934_567,
    "devices": 6,
}
INSTALLED = {
    "event": "installed",
    "device": "sensor-2",
    "device_class": "sensor",
    "release": 1,
    "accuracy": 0.963,
    "latency_ms": 0.1,
    "rss_mb": 78.4,
}


def text(renderable: object, width: int) -> str:
    console = Console(width=width, force_terminal=False, no_color=True)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def words(line: str) -> str:
    return " ".join(line.split())


@pytest.mark.parametrize("width", [80, 120])
def test_table_shows_every_figure_and_cuts_none(width):
    shown = text(class_table(example()), width)
    assert "…" not in shown
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= width
    sensor = next(line for line in shown.splitlines() if line.strip().startswith("sensor"))
    assert words(sensor) == "sensor 309 k MACs 54 kB 309 k 0.12 ms 97.2 95.7 up 247 kB"
    below = shown.splitlines()[shown.splitlines().index(sensor) + 1]
    assert words(below) == "2 devices kept 25 % 25 % down 15 MB"


def test_table_says_when_a_budget_is_exceeded_and_lists_every_limit():
    summary = example()
    phone = summary["classes"]["phone"]
    phone["within_budget"] = False
    phone["budget"] |= {"flash_bytes": 64_000, "ram_bytes": 9_500, "latency_ms": 2.5}
    shown = text(class_table(summary), 80)
    assert shown.count("exceeded") == 1
    for limit in ("617 k MACs", "64 kB file", "9.5 kB RAM", "2.50 ms"):
        assert limit in shown


def test_table_without_what_may_be_missing():
    summary = example()
    summary["dense"] = {"macs": DENSE_MACS, "accuracy": None}
    for group in summary["classes"].values():
        del group["traffic"]
        group["budget"] = {}
        group["accuracy"] = None
        group["artifact"]["latency_ms"] = None
    shown = text(class_table(summary), 80)
    assert "none" in shown
    assert "None" not in shown


def test_closing_compares_bytes_and_says_where_the_results_are():
    shown = text(closing(example(), "out"), 120)
    assert "20 rounds in 43 s." in shown
    assert "8.1 kB upwards" in shown
    assert "200 kB, 24.6 times as much." in words(shown)
    assert "Results: out (summary.json, releases, logs)" in shown
    assert "--out DIR keeps" in text(closing(example(), None), 80)


@pytest.mark.parametrize("width", [80, 120])
def test_live_display(width):
    state = apply(apply(beginning(), ROUND), INSTALLED)
    shown = text(live(state, "digits"), width)
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= width
    lines = shown.splitlines()
    assert lines[0].rstrip() == (
        "Fleetprune  digits  sensor-2 runs release 1, 96.3% right on its own data"
    )
    assert words(lines[1]).endswith("7/20 0:16 left loss 0.512 up 1.2 MB down 9.9 MB")
    rows = [words(line) for line in lines]
    assert "gateway-1 gateway training - - -" in rows
    assert "sensor-1 sensor observing - - -" in rows
    assert "sensor-2 sensor runs release 1 96.3 0.10 ms 78 MB" in rows


def test_live_display_before_anything_happened():
    shown = text(live(beginning(), "har"), 80)
    assert "0/20" in shown
    assert shown.count("starting") == 7  # the news and six devices


def test_rounds_add_up():
    state = beginning()
    for number in (1, 2):
        state = apply(state, {**ROUND, "round": number})
    assert (state.done, state.rounds, state.loss) == (2, 20, 0.5123)
    assert state.news == "round 2 took 1.2 s"  # the rest has a line of its own
    assert state.bytes_up == 2 * 1_234_567
    assert state.left_s == pytest.approx(18 * 1.2)


def test_states_of_a_device():
    state = apply(beginning(), {"event": "enrolled", "device": "phone-1", "device_class": "phone"})
    assert state.devices["phone-1"].doing == "enrolled"
    for event, doing in (("calibrate", "calibrating"), ("release", "updating")):
        state = apply(state, {"event": event})
        assert state.devices["phone-1"].doing == doing
    state = apply(state, {**INSTALLED, "device": "phone-1", "state": "rolled_back", "error": "x"})
    assert state.devices["phone-1"].doing == "rolled back: x"


def test_what_takes_long_before_the_first_round_has_a_name():
    state = beginning()
    for device, name in DEVICES.items():
        assert "graphs" not in state.news
        state = apply(state, {"event": "enrolled", "device": device, "device_class": name})
    assert state.news == MAKING_GRAPHS
    assert MAKING_GRAPHS in text(live(state, "digits"), 80)  # it is not cut off


def test_unknown_events_and_devices_do_no_harm():
    state = apply(beginning(), {"event": "from the future", "device": "phone-1"})
    assert state == beginning()
    state = apply(state, {"event": "enrolled", "device": "tablet-1", "device_class": "tablet"})
    assert state.devices["tablet-1"].device_class == "tablet"
    assert apply(state, {}) == state


@pytest.mark.parametrize(
    ("event", "line"),
    [
        ({"event": "enrolled", "device": "a", "device_class": "b"}, "a enrolled as b"),
        (ROUND, "round 7/20  loss 0.512  1.2 s  up 1.2 MB  down 9.9 MB  6 devices"),
        ({"event": "remask", "mask_version": 3}, "masks solved again: version 3"),
        (
            {"event": "calibrate", "step": 2, "of": 8},
            "BatchNorm statistics calibrated: pass 2 of at most 8",
        ),
        ({"event": "waiting", "devices": 2, "expected": 6}, "waiting for devices: 2 of 6"),
        ({"event": "release", "number": 1}, "release 1 signed and announced"),
        (INSTALLED, "sensor-2 runs release 1, 96.3% right on its own data"),
        ({"event": "done"}, "every device runs the release made for its class"),
        ({"event": "other"}, ""),
    ],
)
def test_events_in_words(event, line):
    assert describe(event) == line


def test_strangers_run_something_else_or_nothing():
    summary = example()
    assert strangers(summary, DEVICES) == []
    summary["devices"][3]["installed_sha256"] = "f" * 8
    summary["devices"][4]["installed_sha256"] = None
    del summary["devices"][5]
    assert strangers(summary, DEVICES) == ["phone-2", "sensor-1", "sensor-2"]


def test_reader_gives_whole_lines_once(tmp_path):
    path = tmp_path / "events.jsonl"
    reader = EventReader(path)
    assert reader.read() == []
    line = json.dumps(ROUND)
    path.write_text(line + "\n" + line[:10])
    assert reader.read() == [ROUND]
    assert reader.read() == []
    with path.open("a") as file:
        file.write(line[10:] + "\n")
    assert reader.read() == [ROUND]


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (None, "-"),
        (0, "0 B"),
        (9, "9 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (9_949, "9.9 kB"),
        (9_950, "10 kB"),
        (999_499, "999 kB"),
        (999_500, "1.0 MB"),
        (5e18, "5000000 TB"),
    ],
)
def test_sizes(count, shown):
    assert size(count) == shown


def test_counts_have_no_unit():
    assert scaled(512, ("", "k")) == "512"
    assert scaled(51_200, ("", "k")) == "51 k"
