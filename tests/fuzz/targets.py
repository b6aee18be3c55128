"""What is fuzzed: each parser of bytes from outside, behind one function of bytes.

A target returns or raises an error of its family; anything else is a bug. Where a format ends in a
checksum, the target makes it right, or a fuzzer would never get behind it. A target that needs a
parameter which the caller knows (a length, a codec) takes it from the first byte.
"""

import copy
import json
import lzma
import struct
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from securesystemslib.formats import encode_canonical
from tuf.api.metadata import Root

from fleetprune import manifest, messages, rollout
from fleetprune.blocks import Block, NotFound, Put, Request, Stored, StoreState, decode
from fleetprune.deflate import deflate
from fleetprune.delta import HEAD, LZMA, MAGIC, VERSION, apply
from fleetprune.errors import (
    GraphError,
    HostileInputError,
    TransportError,
    TrustError,
)
from fleetprune.frame import decode_frame, encode_frame
from fleetprune.graphmeta import check_outputs, parse_graph_meta, reference_feeds
from fleetprune.manifest import Manifest
from fleetprune.messages import Codec, Message, ResultHeader, TaskKind
from fleetprune.model_payload import ModelHeader, decode_model, encode_model
from fleetprune.outbox import Kind, Outbox
from fleetprune.partfile import PartFile
from fleetprune.positions import decode_positions, encode_positions
from fleetprune.result import decode_result, encode_result
from fleetprune.update import SparseUpdate, decode_update
from fleetprune.values import decode_values, encode_values
from fleetprune_agent import slot_files
from fleetprune_agent.feedback import Memory, decode_memory, encode_memory
from fleetprune_agent.golden import load_golden
from fleetprune_agent.journal import Journal
from fleetprune_agent.starts import Starts
from fleetprune_agent.trial import Finding
from fleetprune_agent.trust import TrustedRepository

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "agent"))  # their examples
sys.path.append(str(Path(__file__).parents[1] / "shared"))

from delta_examples import BASE, DELTA, TARGET
from models import INPUTS, golden, npz
from repositories import Clock, MemoryRepository
from road_targets import road_targets
from target import Target, chosen, scratch

SUPPORT = 600  # values on the mask's support, and parameters of the model
CODECS = tuple(Codec)


def sealed(data: bytes) -> bytes:
    """With the CRC-32 that frames, updates and block messages end in."""
    return data + struct.pack("<I", zlib.crc32(data))


HOSTILE: tuple[object, ...] = (
    None, True, 0, 1, -1, 2, 255, 2**31, 2**32, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, 1e-308,
    float("nan"), float("inf"), "", "a", "x" * 65, "x" * 2000, "../../etc/passwd", "/etc/passwd",
    "a\x00b", "\x1b[2J", "\ud800", "0" * 64, "2026-13-01T00:00:00Z", "1970-01-01T00:00:00Z",
    "9999-12-31T23:59:59Z", "releases/phone/1/model.onnx", "ed25519", "root", "snapshot.json",
    [], {}, [[]], [{}], {"": {}}, {"a": 1}, [0] * 300, {"keyids": [], "threshold": 1},
    {"version": 1}, {"length": -1, "hashes": {}}, {"length": 1, "hashes": {"sha256": "0"}},
)  # fmt: skip


def edited(tree: object, data: bytes) -> object:
    """`tree` with one node replaced, removed or moved per two bytes of `data`."""
    for where, what in zip(data[0::2][:8], data[1::2][:8], strict=False):
        nodes = [(tree, key) for tree, key in _nodes(tree)]
        if not nodes:
            break
        parent, key = nodes[where % len(nodes)]
        action = what % (len(HOSTILE) + 2)
        if action < len(HOSTILE):
            parent[key] = copy.deepcopy(HOSTILE[action])
        elif action == len(HOSTILE):
            del parent[key]
        else:
            other, its = nodes[(where + 1) % len(nodes)]
            parent[key] = copy.deepcopy(other[its])
    return tree


