import hashlib

import onnx
import pytest
from onnx import TensorProto, helper

from fleetprune.errors import GraphError
from fleetprune.manifest import Requirements, Training
from fleetprune.messages import Blob, Enrol, GraphRef, Task, TaskKind
from fleetprune_coordinator.provenance import next_smaller, requirements, training_record
from fleetprune_coordinator.records import MaskRecord, Phase
from fleetprune_coordinator.registry import Registry


def relu(domain="", **options):
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy")
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"], domain=domain)], "g", [x], [y]
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, **options).SerializeToString()


def test_what_a_file_needs():
    needs = requirements(relu(ir_version=9), agent_version="0.1.0")
    assert needs == Requirements(opset=18, ir_version=9, agent_version="0.1.0")


def test_operators_that_not_every_device_has():
    message = "the file has operators of com.microsoft, expected ONNX's own alone"
    with pytest.raises(GraphError, match=message):
        requirements(relu("com.microsoft"))


def test_the_other_name_of_the_default_operators():
    model = onnx.load_from_string(relu())
    model.graph.node[0].domain = model.opset_import[0].domain = "ai.onnx"
    assert requirements(model.SerializeToString()).opset == 18


def test_where_devices_turn_whose_model_fails():
    shapes = {
        "gateway": {"a": 8, "b": 8},
        "phone": {"a": 4, "b": 6},
        "twin": {"a": 4, "b": 6},
        "watch": {"a": 2, "b": 2},
        "odd": {"a": 1, "b": 7},
    }
    assert next_smaller(shapes) == {
        "gateway": "phone",
        "phone": "watch",
        "twin": "watch",
    }


def test_where_a_model_came_from(tmp_path):
    """Of three devices two have answered in a training round, one of them twice."""
    words = {"criterion": "taylor", "granularity": "channel", "precision": "int8"}
    with Registry.open(tmp_path / "state", lambda: 1000.0) as registry:
        assert training_record(registry, **words) == Training(**words)
        registry.set_classes({"phone": True})
        for samples, name in enumerate(("p1", "p2", "p3"), 100):
            registry.enrol(
                Enrol(
                    device=name,
                    device_class="phone",
                    agent_version="0",
                    trains=True,
                    samples=samples,
                )
            )
        registry.save_mask(MaskRecord(0, 1, {}, {"phone": {}}))
        for number, answering in ((1, ("p1", "p2")), (2, ("p1",))):
            registry.begin_round(number, Phase.TRAIN, 0, [task(number, n) for n in ("p1", "p2")])
            for name in answering:
                assert registry.save_result(f"t{number}{name}", name, b"answer")
            registry.close_round(number, Phase.TRAIN, None)
        registry.begin_round(3, Phase.CALIBRATE, 0, [task(3, "p3")])
        assert registry.save_result("t3p3", "p3", b"answer")
        assert training_record(registry, **words) == Training(
            rounds=2, devices=2, samples=201, **words
        )


def task(number, device):
    model = b"weights"
    made = Task(
        task=f"t{number}{device}",
        device=device,
        kind=TaskKind.TRAIN,
        round=number,
        mask_version=0,
        shape="phone",
        graphs=(GraphRef(target="graphs/a.onnx", sha256="0" * 64),),
        model=Blob(sha256=hashlib.sha256(model).hexdigest(), size=len(model)),
    )
    return made, model
