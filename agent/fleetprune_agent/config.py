"""The agent's one configuration file, and clear refusals of what is wrong in it."""

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
)

from fleetprune.errors import ConfigError
from fleetprune.messages import Name
from fleetprune.mqtt import BrokerSettings


def _from_base(path: Path, info: ValidationInfo) -> Path:
    base: Path | None = (info.context or {}).get("base")
    return path if base is None else base / path


LocalPath = Annotated[Path, AfterValidator(_from_base)]
"""A path; a relative one starts at the folder of the configuration file."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Data(_Section):
    held_out: float = Field(default=0.2, ge=0, lt=1)
    """Share of the samples set aside to measure the installed model; never trained on."""


class NpzData(_Data):
    """`.npz` files with arrays `x` and, where there are labels, `y`."""

    kind: Literal["npz"]
    path: LocalPath
    """One file, or a folder of them."""


class CsvData(_Data):
    """Sensor windows in CSV files: a row is one time step of one window."""

    kind: Literal["csv"]
    path: LocalPath
    """One file, or a folder of them."""
    columns: tuple[str, ...] = Field(min_length=1)
    """Columns of sensor values; a sample is (columns, steps)."""
    window: str
    """Column that says which window a row belongs to."""
    step: str | None = None
    """Column that orders the rows of a window; None: as they stand in the file."""
    label: str | None = None
    """Column of class names or numbers; None: the device has no labels."""
    labels: tuple[str, ...] = ()
    """Class names in the order of the model's outputs; empty: `label` holds class numbers."""


class FunctionData(_Data):
    """A function installed on the device that returns (x, y), or (x, None)."""

    kind: Literal["function"]
    function: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """`module:function`."""


DataConfig = Annotated[NpzData | CsvData | FunctionData, Field(discriminator="kind")]


class AgentConfig(_Section):
    """Everything an agent needs to know; unknown keys are refused."""

    device: Name
    device_class: Name
    fleet: Name
    broker: BrokerSettings
    root: LocalPath
    """The pinned TUF root (`root.json`), put there when the device is set up."""
    state: LocalPath
    """Folder that the agent owns: slots, outbox, answers, trusted metadata, caches."""
    data: DataConfig
    trains: bool = True
    """False: only forward passes, for devices too small to train."""
    threads: int = Field(default=1, ge=1, le=64)
    """Threads of onnxruntime."""
    telemetry_s: float = Field(default=900.0, gt=0)
    """Seconds between two reports."""
    refresh_s: float = Field(default=3600.0, gt=0)
    """Seconds between two looks for a new release, besides announcements."""
    max_outbox_bytes: int = Field(default=64 * 2**20, ge=2**20)
    """Bytes of answers and reports kept for a coordinator that cannot be reached."""


def load_config(path: Path) -> AgentConfig:
    """Read and check a configuration file.

    Raises:
        ConfigError: It cannot be read, a key is unknown, or a value is missing or wrong; one
            line that names the file and the key.
    """
    try:
        with path.open("rb") as file:
            raw = tomllib.load(file)
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read ({e.strerror})") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: not TOML: {e}") from e
    try:
        return AgentConfig.model_validate(raw, context={"base": path.parent})
    except ValidationError as e:
        errors = e.errors()
        unknown = [x for x in errors if x["type"] in _UNKNOWN]
        raise ConfigError(f"{path}: {_line((unknown or errors)[0])}") from e


_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_SECTIONS: dict[str, type[Any]] = {
    "broker": BrokerSettings,
    "npz": NpzData,
    "csv": CsvData,
    "function": FunctionData,
}


def _line(error: Any) -> str:
    """One line for one of pydantic's errors."""
    loc = tuple(str(part) for part in error["loc"])
    # Pydantic puts the kind of data between `data` and the key; the file has no such level.
    key = ".".join((loc[0], *loc[2:]) if loc[:1] == ("data",) and len(loc) > 2 else loc)
    if error["type"] not in _UNKNOWN:
        hide = error["type"] == "missing" or "password" in key
        got = "" if hide else f" (got {error['input']!r})"
        return f"{key}: {error['msg']}{got}"
    section = AgentConfig if len(loc) == 1 else _SECTIONS.get(loc[-2], AgentConfig)
    known = list(section.__annotations__)
    for base in section.__mro__[1:]:
        known += [k for k in getattr(base, "__annotations__", {}) if k != "model_config"]
    near = difflib.get_close_matches(loc[-1], known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
    return f"unknown key {key}, {hint}"
