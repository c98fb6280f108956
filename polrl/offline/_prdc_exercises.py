"""The checks of PRDC's three exercises."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from polrl.core.exercise import Case, Feedback, check
from polrl.offline.prdc import nearest_index

Tensor = torch.Tensor


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _actions(*shape: int, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


# ---- exercise 1 ----------------------------------------------------------------------------------------------


def _squares(x: Tensor, data: Tensor) -> Tensor:
    """Return the squared distances [B, N]."""
    return (x.unsqueeze(1) - data).pow(2).sum(dim=2)


def _nearest(
    distance: Callable[[Tensor, Tensor, float], Tensor] = lambda state, action, beta: beta**2 * state + action,
    take: Callable[[Tensor, Tensor, int], Tensor] = lambda order, data_a, k: data_a[order[:, k - 1]],
) -> Callable[..., Tensor]:
    """Return an answer to exercise 1, from a distance of squared parts and from what is done with the order."""

    def answer(states: Tensor, pi: Tensor, data_s: Tensor, data_a: Tensor, beta: float, k: int) -> Tensor:
        distances = distance(_squares(states, data_s), _squares(pi, data_a), beta)
        return take(distances.argsort(dim=1, stable=True), data_a, k)

    return answer


_NEAREST_MISTAKES: dict[str, Callable[..., Tensor]] = {
    "beta multiplies the states before they are squared: its square stands before their squared distance.": _nearest(
        lambda state, action, beta: beta * state + action
    ),
    "The states are left out: the neighbour must be near as a pair.": _nearest(lambda state, action, beta: action),
    "The actions are left out: this is the nearest state, and at a logged state that is cloning.": _nearest(
        lambda state, action, beta: state
    ),
    "beta weighs the actions here; it belongs to the states.": _nearest(
        lambda state, action, beta: state + beta**2 * action
    ),
    "The two distances are added; in the joint space their squares are.": _nearest(
        lambda state, action, beta: beta * state.sqrt() + action.sqrt()
    ),
    "This is the farthest pair.": _nearest(lambda state, action, beta: -(beta**2 * state + action)),
    "This is the mean of the k nearest actions; k names one row, the k-th.": _nearest(
        take=lambda order, data_a, k: data_a[order[:, :k]].mean(dim=1)
    ),
    "k counts from 1: the nearest row is the first.": _nearest(
        take=lambda order, data_a, k: data_a[order[:, min(k, order.shape[1] - 1)]]
    ),
    "k is ignored: take the k-th nearest row.": _nearest(take=lambda order, data_a, k: data_a[order[:, 0]]),
}


def check_nearest_actions(function: Any) -> Feedback:
    """Judge exercise 1, `nearest_actions(states, pi, data_s, data_a, beta, k)`: the actions of E2's rows.

    Parameters
    ----------
    function : callable
        Of states [B, ds] and the policy's actions [B, da], the logged states [N, ds] and actions [N, da], beta and k;
        returns the action of the k-th nearest logged pair [B, da]. All float64.
    """
    cases = []
    shapes = ((12, 20, 1, 1, 2.0, 1), (8, 30, 2, 1, 0.5, 2), (20, 60, 3, 2, 2.0, 3), (200, 150, 3, 2, 0.7, 1))
    for batch, rows, ds, da, beta, k in shapes:
        states, pi = _normal(batch, ds, seed=1), _actions(batch, da, seed=2)
        data_s, data_a = _normal(rows, ds, seed=3), _actions(rows, da, seed=4)
        expected = data_a[nearest_index(states, pi, data_s, data_a, beta, k)]
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(5))
        for s, a in ((data_s, data_a), (data_s[order], data_a[order])):
            arguments = {"states": states, "pi": pi, "data_s": s, "data_a": a, "beta": beta, "k": k}
            cases.append(Case(arguments, {"actions": expected}, _NEAREST_MISTAKES))
    return check(
        function,
        cases,
        hint="All squared distances at once: (states[:, None] - data_s) has the shape [B, N, ds]; then argsort.",
        praise="A KD-tree finds the same rows faster, but has beta in it: turn the knob, and it must be built anew.",
    )


# ---- exercise 2 ----------------------------------------------------------------------------------------------


def _loss(
    size: Callable[[Tensor], Tensor] = lambda q: q.abs().mean().detach(),
    sign: float = -1.0,
    mean: Callable[[Tensor], Tensor] = Tensor.mean,
    constraint: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
    target_of: Callable[[Tensor], Tensor] = Tensor.detach,
    weigh: Callable[[float], tuple[float, float]] = lambda alpha: (alpha, 1.0),
) -> Callable[..., Tensor]:
    """Return an answer to exercise 2 with one of its parts replaced."""

    def answer(q: Tensor, pi: Tensor, target: Tensor, alpha: float) -> Tensor:
        critic, data = weigh(alpha)
        return sign * critic / size(q) * mean(q) + data * constraint(pi, target_of(target))

    return answer


_LOSS_MISTAKES: dict[str, Callable[..., Tensor]] = {
    "The sign of Q is wrong: the optimizer goes downhill, and Q shall grow.": _loss(sign=1.0),
    "A gradient passes through the scale of Q: it is a constant, detach it.": _loss(size=lambda q: q.abs().mean()),
    "The scale is the mean of |Q|, not of Q: where Q has both signs, its mean may be close to 0.": _loss(
        size=lambda q: q.mean().detach()
    ),
    "The scale is |mean Q| and not the mean of |Q|.": _loss(size=lambda q: q.mean().abs().detach()),
    "Q is not divided by its mean size: alpha would mean something else in every task.": _loss(
        size=lambda q: torch.ones_like(q[0])
    ),
    "Q is summed; E5 takes its mean.": _loss(mean=Tensor.sum),
    "alpha weighs the constraint here; it belongs to Q.": _loss(weigh=lambda alpha: (1.0, alpha)),
    "The squares are summed over the action's dimensions; E4 is a mean over batch and dimensions.": _loss(
        constraint=lambda p, t: (p - t).pow(2).sum(dim=1).mean()
    ),
    "The squares are summed; E4 is a mean over batch and dimensions.": _loss(
        constraint=lambda p, t: (p - t).pow(2).sum()
    ),
    "The distance is not squared: this is E3, what is built is E4.": _loss(
        constraint=lambda p, t: (p - t).norm(dim=1).mean()
    ),
    "A gradient passes to the neighbour's action: it is data, detach it.": _loss(target_of=lambda t: t),
}


def check_prdc_actor_loss(function: Any) -> Feedback:
    """Judge exercise 2, `prdc_actor_loss(q, pi, target, alpha)`: E4 to E6.

    Parameters
    ----------
    function : callable
        Of values Q_1(s, pi(s)) [B], the policy's actions and the neighbours' [B, da] and alpha; returns a scalar.
    """
    cases = []
    # Values of both signs with a mean below 0: their mean, its size and their mean size differ.
    values = torch.tensor([-2.0, 0.5, 0.9, -1.1, 0.3, -0.7, -1.6, 1.2], dtype=torch.float64)
    for batch, da, alpha, factor in ((2, 1, 1.0, 1.0), (3, 2, 0.5, 1.0), (3, 2, 0.5, 7.0), (8, 3, 2.5, -1.0)):
        q, pi, target = factor * values[:batch], _actions(batch, da, seed=2), _actions(batch, da, seed=3)
        q_leaf, pi_leaf = q.clone().requires_grad_(), pi.clone().requires_grad_()
        loss = _loss()(q_leaf, pi_leaf, target, alpha)
        by_q, by_pi = torch.autograd.grad(loss, (q_leaf, pi_leaf))
        expected = {
            "loss": loss.detach(),
            "gradient by q": by_q,
            "gradient by pi": by_pi,
            "gradient by target": torch.zeros_like(target),
        }
        cases.append(Case({"q": q, "pi": pi, "target": target, "alpha": alpha}, expected, _LOSS_MISTAKES))
    return check(
        function,
        cases,
        hint="Minus alpha times the mean of q over the (detached) mean of |q|, plus the mean squared distance.",
        praise="Seven times the Q, the same loss: only the order of the actions that Q prefers is left.",
    )


# ---- exercise 3 ----------------------------------------------------------------------------------------------


def _exact_limit(states: Tensor, pi: Tensor, actions: Tensor) -> Tensor:
    """Return identity 2's threshold, a scalar."""
    return _thresholds(states, pi, actions).max()


