"""Several runs, one after another or side by side, each in a folder of its own."""

import fcntl
import json
import logging
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fleetprune.errors import ConfigError, FleetpruneError, UsageError
from fleetprune_sim.assemble import assemble
from fleetprune_sim.run import Simulation
from fleetprune_sim.summary import SUMMARY
from fleetprune_sim.wanted import Wanted, claim, give_up
from fleetprune_sim.workers import Workers, worker_context

CHECKPOINT = "dense.pt"
LOOK_S = 0.2  # seconds between two looks at what other processes tell


@dataclass(frozen=True)
class Order:
    """One run, as a process of its own can be told to do it."""

    folder: Path
    fleet: Path | None
    task: str
    method: str
    seed: int
    changes: Mapping[str, Any] = field(default_factory=dict)
    engine: str = "loop"
    workers: int = 1
    resume: bool = False
    warm_rounds: int = 0
    """Rounds of dense training by everyone before the run begins."""
    warm_in: Path | None = None
    """Where runs of several methods share the model of these rounds; None: beside `folder`."""

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.method} seed {self.seed}"


@dataclass(frozen=True)
class Progress:
    """Something has happened in a run."""

    folder: Path
    done: int
    """steps: rounds of trying, training rounds, then calibration passes"""
    total: int
    note: str = ""


Tell = Callable[[Progress], None]
OnRound = Callable[[dict[str, Any]], None]

_exported: dict[str, bytes] = {}
"""Graphs of this process's runs: seeds and methods of a study have most of them in common."""


def carry_out(order: Order, tell: Tell) -> dict[str, Any]:
    """Do a run, or what is left of it; returns its summary."""
    quiet()
    finished = order.folder / SUMMARY
    changes = dict(order.changes)
    if order.warm_rounds:
        changes["model.initial"] = str(_warm_up(order, tell).absolute())
    wanted = assemble(
        order.fleet,
        order.task,
        order.method,
        order.seed,
        changes,
        engine=order.engine,
        workers=order.workers,
    )
    fresh = claim(order.folder, wanted, resume=order.resume)
    if finished.exists():
        return _summary(finished)
    wanted, before = _found_out(wanted, order, tell, fresh=fresh)
    total = before + _steps(wanted)
    last: dict[str, float] = {}

    def closed(metrics: dict[str, Any]) -> None:
        last.update(metrics["evaluated"])
        done = metrics["round"] + (metrics["step"] if metrics["phase"] == "calibrate" else 0)
        note = " ".join(f"{name} {100 * value:.1f}" for name, value in last.items())
        tell(Progress(order.folder, before + done, total, note))

    tell(Progress(order.folder, before, total))
    free = fresh and not before  # what was tried is worth keeping
    with _begun(wanted, order.folder, closed, fresh=free) as simulation:
        simulation.train()
        summary = simulation.finish()
    tell(Progress(order.folder, total, total, "done"))
    return summary


def _summary(path: Path) -> dict[str, Any]:
    """What a finished run has come to.

    Raises:
        ConfigError: The file is damaged.
    """
    try:
        summary: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"{path} cannot be read ({e}): remove it, and --resume makes it anew"
        ) from e
    return summary


def _steps(wanted: Wanted) -> int:
    """Training rounds, then calibration passes."""
    return wanted.config.training.rounds + wanted.config.training.calibration_passes


def _found_out(wanted: Wanted, order: Order, tell: Tell, *, fresh: bool) -> tuple[Wanted, int]:
    """A run with what it asks for, and how many rounds it took to find that out."""
    if not wanted.asked:
        return wanted, 0
    from fleetprune_sim.auto.choose import choose  # noqa: PLC0415  (scikit-learn: a second)

    def told(done: int, of: int, note: str) -> None:
        tell(Progress(order.folder, done, of + _steps(wanted), note))

    try:
        found = choose(wanted, order.folder, told, _exported)
    except UsageError:
        if fresh:
            give_up(order.folder)
        raise
    assert found.tried is not None
    return found, found.tried["rounds"]


def _begun(wanted: Wanted, folder: Path, closed: OnRound, *, fresh: bool) -> Simulation:
    """An open run; what cannot begin leaves no folder that the next try would trip over."""
    try:
        return Simulation(wanted, folder, closed, _exported)
    except FleetpruneError:
        if fresh:
            give_up(folder)
        raise


def _warm_up(order: Order, tell: Tell) -> Path:
    """The dense model that the fleet is taken to run already; trained once per task and seed."""
    folder = order.warm_in or order.folder.parent
    folder /= f"warm-{order.warm_rounds}-seed-{order.seed}"
    checkpoint = folder / CHECKPOINT
    folder.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another method's run may be training it
        if not checkpoint.exists():
            _train_dense(order, folder, tell)
    return checkpoint


def _train_dense(order: Order, folder: Path, tell: Tell) -> None:
    """Train the model of the warm-up, or what is left of it, and save it in `folder`."""
    rounds = {"training.rounds": order.warm_rounds}
    kept = {k: v for k, v in order.changes.items() if k.startswith(("simulation.", "model."))}
    wanted = assemble(
        order.fleet,
        order.task,
        "dense",
        order.seed,
        {**kept, **rounds},
        engine=order.engine,
        workers=order.workers,
    )
    fresh = claim(folder, wanted, resume=True)

    def closed(metrics: dict[str, Any]) -> None:
        tell(Progress(order.folder, 0, 1, f"dense round {metrics['round']}"))

    with _begun(wanted, folder, closed, fresh=fresh) as simulation:
        simulation.train()
        simulation.finish()
        model = simulation.coordinator.rounds.model
        (stats,) = model.stats.values()
        state = simulation.coordinator.network.state_dict()
        state.update({name: torch.from_numpy(v) for name, v in (model.params | stats).items()})
        part = (folder / CHECKPOINT).with_suffix(".part")
        torch.save(state, part)
        part.replace(folder / CHECKPOINT)


def carry_out_all(
    orders: Sequence[Order], jobs: int, tell: Tell
) -> Iterator[tuple[Order, dict[str, Any] | Exception]]:
    """Do several runs; yields each with its summary, or with why it failed, as they end."""
    if jobs <= 1 or len(orders) == 1:
        for order in orders:
            try:
                yield order, carry_out(order, tell)
            except Exception as e:  # the others go on
                yield order, e
        return
    news: Any = worker_context().Queue()
    pool, whole = Workers(jobs, _listen, news), False
    try:
        running: dict[Future[dict[str, Any]], Order] = {
            pool.submit(_carry_out_there, order): order for order in orders
        }
        while running:
            ended, _ = wait(running, timeout=LOOK_S, return_when=FIRST_COMPLETED)
            _pass_on(news, tell)
            for future in ended:
                order = running.pop(future)
                error = future.exception()
                yield order, future.result() if error is None else _as_exception(error)
        whole = True
    finally:
        pool.end(now=not whole)


def _as_exception(error: BaseException) -> Exception:
    return error if isinstance(error, Exception) else RuntimeError(str(error))


def _pass_on(news: Any, tell: Tell) -> None:
    while True:
        try:
            tell(news.get_nowait())
        except queue.Empty:
            return


_news: Any = None
"""Queue of a worker process."""


def _listen(news: Any) -> None:
    global _news  # noqa: PLW0603  (a pool gives its workers no other place)
    _news = news


def _carry_out_there(order: Order) -> dict[str, Any]:
    return carry_out(order, _news.put)


def quiet() -> None:
    """One thread per process, and no chatter from libraries."""
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
