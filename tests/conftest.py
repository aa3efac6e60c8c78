"""Shared fixtures; modules of this folder are importable from its tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# pytest runs in importlib mode, which leaves sys.path alone: cases.py and helpers.py are found through this.
sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("helpers")

torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    """A random generator with a fixed seed."""
    return torch.Generator().manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
