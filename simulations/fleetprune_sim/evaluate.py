"""How good each class's model is, judged by the simulator, which alone sees all data."""

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from fleetprune_agent.runtime import inference_session
from fleetprune_sim.data.partition import Indices

BATCH = 500


@dataclass(frozen=True)
class Score:
    """Of one model on one set of samples."""

    accuracy: float
    loss: float
    """mean cross-entropy"""


def outputs(model: nn.Module, x: NDArray[np.float32]) -> torch.Tensor:
    """(n, classes) of a model in evaluation mode."""
    model.eval()
    with torch.no_grad():
        parts = [model(torch.tensor(x[i : i + BATCH])) for i in range(0, len(x), BATCH)]
    return torch.cat(parts)


def score(model: nn.Module, x: NDArray[np.float32], y: NDArray[np.int64]) -> Score:
    """Accuracy and loss on (n, ...) samples with labels (n,)."""
    logits, targets = outputs(model, x), torch.tensor(y)
    right = (logits.argmax(1) == targets).float().mean()
    return Score(float(right), float(cross_entropy(logits, targets)))


def own_accuracy(
    model: nn.Module, x: NDArray[np.float32], y: NDArray[np.int64], parts: Sequence[Indices]
) -> float | None:
    """Mean over devices of the accuracy on the device's own samples; None without any.

    Args:
        model: Of the devices' class.
        x: (n, ...) all samples.
        y: (n,) their labels.
        parts: Per device the places of its samples; empty ones do not count.
    """
    parts = [part for part in parts if part.size]
    if not parts:
        return None
    every = np.concatenate(parts)
    right = outputs(model, x[every]).argmax(1).numpy() == y[every]
    cuts = np.cumsum([part.size for part in parts])[:-1]
    return float(np.mean([piece.mean() for piece in np.split(right, cuts)]))


def latency_ms(onnx: bytes, input_shape: Sequence[int], times: int = 30) -> float:
    """Median milliseconds for one sample on one core of this machine, with plain onnxruntime."""
    session = inference_session(onnx)
    feeds = {session.get_inputs()[0].name: np.zeros((1, *input_shape), np.float32)}
    session.run(None, feeds)
    took = []
    for _ in range(times):
        start = time.perf_counter()
        session.run(None, feeds)
        took.append(1e3 * (time.perf_counter() - start))
    return statistics.median(took)


def recalibrated(model: nn.Module, x: NDArray[np.float32]) -> nn.Module:
    """The model with the BatchNorm statistics of these samples, as if the fleet had measured them.

    Args:
        model: With whatever statistics it has; stays as it is. Without BatchNorm it is returned.
        x: (n, ...) at least 2 samples, taken as one batch: so every layer sees what the layers
            before it make of all of them, as in the passes of a real calibration.
    """
    twin = copy.deepcopy(model).eval()
    norms = [module for module in twin.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return model
    for norm in norms:
        norm.momentum = 1.0  # forget what was before
        norm.train()
    with torch.no_grad():
        twin(torch.tensor(x))
    return twin.eval()
