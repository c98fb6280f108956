"""What the tests of the methods share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from polrl.core.device import torch_threads


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Bits depend on the number of threads, and small tensors gain nothing from a second one."""
    with torch_threads(1):
        yield
