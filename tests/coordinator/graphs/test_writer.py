import onnx

from fleetprune_coordinator.graphs.writer import GraphWriter


def nodes(turn: str) -> list[str]:
    """A graph whose y = Relu(Neg(x)) is read before and behind the loss; "output=Op(inputs)"."""
    writer = GraphWriter()
    x = writer.input("x", (2,), "float32")
    y = writer.op("Relu", writer.cheap(writer.op("Neg", x)))
    loss = writer.op("Exp", y)
    writer.output(loss, "loss", (2,))
    writer.output(writer.op("Mul", loss, y), "grad", (2,))
    graph = onnx.load_from_string(writer.serialize({}, turn)).graph
    return [f"{n.output[0]}={n.op_type}({','.join(n.input)})" for n in graph.node]


def test_what_is_cheap_is_computed_again_behind_the_turn():
    assert nodes("loss") == [
        "t1=Neg(x)",
        "t2=Relu(t1)",
        "t3=Exp(t2)",
        "t1_again=Neg(x)",
        "t2_again=Relu(t1_again)",
        "t4=Mul(t3,t2_again)",
        "loss=Identity(t3)",
        "grad=Identity(t4)",
    ]


def test_a_graph_without_a_turn_computes_everything_once():
    assert len(nodes("")) == 6
