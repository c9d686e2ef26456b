"""The scripts stand in the folder above; tests import them as modules."""
import os
import signal
import sys
from pathlib import Path

import pytest

# before torch is imported: models this small only lose time between threads, and a thread pool does not survive a fork
os.environ["OMP_NUM_THREADS"] = "1"

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as of a command that a script put into the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def signal_handlers():
    """A script's main() sets its own, which end with its process; here the next test would get them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
