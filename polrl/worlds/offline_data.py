"""Offline data sets: transitions that somebody else's policy recorded, in Minari's form, for offline RL.

Three sets come with polrl, small ones; data/README.md tells how they were made and `polrl data` makes larger ones.
Every other Minari set with one flat observation and one flat action is read too: by its id, if it lies in the Minari
folder, or by its path.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polrl.core.data import included_sets, local_minari_sets, minari_folder
from polrl.core.errors import DataError, UnknownNameError, unknown_name
from polrl.core.files import read_checked

# A float64 action that was rounded to float32 may lie this much, times its bound, outside.
_ROUNDING = 1e-5


@dataclass(frozen=True, eq=False)
class OfflineData:
    """Transitions as float32 tensors on one device; learners share them, so they are not to be changed in place.

    Attributes
    ----------
    observations, next_observations : torch.Tensor, [N, ds]
        s and s', row by row, episode after episode.
    actions : torch.Tensor, [N, da]
    rewards : torch.Tensor, [N]
    terminals : torch.Tensor, [N]
        1 where the task itself ended, so that s' has no value; 0 everywhere else, also where the time limit cut.
    episode_starts, episode_ends : torch.Tensor, int64 [E]
        First row of each episode, and the row after its last.
    name : str
        Such as "hopper-medium-replay".
    task : str
        The gymnasium id of the task, such as "Hopper-v5"; "" if the set does not say.
    action_low, action_high : torch.Tensor, [da]
        Bounds of the action space.
    random_return, best_return : float
        Mean returns of random actions and of the best policy known, for `normalized_score`; NaN if not known.
    """

    observations: torch.Tensor
    actions: torch.Tensor
    rewards: torch.Tensor
    next_observations: torch.Tensor
    terminals: torch.Tensor
    episode_starts: torch.Tensor
    episode_ends: torch.Tensor
    name: str
    task: str
    action_low: torch.Tensor
    action_high: torch.Tensor
    random_return: float = float("nan")
    best_return: float = float("nan")

    def __len__(self) -> int:
        return len(self.rewards)

    def normalized_score(self, returns: Any) -> Any:
        """Return 100 (R - R_random) / (R_best - R_random): 0 for random actions, 100 for the best policy known.

        Parameters
        ----------
        returns : float, array or torch.Tensor
            Undiscounted returns of episodes, in the task's own units.

        Raises
        ------
        DataError
            If the set has no reference returns, or two equal ones.
        """
        span = self.best_return - self.random_return
        if not np.isfinite(span) or span == 0.0:
            raise DataError(
                f"the data set {self.name} has no two reference returns to normalize with "
                f"(random {self.random_return}, best {self.best_return}); take the returns as they are"
            )
        return 100.0 * (returns - self.random_return) / span

    def standardized(self, epsilon: float = 1e-3) -> tuple[OfflineData, torch.Tensor, torch.Tensor]:
        """Standardize the states, (s - mean) / (std + epsilon), feature by feature.

        Returns
        -------
        (OfflineData, torch.Tensor [ds], torch.Tensor [ds])
            The set with both kinds of observations mapped, the mean, and the divisor std + epsilon, where std is the
            biased one over `observations`: a policy trained on the set is to be given (s - mean) / divisor.
        """
        # In float64: the sum of 10^6 float32 values of one sign loses digits.
        mean = self.observations.double().mean(dim=0).float()
        divisor = self.observations.double().std(dim=0, correction=0).float() + epsilon
        mapped = dataclasses.replace(
            self,
            observations=(self.observations - mean) / divisor,
            next_observations=(self.next_observations - mean) / divisor,
        )
        return mapped, mean, divisor

    def episode_returns(self) -> torch.Tensor:
        """Return the undiscounted return of each episode, [E]."""
        return self.monte_carlo_returns(1.0)[self.episode_starts]

    def monte_carlo_returns(self, discount: float) -> torch.Tensor:
        r"""Return the discounted return from each row to the end of its episode, [N].

        .. math:: G_t = \sum_{k \ge t} \gamma^{k-t} r_k

        Where the time limit cut an episode, the rewards that would have followed are missing.
        """
        rewards = self.rewards.double()
        returns = torch.empty_like(rewards)
        lengths, order = torch.sort(self.episode_ends - self.episode_starts, descending=True)
        ends = self.episode_ends[order]
        following = torch.zeros(len(ends), dtype=torch.float64, device=rewards.device)
        # All episodes at once, from their last rows backwards; those with so many rows stand first.
        longest = int(lengths[0])
        backwards = torch.arange(1, longest + 1, device=lengths.device)
        for back, count in enumerate((lengths >= backwards[:, None]).sum(dim=1).tolist(), start=1):
            rows = ends[:count] - back
            following[:count] = rewards[rows] + discount * following[:count]
            returns[rows] = following[:count]
        return returns.float()


def dataset_names() -> tuple[str, ...]:
    """Return the names of the offline data sets that come with polrl."""
    return tuple(sorted(entry.name for entry in included_sets() if entry.form == "minari"))


def load_offline(name: str, device: str | torch.device = "cpu") -> OfflineData:
    """Load an offline data set; the same arguments give the same tensors again.

    Parameters
    ----------
    name : str
        A set that comes with polrl, such as "hopper-medium-replay" (see `dataset_names`); or the id of a set in the
        Minari folder, such as "mujoco/hopper/medium-v0"; or the path of a set's folder.
    device : str or torch.device
        Where the tensors shall lie.

    Raises
    ------
    UnknownNameError
        If there is no such set; names the nearest.
    DataError
        If the set is truncated, altered or empty, has arrays that do not fit each other, values that are not finite
        or actions out of bounds.
    ImportError
        If Minari or h5py is not installed.

    Examples
    --------
    >>> data = load_offline("pendulum-mixed")
    >>> data.observations.shape[1], data.actions.shape[1]
    (3, 1)
    """
    folder, known_as, files = _find(name)
    content = folder / "data"
    # A set of one's own may be made anew under the same name.
    stamp = tuple((path.name, path.stat().st_mtime_ns) for path in sorted(content.glob("*")))
    return _load(known_as, folder, tuple(files.items()), stamp, str(torch.device(device)))


def _find(name: str) -> tuple[Path, str, Mapping[str, str]]:
    """Return a set's folder, the name it goes by, and the sha256 of its files if a manifest tells."""
    entries = included_sets()
    included = {entry.name: entry for entry in entries if entry.form == "minari"}
    if name in included:
        return included[name].folder, name, included[name].files
    own = minari_folder() / name
    for entry in included.values():
        if name == entry.id and not (own / "data").is_dir():
            return entry.folder, entry.name, entry.files
    for folder in (own, Path(name).expanduser()):
        if name and (folder / "data").is_dir():
            return folder.resolve(), name, {}
    local = [entry.id for entry in local_minari_sets()]
    words = [str(unknown_name("data set", name, [*included, *local]))]
    if re.search(r"-v\d+$", name):
        words.append(f"an official Minari set is fetched by: polrl data fetch {name}")
    # The set meant may be one whose own name can't be read.
    words += [entry.problem for entry in entries if entry.problem]
    raise UnknownNameError("; ".join(words))


