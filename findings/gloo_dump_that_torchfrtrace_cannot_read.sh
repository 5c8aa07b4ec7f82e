#!/usr/bin/env bash
# Version: torch 2.13.0, CPU
# Behaviour: the flight recorder records gloo's collectives by default, and its dump has the same fields as NCCL's, but the table of process
#   groups (pg_config) holds one group with an empty name, while the entries belong to group "0". The tool that compares the dumps of all
#   ranks looks the entries' group up in that table and ends with a KeyError: it reads no dump of a gloo run until the table is written anew.
# Seen: "entry's group ('0', 'default_pg'), pg_config names ['']; the tool: KeyError: ('0', 0); with the group's name put in: exit 0"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy tabulate
cat >"$folder/ask.py" <<'PY'
import pickle
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
dist.all_reduce(torch.ones(4))
dump = pickle.loads(c10d._dump_fr_trace())
dist.destroy_process_group()


def read(dump, name):
    folder = Path(sys.argv[1], name)
    folder.mkdir()
    (folder / "rank_0").write_bytes(pickle.dumps(dump))
    tool = [sys.executable, "-m", "torch.distributed.flight_recorder.fr_trace", str(folder), "-p", "rank_"]
    return subprocess.run(tool, capture_output=True, text=True)


group = tuple(dump["entries"][0]["process_group"])
names = [config["name"] for config in dump["pg_config"].values()]
first = read(dump, "as-dumped")
dump["pg_config"] = {group[0]: {"name": group[0], "desc": group[1], "ranks": "[0]"}}
second = read(dump, "mended")
last = first.stderr.strip().splitlines()[-1]
print(f"entry's group {group}, pg_config names {names}; the tool: {last}; with the group's name put in: exit {second.returncode}")
PY
seen=$("$folder/venv/bin/python" -W ignore "$folder/ask.py" "$folder" 2>"$folder/log") || { cat "$folder/log" >&2; exit 1; }
echo "$seen"
[ "$seen" = "entry's group ('0', 'default_pg'), pg_config names ['']; the tool: KeyError: ('0', 0); with the group's name put in: exit 0" ] || exit 1
