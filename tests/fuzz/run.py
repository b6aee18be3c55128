"""Fuzz with atheris (the extra `fuzz`; CPython 3.11 to 3.13 on Linux).

    python tests/fuzz/run.py TARGET [RUNS] [libFuzzer options]
    python tests/fuzz/run.py --all [RUNS]          every target, a line each
    python tests/fuzz/run.py --keep [TARGET ...]   minimise what was found into the kept corpus

Starts from the kept corpus; what it finds beyond that lies in `out/fuzz/TARGET`, and an input that
was not refused as it should be in `out/fuzz/TARGET-crash-*`.
"""

import logging
import re
import subprocess
import sys
import time
from pathlib import Path

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
    """Minimise what was found, and write it to the kept corpus."""
    from corpus import save  # noqa: PLC0415

    small = OUT / f"{name}.small"
    small.mkdir(parents=True, exist_ok=True)
    for old in small.iterdir():
        old.unlink()
    merge = [sys.executable, __file__, name, "0", "-merge=1", str(small)]
    subprocess.run(merge, check=True, capture_output=True)
    print(f"{name}: {save(name, [path.read_bytes() for path in small.iterdir()])} kept")


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
