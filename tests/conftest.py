"""What makes all tests cheaper, and alike in every run; nothing that a test relies on."""

import logging
import os
import sys

from hypothesis import settings

# Before anything loads OpenMP or BLAS, here or in a child: with as many workers as processors,
# threads spend their time in waiting for each other.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")

# The same examples in every run, and as long as they take. HYPOTHESIS=default draws others.
settings.load_profile(os.environ.get("HYPOTHESIS", "ci"))


def pytest_runtest_setup() -> None:
    """Torch's tracer collects stacks for a log that nobody keeps: a sixth of an export's time.

    Its handler takes itself away at the first message, which never comes through pytest's level.
    """
    if "torch" in sys.modules:
        logging.getLogger("torch.__trace").handlers.clear()
