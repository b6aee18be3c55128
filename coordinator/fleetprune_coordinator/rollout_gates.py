"""What the devices of a cohort say about a release, as probabilities that it is too bad.

All three questions are asked of few devices (one to five canaries) and of thousands, so none may
rest on large numbers, and none on a single odd device where there are several.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
MANY = 10  # devices from which on their own scatter says how sure a mean is
WITHOUT_WORST = 0.8  # how likely a loss must be without the device that lost most


def share_above(count: int, of: int, most: float) -> float:
    """Probability that a share is above a limit, from a sample of it.

    The upper tail of the Beta posterior under Jeffreys' prior, which keeps close to its nominal
    error for samples of any size (Brown, Cai and DasGupta 2001, "Interval Estimation for a
    Binomial Proportion", Statistical Science 16).

    Args:
        count: Devices with the property, 0 <= count <= of.
        of: Devices looked at; 0 leaves the prior.
        most: The limit, 0 <= most < 1.
    """
    from scipy.special import betainc  # noqa: PLC0415  (a quarter of a second, for every command)

    return float(1.0 - betainc(count + 0.5, of - count + 0.5, most))


@dataclass(frozen=True, slots=True)
class Paired:
    """One device's held-out samples, judged by the release before and by the new one."""

    before: float
    """Accuracy, as a share."""
    after: float
    samples: int
    agreement: float | None = None
    """Share of recent samples on which both say the same."""


@dataclass(frozen=True, slots=True)
class Loss:
    """What a release costs in accuracy."""

    devices: int
    samples: int
    loss: float
    """Of all samples, as a share; below 0: it gained."""
    error: float
    """Standard error of `loss`."""
    doubt: float
    """Probability that the loss is above the limit."""


def accuracy_loss(devices: Sequence[Paired], most: float) -> Loss | None:
    """Whether a release loses more accuracy than it may: a test of non-inferiority.

    Differences are taken within each device, on the same samples, and added up (stratified and
    paired), so that devices may differ in how hard their samples are. The variance of a paired
    difference is that of its discordant samples, with half a sample added to each of the four
    outcomes (Agresti and Min 2005, "Simple improved confidence intervals for comparing matched
    proportions", Statistics in Medicine 24). Devices do not say how many samples are discordant:
    that is at most the share on which both models disagree, and what independent models would
    have, and at least what the devices' own differences need. From `MANY` devices on the scatter
    between devices counts instead where it is larger (Liang and Zeger 1986); of fewer it is too
    vague, and there the loss must also be likely without the device that lost most.

    Args:
        devices: Any number; those without samples are passed over.
        most: The limit, as a share of all samples.

    Returns:
        None if there are no samples.
    """
    given = [d for d in devices if d.samples > 0]
    if not given:
        return None
    found = _loss(given, most)
    if 1 < len(given) < MANY:
        worst = max(range(len(given)), key=lambda i: given[i].before - given[i].after)
        rest = _loss([d for i, d in enumerate(given) if i != worst], most)
        if rest.doubt < WITHOUT_WORST:
            return replace(found, doubt=min(found.doubt, rest.doubt))
    return found


def _loss(devices: Sequence[Paired], most: float) -> Loss:
    n = np.array([d.samples for d in devices], dtype=np.float64)
    lost = np.rint(n * [d.before for d in devices]) - np.rint(n * [d.after for d in devices])
    total, loss = float(n.sum()), float(lost.sum() / n.sum())
    mean, error = _paired(devices, n, lost, total)
    if len(devices) >= MANY:
        scatter = np.square(lost - loss * n).sum() * len(devices) / (len(devices) - 1)
        error = max(error, math.sqrt(float(scatter)) / total)
    return Loss(len(devices), int(total), loss, error, NormalDist().cdf((mean - most) / error))


def _paired(
    devices: Sequence[Paired], n: Values, lost: Values, total: float
) -> tuple[float, float]:
    """The mean difference of the samples with the added ones, and its standard error."""
    before = float(n @ np.array([d.before for d in devices])) / total
    after = float(n @ np.array([d.after for d in devices])) / total
    most = before * (1 - after) + after * (1 - before)
    told = [(d.samples, d.agreement) for d in devices if d.agreement is not None]
    if told:
        most = min(most, sum(s * (1 - a) for s, a in told) / sum(s for s, _ in told))
    discordant = max(most * total, float(np.abs(lost).sum()))
    mean = float(lost.sum()) / (total + 2)
    return mean, math.sqrt(((discordant + 1) / (total + 2) - mean**2) / (total + 2))
