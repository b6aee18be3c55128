import json

import pytest
from pydantic import ValidationError

from fleetprune import messages
from fleetprune.errors import MessageError
from fleetprune.manifest import Manifest
from fleetprune.messages import (
    MAX_MESSAGE,
    Announcement,
    Blob,
    Certificate,
    Codec,
    Enrol,
    Enrolled,
    GraphRef,
    Join,
    Joined,
    Message,
    Progress,
    Renew,
    ResultHeader,
    Task,
    TaskAck,
    TaskKind,
    Telemetry,
)
from fleetprune.model_payload import ModelHeader
from fleetprune.rollout import Rollout

HASH = "0123456789abcdef" * 4
EXAMPLES: list[Message] = [
    Blob(sha256=HASH, size=5),
    Enrol(device="d1", device_class="phone", agent_version="0.1.0", trains=True, samples=10),
    Enrolled(accepted=False, reason="class 'phone' is unknown"),
    GraphRef(target="graphs/train.onnx", sha256=HASH),
    Task(
        task="t1",
        device="d1",
        kind=TaskKind.TRAIN,
        round=9,
        mask_version=3,
        shape="phone",
        graphs=(GraphRef(target="graphs/train.onnx", sha256=HASH),),
        portable=(GraphRef(target="graphs/portable.onnx", sha256=HASH),),
        model=Blob(sha256=HASH, size=5),
        learning_rate=0.1,
        top_k=0.25,
        codec=Codec.INT8,
    ),
    TaskAck(task="t1", device="d1", state=Progress.REFUSED, reason="no samples"),
    ResultHeader(
        task="t1",
        device="d1",
        kind=TaskKind.OBSERVE,
        round=9,
        mask_version=3,
        samples=32,
        loss=0.5,
        correct=16,
    ),
    Announcement(release=7),
    Renew(request="-----BEGIN CERTIFICATE REQUEST-----"),
    Certificate(certificate="-----BEGIN CERTIFICATE-----"),
    Join(token="0123456789ab.secret.d1", request="-----BEGIN CERTIFICATE REQUEST-----"),
    Joined(
        fleet="f1",
        device="d1",
        device_class="phone",
        certificate="-----BEGIN CERTIFICATE-----",
        ca="-----BEGIN CERTIFICATE-----",
        root="{}",
        broker_host="broker.example.org",
        broker_port=8883,
    ),
    Telemetry(device="d1", device_class="phone", release=7, sha256=HASH, accuracy=0.5),
    Manifest(
        release=7,
        device_class="phone",
        model="models/phone.onnx",
        sha256=HASH,
        size=5,
        golden="golden/phone.npz",
        labels=("cat", "dog"),
        input_shape=(3, 32, 32),
    ),
    Rollout(device_class="phone", serial=3, stable=6, candidate=7, share=500, canaries=("d1",)),
    ModelHeader(mask_version=3, round=9, codec=Codec.FP16, params=3, stats=2),
]
IDS = [type(m).__name__ for m in EXAMPLES]
each = pytest.mark.parametrize("message", EXAMPLES, ids=IDS)


def test_every_message_has_an_example():
    here = {c.__name__ for c in Message.__subclasses__() if c.__module__ == messages.__name__}
    assert here == set(IDS) - {"ModelHeader", "Manifest", "Rollout"}


@each
def test_roundtrip(message):
    assert type(message).from_bytes(message.to_bytes()) == message


def test_golden_bytes():
    assert Announcement(release=7).to_bytes() == b'{"schema":1,"release":7}'
    assert Blob(sha256=HASH, size=5).to_bytes() == (
        b'{"schema":1,"sha256":"' + HASH.encode() + b'","size":5}'
    )


@each
def test_unknown_fields_are_ignored(message):
    fields = json.loads(message.to_bytes()) | {"newer": {"a": [1]}}
    assert type(message).from_bytes(json.dumps(fields).encode()) == message


