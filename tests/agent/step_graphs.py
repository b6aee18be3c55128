"""Hand-made training and observation graphs whose results can be checked in the head."""

import hashlib
from collections.abc import Sequence

import numpy as np
from onnx import TensorProto, helper, load_model_from_string, numpy_helper

from fleetprune.graphmeta import (
    METADATA_KEY,
    Expectation,
    GraphMeta,
    ReferenceInput,
    Run,
    Verification,
)
from fleetprune.messages import Blob, Codec, GraphRef, Task, TaskKind
from fleetprune.model_payload import encode_model

BATCH = 3
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def step(
    direction: Sequence[float] = (1.0, 2.0),
    *,
    batch: int = BATCH,
    block: int = 0,
    criterion: str = "taylor",
) -> bytes:
    """A step of a model with 2 parameters, 2 statistics and 2 units.

    loss = mean of x; params_out = params - lr * direction; momentum_out = momentum + 1;
    stats_out = stats / 2; scores = momentum_out, so its sum over n steps is 1 + 2 + ... + n.
    """
    nodes = [
        helper.make_node("Squeeze", ["x", "axis"], ["flat"]),
        helper.make_node("Mul", ["flat", "sw"], ["weighted"]),
        helper.make_node("ReduceSum", ["weighted"], ["total"], keepdims=0),
        helper.make_node("ReduceSum", ["sw"], ["weight"], keepdims=0),
        helper.make_node("Div", ["total", "weight"], ["loss"]),
        helper.make_node("Mul", ["lr", "direction"], ["move"]),
        helper.make_node("Sub", ["params", "move"], ["params_out"]),
        helper.make_node("Add", ["momentum", "one"], ["momentum_out"]),
        helper.make_node("Mul", ["stats", "half"], ["stats_out"]),
        helper.make_node("Identity", ["momentum_out"], ["scores"]),
    ]
    constants = {
        "axis": np.array([1], np.int64),
        "direction": np.array(direction, np.float32),
        "one": np.float32(1),
        "half": np.float32(0.5),
    }
    inputs = {
        "x": (FLOAT, [batch, 1]),
        "y": (INT64, [batch]),
        "sw": (FLOAT, [batch]),
        "lr": (FLOAT, []),
        "params": (FLOAT, [2]),
        "momentum": (FLOAT, [2]),
        "stats": (FLOAT, [2]),
    }
    outputs = {
        "loss": (FLOAT, []),
        "params_out": (FLOAT, [2]),
        "momentum_out": (FLOAT, [2]),
        "stats_out": (FLOAT, [2]),
        "scores": (FLOAT, [2]),
    }
    meta = GraphMeta(
        kind="train_step",
        block=block,
        batch=batch,
        parameters=2,
        statistics=2,
        units=2,
        criterion=criterion,
        verification=Verification(
            x=ReferenceInput(shape=(batch, 1)),
            y=ReferenceInput(shape=(batch,), high=2),
            live=batch - 1,
            params=(Run(2, 0.0, 1.0),),
            stats=(Run(2, 0.0, 1.0),),
        ),
    )
    return _model(nodes, constants, inputs, outputs, meta)


