"""Finite-horizon Markov decision processes: exact values, visits, episodes by the batch, and two worlds to try.

Everywhere P [H, S, A, S] holds the transition probabilities of each step, R [H, S, A] its expected rewards,
pi [H, S, A] a policy whose rows sum to one; steps count from 0, every episode starts in the state `start`, and
nothing is discounted. Exact functions are differentiable, keep their arguments' dtype, and take R and pi with
further dimensions in front, for many rewards or policies at once.
"""

from __future__ import annotations

import numpy as np
import torch


def expected_next(P_h: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """Return the expected value [..., S, A] of the next state under one step's P [S, A, S], for V [..., S]."""
    return torch.nn.functional.linear(V, P_h.flatten(0, 1)).unflatten(-1, P_h.shape[:2])


def policy_values(P: torch.Tensor, R: torch.Tensor, pi: torch.Tensor) -> torch.Tensor:
    """Return the values [..., H + 1, S] of a policy at the beginning of each step; the last row is 0."""
    batch = torch.broadcast_shapes(R.shape, pi.shape)[:-3]
    V = [R.new_zeros(*batch, R.shape[-2])]
    for h in reversed(range(len(P))):
        Q = R[..., h, :, :] + expected_next(P[h], V[-1])
        V.append((pi[..., h, :, :] * Q).sum(dim=-1))
    return torch.stack(V[::-1], dim=-2)


def optimal_values(P: torch.Tensor, R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Q* [..., H, S, A] and V* [..., H + 1, S]; the row h of Q*'s argmax is a best policy."""
    Q, V = [], [R.new_zeros(R.shape[:-3] + R.shape[-2:-1])]
    for h in reversed(range(len(P))):
        Q.append(R[..., h, :, :] + expected_next(P[h], V[-1]))
        V.append(Q[-1].amax(dim=-1))
    return torch.stack(Q[::-1], dim=-3), torch.stack(V[::-1], dim=-2)


def greedy_policy(Q: torch.Tensor) -> torch.Tensor:
    """Return the policy [..., A] that takes the best action for sure, the first one of equals."""
    return torch.nn.functional.one_hot(Q.argmax(dim=-1), Q.shape[-1]).to(Q.dtype)


def visits(P: torch.Tensor, pi: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Return the probability [..., H, S] of being in each state at the beginning of each step; rows sum to one."""
    first = torch.zeros_like(pi[..., 0, :, 0])
    first[..., start] = 1.0
    d = [first]
    for h in range(len(P) - 1):
        taken = d[-1].unsqueeze(-1) * pi[..., h, :, :]
        d.append(taken.flatten(-2) @ P[h].flatten(0, 1))
    return torch.stack(d, dim=-2)


def roll_out(
    P: torch.Tensor, pi: torch.Tensor, uniforms: torch.Tensor, which: torch.Tensor | None = None, start: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Play episodes whose chance is given as numbers uniform in [0, 1), so that equal numbers give like episodes.

    Parameters
    ----------
    P : Tensor, [H, S, A, S]
    pi : Tensor, [H, S, A] or [K, H, S, A]
        One policy, or several of which each episode follows one.
    uniforms : Tensor, [n, H, 2]
        For each step, what decides the action, and what decides the next state.
    which : Tensor, int64 [n], optional
        The policy that each episode follows; needed if there are several.

    Returns
    -------
    (Tensor int64 [n, H + 1], Tensor int64 [n, H])
        States, the one after the last step included, and actions.
    """
    policies = pi if pi.ndim == 4 else pi.unsqueeze(0)
    if which is None:
        if len(policies) > 1:
            raise ValueError(f"which must name the policy of each episode, there are {len(policies)}")
        which = torch.zeros(len(uniforms), dtype=torch.long, device=P.device)
    to_action, to_state = _cumulated(policies), _cumulated(P)
    state = torch.full_like(which, start)
    states, actions = [state], []
    S, A = pi.shape[-2:]
    for h in range(len(P)):
        action = _draw(to_action[:, h].flatten(0, 1), which * S + state, uniforms[:, h, 0])
        state = _draw(to_state[h].flatten(0, 1), state * A + action, uniforms[:, h, 1])
        actions.append(action)
        states.append(state)
    return torch.stack(states, dim=1), torch.stack(actions, dim=1)


def _cumulated(probabilities: torch.Tensor) -> torch.Tensor:
    """Return cumulated probabilities whose last is exactly one, so that rounding never selects what can't happen."""
    total = probabilities.detach().cumsum(dim=-1)
    return total / total[..., -1:]


def _draw(cumulated: torch.Tensor, rows: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Return, for each row that is named, the first place where it is above the uniform number."""
    named = cumulated.index_select(0, rows)
    return torch.searchsorted(named, uniform.contiguous().unsqueeze(1), right=True).squeeze(1)


def sample_episodes(
    P: torch.Tensor,
    pi: torch.Tensor,
    count: int,
    generator: torch.Generator,
    which: torch.Tensor | None = None,
    start: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Play `count` episodes; policies, `which` and what is returned are as in `roll_out`."""
    uniforms = torch.rand(count, len(P), 2, generator=generator, dtype=P.dtype, device=P.device)
    return roll_out(P, pi, uniforms, which, start)


def count_transitions(states: torch.Tensor, actions: torch.Tensor, S: int, A: int) -> torch.Tensor:
    """Count transitions of episodes, states [n, H + 1] and actions [n, H]: int64 [H, S, A, S]."""
    H = actions.shape[1]
    steps = torch.arange(H, device=actions.device)
    place = ((steps * S + states[:, :H]) * A + actions) * S + states[:, 1:]
    return torch.bincount(place.flatten(), minlength=H * S * A * S).reshape(H, S, A, S)


def empirical_kernel(transitions: torch.Tensor) -> torch.Tensor:
    """Return the frequencies [H, S, A, S] of counted transitions; uniform where a pair was never tried."""
    transitions = transitions if transitions.is_floating_point() else transitions.double()
    tried = transitions.sum(dim=-1, keepdim=True)
    frequency = transitions / tried.clamp(min=1)
    return torch.where(tried > 0, frequency, torch.full_like(frequency, 1 / transitions.shape[-1]))


#: The states of the leaky lock.
ALIVE, DEAD = 0, 1


def leaky_lock(horizon: int = 6, actions: int = 10, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return P and R of the leaky lock, in float64: stay alive through every step to be paid at the last.

    In state 0, alive, each action keeps one alive with a probability of its own, drawn uniformly from 0.3 to
    0.92; at each step one action, drawn too, does it with 0.97. State 1, dead, is never left. The reward is 1
    for being alive at the beginning of the last step, whatever is done there.

    Raises
    ------
    ValueError
        If there are fewer than two steps or two actions.
    """
    if horizon < 2 or actions < 2:
        raise ValueError(f"a leaky lock needs horizon >= 2 and actions >= 2, got {horizon!r} and {actions!r}")
    generator = np.random.default_rng(seed)
    P = np.zeros((horizon, 2, actions, 2))
    for h in range(horizon):
        keep = generator.uniform(0.3, 0.92, actions)
        keep[generator.integers(actions)] = 0.97
        P[h, ALIVE] = np.stack([keep, 1 - keep], axis=1)
    P[:, DEAD, :, DEAD] = 1.0
    R = np.zeros((horizon, 2, actions))
    R[-1, ALIVE] = 1.0
    return torch.from_numpy(P), torch.from_numpy(R)


def random_finite_mdp(
    horizon: int, states: int, actions: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw P with uniform (Dirichlet) rows and R uniform in [0, 1], in float64."""
    shape, device = (horizon, states, actions), generator.device
    P = torch._standard_gamma(torch.ones(*shape, states, dtype=torch.float64, device=device), generator=generator)
    R = torch.rand(*shape, dtype=torch.float64, generator=generator, device=device)
    return P / P.sum(dim=-1, keepdim=True), R
