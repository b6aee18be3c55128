import pytest

from fleetprune import topics
from fleetprune.topics import Topics

FLEET = Topics("north")


def test_golden_topics():
    assert FLEET.release == "fleetprune/north/release"
    assert FLEET.coordinator == "fleetprune/north/coordinator"
    assert FLEET.up("d1", "ack") == "fleetprune/north/up/d1/ack"
    assert FLEET.down("d1", "task") == "fleetprune/north/down/d1/task"
    assert FLEET.up("+", "put") == "fleetprune/north/up/+/put"
    assert FLEET.shared_requests == "$share/blocks/fleetprune/north/up/+/get"
    assert FLEET.parse_blocks("fleetprune/north/blocks/s1") == "s1"
    assert FLEET.parse_blocks("fleetprune/south/blocks/s1") is None


def test_every_topic_is_documented():
    assert topics.__doc__ is not None
    documented = {line.split()[0] for line in topics.__doc__.splitlines() if "{fleet}" in line[:24]}
    plain = Topics("{fleet}")
    ups = ("enrol", "status", "ack", "telemetry", "get", "put", "renew")
    downs = ("enrolled", "task", "block", "stored", "certificate")
    assert documented == {
        plain.release,
        plain.coordinator,
        plain.blocks("{server}"),
        *(plain.up("{device}", kind) for kind in ups),
        *(plain.down("{device}", kind) for kind in downs),
    }


def test_what_a_device_writes_is_parsed():
    assert FLEET.parse_up(FLEET.up("d1", "telemetry")) == ("d1", "telemetry")


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "fleetprune/north/release",
        "fleetprune/south/up/d1/ack",
        "other/north/up/d1/ack",
        "fleetprune/north/down/d1/task",
        "fleetprune/north/up/d1",
        "fleetprune/north/up/d1/ack/more",
    ],
)
def test_any_other_topic_is_not(topic):
    assert FLEET.parse_up(topic) is None
