"""`History`: what was measured, step by step, in columns that grow cheaply and are read at leisure."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch

from polrl.core.learner import Metrics


class History:
    """Rows of scalar metrics, each with its step and phase.

    Appending keeps tensors as they are, so that a GPU is not made to wait; `flush` turns all of them into
    numbers at once. A metric that a row lacks is NaN there.
    """

    def __init__(self) -> None:
        self._steps = array("q")
        self._phases: list[str] = []
        self._columns: dict[str, array[float]] = {}
        self._pending: list[tuple[int, str, Metrics]] = []

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics seen so far, in the order of their first appearance."""
        return list(self._columns)

    @property
    def steps(self) -> np.ndarray:
        """The steps of all flushed rows, int64 [rows]."""
        return np.array(self._steps, dtype=np.int64)

    def steps_since(self, start: int) -> np.ndarray:
        """Return the steps from row `start` on, int64 [rows - start]."""
        return np.array(self._steps[start:], dtype=np.int64)

    def column(self, metric: str, start: int = 0) -> np.ndarray:
        """Return one metric from row `start` on, float64 [rows - start]."""
        return np.array(self._columns[metric][start:], dtype=np.float64)

    def append(self, step: int, phase: str, metrics: Metrics) -> None:
        """Add a row without reading its values yet."""
        self._pending.append((step, phase, metrics))

    def flush(self) -> tuple[int, str] | None:
        """Read all waiting rows.

        Returns
        -------
        (int, str) or None
            Step and name of the first metric that is not finite; rows from that one on are dropped.
        """
        waiting, self._pending = self._pending, []
        for (step, phase, _), values in zip(waiting, _read([row[2] for row in waiting]), strict=True):
            for name, value in values.items():
                if not np.isfinite(value):
                    return step, name
            self._add(step, phase, values)
        return None

    def _add(self, step: int, phase: str, values: dict[str, float]) -> None:
        for name in values:
            if name not in self._columns:
                self._columns[name] = array("d", [float("nan")]) * len(self._steps)
        self._steps.append(step)
        self._phases.append(phase)
        for name, column in self._columns.items():
            column.append(values.get(name, float("nan")))

    def keep_until(self, step: int) -> History:
        """Drop all rows after `step`; return them as a history of their own."""
        kept = int(np.searchsorted(self.steps, step, side="right"))
        dropped = History()
        dropped._steps, self._steps = self._steps[kept:], self._steps[:kept]
        dropped._phases, self._phases = self._phases[kept:], self._phases[:kept]
        dropped._columns = {name: column[kept:] for name, column in self._columns.items()}
        self._columns = {name: column[:kept] for name, column in self._columns.items()}
        self._pending = [row for row in self._pending if row[0] <= step]
        return dropped

    def copy(self) -> History:
        """Return an independent copy of all flushed rows."""
        twin = History()
        twin._steps, twin._phases = self._steps[:], self._phases[:]
        twin._columns = {name: column[:] for name, column in self._columns.items()}
        return twin

    def frame(self) -> pd.DataFrame:
        """Return everything as a table: index step, columns phase and the metrics."""
        columns: dict[str, Any] = {"phase": self._phases}
        columns.update({name: np.array(column) for name, column in self._columns.items()})
        return pd.DataFrame(columns, index=pd.Index(self.steps, name="step"))

    def digest(self) -> str:
        """Return the SHA-256 of all numbers; two runs that went alike to the last bit have the same."""
        content = hashlib.sha256(self._steps.tobytes())
        for name in sorted(self._columns):
            if not np.isnan(self._columns[name]).all():
                content.update(name.encode() + self._columns[name].tobytes())
        return content.hexdigest()

    def rows(self, start: int = 0) -> Iterator[str]:
        """Yield rows from `start` on as JSON lines; floats are written so that they read back exactly."""
        for i in range(start, len(self)):
            values = {n: c[i] for n, c in self._columns.items() if c[i] == c[i]}
            yield json.dumps([self._steps[i], self._phases[i], values])

    @classmethod
    def from_rows(cls, lines: Iterable[str], until: int) -> History:
        """Read JSON lines up to a step; a torn last line, as a kill leaves it, ends the reading."""
        history = cls()
        for line in lines:
            try:
                step, phase, values = json.loads(line)
            except (ValueError, TypeError):
                break
            if step > until:
                break
            history._add(step, phase, values)
        return history


def _read(rows: list[Metrics]) -> list[dict[str, float]]:
    """Turn tensors into numbers, those on an accelerator in one transfer."""
    for name, value in (item for row in rows for item in row.items()):
        if isinstance(value, torch.Tensor) and value.numel() != 1:
            raise ValueError(f"metric {name!r} must be a scalar, got shape {tuple(value.shape)}")
        if not isinstance(value, torch.Tensor | np.ndarray | np.generic | float | int):
            raise ValueError(f"metric {name!r} must be a number, got {value!r}")
    remote = [v for row in rows for v in row.values() if isinstance(v, torch.Tensor) and v.device.type != "cpu"]
    fetched = iter(torch.stack([v.float().reshape(()) for v in remote]).tolist() if remote else [])
    read = []
    for row in rows:
        values = {}
        for name, value in row.items():
            from_device = isinstance(value, torch.Tensor) and value.device.type != "cpu"
            values[name] = next(fetched) if from_device else float(value)
        read.append(values)
    return read
