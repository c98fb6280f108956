"""Many trainings, each a job with a result file of its own: what was done stays done when the sweep is killed."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from polrl.core.catalog import fingerprint
from polrl.core.device import torch_threads
from polrl.core.errors import DivergedError, KnobError, unknown_name
from polrl.core.files import from_json, to_json, write_atomic
from polrl.core.learner import Learner
from polrl.core.progress import progress
from polrl.core.run import Run


@dataclass(frozen=True)
class Job:
    """One training.

    Parameters
    ----------
    learner : Learner class
    settings : mapping
        Seed included.
    steps : int
        Updates; 0 for the learner's own budget.
    labels : mapping
        Words for the result's row; they do not change the result.
    probe : str
        Name of a method of the learner, or "", that returns more figures at the end of each phase.
    """

    learner: type[Learner[Any]]
    settings: Mapping[str, Any]
    steps: int = 0
    labels: Mapping[str, Any] = field(default_factory=dict)
    probe: str = ""

    def key(self) -> str:
        """Name the job by everything that its result depends on, the method's code included."""
        code = fingerprint(Path(inspect.getfile(self.learner)))
        content = json.dumps([self.learner.slug(), code, self.steps, self.probe, dict(sorted(self.settings.items()))])
        return hashlib.sha256(content.encode()).hexdigest()[:24]


def plain_settings(learner: type[Learner[Any]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check settings and return them as a config holds them: numpy's numbers, say, as Python's."""
    config = learner.Config(**settings)
    return {name: getattr(config, name) for name in settings}


def train(job: Job) -> dict[str, Any]:
    """Do one job.

    Returns
    -------
    dict
        "measures": the last evaluation by metric (the last update's metrics where there is no evaluation), and
        the one at the end of each phase by "metric@phase"; of a training that diverged, NaN, and "diverged_at",
        the step;
        "evaluations": all of them, as columns.
    """
    with torch_threads(1):
        learner = job.learner(**job.settings)
    steps = job.steps or learner.budget
    if steps < 1:
        raise KnobError(f"steps must be given: {job.learner.__name__} has no budget of its own")
    run = Run(learner, threads=1, autosave=0)
    measures: dict[str, float] = {}
    while run.step < steps:
        phase = learner.phase
        try:
            _advance_in_phase(run, steps)
            figures = run.evaluate() or _last_update(run)
        except DivergedError as error:  # a figure like any other: a strength that is too high, say
            known = learner.evaluate() or learner.update()
            measures |= dict.fromkeys(known, math.nan) | {"diverged_at": float(error.step)}
            break
        if job.probe:
            figures |= {name: float(value) for name, value in getattr(learner, job.probe)().items()}
        ended = "" if run.step == steps else f"@{phase}"
        measures |= {name + ended: value for name, value in figures.items()}
    table = run.evaluations
    columns = {name: table[name].tolist() for name in table.columns}
    return {"measures": measures, "evaluations": {"step": table.index.tolist(), **columns}}


def _last_update(run: Run) -> dict[str, float]:
    return {name: float(value) for name, value in run.history.iloc[-1].drop("phase").items()}


def _advance_in_phase(run: Run, steps: int) -> None:
    """Advance to step `steps`, or to the end of the present phase if that comes first."""
    phase = run.learner.phase
    while run.step < steps and run.learner.phase == phase:
        run.advance(1 if run.learner.phases else steps - run.step)


def _train_alone(job: Job) -> dict[str, Any]:
    """Do one job in a process that shares the machine with others."""
    import torch

    torch.set_num_threads(1)
    return train(job)


def run_jobs(jobs: Sequence[Job], *, n_jobs: int = 1, folder: Path | None = None, label: str = "") -> list[Any]:
    """Do many jobs, in order or in parallel processes, and return their results in the jobs' order.

    Parameters
    ----------
    jobs : sequence of Job
    n_jobs : int
        Processes at once; 1 stays in this one.
    folder : Path, optional
        Results are kept there, one file a job; jobs whose file is there are not done again.
    label : str
        Words beside the progress bar.
    """
    results: dict[int, Any] = {}
    if folder is not None:
        for i, job in enumerate(jobs):
            path = folder / f"{job.key()}.json"
            if path.exists():
                results[i] = from_json(path.read_text(encoding="utf-8"))
    waiting = [i for i in range(len(jobs)) if i not in results]
    if n_jobs == 1 or len(waiting) <= 1:
        stream = ((i, train(jobs[i])) for i in waiting)
    else:
        stream = _parallel([(i, jobs[i]) for i in waiting], n_jobs)
    for i, result in progress(stream, total=len(waiting), label=label, unit="run"):
        results[i] = result
        if folder is not None:
            write_atomic(folder / f"{jobs[i].key()}.json", to_json(result))
    return [results[i] for i in range(len(jobs))]


def _numbered(i: int, job: Job) -> tuple[int, dict[str, Any]]:
    return i, _train_alone(job)


def _parallel(jobs: Sequence[tuple[int, Job]], n_jobs: int) -> Any:
    import joblib

    workers = joblib.Parallel(n_jobs=n_jobs, return_as="generator_unordered")
    return workers(joblib.delayed(_numbered)(i, job) for i, job in jobs)


def sweep(
    learner: type[Learner[Any]],
    grid: Mapping[str, Sequence[Any]],
    *,
    seeds: Sequence[int] = (0,),
    steps: int = 0,
    settings: Mapping[str, Any] | None = None,
    n_jobs: int | None = None,
    folder: str | Path | None = None,
) -> pd.DataFrame:
    """Train at every point of a grid of settings, for every seed.

    Parameters
    ----------
    learner : Learner class
    grid : mapping of str to sequence
        The values of each knob or structural setting; all combinations are trained.
    seeds : sequence of int
    steps : int
        Updates a training; 0 for the learner's own budget.
    settings : mapping, optional
        Settings that all trainings share.
    n_jobs : int, optional
        Processes at once; as many as there are cores if not given.
    folder : path, optional
        Where results are kept, so that a sweep that was killed resumes when it is called again.

    Returns
    -------
    DataFrame
        A row a training: the grid's settings, seed, and the last evaluation's figures.

    Raises
    ------
    UnknownNameError, KnobError
        If a setting does not exist or a value can't be taken; before anything is trained.
    """
    for name in grid:
        if name not in learner.Config.model_fields:
            raise unknown_name("knob or setting", name, learner.Config.model_fields)
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    jobs = []
    for point, seed in itertools.product(points, seeds):
        every = plain_settings(learner, {**(settings or {}), **point, "seed": seed})
        jobs.append(Job(learner, every, steps, {name: every[name] for name in (*grid, "seed")}))
    cores = n_jobs or os.cpu_count() or 1
    kept = Path(folder) if folder is not None else None
    results = run_jobs(jobs, n_jobs=cores, folder=kept, label=f"sweep {learner.slug()}")
    return pd.DataFrame([{**job.labels, **r["measures"]} for job, r in zip(jobs, results, strict=True)])
