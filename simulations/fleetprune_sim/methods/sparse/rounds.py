"""Rounds in which devices train one model under a mask that changes as training goes on."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fleetprune.layout import FlatLayout, Role
from fleetprune.messages import Codec, Task, TaskKind
from fleetprune.result import Result
from fleetprune_coordinator.bounds import Bounds
from fleetprune_coordinator.config import ClassConfig
from fleetprune_coordinator.intake import Intake
from fleetprune_coordinator.records import DeviceRecord, MaskRecord, Phase
from fleetprune_coordinator.round_plan import RoundKey
from fleetprune_coordinator.rounds import Rounds
from fleetprune_coordinator.snapshot import Snapshot
from fleetprune_sim.methods.sparse.budget import (
    MOST_FOR_ENDS,
    erdos_renyi_kernel,
    keep_counts,
    tightest,
    uniform,
)
from fleetprune_sim.methods.sparse.frames import (
    SparseHeader,
    decode_answer,
    encode_sparse_model,
)
from fleetprune_sim.methods.sparse.intake import SparseIntake
from fleetprune_sim.methods.sparse.prunable import Bools, best_per_tensor, sparse_layout
from fleetprune_sim.methods.sparse.schedule import Schedule

_PREFIX = "sparse/"


class SparseRounds(Rounds):
    """What the methods of this family have in common."""

    erk: ClassVar[bool] = False
    """Start with Erdős–Rényi-kernel densities; else with one density for all tensors."""
    spare_ends: ClassVar[bool] = False
    """Never prune the first and the last tensor."""
    last_share: ClassVar[float] = 1.0
    """Of the rounds, until which the mask changes."""

    def __init__(self, *args: Any, classes: Mapping[str, ClassConfig], **rest: Any) -> None:
        """As `Rounds`.

        Args:
            *args: As `Rounds`.
            classes: Of the fleet, whose tightest budget the model meets.
            **rest: As `Rounds`.
        """
        super().__init__(*args, **rest)
        dense = self._planner.dense
        self.budget = tightest(classes, dense)
        """Multiply-accumulates of the weights that are not zero."""
        self.layout = sparse_layout(self._architecture, spare_ends=self.spare_ends)
        if self.layout.fixed > MOST_FOR_ENDS * self.budget:
            self.layout = sparse_layout(self._architecture)
        self._schedule = Schedule(
            self._settings.rounds, self._settings.remask_every, self.last_share
        )
        self._flat = FlatLayout(self._architecture, self._architecture.groups, Role.PARAMETER)
        self._holders: frozenset[str] = frozenset()

    # ---- the mask

    def _begin(self) -> None:
        params = self._params()
        self._set(params, self._first_mask(params[self.layout.prunable.index]))

    def _first_mask(self, weights: NDArray[np.float32]) -> Bools:
        """(n,) to begin with: the largest of the (n,) weights of each tensor."""
        densities = (erdos_renyi_kernel if self.erk else uniform)(self.layout)
        counts = keep_counts(self.layout, densities, self.budget)
        every = np.ones(weights.size, np.bool_)
        return best_per_tensor(self.layout.prunable, np.abs(weights), every, counts)

    def _params(self) -> NDArray[np.float32]:
        return self._flat.join(self.model.params)

    def _set(self, params: NDArray[np.float32], mask: Bools) -> None:
        """Go on with (P,) parameters under a (n,) mask."""
        self.mask = mask
        pruned = params * self.layout.prunable.support(mask)
        self.model = replace(self.model, params=dict(self._flat.split(pruned)))

    @property
    def kept(self) -> tuple[int, ...]:
        """Weights kept, per prunable tensor."""
        return self.layout.prunable.kept(self.mask)

    # ---- when the mask changes

    def adjusting(self) -> list[int]:
        """Rounds that end with a new mask."""
        return self._schedule.turns()

    def _moving(self, number: int, most: float) -> tuple[int, ...]:
        """How many weights change places per tensor in a round: at first a share `most`."""
        share = self._schedule.share(number, most)
        sizes = zip(self.kept, self.layout.prunable.sizes, strict=True)
        return tuple(min(int(share * k), k - 1, n - k) for k, n in sizes)

    # ---- asking

    def _ask(self, key: RoundKey) -> tuple[str, tuple[int, ...]]:
        """What devices are to do beside training, and the numbers that go with it."""
        return "", ()

    def _knows(self, device: DeviceRecord) -> bool:
        return device.name in self._holders

    def _payload(self, key: RoundKey, name: str, known: bool) -> bytes:
        ask, counts = self._ask(key) if key.phase is Phase.TRAIN else ("", ())
        return self._encode(key, name, self.mask, known=known, ask=ask, counts=counts)

    def _encode(
        self,
        key: RoundKey,
        name: str,
        mask: Bools,
        *,
        known: bool = False,
        ask: str = "",
        counts: tuple[int, ...] = (),
        candidates: tuple[Bools, ...] = (),
    ) -> bytes:
        params, stats = self.model.vectors(self._architecture, name)
        support = self.layout.prunable.support(mask)
        header = SparseHeader(
            mask_version=self.model.mask_version,
            round=key.number,
            codec=Codec.FP32,
            params=int(np.count_nonzero(support)),
            stats=stats.size,
            runs=self.layout.prunable.runs,
            kept=int(np.count_nonzero(mask)),
            ask=ask,
            counts=counts,
            weight_decay=self._settings.weight_decay,
            candidates=tuple(int(np.count_nonzero(c)) for c in candidates),
        )
        masks = candidates if known else (mask, *candidates)
        return encode_sparse_model(header, params[support], stats, masks)

    # ---- taking in

    def _read(self, answer: bytes) -> Result:
        return decode_answer(answer)

    def _intake(self, key: RoundKey, bounds: Bounds) -> Intake:
        if key.phase is not Phase.TRAIN:
            return super()._intake(key, bounds)
        return self._sparse_intake(key, bounds)

    def _sparse_intake(self, key: RoundKey, bounds: Bounds) -> SparseIntake:
        """What adds up the answers of a training round."""
        return self._new_intake(SparseIntake, bounds)

    def _new_intake(self, kind: type[SparseIntake], bounds: Bounds, **more: Any) -> SparseIntake:
        return kind(
            self._architecture,
            self.model,
            self.ledger,
            bounds,
            layout=self.layout,
            mask=self.mask,
            **more,
        )

    def _apply(self, key: RoundKey, intake: Intake, asked: Iterable[Task]) -> MaskRecord | None:
        asked = list(asked)
        if key.phase is not Phase.TRAIN:
            return super()._apply(key, intake, asked)
        assert isinstance(intake, SparseIntake)
        self._calibrated = False
        before = self._params()
        params, stats = intake.mean(before), intake.statistics()
        sound = self._finite({"params": params}, *stats.values())
        if sound:
            self.model = replace(self.model, stats=stats)
        else:
            params = before
        mask = self.mask
        if intake.trained and sound:
            mask = self._next_mask(key, intake, params[self.layout.prunable.index])
        changed = bool((mask != self.mask).any())
        self._set(params, mask)
        if changed:
            self.model = replace(self.model, mask_version=self.model.mask_version + 1)
            self._holders = frozenset()
            return self._mask(key.number)
        trainers = {t.device for t in asked if t.kind is TaskKind.TRAIN}
        answered = {t.device for t in asked if intake.answered(t.task)} & trainers
        # Who has not answered may have lost its memory: it is sent the mask again.
        self._holders = (self._holders - trainers) | answered
        return None

    def _next_mask(
        self, key: RoundKey, intake: SparseIntake, weights: NDArray[np.float32]
    ) -> Bools:
        """(n,) that the next round starts from.

        Args:
            key: Of the round.
            intake: Its answers, at least one.
            weights: (n,) prunable weights that they lead to.
        """
        return self.mask

    # ---- keeping

    def _extra(self) -> dict[str, NDArray[Any]]:
        state = {"mask": self.mask, "holders": np.array(sorted(self._holders), np.str_)}
        return {_PREFIX + name: value for name, value in (state | self._state()).items()}

    def _state(self) -> dict[str, NDArray[Any]]:
        """What else a method carries over."""
        return {}

    def _resume(self, snapshot: Snapshot) -> None:
        found = {
            name.removeprefix(_PREFIX): value
            for name, value in snapshot.extra.items()
            if name.startswith(_PREFIX)
        }
        self.mask = found["mask"]
        self._holders = frozenset(found["holders"].tolist())
        self._take_up(found)

    def _take_up(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `_state` kept."""

    def figures(self, name: str) -> dict[str, float]:
        """What the model would cost where zeros are skipped, in computing and in storing."""
        key = RoundKey(Phase.TRAIN, self._settings.rounds)
        sparse = self._encode(key, name, self.mask)
        return {
            "density": sum(self.kept) / max(1, self.layout.prunable.n),
            "sparse_macs": self.layout.macs(self.kept),
            "sparse_bytes": len(sparse),
        }
