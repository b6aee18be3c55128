"""A class's model out of the registry, as files for other tools; and a saved one back in.

Every file holds the physically small network: what was cut is not in it.
"""

import difflib
import io
import json
import warnings
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from fleetprune.errors import BudgetError, ConfigError, GraphError
from fleetprune.files import make_folder, sha256_of, write_atomic
from fleetprune.layout import Architecture
from fleetprune.patterns import Pattern
from fleetprune_coordinator.artifacts import small_model
from fleetprune_coordinator.config import FleetConfig
from fleetprune_coordinator.coordinator import check_continues, load_model
from fleetprune_coordinator.fleet_model import restored
from fleetprune_coordinator.graphs import check_countable, export_infer
from fleetprune_coordinator.imports import import_object
from fleetprune_coordinator.keys import RELEASES
from fleetprune_coordinator.quantise import quantise
from fleetprune_coordinator.records import ReleaseRecord
from fleetprune_coordinator.registry import Registry
from fleetprune_coordinator.resize import read, resize
from fleetprune_coordinator.rounds import ranges_in
from fleetprune_coordinator.sparse_file import pack
from fleetprune_coordinator.store import DATABASE
from fleetprune_coordinator.supported import untraceable
from fleetprune_coordinator.tracing import trace

DESCRIPTION = ".json"
"""What is added to a state_dict's name for the file that describes it."""


class Format(StrEnum):
    """Kinds of files."""

    ONNX = "onnx"
    STATE_DICT = "state_dict"
    TORCH_EXPORT = "torch-export"


class Description(BaseModel):
    """How to build the network of a saved state_dict."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    factory: str
    arguments: dict[str, Any]
    input_shape: tuple[int, ...]
    labels: tuple[str, ...] = ()
    device_class: str = ""
    keep: dict[str, int]
    """Units per group."""
    exclude: tuple[str, ...] = ()
    """Layers that are in no group because they cannot be traced."""


@dataclass(frozen=True)
class Exported:
    """One file that was written."""

    path: Path
    device_class: str
    bytes: int
    parameters: int | None = None
    """Of the network; None: of a release, which is copied as it is."""


@dataclass(frozen=True)
class _Small:
    """A class's network, and what it was made from."""

    network: nn.Module
    example: Tensor
    description: Description
    ranges: Any
    """(tensors, 2) of its file, as `quantise` takes them; None: not measured."""
    pattern: Pattern | None
    """What of its weights was pruned together; None: no single weights."""


def export(
    config: FleetConfig, what: str, kind: Format, out: Path, *, int8: bool = False
) -> list[Exported]:
    """Write a class's model as it stands, or a release's files.

    Args:
        config: The fleet; its coordinator may be running.
        what: A device class; or the number of a release, whose ONNX files are copied.
        kind: Of the file.
        out: The file. For a release of several classes: a folder, with a file per class.
        int8: Quantise the ONNX file, by the ranges that the fleet has measured.

    Raises:
        ConfigError: There is no such class or release, or not in this format; or the state is of
            another model.
    """
    if int8 and kind is not Format.ONNX:
        raise ConfigError(f"int8 is for --format onnx, not for {kind}")
    if not (config.state / DATABASE).exists():
        raise ConfigError(
            f"{config.state} holds no registry yet: `fleetprune coordinator serve` makes it"
        )
    with Registry.open(config.state, _never, read_only=True) as registry:
        if what not in config.classes:
            return _release(config, _records(config, registry, what), kind, out)
        small = _small(config, registry, what)
    if int8 and small.ranges is None:
        try:
            check_countable(small.network, small.example)
        except GraphError as e:
            raise ConfigError(f"class {what} cannot be quantised: {e}") from e
        raise ConfigError(
            f"class {what}: nobody has measured the ranges of its activations: set pruning.int8 "
            "and let the coordinator finish a training"
        )
    data = _bytes(small, kind, int8=int8)
    make_folder(out.absolute().parent)
    if kind is Format.STATE_DICT:
        text = json.dumps(small.description.model_dump(mode="json"), indent=1) + "\n"
        write_atomic(described_by(out), text.encode())
    write_atomic(out, data)
    parameters = sum(p.numel() for p in small.network.parameters())
    return [Exported(out, what, len(data), parameters)]


def _never() -> float:
    return 0.0  # nothing is written


def described_by(path: Path) -> Path:
    """The file that tells how to build a saved state_dict's network."""
    return path.with_name(path.name + DESCRIPTION)


