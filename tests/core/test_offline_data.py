"""Offline data sets: the committed ones, the loader, its refusals, and the script that makes them."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import minari
import numpy as np
import pytest
import safetensors.torch
import torch

from polrl.core.errors import DataError, UnknownNameError
from polrl.core.files import sha256
from polrl.worlds import offline_data
from polrl.worlds.offline_data import OfflineData, dataset_names, load_offline

DATA = Path(__file__).resolve().parents[2] / "data"
COMMITTED = sorted(path.parent for path in (DATA / "offline").rglob("manifest.json"))
LENGTHS = (3, 1, 5)
REFERENCES = {"title": "tiny", "random_return": -10.0, "best_return": 30.0}


@pytest.fixture(scope="module")
def script() -> types.ModuleType:
    """Return data/make_offline.py as a module."""
    spec = importlib.util.spec_from_file_location("make_offline", DATA / "make_offline.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_offline"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def own_minari_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test a Minari folder of its own."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def make_episodes(script: types.ModuleType, lengths: tuple[int, ...] = LENGTHS) -> list[Any]:
    """Return episodes of Pendulum's shape with arbitrary contents; the middle one terminates, the others are cut."""
    rng = np.random.default_rng(0)
    return [
        script.Episode(
            rng.normal(size=(length + 1, 3)).clip(-1.0, 1.0).astype(np.float32),
            rng.uniform(-2.0, 2.0, size=(length, 1)).astype(np.float32),
            rng.normal(size=length).astype(np.float32),
            terminated=index == 1,
            truncated=index != 1,
        )
        for index, length in enumerate(lengths)
    ]


@pytest.fixture
def tiny(script: types.ModuleType, own_minari_folder: Path) -> tuple[Path, list[Any]]:
    """Return the folder of a tiny set and the episodes that went into it."""
    episodes = make_episodes(script)
    folder = script.write_minari(own_minari_folder, "tiny/tiny-v0", "Pendulum-v1", episodes, REFERENCES)
    assert os.environ["MINARI_DATASETS_PATH"] == str(own_minari_folder)
    return folder, episodes


def damage(folder: Path, change: Callable[[h5py.File], Any]) -> None:
    with h5py.File(folder / "data" / "main_data.hdf5", "r+") as file:
        change(file)


def replace(file: h5py.File, name: str, values: Any) -> None:
    del file[name]
    file[name] = values


def poke(name: str, place: Any, value: float) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        values = file[name][()]
        values[place] = value
        replace(file, name, values)

    return change


# ------------------------------------------------------------------------------------------------------ what is loaded


def test_rows_are_the_episodes_laid_end_to_end(tiny):
    folder, episodes = tiny
    data = load_offline("tiny/tiny-v0")
    assert len(data) == 9
    assert data.episode_starts.tolist() == [0, 3, 4] and data.episode_ends.tolist() == [3, 4, 9]
    for start, end, episode in zip(data.episode_starts, data.episode_ends, episodes, strict=True):
        assert np.array_equal(data.observations[start:end], episode.observations[:-1])
        assert np.array_equal(data.next_observations[start:end], episode.observations[1:])
        assert np.array_equal(data.actions[start:end], episode.actions)
        assert np.array_equal(data.rewards[start:end], episode.rewards)
    assert data.task == "Pendulum-v1" and data.name == "tiny/tiny-v0"
    assert data.action_low.tolist() == [-2.0] and data.action_high.tolist() == [2.0]
    assert (data.random_return, data.best_return) == (-10.0, 30.0)


def test_only_the_tasks_own_end_is_terminal_not_the_time_limit(tiny):
    assert load_offline("tiny/tiny-v0").terminals.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0]


def test_everything_is_float32_on_the_device_asked_for(tiny):
    data = load_offline("tiny/tiny-v0", torch.device("cpu"))
    for field in dataclasses.fields(OfflineData):
        value = getattr(data, field.name)
        if isinstance(value, torch.Tensor):
            assert value.device.type == "cpu"
            assert value.dtype == (torch.int64 if field.name.startswith("episode") else torch.float32), field.name


