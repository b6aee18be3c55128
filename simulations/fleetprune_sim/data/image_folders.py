"""Images in one folder per class."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")


def image_files(folder: Path, labels: Sequence[str]) -> tuple[list[Path], NDArray[np.int64]]:
    """The images below `folder`, by class and name, and the index of each one's label.

    Raises:
        DataError: A folder has no label's name, or a label has no images.
    """
    unknown = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name not in labels)
    if unknown:
        raise DataError(f"{folder / unknown[0]}: expected folders {', '.join(labels)} alone")
    paths: list[Path] = []
    y: list[int] = []
    for label, name in enumerate(labels):
        inside = folder / name
        found = sorted(inside.iterdir()) if inside.is_dir() else []
        images = [p for p in found if p.suffix.lower() in SUFFIXES]
        if not images:
            raise DataError(f"{inside} has no images, expected files {', '.join(SUFFIXES)}")
        paths += images
        y += [label] * len(images)
    return paths, np.array(y, np.int64)


def read_images(paths: Sequence[Path], side: int) -> NDArray[np.uint8]:
    """Read colour images, resized to `side` times `side` where they are not so already.

    Returns:
        (n, 3, side, side).

    Raises:
        DataError: A file is no image; names it.
    """
    from PIL import Image  # noqa: PLC0415  (only those who have images in folders need it)

    x = np.empty((len(paths), 3, side, side), np.uint8)
    for number, path in enumerate(paths):
        try:
            with Image.open(path) as image:
                colours = image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
            raise DataError(f"{path} is no image that can be read: {e}") from e
        if colours.size != (side, side):
            colours = colours.resize((side, side), Image.Resampling.BILINEAR)
        x[number] = np.asarray(colours).transpose(2, 0, 1)
    return x
