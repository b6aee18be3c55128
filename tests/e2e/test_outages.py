"""Processes of a fleet are killed at their worst moments; the fleet gets to its release anyway."""

import pytest

from fleetprune_coordinator.records import TaskState
from tests.e2e.fleet import COORDINATOR, DEVICES, NOW_S, Fleet

pytestmark = pytest.mark.timeout(240)


def test_a_coordinator_killed_at_any_stage_goes_on_where_it_was(tmp_path):
    with Fleet(tmp_path, starts=5, hidden=512, rounds=5) as fleet:
        fleet.start_agents()
        coordinator = fleet.start_coordinator()
        fleet.wait("three devices", lambda: len(fleet.events("enrolled")) == 3)

        # Tasks are announced, nobody has answered.
        for device in DEVICES:
            fleet[device].freeze()
        announced = fleet.wait("the first round", fleet.open_tasks)
        coordinator.kill()
        assert fleet.open_tasks() == announced
        assert set(announced[1].values()) == {TaskState.OPEN}

        # Two of three have answered; they are not asked again.
        fleet["d1"].thaw()
        fleet["d2"].thaw()
        coordinator = fleet.start_coordinator()
        half = (1, {TaskState.ANSWERED: 2, TaskState.OPEN: 1})
        fleet.wait("two answers", lambda: fleet.open_counts() == half)
        assert fleet.open_tasks()[1].keys() == announced[1].keys()
        coordinator.kill()
        early = [t for t, state in fleet.open_tasks()[1].items() if state is TaskState.ANSWERED]
        fleet["d3"].thaw()
        coordinator = fleet.start_coordinator()
        fleet.wait("the first round's end", lambda: fleet.events("round"))

        # All have answered, the round is being closed.
        number, answered = _freeze_while_closing(fleet)
        coordinator.kill()
        assert fleet.open_tasks() == (number, answered)
        coordinator = fleet.start_coordinator()

        # The release is being published (on a very busy machine: has just been).
        files = fleet.state / "releases" / "public" / "targets" / "releases"
        fleet.wait("files of a release", files.exists, every=NOW_S)
        coordinator.kill()
        fleet.start_coordinator()

        fleet.finish()
        fleet.check_rounds()
        assert fleet.registry.open_round() is None
        for task in early:
            device = next(d for d in DEVICES if fleet.times_done(d, task))
            assert fleet.times_done(device, task) == 1
        (release,) = {r.number for r in fleet.registry.releases()}
        fleet.check_installed(release)


def _freeze_while_closing(fleet):
    """Stop the coordinator between a round's last answer and its closing.

    It takes the coordinator some milliseconds; where it was faster, the next round will do.
    """
    coordinator = fleet[COORDINATOR]

    def complete():
        found = fleet.open_tasks()
        return found and set(found[1].values()) == {TaskState.ANSWERED} and found

    while True:
        found = fleet.wait("a round with all answers", complete, every=NOW_S)
        coordinator.freeze()
        if fleet.open_tasks() == found:
            return found
        coordinator.thaw()


def test_an_agent_killed_while_it_trains_fetches_or_installs_always_has_a_model(tmp_path):
    training = {"rounds": 1, "calibration_passes": 0}
    slow = {"hidden": 16384, "samples": {"d1": 1200}, "deltas": False}
    with Fleet(tmp_path, starts=2, **slow, **training) as fleet:
        fleet.start_agents()
        fleet.start_coordinator()
        fleet.finish()
        fleet.check_installed(1)
        before = {device: fleet.slots(device).active() for device in DEVICES}

        fleet.configure(rounds=2, epochs=4)
        fleet.start_coordinator()
        task = _kill_while_training(fleet, "d1")
        half = {TaskState.ANSWERED: 2, TaskState.OPEN: 1}
        fleet.wait("the others' answers", lambda: fleet.open_counts() == (2, half))
        fleet["d2"].freeze()  # they get the release later
        fleet["d3"].freeze()
        fleet.start_agents("d1")
        assert fleet.predict("d1") == 1
        fleet.wait("its answer", lambda: task in fleet.answered("d1"), every=NOW_S)

        sha256 = _released(fleet, 2, "d1")
        part = fleet.device_state("d1") / "parts" / f"{sha256}.part"
        fleet.wait("part of the model", part.exists, every=NOW_S)
        fleet["d1"].freeze()
        assert part.exists()
        fleet["d1"].kill()
        assert fleet.predict("d1") == 1
        fleet.start_agents("d1")
        _kill_while_installing(fleet, ("d1", "d2", "d3"))

        fleet.finish()
        fleet.check_rounds()
        fleet.check_installed(2)
        for device in DEVICES:
            slots = fleet.slots(device)
            old = slots.fallback(slots.active())
            assert (old.release, old.manifest) == (1, before[device].manifest)
        assert fleet.predict("d1") == 2


