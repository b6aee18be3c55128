"""Which devices take part in a round."""

from collections.abc import Sequence

import numpy as np

from fleetprune_coordinator.records import DeviceRecord


def choose(
    devices: Sequence[DeviceRecord], size: int, rng: np.random.Generator, *, stratified: bool
) -> list[DeviceRecord]:
    """Draw devices without replacement.

    Stratified drawing takes the classes in turn, so that each is heard equally often: a class that
    is rare in the fleet is not rare in the aggregate, which measured better at no cost.

    Args:
        devices: Those that can be asked.
        size: How many to draw; all, where there are fewer.
        rng: Draws.
        stratified: Equal numbers of every class, as far as they go.

    Returns:
        The devices drawn, by node id.
    """
    shuffled = [devices[i] for i in rng.permutation(len(devices))]
    if stratified:
        seen: dict[str, int] = {}
        turns: list[tuple[int, int]] = []
        for place, device in enumerate(shuffled):
            turns.append((seen.get(device.device_class, 0), place))
            seen[device.device_class] = seen.get(device.device_class, 0) + 1
        shuffled = [shuffled[place] for _, place in sorted(turns)]
    return sorted(shuffled[:size], key=lambda d: d.id)
