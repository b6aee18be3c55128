import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetprune_coordinator.cohort import choose
from fleetprune_coordinator.records import DeviceRecord


def fleet(**classes):
    names = [name for name, count in classes.items() for _ in range(count)]
    return [
        DeviceRecord(i, f"d{i}", name, True, 10, 0, "1", 0.0, 0.0, 0.0, True)
        for i, name in enumerate(names)
    ]


def drawn(devices, size, *, stratified=True, seed=0):
    return choose(devices, size, np.random.default_rng(seed), stratified=stratified)


def test_a_rare_class_is_heard_as_often_as_a_common_one():
    classes = [d.device_class for d in drawn(fleet(common=98, rare=2), 4)]
    assert sorted(classes) == ["common", "common", "rare", "rare"]


def test_what_a_small_class_cannot_fill_goes_to_the_others():
    classes = [d.device_class for d in drawn(fleet(common=8, rare=1), 6)]
    assert classes.count("rare") == 1
    assert len(classes) == 6


def test_unstratified_draws_follow_the_fleet():
    counts = [
        sum(
            d.device_class == "rare"
            for d in drawn(fleet(common=90, rare=10), 10, seed=s, stratified=False)
        )
        for s in range(200)
    ]
    assert np.mean(counts) == pytest.approx(1.0, abs=0.3)


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 30), st.booleans())
def test_draws_are_distinct_and_as_many_as_there_can_be(a, b, size, stratified):
    devices = fleet(a=a, b=b)
    got = drawn(devices, size, stratified=stratified)
    assert len({d.id for d in got}) == len(got) == min(size, a + b)
    assert [d.id for d in got] == sorted(d.id for d in got)


def test_the_same_seed_draws_the_same_devices():
    assert drawn(fleet(a=9, b=9), 4, seed=3) == drawn(fleet(a=9, b=9), 4, seed=3)
