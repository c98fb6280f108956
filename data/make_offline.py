"""Make offline data sets: train a policy with Soft Actor-Critic, record what it saw and does, in Minari's form.

Stable-Baselines3, on which polrl does not depend, trains the policy (pip install stable-baselines3):

    python data/make_offline.py --task Hopper-v5 --kind medium-replay --kind medium --steps 150000

Training is evaluated and saved at regular steps in the work folder, so that a killed run goes on with the same command,
and other kinds can be cut from the same training later. Kinds of data set:

    random         rollouts of uniformly random actions
    medium         rollouts of the medium policy, which draws its actions
    expert         rollouts of the best policy evaluated, which draws its actions
    medium-replay  everything the training saw until it reached the medium policy, whole episodes in their order
    replay         everything the training saw, whole episodes in their order
    mixed          rollouts: a third of the rows random, a third medium, a third expert

The medium policy is the last one evaluated within --medium-steps whose mean return lies a third to a half of the way
from random to the best; if there is none, the one nearest to that range.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.metadata
import json
import os
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import platformdirs
import safetensors.torch
import torch

from polrl.core.data import minari_folder
from polrl.core.files import sha256, write_atomic

MEDIUM_RANGE = (1 / 3, 1 / 2)  # of the way from random to the best
EVALUATION_EPISODES = 10  # while training
REFERENCE_EPISODES = 50  # for the two returns that scores are normalized with
KINDS = ("random", "medium", "expert", "medium-replay", "replay", "mixed")
# What differs from the library's defaults, so that one slow core makes 10^5 steps in half an hour.
SETTINGS: dict[str, Any] = {
    "learning_starts": 1000,
    "learning_rate": 1e-3,
    "batch_size": 128,
    "train_freq": 2,
    "policy_kwargs": {"net_arch": [128, 128]},
}


@dataclass(frozen=True)
class Episode:
    """One whole episode: T + 1 observations, T actions and rewards, and how it ended (neither: it was cut off)."""

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool
    truncated: bool

    def __len__(self) -> int:
        return len(self.rewards)


class Recorder(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Keeps every whole episode that passes through a task, as float32."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self.episodes: list[Episode] = []
        self._steps: list[tuple[Any, Any, float]] = []
        self._last: Any = None

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        self._last, info = self.env.reset(**options)
        self._steps = []
        return self._last, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._steps.append((self._last, np.array(action), float(reward)))
        self._last = observation
        if terminated or truncated:
            observations, actions, rewards = zip(*self._steps, strict=True)
            self.episodes.append(
                Episode(
                    np.asarray([*observations, observation], np.float32),
                    np.asarray(actions, np.float32),
                    np.asarray(rewards, np.float32),
                    bool(terminated),
                    bool(truncated),
                )
            )
        return observation, reward, terminated, truncated, info


def rollouts(task: str, act: Callable[[Any], Any], seed: int) -> Iterator[Episode]:
    """Yield whole episodes of a policy, for ever; the task's generator starts from `seed`."""
    env = Recorder(gymnasium.make(task))
    observation, _ = env.reset(seed=seed)
    while True:
        observation, _, terminated, truncated, _ = env.step(act(observation))
        if terminated or truncated:
            yield env.episodes.pop()
            observation, _ = env.reset()


def take_rows(episodes: Iterator[Episode], rows: int) -> list[Episode]:
    """Take whole episodes until there are at least so many rows."""
    taken: list[Episode] = []
    while sum(map(len, taken)) < rows:
        taken.append(next(episodes))
    return taken


def mean_return(episodes: Sequence[Episode]) -> float:
    """Return the mean undiscounted return."""
    return float(np.mean([episode.rewards.sum(dtype=np.float64) for episode in episodes]))


def random_actions(task: str, seed: int) -> Callable[[Any], Any]:
    """Return a policy that draws uniformly from the action space."""
    space = gymnasium.make(task).action_space
    space.seed(seed)
    return lambda observation: space.sample()


# ----------------------------------------------------------------------------------------------------------- training


