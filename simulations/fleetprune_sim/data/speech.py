"""Spoken digits: six people say 0 to 9 fifty times each, as images of loudness by pitch and time.

Jackson et al., "Free Spoken Digit Dataset", https://github.com/Jakobovski/free-spoken-digit-dataset,
CC BY-SA 4.0: WAV files `{digit}_{speaker}_{index}.wav`, 8 kHz, mono. The publisher's test set are
the indices 0 to 4. The data set is not part of this project: see `WHERE`.
"""

import io
import re
import wave
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import DataError
from fleetprune_sim.data.corpus import Corpus
from fleetprune_sim.data.partition import hold_out
from fleetprune_sim.data.sources import (
    VARIABLE,
    Arrays,
    fingerprint,
    kept,
    read_errors,
    required_folder,
)

LABELS = tuple(str(digit) for digit in range(10))
TEST_INDICES = 5  # of every digit and speaker, the publisher's choice
VALIDATION_SHARE = 0.1  # of the other recordings

RATE = 8000  # samples per second
LENGTH = RATE  # samples: 1 s; 20 of the publisher's 3,000 recordings are longer
MEL_BANDS = 40
WINDOW = 256  # samples: 32 ms
HOP = 128  # samples: 16 ms
RANGE_DB = 80.0  # what is further below a recording's loudest moment is silence
MAX_RECORDING = 1024 * 1024  # bytes; the longest of the publisher's has 37 kB
CHUNK = 256  # recordings transformed at once: 66 MB of spectra

ARCHIVE = "free-spoken-digit-dataset.zip"
WHERE = (
    "download the repository Jakobovski/free-spoken-digit-dataset from GitHub "
    f"(CC BY-SA 4.0) and put it as {ARCHIVE} or unpacked into the folder that {VARIABLE} names"
)

_RECORDING = re.compile(r"(?:^|/)(\d)_([^/]+)_(\d+)\.wav$")


def corpus(seed: int, cache: Path) -> Corpus:
    """One second of speech per sample, with its speaker as the owner.

    Args:
        seed: Decides what is in the validation set; the test set is the publisher's.
        cache: Folder for the spectra, which take seconds to compute.

    Returns:
        Loudness (n, 1, 40, 63) float32 by mel band and time, standardised with the training
        samples' mean and deviation.

    Raises:
        DataError: The data set is missing or malformed.
    """
    source = find()
    name = f"speech-{fingerprint(source, LENGTH, MEL_BANDS, WINDOW, HOP, RANGE_DB)}"
    found = kept(cache, name, lambda: _parse(source))
    x, y, speaker = found["x"], found["y"], found["speaker"]
    tested = found["index"] < TEST_INDICES
    rest = np.flatnonzero(~tested)
    tuned = rest[hold_out(y[rest], VALIDATION_SHARE, np.random.default_rng(seed))]
    train = np.setdiff1d(rest, tuned)
    if not (train.size and tuned.size and tested.any()):
        raise DataError(
            f"{source}: {train.size} recordings to train, {tuned.size} to validate, "
            f"{tested.sum()} to test, expected some of each: {WHERE}"
        )
    x = ((x - x[train].mean()) / max(float(x[train].std()), 1e-6))[:, None]
    return Corpus(
        x[train],
        y[train],
        x[tuned],
        y[tuned],
        x[tested],
        y[tested],
        LABELS,
        owner=speaker[train],
        test_owner=speaker[tested],
    )


def find(environment: Mapping[str, str] | None = None) -> Path:
    """The publisher's zip, or its folder `recordings`.

    Args:
        environment: Variables to look in; the process's own by default.

    Raises:
        DataError: It is not there; the message says where to download it.
    """
    folder = required_folder("the spoken digits are", WHERE, environment)
    if (folder / ARCHIVE).is_file():
        return folder / ARCHIVE
    # GitHub's own zip unpacks to a folder with the branch in its name.
    for place in (folder, *sorted(folder.glob("free-spoken-digit-dataset*"))):
        if (place / "recordings").is_dir():
            return place / "recordings"
    raise DataError(
        f"{folder} has neither {ARCHIVE} nor a folder recordings, nor has a folder "
        f"free-spoken-digit-dataset* in it: {WHERE}"
    )


