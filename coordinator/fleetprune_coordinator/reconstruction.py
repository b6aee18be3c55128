"""Cutting a trained model: which units rebuild what the others gave, and the weights for it.

A cut unit's activation is partly a linear combination of those that stay. How much so is told by
the Gram matrix of a layer's inputs, `sum over samples and positions of x x^T`, which is additive
over devices and takes forward passes alone. From it follow, exactly and without any sample, the
order in which units rebuild the layers behind them best, and the weights with which they do. For
one model and one cut this is channel pruning by regression (He, Zhang and Sun, "Channel Pruning
for Accelerating Very Deep Neural Networks", 2017) with the greedy choice of ThiNet (Luo, Wu and
Lin, 2017); here samples stay on the devices, and one set of weights serves all nested widths.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleetprune.criteria import Scores, Tensors
from fleetprune.layout import Architecture, Axis, KeepCounts, axis_indices
from fleetprune_coordinator.gram import Gram

Matrix = NDArray[np.float64]

RIDGE = 1e-3
"""Of the mean square of an input, added to each: between 1e-4 and 1e-2 accuracy did not change."""
_STEP = 1e-6  # keeps the order where a later unit gains as much as an earlier one


@dataclass
class _Consumer:
    """A layer behind a group, as far as the group's units go into it."""

    residual: Matrix
    """(n, n) Gram matrix of the inputs, less what the chosen units explain of them"""
    weighted: Matrix
    """(n, n) Gram matrix of the layer's weights, as shares of its energy, times `residual`"""
    ridge: float


def reconstruction(
    architecture: Architecture, params: Tensors, grams: Mapping[str, Gram]
) -> Scores:
    """Units in the order in which they rebuild the inputs of the layers behind them.

    Greedily: each next unit is the one with which the units chosen so far predict most of those
    layers' outputs, as shares of each layer's own energy, by least squares.

    Args:
        architecture: The model.
        params: Dense parameters by name.
        grams: By weight name; layers without one have no say.

    Returns:
        Per group (units,): the share of the outputs that each choice gained, falling strictly
        along the order. A unit that no measured layer has scores 0; so do all units of a group
        with no measured layer behind it.
    """
    scores: Scores = {}
    for group, units in architecture.groups.items():
        found = [
            part
            for name, gram in grams.items()
            for part in _consumers(architecture, params[name], name, gram, group)
        ]
        seen = np.zeros(units, np.bool_)
        for _, indices in found:
            seen[: len(indices)] = True
        worth = _greedy(found, int(seen.sum()))
        scores[group] = np.concatenate([worth, np.zeros(units - worth.size)]).astype(np.float32)
    return scores


def _consumers(
    architecture: Architecture, weight: NDArray[np.float32], name: str, gram: Gram, group: str
) -> Iterator[tuple[_Consumer, list[NDArray[np.intp]]]]:
    """A layer's part for each of its segments that belongs to a group; with each unit's inputs."""
    axis = architecture.tensor(name).axes[1]
    dense, start = architecture.groups, 0
    place = {int(i): at for at, i in enumerate(gram.inputs)}
    for segment in axis:
        length = segment.kept(dense) * segment.block
        mine = [place[i] for i in range(start, start + length) if i in place]
        if segment.group == group and mine:
            rows = _rows(weight)[:, gram.inputs[mine]]
            products = gram.matrix[np.ix_(mine, mine)]
            inner = rows.T @ rows
            energy = float((inner * products).sum())
            if energy > 0:  # else the layer makes nothing of these inputs
                units = np.arange(len(mine)).reshape(-1, segment.block)
                ridge = RIDGE * float(np.trace(products)) / len(mine)
                inner /= energy
                yield _Consumer(products.copy(), inner @ products, ridge), list(units)
        start += length


def _rows(weight: NDArray[np.float32]) -> Matrix:
    """(outputs and taps, inputs) of a weight (outputs, inputs, ...)."""
    return np.moveaxis(weight, 1, -1).reshape(-1, weight.shape[1]).astype(np.float64)


