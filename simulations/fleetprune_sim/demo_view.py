"""How a demo looks: a live display while it runs, a table when it is done."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fleetprune_sim.demo_state import DeviceState, FleetState, scaled, size

_COUNTS = ("", "k", "M", "G", "T")
_STYLES = {"runs": "green", "rolled": "red", "training": "cyan", "observing": "blue"}


def live(state: FleetState, task: str) -> RenderableType:
    """The whole display at one moment."""
    return Group(
        Text.assemble(
            ("Fleetprune", "bold"),
            f"  {task}  {state.news}",
            no_wrap=True,
            overflow="ellipsis",
        ),
        _rounds(state),
        _devices(state.devices),
    )


def class_table(summary: Mapping[str, Any]) -> RenderableType:
    """What each class got: from a summary with the keys that `docs/benchmarks.md` explains."""
    dense = summary["dense"]
    table = _table()
    for heading in ("class", "budget"):
        table.add_column(heading, no_wrap=True)
    for heading in ("artifact", "MACs", "latency", "accuracy %\nbefore after", "traffic"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, group in summary["classes"].items():
        artifact, traffic = group["artifact"], group.get("traffic", {})
        table.add_row(
            Text(f"{name}\n{group['devices']} devices"),
            _budget(group["budget"], bool(group.get("within_budget"))),
            f"{size(artifact['bytes'])}\n{_share(artifact['bytes'], dense.get('bytes'))}",
            f"{scaled(artifact['macs'], _COUNTS)}\n{_share(artifact['macs'], dense['macs'])}",
            _milliseconds(artifact.get("latency_ms")),
            f"{_percent(dense.get('accuracy')):>6} {_percent(group.get('accuracy')):>5}",
            f"up {size(traffic.get('up_bytes')):>7}\ndown {size(traffic.get('down_bytes')):>7}",
        )
    return table


def closing(summary: Mapping[str, Any], place: str | None) -> RenderableType:
    """What comes below the table; `place` is None where nothing is kept."""
    traffic = summary.get("traffic", {})
    update = traffic.get("up_bytes_per_client_round")
    dense = traffic.get("dense_up_bytes_per_client_round")
    lines = [
        f"{summary.get('rounds', '?')} rounds in {summary.get('wall_s', 0.0):.0f} s. "
        "Before: the dense model that this fleet trained; after: the class's own artifact, "
        "both on samples that no device has."
    ]
    if update and dense:
        lines.append(
            f"A device's round took {size(update)} upwards, counted on the wire; a dense float32 "
            f"update alone is {size(dense)}, {dense / update:.1f} times as much."
        )
    if place is None:
        lines.append("Nothing was kept; --out DIR keeps the releases, the logs and summary.json.")
    else:
        lines.append(f"Results: {place} (summary.json, releases, logs)")
    return Text("\n".join(lines))


def _table() -> Table:
    """Two blanks between columns: the widest table fits 80."""
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def _rounds(state: FleetState) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    left = "" if state.left_s is None else f"{_clock(state.left_s)} left"
    loss = "" if state.loss is None else f"loss {state.loss:.3f}"
    grid.add_row(
        "rounds",
        ProgressBar(total=max(state.rounds, 1), completed=state.done, width=24),
        f"{state.done}/{state.rounds}",
        left,
        loss,
        f"up {size(state.bytes_up)}",
        f"down {size(state.bytes_down)}",
    )
    return grid


def _devices(devices: Mapping[str, DeviceState]) -> RenderableType:
    table = _table()
    for heading in ("device", "class", "state"):
        table.add_column(heading, no_wrap=True, overflow="ellipsis")
    for heading in ("accuracy", "latency", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, device in devices.items():
        report = device.report
        style = _STYLES.get(device.doing.split()[0], "")
        table.add_row(
            name,
            device.device_class,
            Text(device.doing, style=style),
            _percent(report.get("accuracy")),
            _milliseconds(report.get("latency_ms")),
            "-" if not report.get("rss_mb") else f"{report['rss_mb']:.0f} MB",
        )
    return table


def _budget(budget: Mapping[str, Any], within: bool) -> Text:
    """The limits that are set, and whether the artifact keeps them."""
    limits = []
    if budget.get("macs"):
        limits.append(f"{scaled(budget['macs'], _COUNTS)} MACs")
    if budget.get("flash_bytes"):
        limits.append(f"{size(budget['flash_bytes'])} file")
    if budget.get("ram_bytes"):
        limits.append(f"{size(budget['ram_bytes'])} RAM")
    if budget.get("latency_ms"):
        limits.append(_milliseconds(budget["latency_ms"]))
    verdict = ("kept", "green") if within else ("exceeded", "bold red")
    return Text.assemble("\n".join(limits) or "none", "\n", verdict)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _share(part: float, whole: float | None) -> str:
    return "" if not whole else f"{100 * part / whole:.0f} %"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} ms"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
