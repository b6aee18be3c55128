import hashlib
import json

import pytest

from fleetprune.errors import MessageError
from fleetprune.rollout import WHOLE, Rollout, cohort

DEVICES = [f"device-{i}" for i in range(20_000)]
SALT = "00112233aabbccdd"


def plan(**fields):
    return Rollout(device_class="phone", serial=1, salt=SALT, **fields)


def test_a_cohort_by_hand():
    digest = hashlib.sha256(b"00112233aabbccdd/d1").digest()
    assert cohort("d1", SALT) == int(int.from_bytes(digest[:8], "big") / 2**64 * 10_000)


def test_a_share_is_that_share_of_the_devices():
    rollout = plan(candidate=2, share=500)
    share = sum(map(rollout.includes, DEVICES)) / len(DEVICES)
    assert abs(share - 0.05) < 4 * (0.05 * 0.95 / len(DEVICES)) ** 0.5


def test_the_next_stage_has_all_devices_of_the_one_before():
    small, large = plan(candidate=2, share=500), plan(candidate=2, share=2500)
    assert all(large.includes(d) for d in DEVICES if small.includes(d))


def test_another_salt_is_another_cohort():
    both = [d for d in DEVICES if cohort(d, SALT) < 500 and cohort(d, "f" * 16) < 500]
    assert len(both) < 0.005 * len(DEVICES), "a twentieth of a twentieth is a four-hundredth"


def test_whole_is_everybody_and_nothing_is_nobody():
    assert all(map(plan(candidate=2, share=WHOLE).includes, DEVICES))
    assert not any(map(plan(candidate=2, share=0).includes, DEVICES))


def test_canaries_come_first():
    assert plan(candidate=2, canaries=("d1",)).includes("d1")


@pytest.mark.parametrize(
    ("fields", "installed", "wanted"),
    [
        ({"stable": 1, "candidate": 2, "canaries": ("d",)}, 1, 2),
        ({"stable": 1, "candidate": 2}, 1, 1),
        ({"stable": 1, "candidate": 2}, 2, 1),  # aborted: back
        ({"stable": 1}, 3, 1),  # an authorised return to an older model
        ({"candidate": 2}, 0, 0),  # a first release that has not come to this device yet
        ({"candidate": 2}, 1, 1),
        ({"stable": 1, "candidate": 2, "canaries": ("d",), "paused": True}, 1, 1),
        ({"stable": 1, "paused": True}, 0, 1),
        ({}, 4, 4),
    ],
)
def test_what_a_device_wants(fields, installed, wanted):
    assert plan(**fields).wanted("d", installed) == wanted


@pytest.mark.parametrize(
    "fields",
    [
        {"serial": 0},
        {"share": WHOLE + 1},
        {"share": -1},
        {"salt": "xyz"},
        {"canaries": ("../d",)},
        {"canaries": tuple(f"d{i}" for i in range(65))},
        {"candidate": 2**32},
    ],
)
def test_nonsense_is_refused(fields):
    with pytest.raises(MessageError, match=next(iter(fields))):
        Rollout.from_bytes(json.dumps({"device_class": "phone", "serial": 1, **fields}).encode())
