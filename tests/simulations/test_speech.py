"""On tones in the publisher's layout that this file makes, and on the publisher's where they are.

Those are looked for in FLEETPRUNE_DATA.
"""

import io
import itertools
import wave
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fleetprune.errors import DataError
from fleetprune_sim.data import speech
from fleetprune_sim.data.sources import VARIABLE

SPEAKERS = ("anna", "ben_2")
INDICES = 15


def wav(sound, rate=8000, channels=1, width=2):
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setframerate(rate)
        writer.setnchannels(channels)
        writer.setsampwidth(width)
        writer.writeframes(np.asarray(sound, f"<i{width}").tobytes())
    return file.getvalue()


def tone(hertz, samples, loudness=8000):
    return loudness * np.sin(2 * np.pi * hertz * np.arange(samples) / 8000)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Each digit is a tone; recordings last 0.3 to 1.2 s."""
    folder = tmp_path_factory.mktemp("speech")
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(folder / speech.ARCHIVE, "w") as archive:
        for digit in range(10):
            for speaker in SPEAKERS:
                for index in range(INDICES):
                    sound = tone(300 + 300 * digit, int(rng.integers(2400, 9600)))
                    archive.writestr(f"recordings/{digit}_{speaker}_{index}.wav", wav(sound))
    return folder


def test_the_publishers_split_and_a_validation_set(made, monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(made))
    corpus, same, other = (speech.corpus(seed, tmp_path) for seed in (0, 0, 1))
    assert corpus.input_shape == (1, 40, 63)
    assert corpus.x.dtype == corpus.x_test.dtype == np.float32
    assert np.bincount(corpus.y_test).tolist() == [2 * 5] * 10
    assert np.bincount(corpus.y_validation).tolist() == [2] * 10  # a tenth of 20
    assert np.bincount(corpus.y).tolist() == [18] * 10
    assert np.unique(corpus.owner).tolist() == list(SPEAKERS)
    assert np.unique(corpus.test_owner, return_counts=True)[1].tolist() == [50, 50]
    assert abs(corpus.x.mean(dtype=np.float64)) < 1e-4
    assert abs(corpus.x.std(dtype=np.float64) - 1) < 1e-4
    assert (corpus.x_validation == same.x_validation).all()
    assert corpus.x_validation.shape == other.x_validation.shape
    assert (corpus.x_validation != other.x_validation).any()
    assert (corpus.y_test == other.y_test).all()
    # A higher digit is a higher tone, and so is its loudest band, whatever else was mixed up.
    loudest = corpus.x[:, 0].mean(axis=2).argmax(axis=1)
    bands = [np.unique(loudest[corpus.y == digit]) for digit in range(10)]
    assert all(low.max() < high.min() for low, high in itertools.pairwise(bands))


@pytest.mark.parametrize("place", ["", "free-spoken-digit-dataset", "free-spoken-digit-dataset-m"])
def test_unpacked_recordings_read_the_same(made, monkeypatch, tmp_path, place):
    monkeypatch.setenv(VARIABLE, str(made))
    zipped = speech.corpus(0, tmp_path / "cache")
    with zipfile.ZipFile(made / speech.ARCHIVE) as archive:
        archive.extractall(tmp_path / "data" / place)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "data"))
    unpacked = speech.corpus(0, tmp_path / "cache")
    assert (unpacked.x == zipped.x).all()
    assert (unpacked.owner == zipped.owner).all()
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_spectra_are_computed_once(made, monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(made))
    first = speech.corpus(0, tmp_path)

    def refuse(source):
        raise AssertionError

    monkeypatch.setattr(speech, "_parse", refuse)
    assert (speech.corpus(0, tmp_path).x == first.x).all()
    monkeypatch.setattr(speech, "RANGE_DB", 60.0)
    with pytest.raises(AssertionError):
        speech.corpus(0, tmp_path)


def test_a_sound_is_made_to_fit_around_its_middle():
    assert speech.fit(np.ones(4, np.float32)).nonzero()[0].tolist() == [3998, 3999, 4000, 4001]
    assert speech.fit(np.ones(3, np.float32)).nonzero()[0].tolist() == [3998, 3999, 4000]
    assert speech.fit(np.arange(8000.0))[[0, -1]].tolist() == [0, 7999]
    assert speech.fit(np.arange(8001.0)).size == 8000
    assert speech.fit(np.arange(8004.0))[[0, -1]].tolist() == [2, 8001]


def test_loudness_does_not_depend_on_the_other_sounds():
    loud, quiet = (speech.fit(tone(440, 4000, k).astype(np.float32) / 32768) for k in (32000, 3.2))
    both = speech.log_mel(np.stack([loud, quiet]))
    np.testing.assert_allclose(both[1], speech.log_mel(quiet[None])[0], rtol=1e-5)
    assert both.shape == (2, 40, 63)
    for spectrum in both:
        assert spectrum.max() - spectrum.min() <= 80.01
        assert spectrum[:, 0].max() == spectrum.min()  # silence before it begins
    difference = both[0].max() - both[1].max()
    assert difference == pytest.approx(80, abs=0.5)  # a factor of 10,000


def test_a_sound_is_read_exactly():
    values = [0, 1, -1, 32767, -32768]
    sound = speech.read_wave("a.wav", wav(values))
    assert sound.dtype == np.float32
    assert (sound * 32768).tolist() == values


GOOD = wav(range(100))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no WAV file: it is cut short"),
        (b"RIFF" + bytes(40), "no WAV file: not a WAVE file"),
        (GOOD[:30], "no WAV file: "),
        (GOOD[:-50], "150 bytes of sound, expected 200, above 0"),
        (wav([]), "0 bytes of sound, expected 0, above 0"),
        (wav([1], rate=16000), "16000 Hz, 1 channels, 16 bits, expected 8000 Hz, 1 channel, 16 b"),
        (wav([1, 2], channels=2), "8000 Hz, 2 channels, 16 bits, expected 8000 Hz"),
        (wav([1], width=4), "8000 Hz, 1 channels, 32 bits, expected 8000 Hz"),
    ],
)
def test_a_malformed_recording_is_named(content, message):
    with pytest.raises(DataError) as caught:
        speech.read_wave("0_a_0.wav", content)
    assert str(caught.value).startswith(f"0_a_0.wav: {message}")
    assert "\n" not in str(caught.value)


def test_missing_recordings_say_where_to_get_them(tmp_path):
    for environment, start in (
        (
            {},
            f"the spoken digits are looked for in the folder that {VARIABLE} names, "
            "which is not set: download ",
        ),
        (
            {VARIABLE: str(tmp_path)},
            f"{tmp_path} has neither {speech.ARCHIVE} nor a folder recordings, nor has a folder "
            "free-spoken-digit-dataset* in it: download ",
        ),
        (
            {VARIABLE: str(tmp_path / "no")},
            f"{tmp_path / 'no'}, which {VARIABLE} names, does not exist: download ",
        ),
    ):
        with pytest.raises(DataError) as caught:
            speech.find(environment)
        message = str(caught.value)
        assert message.startswith(start)
        for hint in ("Jakobovski/free-spoken-digit-dataset", "CC BY-SA 4.0", VARIABLE):
            assert hint in message
        assert "\n" not in message


def test_an_archive_that_is_damaged_empty_or_without_a_test_set(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    archive = tmp_path / speech.ARCHIVE
    archive.write_bytes(b"no zip")
    with pytest.raises(DataError, match=r"is damaged \(File is not a zip file\): download it"):
        speech.corpus(0, tmp_path / "cache")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("README.md", "")
    with pytest.raises(DataError, match=r"holds no recording such as 0_george_0[.]wav: download"):
        speech.corpus(0, tmp_path / "cache")
    with zipfile.ZipFile(archive, "w") as file:
        for index in range(5, 15):
            file.writestr(f"recordings/0_a_{index}.wav", GOOD)
    with pytest.raises(DataError, match="9 recordings to train, 1 to validate, 0 to test, expec"):
        speech.corpus(0, tmp_path / "cache")


def test_a_recording_of_absurd_size_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with zipfile.ZipFile(tmp_path / speech.ARCHIVE, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("recordings/0_a_0.wav", bytes(2**20 + 1))
    with pytest.raises(DataError, match=r"0_a_0[.]wav: 1048577 bytes, expected at most 1048576"):
        speech.corpus(0, tmp_path / "cache")


def test_the_publishers_recordings(tmp_path, monkeypatch):
    try:
        speech.find()
    except DataError:
        pytest.skip(f"{speech.ARCHIVE} is not in {VARIABLE}; made recordings are tested instead")
    corpus = speech.corpus(0, tmp_path)
    assert np.bincount(corpus.y_test).tolist() == [30] * 10
    assert np.bincount(corpus.y_validation).tolist() == [27] * 10
    assert np.bincount(corpus.y).tolist() == [243] * 10
    assert len(np.unique(corpus.owner)) == 6
    monkeypatch.setattr(speech, "_parse", None)  # what was computed once is kept
    assert (speech.corpus(0, tmp_path).x == corpus.x).all()
    assert Path(next(tmp_path.iterdir())).stat().st_size < 40e6
