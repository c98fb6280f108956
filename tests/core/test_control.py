"""Control tasks go on identically from a saved state, in mid-episode and through resets."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from tiny import run_of

import polrl
from polrl import Curve, Learner, Run, knob
from polrl.core.state import State, capture, restore
from polrl.worlds.control import ControlTask

pytest.importorskip("mujoco")

STEPS = 300
TASKS = {
    "Pendulum-v1": 37,
    "CartPole-v1": 11,
    "Acrobot-v1": 20,
    "MountainCarContinuous-v0": 50,
    "Hopper-v5": 9,
    "HalfCheetah-v5": 60,
    "Walker2d-v5": 12,
    "Swimmer-v5": 30,
    "InvertedDoublePendulum-v5": 4,
    "Reacher-v5": 23,
    "Ant-v5": 25,
    "Humanoid-v5": 13,
}


@pytest.fixture(autouse=True)
def _logs_go_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warnings to a file in the working directory


def actions(task, count):
    space, rng = task.env.action_space, np.random.default_rng(3)
    if isinstance(space, gymnasium.spaces.Discrete):
        return [int(rng.integers(space.n)) for _ in range(count)]
    return [rng.uniform(space.low, space.high).astype(space.dtype) for _ in range(count)]


def play(task, moves):
    """Act and reset where an episode ends, also artificially now and then; return everything that is seen."""
    seen = []
    for i, move in enumerate(moves):
        observation, reward, terminated, truncated = task.step(move)
        seen.append((observation.tobytes(), reward, terminated, truncated, task.episode_return))
        if terminated or truncated or i % 83 == 82:
            seen.append(task.reset().tobytes())
    return seen


class Owner:
    def __init__(self, task):
        self.task = task


@pytest.mark.parametrize("name", TASKS)
def test_a_task_goes_on_identically(name):
    task, before = ControlTask(name, seed=1), TASKS[name]
    moves = actions(task, before + STEPS)
    play(task, moves[:before])
    state = capture(Owner(task))
    future = play(task, moves[before:])
    assert len(future) > STEPS, "there were resets"
    fresh = Owner(ControlTask(name, seed=2))
    restore(fresh, State.from_bytes(state.to_bytes({}), name)[0])
    assert play(fresh.task, moves[before:]) == future, "a new task, by way of a file"
    restore(fresh, state)
    assert play(fresh.task, moves[before:]) == future, "the same task, taken back from the middle of an episode"
    assert capture(fresh).digest() == capture(Owner(task)).digest()


@pytest.mark.parametrize("name", ["Pendulum-v1", "CartPole-v1", "Hopper-v5"])
def test_a_state_is_a_copy_and_can_be_loaded_more_than_once(name):
    task = ControlTask(name, seed=1)
    moves = actions(task, 60)
    play(task, moves[:5])
    state = task.state_dict()
    futures = []
    for _ in range(3):
        task.load_state_dict(state)
        futures.append(play(task, moves[5:]))
    assert futures[0] == futures[1] == futures[2]


@pytest.mark.parametrize("name", ["Pendulum-v1", "CartPole-v1", "Hopper-v5"])
def test_saving_a_state_disturbs_nothing(name):
    watched, alone = ControlTask(name, seed=1), ControlTask(name, seed=1)
    moves = actions(alone, 50)
    seen = []
    for move in moves:
        seen += play(watched, [move])
        watched.state_dict()
    assert seen == play(alone, moves)


def test_the_time_limit_counts_on():
    task, fresh = ControlTask("Pendulum-v1", seed=1), ControlTask("Pendulum-v1", seed=2)
    moves = actions(task, 200)
    for move in moves[:150]:
        task.step(move)
    fresh.load_state_dict(task.state_dict())
    ends = [fresh.step(move)[3] for move in moves[150:]]
    assert ends == [False] * 49 + [True]


def test_a_reset_with_a_seed_is_always_the_same():
    task = ControlTask("Pendulum-v1", seed=1)
    first = task.reset(seed=5).copy()
    task.step(np.array([1.0], dtype=np.float32))
    assert task.episode_return < 0
    assert np.array_equal(task.reset(seed=5), first) and task.episode_return == 0.0
    assert not np.array_equal(task.reset(), first)


def test_two_tasks_of_one_seed_are_alike():
    for name in ("CartPole-v1", "Hopper-v5"):
        first, second = ControlTask(name, seed=4), ControlTask(name, seed=4)
        moves = actions(first, 120)
        assert play(first, moves) == play(second, moves)
        assert not np.array_equal(ControlTask(name, seed=5).observation, ControlTask(name, seed=4).observation)


def test_an_unknown_task_is_an_error():
    with pytest.raises(gymnasium.error.Error, match="Hooper"):
        ControlTask("Hooper-v5", seed=0)


class Config(polrl.Config):
    task: str = "Hopper-v5"
    force: float = knob(0.5, low=0.0, high=1.0, first=True)


class Walker(Learner[Config]):
    """Acts at random in a task."""

    curves = (Curve("reward", "Reward"),)

    def setup(self):
        self.task = ControlTask(self.config.task, self.config.seed)

    def update(self):
        shape = self.task.env.action_space.shape
        action = self.config.force * self.rng.numpy.uniform(-1, 1, shape)
        observation, reward, terminated, truncated = self.task.step(action.astype(np.float32))
        if terminated or truncated:
            self.task.reset()
        return {"reward": reward, "first": float(observation[0])}


@pytest.mark.parametrize("name", ["Pendulum-v1", "Hopper-v5", "HalfCheetah-v5"])
def test_a_saved_run_of_a_task_goes_on_identically(name, tmp_path):
    run = run_of(Walker, {"task": name}, folder=tmp_path / "run")
    run.advance(70)
    run.save()
    twin = run.fork()
    run.close()
    loaded = Run.load(tmp_path / "run", Walker, autosave=0)
    for each in (run, twin, loaded):
        each.advance(STEPS - 70)
    assert run.tape.digest == twin.tape.digest == loaded.tape.digest
    loaded.rewind(35)
    twin.rewind(35)
    assert loaded.tape.digest == twin.tape.digest
    assert loaded.learner.state().digest() == twin.learner.state().digest()