def _gains(pi: Tensor, actions: Tensor) -> Tensor:
    """Return how much nearer to pi_i the action of row j is than that of row i, squared [N, N]."""
    return _squares(pi, actions).diagonal().unsqueeze(1) - _squares(pi, actions)


def _gaps(states: Tensor) -> Tensor:
    """Return the distances of the states [N, N], infinite from each to itself."""
    return _squares(states, states).sqrt().fill_diagonal_(math.inf)


def _thresholds(states: Tensor, pi: Tensor, actions: Tensor) -> Tensor:
    """Return the beta from which row i beats row j at its own state [N, N]."""
    return _gains(pi, actions).clamp(min=0).sqrt() / _gaps(states)


_LIMIT_MISTAKES: dict[str, Callable[..., Tensor]] = {
    "This is the sufficient bound; a smaller beta is enough, because other rows' actions are not exactly at pi.": (
        lambda s, p, a: _squares(p, a).diagonal().max().sqrt() / _gaps(s).min()
    ),
    "This is the sufficient bound, row by row; a smaller beta is enough, because other rows' actions are not exactly "
    "at pi.": lambda s, p, a: (_squares(p, a).diagonal().sqrt() / _gaps(s).min(dim=1).values).max(),
    "This is enough for one row of the batch; every row must be its own neighbour, so take the largest.": (
        lambda s, p, a: _thresholds(s, p, a).max(dim=1).values.min()
    ),
    "This is the mean over the batch; every row must be its own neighbour, so take the largest.": (
        lambda s, p, a: _thresholds(s, p, a).max(dim=1).values.mean()
    ),
    "This is beta squared.": lambda s, p, a: _exact_limit(s, p, a) ** 2,
    "Only the nearest state is compared; a farther one whose action is nearer to pi may need a larger beta.": (
        lambda s, p, a: _thresholds(s, p, a).gather(1, _gaps(s).argmin(dim=1, keepdim=True)).max()
    ),
}


def check_beta_limit(function: Any) -> Feedback:
    """Judge exercise 3, `beta_limit(states, pi, actions)`: from which beta on PRDC is TD3+BC on this batch.

    Parameters
    ----------
    function : callable
        Of the logged states [N, ds], the policy's actions [N, da] there and the logged actions [N, da], float64;
        returns the smallest beta, between 0.1 and 10,000, for which every row is its own neighbour. A thousandth off
        is near enough.
    """
    cases = []
    for rows, ds, da, spread in ((3, 1, 1, 0.3), (8, 1, 1, 1.0), (20, 2, 2, 0.1), (30, 5, 1, 0.1), (60, 3, 1, 0.01)):
        states, pi, actions = spread * _normal(rows, ds, seed=1), _actions(rows, da, seed=2), _actions(rows, da, seed=3)
        arguments = {"states": states, "pi": pi, "actions": actions}
        cases.append(Case(arguments, {"beta": _exact_limit(**arguments)}, _LIMIT_MISTAKES, tolerance=1e-3))
    return check(
        function,
        cases,
        hint="Try a beta: is every row of the batch its own nearest pair? Then halve the interval of log beta.",
        praise="Beta is measured in units of the data's spacing: with half the gaps between states, it doubles.",
    )
