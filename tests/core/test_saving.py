"""Saved runs: whatever happens while writing, what is read back is one consistent run, or a clear error."""

from __future__ import annotations

import datetime
import errno
import gc
import itertools
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
from tiny import Phased, Tiny, copy_folder, python, run_of, same

from polrl import Run
from polrl.core import store
from polrl.core.errors import CheckpointError, DivergedError, KnobError, RunLockedError
from polrl.core.store import PREVIOUS, STATE, RunFolder, clean, list_runs, new_run_folder, runs_root


def load(folder, learner=Tiny) -> Run:
    return Run.load(folder, learner, autosave=0)


def assert_consistent(folder: Path, learner=Tiny) -> Run:
    """Load a run and check it against its own tape: rows, numbers, knobs and state belong together."""
    run = load(folder, learner)
    assert list(run.history.index) == list(range(1, run.step + 1))
    assert all(step <= run.step for step in run.evaluations.index)
    again = Run.replay(run.tape, learner, autosave=0)
    assert again.identical, "the rows are not those of the tape"
    assert again.learner.state().digest() == run.learner.state().digest()
    assert again.learner.config.model_dump() == run.learner.config.model_dump()
    for step in sorted({*run.evaluations.index[:1], *run.evaluations.index[-1:]}, reverse=True):
        again.rewind(step)
        assert again.evaluate()["size"] == run.evaluations["size"][step], "the evaluations are not those of the tape"
    run.close()
    return run


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


# ---- saving and loading ----------------------------------------------------------------------------------------------


def test_a_loaded_run_is_the_saved_one(tmp_path):
    run = run_of(folder=tmp_path / "run", evaluate_every=2)
    run.advance(3)
    run.tune(decay=2.0, penalty="absolute", mirrored=True, repeats=2)
    run.advance(4)
    assert run.save() == tmp_path / "run"
    again = load(copy_folder(tmp_path / "run", tmp_path / "copy"))
    assert again.step == 7 and same(run, again) and again.tape == run.tape
    assert again.history.equals(run.history) and again.evaluations.equals(run.evaluations)
    assert again.evaluate_every == 2 and again.folder == tmp_path / "copy" and again.message == ""
    run.advance(3)
    again.advance(3)
    assert same(run, again) and again.evaluations.equals(run.evaluations)


def test_phases_and_their_marks_are_saved(tmp_path):
    run = run_of(Phased, folder=tmp_path / "run")
    run.advance(6)
    run.close()
    again = load(tmp_path / "run", Phased)
    assert (again.learner.phase, again.learner.phase_step, again.phase_marks) == ("second", 2, [(4, "second")])


@pytest.mark.parametrize("target", [0, 2, 6, 9])
def test_a_loaded_run_rewinds_before_where_it_was_loaded(tmp_path, target):
    run = run_of(folder=tmp_path / "run")
    run.advance(3)
    run.tune(decay=3.0)
    run.advance(5)
    run.close()
    again, straight = load(tmp_path / "run"), run_of()
    again.advance(2)
    again.rewind(target)
    straight.advance(min(3, target))
    if target > 3:
        straight.tune(decay=3.0)
    straight.advance(target - straight.step)
    assert same(again, straight) and again.learner.config.decay == straight.learner.config.decay
    again.close()
    assert same(assert_consistent(tmp_path / "run"), straight)


def test_a_save_after_a_rewind_forgets_the_abandoned_rows(tmp_path):
    run = run_of(folder=tmp_path / "run", evaluate_every=1)
    run.advance(8)
    run.save()
    run.rewind(3)
    run.tune(decay=4.0)
    run.advance(2)
    run.save()
    run.advance(2)
    run.close()
    again = assert_consistent(tmp_path / "run")
    assert again.step == 7 and same(run, again)


def test_many_saves_keep_every_row(tmp_path):
    run = run_of(folder=tmp_path / "run", evaluate_every=3)
    for steps in (1, 2, 3, 0, 4):
        run.advance(steps)
        run.save()
    run.rewind(6)
    run.save()
    run.advance(1)
    run.save()
    run.close()
    assert_consistent(tmp_path / "run")


def test_the_folder_holds_the_newest_rows_only(tmp_path):
    run = run_of(folder=tmp_path / "run")
    for _ in range(5):
        run.advance(4)
        run.rewind(2)
        run.save()
    run.advance(1)
    run.save()
    files = sorted(path.name for path in (tmp_path / "run").iterdir())
    rows = [name for name in files if name.endswith(".jsonl")]
    assert len(rows) == 2 and not [name for name in files if name.startswith(".")], files


