import gc
import re
import sys
import types
import weakref

import numpy as np
import pytest

from fleetprune.errors import DataError
from fleetprune_agent.config import CsvData
from fleetprune_agent.data import Batches, Samples, checked, split
from fleetprune_agent.readers import load_samples, read_csv, read_function, read_npz


def refuses(message: str):
    return pytest.raises(DataError, match=f"^{re.escape(message)}$")


def samples(n: int, labels: bool = True) -> Samples:
    x = np.arange(n * 2, dtype=np.float32).reshape(n, 2)
    return checked(x, np.arange(n) % 3 if labels else None, lambda i: f"row {i}", "memory")


def test_npz_folder_in_order_of_names(tmp_path):
    np.savez(tmp_path / "b.npz", x=np.full((1, 2), 3.0), y=[1])
    np.savez(tmp_path / "a.npz", x=np.array([[1, 1], [2, 2]]), y=[0, 2])
    (tmp_path / "notes.txt").write_text("not data")
    got = read_npz(tmp_path)
    assert got.x.tolist() == [[1, 1], [2, 2], [3, 3]]
    assert got.x.dtype == np.float32
    assert got.y is not None
    assert got.y.tolist() == [0, 2, 1]
    assert [got.where(i) for i in range(3)] == [
        f"{tmp_path / 'a.npz'} index 0",
        f"{tmp_path / 'a.npz'} index 1",
        f"{tmp_path / 'b.npz'} index 0",
    ]
    assert got.take(np.array([2, 0])).where(1) == f"{tmp_path / 'a.npz'} index 0"


def test_npz_without_labels(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 3)))
    assert read_npz(tmp_path / "a.npz").y is None


def test_npz_refusals(tmp_path):
    file = tmp_path / "a.npz"
    with refuses(f"{file}: no such file or folder"):
        read_npz(file)
    with refuses(f"{tmp_path}: no .npz files in it"):
        read_npz(tmp_path)
    np.savez(file, z=np.zeros(2))
    with refuses(f"{file}: no array called x"):
        read_npz(file)
    np.savez(file, x=np.array([{}, {}], dtype=object))
    with refuses(
        f"{file}: not a plain .npz file, or it holds pickled Python objects, "
        "which are refused: save it with numpy.savez and numeric arrays"
    ):
        read_npz(file)
    file.write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(DataError, match=rf"^{re.escape(str(file))}: cannot be read as \.npz \("):
        read_npz(file)
    np.savez(file, x=np.zeros((0, 3)))
    with refuses(f"{file}: no samples (x has shape (0, 3))"):
        read_npz(file)
    np.savez(file, x=np.array(["a"]))
    with refuses(f"{file}: x has dtype <U1, expected real numbers"):
        read_npz(file)
    np.savez(file, x=np.zeros(3))
    with refuses(f"{file}: x has shape (3,), expected (samples, ...)"):
        read_npz(file)
    x = np.zeros((3, 2, 2))
    x[1, 0, 1] = np.nan
    np.savez(file, x=x)
    with refuses(f"{file} index 1: x at (0, 1) is nan, expected a finite number"):
        read_npz(file)
    np.savez(file, x=np.array([[1.0], [1e300]]))
    with refuses(f"{file} index 1: x at (0,) is inf, expected a finite number"):
        read_npz(file)
    np.savez(file, x=np.zeros((2, 2)), y=[0])
    with refuses(f"{file}: y has shape (1,), but there are 2 samples: expected (2,)"):
        read_npz(file)
    np.savez(file, x=np.zeros((2, 2)), y=[0.5, 1.0])
    with refuses(f"{file}: y has dtype float64, expected integers"):
        read_npz(file)
    np.savez(file, x=np.zeros((2, 2)), y=[0, -1])
    with refuses(f"{file} index 1: label -1, expected at least 0"):
        read_npz(file)


