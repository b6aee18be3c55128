"""One task, from its message to the bytes of its answer. Knows nothing of any transport.

The same `Worker` runs on a device and in a simulation; only the `TaskSource` differs (signed
targets over MQTT, or memory) and where answers are kept (`feedback.OnDisk`, `feedback.InMemory`).
"""

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from importlib.metadata import version as distribution_version
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from fleetprune.errors import DataError, GraphError, MessageError, TransportError, WireError
from fleetprune.messages import Blob, Codec, GraphRef, ResultHeader, Task, TaskKind
from fleetprune.model_payload import ModelPayload, decode_model
from fleetprune.result import encode_result
from fleetprune.update import SparseUpdate, decode_update, top_k
from fleetprune.values import TOP
from fleetprune_agent.data import Batches, Samples
from fleetprune_agent.feedback import Memory, MemoryStore
from fleetprune_agent.memory import rss_mb
from fleetprune_agent.observer import IMPORTANCE, observe
from fleetprune_agent.sessions import Arrays, Graph, Graphs, require_finite
from fleetprune_agent.timing import RUNTIME, fetch_all, time_graphs
from fleetprune_agent.trainer import log_frequencies, never, train
from fleetprune_agent.trust import SignedFile

FRAME_BYTES: Final = 64 * 1024
"""Bytes of a model's frame beside its values."""


class TaskSource(Protocol):
    """Where the large parts of a task come from. The worker checks all bytes by their hashes."""

    def graph(self, ref: GraphRef) -> bytes:
        """The ONNX bytes; TransportError, TrustError or InstallError if they cannot be had."""
        ...

    def model(self, blob: Blob) -> bytes:
        """A frame of kind MODL; TransportError or InstallError if it cannot be had."""
        ...


class _Closed:
    """The source of a worker that is given one per task."""

    def graph(self, ref: GraphRef) -> bytes:
        raise TransportError(f"no source to read {ref.target} from")

    def model(self, blob: Blob) -> bytes:
        raise TransportError(f"no source to read {blob.sha256} from")


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """Who the worker works for."""

    device: str
    trains: bool = True
    """False: training tasks are refused."""
    max_task_s: float = math.inf
    """Seconds of training or observing after which a task is refused: a task is not signed, and
    what it asks for must not cost more than that."""


