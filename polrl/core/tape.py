"""`Tape`: what was changed when, as JSON; enough to repeat a run that was tuned by hand, exactly."""

from __future__ import annotations

import functools
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from polrl.core.errors import CheckpointError
from polrl.core.files import write_atomic

PACKAGES = ("polrl", "torch", "numpy", "scipy", "gymnasium", "transformers")


class Change(BaseModel):
    """A knob was turned: after `step` updates, `knob` took `value`."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    step: int = Field(ge=0)
    knob: str
    value: bool | int | float | str


class Tape(BaseModel):
    """A run, written down.

    Attributes
    ----------
    method : str
        The method's slug.
    config : dict
        All settings at the start.
    changes : list of Change
        In the order in which they were made.
    steps : int
        Updates done.
    threads : int
        torch threads of the training thread; sums depend on it in their last bits.
    versions : dict
        Versions of Python and the packages, and the machine's kind.
    digest : str
        SHA-256 of the history's numbers.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[1] = 1
    method: str
    config: dict[str, Any]
    changes: list[Change] = []
    steps: int = Field(0, ge=0)
    threads: int = Field(1, ge=1)
    versions: dict[str, str] = {}
    digest: str = ""

    @model_validator(mode="after")
    def _in_order(self) -> Tape:
        steps = [change.step for change in self.changes]
        if steps != sorted(steps) or (steps and steps[-1] > self.steps):
            raise ValueError(f"changes must stand in the order of their steps, none after step {self.steps}")
        return self

    def save(self, path: str | Path) -> Path:
        """Write the tape as a JSON file, atomically."""
        write_atomic(Path(path), self.model_dump_json(indent=1) + "\n")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Tape:
        """Read a tape.

        Raises
        ------
        CheckpointError
            If the file is missing or is not a whole tape.
        """
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            raise CheckpointError(f"{path} is not a tape of polrl: {error}") from error

    def record(self, step: int, knob: str, value: Any) -> None:
        """Add a change; one at the same step and of the same knob takes the earlier one's place."""
        self.changes = [c for c in self.changes if (c.step, c.knob) != (step, knob)]
        self.changes.append(Change(step=step, knob=knob, value=value))

    def cut(self, step: int) -> list[Change]:
        """Drop the changes made at `step` or later; return them."""
        dropped = [change for change in self.changes if change.step >= step]
        self.changes = [change for change in self.changes if change.step < step]
        return dropped

    def as_code(self, learner: str) -> str:
        """Return Python lines that repeat the run, for "copy as code"."""
        settings = ", ".join(f"{name}={value!r}" for name, value in self.config.items())
        lines = [f"run = Run({learner}({settings}), threads={self.threads})"]
        done = 0
        for change in self.changes:
            if change.step > done:
                lines.append(f"run.advance({change.step - done})")
                done = change.step
            lines.append(f"run.tune({change.knob}={change.value!r})")
        if self.steps > done:
            lines.append(f"run.advance({self.steps - done})")
        return "\n".join(lines)


def present_versions() -> dict[str, str]:
    """Return the versions that a tape names."""
    return dict(_versions())


@functools.cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["instructions"] = torch.backends.cpu.get_cpu_capability()
    return found
