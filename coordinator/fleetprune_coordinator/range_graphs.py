"""The graphs that count which values classes' files work with, as far as there can be any."""

import logging

from fleetprune.errors import GraphError
from fleetprune.layout import KeepCounts
from fleetprune.messages import GraphRef
from fleetprune_coordinator.graph_library import GraphLibrary
from fleetprune_coordinator.int8 import UNMEASURED, Int8

log = logging.getLogger(__name__)


class RangeGraphs:
    """Asks the library, and keeps the reasons why there are none."""

    def __init__(self, library: GraphLibrary, wanted: Int8) -> None:
        """Prepare; nothing is exported yet.

        Args:
            library: Exports them.
            wanted: `pruning.int8`. False: there are none. "auto": a model that has none keeps its
                float32 file. True: that is refused, since its budget counts the quantised one.
        """
        self._library, self._wanted = library, wanted
        self._refused: dict[tuple[tuple[str, int], ...], str] = {}
        self._told: set[str] = set()

    def graph(self, name: str, keep: KeepCounts) -> tuple[GraphRef, int] | None:
        """A class's graph, and the length of what it counts; None if there is none.

        Args:
            name: The class, for the log.
            keep: Its shape.

        Raises:
            GraphError: There is none, although `wanted` is True.
        """
        key = tuple(sorted(keep.items()))
        if not self._wanted or key in self._refused:
            return None
        try:
            return self._library.ranges(keep)
        except GraphError as e:
            if self._wanted is True:
                raise GraphError(
                    f"pruning.int8 is true, but the model of class {name} cannot be quantised: {e}"
                ) from e
            self._refused[key] = str(e)
            if name not in self._told:
                self._told.add(name)
                log.warning("class %s keeps its float32 file: %s", name, e)
            return None

    def why_none(self, name: str, keep: KeepCounts) -> str:
        """Why nobody has measured a class's ranges: it cannot be done, or was not."""
        self.graph(name, keep)
        return self._refused.get(tuple(sorted(keep.items())), UNMEASURED)