def test_a_set_is_read_once_and_read_anew_when_it_was_made_anew(tiny):
    folder, _ = tiny
    first = load_offline("tiny/tiny-v0")
    assert load_offline("tiny/tiny-v0") is first
    damage(folder, poke("episode_0/rewards", 0, 7.0))
    os.utime(folder / "data" / "main_data.hdf5", ns=(1, 1))
    assert load_offline("tiny/tiny-v0").rewards[0] == 7.0


def test_a_set_is_found_by_its_path(tiny):
    folder, _ = tiny
    assert torch.equal(load_offline(str(folder)).rewards, load_offline("tiny/tiny-v0").rewards)


def test_one_episode_is_enough(script, own_minari_folder):
    episodes = make_episodes(script, (4,))
    script.write_minari(own_minari_folder, "one-v0", "Pendulum-v1", episodes, REFERENCES)
    data = load_offline(str(own_minari_folder / "one-v0"))
    assert len(data) == 4 and data.episode_ends.tolist() == [4]


def test_returns_are_discounted_to_the_end_of_each_episode(tiny):
    _, episodes = tiny
    data = load_offline("tiny/tiny-v0")
    for discount in (0.0, 0.9, 1.0):
        expected = [
            sum(discount**k * float(reward) for k, reward in enumerate(episode.rewards[step:]))
            for episode in episodes
            for step in range(len(episode))
        ]
        torch.testing.assert_close(data.monte_carlo_returns(discount), torch.tensor(expected))
    sums = [float(episode.rewards.sum(dtype=np.float64)) for episode in episodes]
    torch.testing.assert_close(data.episode_returns(), torch.tensor(sums))


def test_standardized_states_have_mean_zero_and_the_old_ones_stay(tiny):
    data = load_offline("tiny/tiny-v0")
    before = data.observations.clone()
    mapped, mean, divisor = data.standardized(epsilon=0.5)
    states = data.observations.double()
    torch.testing.assert_close(mean, states.mean(0).float())
    torch.testing.assert_close(divisor, (((states - states.mean(0)) ** 2).mean(0).sqrt() + 0.5).float())
    torch.testing.assert_close(mapped.observations * divisor + mean, data.observations)
    torch.testing.assert_close(mapped.next_observations * divisor + mean, data.next_observations)
    assert torch.equal(data.observations, before) and mapped.rewards is data.rewards
    assert torch.equal(data.standardized()[2], data.standardized(1e-3)[2])


def test_scores_are_0_for_random_actions_and_100_for_the_best(tiny):
    data = load_offline("tiny/tiny-v0")
    assert data.normalized_score(-10.0) == 0.0 and data.normalized_score(30.0) == 100.0
    torch.testing.assert_close(data.normalized_score(torch.tensor([10.0, 50.0])), torch.tensor([50.0, 150.0]))


@pytest.mark.parametrize("references", [{"best_return": float("nan")}, {"best_return": -10.0}])
def test_without_two_reference_returns_there_is_no_score(tiny, references):
    data = dataclasses.replace(load_offline("tiny/tiny-v0"), **references)
    with pytest.raises(DataError, match=r"tiny/tiny-v0.*random -10\.0"):
        data.normalized_score(1.0)


def test_a_set_without_reference_returns_loads(tiny):
    folder, _ = tiny
    path = folder / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    del metadata["ref_min_score"], metadata["ref_max_score"], metadata["env_spec"]
    path.write_text(json.dumps(metadata))
    data = load_offline(str(folder))
    assert np.isnan(data.random_return) and np.isnan(data.best_return) and data.task == ""


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("key", ["observations", "actions", "rewards"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_with_array_row_and_episode(tiny, key, value):
    folder, _ = tiny
    damage(folder, poke(f"episode_2/{key}", 1, value))
    with pytest.raises(DataError, match=rf"tiny.*{key} holds {value} in row 5 \(episode 2, step 1\)"):
        load_offline(str(folder))


def test_a_last_observation_that_is_not_finite_is_found_too(tiny):
    folder, _ = tiny
    damage(folder, poke("episode_1/observations", (1, 2), -np.inf))
    with pytest.raises(DataError, match=r"next_observations holds -inf in row 3 \(episode 1, step 0\)"):
        load_offline(str(folder))


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("observations", (5, 3)),
        ("observations", (6, 2)),
        ("actions", (4, 1)),
        ("actions", (5, 2)),
        ("terminations", (4,)),
        ("truncations", (6,)),
    ],
)
def test_arrays_that_do_not_fit_each_other_are_refused(tiny, key, shape):
    folder, _ = tiny
    damage(folder, lambda file: replace(file, f"episode_2/{key}", np.zeros(shape, np.float32)))
    with pytest.raises(DataError) as caught:
        load_offline(str(folder))
    assert f"episode 2: {key} has the shape {shape}" in str(caught.value) and "5 rewards" in str(caught.value)


