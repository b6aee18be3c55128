import io
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from fleetprune.errors import DataError
from fleetprune_sim.data import cifar10
from fleetprune_sim.data.cifar10 import BINARY, IMAGES, LABELS, PYTHON
from fleetprune_sim.data.sources import VARIABLE
from tests.simulations.cifar import BATCHES, batch, python2_pickle, write_archive, write_folder


@pytest.fixture
def data(tmp_path, monkeypatch):
    """The folder that the user names."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv(VARIABLE, str(folder))
    return folder


def colours(x):
    """The bytes that standardised images were made of."""
    mean, deviation = (np.array(v)[:, None, None] for v in (cifar10.MEAN, cifar10.DEVIATION))
    return np.round((x.astype(np.float64) * deviation + mean) * 255).astype(np.uint8)


def by_image(x, y):
    return {image.tobytes(): int(label) for image, label in zip(x, y, strict=True)}


@pytest.mark.parametrize("form", [PYTHON, BINARY])
@pytest.mark.parametrize("write", [write_folder, write_archive])
def test_all_images_are_somewhere_once(data, tmp_path, form, write):
    write(data, form)
    for _ in range(2):  # the second time from the cache
        corpus = cifar10.corpus(3, tmp_path / "cache")
        assert corpus.input_shape == (3, 32, 32)
        assert corpus.x.dtype == corpus.x_test.dtype == np.float32
        assert np.bincount(corpus.y).tolist() == [18] * 10
        assert np.bincount(corpus.y_validation).tolist() == [2] * 10  # a tenth of 20
        x = colours(np.concatenate([corpus.x, corpus.x_validation]))
        y = np.concatenate([corpus.y, corpus.y_validation])
        train = [batch(number) for number in range(5)]
        assert by_image(x, y) == by_image(
            np.concatenate([x for x, _ in train]), np.concatenate([y for _, y in train])
        )
        x, y = batch(5)
        assert (colours(corpus.x_test) == x.reshape(-1, 3, 32, 32)).all()
        assert (corpus.y_test == y).all()
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_seed_decides_what_is_validated(data, tmp_path):
    write_folder(data, BINARY)
    one, same, other = (cifar10.corpus(seed, tmp_path / "cache") for seed in (0, 0, 1))
    assert (one.x_validation == same.x_validation).all()
    assert (one.x_validation != other.x_validation).any()
    assert (one.x_test == other.x_test).all()


def picture(label, number, size=(32, 32), mode="RGB"):
    """Each class has its own red, each image its own green; the left half has all blue."""
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[:, : size[1] // 2, 2] = 20 * label, number, 255
    return Image.fromarray(pixels).convert(mode)


def write_images(folder, per_class):
    for label, name in enumerate(LABELS):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            picture(label, number).save(folder / name / f"{number}.png")


def test_image_folders_with_a_test_set(data, tmp_path):
    write_images(data / IMAGES / "train", 10)
    write_images(data / IMAGES / "test", 3)
    (data / IMAGES / "train" / "README").write_text("not an image")
    corpus = cifar10.corpus(0, tmp_path / "cache")
    assert [y.size for y in (corpus.y, corpus.y_validation, corpus.y_test)] == [90, 10, 30]
    for x, y in ((corpus.x, corpus.y), (corpus.x_test, corpus.y_test)):
        seen = colours(x)
        assert (seen[:, 0] == 20 * y[:, None, None]).all()
        assert (seen[:, 2, :, :16] == 255).all()
        assert (seen[:, 2, :, 16:] == 0).all()
    assert sorted(colours(corpus.x_test)[:, 1, 0, 0].tolist()) == [0] * 10 + [1] * 10 + [2] * 10
    again = cifar10.corpus(0, tmp_path / "cache")
    assert (again.x == corpus.x).all()


def test_image_folders_without_a_test_set(data, tmp_path):
    write_images(data / IMAGES, 12)
    corpus, other = (cifar10.corpus(seed, tmp_path / "cache") for seed in (0, 1))
    assert np.bincount(corpus.y_test).tolist() == [2] * 10
    assert np.bincount(corpus.y_validation).tolist() == [1] * 10
    assert np.bincount(corpus.y).tolist() == [9] * 10
    assert (corpus.x_test != other.x_test).any()


def test_other_sizes_and_modes_are_converted(data, tmp_path):
    write_images(data / IMAGES, 6)
    picture(9, 77, (64, 48), "RGBA").save(data / IMAGES / "truck" / "5.png")
    corpus = cifar10.corpus(0, tmp_path)
    x = colours(np.concatenate([corpus.x, corpus.x_validation, corpus.x_test]))
    (large,) = x[x[:, 1, 0, 0] == 77]
    assert (large[0] == 180).all()
    assert (large[2, :, :14] == 255).all()
    assert (large[2, :, 18:] == 0).all()


def test_missing_images_say_where_to_get_them(tmp_path):
    for environment, start in (
        (
            {},
            f"CIFAR-10 is looked for in the folder that {VARIABLE} names, which is not set: "
            "download cifar-10-python.tar.gz",
        ),
        (
            {VARIABLE: str(tmp_path / "no")},
            f"{tmp_path / 'no'}, which {VARIABLE} names, does not exist: download ",
        ),
        (
            {VARIABLE: str(tmp_path)},
            f"{tmp_path} has none of cifar-10-batches-py, cifar-10-batches-bin, cifar-10, "
            "cifar-10-python.tar.gz, cifar-10-binary.tar.gz: download",
        ),
    ):
        with pytest.raises(DataError) as caught:
            cifar10.find(environment)
        assert str(caught.value).startswith(start)
        assert "https://www.cs.toronto.edu/~kriz/cifar.html" in str(caught.value)
        assert "\n" not in str(caught.value)


def refused(tmp_path):
    with pytest.raises(DataError) as caught:
        cifar10.corpus(0, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_batches_that_are_missing_are_named(data, tmp_path):
    write_folder(data, PYTHON)
    (data / PYTHON / "data_batch_3").unlink()
    (data / PYTHON / "test_batch").unlink()
    assert refused(tmp_path).startswith(f"{data / PYTHON} lacks data_batch_3, test_batch: downl")


class Runs:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_batch_that_would_run_code_is_refused(data, tmp_path):
    write_folder(data, PYTHON)
    mark = tmp_path / "mark"
    (data / PYTHON / "data_batch_2").write_bytes(python2_pickle({b"data": Runs(mark)}))
    assert refused(tmp_path) == (
        "data_batch_2 is no pickle of plain data and byte arrays: it names posix.mkdir; "
        "download it again"
    )
    assert not mark.exists()


X, Y = batch(0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({b"labels": Y.tolist()}, "data is no array, expected images of 3072 bytes"),
        (
            {b"data": X[:, :3000], b"labels": Y.tolist()},
            "data is shape (40, 3000), expected images of 3072 bytes",
        ),
        ({b"data": X, b"labels": Y.tolist()[1:]}, "labels are no list of 40 numbers"),
        ({b"data": X, b"labels": [*Y.tolist()[1:], b"x"]}, "labels are no list of 40 numbers"),
        ({b"data": X, b"labels": b"x" * 40}, "labels are no list of 40 numbers"),
        ({b"data": X, b"labels": [*Y.tolist()[1:], 10]}, "labels 0..10, expected 0..9"),
        ({b"data": X, b"labels": [*Y.tolist()[1:], -1]}, "labels -1..9, expected 0..9"),
    ],
)
def test_a_malformed_python_batch_is_named(content, message):
    with pytest.raises(DataError) as caught:
        cifar10.python_batch("data_batch_1", python2_pickle(content))
    assert str(caught.value) == f"data_batch_1: {message}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, expected a multiple of 3073: download it again"),
        (bytes(3072), "3072 bytes, expected a multiple of 3073: download it again"),
        (b"\x0a" + bytes(3072), "labels 10..10, expected 0..9"),
    ],
)
def test_a_malformed_binary_batch_is_named(content, message):
    with pytest.raises(DataError) as caught:
        cifar10.binary_batch("test_batch.bin", content)
    assert str(caught.value) == f"test_batch.bin: {message}"


def test_an_archive_may_be_cut_anywhere(data, tmp_path):
    archive = write_archive(data, BINARY)
    whole = archive.read_bytes()
    for cut in [*range(0, 40, 3), *range(40, len(whole) - 9, 50_001), len(whole) - 9]:
        archive.write_bytes(whole[:cut])
        message = refused(tmp_path)
        assert message.startswith(f"{archive} ")
        assert "download" in message


def test_a_batch_of_absurd_size_is_not_read(data, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "_MOST", 1000)
    write_folder(data, BINARY)
    expected = f"data_batch_1.bin: {40 * 3073} bytes, expected at most 1000"
    assert refused(tmp_path) == expected
    for file in (data / BINARY).iterdir():
        file.unlink()
    (data / BINARY).rmdir()
    write_archive(data, BINARY)
    assert "bytes, expected at most 1000" in refused(tmp_path)


def test_a_link_in_an_archive_is_not_followed(data, tmp_path):
    (tmp_path / "secret").write_bytes(bytes(3073))
    with tarfile.open(data / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for name in BATCHES:
            link = tarfile.TarInfo(f"{BINARY}/{name}.bin")
            link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
            archive.addfile(link)
    assert "lacks data_batch_1.bin" in refused(tmp_path)


def test_image_folders_that_do_not_fit(data, tmp_path):
    folder = data / IMAGES
    write_images(folder, 6)
    (folder / "zebra").mkdir()
    assert refused(tmp_path).startswith(f"{folder / 'zebra'}: expected folders airplane, automob")
    (folder / "zebra").rmdir()
    (folder / "cat" / "3.png").write_bytes(b"no image")
    assert refused(tmp_path).startswith(f"{folder / 'cat' / '3.png'} is no image that can be read")
    for file in (folder / "cat").iterdir():
        file.unlink()
    assert refused(tmp_path) == (
        f"{folder / 'cat'} has no images, expected files .png, .jpg, .jpeg, .bmp"
    )
    (folder / "train").mkdir()
    assert refused(tmp_path) == (
        f"{folder} has a folder train but no folder test: put the test images into "
        f"{folder}/test/airplane and so on, or all images into {folder}/airplane and so on"
    )


def test_a_picture_that_is_cut_short_is_named(data, tmp_path):
    write_images(data / IMAGES, 6)
    file = io.BytesIO()
    picture(1, 1).save(file, "PNG")
    broken = data / IMAGES / "dog" / "2.png"
    broken.write_bytes(file.getvalue()[:-30])
    assert refused(tmp_path).startswith(f"{broken} is no image that can be read")
