"""On files in the publisher's layout that this file makes, and on the publisher's where they are.

Those are looked for in FLEETPRUNE_DATA and where Debian's package puts them.
"""

import gzip
import struct

import numpy as np
import pytest

from fleetprune.errors import DataError
from fleetprune_sim.data import fashion
from fleetprune_sim.data.sources import VARIABLE


def idx(values, magic=None):
    """A file of bytes as the publisher writes it."""
    head = struct.pack(">I", 0x0800 | values.ndim if magic is None else magic)
    return head + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def images(n, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 28, 28), np.uint8), (np.arange(n) % 10).astype(np.uint8)


def write(folder, packed):
    """60 training and 20 test images."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = [idx(a) for n, seed in ((60, 0), (20, 1)) for a in images(n, seed)]
    for name, content in zip(fashion.FILES, contents, strict=True):
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


def grey(x):
    """The bytes that standardised images were made of."""
    return np.round((x[:, 0].astype(np.float64) * 0.353 + 0.286) * 255).astype(np.uint8)


@pytest.fixture(autouse=True)
def no_package(monkeypatch, tmp_path):
    monkeypatch.setattr(fashion, "SYSTEM", tmp_path / "system")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("place", ["", "fashion-mnist", "../system"])
def test_all_images_are_somewhere_once(tmp_path, monkeypatch, packed, place):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "own"))
    write(tmp_path / "own" / place, packed)
    corpus = fashion.corpus(3, tmp_path)
    assert corpus.input_shape == (1, 28, 28)
    assert corpus.x.dtype == corpus.x_test.dtype == np.float32
    assert np.bincount(corpus.y).tolist() == [5] * 10
    assert np.bincount(corpus.y_validation).tolist() == [1] * 10
    raw, labels = images(60, 0)
    ours = grey(np.concatenate([corpus.x, corpus.x_validation]))
    theirs = {image.tobytes(): label for image, label in zip(raw, labels, strict=True)}
    y = [*corpus.y, *corpus.y_validation]
    assert {i.tobytes(): label for i, label in zip(ours, y, strict=True)} == theirs
    raw, labels = images(20, 1)
    assert (grey(corpus.x_test) == raw).all()
    assert (corpus.y_test == labels).all()


def test_the_seed_decides_what_is_validated(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    write(tmp_path, packed=True)
    one, same, other = (fashion.corpus(seed, tmp_path).x_validation for seed in (0, 0, 1))
    assert (one == same).all()
    assert (one != other).any()


def test_the_publishers_images(monkeypatch):
    monkeypatch.undo()
    try:
        fashion.find()
    except DataError:
        pytest.skip(f"Fashion-MNIST is in neither {VARIABLE} nor {fashion.SYSTEM}")
    corpus = fashion.corpus(0, fashion.SYSTEM)
    assert np.bincount(corpus.y).tolist() == [5000] * 10
    assert np.bincount(corpus.y_validation).tolist() == [1000] * 10
    assert np.bincount(corpus.y_test).tolist() == [1000] * 10
    some = corpus.x[::10].astype(np.float64)
    assert abs(some.mean()) < 1e-2
    assert abs(some.std() - 1) < 1e-2


def test_missing_images_say_where_to_get_them(tmp_path):
    system = fashion.SYSTEM
    for environment, looked in (
        ({}, f"{system}"),
        ({VARIABLE: str(tmp_path)}, f"{tmp_path}, {tmp_path / 'fashion-mnist'}, {system}"),
        (
            {VARIABLE: str(tmp_path / "no")},
            f"{system}; {tmp_path / 'no'}, which {VARIABLE} names, does not exist",
        ),
    ):
        with pytest.raises(DataError) as caught:
            fashion.find(environment)
        assert str(caught.value) == f"Fashion-MNIST is not in {looked}: {fashion.WHERE}"
    for hint in ("dataset-fashion-mnist", "zalandoresearch/fashion-mnist", "MIT", VARIABLE):
        assert hint in fashion.WHERE


def test_files_that_are_missing_are_named(tmp_path):
    write(tmp_path, packed=True)
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    (tmp_path / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(DataError) as caught:
        fashion.find({VARIABLE: str(tmp_path)})
    assert str(caught.value).startswith(
        f"{tmp_path} lacks train-labels-idx1-ubyte, t10k-images-idx3-ubyte (or with .gz): install"
    )


GOOD = idx(images(60, 0)[0])
INTERRUPTED = "the download was interrupted, download it again"
SHAPE = "(60, 28, 28)"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", f" ends too early: {INTERRUPTED}"),
        (GOOD[:15], f" ends too early: {INTERRUPTED}"),
        (GOOD[:16], f": 0 of the 47040 bytes of shape {SHAPE}: {INTERRUPTED}"),
        (GOOD[:-1], f": 47039 of the 47040 bytes of shape {SHAPE}: {INTERRUPTED}"),
        (GOOD + b"x", f": goes on after the 47040 bytes of shape {SHAPE}"),
        (idx(images(60, 0)[1]), ": magic number 2049, expected 2051"),
        (idx(images(60, 0)[0], magic=0x0D03), ": magic number 3331, expected 2051"),
        (
            idx(np.zeros((0, 28, 28), np.uint8)),
            ": shape (0, 28, 28), expected 1 to 268435456 bytes",
        ),
        (
            struct.pack(">4I", 2051, 2**31, 2**31, 2**31),
            ": shape (2147483648, 2147483648, 2147483648), expected 1 to 268435456 bytes",
        ),
    ],
)
def test_a_malformed_file_says_what_it_has_and_what_was_expected(tmp_path, content, message):
    for name, written in (("i", content), ("i.gz", gzip.compress(content))):
        (tmp_path / name).write_bytes(written)
        with pytest.raises(DataError) as caught:
            fashion.read_idx(tmp_path / name, 3)
        assert str(caught.value) == f"{tmp_path / name}{message}"


def test_a_compressed_file_may_be_cut_anywhere(tmp_path):
    whole = gzip.compress(GOOD)
    file = tmp_path / "i.gz"
    file.write_bytes(whole)
    assert (fashion.read_idx(file, 3) == images(60, 0)[0]).all()
    for cut in [*range(30), *range(30, len(whole) - 12, 4001), *range(len(whole) - 12, len(whole))]:
        file.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"download it again$") as caught:
            fashion.read_idx(file, 3)
        assert "\n" not in str(caught.value)


def test_a_damaged_compressed_file(tmp_path):
    file = tmp_path / "i.gz"
    file.write_bytes(GOOD)
    with pytest.raises(
        DataError, match=r"i.gz is damaged \(Not a gzipped file .*download it again$"
    ):
        fashion.read_idx(file, 3)
    whole = bytearray(gzip.compress(GOOD))
    whole[-6] ^= 1
    file.write_bytes(whole)
    with pytest.raises(DataError, match=r"i.gz is damaged \(CRC check failed"):
        fashion.read_idx(file, 3)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (0, np.zeros((60, 28, 27), np.uint8), r"images of \(28, 27\), expected \(28, 28\)$"),
        (0, np.zeros((59, 28, 28), np.uint8), r"has 59 images, .* has 60 labels$"),
        (3, np.full(20, 10, np.uint8), r"label 10, expected 0 to 9$"),
    ],
)
def test_files_that_do_not_belong_together(tmp_path, monkeypatch, name, values, message):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    write(tmp_path, packed=False)
    (tmp_path / fashion.FILES[name]).write_bytes(idx(values))
    with pytest.raises(DataError, match=message):
        fashion.corpus(0, tmp_path)