class Training:
    """A Soft Actor-Critic training whose work folder holds all that is needed to go on, and to cut data sets from it.

    Parameters
    ----------
    task : str
        A gymnasium id with continuous actions.
    seed : int
    work : Path
        A folder of its own for this task and seed.
    steps : int
        Environment steps to train.
    every : int
        Steps between evaluations; each also saves.
    """

    def __init__(self, task: str, seed: int, work: Path, steps: int, every: int) -> None:
        try:
            import stable_baselines3
        except ImportError:
            raise ImportError("training needs Stable-Baselines3: pip install stable-baselines3") from None
        self.task, self.seed, self.work, self.steps, self.every = task, seed, work, steps, every
        self.version = stable_baselines3.__version__
        work.mkdir(parents=True, exist_ok=True)
        self.recorder = Recorder(gymnasium.make(task))
        torch.set_num_threads(1)
        self.model = stable_baselines3.SAC(
            "MlpPolicy", self.recorder, seed=seed, device="cpu", **copy.deepcopy(SETTINGS)
        )
        self.evaluations: list[dict[str, Any]] = []
        if (work / "evaluations.json").exists():
            self._restore()

    def policy(self, step: int) -> Callable[[Any], Any]:
        """Return the policy of an evaluated step, which draws its actions; `evaluate` then is about it."""
        self.model.actor.load_state_dict(safetensors.torch.load_file(self.work / f"policy_{step}.safetensors"))
        return lambda observation: self.model.predict(observation, deterministic=False)[0]

    def evaluate(self, episodes: int = EVALUATION_EPISODES, first_seed: int = 10_000) -> float:
        """Return the mean return of some episodes, played side by side, with the policy's mean action."""
        tasks = [Recorder(gymnasium.make(self.task)) for _ in range(episodes)]
        seen = [task.reset(seed=first_seed + i)[0] for i, task in enumerate(tasks)]
        while running := [i for i, task in enumerate(tasks) if not task.episodes]:
            actions, _ = self.model.predict(np.stack([seen[i] for i in running]), deterministic=True)
            for i, action in zip(running, actions, strict=True):
                seen[i] = tasks[i].step(action)[0]
        return mean_return([task.episodes[0] for task in tasks])

    def run(self) -> None:
        """Train up to the budget; evaluate, save and report at regular steps."""
        from stable_baselines3.common.callbacks import BaseCallback

        training, begun, at_start = self, time.process_time(), self.model.num_timesteps

        class Report(BaseCallback):
            def _on_step(self) -> bool:
                step = training.model.num_timesteps
                if step % training.every == 0:
                    value = training.evaluate()
                    seconds = time.process_time() - begun
                    figures = {"step": step, "return": value, "since": at_start, "seconds": round(seconds)}
                    training.evaluations.append(figures)
                    training.save()
                    speed = (step - at_start) / max(seconds, 1e-9)
                    print(f"{training.task} step {step:,}: return {value:.1f}, {speed:.0f} steps/s", flush=True)
                return True

        remaining = self.steps - self.model.num_timesteps
        if remaining > 0:
            self.model.learn(remaining, callback=Report(), reset_num_timesteps=False)

    def save(self) -> None:
        """Save what was seen, the policy and the learner; the list of evaluations last, which makes it count."""
        step = self.model.num_timesteps
        write_atomic(self.work / f"policy_{step}.safetensors", safetensors.torch.save(self.model.actor.state_dict()))
        state = {"parameters": self.model.get_parameters(), "log_ent_coef": self.model.log_ent_coef.detach()}
        for name, save in (("rows.npz", self._save_rows), ("learner.pt", lambda file: torch.save(state, file))):
            with open(self.work / f"{name}.part", "wb") as file:
                save(file)
            os.replace(self.work / f"{name}.part", self.work / name)
        write_atomic(self.work / "evaluations.json", json.dumps(self.evaluations))

    def _save_rows(self, file: Any) -> None:
        episodes = self.recorder.episodes
        np.savez(
            file,
            lengths=[len(episode) for episode in episodes],
            ends=[(episode.terminated, episode.truncated) for episode in episodes],
            observations=np.concatenate([episode.observations for episode in episodes]),
            actions=np.concatenate([episode.actions for episode in episodes]),
            rewards=np.concatenate([episode.rewards for episode in episodes]),
        )

    def _restore(self) -> None:
        self.evaluations = json.loads((self.work / "evaluations.json").read_text())
        state = torch.load(self.work / "learner.pt", weights_only=True)
        self.model.set_parameters(state["parameters"])
        with torch.no_grad():
            self.model.log_ent_coef.copy_(state["log_ent_coef"])
        self.model.num_timesteps = self.evaluations[-1]["step"]
        with np.load(self.work / "rows.npz", allow_pickle=False) as rows:
            cuts = np.cumsum(rows["lengths"])[:-1]
            observations = np.split(rows["observations"], cuts + np.arange(1, len(cuts) + 1))
            parts = zip(observations, np.split(rows["actions"], cuts), np.split(rows["rewards"], cuts), strict=True)
            ends = rows["ends"]
        for (seen, actions, rewards), (terminated, truncated) in zip(parts, ends, strict=True):
            self.recorder.episodes.append(Episode(seen, actions, rewards, bool(terminated), bool(truncated)))
            scaled = self.model.policy.scale_action(actions)
            for i, action in enumerate(scaled):
                last = i == len(actions) - 1
                self.model.replay_buffer.add(
                    seen[i], seen[i + 1], action, rewards[i : i + 1], np.array([last and bool(terminated)]), [{}]
                )