def _nodes(tree: object) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON tree, in order."""
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, child in list(items):
        yield tree, key
        yield from _nodes(child)


def frame(data: bytes) -> None:
    decode_frame(sealed(data), "TEST", max_bytes=1 << 16)


def values(data: bytes) -> None:
    (codec, n), rest = chosen(data, tuple((c, n) for c in CODECS for n in (0, 1, 63, 130)))
    got = decode_values(rest, n, codec)
    assert got.shape == (n,) and np.isfinite(got).all()


def positions(data: bytes) -> None:
    (n, k), rest = chosen(data, ((600, 31), (600, 300), (600, 590), (9, 4), (5, 5), (0, 0)))
    got = decode_positions(rest, n, k)
    assert got.shape == (k,) and (np.diff(got) > 0).all()


def update(data: bytes) -> None:
    got = decode_update(sealed(data), mask_version=1, size=SUPPORT)
    assert got.dense().shape == (SUPPORT,)


def model(data: bytes) -> None:
    got = decode_model(sealed(data), parameters=SUPPORT, statistics=9)
    assert got.params.shape == (SUPPORT,) and np.isfinite(got.params).all()


def result(data: bytes) -> None:
    """As the coordinator reads an answer: the frame, and the update in it."""
    got = decode_result(sealed(data))
    if got.update is not None:
        decode_update(got.update, mask_version=got.header.mask_version, size=SUPPORT)


def block(data: bytes) -> None:
    """The length is made right too: it is checked before everything else."""
    if len(data) >= 8:
        data = data[:4] + struct.pack("<I", len(data) + 4) + data[8:]
    message = decode(sealed(data))
    assert decode(message.encode()) == message


MESSAGES: tuple[type[Message], ...] = tuple(
    sorted(
        {
            kind
            for module in (messages, manifest, rollout)
            for kind in vars(module).values()
            if isinstance(kind, type) and issubclass(kind, Message) and kind is not Message
        }
        | {ModelHeader, slot_files.Record, slot_files.Pointer, slot_files.Staging}
        | {slot_files.Rejected, slot_files.Refusal, Journal, Starts, Finding},
        key=lambda kind: kind.__name__,
    )
)


def message(data: bytes) -> None:
    kind, rest = chosen(data, MESSAGES)
    got = kind.from_bytes(rest)
    assert kind.from_bytes(got.to_bytes()) == got


def message_edited(data: bytes) -> None:
    """A valid message with some of its values replaced: gets behind the JSON parser."""
    kind, rest = chosen(data, MESSAGES)
    tree = json.loads(_message_seeds()[MESSAGES.index(kind)][1:])
    got = kind.from_bytes(json.dumps(edited(tree, rest)).encode())
    assert kind.from_bytes(got.to_bytes()) == got


def graph_meta_edited(data: bytes) -> None:
    seed, rest = chosen(data, _graph_meta_seeds())
    graph_meta(json.dumps(edited(json.loads(seed), rest)).encode())


def graph_meta(data: bytes) -> None:
    """A graph's own description, as a device acts upon it before it runs the graph."""
    meta = parse_graph_meta(data.decode(errors="replace"))
    if meta.verification.elements > 1 << 16:
        return  # bounded, but not by what a fuzzer has time for
    feeds = reference_feeds(meta)
    check_outputs(meta, {name: feed for name, feed in feeds.items() if feed.size})


def memory(data: bytes) -> None:
    decode_memory(sealed(data))


def delta(data: bytes) -> None:
    """Whatever it is applied to, it makes what it says, or nothing."""
    made = apply(BASE, data, max_bytes=1 << 16)
    assert len(made) <= 1 << 16


