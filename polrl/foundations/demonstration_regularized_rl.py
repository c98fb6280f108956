r"""Demonstration-Regularized RL: clone the demonstrations, then learn under a KL penalty for leaving the clone.

Reinforcement learning from nothing must try everything; a clone of an expert never gets better than what it
copies. Practice does both: it maximises V - lambda KL(policy || clone). The paper says what that buys. A clone
of N_E demonstrations is within a KL of order 1 / N_E of the expert; in the penalised problem an error of
estimation costs only its square, so that 1 / (lambda epsilon) episodes suffice where plain RL needs
1 / epsilon^2; and lambda = epsilon / KL, about epsilon N_E, balances what the penalty saves and what it costs.

Tiapkin, Belomestny, Calandriello, Moulines, Munos, Naumov, Perrault, Valko and Menard, arXiv 2310.17303 (ICLR 2024).
The paper's body could not be read in full: E1-E6 are recalled and derived again, and E7, the online learner, is a
simple substitute with the same skeleton as the paper's (optimism, penalised planning, one step of exploration).
E8, the orders of growth H^5 S^2 A / (lambda epsilon) and H^6 S^3 A^2 / (epsilon^2 N_E) of the online episodes, are
bounds up to constants and logarithms: there is nothing to compute. E9 serves the notebook's passage on RLHF.
Letters: P [H, S, A, S], R [H, S, A], pi and ref (the clone) [H, S, A], counts [H, S, A]; steps h from 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch.nn import functional as F

import polrl
from polrl import Budget, Criterion, Curve, Heatmap, Learner, Lines, Metrics, Study, View, equation, knob
from polrl.worlds.finite_horizon import (
    ALIVE,
    count_transitions,
    empirical_kernel,
    expected_next,
    greedy_policy,
    leaky_lock,
    optimal_values,
    policy_values,
    random_finite_mdp,
    roll_out,
    sample_episodes,
    visits,
)

#: Demonstrations that are ready to be used.
MAX_DEMOS = 10_000
#: A gap below is shown as this much, so that its logarithm is finite; and a KL above, infinity too, as MAX_KL.
MIN_GAP, MAX_KL = 1e-6, 99.0
#: The smallest strength and the smallest gap in the picture of all strengths.
LOWEST, MIN_SHOWN = 1e-3, 1e-4


class Config(polrl.Config):
    """Settings of the method, on the leaky lock."""

    horizon: int = Field(6, ge=2, le=20, description="steps of an episode")
    actions: int = Field(10, ge=2, le=50)
    world_seed: int = Field(0, ge=0, description="which lock: how safe each action is")
    T: int = Field(1000, ge=1, description="online episodes of a whole run")
    batch: int = Field(20, ge=1, description="episodes between two plannings: a step")

    lam: float = knob(
        0.03, low=0.0, high=3.0, scale="log_zero", smallest=1e-3, symbol=r"\lambda", first=True,
        help="price of a nat of KL from the clone", at_low="plain RL: slow, the clone is ignored",
        at_high="the clone: fast, and stuck at its quality",
    )  # fmt: skip
    n_demo: int = knob(
        300, low=0, high=MAX_DEMOS, scale="log_zero", smallest=10, symbol="N_E", unit="episodes",
        help="demonstrations that are cloned", at_low="none: the clone is uniform", at_high="the clone is the expert",
    )  # fmt: skip
    smooth: float = knob(
        1.0, low=0.0, high=10.0, help="what is added to each count before cloning; 1 is E2's",
        at_low="what was never shown is forbidden for ever", at_high="washes the demonstrations out",
    )  # fmt: skip
    expert_noise: float = knob(
        0.1, low=0.0, high=1.0, help="share of uniform actions in the expert", at_low="perfect expert",
        at_high="useless expert",
    )  # fmt: skip
    c_bonus: float = knob(
        0.2, low=0.0, high=2.0, symbol="c", help="optimism about what was seldom tried; theory asks for far more",
        at_low="trusts its data at once", at_high="explores for too long",
    )  # fmt: skip


@equation(
    "E1",
    r"\pi^{BC}\in\arg\min_\pi\sum_h\Big(\sum_{s,a}N_h(s,a)\log\frac1{\pi_h(a|s)}"
    r"+\kappa\sum_{s,a}\log\frac1{\pi_h(a|s)}\Big)",
    source="recalled",
)
def cloning_objective(pi: torch.Tensor, counts: torch.Tensor, smooth: float = 1.0) -> torch.Tensor:
    """Return the negative log-likelihood of the demonstrations plus the tabular regularizer, both summed."""
    _check("smooth", smooth, smooth >= 0, "at least 0")
    return -torch.xlogy(counts + smooth, pi).sum()


@equation("E2", r"\pi^{BC}_h(a|s)=\frac{N_h(s,a)+\kappa}{N_h(s)+\kappa A},\qquad\kappa=1", source="recalled")
def clone(counts: torch.Tensor, smooth: float = 1.0) -> torch.Tensor:
    """Return what minimises E1: smoothed frequencies; uniform where nothing was shown, also without smoothing."""
    _check("smooth", smooth, smooth >= 0, "at least 0")
    weight = (counts if counts.is_floating_point() else counts.double()) + smooth
    total = weight.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, weight / total, torch.full_like(weight / total, 1 / counts.shape[-1]))


@equation(
    "E3",
    r"\mathrm{KL}_{traj}(\pi^E\|\pi^{BC})\approx\frac{A-1}{2N_E}\,\#\{(h,s)\text{ that the expert can reach}\}",
    source="derived; the order 1 / N_E is the paper's",
)
def cloning_kl(reached: int, actions: int, n_demo: int) -> float:
    """Return the KL to expect of a clone of many demonstrations, for an expert that takes every action."""
    _check("n_demo", n_demo, n_demo > 0, "above 0")
    return (actions - 1) * reached / (2 * n_demo)


class Plan(NamedTuple):
    """What planning returns: Q [..., H, S, A], V [..., H + 1, S] and the policy [..., H, S, A]."""

    Q: torch.Tensor
    V: torch.Tensor
    pi: torch.Tensor


@equation(
    "E4",
    r"Q_h=R_h+P_hV_{h+1},\quad V_h(s)=\lambda\log\sum_a\tilde\pi_h(a|s)e^{Q_h(s,a)/\lambda},\quad "
    r"\pi^*_{\lambda,h}(a|s)=\tilde\pi_h(a|s)e^{(Q_h(s,a)-V_h(s))/\lambda}",
    source="recalled",
)
def regularized_plan(P: torch.Tensor, R: torch.Tensor, ref: torch.Tensor, lam: float) -> Plan:
    """Solve the penalised problem exactly, from the last step to the first; R [..., H, S, A]."""
    Q, V, pi = [], [R.new_zeros(R.shape[:-3] + R.shape[-2:-1])], []
    for h in reversed(range(len(P))):
        Q.append(R[..., h, :, :] + expected_next(P[h], V[-1]))
        value, policy = kl_backup(Q[-1], ref[h], lam)
        V.append(value)
        pi.append(policy)
    return Plan(torch.stack(Q[::-1], dim=-3), torch.stack(V[::-1], dim=-2), torch.stack(pi[::-1], dim=-3))


@equation(
    "E4a",
    r"\max_\pi\ \langle\pi,Q\rangle-\lambda\,\mathrm{KL}(\pi\|\tilde\pi)=\lambda\log\sum_a\tilde\pi(a)e^{Q(a)/\lambda}",
    source="recalled",
)
def kl_backup(Q: torch.Tensor, ref: torch.Tensor, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return value [..., S] and policy [..., S, A] of one step of E4; at lam = 0 the greedy ones, whatever ref is."""
    _check("lam", lam, 0 <= lam < math.inf, "at least 0, and finite")
    if lam == 0:
        return Q.max(dim=-1).values, greedy_policy(Q)
    logits = ref.log() + Q / lam
    return lam * torch.logsumexp(logits, dim=-1), torch.softmax(logits, dim=-1)


