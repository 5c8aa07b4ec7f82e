"""A rank that hangs ends itself and says where it hung."""

import subprocess
import sys
import time

from pipeline.training.watchdog import Watchdog

HANGS = """
import threading
from pipeline.training.watchdog import Watchdog

def stuck_in_a_collective():
    threading.Event().wait(60)

with Watchdog(0.3) as watchdog:
    watchdog.beat()
    stuck_in_a_collective()
"""


def test_a_hang_ends_with_stacks():
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert "stuck_in_a_collective" in done.stderr


def test_beats_keep_it_alive():
    with Watchdog(0.4) as watchdog:
        for _ in range(6):
            time.sleep(0.1)
            watchdog.beat()
    time.sleep(0.5)  # nothing is armed any more, or this process would be gone
