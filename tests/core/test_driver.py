"""Driver: training in the background, with commands between updates, and never a half-way state."""

from __future__ import annotations

import math
import sys
import threading
import time

import pytest
import torch
from test_run import Failing, Fragile
from tiny import Phased, Tiny, run_of, same

from polrl import Driver, Run
from polrl.core import run as run_module
from polrl.core.errors import DivergedError, KnobError

PATIENCE = 30.0


def until(condition, what="the condition"):
    """Wait for something that another thread brings about."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"{what} did not come about"
        time.sleep(0.002)


@pytest.fixture
def drive():
    """Make drivers that are closed at the end, whatever happens."""
    made = []

    def make(*runs, **options):
        made.append(Driver(runs, **options))
        return made[-1]

    yield make
    for driver in made:
        driver.close()
        assert not driver.alive, "a training thread outlived its driver"


@pytest.fixture(autouse=True)
def _frequent_switches():
    """Let threads interleave more often than usual, so that races show."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


# ---- play, pause, a number of steps ------------------------------------------------------------------------------------


def test_a_driven_run_comes_out_as_an_undriven_one(drive):
    run, straight = run_of(evaluate_every=7), run_of()
    driver = drive(run)
    driver.play(40)
    until(lambda: not driver.training)
    straight.advance(40)
    assert run.step == 40 and same(run, straight)
    assert run.evaluations.index.tolist() == [7, 14, 21, 28, 35]


@pytest.mark.parametrize("rounds", [1, 3])
def test_playing_a_number_of_rounds_does_exactly_those(drive, rounds):
    run = run_of()
    driver = drive(run)
    for k in range(1, 6):
        driver.play(rounds)
        until(lambda: not driver.training)
        assert len(run.history) == k * rounds
    assert driver.error == "" and driver.alive


def test_pause_stops_and_play_goes_on(drive):
    run = run_of()
    driver = drive(run)
    driver.play()
    until(lambda: run.step > 5)
    driver.pause()
    stopped = len(run.history)
    assert not driver.training
    time.sleep(0.1)
    assert len(run.history) == stopped
    driver.play()
    until(lambda: run.step > stopped + 5)


def test_a_pause_is_never_lost(drive):
    run = run_of(Phased)
    driver = drive(run)
    for _ in range(200):
        driver.play()
        driver.pause()
        assert not driver.training
    stopped = len(run.history)
    time.sleep(0.05)
    assert len(run.history) == stopped


def test_two_runs_advance_together(drive):
    first, second = run_of(), run_of(Phased)
    driver = drive(first, second)
    driver.play(15)
    until(lambda: not driver.training)
    assert first.step == second.step == 15
    alone = run_of(), run_of(Phased)
    for run in alone:
        run.advance(15)
    assert same(first, alone[0]) and same(second, alone[1])


def test_each_run_trains_with_the_threads_of_its_tape(drive):
    class Seeing(Tiny):
        def update(self):
            return {**super().update(), "threads": torch.get_num_threads()}

    one, two = run_of(Seeing, threads=1), run_of(Seeing, threads=2)
    driver = drive(one, two)
    driver.play(4)
    until(lambda: not driver.training)
    assert set(one.history["threads"]) == {1} and set(two.history["threads"]) == {2}
    assert (one.tape.threads, two.tape.threads) == (1, 2)


def test_two_drivers_at_once_do_not_disturb_each_other(drive):
    runs = [run_of(settings={"seed": seed}) for seed in (1, 2)]
    drivers = [drive(run) for run in runs]
    for driver in drivers:
        driver.play(60)
    until(lambda: not any(driver.training for driver in drivers))
    for seed, run in zip((1, 2), runs, strict=True):
        alone = run_of(settings={"seed": seed})
        alone.advance(60)
        assert same(run, alone)


def test_the_speed_limit_holds_roughly_even_while_commands_come(drive):
    run = run_of()
    driver = drive(run)
    driver.speed_limit = 20.0
    began = time.monotonic()
    driver.play()
    while time.monotonic() < began + 0.6:
        run.tune(decay=1.0)
    driver.pause()
    steps = len(run.history)
    took = time.monotonic() - began
    assert 1 <= steps <= 20 * took + 2
    driver.speed_limit = None
    driver.play(30)
    until(lambda: not driver.training)
    assert run.step == steps + 30


def test_a_pause_during_the_wait_of_a_speed_limit_takes_effect(drive):
    run = run_of()
    driver = drive(run)
    driver.speed_limit = 2.0
    driver.play()
    until(lambda: run.step == 1)
    driver.pause()
    time.sleep(0.6)
    assert run.step == 1


# ---- commands from other threads ---------------------------------------------------------------------------------------


