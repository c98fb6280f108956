"""Progress bars, for everything that takes over two seconds."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], total: int, label: str, unit: str = "it") -> Iterator[T]:
    """Yield the items, with a bar on the terminal once two seconds have passed; none in automatic runs."""
    quiet = bool(os.environ.get("POLRL_MODE"))
    yield from tqdm(items, total=total, desc=label, unit=unit, delay=2.0, leave=False, disable=quiet)
