"""Metadata and reference inputs: the same numbers on every machine."""

import json

import numpy as np
import pytest

from fleetprune.errors import GraphError
from fleetprune.graphmeta import (
    GraphMeta,
    ReferenceInput,
    Run,
    Verification,
    check_outputs,
    expectation,
    hashed,
    noise,
    parse_graph_meta,
    reference_feeds,
)


def meta(**changes):
    values = {
        "kind": "train_step",
        "batch": 4,
        "parameters": 3,
        "statistics": 2,
        "verification": Verification(
            x=ReferenceInput(shape=(4, 2)),
            y=ReferenceInput(shape=(4,), high=3),
            live=3,
            params=(Run(2, 0.0, 1.0), Run(1, 1.0, 0.1)),
            stats=(Run(1, 0.0, 0.2), Run(1, 1.0, 0.3)),
        ),
    }
    return GraphMeta(**values | changes)


def test_hash_is_the_same_everywhere():
    # MurmurHash3's fmix32 of 0, 1, 2, 3.
    assert hashed(4, seed=0).tolist() == [0, 0x514E28B7, 0x30F4C306, 0x85F0B427]


def test_noise_is_uniform():
    values = noise(10_000, seed=7)
    assert values.min() >= -1
    assert values.max() < 1
    assert abs(values.mean()) < 0.02
    assert abs(values.var() - 1 / 3) < 0.01
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.03


def test_reference_feeds_fit_the_description():
    feeds = reference_feeds(meta())
    assert {n: (a.shape, a.dtype.name) for n, a in feeds.items()} == {
        "x": ((4, 2), "float32"),
        "sw": ((4,), "float32"),
        "params": ((3,), "float32"),
        "stats": ((2,), "float32"),
        "y": ((4,), "int64"),
        "lr": ((), "float32"),
        "momentum": ((3,), "float32"),
    }
    assert (feeds["sw"] > 0).tolist() == [True, True, True, False]
    assert 0.9 <= feeds["params"][2] <= 1.1
    assert set(feeds["y"].tolist()) <= {0, 1, 2}
    assert not feeds["momentum"].any()


def test_metadata_survives_its_text_form():
    assert parse_graph_meta(meta().to_json()) == meta()


def test_unknown_fields_of_a_newer_writer_are_ignored():
    text = meta().to_json().replace('{"kind"', '{"colour":"red","kind"', 1)
    assert parse_graph_meta(text) == meta()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "graph metadata, kind: Field required"),
        (
            meta().to_json().replace('"train_step"', '"sleep"'),
            "graph metadata, kind: Input should be 'train_step', 'observe' or 'infer'",
        ),
        (
            meta().to_json().replace('"schema":1', '"schema":2'),
            "graph metadata of schema 2, expected 1",
        ),
    ],
)
def test_metadata_that_does_not_fit_is_refused(text, message):
    with pytest.raises(GraphError) as error:
        parse_graph_meta(text)
    assert str(error.value) == message


def checked(**arrays):
    expected = tuple(expectation(n, a, a) for n, a in arrays.items())
    return meta(verification=meta().verification.model_copy(update={"expected": expected}))


def test_outputs_within_the_tolerance_pass():
    want = np.arange(5.0)
    check_outputs(checked(loss=np.array(2.0), v=want), {"loss": np.array(2.03), "v": want + 0.001})


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({}, "train_step graph has no output v"),
        ({"v": np.array(1.0)}, "train_step graph: output v has another size"),
        (
            {"v": np.array([0, np.nan, 2])},
            "train_step graph: output v is not finite on this machine",
        ),
    ],
)
def test_outputs_that_do_not_fit_are_refused(outputs, message):
    with pytest.raises(GraphError) as error:
        check_outputs(checked(v=np.arange(3.0)), outputs)
    assert str(error.value) == message


def test_permuted_outputs_are_refused():
    with pytest.raises(GraphError, match="train_step graph computes wrong numbers on this machine"):
        check_outputs(checked(v=np.arange(16.0)), {"v": np.arange(16.0).reshape(4, 4).T.ravel()})


def test_a_wrong_loss_is_told_by_how_much():
    with pytest.raises(GraphError) as error:
        check_outputs(checked(loss=np.array(2.0)), {"loss": np.array(2.5)})
    assert str(error.value) == (
        "train_step graph computes wrong numbers on this machine: loss is off by 2.5e-01, "
        "tolerated is 2.0e-02"
    )


def test_a_training_graph_must_describe_its_targets():
    broken = meta(verification=meta().verification.model_copy(update={"y": None}))
    with pytest.raises(GraphError) as error:
        reference_feeds(broken)
    assert str(error.value) == "metadata of a train_step graph without a description of y"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": {"shape": [4, 2**40]}}, "verification.x.shape.1: Input should be less than"),
        ({"x": {"shape": [-4, 2]}}, "verification.x.shape.0: Input should be greater than"),
        ({"x": {"shape": []}}, "verification.x.shape: Tuple should have at least 1 item"),
        ({"params": [[2**60, 0.0, 1.0]]}, "verification.params.0.0: Input should be less than"),
        ({"params": [[3, 0.0, 1e300]]}, "verification.params.0.2: Input should be less than"),
        ({"y": {"shape": [4], "high": 2**40}}, "verification.y.high: Input should be less than"),
    ],
)
def test_metadata_cannot_ask_for_any_amount_of_memory(changes, message):
    values = json.loads(meta().to_json())
    values["verification"] |= changes
    with pytest.raises(GraphError) as error:
        parse_graph_meta(json.dumps(values))
    assert str(error.value).startswith(f"graph metadata, {message}")


def test_the_inputs_of_a_graph_are_bounded_together():
    values = json.loads(meta().to_json())
    values["verification"] |= {"x": {"shape": [2**13, 2**13]}, "y": None}
    with pytest.raises(GraphError) as error:
        parse_graph_meta(json.dumps(values))
    state = sum(
        run["size"] if isinstance(run, dict) else run[0]
        for name in ("params", "stats")
        for run in values["verification"][name]
    )
    assert str(error.value) == (
        f"graph metadata with {2**26 + state} elements of reference inputs, "
        f"expected at most {2**26}"
    )