def test_files_must_agree(tmp_path):
    a, b = tmp_path / "a.npz", tmp_path / "b.npz"
    np.savez(a, x=np.zeros((2, 3)), y=[0, 0])
    np.savez(b, x=np.zeros((2, 4)), y=[0, 0])
    with refuses(f"{b} index 0: sample of shape (4,), but {a} index 0 has (3,)"):
        read_npz(tmp_path)
    np.savez(b, x=np.zeros((2, 3)))
    with refuses(f"{b} index 0: no labels, but {a} index 0 has them"):
        read_npz(tmp_path)


CSV = """win,t,ax,ay,what
u,0,1,10,walk
u,1,2,20,run
v,1,4,40,run
v,0,3,30,run
u,2,3,30,walk
v,2,5,50,sit
"""


def csv_config(path, **changes):
    settings = {
        "kind": "csv",
        "path": path,
        "columns": ("ax", "ay"),
        "window": "win",
        "step": "t",
        "label": "what",
        "labels": ("sit", "walk", "run"),
    }
    return CsvData.model_validate({**settings, **changes})


def test_csv_windows(tmp_path):
    file = tmp_path / "s.csv"
    file.write_text(CSV)
    got = load_samples(csv_config(file))
    assert got.x.tolist() == [[[1, 2, 3], [10, 20, 30]], [[3, 4, 5], [30, 40, 50]]]
    assert got.y is not None
    assert got.y.tolist() == [1, 2]  # walk 2:1, run 2:1
    assert got.where(1) == f"{file} row 4, window v"
    unordered = read_csv(csv_config(file, step=None, label=None))
    assert unordered.y is None
    assert unordered.x[1].tolist() == [[4, 3, 5], [40, 30, 50]]


def test_csv_class_numbers(tmp_path):
    (tmp_path / "s.csv").write_text("w,a,c\n1,0,2\n1,0,2\n")
    config = CsvData(kind="csv", path=tmp_path, columns=("a",), window="w", label="c")
    got = read_csv(config)
    assert (got.x.shape, got.y.tolist()) == ((1, 1, 2), [2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("u,1,2,", "u,1,x,"), " row 3: ax is 'x', expected a number"),
        (("u,1,2,", "u,1,inf,"), " row 3: ax is 'inf', expected a finite number"),
        (("v,2,5,50,sit\n", "v,2,5\n"), " row 7: ay is None, expected a number"),
        (("v,2,5,50,sit\n", ""), " row 4: window v has 2 steps, but window u has 3"),
        (("win,t,ax", "win,t,az"), ": no column ax, it has win, t, az, ay, what"),
        ((CSV.split("\n", 1)[1], ""), ": no samples (no row below the header)"),
        (
            ("run", "fly"),
            " row 4: label 'fly', expected one of sit, walk, run",
        ),
    ],
)
def test_csv_refusals(tmp_path, change, message):
    file = tmp_path / "s.csv"
    assert change[0] in CSV
    file.write_text(CSV.replace(*change))
    with refuses(f"{file}{message}"):
        read_csv(csv_config(file))


def test_csv_label_without_names(tmp_path):
    file = tmp_path / "s.csv"
    file.write_text(CSV)
    with refuses(
        f"{file} row 2: label 'walk' is no class number: name the classes in the "
        "setting data.labels"
    ):
        read_csv(csv_config(file, labels=()))


def test_function(monkeypatch):
    module = types.ModuleType("sensors_for_test")
    module.good = lambda: ([[1, 2], [3, 4]], [0, 1])
    module.unlabelled = lambda: (np.ones((1, 2)), None)
    module.bad = lambda: [1]
    module.broken = lambda: 1 / 0
    monkeypatch.setitem(sys.modules, "sensors_for_test", module)
    assert read_function("sensors_for_test:good").x.tolist() == [[1, 2], [3, 4]]
    assert read_function("sensors_for_test:unlabelled").y is None
    with refuses("sensors_for_test:bad: returned list, expected a tuple (x, y)"):
        read_function("sensors_for_test:bad")
    with refuses("sensors_for_test:broken: raised ZeroDivisionError: division by zero"):
        read_function("sensors_for_test:broken")
    with refuses("no_such_module:f: cannot be imported (No module named 'no_such_module')"):
        read_function("no_such_module:f")