@each
def test_a_newer_schema_is_refused(message):
    fields = json.loads(message.to_bytes()) | {"schema": 2}
    with pytest.raises(MessageError) as e:
        type(message).from_bytes(json.dumps(fields).encode())
    assert str(e.value) == f"{type(message).__name__}: schema: Input should be 1"


@each
def test_truncated_at_every_byte(message):
    data = message.to_bytes()
    for end in range(len(data)):
        with pytest.raises(MessageError):
            type(message).from_bytes(data[:end])


@each
def test_every_single_bit_flip_is_read_or_refused(message):
    data = message.to_bytes()
    refused = 0
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            type(message).from_bytes(bytes(flipped))
        except MessageError as e:
            refused += 1
            assert "\n" not in str(e)
    assert refused > len(data)


@each
def test_messages_are_frozen(message):
    with pytest.raises(ValidationError):
        message.schema_ = 1


def test_too_long_is_refused_before_it_is_parsed():
    data = b'{"schema":1,"release":7}'
    padded = data + b" " * (MAX_MESSAGE - len(data))
    assert Announcement.from_bytes(padded).release == 7
    with pytest.raises(MessageError) as e:
        Announcement.from_bytes(padded + b" ")
    assert str(e.value) == "Announcement of 65537 bytes, expected at most 65536"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"release":-1}', "release: Input should be greater than or equal to 0"),
        (
            b'{"release":"x"}',
            "release: Input should be a valid integer, unable to parse string as an integer",
        ),
        (b"{}", "release: Field required"),
        (b"[]", "message: Input should be an object"),
        (b"", "message: Invalid JSON: EOF while parsing a value at line 1 column 0"),
        (b'{"release":NaN}', "release: Input should be a finite number"),
    ],
)
def test_malformed_messages_say_where(data, message):
    with pytest.raises(MessageError) as e:
        Announcement.from_bytes(data)
    assert str(e.value) == f"Announcement: {message}"


@pytest.mark.parametrize("data", [b"\xff", b'"\\ud800"', b"[" * 60_000, b'{"a":' * 10_000])
def test_hostile_json_raises_nothing_else(data):
    with pytest.raises(MessageError):
        Announcement.from_bytes(data)


@pytest.mark.parametrize(
    "name", ["", "-a", ".", "..", "a/b", "a+b", "a#", "a b", "a\n", "ä", "a" * 65, "$SYS"]
)
def test_names_are_safe_as_topic_levels_and_file_names(name):
    fields = {"task": name, "device": "d1", "state": "accepted"}
    with pytest.raises(MessageError, match=r"^TaskAck: task: String should match pattern"):
        TaskAck.from_bytes(json.dumps(fields).encode())


def test_texts_of_peers_are_one_harmless_line():
    hostile = "no\r\ndata\x1b[2J\u202e\u2028!"
    ack = TaskAck(task="t", device="d", state="refused", reason=hostile)
    assert TaskAck.from_bytes(ack.to_bytes()).reason == "no  data [2J  !"


@pytest.mark.parametrize(
    ("field", "most"),
    [("mask_version", 2**32 - 1), ("epochs", 2**32 - 1), ("deadline_s", 604800)],
)
def test_a_task_asks_for_what_can_be(field, most):
    fields = json.loads(EXAMPLES[IDS.index("Task")].to_bytes())
    assert Task.from_bytes(json.dumps({**fields, field: most}).encode())
    with pytest.raises(MessageError) as e:
        Task.from_bytes(json.dumps({**fields, field: most + 1}).encode())
    assert str(e.value) == f"Task: {field}: Input should be less than or equal to {most}"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_are_finite(number):
    data = EXAMPLES[IDS.index("ResultHeader")].to_bytes().replace(b"0.5", number.encode())
    with pytest.raises(
        MessageError, match=r"^ResultHeader: loss: Input should be a finite number$"
    ):
        ResultHeader.from_bytes(data)
