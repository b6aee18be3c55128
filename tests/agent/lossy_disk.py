"""A disk that loses what was not synced: every state that a power cut may leave behind.

`recording` notes the operations of a piece of code on the files below a folder. The calls that
give an order (fsync, rename, unlink, mkdir) are intercepted; what was written or created between
two of them is found by comparing the folder with what it was, whoever wrote it. `power_cuts` then
takes every prefix of the record and builds the trees that the disk may hold when power fails there.

What POSIX promises, and no more:
- fsync of a file keeps its content, not its name; fsync of a folder keeps its names: creations,
  renames and removals.
- Of names that are not synced each change is kept or lost on its own; a rename is kept or lost as
  a whole.
- Of content that is not synced all, nothing, a beginning, some pages, or only the length is kept.

So a record in which fsync calls are struck out says what would happen without them.
"""

import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

PAGE = 4096  # bytes that a disk writes as one
ROOT = 0  # the folder that is recorded
Tree = dict[str, bytes | str | None]
"""Relative path to content; None: a folder; a text: where a symbolic link leads."""


@dataclass(frozen=True)
class Event:
    """One operation; files and folders have numbers, since names change.

    Attributes:
        kind: create, mkdir, unlink, rename, write, fsync or mark.
        inode: What it was done to.
        folder: Where its name is, or was.
        name: Its name there.
        to: Folder and name after a rename.
        content: After a write, or of a link, which is made whole.
        label: Who did it (fsync), or what was promised by then (mark).
    """

    kind: str
    inode: int = -1
    folder: int = -1
    name: str = ""
    to: tuple[int, str] = (-1, "")
    content: bytes | str = b""
    label: str = ""


@dataclass
class Record:
    """What some code did to a folder."""

    before: Tree
    events: list[Event]
    paths: dict[int, str]
    """Last known path of every number, for people."""
    look: Callable[[], None] = lambda: None
    """Notes what was written or created since the last look."""

    def mark(self, promise: str) -> None:
        """From here on, a promise has been given: it must outlive a power cut."""
        self.look()
        self.events.append(Event("mark", label=promise))

    def syncs(self) -> list[str]:
        """Labels of all fsyncs, each once, in order."""
        return list(dict.fromkeys(e.label for e in self.events if e.kind == "fsync"))

    def without(self, label: str) -> "Record":
        """The same without the fsyncs of one label."""
        left = [e for e in self.events if not (e.kind == "fsync" and e.label == label)]
        return Record(self.before, left, self.paths)


class _Recorder:
    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.numbers: dict[Path, int] = {self.root: ROOT}
        self.contents: dict[int, bytes] = {}
        self.events: list[Event] = []
        self.paths: dict[int, str] = {}
        self.scan()
        self.before = read_tree(self.root)
        self.start = dict(self.numbers)
        self.events.clear()

    def scan(self) -> None:
        """Note what was created or written since the last look."""
        for path in sorted(self.root.rglob("*")):
            number, content = self.numbers.get(path), _content(path)
            if number is None:
                number = self.numbers[path] = len(self.paths) + 1
                self.paths[number] = str(path.relative_to(self.root))
                kind = "mkdir" if content is None else "create"
                link = content if isinstance(content, str) else b""
                where = self.numbers[path.parent], path.name
                self.events.append(Event(kind, number, *where, content=link))
            if isinstance(content, bytes) and content != self.contents.get(number, b""):
                self.contents[number] = content
                self.events.append(Event("write", number, content=content))

    def known(self, path: Path | str | int) -> Path | None:
        if isinstance(path, int):
            path = str(Path(f"/proc/self/fd/{path}").readlink()).removesuffix(" (deleted)")
        found = _absolute(path)
        return found if found in self.numbers else None

    def removed(self, path: Path | str) -> None:
        found = self.known(path)
        if found is not None:
            event = Event("unlink", self.numbers[found], self.numbers[found.parent], found.name)
            self.events.append(event)
            del self.numbers[found]

    def renamed(self, source: Path | str, target: Path | str) -> None:
        found, to = self.known(source), _absolute(target)
        if found is None:
            return
        number = self.numbers.pop(found)
        folder = self.numbers[found.parent]
        there = (self.numbers[to.parent], to.name)
        self.events.append(Event("rename", number, folder, found.name, to=there))
        self.numbers[to] = number
        self.paths[number] = str(to.relative_to(self.root))

    def synced(self, descriptor: int) -> None:
        found = self.known(descriptor)
        if found is not None:
            name = str(found.relative_to(self.root))
            label = f"{_caller()}: {name}"
            self.events.append(Event("fsync", self.numbers[found], label=label))


