"""Validly signed models that are traps: one clear rejection, bounded memory, the agent goes on.

Each goes the real way: a signed target, downloaded, verified, and tried in a process of its own.
"""

import io
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from models import CLASSES, INPUTS, ZEROS, gemm, golden
from onnx import TensorProto, helper, numpy_helper
from repositories import Clock, MemoryRepository

from fleetprune.deflate import deflate
from fleetprune.errors import WireError
from fleetprune.frame import decode_frame, encode_frame
from fleetprune.messages import Codec
from fleetprune.update import SparseUpdate, decode_update
from fleetprune_agent.install import Checks, InstallOutcome, Status, install
from fleetprune_agent.serving import Predictor
from fleetprune_agent.slots import Slots
from fleetprune_agent.trial import InChild
from fleetprune_agent.trust import TrustedRepository

SECRET = "a file of the device's own"
GIB = 2**30


def model(nodes=None, tensors=(), inputs=("x",), **fields) -> bytes:
    """y = x @ ones + 2, or as `nodes` say."""
    x = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", INPUTS]) for name in inputs]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", CLASSES])
    graph = helper.make_graph(nodes or [GEMM], "trap", x, [y], list(tensors) or [WEIGHT, BIAS])
    opsets = fields.pop("opsets", [helper.make_opsetid("", 20)])
    made = helper.make_model(graph, opset_imports=opsets, ir_version=10, **fields)
    return made.SerializeToString()


WEIGHT = numpy_helper.from_array(np.ones((INPUTS, CLASSES), np.float32), "w")
BIAS = numpy_helper.from_array(np.full(CLASSES, 2, np.float32), "b")
GEMM = helper.make_node("Gemm", ["x", "w", "b"], ["y"])
GEMM_OF_Z = helper.make_node("Gemm", ["z", "w", "b"], ["y"])