# ------------------------------------------------------------------------------------------------------------ the sets


def choose_medium(evaluations: Sequence[dict[str, Any]], random_return: float, best_return: float) -> dict[str, Any]:
    """Return the last evaluation in the medium range, or the one nearest to it."""

    def distance(evaluation: dict[str, Any]) -> float:
        share = (evaluation["return"] - random_return) / (best_return - random_return)
        return max(MEDIUM_RANGE[0] - share, share - MEDIUM_RANGE[1], 0.0)

    return min(reversed(evaluations), key=distance)


def describe(training: Training, medium_steps: int) -> dict[str, Any]:
    """Return the reference returns, and which policies are the medium and the best."""
    seeds = np.random.SeedSequence(training.seed).generate_state(2)
    episodes = rollouts(training.task, random_actions(training.task, int(seeds[0])), int(seeds[1]))
    random_return = mean_return([next(episodes) for _ in range(REFERENCE_EPISODES)])
    best = max(training.evaluations, key=lambda each: each["return"])
    training.policy(best["step"])
    # Of new episodes: the largest of many evaluations flatters.
    best_return = training.evaluate(REFERENCE_EPISODES, first_seed=20_000)
    within = [each for each in training.evaluations if each["step"] <= medium_steps]
    if not within:
        raise ValueError(f"--medium-steps {medium_steps}: the first evaluation was at {training.every} steps")
    medium = choose_medium(within, random_return, best_return)
    return {"random_return": random_return, "best_return": best_return, "medium": medium, "best": best}


