"""Sweeps: every point of the grid, nothing twice, and nothing lost to a kill."""

from __future__ import annotations

import signal
import time

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import Counted, Phased, Tiny, Unjudged, python, run_of

import polrl
from polrl import Learner, knob, sweep
from polrl.core.device import torch_threads
from polrl.core.errors import KnobError, UnknownNameError
from polrl.core.sweep import Job, run_jobs, train

CPU = {"device": "cpu"}


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


# ---- one training ------------------------------------------------------------------------------------------------------


def test_a_job_measures_what_a_run_would():
    result = train(Job(Tiny, {**CPU, "seed": 3, "decay": 0.5}, 12))
    run = run_of(settings={"seed": 3, "decay": 0.5})
    run.advance(12)
    assert result["measures"] == run.evaluate()
    assert result["evaluations"]["step"] == [12] and result["evaluations"]["size"] == [run.evaluate()["size"]]


def test_a_job_takes_the_learners_budget_and_measures_each_phase():
    measures = train(Job(Phased, {**CPU, "first_steps": 3}))["measures"]
    run = run_of(Phased, {"first_steps": 3})
    run.advance(3)
    first = run.evaluate()["distance"]
    run.advance(6)
    assert measures == {"distance": run.evaluate()["distance"], "distance@first": first}


def test_a_job_without_steps_is_refused():
    with pytest.raises(KnobError, match="steps must be given: Tiny has no budget of its own"):
        train(Job(Tiny, CPU))


def test_a_learner_without_evaluation_is_measured_by_its_last_update():
    result = train(Job(Unjudged, {**CPU, "gain": 2.0}, 5))
    run = run_of(Unjudged, {"gain": 2.0})
    run.advance(5)
    assert result["measures"] == {"total": run.history["total"].iloc[-1]}


def test_a_probe_adds_its_figures():
    measures = train(Job(Counted, CPU, 3, probe="extra"))["measures"]
    assert measures["extra"] == 2 * measures["score"]


def test_a_job_trains_with_one_thread_from_the_start():
    class Seeing(Counted):
        def setup(self):
            super().setup()
            self.built_with = torch.get_num_threads()

        def evaluate(self):
            return {"built": self.built_with, "trained": torch.get_num_threads()}

    with torch_threads(2):
        assert train(Job(Seeing, CPU, 1))["measures"] == {"built": 1, "trained": 1}
        assert torch.get_num_threads() == 2


# ---- the name of a job ---------------------------------------------------------------------------------------------------


def test_a_jobs_key_tells_apart_all_that_its_result_depends_on():
    jobs = [
        Job(Counted, {"gain": 1.0}, 5),
        Job(Counted, {"gain": 1.5}, 5),
        Job(Counted, {"gain": 1.0}, 6),
        Job(Counted, {"gain": 1.0}, 5, probe="extra"),
        Job(Counted, {"gain": 1.0, "seed": 1}, 5),
        Job(Tiny, {"gain": 1.0}, 5),
    ]
    assert len({job.key() for job in jobs}) == len(jobs)
    assert Job(Counted, {"seed": 1, "gain": 1.0}, 5, {"arm": "a"}).key() == jobs[4].key()


def test_a_jobs_key_changes_with_the_methods_code(monkeypatch):
    job = Job(Counted, {"gain": 1.0}, 5)
    before = job.key()
    monkeypatch.setitem(Job.key.__globals__, "fingerprint", lambda path: "another code")
    assert job.key() != before


# ---- a grid --------------------------------------------------------------------------------------------------------------


def test_a_sweep_trains_every_point_for_every_seed(tmp_path):
    log = tmp_path / "log"
    grid = {"gain": [1.0, 2.0], "count": [1, 3]}
    table = sweep(Counted, grid, seeds=(0, 1), steps=4, settings={**CPU, "log": str(log)}, n_jobs=1)
    assert isinstance(table, pd.DataFrame)
    assert table[["gain", "count", "seed"]].to_numpy().tolist() == [
        [g, c, s] for g in (1.0, 2.0) for c in (1, 3) for s in (0, 1)
    ]
    expected = run_of(Counted, {"gain": 2.0, "count": 3, "seed": 1})
    expected.advance(4)
    assert table["score"].iloc[-1] == expected.evaluate()["score"]
    assert sorted(set(lines(log))) == sorted({f"{g} {c} {s}" for g in (1.0, 2.0) for c in (1, 3) for s in (0, 1)})


