"""CIFAR-10's files in the publisher's layouts, with a few random images."""

import io
import pickle
import tarfile
from typing import ClassVar

import numpy as np

from fleetprune_sim.data.cifar10 import BINARY, LABELS, PYTHON

PER_BATCH = 40
BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


class _Python2(pickle._Pickler):
    """Writes bytes as Python 2's `cPickle` wrote strings."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, text):
        if len(text) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(text)]) + text)
        else:
            self.write(pickle.BINSTRING + len(text).to_bytes(4, "little") + text)
        self.memoize(text)

    dispatch[bytes] = save_string


def python2_pickle(content):
    """As the publisher's: protocol 2, strings as bytes, numpy's names of 2009."""
    file = io.BytesIO()
    _Python2(file, 2).dump(content)
    return file.getvalue().replace(b"numpy._core", b"numpy.core")


def batch(number):
    """Images (n, 3072) and labels of one of the six files, four of each class."""
    rng = np.random.default_rng(number)
    y = rng.permutation(np.arange(PER_BATCH) % len(LABELS))
    return rng.integers(0, 256, (PER_BATCH, 3072), np.uint8), y


def files(form):
    """Name and contents of the files that decide, and of those beside them."""
    for number, name in enumerate(BATCHES):
        x, y = batch(number)
        if form == PYTHON:
            names = [b"a_%06d.png" % i for i in range(PER_BATCH)]
            content = {b"batch_label": b"x", b"labels": y.tolist(), b"data": x, b"filenames": names}
            yield name, python2_pickle(content)
        else:
            yield f"{name}.bin", np.column_stack([y.astype(np.uint8), x]).tobytes()
    yield "readme.html", b"<html></html>"
    if form == PYTHON:
        yield "batches.meta", python2_pickle({b"label_names": [n.encode() for n in LABELS]})
    else:
        yield "batches.meta.txt", "\n".join(LABELS).encode()


def write_folder(folder, form):
    """Unpacked, below `folder`."""
    (folder / form).mkdir(parents=True)
    for name, content in files(form):
        (folder / form / name).write_bytes(content)


def write_archive(folder, form):
    """Packed, in `folder`; returns the archive."""
    kind = "python" if form == PYTHON else "binary"
    assert form in (PYTHON, BINARY)
    path = folder / f"cifar-10-{kind}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in reversed(list(files(form))):  # the publisher's are in no order
            info = tarfile.TarInfo(f"{form}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path
