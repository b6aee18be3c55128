import numpy as np
import pytest

from fleetprune import criteria
from fleetprune.errors import BudgetError

from .nets import RESIDUAL, TWO, f32

PARAMS = {
    "in.weight": f32([1, -2], [0, 4]),
    "norm.weight": f32(1, 2),
    "norm.bias": f32(3, 1),
}
GRADS = {
    "in.weight": f32([2, 1], [-7, 0.5]),
    "norm.weight": f32(2, 1),
    "norm.bias": f32(-1, 1),
}


def test_taylor_sums_scale_and_shift_before_the_square():
    # unit 0: 1*2 + 3*-1 = -1; unit 1: 2*1 + 1*1 = 3
    assert criteria.taylor(TWO, PARAMS, GRADS)["h"].tolist() == [1.0, 9.0]
    assert criteria.taylor_abs(TWO, PARAMS, GRADS)["h"].tolist() == [1.0, 3.0]
    assert criteria.movement(TWO, PARAMS, GRADS)["h"].tolist() == [1.0, -3.0]


def test_taylor_of_a_filter_before_a_norm_is_nothing_so_gates_leave_it_out():
    assert all(not gate.tensor.startswith("in") for gate in TWO.gates["h"])


def test_members_of_a_residual_group_act_together():
    params = {"a.weight": f32([1], [1], [1]), "b.weight": f32([1, 0], [1, 0], [1, 0])}
    grads = {"a.weight": f32([2], [2], [0]), "b.weight": f32([-2, 0], [1, 0], [0, 9])}
    assert criteria.taylor(RESIDUAL, params, grads)["r"].tolist() == [0, 9, 0]


def test_sensitivity_keeps_the_sensitive():
    assert criteria.sensitivity(TWO, GRADS)["h"].tolist() == [3.0, 7.5]


def test_fisher_is_half_the_squared_gradient_times_the_squared_weight():
    squared = {"in.weight": np.square(GRADS["in.weight"])}
    # (1*4 + 4*1) / 2 and (0*49 + 16*0.25) / 2
    assert criteria.fisher(TWO, PARAMS, squared)["h"].tolist() == [4.0, 2.0]


def test_snip_is_a_share_of_the_network():
    # |1*2| + |-2*1| = 4 and |0*-7| + |4*0.5| = 2
    scores = criteria.snip(TWO, PARAMS, GRADS)["h"]
    assert scores.tolist() == [np.float32(4 / 6), np.float32(2 / 6)]
    louder = {name: 1000 * g for name, g in GRADS.items()}
    np.testing.assert_allclose(criteria.snip(TWO, PARAMS, louder)["h"], scores, rtol=1e-6)


def test_growth_is_the_gradient_of_what_is_pruned():
    assert criteria.growth(TWO, GRADS, {"h": 1})["h"].tolist() == [-1.0, 7.5]
    with pytest.raises(BudgetError, match=r"^group h: keep 3, expected 1\.\.2$"):
        criteria.growth(TWO, GRADS, {"h": 3})


def test_movement_is_positive_for_what_moves_away_from_zero():
    start = {"norm.weight": f32(1, -1), "norm.bias": f32(0, 0)}
    end = {"norm.weight": f32(2, -0.5), "norm.bias": f32(-1, 0)}
    # (4 - 1 + 1) / 2 and (0.25 - 1) / 2
    assert criteria.moved(TWO, start, end)["h"].tolist() == [2.0, -0.375]


def test_movement_of_a_narrower_model():
    start = {"norm.weight": f32(1), "norm.bias": f32(0)}
    end = {"norm.weight": f32(3), "norm.bias": f32(0)}
    assert criteria.moved(TWO, start, end, {"h": 1})["h"].tolist() == [4.0]


def test_movement_from_both_ends_is_that_of_the_steps_between():
    """Gradient descent on L = sum of (w - target)**2 / 2, in small steps."""
    rate, target = 1e-4, f32(3, -1)
    weights = {"norm.weight": np.array([1.0, -2.0]), "norm.bias": np.zeros(2)}
    start = {n: w.astype(np.float32) for n, w in weights.items()}
    total = np.zeros(2)
    for _ in range(2000):
        gradients = {
            "norm.weight": weights["norm.weight"] - target,
            "norm.bias": np.zeros(2),
        }
        total += criteria.movement(TWO, weights, gradients)["h"]
        weights = {n: w - rate * gradients[n] for n, w in weights.items()}
    end = {n: w.astype(np.float32) for n, w in weights.items()}
    np.testing.assert_allclose(criteria.moved(TWO, start, end)["h"], rate * total, rtol=1e-3)
    assert (total > 0).tolist() == [True, False]


@pytest.mark.parametrize(
    "criterion", [criteria.taylor, criteria.taylor_abs, criteria.snip, criteria.movement]
)
def test_without_any_gradient_all_scores_are_zero(criterion):
    nothing = {name: np.zeros_like(g) for name, g in GRADS.items()}
    assert criterion(TWO, PARAMS, nothing)["h"].tolist() == [0, 0]


def test_a_gradient_that_is_not_a_number_is_noticed():
    broken = GRADS | {"norm.bias": f32(np.nan, 0)}
    with pytest.raises(BudgetError, match=r"^taylor: unit 0 of group h scores nan, "):
        criteria.taylor(TWO, PARAMS, broken)