def delta_inside(data: bytes) -> None:
    """What stands in the four streams of a delta, which are packed here."""
    if len(data) < 6:
        return
    count, size = data[0], data[1]
    cuts = [0, data[2], data[2] + data[3], data[2] + data[3] + data[4]]
    body = data[5:]
    table, rest, about, steps = (
        body[at:end] for at, end in zip(cuts, [*cuts[1:], len(body)], strict=True)
    )
    packed = [deflate(part, match=True) for part in (table, about)]
    packed.insert(1, deflate(rest, match=True, dictionary=_REST_OF_BASE))
    packed.append(lzma.compress(steps, lzma.FORMAT_RAW, filters=[LZMA]))
    digests = sha256(BASE).digest(), sha256(TARGET).digest()
    head = HEAD.pack(MAGIC, VERSION, count, len(BASE), size, *digests, *map(len, packed))
    apply(BASE, head + b"".join(packed), max_bytes=1 << 16)


_REST_OF_BASE = b"<>"  # what is left of the base without the weight of the seed


def _delta_seed() -> bytes:
    """`DELTA`, unpacked."""
    lengths = HEAD.unpack_from(DELTA)[-4:]
    at, streams = HEAD.size, []
    for length in lengths:
        streams.append(DELTA[at : at + length])
        at += length
    table, about = zlib.decompressobj(-15), zlib.decompressobj(-15)
    rest = zlib.decompressobj(-15, zdict=_REST_OF_BASE)
    parts = [table.decompress(streams[0]), rest.decompress(streams[1])]
    parts.append(about.decompress(streams[2]))
    steps = lzma.decompress(streams[3], lzma.FORMAT_RAW, filters=[LZMA])
    sizes = bytes(map(len, parts))
    return bytes([1, len(TARGET)]) + sizes + b"".join(parts) + steps


def outbox(data: bytes) -> None:
    folder = scratch() / "outbox"
    folder.mkdir(exist_ok=True)
    (folder / "000000000000.entry").write_bytes(_sealed_entry(data))
    list(Outbox(folder, 1 << 16).pending())
    for left in folder.iterdir():
        left.unlink()


def _sealed_entry(data: bytes) -> bytes:
    """Magic, lengths and the right CRC before kind, name and payload."""
    if len(data) < 3:
        return data
    return b"FPO1" + data[:3] + struct.pack("<I", zlib.crc32(data[3:])) + data[3:]


def part_map(data: bytes) -> None:
    """A map that disk or attacker wrote, beside 3 blocks; what it claims must match the data."""
    path, whole = scratch() / "part", bytes(range(250))
    path.write_bytes(whole)
    path.with_name("part.map").write_bytes(data)
    with PartFile(path, len(whole), bytes(32), 100) as part:
        for index in part.have:
            assert zlib.crc32(whole[100 * index : 100 * index + 100])
    path.unlink()


def golden_samples(data: bytes) -> None:
    path = scratch() / "golden.npz"
    path.write_bytes(data)
    x, y = load_golden(path, _manifest())
    assert x.dtype == y.dtype == np.float32 and len(x) == len(y)


@cache
def _manifest() -> Manifest:
    return Manifest(
        release=1,
        device_class="phone",
        model="releases/phone/1/model.onnx",
        sha256="0" * 64,
        size=1,
        golden="releases/phone/1/golden.npz",
        input_shape=(INPUTS,),
    )


ROLES = ("timestamp", "snapshot", "targets", "root", "rollouts", "graphs")


@cache
def _repository() -> MemoryRepository:
    repository = MemoryRepository()
    repository.release(1)
    return repository


def _served(role: str) -> str:
    repository = _repository()
    versions = {
        "timestamp": "metadata/timestamp.json",
        "snapshot": f"metadata/{repository.snapshot.version}.snapshot.json",
        "targets": f"metadata/{repository.targets.version}.targets.json",
        "root": "metadata/2.root.json",
        "rollouts": f"metadata/{repository.delegated['rollouts'].version}.rollouts.json",
        "graphs": f"metadata/{repository.delegated['graphs'].version}.graphs.json",
    }
    return versions[role]