@pytest.mark.parametrize(("value", "bound"), [(2.5, "-2 to 2"), (-2.0002, "-2 to 2")])
def test_actions_out_of_bounds_are_refused_with_the_worst_value(tiny, value, bound):
    folder, _ = tiny
    damage(folder, poke("episode_2/actions", 0, (value + np.sign(value) * 2.0) / 2))
    damage(folder, poke("episode_2/actions", 3, value))
    with pytest.raises(DataError, match=rf"action {value:g} in row 7 \(episode 2, step 3\).*bounds {bound}"):
        load_offline(str(folder))


def test_an_action_rounded_to_float32_is_no_offence(tiny):
    folder, _ = tiny
    damage(folder, poke("episode_2/actions", 3, 2.0 + 1e-6))
    assert len(load_offline(str(folder))) == 9


def test_an_action_space_without_bounds_allows_every_finite_action(script, tiny):
    rows = {"starts": np.array([0]), "ends": np.array([2])}
    values = {key: np.zeros((2, 1)) for key in ("observations", "next_observations", "rewards")}
    space = gymnasium.spaces.Box(-np.inf, np.inf, (1,))
    offline_data._check_values("x", {**rows, **values, "actions": np.array([[1e30], [-5.0]])}, space)


@pytest.mark.parametrize("lengths", [(), (3, 0)])
def test_an_empty_set_or_episode_is_refused(script, tiny, lengths):
    folder, _ = tiny
    path = folder / "data" / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "total_episodes": len(lengths)}))
    if lengths:

        def empty(file: h5py.File) -> None:
            for key, width in (("observations", (1, 3)), ("actions", (0, 1))):
                replace(file, f"episode_1/{key}", np.zeros(width, np.float32))
            for key in ("rewards", "terminations", "truncations"):
                replace(file, f"episode_1/{key}", np.zeros(0, np.float32))

        damage(folder, empty)
    with pytest.raises(DataError, match="episode 1 is empty" if lengths else "is empty: it has no episode"):
        load_offline(str(folder))


