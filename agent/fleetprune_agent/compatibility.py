"""Whether a model can run on this machine, decided before anything of it is downloaded."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from fleetprune.errors import InstallError
from fleetprune.manifest import Manifest, Requirements

_ASK: Final = "from fleetprune_agent.runtime import survey; print(survey())"


@dataclass(frozen=True, slots=True)
class Machine:
    """What models may require."""

    runtime: str = "onnxruntime"
    runtime_version: str = "0"
    opset: int = 0
    """The newest default operator set whose models load."""
    ir_version: int = 0
    agent_version: str = "0"


def shortfall(manifest: Manifest, machine: Machine) -> str:
    """Why a machine cannot run a model, in one line; empty if it can."""
    need = manifest.requires
    has = f"{machine.runtime} {machine.runtime_version}"
    if need.runtime != machine.runtime:
        return f"the model requires {need.runtime}, this device has {has}"
    if numbers(need.runtime_version) > numbers(machine.runtime_version):
        return f"the model requires {need.runtime} {need.runtime_version}, this device has {has}"
    if need.opset > machine.opset:
        return f"the model requires opset {need.opset}, {has} takes up to {machine.opset}"
    if need.ir_version > machine.ir_version:
        return f"the model requires IR version {need.ir_version}, {has} takes up to " + str(
            machine.ir_version
        )
    if numbers(need.agent_version) > numbers(machine.agent_version):
        return (
            f"the model requires agent {need.agent_version}, this device has "
            f"{machine.agent_version}"
        )
    return ""


def undemanding(manifest: Manifest) -> bool:
    """Whether every machine will do, so that none has to be asked."""
    return manifest.requires == Requirements()


def numbers(text: str) -> tuple[int, ...]:
    """A version as numbers, without zeros at the end: 1.32.0rc1 is (1, 32)."""
    found = []
    for part in text.split("."):
        digits = re.match(r"\d+", part)
        if digits is None:
            break
        found.append(int(digits[0]))
    while found and not found[-1]:
        found.pop()
    return tuple(found)


@cache
def this_machine() -> Machine:
    """This machine; asked once per process.

    onnxruntime has no table of what it supports, so tiny models are loaded until one is refused.
    That happens in a process of its own: the library costs 30 MB for as long as a process lives.

    Raises:
        InstallError: The runtime cannot be asked now.
    """
    try:
        agent_version = version("fleetprune")
    except PackageNotFoundError:
        agent_version = "0"
    try:
        answer = json.loads(_asked())
        return Machine(agent_version=agent_version, **answer)
    except (OSError, subprocess.SubprocessError, ValueError, TypeError) as e:
        raise InstallError(f"what onnxruntime supports cannot be found out: {e}") from e


def _asked() -> str:
    if "onnxruntime" in sys.modules:
        from fleetprune_agent.runtime import survey  # noqa: PLC0415

        return survey()
    done = subprocess.run(  # noqa: S603  (our own interpreter and code)
        [sys.executable, "-P", "-c", _ASK], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout
