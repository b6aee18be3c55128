"""What the publisher wrote is read; whatever would run code, or exhaust memory, is refused."""

import os
import pickle
import struct

import numpy as np
import pytest

from fleetprune.errors import DataError
from fleetprune_sim.data.plain_pickle import load_plain
from tests.simulations.cifar import python2_pickle

DATA = np.arange(24, dtype=np.uint8).reshape(2, 12)


@pytest.mark.parametrize("data", [DATA, np.asfortranarray(DATA), DATA[:, ::2]])
def test_what_python_2_wrote_is_read(data):
    content = {b"data": data, b"labels": [3, 1], b"batch_label": b"x", b"share": 0.5, b"n": 70000}
    found = load_plain("b", python2_pickle(content))
    assert found.keys() == content.keys()
    assert (found.pop(b"data") == data).all()
    assert found == {k: v for k, v in content.items() if k != b"data"}


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_what_python_3_writes_of_strings_and_lists_is_read(protocol):
    content = {"labels": [1, None, True], "name": "ä", "nested": {"a": (1, 2.5)}}
    assert load_plain("b", pickle.dumps(content, protocol)) == content


class Runs:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("place", ["whole", "value", "key", "list"])
def test_code_is_not_run(tmp_path, protocol, place):
    mark = tmp_path / "mark"
    runs = Runs(mark)
    content = {
        "whole": runs,
        "value": {b"data": runs},
        "key": {(runs,): 1},
        "list": {b"labels": [[runs]]},
    }[place]
    data = pickle.dumps(content, protocol)
    with pytest.raises(DataError, match=r"^b is no pickle of plain data and byte arrays: it ") as e:
        load_plain("b", data)
    assert "\n" not in str(e.value)
    assert not mark.exists()
    if place != "key":  # the pickle is a working one: Python's own reader runs it
        pickle.loads(data)
        assert mark.exists()


def named(module, name, arguments=b"("):
    return b"\x80\x02c" + module + b"\n" + name + b"\n" + arguments


REFUSED = {
    "system": (named(b"os", b"system", b"(U\x04true\x85R."), "it names os.system"),
    "eval": (named(b"builtins", b"eval", b"U\x011\x85R."), "it names builtins.eval"),
    "numpy's own": (named(b"numpy", b"load", b"U\x01x\x85R."), "it names numpy.load"),
    "within a known module": (
        named(b"numpy.core.multiarray", b"fromfile", b"U\x01x\x85R."),
        "it names numpy.core.multiarray.fromfile",
    ),
    "dotted": (b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.dumps\x93.", "it names numpy.ndarray.dumps"),
    "instance": (b"(ios\nsystem\n.", "it has the instruction INST"),
    "object": (b"(cos\nsystem\no.", "it has the instruction OBJ"),
    "new object": (b"\x80\x02cos\nsystem\n)\x81.", "it has the instruction NEWOBJ"),
    "extension": (b"\x80\x02\x82\x01.", "it has the instruction EXT1"),
    "persistent": (b"\x80\x02Px\n.", "it has the instruction PERSID"),
    "evaluated string": (b"S'x'\n.", "it has the instruction STRING"),
    "huge table": (
        b"\x80\x02]r" + struct.pack("<I", 2**31) + b".",
        "it numbers a value 2147483648",
    ),
    "huge array": (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".", ""),
    "empty": (b"", "pickle exhausted before seeing STOP"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_pickles_are_refused(case):
    data, reason = REFUSED[case]
    with pytest.raises(DataError) as caught:
        load_plain("batch", data)
    message = str(caught.value)
    assert message.startswith(f"batch is no pickle of plain data and byte arrays: {reason}")
    assert message.endswith("; download it again")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros(2, np.int64), "an array that is not of unsigned bytes"),
        (np.array([{}], dtype=object), "an array that is not of unsigned bytes"),
    ],
)
def test_arrays_of_anything_but_bytes_are_refused(array, reason):
    with pytest.raises(DataError, match=reason):
        load_plain("b", python2_pickle({b"data": array}))


def test_an_array_that_lies_about_its_shape_is_refused():
    whole = python2_pickle({b"data": DATA})
    assert whole.count(b"K\x02K\x0c") == 1  # its shape, (2, 12)
    for shape in (b"K\x02K\x0d", b"K\x02U\x00", b"K\x02N"):
        with pytest.raises(DataError, match=r"whose shape does not fit|without a shape"):
            load_plain("b", whole.replace(b"K\x02K\x0c", shape))


def test_a_pickle_may_be_cut_anywhere():
    whole = python2_pickle({b"data": DATA, b"labels": [3, 1]})
    for cut in range(len(whole)):
        with pytest.raises(DataError, match=r"^b (is no pickle|holds a )"):
            load_plain("b", whole[:cut])


def test_a_pickle_of_something_else():
    with pytest.raises(DataError, match=r"^b holds a list, expected a dict$"):
        load_plain("b", pickle.dumps([1]))
