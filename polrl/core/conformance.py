"""The contract as tests: what holds for every learner, whatever it learns.

Each function takes a `Case` and raises AssertionError with a sentence that says what was broken. The test
suite runs all of them on every learner that the catalog finds; `polrl check` runs them on one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import hashlib
import inspect
import json
import math
import random
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polrl.core.device import torch_threads
from polrl.core.errors import DrivenConfigError, KnobError, StructureError, UnknownNameError
from polrl.core.fake_device import pretended_cuda
from polrl.core.knobs import Config, Knob
from polrl.core.learner import Learner
from polrl.core.run import Run
from polrl.core.state import State
from polrl.core.store import STATE
from polrl.core.tape import Tape
from polrl.core.views import View


@dataclasses.dataclass(frozen=True)
class Case:
    """A learner to be examined.

    Parameters
    ----------
    learner : Learner class
    settings : mapping
        Settings that keep it small; with phases, all of them should begin within `steps` updates.
    steps : int
        Updates in one stretch.
    """

    learner: type[Learner[Any]]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 6

    def make(self, **more: Any) -> Learner[Any]:
        """Build the learner, on the CPU unless told otherwise."""
        return self.learner(**{"device": "cpu", **self.settings, **more})

    def run(self, settings: Mapping[str, Any] | None = None, **options: Any) -> Run:
        """Start a run of it, with further settings; with one thread, neither saved nor evaluated unless told so."""
        return Run(self.make(**(settings or {})), **{"threads": 1, "autosave": 0, "evaluate_every": 0, **options})

    def __str__(self) -> str:
        return self.learner.__name__


def _same_future(first: Run, second: Run, steps: int, what: str) -> None:
    for run in (first, second):
        run.advance(steps)
    assert first._history.digest() == second._history.digest(), f"{what}: the metrics differ"
    assert first.learner.state().digest() == second.learner.state().digest(), f"{what}: the states differ"


def _other_value(knob: Knob, config: Config) -> Any:
    """Return a value of the knob that is not its present one, away from the ends."""
    now = getattr(config, knob.name)
    if knob.kind == "bool":
        return not now
    if knob.kind == "choice":
        return next((option for option in knob.options if option != now), now)
    for position in (0.35, 0.65, 0.8, 0.2, 1.0, 0.0):
        value = knob.from_position(position, config)
        if value != now:
            return value
    return now


def check_builds_alike(case: Case) -> None:
    """Two learners of one seed are alike; building one leaves the global generators alone."""
    before = _global_randomness()
    first, second = case.make(), case.make()
    assert _global_randomness() == before, "setup() moved a global random generator"
    assert first.state().digest() == second.state().digest(), "two learners of the same seed begin differently"
    shared = _tensor_storages(first) & _tensor_storages(second)
    assert not shared, f"two learners share {len(shared)} tensors (name data sets in `constants`)"
    assert first.step == 0 and first.phase == (first.phases[0] if first.phases else ""), "a learner begins at step 0"


def check_update(case: Case) -> None:
    """Updates count, return finite scalar metrics without a graph, and leave global randomness alone."""
    learner = case.make()
    before, constants = _global_randomness(), _constant_contents(learner)
    seen: set[str] = set()
    phases = {learner.phase}
    for step in range(1, 2 * case.steps + 1):
        metrics = learner.update()
        phases.add(learner.phase)
        assert learner.step == step, "update() must be one step"
        assert metrics, "update() returned no metrics"
        for name, value in metrics.items():
            assert not isinstance(value, torch.Tensor) or not value.requires_grad, f"metric {name} holds its graph"
            assert not isinstance(value, torch.Tensor) or value.numel() == 1, f"metric {name} is not a scalar"
            assert math.isfinite(float(value)), f"metric {name} is {float(value)} at step {step}"
        seen.update(metrics)
    assert phases == set(learner.phases or ("",)), f"of the phases {learner.phases} only {sorted(phases)} were entered"
    seen.update(learner.evaluate())
    assert _global_randomness() == before, "update() or evaluate() moved a global random generator"
    changed = [name for name, content in _constant_contents(learner).items() if content != constants.get(name)]
    assert not changed, f"update() or evaluate() changed what `constants` names: {', '.join(changed)}"
    assert learner.curves, "a learner declares at least one curve"
    for curve in learner.curves:
        for metric in curve.metrics:
            assert metric in seen, (
                f"curve {curve.title!r} shows {metric}, which neither update() nor evaluate() returns"
            )


def check_observation_is_pure(case: Case) -> None:
    """evaluate() and views() change nothing, and answer alike twice."""
    learner = case.make()
    for stretch in range(2):
        for _ in range(case.steps if stretch else 0):
            learner.update()
        before, randomness = learner.state().digest(), _global_randomness()
        figures = [{n: float(v) for n, v in learner.evaluate().items()} for _ in range(2)]
        pictures = [learner.views() for _ in range(2)]
        assert learner.state().digest() == before, "evaluate() or views() changed the learner"
        assert _global_randomness() == randomness, "evaluate() or views() moved a global random generator"
        assert figures[0] == figures[1], "evaluate() gives two answers for one state"
        assert pictures[0], "a learner shows at least one view"
        for name, view in pictures[0].items():
            assert isinstance(view, View), f"view {name} is a {type(view).__name__}, not a View"
            assert view.title and view.alt, f"view {name} lacks a title or the words for people who can't see it"
            assert _same_data(view, pictures[1][name]), f"view {name} looks different the second time"
    quiet, watched = case.run(), case.run(evaluate_every=1)
    _same_future(quiet, watched, 2 * case.steps, "with and without evaluation")


def check_fork(case: Case) -> None:
    """A fork goes on identically if left alone, shares nothing, and never disturbs its parent."""
    alone, parent = case.run(), case.run()
    for start in (1, case.steps + 1, 2 * case.steps + 1):
        for run in (alone, parent):
            run.advance(start - run.step)
        twin, tuned = parent.fork(), parent.fork()
        shared = _tensor_storages(parent.learner) & _tensor_storages(twin.learner)
        assert not shared, f"a fork shares {len(shared)} tensors with its parent (name data sets in `constants`)"
        for knob in tuned.learner.config.knobs.values():
            tuned.tune(**{knob.name: _other_value(knob, tuned.learner.config)})
        tuned.advance(case.steps)
        _same_future(parent, twin, case.steps, f"fork at step {start}")
        alone.advance(case.steps)
        assert alone.learner.state().digest() == parent.learner.state().digest(), "a fork disturbed its parent"


def check_rewind(case: Case) -> None:
    """Going back and on again gives the same numbers, also through phases and changes of knobs."""
    run, straight = (case.run(evaluate_every=None) for _ in range(2))  # as often as the learner asks for
    for each in (run, straight):
        each.advance(case.steps)
        for knob in each.learner.config.knobs.values():
            each.tune(**{knob.name: _other_value(knob, each.learner.config)})
        each.advance(case.steps)
    for target in (case.steps + 1, 2, 0):
        tape = run.tape
        run.rewind(target)
        assert run.step == target and len(run.history) == target, "rewind(step) must lead to that step"
        changes = [change for change in tape.changes if change.step >= target]
        assert run.ghosts[-1].changes == changes, "the abandoned branch must be kept as a ghost"
        _follow(run, tape)
        assert run.learner.state().digest() == straight.learner.state().digest(), f"rewind to {target}: states differ"
        assert run.tape.digest == tape.digest, f"rewind to {target} and on again: the metrics differ"


def _follow(run: Run, tape: Tape) -> None:
    for change in tape.changes:
        if change.step >= run.step:
            run.advance(change.step - run.step)
            run.tune(**{change.knob: change.value})
    run.advance(tape.steps - run.step)


def check_resume(case: Case) -> None:
    """A run that is loaded goes on exactly as the one that was saved would have."""
    for start in (case.steps, 2 * case.steps):
        with tempfile.TemporaryDirectory() as folder:
            run = case.run(folder=Path(folder) / "run", evaluate_every=None)
            run.advance(start)
            for knob in run.learner.config.knobs.values():
                run.tune(**{knob.name: _other_value(knob, run.learner.config)})
            run.advance(1)
            run.save()
            content = (Path(folder) / "run" / STATE).read_bytes()
            state, notes = State.from_bytes(content, "the saved state")
            assert state.digest() == run.learner.state().digest(), "what was saved is not the present state"
            assert notes["step"] == start + 1
            copy = Path(folder) / "copy"
            copy.mkdir()
            for file in (Path(folder) / "run").iterdir():
                if file.name != "lock":
                    (copy / file.name).write_bytes(file.read_bytes())
            resumed = Run.load(copy, case.learner, autosave=0)
            assert resumed.learner.config.model_dump() == run.learner.config.model_dump(), "settings differ"
            _same_future(run, resumed, case.steps, f"resumed at step {start + 1}")
            assert resumed.tape.model_dump() == run.tape.model_dump(), "the tapes differ"
            run.close()
            resumed.close()


def check_replay(case: Case) -> None:
    """A tape with a change of every knob replays to the last bit, whatever torch's thread count around it."""
    run = case.run()
    for knob in run.learner.config.knobs.values():
        run.advance(2)
        run.tune(**{knob.name: _other_value(knob, run.learner.config)})
    run.advance(case.steps)
    text = run.tape.model_dump_json()
    assert json.loads(text)["steps"] == run.step, "a tape is JSON"
    tape = Tape.model_validate_json(text)
    assert tape == run.tape, "a tape reads back as it was written"
    for threads in (2, 1):
        with torch_threads(threads):
            again = Run.replay(tape, case.learner, autosave=0)
            assert torch.get_num_threads() == threads, "a run left torch's thread count changed"
        assert again.identical, f"replay with {threads} ambient threads: {again.message}"
        assert again.learner.state().digest() == run.learner.state().digest(), "replay: the states differ"


