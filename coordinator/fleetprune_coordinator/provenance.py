"""What a release says of itself: what it needs to run, and where it came from."""

from collections.abc import Mapping

import onnx

from fleetprune.errors import GraphError
from fleetprune.layout import KeepCounts
from fleetprune.manifest import Requirements, Training
from fleetprune_coordinator.registry import Registry

_DEFAULT_DOMAINS = ("", "ai.onnx")


def requirements(model: bytes, *, agent_version: str = "0") -> Requirements:
    """What a device must have to run a file.

    Args:
        model: An ONNX file.
        agent_version: The oldest agent that can install it.

    Raises:
        GraphError: The file needs operators that are not ONNX's own: no device has them.
    """
    parsed = onnx.load_from_string(model)
    opsets = {entry.domain: entry.version for entry in parsed.opset_import}
    foreign = sorted(
        {node.domain for node in parsed.graph.node if node.domain not in _DEFAULT_DOMAINS}
    )
    if foreign:
        raise GraphError(
            f"the file has operators of {', '.join(foreign)}, expected ONNX's own alone: a device "
            "with another version of its runtime might not have them"
        )
    opset = max((opsets[d] for d in _DEFAULT_DOMAINS if d in opsets), default=1)
    return Requirements(opset=opset, ir_version=parsed.ir_version, agent_version=agent_version)


def next_smaller(shapes: Mapping[str, KeepCounts]) -> dict[str, str]:
    """Where devices turn whose own class's model fails there.

    Args:
        shapes: Keep counts of every class.

    Returns:
        Class to the widest class that lies within it and is smaller; no entry where there is none.
    """
    found = {}
    for name, own in shapes.items():
        inside = [
            other
            for other, shape in shapes.items()
            if dict(shape) != dict(own) and all(shape[group] <= own[group] for group in own)
        ]
        if inside:
            found[name] = max(inside, key=lambda other: sum(shapes[other].values()))
    return found


def training_record(
    registry: Registry, *, criterion: str, granularity: str, precision: str
) -> Training:
    """Where a fleet's model came from: counted in the registry, the rest as configured.

    Args:
        registry: The fleet's memory.
        criterion: Of importance.
        granularity: Of what was pruned.
        precision: Of the file: `float32` or `int8`.
    """
    row = registry.first(
        "SELECT count(*) AS devices, coalesce(sum(samples), 0) AS samples FROM devices WHERE id IN "
        "(SELECT t.device FROM tasks t JOIN rounds r ON r.id = t.round "
        "WHERE r.phase = 'train' AND t.state = 'answered')"
    )
    rounds = registry.first(
        "SELECT count(*) AS n FROM rounds WHERE phase = 'train' AND state = 'closed'"
    )
    return Training(
        rounds=0 if rounds is None else rounds["n"],
        devices=0 if row is None else row["devices"],
        samples=0 if row is None else row["samples"],
        criterion=criterion,
        granularity=granularity,
        precision=precision,
    )
