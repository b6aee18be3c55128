"""Which operators of an inference graph onnxruntime can run on integers.

Before quantisation: `choose` says which nodes get quantised inputs and outputs, and which tensors'
ranges that takes. After it: `integers` says which nodes of a file in QDQ form (pairs of
QuantizeLinear and DequantizeLinear around float operators) onnxruntime replaces by an integer
kernel, as it does when it loads the file. All others compute in float32.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx

PRODUCTS = frozenset({"Gemm", "MatMul"})
"""Their kernels can also write float32."""
WEIGHTED = PRODUCTS | {"Conv"}
UNKNOWN = frozenset({"ConvTranspose"})
"""Layers with weights that have none."""
JOINS = frozenset({"Add", "Mul", "Concat"})
UNARY = frozenset({"GlobalAveragePool", "AveragePool", "MaxPool", "Sigmoid", "LeakyRelu"})
VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"})
CLAMPS = frozenset({"Relu", "Clip"})
"""Vanish into the range of their output."""
KERNELS = WEIGHTED | JOINS | UNARY | VIEWS
INTO, OUT_OF = "QuantizeLinear", "DequantizeLinear"

Nodes = Sequence[onnx.NodeProto]


@dataclass(frozen=True)
class Choice:
    """What of a graph is to run on integers."""

    nodes: tuple[int, ...]
    """Places of the nodes."""
    tensors: tuple[str, ...]
    """Whose ranges must be known, in the order of the graph."""


def depends(nodes: Nodes, x: str) -> set[str]:
    """Names of all values that depend on the sample `x`; a shape does not."""
    found = {x}
    for node in nodes:
        if node.op_type != "Shape" and found.intersection(node.input):
            found.update(node.output)
    return found


def choose(nodes: Nodes, x: str, outputs: Iterable[str], constants: Collection[str]) -> Choice:
    """Choose the nodes of a float graph that are worth running on integers.

    Convolutions and linear layers whose weights and biases are stored; and what joins, pools, bends
    or reshapes nothing but their outputs. A node between two float operators is left alone: turning
    values to integers and back costs more than it saves.

    Args:
        nodes: The graph's, in order.
        x: Its float32 input.
        outputs: Its outputs.
        constants: Names of the tensors that it stores.
    """
    inside = depends(nodes, x)
    reads = Counter(outputs)
    reads.update(name for node in nodes for name in set(node.input))
    integer, chosen, tensors, clamped = {x}, [], [x], set[str]()
    for place, node in enumerate(nodes):
        fed = [name for name in node.input if name in inside]
        if not fed or not _suits(node, fed, integer, reads):
            continue
        if node.op_type in WEIGHTED and why_float(node, fed, constants):
            continue
        chosen.append(place)
        integer.update(node.output)
        if node.op_type in CLAMPS:
            clamped.add(fed[0])
        elif node.op_type in WEIGHTED:
            tensors += fed
        if node.op_type not in VIEWS:
            tensors += node.output
    return Choice(tuple(chosen), tuple(t for t in dict.fromkeys(tensors) if t not in clamped))


def _suits(
    node: onnx.NodeProto, fed: Sequence[str], integer: set[str], reads: Mapping[str, int]
) -> bool:
    if node.op_type in WEIGHTED:
        return len(fed) == 1
    if any(name not in integer for name in fed):
        return False
    if node.op_type in JOINS:
        return len(fed) == len(node.input) > 1
    if node.op_type in CLAMPS:
        return reads[fed[0]] == 1
    return node.op_type in UNARY | VIEWS and node.input[0] == fed[0]


def left_in_float(nodes: Nodes, x: str, constants: Collection[str]) -> str:
    """Which layers with weights no integer kernel can run, in words; empty if there are none.

    Args:
        nodes: The graph's, in order.
        x: Its float32 input.
        constants: Names of the tensors that it stores.
    """
    inside = depends(nodes, x)
    reasons = []
    for node in nodes:
        fed = [name for name in node.input if name in inside]
        if node.op_type in WEIGHTED | UNKNOWN and len(fed) == 1:
            reasons.append((node.op_type, why_float(node, fed, constants)))
    left = Counter(f"{kind} ({why})" for kind, why in reasons if why)
    if not left:
        return ""
    parts = [f"{count} {what}" for what, count in left.items()]
    return f"{left.total()} of {len(reasons)} layers stay in float32: {', '.join(parts)}"


def why_float(node: onnx.NodeProto, fed: Sequence[str], constants: Collection[str]) -> str:
    """Why a layer cannot run on integers; empty if it can.

    Args:
        node: With one input that depends on the sample.
        fed: That input.
        constants: Names of the tensors that the graph stores.
    """
    if node.op_type in UNKNOWN:
        return "onnxruntime has no integer kernel"
    if node.input[0] != fed[0]:
        return "its weight is on the left"
    for what, name in zip(("weight", "bias"), node.input[1:], strict=False):
        if name and name not in constants:
            return f"its {what} is computed"
    return ""


@dataclass(frozen=True)
class Integers:
    """What of a file in QDQ form runs on integers."""

    nodes: frozenset[int]
    """Places of the nodes in whose stead onnxruntime runs an integer kernel."""
    values: frozenset[str]
    """Names of the float values that never exist, since their makers and readers are such nodes."""


def integers(nodes: Nodes, outputs: Iterable[str]) -> Integers:
    """What of a file in QDQ form runs on integers.

    A kernel takes the place of a node whose samples come out of DequantizeLinear and go into
    QuantizeLinear, through a clamp or directly; a linear layer's result may also stay float32.

    Args:
        nodes: The file's, in order.
        outputs: The file's.
    """
    makers = {name: node for node in nodes for name in node.output}
    seen, readers = set(outputs), dict[str, list[onnx.NodeProto]]()
    for node in nodes:
        for name in set(node.input):
            readers.setdefault(name, []).append(node)

    def way_in(name: str) -> list[str]:
        """The values from `name` to QuantizeLinear; empty if something else reads one."""
        following = readers.get(name, [])
        if name in seen or not following:
            return []
        if len(following) == 1 and following[0].op_type in CLAMPS:
            rest = way_in(following[0].output[0])
            return [name, *rest] if rest else []
        return [name] if all(node.op_type == INTO for node in following) else []

    def comes_out(name: str) -> bool:
        return name in makers and makers[name].op_type == OUT_OF

    ways = {name: way_in(name) for node in nodes if node.op_type in KERNELS for name in node.output}
    kernels = {
        place: node
        for place, node in enumerate(nodes)
        if node.op_type in KERNELS
        and comes_out(node.input[0])
        and all(comes_out(name) for name in node.input if name in makers)
        and (node.op_type in PRODUCTS or all(ways[name] for name in node.output))
    }
    own = {id(node) for node in kernels.values()}
    values = {value for node in kernels.values() for name in node.output for value in ways[name]}
    values.update(
        name
        for node in nodes
        if node.op_type == OUT_OF
        for name in node.output
        if name not in seen and all(id(reader) in own for reader in readers.get(name, ()))
    )
    return Integers(frozenset(kernels), frozenset(values))