def test_commands_are_carried_out_between_updates(drive, tmp_path):
    run = run_of(evaluate_every=0)
    driver = drive(run)
    thread = driver._thread
    carried_out = []
    driver.play()
    for k in range(10):
        run.tune(decay=0.1 * k)
        twin = run.fork()
        assert twin.step == len(twin.history) and twin.learner.config.decay == 0.1 * k
        assert math.isfinite(run.evaluate()["size"]) and run.views().keys() == {"weight"}
        run.save(tmp_path / "run")
        step = run.post(lambda: run.step).result()
        run.rewind(step // 2)
        assert len(run.ghosts) <= k + 1
        carried_out.append(run.post(threading.current_thread).result())
    driver.pause()
    assert set(carried_out) == {thread}
    run.tune(decay=1.0)
    assert run.learner.config.decay == 1.0, "commands are carried out while paused, too"
    assert Run.replay(run.tape, Tiny, autosave=0).identical
    assert Run.replay(twin.tape, Tiny, autosave=0).identical


def test_a_refused_command_tells_its_sender_and_stops_nothing(drive):
    run = run_of()
    driver = drive(run)
    driver.play()
    with pytest.raises(KnobError, match="decay"):
        run.tune(decay=99.0)
    step = run.step
    until(lambda: run.step > step + 3)
    assert driver.error == "" and driver.training


def test_many_changes_in_quick_succession_lose_no_final_value(drive):
    run = run_of()
    driver = drive(run)
    driver.play()
    values = [{"decay": 4.0 * i / 999, "mirrored": i % 2 == 1} for i in range(1000)]
    for future in [run.post(lambda values=values: run._tune(values)) for values in values]:
        future.result(PATIENCE)
    assert run.learner.config.decay == 4.0 and run.learner.config.mirrored is True
    driver.pause()
    keys = [(change.step, change.knob) for change in run.tape.changes]
    assert len(keys) == len(set(keys)) and keys == sorted(keys, key=lambda key: key[0])
    assert Run.replay(run.tape, Tiny, autosave=0).identical


def test_a_knob_has_one_value_during_an_update(drive):
    class Reading(Tiny):
        def update(self):
            first = self.config.decay
            time.sleep(0.002)
            return {**super().update(), "first": first, "second": self.config.decay}

    run = run_of(Reading)
    driver = drive(run)
    driver.play(60)
    value = 0
    while driver.training:
        value += 1
        run.tune(decay=value % 40 / 10)
    table = run.history
    assert len(table) == 60 and (table["first"] == table["second"]).all() and table["first"].nunique() > 5


def test_rewinds_from_two_threads_at_once_are_carried_out_one_after_the_other(drive):
    run = run_of()
    drive(run)
    run.advance(30)
    outcomes = []

    def back(step):
        try:
            run.rewind(step)
            outcomes.append(step)
        except KnobError:
            outcomes.append(None)

    threads = [threading.Thread(target=back, args=(step,)) for step in (20, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert 10 in outcomes and run.step == len(run.history) == 10
    with pytest.raises(KnobError, match="from 0 to 10"):
        run.rewind(20)


def test_advancing_by_hand_works_while_paused(drive):
    run, straight = run_of(), run_of()
    drive(run)
    run.advance(5)
    straight.advance(5)
    assert same(run, straight)


# ---- the end ---------------------------------------------------------------------------------------------------------------


def test_commands_after_closing_are_carried_out_directly(drive):
    run = run_of()
    driver = drive(run)
    driver.play()
    until(lambda: run.step > 3)
    driver.close()
    assert not driver.alive and not driver.training
    step = run.step
    assert run.post(threading.current_thread).result() is threading.current_thread()
    run.advance(4)
    run.tune(decay=1.0)
    assert run.step == step + 4 == len(run.history)


def test_no_command_is_lost_when_the_driver_closes(drive):
    for _ in range(15):
        run = run_of(Phased)
        driver = drive(run)
        driver.play()
        done, busy, rooms = [], [0], []

        def command(run=run, done=done, busy=busy, rooms=rooms):
            busy[0] += 1
            rooms.append(busy[0])
            time.sleep(0.0005)
            done.append(run.step)
            busy[0] -= 1

        def send(count, run=run):
            for _ in range(count):
                run.post(command).result(PATIENCE)

        senders = [threading.Thread(target=send, args=(15,)) for _ in range(3)]
        for sender in senders:
            sender.start()
        time.sleep(0.005)
        driver.close()
        for sender in senders:
            sender.join(PATIENCE)
            assert not sender.is_alive(), "a command was never carried out"
        assert len(done) == 45 and set(rooms) == {1}, "two commands were carried out at once"


def test_closing_from_the_tick_does_not_wait_for_itself(drive):
    run = run_of()
    driver = drive(run)
    driver.on_tick = driver.close
    driver.play()
    until(lambda: not driver.alive)
    run.advance(1)


def test_a_driver_can_be_closed_twice(drive):
    driver = drive(run_of())
    driver.close()
    driver.close()


def test_a_run_has_one_driver(drive):
    free, taken = run_of(), run_of()
    first = drive(taken)
    with pytest.raises(KnobError, match="driven by another thread"):
        Driver([free, taken])
    free.advance(2)
    assert free.step == 2, "a driver that could not begin holds nothing"
    first.close()
    drive(taken).close()


def test_runs_join_and_leave_while_training(drive):
    first, second = run_of(), run_of(Phased)
    driver = drive(first)
    driver.play()
    until(lambda: first.step > 3)
    for _ in range(10):
        driver.add(second)
        step = second.step
        until(lambda step=step: second.step > step)
        driver.remove(second)
        step = second.step
        second.advance(2)
        assert second.step == step + 2 == len(second.history), "a run that left is nobody else's"
    assert first in driver.runs and second not in driver.runs
    driver.pause()
    driver.add(second)
    driver.remove(second)
    alone = run_of(Phased)
    alone.advance(second.step)
    assert same(second, alone)


def test_a_closed_driver_takes_no_more_runs(drive):
    driver = drive(run_of())
    driver.close()
    late = run_of()
    with pytest.raises(KnobError, match="closed"):
        driver.add(late)
    late.advance(1)
    assert late.step == 1


# ---- what goes wrong ---------------------------------------------------------------------------------------------------------


def test_an_exception_in_update_pauses_with_its_traceback(drive, monkeypatch):
    run = run_of(Failing)
    driver = drive(run)
    driver.play()
    until(lambda: run.step > 3)
    monkeypatch.setattr(Failing, "failures", [RuntimeError("the learner's own fault")])
    until(lambda: driver.error, "the pause")
    assert not driver.training and driver.alive
    assert "the learner's own fault" in driver.error and "Traceback" in driver.error and "in update" in driver.error
    run.tune(decay=2.0)
    assert run.step == len(run.history)
    driver.play(3)
    until(lambda: not driver.training)
    assert driver.error == ""
    assert Run.replay(run.tape, Failing, autosave=0).identical


def test_a_metric_that_is_not_finite_pauses(drive):
    run = run_of(Fragile, evaluate_every=0)
    driver = drive(run)
    driver.play()
    until(lambda: run.step > 3)
    run.tune(poison=1.0)
    until(lambda: driver.error, "the pause")
    assert not driver.training
    assert driver.error.startswith("loss was not finite at step") and "poison=1.0" in driver.error
    assert run.learner.config.poison == 0.0 and run.step == len(run.history)
    driver.play(5)
    until(lambda: not driver.training)
    assert driver.error == ""


@pytest.mark.parametrize("who", ["a command", "the tick"])
def test_whoever_finds_the_divergence_the_training_pauses(drive, monkeypatch, who):
    monkeypatch.setattr(run_module, "CHECK_SECONDS", 1e9)
    run = run_of(Fragile, evaluate_every=0)
    driver = drive(run)
    driver.play()
    until(lambda: run.step > 3)
    if who == "the tick":
        driver.on_tick = lambda: run.history
        run.tune(poison=1.0)
    else:
        with pytest.raises(DivergedError):
            run.post(lambda: (run._tune({"poison": 1.0}), run._advance(1))).result(PATIENCE)
    until(lambda: driver.error, "the pause")
    assert not driver.training and driver.error.startswith("loss was not finite at step")
    stopped = run.step
    time.sleep(0.05)
    assert run.step == stopped


def test_an_exception_while_drawing_is_kept_and_training_goes_on(drive):
    run = run_of()
    driver = drive(run)

    def draw():
        raise ValueError("no canvas")

    driver.on_tick = draw
    driver.play()
    until(lambda: "no canvas" in driver.error)
    step = run.step
    until(lambda: run.step > step + 3)


def test_ticks_come_between_updates_in_the_training_thread(drive):
    class Marking(Tiny):
        inside = False

        def update(self):
            type(self).inside = True
            try:
                return super().update()
            finally:
                type(self).inside = False

    run = run_of(Marking)
    driver = drive(run)
    seen = []
    driver.tick_seconds = 0.0
    driver.on_tick = lambda: seen.append((Marking.inside, threading.current_thread() is driver._thread, run.step))
    driver.play(30)
    until(lambda: not driver.training)
    driver.close()
    assert {(inside, own) for inside, own, _ in seen} == {(False, True)}
    assert {step for *_, step in seen} >= set(range(1, 31))


def test_a_run_at_the_end_of_its_tape_waits_while_the_others_go_on():
    first = Run(Tiny(device="cpu"), threads=1)
    first.advance(6)
    replayed, other = Run(Tiny(device="cpu"), threads=1), Run(Tiny(device="cpu"), threads=1)
    replayed.follow(first.tape)
    driver = Driver([replayed, other])
    try:
        driver.play(15)
        until(lambda: not driver.training)
        assert (replayed.step, other.step) == (6, 15) and replayed.identical and replayed.held
        driver.remove(other)
        driver.play(3)  # asked to play, it goes on
        until(lambda: not driver.training)
        assert replayed.step == 9 and not replayed.held
    finally:
        driver.close()


def test_a_driver_whose_runs_all_wait_pauses():
    tape = Run(Tiny(device="cpu"), threads=1).tape
    run = Run(Tiny(device="cpu"), threads=1)
    driver = Driver([run])
    try:
        run.follow(tape.model_copy(update={"steps": 4}))
        driver.play()
        until(lambda: not driver.training)
        assert run.step == 4 and run.held and run.identical is False
    finally:
        driver.close()