def _greedy(found: list[tuple[_Consumer, list[NDArray[np.intp]]]], units: int) -> Matrix:
    """(units,) what each unit gained when it was chosen, falling strictly along the order."""
    order: list[int] = []
    gains = np.zeros(units)
    for _ in range(units):
        now = np.zeros(units)
        for consumer, inputs in found:
            now[: len(inputs)] += _gains(consumer, inputs)
        now[order] = -np.inf
        best = int(np.argmax(now))
        gains[len(order)] = max(0.0, now[best])
        order.append(best)
        for consumer, inputs in found:
            if best < len(inputs):
                _explain(consumer, inputs[best])
    falling = np.minimum.accumulate(gains)
    least = _STEP * max(float(falling.max(initial=0.0)), 1.0)
    worth = np.empty(units)
    worth[order] = falling + least * np.arange(units, 0, -1)
    return worth


def _gains(consumer: _Consumer, inputs: list[NDArray[np.intp]]) -> Matrix:
    """(units,) how much more of the outputs each unit would explain."""
    if len(inputs[0]) == 1:
        numerator = (consumer.residual * consumer.weighted).sum(axis=0)
        return np.asarray(numerator / (np.diag(consumer.residual) + consumer.ridge))
    gains = np.empty(len(inputs))
    for unit, i in enumerate(inputs):
        own = consumer.residual[np.ix_(i, i)] + consumer.ridge * np.eye(len(i))
        cross = consumer.residual[:, i].T @ consumer.weighted[:, i]
        gains[unit] = np.trace(np.linalg.solve(own, cross))
    return gains


def _explain(consumer: _Consumer, chosen: NDArray[np.intp]) -> None:
    """Take away from all inputs what the chosen ones predict of them."""
    column = consumer.residual[:, chosen]
    own = column[chosen] + consumer.ridge * np.eye(len(chosen))
    predicted = np.linalg.solve(own, column.T)
    consumer.weighted -= consumer.weighted[:, chosen] @ predicted
    consumer.residual -= column @ predicted


def refit(
    architecture: Architecture,
    params: Tensors,
    grams: Mapping[str, Gram],
    shapes: Mapping[str, KeepCounts],
) -> dict[str, NDArray[np.float32]]:
    """Weights with which every nested width rebuilds what the dense layers gave.

    Per measured layer and from the narrowest width to the widest: the columns that a width has
    and the narrower ones have not are those of least squares for what the narrower ones leave of
    the dense layer's output. So each width is as good as it can be without touching a narrower
    one's weights; the dense model pays a little for what it shares.

    Args:
        architecture: The model.
        params: Dense parameters by name, in the present order of units.
        grams: By weight name, in the same order.
        shapes: Keep counts of all classes.

    Returns:
        All parameters; those without a Gram matrix are the same arrays.
    """
    fitted = dict(params)
    for name, gram in grams.items():
        axis = architecture.tensor(name).axes[1]
        stages = _stages(architecture, axis, gram, shapes)
        ridge = RIDGE * float(np.trace(gram.matrix)) / max(1, gram.inputs.size)
        if len(stages) < 2 or ridge == 0:  # every width has all of it, or it has seen nothing
            continue
        weight = params[name]
        rows = _rows(weight)
        wanted = rows[:, gram.inputs] @ gram.matrix
        new = np.zeros((len(rows), gram.inputs.size))
        for stage in stages:
            own = gram.matrix[np.ix_(stage, stage)] + ridge * np.eye(len(stage))
            # The ridge pulls towards the dense weights: what is not measured stays as it was.
            old = rows[:, gram.inputs[stage]]
            left = (wanted - new @ gram.matrix)[:, stage] + ridge * old
            new[:, stage] = np.linalg.solve(own, left.T).T
        rows[:, gram.inputs] = new
        moved = rows.reshape(weight.shape[0], *weight.shape[2:], weight.shape[1])
        fitted[name] = np.ascontiguousarray(np.moveaxis(moved, -1, 1), dtype=np.float32)
    return fitted


def _stages(
    architecture: Architecture, axis: Axis, gram: Gram, shapes: Mapping[str, KeepCounts]
) -> list[NDArray[np.intp]]:
    """Places in the Gram matrix that each width adds, from the narrowest; the rest comes last."""
    place = {int(i): at for at, i in enumerate(gram.inputs)}
    widths = {tuple(axis_indices(axis, architecture.groups, keep)) for keep in shapes.values()}
    stages: list[NDArray[np.intp]] = []
    done: set[int] = set()
    for width in [*sorted(widths, key=len), tuple(gram.inputs)]:
        added = [place[int(i)] for i in width if int(i) in place and int(i) not in done]
        done.update(map(int, width))
        if added:
            stages.append(np.array(added, np.intp))
    return stages
