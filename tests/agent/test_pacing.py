import threading
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fleetprune_agent.pacing import Limit, PacingSettings, TokenBucket

DAY = datetime(2026, 3, 1)


def at(clock):
    hour, minute = map(int, clock.split(":"))
    return DAY.replace(hour=hour, minute=minute)


@pytest.mark.parametrize(
    ("hours", "clock", "quiet"),
    [
        ("22:00-06:00", "21:59", False),
        ("22:00-06:00", "22:00", True),
        ("22:00-06:00", "00:00", True),
        ("22:00-06:00", "05:59", True),
        ("22:00-06:00", "06:00", False),
        ("08:00-17:30", "07:59", False),
        ("08:00-17:30", "08:00", True),
        ("08:00-17:30", "17:29", True),
        ("08:00-17:30", "17:30", False),
    ],
)
def test_quiet_hours(hours, clock, quiet):
    reason = PacingSettings(quiet_hours=(hours,)).may_fetch(at(clock), 1)
    expected = f"quiet hours {hours}: it is {clock}, fetched from {hours[6:]} on"
    assert reason == (expected if quiet else "")


def test_each_of_several_quiet_hours_counts():
    pacing = PacingSettings(quiet_hours=("06:00-08:00", "18:00-20:00"))
    assert [bool(pacing.may_fetch(at(f"{h:02}:30"), 1)) for h in (5, 7, 12, 19, 20)] == [
        False, True, False, True, False
    ]  # fmt: skip


def test_a_metered_link_takes_what_is_small():
    pacing = PacingSettings(metered=True, metered_bytes=300_000)
    assert pacing.may_fetch(DAY, 300_000) == ""
    assert pacing.may_fetch(DAY, 300_001) == (
        "metered link: 300001 bytes, at most 300000 are fetched over it"
    )
    assert PacingSettings(metered=True).may_fetch(DAY, 1) != ""
    assert PacingSettings(metered_bytes=5).may_fetch(DAY, 10**9) == ""
    assert PacingSettings().may_fetch(DAY, 10**9) == ""


@pytest.mark.parametrize("hours", ["22-6", "24:00-06:00", "07:00-07:00", "7:00-08:00", ""])
def test_hours_that_are_none_are_refused(hours):
    with pytest.raises(ValidationError, match=r'expected two times of the day such as "22:00-06:'):
        PacingSettings(quiet_hours=(hours,))


def test_bucket_spends_first_and_waits_afterwards():
    bucket = TokenBucket(rate=100.0)
    assert bucket.wait_s(0.0) == 0
    bucket.spend(250, 0.0)
    assert bucket.wait_s(0.0) == 2.5
    assert bucket.wait_s(2.0) == 0.5
    bucket.spend(50, 2.0)
    assert bucket.wait_s(3.0) == 0
    assert bucket.wait_s(1000.0) == 0
    bucket.spend(100, 1000.0)  # what was not used is not saved up
    assert bucket.wait_s(1000.0) == 1
    assert bucket.wait_s(999.0) == 1  # a clock that jumps back costs nothing and gives nothing


@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 5)), min_size=1, max_size=50))
def test_the_mean_never_exceeds_the_rate_by_more_than_one_piece(pieces):
    bucket, now, spent = TokenBucket(rate=1000.0), 0.0, 0
    for size, pause in pieces:
        now += pause
        now += bucket.wait_s(now) * (1 + 1e-12) + 1e-9
        assert spent <= 1000.0 * now + max(s for s, _ in pieces) + 1e-3
        bucket.spend(size, now)
        spent += size


def test_a_limit_is_one_for_all_threads():
    now = [0.0]
    limit = Limit(1000, lambda: now[0])
    threads = [threading.Thread(target=lambda: limit.spend(500)) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert limit.wait_s() == 4.0
    now[0] = 4.0
    assert limit.wait_s() == 0.0


def test_the_window_narrows_where_the_limit_is_slow():
    def windows(rate):
        return Limit(rate, lambda: 0.0).window(8, 65536)

    assert [windows(r) for r in (1024, 65535, 65536, 131072, 10**9, None)] == [1, 1, 2, 4, 8, 8]
    assert Limit(None, lambda: 0.0).wait_s() == 0
