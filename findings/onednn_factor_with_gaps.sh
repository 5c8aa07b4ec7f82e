#!/usr/bin/env bash
# Version: torch 2.13.0, CPU build
# Behaviour: the fp32 product by oneDNN (mkldnn._linear_pointwise, which torch.compile makes of a linear layer on a CPU) is fast whatever
#   the strides of its first factor, and has no fast kernel for a second factor with gaps, a column slice of a wider matrix: it
#   falls to a reference loop without saying so. The numbers are right. torch.mm takes the same slice in its usual time, and a dense copy
#   costs a tenth of the product. Met where gradients of a SwiGLU's gate and up are made as one [rows, 2 F] matrix and its halves
#   are multiplied by oneDNN: one backward pass took 73 s instead of 0.4.
# Seen: torch 2.13.0: "second factor a half of a wider matrix: over 50 times as long as dense; first factor such a half: not"
#   (1,700 times on a Zen 5, one thread, 256 x 512 x 256)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PY' || { echo "not as it was seen: the behaviour has changed" >&2; exit 1; }
import time

import torch

torch.set_num_threads(1)


def seconds(function):
    function()
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        function()
        best = min(best, time.process_time() - start)
    return best


def onednn(x, weight):
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


wide = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
half = wide[:, :512]
dense = half.contiguous()
dense_seconds = seconds(lambda: onednn(dense, dense))
second = seconds(lambda: onednn(dense, half)) / dense_seconds
first = seconds(lambda: onednn(half, dense)) / dense_seconds
torch.testing.assert_close(onednn(dense, half), dense @ dense.T, rtol=1e-4, atol=1e-3)
print(f"times as long as dense: second factor a half {second:,.0f}, first {first:.1f}")
assert second > 50 and first < 20, (second, first)
print("second factor a half of a wider matrix: over 50 times as long as dense; first factor such a half: not")
PY
