"""Stages, silence, small fleets, and a fleet of ten thousand: pure, in its own time."""

from dataclasses import replace

import numpy as np
import pytest

from fleetprune.config_file import load_section
from fleetprune.errors import ConfigError
from fleetprune.rollout import cohort
from fleetprune_coordinator.rollout_config import RolloutConfig
from fleetprune_coordinator.rollout_fates import Fate, fate
from fleetprune_coordinator.rollout_state import Device, Status
from tests.coordinator.rollout_examples import DAY, HOUR, Class, device, record, report

RULES = RolloutConfig()
ALL_AT_ONCE = RolloutConfig(stages=(1.0,), soak_s=0)


def devices(n, **fields):
    return [device(f"d{i}", **(fields or {"release": 1})) for i in range(n)]


def walk(phones, **fields):
    """Everybody installs and soaks, stage after stage; the stages' shares with their cohorts."""
    seen = []
    while phones.rollout.status.open:
        seen.append((phones.rollout.place, len(phones.cohort())))
        phones.install(**fields)
        phones.step(HOUR)
        assert len(seen) < 20
    return seen


def test_a_release_goes_through_its_stages():
    phones = Class(devices(200))
    assert phones.log == [("draw", f"drawn as canaries: {', '.join(phones.rollout.canaries)}")]
    seen = walk(phones)
    assert [place for place, _ in seen] == ["canaries", "5 %", "25 %", "50 %", "100 %"]
    sizes = [n for _, n in seen]
    assert sizes[0] == 3 and sizes[-1] == 200 and sizes == sorted(sizes)
    assert phones.rollout.status is Status.COMPLETE
    assert phones.log[-1] == ("complete", "200 of 200 devices run it well")
    done = phones.rollout.plan(9)
    assert (done.serial, done.stable, done.candidate, done.share) == (9, 2, 0, 0)


def test_canaries_are_the_first_in_the_order_of_cohorts_that_are_there():
    phones = devices(50)
    order = sorted(phones, key=lambda d: cohort(d.name, record().salt))
    order[0] = device(order[0].name, online=False)
    found = Class([order[0], *order[1:]])
    assert found.rollout.canaries == tuple(d.name for d in order[1:4])


@pytest.mark.parametrize(("n", "canaries"), [(1, 1), (2, 1), (5, 1), (6, 2), (9, 3), (90, 3)])
def test_at_most_a_third_are_drawn_and_at_least_one(n, canaries):
    assert len(Class(devices(n)).rollout.canaries) == canaries


def test_stages_that_add_nobody_are_skipped_and_said():
    phones = Class(devices(1))
    phones.install()
    step = phones.step(HOUR)
    assert step.rollout.status is Status.COMPLETE
    assert step.reason == (
        "1 of 1 devices run it well; 5 %, 25 %, 50 %, 100 % skipped: "
        "no other device was seen lately"
    )


def test_a_class_without_a_device_that_is_there_waits_for_a_canary():
    phones = Class([device("d0", online=False)])
    assert phones.log == [
        ("wait", "no device of the class is online: the first that comes is the canary")
    ]
    phones.now = 30 * DAY
    phones.comes("d0")
    assert phones.step().action == "draw"
    assert phones.rollout.canaries == ("d0",)


def test_named_canaries_who_never_come_hold_the_rollout():
    phones = Class([device("d0", seen=-1, online=False), device("d1")], canaries=("d0",))
    assert phones.step(HOUR).reason == "of the canaries d0 none has been seen"
    step = phones.step(DAY)
    assert (step.action, step.reason) == (
        "hold",
        "of the canaries d0 none has been seen: promote, abort, or start it with others",
    )
    assert phones.step(DAY).action == "wait"  # said once


def test_everybody_at_once():
    phones = Class(devices(3), ALL_AT_ONCE)
    assert phones.rollout.place == "100 %" and len(phones.cohort()) == 3
    assert phones.step().reason == "0 of 3 devices run it well, 3 awaited"
    phones.install()
    assert phones.step().action == "complete"


def test_a_class_without_devices_is_complete_where_nobody_is_asked_first():
    assert Class([], ALL_AT_ONCE).rollout.status is Status.COMPLETE


