"""Run: going on, turning knobs, going back, splitting, diverging, repeating. Saving is in test_saving."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import Counted, Phased, Tiny, run_of, same
from torch import nn

import polrl
from polrl import Learner, Run, Tape, knob
from polrl.core import run as run_module
from polrl.core.device import torch_threads
from polrl.core.errors import CheckpointError, DivergedError, KnobError, StructureError, UnknownNameError

# ---- going on ------------------------------------------------------------------------------------------------------


def test_advancing_in_pieces_is_advancing_at_once():
    whole, pieces = run_of(), run_of()
    whole.advance(12)
    for steps in (1, 0, 5, 6):
        pieces.advance(steps)
    assert whole.step == pieces.step == 12 and same(whole, pieces)
    assert list(whole.history.index) == list(range(1, 13))


@pytest.mark.parametrize("wrong", [-1, 1.0, True, "3", None])
def test_a_wrong_number_of_steps_is_refused(wrong):
    run = run_of()
    with pytest.raises(KnobError, match="steps must be a whole number of at least 0"):
        run.advance(wrong)
    assert run.step == 0


def test_a_learner_that_was_trained_already_is_refused():
    learner = Tiny(device="cpu")
    learner.update()
    with pytest.raises(KnobError, match="at step 1 already"):
        Run(learner)


def test_a_learner_has_one_run():
    run = run_of()
    with pytest.raises(KnobError, match="driven by another run already; fork that run"):
        Run(run.learner)


def test_a_run_that_could_not_begin_leaves_its_learner_free(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    learner = Tiny(device="cpu")
    with pytest.raises(OSError):
        Run(learner, folder=tmp_path / "file")
    run = Run(learner, threads=1)
    run.advance(1)
    assert run.step == 1


@pytest.mark.parametrize("threads", [0, -1])
def test_a_wrong_thread_count_is_refused(threads):
    with pytest.raises(KnobError, match="threads"):
        run_of(threads=threads)


def test_the_threads_of_a_run_hold_inside_it_only():
    class Watching(Tiny):
        def update(self):
            seen.add(torch.get_num_threads())
            return super().update()

        def evaluate(self):
            seen.add(torch.get_num_threads())
            return super().evaluate()

    seen: set[int] = set()
    with torch_threads(1):
        run = Run(Watching(device="cpu"), threads=2, evaluate_every=2)
        run.advance(4)
        run.evaluate()
        run.rewind(1)
        assert torch.get_num_threads() == 1
    assert seen == {2} and run.tape.threads == 2


def test_history_shows_each_steps_own_numbers():
    class InPlace(Tiny):
        def update(self):
            loss = super().update()["loss"]
            return {"loss": loss, "weight": self.net.weight[0, 0], "bias": self.net.bias}

    straight, watched = run_of(InPlace), run_of(InPlace)
    straight.advance(5)
    seen = []
    for _ in range(5):
        watched.advance(1)
        seen.append(float(watched.learner.net.weight[0, 0]))
    assert straight.history["weight"].tolist() == seen
    assert straight.tape.digest == watched.tape.digest


def test_metrics_that_come_and_go_leave_gaps():
    class Sometimes(Tiny):
        def update(self):
            metrics = super().update()
            return {**metrics, "even": 1.0} if self.step % 2 == 0 else metrics

    run = run_of(Sometimes)
    run.advance(4)
    column = run.history["even"]
    assert column.notna().tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("value", "words"), [(torch.zeros(2), r"'odd' must be a scalar, got shape \(2,\)"), ("high", "odd"), (None, "odd")]
)
def test_a_metric_that_is_no_number_is_named(value, words):
    class Odd(Tiny):
        def update(self):
            return {**super().update(), "odd": value}

    with pytest.raises((ValueError, TypeError), match=words):
        run_of(Odd).advance(1)


def test_history_is_a_table_with_phases():
    run = run_of(Phased)
    run.advance(6)
    table = run.history
    assert isinstance(table, pd.DataFrame) and table.index.name == "step"
    assert table["phase"].tolist() == ["first"] * 4 + ["second"] * 2
    assert run.phase_marks == [(4, "second")]
    assert table["place"].dtype == np.float64
    table["place"] = 0.0
    assert run.history["place"].abs().sum() > 0, "the table is the caller's own"


# ---- evaluating --------------------------------------------------------------------------------------------------------


def test_evaluations_happen_on_time_and_where_phases_change():
    run = run_of(Phased, evaluate_every=5)
    run.advance(11)
    assert run.evaluations.index.tolist() == [4, 5, 10]
    assert run.evaluate() == {"distance": abs(float(run.learner.place))}
    assert run.evaluations.index.tolist() == [4, 5, 10, 11]
    never = run_of(Phased, evaluate_every=0)
    never.advance(11)
    assert never.phase_marks and never.evaluations.empty


def test_a_second_evaluation_at_one_step_takes_the_firsts_place():
    run = run_of(Phased, evaluate_every=0)
    run.advance(2)
    assert run.evaluate() == run.evaluate()
    assert run.evaluations.index.tolist() == [2]


def test_evaluating_and_looking_leave_no_trace():
    quiet, watched = run_of(evaluate_every=0), run_of(evaluate_every=1)
    for _ in range(6):
        quiet.advance(1)
        watched.advance(1)
        assert set(watched.views()) == {"weight"}
        assert len(watched.history) == watched.step
    assert same(quiet, watched) and quiet.evaluations.empty


# ---- turning knobs -------------------------------------------------------------------------------------------------------


def test_a_change_acts_on_the_very_next_update():
    class Showing(Tiny):
        def update(self):
            return {**super().update(), "decay": self.config.decay}

    run = run_of(Showing)
    run.advance(2)
    run.tune(decay=2.0)
    run.advance(2)
    run.tune(decay=0.5)
    run.advance(1)
    assert run.history["decay"].tolist() == [0.1, 0.1, 2.0, 2.0, 0.5]
    assert [(c.step, c.value) for c in run.tape.changes] == [(2, 2.0), (4, 0.5)]


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"decay": 1.0, "rate": 9.0}, KnobError),
        ({"decay": 1.0, "size": 4}, StructureError),
        ({"decay": 1.0, "rtae": 0.1}, UnknownNameError),
        ({"rtae": 0.1, "decay": 1.0}, UnknownNameError),
        ({"decay": 1.0, "repeats": 4}, KnobError),
    ],
)
def test_several_values_are_taken_together_or_not_at_all(values, error):
    run = run_of()
    before = run.learner.config.model_dump()
    with pytest.raises(error):
        run.tune(**values)
    assert run.learner.config.model_dump() == before and run.tape.changes == []
    run.tune(decay=1.0, rate=0.2, penalty="absolute", mirrored=True, repeats=3)
    assert len(run.tape.changes) == 5


def test_the_refusal_of_a_change_says_what_stays():
    with pytest.raises(KnobError, match=r"decay must be a number from 0 to 4, got 9; it stays 0\.1"):
        run_of().tune(decay=9)


def test_the_last_of_several_changes_at_one_step_counts():
    run = run_of()
    for value in (0.2, 0.3, 0.4):
        run.tune(decay=value)
    run.tune(rate=0.01)
    assert [(c.step, c.knob, c.value) for c in run.tape.changes] == [(0, "decay", 0.4), (0, "rate", 0.01)]


# ---- going back ----------------------------------------------------------------------------------------------------------


def tuned(run: Run) -> Run:
    run.advance(3)
    run.tune(decay=1.0, penalty="absolute")
    run.advance(3)
    run.tune(rate=0.2)
    run.advance(4)
    return run


@pytest.mark.parametrize("target", [0, 1, 3, 4, 6, 9])
def test_rewinding_restores_the_step_exactly(target):
    run = tuned(run_of(evaluate_every=2))
    before = run.history
    run.rewind(target)
    assert run.step == target and run.history["loss"].to_dict() == before["loss"].loc[:target].to_dict()
    assert all(change.step < target for change in run.tape.changes)
    expected = run_of()
    for change in run.tape.changes:
        expected.advance(change.step - expected.step)
        expected.tune(**{change.knob: change.value})
    expected.advance(target - expected.step)
    assert same(run, expected)
    assert run.learner.config.model_dump() == expected.learner.config.model_dump()
    assert run.evaluations.index.tolist() == [s for s in (2, 4, 6, 8, 10) if s <= target]


def test_what_is_left_by_rewinding_stays_as_a_ghost():
    run = tuned(run_of(evaluate_every=5))
    before = run.history
    run.rewind(4)
    run.advance(2)
    run.rewind(5)
    first, second = run.ghosts
    assert first.start == 4 and first.history.frame().equals(before.loc[5:])
    assert [(c.step, c.knob) for c in first.changes] == [(6, "rate")]
    assert first.evaluations.steps.tolist() == [5, 10]
    assert second.start == 5 and second.history.steps.tolist() == [6] and second.changes == []


def test_rewinding_to_the_present_step_changes_nothing():
    run = run_of()
    run.advance(2)
    run.tune(decay=2.0)
    run.rewind(2)
    assert run.ghosts == [] and run.learner.config.decay == 2.0 and len(run.tape.changes) == 1


@pytest.mark.parametrize("wrong", [-1, 6, 2.0, True, "2"])
def test_rewinding_to_a_wrong_step_is_refused(wrong):
    run = run_of()
    run.advance(5)
    with pytest.raises(KnobError, match="step must be a whole number from 0 to 5"):
        run.rewind(wrong)
    assert run.step == 5


def test_steps_may_be_numpys_as_they_come_from_a_tables_index():
    run = run_of()
    run.advance(np.int64(5))
    for step in reversed(run.history.index):
        run.rewind(step)
        assert run.step == step and type(run.ghosts[-1].start if run.ghosts else 0) is int


def test_rewinding_goes_through_phases():
    run, straight = run_of(Phased), run_of(Phased)
    run.advance(9)
    run.rewind(2)
    assert (run.learner.phase, run.learner.phase_step, run.phase_marks) == ("first", 2, [])
    run.advance(7)
    straight.advance(9)
    assert same(run, straight) and run.phase_marks == straight.phase_marks == [(4, "second")]
    run.rewind(4)
    assert run.learner.phase == "second" and run.phase_marks == [(4, "second")]


def test_few_snapshots_serve_the_whole_run(monkeypatch):
    monkeypatch.setattr(run_module, "MAX_SNAPSHOTS", 6)
    run = run_of()
    for _ in range(60):
        run._snapshot_due = 0.0
        run.advance(1)
        assert len(run._snapshots) <= 7
    assert run._snapshots[0][0] == 0
    digests = {}
    for target in (59, 41, 17, 3, 0):
        run.rewind(target)
        digests[target] = run.learner.state().digest()
    fresh = run_of()
    for target in sorted(digests):
        fresh.advance(target - fresh.step)
        assert fresh.learner.state().digest() == digests[target]


# ---- splitting -----------------------------------------------------------------------------------------------------------


def test_a_fork_goes_its_own_way():
    parent = tuned(run_of(evaluate_every=5))
    twin = parent.fork()
    assert twin.step == 10 and same(parent, twin)
    assert twin.tape.changes == parent.tape.changes and twin.evaluations.equals(parent.evaluations)
    twin.tune(decay=3.0)
    twin.advance(3)
    assert parent.step == 10 and parent.learner.config.decay == 1.0 and len(parent.tape.changes) == 3
    parent.advance(3)
    assert not same(parent, twin)
    assert Run.replay(twin.tape, Tiny, autosave=0).identical
    twin.rewind(2)
    assert twin.step == 2 and parent.step == 13


def test_a_fork_of_a_fork_rewinds_before_both():
    run = run_of()
    run.advance(4)
    twin = run.fork()
    twin.advance(3)
    last = twin.fork()
    last.advance(2)
    last.rewind(1)
    run.rewind(1)
    assert same(run, last)


# ---- diverging -------------------------------------------------------------------------------------------------------------


class FragileConfig(polrl.Config):
    poison: float = knob(0.0, low=0.0, high=10.0, first=True)
    harmless: float = knob(0.0, low=0.0, high=1.0)
    evaluation_fails_from: int = 10**6


class Fragile(Learner[FragileConfig]):
    """Breaks in the way that its knob asks for."""

    def setup(self):
        self.net = nn.Linear(1, 1)
        self.inner = torch.zeros(1)

    def update(self):
        kind, loss = int(self.config.poison), self.net.weight.detach().abs().sum()
        with torch.no_grad():
            self.net.weight += 0.1
            if kind == 3:  # the numbers go bad in the parameters; the metrics show it one step later
                self.net.weight *= math.nan
        bad = {1: math.nan, 2: math.inf, 4: -math.inf}.get(kind)
        return {"fine": 1.0, "loss": loss if bad is None else loss * bad}

    def evaluate(self):
        return {"score": math.nan if self.step >= self.config.evaluation_fails_from else 1.0}


def fragile(**options):
    return run_of(Fragile, **{"evaluate_every": 0, **options})


@pytest.mark.parametrize(("poison", "step"), [(1, 6), (2, 6), (4, 6), (3, 7)])
def test_a_metric_that_is_not_finite_takes_the_run_back(poison, step):
    run = fragile()
    run.advance(3)
    run.tune(harmless=0.5)
    run.advance(2)
    run.tune(poison=float(poison))
    with pytest.raises(DivergedError) as raised:
        run.advance(20)
    error = raised.value
    assert (error.step, error.metric) == (step, "loss")
    assert f"loss was not finite at step {step}" in str(error)
    assert f"the last change was poison={poison / 1!r} at step 5" in str(error)
    assert f"back at step {error.restored_step}" in str(error)
    assert run.step == error.restored_step < step
    assert run.learner.parameters_finite() and len(run.history) == run.step
    assert run.history["loss"].map(math.isfinite).all()
    assert run.learner.config.poison == 0.0, "the change is undone with the steps"
    run.advance(20 - run.step)
    assert run.history.index.tolist() == list(range(1, 21))
    assert Run.replay(run.tape, Fragile, autosave=0).identical


def test_a_run_that_was_poisoned_long_ago_goes_on_once_tuned_back(monkeypatch):
    class Later(Fragile):
        def update(self):
            return {**super().update(), "late": math.nan if self.config.poison == 9 and self.step >= 8 else 0.0}

    run = run_of(Later, evaluate_every=0)
    run.tune(poison=9.0)
    for _ in range(8):
        run._snapshot_due = 0.0  # a snapshot at every step: the last finite one is after the change
        run.advance(1)
    for _ in range(2):
        with pytest.raises(DivergedError, match=r"late was not finite at step 9; .* poison=9.0 at step 0") as raised:
            run.advance(3)
        assert run.step == raised.value.restored_step == 7
        assert run.learner.config.poison == 9.0
    run.tune(poison=0.0)
    run.advance(5)
    assert run.step == 12 and run.history["late"].eq(0).all() and len(run.history) == 12


def test_snapshots_are_not_taken_of_broken_parameters():
    run = fragile()
    run.advance(2)
    run.tune(poison=3.0)
    run._advance = None  # only single steps below: the guard has not looked yet
    for _ in range(2):
        run._snapshot_due = 0.0
        try:
            run.single_step()
        except DivergedError as error:
            assert error.restored_step == 2
            break
    else:
        with pytest.raises(DivergedError):
            run.check()
    assert run.learner.parameters_finite() and run.step == 2


def test_without_any_change_the_message_says_so():
    class Sick(Fragile):
        def update(self):
            super().update()
            return {"loss": math.nan}

    run = run_of(Sick)
    with pytest.raises(DivergedError, match=r"loss was not finite at step 1; no knob was moved; .*back at step 0"):
        run.advance(3)
    assert run.step == 0 and run.history.empty


def test_an_evaluation_that_is_not_finite_takes_the_run_back():
    run = run_of(Fragile, {"evaluation_fails_from": 4}, evaluate_every=2)
    with pytest.raises(DivergedError, match="score was not finite at step 4") as raised:
        run.advance(10)
    assert raised.value.metric == "score" and run.step < 4
    assert run.evaluations["score"].map(math.isfinite).all()
    run = run_of(Fragile, {"evaluation_fails_from": 4}, evaluate_every=0)
    run.advance(5)
    with pytest.raises(DivergedError, match="score was not finite at step 5"):
        run.evaluate()
    assert run.step < 5


@pytest.mark.parametrize("look", [lambda run: run.history, lambda run: run.tape, lambda run: run.fork()])
def test_nothing_shows_or_copies_numbers_that_are_not_finite(look):
    run = fragile()
    run.tune(poison=1.0)
    with torch_threads(1):
        run.single_step()
    with pytest.raises(DivergedError):
        look(run)
    look(run)
    assert run.step == 0


def test_the_guard_looks_at_least_twice_a_second(monkeypatch):
    monkeypatch.setattr(run_module, "CHECK_SECONDS", 0.0)
    run = fragile()
    run.tune(poison=1.0)
    with pytest.raises(DivergedError, match="not finite at step 1;"):
        for _ in range(3):
            time.sleep(0.001)
            run.single_step()


# ---- an update that fails ----------------------------------------------------------------------------------------------------


class Failing(Tiny):
    """Raises in mid-update when asked to, after drawing and before its optimizer's step."""

    failures: list[BaseException] = []

    def update(self):
        if self.failures:
            torch.randn(1, generator=self.rng.torch)
            self.net.weight.data += 1
            raise self.failures.pop()
        return super().update()


