"""Demonstrations for control: pendulums swung up by a demonstrator who knows how, but is weak, late and unsteady.

Gymnasium's Pendulum-v1 hangs from a hinge; a torque of at most 2 N m cannot lift it at once, so it has to swing to and
fro. The demonstrator pumps energy until there is enough of it to stand, then balances. From rest it begins to the left
or to the right, as chance will have it: the mean of the two, no torque at all, would be of no use, and a policy that
learns from the demonstrations has to be able to hold both. Its torque is limited below the task's, and shakes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from polrl.core.errors import KnobError
from polrl.worlds.control import ControlTask

TASK = "Pendulum-v1"
TORQUE = 2.0  # the task's limit, N m
STEPS = 200  # the task's time limit
_STRENGTH, _SHAKE = 1.0, 0.6  # the demonstrator's limit and standard deviation of its noise, N m
_STANDING = 5.0  # energy of the pendulum that stands still, J


@dataclass(frozen=True)
class Demonstrations:
    """Whole episodes on one device; learners share them, so they are not to be changed in place.

    Attributes
    ----------
    observations : Tensor, float32 [E, T, 3]
        Cosine and sine of the angle (0 stands upright), and the angular velocity in rad/s.
    actions : Tensor, float32 [E, T, 1]
        Torque as a share of the task's limit, from -1 to 1.
    returns : Tensor, float32 [E]
    """

    observations: torch.Tensor
    actions: torch.Tensor
    returns: torch.Tensor

    def windows(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return every observation [M, 3] with the `length` actions that follow it, in a row [M, length].

        Raises
        ------
        KnobError
            If no episode is that long.
        """
        steps = self.actions.shape[1]
        if not 1 <= length <= steps:
            raise KnobError(f"a window of {length!r} actions; allowed: 1 to the {steps} steps of an episode")
        following = self.actions.unfold(1, length, 1).flatten(2)  # [E, T - length + 1, length]
        return self.observations[:, : steps - length + 1].flatten(0, 1), following.flatten(0, 1)


def load_demonstrations(episodes: int = 20, device: str | torch.device = "cpu") -> Demonstrations:
    """Return the first so many demonstrations, always the same; they are played when first asked for.

    Parameters
    ----------
    episodes : int
        From 1 to 1,000; 200 steps each.
    device : str or torch.device

    Raises
    ------
    KnobError
        If `episodes` is out of range.
    ImportError
        If gymnasium's classic control is not installed.

    Examples
    --------
    >>> load_demonstrations(2).actions.shape
    torch.Size([2, 200, 1])
    """
    if isinstance(episodes, bool) or not isinstance(episodes, int) or not 1 <= episodes <= 1000:
        raise KnobError(f"episodes={episodes!r}; allowed: a whole number from 1 to 1000")
    return _load(episodes, str(torch.device(device)))


@lru_cache(maxsize=8)
def _load(episodes: int, device: str) -> Demonstrations:
    task = ControlTask(TASK, seed=0)
    played = [_episode(task, number) for number in range(episodes)]
    columns = [
        torch.tensor(np.stack(column), dtype=torch.float32, device=device) for column in zip(*played, strict=True)
    ]
    return Demonstrations(*columns)


def _episode(task: ControlTask, number: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float]:
    """Play one episode; its number decides where it begins, and everything else."""
    rng = np.random.default_rng([7, number])
    side = rng.choice([-1.0, 1.0])
    task.reset(seed=number)
    observations, actions = [], []
    for _ in range(STEPS):
        observations.append(task.observation)
        torque = np.clip(_intended(task.observation, side) + _SHAKE * rng.standard_normal(), -_STRENGTH, _STRENGTH)
        actions.append([torque / TORQUE])
        task.step(np.array([torque], dtype=np.float32))
    return np.stack(observations), np.array(actions), task.episode_return


def _intended(observation: npt.NDArray[np.float64], side: float) -> float:
    """Return the torque that a demonstrator wants: balance near the top, elsewhere swing until there is energy."""
    cosine, sine, velocity = (float(value) for value in observation)
    angle = float(np.arctan2(sine, cosine))
    energy = velocity**2 / 6 + 5 * cosine
    if abs(angle) < 0.6 and abs(velocity) < 3.0:
        return -8.0 * angle - 1.5 * velocity
    direction = side if abs(velocity) < 0.2 else np.sign(velocity)
    return float(np.clip(1.5 * (_STANDING - energy), -_STRENGTH, _STRENGTH) * direction)