def test_a_failed_canary_stops_it_before_the_others_have_answered():
    phones = Class(devices(200))
    first = phones.rollout.canaries[0]
    phones.says(first, failed=2, state="rolled_back", error="release 2: golden samples differ")
    step = phones.step()
    assert (step.action, step.reason) == (
        "abort",
        f"1 of 3 devices failed ({first} rolled back: release 2: golden samples differ), 2 % may",
    )
    plan = phones.rollout.plan(5)
    assert (plan.stable, plan.candidate) == (1, 0)
    assert plan.wanted(first, 1) == plan.wanted("d7", 2) == 1


def test_a_first_release_that_is_stopped_leaves_devices_what_they_have():
    phones = Class([device(f"d{i}", online=True) for i in range(9)], stable=0)
    phones.says(phones.rollout.canaries[0], release=0, state="empty", failed=2)
    assert phones.step().reason.endswith(
        "there is no release to go back to: devices that have it keep it"
    )
    assert phones.rollout.plan(1).wanted("d0", 2) == 2


def test_silence_is_failure_after_the_deadline():
    phones = Class(devices(200))
    bricked = phones.rollout.canaries[0]
    phones.install()
    phones.says(bricked, release=1)  # it has not got to it yet, and is never heard of again
    phones.leaves(bricked)
    for name in phones.devices:
        if name != bricked:
            phones.says(name, release=2 if name in phones.cohort() else 1)
    assert phones.step(HOUR).reason == "2 of 3 devices run it well, 1 awaited"
    assert phones.step(DAY - HOUR - 1).action == "wait"
    step = phones.step(2)
    assert (step.action, step.reason) == (
        "abort",
        f"1 of 3 devices failed ({bricked} has not been heard of since it was told), 2 % may",
    )


def test_a_device_that_is_bricked_after_it_has_committed_counts_too():
    phones = Class(devices(200))
    phones.install()
    bricked = phones.rollout.canaries[0]
    phones.leaves(bricked)
    phones.step(HOUR + 1)
    assert phones.rollout.place == "canaries"
    step = phones.step(DAY)
    assert step.action == "abort"
    assert f"{bricked} ran it, and has not been heard of since" in step.reason


def test_a_device_that_is_away_neither_blocks_nor_fails_a_stage():
    away = [device(f"a{i}", seen=-30 * DAY, online=False, release=1) for i in range(100)]
    phones = Class([*devices(100), *away])
    walk(phones)
    assert phones.rollout.status is Status.COMPLETE
    assert phones.log[-1][1] == "100 of 100 devices run it well"


def test_a_device_that_comes_back_late_has_its_own_deadline():
    late = device("late", seen=-HOUR, online=False, release=1)
    phones = Class([*devices(2), late], ALL_AT_ONCE)
    phones.install()
    phones.now = DAY - 10
    phones.step()
    assert phones.rollout.status is Status.COMPLETE  # it was not there: nobody waits for it
    phones = Class([*devices(2), late], ALL_AT_ONCE)
    phones.comes("late")
    phones.step()
    phones.install()
    phones.says("late", release=1)
    phones.leaves("late")
    assert phones.step(DAY - 1).action == "wait"
    assert phones.step(2).action == "abort"


def test_a_device_that_says_why_it_waits_does_not_count_after_the_deadline():
    phones = Class(devices(200))
    phones.install()
    slow = phones.rollout.canaries[0]
    phones.says(slow, release=1, postponed="quiet hours until 06:00")
    step = phones.step(HOUR)
    assert step.evidence.reasons == {slow: "quiet hours until 06:00"}
    phones.now += DAY
    phones.says(slow, release=1, postponed="a metered link")
    step = phones.step()
    assert (step.action, step.evidence.counted, step.evidence.excused) == ("advance", 2, 1)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"release": 2}, (Fate.GOOD, "runs it")),
        ({"release": 2, "state": "trial"}, (Fate.WAITING, "has it on trial")),
        ({"release": 1}, (Fate.WAITING, "has not installed it yet")),
        (
            {"release": 1, "failed": 2, "error": "too slow"},
            (Fate.FAILED, "refused it: too slow"),
        ),
        (
            {"release": 1, "failed": 2, "state": "rolled_back"},
            (Fate.FAILED, "rolled back: no reason given"),
        ),
        ({"release": 1, "failed": 1}, (Fate.WAITING, "has not installed it yet")),
        (
            {"release": 2, "variant": "watch", "error": "too slow"},
            (Fate.FAILED, "runs the model of class watch: too slow"),
        ),
        ({"release": 2, "crashes": 3}, (Fate.GOOD, "runs it")),
        ({"release": 2, "crashes": 4}, (Fate.FAILED, "crashed 4 times, allowed are 3")),
    ],
)
def test_what_became_of_it(fields, expected):
    told = Device("d", True, 0.0, report("d", **fields), 0.0, told_at=0.0, committed_at=0.0)
    assert fate(told, 2, RULES, HOUR) == expected


