"""What a device does once: a key and a request to join with, and the trial of a release.

    python benchmarks/one_time.py [--repeat 9] [--width 700]

Keys are made by `openssl`, and by the package `cryptography`, which is the second choice; each run
is a process of its own, as on a device, and its memory is the largest of the processes that it
starts. A release is tried by `InChild` beside one of the same size that runs, with 256 recent
samples, from the start of the process to its verdict.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from fleetprune.manifest import Manifest
from fleetprune_agent.golden import load_golden
from fleetprune_agent.runtime import inference_session
from fleetprune_agent.slot_files import GOLDEN, MODEL
from fleetprune_agent.trial import Evidence, InChild, Request

CLASSES, RECENT = 10, 256
KEY = """
import json, resource, sys, time
from fleetprune_agent import device_key
if sys.argv[1] == "cryptography":
    device_key.shutil.which = lambda _: None
began = time.monotonic()
device_key.make_request(device_key.make_key(), "d1")
took = time.monotonic() - began
print(json.dumps([took, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024]))
"""


def keys(way: str, repeat: int) -> tuple[float, float]:
    """Median seconds for a key and a request, and the most MB that a process of these had."""
    runs = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", KEY, way], check=True, capture_output=True, text=True
            ).stdout
        )
        for _ in range(repeat)
    ]
    return statistics.median(took for took, _ in runs), max(mb for _, mb in runs)


def release(folder: Path, width: int) -> Manifest:
    """Two dense layers, and golden samples of them."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.normal(0, 0.05, shape).astype(np.float32), name)
        for name, shape in (("w1", (width, width)), ("w2", (width, CLASSES)))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w2"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", width])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", CLASSES])
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    opset = helper.make_opsetid("", 20)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=9)
    folder.mkdir()
    (folder / MODEL).write_bytes(model.SerializeToString())
    samples = rng.normal(size=(8, width)).astype(np.float32)
    session = inference_session((folder / MODEL).read_bytes())
    np.savez(folder / GOLDEN, x=samples, y=session.run(None, {"x": samples})[0])
    manifest = Manifest(
        release=1,
        device_class="phone",
        model="releases/phone/1/model.onnx",
        sha256="0" * 64,
        size=(folder / MODEL).stat().st_size,
        golden="releases/phone/1/golden.npz",
        input_shape=(width,),
    )
    load_golden(folder / GOLDEN, manifest)
    return manifest


def trials(folder: Path, width: int, repeat: int) -> tuple[float, int]:
    """Median seconds of a trial in a process of its own, and the model's bytes."""
    manifest = release(folder / "a", width)
    release(folder / "b", width)
    rng = np.random.default_rng(1)
    evidence = Evidence(rng.normal(size=(RECENT, width)).astype(np.float32))
    request = Request(
        folder=str(folder / "a"),
        manifest=manifest,
        incumbent=str(folder / "b" / MODEL),
        incumbent_shape=(width,),
    )
    took = []
    for _ in range(repeat):
        began = time.monotonic()
        found = InChild()(request, evidence)
        took.append(time.monotonic() - began)
        assert found.agreement == 1.0
    return statistics.median(took), manifest.size


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--width", type=int, default=700, help="Of both layers' inputs.")
    options = parser.parse_args()
    for way in ("openssl", "cryptography"):
        took, mb = keys(way, options.repeat)
        print(f"key and request, {way}: {1e3 * took:.0f} ms, {mb:.0f} MB")
    with tempfile.TemporaryDirectory() as name:
        took, size = trials(Path(name), options.width, options.repeat)
    print(f"trial of a model of {size / 1e6:.1f} MB: {took:.2f} s")


if __name__ == "__main__":
    main()