@pytest.mark.parametrize("file", ["main_data.hdf5", "metadata.json"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_refused_with_its_folder(tiny, file, kept):
    folder, _ = tiny
    path = folder / "data" / file
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(DataError, match="can't be read") as caught:
        load_offline(str(folder))
    assert str(folder) in str(caught.value) and "polrl data" in str(caught.value)


def test_a_missing_array_is_refused(tiny):
    folder, _ = tiny
    damage(folder, lambda file: file.__delitem__("episode_1/actions"))
    with pytest.raises(DataError, match="can't be read"):
        load_offline(str(folder))


@pytest.mark.filterwarnings("ignore")  # Minari's, about links and addresses
def test_spaces_that_are_not_flat_boxes_are_refused(own_minari_folder):
    space = gymnasium.spaces.Dict({"goal": gymnasium.spaces.Box(0.0, 1.0, (2,))})
    buffer = minari.data_collector.EpisodeBuffer(
        observations={"goal": np.zeros((2, 2), np.float32)},
        actions=np.zeros((1, 1), np.float32),
        rewards=[0.0],
        terminations=[False],
        truncations=[True],
    )
    box = gymnasium.spaces.Box(0.0, 1.0, (1,))
    minari.create_dataset_from_buffers("goal-v0", [buffer], observation_space=space, action_space=box)
    with pytest.raises(DataError, match="goal-v0 has the observation space Dict.*flat box"):
        load_offline("goal-v0")
    with pytest.raises(DataError, match="action space Discrete"):
        offline_data._width("x", "action", gymnasium.spaces.Discrete(3))


@pytest.mark.parametrize("missing", ["minari.dataset.minari_storage", "h5py"])
def test_without_minari_or_h5py_the_extra_is_named(tiny, monkeypatch, missing):
    folder, _ = tiny
    offline_data._load.cache_clear()
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r'pip install "polrl\[course\]"'):
        load_offline(str(folder))


def test_an_unknown_name_suggests_the_nearest_also_of_local_sets(tiny):
    with pytest.raises(UnknownNameError, match=r"unknown data set 'tiny/tinny-v0'; did you mean tiny/tiny-v0"):
        load_offline("tiny/tinny-v0")
    with pytest.raises(UnknownNameError, match=r"polrl data fetch mujoco/walker2d/medium-v0"):
        load_offline("mujoco/walker2d/medium-v0")
    with pytest.raises(UnknownNameError) as caught:
        load_offline("pendulum-mixt")
    assert "did you mean pendulum-mixed" in str(caught.value) and "fetch" not in str(caught.value)


def test_importing_polrl_imports_neither_minari_nor_gymnasium():
    code = "import sys, polrl, polrl.worlds.offline_data; print({'minari', 'gymnasium', 'h5py'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---------------------------------------------------------------------------------------------------- the committed sets


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_a_committed_set_is_what_its_manifest_says(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    data = load_offline(manifest["name"])
    returns = data.episode_returns()
    assert len(data) == manifest["rows"] and len(returns) == manifest["episodes"]
    for name, value in (("mean", returns.mean()), ("min", returns.min()), ("max", returns.max())):
        assert float(value) == pytest.approx(manifest["returns"][name], rel=1e-4)
    assert data.task == manifest["task"]
    assert (data.random_return, data.best_return) == (manifest["random_return"], manifest["best_return"])
    assert data.best_return > max(data.random_return, float(returns.mean()))
    assert sum((folder / name).stat().st_size for name in manifest["files"]) == manifest["bytes"]
    assert manifest["licence"]["name"] and manifest["seed"] == 0 and manifest["versions"]["stable-baselines3"]


def test_the_committed_sets_have_their_names_and_are_small():
    assert set(dataset_names()) >= {"hopper-medium", "hopper-medium-replay", "pendulum-mixed"}
    assert sum(path.stat().st_size for path in (DATA / "offline").rglob("*") if path.is_file()) < 12e6


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_plain_minari_reads_a_committed_set(folder, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(DATA / "offline"))
    manifest = json.loads((folder / "manifest.json").read_text())
    dataset = minari.load_dataset(manifest["id"])
    assert (dataset.total_steps, dataset.total_episodes) == (manifest["rows"], manifest["episodes"])
    episode = dataset[0]
    assert episode.observations.dtype == dataset.observation_space.dtype == np.float32
    assert episode.actions.dtype == dataset.action_space.dtype == np.float32
    assert dataset.observation_space.contains(episode.observations[0])
    assert dataset.env_spec is not None and dataset.env_spec.id == manifest["task"]


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_the_recorded_transitions_are_the_tasks_own(folder):
    """The simulator, put into a recorded state, answers a recorded action with the recorded reward."""
    data = load_offline(json.loads((folder / "manifest.json").read_text())["name"])
    env = gymnasium.make(data.task).unwrapped
    env.reset(seed=0)
    rows = np.random.default_rng(0).integers(len(data), size=20)
    if data.task == "Pendulum-v1":
        for row in rows:
            x, y, speed = data.observations[row].double().tolist()
            env.state = np.array([np.arctan2(y, x), speed])
            seen, reward, *_ = env.step(data.actions[row].numpy())
            assert np.allclose(seen, data.next_observations[row], atol=1e-4)
            assert reward == pytest.approx(float(data.rewards[row]), abs=1e-3)
    else:
        # Hopper's reward is 1 while healthy, plus the forward speed, minus the cost of control; its end is a fall.
        ends = data.episode_ends - 1
        assert data.terminals.sum() == data.terminals[ends].sum() > 0
        fallen = data.next_observations[data.terminals.bool()]
        healthy = (fallen[:, 0] > 0.7) & (fallen[:, 1].abs() < 0.2) & (fallen.abs() < 100.0).all(dim=1)
        assert not healthy.any()
        cost = 1e-3 * (data.actions**2).sum(dim=1)
        speed = data.rewards + cost - (1.0 - data.terminals)
        # The mean of the speeds before and after is near the mean speed within the step.
        both = (data.observations[:, 5] + data.next_observations[:, 5]) / 2
        assert torch.corrcoef(torch.stack([speed, both]))[0, 1] > 0.99


def test_a_damaged_committed_set_is_refused(tmp_path, monkeypatch):
    copied = Path(shutil.copytree(DATA / "offline" / "pendulum", tmp_path / "data" / "pendulum"))
    monkeypatch.setattr("polrl.core.data.asset_roots", lambda: [tmp_path])
    assert dataset_names() == ("pendulum-mixed",)
    path = copied / "mixed-v0" / "data" / "main_data.hdf5"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"main_data\.hdf5 is not the one its manifest names"):
        load_offline("pendulum-mixed")
    (copied / "mixed-v0" / "manifest.json").write_text("{")
    with pytest.raises(UnknownNameError, match=r"manifest\.json can't be read"):
        load_offline("pendulum-mixed")


# ----------------------------------------------------------------------------------------------------------- the script


def test_the_recorder_keeps_whole_episodes_with_their_last_observation(script):
    env = script.Recorder(gymnasium.make("Pendulum-v1"))
    observation, _ = env.reset(seed=3)
    seen, actions, rewards = [observation], [], []
    for step in range(200):
        action = np.array([np.sin(step)], np.float32)
        observation, reward, _, truncated, _ = env.step(action)
        seen.append(observation)
        actions.append(action)
        rewards.append(reward)
    assert truncated
    env.reset()
    env.step(actions[0])  # an episode not ended yet is not kept
    (episode,) = env.episodes
    assert np.array_equal(episode.observations, np.array(seen, np.float32))
    assert np.array_equal(episode.actions, np.array(actions)) and np.allclose(episode.rewards, rewards)
    assert episode.truncated and not episode.terminated and len(episode) == 200


def test_whole_episodes_are_taken_until_there_are_enough_rows(script):
    episodes = make_episodes(script)
    assert [len(episode) for episode in script.take_rows(iter(episodes), 4)] == [3, 1]


def test_rollouts_of_one_seed_are_the_same(script):
    takes = [
        next(script.rollouts("Pendulum-v1", script.random_actions("Pendulum-v1", seed), seed)) for seed in (5, 5, 6)
    ]
    assert np.array_equal(takes[0].observations, takes[1].observations)
    assert not np.array_equal(takes[0].observations, takes[2].observations)


@pytest.mark.parametrize(
    ("returns", "chosen"),
    [
        ([0, 40, 45, 90, 100], 2),  # the last within a third to a half
        ([0, 40, 90, 36, 100], 3),
        ([0, 10, 60, 90, 100], 2),  # none within: the nearest
        ([0, 30, 90, 100], 1),
    ],
)
def test_the_medium_policy_is_the_last_in_its_range_or_the_nearest(script, returns, chosen):
    evaluations = [{"step": i, "return": value} for i, value in enumerate(returns)]
    assert script.choose_medium(evaluations, 0.0, 100.0)["step"] == chosen


class FakeTraining:
    """Looks like a training of Pendulum whose policies do nothing."""

    task, seed, steps, every = "Pendulum-v1", 0, 9, 3
    evaluations = [{"step": 3, "return": -900.0}, {"step": 6, "return": -600.0}, {"step": 9, "return": -100.0}]

    def __init__(self, script: types.ModuleType) -> None:
        self.recorder = types.SimpleNamespace(episodes=make_episodes(script))
        self.asked: list[int] = []

    def policy(self, step: int) -> Callable[[Any], Any]:
        self.asked.append(step)
        return lambda observation: np.zeros(1, np.float32)

    def evaluate(self, episodes: int, first_seed: int) -> float:
        return -100.0


def test_replay_is_what_was_seen_in_order_up_to_the_medium_policy(script):
    training = FakeTraining(script)
    about = {"medium": {"step": 6}, "best": {"step": 9}}
    assert script.record(training, about, "medium-replay", 1) == training.recorder.episodes[:2]
    assert script.record(training, about, "replay", 1) == training.recorder.episodes
    assert training.asked == []


def test_rollouts_come_from_the_policy_of_their_kind(script):
    training = FakeTraining(script)
    about = {"medium": {"step": 6}, "best": {"step": 9}}
    assert sum(map(len, script.record(training, about, "medium", 300))) == 400
    assert training.asked == [6]
    assert len(script.record(training, about, "mixed", 600)) == 3 and training.asked == [6, 6, 9]
    (random,) = script.record(training, about, "random", 200)
    assert random.actions.std() > 0.5


def test_sets_are_made_with_a_manifest_that_the_loader_checks(script, own_minari_folder, capsys, monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "1.0" if name == "stable-baselines3" else version(name)
    )
    options = script.parse(["--task", "Pendulum-v1", "--kind", "mixed", "--kind", "medium-replay", "--rows", "600"])
    script.make_sets(options, FakeTraining(script))
    folder = own_minari_folder / "pendulum" / "mixed-v0"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"]["data/main_data.hdf5"] == sha256((folder / "data" / "main_data.hdf5").read_bytes())
    assert (manifest["rows"], manifest["episodes"], manifest["best_return"]) == (600, 3, -100.0)
    assert -1600 < manifest["random_return"] < -900
    data = load_offline(str(folder))
    assert len(data) == 600 and (data.random_return, data.best_return) == (manifest["random_return"], -100.0)
    assert manifest["returns"]["mean"] == pytest.approx(float(data.episode_returns().mean()), rel=1e-5)
    assert "600 rows" in capsys.readouterr().out
    assert len(load_offline("pendulum/medium-replay-v0")) == 4  # the first two episodes, up to step 6
    with pytest.raises(FileExistsError, match="--version"):
        script.make_sets(options, FakeTraining(script))
    assert not [path for path in own_minari_folder.iterdir() if path.name.startswith(".")]


def test_compressing_changes_no_value(script, own_minari_folder):
    rng = np.random.default_rng(1)
    episode = script.Episode(
        np.round(rng.normal(size=(4001, 3)).clip(-1.0, 1.0), 1).astype(np.float32),
        np.zeros((4000, 1), np.float32),
        np.ones(4000, np.float32),
        terminated=False,
        truncated=True,
    )
    folder = script.write_minari(own_minari_folder, "big-v0", "Pendulum-v1", [episode], REFERENCES)
    with h5py.File(folder / "data" / "main_data.hdf5") as file:
        assert file["episode_0/observations"].compression == "gzip" and file["episode_0"].attrs["total_steps"] == 4000
        assert np.array_equal(file["episode_0/observations"], episode.observations)
    assert (folder / "data" / "main_data.hdf5").stat().st_size < episode.observations.nbytes / 2


def test_without_stable_baselines_the_script_says_what_it_needs(script, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    assert script.main(["--work", str(tmp_path / "work")]) == 1
    assert "pip install stable-baselines3" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--kind", "good"], ["--steps", "0"], ["--rows", "x"]])
def test_a_wrong_option_is_refused(script, words):
    with pytest.raises(SystemExit):
        script.parse(words)


@pytest.mark.slow
def test_a_killed_training_goes_on_where_it_was_saved(script, tmp_path):
    pytest.importorskip("stable_baselines3")
    first = script.Training("Pendulum-v1", 0, tmp_path, 1200, 400)
    first.run()
    assert [each["step"] for each in first.evaluations] == [400, 800, 1200]
    again = script.Training("Pendulum-v1", 0, tmp_path, 1600, 400)
    assert again.model.num_timesteps == 1200 and again.model.replay_buffer.size() == 1200
    for old, new in zip(first.recorder.episodes, again.recorder.episodes, strict=True):
        assert np.array_equal(old.observations, new.observations) and old.truncated == new.truncated
    saved = safetensors.torch.load_file(tmp_path / "policy_1200.safetensors")
    for name, value in again.model.actor.state_dict().items():
        assert torch.equal(value, saved[name]), name
    old, new = first.model.replay_buffer, again.model.replay_buffer
    for name in ("observations", "next_observations", "actions", "rewards"):
        assert np.allclose(getattr(old, name)[:1200], getattr(new, name)[:1200], atol=1e-6), name
    again.run()
    assert [each["since"] for each in again.evaluations] == [0, 0, 0, 1200]
    assert len(again.recorder.episodes) == 8