@pytest.mark.parametrize("failure", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("times", [1, 2])
def test_an_update_that_fails_half_way_leaves_no_half_step(failure, times, monkeypatch):
    run, straight = run_of(Failing), run_of(Failing)
    run.advance(4)
    run.tune(rate=0.05)
    monkeypatch.setattr(Failing, "failures", [failure] * times)
    with pytest.raises(type(failure)):
        run.advance(3)
    assert Failing.failures == []
    assert run.step == len(run.history) == (4 if times == 1 else 0)
    run.advance(4 - run.step)
    run.advance(3)
    straight.advance(7)
    assert same(run, straight) and Run.replay(run.tape, Failing, autosave=0).identical


# ---- repeating ---------------------------------------------------------------------------------------------------------------


def test_a_tape_replays_identically_from_its_json(tmp_path):
    run = tuned(run_of())
    tape = run.tape
    assert json.loads(tape.model_dump_json())["changes"][0] == {"step": 3, "knob": "decay", "value": 1.0}
    assert Tape.load(tape.save(tmp_path / "tape.json")) == tape
    again = Run.replay(tmp_path / "tape.json", Tiny, autosave=0)
    assert again.identical and again.message == "" and same(run, again)
    assert again.tape.changes == tape.changes
    assert run.identical is None


def test_the_kinds_of_values_survive_a_tape():
    run = run_of()
    run.tune(decay=1, repeats=2, mirrored=True, penalty="absolute")
    run.advance(1)
    tape = Tape.model_validate_json(run.tape.model_dump_json())
    assert [repr(change.value) for change in tape.changes] == ["1.0", "2", "True", "'absolute'"]
    assert Run.replay(tape, Tiny, autosave=0).identical


def test_a_setting_that_is_a_tuple_survives_a_tape():
    class Shaped(polrl.Config):
        widths: tuple[int, ...] = (4, 4)
        pairs: tuple[tuple[str, int], ...] = (("a", 1),)
        pull: float = knob(1.0, low=0.0, high=2.0, first=True)

    class Wide(Learner[Shaped]):
        def setup(self):
            self.total = float(sum(self.config.widths))

        def update(self):
            self.total += self.config.pull
            return {"total": self.total}

    run = Run(Wide(widths=(8, 2, 3), pairs=(("b", 2), ("c", 3)), device="cpu"), threads=1)
    run.advance(2)
    tape = Tape.model_validate_json(run.tape.model_dump_json())
    assert tape == run.tape
    again = Run.replay(tape, Wide, autosave=0)
    assert again.identical and again.learner.config == run.learner.config


def test_the_threads_of_a_tape_hold_for_building_too():
    class Summing(Tiny):
        def setup(self):
            super().setup()
            self.threads_seen = torch.get_num_threads()

    with torch_threads(2):
        run = Run(Summing(device="cpu"), autosave=0)
        run.advance(2)
    with torch_threads(1):
        again = Run.replay(run.tape, Summing, autosave=0)
        assert again.threads == 2 and again.learner.threads_seen == 2 and again.identical
        assert again.fork().learner.threads_seen == 2


def test_other_numbers_are_a_note_and_not_an_error():
    tape = tuned(run_of()).tape
    other = tape.model_copy(update={"digest": "0" * 64, "versions": {**tape.versions, "torch": "1.0"}})
    again = Run.replay(other, Tiny, autosave=0)
    assert again.identical is False and again.step == 10
    assert "numbers differ" in again.message and "torch" in again.message
    other = tape.model_copy(update={"digest": "0" * 64})
    assert "versions are the same" in Run.replay(other, Tiny, autosave=0).message


def test_a_tape_of_another_method_is_refused():
    with pytest.raises(CheckpointError, match="made by .*Tiny, not by .*Phased"):
        Run.replay(run_of().tape, Phased)
    with pytest.raises(CheckpointError, match="give its class as `method=`"):
        Run.replay(run_of().tape)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '{"method": "m", "config": {}, "steps": -1}',
        '{"method": "m", "config": {}, "more": 1}',
        '{"method": "m", "config": {}, "format": 2}',
        '{"method": "m", "config": {}, "steps": 9, "changes": [{"step": 10, "knob": "k", "value": 1}]}',
        '{"method": "m", "config": {}, "changes": [{"step": 10, "knob": "k", "value": 1}]}',
        '{"method": "m", "config": {}, "steps": 9, "changes": [{"step": 5, "knob": "k", "value": 1}, '
        '{"step": 4, "knob": "k", "value": 1}]}',
        '{"method": "m", "config": {}, "steps": 9, "changes": [{"step": 5, "knob": "k", "value": null}]}',
        '{"method": "m", "config": {}, "steps": 9, "changes": [{"step": 5, "knob": "k", "value": NaN}]}',
    ],
)
def test_what_is_not_a_tape_is_refused(text, tmp_path):
    (tmp_path / "tape.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tape\.json is not a tape of polrl"):
        Tape.load(tmp_path / "tape.json")