def check_threads(case: Case) -> None:
    """Two learners that are built and trained in two threads come out as they would alone."""
    alone = []
    for seed in (1, 2):
        run = case.run({"seed": seed})
        run.advance(case.steps)
        alone.append(run.tape.digest)
    together: dict[int, str] = {}
    problems: list[BaseException] = []
    barrier = threading.Barrier(2)

    def work(seed: int) -> None:
        try:
            barrier.wait(60)
            run = case.run({"seed": seed})
            run.advance(case.steps)
            together[seed] = run.tape.digest
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    if problems:
        raise problems[0]
    assert [together[1], together[2]] == alone, "two learners in two threads disturb each other"


def check_knobs_refuse(case: Case) -> None:
    """What a knob can't take is refused by name, value and range, and the run goes on with the old value."""
    run, untouched = case.run(), case.run()
    config = run.learner.config
    assert config.knobs, "a learner has at least one knob"
    assert sum(knob.first for knob in config.knobs.values()) == 1, "exactly one knob is the one to drag first"
    for knob in config.knobs.values():
        old = getattr(config, knob.name)
        for wrong in _wrong_values(knob, config):
            message = _refused(KnobError, functools.partial(run.tune, **{knob.name: wrong}))
            for part in (knob.name, repr(wrong), knob.allowed(config), repr(old)):
                assert part in message, f"the refusal of {knob.name}={wrong!r} does not say {part!r}: {message}"
            assert getattr(config, knob.name) == old, "a refused value was taken"
        message = _refused(DrivenConfigError, functools.partial(setattr, config, knob.name, old))
        assert "tune" in message, "the refusal of direct assignment must name tune"
        if knob.kind == "float" and float(np.float32(old)) == old:
            run.tune(**{knob.name: np.float32(old)})
            assert type(getattr(config, knob.name)) is float, "numpy scalars are taken as Python numbers"
    message = _refused(UnknownNameError, lambda: run.tune(**{next(iter(config.knobs)) + "s": 1.0}))
    assert next(iter(config.knobs)) in message, "an unknown knob's refusal must suggest the nearest name"
    message = _refused(StructureError, lambda: run.tune(seed=config.seed + 1))
    assert "seed" in message and "new run" in message, "a structural change must say to start a new run"
    for each in (run, untouched):
        each.advance(case.steps)
    assert run.learner.state().digest() == untouched.learner.state().digest(), "a refused change left a trace"


