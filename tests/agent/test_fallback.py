import random
import threading
from pathlib import Path

import pytest

from fleetprune.blocks import NotFoundError
from fleetprune.errors import TransportError, TrustError
from fleetprune_agent.fallback import AVOID, FallbackSource, Road


class Source:
    """Gives its name, or fails as it is told to; counts how often it was asked."""

    def __init__(self, name):
        self.name, self.error, self.asked = name, None, 0

    def read(self, name, max_bytes):
        self.asked += 1
        if self.error is not None:
            raise self.error
        return self.name.encode()

    def pull(self, name, size, sha256, into):
        into.write_bytes(self.read(name, size))


class Fixture:
    def __init__(self):
        self.now, self.abort = 0.0, threading.Event()
        self.mqtt, self.https = Source("mqtt"), Source("https")
        self.closed = ""
        roads = [Road("MQTT", self.mqtt, lambda: self.closed), Road("HTTPS", self.https)]
        self.source = FallbackSource(roads, lambda: self.now, random.Random(1), self.abort)

    def read(self):
        return self.source.read("metadata/timestamp.json", 10).decode()


@pytest.fixture
def fixture():
    return Fixture()


def test_the_first_road_is_used_while_it_leads_there(fixture, tmp_path):
    assert fixture.read() == "mqtt"
    fixture.source.pull("targets/x", 4, "", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"mqtt"
    assert fixture.https.asked == 0


def test_a_road_that_failed_is_avoided_for_a_while(fixture):
    fixture.mqtt.error = TransportError("no answer for 120 s")
    assert [fixture.read() for _ in range(5)] == ["https"] * 5
    assert fixture.mqtt.asked == 1  # not once per file
    fixture.now += AVOID.first_s
    fixture.mqtt.error = None
    assert fixture.read() == "mqtt"


def test_the_longer_it_fails_the_longer_it_is_avoided(fixture):
    fixture.mqtt.error = TransportError("no answer")
    waits = []
    for _ in range(8):
        fixture.read()
        road = fixture.source._roads[0]
        waits.append(road.avoid_until - fixture.now)
        fixture.now = road.avoid_until
    assert all(15 * 2**i <= w <= min(1800, 30 * 2**i) for i, w in enumerate(waits[:6]))
    assert all(900 <= w <= 1800 for w in waits[6:])


def test_an_avoided_road_is_better_than_none(fixture):
    fixture.mqtt.error = TransportError("no answer")
    fixture.read()
    fixture.https.error = TransportError("answers 503")
    fixture.mqtt.error = None
    assert fixture.read() == "mqtt"
    assert fixture.read() == "mqtt"
    assert fixture.https.asked == 2


def test_when_no_road_leads_there_it_says_why_of_each(fixture):
    fixture.closed = "broker b:1883 is unreachable: connection refused; is it running?"
    fixture.https.error = TransportError("release server h:443 answers 503")
    with pytest.raises(TransportError) as e:
        fixture.read()
    assert str(e.value) == (
        "MQTT: broker b:1883 is unreachable: connection refused; is it running?; "
        "HTTPS: release server h:443 answers 503"
    )
    assert fixture.mqtt.asked == 0


def test_one_request_per_road_and_question_however_long_all_fail(fixture):
    fixture.mqtt.error = fixture.https.error = TransportError("answers 503")
    for i in range(1, 11):
        with pytest.raises(TransportError):
            fixture.read()
        assert (fixture.mqtt.asked, fixture.https.asked) == (i, i)


def test_not_found_is_an_answer(fixture):
    fixture.mqtt.error = NotFoundError("the coordinator has no metadata/2.root.json")
    with pytest.raises(NotFoundError):
        fixture.read()
    assert fixture.https.asked == 0


def test_lies_of_one_road_do_not_keep_a_release_away(fixture, tmp_path):
    fixture.mqtt.error = TrustError("x has SHA-256 00, expected 11")
    fixture.source.pull("targets/x", 5, "", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"https"
    fixture.https.error = TransportError("answers 503")
    fixture.now += 1e6
    with pytest.raises(TrustError, match=r"^x has SHA-256 00, expected 11$"):
        fixture.source.pull("targets/x", 5, "", tmp_path / "x")


def test_an_agent_that_stops_takes_no_other_road(fixture):
    fixture.mqtt.error = TransportError("transfer of x was stopped")
    fixture.abort.set()
    with pytest.raises(TransportError, match=r"^transfer of x was stopped$"):
        fixture.source.pull("x", 1, "", Path("x"))
    assert fixture.https.asked == 0
