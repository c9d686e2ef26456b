"""Problems made per second on one core, and seconds for the six-number solve: python tests/bench/bench_countdown.py"""
import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import countdown  # noqa: E402


def seconds(work, times=5):
    """The median processor time over some runs: other work on the machine counts little."""
    took = []
    for _ in range(times):
        start = time.process_time()
        work()
        took.append(time.process_time() - start)
    return sorted(took)[times // 2]


def generate(*flags):
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        countdown.main(["--out", folder, *map(str, flags)])


for name, flags in {"3 and 4 numbers up to 99": ["--numbers", 3, 4], "3 numbers up to 99": ["--numbers", 3],
                    "4 numbers up to 99": ["--numbers", 4]}.items():
    took = seconds(lambda: generate("--train", 5000, "--test", 500, "--traces", 0, *flags))
    print(f"{name}: {5500 / took:,.0f} problems/s, written with solution, difficulty and trace")
few, many = (seconds(lambda: generate("--train", 2000, "--traces", k), 3) for k in (0, 16))
print(f"further traces: {2000 * 16 / (many - few):,.0f} rows/s")
six = [25, 50, 75, 100, 3, 6]
for target in (952, 100):
    one, every = seconds(lambda: countdown.solve(six, target)), seconds(lambda: countdown.solutions(six, target))
    print(f"{six} -> {target}: solve {one * 1000:.1f} ms, all {len(countdown.solutions(six, target))} solutions "
          f"{every * 1000:.1f} ms")