def _look(overrides: dict[str, bytes]) -> None:
    """All that a device asks the repository, with some of its files replaced."""
    repository = _repository()
    repository.overrides = overrides
    folder = scratch() / "trust"
    for left in folder.rglob("*") if folder.is_dir() else ():
        if not left.is_dir():
            left.unlink()
    trusted = TrustedRepository(folder, repository.bootstrap, repository, Clock())
    trusted.refresh()
    trusted.describe("releases/phone/1/model.onnx")
    told = trusted.rollout("phone")
    trusted.manifest("phone", told.wanted("d1", 0) if told is not None else 1)
    with suppress(TrustError):  # there is none
        trusted.describe("graphs/a.onnx")


def document(data: bytes) -> None:
    """A rollout, or a manifest, that is validly signed and says anything."""
    repository = _repository()
    path, rest = chosen(data, (rollout.rollout_path("phone"), manifest.manifest_path("phone", 1)))
    kept = {role: dict(targets.targets) for role, targets in repository.content().items()}
    blobs = dict(repository.blobs)
    try:
        repository.add(path, rest)
        _look({})
    finally:
        repository.blobs = blobs
        for role, targets in repository.content().items():
            targets.targets = kept[role]


def tuf_unsigned(data: bytes) -> None:
    """Any bytes in the place of one role's metadata."""
    role, rest = chosen(data, ROLES)
    _look({_served(role): rest})


def tuf_signed(data: bytes) -> None:
    """Whatever a stolen key may sign: the bytes are the `signed` part of one role's metadata."""
    role, rest = chosen(data, ROLES)
    signed = _resigned(role, rest)
    _look({_served(role): rest if signed is None else signed})


def tuf_edited(data: bytes) -> None:
    """A stolen key again: valid metadata with some of its values replaced, validly signed."""
    role, rest = chosen(data, ROLES)
    seed = json.loads(_signed_seeds()[ROLES.index(role)][1:])
    signed = _resigned(role, json.dumps(edited(seed, rest)).encode())
    if signed is not None:
        _look({_served(role): signed})


def _resigned(role: str, data: bytes) -> bytes | None:
    """`data` as validly signed metadata of `role`; None where it is no JSON."""
    try:
        content = json.loads(data)
        canonical = encode_canonical(content).encode()
    except Exception:
        return None
    signature = _repository().signers[role].sign(canonical)
    envelope = {
        "signatures": [{"keyid": signature.keyid, "sig": signature.signature}],
        "signed": content,
    }
    return json.dumps(envelope).encode()


def _metadata_seeds() -> tuple[bytes, ...]:
    repository = _repository()
    newer = Root.from_dict(repository.root.to_dict())
    newer.version = 2
    payloads = (repository.timestamp, repository.snapshot, repository.targets, newer)
    payloads += tuple(repository.delegated[role] for role in ROLES[4:])
    return tuple(
        bytes([i]) + repository.signed(payload, ROLES[i]) for i, payload in enumerate(payloads)
    )


def _documents() -> tuple[bytes, ...]:
    repository = _repository()
    paths = (rollout.rollout_path("phone"), manifest.manifest_path("phone", 1))
    targets = {p: t for role in repository.content().values() for p, t in role.targets.items()}
    blobs = (f"targets/{_blob_name(path, targets[path])}" for path in paths)
    return tuple(bytes([i]) + repository.blobs[blob] for i, blob in enumerate(blobs))


def _blob_name(path: str, target: Any) -> str:
    folder, _, name = path.rpartition("/")
    return f"{folder}/{target.hashes['sha256']}.{name}"


@cache
def _signed_seeds() -> tuple[bytes, ...]:
    return tuple(
        seed[:1] + json.dumps(json.loads(seed[1:])["signed"]).encode() for seed in _metadata_seeds()
    )