def test_a_run_in_memory_needs_a_folder_to_be_saved(tmp_path):
    run = run_of()
    with pytest.raises(KnobError, match="folder must be given"):
        run.save()
    run.advance(2)
    run.save(tmp_path / "later")
    run.advance(2)
    run.close()
    assert_consistent(tmp_path / "later")


def test_saving_elsewhere_leaves_the_first_folder_to_others(tmp_path):
    run = run_of(folder=tmp_path / "first")
    run.advance(2)
    assert run.save(tmp_path / "second") == tmp_path / "second"
    assert run.folder == tmp_path / "second"
    assert load(tmp_path / "first").step == 0
    run.advance(1)
    run.close()
    assert assert_consistent(tmp_path / "second").step == 3


def test_the_same_folder_spelled_otherwise_is_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = run_of(folder=tmp_path / "run")
    run.save("run")
    run.save(tmp_path / "other" / ".." / "run")
    run.close()


def test_a_place_that_cannot_be_written_leaves_the_old_one_in_use(tmp_path):
    run = run_of(folder=tmp_path / "run")
    run.advance(2)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        run.save(tmp_path / "file")
    assert run.folder == tmp_path / "run"
    run.close()
    assert assert_consistent(tmp_path / "run").step == 2


def test_a_fork_is_saved_where_it_is_told(tmp_path):
    run = run_of(folder=tmp_path / "parent")
    run.advance(3)
    twin = run.fork(tmp_path / "twin")
    twin.tune(decay=2.0)
    twin.advance(2)
    run.advance(1)
    twin.close()
    run.close()
    assert assert_consistent(tmp_path / "twin").step == 5
    assert assert_consistent(tmp_path / "parent").step == 4


def test_closing_saves_and_unlocks(tmp_path):
    with run_of(folder=tmp_path / "run") as run:
        run.advance(3)
    assert run.folder is None
    assert assert_consistent(tmp_path / "run").step == 3
    run.close()
    run.advance(1)
    assert run.step == 4, "a closed run goes on in memory"


def test_a_run_that_is_forgotten_unlocks_its_folder(tmp_path):
    run = run_of(folder=tmp_path / "run")
    del run
    gc.collect()
    load(tmp_path / "run").close()


def test_autosave_writes_while_advancing(tmp_path):
    run = run_of(folder=tmp_path / "run", autosave=1e-9)
    run._checked = run._saved = run._save_cost = 0.0
    run.advance(3)
    run._checked = run._saved = run._save_cost = 0.0
    run.single_step()
    assert assert_consistent(copy_folder(tmp_path / "run", tmp_path / "copy")).step == 4


