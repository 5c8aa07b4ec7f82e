"""Permutations: bijective for every size and key, and random enough for sorted data."""

import numpy as np
import pytest

from pipeline.dataset.feistel import key_of, permute, subkey


@pytest.mark.parametrize("n", [*range(1, 40), 255, 256, 257, 1000, 65_537])
def test_is_a_bijection(n: int) -> None:
    assert sorted(permute(np.arange(n), n, key_of("test", n))) == list(range(n))


def test_domains_and_keys_may_differ_per_element() -> None:
    n = np.array([5, 7, 300])
    keys = subkey(key_of("k"), np.arange(3))
    together = permute(np.array([4, 0, 299]), n, keys)
    alone = [int(permute(x, size, key)) for x, size, key in zip([4, 0, 299], n, keys)]
    assert together.tolist() == alone


def test_keys_differ() -> None:
    images = {tuple(permute(np.arange(64), 64, subkey(key_of(0, "windows"), e))) for e in range(200)}
    assert len(images) == 200
    assert key_of(1, "2") != key_of("1", 2) != key_of("12")


def chi_square(values: np.ndarray, cells: int) -> float:
    """Chi-square per degree of freedom of a uniform distribution over the cells."""
    observed = np.bincount(values, minlength=cells)
    expected = len(values) / cells
    return float(((observed - expected) ** 2 / expected).sum() / (cells - 1))


def test_successive_images_are_independent_in_low_and_high_bits() -> None:
    """Pairs of successive images over a 64 x 64 grid, and their differences: chi-square/dof near 1."""
    n = 1_391_601_562  # rows of 4,096 tokens in 5.7 T
    x = permute(np.arange(1_000_001), n, key_of("quality"))
    low, high = x % 64, x * 64 // n
    difference = (x[1:] - x[:-1]) % n * 4096 // n
    for values, cells in ((low[:-1] * 64 + low[1:], 4096), (high[:-1] * 64 + high[1:], 4096), (difference, 4096)):
        assert 0.85 < chi_square(values, cells) < 1.2
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 0.005
