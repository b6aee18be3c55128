"""Sends the blocks that devices ask for, no faster than the broker takes them."""

import logging
import threading
from collections.abc import Callable

from fleetprune.blocks import Request
from fleetprune.errors import WireError
from fleetprune_coordinator.block_queue import BlockQueue
from fleetprune_coordinator.block_reader import BlockReader

log = logging.getLogger(__name__)

END_S = 10.0  # for the block that is being sent when the sender is stopped


class BlockSender:
    """One thread between a `BlockReader` and a connection."""

    def __init__(
        self,
        reader: BlockReader,
        send: Callable[[str, bytes], bool],
        wait_for_room: Callable[[], bool],
    ) -> None:
        """Prepare; `start` begins.

        Args:
            reader: Has the blocks; its `answer` is called in the sender's thread.
            send: Hands (device, answer) to the broker; False: it is lost, and asked for again.
            wait_for_room: Returns when the broker may be handed one more, or False after a
                while if there is no room yet.
        """
        self._reader, self._send, self._wait_for_room = reader, send, wait_for_room
        self._queue = BlockQueue()
        self._thread = threading.Thread(target=self._run, name="blocks", daemon=True)
        self._stopping = threading.Event()

    def start(self) -> None:
        """Begin to send, in the background."""
        self._thread.start()

    def stop(self) -> None:
        """End; what waits is forgotten, and asked for again."""
        self._stopping.set()
        self._queue.close()
        if self._thread.ident is not None:
            self._thread.join(END_S)

    def ask(self, device: str, request: Request) -> None:
        """Let a device's request wait for its turn."""
        self._queue.put(device, request)

    def _run(self) -> None:
        while (item := self._queue.take()) is not None:
            device, request, index = item
            while not self._wait_for_room():
                if self._stopping.is_set():
                    return
            try:
                self._send(device, self._reader.answer(request, index))
            except WireError as e:
                log.warning("get of device %s ignored: %s", device, e)
            except Exception:
                log.exception("a block of %s for %s failed; the others go on", request.name, device)
