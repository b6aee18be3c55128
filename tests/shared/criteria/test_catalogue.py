import inspect

import numpy as np
import pytest

from fleetprune import criteria
from fleetprune.criteria import CATALOGUE, MEASURED, Criterion, Needs, needs
from fleetprune.masks import order_units, settle_order
from fleetprune.result import VECTORS


def test_every_criterion_says_what_it_needs():
    assert set(CATALOGUE) == set(Criterion)
    assert {c.value for c in Criterion if needs(c) is Needs.FORWARD} == {
        "wanda",
        "apoz",
        "reconstruction",
    }
    assert {c.value for c in Criterion if needs(c) is Needs.BACKWARD} == {
        "taylor",
        "taylor_abs",
        "sensitivity",
        "fisher",
        "snip",
    }
    assert [c for c in Criterion if needs(c) is Needs.TRAINING] == [Criterion.MOVEMENT]


def test_what_devices_report_has_a_section():
    for criterion, facts in CATALOGUE.items():
        asked = facts.needs in (Needs.FORWARD, Needs.BACKWARD)
        assert (facts.section in VECTORS) == asked, criterion


def test_only_sums_of_forward_passes_are_additive():
    assert [c for c, f in CATALOGUE.items() if f.additive] == [
        c for c in Criterion if needs(c) is Needs.FORWARD
    ]


def test_measured_are_those_that_every_round_brings():
    devices = {c for c in Criterion if needs(c) is not Needs.NOTHING}
    assert devices - MEASURED == {Criterion.RECONSTRUCTION}
    assert devices >= MEASURED


FUNCTIONS = [
    f for name in criteria.__all__ if inspect.isfunction(f := getattr(criteria, name))
    and inspect.signature(f).return_annotation is criteria.Scores
]  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_every_criterion_says_paper_sign_and_place(function):
    text = inspect.getdoc(function)
    assert "high = " in text.lower()
    assert "Runs " in text
    assert "et al." in text or "Smolensky" in text or "movement" in text


def test_all_criteria_are_looked_at():
    assert len(FUNCTIONS) == 16


@pytest.mark.parametrize("scores", [np.zeros(5), np.full(5, 0.3)])
def test_equal_scores_leave_the_order_as_it_is(scores):
    scores = scores.astype(np.float32)
    assert order_units(scores).tolist() == [0, 1, 2, 3, 4]
    assert settle_order({"g": scores}, {"g": {2, 3}})["g"].tolist() == [0, 1, 2, 3, 4]
