import runpy
from pathlib import Path

import numpy as np
import pytest

FUZZ = runpy.run_path(str(Path(__file__).with_name("fuzz_wire.py")))


def test_a_short_fuzz_finds_nothing():
    read, refused = FUZZ["fuzz"](20, seed=0)
    assert read > 0
    assert refused > read


def test_every_form_of_positions_is_fuzzed():
    names = [name for name, *_ in FUZZ["targets"]()]
    assert {f"positions in form {form}" for form in (0, 2, 3)} <= set(names)


def test_targets_are_valid_before_they_are_mutated():
    for _, data, decode, _ in FUZZ["targets"]():
        decode(data)


def test_the_fuzz_can_fail():
    def careless(data: bytes) -> int:
        return data[1000]

    targets = FUZZ["targets"]()
    targets.append(("careless", bytes(8), careless, False))
    try:
        with pytest.raises(AssertionError, match=r"^careless, seed 0: IndexError"):
            FUZZ["fuzz"](1, seed=0)
    finally:
        targets.pop()


def test_mutants_are_reproducible():
    first, second = (FUZZ["mutate"](bytes(50), np.random.default_rng(5)) for _ in range(2))
    assert first == second
    assert first != bytes(50)