def _absolute(path: Path | str) -> Path:
    """Of a name, not of what a link leads to."""
    return Path(path).parent.resolve() / Path(path).name


_PASSED_THROUGH = ("replace_message", "Slots._write_pointer", "JournalFile.note")


def _caller() -> str:
    """The functions of ours that asked for an fsync, outermost last."""
    frame, names = sys._getframe(1), []
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        function = frame.f_code.co_qualname
        if module.startswith("fleetprune") and function not in _PASSED_THROUGH:
            names.append(function)
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(names[:3])


@contextmanager
def recording(root: Path) -> Iterator[Record]:
    """Note what is done below `root`, which may hold files already: these are on disk."""
    recorder = _Recorder(root)
    record = Record(recorder.before, recorder.events, recorder.paths, recorder.scan)
    real = {name: getattr(os, name) for name in _AFTER}

    def wrap(name: str) -> Callable[..., object]:
        def call(*args, **kwargs):
            recorder.scan()
            note = _AFTER[name]
            if name == "fsync":
                note(recorder, *args)
            result = real[name](*args, **kwargs)
            if name != "fsync":
                note(recorder, *args)
            return result

        return call

    for name in real:
        setattr(os, name, wrap(name))
    try:
        yield record
    finally:
        for name, call in real.items():
            setattr(os, name, call)
        recorder.scan()


_AFTER: dict[str, Callable[..., None]] = {
    "fsync": _Recorder.synced,
    "replace": _Recorder.renamed,
    "rename": _Recorder.renamed,
    "unlink": _Recorder.removed,
    "remove": _Recorder.removed,
    "rmdir": _Recorder.removed,
    "mkdir": lambda recorder, *_: recorder.scan(),
}


def read_tree(root: Path) -> Tree:
    """Everything below a folder."""
    return {str(path.relative_to(root)): _content(path) for path in sorted(root.rglob("*"))}


def _content(path: Path) -> bytes | str | None:
    if path.is_symlink():
        return str(path.readlink())
    return None if path.is_dir() else path.read_bytes()


def write_tree(tree: Tree, root: Path) -> None:
    """Make a folder hold exactly a tree."""
    for path in sorted(root.rglob("*"), reverse=True) if root.exists() else ():
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    root.mkdir(exist_ok=True)
    for name, content in sorted(tree.items()):
        if content is None:
            (root / name).mkdir()
        elif isinstance(content, str):
            (root / name).symlink_to(content)
        else:
            (root / name).write_bytes(content)


@dataclass
class _Disk:
    """What is certainly on disk, and what may be."""

    names: dict[int, dict[str, int]]
    contents: dict[int, bytes | str]
    folders: set[int]
    changes: list[Event] = field(default_factory=list)
    """Of names, not synced."""
    versions: dict[int, list[bytes]] = field(default_factory=dict)
    """Contents since the last sync."""

    def take(self, event: Event) -> None:
        if event.kind == "write":
            self.versions.setdefault(event.inode, []).append(event.content)
        elif event.kind == "fsync" and event.inode in self.folders:
            here = [e for e in self.changes if event.inode in (e.folder, e.to[0])]
            self.changes = [e for e in self.changes if e not in here]
            for change in here:
                _apply(self.names, change)
        elif event.kind == "fsync":
            if event.inode in self.versions:
                self.contents[event.inode] = self.versions.pop(event.inode)[-1]
        elif event.kind != "mark":
            if event.kind == "mkdir":
                self.folders.add(event.inode)
                self.names[event.inode] = {}
            elif isinstance(event.content, str):
                self.contents[event.inode] = event.content
            self.changes.append(event)

    def tree(self, kept: Iterable[Event], contents: Mapping[int, bytes | str]) -> Tree:
        names = {folder: dict(entries) for folder, entries in self.names.items()}
        for change in kept:
            _apply(names, change)
        out: Tree = {}

        def walk(folder: int, prefix: str) -> None:
            for name, number in names[folder].items():
                if number in self.folders:
                    out[prefix + name] = None
                    walk(number, f"{prefix}{name}/")
                else:
                    out[prefix + name] = contents.get(number, self.contents.get(number, b""))

        walk(ROOT, "")
        return out


def _apply(names: dict[int, dict[str, int]], change: Event) -> None:
    if change.kind in ("create", "mkdir"):
        names[change.folder][change.name] = change.inode
    else:
        if names[change.folder].get(change.name) == change.inode:
            del names[change.folder][change.name]
        if change.kind == "rename":
            names[change.to[0]][change.to[1]] = change.inode


