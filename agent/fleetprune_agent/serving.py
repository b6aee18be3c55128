"""Predictions from the installed model, whatever happens to it.

The first good runs of a release on trial commit it. A model that raises or yields something that
is not finite is rolled back, and the same samples go to the other slot's model, so the caller
gets an answer and not the failure. Wrong input is told from a wrong model beforehand.
"""

import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from fleetprune.errors import DataError, GraphError, InstallError
from fleetprune.manifest import Manifest
from fleetprune_agent.recent import Recent
from fleetprune_agent.runtime import inference_session
from fleetprune_agent.slot_files import Installed, State
from fleetprune_agent.slots import Slots

COMMIT_AFTER = 3  # good predictions, at least one sample each, that commit a release on trial


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded artifact: one input, the first output is what it predicts."""

    session: ort.InferenceSession
    input_name: str
    rows: int | None
    """Samples per run that the graph was exported for; None: any number."""

    def run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Predict.

        Args:
            x: (n, *input_shape) float32, n >= 1.

        Returns:
            (n, classes) float32, finite.

        Raises:
            GraphError: The model raised, or its output is not finite or not one row per sample.
        """
        step = self.rows or len(x)
        try:
            parts = [
                self.session.run(None, {self.input_name: x[i : i + step]})[0]
                for i in range(0, len(x), step)
            ]
            y = np.concatenate([np.asarray(part, dtype=np.float32) for part in parts])
        except Exception as e:  # onnxruntime has a class of its own for each failure
            raise GraphError(f"the model raised {type(e).__name__}: {_line(e)}") from e
        if y.ndim != 2 or len(y) != len(x):
            raise GraphError(
                f"the model's output has shape {y.shape}, expected ({len(x)}, classes)"
            )
        bad = int(np.count_nonzero(~np.isfinite(y)))
        if bad:
            raise GraphError(f"the model's output has {bad} of {y.size} values that are not finite")
        return y


def load_model(path: Path, threads: int = 1) -> Model:
    """Load a verified artifact.

    Raises:
        GraphError: onnxruntime refuses it, or it does not have exactly one input.
    """
    try:
        session = inference_session(path.read_bytes(), threads)
    except (GraphError, OSError) as e:
        raise GraphError(f"the model does not load: {_line(e)}") from e
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise GraphError(f"the model has {len(inputs)} inputs, expected 1")
    first = inputs[0].shape[0] if inputs[0].shape else None
    return Model(session, inputs[0].name, first if isinstance(first, int) else None)


def _line(e: Exception) -> str:
    return " ".join(str(e).split())[:200]


@dataclass(slots=True)
class _Serving:
    """The release in memory."""

    installed: Installed
    model: Model
    good: int = 0


class Predictor:
    """Serves the active release of some slots; follows every switch. Threads may share it."""

    def __init__(
        self,
        slots: Slots,
        threads: int = 1,
        commit_after: int = COMMIT_AFTER,
        recent: Recent | None = None,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            slots: Where releases are installed.
            threads: Of onnxruntime.
            commit_after: Good predictions that commit a release on trial.
            recent: Keeps what is predicted for, to try later releases on; None: nothing is kept.
        """
        self._recent = recent
        self._slots, self._threads, self._commit_after = slots, threads, commit_after
        self._lock = threading.Lock()
        self._version: tuple[int, int, int] | None = None
        self._serving: _Serving | None = None

    @property
    def manifest(self) -> Manifest:
        """Of the release that serves.

        Raises:
            InstallError: No model is installed yet, or none that is installed loads.
        """
        with self._lock:
            return self._current().installed.manifest

    def predict(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Predict with the active release, or with the other slot's if that one fails.

        Args:
            x: (n, *input_shape) finite, of the manifest's input shape; cast to float32.

        Returns:
            (n, classes) float32, finite.

        Raises:
            DataError: `x` has another shape, no samples or values that are not finite.
            InstallError: No model is installed yet, or none that is installed works.
        """
        with self._lock:
            serving = self._current()
            try:
                y = serving.model.run(_checked(x, serving.installed.manifest))
            except GraphError as e:
                serving = self._fall_back(serving.installed, e)
                try:
                    y = serving.model.run(_checked(x, serving.installed.manifest))
                except GraphError as second:
                    raise InstallError(f"both installed models fail: {e}; {second}") from second
            self._count_good(serving)
            if self._recent is not None:
                self._recent.add(_checked(x, serving.installed.manifest))
            return y

    def _current(self) -> _Serving:
        version = self._slots.version()
        if self._serving is not None and version == self._version:
            return self._serving
        installed = self._slots.active()
        if installed is None:
            raise InstallError(
                "no model installed yet: the first release has not arrived, or was refused"
            )
        if self._serving is not None and self._serving.installed.manifest == installed.manifest:
            self._serving.installed = installed  # only its state changed
        else:
            try:
                self._serving = _Serving(installed, load_model(installed.model, self._threads))
            except GraphError as e:
                return self._fall_back(installed, e)
        self._version = version
        return self._serving

    def _fall_back(self, failed: Installed, e: GraphError) -> _Serving:
        """Roll back and load the other slot; works in memory even where the disk is full."""
        try:
            other = self._slots.rollback(str(e), release=failed.release)
        except InstallError:
            other = self._slots.fallback(failed)
        if other is None:
            raise InstallError(
                f"release {failed.release} fails and there is no other model to fall back to: {e}"
            ) from e
        try:
            self._serving = _Serving(other, load_model(other.model, self._threads))
        except GraphError as second:
            raise InstallError(f"both installed models fail: {e}; {second}") from second
        self._version = self._slots.version()
        return self._serving

    def _count_good(self, serving: _Serving) -> None:
        serving.good += 1
        if serving.installed.state is State.TRIAL and serving.good >= self._commit_after:
            with suppress(InstallError):  # a disk that is full now must not cost an answer
                self._slots.commit(serving.installed.release)


def _checked(x: NDArray[np.float32], manifest: Manifest) -> NDArray[np.float32]:
    x = np.ascontiguousarray(x, dtype=np.float32)
    if x.shape[1:] != manifest.input_shape or x.ndim == 0 or len(x) == 0:
        want = ", ".join(map(str, ("n", *manifest.input_shape)))
        raise DataError(f"input has shape {x.shape}, expected ({want}), n >= 1")
    bad = int(np.count_nonzero(~np.isfinite(x)))
    if bad:
        raise DataError(f"input has {bad} of {x.size} values that are not finite")
    return x
