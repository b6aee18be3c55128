import re
import sys
from pathlib import Path

import pytest

from fleetprune.budgets import Allocation, Budget
from fleetprune.config_file import Section, load_section
from fleetprune.costs import Costs
from fleetprune.criteria import Criterion
from fleetprune.errors import ConfigError
from fleetprune.messages import Codec
from fleetprune_coordinator.config import load_fleet_config
from fleetprune_coordinator.imports import import_object
from fleetprune_coordinator.score_merge import ScoreMerge

SMALL = """
fleet = "digits"
[model]
factory = "models:make"
input_shape = [1, 8, 8]
classes = 10
[classes.phone]
macs_share = 0.25
"""

FULL = """
fleet = "digits"
state = "var"
[broker]
host = "broker.example"
ca_file = "ca.pem"
[model]
factory = "models:make"
arguments = { width = 16 }
input_shape = [1, 8, 8]
labels = ["no", "yes"]
loss = "losses:focal"
initial = "weights.pt"
[data]
test = "test.npz"
[training]
rounds = 30
learning_rate = 1
codec = "int8"
criterion = "wanda"
stratified = false
[schedule]
begin = 2
end = 10
initial = 0.5
[pruning]
channel_multiple = 4
allocation = "global"
floor = 0.25
exclude = ["stem"]
minimum = { head = 16, body = 0.5 }
multiple = { head = 2 }
[classes.phone]
flash_bytes = 200_000
ram_bytes = 30_000
macs = 1_000_000
latency_ms = 5
[classes.sensor]
flash_share = 0.5
ram_share = 0.1
macs_share = 0.25
batch = 4
multiple = 2
trains = false
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "fleet.toml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str) -> str:
    path = write(folder, text)
    with pytest.raises(ConfigError) as caught:
        load_fleet_config(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def test_a_small_file_has_the_defaults(tmp_path: Path) -> None:
    config = load_fleet_config(write(tmp_path, SMALL))
    assert config.fleet == "digits"
    assert config.state == tmp_path / "state"
    assert config.folder == tmp_path
    assert config.model.outputs == 10
    assert config.model.loss == "cross_entropy"
    assert config.training.codec is Codec.INT4
    assert config.training.down_codec is Codec.FP16
    assert config.training.criterion is Criterion.TAYLOR
    assert (config.training.rounds, config.training.remask_every) == (20, 5)
    assert config.schedule.slack(0) == 0.0  # cut at once
    assert config.pruning.channel_multiple == 8
    assert config.broker.host == "127.0.0.1"
    assert config.classes["phone"].trains


def test_every_section_is_read(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").touch()
    (tmp_path / "test.npz").touch()
    config = load_fleet_config(write(tmp_path, FULL))
    assert config.state == tmp_path / "var"
    assert config.broker.host == "broker.example"
    assert config.broker.ca_file == tmp_path / "ca.pem"
    assert config.model.arguments == {"width": 16}
    assert config.model.labels == ("no", "yes")
    assert config.model.outputs == 2
    assert config.model.initial == tmp_path / "weights.pt"
    assert config.data.test == tmp_path / "test.npz"
    assert config.training.learning_rate == 1.0
    assert config.training.criterion is Criterion.WANDA
    assert not config.training.stratified
    assert (config.schedule.begin, config.schedule.end, config.schedule.initial) == (2, 10, 0.5)
    assert config.pruning.allocation is Allocation.GLOBAL
    assert (config.pruning.floor, config.pruning.exclude) == (0.25, ("stem",))
    assert config.pruning.minimum == {"head": 16, "body": 0.5}
    assert [type(n) for n in config.pruning.minimum.values()] == [int, float]
    assert config.pruning.multiple == {"head": 2}
    assert (config.classes["sensor"].multiple, config.classes["phone"].multiple) == (2, None)
    assert list(config.classes) == ["phone", "sensor"]
    assert not config.classes["sensor"].trains


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            'criterion = "reconstruction"',
            "training: criterion reconstruction orders the units of a model that comes trained, "
            "once: it can only be the first_criterion",
        ),
        (
            'first_criterion = "movement"',
            "training: first_criterion movement comes of training, and none has been: "
            "it can only be the criterion",
        ),
    ],
)
def test_criteria_have_their_time(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(f"{SMALL}[training]\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        load_fleet_config(path)
    assert str(caught.value) == f"{path}: {message}"


@pytest.mark.parametrize("criterion", [c for c in Criterion if c is not Criterion.RECONSTRUCTION])
def test_criteria_are_known_by_name(tmp_path: Path, criterion: Criterion) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(
        f'{SMALL}[training]\ncriterion = "{criterion.value}"\nscore_merge = "trimmed"\n'
    )
    training = load_fleet_config(path).training
    assert training.criterion is criterion
    assert training.score_merge is ScoreMerge.TRIMMED


def test_budgets_are_absolute_or_shares_of_the_dense_model(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").touch()
    (tmp_path / "test.npz").touch()
    classes = load_fleet_config(write(tmp_path, FULL)).classes
    dense = Costs(artifact_bytes=1001, macs=4003, peak_activation_bytes=1009)
    assert classes["phone"].budget(dense) == Budget(
        flash_bytes=200_000, ram_bytes=30_000, macs=1_000_000, latency_ms=5.0
    )
    # a tenth of four samples' memory
    assert classes["sensor"].budget(dense) == Budget(
        flash_bytes=500, ram_bytes=403, macs=1000, batch=4
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('fleet = "digits"', "", "fleet: field required"),
        (
            'fleet = "digits"',
            'fleet = "../x"',
            "fleet: string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$', got \"../x\"",
        ),
        (
            "classes = 10",
            "classes = 10\n[training]\nlearning_rat = 0.1",
            "training.learning_rat: unknown key, did you mean learning_rate?",
        ),
        (
            "macs_share = 0.25",
            "macs_shares = 0.25",
            "classes.phone.macs_shares: unknown key, did you mean macs_share?",
        ),
        (
            'fleet = "digits"',
            'flet = "digits"',
            "flet: unknown key, did you mean fleet? (and 1 more)",
        ),
        (
            "classes = 10",
            "classes = 10\n[pruning]\nxyz = 1",
            "pruning.xyz: unknown key, expected one of allocation, channel_multiple, dense_layers, "
            "exclude, floor, granularity, int8, int8_loss, minimum, multiple, pattern, "
            "weight_allocation",
        ),
        (
            "classes = 10",
            "classes = 10\n[pruning]\nminimum = { head = 1.5 }",
            "pruning.minimum.head: expected a number of units, or a share with a point, up to 1.0, "
            "got 1.5",
        ),
        (
            "classes = 10",
            "classes = 10\n[pruning]\nminimum = { head = true }",
            "pruning.minimum.head: expected a number of units, or a share with a point, up to 1.0, "
            "got true",
        ),
        (
            "classes = 10",
            "classes = 10\n[broker]\nhots = 'a'",
            "broker.hots: unknown key, did you mean host?",
        ),
        (
            "classes = 10",
            "classes = 10\n[schedule]\npowr = 2",
            "schedule.powr: unknown key, did you mean power?",
        ),
        (
            "classes = 10",
            'classes = 10\n[training]\nrounds = "20"',
            'training.rounds: input should be a valid integer, got "20"',
        ),
        (
            "classes = 10",
            "classes = 10\n[training]\nstratified = 1",
            "training.stratified: input should be a valid boolean, got 1",
        ),
        (
            "classes = 10",
            "classes = 10\n[training]\nlearning_rate = inf",
            "training.learning_rate: input should be a finite number, got Infinity",
        ),
        (
            "classes = 10",
            "classes = 10\n[training]\nquorum = 0",
            "training.quorum: input should be greater than 0, got 0",
        ),
        (
            "classes = 10",
            'classes = 10\n[training]\ncodec = "int3"',
            "training.codec: input should be 'fp32', 'fp16', 'int8' or 'int4', got \"int3\"",
        ),
        (
            "classes = 10",
            "classes = 10\n[training]\nmin_devices = 9",
            "training: min_devices 9 is more than devices_per_round 8",
        ),
        (
            "classes = 10",
            "classes = 10\n[broker]\npassword = 12345",
            "broker.password: input should be a valid string",
        ),
        (
            "[1, 8, 8]",
            "[1, 0, 8]",
            "model.input_shape.1: input should be greater than or equal to 1, got 0",
        ),
        ("classes = 10", "", "model: give either labels or classes"),
        ("classes = 10", 'labels = ["a", "a"]', "model: labels are not distinct"),
        ("classes = 10", 'labels = ["a"]', "model: one label, expected at least 2"),
        ("classes = 10", 'classes = 10\ninitial = "w.pt"', "model.initial: no file {folder}/w.pt"),
        (
            "classes = 10",
            'classes = 10\n[data]\ntest = "t.npz"',
            "data.test: no file {folder}/t.npz",
        ),
        (
            "models:make",
            "models.make",
            "model.factory: string should match pattern "
            "'^[A-Za-z_][\\w.]*:[A-Za-z_][\\w.]*$', got \"models.make\"",
        ),
        (
            "macs_share = 0.25",
            "macs_share = 0.25\nmacs = 5",
            "classes.phone: give either macs or macs_share",
        ),
        ("macs_share = 0.25", "trains = false", "no class trains: at least one must"),
        (
            "classes = 10",
            "classes = 10\n[schedule]\nbegin = 3\nend = 2",
            "schedule: begins in round 3, after its end 2; raise end, or lower begin",
        ),
        (
            "classes = 10",
            "classes = 10\n[schedule]\nend = 21",
            "schedule ends in round 21, but training has 20 rounds",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in SMALL
    got = refusal(tmp_path, SMALL.replace(old, new, 1))
    assert got == message.replace("{folder}", str(tmp_path))


def test_a_fleet_needs_a_class(tmp_path: Path) -> None:
    text = SMALL.replace("[classes.phone]\nmacs_share = 0.25", "[classes]")
    assert refusal(tmp_path, text) == (
        "classes: dictionary should have at least 1 item after validation, not 0"
    )


def test_a_class_name_is_a_topic_level(tmp_path: Path) -> None:
    text = SMALL.replace("[classes.phone]", '[classes."a/b"]')
    assert refusal(tmp_path, text).startswith("classes.a/b: string should match pattern")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "none.toml"
    with pytest.raises(
        ConfigError,
        match=rf"^{re.escape(str(missing))}: cannot be read: No such file or directory; "
        r"docs/bring-your-own\.md says what such a file holds$",
    ):
        load_fleet_config(missing)
    assert refusal(tmp_path, "fleet =").startswith("not TOML: Invalid value")
    path = tmp_path / "fleet.toml"
    path.write_bytes(b'a = "\xff"')
    with pytest.raises(ConfigError, match=r": byte 5 is not UTF-8$"):
        load_fleet_config(path)


def test_what_is_missing_is_named_together(tmp_path: Path) -> None:
    assert refusal(tmp_path, "") == "fleet, model, classes: field required"
    assert refusal(tmp_path, 'fleet = "f"\n[model]\n[classes.a]') == (
        "model.factory, model.input_shape: field required"
    )
    wrong = "fleet = 7\n[classes.a]\nmacs_share = 2"
    assert refusal(tmp_path, wrong) == "fleet: input should be a valid string, got 7 (and 2 more)"
    assert refusal(tmp_path, "[classes.a]\nmacs_share = 2") == (
        "fleet, model: field required (and 1 more)"
    )


def test_what_is_missing_is_counted_where_it_is_much(tmp_path: Path) -> None:
    class Many(Section):
        a: int
        b: int
        c: int
        d: int
        e: int
        f: int

    path = tmp_path / "many.toml"
    path.write_text("f = 1")
    with pytest.raises(ConfigError, match=r": a, b, c, d, e: field required$"):
        load_section(path, Many)
    path.write_text("")
    with pytest.raises(ConfigError, match=r": a, b, c, d, e: field required \(and 1 more\)$"):
        load_section(path, Many)


def test_the_users_module_is_found_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "fp_models_beside.py").write_text(
        "import fp_helper_beside\nclass Net:\n    made = fp_helper_beside.VALUE\n"
    )
    (tmp_path / "fp_helper_beside.py").write_text("VALUE = 7\n")
    path = list(sys.path)
    config = load_fleet_config(write(tmp_path, SMALL))
    try:
        assert config.import_object("fp_models_beside:Net.made", "model.factory") == 7
        assert sys.path == path
        with pytest.raises(
            ConfigError, match=r"^model\.factory: fp_models_beside has no Nets, did you mean Net\?$"
        ):
            config.import_object("fp_models_beside:Nets", "model.factory")
    finally:
        for name in ("fp_models_beside", "fp_helper_beside"):
            sys.modules.pop(name, None)


def test_modules_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "fp_broken.py").write_text("1 / 0\n")
    (tmp_path / "fp_needs.py").write_text("import fp_not_there\n")
    cases = {
        "fp_no_such:make": "x: no module fp_no_such in {f} or among the installed packages",
        "fp_broken:make": "x: fp_broken fails to import: ZeroDivisionError: division by zero",
        "fp_needs:make": "x: fp_needs needs a module fp_not_there that is missing",
        "json": "x: 'json', expected module:name",
    }
    for dotted, message in cases.items():
        with pytest.raises(ConfigError) as caught:
            import_object(dotted, "x", tmp_path)
        assert str(caught.value) == message.replace("{f}", str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"^x: no module fp_no_such among the installed packages$"
    ):
        import_object("fp_no_such:make", "x")


# ---- single weights

LIMITED = SMALL.replace("macs_share", "flash_share")


def pruned(*lines: str, text: str = LIMITED) -> str:
    return f"{text}\n[pruning]\n" + "\n".join(lines)


@pytest.mark.parametrize("granularity", ["weight", "hybrid"])
@pytest.mark.parametrize("pattern", ["1x1", "4x1", "2:4"])
def test_single_weights_are_asked_for(tmp_path: Path, granularity: str, pattern: str) -> None:
    text = pruned(f'granularity = "{granularity}"', f'pattern = "{pattern}"')
    pruning = load_fleet_config(write(tmp_path, text)).pruning
    assert (pruning.granularity, pruning.pattern) == (granularity, pattern)
    assert pruning.weight_allocation is Allocation.GLOBAL


@pytest.mark.parametrize("pattern", ["0x1", "3:2", "2:2", "x", "", "1x1x1", "2:4 "])
def test_a_pattern_that_is_none_is_refused(tmp_path: Path, pattern: str) -> None:
    text = pruned('granularity = "weight"', f'pattern = "{pattern}"')
    assert refusal(tmp_path, text) == (
        'pruning.pattern: expected outputs x inputs of a block, as "1x1" or "4x1", or N:M with '
        f'N < M, as "2:4", got "{pattern}"'
    )


def test_a_granularity_that_is_none_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, pruned('granularity = "weights"')) == (
        "pruning.granularity: input should be 'channel', 'weight' or 'hybrid', got \"weights\""
    )


@pytest.mark.parametrize("line", ['pattern = "4x1"', 'pattern = "2:4"', 'dense_layers = ["fc"]'])
def test_what_is_about_single_weights_needs_them(tmp_path: Path, line: str) -> None:
    key = line.partition(" ")[0]
    for lines in ((line,), ('granularity = "channel"', line)):
        assert refusal(tmp_path, pruned(*lines)) == (
            f'pruning.{key} is about single weights: set pruning.granularity = "weight" or "hybrid"'
        )


@pytest.mark.parametrize("granularity", ["weight", "hybrid"])
def test_weights_are_pruned_down_to_some_bytes(tmp_path: Path, granularity: str) -> None:
    line = f'granularity = "{granularity}"'
    assert refusal(tmp_path, pruned(line, text=SMALL)) == (
        f"pruning.granularity {granularity} prunes weights down to flash_bytes or flash_share, and "
        'no class has one: give it to those that have limits, or choose a pattern as "2:4"'
    )
    load_fleet_config(write(tmp_path, pruned(line, 'pattern = "2:4"', text=SMALL)))
    load_fleet_config(write(tmp_path, pruned(line, text=SMALL + "flash_bytes = 9\n")))


@pytest.mark.parametrize("criterion", ["gamma", "fpgm", "apoz"])
def test_a_criterion_of_units_alone_does_not_prune_weights_alone(
    tmp_path: Path, criterion: str
) -> None:
    training = f'\n[training]\ncriterion = "{criterion}"\n'
    assert refusal(tmp_path, pruned('granularity = "weight"', text=LIMITED + training)) == (
        f"training.criterion {criterion} tells units apart, not weights: choose another, or "
        'pruning.granularity = "hybrid"'
    )
    load_fleet_config(write(tmp_path, pruned('granularity = "hybrid"', text=LIMITED + training)))
