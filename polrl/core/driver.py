"""`Driver`: lets runs train in one background thread, so that sliders and other cells stay alive."""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

import torch

from polrl.core.errors import DivergedError
from polrl.core.run import Run


class Driver:
    """A thread that advances one or more runs in turn, carries out their commands between updates, and pauses.

    Parameters
    ----------
    runs : sequence of Run
        Each gets one update a round.
    threads : int, optional
        torch threads of the background thread; that of the first run if not given.

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

    def __init__(self, runs: Sequence[Run], threads: int | None = None) -> None:
        self.runs = list(runs)
        self.threads = runs[0].threads if threads is None else threads
        self.on_tick: Callable[[], None] | None = None
        self.tick_seconds = 0.05
        self.speed_limit: float | None = None
        self.error = ""
        self._rounds_left: float = 0
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="polrl-training", daemon=True)
        for run in self.runs:
            run.hand_over(self._thread)
        self._thread.start()

    @property
    def training(self) -> bool:
        """True while updates are being done."""
        return self._rounds_left > 0 and not self._stopping

    @property
    def alive(self) -> bool:
        """True until `close`."""
        return self._thread.is_alive()

    def play(self, rounds: float = float("inf")) -> None:
        """Train for a number of rounds, or until `pause`."""
        with self._wake:
            self.error = ""
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
        self.runs.append(run)

    def remove(self, run: Run) -> None:
        """Leave a run to itself."""
        self.runs.remove(run)
        run.hand_over(None)

    def close(self, timeout: float = 10.0) -> None:
        """End the thread after the present update; the runs can then be used directly again."""
        with self._wake:
            self._stopping = True
            self._rounds_left = 0
            self._wake.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _work(self) -> None:
        torch.set_num_threads(self.threads)
        last_tick = last_round = 0.0
        try:
            while not self._stopping:
                served = sum(run.serve() for run in list(self.runs))
                if self._rounds_left > 0:
                    self._keep_speed(last_round)
                    last_round = time.monotonic()
                    self._round()
                now = time.monotonic()
                if served or now - last_tick >= self.tick_seconds or self._rounds_left <= 0:
                    last_tick = now
                    self._tick()
                if self._rounds_left <= 0:
                    with self._wake:
                        if self._rounds_left <= 0 and not self._stopping and not self._commands_waiting():
                            self._wake.wait(0.05 if served else 0.2)
        finally:
            for run in list(self.runs):
                run.hand_over(None)

    def _commands_waiting(self) -> bool:
        return any(not run._commands.empty() for run in self.runs)

    def _keep_speed(self, last_round: float) -> None:
        if not self.speed_limit:
            return
        due = last_round + 1 / self.speed_limit
        while (wait := due - time.monotonic()) > 0 and not self._stopping and self._rounds_left > 0:
            time.sleep(min(wait, 0.02))
            if self._commands_waiting():
                return

    def _round(self) -> None:
        with self._guard():
            for run in list(self.runs):
                run.single_step()
            self._rounds_left -= 1

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """Pause on whatever goes wrong, and keep the words."""
        try:
            yield
        except DivergedError as diverged:
            self.error = str(diverged)
            self._rounds_left = 0
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
