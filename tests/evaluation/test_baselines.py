"""Baselines against the command-line compressors' algorithms and closed forms."""

import bz2
import gzip
import lzma
import math
import shutil
import subprocess

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.baselines import bits_per_byte, compressed_bits_per_byte, unigram_entropy

TEXT = b"".join(b"line %d of a text that repeats itself\n" % (i % 37) for i in range(500))


@pytest.mark.skipif(shutil.which("xz") is None, reason="needs the xz program")
def test_xz_is_what_the_program_gives():
    found = subprocess.run(["xz", "-9", "-c", "-T1"], input=TEXT, capture_output=True, check=True).stdout
    assert compressed_bits_per_byte(TEXT)["xz -9"] == 8 * len(found) / len(TEXT)


def test_figures_belong_to_streams_that_decompress():
    sizes = {
        "xz -9": len(lzma.compress(TEXT, preset=9)),
        "bzip2 -9": len(bz2.compress(TEXT, 9)),
        "zlib -9": len(gzip.compress(TEXT, 9)) - 12,  # the same stream in a header of 18 bytes instead of 6
    }
    assert compressed_bits_per_byte(TEXT) == {name: 8 * size / len(TEXT) for name, size in sizes.items()}


def test_random_bytes_do_not_compress():
    noise = np.random.default_rng(0).bytes(20_000)
    assert all(8.0 < bits < 8.2 for bits in compressed_bits_per_byte(noise).values())


def test_no_text_is_an_error():
    with pytest.raises(ValueError, match="no held-out text"):
        compressed_bits_per_byte(b"")


@given(st.lists(st.integers(0, 20), min_size=1, max_size=200))
@settings(max_examples=50, derandomize=True, deadline=None)
def test_unigram_entropy_is_torchs(tokens: list[int]):
    counts = torch.tensor(np.unique(tokens, return_counts=True)[1], dtype=torch.float64)
    found = float(torch.distributions.Categorical(probs=counts / counts.sum()).entropy())
    assert unigram_entropy(np.array(tokens)) == pytest.approx(found, abs=1e-9)


def test_bits_per_byte():
    assert bits_per_byte(100 * math.log(2), 50) == pytest.approx(2.0)