def read_wave(name: str, data: bytes) -> NDArray[np.float32]:
    """The loudness of one WAV file, (samples,) in -1..1.

    Raises:
        DataError: It is no WAV file, or not 8 kHz, mono, 16 bits; the message names the file.
    """
    try:
        with wave.open(io.BytesIO(data)) as file:
            kind = (file.getframerate(), file.getnchannels(), 8 * file.getsampwidth())
            samples = file.getnframes()
            frames = file.readframes(samples)
    except (wave.Error, EOFError) as e:
        raise DataError(f"{name}: no WAV file: {str(e) or 'it is cut short'}") from e
    if kind != (RATE, 1, 16):
        raise DataError(
            f"{name}: {kind[0]} Hz, {kind[1]} channels, {kind[2]} bits, "
            f"expected {RATE} Hz, 1 channel, 16 bits"
        )
    if not samples or len(frames) != 2 * samples:
        raise DataError(f"{name}: {len(frames)} bytes of sound, expected {2 * samples}, above 0")
    return (np.frombuffer(frames, "<i2") / 32768.0).astype(np.float32)


def fit(sound: NDArray[np.float32]) -> NDArray[np.float32]:
    """Exactly `LENGTH` samples: silence on both sides of a shorter one, the middle of a longer."""
    missing = LENGTH - sound.size
    if missing >= 0:
        return np.pad(sound, (missing // 2, missing - missing // 2))
    return sound[-missing // 2 :][:LENGTH]


def log_mel(sounds: NDArray[np.float32]) -> NDArray[np.float32]:
    """Loudness in dB by mel band and time, `RANGE_DB` deep below each sound's own maximum.

    Args:
        sounds: (n, samples) in -1..1.

    Returns:
        (n, 40, 1 + samples // 128).
    """
    import librosa  # noqa: PLC0415  (half a second; a cached data set needs none of it)

    power = librosa.feature.melspectrogram(
        y=sounds, sr=RATE, n_fft=WINDOW, hop_length=HOP, n_mels=MEL_BANDS
    )
    loudness = librosa.power_to_db(power, top_db=None)  # its own top_db mixes the sounds
    floor = loudness.max(axis=(1, 2), keepdims=True) - RANGE_DB
    deep: NDArray[np.float32] = np.maximum(loudness, floor).astype(np.float32)
    return deep


def _parse(source: Path) -> Arrays:
    digits, speakers, indices, sounds = [], [], [], []
    for digit, speaker, index, name, data in _recordings(source):
        digits.append(digit)
        speakers.append(speaker)
        indices.append(index)
        sounds.append(fit(read_wave(name, data)))
    if not sounds:
        raise DataError(f"{source} holds no recording such as 0_george_0.wav: {WHERE}")
    starts = range(0, len(sounds), CHUNK)
    return {
        "x": np.concatenate([log_mel(np.stack(sounds[i : i + CHUNK])) for i in starts]),
        "y": np.array(digits, np.int64),
        "speaker": np.array(speakers),
        "index": np.array(indices, np.int64),
    }


def _recordings(source: Path) -> Iterator[tuple[int, str, int, str, bytes]]:
    """Digit, speaker, index, name and contents of every recording, in this order."""
    with read_errors(source):
        if source.is_dir():
            for digit, speaker, index, name in _ordered(path.name for path in source.iterdir()):
                yield digit, speaker, index, name, (source / name).read_bytes()
            return
        with zipfile.ZipFile(source) as archive:
            for digit, speaker, index, name in _ordered(archive.namelist()):
                size = archive.getinfo(name).file_size
                if size > MAX_RECORDING:
                    raise DataError(f"{name}: {size} bytes, expected at most {MAX_RECORDING}")
                yield digit, speaker, index, name, archive.read(name)


def _ordered(names: Iterable[str]) -> list[tuple[int, str, int, str]]:
    matches = (match for name in names if (match := _RECORDING.search(name)))
    return sorted((int(m[1]), m[2], int(m[3]), m.string) for m in matches)
