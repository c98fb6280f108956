"""`Driver`: lets runs train in one background thread, so that sliders and other cells stay alive."""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

import torch

from polrl.core.device import torch_threads
from polrl.core.errors import DivergedError, KnobError
from polrl.core.run import Run

#: The training thread rests so long after a command, so that the answer gets to the screen.
COURTESY_SECONDS = 0.002


class Driver:
    """A thread that advances one or more runs in turn, carries out their commands between updates, and pauses.

    Parameters
    ----------
    runs : sequence of Run
        Each gets one update a round, with its own number of torch threads.

    Attributes
    ----------
    on_tick : callable or None
        Called in the training thread, between two updates and at least every `tick_seconds` while training;
        also once after commands were carried out. For drawing.
    tick_seconds : float
    speed_limit : float or None
        Rounds per second at the most.
    error : str
        What stopped the training last: the guard's message, or a traceback; "" if nothing did.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs: list[Run] = []
        self.on_tick: Callable[[], None] | None = None
        self.tick_seconds = 0.4
        self.speed_limit: float | None = None
        self.error = ""
        self._rounds_left: float = 0
        self._cpu_seconds = 0.0
        self._wake = threading.Condition()
        self._stopping = False
        # Like a part of the cell that made it: there it prints, and there a notebook's page is answered.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._work,), name="polrl-training", daemon=True)
        try:
            for run in runs:
                self.add(run)
        except BaseException:
            self._let_go()
            raise
        self._thread.start()

    @property
    def training(self) -> bool:
        """True while updates are being done."""
        return self._rounds_left > 0 and not self._stopping

    @property
    def alive(self) -> bool:
        """True until `close`."""
        return self._thread.is_alive()

    def cpu_seconds(self) -> float:
        """Processor time that the training thread has taken so far, in seconds."""
        return self._cpu_seconds

    def play(self, rounds: float = float("inf")) -> None:
        """Train for a number of rounds, or until `pause`."""
        with self._wake:
            self.error = ""
            for run in self.runs:
                run.held = False
            self._rounds_left = rounds
            self._wake.notify_all()

    def pause(self) -> None:
        """Stop after the present update; commands are still carried out."""
        with self._wake:
            self._rounds_left = 0
            self._wake.notify_all()

    def nudge(self) -> None:
        """Have waiting commands carried out now, also while paused."""
        with self._wake:
            self._wake.notify_all()

    def add(self, run: Run) -> None:
        """Drive one more run."""
        run.hand_over(self._thread)
        run.diverged = None
        with self._wake:
            closed = self._stopping
            if not closed:
                self.runs.append(run)
        if closed:
            run.hand_over(None)
            raise KnobError("this driver was closed; make a new one")

    def remove(self, run: Run) -> None:
        """Leave a run to itself, after the present update."""

        def leave() -> None:
            self.runs.remove(run)
            run.hand_over(None)

        left = run.post(leave)
        self.nudge()
        left.result()

    def close(self, timeout: float = 10.0) -> None:
        """End the thread after the present update; the runs can then be used directly again."""
        with self._wake:
            self._stopping = True
            self._rounds_left = 0
            self._wake.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _work(self) -> None:
        if self.runs:
            torch.set_num_threads(self.runs[0].threads)
        last_tick = last_round = 0.0
        try:
            while not self._stopping:
                served = sum(run.serve() for run in list(self.runs))
                self._heed()
                if self._rounds_left > 0 and self._may_go_on(last_round):
                    last_round = time.monotonic()
                    self._round()
                now = time.monotonic()
                if served or now - last_tick >= self.tick_seconds or self._rounds_left <= 0:
                    last_tick = now
                    self._cpu_seconds = time.thread_time()
                    self._tick()
                    self._heed()
                    if served and self._rounds_left > 0:
                        time.sleep(COURTESY_SECONDS)
                if self._rounds_left <= 0:
                    with self._wake:
                        if self._rounds_left <= 0 and not self._stopping and not self._commands_waiting():
                            self._wake.wait(0.05 if served else 0.2)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        with self._wake:
            self._stopping = True
        for run in list(self.runs):
            run.hand_over(None)

    def _commands_waiting(self) -> bool:
        return any(not run._commands.empty() for run in self.runs)

    def _may_go_on(self, last_round: float) -> bool:
        """Wait until the speed limit allows another round; False if something else has come up by then."""
        while limit := self.speed_limit:
            wait = last_round + 1 / limit - time.monotonic()
            if wait <= 0:
                break
            if self._stopping or self._rounds_left <= 0 or self._commands_waiting():
                return False
            time.sleep(min(wait, 0.02))
        return self._rounds_left > 0

    def _heed(self) -> None:
        """Pause if a run has gone back, whoever found its numbers to be bad."""
        for run in list(self.runs):
            if run.diverged is not None:
                self.error, run.diverged = str(run.diverged), None
                self._rounds_left = 0

    def _round(self) -> None:
        with self._guard():
            going = [run for run in self.runs if not run.held]
            for run in going:
                with torch_threads(run.threads):
                    run.single_step()
            with self._wake:
                self._rounds_left = self._rounds_left - 1 if going else 0

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """Pause on whatever goes wrong, and keep the words."""
        try:
            yield
        except DivergedError:
            self._heed()
        except BaseException:
            self.error = traceback.format_exc()
            self._rounds_left = 0

    def _tick(self) -> None:
        with self._guard():
            for run in list(self.runs):
                run.check()
        if self.on_tick is not None:
            try:
                self.on_tick()
            except Exception:
                self.error = self.error or traceback.format_exc()
