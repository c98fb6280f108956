"""Run folders: where runs lie on the disk, how they are written, locked, listed and cleaned.

A folder holds `state.safetensors` (the newest whole state, with the tape beside it), `state.previous.safetensors`
(the one before), `history-N.jsonl` and `evaluations-N.jsonl` (rows that are only ever appended). Each state names in
its notes the N of its rows; a run that went back begins new files, so that no state ever stands beside rows of
another branch. Readers need nothing but JSON and safetensors.
"""

from __future__ import annotations

import datetime
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import platformdirs

from polrl.core.errors import CheckpointError, RunLockedError
from polrl.core.files import write_atomic
from polrl.core.history import History
from polrl.core.state import State

STATE, PREVIOUS = "state.safetensors", "state.previous.safetensors"
MAX_BYTES = 2 * 1024**3
MAX_RUNS = 200


def runs_root() -> Path:
    """Return the folder of this user's runs; the environment variable POLRL_RUNS names another."""
    named = os.environ.get("POLRL_RUNS")
    return Path(named) if named else Path(platformdirs.user_data_dir("polrl", appauthor=False)) / "runs"


def new_run_folder(method: str) -> Path:
    """Return the path of a new run's folder, and make room by dropping the oldest runs beyond the bounds."""
    clean(max_bytes=MAX_BYTES, max_runs=MAX_RUNS - 1)
    moment = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return runs_root() / f"{method.replace(':', '.')}-{moment}-{uuid.uuid4().hex[:4]}"


class RunFolder:
    """One run's folder, locked against a second writer for as long as it is open.

    Parameters
    ----------
    path : Path
        Made if it is missing.

    Raises
    ------
    RunLockedError
        If another run, here or in another process, writes to the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        # Not a thread's own lock: a run may be opened in the thread that trains and closed in another.
        self._lock = filelock.FileLock(self.path / "lock", timeout=0, thread_local=False)
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise RunLockedError(
                f"{self.path} is being written by another run; close that one, or give this one a folder of its own"
            ) from None
        self._written = {"history": 0, "evaluations": 0}
        self._branch = 0
        self._kept: list[int] = []

    def close(self) -> None:
        """Let others write to the folder."""
        self._lock.release()

    def write(self, state: State, notes: dict[str, Any], tables: dict[str, History], cut: bool) -> None:
        """Save everything; a crash at any moment leaves a folder that can be read.

        Parameters
        ----------
        state : State
        notes : dict
            Plain values: tape, step and so on.
        tables : dict of str to History
            "history" and "evaluations".
        cut : bool
            True if rows written earlier no longer hold (after rewinding): the tables go to new files. Otherwise
            new rows are appended.
        """
        if cut or not self._branch:
            self._branch = 1 + max(map(_branch_of, self._row_files()), default=0)
            self._written = dict.fromkeys(tables, 0)
        for name, table in tables.items():
            self._append(name, table)
        self._write_state(state, {**notes, "branch": self._branch})
        self._kept = [*self._kept, self._branch][-2:]
        if len(self._kept) == 2:  # the newest state and the one before are ours: no other rows are needed
            for path in self._row_files():
                if _branch_of(path) not in self._kept:
                    path.unlink(missing_ok=True)

    def _row_files(self) -> list[Path]:
        return [path for name in self._written for path in self.path.glob(f"{name}-*.jsonl")]

    def _append(self, name: str, table: History) -> None:
        path = self.path / f"{name}-{self._branch}.jsonl"
        if self._written[name] == 0:
            write_atomic(path, "".join(row + "\n" for row in table.rows()))
        elif len(table) > self._written[name]:
            size = path.stat().st_size
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.writelines(row + "\n" for row in table.rows(self._written[name]))
                    file.flush()
                    os.fsync(file.fileno())
            except BaseException:
                os.truncate(path, size)  # the disk is full, say: half a row would hide those that come later
                raise
        self._written[name] = len(table)

    def _write_state(self, state: State, notes: dict[str, Any]) -> None:
        content = state.to_bytes(notes)
        fresh, current, previous = (self.path / name for name in ("state.new.safetensors", STATE, PREVIOUS))
        write_atomic(fresh, content)
        if current.exists():
            os.replace(current, previous)
        os.replace(fresh, current)

    def read(self) -> tuple[State, dict[str, Any], dict[str, History]]:
        """Read the newest whole state and the rows up to it.

        Raises
        ------
        CheckpointError
            If neither the newest nor the previous state is whole.
        """
        problems = []
        for name in (STATE, PREVIOUS, "state.new.safetensors"):
            path = self.path / name
            if not path.exists():
                continue
            try:
                state, notes = State.from_bytes(path.read_bytes(), str(path))
            except (CheckpointError, OSError) as error:
                problems.append(str(error))
                continue
            tables = {}
            for table in self._written:
                rows = self.path / f"{table}-{notes['branch']}.jsonl"
                lines = rows.read_text(encoding="utf-8", errors="replace").splitlines() if rows.exists() else []
                tables[table] = History.from_rows(lines, until=notes["step"])
            if problems:
                notes["warning"] = f"{problems[0]}; the previous good state, at step {notes['step']}, was used"
            return state, notes, tables
        raise CheckpointError("; ".join(problems) or f"{self.path} holds no saved run")


def _branch_of(path: Path) -> int:
    return int(path.stem.rsplit("-", 1)[1])


@dataclass(frozen=True)
class RunInfo:
    """What `polrl runs` shows of one folder."""

    path: Path
    nbytes: int
    modified: datetime.datetime
    locked: bool


def list_runs() -> list[RunInfo]:
    """Return this user's runs, the newest first."""
    root = runs_root()
    found = []
    for path in root.iterdir() if root.exists() else ():
        states = [path / name for name in (STATE, PREVIOUS) if (path / name).exists()]
        if not path.is_dir() or not (states or (path / "lock").exists()):
            continue
        newest = max((file.stat().st_mtime for file in states), default=path.stat().st_mtime)
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        found.append(RunInfo(path, size, datetime.datetime.fromtimestamp(newest), _is_locked(path)))
    return sorted(found, key=lambda run: run.modified, reverse=True)


def _is_locked(path: Path) -> bool:
    lock = filelock.FileLock(path / "lock", timeout=0)
    try:
        lock.acquire()
    except (filelock.Timeout, OSError):
        return True
    lock.release()
    return False


def clean(max_bytes: int = MAX_BYTES, max_runs: int = MAX_RUNS) -> list[Path]:
    """Delete the oldest runs until the rest fits; runs that are being written stay.

    Returns
    -------
    list of Path
        The folders that were deleted.
    """
    dropped = []
    kept_bytes = kept = 0
    for run in list_runs():
        if run.locked or (kept < max_runs and kept_bytes + run.nbytes <= max_bytes):
            kept += 1
            kept_bytes += run.nbytes
        else:
            shutil.rmtree(run.path, ignore_errors=True)
            dropped.append(run.path)
    return dropped
