import math

import numpy as np
import pytest

from fleetprune_sim.clock import Clock, Work, close_round
from fleetprune_sim.settings import DeviceProfile

STEADY = {
    "macs_per_s": 100.0,
    "up_bytes_per_s": 10.0,
    "down_bytes_per_s": 20.0,
    "latency_s": 0.5,
    "jitter": 0.0,
    "compute_w": 2.0,
    "radio_w": 1.0,
}


def clock(seed=0, **profile) -> Clock:
    return Clock({"a": DeviceProfile(**{**STEADY, **profile})}, seed)


def test_a_task_takes_its_computing_its_bytes_and_three_latencies():
    timing = clock().timing("a", 1, 1, 0, Work(macs=300, up_bytes=50, down_bytes=40))
    # 300/100 computing, 50/10 up, 40/20 down, 3 * 0.5 latency
    assert timing.seconds == pytest.approx(3 + 5 + 2 + 1.5)
    # 2 W while computing, 1 W while sending and receiving
    assert timing.energy_j == pytest.approx(2 * 3 + 1 * (5 + 2))


def test_a_silent_device_never_answers_and_has_spent_what_it_computed():
    timing = clock(drop_out=1.0).timing("a", 1, 1, 0, Work(300, 50, 40))
    assert timing.seconds == math.inf
    assert timing.energy_j == pytest.approx(2 * 3 + 1 * 2)


def test_draws_depend_on_seed_round_step_and_device_alone():
    work = Work(300, 50, 40)
    one = clock(jitter=0.3)
    first = one.timing("a", 5, 3, 0, work)
    for other in (4, 6, 7):
        one.timing("a", other, 3, 0, work)
    assert one.timing("a", 5, 3, 0, work) == first == clock(jitter=0.3).timing("a", 5, 3, 0, work)
    others = {
        clock(seed=1, jitter=0.3).timing("a", 5, 3, 0, work).seconds,
        one.timing("a", 6, 3, 0, work).seconds,
        one.timing("a", 5, 4, 0, work).seconds,
        one.timing("a", 5, 3, 1, work).seconds,
        first.seconds,
    }
    assert len(others) == 5


def test_jitter_is_lognormal():
    seconds = [
        clock(jitter=0.5, latency_s=0.0).timing("a", device, 1, 0, Work(100, 0, 0)).seconds
        for device in range(2000)
    ]
    assert np.mean(np.log(seconds)) == pytest.approx(0.0, abs=0.05)
    assert np.std(np.log(seconds)) == pytest.approx(0.5, abs=0.05)


def test_availability_and_drop_out_are_shares():
    away = clock(available=0.25, drop_out=0.1)
    online = [away.online("a", device, 1) for device in range(4000)]
    assert np.mean(online) == pytest.approx(0.25, abs=0.03)
    silent = [away.timing("a", d, 1, 0, Work(1, 1, 1)).seconds == math.inf for d in range(4000)]
    assert np.mean(silent) == pytest.approx(0.1, abs=0.02)
    assert all(clock().online("a", device, 1) for device in range(100))


@pytest.mark.parametrize(
    ("seconds", "timeout", "quorum", "end", "in_time"),
    [
        ([3.0, 1.0, 2.0], 10.0, 1.0, 3.0, (True, True, True)),
        ([3.0, 1.0, 2.0], 2.5, 1.0, 2.5, (False, True, True)),
        ([3.0, 1.0, 2.0], 10.0, 0.5, 2.0, (False, True, True)),
        ([3.0, math.inf, 2.0], 10.0, 1.0, 10.0, (True, False, True)),
        ([3.0, math.inf, 2.0], 10.0, 0.6, 3.0, (True, False, True)),
        ([2.0, 2.0, 2.0, 2.0], 10.0, 0.5, 2.0, (True, True, False, False)),
        ([], 10.0, 1.0, 0.0, ()),
    ],
)
def test_a_round_ends_as_the_coordinator_ends_it(seconds, timeout, quorum, end, in_time):
    closing = close_round(seconds, timeout, quorum)
    assert (closing.seconds, closing.in_time) == (end, in_time)
