"""The documentation is complete, its links lead somewhere, its examples are valid."""

import json
import re
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import pytest
import typer
from pydantic import BaseModel

from fleetprune.cli import SUB_COMMANDS
from fleetprune.config_file import _models_in
from fleetprune.mqtt import BrokerSettings

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("deploy/**/*.md"),
    ]
)
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(language: str) -> list[tuple[str, str]]:
    """Page and text of every code block in a language."""
    return [
        (name(page), text)
        for page in PAGES
        for found, text in _FENCE.findall(page.read_text())
        if found == language
    ]


def commands(command: click.Command, path: str) -> Iterator[str]:
    """Full names of a command's leaves."""
    if isinstance(command, click.Group):
        for child in command.commands.values():
            yield from commands(child, f"{path} {child.name}")
    else:
        yield path


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def broken_links(page: Path) -> list[str]:
    """Relative links of a page that lead nowhere."""
    broken = []
    for link in _LINK.findall(_FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        place = page.parent / target if target else page
        if not place.exists() or (anchor and anchor not in anchors(place)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("sub_command", SUB_COMMANDS)
def test_every_command_is_documented(sub_command):
    text = "\n".join(page.read_text() for page in PAGES)
    app = import_module(SUB_COMMANDS[sub_command].module).app
    full = list(commands(typer.main.get_command(app), f"fleetprune {sub_command}"))
    assert full
    assert [command for command in full if not re.search(rf"{command}\b", text)] == []


def test_documented_commands_exist():
    known = {"fleetprune COMMAND"}
    for sub_command, target in SUB_COMMANDS.items():
        app = import_module(target.module).app
        known |= set(commands(typer.main.get_command(app), f"fleetprune {sub_command}"))
    table = (ROOT / "docs/commands.md").read_text()
    listed = re.findall(r"^\| `(fleetprune [a-z ]+)` \|", table, re.MULTILINE)
    assert sorted(listed) == sorted(known - {"fleetprune COMMAND"})


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b` c\n[x](#a-b-c) [y](#d) [z](no.md) [w](page.md#a-b-c)\n")
    assert broken_links(page) == ["#d", "no.md"]


def test_toml_and_json_examples_parse():
    assert blocks("toml")
    for page, text in blocks("toml"):
        try:
            tomllib.loads(text)
        except tomllib.TOMLDecodeError as e:
            pytest.fail(f"{page}: {e}\n{text}")
    for page, text in blocks("json"):
        try:
            json.loads(text)
        except ValueError as e:
            pytest.fail(f"{page}: {e}\n{text}")


def test_python_examples_compile():
    assert blocks("python")
    for page, text in blocks("python"):
        compile(text, page, "exec")


def keys(section: type[BaseModel]) -> Iterator[str]:
    """Names of all settings of a section and of the sections in it."""
    for key, field in section.model_fields.items():
        inner = list(_models_in(field.annotation))
        if not inner:
            yield key
        for model in inner:
            yield from keys(model)


def test_every_setting_is_documented():
    pytest.importorskip("torch")
    from fleetprune_agent.config import AgentConfig  # noqa: PLC0415
    from fleetprune_coordinator.config import FleetConfig  # noqa: PLC0415

    text = (ROOT / "docs/bring-your-own.md").read_text()
    tables = {
        "fleet.toml": text.partition("\n## `fleet.toml`")[2].partition("\n## `agent.toml`")[0],
        "agent.toml": text.partition("\n## `agent.toml`")[2],
    }
    for file, section in (("fleet.toml", FleetConfig), ("agent.toml", AgentConfig)):
        rows = re.findall(r"^\| (`.*?) \|", tables[file], re.MULTILINE)
        said = {key.rpartition(".")[2] for row in rows for key in re.findall(r"`(.+?)`", row)}
        wanted = set(keys(section))
        if file == "agent.toml":  # its broker is that of fleet.toml, and says so
            assert "broker" in said
            wanted -= set(BrokerSettings.model_fields)
        assert sorted(wanted - said) == [], file


def test_the_readmes_files_fit_together(tmp_path):
    """Both configurations are accepted, and the model is what they say it is."""
    torch = pytest.importorskip("torch")
    from fleetprune_agent.config import load_config  # noqa: PLC0415
    from fleetprune_coordinator.config import load_fleet_config  # noqa: PLC0415

    for language in ("toml", "python"):
        for page, text in blocks(language):
            if page == "README.md":
                file = re.match(r"# (\S+)\n", text)
                assert file is not None, f"a {language} example without a file name"
                (tmp_path / file[1]).write_text(text)
    fleet = load_fleet_config(tmp_path / "fleet.toml")
    agent = load_config(tmp_path / "agent.toml")
    assert agent.fleet == fleet.fleet
    assert agent.trains is fleet.classes[agent.device_class].trains
    factory = fleet.import_object(fleet.model.factory, "model.factory")
    model = factory(**fleet.model.arguments)
    output = model(torch.zeros(2, *fleet.model.input_shape))
    assert output.shape == (2, fleet.model.outputs)
