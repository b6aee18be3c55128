"""Where a real device gets the large parts of a task from."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from fleetprune.errors import TrustError
from fleetprune.files import storage_errors
from fleetprune.messages import Blob, GraphRef
from fleetprune_agent.trust import TrustedRepository


class Puller(Protocol):
    """The part of `transfer.BlobClient` that is used here."""

    def pull(self, name: str, size: int, sha256: str, into: Path) -> None:
        """Fetch and verify a blob into a file; TransportError if it cannot be had now."""
        ...


class DeviceSource:
    """Graphs as signed targets of the release repository, models as blobs named by the task.

    A model needs no signature: it is data whose values are checked, and the worst that wrong
    weights can do is a wrong update. A graph is a program, so its signature is what counts, and
    the hash in the task only has to agree with it.
    """

    def __init__(
        self, repository: Callable[[], TrustedRepository], puller: Puller, folder: Path
    ) -> None:
        """Use `folder` for what is on its way.

        Args:
            repository: Gives the repository; called when the first graph is asked for.
            puller: Fetches blobs.
            folder: Created.
        """
        self._repository, self._puller, self._folder = repository, puller, folder
        with storage_errors("make", folder):
            folder.mkdir(parents=True, exist_ok=True)

    def graph(self, ref: GraphRef) -> bytes:
        """See `worker.TaskSource`; a target that is not known yet is looked for once more."""
        repository = self._repository()
        try:
            signed = repository.describe(ref.target)
        except TrustError:  # signed after the last refresh?
            repository.refresh()
            signed = repository.describe(ref.target)
        if signed.sha256 != ref.sha256:
            raise TrustError(
                f"{ref.target} is signed with SHA-256 {signed.sha256}, the task says {ref.sha256}"
            )
        file = repository.target(ref.target, self._folder / f"{ref.sha256}.onnx")
        return self._take(file)

    def model(self, blob: Blob) -> bytes:
        """See `worker.TaskSource`."""
        file = self._folder / f"{blob.sha256}.model"
        self._puller.pull(f"blobs/{blob.sha256}", blob.size, blob.sha256, file)
        return self._take(file)

    def _take(self, file: Path) -> bytes:
        """Content of a file, which is then removed: it is cached or used up elsewhere."""
        with storage_errors("read", file):
            data = file.read_bytes()
            file.unlink(missing_ok=True)
        return data