@pytest.mark.parametrize(
    ("folder", "words"),
    [("nowhere", "there is no run folder"), ("empty", "holds no saved run"), ("file", "no run folder")],
)
def test_what_is_not_a_run_is_refused(tmp_path, folder, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    with pytest.raises(CheckpointError, match=words):
        load(tmp_path / folder)
    assert not (tmp_path / "nowhere").exists()


def test_a_run_of_another_method_is_refused_and_left_unlocked(tmp_path):
    run_of(folder=tmp_path / "run").close()
    with pytest.raises(CheckpointError, match="made by .*Tiny, not by .*Phased"):
        load(tmp_path / "run", Phased)
    load(tmp_path / "run").close()


# ---- a second writer -----------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused(tmp_path):
    run = run_of(folder=tmp_path / "run")
    run.advance(2)
    for attempt in (
        lambda: run_of(folder=tmp_path / "run"),
        lambda: load(tmp_path / "run"),
        lambda: run.fork(run.folder),
    ):
        with pytest.raises(RunLockedError, match="being written by another run"):
            attempt()
    run.close()
    load(tmp_path / "run").close()


@pytest.mark.parametrize("opener", ["here", "there"])
def test_the_lock_belongs_to_the_run_and_not_to_a_thread(tmp_path, opener):
    folders = []
    thread = threading.Thread(target=lambda: folders.append(RunFolder(tmp_path / "run")))
    if opener == "there":
        thread.start()
        thread.join()
        folders[0].close()
    else:
        first = RunFolder(tmp_path / "run")
        thread = threading.Thread(target=first.close)
        thread.start()
        thread.join()
    RunFolder(tmp_path / "run").close()


WRITER = """
import sys, time
from pathlib import Path
from tiny import run_of
run = run_of(folder=sys.argv[1], autosave=1e-6)
print("open", flush=True)
while True:
    run.advance(1)
    if run.step == 10:
        run.tune(decay=1.5)
    run._checked = run._save_cost = run._saved = 0.0
    if run.step == 25:
        print("steps", flush=True)
"""


def test_a_process_that_is_killed_loses_little_and_nothing_else(tmp_path):
    writer = python(WRITER, tmp_path / "run")
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "open\n", writer.stderr.read()
        with pytest.raises(RunLockedError, match="being written by another run"):
            load(tmp_path / "run")
        assert writer.stdout.readline() == "steps\n"
        time.sleep(random.Random(0).random() * 0.2)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    run = assert_consistent(tmp_path / "run")
    assert run.step >= 24
    resumed, straight = load(tmp_path / "run"), run_of()
    straight.advance(10)
    straight.tune(decay=1.5)
    resumed.advance(30)
    straight.advance(run.step + 30 - 10)
    assert same(resumed, straight)


# ---- a crash at every moment of writing ------------------------------------------------------------------------------------

WRITING = {"open", "os.rename", "os.remove", "os.truncate", "os.chmod", "os.mkdir", "shutil.rmtree"}


def dying_at(moment):
    """Return an audit hook that ends the process at its `moment`-th touch of a file, as a kill would."""
    touched = itertools.count(1)

    def hook(event, arguments):
        if event in WRITING and not str(arguments[0]).endswith((".py", ".pyc", "lock")) and next(touched) == moment:
            os._exit(9)

    return hook


def crash_points(work):
    """Run `work` in one forked child after another, each of which dies one touch of a file later than the last."""
    for moment in range(1, 200):
        child = os.fork()
        if child == 0:
            try:
                work(lambda moment=moment: sys.addaudithook(dying_at(moment)))
                os._exit(0)
            except BaseException as error:
                os.write(2, repr(error).encode())
                os._exit(7)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9), f"the child failed with {code}"
        yield moment
        if code == 0:
            assert moment > 3, "nothing was written at all"
            return
    raise AssertionError("the work never ends")


def first_save(folder, armed):
    run = run_of()
    run.advance(3)
    armed()
    run.save(folder)


def plain_save(folder, armed):
    run = load(folder)
    run.save()
    run.advance(4)
    armed()
    run.save()


def save_after_load(folder, armed):
    run = load(folder)
    run.advance(4)
    armed()
    run.save()


def save_after_rewind(folder, armed):
    run = load(folder)
    run.save()
    run.rewind(4)
    run.tune(decay=4.0)
    run.advance(2)
    armed()
    run.save()
    run.advance(5)
    run.save()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "work",
    [plain_save, save_after_load, save_after_rewind],
    ids=lambda work: work.__name__,
)
def test_a_crash_at_any_moment_leaves_one_consistent_run(tmp_path, work):
    run = run_of(folder=tmp_path / "origin", evaluate_every=2)
    run.advance(5)
    run.tune(decay=2.0)
    run.advance(2)
    run.save()
    run.advance(1)
    run.close()
    folder = tmp_path / "run"

    def in_the_folder(arm):
        work(folder, arm)

    copy_folder(tmp_path / "origin", folder)
    steps = set()
    for _ in crash_points(in_the_folder):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            steps.add(assert_consistent(folder).step)
        shutil.rmtree(folder)
        copy_folder(tmp_path / "origin", folder)
    assert len(steps) >= 2, "both the old and the new state were seen"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_crash_in_the_first_save_leaves_all_or_nothing(tmp_path):
    folder = tmp_path / "run"
    seen = set()
    for _ in crash_points(lambda arm: first_save(folder, arm)):
        try:
            seen.add(assert_consistent(folder).step)
        except CheckpointError:
            seen.add(None)
        shutil.rmtree(folder, ignore_errors=True)
    assert seen == {None, 3}


# ---- damage --------------------------------------------------------------------------------------------------------------------


def saved_twice(folder: Path) -> Path:
    run = run_of(folder=folder, evaluate_every=2)
    run.advance(4)
    run.save()
    run.tune(decay=2.0)
    run.advance(3)
    run.close()
    return folder


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty", "missing"])
def test_a_damaged_newest_state_falls_back_to_the_one_before(tmp_path, damage):
    folder = saved_twice(tmp_path / "run")
    newest = folder / STATE
    if damage == "truncated":
        newest.write_bytes(newest.read_bytes()[:-40])
    elif damage == "altered":
        flip(newest, 0.9)
    elif damage == "empty":
        newest.write_bytes(b"")
    else:
        newest.unlink()
    if damage == "missing":
        run = load(folder)
    else:
        with pytest.warns(UserWarning, match="previous good state, at step 4, was used"):
            run = load(folder)
        assert "previous good state" in run.message and STATE in run.message
    assert run.step == 4 and len(run.history) == 4
    run.advance(2)
    run.close()
    assert assert_consistent(folder).step == 6


