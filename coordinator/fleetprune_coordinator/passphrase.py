"""Asking a person for the passphrase of private keys, where no file has it."""

import sys
from pathlib import Path

import typer

from fleetprune.errors import ConfigError
from fleetprune_coordinator.key_files import PASSPHRASE_FILE, passphrase_from_environment


def ask_passphrase(key: Path) -> bytes | None:
    """Of an encrypted key: from the environment's file, else from whoever sits at the terminal."""
    found = passphrase_from_environment()
    if found is None and sys.stdin.isatty():
        found = typer.prompt(f"Passphrase of {key}", hide_input=True, err=True).encode()
    return found


def new_passphrase() -> bytes:
    """For keys that are made now; ConfigError if there is none and nobody can be asked."""
    found = passphrase_from_environment()
    if found is None and sys.stdin.isatty():
        found = typer.prompt(
            "New passphrase", hide_input=True, confirmation_prompt=True, err=True
        ).encode()
    if not found:
        raise ConfigError(f"no passphrase: name a file that holds one in {PASSPHRASE_FILE}")
    return found