def load(path: Path | str, folder: Path | str | None = None) -> nn.Module:
    """Build the small network of a state_dict that was exported, with its weights.

    Args:
        path: The state_dict; its description lies beside it.
        folder: Where the module of the model's factory is; None: beside `path`, or installed.

    Returns:
        The network, in evaluation mode.

    Raises:
        ConfigError: A file is missing or damaged, the factory is not there, or it makes another
            network now.
    """
    path = Path(path)
    try:
        description = Description.model_validate_json(described_by(path).read_bytes())
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}: {e.filename}") from e
    except ValidationError as e:
        raise ConfigError(f"{described_by(path)} is no description of a state_dict") from e
    except Exception as e:  # of any other file, torch raises whatever its bytes lead to
        raise ConfigError(f"{path} is no state_dict") from e
    where = Path(folder) if folder is not None else path.absolute().parent
    factory = import_object(description.factory, "factory", where)
    dense = factory(**description.arguments)
    example = torch.zeros(1, *description.input_shape)
    architecture = trace(dense, example, description.exclude)
    try:
        small = resize(dense, architecture, description.keep)
        small.load_state_dict(state)
    except (BudgetError, RuntimeError, TypeError, AttributeError) as e:
        reason = str(e).splitlines()[-1].strip()
        raise ConfigError(f"{path} does not fit what {description.factory} makes: {reason}") from e
    return small.eval()


def _small(config: FleetConfig, registry: Registry, name: str) -> _Small:
    snapshot = registry.latest_snapshot()
    if snapshot is None:
        raise ConfigError(f"{config.state} holds no model yet: nothing has been trained")
    torch.manual_seed(config.training.seed)
    dense = load_model(config)
    check_continues(snapshot, read(dense)[0], config)
    example = torch.zeros(1, *config.model.input_shape)
    exclude = untraceable(dense, config.pruning.exclude)
    architecture: Architecture = trace(dense, example, exclude)
    state = restored(snapshot, registry.mask(snapshot.mask_version))
    return _Small(
        network=small_model(dense, architecture, state, name),
        example=example,
        description=Description(
            factory=config.model.factory,
            arguments=config.model.arguments,
            input_shape=config.model.input_shape,
            labels=config.model.labels,
            device_class=name,
            keep=state.shapes[name],
            exclude=exclude,
        ),
        ranges=ranges_in(snapshot).get(name),
        pattern=Pattern.parse(config.pruning.pattern) if name in state.supports else None,
    )


def _bytes(small: _Small, kind: Format, *, int8: bool) -> bytes:
    if kind is Format.ONNX:
        onnx = export_infer(small.network, small.example).onnx
        onnx = quantise(onnx, small.ranges) if int8 else onnx
        return onnx if small.pattern is None else pack(onnx, small.pattern)
    out = io.BytesIO()
    if kind is Format.STATE_DICT:
        torch.save(small.network.state_dict(), out)
        return out.getvalue()
    two = small.example.expand(2, *small.example.shape[1:]).contiguous()
    with warnings.catch_warnings(action="ignore"):  # torch's, about itself
        program = torch.export.export(
            small.network, (two,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
        )
        torch.export.save(program, out)
    return out.getvalue()


def _records(config: FleetConfig, registry: Registry, what: str) -> list[ReleaseRecord]:
    """A release by its number; ConfigError if `what` is none."""
    releases = registry.releases()
    found = [r for r in releases if str(r.number) == what]
    if found:
        return found
    if what.isdigit():
        numbers = sorted({r.number for r in releases})
        known = f"there are {numbers[0]} to {numbers[-1]}" if numbers else "there is none yet"
        raise ConfigError(f"no release {what}: {known}")
    near = difflib.get_close_matches(what, config.classes, n=1, cutoff=0.5)
    hint = f", did you mean {near[0]}?" if near else ""
    raise ConfigError(
        f"no device class {what!r}: the fleet has {', '.join(sorted(config.classes))}{hint}"
    )


def _release(
    config: FleetConfig, records: list[ReleaseRecord], kind: Format, out: Path
) -> list[Exported]:
    number = records[0].number
    if kind is not Format.ONNX:
        raise ConfigError(
            f"release {number} is made of ONNX files: give --format onnx, or a device class for "
            "its model as it stands now"
        )
    files = {r.device_class: _target(config, r) for r in records}
    paths = {n: out if len(files) == 1 else out / f"{n}.onnx" for n in files}
    for name, file in files.items():
        make_folder(paths[name].absolute().parent)
        write_atomic(paths[name], file.read_bytes())
    return [Exported(paths[n], n, file.stat().st_size) for n, file in files.items()]


def _target(config: FleetConfig, record: ReleaseRecord) -> Path:
    """The signed file of a release, where the repository has it; it keeps the last few."""
    folder, _, name = record.path.rpartition("/")
    public = config.state / RELEASES / "public" / "targets"
    path = public / folder / f"{record.sha256}.{name}"
    if not path.is_file() or sha256_of(path) != record.sha256:
        raise ConfigError(
            f"release {record.number} of class {record.device_class} is no longer in {public}"
        )
    return path
