import subprocess
import sys

import onnxruntime
import pytest
from models import INPUTS
from onnx import TensorProto, helper

from fleetprune.errors import InstallError
from fleetprune.manifest import Manifest, Requirements
from fleetprune_agent import compatibility
from fleetprune_agent.compatibility import (
    Machine,
    numbers,
    shortfall,
    this_machine,
    undemanding,
)
from fleetprune_agent.runtime import tiny_model

MACHINE = Machine("onnxruntime", "1.32.0", opset=24, ir_version=11, agent_version="0.5.0")


def manifest(**requires: object) -> Manifest:
    return Manifest(
        release=1,
        device_class="phone",
        model="m",
        sha256="0" * 64,
        size=1,
        golden="g",
        input_shape=(INPUTS,),
        requires=Requirements.model_validate(requires),
    )


@pytest.mark.parametrize(
    "requires",
    [
        {},
        {"opset": 24, "ir_version": 11, "runtime_version": "1.32", "agent_version": "0.5"},
        {"opset": 1, "ir_version": 1, "runtime_version": "1.9.7", "agent_version": "0.4.99"},
    ],
)
def test_what_can_run(requires):
    assert shortfall(manifest(**requires), MACHINE) == ""


@pytest.mark.parametrize(
    ("requires", "why"),
    [
        ({"opset": 25}, "the model requires opset 25, onnxruntime 1.32.0 takes up to 24"),
        ({"ir_version": 12}, "the model requires IR version 12, onnxruntime 1.32.0 takes up to 11"),
        (
            {"runtime_version": "1.32.1"},
            "the model requires onnxruntime 1.32.1, this device has onnxruntime 1.32.0",
        ),
        (
            {"runtime": "tflite"},
            "the model requires tflite, this device has onnxruntime 1.32.0",
        ),
        ({"agent_version": "0.10"}, "the model requires agent 0.10, this device has 0.5.0"),
    ],
)
def test_what_cannot_run(requires, why):
    assert shortfall(manifest(**requires), MACHINE) == why


def test_versions_are_compared_number_by_number():
    assert numbers("1.32.0rc1") == numbers("1.32") == (1, 32)
    assert numbers("0.10") > numbers("0.9.9")
    assert numbers("unknown") == numbers("0") == ()


def test_no_machine_is_asked_for_a_model_that_requires_nothing():
    assert undemanding(manifest())
    assert not undemanding(manifest(opset=2))


def test_the_tiny_model_is_what_onnx_writes():
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    opsets = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    assert model.SerializeToString() == tiny_model(20, 10)


def test_this_machine_says_what_loads_here():
    this_machine.cache_clear()
    machine = this_machine()
    assert machine.runtime_version == onnxruntime.__version__
    onnxruntime.InferenceSession(tiny_model(machine.opset, 10))
    onnxruntime.InferenceSession(tiny_model(13, machine.ir_version))
    for model in (tiny_model(machine.opset + 1, 10), tiny_model(13, machine.ir_version + 1)):
        with pytest.raises(Exception, match=r"ONNXRuntimeError"):
            onnxruntime.InferenceSession(model)


def test_an_agent_asks_another_process_and_stays_small():
    code = (
        "import sys\n"
        "from fleetprune_agent.compatibility import this_machine\n"
        "print(this_machine().opset, 'onnxruntime' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{this_machine().opset} False\n"


def test_a_runtime_that_cannot_be_asked_is_asked_again(monkeypatch):
    def fail() -> str:
        raise OSError("out of memory")

    this_machine.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(compatibility, "_asked", fail)
        with pytest.raises(InstallError) as e:
            this_machine()
    assert str(e.value) == "what onnxruntime supports cannot be found out: out of memory"
    assert this_machine().opset > 0
