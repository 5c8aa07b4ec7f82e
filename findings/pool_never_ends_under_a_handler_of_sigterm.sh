#!/usr/bin/env bash
# Version: Python 3.11 to 3.13, Linux (workers are forked); lm-eval 0.4.13
# Behaviour: leaving `with multiprocessing.Pool()` ends its workers by SIGTERM and joins them without a limit. Forked workers have the
#   parent's Python handlers: where the parent has one for SIGTERM that notes the signal and returns, a shutdown flag as servers and trainers
#   have it, a worker that waits for the queue's lock, which the parent holds by then, takes the signal, waits on, and the parent waits for
#   it for ever. No error, no CPU. Not each time: a worker that has met the end of the queue before is gone; of a few pools one stays.
#   lm-eval makes such a pool, one worker a core, for every bootstrapped standard error, also where there is one task for all of them
#   (bootstrap_iters up to 1,000); DISABLE_MULTIPROC in the environment draws the same numbers without it.
# Seen: Python 3.11.7: "default handler: fifty pools end; one that sets a flag: one of them does not"
set -euo pipefail
python3 - <<'PY' || { echo "not as it was seen: the behaviour has changed" >&2; exit 1; }
import os
import signal
import subprocess
import sys

POOL = """
import multiprocessing, os, signal, sys
if sys.argv[1] == "flag":
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
for _ in range(50):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(abs, [-1]) == [1]
print("ended")
"""


def ends(handler):
    started = subprocess.Popen(
        [sys.executable, "-c", POOL, handler], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        return started.communicate(timeout=60)[0] == "ended\n"
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        started.communicate()
        return False


default, flag = ends("default"), ends("flag")
assert default and not flag, (default, flag)
print("default handler: fifty pools end; one that sets a flag: one of them does not")
PY
