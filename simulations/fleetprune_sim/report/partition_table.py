"""Who has which samples: the devices of one run, or an even choice of them."""

import json
from collections.abc import Sequence

from fleetprune_sim.history import DeviceRow
from fleetprune_sim.report.runs import Run
from fleetprune_sim.report.table import Table, Value

SHOWN = 60
"""Most devices that are drawn."""


def partition(run: Run) -> Table:
    """A line per drawn device and label."""
    columns = ("class", "device", "label", "samples", "share")
    rows: list[tuple[Value, ...]] = []
    for device in chosen(run.devices):
        counts = label_counts(device)
        total = max(1, sum(counts))
        for label, count in zip(_labels(run, len(counts)), counts, strict=True):
            rows.append((device.device_class, device.device, label, count, round(count / total, 4)))
    return Table("partition", columns, tuple(rows))


def devices(run: Run) -> Table:
    """A line per device, all of them."""
    longest = max((len(label_counts(d)) for d in run.devices), default=0)
    labels = tuple(f"label {name}" for name in _labels(run, longest))
    rows: tuple[tuple[Value, ...], ...] = tuple(
        (d.device, d.device_class, d.samples, *_padded(label_counts(d), longest))
        for d in run.devices
    )
    return Table("devices", ("device", "class", "samples", *labels), rows)


def chosen(all_devices: Sequence[DeviceRow], most: int = SHOWN) -> list[DeviceRow]:
    """At most `most` devices, or one per class: of each class its share, evenly spaced by name."""
    classes: dict[str, list[DeviceRow]] = {}
    for device in all_devices:
        classes.setdefault(device.device_class, []).append(device)
    if len(all_devices) <= most:
        return [d for members in classes.values() for d in members]
    found = []
    for members in classes.values():
        n = max(1, most * len(members) // len(all_devices))
        found += [members[i * len(members) // n] for i in range(n)]
    return found


def label_counts(device: DeviceRow) -> list[int]:
    """Samples per label; none where the column holds no list of counts."""
    try:
        counts = json.loads(device.label_counts)
    except ValueError:
        return []
    return [int(c) for c in counts] if isinstance(counts, list) else []


def _labels(run: Run, n: int) -> list[str]:
    known = [str(label) for label in run.summary.labels]
    return known if len(known) == n else [str(i) for i in range(n)]


def _padded(counts: list[int], n: int) -> list[int]:
    return counts + [0] * (n - len(counts))
