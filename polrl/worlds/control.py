"""Control tasks: gymnasium environments that can be saved in mid-episode and go on identically."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

# Derived from the physics, but one substep behind it; Ant and Humanoid take their next reward from them.
_POSITIONS = ("xpos", "xipos")


class ControlTask:
    """One environment with its present observation.

    Parameters
    ----------
    name : str
        A gymnasium id such as "Pendulum-v1" or "Hopper-v5".
    seed : int
        The environment's own generator starts from it, once.

    Attributes
    ----------
    observation : array, [d]
        What the next action answers to.
    episode_return : float
        Rewards of the present episode so far.
    """

    def __init__(self, name: str, seed: int) -> None:
        try:
            self.env = gymnasium.make(name)
        except gymnasium.error.DependencyNotInstalled as error:
            raise ImportError(f"{name} needs a simulator that is not installed: {error}") from error
        self.observation: npt.NDArray[Any]
        self.observation, _ = self.env.reset(seed=seed)
        self.episode_return = 0.0

    def reset(self, seed: int | None = None) -> npt.NDArray[Any]:
        """Begin a new episode; with a seed, always the same one."""
        self.observation, _ = self.env.reset(seed=seed)
        self.episode_return = 0.0
        return self.observation

    def step(self, action: Any) -> tuple[npt.NDArray[Any], float, bool, bool]:
        """Act once.

        Returns
        -------
        (array [d], float, bool, bool)
            Next observation, reward, terminated (the task's own end), truncated (the time limit).
            The caller resets after either end.
        """
        observation, reward, terminated, truncated, _ = self.env.step(action)
        self.observation = observation
        self.episode_return += float(reward)
        return observation, float(reward), terminated, truncated

    def _layers(self) -> list[Any]:
        layers, layer = [], self.env
        while layer is not self.env.unwrapped:
            layers.append(layer)
            layer = layer.env  # type: ignore[attr-defined]
        return layers

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the episode depends on."""
        raw: Any = self.env.unwrapped
        names = ("_elapsed_steps", "_has_reset")
        state = {
            "observation": self.observation,
            "episode_return": self.episode_return,
            "wrappers": [{n: getattr(layer, n) for n in names if hasattr(layer, n)} for layer in self._layers()],
            "random": raw.np_random.bit_generator.state,
        }
        if _is_mujoco(raw):
            import mujoco

            kind = int(mujoco.mjtState.mjSTATE_INTEGRATION)
            physics = np.empty(mujoco.mj_stateSize(raw.model, kind))
            mujoco.mj_getState(raw.model, raw.data, physics, kind)
            state["physics"] = physics
            state["positions"] = {name: np.array(getattr(raw.data, name)) for name in _POSITIONS}
        else:
            state["attributes"] = {name: value for name, value in vars(raw).items() if _is_plain(value)}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` of the same task returned."""
        raw: Any = self.env.unwrapped
        self.observation = np.array(state["observation"])
        self.episode_return = state["episode_return"]
        for layer, attributes in zip(self._layers(), state["wrappers"], strict=True):
            for name, value in attributes.items():
                setattr(layer, name, value)
        raw.np_random.bit_generator.state = state["random"]
        if "physics" in state:
            import mujoco

            kind = int(mujoco.mjtState.mjSTATE_INTEGRATION)
            # No mj_forward here: it would change the solver's warm start, and the next step with it.
            mujoco.mj_setState(raw.model, raw.data, np.array(state["physics"]), kind)
            for name, value in state["positions"].items():
                getattr(raw.data, name)[:] = value
        else:
            for name, value in state["attributes"].items():
                setattr(raw, name, value)


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(item) for item in value)
    return isinstance(value, bool | int | float | np.ndarray | np.generic | None)


def _is_mujoco(raw: Any) -> bool:
    return type(getattr(raw, "data", None)).__name__ == "MjData"
