"""Pictures that the chapter's methods share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polrl import Histogram, Lines, Points, View
from polrl.offline._td3 import OfflineActorCritic
from polrl.offline._trials import LineTrial
from polrl.worlds.line_world import walk


def line_grid(learner: OfflineActorCritic[Any]) -> Tensor:
    """Return the places [91, 1] from 0 to 9 at which the line world is drawn."""
    return torch.linspace(0, 9, 91, device=learner.device).unsqueeze(1)


def policy_picture(learner: OfflineActorCritic[Any], targets: Tensor | None = None, name: str = "") -> View:
    """Draw the policy's actions over the data's, and the actions to which it is pulled at the same states.

    Parameters
    ----------
    learner : OfflineActorCritic
    targets : Tensor, [91 or 300, da], optional
        At the states that `shown_states` returns; named `name` in the picture.
    """
    raw = learner.data.observations * learner.divisor + learner.mean
    logged = learner.data.actions
    seen = shown_states(learner)
    acted = learner.act(seen)
    some = slice(None, None, max(1, len(logged) // 600))
    if isinstance(learner.trial, LineTrial):
        groups = {"diary": _pairs(raw[some, 0], logged[some, 0])}
        groups |= {} if targets is None else {name: _pairs(seen[:, 0], targets[:, 0])}
        return Points(
            title="Where the policy goes, over the diary",
            alt="Each logged action at its place on the line, and the policy's action at every place",
            groups={**groups, "policy": _pairs(seen[:, 0], acted[:, 0])},
            x_label="place on the line (goal from 9 on)",
            y_label="action",
            x_range=(0, 9),
            y_range=(-1.1, 1.1),
        )
    first, second = (0, 1) if logged.shape[1] > 1 else (0, 0)
    reach = 1.1 * float(learner.a_max.max())

    def plane(states: Tensor, actions: Tensor) -> Any:
        return _pairs(actions[:, 0], actions[:, 1]) if second else _pairs(states[:, first], actions[:, 0])

    groups = {"data": plane(raw[some], logged[some])}
    groups |= {} if targets is None else {name: plane(seen, targets)}
    return Points(
        title="The policy's actions over the data's",
        alt="A cloud of logged actions, and the policy's actions at states of the data",
        groups={**groups, "policy": plane(seen, acted)},
        x_label="action, first component" if second else "state, first component",
        y_label="action, second component" if second else "action",
        y_range=(-reach, reach),
    )


def shown_states(learner: OfflineActorCritic[Any]) -> Tensor:
    """Return the states [n, ds] that pictures show, in the task's own units: the line, or 300 states of the data."""
    if isinstance(learner.trial, LineTrial):
        return line_grid(learner)
    rows = torch.linspace(0, len(learner.data) - 1, 300, device=learner.device).long()
    return learner.data.observations[rows] * learner.divisor + learner.mean


def values_picture(learner: OfflineActorCritic[Any]) -> View:
    """Draw what the critic promises against what comes; outside the line world, against the logged actions' values."""
    seen = shown_states(learner)
    promised = learner.value(seen)
    if isinstance(learner.trial, LineTrial):
        came, _ = walk(learner.act, seen[:, 0], learner.trial.steps, learner.config.discount)
        return Lines(
            title="What the critic promises, and what comes",
            alt="At every place the critic's value of the policy's action, and the return of walking on from there",
            x=seen[:, 0].cpu().numpy(),
            y={"promised": promised.cpu().numpy(), "return": came.cpu().numpy()},
            x_label="place on the line",
            y_label="discounted return",
        )
    s = (seen - learner.mean) / learner.divisor
    rows = torch.linspace(0, len(learner.data) - 1, 300, device=learner.device).long()
    gain = promised - learner.critic.first(s, learner.data.actions[rows])
    low, high = (float(x) for x in gain.cpu().aminmax())
    edges = torch.linspace(low - 1e-3, high + 1e-3, 31)
    return Histogram(
        title="What the policy's action promises beyond the logged one",
        alt="How often the critic values the policy's action by how much above the logged action",
        edges=edges.numpy(),
        counts={"data states": (torch.histogram(gain.cpu(), edges).hist / 300).numpy()},
        x_label="difference of Q",
    )


def _pairs(x: Tensor, y: Tensor) -> Any:
    return torch.stack([x, y], dim=1).cpu().numpy()
