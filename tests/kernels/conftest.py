"""On a GPU `python -m benchmarks.gpu` compares the kernels; these tests run them in Triton's interpreter."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if torch.cuda.is_available() and "tests/kernels" in item.path.as_posix():
            item.add_marker(
                pytest.mark.skip(reason="Triton's interpreter is off where there is a GPU: python -m benchmarks.gpu")
            )