def test_a_missing_tape_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a tape"):
        Tape.load(tmp_path / "nowhere.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="is not a tape"):
        Tape.load(tmp_path / "bytes.json")


def test_a_tape_as_code_repeats_the_run():
    run = tuned(run_of(settings={"seed": 3}))
    names = {"Run": Run, "Tiny": Tiny}
    exec(run.tape.as_code("Tiny"), names)
    assert same(names["run"], run)


def test_a_replay_goes_through_what_a_rewind_left():
    run = tuned(run_of())
    run.rewind(5)
    run.tune(decay=2.5)
    run.advance(5)
    again = Run.replay(run.tape, Tiny, autosave=0)
    assert again.identical and same(run, again)


# ---- following a tape ----------------------------------------------------------------------------------------------------


def tuned_run(steps=12):
    run = Run(Counted(gain=1.0, device="cpu"), threads=1)
    run.tune(gain=1.5)
    run.advance(5)
    run.tune(gain=2.0)
    run.advance(steps - 5)
    run.tune(gain=0.5)  # after the last step
    return run


def test_a_run_that_follows_a_tape_turns_the_knobs_itself_and_is_held_at_its_end():
    tape = tuned_run().tape
    run = Run(Counted(gain=1.0, device="cpu"), threads=1)
    run.follow(tape)
    run.advance(5)
    assert run.learner.config.gain == 1.5 and not run.held and run.identical is None
    run.advance(1)
    assert run.learner.config.gain == 2.0
    run.advance(6)
    assert run.held and run.identical and "every number" in run.message
    assert run.learner.config.gain == 0.5 and run.tape == tape


def test_a_hand_on_a_knob_ends_the_following():
    run = Run(Counted(gain=1.0, device="cpu"), threads=1)
    run.follow(tuned_run().tape)
    run.advance(2)
    run.tune(gain=3.0)
    run.advance(20)
    assert run.learner.config.gain == 3.0 and not run.held and run.identical is None


def test_a_followed_tape_whose_numbers_differ_is_told():
    tape = tuned_run().tape.model_copy(update={"digest": "0" * 64})
    run = Run(Counted(gain=1.0, device="cpu"), threads=1)
    run.follow(tape)
    run.advance(12)
    assert run.identical is False and "differ" in run.message


def test_only_the_same_beginning_can_follow_a_tape():
    tape = tuned_run().tape
    other = Run(Counted(gain=1.0, seed=3, device="cpu"), threads=1)
    with pytest.raises(CheckpointError, match="did not begin as the tape"):
        other.follow(tape)
    late = Run(Counted(gain=1.0, device="cpu"), threads=1)
    late.advance(1)
    with pytest.raises(CheckpointError, match="from step 0, this run is at step 1"):
        late.follow(tape)


def test_rewinding_while_following_goes_on_following():
    tape = tuned_run().tape
    run = Run(Counted(gain=1.0, device="cpu"), threads=1)
    run.follow(tape)
    run.advance(9)
    run.rewind(3)
    run.advance(9)
    assert run.identical and run.tape.digest == tape.digest


class Table(Learner[polrl.Config]):
    """A learner without networks, whose table can go bad some steps before a metric shows it."""

    def setup(self):
        self.values = torch.zeros(3)
        self.unfilled = torch.full((2,), float("nan"))
        self.spoil = False

    def update(self):
        self.values = self.values + 1
        if self.spoil:
            self.values[2] = float("nan")
        return {"first": self.values[0] if self.step % 40 != 39 else self.values.sum()}


def test_a_table_that_went_bad_is_no_state_to_go_back_to():
    run = Run(Table(), threads=1)
    for step in range(60):
        run._snapshot_due = 0.0
        run.learner.spoil = step >= 10
        if step == 39:
            break
        run.advance(1)
    with pytest.raises(DivergedError, match="first was not finite at step 40"):
        run.advance(1)
    assert run.step == 10 and run.learner.values.isfinite().all()
    assert len(run._snapshots) > 5, "what was NaN from the beginning does not hinder snapshots"
