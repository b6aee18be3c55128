"""Deltas to a new release from those that its devices may have."""

import logging
from typing import Final

from fleetprune.errors import GraphError
from fleetprune_coordinator.delta_maker import make
from fleetprune_coordinator.releases import ReleaseRepository

log = logging.getLogger(__name__)

WORTH_IT: Final = 0.6
"""Largest delta that is shipped, as a share of the file: a device that takes one has more to do,
and a repository more to keep and to sign."""


def deltas_to(
    repository: ReleaseRepository, device_class: str, onnx: bytes
) -> tuple[tuple[str, bytes], ...]:
    """Make the deltas that are worth it.

    Args:
        repository: Of the releases before.
        device_class: The class.
        onnx: Its new file.

    Returns:
        Per release that the class's rollout names, stable or candidate, the SHA-256 of its file
        and the delta from there to the new one; those left out that are not worth it.
    """
    rollout = repository.rollout(device_class)
    found: dict[str, bytes] = {}
    for number in () if rollout is None else filter(None, (rollout.stable, rollout.candidate)):
        manifest = repository.manifest(device_class, number)
        if manifest is None or manifest.sha256 in found:
            continue
        folder, _, name = manifest.model.rpartition("/")
        base = repository.read(f"targets/{folder}/{manifest.sha256}.{name}")
        if base is None or base == onnx:
            continue
        try:
            delta = make(base, onnx)
        except GraphError as e:  # devices take the whole file
            log.warning("class %s, from release %d: %s", device_class, number, e)
            continue
        if len(delta) <= WORTH_IT * len(onnx):
            found[manifest.sha256] = delta
    return tuple(found.items())
