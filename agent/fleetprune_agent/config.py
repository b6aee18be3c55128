"""The agent's one configuration file, and clear refusals of what is wrong in it."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    Field,
)

from fleetprune.config_file import LocalPath, Section, load_section
from fleetprune.messages import Name
from fleetprune.mqtt import BrokerSettings
from fleetprune_agent.http_source import HttpsSettings
from fleetprune_agent.pacing import PacingSettings


class _Data(Section):
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


class AgentConfig(Section):
    """Everything an agent needs to know; unknown keys are refused."""

    device: Name
    device_class: Name
    fleet: Name
    broker: BrokerSettings
    https: HttpsSettings | None = None
    """A second road to releases; None: MQTT alone."""
    pacing: PacingSettings = Field(default_factory=PacingSettings)
    root: LocalPath
    """The pinned TUF root (`root.json`), put there when the device is set up."""
    state: LocalPath
    """Folder that the agent owns: slots, outbox, answers, trusted metadata, caches."""
    data: DataConfig
    trains: bool = True
    """False: only forward passes, for devices too small to train."""
    recent_samples: int = Field(default=0, ge=0, le=4096)
    """Samples that the model saw in service and that are kept on the disk, to compare the next
    model with it; 0: none are kept, since they may be private, and `data` serves instead."""
    check_s: float = Field(default=300.0, gt=0)
    """Seconds that the health check of a new model may take."""
    threads: int = Field(default=1, ge=1, le=64)
    """Threads of onnxruntime."""
    max_task_s: float = Field(default=3600.0, gt=0)
    """Seconds of work on one task; what takes longer is refused. Nobody signs a task."""
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
    return load_section(path, AgentConfig)