class Worker:
    """Does a device's tasks, one at a time."""

    def __init__(
        self,
        settings: WorkerSettings,
        samples: Samples,
        graphs: Graphs,
        answers: MemoryStore,
        *,
        source: TaskSource | None = None,
        clock: Callable[[], float] = time.perf_counter,
        memory_mb: Callable[[], float] = rss_mb,
        stopped: Callable[[], bool] = never,
    ) -> None:
        """Make a worker.

        Args:
            settings: Who the worker works for.
            samples: What it trains on and observes.
            graphs: Sessions; may be shared by the workers of one process.
            answers: Where residual and answers are kept; its own.
            source: Where graphs and models come from, unless `handle` is given another.
            clock: Seconds; how long work took goes into the answer.
            memory_mb: Memory of this process; goes into the answer.
            stopped: Asked between steps; True ends a task with StoppedError.
        """
        self.settings, self.samples, self.graphs = settings, samples, graphs
        self._answers, self._source, self._clock = answers, source or _Closed(), clock
        self._memory_mb, self._stopped = memory_mb, stopped

    def answer(self, task: str) -> bytes | None:
        """The stored answer to a task; None if it has not been answered, or long ago."""
        return self._answers.load().answers.get(task)

    def handle(self, task: Task, source: TaskSource | None = None) -> bytes:
        """Do a task, or find the answer that was given to it before.

        Answer and residual are stored by one atomic write, the last thing that happens here, so
        a kill at any instant leaves either a task that was never done or one that is done for
        good (see `feedback`).

        Args:
            task: For this device.
            source: Instead of the worker's own.

        Returns:
            A frame of kind RSLT.

        Raises:
            MessageError: The task is for another device.
            DataError: The device's data or settings do not allow it.
            GraphError: No graph works here, or training diverged.
            HostileInputError: What came from the source is not what the task names.
            TransportError: The source does not answer; the task may be tried again.
            InstallError: The disk refuses; nothing has changed.
            StoppedError: The agent was told to end.
        """
        if task.device != self.settings.device:
            raise MessageError(
                f"task {task.task} is for device {task.device}, this is {self.settings.device}"
            )
        memory = self._answers.load()
        if (known := memory.answers.get(task.task)) is not None:
            return known
        source = source or self._source
        if task.kind is TaskKind.TIME:
            answer = self._time(task, source)
            self._answers.save(memory.answered(task.task, answer))
            return answer
        graphs = self._resolve(task, source)
        payload = self._payload(task, source, graphs[0])
        started = self._clock()
        if task.kind is TaskKind.TRAIN:
            memory, answer = self._train(task, graphs, payload, memory, started)
        else:
            answer = self._observe(task, graphs[0], payload, started)
        self._answers.save(memory.answered(task.task, answer))
        return answer

    def _resolve(self, task: Task, source: TaskSource) -> list[Graph]:
        """The task's graphs, or the portable ones where the fast ones do not work; `look` last."""
        if task.kind is TaskKind.TRAIN:
            if not self.settings.trains:
                raise DataError(f"task {task.task} trains, but this device has trains = false")
            if self.samples.y is None:
                raise DataError(f"task {task.task} trains, but this device's data has no labels")
        try:
            graphs = [self._graph(ref, task.kind, source) for ref in task.graphs]
        except GraphError:
            if not task.portable:
                raise
            graphs = [self._graph(ref, task.kind, source) for ref in task.portable]
        kinds = {
            (m.parameters, m.statistics, m.batch, m.units, m.criterion)
            for m in (g.meta for g in graphs)
        }
        if len(kinds) > 1:
            raise GraphError(f"task {task.task}: its graphs are of different shapes")
        if task.look is not None and task.kind is TaskKind.TRAIN and task.scores:
            look, own = self._graph(task.look, TaskKind.OBSERVE, source), graphs[0].meta
            # Fixed statistics of narrower models stand behind the model's own.
            if look.meta.parameters != own.parameters or look.meta.statistics > own.statistics:
                raise GraphError(f"task {task.task}: its graphs are of different shapes")
            graphs.append(look)
        return graphs

    def _graph(self, ref: GraphRef, task: TaskKind, source: TaskSource) -> Graph:
        graph = self.graphs.get(ref, source.graph)
        meta = graph.meta
        kind = "train_step" if task is TaskKind.TRAIN else "observe"
        if meta.kind != kind or not meta.batch:
            raise GraphError(f"{ref.target} is a graph of kind {meta.kind}, expected {kind}")
        y = meta.verification.y
        self.samples.expect(tuple(meta.verification.x.shape[1:]), (y.high or None) if y else None)
        return graph

    def _payload(self, task: Task, source: TaskSource, graph: Graph) -> ModelPayload:
        most = self._longest(graph)
        if task.model.size > most:  # before it is fetched: it would fill the disk
            raise WireError(f"model of {task.model.size} bytes, expected at most {most}")
        payload = self._decode(fetch_model(task.model, source), task, graph)
        if (payload.mask_version, payload.round) != (task.mask_version, task.round):
            raise WireError(
                f"model of mask version {payload.mask_version} and round {payload.round}, "
                f"expected {task.mask_version} and {task.round}"
            )
        return payload

    def _longest(self, graph: Graph) -> int:
        """Bytes that a model of the graph's shape has at most."""
        marks = graph.meta.parameters // 8 + 2
        return 4 * (graph.meta.parameters + graph.meta.statistics) + marks + FRAME_BYTES

    def _decode(self, data: bytes, task: Task, graph: Graph) -> ModelPayload:
        """A task's model from its frame; HostileInputError if it is not of the graph's shape."""
        meta = graph.meta
        return decode_model(data, parameters=meta.parameters, statistics=meta.statistics)

    def _train(
        self,
        task: Task,
        graphs: list[Graph],
        payload: ModelPayload,
        memory: Memory,
        started: float,
    ) -> tuple[Memory, bytes]:
        looks = [g for g in graphs if g.meta.kind == "observe"]
        graphs = [g for g in graphs if g.meta.kind == "train_step"]
        seen = self._seen(task, looks[0], payload, started) if looks else {}
        order = stream(task, Draws.ORDER)
        batches = Batches(self.samples.x, self.samples.y, graphs[0].meta.batch or 1, order)
        trained = train(
            [g.session for g in graphs],
            payload,
            batches,
            epochs=task.epochs,
            max_steps=task.max_steps,
            learning_rate=task.learning_rate,
            rng=stream(task, Draws.GRAPHS) if len(graphs) > 1 else None,
            proximal=task.proximal,
            prior=self._prior(graphs[0]),
            after_step=None if payload.support is None else holding(payload.support),
            stopped=self._watch(task, started),
        )
        seconds = self._clock() - started
        with np.errstate(over="ignore", invalid="ignore"):  # refused on the next line but one
            total = trained.params - payload.params
            total = total if payload.support is None else total[payload.support]
            total += memory.residual_for(task.mask_version, task.shape, total.size)
        require_finite("update", total)
        rounding = stream(task, Draws.ROUNDING) if task.codec in TOP else None
        update, left_out = lossy(total, task, rounding)
        sections = seen | ({"stats": trained.stats} if trained.stats.size else {})
        if trained.scores is not None and task.scores:
            sections["scores"] = trained.scores
        header = self._header(task, seconds, steps=trained.steps, loss=trained.loss)
        answer = encode_result(header, sections, update)
        return memory.left_out(task.mask_version, task.shape, left_out), answer

    def _watch(self, task: Task, started: float) -> Callable[[], bool]:
        """Whether to stop; DataError when the task has had its time."""

        def stopped() -> bool:
            if self._clock() - started > self.settings.max_task_s:
                raise DataError(
                    f"task {task.task} takes longer than max_task_s = {self.settings.max_task_s:g}"
                )
            return self._stopped()

        return stopped if self.settings.max_task_s < math.inf else self._stopped

    def _prior(self, graph: Graph) -> NDArray[np.float32] | None:
        """The device's label frequencies, for graphs that adjust logits."""
        if not graph.meta.classes or self.samples.y is None:
            return None
        return log_frequencies(self.samples.y, graph.meta.classes)

    def _seen(
        self, task: Task, graph: Graph, payload: ModelPayload, started: float
    ) -> dict[str, NDArray[np.float32]]:
        """What the samples say of importance, by the model as it came."""
        own = replace(payload, stats=payload.stats[: graph.meta.statistics])
        batches = Batches(self.samples.x, self.samples.y, graph.meta.batch or 1)
        sums = observe(graph.session, own, batches, self._watch(task, started)).sums
        return {name: values for name, values in sums.items() if name in IMPORTANCE}

    def _observe(self, task: Task, graph: Graph, payload: ModelPayload, started: float) -> bytes:
        batches = Batches(self.samples.x, self.samples.y, graph.meta.batch or 1)
        seen = observe(graph.session, payload, batches, self._watch(task, started))
        header = self._header(task, self._clock() - started, correct=seen.correct)
        sums = {n: v for n, v in seen.sums.items() if task.scores or n not in IMPORTANCE}
        return encode_result(header, sums, None)

    def _time(self, task: Task, source: TaskSource) -> bytes:
        onnx, started = fetch_all(task, source.graph), self._clock()
        timed = time_graphs(
            onnx,
            sweeps=task.epochs,
            runs=task.max_steps,
            threads=self.graphs.threads,
            clock=self._clock,
            stopped=self._watch(task, started),
        )
        header = self._header(task, self._clock() - started, steps=timed.runs)
        said = {"runtime": RUNTIME, "runtime_version": distribution_version(RUNTIME)}
        sections = {"median_ms": timed.median_ms, "spread_ms": timed.spread_ms}
        return encode_result(header.model_copy(update=said), sections, None)

    def _header(
        self,
        task: Task,
        seconds: float,
        *,
        steps: int = 0,
        loss: float | None = None,
        correct: int | None = None,
    ) -> ResultHeader:
        return ResultHeader(
            task=task.task,
            device=task.device,
            kind=task.kind,
            round=task.round,
            mask_version=task.mask_version,
            samples=len(self.samples),
            steps=steps,
            loss=loss,
            correct=correct,
            train_s=max(0.0, round(seconds, 4)),
            rss_mb=round(self._memory_mb(), 1),
        )