def test_few_may_be_missing_where_many_may_fail():
    phones = Class(devices(1000), RolloutConfig(stages=(1.0,), soak_s=60))
    phones.install()
    for i in range(20):
        phones.says(f"d{i}", release=1)
    assert phones.step(60).action == "complete"  # 980 of 1000, and 2 % may fail
    phones = Class(devices(1000), RolloutConfig(stages=(1.0,), soak_s=60))
    phones.install()
    for i in range(21):
        phones.says(f"d{i}", release=1)
    assert phones.step(60).action == "wait"


def test_more_failures_than_may_be_but_perhaps_by_chance_are_for_a_person():
    phones = Class(devices(100), RolloutConfig(stages=(1.0,), soak_s=60))
    phones.install()
    for i in range(3):
        phones.says(f"d{i}", release=1, failed=2, error="x")
    step = phones.step(60)
    assert (step.action, step.reason) == (
        "hold",
        "3 of 100 devices failed (d0 refused it: x; d1 refused it: x; and 1 more), 2 % may, "
        "but not with 95 % confidence: promote or abort",
    )
    assert phones.rollout.held


def test_accuracy_that_falls_stops_it():
    phones = Class(devices(90))
    phones.install(accuracy=0.7, accuracy_before=0.9, samples=50, agreement=0.8)
    step = phones.step()
    assert (step.action, step.reason) == (
        "abort",
        "accuracy fell by 20.0 points on 150 samples of 3 devices, 2 may be lost",
    )


def test_accuracy_is_judged_with_more_care_while_devices_are_awaited():
    fields = {"accuracy": 0.80, "accuracy_before": 0.92, "samples": 50, "agreement": 0.8}
    phones = Class(devices(90))
    for name in phones.rollout.canaries[:2]:
        phones.says(name, release=2, **fields)
    assert phones.step().action == "wait"
    phones.says(phones.rollout.canaries[2], release=2, **fields)
    assert phones.step(HOUR).action == "abort"


def test_a_doubtful_loss_is_waited_on_until_the_deadline():
    phones = Class(devices(90))
    phones.install(accuracy=0.86, accuracy_before=0.92, samples=50, agreement=0.9)
    step = phones.step(HOUR)
    assert (step.action, step.reason) == (
        "wait",
        "accuracy may have got worse: more reports are awaited",
    )
    assert phones.step(DAY).action == "advance"  # the next stage knows more, and nothing is lost


def test_latency_that_rises_on_most_devices_stops_it():
    phones = Class(devices(90))
    phones.install(latency_ms=4.1)
    for name in phones.rollout.canaries:
        phones.devices[name] = replace(phones.devices[name], latency_before=2.0)
    step = phones.step(HOUR)
    assert (step.action, step.reason) == (
        "abort",
        "3 of 3 devices need more than 50 % longer than before",
    )


def test_latency_that_rises_by_less_than_it_jitters_is_nothing():
    phones = Class(devices(90))
    phones.install(latency_ms=1.1)
    for name in phones.rollout.canaries:
        phones.devices[name] = replace(phones.devices[name], latency_before=0.1)
    assert phones.step(HOUR).action == "advance"


def test_a_doubt_does_not_hold_up_the_last_stage():
    phones = Class(devices(3), ALL_AT_ONCE)
    phones.install(accuracy=0.86, accuracy_before=0.92, samples=50, agreement=0.9)
    step = phones.step()
    assert step.evidence.accuracy.doubt > 0.8
    assert step.action == "complete"


