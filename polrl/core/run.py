"""`Run`: drives one learner, writes down what is done to it, and can go back, split, stop and repeat."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import queue
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch

from polrl.core.device import torch_threads
from polrl.core.errors import CheckpointError, DivergedError, KnobError, unknown_name
from polrl.core.history import History
from polrl.core.learner import Learner
from polrl.core.state import State
from polrl.core.store import PREVIOUS, STATE, RunFolder
from polrl.core.tape import Change, Tape, present_versions
from polrl.core.views import View

T = TypeVar("T")

#: Seconds between two looks at the metrics for values that are not finite.
CHECK_SECONDS = 0.25
#: Metrics of so many steps are kept unread at the most.
CHECK_STEPS = 500
#: Upkeep waits so long after a person has moved a knob, evaluations until it has rested for so long; seconds.
ANSWER_SECONDS, SETTLED_SECONDS = 0.15, 0.4
MAX_SNAPSHOTS = 64
MAX_SNAPSHOT_BYTES = 512 * 1024**2


@dataclasses.dataclass(frozen=True)
class Ghost:
    """A branch that was left by rewinding: kept to be seen, not to be continued."""

    start: int
    history: History
    evaluations: History
    changes: list[Change]


class Run:
    """One learner on its way.

    Everything that touches the learner goes through here, so that a run that trains in a background thread
    (see `polrl.core.driver`) does it between two updates of that thread, and any other at once.

    Parameters
    ----------
    learner : Learner
        Becomes the run's own.
    folder : Path, optional
        Where to save; without one the run lives in memory only. A folder is saved to every few seconds
        (`autosave`), so that a killed process loses no more than that.
    threads : int, optional
        torch threads while training; what torch uses at present if not given.
    autosave : float
        Seconds between two savings; fewer savings are made where one takes long. 0 turns it off.
    evaluate_every : int, optional
        Steps between two evaluations, of which there is one more where a phase begins; the learner's own number if
        not given, 0 for none at all.

    Examples
    --------
    >>> run = Run(NoiseMask(pretrain_epochs=1))
    >>> run.advance(20)
    >>> run.tune(mask_strength=0.5)
    >>> other = run.fork()
    >>> run.history.tail()
    """

    def __init__(
        self,
        learner: Learner[Any],
        *,
        folder: str | Path | None = None,
        threads: int | None = None,
        autosave: float = 3.0,
        evaluate_every: int | None = None,
        _continued: bool = False,
    ) -> None:
        if learner.config._driven:
            raise KnobError("this learner is driven by another run already; fork that run, or make a new learner")
        if learner.step and not _continued:
            raise KnobError(f"the learner is at step {learner.step} already: a run's tape must begin at step 0")
        if threads is not None and threads < 1:
            raise KnobError(f"threads must be a whole number of at least 1, got {threads!r}")
        self.learner = learner
        self.threads = torch.get_num_threads() if threads is None else threads
        self.evaluate_every = learner.evaluate_every if evaluate_every is None else evaluate_every
        self.autosave = autosave
        self.ghosts: list[Ghost] = []
        self.phase_marks: list[tuple[int, str]] = []
        #: When a person last moved a knob (time.monotonic): evaluations wait until the knob rests, other upkeep for
        #: the moment that the answer takes.
        self.touched = -math.inf
        self._evaluation_waits = False
        #: What a person should know: a save that failed, a fallback that was used; "" if nothing.
        self.message = ""
        #: After `replay`: True if all numbers came out alike; None for any other run.
        self.identical: bool | None = None
        #: True at the end of a tape that was followed: a driver leaves the run alone until it is told to play.
        self.held = False
        self._followed: Tape | None = None
        self._script: dict[int, dict[str, Any]] = {}
        #: The last divergence, until a driver has heeded it.
        self.diverged: DivergedError | None = None
        self._history = History()
        self._evaluations = History()
        self._tape = Tape(method=learner.slug(), config=learner.config.model_dump(mode="json"), threads=self.threads)
        self._snapshots: list[tuple[int, State]] = []
        self._unfilled: set[str] = set()
        self._snapshot_seconds = 0.5
        self._snapshot_due = 0.0
        self._checked = time.monotonic()
        self._saved = time.monotonic()
        self._save_cost = 0.0
        self._save_trouble = ""
        self._rows_cut = False
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.RLock()
        self._door = threading.RLock()
        self._driver: threading.Thread | None = None
        self._folder: RunFolder | None = None
        if folder is not None:
            self._open(Path(folder))
        learner.config._driven = True

    def __repr__(self) -> str:
        return f"<Run of {self._tape.method} at step {self.step}{' in ' + str(self.folder) if self.folder else ''}>"

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- who may touch the learner ---------------------------------------------------------------------------

    def post(self, command: Callable[[], T]) -> concurrent.futures.Future[T]:
        """Let a function run between two updates, in the thread that trains; at once if none does."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def carry_out() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(command())
            except BaseException as error:
                future.set_exception(error)

        with self._door:
            driver = self._driver
            elsewhere = driver is not None and driver is not threading.current_thread()
            if elsewhere:
                self._commands.put(carry_out)
        if not elsewhere:
            with self._lock:
                carry_out()
        return future

    def hand_over(self, driver: threading.Thread | None) -> None:
        """Let a thread drive the run from now on, or (with None) nobody; waiting commands are carried out first."""
        with self._door:
            if driver is not None and self._driver is not None:
                raise KnobError("this run is driven by another thread already")
            self._driver = driver
            if driver is None:
                self.serve()  # before anyone else's command, which waits at the door

    def serve(self) -> int:
        """Carry out the commands that are waiting; called by the training thread. Returns how many."""
        served = 0
        while not self._commands.empty():
            self._commands.get()()
            served += 1
        return served

    # ---- going on --------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Updates done."""
        return self.learner.step

    @property
    def folder(self) -> Path | None:
        """Where the run is saved."""
        return self._folder.path if self._folder else None

    def advance(self, steps: int = 1) -> None:
        """Do a number of updates.

        Raises
        ------
        DivergedError
            If a metric is not finite; the run is then back at its last finite state.
        """
        if not _is_whole(steps) or steps < 0:
            raise KnobError(f"steps must be a whole number of at least 0, got {steps!r}")
        self.post(lambda: self._advance(steps)).result()

    def _advance(self, steps: int) -> None:
        with torch_threads(self.threads):
            for _ in range(steps):
                self.single_step()
            self.check()

    def single_step(self) -> None:
        """Do one update, with the upkeep that is due; the training thread's own call."""
        learner = self.learner
        now = time.monotonic()
        if self._followed is not None and learner.step in self._script:
            self._set_knobs(self._script[learner.step])
        touched = now - self.touched  # a person turns a knob: upkeep leaves the answer its time
        patience = 2.0 if touched < ANSWER_SECONDS else 0.0
        if now >= self._snapshot_due + patience:
            self._snapshot()
        phase = learner.phase
        step = learner.step + 1
        try:
            self._history.append(step, phase, learner.update())
        except BaseException:  # an interrupt, say, with half an update done
            self._undo_half_step(step - 1)
            raise
        if learner.phase != phase:
            self.phase_marks.append((step, learner.phase))
        if self.evaluate_every:
            self._evaluation_waits |= step % self.evaluate_every == 0
            if learner.phase != phase or (self._evaluation_waits and touched >= SETTLED_SECONDS):
                self._evaluate()
        if now - self._checked > CHECK_SECONDS or len(self._history._pending) >= CHECK_STEPS:
            self.check()
        if self._folder is not None and (not patience or now - self._saved > 2 * self.autosave):
            self._autosave_if_due()
        if self._followed is not None and step >= self._followed.steps:
            self._end_of_tape()

    def _undo_half_step(self, before: int) -> None:
        self._history.keep_until(before)
        try:
            self._restore(before)
        except BaseException:  # it fails again, or the person is impatient: the newest snapshot must do
            self._return_to(self._snapshots[-1][0])

    def check(self) -> None:
        """Read the metrics that are waiting; go back and raise DivergedError if one is not finite."""
        self._checked = time.monotonic()
        bad = self._history.flush()
        if bad is not None:
            self._go_back(*bad)

    def _go_back(self, step: int, metric: str) -> None:
        while self._snapshots and self._snapshots[-1][0] >= step:
            self._snapshots.pop()
        self._remember_start()
        restored = self._snapshots[-1][0]
        last = next((c for c in reversed(self._tape.changes) if c.step < step), None)
        self._return_to(restored)
        cause = f"the last change was {last.knob}={last.value!r} at step {last.step}" if last else "no knob was moved"
        self.diverged = DivergedError(
            f"{metric} was not finite at step {step}; {cause}; the run is back at step {restored}",
            step=step,
            metric=metric,
            restored_step=restored,
        )
        raise self.diverged

    def tune(self, **values: Any) -> None:
        """Turn knobs; the very next update uses the new values, and the tape keeps them.

        Raises
        ------
        UnknownNameError
            If there is no such knob; nothing is changed.
        StructureError
            If the name is that of a structural setting.
        KnobError
            If a value can't be taken; nothing is changed.
        """
        self.post(lambda: self._tune(values)).result()

    def _tune(self, values: dict[str, Any]) -> None:
        self._followed = None  # from here on the run is the person's own
        self._set_knobs(values)

    def _set_knobs(self, values: dict[str, Any]) -> None:
        config = self.learner.config
        for name, value in values.items():
            if name in config.knobs:
                try:
                    config.knobs[name].check(value, config)
                except KnobError as error:
                    raise KnobError(f"{error}; it stays {getattr(config, name)!r}") from None
            elif name in type(config).model_fields:
                config._set(name, value)
            else:
                raise unknown_name("knob", name, config.knobs)
        for name, value in values.items():
            if name in config.knobs:
                taken = config._set(name, value)
                self._tape.record(self.step, name, taken)

    def follow(self, tape: Tape) -> None:
        """Turn the knobs by themselves from now on, as a tape says; `tune` ends that.

        At the tape's last step `identical` and `message` say whether the numbers came out alike, and `held` is
        set.

        Raises
        ------
        CheckpointError
            If the run is not at the beginning of that tape: another method or configuration, or not at step 0.
        """
        self.post(lambda: self._follow(tape)).result()

    def _follow(self, tape: Tape) -> None:
        if (tape.method, tape.config) != (self._tape.method, self._tape.config):
            raise CheckpointError(f"this run of {self._tape.method} did not begin as the tape of {tape.method} says")
        if self.step or self._tape.changes:
            raise CheckpointError(f"a tape is followed from step 0, this run is at step {self.step}")
        self._followed, self._script = tape, {}
        for change in tape.changes:
            self._script.setdefault(change.step, {})[change.knob] = change.value
        if not tape.steps:
            self._end_of_tape()

    def _end_of_tape(self) -> None:
        """Compare the numbers with those of the tape that was followed."""
        assert self._followed is not None
        tape, self._followed = self._followed, None
        self._set_knobs(self._script.get(tape.steps, {}))
        again = self._present_tape()
        self.identical = again.digest == tape.digest
        self.held = True
        if self.identical:
            self.message = f"replayed {tape.steps} steps: every number came out as on the tape"
            return
        differing = sorted(k for k, v in tape.versions.items() if again.versions.get(k) != v)
        reason = f"these differ: {', '.join(differing)}" if differing else "versions are the same"
        self.message = f"the replay's numbers differ from the tape's; {reason}"

    def evaluate(self) -> dict[str, float]:
        """Evaluate now; the figures also go to `evaluations`."""
        return self.post(self._evaluate).result()

    def _evaluate(self) -> dict[str, float]:
        self._evaluation_waits = False
        self.check()
        with torch_threads(self.threads):
            metrics = self.learner.evaluate()
        if metrics:
            table = self._evaluations
            table.keep_until(self.step - 1)  # a second evaluation at one step takes the first one's place
            table.append(self.step, self.learner.phase, metrics)
            bad = table.flush()
            if bad is not None:
                self._go_back(*bad)
        return {name: float(value) for name, value in metrics.items()}

    def views(self) -> dict[str, View]:
        """Return pictures of the present state."""
        return self.post(self._views).result()

    def _views(self) -> dict[str, View]:
        with torch_threads(self.threads):
            return self.learner.views()

    # ---- looking back ----------------------------------------------------------------------------------------

    @property
    def history(self) -> pd.DataFrame:
        """The metrics of every update: index step, columns phase and the metrics."""
        return self.post(self._flushed).result().frame()

    @property
    def evaluations(self) -> pd.DataFrame:
        """The figures of every evaluation: index step, columns phase and the metrics."""
        return self.post(self._evaluations.copy).result().frame()

    def _flushed(self) -> History:
        self.check()
        return self._history.copy()

    @property
    def rows(self) -> tuple[History, History]:
        """History and evaluations as they grow, without a copy; for the training thread, which draws from them."""
        return self._history, self._evaluations

    @property
    def tape(self) -> Tape:
        """What was done so far, as a copy that can be saved and replayed."""
        return self.post(self._present_tape).result()

    def _present_tape(self) -> Tape:
        self.check()
        return self._tape.model_copy(
            update={"steps": self.step, "versions": present_versions(), "digest": self._history.digest()}, deep=True
        )

    # ---- going back and splitting ----------------------------------------------------------------------------

    def _snapshot(self) -> None:
        began = time.monotonic()
        self.check()
        if self._snapshots and self._snapshots[-1][0] >= self.step:
            self._snapshots.pop()
        state = self.learner.state()
        if not self._snapshots:  # what begins as NaN (a place still to be filled, say) may stay so
            self._unfilled = _with_nan(state)
        if not self._snapshots or (self.learner.parameters_finite() and _with_nan(state) <= self._unfilled):
            self._snapshots.append((self.step, state))
        size = sum(state.nbytes for _, state in self._snapshots)
        if len(self._snapshots) > MAX_SNAPSHOTS or (size > MAX_SNAPSHOT_BYTES and len(self._snapshots) > 2):
            # Every second one goes, and the spacing doubles: the whole run stays within reach.
            self._snapshots = self._snapshots[::2]
            self._snapshot_seconds *= 2
        done = time.monotonic()
        self._snapshot_due = done + max(self._snapshot_seconds, 50 * (done - began))

    def rewind(self, step: int) -> None:
        """Go back to an earlier step exactly; what came after stays as a ghost, and the tape is cut there.

        Raises
        ------
        KnobError
            If the step is negative or lies ahead.
        """
        self.post(lambda: self._rewind(step)).result()

    def _rewind(self, step: int) -> None:
        self.check()
        if not _is_whole(step) or not 0 <= step <= self.step:
            raise KnobError(f"step must be a whole number from 0 to {self.step}, got {step!r}")
        step = int(step)
        if step == self.step:
            return
        if not self._snapshots or self._snapshots[0][0] > step:
            self._remember_start()
        self._return_to(step)

    def _remember_start(self) -> None:
        """Make the state at step 0 anew where no snapshot reaches back so far: in a run that was loaded."""
        if not self._snapshots or self._snapshots[0][0] > 0:
            with torch_threads(self.threads):
                start = type(self.learner)(**self._tape.config).state()
            self._snapshots.insert(0, (0, start))

    def _return_to(self, step: int) -> None:
        """Restore the newest snapshot at or before `step` and repeat the updates from there to `step`."""
        changes = self._tape.cut(step)
        evaluations = self._evaluations.keep_until(step)
        self.ghosts.append(Ghost(step, self._history.keep_until(step), evaluations, changes))
        self._snapshots = [snapshot for snapshot in self._snapshots if snapshot[0] <= step]
        self.phase_marks = [mark for mark in self.phase_marks if mark[0] <= step]
        self._rows_cut = True
        self._restore(step)

    def _restore(self, step: int) -> None:
        start, state = self._snapshots[-1]
        self.learner.load_state(state)
        with torch_threads(self.threads):
            for knob, value in self._knobs_at(start).items():
                self.learner.config._set(knob, value)
            for change in [c for c in self._tape.changes if c.step >= start]:
                self._repeat(change.step)
                self.learner.config._set(change.knob, change.value)
            self._repeat(step)

    def _repeat(self, until: int) -> None:
        while self.learner.step < until:
            self.learner.update()

    def _knobs_at(self, step: int) -> dict[str, Any]:
        knobs = {name: self._tape.config[name] for name in self.learner.config.knobs}
        knobs.update({change.knob: change.value for change in self._tape.changes if change.step < step})
        return knobs

    def fork(self, folder: str | Path | None = None) -> Run:
        """Return a second run in the same state, with a tape that starts with this one's."""
        return self.post(lambda: self._fork(folder)).result()

    def _fork(self, folder: str | Path | None) -> Run:
        self.check()
        with torch_threads(self.threads):
            learner = self.learner.fork()
        twin = Run(
            learner,
            threads=self.threads,
            autosave=self.autosave,
            evaluate_every=self.evaluate_every,
            _continued=True,
        )
        twin._tape = self._tape.model_copy(deep=True)
        twin._history = self._history.copy()
        twin._evaluations = self._evaluations.copy()
        twin._snapshots = list(self._snapshots)
        twin._snapshot_seconds = self._snapshot_seconds
        twin.phase_marks = list(self.phase_marks)
        if folder is not None:
            twin._open(Path(folder))
        return twin

    # ---- saving ----------------------------------------------------------------------------------------------

    def _open(self, folder: Path) -> None:
        former, self._folder = self._folder, RunFolder(folder)
        try:
            if any((folder / name).exists() for name in (STATE, PREVIOUS)):
                raise CheckpointError(f"{folder} holds a saved run already: open it with Run.load, or name another")
            self._save()
        except BaseException:
            self._folder.close()
            self._folder = former
            raise
        weakref.finalize(self, self._folder.close)
        if former is not None:
            former.close()

    def save(self, folder: str | Path | None = None) -> Path:
        """Save everything now.

        Parameters
        ----------
        folder : path, optional
            Needed the first time, unless the run was given one; the run goes on saving there.

        Raises
        ------
        OSError
            If the disk is full; what was saved before still stands.
        """
        if folder is None and self._folder is None:
            raise KnobError("folder must be given: this run lives in memory only so far")
        if folder is not None and (self._folder is None or Path(folder).resolve() != self._folder.path.resolve()):
            self.post(lambda: self._open(Path(folder))).result()
        else:
            self.post(self._save).result()
        assert self._folder is not None
        return self._folder.path

    def _save(self) -> None:
        assert self._folder is not None
        began = time.monotonic()
        self.check()
        notes = {
            "tape": self._present_tape().model_dump(),
            "step": self.step,
            "phase_marks": self.phase_marks,
            "evaluate_every": self.evaluate_every,
        }
        tables = {"history": self._history, "evaluations": self._evaluations}
        self._folder.write(self.learner.state(), notes, tables, self._rows_cut)
        self._rows_cut = False
        self._saved = time.monotonic()
        self._save_cost = self._saved - began
        if self.message == self._save_trouble:
            self.message = ""

    def _autosave_if_due(self) -> None:
        if self._folder is None or not self.autosave:
            return
        # Saving may take a hundredth of the time at most.
        if time.monotonic() - self._saved < max(self.autosave, 100 * self._save_cost):
            return
        if not self.learner.parameters_finite():
            return  # the guard is about to go back: the last good save must stay
        try:
            self._save()
        except OSError as error:
            self._saved = time.monotonic()
            self._save_trouble = f"saving to {self._folder.path} failed ({error}); the last good save still stands"
            self.message = self._save_trouble
            warnings.warn(self.message, stacklevel=2)

    def close(self) -> None:
        """Save, if the run has a folder, and let others write to it."""
        if self._folder is None:
            return
        try:
            self.post(self._save).result()
        finally:
            self._folder.close()
            self._folder = None

    @classmethod
    def load(cls, folder: str | Path, method: type[Learner[Any]] | None = None, **options: Any) -> Run:
        """Open a saved run; it goes on exactly as the saved one would have.

        Parameters
        ----------
        folder : path
        method : Learner class, optional
            Needed only for a learner that is not one of polrl's methods.
        **options
            `autosave`, as for a new run.

        Raises
        ------
        CheckpointError
            If nothing whole is there; a damaged newest state falls back to the one before, with a warning.
        RunLockedError
            If another run writes to the folder.
        """
        if not Path(folder).is_dir():
            raise CheckpointError(f"there is no run folder {folder}")
        store = RunFolder(Path(folder))
        try:
            state, notes, tables = store.read()
            tape = Tape.model_validate(notes["tape"])
            with torch_threads(tape.threads):
                learner = learner_class(tape.method, method)(**tape.config)
            run = cls(learner, threads=tape.threads, evaluate_every=notes["evaluate_every"], **options)
            learner.load_state(state)
        except BaseException:
            store.close()
            raise
        run._tape = tape
        run._history, run._evaluations = tables["history"], tables["evaluations"]
        run.phase_marks = [(step, phase) for step, phase in notes["phase_marks"]]
        run._folder = store
        run._rows_cut = True  # rows after the state that was read are written anew at the next saving
        weakref.finalize(run, store.close)
        trouble = [notes["warning"]] if "warning" in notes else []
        if run._history.digest() != tape.digest:
            trouble.append(f"the history in {folder} was damaged; the state at step {run.step} is whole")
        if trouble:
            run.message = "; ".join(trouble)
            warnings.warn(run.message, stacklevel=2)
        return run

    @classmethod
    def replay(cls, tape: Tape | str | Path, method: type[Learner[Any]] | None = None, **options: Any) -> Run:
        """Repeat a run from its tape, each change at its step.

        Returns
        -------
        Run
            At the tape's last step; `identical` says whether all numbers came out alike, and `message` says
            what may be the reason where they did not (another machine, other versions).
        """
        tape = tape if isinstance(tape, Tape) else Tape.load(tape)
        with torch_threads(tape.threads):
            learner = learner_class(tape.method, method)(**tape.config)
        run = cls(learner, threads=tape.threads, **options)
        run.follow(tape)
        run.advance(tape.steps)
        run.held = False
        if run.identical:
            run.message = ""
        return run


def _with_nan(state: State) -> set[str]:
    """Return the slots of a state whose tensors hold NaN."""
    return {slot for slot, tensor in state.tensors.items() if tensor.is_floating_point() and bool(tensor.isnan().any())}


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def learner_class(method: str, given: type[Learner[Any]] | None) -> type[Learner[Any]]:
    """Find the class of a saved method, or check the one that was given."""
    if given is not None:
        if given.slug() != method:
            raise CheckpointError(f"this was made by {method}, not by {given.slug()}")
        return given
    if ":" in method:
        raise CheckpointError(f"{method} is not one of polrl's methods; give its class as `method=`")
    from polrl.core.catalog import load_method

    return load_method(method)