def holding(support: NDArray[np.bool_]) -> Callable[[Arrays], None]:
    """What keeps pruned parameters at zero: called after each step of training.

    Args:
        support: (P,), which parameters are not pruned.
    """
    kept = support.astype(np.float32)

    def hold(state: Arrays) -> None:
        state["params"] *= kept
        state["momentum"] *= kept

    return hold


def fetch_model(blob: Blob, source: TaskSource) -> bytes:
    """The bytes that a task names; WireError if the source has others."""
    data = source.model(blob)
    got = (hashlib.sha256(data).hexdigest(), len(data))
    if got != (blob.sha256, blob.size):
        raise WireError(
            f"model of {got[1]} bytes with SHA-256 {got[0]}, "
            f"expected {blob.size} bytes with {blob.sha256}"
        )
    return data


def lossy(
    total: NDArray[np.float32], task: Task, rng: np.random.Generator | None
) -> tuple[bytes, NDArray[np.float32]]:
    """Encode a change as the task asks, and say what that leaves out.

    Args:
        total: (k,) float32, the change of what is not pruned and what earlier updates left out.
        task: Says codec and share of values.
        rng: For stochastic rounding; None: to nearest.

    Returns:
        The encoded update, and (k,) float32: `total` less what its receiver will decode.
    """
    positions = top_k(total, task.top_k) if task.top_k < 1 else None
    values = total if positions is None else total[positions]
    update = SparseUpdate(task.mask_version, total.size, values, positions)
    encoded = update.encode(task.codec, rng)
    if task.codec is Codec.FP32 and positions is None:
        return encoded, np.zeros_like(total)
    sent = decode_update(encoded, mask_version=task.mask_version, size=total.size)
    return encoded, total - sent.dense()


