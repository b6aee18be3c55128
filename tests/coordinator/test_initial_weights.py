"""Starting from a checkpoint, with a new head and with frozen layers."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fleetprune.errors import ConfigError
from fleetprune_coordinator.initial_weights import frozen_parameters, load_initial, starts_anew
from fleetprune_sim import models

FACTORY = "nets:make"


def classifier(classes=10, seed=0):
    torch.manual_seed(seed)
    return models.digits_cnn(classes)


def saved(folder, state, name):
    path = folder / name
    if name.endswith(".safetensors"):
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        torch.save(dict(state), path)
    return path


def same(model, state, *, without=()):
    return all(
        torch.equal(value, state[name])
        for name, value in model.state_dict().items()
        if not name.startswith(without)
    )


@pytest.mark.parametrize("name", ["start.pt", "start.safetensors", "start.bin"])
def test_torch_and_safetensors_files(tmp_path, name):
    trained = classifier(seed=1)
    path = saved(tmp_path, trained.state_dict(), name)
    model = classifier()
    load_initial(model, path, factory=FACTORY)
    assert same(model, trained.state_dict())


def test_a_safetensors_file_by_any_name(tmp_path):
    trained = classifier(seed=1)
    path = saved(tmp_path, trained.state_dict(), "start.safetensors").rename(tmp_path / "weights")
    model = classifier()
    load_initial(model, path, factory=FACTORY)
    assert same(model, trained.state_dict())


def test_half_precision_becomes_float32(tmp_path):
    trained = classifier(seed=1).half()
    model = classifier()
    path = saved(tmp_path, trained.state_dict(), "start.safetensors")
    load_initial(model, path, factory=FACTORY)
    assert model.fc.weight.dtype == torch.float32
    assert torch.equal(model.fc.weight, trained.fc.weight.float())


@pytest.mark.parametrize("name", ["start.pt", "start.safetensors"])
def test_a_head_for_other_labels_starts_anew(tmp_path, name):
    trained, model, fresh = classifier(10, seed=1), classifier(4), classifier(4)
    load_initial(model, saved(tmp_path, trained.state_dict(), name), factory=FACTORY, head="fc")
    assert same(model, trained.state_dict(), without="fc.")
    assert torch.equal(model.fc.weight, fresh.fc.weight)
    assert torch.equal(model.fc.bias, fresh.fc.bias)
    assert starts_anew(fresh, tmp_path / name, "fc")


def test_a_head_that_the_file_has_not(tmp_path):
    trained, model, fresh = classifier(10, seed=1), classifier(10), classifier(10)
    body = {n: v for n, v in trained.state_dict().items() if not n.startswith("fc.")}
    for extra in ({}, {"fc.0.weight": torch.zeros(3, 3)}):
        path = saved(tmp_path, body | extra, "start.pt")
        load_initial(model, path, factory=FACTORY, head="fc")
        assert same(model, trained.state_dict(), without="fc.")
        assert torch.equal(model.fc.weight, fresh.fc.weight)


def test_a_head_that_fits_is_kept(tmp_path):
    trained, model = classifier(10, seed=1), classifier(10)
    path = saved(tmp_path, trained.state_dict(), "start.pt")
    load_initial(model, path, factory=FACTORY, head="fc")
    assert same(model, trained.state_dict())
    assert not starts_anew(classifier(10), path, "fc")


def refused(function, message):
    with pytest.raises(ConfigError) as caught:
        function()
    assert str(caught.value) == message


def test_all_but_the_head_must_match(tmp_path):
    trained = classifier(10, seed=1).state_dict()
    del trained["body.0.0.weight"]
    path = saved(tmp_path, trained, "start.pt")
    refused(
        lambda: load_initial(classifier(4), path, factory=FACTORY, head="fc"),
        f"model.initial {path} does not fit the model: it lacks body.0.0.weight; "
        f"expected a state_dict of {FACTORY} with these arguments",
    )
    refused(
        lambda: load_initial(classifier(4), path, factory=FACTORY),
        f"model.initial {path} does not fit the model: it lacks body.0.0.weight, and has "
        f"fc.weight (10, 64) instead of (4, 64), fc.bias (10,) instead of (4,); "
        f"expected a state_dict of {FACTORY} with these arguments",
    )


def test_a_head_that_the_model_has_not(tmp_path):
    path = saved(tmp_path, classifier().state_dict(), "start.pt")
    refused(
        lambda: load_initial(classifier(), path, factory=FACTORY, head="fcc"),
        "model.head: the model has no layer 'fcc' with weights; near are fc",
    )
    refused(
        lambda: load_initial(classifier(), path, factory=FACTORY, head="classifier"),
        "model.head: the model has no layer 'classifier' with weights; "
        "it has body, body.0, body.0.0 and 19 more",
    )


def test_a_safetensors_file_that_is_damaged(tmp_path):
    path = saved(tmp_path, classifier().state_dict(), "start.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=rf"^model.initial {path} is no whole safetensors file: "):
        load_initial(classifier(), path, factory=FACTORY)


def net():
    layers = {
        "stem": nn.Linear(4, 8),
        "pool": nn.ReLU(),
        "body": nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)),
        "fc": nn.Linear(8, 2),
    }
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([], ()),
        (["stem"], ("stem.weight", "stem.bias")),
        (["body.0", "fc.bias"], ("body.0.weight", "body.0.bias", "fc.bias")),
        (["body.[12]"], ("body.1.weight", "body.1.bias", "body.2.weight", "body.2.bias")),
        (["*.bias"], ("stem.bias", "body.0.bias", "body.1.bias", "body.2.bias", "fc.bias")),
        (["s*", "stem"], ("stem.weight", "stem.bias")),
    ],
)
def test_layers_that_are_frozen(names, found):
    assert frozen_parameters(net(), names) == found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("body.3", "the model has no layer 'body.3'; near are body.2, body.1, body.0"),
        ("stemm", "the model has no layer 'stemm'; near are stem"),
        ("xyz", "the model has no layer 'xyz'; it has stem, pool, body and 4 more"),
        ("bod", "the model has no layer 'bod'; near are body, body.2, body.1"),
        ("pool", "layer 'pool' has no weights"),
        ("*", "every layer is frozen, expected one that trains"),
    ],
)
def test_names_that_freeze_nothing_or_all(name, message):
    refused(lambda: frozen_parameters(net(), [name]), f"model.freeze: {message}")