def _kill_while_training(fleet, device):
    """Kill an agent that has begun to train; returns the task, which has no answer."""
    task = fleet.wait("a task", lambda: fleet.task_of(device)).task
    inbox = fleet.device_state(device) / "tasks"
    fleet.wait("its acceptance", lambda: any(inbox.iterdir()))
    begun = fleet[device].cpu_s()
    fleet.wait("training", lambda: fleet[device].cpu_s() > begun + 0.2)
    fleet[device].freeze()
    assert task not in fleet.answered(device)
    fleet[device].kill()
    assert [p.stem for p in inbox.glob("*.json")] == [task]
    return task


def _released(fleet, release, device):
    """SHA-256 of the model that a release has for a device, once it is out."""

    def look():
        wanted = (release, DEVICES[device])
        return [r.sha256 for r in fleet.registry.releases() if (r.number, r.device_class) == wanted]

    return fleet.wait(f"release {release}", look)[0]


def _kill_while_installing(fleet, devices):
    """Kill an agent that has the new model in its idle slot and the old one active.

    Trying a model takes some milliseconds; where an agent was faster, the next one will do.
    """
    for device in devices:
        agent, slots = fleet[device], fleet.slots(device)
        agent.thaw()
        idle = slots.folder / ("b" if slots.active().slot == "a" else "a")
        staged = idle / "model.onnx"
        fleet.wait("a staged model", staged.exists, every=NOW_S)
        agent.freeze()
        if slots.active().release == 1:
            agent.kill()
            fleet.start_agents(device)
            assert fleet.predict(device) in {1, 2}
            fleet.wait("release 2", lambda slots=slots: slots.active().release == 2)
            break
        agent.thaw()
    else:
        pytest.fail("no agent was caught while it installed")
    for device in devices:
        fleet[device].thaw()


def test_a_round_survives_its_broker_and_a_stop_and_ends_without_a_silent_device(tmp_path):
    timeout_s = 6.0
    with Fleet(tmp_path, starts=2, rounds=4, round_timeout_s=timeout_s) as fleet:
        fleet.start_agents()
        coordinator = fleet.start_coordinator()
        fleet.wait("three devices", lambda: len(fleet.events("enrolled")) == 3)
        d3 = fleet["d3"]
        d3.freeze()

        # The broker is killed in mid-round, with all that it held.
        half = {TaskState.ANSWERED: 2, TaskState.OPEN: 1}
        fleet.wait("two answers", lambda: fleet.open_counts() == (1, half))
        fleet.broker.kill()
        d3.thaw()
        fleet.broker.start()
        fleet.wait("the end of the round", lambda: fleet.events("round"))

        # A device is silent for a whole round; the broker would take a minute to notice.
        d3.freeze()
        fleet.wait("two answers", lambda: fleet.open_counts()[1] == half)
        opened = fleet.open_tasks()
        assert coordinator.end(within=timeout_s - 1) == 0
        assert fleet.open_tasks() == opened
        coordinator = fleet.start_coordinator()
        (away,) = fleet.wait("a round without it", lambda: fleet.rounds_of("d3", TaskState.LATE))
        d3.thaw()
        answered = fleet.wait("a round with it", lambda: _after(fleet, "d3", away))
        # The rounds that are left take less time than the device's start: nobody is to miss it.
        coordinator.freeze()
        d3.kill()
        connections = fleet.connections("d3")
        fleet.start_agents("d3")
        fleet.wait("its return", lambda: fleet.connections("d3") > connections)
        coordinator.thaw()

        fleet.finish()
        (closed,) = [e for e in fleet.events("round") if e["round"] == away[1]]
        assert closed["answers"] == 2
        assert closed["seconds"] >= timeout_s - 0.1
        assert answered
        fleet.check_rounds(silent={(*r, "d3") for r in fleet.rounds_of("d3", TaskState.LATE)})
        fleet.check_installed(1)


def _after(fleet, device, away):
    """Rounds later than `away` that a device has answered."""
    return [r for r in fleet.rounds_of(device, TaskState.ANSWERED) if r[1] > away[1]]
