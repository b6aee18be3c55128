import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fleetprune.errors import DataError
from fleetprune_sim.data import partition
from fleetprune_sim.data.partition import PartitionSpec, deal, dirichlet, draw, hold_out, split


def rng(seed=0):
    return np.random.default_rng(seed)


def test_hold_out_takes_the_share_of_each_label():
    labels = np.repeat([0, 1, 2], [10, 20, 30])
    held = hold_out(labels, 0.1, rng())
    assert np.bincount(labels[held]).tolist() == [1, 2, 3]
    assert (np.diff(held) > 0).all()


def test_hold_out_leaves_a_single_sample_where_it_is():
    assert hold_out(np.array([0, 1, 1]), 0.2, rng()).size == 1
    assert hold_out(np.array([0, 1, 2]), 0.2, rng()).size == 0
    assert hold_out(np.array([0, 1, 1]), 0.0, rng()).size == 0
    assert hold_out(np.array([], dtype=np.int64), 0.5, rng()).size == 0


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_hold_out_refuses_a_share_out_of_range(share):
    with pytest.raises(DataError, match=f"is {share}, expected 0 <= share < 1"):
        hold_out(np.array([0]), share, rng())


@settings(max_examples=60, deadline=None)
@given(
    devices=st.integers(1, 9),
    least=st.integers(0, 12),
    alpha=st.sampled_from([0.05, 0.5, 100.0]),
    seed=st.integers(0, 2**31),
)
def test_dirichlet_is_a_partition_with_a_minimum(devices, least, alpha, seed):
    labels = rng(seed).integers(0, 4, 120)
    parts = dirichlet(labels, devices, alpha, least, rng(seed))
    assert len(parts) == devices
    assert sorted(np.concatenate(parts).tolist()) == list(range(120))
    assert min(part.size for part in parts) >= least


