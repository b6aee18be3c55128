"""Successive halving: all candidates get a few rounds, the better half twice as many, and so on.

Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization",
AISTATS 2016, as scikit-learn does it: rung by rung, so that the cost is known before the first
round and nothing depends on the order of the candidates. Optuna's pruner is asynchronous: it
judges each candidate by those before it and lets the first one run to the end, and Optuna would be
one more dependency. scikit-learn marks halving as experimental: this module's test would notice a
change.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.experimental import enable_halving_search_cv  # noqa: F401  (it must be asked for)
from sklearn.model_selection import HalvingGridSearchCV

from fleetprune.errors import ConfigError

FACTOR = 2
LEAST_ROUNDS = 2
LEAST_SHARE = 0.05
"""Of the training's rounds: a shorter training says nothing of it."""
LONGEST_SHARE = 0.5
"""Of the training's rounds: what a longer one would add is better spent on the run itself."""
_TIE = 1e-9  # far below any difference of accuracies; scikit-learn leaves it open who wins a tie

Judge = Callable[[int, int], float]
"""(which candidate, rounds) to its score, the higher the better."""


@dataclass(frozen=True)
class Ladder:
    """How many candidates are trained for how many rounds."""

    sizes: tuple[int, ...]
    """candidates per rung"""
    rounds: tuple[int, ...]
    """of each of them"""

    @property
    def total(self) -> int:
        """Rounds of all trainings together."""
        return sum(n * r for n, r in zip(self.sizes, self.rounds, strict=True))


def plan_ladder(candidates: int, rounds: int, share: float) -> Ladder:
    """The ladder for as many candidates as a budget of rounds allows.

    Args:
        candidates: How many there are, at least 2.
        rounds: Of the training that is to come.
        share: Of these rounds, what all trying may take together.

    Returns:
        With `sizes[0]` of the candidates, the first ones.

    Raises:
        ConfigError: The budget is too small for two.
    """
    budget = int(share * rounds)
    longest = max(1, int(LONGEST_SHARE * rounds))
    least = min(longest, max(LEAST_ROUNDS, ceil(LEAST_SHARE * rounds)))
    for tried in range(candidates, 1, -1):
        sizes = _sizes(tried)
        growth = [FACTOR**i for i in range(len(sizes))]
        whole = sum(n * g for n, g in zip(sizes, growth, strict=True))
        first = min(budget // whole, longest // growth[-1])
        if first >= least:
            return Ladder(sizes, tuple(first * g for g in growth))
    raise ConfigError(
        f"simulation.auto_rounds {share:g} of {rounds} rounds is {budget}: two candidates need "
        f"{2 * least}, raise it to {2 * least / rounds:.2g} or more"
    )


def _sizes(candidates: int) -> tuple[int, ...]:
    """Candidates per rung, down to two: one alone has nothing to win."""
    sizes = [candidates]
    while sizes[-1] > FACTOR:
        sizes.append(ceil(sizes[-1] / FACTOR))
    return tuple(sizes)


class _Trial(BaseEstimator):  # type: ignore[misc]
    """A candidate as scikit-learn asks for it."""

    def __init__(self, judge: Judge | None = None, candidate: int = 0, rounds: int = 1) -> None:
        self.judge, self.candidate, self.rounds = judge, candidate, rounds

    def fit(self, x: Any, y: Any = None) -> Self:
        assert self.judge is not None
        self.score_ = self.judge(self.candidate, self.rounds) - _TIE * self.candidate
        return self

    def score(self, x: Any, y: Any = None) -> float:
        return self.score_


def halve(ladder: Ladder, judge: Judge) -> int:
    """Climb the ladder.

    Args:
        ladder: From `plan_ladder`.
        judge: Called once per candidate and rung, one rung after the other.

    Returns:
        The candidate with the best score of the last rung; ties go to the lower number, here and
        on the way.
    """

    def judged(candidate: int, rounds: int) -> float:
        # Of a method, scikit-learn would copy the object.
        return judge(candidate, rounds)

    search = HalvingGridSearchCV(
        _Trial(judged),
        {"candidate": list(range(ladder.sizes[0]))},
        resource="rounds",
        factor=FACTOR,
        min_resources=ladder.rounds[0],
        max_resources=ladder.rounds[-1],
        cv=[([0], [0])],  # the judge knows the samples; these are none
        refit=False,
        error_score="raise",
        return_train_score=False,
    )
    search.fit(np.zeros((1, 1)))
    return int(search.best_params_["candidate"])
