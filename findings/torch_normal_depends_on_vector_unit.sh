#!/usr/bin/env bash
# Version: torch 2.13.0
# Behaviour: Tensor.normal_ with a seeded CPU generator draws other bits on x86 with AVX2 or AVX-512 than on processors without
#   (older x86, and by the same code ARM): from 16 numbers on the draw is vectorised and takes approximations of logarithm and
#   cosine of its own. The stream is the same, so the numbers agree to about a unit in the last place. Fewer than 16 numbers are
#   the same bits everywhere. Ranks on unlike processors therefore do not draw equal replicas of a weight from equal seeds.
# Seen: torch 2.13.0: "1,000 numbers: 1 kernel(s) for AVX2 and AVX-512, another without; 15 numbers: equal everywhere; largest difference below 1e-5"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat >"$folder/draw.py" <<'PYTHON'
import sys

import torch

numbers = [torch.empty(n).normal_(generator=torch.Generator().manual_seed(5)) for n in (15, 1000)]
torch.save(numbers, sys.argv[1])
PYTHON
for unit in default avx2 avx512; do
  ATEN_CPU_CAPABILITY=$unit "$folder/venv/bin/python" "$folder/draw.py" "$folder/$unit.pt"
done
cat >"$folder/compare.py" <<'PYTHON'
import sys

import torch

few, many = zip(*(torch.load(f"{sys.argv[1]}/{unit}.pt") for unit in ("default", "avx2", "avx512")))
assert torch.equal(few[0], few[1]) and torch.equal(few[1], few[2]), "15 numbers differ"
assert torch.equal(many[1], many[2]), "AVX2 and AVX-512 differ"
assert not torch.equal(many[0], many[1]), "1,000 numbers are equal with and without AVX2"
worst = float((many[0] - many[1]).abs().max())
assert worst < 1e-5, worst
print("1,000 numbers: 1 kernel(s) for AVX2 and AVX-512, another without; 15 numbers: equal everywhere; largest difference below 1e-5")
PYTHON
"$folder/venv/bin/python" "$folder/compare.py" "$folder" || { echo "not as it was seen: the behaviour has changed" >&2; exit 1; }
