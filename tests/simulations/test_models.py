"""Every network can be traced, pruned in every group, and exported, in the shapes of the tasks."""

import numpy as np
import pytest
import torch

from fleetprune.costs import costs, parameters
from fleetprune.layout import Role, axis_indices
from fleetprune_coordinator.graphs import export_infer, export_observe, export_train_step
from fleetprune_coordinator.graphs.verification import native_block
from fleetprune_coordinator.onnx_costs import file_costs
from fleetprune_coordinator.resize import resize, statistics_of
from fleetprune_coordinator.selfcheck import randomised
from fleetprune_coordinator.tracing import trace
from fleetprune_sim import models

torch.set_num_threads(1)  # on a busy machine, threads that wait for each other take minutes

MODELS = {
    "mlp": (lambda: models.mlp(12, 16, 4), (12,)),
    "digits_cnn": (models.digits_cnn, (1, 8, 8)),
    "cnn1d": (models.cnn1d, (6, 192)),
    "ds_cnn": (lambda: models.ds_cnn(channels=1), (1, 40, 63)),
    "resnet8": (lambda: models.resnet8(channels=1, stride=2), (1, 28, 28)),
    "se_resnet8": (lambda: models.se_resnet8(channels=1, stride=2, reduction=8), (1, 28, 28)),
    "mobilenet_v2": (lambda: models.mobilenet_v2(0.1, channels=2, stride=2), (2, 32, 32)),
    "efficientnet_lite0": (
        lambda: models.efficientnet_lite0(0.1, channels=1, stride=2),
        (1, 32, 32),
    ),
    "transformer": (lambda: models.transformer(6, 64, 5, width=16, heads=4, hidden=24), (6, 64)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_cut_network_equals_one_with_the_units_zeroed(name):
    """All groups at once and each alone, to 1e-5 of the largest output in float32."""
    make, shape = MODELS[name]
    dense = randomised(make(), torch.float32)
    architecture = trace(dense, torch.zeros(1, *shape))
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    tensors = dict([*dense.named_parameters(), *statistics_of(dense)])
    whole = {n: t.clone() for n, t in tensors.items()}
    half = {group: units // 2 for group, units in architecture.groups.items()}
    alone = [architecture.dense | {group: units} for group, units in half.items()]
    with torch.no_grad():
        uncut = dense(x)
        for keep in [half, *alone]:
            cut = resize(dense, architecture, keep)(x)
            for spec in architecture.tensors:
                axes = [axis_indices(axis, architecture.groups, keep) for axis in spec.axes]
                kept = tuple(torch.from_numpy(i) for i in np.ix_(*axes))
                zeroed = torch.zeros_like(whole[spec.name])
                zeroed[kept] = whole[spec.name][kept]
                tensors[spec.name].copy_(zeroed)
            want = dense(x)
            bound = 1e-5 * float(want.abs().max())
            torch.testing.assert_close(cut, want, rtol=0, atol=bound)
            assert keep is not half or (cut - uncut).abs().max() > 100 * bound
            for spec in architecture.tensors:
                tensors[spec.name].copy_(whole[spec.name])


def test_heads_and_hidden_units_of_a_transformer_are_cut_and_its_tokens_are_not():
    architecture = trace(models.transformer(), torch.zeros(1, 6, 128))
    assert architecture.groups == {
        **{"body.0.attention": 4, "body.0.perceptron.0": 128},
        **{"body.1.attention": 4, "body.1.perceptron.0": 128},
    }
    tokens = "body.0.first (LayerNorm) calls layer_norm across its units"
    assert architecture.uncut["patches"] == tokens
    assert architecture.channels["body.0.attention"] == 16


def test_windows_are_whole_patches():
    with pytest.raises(ValueError) as caught:
        models.transformer(length=100)
    assert str(caught.value) == "windows of 100 samples, expected a multiple of the patch, 8"


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: models.efficientnet_lite0(0.1, channels=1), (1, 16, 16)),
        (lambda: models.se_resnet8(channels=1, stride=2), (1, 16, 16)),
        (lambda: models.transformer(6, 64, 5, width=16, hidden=24), (6, 64)),
    ],
    ids=["efficientnet_lite0", "se_resnet8", "transformer"],
)
def test_all_three_graphs_of_a_cut_network_can_be_made(make, shape):
    """They are held against torch as they are made; dense networks' are made elsewhere."""
    torch.manual_seed(0)
    model, x = make(), torch.randn(4, *shape)
    architecture = trace(model, x[:1])
    keep = {group: max(1, units // 3) for group, units in architecture.groups.items()}
    small = resize(model, architecture, keep)
    weights = [s.name for s in architecture.role(Role.PARAMETER)]
    train = export_train_step(small, x, batch=4, block=native_block())
    observe = export_observe(small, x, batch=4, observed=architecture.observed)
    infer = export_infer(small, x[:1])
    count = parameters(architecture, keep)
    assert train.meta.parameters == observe.meta.parameters == count
    assert 4 * count * 0.9 < len(infer.onnx) < 4 * count + 200 * len(weights) + 6000
    assert file_costs(infer.onnx).macs == costs(architecture, keep).macs


def test_efficientnet_lite0_is_the_published_one():
    model = models.efficientnet_lite0(classes=1000, stride=2)
    assert sum(p.numel() for p in model.parameters()) == 4_652_008
    total = []

    def count(layer, _, out):
        total.append(layer.weight.numel() * out[0, 0].numel())

    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            layer.register_forward_hook(count)
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 224, 224))
    assert 380e6 < sum(total) < 410e6  # Google's figure is 407 M, and counts more than products


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (models.mlp, (64,)),
        (models.digits_cnn, (1, 8, 8)),
        (models.cnn1d, (6, 128)),
        (models.ds_cnn, (3, 32, 32)),
        (models.resnet8, (3, 32, 32)),
        (models.mobilenet_v2, (3, 32, 32)),
        (models.efficientnet_lite0, (3, 32, 32)),
        (models.se_resnet8, (3, 32, 32)),
        (models.transformer, (6, 128)),
    ],
)
def test_defaults_fit_the_shape_that_is_documented(make, shape):
    with torch.no_grad():
        assert make().eval()(torch.zeros(2, *shape)).shape[0] == 2


@pytest.mark.parametrize(
    "make",
    [
        models.ds_cnn,
        models.resnet8,
        models.se_resnet8,
        models.mobilenet_v2,
        models.efficientnet_lite0,
    ],
)
def test_channels_and_the_first_stride_can_be_chosen(make):
    first = next(m for m in make(channels=5, stride=3).modules() if isinstance(m, torch.nn.Conv2d))
    assert first.in_channels == 5
    assert first.stride == (3, 3)