def _wire_seeds() -> dict[str, tuple[bytes, ...]]:
    rng = np.random.default_rng(0)
    vector = rng.normal(size=SUPPORT).astype(np.float32)
    header = ResultHeader(
        task="t", device="d", kind=TaskKind.TRAIN, round=1, mask_version=1, samples=1
    )
    sizes = tuple((c, n) for c in CODECS for n in (0, 1, 63, 130))
    some = tuple(np.flatnonzero(rng.random(600) < share) for share in (0.05, 0.5, 0.98))
    full = SparseUpdate(1, SUPPORT, np.zeros(SUPPORT, np.float32), None).encode(Codec.INT8)
    codecs = (Codec.INT4, Codec.FP16)
    updates = [
        full,
        *(SparseUpdate(1, SUPPORT, vector[at], at).encode(c) for at in some for c in codecs),
    ]
    pruned = vector > 0
    exact = (np.arange(31) * 19, np.arange(300) * 2, np.arange(590))
    return {
        "frame": (encode_frame("TEST", b"{}", {"a": b"z", "b": b"xy"})[:-4],),
        "values": tuple(
            bytes([i]) + encode_values(vector[:n], codec, rng) for i, (codec, n) in enumerate(sizes)
        ),
        "positions": tuple(bytes([i]) + encode_positions(at, 600) for i, at in enumerate(exact)),
        "update": tuple(data[:-4] for data in updates),
        "model": tuple(
            encode_model(
                1, 1, vector * (mask if mask is not None else 1), vector[:9], codec, support=mask
            )[:-4]
            for codec in (Codec.INT4, Codec.FP16)
            for mask in (None, pruned)
        ),
        "result": tuple(
            encode_result(header, {"stats": vector[:3], "gram": vector[:2]}, data)[:-4]
            for data in (None, updates[0])
        ),
    }


def _block_seeds() -> tuple[bytes, ...]:
    samples = (
        Request("targets/a/b.onnx", 7, (0, 1, 2, 9), 100),
        Block(7, 1, 3, 100, 150, bytes(50)),
        NotFound(7),
        Put("results/t", 7, 0, 100, 3, bytes(32), b"abc"),
        Stored(7, StoreState.RECEIVING, bytes(32), frozenset({0, 9}), 12, "why", 4),
    )
    return tuple(sample.encode()[:-4] for sample in samples)


@cache
def _message_seeds() -> tuple[bytes, ...]:
    sha = "0123456789abcdef" * 4
    graph = {"target": "graphs/a.onnx", "sha256": sha}
    every = {
        "task": "t1", "device": "d1", "device_class": "phone", "kind": "train", "round": 9,
        "mask_version": 3, "shape": "phone", "graphs": [graph], "portable": [graph], "look": graph,
        "model": {"sha256": sha, "size": 5}, "samples": 4, "loss": 0.5, "state": "accepted",
        "reason": "r", "accepted": True, "agent_version": "0.1", "trains": True, "sha256": sha,
        "size": 5, "target": "graphs/a.onnx", "codec": "int4", "params": 3, "stats": 2, "kept": 2,
        "serial": 3, "stable": 6, "candidate": 7, "share": 500, "canaries": ["d1"],
        "salt": "0123456789abcdef", "paused": False, "opset": 20, "runtime_version": "1.2.3",
        "base": sha, "release": 7, "schema": 1, "slot": "a", "checks": 1,
        "token": "a.b.d1", "request": "PEM", "certificate": "PEM", "ca": "PEM", "root": "{}",
        "fleet": "f", "broker_host": "broker", "broker_port": 8883,
    }  # fmt: skip
    files = {
        "model": "m.onnx", "golden": "g.npz", "tolerance": 0.1, "labels": ["cat"],
        "input_shape": [3, 8], "smaller": "watch", "max_rss_mb": 9.5, "min_agreement": 0.9,
        "deltas": [{"base": sha, "target": "d", "sha256": sha, "size": 4}], "licence": "MIT",
        "training": {"rounds": 3, "criterion": "taylor"}, "requires": {"opset": 20},
    }  # fmt: skip
    out = []
    for i, kind in enumerate(MESSAGES):
        fields = every | (files if kind is Manifest else {})
        fields |= {"manifest": every | files, "files": {"model.onnx": sha}, "releases": {"3": "x"}}
        if kind in (slot_files.Pointer, messages.Telemetry):
            fields["state"] = "trial"
        if kind is Journal:
            fields |= {"model": sha, "finding": {"samples": 3, "accuracy": 0.5}}
        known = {f.alias or name for name, f in kind.model_fields.items()}
        known_fields = {k: v for k, v in fields.items() if k in known}
        out.append(bytes([i]) + _json(known_fields))
    return tuple(out)