@lru_cache(maxsize=8)
def _load(name: str, folder: Path, files: tuple[tuple[str, str], ...], stamp: object, device: str) -> OfflineData:
    for file, expected in files:
        read_checked(folder / file, expected)
    try:
        importlib.import_module("h5py")  # Minari itself asks for it only when it reads
        from minari.dataset.minari_storage import MinariStorage
    except ImportError as error:
        raise ImportError(
            f'the data set {name} needs Minari and h5py ({error}): pip install "polrl[course]"'
        ) from error
    try:
        storage = MinariStorage.read(folder / "data")
        metadata = storage.read_raw_metadata(folder / "data")
        episodes = list(storage.get_episodes(range(storage.total_episodes)))
        spaces = storage.observation_space, storage.action_space
        task = str(json.loads(metadata.get("env_spec") or "{}").get("id", ""))
        references = [float(metadata.get(key, "nan")) for key in ("ref_min_score", "ref_max_score")]
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, AssertionError, AttributeError) as error:
        raise DataError(
            f"the data set {name} in {folder} can't be read: {error!r}; it was truncated or altered, or is no Minari "
            "set: fetch it or make it anew (polrl data --help)"
        ) from error
    arrays = _join(name, episodes, *spaces)

    def tensor(values: Any) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, np.float32), device=device)

    return OfflineData(
        observations=tensor(arrays["observations"]),
        actions=tensor(arrays["actions"]),
        rewards=tensor(arrays["rewards"]),
        next_observations=tensor(arrays["next_observations"]),
        terminals=tensor(arrays["terminations"]),
        episode_starts=torch.as_tensor(arrays["starts"], device=device),
        episode_ends=torch.as_tensor(arrays["ends"], device=device),
        name=name,
        task=task,
        action_low=tensor(spaces[1].low),
        action_high=tensor(spaces[1].high),
        random_return=references[0],
        best_return=references[1],
    )


