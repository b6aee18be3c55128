"""Transfer learning in a whole fleet: frozen layers stay bit for bit, and may still be cut."""

import numpy as np
import pytest
import torch

from fleetprune_coordinator.resize import read
from fleetprune_sim.loop import open_coordinator, train
from fleetprune_sim.models import mlp
from tests.simulations.fleets import CLASSES, INPUTS, tiny_config, tiny_devices


def run(folder, *, freeze, **training):
    folder.mkdir()
    torch.manual_seed(1)
    start = mlp(INPUTS, 16, CLASSES)
    torch.save(start.state_dict(), folder / "start.pt")
    config = tiny_config(folder, **training)
    update = {"initial": folder / "start.pt", "freeze": tuple(freeze)}
    config = config.model_copy(update={"model": config.model.model_copy(update=update)})
    devices = tiny_devices()
    with open_coordinator(config, devices) as coordinator:
        grid = train(coordinator, devices)
        return read(start)[0], coordinator.rounds.model, grid


@pytest.mark.parametrize("codec", ["int4", "fp32"])
def test_frozen_layers_are_only_put_in_order(tmp_path, codec):
    start, model, _ = run(tmp_path / "run", freeze=["0"], codec=codec, refit=False)
    (order,) = model.origin.values()
    assert order.tolist() != list(range(16))
    for name in ("0.weight", "0.bias"):
        np.testing.assert_array_equal(model.params[name], start[name][order])
    assert (model.params["2.weight"] != start["2.weight"][:, order]).any()
    assert model.shapes["small"]["0"] < model.shapes["large"]["0"] == 16


def test_frozen_layers_cost_little_on_the_wire(tmp_path):
    def sent(folder, freeze):
        _, _, grid = run(folder, freeze=freeze, refit=False, first_criterion="magnitude")
        return sum(grid.traffic(device)[0] for device in tiny_devices())

    assert sent(tmp_path / "half", ["0"]) < sent(tmp_path / "whole", [])