def _json(fields: Mapping[str, object]) -> bytes:
    return json.dumps(fields).encode()


@cache
def _graph_meta_seeds() -> tuple[bytes, ...]:
    verification = {
        "x": {"shape": [2, 3]}, "y": {"shape": [2], "high": 3}, "live": 1,
        "params": [[4, 0.0, 1.0]], "stats": [[2, 1.0, 0.5]],
        "expected": [{"output": "x", "values": [1.0, 2.0, 3.0], "scale": 2.0}], "tolerance": 0.5,
    }  # fmt: skip
    kinds = ("train_step", "observe", "infer")
    metas = [
        {"kind": kind, "schema": 1, "classes": 3, "verification": verification} for kind in kinds
    ]
    loose = {"kind": "infer", "schema": 1, "verification": {"x": {"shape": [2, 3]}}}
    return tuple(_json(meta) for meta in (*metas, loose))


def _edits(kinds: int) -> tuple[bytes, ...]:
    """Each kind as it is."""
    return tuple(bytes([i]) for i in range(kinds))


def _memory_seed() -> bytes:
    remembered = Memory(3, "phone", np.ones(5, np.float32), {"t1": b"answer", "t2": b""})
    return encode_memory(remembered)[:-4]


@cache
def targets() -> dict[str, Target]:
    """All of them, by name."""
    wire = _wire_seeds()
    entry = bytes([6]) + struct.pack("<H", 9) + b"result" + b"results/t" + b"payload"
    named = {kind.value.encode() for kind in Kind}
    assert b"result" in named
    part = struct.pack("<4sIQ32s3I", b"FPM1", 100, 250, bytes(32), 1, 2, 3)
    samples = (golden(1), npz(x=np.zeros((2, INPUTS), np.float32), y=np.zeros((2, 3), np.float32)))
    device = (HostileInputError, TransportError)
    return {
        **{
            name: Target(globals()[name], wire[name])
            for name in ("frame", "values", "positions", "update", "model", "result")
        },
        "block": Target(block, _block_seeds()),
        "message": Target(message, _message_seeds(), max_len=8192),
        "message_edited": Target(message_edited, _edits(len(MESSAGES)), max_len=17),
        "graph_meta_edited": Target(graph_meta_edited, _edits(4), (GraphError,), max_len=17),
        "tuf_edited": Target(tuf_edited, _edits(len(ROLES)), device, max_len=17, share=0.05),
        "graph_meta": Target(graph_meta, _graph_meta_seeds(), (GraphError,)),
        "golden": Target(golden_samples, samples, (GraphError,), max_len=8192),
        "document": Target(document, _documents(), device, share=0.05),
        "delta": Target(delta, (DELTA,), max_len=1024),
        "delta_inside": Target(delta_inside, (_delta_seed(),), max_len=512),
        "tuf_unsigned": Target(tuf_unsigned, _metadata_seeds(), device, share=0.05),
        "tuf_signed": Target(tuf_signed, _signed_seeds(), device, share=0.05),
        "memory": Target(memory, (_memory_seed(),), ()),
        "outbox": Target(outbox, (entry,), (), share=0.05),
        "part_map": Target(part_map, (part,), ()),
        **road_targets(),
    }
