"""Rollouts on a real registry and a real repository: what is signed, recorded and survives."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fleetprune.errors import InstallError, RolloutError, UsageError
from fleetprune.rollout import Rollout
from fleetprune_coordinator.releases import KEEP_RELEASES
from fleetprune_coordinator.rollout_state import Status
from tests.coordinator.rollout_fleets import RULES, Fleet, write_fast

PERSON = "ada (uid 1000)"
NAMES = ("p1", "p2", "p3", "p4")


@pytest.fixture
def fleet(tmp_path):
    with Fleet(tmp_path) as fleet:
        fleet.enrol(*NAMES)
        fleet.publish(1)
        yield fleet


def canary(fleet):
    return fleet.registry.open_rollouts()["phone"].canaries[0]


def released(fleet, number=1):
    """A release that all phones run."""
    fleet.rollouts.ensure(number, ["phone"])
    fleet.finish()
    assert fleet.repository.rollout("phone").stable == number


def test_a_release_goes_from_canary_to_all_and_is_signed_on_the_way(fleet):
    fleet.rollouts.ensure(1, ["phone"])
    first = canary(fleet)
    assert [n for n in NAMES if fleet.wanted(n)] == [first]
    fleet.report(first, 1)
    fleet.tick(59)
    assert [n for n in NAMES if fleet.wanted(n)] == [first]
    fleet.tick(2)
    assert len([n for n in NAMES if fleet.wanted(n)]) > 1
    fleet.finish()
    done = fleet.repository.rollout("phone")
    assert (done.stable, done.candidate) == (1, 0)
    assert all(fleet.wanted(n) == 1 for n in (*NAMES, "a device that comes next year"))
    actions = [a for a, _, _ in fleet.decisions()]
    assert actions[0] == "start" and actions[-1] == "complete"
    assert fleet.announced == [1] * (len(actions))
    assert {who for _, _, who in fleet.decisions()} == {"automatic"}
    assert fleet.told()[0] == ("start", "phone", 1, "canaries")
    assert fleet.told()[-1][0] == "complete"


def test_decisions_come_with_their_evidence(fleet):
    fleet.rollouts.ensure(1, ["phone"])
    first = canary(fleet)
    fleet.report(first, 0, state="empty", failed=1, error="too slow: 90 ms, allowed are 20")
    fleet.tick()
    entry = fleet.registry.rollout_log("phone")[-1]
    assert (entry.action, entry.release) == ("abort", 1)
    assert entry.reason == (
        f"1 of 1 devices failed ({first} refused it: too slow: 90 ms, allowed are 20), 2 % may; "
        "there is no release to go back to: devices that have it keep it"
    )
    assert entry.evidence["failed"] == 1
    assert entry.evidence["failure_doubt"] > 0.99
    assert entry.evidence["reasons"] == {first: "refused it: too slow: 90 ms, allowed are 20"}


def test_every_class_goes_its_own_way(fleet):
    fleet.enrol("w1", device_class="watch")
    fleet.rollouts.ensure(1, ["phone", "watch"])
    fleet.report(canary(fleet), 0, state="empty", failed=1, error="x")
    fleet.tick()
    assert fleet.repository.rollout("phone").candidate == 0
    fleet.report("w1", 1, "watch")
    fleet.tick(61)
    assert fleet.repository.rollout("watch").stable == 1
    with pytest.raises(
        RolloutError, match=r"^the rollout of release 1 to class phone was aborted: 1 of"
    ):
        fleet.rollouts.ended(1)


def test_aborted_devices_are_told_to_go_back(fleet):
    released(fleet)
    fleet.publish(2)
    fleet.rollouts.ensure(2, ["phone"])
    first = canary(fleet)
    assert fleet.wanted(first, 1) == 2
    fleet.report(first, 2)
    fleet.tick()
    done = fleet.rollouts.abort(who=PERSON, reason="complaints")
    assert [(d.device_class, d.release, d.changed, d.reason) for d in done] == [
        ("phone", 2, True, "complaints")
    ]
    assert fleet.wanted(first, 2) == 1
    again = fleet.rollouts.abort(who=PERSON)
    assert [(d.changed, d.reason) for d in again] == [(False, "was aborted already: complaints")]
    assert fleet.decisions()[-1] == ("abort", 2, PERSON)


def test_silence_is_failure_and_the_others_go_back(fleet):
    released(fleet)
    fleet.publish(2)
    fleet.rollouts.ensure(2, ["phone"])
    first = canary(fleet)
    fleet.moment += 5
    fleet.registry.set_online(first, False)
    fleet.tick(594)
    assert fleet.repository.rollout("phone").candidate == 2
    fleet.tick(2)
    assert fleet.repository.rollout("phone").candidate == 0
    reason = fleet.registry.rollouts("phone")[0].reason
    assert reason.startswith(f"1 of 1 devices failed ({first} gave no result within 600 s")


def test_time_in_which_nobody_listens_does_not_count(tmp_path):
    with Fleet(tmp_path) as fleet:
        fleet.enrol(*NAMES)
        fleet.publish(1)
        fleet.rollouts.ensure(1, ["phone"])
        first = canary(fleet)
        fleet.tick(30)
        fleet.registry.set_online(first, False)
        moment = fleet.moment
    with Fleet(tmp_path, now=moment + 7 * 86400, gap_s=60) as fleet:  # the machine was off
        fleet.tick()
        assert fleet.registry.open_rollouts()["phone"].status is Status.RUNNING
        for _ in range(9):
            fleet.tick(59)
        assert fleet.registry.open_rollouts()["phone"].status is Status.RUNNING
        fleet.rollouts.tick(listening=False)  # the broker is away
        fleet.moment += 3600
        fleet.rollouts.tick(listening=False)
        fleet.tick()
        assert fleet.registry.open_rollouts()["phone"].status is Status.RUNNING
        fleet.tick(59)
        assert not fleet.registry.open_rollouts()


def test_a_pause_keeps_devices_where_they_are_and_does_not_count(fleet):
    released(fleet)
    fleet.publish(2)
    fleet.rollouts.ensure(2, ["phone"])
    first = canary(fleet)
    other = next(n for n in NAMES if n != first)
    fleet.tick(30)
    assert [d.changed for d in fleet.rollouts.pause(who=PERSON)] == [True]
    assert [(d.changed, d.reason) for d in fleet.rollouts.pause(who=PERSON)] == [
        (False, "is paused already")
    ]
    assert (fleet.wanted(first, 1), fleet.wanted(first, 2), fleet.wanted(other, 1)) == (1, 2, 1)
    fleet.tick(7 * 86400)
    assert fleet.registry.open_rollouts()["phone"].status is Status.PAUSED
    fleet.rollouts.resume(who=PERSON)
    assert [d.reason for d in fleet.rollouts.resume(who=PERSON)] == ["is not paused"]
    assert fleet.wanted(first, 1) == 2
    fleet.tick(569)
    assert fleet.registry.open_rollouts()["phone"].status is Status.RUNNING
    fleet.tick(2)
    assert fleet.registry.rollouts("phone")[0].status is Status.ABORTED


def test_a_person_promotes_whatever_the_gates_say(fleet):
    fleet.rollouts.ensure(1, ["phone"])
    seen = {"phone": 0}
    done = fleet.rollouts.promote(who=PERSON, seen=seen)
    assert done[0].changed
    again = fleet.rollouts.promote(who=PERSON, seen=seen)  # the answer was lost, say
    assert [(d.changed, d.reason) for d in again] == [(False, "has gone on already: 50 %")]
    fleet.rollouts.promote(who=PERSON, to_all=True)
    assert fleet.repository.rollout("phone").share == 10_000
    fleet.rollouts.promote(who=PERSON)
    assert fleet.repository.rollout("phone").stable == 1
    assert [a for a, _, who in fleet.decisions() if who == PERSON] == ["promote"] * 3


def test_a_newer_release_takes_the_place_of_one_that_is_under_way(fleet):
    released(fleet)
    fleet.publish(2)
    fleet.rollouts.ensure(2, ["phone"])
    fleet.report(canary(fleet), 2)
    before = canary(fleet)
    fleet.publish(3)
    fleet.rollouts.ensure(3, ["phone"])
    now = fleet.repository.rollout("phone")
    assert (now.stable, now.candidate) == (1, 3)
    assert canary(fleet) == before  # who has tried the last one goes first again
    old = fleet.registry.rollouts("phone")[1]
    assert (old.candidate, old.status, old.reason) == (
        2,
        Status.REPLACED,
        "release 3 takes its place",
    )
    with pytest.raises(
        RolloutError, match="release 2 to class phone was replaced: release 3 takes"
    ):
        fleet.rollouts.ended(2)
    fleet.finish()
    assert fleet.repository.rollout("phone").stable == 3


def test_a_release_that_replaces_a_paused_one_by_itself_is_paused_too(fleet):
    released(fleet)
    fleet.publish(2)
    fleet.rollouts.ensure(2, ["phone"])
    fleet.rollouts.pause(who=PERSON)
    fleet.publish(3)
    fleet.rollouts.ensure(3, ["phone"])
    now = fleet.repository.rollout("phone")
    assert (now.candidate, now.paused) == (3, True)
    assert fleet.registry.rollout_log("phone")[-1].reason.endswith("; paused, as that of 2 was")
    fleet.rollouts.resume(who=PERSON)
    fleet.finish()
    assert fleet.repository.rollout("phone").stable == 3


def test_a_return_to_an_older_release(fleet):
    released(fleet)
    fleet.publish(2)
    released(fleet, 2)
    serial = fleet.repository.rollout("phone").serial
    done = fleet.rollouts.rollback(1, who=PERSON, reason="drift")
    assert done[0].changed
    assert fleet.repository.rollout("phone") == Rollout(
        device_class="phone", serial=serial + 1, stable=1
    )
    assert [d.changed for d in fleet.rollouts.rollback(1, ["phone"], who=PERSON)] == [False]
    assert fleet.decisions()[-1] == ("rollback", 1, PERSON)
    with pytest.raises(
        RolloutError,
        match=r"^release 2 is no return for class phone, which is told to run 1: "
        r"`fleetprune rollout start 2` rolls it out$",
    ):
        fleet.rollouts.rollback(2, ["phone"], who=PERSON)
    fleet.rollouts.start(2, ["phone"], who=PERSON)
    assert fleet.repository.rollout("phone").candidate == 2


def test_a_return_in_the_middle_of_a_rollout_ends_it(fleet):
    released(fleet)
    fleet.publish(2)
    released(fleet, 2)
    fleet.publish(3)
    fleet.rollouts.ensure(3, ["phone"])
    fleet.rollouts.rollback(1, ["phone"], who=PERSON)
    assert not fleet.registry.open_rollouts()
    assert [r.status for r in fleet.registry.rollouts("phone")][:2] == [
        Status.COMPLETE,
        Status.REPLACED,
    ]


def test_no_return_to_a_release_that_was_stopped(fleet):
    released(fleet)
    fleet.publish(2)
    fleet.rollouts.ensure(2, ["phone"])
    fleet.rollouts.abort(who=PERSON, reason="bad")
    fleet.publish(3)
    fleet.rollouts.ensure(3, ["phone"])
    with pytest.raises(
        RolloutError, match=r"^release 2 was stopped for class phone \(bad\): `fleetprune rollout"
    ):
        fleet.rollouts.rollback(2, ["phone"], who=PERSON)


def test_a_release_that_is_not_signed_any_more_is_refused(fleet):
    released(fleet)
    for number in range(2, KEEP_RELEASES + 4):
        fleet.publish(number)
    released(fleet, KEEP_RELEASES + 3)
    fleet.publish(KEEP_RELEASES + 4)  # release 1 is no longer in use, and goes
    for order in (fleet.rollouts.rollback, fleet.rollouts.start):
        with pytest.raises(
            RolloutError,
            match=r"^release 1 is not signed, or not any more: `fleetprune release list` shows",
        ):
            order(1, who=PERSON)
    with pytest.raises(RolloutError, match=r"^release 99 is not signed for class watch, or"):
        fleet.rollouts.start(99, ["watch"], who=PERSON)


def test_orders_that_cannot_be(fleet):
    with pytest.raises(RolloutError, match=r"^no rollout is under way: there is nothing to pause$"):
        fleet.rollouts.pause(who=PERSON)
    with pytest.raises(
        RolloutError, match=r"^class phone has no rollout under way to promote: none was$"
    ):
        fleet.rollouts.promote(["phone"], who=PERSON)
    with pytest.raises(UsageError, match=r"^class tv: this fleet has phone, watch$"):
        fleet.rollouts.start(1, ["tv"], who=PERSON)
    released(fleet)
    with pytest.raises(RolloutError, match=r"to abort: that of 1 is complete$"):
        fleet.rollouts.abort(["phone"], who=PERSON)
    assert not fleet.rollouts.start(1, ["phone"], who=PERSON)[0].changed


def test_an_order_for_several_classes_is_carried_out_for_all_or_none(fleet):
    fleet.enrol("w1", device_class="watch")
    fleet.rollouts.ensure(1, ["phone"])
    with pytest.raises(RolloutError):
        fleet.rollouts.pause(["phone", "watch"], who=PERSON)
    assert fleet.registry.open_rollouts()["phone"].status is Status.RUNNING
    assert not fleet.repository.rollout("phone").paused


def test_named_canaries_go_first(tmp_path):
    rules = RULES.model_copy(update={"canaries": ("p3", "w1", "unknown")})
    with Fleet(tmp_path, rules) as fleet:
        fleet.enrol(*NAMES)
        fleet.enrol("w1", device_class="watch")
        fleet.publish(1)
        fleet.rollouts.ensure(1, ["phone", "watch"])
        assert fleet.repository.rollout("phone").canaries == ("p3",)
        assert fleet.repository.rollout("watch").canaries == ("w1",)
        assert [n for n in NAMES if fleet.wanted(n)] == ["p3"]


def test_latency_is_held_against_what_the_device_ran_before(fleet):
    fleet.rollouts.ensure(1, ["phone"])
    for name in NAMES:
        fleet.report(name, 1, latency_ms=2.0)
    fleet.finish()
    for name in NAMES:
        fleet.report(name, 1, latency_ms=2.0)
    fleet.publish(2)
    fleet.rollouts.ensure(2, ["phone"])
    first = canary(fleet)
    fleet.report(first, 2, latency_ms=9.0)
    fleet.tick(61)
    (told,) = [d for d in fleet.registry.rollout_devices("phone", 2) if d.told_at]
    assert (told.name, told.latency_before) == (first, 2.0)
    status = fleet.registry.rollouts("phone")[0]
    assert status.status is Status.RUNNING  # one device alone is too few to tell
    assert fleet.rollouts.ledger.evidence(status).slow == 1


def test_a_repository_that_was_rolled_out_by_other_means_is_taken_over(tmp_path):
    with Fleet(tmp_path) as fleet:
        fleet.publish(1)
        fleet.repository.roll_out_to_all(1, ["phone"])
    with Fleet(tmp_path) as fleet:
        assert fleet.registry.documents()["phone"].stable == 1
        fleet.enrol(*NAMES)
        fleet.publish(2)
        fleet.rollouts.ensure(2, ["phone"])
        now = fleet.repository.rollout("phone")
        assert (now.serial, now.stable, now.candidate) == (2, 1, 2)


def test_a_registry_from_a_backup_signs_over_what_came_after_it(tmp_path):
    with Fleet(tmp_path) as fleet:
        fleet.enrol(*NAMES)
        fleet.publish(1)
        fleet.rollouts.ensure(1, ["phone"])
        fleet.repository.publish_rollout(Rollout(device_class="phone", serial=40, stable=1))
        fleet.rollouts.pause(who=PERSON)
        now = fleet.repository.rollout("phone")
        assert (now.serial, now.candidate, now.paused) == (41, 1, True)


def test_devices_of_rollouts_that_are_over_do_not_pile_up(fleet):
    released(fleet)
    fleet.publish(2)
    fleet.rollouts.ensure(2, ["phone"])
    fleet.registry.collect_garbage()
    told = [
        sum(d.told_at is not None for d in fleet.registry.rollout_devices("phone", n))
        for n in (1, 2)
    ]
    assert told == [0, 1]
    assert len(fleet.registry.rollout_log("phone")) > 2  # what was decided stays


def test_what_could_not_be_signed_is_signed_later(tmp_path):
    full = [False]

    def write(path, data):
        if full[0]:
            raise InstallError("disk full")
        write_fast(path, data)

    with Fleet(tmp_path, write=write) as fleet:
        fleet.enrol(*NAMES)
        fleet.publish(1)
        full[0] = True
        with pytest.raises(InstallError, match=r"^disk full$"):
            fleet.rollouts.ensure(1, ["phone"])
        assert fleet.repository.rollout("phone") is None
        full[0] = False
        fleet.tick()
        assert fleet.repository.rollout("phone").candidate == 1
        assert fleet.announced == [1]


def crash(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "tests.coordinator.crash_rollouts", *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_kill_at_any_statement_or_file_leaves_registry_and_signature_in_step(tmp_path):
    """The whole way of two releases, killed at every place that writes, and taken up again."""
    lines = crash("sweep", tmp_path)
    assert len(lines) > 60
    assert [line["killed"] for line in lines] == [True] * (len(lines) - 1) + [False]
    serials = [(line["signed"], line["decided"]) for line in lines]
    assert all(signed <= decided <= signed + 1 for signed, decided in serials)
    assert any(signed < decided for signed, decided in serials)
    for line in lines:
        assert line["end"] == {"stable": 1, "candidate": 0, "runs": [1, 1, 1, 1]}
        assert line["log"] == ["start", "complete", "start", "pause", "resume", "abort"]