def _join(name: str, episodes: list[dict[str, Any]], observation_space: Any, action_space: Any) -> dict[str, Any]:
    """Check the episodes and lay them end to end."""
    if not episodes:
        raise DataError(f"the data set {name} is empty: it has no episode")
    widths = {"observations": _width(name, "observation", observation_space)}
    widths["actions"] = _width(name, "action", action_space)
    for index, episode in enumerate(episodes):
        _check_shapes(f"the data set {name}, episode {index}", episode, widths)
    lengths = np.array([len(episode["rewards"]) for episode in episodes], dtype=np.int64)
    ends = np.cumsum(lengths)
    arrays: dict[str, Any] = {"starts": ends - lengths, "ends": ends}
    for key in ("actions", "rewards", "terminations"):
        arrays[key] = np.concatenate([episode[key] for episode in episodes])
    observations = [np.asarray(episode["observations"]) for episode in episodes]
    arrays["observations"] = np.concatenate([seen[:-1] for seen in observations])
    arrays["next_observations"] = np.concatenate([seen[1:] for seen in observations])
    _check_values(name, arrays, action_space)
    return arrays


def _width(name: str, kind: str, space: Any) -> int:
    shape = getattr(space, "shape", None)
    if not hasattr(space, "low") or shape is None or len(shape) != 1:
        raise DataError(f"the data set {name} has the {kind} space {space}; allowed: a flat box, such as Box(3,)")
    return int(shape[0])


def _check_shapes(place: str, episode: Mapping[str, Any], widths: Mapping[str, int]) -> None:
    steps = len(episode["rewards"])
    if steps == 0:
        raise DataError(f"{place} is empty: it has no step")
    expected = {
        "observations": (steps + 1, widths["observations"]),
        "actions": (steps, widths["actions"]),
        "rewards": (steps,),
        "terminations": (steps,),
        "truncations": (steps,),
    }
    for key, shape in expected.items():
        found = np.shape(episode[key])
        if found != shape:
            raise DataError(
                f"{place}: {key} has the shape {found}, expected {shape}: there are {steps} rewards, and an episode "
                "has as many actions, and one observation more"
            )


def _check_values(name: str, arrays: Mapping[str, Any], action_space: Any) -> None:
    for key in ("observations", "next_observations", "actions", "rewards"):
        values = arrays[key].reshape(len(arrays[key]), -1)
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(bad):
            row = values[bad[0]]
            raise DataError(
                f"the data set {name}: {key} holds {row[~np.isfinite(row)][0]} in {_place(arrays, bad[0])} "
                f"({len(bad):,} such rows): fetch it or make it anew"
            )
    actions = arrays["actions"].astype(np.float64)
    low, high = (np.asarray(bound, np.float64) for bound in (action_space.low, action_space.high))
    beyond = np.maximum(low - actions, actions - high)
    allowed = _ROUNDING * np.maximum(1.0, np.maximum(np.abs(low), np.abs(high)))
    # An action space without a bound has infinite ones.
    beyond = np.where(np.isfinite(beyond), beyond - np.where(np.isfinite(allowed), allowed, 0.0), -np.inf)
    row, column = np.unravel_index(np.argmax(beyond), beyond.shape)
    if beyond[row, column] > 0.0:
        raise DataError(
            f"the data set {name}: action {actions[row, column]:g} in {_place(arrays, row)}, component {column}, is "
            f"out of the action space's bounds {low[column]:g} to {high[column]:g}"
        )


def _place(arrays: Mapping[str, Any], row: Any) -> str:
    episode = int(np.searchsorted(arrays["ends"], row, side="right"))
    return f"row {int(row)} (episode {episode}, step {int(row - arrays['starts'][episode])})"
