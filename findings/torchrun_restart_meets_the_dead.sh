#!/usr/bin/env bash
# Version: torch 2.13.0
# Behaviour: `torchrun --max-restarts` (c10d rendezvous, also --standalone) starts a failed group again on the store of the attempt
#   before, without a prefix of its own: what the dead ranks had put there is still found, under the same keys. A gloo group then
#   reads the addresses of processes that are gone ("Gloo connectFullMesh failed with ... Connection refused"), unless each new rank
#   happens to have written its own first; so a restart works or fails by chance. Earlier releases had a prefix an attempt;
#   torch/distributed/rendezvous.py now says that a store is made anew for every retry, which DynamicRendezvousHandler does not do.
#   TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or a PrefixStore named by TORCHELASTIC_RESTART_COUNT, avoids it.
# Seen: torch 2.13.0: "attempt 1 finds what attempt 0 wrote, on the same port: True; with a store of its own: False"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat >"$folder/rank.py" <<'PYTHON'
import os
import sys
from torch.distributed.rendezvous import rendezvous

store, rank, world = next(rendezvous("env://"))
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
if attempt == "0":
    store.set("address of rank 0", "that of a dead process")
    open(f"{sys.argv[1]}/port", "w").write(os.environ["MASTER_PORT"])
    sys.exit(1)
same_port = open(f"{sys.argv[1]}/port").read() == os.environ["MASTER_PORT"]
open(f"{sys.argv[1]}/found", "w").write(str(same_port and store.check(["address of rank 0"])))
PYTHON
run() { "$folder/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node 1 --max-restarts 1 "$folder/rank.py" "$folder" >"$folder/log" 2>&1 || { cat "$folder/log"; exit 1; }; cat "$folder/found"; }
shared=$(run)
own=$(TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 run)
echo "attempt 1 finds what attempt 0 wrote, on the same port: $shared; with a store of its own: $own"
[ "$shared" = True ] && [ "$own" = False ] || { echo "not as it was seen: the behaviour has changed" >&2; exit 1; }
