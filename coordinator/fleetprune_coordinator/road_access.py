"""What of the road a device may read: its own class's releases and its own tasks, nothing else.

Pure, and asked for each request: by the hub, and by block servers that are processes of their own.
"""

import re
from collections.abc import Callable, Collection

_PREFIX = re.compile(r"[0-9a-f]{64}\.")
"""File names of targets begin with their hash (TUF's consistent snapshots)."""
_BLOB = re.compile(r"[0-9a-f]{64}")


def may_read(
    name: str,
    device_class: str,
    smaller: Callable[[], Collection[str]],
    has_task_with: Callable[[str], bool],
) -> bool:
    """Whether a device may read a name; one that is no plain relative path is refused.

    Args:
        name: Unverified: `metadata/...`, `targets/...` or `blobs/...`.
        device_class: The device's.
        smaller: Gives the classes whose models it may fall back to; asked for those only.
        has_task_with: Whether one of its open tasks names the blob with this SHA-256; asked for
            blobs only.
    """
    match name.split("/"):
        case ["metadata", file]:
            return bool(file) and not file.startswith(".")
        case ["blobs", sha256]:
            return _BLOB.fullmatch(sha256) is not None and has_task_with(sha256)
        case ["targets", "graphs", file]:
            return _PREFIX.match(file) is not None
        case ["targets", "rollouts", file]:
            prefix = _PREFIX.match(file)
            return prefix is not None and file[prefix.end() :] == f"{device_class}.json"
        case ["targets", "releases", of, release, file]:
            mine = of == device_class or of in smaller()
            return mine and release.isdecimal() and _PREFIX.match(file) is not None
    return False


def smaller_classes(device_class: str, next_smaller: Callable[[str], str | None]) -> frozenset[str]:
    """All classes that a class's devices may fall back to, one after the other.

    Args:
        device_class: Theirs.
        next_smaller: Per class the one that its manifest names as `smaller`; None: none.
    """
    found: set[str] = set()
    step = next_smaller(device_class)
    while step is not None and step != device_class and step not in found:
        found.add(step)
        step = next_smaller(step)
    return frozenset(found)
