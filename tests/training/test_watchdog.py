"""A rank that hangs ends itself and says where it hung."""

import subprocess
import sys

HANGS = """
import threading
from pipeline.training.watchdog import Watchdog

def stuck_in_a_collective():
    threading.Event().wait(60)

with Watchdog(0.3) as watchdog:
    watchdog.beat()
    stuck_in_a_collective()
"""

BEATS = """
import time
from pipeline.training.watchdog import Watchdog

with Watchdog(3.0) as watchdog:
    for _ in range(16):
        time.sleep(0.25)
        watchdog.beat()
time.sleep(4)  # nothing is armed any more
print("alive")
"""


def test_a_hang_ends_with_stacks():
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "stuck_in_a_collective" in done.stderr


def test_beats_keep_it_alive():
    """In a process of its own, which a watchdog that is wrong would end."""
    done = subprocess.run([sys.executable, "-c", BEATS], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")