def test_without_auto_a_person_advances_and_gates_still_stop():
    phones = Class(devices(90), RolloutConfig(auto=False))
    phones.install()
    step = phones.step(HOUR)
    assert (step.action, step.reason) == (
        "hold",
        "3 of 3 devices run it well; rollout.auto is false: promote it",
    )
    phones.says(phones.rollout.canaries[0], release=1, failed=2)
    assert phones.step().action == "abort"


def test_a_coordinator_that_comes_back_to_an_empty_room_does_not_rush_through_the_stages():
    phones = Class(devices(200))
    phones.install()
    phones.step(HOUR)
    assert phones.rollout.place == "5 %"
    phones.install()
    for name in phones.devices:
        phones.leaves(name)  # all are offline for a restarted coordinator
    phones.step(HOUR)
    assert phones.rollout.place == "5 %"
    new = [d.name for d in phones.view.devices if d.name not in phones.cohort()]
    for name in phones.cohort():
        phones.comes(name)
    phones.step()
    assert phones.rollout.place == "25 %"
    assert phones.step(2 * HOUR).reason.startswith("none of the ")
    assert phones.rollout.place == "25 %"
    assert new


def test_ten_thousand_devices():
    """3 % are away, 2 % come and go, installations take minutes to hours, 0.3 % fail."""
    rng = np.random.default_rng(5)
    n, tick = 10_000, 900.0
    phones = Class(
        devices(n - 300)
        + [device(f"a{i}", seen=-60 * DAY, online=False, release=1) for i in range(300)]
    )
    fails = {f"d{i}" for i in rng.choice(n - 300, 30, replace=False)}
    takes = {d: 300 + rng.exponential(1800) for d in phones.devices}
    done, ticks = set(), 0
    while phones.rollout.status.open and ticks < 400:
        ticks += 1
        for d in list(phones.view.devices):
            told = d.told_at is not None and phones.now - d.told_at > takes[d.name]
            if told and d.name not in done:
                done.add(d.name)
                bad = d.name in fails
                phones.says(d.name, release=1 if bad else 2, failed=2 if bad else 0)
        phones.step(tick)
    assert phones.rollout.status is Status.COMPLETE, phones.log[-1]
    begun = [reason for action, reason in phones.log if action == "advance"]
    assert len(begun) == 4
    assert phones.log[-1][1].endswith("devices run it well")
    assert phones.now < 15 * HOUR  # nobody waited for a deadline


def test_ten_thousand_devices_are_spared_a_bad_release():
    """One device in ten would fail: no more than the canaries and the first stage ever see it."""
    rng = np.random.default_rng(6)
    phones = Class(devices(10_000))
    bad = {f"d{i}" for i in rng.choice(10_000, 1000, replace=False)} - set(phones.rollout.canaries)
    while phones.rollout.status.open:
        for name in phones.cohort():
            fields = {"release": 1, "failed": 2} if name in bad else {"release": 2}
            phones.says(name, **fields)
        phones.step(HOUR)
    assert phones.rollout.status is Status.ABORTED
    assert phones.rollout.place == "5 %"
    assert sum(d.told_at is not None for d in phones.view.devices) < 600


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"stages": [0.5, 0.25, 1.0]},
            r"stages \[0.5, 0.25, 1.0\], expected shares that rise to 1.0",
        ),
        ({"stages": [0.5]}, r"stages \[0.5\], expected shares that rise to 1.0"),
        ({"soak_s": 10, "deadline_s": 10}, "deadline_s 10 is within soak_s 10"),
    ],
)
def test_rules_that_cannot_be(fields, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load_section(tmp_path / "fleet.toml", RolloutConfig, fields)


def test_rules_become_stages():
    assert RULES.shares(named=False) == (0, 500, 2500, 5000, 10000)
    assert ALL_AT_ONCE.shares(named=False) == (10000,)
    assert ALL_AT_ONCE.shares(named=True) == (0, 10000)
    assert RolloutConfig(canary_count=0).shares(named=False) == (500, 2500, 5000, 10000)