def test_dirichlet_is_seeded():
    labels = np.arange(300) % 5
    first, second, other = (dirichlet(labels, 4, 0.5, 10, rng(s)) for s in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert any(a.size != b.size or (a != b).any() for a, b in zip(first, other, strict=True))


def test_small_alpha_gives_labels_to_few_devices():
    labels = np.arange(2000) % 10

    def largest_share(alpha):
        parts = dirichlet(labels, 5, alpha, 10, rng())
        counts = np.array([np.bincount(labels[part], minlength=10) for part in parts])
        return (counts.max(axis=0) / counts.sum(axis=0)).mean()

    assert largest_share(0.05) > 0.75
    assert largest_share(1000.0) < 0.3


def test_dirichlet_refuses_too_few_samples():
    with pytest.raises(DataError, match=r"^7 samples are too few for 2 devices with at least 4 "):
        dirichlet(np.zeros(7, np.int64), 2, 0.5, 4, rng())
    with pytest.raises(DataError, match="expected devices >= 1, alpha > 0"):
        dirichlet(np.zeros(7, np.int64), 2, 0.0, 1, rng())


def test_deal_goes_round_in_turn():
    assert deal(list("abcdefg"), [2, 1]) == [["a", "b", "d", "e", "g"], ["c", "f"]]


def test_deal_refuses_an_empty_part():
    with pytest.raises(DataError, match=r"^1 items are too few for 2 parts$"):
        deal(["a"], [1, 1])
    with pytest.raises(DataError, match=r"^no part takes any item$"):
        deal(["a"], [])


def pool(labels=10, samples=480):
    """Labels and owners: label i is everybody's, `a` has half of all samples."""
    y = np.arange(samples) % labels
    owner = np.array(["a", "a", "b", "c"])[np.arange(samples) // labels % 4]
    return y, owner


def spec(**keys):
    return PartitionSpec(**keys)


RULES = {
    "iid": spec(kind="iid"),
    "dirichlet": spec(alpha=0.3, least=3),
    "pathological": spec(kind="pathological", labels_per_device=3),
    "natural": spec(kind="natural", alpha=0.3, least=2),
}


@pytest.mark.parametrize("large", [False, True], ids=["flower", "arrays"])
@pytest.mark.parametrize("rule", RULES)
def test_split_is_a_seeded_partition(rule, large, monkeypatch):
    monkeypatch.setattr(partition, "FLOWER_DEVICES", 0 if large else 1000)
    y, owner = pool()
    parts, same, other = (split(y, owner, RULES[rule], 20, seed) for seed in (1, 1, 2))
    assert len(parts) == 20
    assert sorted(np.concatenate(parts).tolist()) == list(range(480))
    assert min(part.size for part in parts) >= RULES[rule].least
    assert all((np.diff(part) > 0).all() and part.dtype == np.intp for part in parts)
    assert all((a == b).all() for a, b in zip(parts, same, strict=True))
    assert any(a.size != b.size or (a != b).any() for a, b in zip(parts, other, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_more_devices_than_flower_splits_for_get_the_same(rule, monkeypatch):
    y, owner = pool()
    by_flower = split(y, owner, RULES[rule], 30, 5)
    monkeypatch.setattr(partition, "FLOWER_DEVICES", 29)
    by_arrays = split(y, owner, RULES[rule], 30, 5)
    assert all((a == b).all() for a, b in zip(by_flower, by_arrays, strict=True))


def test_iid_parts_are_equal_and_mixed():
    y, _ = pool(labels=2, samples=402)
    parts = split(y, None, spec(kind="iid"), 4, 0)
    assert sorted(part.size for part in parts) == [100, 100, 101, 101]
    assert all(30 < y[part].sum() < 70 for part in parts)


def test_alpha_decides_how_labels_gather():
    y, _ = pool(samples=4000)

    def largest_share(alpha):
        parts = split(y, None, spec(alpha=alpha), 5, 0)
        counts = np.array([np.bincount(y[part], minlength=10) for part in parts])
        return (counts.max(axis=0) / counts.sum(axis=0)).mean()

    assert largest_share(0.05) > 0.7
    assert largest_share(1000.0) < 0.3


def test_pathological_devices_have_exactly_so_many_labels():
    y, _ = pool()
    parts = split(y, None, RULES["pathological"], 20, 0)
    assert {np.unique(y[part]).size for part in parts} == {3}


def test_one_device_per_owner():
    y, owner = pool()
    parts = split(y, owner, spec(kind="natural"), 3, 0)
    assert [set(owner[part]) for part in parts] == [{"a"}, {"b"}, {"c"}]
    assert [part.size for part in parts] == [240, 120, 120]


def test_owners_with_more_samples_get_more_devices():
    y, owner = pool()
    parts = split(y, owner, spec(kind="natural", alpha=0.1), 12, 0)
    names = [set(owner[part].tolist()) for part in parts]
    assert names == [{"a"}] * 6 + [{"b"}] * 3 + [{"c"}] * 3
    counts = np.array([np.bincount(y[part], minlength=10) for part in parts[:6]])
    assert (counts.max(axis=0) / counts.sum(axis=0)).mean() > 0.5  # further by label


@pytest.mark.parametrize(
    ("rule", "devices", "message"),
    [
        (
            spec(least=49),
            10,
            "480 samples are too few for 10 devices with at least 49 each: simulate fewer devices, "
            "or raise samples_per_device",
        ),
        (spec(), 0, "cannot split samples over 0 devices, expected 1 or more"),
        (
            spec(kind="natural"),
            2,
            "partition natural: 2 devices are fewer than the data's 3 owners, expected 3 or more",
        ),
        (
            spec(kind="natural", least=121),
            3,
            "120 samples are too few for 1 devices of b with at least 121 each: simulate fewer "
            "devices, or raise samples_per_device",
        ),
        (
            spec(kind="pathological", labels_per_device=11),
            5,
            "labels_per_device 11, expected at most the data's 10",
        ),
        (
            spec(kind="pathological", labels_per_device=1),
            8,
            "8 devices with 1 labels each leave labels 8, 9 to nobody: simulate more devices, or "
            "raise labels_per_device",
        ),
        (
            spec(kind="pathological", labels_per_device=1, least=25),
            19,
            "a device would have 24 samples, expected at least 25: simulate fewer devices, or "
            "raise samples_per_device",
        ),
        (
            spec(kind="pathological", labels_per_device=5),
            200,
            "200 devices with 5 labels each share a label that has fewer samples than these: "
            "simulate fewer devices, or raise samples_per_device",
        ),
    ],
)
@pytest.mark.parametrize("large", [False, True], ids=["flower", "arrays"])
def test_a_partition_that_cannot_be_says_what_to_change(rule, devices, message, large, monkeypatch):
    monkeypatch.setattr(partition, "FLOWER_DEVICES", 0 if large else 1000)
    y, owner = pool()
    with pytest.raises(DataError) as caught:
        split(y, owner, rule, devices, 0)
    assert str(caught.value) == message


def test_natural_needs_owners():
    with pytest.raises(DataError, match="does not say whose its samples are"):
        split(pool()[0], None, spec(kind="natural"), 3, 0)


def test_a_rule_is_a_table_and_refuses_what_it_does_not_know():
    assert PartitionSpec.model_validate({"kind": "iid"}) == spec(kind="iid")
    for wrong in ({"kind": "fair"}, {"alpha": 0}, {"labels_per_device": 0}, {"beta": 1}):
        with pytest.raises(ValidationError):
            PartitionSpec.model_validate(wrong)


def test_ten_thousand_devices_share_a_thousand_images():
    y = np.arange(1170) % 10
    chosen = draw(y, 10_000 * 48, 0)
    parts = split(y[chosen], None, spec(alpha=0.3, least=8), 10_000, 0)
    assert len(parts) == 10_000
    assert min(part.size for part in parts) == 8
    assert sum(part.size for part in parts) == 480_000


def test_fewer_samples_than_there_are_keep_each_labels_share():
    y = np.repeat([0, 1, 2], [60, 30, 10])
    chosen = draw(y, 10, 0)
    assert np.bincount(y[chosen]).tolist() == [6, 3, 1]
    assert np.unique(chosen).size == 10
    assert (chosen != np.sort(chosen)).any()
    assert np.bincount(y[draw(y, 11, 0)]).tolist() == [7, 3, 1]  # of 6.6, 3.3, 1.1
    assert (draw(y, 10, 0) == chosen).all()
    assert (np.sort(draw(y, 10, 1)) != np.sort(chosen)).any()


def test_more_samples_than_there_are_repeat_all_alike():
    y = np.repeat([0, 1, 2], [60, 30, 10])
    chosen = draw(y, 250, 0)
    times = np.bincount(chosen, minlength=100)
    assert set(times.tolist()) == {2, 3}
    assert np.bincount(y[chosen]).tolist() == [150, 75, 25]
    assert (np.diff(np.flatnonzero(chosen == chosen[0])) > 1).any()  # not side by side


def test_there_must_be_something_to_draw():
    for y, total in ((np.zeros(0, np.int64), 3), (np.zeros(5, np.int64), 0)):
        with pytest.raises(DataError, match=rf"^cannot choose {total} of {y.size} samples"):
            draw(y, total, 0)


CHILD = """
import socket, sys

def refuse(*arguments):
    raise OSError("no network here")

socket.socket.connect = socket.getaddrinfo = refuse
import numpy as np
from fleetprune_sim.data.partition import PartitionSpec, split

assert not {"datasets", "flwr_datasets", "pyarrow"} & sys.modules.keys()
owner = np.array(["a", "b"] * 20)
for kind in ("iid", "dirichlet", "pathological", "natural"):
    split(np.arange(40) % 4, owner, PartitionSpec(kind=kind), 4, 0)
assert "flwr_datasets" in sys.modules
"""


def test_flower_is_imported_late_says_nothing_and_leaves_nothing(tmp_path):
    hidden = {"MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME"}
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    (tmp_path / "tmp").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        env=environment | {"HOME": str(tmp_path), "TMPDIR": str(tmp_path / "tmp")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