def record(training: Training, about: dict[str, Any], kind: str, rows: int) -> list[Episode]:
    """Return the episodes of one kind of data set; see the top of the file."""
    if kind in ("medium-replay", "replay"):
        last = about["medium"]["step"] if kind == "medium-replay" else training.steps
        ends = np.cumsum([len(episode) for episode in training.recorder.episodes])
        return [episode for episode, end in zip(training.recorder.episodes, ends, strict=True) if end <= last]
    if kind == "mixed":
        parts = [record(training, about, part, rows // 3) for part in ("random", "medium", "expert")]
        return [episode for part in parts for episode in part]
    seed = training.seed + 1 + KINDS.index(kind)
    if kind == "random":
        return take_rows(rollouts(training.task, random_actions(training.task, seed), seed), rows)
    act = training.policy(about["medium" if kind == "medium" else "best"]["step"])
    torch.manual_seed(seed)  # the library draws actions from the global generator
    return take_rows(rollouts(training.task, act, seed), rows)


def write_minari(out: Path, dataset_id: str, task: str, episodes: Sequence[Episode], about: dict[str, Any]) -> Path:
    """Write episodes as a Minari set under `out`, compressed; returns its folder, which must not be there yet."""
    import minari
    from minari.data_collector import EpisodeBuffer

    target = out / dataset_id
    if target.exists():
        raise FileExistsError(f"{target} is there already; remove it, or take another --version")
    space = gymnasium.make(task).observation_space
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".make-") as temporary, minari_writes_to(temporary):
        minari.create_dataset_from_buffers(
            dataset_id,
            [
                EpisodeBuffer(
                    observations=episode.observations,
                    actions=episode.actions,
                    rewards=episode.rewards,
                    terminations=ending(episode, episode.terminated),
                    truncations=ending(episode, episode.truncated),
                )
                for episode in episodes
            ],
            env=task,
            observation_space=gymnasium.spaces.Box(
                space.low.astype(np.float32), space.high.astype(np.float32), dtype=np.float32
            ),
            ref_min_score=about["random_return"],
            ref_max_score=about["best_return"],
            num_episodes_average_score=REFERENCE_EPISODES,
            algorithm_name="SAC (Stable-Baselines3)",
            author="The polrl authors",
            description=about["title"],
        )
        compress(Path(temporary) / dataset_id / "data" / "main_data.hdf5")
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(Path(temporary) / dataset_id, target)
    return target


@contextlib.contextmanager
def minari_writes_to(folder: str) -> Iterator[None]:
    """Let Minari write to a folder, and spare its warnings about links and e-mail addresses."""
    name = "MINARI_DATASETS_PATH"
    before = os.environ.get(name)
    os.environ[name] = folder
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def ending(episode: Episode, ended: bool) -> np.ndarray:
    """Return flags for all steps of an episode, of which only the last may be set."""
    return np.arange(1, len(episode) + 1) == (len(episode) if ended else 0)


def compress(path: Path) -> None:
    """Write an HDF5 file anew with gzip, which Minari does not use; the data stay the same."""
    import h5py

    smaller = path.with_suffix(".part")
    with h5py.File(path) as source, h5py.File(smaller, "w", libver=("v110", "v110")) as result:
        result.attrs.update(source.attrs)
        for name in sorted(source, key=lambda each: int(each.rpartition("_")[2])):
            group = result.create_group(name)
            group.attrs.update(source[name].attrs)
            for key, values in source[name].items():
                # A short array costs less in one piece than as a compressed chunk with its index.
                packed = {"compression": "gzip", "compression_opts": 9, "shuffle": True, "chunks": values.shape}
                group.create_dataset(key, data=values[()], **(packed if values.nbytes > 1024 else {}))
    os.replace(smaller, path)


def write_manifest(folder: Path, manifest: dict[str, Any], episodes: Sequence[Episode]) -> None:
    """Write what there is to know of a set beside it: how it was made, its figures, its files' sha256."""
    returns = np.array([episode.rewards.sum(dtype=np.float64) for episode in episodes])
    files = sorted(path for path in (folder / "data").iterdir())
    figures = {
        "rows": sum(map(len, episodes)),
        "episodes": len(episodes),
        "returns": {
            "mean": returns.mean(),
            "standard_deviation": returns.std(),
            "min": returns.min(),
            "max": returns.max(),
        },
        "bytes": sum(path.stat().st_size for path in files),
        "files": {path.relative_to(folder).as_posix(): sha256(path.read_bytes()) for path in files},
    }
    write_atomic(folder / "manifest.json", json.dumps({**manifest, **figures}, indent=2) + "\n")


TITLES = {
    "random": "rollouts of random actions",
    "medium": "rollouts of the medium policy",
    "expert": "rollouts of the best policy",
    "medium-replay": "all that the training saw until the medium policy",
    "replay": "all that the training saw",
    "mixed": "rollouts, thirds random, medium and best",
}


def make_sets(options: argparse.Namespace, training: Training) -> None:
    """Cut, write and report the sets that were asked for."""
    about = describe(training, options.medium_steps or options.steps)
    packages = ("stable-baselines3", "torch", "gymnasium", "mujoco", "minari", "numpy")
    short = options.task.rpartition("-")[0].lower()
    for kind in options.kind:
        title = f"{options.task}: {TITLES[kind]}"
        episodes = record(training, about, kind, options.rows)
        if not episodes:
            raise ValueError(f"{kind}: the training ended no episode before step {about['medium']['step']}")
        identity = f"{short}/{kind}-v{options.version}"
        folder = write_minari(options.out, identity, options.task, episodes, {**about, "title": title})
        manifest = {
            "name": f"{short}-{kind}",
            "title": title,
            "kind": title,
            "form": "minari",
            "id": identity,
            "task": options.task,
            "source": "made by data/make_offline.py; no foreign data",
            "licence": {"name": "MIT", "notice": "As polrl itself; the simulators' own licences stay theirs."},
            "script": "data/make_offline.py",
            "options": shlex.join(public_options(options, kind)),
            "seed": options.seed,
            "versions": {name: importlib.metadata.version(name) for name in packages},
            "training": {
                "algorithm": "SAC",
                "settings": SETTINGS,
                "steps": training.evaluations[-1]["step"],
                "begun_at_steps": sorted({each.get("since", 0) for each in training.evaluations}),
                "return_by_step": {each["step"]: round(each["return"], 1) for each in training.evaluations},
                "medium_step": about["medium"]["step"],
                "medium_return": about["medium"]["return"],
                "best_step": about["best"]["step"],
            },
            "random_return": about["random_return"],
            "best_return": about["best_return"],
        }
        write_manifest(folder, manifest, episodes)
        print(f"{folder}: {sum(map(len, episodes)):,} rows, mean return {mean_return(episodes):.1f}", flush=True)


def public_options(options: argparse.Namespace, kind: str) -> list[str]:
    """Return the options that make this set again, without the folders of this machine."""
    words = ["--task", options.task, "--kind", kind]
    for name in ("steps", "medium_steps", "every", "rows", "seed"):
        words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return words


def positive(text: str) -> int:
    """Parse a count for the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a whole number from 1")
    return int(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="make_offline", description="Make offline data sets in Minari's form.")
    parser.add_argument("--task", default="Hopper-v5", help="gymnasium id of a task with continuous actions")
    parser.add_argument("--kind", action="append", choices=KINDS, help="kind of set; may be given several times")
    parser.add_argument("--steps", type=positive, default=150_000, help="steps of the task to train")
    parser.add_argument("--medium-steps", type=int, default=0, help="latest step of the medium policy; 0 for any")
    parser.add_argument("--every", type=int, default=0, help="steps between evaluations; 0 for a fortieth of --steps")
    parser.add_argument("--rows", type=positive, default=45_000, help="rows of a set of rollouts, up to whole episodes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--version", type=int, default=0, help="version in the set's id")
    parser.add_argument("--out", type=Path, help="folder of the sets; Minari's own folder if not given")
    parser.add_argument("--work", type=Path, help="folder of the training; one in your cache if not given")
    options = parser.parse_args(arguments)
    options.kind = options.kind or ["medium-replay"]
    options.every = options.every or max(1, options.steps // 40)
    options.out = (options.out or minari_folder()).resolve()  # Minari would take a relative path twice
    cache = Path(platformdirs.user_cache_dir("polrl", appauthor=False)) / "make_offline"
    options.work = options.work or cache / f"{options.task}-seed{options.seed}"
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parse(arguments)
    try:
        training = Training(options.task, options.seed, options.work, options.steps, options.every)
        training.run()
        make_sets(options, training)
    except (OSError, ValueError, ImportError, gymnasium.error.Error) as error:
        print(f"make_offline: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
