"""Imports point only where they may (docs: the layout); read from the sources, run nowhere."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "fleetprune": ROOT / "shared",
    "fleetprune_agent": ROOT / "agent",
    "fleetprune_coordinator": ROOT / "coordinator",
    "fleetprune_sim": ROOT / "simulations",
}
HEAVY = {
    "torch", "torchvision", "flwr", "ray", "onnx", "onnxscript", "torch_pruning", "sqlite_utils"
}  # fmt: skip

# Package: what none of its modules may import.
NEVER = {
    "fleetprune": {"fleetprune_agent", "fleetprune_coordinator", "fleetprune_sim"}
    | HEAVY
    | {"onnxruntime"},
    "fleetprune_agent": {"fleetprune_coordinator", "fleetprune_sim"} | HEAVY,
    "fleetprune_coordinator": {"fleetprune_agent", "fleetprune_sim"},
    "fleetprune_sim": set(),
}
# Import: the only modules that may have it (a name without a dot stands for a whole package).
ONLY = {
    "paho": {"fleetprune.mqtt"},
    "flwr": {
        "fleetprune_coordinator.strategy",
        "fleetprune_coordinator.loop_grid",
        "fleetprune_coordinator.mqtt_grid",
        "fleetprune_coordinator.task_grid",
        "fleetprune_coordinator.flower_messages",
        "fleetprune_sim",
    },
    "ray": {"fleetprune_sim.ray_cluster"},  # started and ended in one place
    "torch_pruning": {"fleetprune_sim"},
    # a device may do without it; where it is installed it costs 18 MB
    "cryptography": {"fleetprune_agent.device_key", "fleetprune_coordinator"},
}


def imports(source: str) -> set[str]:
    """Full names of all that a source imports, anywhere in it, also by `import_module("...")`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            name = node.func.id if isinstance(node.func, ast.Name) else name
            if name in {"import_module", "__import__"}:
                found.add(str(node.args[0].value))
    return found


def violations(module: str, source: str) -> list[str]:
    """What a module imports against the rules."""
    package = module.split(".", maxsplit=1)[0]
    wrong = []
    for name in sorted(imports(source)):
        top = name.split(".")[0]
        if top in NEVER[package]:
            wrong.append(f"{module} imports {name}: never in {package}")
        elif top in ONLY and not {module, package, module.rpartition(".")[0]} & ONLY[top]:
            wrong.append(f"{module} imports {name}: only {', '.join(sorted(ONLY[top]))} may")
    return wrong


def modules():
    for package, folder in PACKAGES.items():
        for path in sorted((folder / package).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join(p for p in parts if p != "__init__"), path


@pytest.mark.parametrize(("module", "path"), [pytest.param(m, p, id=m) for m, p in modules()])
def test_imports(module, path):
    assert violations(module, path.read_text()) == []


def test_all_packages_are_looked_at():
    seen = {module.split(".")[0] for module, _ in modules()}
    assert seen == set(PACKAGES)
    assert {"fleetprune.mqtt", "fleetprune_agent.worker"} <= {module for module, _ in modules()}


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        (
            "fleetprune_agent.made_up",
            "def f():\n    import torch.nn as nn\n",
            ["fleetprune_agent.made_up imports torch.nn: never in fleetprune_agent"],
        ),
        (
            "fleetprune_agent.made_up",
            "from fleetprune_coordinator.plan import x",
            [
                "fleetprune_agent.made_up imports fleetprune_coordinator.plan: "
                "never in fleetprune_agent"
            ],
        ),
        (
            "fleetprune_coordinator.made_up",
            "if True:\n    from fleetprune_agent import worker",
            [
                "fleetprune_coordinator.made_up imports fleetprune_agent: "
                "never in fleetprune_coordinator"
            ],
        ),
        (
            "fleetprune.made_up",
            "import numpy, fleetprune_sim",
            ["fleetprune.made_up imports fleetprune_sim: never in fleetprune"],
        ),
        (
            "fleetprune_agent.made_up",
            "import importlib\nimportlib.import_module('flwr.client')",
            ["fleetprune_agent.made_up imports flwr.client: never in fleetprune_agent"],
        ),
        (
            "fleetprune.made_up",
            "from paho.mqtt import client",
            ["fleetprune.made_up imports paho.mqtt: only fleetprune.mqtt may"],
        ),
        (
            "fleetprune_coordinator.made_up",
            "import flwr, torch_pruning",
            [
                "fleetprune_coordinator.made_up imports flwr: only "
                + ", ".join(sorted(ONLY["flwr"]))
                + " may",
                "fleetprune_coordinator.made_up imports torch_pruning: only fleetprune_sim may",
            ],
        ),
        (
            "fleetprune_sim.made_up",
            "from importlib import import_module\nimport_module('ray')",
            ["fleetprune_sim.made_up imports ray: only fleetprune_sim.ray_cluster may"],
        ),
        (
            "fleetprune_agent.made_up",
            "from cryptography import x509",
            [
                "fleetprune_agent.made_up imports cryptography: only fleetprune_agent.device_key, "
                "fleetprune_coordinator may"
            ],
        ),
        ("fleetprune_coordinator.couplings", "import torch, numpy", []),
        ("fleetprune_sim.made_up", "import flwr, fleetprune_agent, fleetprune_coordinator", []),
        ("fleetprune_coordinator.strategy", "from flwr.serverapp import strategy", []),
        ("fleetprune.mqtt", "import paho.mqtt.client as paho", []),
    ],
)
def test_the_checker_can_fail(module, source, wrong):
    assert violations(module, source) == wrong
