"""Fuzz with atheris (the extra `fuzz`; CPython 3.11 to 3.13 on Linux).

    python tests/fuzz/run.py TARGET [RUNS] [libFuzzer options]
    python tests/fuzz/run.py --all [RUNS]          every target, a line each
    python tests/fuzz/run.py --keep [TARGET ...]    what was found, without repetitions, is kept

Starts from the kept corpus; what it finds beyond that lies in `out/fuzz/TARGET`, and an input that
was not refused as it should be in `out/fuzz/TARGET-crash-*`.
"""

import logging
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from targets import Target

OUT = Path("out") / "fuzz"
RSS_MB = 600  # what onnxruntime, python-tuf and numpy take is 200 of it
TIMEOUT_S = 10  # for one input
MODULES = ["fleetprune", "fleetprune_agent", "tuf", "securesystemslib", "numpy.lib", "zipfile"]


def fuzz(name: str, runs: int, options: list[str]) -> None:
    """Run one target in this process; does not return."""
    import atheris  # noqa: PLC0415

    logging.disable()  # damaged outbox entries are logged with their traceback

    with atheris.instrument_imports(include=MODULES):
        from corpus import load  # noqa: PLC0415
        from targets import targets  # noqa: PLC0415

    target = targets()[name]
    found = OUT / name
    found.mkdir(parents=True, exist_ok=True)
    for i, data in enumerate([*target.seeds, *load(name)]):
        (found / f"kept-{i}").write_bytes(data)
    arguments = [
        sys.argv[0],
        f"-runs={runs}",
        f"-rss_limit_mb={RSS_MB}",
        f"-timeout={TIMEOUT_S}",
        f"-max_len={target.max_len}",
        f"-artifact_prefix={OUT}/{name}-",
        "-print_final_stats=1",
        *options,
    ]
    atheris.Setup([*arguments, str(found)], target)
    atheris.Fuzz()


def fuzz_all(runs: int) -> bool:
    """Run every target in a process of its own; whether nothing was found."""
    from targets import targets  # noqa: PLC0415

    clean, total = True, 0
    for name, target in targets().items():
        wanted = max(1, round(runs * target.share))
        begun = time.monotonic()
        command = [sys.executable, __file__, name, str(wanted)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        stats = dict(re.findall(r"stat::(\w+): +(\d+)", done.stderr))
        executed = int(stats.get("number_of_executed_units", 0))
        clean, total = clean and done.returncode == 0, total + executed
        print(
            f"{name:18}{executed:>10} executions {time.monotonic() - begun:>6.0f} s "
            f"{stats.get('peak_rss_mb', '?'):>5} MB at most"
            + ("" if done.returncode == 0 else f"\n{done.stderr[-3000:]}"),
            flush=True,
        )
    print(f"{total} executions, {'nothing found' if clean else 'see above'}")
    return clean


def keep(name: str) -> None:
    """Write the shortest of what was found to the kept corpus: each takes a way of its own."""
    from corpus import load, save  # noqa: PLC0415
    from targets import targets  # noqa: PLC0415

    logging.disable()
    target, known, kept = targets()[name], set[object](), []
    found = [path.read_bytes() for path in (OUT / name).iterdir()] if (OUT / name).exists() else []
    for data in sorted({*target.seeds, *load(name), *found}, key=lambda d: (len(d), d)):
        way = _way(target, data)
        if not way <= known:
            known |= way
            kept.append(data)
    print(f"{name}: {save(name, kept)} of {len(found)} kept")


def _way(target: "Target", data: bytes) -> set[object]:
    """Steps from line to line in our code and python-tuf's, and the error without its numbers."""
    way: set[object] = set()

    def trace(frame: FrameType, event: str, arg: object) -> Callable[..., object] | None:
        if not str(frame.f_globals.get("__name__", "")).startswith(("fleetprune", "tuf.")):
            return None
        before = [0]

        def line(frame: FrameType, event: str, arg: object) -> Callable[..., object]:
            way.add((frame.f_code, before[0], frame.f_lineno))
            before[0] = frame.f_lineno
            return line

        return line

    sys.settrace(trace)
    try:
        target.run(data)
    except target.family as e:
        way.add((type(e), re.sub(r"[0-9a-f]*[0-9][0-9a-f]*|'.*?'", "", str(e))[:60]))
    finally:
        sys.settrace(None)
    return way


def main() -> None:
    if sys.argv[1] == "--all":
        sys.exit(not fuzz_all(int(sys.argv[2]) if len(sys.argv) > 2 else 10_000))
    elif sys.argv[1] == "--keep":
        from targets import targets  # noqa: PLC0415

        for name in sys.argv[2:] or targets():
            keep(name)
    else:
        runs = int(sys.argv[2]) if len(sys.argv) > 2 else 10_000
        fuzz(sys.argv[1], runs, sys.argv[3:])


if __name__ == "__main__":
    main()
