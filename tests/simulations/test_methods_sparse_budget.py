"""How many single weights fit a budget, and what a model under a mask costs on the wire."""

import math

import numpy as np
import pytest

from fleetprune.costs import Costs
from fleetprune.errors import BudgetError, FleetpruneError, WireError
from fleetprune.frame import decode_frame, encode_frame
from fleetprune.layout import Architecture, Role, Segment, TensorSpec
from fleetprune.messages import Codec
from fleetprune_coordinator.config import ClassConfig
from fleetprune_sim.methods.sparse.budget import (
    erdos_renyi_kernel,
    keep_counts,
    tightest,
    uniform,
)
from fleetprune_sim.methods.sparse.device import packed, unpacked
from fleetprune_sim.methods.sparse.frames import (
    SparseHeader,
    decode_sparse_model,
    encode_sparse_model,
)
from fleetprune_sim.methods.sparse.prunable import Prunable, SparseLayout, sparse_layout


def axis(n):
    return (Segment(units=n),)


def tensor(name, *shape, positions=0):
    axes = tuple(map(axis, shape))
    return TensorSpec(name=name, role=Role.PARAMETER, axes=axes, positions=positions)


CNN = Architecture(
    groups={},
    tensors=(
        tensor("stem", 4, 1, 3, 3, positions=64),
        tensor("norm", 4),
        tensor("body", 8, 4, 3, 3, positions=16),
        tensor("fc", 10, 8, positions=1),
        tensor("bias", 10),
    ),
)
"""36 weights at 64, 288 at 16, 80 at 1: 2304 + 4608 + 80 = 6992 multiply-accumulates."""


def test_weights_of_convolutions_and_linear_layers_are_prunable_norms_and_biases_are_not():
    layout = sparse_layout(CNN)
    assert layout.prunable == Prunable(36 + 4 + 288 + 80 + 10, ((0, 36), (40, 288), (328, 80)))
    assert (layout.costs, layout.fixed) == ((64, 16, 1), 0)
    assert layout.macs((36, 288, 80)) == 6992
    spared = sparse_layout(CNN, spare_ends=True)
    assert (spared.prunable.runs, spared.fixed) == (((40, 288),), 2304 + 80)


def test_a_model_of_two_layers_has_no_ends_to_spare():
    mlp = Architecture(
        groups={}, tensors=(tensor("a", 4, 2, positions=1), tensor("b", 3, 4, positions=1))
    )
    assert sparse_layout(mlp, spare_ends=True) == sparse_layout(mlp)


def test_the_tightest_class_decides_and_bytes_count_as_their_share():
    dense = Costs(artifact_bytes=2000, macs=1000, peak_activation_bytes=50)
    classes = {"a": ClassConfig(), "b": ClassConfig(macs_share=0.5), "c": ClassConfig(macs=400)}
    assert tightest(classes, dense) == 400
    assert tightest(classes | {"d": ClassConfig(flash_bytes=600)}, dense) == 300
    assert tightest({"a": ClassConfig(ram_bytes=1)}, dense) == 1000


def test_one_density_for_all_tensors_in_whole_weights():
    layout = SparseLayout(Prunable(30, ((0, 10), (10, 20))), ((10,), (20,)), (1, 2), 0)
    # 10 + 2 * 20 = 50 in all. At a density of 0.5: 5 + 2 * 10.
    assert keep_counts(layout, uniform(layout), 25) == (5, 10)
    # One more would fit the first tensor (1), then none the second (2).
    assert keep_counts(layout, uniform(layout), 26) == (6, 10)
    assert keep_counts(layout, uniform(layout), 27) == (5, 11)
    assert keep_counts(layout, uniform(layout), 10**9) == (10, 20)
    assert keep_counts(layout, uniform(layout), 3) == (1, 1)
    with pytest.raises(BudgetError, match=r"^2 multiply-accumulates .* which has at least 3: give"):
        keep_counts(layout, uniform(layout), 2)


def test_erdos_renyi_keeps_small_tensors_denser_and_none_above_whole():
    layout = sparse_layout(CNN)
    densities = erdos_renyi_kernel(layout)
    assert densities == pytest.approx((11 / 36, 18 / 288, 18 / 80))
    # In the relation 11 : 18 : 18, times 64, 16 and 1: 1010 a step.
    assert keep_counts(layout, densities, 1010) == (11, 18, 18)
    kept = keep_counts(layout, densities, 6000)
    assert (kept[0], kept[2]) == (36, 80)
    assert 6000 - 16 < layout.macs(kept) <= 6000


@pytest.mark.parametrize("share", [0.03, 0.1, 0.37, 0.9])
@pytest.mark.parametrize("relation", [uniform, erdos_renyi_kernel])
def test_the_budget_is_met_and_used_up_to_less_than_a_weight_of_each_tensor(share, relation):
    layout = sparse_layout(CNN)
    budget = math.floor(share * 6992)
    kept = keep_counts(layout, relation(layout), budget)
    assert layout.macs(kept) <= budget < layout.macs([k + 1 for k in kept])
    assert all(1 <= k <= n for k, n in zip(kept, layout.prunable.sizes, strict=True))


