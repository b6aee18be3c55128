"""Writes an ONNX graph node by node.

Equal constants and equal nodes are written once (common subexpressions), and what no output needs
is left out, so that the rules that lower operators may ask for the same thing again and again.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

OPSET = 18
IR_VERSION = 9

MICROSOFT = "com.microsoft"
"""onnxruntime's own operators, present in every build."""
NCHWC = "com.microsoft.nchwc"
"""onnxruntime's operators on channel-blocked tensors, present where the processor has them."""

_AS_CHEAP = {"Clip", "Identity", "Relu", "Reshape"}
"""Operators whose output is as quickly computed again as their input."""

Shape = Sequence[int | str]
"""Sizes; a string names a size that is known only when the graph runs."""


class GraphWriter:
    """Collects nodes; a tensor is known by its name."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[tuple[str, onnx.ValueInfoProto]] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._initializers: list[onnx.TensorProto] = []
        self._known: dict[tuple[Any, ...], list[str]] = {}
        self._names = 0
        self._cheap: set[str] = set()

    def constant(self, array: Any, dtype: Any = None) -> str:
        """The name of a constant tensor."""
        value: NDArray[Any] = np.ascontiguousarray(np.asarray(array, dtype=dtype))
        value = value.reshape(np.shape(array))  # ascontiguousarray makes scalars 1-D
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self._constants:
            name = f"c{len(self._constants)}"
            self._constants[key] = name
            self._initializers.append(numpy_helper.from_array(value, name))
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """The name of a constant int64 vector."""
        return self.constant(np.array(values, np.int64))

    def floats(self, *values: float) -> str:
        """The name of a constant float32 vector."""
        return self.constant(np.array(values, np.float32))

    def scalar(self, value: float | bool, dtype: str = "float32") -> str:
        """The name of a constant without axes."""
        return self.constant(np.array(value, dtype))

    def op(self, op_type: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output; returns that output's name.

        Args:
            op_type: ONNX operator.
            *inputs: Names; "" leaves an optional input out.
            domain: "", MICROSOFT or NCHWC.
            **attributes: The node's attributes.
        """
        return self.multi(op_type, *inputs, outputs=1, domain=domain, **attributes)[0]

    def multi(
        self, op_type: str, *inputs: str, outputs: int, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node with several outputs; returns their names."""
        key = (op_type, domain, inputs, outputs, repr(sorted(attributes.items())))
        if key in self._known and not op_type.startswith("Random"):
            return self._known[key]
        self._names += 1
        base = f"t{self._names}"
        names = [base] if outputs == 1 else [f"{base}_{i}" for i in range(outputs)]
        self._nodes.append(
            helper.make_node(op_type, list(inputs), names, domain=domain, **attributes)
        )
        self._known[key] = names
        if op_type in _AS_CHEAP and inputs[0] in self._cheap:
            self._cheap.add(names[0])
        return names

    def cheap(self, name: str) -> str:
        """Say that a tensor is quickly computed again from what is kept anyway; returns it."""
        self._cheap.add(name)
        return name

    def zeros(self, *shape: int) -> str:
        """A float32 tensor of zeros that takes no room in the file."""
        zero = numpy_helper.from_array(np.zeros(1, np.float32))
        return self.op("ConstantOfShape", self.ints(*shape), value=zero)

    def input(self, name: str, shape: Shape, dtype: str) -> str:
        """Declare an input; returns its name."""
        self._inputs.append(helper.make_tensor_value_info(name, onnx_type(dtype), list(shape)))
        return name

    def output(self, value: str, name: str, shape: Shape, dtype: str = "float32") -> None:
        """Declare that tensor `value` is the output `name`."""
        info = helper.make_tensor_value_info(name, onnx_type(dtype), list(shape))
        self._outputs.append((value, info))

    def live_nodes(self) -> list[onnx.NodeProto]:
        """The nodes that the outputs declared so far need, in order, without naming those."""
        values = {value for value, _ in self._outputs}
        return self._needed(self._nodes, values)

    def uses(self, op_type: str) -> bool:
        """Whether a node of this type has been added."""
        return any(node.op_type == op_type for node in self._nodes)

    def uses_domain(self, domain: str) -> bool:
        """Whether a node of this domain has been added."""
        return any(node.domain == domain for node in self._nodes)

    def serialize(self, metadata: dict[str, str], turn: str = "") -> bytes:
        """The graph as the bytes of an ONNX file.

        Args:
            metadata: The file's metadata entries.
            turn: The output that ends the forward half, if there is a backward one. What is
                cheap is computed again for the latter: kept, it would lie in memory unread.
        """
        nodes = self._live_nodes([*self._compute_again(turn), *self._name_outputs()])
        used = {name for node in nodes for name in node.input}
        graph = helper.make_graph(
            nodes,
            "fleetprune",
            self._inputs,
            [info for _, info in self._outputs],
            [tensor for tensor in self._initializers if tensor.name in used],
        )
        domains = {"": OPSET} | {d: 1 for d in (MICROSOFT, NCHWC) if d in {n.domain for n in nodes}}
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid(d, v) for d, v in domains.items()],
            ir_version=IR_VERSION,
        )
        helper.set_model_props(model, metadata)
        data: bytes = model.SerializeToString(deterministic=True)
        return data

    def _compute_again(self, turn: str) -> list[onnx.NodeProto]:
        """All nodes, and copies of the cheap ones where nodes behind `turn` read them first."""
        last = {info.name: value for value, info in self._outputs}.get(turn, "")
        forward = next((i for i, n in enumerate(self._nodes, 1) if last in n.output), None)
        nodes, backward = self._nodes[:forward], self._nodes[forward:] if forward else []
        makers = {name: node for node in nodes for name in node.output if name in self._cheap}
        again: dict[str, str] = {}

        def read(name: str) -> str:
            if name in makers and name not in again:
                again[name] = f"{name}_again"
                inputs = [read(i) for i in makers[name].input]
                nodes.append(_renamed(makers[name], inputs, [again[name]]))
            return again.get(name, name)

        for node in backward:
            inputs = [read(name) for name in node.input]
            nodes.append(_renamed(node, inputs, node.output))
        return nodes

    def _name_outputs(self) -> Iterable[onnx.NodeProto]:
        return [helper.make_node("Identity", [v], [info.name]) for v, info in self._outputs]

    def _live_nodes(self, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
        return self._needed(nodes, {info.name for _, info in self._outputs})

    def _needed(self, nodes: list[onnx.NodeProto], live: set[str]) -> list[onnx.NodeProto]:
        """The nodes that the values `live` need, in order."""
        kept = []
        for node in reversed(nodes):
            if live.intersection(node.output):
                if node.op_type == "MaxPool" and live.isdisjoint(node.output[1:]):
                    # With places that nobody reads, onnxruntime has no fast kernel.
                    node = _renamed(node, node.input, node.output[:1])  # noqa: PLW2901
                kept.append(node)
                live.update(node.input)
        return kept[::-1]


def onnx_type(dtype: str) -> int:
    """ONNX's number for a numpy dtype name."""
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def _renamed(node: onnx.NodeProto, inputs: Iterable[str], outputs: Iterable[str]) -> onnx.NodeProto:
    """A copy with other inputs and outputs."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[:], copy.output[:] = inputs, outputs
    return copy
