"""Splits samples over devices; every choice comes from the seed or `rng` that is passed in."""

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import DataError
from fleetprune_sim.data.rules import PartitionSpec, Rules, check_enough, fill_up
from fleetprune_sim.data.splitters import ArraySplitter, FlowerSplitter, Indices

__all__ = ["Indices", "PartitionSpec", "deal", "dirichlet", "draw", "hold_out", "split"]

FLOWER_DEVICES = 1000
"""Most devices that Flower Datasets splits for: it takes 2 to 4 s for so many and 20 to 34 s for
10,000, nearly all of it to hand out the parts one by one."""


def draw(y: NDArray[np.int64], total: int, seed: int) -> Indices:
    """Choose the samples that a fleet shares out.

    Fewer than there are: a subsample with each label's share. More: every sample is taken equally
    often, one time more or less, as if several devices had recorded the same.

    Args:
        y: (n,) label of each sample.
        total: How many to choose, 1 or more.
        seed: Decides which.

    Returns:
        (total,) indices in random order.

    Raises:
        DataError: There is nothing to choose from, or nothing wanted.
    """
    if total < 1 or not y.size:
        raise DataError(f"cannot choose {total} of {y.size} samples, expected 1 or more of each")
    rng = np.random.default_rng(seed)
    rounds, rest = divmod(total, y.size)
    _, label, counts = np.unique(y, return_inverse=True, return_counts=True)
    exact = counts * (rest / y.size)
    quota = exact.astype(np.intp)
    most_cut_off = np.argsort(quota - exact, kind="stable")  # ties go to the lower label
    quota[most_cut_off[: rest - quota.sum()]] += 1
    drawn = [
        rng.permutation(np.flatnonzero(label == index))[:count] for index, count in enumerate(quota)
    ]
    return rng.permutation(np.concatenate([*[np.arange(y.size)] * rounds, *drawn]))


def split(
    y: NDArray[np.int64],
    owner: NDArray[np.str_] | None,
    spec: PartitionSpec,
    devices: int,
    seed: int,
) -> list[Indices]:
    """Split samples over devices by the rule that `spec` names.

    Flower Datasets works the parts out for up to `FLOWER_DEVICES` devices, above that arrays do,
    with the same result. By Dirichlet, a device that ends below `spec.least` samples is filled up
    from the largest, so that no draw fails.

    Args:
        y: (n,) label of each sample.
        owner: (n,) whose sample it is, if the data set says so.
        spec: The rule.
        devices: Number of parts.
        seed: Decides everything.

    Returns:
        Per device the sorted indices of its samples; disjoint, together all of 0..n-1. With
        `natural`, a device's samples have one owner, and owners stand in the order of their names.

    Raises:
        DataError: A device would have fewer than `spec.least` samples, a label would be nobody's,
            or there are fewer devices than owners; says which setting to change.
    """
    if devices < 1:
        raise DataError(f"cannot split samples over {devices} devices, expected 1 or more")
    check_enough(f"{devices} devices", y.size, devices, spec.least)
    rng = np.random.default_rng(seed)
    order = rng.permutation(y.size)
    rules = Rules(FlowerSplitter() if devices <= FLOWER_DEVICES else ArraySplitter(), spec, rng)
    parts = rules.parts(y[order], None if owner is None else owner[order], devices)
    return [np.sort(order[part]) for part in parts]


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
    fill_up(parts, least, rng)
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
