import pytest

from fleetprune.errors import BudgetError
from fleetprune.layout import Architecture, Role, TensorSpec
from fleetprune.protection import UNPROTECTED, Protection, protect
from tests.shared.chains import axis, weight

# stem -> body.0.conv -> body.0.norm, body.1.conv -> fc; body.1.conv's outputs are two groups.
NET = Architecture(
    groups={"stem": 8, "body.0.conv": 16, "body.1.conv": 12, "body.1.conv:2": 4},
    tensors=(
        weight("stem", axis(8, "stem"), axis(3)),
        weight("body.0.conv", axis(16, "body.0.conv"), axis(8, "stem")),
        TensorSpec(name="body.0.norm.bias", role=Role.PARAMETER, axes=(axis(16, "body.0.conv"),)),
        weight(
            "body.1.conv",
            axis(12, "body.1.conv") + axis(4, "body.1.conv:2"),
            axis(16, "body.0.conv"),
        ),
        weight("fc", axis(10), axis(12, "body.1.conv") + axis(4, "body.1.conv:2")),
        TensorSpec(name="scale", role=Role.PARAMETER, axes=()),
    ),
)


def excluded(*names):
    return set(protect(NET, exclude=names).whole)


def test_nothing_is_protected_unless_it_is_said():
    assert protect(NET) == UNPROTECTED
    assert UNPROTECTED.levels("stem", 20, 8) == (8, 16, 20)


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("stem", {"stem"}),
        ("body.0", {"body.0.conv"}),
        ("body.0.norm", {"body.0.conv"}),
        ("body", {"body.0.conv", "body.1.conv", "body.1.conv:2"}),
        ("body.1.conv", {"body.1.conv", "body.1.conv:2"}),
        ("body.1.conv:2", {"body.1.conv:2"}),
        ("*.conv", {"body.0.conv", "body.1.conv", "body.1.conv:2"}),
        ("body.?", {"body.0.conv", "body.1.conv", "body.1.conv:2"}),
        ("body.[1-9]", {"body.1.conv", "body.1.conv:2"}),
        ("fc", set()),  # never cut anyway
    ],
)
def test_names_stand_for_groups(name, groups):
    assert excluded(name) == groups


def test_several_names():
    assert excluded("stem", "body.0") == {"stem", "body.0.conv"}


def test_a_minimum_is_a_number_or_a_share():
    found = protect(NET, minimum={"stem": 3, "body.0": 0.4, "body.1": 6})
    assert found.least == {"stem": 3, "body.0.conv": 7, "body.1.conv": 6, "body.1.conv:2": 4}
    assert protect(NET, minimum={"stem": 1.0}).least == {"stem": 8}
    assert protect(NET, minimum={"stem": 1}).least == {"stem": 1}


def test_the_last_name_counts():
    found = protect(NET, multiple={"*": 4, "body.0": 2})
    assert found.multiple["body.0.conv"] == 2
    assert found.multiple["stem"] == 4
    assert protect(NET, minimum={"body.0": 2, "*": 4}).least["body.0.conv"] == 4


def test_levels_begin_at_the_first_multiple_that_is_enough():
    protection = Protection(frozenset({"whole"}), {"least": 9}, {"own": 3, "least": 4})
    assert protection.levels("whole", 20, 8) == (20,)
    assert protection.levels("least", 20, 8) == (12, 16, 20)
    assert protection.levels("own", 10, 8) == (3, 6, 9, 10)
    assert protection.levels("least", 10, 8) == (10,)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"exclude": ["body.2"]},
            "pruning.exclude: no layer 'body.2', did you mean body.1, body.0, body?",
        ),
        ({"exclude": ["stm"]}, "pruning.exclude: no layer 'stm', did you mean stem?"),
        (
            {"exclude": ["body.01"]},
            "pruning.exclude: no layer 'body.01', did you mean body.1, body.0, body?",
        ),
        (
            {"minimum": {"zzz": 1}},
            "pruning.minimum: no layer 'zzz', expected one of stem, body.0.conv, body.0.norm "
            "and 3 more",
        ),
        (
            {"multiple": {"fc": 4}},
            "pruning.multiple: the outputs of 'fc' are never cut, name a layer that can be",
        ),
        ({"minimum": {"stem": 9}}, "pruning.minimum: 'stem' has 8 units, got 9"),
        ({"minimum": {"body.1": 13}}, "pruning.minimum: 'body.1' has 12 units, got 13"),
    ],
)
def test_names_and_numbers_that_do_not_fit(asked, message):
    with pytest.raises(BudgetError) as e:
        protect(NET, **asked)
    assert str(e.value) == message
