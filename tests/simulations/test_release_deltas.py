"""Two releases of one fleet, and the small file from one to the other."""

import hashlib

import numpy as np
import pytest

from fleetprune.delta import apply
from fleetprune_coordinator import release_deltas
from fleetprune_sim.loop import open_coordinator, train
from tests.simulations.fleets import tiny_config, tiny_devices


def released(folder, rounds, **release):
    config = tiny_config(folder, rounds=rounds, last_remask=2)
    # Wide enough that the graph around the weights is a small part of the file.
    model = config.model.model_copy(update={"arguments": config.model.arguments | {"hidden": 128}})
    update = {"model": model, "release": config.release.model_copy(update=release)}
    devices = tiny_devices()
    with open_coordinator(config.model_copy(update=update), devices) as coordinator:
        train(coordinator, devices)
        return coordinator.release(), coordinator.repository


def test_one_more_round_comes_as_a_delta_from_the_release_before(tmp_path):
    before, _ = released(tmp_path, 4, licence="MIT")
    after, repository = released(tmp_path, 5, licence="MIT")
    for name in ("large", "small"):
        manifest = after[name].manifest
        (delta,) = manifest.deltas
        assert (manifest.release, manifest.licence) == (2, "MIT")
        assert before[name].manifest.deltas == ()
        assert delta.base == before[name].manifest.sha256
        assert delta.target == f"releases/{name}/2/from-{delta.base}.delta"
        folder, _, file = delta.target.rpartition("/")
        data = repository.read(f"targets/{folder}/{delta.sha256}.{file}")
        made = apply(before[name].artifact.onnx, data, manifest.size)
        assert hashlib.sha256(made).hexdigest() == manifest.sha256
        assert delta.size == len(data) <= 0.3 * manifest.size


def test_a_release_that_stands_is_found_again_after_a_restart(tmp_path):
    first, _ = released(tmp_path, 2)
    again, _ = released(tmp_path, 2)
    assert again["large"].manifest == first["large"].manifest


def test_without_deltas_weights_are_not_rounded(tmp_path):
    released(tmp_path / "a", 2, deltas=False)
    after, _ = released(tmp_path / "a", 3, deltas=False)
    rounded, _ = released(tmp_path / "b", 3)
    assert after["large"].manifest.deltas == ()
    assert after["large"].artifact.onnx != rounded["large"].artifact.onnx
    assert len(after["large"].artifact.onnx) == pytest.approx(
        len(rounded["large"].artifact.onnx), abs=8
    )


def test_a_delta_that_is_not_worth_it_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(release_deltas, "WORTH_IT", 0.01)
    released(tmp_path, 2)
    after, _ = released(tmp_path, 3)
    assert after["large"].manifest.deltas == ()


def test_files_that_have_no_delta_are_released_all_the_same(tmp_path, monkeypatch, caplog):
    released(tmp_path, 2)
    monkeypatch.setattr("fleetprune_coordinator.delta_maker.apply", lambda base, delta, most: b"")
    after, _ = released(tmp_path, 3)
    assert after["large"].manifest.deltas == ()
    assert "class large, from release 1: no delta between these two files" in caplog.text
    assert np.isfinite(after["large"].manifest.macs)