def _wrong_values(knob: Knob, config: Config) -> list[Any]:
    if knob.kind == "bool":
        return [1, "True", None, 0.5]
    if knob.kind == "choice":
        return ["no such option", 0, None, True]
    low, high = knob.bounds(config)
    wrong: list[Any] = [math.nan, math.inf, -math.inf, "1", None, True, [low], low - 1, high + 1]
    if knob.kind == "int":
        wrong += [low + 0.5]
        wrong += [int(low) + int(low) % 2] if knob.odd and low + low % 2 <= high else []
    return wrong


def _refused(expected: type[Exception], attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except expected as error:
        return str(error)
    raise AssertionError(f"{expected.__name__} was expected, but nothing was raised")


def check_knobs_act(case: Case) -> None:
    """Every knob is read anew at every update of some phase, one value an update, and both its ends can be trained."""
    learner = case.make()
    phases: dict[str, list[set[str]]] = {}
    for _ in range(2 * case.steps):
        phase = learner.phase
        with _recorded_reads(learner.config) as names:
            learner.update()
        phases.setdefault(phase, []).append(names)
    for knob in learner.config.knobs:
        always = [phase for phase, updates in phases.items() if all(knob in names for names in updates)]
        assert always, f"{knob} is not read at every update of any phase: a change would not act"
    for position in (0.0, 1.0):
        run = case.run()
        for knob in run.learner.config.knobs.values():
            run.rewind(0)
            if knob.kind in ("float", "int"):
                run.tune(**{knob.name: knob.from_position(position, run.learner.config)})
            else:
                run.tune(**{knob.name: _other_value(knob, run.learner.config)})
            run.advance(2)


@contextlib.contextmanager
def _recorded_reads(config: Config) -> Iterator[set[str]]:
    names: set[str] = set()
    own = type(config)

    class Recorded(own):  # type: ignore[misc, valid-type]
        def __getattribute__(self, name: str) -> Any:
            names.add(name)
            return super().__getattribute__(name)

    object.__setattr__(config, "__class__", Recorded)
    try:
        yield names
    finally:
        object.__setattr__(config, "__class__", own)


def check_device(case: Case) -> None:
    """Everything is computed on the learner's device: nothing is made on another, nothing slips away from it."""
    with pretended_cuda() as tags:
        learner = case.make(device="cuda")
        assert learner.device.type == "cuda"
        for _ in range(2 * case.steps):
            metrics = learner.update()
        for name, parameter in ((n, p) for m in learner.modules() for n, p in m.named_parameters()):
            assert parameter in tags, f"parameter {name} is not on the learner's device"
        learner.evaluate()
        learner.views()
        twin = learner.fork()
        twin.update()
        run = case.run({"device": "cuda"})
        run.advance(2)
        assert set(run.history.columns) >= set(metrics) or learner.phases, "metrics get lost on another device"
    gc.collect()


ALL_CHECKS: tuple[Callable[[Case], None], ...] = (
    check_builds_alike,
    check_update,
    check_observation_is_pure,
    check_fork,
    check_rewind,
    check_resume,
    check_replay,
    check_threads,
    check_knobs_refuse,
    check_knobs_act,
    check_device,
)


def case_of(learner: type[Learner[Any]]) -> Case:
    """Return the case of a method's learner: its study's smoke settings keep it small."""
    study = getattr(sys.modules[learner.__module__], "study", None)
    settings = dict(study.smoke.settings) if study is not None else {}
    if not learner.phases:
        return Case(learner, settings)
    small = learner(**{"device": "cpu", **settings})
    steps = 6
    while set(small.phases) - {small.phase} and small.phase != small.phases[-1] and small.step < 2000:
        small.update()
    return Case(learner, settings, max(steps, (small.step + 8) // 2))


def _global_randomness() -> tuple[Any, ...]:
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
    words = str(numpy_state["state"]["key"].tolist()) + str(numpy_state["state"]["pos"])
    return random.getstate(), words, torch.get_rng_state().numpy().tobytes()


def _tensor_storages(learner: Learner[Any]) -> set[int]:
    """Return the addresses of all tensor memory that a learner reaches, except through its constants."""
    own = [value for name, value in vars(learner).items() if name not in learner.constants]
    return {_address(value) for value in _reached(own)}


def _address(value: torch.Tensor | np.ndarray[Any, Any]) -> int:
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().data_ptr()
    return int(value.__array_interface__["data"][0])


def _constant_contents(learner: Learner[Any]) -> dict[str, str]:
    """Return a digest of the tensors and arrays under each of a learner's constants."""
    contents = {}
    for name in learner.constants:
        digest = hashlib.sha256()
        for value in _reached([getattr(learner, name, None)]):
            if isinstance(value, torch.Tensor):
                value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digest.update(np.ascontiguousarray(value).tobytes())
        contents[name] = digest.hexdigest()
    return contents


def _reached(waiting: list[Any]) -> Iterator[torch.Tensor | np.ndarray[Any, Any]]:
    """Yield the tensors and arrays that are not empty under some objects, also through closures."""
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor | np.ndarray):
            if math.prod(value.shape):
                yield value
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple | set):
            waiting.extend(value)
        elif inspect.isfunction(value):
            waiting.extend(cell.cell_contents for cell in value.__closure__ or ())
        elif isinstance(value, torch.nn.Module | torch.optim.Optimizer) or _is_plain_object(value):
            waiting.extend(vars(value).values())


def _is_plain_object(value: Any) -> bool:
    """Objects that save themselves (simulators, for example) may share what never changes; others may not."""
    if isinstance(value, type) or inspect.ismodule(value) or hasattr(value, "load_state_dict"):
        return False
    return hasattr(value, "__dict__")


def _same_data(first: Any, second: Any) -> bool:
    if dataclasses.is_dataclass(first):
        return all(_same_data(getattr(first, f.name), getattr(second, f.name)) for f in dataclasses.fields(first))
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second, equal_nan=True)
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(_same_data(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(_same_data, first, second))
    return bool(first == second)