def test_when_both_states_are_damaged_nothing_is_deleted(tmp_path):
    folder = saved_twice(tmp_path / "run")
    for name in (STATE, PREVIOUS):
        flip(folder / name, 0.95)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}
    with pytest.raises(CheckpointError) as raised:
        load(folder)
    assert STATE in str(raised.value) and PREVIOUS in str(raised.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"} == before
    with pytest.raises(CheckpointError):
        load(folder)


def row_files(folder: Path) -> Path:
    (found,) = folder.glob("history*.jsonl")
    return found


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_torn_last_row_is_left_out(tmp_path, cut):
    folder = saved_twice(tmp_path / "run")
    rows = row_files(folder)
    later = json.dumps([8, "", {"loss": 1.0}]) + "\n"
    rows.write_text(rows.read_text() + later[:-cut])
    run = load(folder)
    assert run.step == 7 and list(run.history.index) == list(range(1, 8))
    run.advance(2)
    run.close()
    assert assert_consistent(folder).step == 9


@pytest.mark.parametrize("damage", ["bytes", "number", "lost", "gone", "shape"])
def test_damaged_rows_are_told(tmp_path, damage):
    folder = saved_twice(tmp_path / "run")
    rows = row_files(folder)
    lines = rows.read_bytes().splitlines(keepends=True)
    if damage == "bytes":
        lines[3] = b"\xff\xfe" + lines[3][2:]
    elif damage == "number":
        last = lines[3].rindex(b"}") - 1
        lines[3] = lines[3][:last] + (b"1" if lines[3][last : last + 1] != b"1" else b"2") + lines[3][last + 1 :]
    elif damage == "lost":
        del lines[3]
    elif damage == "shape":
        lines[3] = b"17\n"
    rows.write_bytes(b"".join(lines))
    if damage == "gone":
        rows.unlink()
    with pytest.warns(UserWarning, match="history.* was damaged"):
        run = load(folder)
    assert run.step == 7 and "damaged" in run.message
    straight = run_of()
    straight.advance(4)
    straight.tune(decay=2.0)
    straight.advance(3)
    assert run.learner.state().digest() == straight.learner.state().digest()
    run.close()


# ---- a full disk ---------------------------------------------------------------------------------------------------------------


class FullDisk:
    """Lets a file system call fail as on a full disk, from its n-th call on."""

    def __init__(self, monkeypatch, name, after):
        self.left, self.real, self.name = after, getattr(os, name), name
        self.failed = 0
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(os, name, self)

    def __call__(self, *arguments, **more):
        if self.left <= 0:
            self.failed += 1
            raise OSError(errno.ENOSPC, "No space left on device")
        self.left -= 1
        return self.real(*arguments, **more)

    def free(self):
        self.monkeypatch.setattr(os, self.name, self.real)


@pytest.mark.parametrize("rewound", [False, True])
@pytest.mark.parametrize(("name", "after"), [("fsync", 0), ("fsync", 1), ("fsync", 2), ("replace", 0), ("replace", 1)])
def test_a_full_disk_leaves_the_last_good_save(tmp_path, monkeypatch, name, after, rewound):
    run = run_of(folder=tmp_path / "run", evaluate_every=2)
    run.advance(4)
    run.save()
    run.advance(2)
    run.save()
    if rewound:
        run.rewind(3)
        run.tune(decay=3.0)
    run.advance(4)
    disk = FullDisk(monkeypatch, name, after)
    with pytest.raises(OSError, match="No space left"):
        run.save()
    disk.free()
    assert disk.failed
    assert assert_consistent(copy_folder(tmp_path / "run", tmp_path / "copy")).step in (4, 6)
    assert not list((tmp_path / "run").glob("*.part")) and not list((tmp_path / "run").glob(".*.part"))
    run.advance(1)
    run.close()
    final = assert_consistent(tmp_path / "run")
    assert final.step == run.step and final.tape.digest == run.tape.digest


def test_a_full_disk_does_not_stop_the_training(tmp_path, monkeypatch):
    run = run_of(folder=tmp_path / "run", autosave=1e-9)
    run.advance(2)
    run.save()
    disk = FullDisk(monkeypatch, "fsync", 0)
    run._checked = run._saved = run._save_cost = 0.0
    with pytest.warns(UserWarning, match="failed .*No space left.*the last good save still stands"):
        run.advance(3)
    assert run.step == 5 and "No space left" in run.message and disk.failed
    disk.free()
    assert assert_consistent(copy_folder(tmp_path / "run", tmp_path / "copy")).step == 2
    run._checked = run._saved = run._save_cost = 0.0
    run.advance(1)
    assert assert_consistent(copy_folder(tmp_path / "run", tmp_path / "copy2")).step == 6
    assert run.message == "", "the trouble is over"


@pytest.mark.parametrize("trouble", ["disk", "diverged"])
def test_closing_unlocks_even_if_saving_fails(tmp_path, monkeypatch, trouble):
    run = run_of(folder=tmp_path / "run")
    run.advance(2)
    run.save()
    if trouble == "disk":
        disk = FullDisk(monkeypatch, "fsync", 0)
        with pytest.raises(OSError, match="No space left"):
            run.close()
        disk.free()
    else:
        run._history.append(3, "", {"loss": float("nan")})
        with pytest.raises(DivergedError):
            run.close()
    assert load(tmp_path / "run").step == 2


def test_an_interrupted_save_is_made_good_by_the_next(tmp_path, monkeypatch):
    run = run_of(folder=tmp_path / "run")
    run.advance(3)
    run.save()
    run.advance(3)
    real, calls = os.fsync, []

    def interrupted(handle):
        calls.append(handle)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.save()
    monkeypatch.setattr(os, "fsync", real)
    assert calls
    run.advance(2)
    run.close()
    assert assert_consistent(tmp_path / "run").step == 8


# ---- the runs of a person --------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("POLRL_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def some_runs(root, count):
    """Make runs whose ages differ by an hour each, the first the oldest."""
    for i in range(count):
        run_of(folder=root / f"run{i}").close()
        moment = time.time() - 3600 * (count - i)
        for name in (STATE, PREVIOUS):
            if (root / f"run{i}" / name).exists():
                os.utime(root / f"run{i}" / name, (moment, moment))


def test_runs_are_listed_newest_first(root):
    assert runs_root() == root and list_runs() == []
    some_runs(root, 3)
    (root / "something else").mkdir()
    (root / "file").write_text("no run")
    found = list_runs()
    assert [info.path.name for info in found] == ["run2", "run1", "run0"]
    assert all(info.nbytes > 1000 and not info.locked for info in found)
    assert found[0].modified - found[1].modified == pytest.approx(
        datetime.timedelta(hours=1), abs=datetime.timedelta(seconds=5)
    )


def test_cleaning_keeps_the_newest_within_the_bounds(root):
    some_runs(root, 5)
    size = list_runs()[0].nbytes
    assert clean() == []
    assert {path.name for path in clean(max_runs=4)} == {"run0"}
    assert {path.name for path in clean(max_bytes=2 * size + 100)} == {"run1", "run2"}
    assert {path.name for path in root.iterdir()} == {"run3", "run4"}
    assert {path.name for path in clean(max_runs=0)} == {"run3", "run4"}


def test_a_run_that_is_being_written_is_never_cleaned(root):
    some_runs(root, 2)
    run = load(root / "run0")
    assert [info.locked for info in list_runs()] == [False, True]
    assert {path.name for path in clean(max_runs=0)} == {"run1"}
    run.advance(1)
    run.close()
    assert assert_consistent(root / "run0").step == 1


def test_a_new_run_makes_room_and_gets_a_folder_of_its_own(root, monkeypatch):
    some_runs(root, 3)
    monkeypatch.setattr(store, "MAX_RUNS", 3)
    folders = {new_run_folder("tiny:Tiny") for _ in range(5)}
    assert len(folders) == 5 and all(folder.parent == root and not folder.exists() for folder in folders)
    assert {info.path.name for info in list_runs()} == {"run1", "run2"}
    run_of(folder=folders.pop()).close()
    assert len(list_runs()) == 3


def test_a_new_run_never_overwrites_a_saved_one(tmp_path):
    with Run(Tiny(), threads=1, folder=tmp_path / "run") as run:
        run.advance(3)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(CheckpointError, match="holds a saved run already"):
        Run(Tiny(), threads=1, folder=tmp_path / "run")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    with Run.load(tmp_path / "run", Tiny) as again:
        assert again.step == 3