@equation("E5", r"J(\theta)=V^{\pi_\theta}_1-\lambda\,\mathrm{KL}_{traj}(\pi_\theta\|\tilde\pi)", source="recalled")
def regularized_objective(
    P: torch.Tensor, R: torch.Tensor, pi: torch.Tensor, ref: torch.Tensor, lam: float, start: int = 0
) -> torch.Tensor:
    """Return the penalised value of a policy; gradients pass through the log-ratio too."""
    _check("lam", lam, 0 <= lam < math.inf, "at least 0, and finite")
    value = policy_values(P, R, pi)[..., 0, start]
    return value - lam * trajectory_kl(P, pi, ref, start) if lam > 0 else value


@equation(
    "E5a",
    r"\mathrm{KL}_{traj}(\pi\|\tilde\pi)=\mathbb E_\pi\sum_h\mathrm{KL}\big(\pi_h(s_h)\|\tilde\pi_h(s_h)\big)",
    source="recalled",
)
def trajectory_kl(P: torch.Tensor, pi: torch.Tensor, ref: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Return the KL [...] between the trajectories of two policies; the states are those that pi visits."""
    by_state = (torch.xlogy(pi, pi) - torch.xlogy(pi, ref)).sum(dim=-1)
    visited = visits(P, pi, start)
    return (visited * by_state).masked_fill(visited == 0, 0.0).sum(dim=(-2, -1))


@equation(
    "E6",
    r"V^*-V^\pi\le\varepsilon_E+\varepsilon_{RL}+\lambda\,\varepsilon_{KL}^2,\qquad "
    r"\varepsilon_{KL}^2\ge\mathrm{KL}_{traj}(\pi^E\|\tilde\pi)",
    source="recalled, proved again",
)
def transfer_bound(expert_gap: float, eps_rl: float, lam: float, kl: float) -> float:
    """Return what a policy's gap can't exceed; kl, expert || clone, is the squared epsilon itself."""
    _check("lam", lam, 0 <= lam < math.inf, "at least 0, and finite")
    return expert_gap + eps_rl + (lam * kl if lam > 0 else 0.0)


@equation("E6a", r"\lambda^*=\varepsilon_{RL}/\varepsilon_{KL}^2", source="recalled")
def balancing_strength(eps_rl: float, kl: float) -> float:
    """Return the strength at which the penalty costs no more than the error that is allowed anyway."""
    _check("kl", kl, kl > 0, "above 0")
    return eps_rl / kl


@equation(
    "E7",
    r"\bar Q_h=\min(R_h+\hat P_h\bar V_{h+1}+b_h,\,H-h),\qquad "
    r"\underline Q_h=\min(R_h+\hat P_h\underline V_{h+1}-b_h,\,H-h)",
    source="ours; the paper's learner has the same skeleton",
)
def optimistic_plan(
    P_hat: torch.Tensor, R: torch.Tensor, bonus: torch.Tensor, ref: torch.Tensor, lam: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return upper Q, lower Q and the upper one's policy, all [H, S, A]; values and policy by E4a, no lower clip."""
    H = len(P_hat)
    shifted = torch.stack([R + bonus, R - bonus])
    V, Qs, pis = R.new_zeros(2, R.shape[1]), [], []
    for h in reversed(range(H)):
        Qs.append((shifted[:, h] + expected_next(P_hat[h], V)).clamp(max=H - h))
        V, both = kl_backup(Qs[-1], ref[h], lam)
        pis.append(both[0])
    upper, lower = torch.stack(Qs[::-1], dim=1)
    return upper, lower, torch.stack(pis[::-1])


@equation("E7a", r"b_h(s,a)=c\,\frac{H-h}{\sqrt{\max(n_h(s,a),1)}}", source="ours")
def exploration_bonus(counts: torch.Tensor, c: float) -> torch.Tensor:
    """Return the bonus [H, S, A] for how often each pair was tried [H, S, A]; h counts from 0."""
    _check("c", c, c >= 0, "at least 0")
    H = len(counts)
    to_go = torch.arange(H, 0, -1, device=counts.device).reshape(H, 1, 1)
    return c * to_go / (counts if counts.is_floating_point() else counts.double()).clamp(min=1).sqrt()


@equation(
    "E7b",
    r"h'\sim\mathrm U\{0..H\};\qquad a_{h'}=\arg\max_a(\bar Q_{h'}-\underline Q_{h'}),\quad "
    r"a_h\sim\bar\pi_h\ (h\ne h')",
    source="ours; the paper's learner has the same skeleton",
)
def behaviour_policies(upper: torch.Tensor, lower: torch.Tensor, pi: torch.Tensor) -> torch.Tensor:
    """Return H + 1 policies [H + 1, H, S, A]: the k-th takes the widest action at step k; the last one never."""
    H = len(pi)
    deviates = torch.eye(H + 1, H, dtype=torch.bool, device=pi.device).reshape(H + 1, H, 1, 1)
    return torch.where(deviates, greedy_policy(upper - lower), pi)


@equation(
    "E9",
    r"P(\tau_1\succ\tau_0)=\sigma\big(r(\tau_1)-r(\tau_0)\big),\qquad \hat r\in\arg\min_r-\sum\log P",
    source="recalled",
)
def preference_loss(return_1: torch.Tensor, return_0: torch.Tensor, first_wins: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood, summed over pairs; first_wins: 1 where trajectory 1 was preferred."""
    return F.binary_cross_entropy_with_logits(return_1 - return_0, first_wins.to(return_1.dtype), reduction="sum")


def _check(name: str, value: float, fine: bool, allowed: str) -> None:
    if not fine:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


class DemonstrationRegularizedRL(Learner[Config]):
    """Clone, then explore under the penalty; a step plans with what was seen so far and plays a batch of episodes."""

    constants = ("P", "R", "best", "best_value", "uniforms")
    evaluate_every = 1
    curves = (
        Curve(("gap", "clone_gap", "bound"), "Gap to the best policy", "value", log=True),
        Curve(("regularized_gap",), "Gap in the penalised problem", "penalised value", log=True),
        Curve(("kl_to_clone",), "KL of the policy from the clone", "nats"),
        Curve(("value", "episode_return"), "Value, and return of the batch", "value"),
    )

    def setup(self) -> None:
        config = self.config
        dtype = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no float64
        P, R = leaky_lock(config.horizon, config.actions, config.world_seed)
        self.P, self.R = P.to(dtype).to(self.device), R.to(dtype).to(self.device)
        Q, V = optimal_values(self.P, self.R)
        self.best, self.best_value = greedy_policy(Q), V[0, 0]
        # The demonstrations' chance, drawn once: more of them add to the same first ones, a better expert shows them.
        size = MAX_DEMOS, config.horizon, 2
        self.uniforms = torch.rand(size, generator=self.rng.torch, dtype=dtype, device=self.device)
        self.transitions = torch.zeros_like(self.P)

    @property
    def budget(self) -> int:
        return -(-self.config.T // self.config.batch)

    def update(self) -> Metrics:
        config = self.config
        ref = self.clone()  # E2
        bonus = exploration_bonus(self.transitions.sum(dim=-1), config.c_bonus)  # E7a
        P_hat = empirical_kernel(self.transitions)
        upper, lower, policy = optimistic_plan(P_hat, self.R, bonus, ref, config.lam)  # E7
        behaviours = behaviour_policies(upper, lower, policy)  # E7b
        deviation = torch.randint(len(behaviours), (config.batch,), generator=self.rng.torch, device=self.device)
        states, actions = sample_episodes(self.P, behaviours, config.batch, self.rng.torch, deviation)
        self.transitions = self.transitions + count_transitions(states, actions, *self.R.shape[1:])
        steps = torch.arange(config.horizon, device=self.device)
        return {"episode_return": self.R[steps, states[:, :-1], actions].sum(dim=1).mean()}

    def expert(self) -> torch.Tensor:
        """Return the expert [H, S, A]: the best action, now and then a uniform one."""
        noise = self.config.expert_noise
        return (1 - noise) * self.best + noise / self.config.actions

    def clone(self) -> torch.Tensor:
        """Return the clone [H, S, A] of the expert's first n_demo demonstrations."""
        states, actions = roll_out(self.P, self.expert(), self.uniforms[: self.config.n_demo])
        counts = count_transitions(states, actions, *self.R.shape[1:]).sum(dim=-1)
        return clone(counts.to(self.R.dtype), self.config.smooth)

    def recommended(self, ref: torch.Tensor) -> torch.Tensor:
        """Return the policy to be used after learning: E4 on what was seen, without a bonus."""
        return regularized_plan(empirical_kernel(self.transitions), self.R, ref, self.config.lam).pi

    def gap(self, pi: torch.Tensor) -> torch.Tensor:
        """Return exactly what policies [..., H, S, A] lack to the best one."""
        return (self.best_value - policy_values(self.P, self.R, pi)[..., 0, 0]).clamp(min=MIN_GAP)

    def evaluate(self) -> Metrics:
        """Judge the recommended policy in the true lock, exactly; `digits` is minus the gap's log by 10."""
        lam, ref, expert = self.config.lam, self.clone(), self.expert()
        policy = self.recommended(ref)
        best_regularized = regularized_plan(self.P, self.R, ref, lam).V[0, 0]
        regularized_gap = best_regularized - regularized_objective(self.P, self.R, policy, ref, lam)
        kl, demo_kl = trajectory_kl(self.P, torch.stack([policy, expert]), ref)
        gap, clone_gap, expert_gap = self.gap(torch.stack([policy, ref, expert]))
        bound = transfer_bound(float(expert_gap), float(regularized_gap), lam, float(demo_kl))
        return {
            "gap": gap,
            "clone_gap": clone_gap,
            "bound": min(bound, float(self.best_value)),  # no gap is larger than V*
            "regularized_gap": regularized_gap.clamp(min=MIN_GAP),
            "kl_to_clone": kl.clamp(max=MAX_KL),
            "value": self.best_value - gap,
            "digits": -gap.log10(),
            "clone_digits": -clone_gap.log10(),
        }

    @torch.no_grad()
    def rates(self) -> Metrics:
        """Fit the two slopes of the claim: this run's penalised gap by episodes (its minus), a clone's KL."""
        twin, course = type(self)(self.config.model_copy()), dict[int, float]()
        while twin.step < self.step:
            twin.update()
            course[twin.step * self.config.batch] = float(twin.evaluate()["regularized_gap"])
        marks = [episodes for episodes in (300, 1000, 2000, 4000) if episodes in course]
        if len(marks) < 2:
            return {}
        sizes = (100, 300, 1000, 3000, 10_000)
        return {
            "cloning_slope": _slope(sizes, cloning_curve(sizes, self.config.seed)),
            "gap_speed": -_slope(marks, [course[mark] for mark in marks]),
        }

    def views(self) -> dict[str, View]:
        ref, H, A = self.clone(), self.config.horizon, self.config.actions
        order = self.P[:-1, ALIVE, :, ALIVE].argsort(dim=-1, descending=True)  # nothing depends on the last action
        blank = torch.full((H - 1, 1), torch.nan, dtype=self.R.dtype, device=self.device)
        blocks = []
        for policy in (ref, self.recommended(ref), self.expert()):
            blocks += [torch.take_along_dim(policy[:-1, ALIVE], order, dim=1), blank]
        tried = torch.take_along_dim(self.transitions.sum(dim=-1)[:-1, ALIVE], order, dim=1)
        names = [""] * (3 * A + 2)
        names[A // 2 :: A + 1] = ["clone", "learner", "expert"]  # in the middle of each block
        steps = [f"step {h + 1}" for h in range(H - 1)]
        return {
            "policies": Heatmap(
                title="Clone, learner, expert",
                alt="Probability of each action while alive, by step: the clone, the learner's policy and the expert",
                values=torch.cat(blocks[:-1], dim=1).log10().clamp(min=-3).cpu().numpy(),
                row_labels=steps,
                column_labels=names,
                x_label="actions, the safest first (colour: log10 of the probability)",
                low=-3.0,
                high=0.0,
            ),
            "strengths": self.strengths(ref),
            "tried": Heatmap(
                title="How often each action was tried",
                alt="Log by 10 of one more than the number of tries of each action while alive, by step",
                values=torch.log10(1 + tried).cpu().numpy(),
                row_labels=steps,
                x_label="actions, the safest first (colour: log10(1 + tries))",
                low=0.0,
                high=4.0,
            ),
        }

    def strengths(self, ref: torch.Tensor) -> Lines:
        """Show, exactly, what each lambda makes of the data so far, and would make of endless data."""
        lam = max(self.config.lam, LOWEST)
        # The present strength twice, so that a vertical line can be drawn there.
        grid = torch.tensor(sorted([*np.geomspace(LOWEST, 3.0, 26), lam, lam]), dtype=torch.float64)
        marker = torch.full_like(grid, torch.nan)
        here = torch.nonzero(grid == lam)[:, 0]
        marker[here], marker[here[-1]] = MIN_SHOWN, 1.0
        # In rewards divided by lambda the strength is 1: one call plans for all strengths.
        scaled = self.R / grid.to(self.R).reshape(-1, 1, 1, 1)
        models = empirical_kernel(self.transitions), self.P
        now, endless = (self.gap(regularized_plan(P, scaled, ref, 1.0).pi) for P in models)
        lines = {"data so far": now, "endless data": endless, "clone": self.gap(ref).expand_as(now), "now": marker}
        return Lines(
            title="Gap at every strength",
            alt="Exact gap by lambda, planned with the data so far and with endless data, and the clone's gap",
            x=grid.numpy(),
            y={name: line.cpu().numpy() for name, line in lines.items()},
            x_label="lambda (0 is marked at the left end)",
            y_label="gap",
            y_range=(MIN_SHOWN, 1.0),
            log_x=True,
            log_y=True,
        )


def cloning_curve(sizes: tuple[int, ...], seed: int, draws: int = 20) -> list[float]:
    """Return the mean KL, expert || clone, of clones of so many demonstrations, in a random MDP of 5 steps."""
    generator = torch.Generator().manual_seed(seed)
    P, R = random_finite_mdp(5, 6, 4, generator)
    expert = 0.97 * greedy_policy(optimal_values(P, R)[0]) + 0.03 / 4
    kls = torch.zeros(len(sizes), dtype=torch.float64)
    for _ in range(draws):
        states, actions = sample_episodes(P, expert, max(sizes), generator)
        for place, size in enumerate(sizes):
            counts = count_transitions(states[:size], actions[:size], 6, 4).sum(dim=-1)
            kls[place] += trajectory_kl(P, expert, clone(counts.double())) / draws
    return kls.tolist()


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of a straight line through the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


_STRENGTHS = ("lam 0.01", "lam 0.03", "lam 0.1")
_LONG = "lam 0.1, 30 demos, to the end"

study = Study(
    claim="A penalty for leaving the clone passes both parents early: RL from nothing and the clone itself.",
    learner=DemonstrationRegularizedRL,
    arms={
        "RL alone": {"lam": 0.0, "T": 300},
        "lam 0.01": {"lam": 0.01, "T": 300},
        "lam 0.03": {"lam": 0.03, "T": 300},
        "lam 0.1": {"lam": 0.1, "T": 300},
        "lam 3, nearly the clone": {"lam": 3.0, "T": 300},
        "RL alone, batch 10": {"lam": 0.0, "T": 300, "batch": 10},
        "lam 0.03, batch 10": {"lam": 0.03, "T": 300, "batch": 10},
        "RL alone, to the end": {"lam": 0.0},
        "lam 0.03, to the end": {"lam": 0.03},
        _LONG: {"lam": 0.1, "n_demo": 30},
    },
    criteria=(
        Criterion(
            "cloning rate",
            "a clone's KL falls like 1 / N_E: the slope on logarithmic axes is within 0.15 of -1",
            plus=(_LONG, "cloning_slope"),
            above=-1.15,
            below=-0.85,
        ),
        Criterion(
            "passes RL",
            "after 300 episodes, planned every 100, the best lambda's gap is under a fifth of RL's (0.699 digits)",
            plus=(_STRENGTHS, "digits"),
            minus=("RL alone", "digits"),
            above=math.log10(5),
        ),
        Criterion(
            "passes the clone",
            "after 300 episodes the best lambda's gap is under a third of the clone's (0.477 digits)",
            plus=(_STRENGTHS, "digits"),
            minus=("lam 0.03", "clone_digits"),
            above=math.log10(3),
        ),
        Criterion(
            "fast rate",
            "the penalised gap falls about like 1 / episodes, not like 1 / root: its slope is steeper than -0.8",
            plus=(_LONG, "gap_speed"),
            above=0.8,
        ),
    ),
    smoke=Budget(seeds=1, settings={"batch": 100, "T": 1000}, arms=("RL alone", *_STRENGTHS, _LONG), probe="rates"),
    fast=Budget(seeds=3, settings={"batch": 100, "T": 1000}, probe="rates"),
    full=Budget(seeds=10, settings={"batch": 100, "T": 4000}, probe="rates"),
)
