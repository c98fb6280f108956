"""The smallest learners, for tests of what drives them; and what several tests ask of files and processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

import torch
from torch import nn

import polrl
from polrl import Curve, Heatmap, Learner, Run, knob

HERE = Path(__file__).resolve().parent


class Config(polrl.Config):
    size: int = 3
    decay: float = knob(0.1, low=0.0, high=4.0, first=True, symbol=r"\lambda", help="pull to zero", at_low="plain fit")
    rate: float = knob(0.05, low=1e-3, high=0.5, scale="log", paper=0.1)
    repeats: int = knob(1, low=1, high="size")
    mirrored: bool = knob(False)
    penalty: Literal["square", "absolute"] = knob("square")


class Tiny(Learner[Config]):
    """Regression on noise by SGD with momentum: small, random, with every kind of knob."""

    curves = (Curve("loss", "Loss"), Curve("size", "Size of the weights"))

    def setup(self):
        self.net = nn.Linear(self.config.size, 1).to(self.device)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)

    def penalised(self):
        weight = self.net.weight
        return weight.square().sum() if self.config.penalty == "square" else weight.abs().sum()

    def update(self):
        self.optimizer.param_groups[0]["lr"] = self.config.rate
        loss = torch.zeros((), device=self.device)
        for _ in range(self.config.repeats):
            x = torch.randn(8, self.config.size, generator=self.rng.torch, device=self.device)
            x = -x if self.config.mirrored else x
            loss = (self.net(x) - x.sum(1, keepdim=True)).square().mean() + self.config.decay * self.penalised()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return {"loss": loss}

    def evaluate(self):
        return {"size": self.net.weight.norm()}

    def views(self):
        weight = self.net.weight.detach().cpu()
        return {"weight": Heatmap(title="Weight", alt="The weights", values=weight)}


class PhasedConfig(polrl.Config):
    first_steps: int = 4
    pace: float = knob(0.1, low=0.0, high=1.0, first=True)


class Phased(Learner[PhasedConfig]):
    """A walk with two phases and a budget, without networks."""

    phases = ("first", "second")
    curves = (Curve("place", "Place"),)

    def setup(self):
        self.place = torch.zeros((), dtype=torch.float64, device=self.device)

    @property
    def budget(self):
        return 3 * self.config.first_steps

    def update(self):
        sign = 1 if self.phase == "first" else -1
        noise = torch.randn((), generator=self.rng.torch, device=self.device, dtype=torch.float64)
        self.place = self.place + self.config.pace * (sign + noise)
        if self.phase == "first" and self.phase_step + 1 == self.config.first_steps:
            self.enter("second")
        return {"place": self.place}

    def evaluate(self):
        return {"distance": self.place.abs()}

    def views(self):
        return {"place": Heatmap(title="Place", alt="The place", values=[[float(self.place)]])}


def run_of(learner=Tiny, settings=None, **options) -> Run:
    """Start a run on the CPU, with one thread, saved only when asked."""
    made = learner(**{"device": "cpu", **(settings or {})})
    return Run(made, **{"threads": 1, "autosave": 0, **options})


def same(first: Run, second: Run) -> bool:
    """Return whether two runs have the same numbers and the same state, to the last bit."""
    histories = first.tape.digest == second.tape.digest
    return histories and first.learner.state().digest() == second.learner.state().digest()


def copy_folder(source: Path, target: Path) -> Path:
    """Copy a run's folder as a killed process would leave it."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("lock"))
    return target


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a process that finds polrl and the tests' learners."""
    known = [str(HERE), *(p for p in sys.path if p)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(known), "OMP_NUM_THREADS": "1", **more}


def python(code: str, *arguments: object, **more: str) -> subprocess.Popen[str]:
    """Start a Python process that finds polrl and the tests' learners."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment(**more),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


class CountedConfig(polrl.Config):
    log: str = ""
    shape: tuple[int, ...] = (2,)
    gain: float = knob(1.0, low=-5.0, high=5.0, first=True)
    count: int = knob(1, low=1, high=9)
    fails: bool = knob(False)


class Counted(Learner[CountedConfig]):
    """Writes a line to a file whenever it is built, so that trainings can be counted across processes."""

    curves = (Curve("total", "Total"),)

    def setup(self):
        if self.config.log:
            with open(self.config.log, "a", encoding="utf-8") as file:
                file.write(f"{self.config.gain} {self.config.count} {self.config.seed}\n")
        self.total = 0.0

    def update(self):
        if self.config.fails:
            raise RuntimeError("this setting cannot be trained")
        self.total += self.config.gain * self.config.count + 0.1 * float(self.rng.numpy.standard_normal())
        return {"total": self.total}

    def evaluate(self):
        return {"score": self.total, "threads": torch.get_num_threads()}

    def extra(self):
        return {"extra": 2 * self.total}


class Unjudged(Counted):
    """The same without an evaluation."""

    def evaluate(self):
        return {}
