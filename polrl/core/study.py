"""`Study`: a paper's claim, put so that it can fail."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import platformdirs

from polrl.core.catalog import fingerprint, stored_result
from polrl.core.errors import PolrlError, unknown_name
from polrl.core.files import from_json, to_json, write_atomic
from polrl.core.learner import Learner
from polrl.core.sweep import Job, plain_settings, run_jobs
from polrl.core.tape import present_versions

Mode = Literal["smoke", "fast", "full"]
Side = tuple[str | tuple[str, ...], str]


@dataclass(frozen=True)
class Criterion:
    """One statement that the figures bear out or don't.

    For each seed the figure is `plus` less `minus`; the statement counts as shown if the whole 95 % interval
    of its mean over seeds (Student's t, paired by seed) lies above `above` and below `below`, as far as they are given.

    Parameters
    ----------
    name : str
    statement : str
        The claim in words.
    plus, minus : (str or tuple of str, str)
        Arm and metric; "metric@phase" is the metric at the end of a phase. Of several arms (the strengths of a
        sweep) the one with the highest mean over seeds is taken. Without `minus`, zero is taken.
    above, below : float
        In the metric's unit. Without both the figure must lie above 0; with one of them the other side is open.
    """

    name: str
    statement: str
    plus: Side
    minus: Side | None = None
    above: float | None = None
    below: float | None = None

    @property
    def least(self) -> float:
        """What the interval must lie above."""
        if self.above is not None:
            return self.above
        return 0.0 if self.below is None else -math.inf


@dataclass(frozen=True)
class Budget:
    """How much a form of the study spends.

    Parameters
    ----------
    seeds : int
        Seeds 0, 1, ... for every arm.
    settings : mapping
        Settings that all arms share.
    steps : int
        Updates a training; 0 for the learner's own budget.
    arms : tuple of str
        The arms to run; all if empty. Criteria that need others are left out.
    probe : str
        Name of a method of the learner that returns more figures at the end of each phase.
    """

    seeds: int
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 0
    arms: tuple[str, ...] = ()
    probe: str = ""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % interval (Student's t); without width it is not known (one seed)."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Compute the interval of some figures, one a seed."""
        array = np.asarray(values, dtype=np.float64)
        mean = float(array.mean())
        if len(array) < 2:
            return cls(mean, -math.inf, math.inf)
        from scipy.stats import t

        half = float(t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / math.sqrt(len(array)))
        return cls(mean, mean - half, mean + half)

    def __str__(self) -> str:
        if math.isinf(self.low):
            return f"{self.mean:.3f} (one seed)"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Verdict:
    """What the figures say of one criterion."""

    name: str
    statement: str
    values: list[float]
    interval: Interval
    above: float
    shown: bool
    below: float | None = None
    arms: str = ""

    @property
    def must_lie(self) -> str:
        """Where the interval must lie, in words."""
        if self.below is None:
            return f"above {self.above:g}"
        return f"below {self.below:g}" if math.isinf(self.above) else f"between {self.above:g} and {self.below:g}"

    def __str__(self) -> str:
        word = "SHOWN" if self.shown else "NOT SHOWN"
        return f"{word}: {self.statement} ({self.interval}, must lie {self.must_lie}; {len(self.values)} seeds)"


@dataclass(frozen=True)
class StudyResult:
    """Figures and verdicts of a study that was run.

    Attributes
    ----------
    measures : list of dict
        A row a training: arm, seed, and figures by metric.
    evaluations : list of dict
        A row a training: arm, seed, and the course of all evaluations as columns.
    """

    slug: str
    claim: str
    mode: str
    fingerprint: str
    versions: dict[str, str]
    measures: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    verdicts: list[Verdict]

    def table(self, metrics: Sequence[str] | None = None) -> pd.DataFrame:
        """Return mean and interval by arm (rows) and metric (columns), as text."""
        frame = pd.DataFrame(self.measures)
        names = list(metrics or [c for c in frame.columns if c not in ("arm", "seed")])
        for name in names:
            if name not in frame.columns:
                raise unknown_name("metric", name, frame.columns)
        arms = list(dict.fromkeys(frame["arm"]))
        rows = {
            arm: {m: str(Interval.of(v)) if len(v := frame[frame["arm"] == arm][m].dropna()) else "" for m in names}
            for arm in arms
        }
        return pd.DataFrame.from_dict(rows, orient="index")

    def verdict_table(self) -> pd.DataFrame:
        """Return one row a criterion: what was asked, what was found, shown or not shown."""
        return pd.DataFrame(
            [
                {
                    "criterion": v.name,
                    "statement": v.statement,
                    "found": str(v.interval),
                    "must lie": v.must_lie,
                    "verdict": "shown" if v.shown else "not shown",
                }
                for v in self.verdicts
            ]
        ).set_index("criterion")

    def to_json(self) -> str:
        """Return everything as JSON."""
        return to_json(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> StudyResult:
        """Read what `to_json` wrote."""
        return cls.of(from_json(text))

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> StudyResult:
        """Make a result of its plain values."""
        verdicts = [Verdict(**{**v, "interval": Interval(**v["interval"])}) for v in raw["verdicts"]]
        return cls(**{**raw, "verdicts": verdicts})


@dataclass(frozen=True)
class Study:
    """A claim, what is compared, and what counts as showing it, all written before running.

    Parameters
    ----------
    claim : str
        One sentence.
    learner : Learner class
    arms : mapping of str to mapping
        The settings of each arm; an entry "learner" names another class, for a baseline.
    criteria : sequence of Criterion
    fast, full, smoke : Budget
        What a learner waits for, what the verdict rests on, and what only shows that the code runs.
    """

    claim: str
    learner: type[Learner[Any]]
    arms: Mapping[str, Mapping[str, Any]]
    criteria: Sequence[Criterion]
    fast: Budget
    full: Budget
    smoke: Budget

    def __post_init__(self) -> None:
        for criterion in self.criteria:
            for side in filter(None, (criterion.plus, criterion.minus)):
                for arm in _arms(side):
                    if arm not in self.arms:
                        raise unknown_name("arm", arm, self.arms)

    def jobs(self, mode: Mode) -> list[Job]:
        """Return the trainings of one form of the study."""
        budget = self._budget(mode)
        jobs = []
        for arm in budget.arms or self.arms:
            settings = dict(self.arms[arm])
            learner = settings.pop("learner", self.learner)
            for seed in range(budget.seeds):
                every = plain_settings(learner, {**budget.settings, **settings, "seed": seed})
                jobs.append(Job(learner, every, budget.steps, {"arm": arm, "seed": seed}, budget.probe))
        return jobs

    def _budget(self, mode: Mode) -> Budget:
        budgets = {"smoke": self.smoke, "fast": self.fast, "full": self.full}
        if mode not in budgets:
            raise unknown_name("mode", mode, budgets)
        return budgets[mode]

    def fingerprint(self) -> str:
        """Return a digest of the method's file, in which the study stands."""
        return fingerprint(Path(inspect.getfile(self.learner)))

    def run(self, mode: Mode = "fast", *, n_jobs: int | None = None, folder: str | Path | None = None) -> StudyResult:
        """Train all arms and judge the criteria.

        Parameters
        ----------
        mode : {"smoke", "fast", "full"}
        n_jobs : int, optional
            Processes at once; as many as there are cores if not given (one for "smoke").
        folder : path, optional
            Where finished trainings are kept, so that a killed study resumes; the full form keeps them in the
            user's cache if none is given.
        """
        cores = n_jobs or (1 if mode == "smoke" else os.cpu_count() or 1)
        if folder is None and mode == "full":
            folder = Path(platformdirs.user_cache_dir("polrl", appauthor=False)) / "studies" / self.learner.slug()
        jobs = self.jobs(mode)
        kept = Path(folder) if folder is not None else None
        results = run_jobs(jobs, n_jobs=cores, folder=kept, label=f"{mode} study of {self.learner.slug()}")
        measures = [{**job.labels, **r["measures"]} for job, r in zip(jobs, results, strict=True)]
        return StudyResult(
            slug=self.learner.slug(),
            claim=self.claim,
            mode=mode,
            fingerprint=self.fingerprint(),
            versions=present_versions(),
            measures=measures,
            evaluations=[{**job.labels, **r["evaluations"]} for job, r in zip(jobs, results, strict=True)],
            verdicts=self.judge(measures),
        )

    def judge(self, measures: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """Return a verdict for each criterion whose arms were run.

        Raises
        ------
        UnknownNameError
            If a criterion names a metric that was not measured.
        """
        by_arm: dict[str, dict[int, Mapping[str, Any]]] = {}
        for row in measures:
            by_arm.setdefault(row["arm"], {})[row["seed"]] = row
        verdicts = []
        for criterion in self.criteria:
            sides = [side for side in (criterion.plus, criterion.minus) if side]
            if any(arm not in by_arm for side in sides for arm in _arms(side)):
                continue
            seeds = sorted(set.intersection(*(set(by_arm[arm]) for side in sides for arm in _arms(side))))
            (plus, ahead), (minus, behind) = (
                _best(by_arm, side, seeds) if side else ("", [0.0] * len(seeds))
                for side in (criterion.plus, criterion.minus)
            )
            values = [a - b for a, b in zip(ahead, behind, strict=True)]
            interval = Interval.of(values)
            shown = interval.low > criterion.least
            if criterion.below is not None:
                shown = shown and interval.high < criterion.below
            verdicts.append(
                Verdict(
                    criterion.name,
                    criterion.statement,
                    values,
                    interval,
                    criterion.least,
                    shown=shown,
                    below=criterion.below,
                    arms=" against ".join(filter(None, (plus, minus))),
                )
            )
        return verdicts


def _arms(side: Side) -> tuple[str, ...]:
    return (side[0],) if isinstance(side[0], str) else side[0]


def _best(
    by_arm: Mapping[str, Mapping[int, Mapping[str, Any]]], side: Side, seeds: Sequence[int]
) -> tuple[str, list[float]]:
    """Return the arm of a side with the highest mean, and its figures by seed."""
    figures = {arm: [_figure(by_arm, arm, side[1], seed) for seed in seeds] for arm in _arms(side)}
    finite = {arm: values for arm, values in figures.items() if not any(map(math.isnan, values))} or figures
    arm = max(finite, key=lambda arm: float(np.mean(finite[arm])))
    return arm, figures[arm]


def _figure(by_arm: Mapping[str, Mapping[int, Mapping[str, Any]]], arm: str, metric: str, seed: int) -> float:
    row = by_arm[arm][seed]
    if metric not in row and "diverged_at" in row:
        return math.nan
    if metric not in row:
        raise unknown_name("metric", metric, [name for name in row if name not in ("arm", "seed")])
    return float(row[metric])


def keep_result(result: StudyResult, folder: Path) -> Path:
    """Write a full study's result to `folder/<slug>.json`, where notebook and gallery look for it."""
    if result.mode != "full":
        raise PolrlError(f"only the full form's result is kept, this is the {result.mode} form's")
    path = folder / f"{result.slug}.json"
    write_atomic(path, result.to_json() + "\n")
    return path


def kept_result(slug: str) -> StudyResult | None:
    """Return the kept result of a method's full study, or None if there is none yet."""
    stored = stored_result(slug)
    return None if stored is None else StudyResult.of(stored)
