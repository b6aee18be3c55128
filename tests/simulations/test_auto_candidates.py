"""What can be tried on a fleet, and why the rest cannot."""

import pytest
import torch

from fleetprune.criteria import CATALOGUE
from fleetprune.errors import ConfigError
from fleetprune_sim.assemble import assemble
from fleetprune_sim.auto.candidates import _BY_PROMISE, find_candidates
from fleetprune_sim.models import mlp
from tests.simulations.tiny_task import INPUTS, LABELS

TASK = "tests.simulations.tiny_task:task"
GRANULARITY = {"pruning.granularity": "auto"}
CRITERION = {"training.criterion": "auto"}
FIRST = {"training.first_criterion": "auto"}
WIDE = {"model.arguments.hidden": 128}  # wide enough for masks to save bytes
BYTES = {**WIDE, "classes.small.macs_share": None, "classes.small.flash_share": 0.5}
BOTH = {**WIDE, "classes.small.macs_share": 0.5, "classes.small.flash_share": 0.4}
ROOMY = {**WIDE, "classes.small.macs_share": 0.5, "classes.small.flash_share": 0.9}
NO_UNITS = (
    "class small: macs 576 cannot be met, the smallest achievable is 1152; single weights save "
    'bytes alone: raise the budget or set pruning.granularity = "hybrid"'
)
NO_NORMS = "gamma: no norm layer scales any unit; choose magnitude"


def of_weights(criterion: str) -> str:
    return (
        f"training.criterion {criterion} tells units apart, not weights: choose another, or "
        'pruning.granularity = "hybrid"'
    )


def found(changes):
    wanted = assemble(None, TASK, "nested", 0, changes)
    candidates = find_candidates(wanted)
    refused = {c.name: c.reason for c in candidates.refused}
    return [c.name for c in candidates.possible], refused


def refused(changes):
    with pytest.raises(ConfigError) as caught:
        found(changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_criterion_has_its_place():
    assert sorted(_BY_PROMISE) == sorted(c for c, facts in CATALOGUE.items() if facts.later)


def test_all_criteria_but_those_without_what_they_look_at():
    possible, refused = found(CRITERION)
    assert possible[:3] == ["taylor", "magnitude", "wanda"]
    assert possible[-1] == "none"
    assert len(possible) == 14
    assert refused == {"gamma": NO_NORMS}


@pytest.mark.parametrize(
    ("changes", "possible", "reasons"),
    [
        (
            BYTES,
            ["channel", "weight"],
            {"hybrid": "no limit but of bytes cuts any unit: the same as weight"},
        ),
        (BOTH, ["channel", "hybrid"], {"weight": NO_UNITS}),
        (
            ROOMY,
            ["channel"],
            {
                "hybrid": "where all other limits hold, so do those of bytes: the same as channel",
                "weight": NO_UNITS,
            },
        ),
        (
            {**BYTES, "training.criterion": "apoz"},
            ["channel", "hybrid"],
            {"weight": of_weights("apoz")},
        ),
        (
            {
                **BYTES,
                "classes.small.flash_share": 0.7,
                "pruning.pattern": "4x1",
                "pruning.dense_layers": ["2"],
            },
            ["weight"],
            {
                "channel": "pruning.pattern is about single weights: set pruning.granularity = "
                '"weight" or "hybrid"',
                "hybrid": "no limit but of bytes cuts any unit: the same as weight",
            },
        ),
    ],
    ids=["bytes alone", "bytes and MACs", "bytes to spare", "a criterion of units", "a pattern"],
)
def test_granularities_that_make_sense(changes, possible, reasons):
    assert found({**changes, **GRANULARITY}) == (possible, reasons)


def test_of_each_criterion_all_granularities_come_together():
    possible, refused = found({**BYTES, **GRANULARITY, **CRITERION})
    assert possible[:4] == [
        "channel-taylor", "weight-taylor", "channel-magnitude", "weight-magnitude",
    ]  # fmt: skip
    assert "weight-apoz" not in possible
    assert "channel-apoz" in possible
    assert refused == {
        "hybrid": "no limit but of bytes cuts any unit: the same as weight",
        "gamma": NO_NORMS,
        "weight-fpgm": of_weights("fpgm"),
        "weight-apoz": of_weights("apoz"),
    }


def test_a_trained_model_is_first_cut_by_any_criterion(tmp_path):
    torch.manual_seed(0)
    torch.save(mlp(INPUTS, 128, LABELS).state_dict(), tmp_path / "start.pt")
    start = {"model.initial": str(tmp_path / "start.pt")}
    possible, _ = found({**WIDE, **start, **FIRST})
    assert possible[:3] == ["reconstruction", "taylor", "magnitude"]
    assert "movement" not in possible  # nothing has moved yet
    possible, refused = found({**BYTES, **start, **GRANULARITY, **FIRST, **CRITERION})
    assert possible[:6] == [
        "channel-reconstruction-taylor",
        "weight-reconstruction-taylor",
        "channel-reconstruction-magnitude",
        "channel-taylor-taylor",
        "weight-reconstruction-magnitude",
        "weight-taylor-taylor",
    ]
    assert sum(name.startswith("weight-") for name in refused) == 2  # whatever comes first


def test_what_makes_no_difference_is_not_tried():
    assert refused(FIRST) == (
        'training.first_criterion "auto": it only matters where the model comes trained: give '
        "--init or --warm-rounds, or leave it out"
    )
    why = 'training.criterion "auto": masks never change, so no criterion is asked: '
    assert refused({**CRITERION, "training.remask_every": 0}) == (
        f"{why}training.remask_every is 0, and no new masks come after round 3; let it be at most "
        "that, and not 0"
    )
    assert refused({**CRITERION, "training.last_remask": 0}) == (
        f"{why}training.remask_every is 2, and no new masks come after round 0; raise last_remask"
    )


def test_where_nothing_fits_the_reasons_are_told():
    limit = "class small: macs 1 cannot be met, the smallest achievable is 36; raise the budget or "
    assert refused({**GRANULARITY, "classes.small.macs_share": 0.01}).startswith(
        f'pruning.granularity "auto": nothing can be chosen; channel: {limit}'
    )
