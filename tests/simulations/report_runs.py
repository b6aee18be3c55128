"""Made-up runs whose figures can be worked out by hand, written as a simulation writes them."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from fleetprune_sim.history import FILE, DeviceRow, EvaluationRow, History, RoundRow

LABELS = ("shirt", "shoe", "bag")
GROUPS = {"stem": 16, "block": 32, "head": 64}
DENSE = {"params": 10_000, "bytes": 40_000, "macs": 1_000_000, "accuracy": 0.9}
DENSE_UP = 40_000.0  # bytes of a client round: four per parameter
SHARES = {"hub": 1.0, "phone": 0.5, "watch": 0.25, "sensor": 0.125}
DEVICES = {"hub": 1, "phone": 2, "watch": 3, "sensor": 4}


@dataclass
class Synthetic:
    """A run to be; every device answers every round."""

    task: str = "fashion"
    method: str = "nested"
    seed: int = 0
    level: float = 0.80
    """Accuracy of the widest class at the end; each narrower class has one point less."""
    rounds: int = 4
    up: int = 4_000
    """Bytes of an answer."""
    settings: dict = field(default_factory=lambda: {"lr": 0.1})
    partition: dict = field(default_factory=lambda: {"kind": "dirichlet", "alpha": 0.3})
    models: dict[str, str | None] = field(default_factory=lambda: {c: c for c in SHARES})
    sparse: bool = False
    names: dict[str, str] = field(default_factory=dict)
    """Other names of classes."""
    latency_ms: float | None = None
    """Limit of the narrowest class; its model takes 5 ms on the machine that simulates."""
    levels: dict[str, float] = field(default_factory=dict)
    """Accuracies of single classes, over what follows from `level`."""
    lost: dict[str, dict[str, float]] = field(default_factory=dict)
    """What corruptions cost single classes, over what `robustness` says."""
    before: float | None = None
    """Accuracy of the trained model that was cut."""
    new_head: str | None = None
    """The layer of it that began anew."""
    robust: bool = True
    """Whether anybody looked: summaries of older versions do not tell."""
    version: str = "0.1.0"
    devices: dict[str, int] = field(default_factory=lambda: dict(DEVICES))

    def accuracy(self, device_class: str) -> float:
        usual = round(self.level - 0.01 * list(SHARES).index(device_class), 6)
        return self.levels.get(device_class, usual)

    def validation(self, device_class: str, number: int) -> float:
        """Rises evenly and ends 0.01 above the test set's."""
        return (self.accuracy(device_class) + 0.01) * number / self.rounds

    def robustness(self, device_class: str) -> dict[str, float]:
        """Noise costs ten points and a bias five; noise costs each narrower class two more."""
        lost = {"noise": 0.10 + 0.02 * list(SHARES).index(device_class), "bias": 0.05}
        return stand(self.accuracy(device_class), lost | self.lost.get(device_class, {}))

    def name(self, device_class: str) -> str:
        return self.names.get(device_class, device_class)

    def artifact(self, device_class: str) -> dict | None:
        model = self.models[device_class]
        if model is None:
            return None
        share = SHARES[model]
        sparse = {"sparse_bytes": 9_000, "sparse_macs": 200_000} if self.sparse else {}
        return {
            "path": f"releases/{device_class}/model.onnx",
            "sha256": "0" * 64,
            "bytes": int(40_000 * share),
            "params": int(10_000 * share),
            "macs": int(1_000_000 * share),
            "peak_activation_bytes": 2_000,
            "latency_ms": 5.0,
            **sparse,
        }

    def of_class(self, device_class: str) -> dict:
        model, artifact = self.models[device_class], self.artifact(device_class)
        # A device's round takes 1,000 bytes down; nothing is allowed above the class's own share.
        answers = self.devices[device_class] * self.rounds if model else 0
        macs = None if device_class == "hub" else int(1_000_000 * SHARES[device_class])
        latency = self.latency_ms if device_class == "sensor" else None
        return {
            "devices": self.devices[device_class],
            "model": model and self.name(model),
            "budget": {
                "flash_bytes": 50_000, "ram_bytes": None, "macs": macs, "latency_ms": latency,
            },
            "artifact": artifact,
            "keep": {g: int(n * SHARES[model]) for g, n in GROUPS.items()} if model else {},
            "validation_accuracy": self.validation(device_class, self.rounds) if model else None,
            "accuracy": self.accuracy(device_class) if model else None,
            "own_accuracy": self.accuracy(device_class) + 0.005 if model else None,
            **self.looked("robustness", self.robustness(device_class) if model else None),
            "within_budget": artifact is not None and artifact["macs"] <= (macs or 1_000_000),
            "traffic": {"up_bytes": self.up * answers, "down_bytes": 1_000 * answers},
        }  # fmt: skip

    def summary(self) -> dict:
        answers = sum(self.devices[c] for c, m in self.models.items() if m) * self.rounds
        return {
            "schema": 1,
            "task": self.task,
            "method": self.method,
            "seed": self.seed,
            "rounds": self.rounds,
            "version": self.version,
            "engine": "loop",
            "wall_s": 1.0,
            "client_rounds": answers,
            "client_rounds_per_s": 1.0 * answers,
            "dense": DENSE,
            **self.looked("before", self.cut()),
            **self.looked("new_head", self.new_head),
            "traffic": {
                "up_bytes": self.up * answers,
                "down_bytes": 1_000 * answers,
                "up_bytes_per_client_round": float(self.up),
                "dense_up_bytes_per_client_round": DENSE_UP,
            },
            "virtual": {"s": 100.0 * self.rounds, "energy_j": 2.0 * answers},
            "labels": list(LABELS),
            "input_shape": [1, 28, 28],
            "groups": GROUPS,
            "partition": self.partition,
            "settings": {**self.settings, "seed": self.seed},
            "classes": {self.name(c): self.of_class(c) for c in SHARES},
            "devices": [],
        }

    def looked(self, key: str, value: dict | str | None) -> dict:
        return {key: value} if self.robust else {}

    def cut(self) -> dict | None:
        if self.before is None:
            return None
        robustness = stand(self.before, {"noise": 0.08, "bias": 0.04})
        return {"accuracy": self.before, "robustness": robustness}

    def history(self, history: History) -> None:
        """Rounds of 100 s, two joules a device, and an evaluation after each."""
        trained = [c for c, model in self.models.items() if model]
        numbers = range(1, self.rounds + 1)
        history.write(
            RoundRow(
                number, "train", 0, self.name(c), n, n, 0, 0, self.up * n, 1_000 * n, 100.0,
                2.0 * n, 0.1,
            )
            for number in numbers
            for c in trained
            for n in [self.devices[c]]
        )  # fmt: skip
        history.write(
            EvaluationRow(number, self.name(c), self.validation(c, number), 1.0)
            for number in numbers
            for c in trained
        )
        history.write(
            DeviceRow(
                f"{c}-{i:03}", self.name(c), 60, json.dumps([30 + i % 30, 20 - i % 20, 10])
            )
            for c in SHARES
            for i in range(self.devices[c])
        )  # fmt: skip

    def write(self, folder: Path, *, finished: bool = True) -> Path:
        folder.mkdir(parents=True)
        with History(folder / FILE) as history:
            self.history(history)
        if finished:
            (folder / "summary.json").write_text(json.dumps(self.summary()))
        return folder


def stand(clean: float, lost: dict[str, float]) -> dict[str, float]:
    return {"clean": clean, **{name: round(clean - cost, 6) for name, cost in lost.items()}}


def write_fleet(root: Path, seeds: int = 3, **changes) -> Path:
    """Four methods with three seeds: one that wins, one that is wider than allowed, one that
    leaves classes out, one with scattered zeros."""
    dense = dict.fromkeys(SHARES, "hub")
    some = {"hub": "hub", "phone": "phone", "watch": None, "sensor": None}
    for seed in range(seeds):
        shift = (-0.01, 0.0, 0.01)[seed % 3]  # mean 0, sample deviation 0.01
        for method, level, more in (
            ("nested", 0.80, {"up": 4_000}),
            ("dense", 0.84, {"up": 40_000, "models": dense}),
            ("exclude", 0.70, {"up": 20_000, "models": some}),
            ("sparse", 0.75, {"up": 8_000, "models": dense, "sparse": True}),
        ):
            run = Synthetic(
                method=method, seed=seed, level=round(level + shift, 6), **{**more, **changes}
            )
            run.write(root / method / f"seed-{seed}")
    return root
