"""`summary.json`: the figures of a run, under keys that scripts can rely on."""

from collections.abc import Mapping
from typing import Any

from fleetprune.costs import parameters
from fleetprune_coordinator.coordinator import Coordinator, Released
from fleetprune_coordinator.records import Phase, TaskState


def summarise(
    coordinator: Coordinator, released: Mapping[str, Released], *, engine: str, wall_s: float
) -> dict[str, Any]:
    """The summary of a training and its release.

    Args:
        coordinator: Whose.
        released: Per class what was released.
        engine: What carried the messages: `mqtt` or `loop`.
        wall_s: Seconds from the first round to the release.

    Returns:
        JSON values: `dense`, `traffic`, per class budget and artifact, per device what it last
        reported. Bytes are those counted for the devices' own packets, both ways; the dense
        figure is what float32 updates of the uncut model would have taken, without packets.
    """
    config, architecture = coordinator.config, coordinator.architecture
    registry = coordinator.registry
    devices = registry.devices()
    trained = [
        task
        for number in range(1, config.training.rounds + 1)
        for task in registry.tasks(number, Phase.TRAIN)
        if task.state is TaskState.ANSWERED
    ]
    up = sum(t.up for t in registry.traffic())
    down = sum(t.down for t in registry.traffic())
    dense = coordinator.planner.dense
    dense_parameters = parameters(architecture, architecture.groups)
    widest = _uncut(coordinator, released)
    return {
        "schema": 1,
        "task": config.fleet,
        "method": "nested",
        "seed": config.training.seed,
        "rounds": config.training.rounds,
        "engine": engine,
        "wall_s": round(wall_s, 3),
        "client_rounds": len(trained),
        "client_rounds_per_s": round(len(trained) / wall_s, 3) if wall_s else 0.0,
        "dense": {
            "params": dense_parameters,
            "bytes": dense.artifact_bytes,
            "macs": dense.macs,
            "accuracy": None if widest is None else widest.manifest.accuracy,
        },
        "traffic": {
            "up_bytes": up,
            "down_bytes": down,
            "up_bytes_per_client_round": round(up / max(1, len(trained)), 1),
            "dense_up_bytes_per_client_round": 4.0 * dense_parameters,
        },
        "classes": {name: _class(coordinator, name, r) for name, r in released.items()},
        "devices": _devices(coordinator, {d.id: d for d in devices}),
    }


def _uncut(coordinator: Coordinator, released: Mapping[str, Released]) -> Released | None:
    """The release of a class that holds the whole model; None if every class is cut."""
    dense = coordinator.architecture.dense
    shapes = coordinator.rounds.model.shapes
    return next((r for name, r in released.items() if shapes[name] == dense), None)


def _class(coordinator: Coordinator, name: str, released: Released) -> dict[str, Any]:
    budget = coordinator.planner.budgets[name]
    manifest, artifact = released.manifest, released.artifact
    of_class = {d.name for d in coordinator.registry.devices() if d.device_class == name}
    reports = [
        t.telemetry
        for t in coordinator.registry.latest_telemetry()
        if t.telemetry.device in of_class and t.telemetry.release == manifest.release
    ]
    latencies = sorted(t.latency_ms for t in reports if t.latency_ms is not None)
    return {
        "devices": len(of_class),
        "budget": {
            "flash_bytes": budget.flash_bytes,
            "ram_bytes": budget.ram_bytes,
            "macs": budget.macs,
            "latency_ms": budget.latency_ms,
        },
        "artifact": {
            "path": f"releases/{name}/model.onnx",
            "sha256": manifest.sha256,
            "bytes": artifact.costs.artifact_bytes,
            "params": artifact.parameters,
            "macs": artifact.costs.macs,
            "peak_activation_bytes": artifact.costs.peak_activation_bytes,
            "latency_ms": latencies[len(latencies) // 2] if latencies else None,
        },
        "keep": dict(coordinator.rounds.model.shapes[name]),
        "accuracy": manifest.accuracy,
        "within_budget": budget.meets(artifact.costs),
        "traffic": {
            "up_bytes": sum(t.up for t in _traffic(coordinator, of_class)),
            "down_bytes": sum(t.down for t in _traffic(coordinator, of_class)),
        },
    }


def _traffic(coordinator: Coordinator, devices: set[str]) -> list[Any]:
    return [t for t in coordinator.registry.traffic() if t.device in devices]


def _devices(coordinator: Coordinator, known: Mapping[int, Any]) -> list[dict[str, Any]]:
    return [
        {
            "id": t.telemetry.device,
            "class": known[t.node_id].device_class,
            "installed_sha256": t.telemetry.sha256,
            "release": t.telemetry.release,
            "state": t.telemetry.state,
            "accuracy": t.telemetry.accuracy,
            "latency_ms": t.telemetry.latency_ms,
            "rss_mb": t.telemetry.rss_mb,
            "bytes_up": t.telemetry.bytes_up,
            "bytes_down": t.telemetry.bytes_down,
        }
        for t in coordinator.registry.latest_telemetry()
    ]
