"""What befalls samples between a training set and a device: noise, blur, a bias, a dead channel.

After Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", 2019, in forms that sensors of every kind have. A pruned model may be as accurate as
the dense one on clean samples and lose more on these (Hooker et al., "What Do Compressed Deep
Neural Networks Forget?", 2019), so both are looked at.
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

Samples = NDArray[np.float32]

NOISE = 0.5
"""Standard deviation of the added noise, in those of the channel."""
BIAS = 0.5
"""What is added to one channel, in its standard deviations."""
BLUR = 1.0
"""Standard deviation of the Gaussian, in pixels or time steps."""


def _deviation(x: Samples) -> Samples:
    """(1, C, 1, ...) standard deviation of each channel over samples and positions."""
    others = tuple(a for a in range(x.ndim) if a != 1)
    return np.asarray(x.std(axis=others, keepdims=True), np.float32)


def _chosen(x: Samples, rng: np.random.Generator) -> NDArray[np.bool_]:
    """(n, C, 1, ...) one channel of each sample."""
    channels = x.shape[1]
    mine = rng.integers(0, channels, len(x))[:, None] == np.arange(channels)
    return np.reshape(mine, (*mine.shape, *[1] * (x.ndim - 2)))


def noise(x: Samples, rng: np.random.Generator) -> Samples:
    """Gaussian noise on every value."""
    return x + NOISE * _deviation(x) * rng.standard_normal(x.shape, np.float32)


def blur(x: Samples, rng: np.random.Generator) -> Samples:
    """A Gaussian along every spatial axis: out of focus, or a slow sensor."""
    for axis in range(2, x.ndim):
        x = gaussian_filter1d(x, BLUR, axis=axis)
    return x


def bias(x: Samples, rng: np.random.Generator) -> Samples:
    """A constant on one channel of each sample: a sensor out of calibration, a wrong exposure."""
    return x + BIAS * _deviation(x) * _chosen(x, rng).astype(np.float32)


def dropped(x: Samples, rng: np.random.Generator) -> Samples:
    """One channel of each sample at its mean: a dead sensor. Of one channel, a quarter of it."""
    others = tuple(a for a in range(x.ndim) if a != 1)
    mean = np.asarray(x.mean(axis=others, keepdims=True), np.float32)
    if x.shape[1] > 1:
        return np.where(_chosen(x, rng), mean, x)
    length = x.shape[-1]
    start = rng.integers(0, length, len(x)).reshape(-1, *[1] * (x.ndim - 1))
    gone = (np.arange(length) - start) % length < max(1, length // 4)
    return np.where(gone, mean, x)


CORRUPTIONS: Mapping[str, Callable[[Samples, np.random.Generator], Samples]] = {
    "noise": noise,
    "blur": blur,
    "bias": bias,
    "dropped": dropped,
}
"""By the name in `summary.json`: (n, C, ...) samples and a generator to samples of that shape."""


def applicable(shape: tuple[int, ...]) -> list[str]:
    """The corruptions that samples of a shape (without the batch) can have."""
    return [name for name in CORRUPTIONS if name != "blur" or len(shape) > 1]


def corrupted(name: str, x: Samples, seed: int) -> Samples:
    """Samples as the world might deliver them; the same for every model that is judged.

    Args:
        name: Out of `CORRUPTIONS`.
        x: (n, C, ...); stays as it is.
        seed: Of the run.
    """
    rng = np.random.default_rng([seed, list(CORRUPTIONS).index(name)])
    return CORRUPTIONS[name](x, rng).astype(np.float32, copy=False)