# ---- frames


def model(density, n=60_000, others=500, seed=0):
    rng = np.random.default_rng(seed)
    prunable = Prunable(n + others, ((0, n // 3), (n // 3 + others, n - n // 3)))
    mask = np.zeros(n, np.bool_)
    mask[rng.permutation(n)[: round(density * n)]] = True
    params = rng.normal(size=n + others).astype(np.float32) * prunable.support(mask)
    stats = rng.normal(size=40).astype(np.float32)
    header = SparseHeader(
        mask_version=3,
        round=7,
        codec=Codec.FP32,
        params=int(prunable.support(mask).sum()),
        stats=40,
        runs=prunable.runs,
        kept=int(mask.sum()),
    )
    return prunable, mask, params, stats, header


def encoded(found, masks):
    prunable, mask, params, stats, header = found
    return encode_sparse_model(header, params[prunable.support(mask)], stats, masks)


def bound(found):
    """Bytes of the values and of the mask's entropy."""
    prunable, _, _, stats, header = found
    p = header.kept / prunable.n
    entropy = -(p * math.log2(p) + (1 - p) * math.log2(1 - p))
    return 4 * (header.params + stats.size), prunable.n * entropy / 8


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5])
def test_a_model_costs_its_values_and_the_entropy_of_its_mask(density):
    found = model(density)
    values, mask = bound(found)
    with_mask = encoded(found, (found[1],))
    without = encoded(found, ())
    assert values < len(without) < values + 500
    assert 0.99 * mask < len(with_mask) - len(without) < 1.03 * mask + 60
    assert len(with_mask) < 1.03 * (values + mask) + 500


def test_a_model_comes_back_as_it_was_with_its_mask_or_with_one_that_was_kept():
    found = prunable, mask, params, stats, _ = model(0.1, n=600, others=9)
    size = {"parameters": 609, "statistics": 40}
    for masks, known in (((mask,), None), ((), mask)):
        payload = decode_sparse_model(encoded(found, masks), **size, known=lambda n, k=known: k)
        np.testing.assert_array_equal(payload.params, params)
        np.testing.assert_array_equal(payload.stats, stats)
        np.testing.assert_array_equal(payload.mask, mask)
        assert (payload.mask_version, payload.round, payload.prunable) == (3, 7, prunable)
    with pytest.raises(WireError, match=r"^a model without mask 3, which is not here$"):
        decode_sparse_model(encoded(found, ()), **size, known=lambda n: None)
    with pytest.raises(WireError, match=r"^a model without mask 3, which is not here$"):
        decode_sparse_model(encoded(found, ()), **size, known=lambda n: ~mask)


def test_candidates_travel_with_the_union():
    prunable, mask, params, stats, header = model(0.2, n=600, others=9)
    half = mask & (np.arange(600) < 300)
    header = header.model_copy(update={"candidates": (header.kept, int(half.sum()))})
    data = encode_sparse_model(header, params[prunable.support(mask)], stats, (mask, mask, half))
    payload = decode_sparse_model(data, parameters=609, statistics=40, known=lambda n: None)
    assert len(payload.candidates) == 2
    np.testing.assert_array_equal(payload.candidates[1], half)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"runs": ((0, 200), (150, 400))},
            r"^prunable weights .* overlap, or lie outside 0\.\.609$",
        ),
        ({"runs": ((0, 200), (209, 401))}, "overlap, or lie outside"),
        ({"runs": ((209, 400), (0, 200))}, "overlap, or lie outside"),
        ({"kept": 61}, "positions"),
        ({"kept": 601}, r"^601 positions, expected 0\.\.600$"),
        ({"candidates": (3,)}, r"^model without sections \['mask0'\]$"),
    ],
)
def test_a_model_that_contradicts_itself_is_refused(changes, message):
    found = model(0.1, n=600, others=9)
    _, sections = decode_frame(encoded(found, (found[1],)), "MODL")
    data = encode_frame("MODL", found[4].model_copy(update=changes).to_bytes(), sections)
    with pytest.raises(WireError, match=message):
        decode_sparse_model(data, parameters=609, statistics=40, known=lambda n: None)


def test_every_cut_of_a_model_is_refused():
    found = model(0.1, n=60, others=9)
    data = encoded(found, (found[1],))
    assert set(decode_frame(data, "MODL")[1]) == {"mask", "params", "stats"}
    for end in range(len(data)):
        with pytest.raises(FleetpruneError):
            decode_sparse_model(data[:end], parameters=69, statistics=40, known=lambda n: found[1])


def test_a_device_keeps_a_mask_in_an_eighth_of_its_numbers():
    mask = np.random.default_rng(0).random(61) < 0.3
    assert packed(mask).shape == (8,)
    np.testing.assert_array_equal(unpacked(packed(mask), 61), mask)
