"""The chapter's problems: a data set, and the task in which the policy that was learned from it is tried."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polrl.core.errors import DataError, UnknownNameError, unknown_name
from polrl.worlds.control import ControlTask
from polrl.worlds.line_world import line_diary, walk
from polrl.worlds.offline_data import OfflineData, dataset_names, load_offline

Policy = Callable[[Tensor], Tensor]
LINE = "line-diary"


@dataclass(frozen=True)
class Trial:
    """What came of some episodes.

    Attributes
    ----------
    starts : Tensor, [n, ds]
        The first observation of each, in the task's own units.
    discounted : Tensor, [n]
        Their discounted returns.
    scores : dict
        "score": 0 to 100 in the line world (goals reached), normalised (0 random, 100 the best known) elsewhere,
        left out where the data set has no references; "mean_return", undiscounted, outside the line world.
    """

    starts: Tensor
    discounted: Tensor
    scores: dict[str, Tensor | float]


class LineTrial:
    """Twenty walks of at most 40 steps, from places spread over [0, 5]."""

    steps = 40

    def __init__(self, device: torch.device) -> None:
        self.starts = torch.linspace(0, 5, 20, device=device)

    @torch.no_grad()
    def play(self, policy: Policy, discount: float) -> Trial:
        """Let a policy walk; the score is the percentage of walks that reach the goal."""
        discounted, arrived = walk(policy, self.starts, self.steps, discount)
        return Trial(self.starts.unsqueeze(1), discounted, {"score": 100 * arrived.mean()})


class TaskTrial:
    """Three episodes of a gymnasium task, side by side, always from the same three seeds."""

    def __init__(self, data: OfflineData) -> None:
        self.data, self.tasks = data, [ControlTask(data.task, seed) for seed in range(3)]

    @torch.no_grad()
    def play(self, policy: Policy, discount: float) -> Trial:
        """Let a policy act to the end of each episode, or to the task's time limit."""
        device = self.data.observations.device
        observations: list[Any] = [task.reset(seed=seed) for seed, task in enumerate(self.tasks)]
        starts = torch.tensor(np.array(observations), dtype=torch.float32, device=device)
        discounted, going, weight = np.zeros(len(self.tasks)), [True] * len(self.tasks), 1.0
        while any(going):
            seen = torch.tensor(np.array(observations), dtype=torch.float32, device=device)
            actions = policy(seen).cpu().numpy()
            for i, task in enumerate(self.tasks):
                if going[i]:
                    observations[i], reward, terminated, truncated = task.step(actions[i])
                    discounted[i] += weight * reward
                    going[i] = not (terminated or truncated)
            weight *= discount
        mean_return = float(np.mean([task.episode_return for task in self.tasks]))
        scores: dict[str, Tensor | float] = {"mean_return": mean_return}
        if np.isfinite(self.data.random_return + self.data.best_return):
            scores["score"] = float(self.data.normalized_score(mean_return))
        return Trial(starts, torch.tensor(discounted, dtype=torch.float32, device=device), scores)


def load_problem(name: str, rows: int, seed: int, device: torch.device) -> tuple[OfflineData, LineTrial | TaskTrial]:
    """Return a data set by name, states as they were recorded, and the trials that belong to it.

    Parameters
    ----------
    name : str
        "line-diary", or what `load_offline` takes.
    rows, seed : int
        Length of the line world's diary, and which diary it is.

    Raises
    ------
    UnknownNameError
        If there is no such data set; the nearest names are suggested.
    DataError
        If the data set does not name its task, or its actions are not bounded alike on both sides.
    """
    if name == LINE:
        return line_diary(rows, seed, str(device)), LineTrial(device)
    try:
        data = load_offline(name, device)
    except UnknownNameError:
        if difflib.get_close_matches(name, [LINE], cutoff=0.5):
            raise unknown_name("data set", name, [LINE, *dataset_names()]) from None
        raise
    if not data.task:
        raise DataError(f"the data set {name} does not say in which task its policy can be tried")
    if not bool((data.action_low == -data.action_high).all() and data.action_high.isfinite().all()):
        raise DataError(
            f"actions must be bounded alike on both sides, those of {name} are from {data.action_low.tolist()} to "
            f"{data.action_high.tolist()}"
        )
    return data, TaskTrial(data)
