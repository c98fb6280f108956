"""The pendulums of `diffusion_policy`: many at once, moved by chunks of actions."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from polrl.worlds.control import ControlTask
from polrl.worlds.demonstrations import TASK, TORQUE


class Outcome(NamedTuple):
    """What became of one chunk in each of n environments.

    Attributes
    ----------
    reward : Tensor, float32 [n]
        Summed over the chunk.
    terminated, truncated : Tensor, bool [n]
        Whether the episode ended within the chunk, by the task or by its time limit.
    last : Tensor, float32 [n, d]
        The observation after the chunk, before an ended episode begins anew.
    """

    reward: torch.Tensor
    terminated: torch.Tensor
    truncated: torch.Tensor
    last: torch.Tensor


class Pendulums:
    """Environments side by side, each with a generator and a state of its own.

    Parameters
    ----------
    count : int
    seed : int
        The environments start from seed, seed + 1, ...
    device : torch.device
        Of what comes out.
    """

    def __init__(self, count: int, seed: int, device: torch.device) -> None:
        self.tasks = [ControlTask(TASK, seed + number) for number in range(count)]
        self.device = device

    def reset(self, seed: int) -> None:
        """Begin all episodes anew, always the same ones for one seed."""
        for number, task in enumerate(self.tasks):
            task.reset(seed=seed + number)

    def observe(self) -> torch.Tensor:
        """Return the present observations, float32 [n, d]."""
        return self._tensor([task.observation for task in self.tasks])

    def play(self, chunks: torch.Tensor) -> Outcome:
        """Act out a chunk of actions [n, T_a], shares of the torque limit, in each; ended episodes begin anew."""
        results = [_play_one(task, actions) for task, actions in zip(self.tasks, chunks.cpu().numpy(), strict=True)]
        reward, terminated, truncated, last = zip(*results, strict=True)
        return Outcome(
            self._tensor(reward),
            torch.tensor(terminated, device=self.device),
            torch.tensor(truncated, device=self.device),
            self._tensor(last),
        )

    def _tensor(self, rows: Any) -> torch.Tensor:
        return torch.tensor(np.array(rows), dtype=torch.float32, device=self.device)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every environment."""
        return {"tasks": [task.state_dict() for task in self.tasks]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        for task, saved in zip(self.tasks, state["tasks"], strict=True):
            task.load_state_dict(saved)


def _play_one(task: ControlTask, actions: np.ndarray[Any, Any]) -> tuple[float, bool, bool, Any]:
    total, terminated, truncated = 0.0, False, False
    for action in actions:
        _, reward, terminated, truncated = task.step(np.array([TORQUE * action], dtype=np.float32))
        total += reward
        if terminated or truncated:
            break
    last = task.observation
    if terminated or truncated:
        task.reset()
    return total, terminated, truncated, last
