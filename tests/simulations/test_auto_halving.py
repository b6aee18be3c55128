"""Successive halving on made-up accuracies: who is tried for how long, and who wins."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetprune.errors import ConfigError
from fleetprune_sim.auto.halving import Ladder, halve, plan_ladder


@pytest.mark.parametrize(
    ("candidates", "rounds", "share", "sizes", "each"),
    [
        (8, 50, 2.0, (8, 4, 2), (4, 8, 16)),  # 32 + 32 + 32 of 100
        (15, 50, 2.0, (8, 4, 2), (4, 8, 16)),  # 15 would have one round each, and 3 are the least
        (15, 50, 4.0, (15, 8, 4, 2), (3, 6, 12, 24)),  # 45 + 48 + 48 + 48 of 200
        (5, 50, 2.0, (5, 3, 2), (5, 10, 20)),  # 25 + 30 + 40
        (3, 50, 2.0, (3, 2), (12, 24)),  # half of a training is the longest
        (2, 50, 2.0, (2,), (25,)),
        (8, 20, 2.0, (6, 3, 2), (2, 4, 8)),  # 12 + 12 + 16 of 40
        (8, 1, 2.0, (2,), (1,)),
    ],
)
def test_a_budget_of_rounds_is_shared_out(candidates, rounds, share, sizes, each):
    assert plan_ladder(candidates, rounds, share) == Ladder(sizes, each)


def test_too_few_rounds_are_refused_with_what_would_do():
    with pytest.raises(ConfigError) as caught:
        plan_ladder(8, 40, 0.05)
    assert str(caught.value) == (
        "simulation.auto_rounds 0.05 of 40 rounds is 2: two candidates need 4, raise it to 0.1 or "
        "more"
    )
    assert plan_ladder(8, 40, 0.1) == Ladder((2,), (2,))


@given(st.integers(2, 40), st.integers(1, 300), st.floats(2.0, 20.0))
def test_a_ladder_keeps_its_budget_and_halves(candidates, rounds, share):
    ladder = plan_ladder(candidates, rounds, share)
    assert ladder.total <= share * rounds
    assert 2 <= ladder.sizes[0] <= candidates
    assert ladder.sizes[-1] == 2
    assert all(b == -(-a // 2) for a, b in zip(ladder.sizes, ladder.sizes[1:], strict=False))
    assert all(b == 2 * a for a, b in zip(ladder.rounds, ladder.rounds[1:], strict=False))
    assert ladder.rounds[-1] <= max(1, rounds // 2)


EIGHT = Ladder((8, 4, 2), (4, 8, 16))


def test_the_better_half_is_tried_for_twice_as_long():
    after = {
        4: {0: 0.50, 1: 0.70, 2: 0.75, 3: 0.20, 4: 0.60, 5: 0.72, 6: 0.10, 7: 0.71},
        8: {1: 0.80, 2: 0.76, 5: 0.81, 7: 0.77},  # 1, 2, 5 and 7 were the best four
        16: {1: 0.90, 5: 0.89},
    }
    asked: dict[int, list[int]] = {4: [], 8: [], 16: []}

    def judge(candidate, rounds):
        asked[rounds].append(candidate)
        return after[rounds][candidate]

    assert halve(EIGHT, judge) == 1
    assert {rounds: sorted(some) for rounds, some in asked.items()} == {
        rounds: sorted(some) for rounds, some in after.items()
    }


def test_ties_go_to_the_one_that_comes_first():
    asked = []

    def judge(candidate, rounds):
        asked.append((rounds, candidate))
        return 0.5

    assert halve(EIGHT, judge) == 0
    assert {c for r, c in asked if r == 8} == {0, 1, 2, 3}
    assert {c for r, c in asked if r == 16} == {0, 1}


def test_one_that_fails_is_behind_all_others():
    assert halve(Ladder((3, 2), (2, 4)), lambda candidate, _: (-1.0, 0.0, -1.0)[candidate]) == 1


def test_what_the_judge_raises_comes_through():
    def judge(candidate, rounds):
        raise ConfigError("no")

    with pytest.raises(ConfigError, match=r"^no$"):
        halve(EIGHT, judge)


@given(st.lists(st.integers(0, 100), min_size=2, max_size=20))
def test_where_rounds_change_nothing_the_best_wins(scores):
    sizes = [len(scores)]
    while sizes[-1] > 2:
        sizes.append(-(-sizes[-1] // 2))
    ladder = Ladder(tuple(sizes), tuple(2**i for i in range(len(sizes))))
    assert halve(ladder, lambda candidate, _: scores[candidate] / 100) == scores.index(max(scores))
