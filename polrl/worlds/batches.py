"""Minibatches in random order, epoch by epoch, from a learner's own generator."""

from __future__ import annotations

from typing import Any

import torch

from polrl.core.errors import KnobError


class EpochBatches:
    """Indices of minibatches; each epoch visits the data once, in a new order, without its last partial batch.

    Parameters
    ----------
    count : int
        Number of examples.
    batch_size : int
        From 1 to `count`.
    generator : torch.Generator
        On the device where the indices shall be.

    Attributes
    ----------
    per_epoch : int
        Batches an epoch.
    """

    def __init__(self, count: int, batch_size: int, generator: torch.Generator) -> None:
        if not 1 <= batch_size <= count:
            raise KnobError(f"batch_size must be from 1 to the number of examples, {count}, got {batch_size!r}")
        self.count, self.batch_size = count, batch_size
        self.per_epoch = count // batch_size
        self._generator = generator
        self._order = torch.empty(0, dtype=torch.long, device=generator.device)
        self._next = self.per_epoch

    def draw(self) -> torch.Tensor:
        """Return the indices of the next batch, int64 [batch_size]."""
        if self._next == self.per_epoch:
            self._order = torch.randperm(self.count, generator=self._generator, device=self._generator.device)
            self._next = 0
        start = self._next * self.batch_size
        self._next += 1
        return self._order[start : start + self.batch_size]

    def state_dict(self) -> dict[str, Any]:
        """Return the present epoch's order and the place in it; the generator is its owner's to save."""
        return {"order": self._order, "next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._order = state["order"].to(self._order.device, copy=True)
        self._next = state["next"]
