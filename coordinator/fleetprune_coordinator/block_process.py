"""`fleetprune coordinator blocks`: serves the release repository's files, and nothing else.

Such a process needs no registry, no torch and no key: it reads the public folder, or a copy of it,
and devices verify what they get. Several share the load, since the broker gives each request to
one of them. Its presence is what makes the coordinator leave these requests alone.
"""

import logging
import re
import threading
from pathlib import Path

from fleetprune.errors import ConfigError, HostileInputError
from fleetprune.mqtt import BrokerSettings, Connection
from fleetprune.topics import Topics
from fleetprune_coordinator.block_reader import BlockReader, read_request
from fleetprune_coordinator.block_sender import BlockSender

log = logging.getLogger(__name__)

PRESENCE_S = 30.0  # between two signs of life: the broker may lose one, and the will with it
ROOM_S = 1.0  # between two looks whether a sender that waits for the broker is to end
PUBLIC = ("metadata", "targets")
ONLINE, OFFLINE = b"online", b"offline"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class BlockProcess:
    """One block server of a fleet."""

    def __init__(
        self,
        settings: BrokerSettings,
        fleet: str,
        public: Path,
        name: str,
        *,
        shared: bool = True,
    ) -> None:
        """Prepare; nothing is opened before `run`.

        Args:
            settings: The broker.
            fleet: Name of the fleet.
            public: The repository's public folder, with `metadata` and `targets`.
            name: Of this server, another one for each of a fleet's.
            shared: False: for brokers without shared subscriptions; there may be one server then.

        Raises:
            ConfigError: There is no repository, or the name is none.
        """
        if not (public / "metadata").is_dir():
            raise ConfigError(
                f"{public} holds no release repository: `fleetprune coordinator init` makes it"
            )
        if not _NAME.fullmatch(name):
            raise ConfigError(f"name {name[:80]!r}: expected 1 to 64 letters, digits, . _ -")
        self._topics, self._public = Topics(fleet), public
        self._presence = self._topics.blocks(name)
        self._reader = BlockReader(self._path)
        self._sender = BlockSender(self._reader, self._send, self._has_room)
        self.connection = Connection(
            settings,
            f"fleetprune-{fleet}-blocks-{name}",
            on_message=self._receive,
            on_up=self._tell,
            will=(self._presence, OFFLINE),
        )
        self.connection.subscribe(
            [self._topics.shared_requests if shared else self._topics.requests]
        )

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` is set."""
        self._sender.start()
        self.connection.start()
        try:
            while not stop.wait(PRESENCE_S):
                self._tell()
        finally:
            self.connection.publish(self._presence, OFFLINE, retain=True)
            self.connection.stop()
            self._sender.stop()
            self._reader.close()

    def _tell(self) -> None:
        self.connection.publish(self._presence, ONLINE, retain=True)

    def _receive(self, topic: str, payload: bytes) -> None:
        parsed = self._topics.parse_up(topic)
        if parsed is None or parsed[1] != "get" or not _NAME.fullmatch(parsed[0]):
            return
        try:
            request = read_request(payload)
        except HostileInputError as e:
            log.warning("get of device %s ignored: %s", parsed[0], e)
            return
        if request.name.split("/")[0] in PUBLIC:  # what else there is, the coordinator has
            self._sender.ask(parsed[0], request)

    def _send(self, device: str, block: bytes) -> bool:
        # An acknowledgement says nothing of the device, which asks again for what it lacks.
        return self.connection.publish(self._topics.down(device, "block"), block, qos=0)

    def _has_room(self) -> bool:
        return self.connection.wait_for_room(ROOM_S)

    def _path(self, name: str) -> Path | None:
        """An existing regular file below the public folder; None for every other name."""
        parts = name.split("/")
        if parts[0] not in PUBLIC or not all(map(_PART.fullmatch, parts)):
            return None
        path = self._public.joinpath(*parts)
        return path if path.is_file() and not path.is_symlink() else None
