from hypothesis import given
from hypothesis import strategies as st

from fleetprune.dynamic_schedule import Move, Threshold, start, step
from fleetprune.schedule import Schedule

FAST = Schedule(curve="dynamic", end=100, step=0.25, window=1, stable=0.1, bound=0.02)


def follow(schedule, *rounds):
    """Slack and move after each (loss, accuracy)."""
    state, seen = start(), []
    for loss, accuracy in rounds:
        state = step(schedule, state, loss, accuracy)
        seen.append((state.slack, str(state.move)))
    return seen


def test_it_waits_while_the_loss_falls_and_cuts_when_it_is_stable():
    assert follow(FAST, (1.0, None), (0.8, None), (0.7, None), (0.65, None)) == [
        (1.0, "wait"),
        (1.0, "wait"),  # a fifth lower
        (1.0, "wait"),  # an eighth lower
        (0.75, "cut"),  # a fourteenth: stable
    ]


def test_a_window_is_compared_with_the_one_before():
    two = FAST.model_copy(update={"window": 2})
    losses = [(1.0, None), (0.6, None), (0.75, None), (0.83, None)]
    assert follow(two, *losses)[-1] == (0.75, "cut")  # 0.8 before, 0.79 now


def test_after_a_cut_the_window_begins_anew():
    assert follow(FAST, (1.0, None), (1.0, None), (3.0, None), (3.0, None)) == [
        (1.0, "wait"),
        (0.75, "cut"),
        (0.75, "wait"),
        (0.5, "cut"),
    ]


def test_it_backs_off_when_accuracy_drops_by_more_than_the_bound():
    rounds = [(1.0, 0.8), (1.0, 0.9), (1.0, 0.89), (1.0, 0.87), (1.0, 0.9)]
    assert follow(FAST, *rounds) == [
        (1.0, "wait"),
        (0.75, "cut"),
        (0.75, "wait"),  # a point below the best: within the bound
        (1.0, "back off"),  # three points
        (1.0, "wait"),
    ]


def test_the_dense_model_has_nothing_to_take_back():
    assert follow(FAST, (1.0, 0.9), (0.5, 0.5)) == [(1.0, "wait"), (1.0, "wait")]


def test_it_ends_at_the_budget_and_leaves_it_again_if_it_hurts():
    tenth = FAST.model_copy(update={"step": 0.1})
    state = start()
    for _ in range(20):
        state = step(tenth, state, 1.0, 0.9)
    assert (state.slack, state.move) == (0.0, Move.CUT)
    state = step(tenth, state, 1.0, 0.9)
    assert (state.slack, state.move) == (0.0, Move.DONE)
    assert step(tenth, state, 1.0, 0.8).slack == 0.1


def test_a_round_without_a_report_changes_nothing():
    state = Threshold(0.5, (1.0,), 0.9, Move.WAIT)
    assert step(FAST, state, None, None) == state


@given(st.lists(st.tuples(st.floats(0, 10), st.one_of(st.none(), st.floats(0, 1))), max_size=60))
def test_slack_stays_between_the_budget_and_the_dense_model(rounds):
    assert all(0.0 <= slack <= 1.0 for slack, _ in follow(FAST, *rounds))
