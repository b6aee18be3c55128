"""Splits samples over devices; every choice comes from the `rng` that is passed in."""

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import DataError

Indices = NDArray[np.intp]


def hold_out(labels: NDArray[np.int64], share: float, rng: np.random.Generator) -> Indices:
    """Draw a share of every label's samples, rounded down, at least one where it has two.

    Args:
        labels: (n,) label of each sample.
        share: Part to draw of each label, 0 <= share < 1.
        rng: Source of the draw.

    Returns:
        Sorted indices of the drawn samples.

    Raises:
        DataError: `share` is out of range.
    """
    if not 0 <= share < 1:
        raise DataError(f"share of held-out samples is {share}, expected 0 <= share < 1")
    drawn: list[Indices] = [np.empty(0, np.intp)]
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = int(members.size * share)
        if share > 0 and count == 0 and members.size > 1:
            count = 1
        drawn.append(rng.permutation(members)[:count])
    return np.sort(np.concatenate(drawn))


def dirichlet(
    labels: NDArray[np.int64],
    devices: int,
    alpha: float,
    least: int,
    rng: np.random.Generator,
) -> list[Indices]:
    """Split samples so that devices differ in labels and in size (Hsu et al. 2019).

    Each label's samples are dealt out in proportions drawn from Dirichlet(alpha): a small alpha
    gives every label to few devices, a large one gives all devices the same mixture. A device
    that ends below `least` samples is filled up from the largest one, so that no draw fails.

    Args:
        labels: (n,) label of each sample.
        devices: Number of parts.
        alpha: Concentration, above 0.
        least: Samples that every device gets at least.
        rng: Source of the draw.

    Returns:
        Per device the sorted indices of its samples; disjoint, together all of 0..n-1.

    Raises:
        DataError: There are not enough samples, or an argument is out of range.
    """
    if devices < 1 or alpha <= 0 or least < 0:
        raise DataError(
            f"cannot split over {devices} devices with alpha {alpha} and at least {least} "
            "samples each; expected devices >= 1, alpha > 0 and least >= 0"
        )
    if labels.size < devices * least:
        raise DataError(
            f"{labels.size} samples are too few for {devices} devices with at least {least} each"
        )
    parts: list[list[int]] = [[] for _ in range(devices)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(devices, alpha))
        cuts = (np.cumsum(shares)[:-1] * members.size).round().astype(np.intp)
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.extend(piece.tolist())
    for part in parts:
        while len(part) < least:
            largest = max(parts, key=len)
            part.append(largest.pop(int(rng.integers(len(largest)))))
    return [np.sort(np.array(part, dtype=np.intp)) for part in parts]


def deal(items: list[str], shares: list[int]) -> list[list[str]]:
    """Deal items out in turn, `shares[i]` at a time to part i, until none is left.

    Raises:
        DataError: A part would stay empty.
    """
    parts: list[list[str]] = [[] for _ in shares]
    turn = [i for i, share in enumerate(shares) for _ in range(share)]
    if not turn:
        raise DataError("no part takes any item")
    for position, item in enumerate(items):
        parts[turn[position % len(turn)]].append(item)
    if not all(parts):
        raise DataError(f"{len(items)} items are too few for {len(shares)} parts")
    return parts