def external(location: str, length: int = 4 * INPUTS * CLASSES) -> bytes:
    """The weights are in another file, says the model."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[INPUTS, CLASSES])
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
        weight.external_data.add(key=key, value=value)
    return model(tensors=[weight, BIAS])


def giant(dims: list[int], raw: bytes = b"") -> bytes:
    """More elements than there is data; their sum is added, so that no shape is wrong."""
    weight = TensorProto(name="large", data_type=TensorProto.FLOAT, dims=dims, raw_data=raw)
    nodes = [
        helper.make_node("ReduceSum", ["large"], ["sum"], keepdims=0),
        helper.make_node("Gemm", ["x", "w", "b"], ["z"]),
        helper.make_node("Add", ["z", "sum"], ["y"]),
    ]
    return model(nodes, [WEIGHT, BIAS, weight])


def fill(dims: list[int]) -> bytes:
    """A constant that only becomes large when the graph is loaded or run."""
    shape = numpy_helper.from_array(np.array(dims, np.int64), "shape")
    zero = numpy_helper.from_array(np.zeros(1, np.float32), "zero")
    nodes = [
        helper.make_node("Expand", ["zero", "shape"], ["large"]),
        helper.make_node("ReduceSum", ["large"], ["sum"], keepdims=0),
        helper.make_node("Gemm", ["x", "w", "b"], ["z"]),
        helper.make_node("Add", ["z", "sum"], ["y"]),
    ]
    return model(nodes, [WEIGHT, BIAS, shape, zero])


def cycle() -> bytes:
    nodes = [
        helper.make_node("Add", ["x", "b2"], ["a"]),
        helper.make_node("Relu", ["a"], ["b2"]),
        helper.make_node("Gemm", ["b2", "w", "b"], ["y"]),
    ]
    return model(nodes)


def deep(levels: int) -> bytes:
    """If in If in If ..., as deep as one likes."""
    out = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "g", [], [out])
    raw = graph.SerializeToString()
    for _ in range(levels):  # by hand: protobuf refuses to make what it would refuse to read
        node = _field(1, b"t") + _field(2, b"z") + _field(4, b"If")
        for name in (b"then_branch", b"else_branch")[:1]:
            attribute = _field(1, name) + _field(6, raw) + b"\xa0\x01\x05"
            node += _field(5, attribute)
        raw = _field(1, node) + _field(2, b"g") + _field(12, out.SerializeToString())
    whole = onnx.ModelProto(ir_version=10, opset_import=[helper.make_opsetid("", 20)])
    return whole.SerializeToString() + _field(7, raw)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def functions(levels: int) -> bytes:
    """Each function calls the one before twice: 2**levels nodes once they are inlined."""
    made = []
    for i in range(levels):
        inner = "Identity" if i == 0 else f"F{i - 1}"
        domain = "" if i == 0 else "trap"
        nodes = [
            helper.make_node(inner, ["a"], ["m"], domain=domain),
            helper.make_node(inner, ["m"], ["c"], domain=domain),
        ]
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("trap", 1)]
        made.append(helper.make_function("trap", f"F{i}", ["a"], ["c"], nodes, opsets))
    nodes = [helper.make_node(f"F{levels - 1}", ["x"], ["z"], domain="trap")]
    nodes.append(helper.make_node("Gemm", ["z", "w", "b"], ["y"]))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("trap", 1)]
    return model(nodes, functions=made, opsets=opsets)


def endless() -> bytes:
    """A loop of 2**62 turns."""
    turns = numpy_helper.from_array(np.array(2**62, np.int64), "turns")
    yes = numpy_helper.from_array(np.array(True), "yes")
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Sin", ["v"], ["u"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, ["n", INPUTS]),
        ],
        [
            helper.make_tensor_value_info("d", TensorProto.BOOL, []),
            helper.make_tensor_value_info("u", TensorProto.FLOAT, ["n", INPUTS]),
        ],
    )
    nodes = [
        helper.make_node("Loop", ["turns", "yes", "x"], ["z"], body=body),
        helper.make_node("Gemm", ["z", "w", "b"], ["y"]),
    ]
    return model(nodes, [WEIGHT, BIAS, turns, yes])


def bombs(count: int) -> bytes:
    """A node with very many attributes."""
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"])
    node.attribute.extend(helper.make_attribute(f"a{i}", [0.0] * 50) for i in range(count))
    return model([node])


TRAPS: dict[str, Callable[[Path], bytes]] = {
    "weights in /etc/passwd": lambda folder: external("/etc/passwd"),
    "weights in ../": lambda folder: external("../active.json"),
    "weights far up": lambda folder: external("../" * 12 + "etc/passwd"),
    "weights behind a link": lambda folder: external(str(_link(folder))),
    "weights in the golden samples": lambda folder: external("golden.npz"),
    "weights in memory": lambda folder: external("*/_ORT_MEM_ADDR_/*"),
    "a giant initialiser": lambda folder: giant([2**20, 2**20]),
    "dimensions that overflow": lambda folder: giant([2**33, 2**33, 4]),
    "a negative dimension": lambda folder: giant([-1, CLASSES], bytes(48)),
    "a constant of 16 GiB": lambda folder: fill([2**16, 2**16]),
    "a constant of 2 EiB": lambda folder: fill([2**30, 2**29]),
    "a cycle": lambda folder: cycle(),
    "recursion": lambda folder: deep(60),
    "deep recursion": lambda folder: deep(3000),
    "functions that double": lambda folder: functions(40),
    "an endless loop": lambda folder: endless(),
    "an operator that nobody knows": lambda folder: model(
        [helper.make_node("Shell", ["x"], ["y"], command="id")]
    ),
    "an operator of a library": lambda folder: model(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], domain="evil.so")],
        opsets=[helper.make_opsetid("", 20), helper.make_opsetid("evil.so", 1)],
    ),
    "an operator set of the future": lambda folder: model(opsets=[helper.make_opsetid("", 9999)]),
    "a node with 20,000 attributes": lambda folder: bombs(20_000),
    "zeros without data": lambda folder: giant([2**34]),
    "two inputs": lambda folder: model(
        [helper.make_node("Add", ["x", "w2"], ["z"]), GEMM_OF_Z],
        inputs=("x", "w2"),
    ),
    "no inputs": lambda folder: model(
        [helper.make_node("Identity", ["b"], ["y"])], inputs=()
    ),
    "no graph": lambda folder: b"\x08\x0a",
    "not protobuf": lambda folder: b"\xff" * 1000,
    "a field without an end": lambda folder: _varint(7 << 3 | 2) + _varint(2**40),
}  # fmt: skip

ENDLESS = ("functions that double", "an endless loop")


def _link(folder: Path) -> Path:
    secret, link = folder / "secret", folder / "link"
    secret.write_text(SECRET)
    link.symlink_to(secret)
    return link


class Device:
    """Runs release 1, and tries models in processes that may not take more than 3 GiB."""

    def __init__(self, folder: Path) -> None:
        self.repository = MemoryRepository()
        self.repository.release(1, model=gemm(1))
        road, clock = self.repository, Clock()
        self.trusted = TrustedRepository(folder / "trust", road.bootstrap, road, clock)
        self.slots = Slots(folder)
        assert self.install().status is Status.INSTALLED
        self.slots.commit()

    def install(self, seconds: float = 60.0) -> InstallOutcome:
        code = (
            "import resource; from fleetprune_agent import health; "
            f"resource.setrlimit(resource.RLIMIT_AS, ({3 * GIB}, {3 * GIB})); health.main()"
        )
        return install(
            self.trusted, self.slots, "phone", Checks(trial=InChild(seconds, command=("-c", code)))
        )


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    return Device(tmp_path_factory.mktemp("device"))


def test_the_same_model_without_a_trap_is_installed(tmp_path):
    """So it is the trap that is rejected above."""
    device = Device(tmp_path)
    for number, harmless in ((2, model()), (3, giant([2], bytes(8))), (4, functions(3))):
        device.repository.release(number, model=harmless, samples=golden(2))
        assert device.install().status is Status.INSTALLED
        device.slots.commit()


@pytest.mark.parametrize("trap", TRAPS)
def test_a_model_that_is_a_trap_is_rejected(device, tmp_path, trap):
    """The numbers of releases rise; the device stays what it is from one trap to the next."""
    number = max(device.slots.rejected(), default=1) + 1
    hostile = TRAPS[trap](tmp_path)
    assert len(hostile) < 8 * 2**20
    device.repository.release(number, model=hostile, samples=golden(2))
    outcome = device.install(2.0 if trap in ENDLESS else 60.0)
    assert outcome.status is Status.REJECTED, outcome
    assert ("did not end in 2 s" in outcome.reason) == (trap in ENDLESS)
    assert outcome.reason and "\n" not in outcome.reason
    assert device.slots.rejected()[number] == outcome.reason[:200]
    assert SECRET not in outcome.reason
    assert Predictor(device.slots).predict(ZEROS)[0, 0] == 1


def deflated(size: int) -> bytes:
    return deflate(bytes(size), match=True)


def test_an_update_that_inflates_to_more_than_its_task_allows():
    """A gigabyte in a megabyte: no more than the support's values is ever inflated."""
    honest = SparseUpdate(1, 1000, np.zeros(1000, np.float32), None).encode(Codec.FP32)
    head, packed = bytearray(honest[:28]), deflated(64 * 2**20)
    head[24:28] = len(packed).to_bytes(4, "little")
    for claimed in (1000, 2**28):
        head[12:16] = head[16:20] = claimed.to_bytes(4, "little")
        body = bytes(head) + packed
        bomb = body + zlib.crc32(body).to_bytes(4, "little")
        tracemalloc.start()
        with pytest.raises(WireError, match=r"^(deflated )?(update|values)"):
            decode_update(bomb, mask_version=1, size=1000)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 * 2**20


