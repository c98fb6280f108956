"""Which device a learner computes on, and how many threads it takes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from polrl.core.errors import KnobError


def resolve_device(name: str = "auto") -> torch.device:
    """Return the torch device of that name; "auto" takes CUDA, then MPS, then the CPU.

    Raises
    ------
    KnobError
        If there is no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise KnobError(f"device must be auto or a torch device such as cpu, cuda or mps, got {name!r}") from None
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(device.type, True):
        raise KnobError(f"device {name!r} was asked for, but torch finds none here; use 'auto' or 'cpu'")
    return device


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads inside the block; the calling thread's old setting comes back after it.

    Sums are split by thread, so the last bits of a result depend on the count: exact replay needs it fixed.
    """
    before = torch.get_num_threads()
    if before != count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if before != count:
            torch.set_num_threads(before)