@pytest.mark.parametrize(
    ("grid", "settings", "error", "words"),
    [
        ({"gian": [1.0]}, {}, UnknownNameError, "did you mean gain"),
        ({"gain": [1.0, 9.0]}, {}, KnobError, "gain must be a number from -5 to 5, got 9.0"),
        ({"gain": [1.0]}, {"count": 0}, KnobError, "count must be"),
        ({"gain": [1.0]}, {"cuont": 0}, UnknownNameError, "did you mean count"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_is_trained(tmp_path, grid, settings, error, words):
    log = tmp_path / "log"
    with pytest.raises(error, match=words):
        sweep(Counted, grid, steps=2, settings={**CPU, "log": str(log), **settings}, n_jobs=1)
    assert lines(log) == []


def test_numpy_values_do_for_a_grid(tmp_path):
    grid = {"gain": np.linspace(0, 1, 2, dtype=np.float32), "count": np.arange(1, 3), "shape": [[1, 2]]}
    options = {"steps": 2, "settings": CPU, "n_jobs": 1, "folder": tmp_path / "kept"}
    table = sweep(Counted, grid, **options)
    again = sweep(Counted, {"gain": [0.0, 1.0], "count": [1, 2], "shape": [(1, 2)]}, **options)
    assert len(list((tmp_path / "kept").iterdir())) == 4, "the same values are the same jobs"
    assert table["score"].tolist() == again["score"].tolist()


def test_a_learner_without_evaluation_can_be_swept():
    table = sweep(Unjudged, {"gain": [1.0, 2.0]}, steps=3, settings=CPU, n_jobs=1)
    assert table["total"].is_monotonic_increasing and list(table.columns) == ["gain", "seed", "total"]


# ---- resuming ------------------------------------------------------------------------------------------------------------


def test_a_sweep_that_was_interrupted_resumes_without_redoing(tmp_path, monkeypatch):
    log, kept = tmp_path / "log", tmp_path / "kept"
    options = {"seeds": range(5), "steps": 3, "settings": {**CPU, "log": str(log)}, "n_jobs": 1, "folder": kept}
    whole = sweep(Counted, {"gain": [1.0]}, **{**options, "folder": None})
    log.unlink()

    def impatient(job, real=train):
        if job.settings["seed"] == 3:
            raise KeyboardInterrupt
        return real(job)

    monkeypatch.setitem(run_jobs.__globals__, "train", impatient)
    with pytest.raises(KeyboardInterrupt):
        sweep(Counted, {"gain": [1.0]}, **options)
    monkeypatch.undo()
    assert len(set(lines(log))) == 3 and len(list(kept.iterdir())) == 3
    resumed = sweep(Counted, {"gain": [1.0]}, **options)
    assert len(lines(log)) == 5 and sorted(lines(log)) == [f"1.0 1 {seed}" for seed in range(5)]
    assert resumed.equals(whole)
    assert sweep(Counted, {"gain": [1.0]}, **options).equals(whole) and len(lines(log)) == 5


SWEEPER = """
import os, signal, sys
import polrl.core.sweep as sweeping
from tiny import Counted
real, done = sweeping.train, []
def train(job):
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(job)
    return real(job)
vars(sweeping)["train"] = train
sweeping.sweep(Counted, {"gain": [1.0]}, seeds=range(4), steps=3, n_jobs=1, folder=sys.argv[2],
               settings={"device": "cpu", "log": sys.argv[1]})
"""


def test_a_sweep_that_was_killed_resumes_without_redoing(tmp_path):
    log, kept = tmp_path / "log", tmp_path / "kept"
    process = python(SWEEPER, log, kept)
    _, problems = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, problems
    assert lines(log) == ["1.0 1 0", "1.0 1 1"]
    settings = {**CPU, "log": str(log)}
    table = sweep(Counted, {"gain": [1.0]}, seeds=range(4), steps=3, n_jobs=1, folder=kept, settings=settings)
    assert lines(log) == [f"1.0 1 {seed}" for seed in range(4)] and table["score"].notna().all()


def test_a_job_that_fails_keeps_what_was_done_before(tmp_path):
    jobs = [Job(Counted, {**CPU, "seed": s, "fails": s == 2}, 2) for s in range(4)]
    with pytest.raises(RuntimeError, match="cannot be trained"):
        run_jobs(jobs, folder=tmp_path / "kept")
    assert len(list((tmp_path / "kept").glob("*.json"))) == 2


def test_processes_give_what_one_process_gives(tmp_path):
    log, kept = tmp_path / "log", tmp_path / "kept"
    options = {"seeds": range(4), "steps": 3, "settings": {**CPU, "log": str(log)}}
    alone = sweep(Counted, {"gain": [1.0]}, n_jobs=1, **options)
    log.unlink()
    began = time.monotonic()
    together = sweep(Counted, {"gain": [1.0]}, n_jobs=2, folder=kept, **options)
    assert time.monotonic() - began < 120
    assert together.equals(alone), "in the jobs' order, whichever is done first"
    assert sorted(lines(log)) == [f"1.0 1 {seed}" for seed in range(4)] and len(list(kept.iterdir())) == 4


class ExplosiveConfig(polrl.Config):
    factor: float = knob(1.0, low=0.0, high=1e30)


class Explosive(Learner[ExplosiveConfig]):
    """Grows by a factor each step; too large a one overflows."""

    def setup(self):
        self.x = torch.ones(())

    def update(self):
        self.x = self.x * self.config.factor
        return {"x": self.x}

    def evaluate(self):
        return {"size": self.x}


def test_a_training_that_diverges_is_a_row_and_does_not_end_the_sweep(tmp_path):
    for _ in range(2):  # the second time from the files
        table = sweep(Explosive, {"factor": [0.5, 1e30]}, steps=5, n_jobs=1, folder=tmp_path)
        assert table["size"].tolist()[0] == pytest.approx(0.5**5) and np.isnan(table["size"][1])
        assert table["diverged_at"].tolist()[1] == 2.0
    assert not any("NaN" in p.read_text().replace('"NaN"', "") for p in tmp_path.glob("*.json")), "JSON knows no NaN"