def test_expect():
    s = samples(4)
    s.expect((2,), 3)
    s.expect((2,), None)
    with refuses("row 0: sample of shape (2,), but the model expects (3, 8)"):
        s.expect((3, 8), 3)
    with refuses("row 2: label 2, but the model has classes 0..1"):
        s.expect((2,), 2)


@pytest.mark.parametrize(
    ("n", "share", "aside"), [(10, 0.2, 2), (10, 0.25, 2), (1, 0.9, 0), (3, 0.9, 2), (5, 0, 0)]
)
def test_split_counts_are_exact(n, share, aside):
    parts = split(samples(n), share)
    assert (len(parts.train), len(parts.held_out)) == (n - aside, aside)
    together = np.concatenate([parts.train.x, parts.held_out.x])
    assert sorted(together[:, 0].tolist()) == [2 * i for i in range(n)]


def test_split_does_not_depend_on_the_order():
    s = samples(20)
    mixed = s.take(np.random.default_rng(0).permutation(20))
    a, b = split(s, 0.3), split(mixed, 0.3)
    assert sorted(a.held_out.x[:, 0]) == sorted(b.held_out.x[:, 0])
    assert a.held_out.x[:, 0].tolist() == [4, 14, 24, 26, 30, 38]  # may not change
    assert a.held_out.where(0) == "row 2"


def test_copies_of_one_sample_stay_together():
    x = np.repeat(np.arange(6, dtype=np.float32)[:, None], 5, axis=0)
    parts = split(checked(x, None, str, "memory"), 1 / 3)
    assert len(set(parts.held_out.x[:, 0])) == 2
    assert not set(parts.held_out.x[:, 0]) & set(parts.train.x[:, 0])


def test_batches_pad_with_weight_zero():
    s = samples(5)
    batches = Batches(s.x, s.y, 3)
    assert len(batches) == 2
    first, last = batches
    assert first.x[:, 0].tolist() == [0, 2, 4]
    assert (first.sw.tolist(), first.samples) == ([1, 1, 1], 3)
    assert last.x[:, 0].tolist() == [6, 8, 6]
    assert last.y.tolist() == [0, 1, 0]
    assert (last.sw.tolist(), last.samples) == ([1, 1, 0], 2)
    assert last.sw.dtype == np.float32


def test_batches_larger_than_the_data_and_without_labels():
    (only,) = Batches(samples(2).x, None, 5)
    assert only.x[:, 0].tolist() == [0, 2, 0, 2, 0]
    assert only.y.tolist() == [0] * 5
    assert only.sw.tolist() == [1, 1, 0, 0, 0]


def test_batches_draw_a_new_order_each_pass():
    batches = Batches(samples(8).x, None, 4, np.random.default_rng(3))
    passes = [np.concatenate([b.x[:, 0] for b in batches]).tolist() for _ in range(2)]
    assert passes[0] != passes[1]
    assert sorted(passes[0]) == sorted(passes[1]) == [0, 2, 4, 6, 8, 10, 12, 14]


def test_batches_of_nothing():
    with refuses("no samples to make batches of"):
        Batches(np.zeros((0, 2), np.float32), None, 4)


def test_a_split_does_not_keep_the_whole_in_memory(tmp_path):
    for name in "ab":
        np.savez(tmp_path / f"{name}.npz", x=np.arange(8.0).reshape(4, 2))
    whole = read_npz(tmp_path)
    memory = weakref.ref(whole.x)
    parts = split(whole, 0.25)
    assert memory() is not None
    del whole
    gc.collect()
    assert memory() is None
    assert parts.train.where(0).startswith(str(tmp_path))