class Draws(IntEnum):
    """What chance decides in a task."""

    ORDER = 0
    """of the samples"""
    GRAPHS = 1
    """which of several is trained next"""
    ROUNDING = 2
    """of the values that are sent"""


def stream(task: Task, draws: Draws) -> np.random.Generator:
    """The generator for one purpose, of the task's seed and device; independent of the others."""
    name = int.from_bytes(hashlib.blake2b(task.device.encode(), digest_size=8).digest())
    return np.random.default_rng(np.random.SeedSequence([task.seed, name], spawn_key=(draws,)))


def streams(task: Task) -> list[np.random.Generator]:
    """The generators for all purposes, in the order of `Draws`."""
    return [stream(task, draws) for draws in Draws]


class _ReadSource:
    """Everything by name from one function."""

    def __init__(self, read: Callable[[str], bytes]) -> None:
        self._read = read

    def graph(self, ref: GraphRef) -> bytes:
        return self._read(SignedFile(ref.target, 0, ref.sha256).blob)

    def model(self, blob: Blob) -> bytes:
        return self._read(f"blobs/{blob.sha256}")


def as_loop_device(worker: Worker) -> Callable[[bytes, Callable[[str], bytes]], bytes]:
    """A simulated device: a function from a task's JSON and a reader of blobs to its answer.

    The reader is asked for what a real device asks its coordinator for: graphs by their name in
    the release repository, `targets/<folder>/<sha256>.<file>`, and models by `blobs/<sha256>`. What
    `Worker.handle` raises is raised.
    """

    def device(task: bytes, read: Callable[[str], bytes]) -> bytes:
        return worker.handle(Task.from_bytes(task), _ReadSource(read))

    return device