def observation(*, batch: int = BATCH, statistics: int = 2) -> bytes:
    """sumsq = sum of x**2; bn_sum = sum of x; bn_sumsq = 2 * sumsq; bn_count = samples;
    logits = (x, 0.5), so class 0 wins where x > 0.5."""
    nodes = [
        helper.make_node("Squeeze", ["x", "axis"], ["flat"]),
        helper.make_node("Mul", ["flat", "sw"], ["weighted"]),
        helper.make_node("Mul", ["flat", "weighted"], ["squares"]),
        helper.make_node("ReduceSum", ["squares"], ["sumsq"], keepdims=1),
        helper.make_node("ReduceSum", ["weighted"], ["bn_sum"], keepdims=1),
        helper.make_node("Add", ["sumsq", "sumsq"], ["bn_sumsq"]),
        helper.make_node("ReduceSum", ["sw"], ["bn_count"], keepdims=1),
        helper.make_node("ReduceSum", ["params"], ["unused"], keepdims=0),
        helper.make_node("Concat", ["x", "halves"], ["logits"], axis=1),
    ]
    constants = {
        "axis": np.array([1], np.int64),
        "halves": np.full((batch, 1), 0.5, np.float32),
    }
    inputs = {
        "x": (FLOAT, [batch, 1]),
        "sw": (FLOAT, [batch]),
        "params": (FLOAT, [2]),
        "stats": (FLOAT, [statistics]),
    }
    outputs = {
        "sumsq": (FLOAT, [1]),
        "bn_sum": (FLOAT, [1]),
        "bn_sumsq": (FLOAT, [1]),
        "bn_count": (FLOAT, [1]),
        "logits": (FLOAT, [batch, 2]),
    }
    meta = GraphMeta(
        kind="observe",
        batch=batch,
        parameters=2,
        statistics=statistics,
        observed=1,
        verification=Verification(
            x=ReferenceInput(shape=(batch, 1)),
            live=batch,
            params=(Run(2, 0.0, 1.0),),
            stats=(Run(statistics, 0.0, 1.0),),
        ),
    )
    return _model(nodes, constants, inputs, outputs, meta)


def _model(nodes, constants, inputs, outputs, meta: GraphMeta) -> bytes:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(k, *v) for k, v in inputs.items()],
        [helper.make_tensor_value_info(k, *v) for k, v in outputs.items()],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {METADATA_KEY: meta.to_json()})
    return model.SerializeToString()


def wrong_expectation(onnx: bytes) -> bytes:
    """The same graph, which now fails its verification."""
    model = load_model_from_string(onnx)
    meta = GraphMeta.model_validate_json(model.metadata_props[0].value)
    wrong = Expectation(output="loss", values=(1e9,), scale=1.0)
    checks = meta.verification.model_copy(update={"expected": (wrong,)})
    model.metadata_props[0].value = meta.model_copy(update={"verification": checks}).to_json()
    return model.SerializeToString()


class Shelf:
    """A `TaskSource` in memory that counts what it is asked for."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.asked: list[str] = []

    def read(self, name: str) -> bytes:
        self.asked.append(name)
        return self.blobs[name]

    def graph(self, ref: GraphRef) -> bytes:
        return self.read(ref.target)

    def model(self, blob: Blob) -> bytes:
        return self.read(f"blobs/{blob.sha256}")

    def add_graph(self, onnx: bytes) -> GraphRef:
        sha256 = hashlib.sha256(onnx).hexdigest()
        self.blobs[f"graphs/{sha256}.onnx"] = onnx
        self.blobs[f"targets/graphs/{sha256}.{sha256}.onnx"] = onnx
        return GraphRef(target=f"graphs/{sha256}.onnx", sha256=sha256)

    def add_model(
        self, params, stats, *, mask_version: int = 1, round_: int = 0, support=None
    ) -> Blob:
        data = encode_model(
            mask_version,
            round_,
            np.asarray(params, np.float32),
            np.asarray(stats, np.float32),
            Codec.FP32,
            support=None if support is None else np.asarray(support, np.bool_),
        )
        sha256 = hashlib.sha256(data).hexdigest()
        self.blobs[f"blobs/{sha256}"] = data
        return Blob(sha256=sha256, size=len(data))

    def task(self, name: str, graphs: Sequence[bytes], **fields) -> Task:
        """A training task on parameters (1, 2) and statistics (4, 8), unless told otherwise."""
        model = fields.pop("model", None) or self.add_model([1, 2], [4, 8])
        return Task.model_validate(
            {
                "task": name,
                "device": "d1",
                "kind": TaskKind.TRAIN,
                "round": 0,
                "mask_version": 1,
                "shape": "phone",
                "graphs": [self.add_graph(g).model_dump(by_alias=True) for g in graphs],
                "model": model.model_dump(by_alias=True),
                "learning_rate": 0.5,
                "codec": "fp32",
                **fields,
            }
        )