def _fresh(before: Tree) -> tuple[_Disk, dict[str, int]]:
    """Numbers as the recorder gives them: in the order of sorted paths."""
    disk = _Disk({ROOT: {}}, {}, {ROOT})
    numbers = {"": ROOT}
    order = sorted(before, key=lambda name: Path("/r") / name)
    for i, name in enumerate(order, start=1):
        parent, _, last = name.rpartition("/")
        numbers[name] = i
        disk.names[numbers[parent]][last] = i
        content = before[name]
        if content is None:
            disk.folders.add(i)
            disk.names[i] = {}
        else:
            disk.contents[i] = content
    return disk, numbers


def _remains(old: bytes, versions: list[bytes], rng: random.Random) -> list[bytes]:
    """What may be left of a file that went from `old` through `versions` without a sync."""
    new = versions[-1]
    there = old[: len(new)].ljust(len(new), b"\0")
    pages = range(0, len(new), PAGE)
    torn = b"".join((new if rng.random() < 0.5 else there)[at : at + PAGE] for at in pages)
    left = [new, old, bytes(len(new)), new[: len(new) // 2], torn, *versions[:-1]]
    return list(dict.fromkeys(left))


@dataclass(frozen=True)
class PowerCut:
    """One state."""

    tree: Tree
    after: int
    """Operations before it."""
    promises: tuple[str, ...]
    """Given by then."""
    lost: str
    """For people."""


def power_cuts(record: Record, *, seed: int = 0, most: int = 40) -> Iterator[PowerCut]:
    """The states that a power cut may leave, after each operation.

    All of them where there are at most `most` for one prefix; else the extremes, each change
    lost or kept alone, and random ones up to `most`.
    """
    rng = random.Random(seed)
    disk, _ = _fresh(record.before)
    promises: tuple[str, ...] = ()
    seen: set[tuple[object, ...]] = set()
    for after in range(len(record.events) + 1):
        if after:
            event = record.events[after - 1]
            disk.take(event)
            promises += (event.label,) if event.kind == "mark" else ()
        files = list(disk.versions)
        remains = [_remains(disk.contents.get(i, b""), disk.versions[i], rng) for i in files]
        for kept, left in _choices(len(disk.changes), [len(r) for r in remains], rng, most):
            changes = [e for e, keep in zip(disk.changes, kept, strict=True) if keep]
            contents = {i: r[at] for i, r, at in zip(files, remains, left, strict=True)}
            tree = disk.tree(changes, contents)
            key = (promises, tuple(sorted((n, hash(c)) for n, c in tree.items())))
            if key not in seen:
                seen.add(key)
                lost = [e for e, keep in zip(disk.changes, kept, strict=True) if not keep]
                yield PowerCut(tree, after, promises, _describe(record, lost, files, left))


def _choices(
    changes: int, remains: list[int], rng: random.Random, most: int
) -> list[tuple[tuple[bool, ...], tuple[int, ...]]]:
    number = 2**changes
    for r in remains:
        number *= r
    if number <= most:
        every = product((True, False), repeat=changes)
        return [(k, c) for k in every for c in product(*map(range, remains))]
    all_kept, none = (True,) * changes, (False,) * changes
    ones = [tuple(i == j for j in range(changes)) for i in range(changes)]
    names = [all_kept, none, *ones, *(tuple(not k for k in one) for one in ones)]
    whole = (0,) * len(remains)
    gone = tuple(min(1, r - 1) for r in remains)
    out = [(kept, left) for kept in names for left in (whole, gone)]
    out += [(all_kept, tuple(min(v, r - 1) for r in remains)) for v in range(5)]
    while len(out) < most:
        kept = tuple(rng.random() < 0.5 for _ in range(changes))
        out.append((kept, tuple(rng.randrange(r) for r in remains)))
    return out


def _describe(record: Record, lost: list[Event], files: list[int], left: tuple[int, ...]) -> str:
    names = [f"{e.kind} {e.name}{' to ' + e.to[1] if e.to[1] else ''}" for e in lost]
    remains = ("whole", "old", "zeros", "half", "torn")
    contents = [
        f"{record.paths.get(i, i)} {remains[min(at, 4)]}" for i, at in zip(files, left, strict=True)
    ]
    return f"lost: {', '.join(names) or 'no name'}; content: {', '.join(contents) or 'all synced'}"