def test_a_frame_holds_what_is_there_and_nothing_that_is_claimed():
    """Sections are not packed; a table that claims gigabytes is refused before anything is made."""
    frame = bytearray(encode_frame("TEST", b"{}", {"a": b"z"}))
    frame[32:36] = (2**31).to_bytes(4, "little")
    with pytest.raises(WireError, match=r"^frame of 43 bytes, expected 2147483690$"):
        decode_frame(bytes(frame), "TEST")


def npz(*entries: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return file.getvalue()


def array(shape: str, data: bytes = b"", descr: str = "<f4") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    header = header.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data


Y = array("(1, 3)", np.full(3, 2, np.float32).tobytes())
X = array("(1, 4)", bytes(16))
SAMPLES = {
    "harmless": (npz(("x.npy", X), ("y.npy", Y)), ""),
    "a terabyte that is not there": (
        npz(("x.npy", array("(68719476736, 4)")), ("y.npy", Y)),
        "x of shape (68719476736, 4) in 0 bytes",
    ),
    "more dimensions than can be counted": (
        npz(("x.npy", array("(99999999999999999999, 4)")), ("y.npy", Y)),
        "x of shape (99999999999999999999, 4) in 0 bytes",
    ),
    "a hundred entries": (
        npz(("x.npy", X), ("y.npy", Y), *((f"z{i}", b"") for i in range(100))),
        "102 entries, expected at most 16",
    ),
    "packed by LZMA, which allocates what its header says": (
        npz(("x.npy", X), ("y.npy", Y), method=zipfile.ZIP_LZMA),
        "an entry is packed by method 14 with flags 0x2, "
        "expected stored or deflated and not encrypted",
    ),
    "an expression in place of a header": (
        npz(("x.npy", array("(" * 300 + ")" * 300)), ("y.npy", Y)),
        "Cannot parse header",
    ),
    "objects": (
        npz(("x.npy", array("(1, 4)", b"cos\nsystem\n", "|O")), ("y.npy", Y)),
        "x is object, expected float32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SAMPLES)
def test_golden_samples_that_are_traps(tmp_path, case):
    device = Device(tmp_path)
    samples, reason = SAMPLES[case]
    device.repository.release(2, model=gemm(2), samples=samples)
    outcome = install(device.trusted, device.slots, "phone")
    if not reason:
        assert outcome.status is Status.INSTALLED, outcome
        return
    assert outcome.status is Status.REJECTED
    assert outcome.reason.startswith(f"golden samples: {reason}")
    assert Predictor(device.slots).predict(ZEROS)[0, 0] == 1
