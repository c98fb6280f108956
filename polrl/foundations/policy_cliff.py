r"""The Policy Cliff: a change of the reward too small to see can turn the optimal policy over.

RL turns a reward into a policy. The value side of that map is tame: the optimal Q moves at most 1/(1 - gamma)
times as far as the reward (E3). The policy side is not: where several answers tie at the top, any change of the
reward breaks the tie and the optimal policy jumps (E5). Failures of alignment can be read as such jumps: the
rational optimum of an incomplete reward (E10), or of a tie-breaker that nobody looked at (E11). An entropy bonus
alpha makes the map Lipschitz again (E8), for some of the reward; a KL penalty beta also says which optimum is taken.

The learner holds two small worlds at once. On a token tree two tabular policies climb, under rewards that differ by
eps times style; their exact optimum is known (E13). In a random MDP with m tied actions, made by running the Bellman
equation backwards (E4), two tables are solved, before and after E5. A step is one gradient step of the policies and
one backup of the tables. alpha and beta add up to one temperature: the KL penalty is an entropy bonus beta and a
reward beta log(base).

Xu, arXiv 2507.20150. The paper is theory and trains nothing: the solution in E9, the training (E12) and the law of
whole strings (E13) are derived for teaching. The same study on a character model waits for the language chapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from statistics import linear_regression
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import one_hot

import polrl
from polrl import Bars, Budget, Criterion, Curve, Learner, Lines, Metrics, Study, View, equation, knob
from polrl.worlds.tabular import discounted_visits, policy_value, random_mdp
from polrl.worlds.token_tree import TokenTree


class Config(polrl.Config):
    """Settings of both worlds; by default the tree is that of the study, its 81 strings of four tokens 0, 1, 2."""

    depth: int = Field(4, ge=2, le=6)
    states: int = Field(20, ge=2)
    actions: int = Field(8, ge=2)
    gradient: Literal["exact", "sampled"] = "exact"  # sampled: REINFORCE with `batch` strings a policy
    batch: int = Field(64, ge=2)

    alpha: float = knob(
        0.1, low=0.0, high=3.0, scale="log_zero", smallest=1e-3, symbol=r"\alpha", first=True, help="entropy bonus",
        at_low="the cliff: the optimum flips at any eps", at_high="stable but near uniform: reward is lost",
    )  # fmt: skip
    beta: float = knob(
        0.0, low=0.0, high=3.0, scale="log_zero", smallest=1e-3, symbol=r"\beta", paper=1e-3,
        help="KL penalty to a random base policy", at_low="none; near it, breaks ties only", at_high="pinned to it",
    )  # fmt: skip
    eps: float = knob(
        1e-3, low=-1.0, high=1.0, scale="signed_log", smallest=1e-6, symbol=r"\varepsilon",
        help="how far the two rewards are apart: plus and minus eps times style; eps more for one action of the MDP",
        at_low="style, or the action, is paid less", at_high="an ordinary, large change of the reward",
    )  # fmt: skip
    tie_break: float = knob(
        3e-4, low=-0.1, high=0.1, symbol="c", help="tie-breaker in both rewards of the tree: the pay for style",
        at_low="style disfavoured", at_high="style favoured; the sign decides the side of the cliff",
    )  # fmt: skip
    w: float = knob(
        0.5, low=0.0, high=1.0, symbol="w_1", help="weight of the tree's first grader, who likes style",
        at_low="only the second, who dislikes it", at_high="only the first; between, the mix crosses the tie",
    )  # fmt: skip
    m_ties: int = knob(
        3, low=2, high="actions", symbol="m", help="tied best actions in state 0 of the MDP",
        at_low="the policy jumps by 1/2", at_high="by nearly 1",
    )  # fmt: skip
    gamma: float = knob(
        0.9, low=0.0, high=0.99, symbol=r"\gamma", help="discount of the MDP", at_low="bandit",
        at_high="the bound grows as 1/(1 - gamma); the backups converge slowly",
    )  # fmt: skip
    lr: float = knob(
        2.0, low=0.01, high=5.0, scale="log", help="step of the gradient ascent on the tree",
        at_low="slow drift to the optimum", at_high="fast; with a high temperature it oscillates",
    )  # fmt: skip


# ---- what the equations share --------------------------------------------------------------------------------


def soft_value(Q: Tensor, alpha: float) -> Tensor:
    """Return alpha log sum_a exp(Q / alpha) [...] over the last dimension; its limit, the maximum, at alpha = 0."""
    best = Q.amax(dim=-1)
    return best if alpha == 0 else best + alpha * ((Q - best.unsqueeze(-1)) / alpha).exp().sum(dim=-1).log()


def soft_policy(Q: Tensor, alpha: float) -> Tensor:
    """Return softmax(Q / alpha) [..., A]; at alpha = 0, where a limit of its own need not exist, uniform E2."""
    return greedy_policy(Q) if alpha == 0 else torch.softmax((Q - Q.amax(dim=-1, keepdim=True)) / alpha, dim=-1)


def backup(Q: Tensor, R: Tensor, P: Tensor, gamma: float, alpha: float) -> Tensor:
    """Return R + gamma P soft_value(Q) for tables [..., S, A]: one Bellman backup, hard at alpha = 0."""
    return R + gamma * torch.einsum("sat,...t->...sa", P, soft_value(Q, alpha))


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Return half the sum of absolute differences [...] of laws over the last dimension."""
    return (p - q).abs().sum(dim=-1) / 2


def _check_mdp(table: Tensor, P: Tensor, gamma: float) -> None:
    fits = P.ndim == 3 and P.shape[0] == P.shape[2] and table.shape[-2:] == P.shape[:2]
    _require(fits, f"P must be [S, A, S] and tables [S, A], got {list(P.shape)} and {list(table.shape)}")
    _require(0 <= gamma < 1, f"gamma must be from 0 to below 1, got {gamma!r}")


def _require(condition: bool, words: str) -> None:
    if not condition:
        raise ValueError(words)


# ---- the equations -------------------------------------------------------------------------------------------


@equation("E1", r"Q^*_R(s,a)=R(s,a)+\gamma\sum_{s'}P(s'|s,a)\max_{a'}Q^*_R(s',a')", source="Sec. 2.1")
def optimal_q(R: Tensor, P: Tensor, gamma: float) -> Tensor:
    """Return the optimal table [S, A] of a reward [S, A] under transitions P [S, A, S]."""
    return soft_optimum(R, P, gamma, 0.0)[0]


@equation("E2", r"\mathrm{supp}\,\pi(\cdot|s)\subseteq A^*(s;R)=\arg\max_a Q^*_R(s,a)", source="Sec. 2.1")
def greedy_policy(Q: Tensor, rule: str = "uniform", tolerance: float = 1e-9) -> Tensor:
    """Return an optimal policy [..., A]: "uniform" over the best actions, or the "first" of them."""
    _require(rule in ("uniform", "first"), f"rule must be 'uniform' or 'first', got {rule!r}")
    # Float sums keep a tie to about 1e-12 only: without a tolerance one of the tied would win by rounding.
    best = (Q >= Q.amax(dim=-1, keepdim=True) - tolerance).to(Q.dtype)
    if rule == "first":
        best = best * (best.cumsum(dim=-1) == 1)
    return best / best.sum(dim=-1, keepdim=True)


@equation("E3", r"\|Q^*_{R_1}-Q^*_{R_2}\|_\infty\le\tfrac{1}{1-\gamma}\|R_1-R_2\|_\infty", source="Prop. 2.1")
def value_bound(R1: Tensor, R2: Tensor, gamma: float) -> Tensor:
    """Return how far the optimal tables of two rewards can be apart."""
    _require(0 <= gamma < 1, f"gamma must be from 0 to below 1, got {gamma!r}")
    return (R1 - R2).abs().max() / (1 - gamma)


@equation("E4", r"R_Q(s,a)=Q(s,a)-\gamma\sum_{s'}P(s'|s,a)\max_{a'}Q(s',a')", source="Prop. 2.4, proof")
def inverse_bellman(Q: Tensor, P: Tensor, gamma: float) -> Tensor:
    """Return the reward [S, A] whose optimal table is Q [S, A], whatever Q is; so ties can be made to order."""
    _check_mdp(Q, P, gamma)
    return Q - gamma * (P @ Q.amax(dim=-1))


@equation("E5", r"Q_\varepsilon=Q_0+\varepsilon\,\mathbf 1[(s,a)=(s_0,a_2)],\ R_\varepsilon=R_{Q_\varepsilon},\quad "
          r"\|R_\varepsilon-R_0\|_\infty\le(1+\gamma)\,\varepsilon", source="Props. 2.4, 2.5, 3.2")  # fmt: skip
def perturbed_reward(Q0: Tensor, P: Tensor, gamma: float, s0: int, a2: int, eps: float) -> Tensor:
    """Return the reward [S, A] that moves one entry of the optimal table by eps and leaves the others.

    The uniform policy over m tied actions then moves by (m - 1)/m. The tie-breaker of Prop. 3.2 is eps / (1 + gamma).
    """
    raised = Q0.clone()
    raised[s0, a2] += eps
    return inverse_bellman(raised, P, gamma)


@equation("E6", r"R_{\rm eff}(s,a)=\sum_k w_k(s)\,R_k(s,a)", source="Sec. 4.2")
def effective_reward(rewards: Tensor, weights: Tensor) -> Tensor:
    """Mix rewards [K, S, A] by each state's weights [S, K], which are not negative and sum to one."""
    if not bool((weights >= 0).all() & ((weights.sum(dim=-1) - 1).abs() <= 1e-6).all()):
        raise ValueError(f"weights must not be negative and sum to 1 in each state, got {weights.tolist()}")
    return torch.einsum("sk,ksa->sa", weights, rewards)


@equation("E7", r"Q_\alpha(s,a)=R(s,a)+\gamma\sum_{s'}P(s'|s,a)\,\alpha\log\sum_{a'}e^{Q_\alpha(s',a')/\alpha},\quad "
          r"\pi_\alpha(a|s)\propto e^{Q_\alpha(s,a)/\alpha}", source="Sec. 4.4")  # fmt: skip
def soft_optimum(R: Tensor, P: Tensor, gamma: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Return table and policy [S, A] that are optimal with an entropy bonus; at alpha = 0, E1 and uniform E2."""
    _check_mdp(R, P, gamma)
    _require(alpha >= 0, f"alpha must be at least 0, got {alpha!r}")
    _require(bool(R.isfinite().all()), "R must be finite, or the backups never end")
    # Back up until the table moves by less than 1e-12, or than its dtype can tell.
    tolerance = max(1e-12, 16 * torch.finfo(R.dtype).eps * float(R.abs().max()) / (1 - gamma))
    Q, change = torch.zeros_like(R), math.inf
    while change >= tolerance:
        before, Q = Q, backup(Q, R, P, gamma, alpha)
        change = float((Q - before).detach().abs().max())
    return Q, soft_policy(Q, alpha)


@equation("E8", r"d_{TV}\big(\pi_{R_1,\alpha}(\cdot|s),\pi_{R_2,\alpha}(\cdot|s)\big)\le"
          r"\frac{1}{2\alpha(1-\gamma)}\|\mathbf R_1-\mathbf R_2\|_N", source="Prop. 4.5")  # fmt: skip
def policy_bound(R1: Tensor, R2: Tensor, alpha: float, gamma: float) -> Tensor:
    """Return how far soft policies can be apart in any state; whole strings (E13) are one step, gamma = 0."""
    _require(alpha > 0, f"alpha must be above 0, got {alpha!r}")
    return value_bound(R1, R2, gamma) / (2 * alpha)


@equation("E9", r"Q_\beta=R+\gamma PV_\beta,\quad V_\beta(s)=\beta\log\sum_a\pi_b(a|s)\,e^{Q_\beta(s,a)/\beta},\quad "
          r"\pi_\beta(a|s)=\pi_b(a|s)\,e^{(Q_\beta(s,a)-V_\beta(s))/\beta}", source="Sec. 3.4; derived")  # fmt: skip
def kl_optimum(R: Tensor, P: Tensor, gamma: float, beta: float, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return table [S, A], values [S] and policy [S, A] that are optimal with a KL penalty to the base [S, A] > 0."""
    _require(beta > 0, f"beta must be above 0, got {beta!r}")
    _require(bool((base > 0).all()), f"base must be above 0 everywhere, its smallest entry is {float(base.min())!r}")
    pull = beta * base.log()  # the penalty is an entropy bonus beta and this reward
    Q, policy = soft_optimum(R + pull, P, gamma, beta)
    return Q - pull, soft_value(Q, beta), policy


@equation("E10", r"R_{\rm true}=R_{\rm train}+R_{\rm miss},\ a_2\in A^*(s_0;R_{\rm train}),\quad "
          r"Q^{\pi}_{R_{\rm miss}}(s_0,a_2)-V^{\pi}_{R_{\rm miss}}(s_0)>0", source="Prop. 3.1")  # fmt: skip
def missing_advantage(R_miss: Tensor, P: Tensor, gamma: float, pi: Tensor) -> Tensor:
    """Return the advantages [S, A] of the reward that training forgot, under the policy pi [S, A] that it made.

    Where one is above 0, in a state that is reached and for an action that ties for the best in training, pi is
    optimal for the training's reward and strictly worse than the best for the true one.
    """
    _check_mdp(R_miss, P, gamma)
    V = policy_value(P, R_miss, pi, gamma)
    return R_miss + gamma * (P @ V) - V.unsqueeze(-1)


@equation("E11", r"r=\mathbf 1[y\text{ correct}]-c\,|n_{\rm target}-n_y|", source="Sec. 5.3")
def tie_breaker_reward(correct: Tensor, length: Tensor, target: float, c: float) -> Tensor:
    """Pay correct answers [N] 1, less c for each unit by which the length [N] misses the target."""
    return 1.0 * correct - c * (target - length).abs()


@equation("E12", r"J(\theta)=\rho^\top V,\quad \frac{\partial J}{\partial\theta_{s,a}}=\mu(s)\,\pi(a|s)"
          r"\big[Q(s,a)-\alpha\log\pi(a|s)-V(s)\big],\quad \mu^\top=\rho^\top(I-\gamma P_\pi)^{-1}",
          source="derived")  # fmt: skip
def policy_gradient(
    theta: Tensor, R: Tensor, P: Tensor, gamma: float, alpha: float, rho: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the objective of the softmax policy of logits theta [S, A], and its exact gradient [S, A].

    V and Q = R + gamma P V count the entropy bonus; rho [S] is the start. The gradient vanishes at E7.
    """
    _check_mdp(R, P, gamma)
    log_pi = torch.log_softmax(theta, dim=-1)
    V = policy_value(P, R - alpha * log_pi, log_pi.exp(), gamma)
    advantage = R + gamma * (P @ V) - alpha * log_pi - V.unsqueeze(-1)
    visits = discounted_visits(P, log_pi.exp(), rho, gamma)
    return rho @ V, visits.unsqueeze(-1) * log_pi.exp() * advantage


@equation("E12b", r"\nabla J=\sum_y q(y)\,\mathrm{sg}\big[R(y)-\alpha\log\pi(y)-b\big]\,\nabla\log\pi(y),\quad "
          r"b=\sum_y q(y)\big[R(y)-\alpha\log\pi(y)\big]", source="derived: E12 for strings")  # fmt: skip
def ascent_objective(log_p: Tensor, reward: Tensor, alpha: float, share: Tensor) -> Tensor:
    """Return a number whose gradient climbs J, from log pi(y), R(y) and q(y), each [..., N].

    With pi itself as q the gradient is exact; with the frequencies of strings that were drawn it is REINFORCE,
    the mean as its baseline. q and the bracket are constants for autograd.
    """
    share, earned = share.detach(), (reward - alpha * log_p).detach()
    baseline = (share * earned).sum(dim=-1, keepdim=True)
    return (share * (earned - baseline) * log_p).sum()


@equation("E13", r"\pi_\alpha(y)=\frac{e^{R(y)/\alpha}}{\sum_{y'}e^{R(y')/\alpha}},\quad "
          r"\pi_\beta(y)\propto\pi_b(y)\,e^{R(y)/\beta}", source="derived")  # fmt: skip
def gibbs_law(reward: Tensor, temperature: float, base: Tensor | None = None) -> Tensor:
    """Return the best law [..., N] of whole strings with an entropy bonus, or with a KL penalty to a base [N]."""
    _require(temperature >= 0, f"temperature must be at least 0, got {temperature!r}")
    if base is not None:
        _require(bool((base > 0).all()), f"base must be above 0 everywhere, its smallest is {float(base.min())!r}")
        reward = reward + temperature * base.log()
    return soft_policy(reward, temperature)


# ---- the learner ---------------------------------------------------------------------------------------------


class PolicyCliff(Learner[Config]):
    """Two policies on a token tree and two tables of an MDP, each pair under rewards that differ by eps."""

    constants = ("tree", "correct", "style", "log_base", "P", "table", "mdp_log_base")
    curves = (
        Curve(("tv", "tv_optimum", "tv_bound"), "Tree: distance of the policies", "total variation"),
        Curve(("accuracy", "accuracy_optimum"), "Tree: mass on correct strings", "share"),
        Curve(("mdp_tv", "mdp_bound"), "MDP: distance in state 0", "total variation"),
        Curve(("shortfall", "mdp_loss"), "Tree: still to go. MDP: reward lost", "reward", log=True),
    )

    def setup(self) -> None:
        self.tree = TokenTree(3, self.config.depth, self.device)
        self.correct = (self.tree.strings.sum(dim=1) % 3 == 0).double()
        self.style = (self.tree.strings == 2).double().mean(dim=1)
        # What is learned on the tree: the logits of two policies, which begin uniform; in the MDP: two tables.
        self.logits = torch.zeros(2, self.tree.prefixes, 3, dtype=torch.float64, device=self.device)
        self.P, self.table = random_mdp(self.config.states, self.config.actions, self.rng.torch)
        self.Q = torch.zeros_like(self.table).repeat(2, 1, 1)
        # The KL penalty needs a base policy in each world: a random one.
        base, mdp_base = (torch.empty_like(x).normal_(generator=self.rng.torch) for x in (self.logits[0], self.table))
        self.log_base, self.mdp_log_base = self.tree.log_probabilities(base), torch.log_softmax(mdp_base, dim=-1)

    @property
    def temperature(self) -> float:
        """The entropy bonus and the KL penalty's share of it."""
        return self.config.alpha + self.config.beta

    def string_rewards(self, eps: float | Tensor) -> Tensor:
        """Return R+ and R- [2, ..., N]: what two graders pay, plus and minus eps [..., 1] times style, the share of 2s.

        The graders agree on what is correct; with equal weights their tastes for style cancel. Holds beta log(base).
        """
        config = self.config
        tastes = (config.tie_break + 0.05, config.tie_break - 0.05)  # the first likes style, the second does not
        graders = [tie_breaker_reward(self.correct, self.style, 1.0, taste) for taste in tastes]
        weights = torch.tensor([[config.w, 1 - config.w]], dtype=torch.float64, device=self.device)
        middle = effective_reward(torch.stack(graders).unsqueeze(1), weights)[0] + config.beta * self.log_base
        return torch.stack([middle + eps * self.style, middle - eps * self.style])

    def mdp_rewards(self, eps: float) -> Tensor:
        """Return R_0 and R_eps [2, S, A]: m actions of state 0 tie at 1, above all others, and eps moves action 1."""
        tied = self.table.clone()  # entries between 0 and 1
        tied[0, : self.config.m_ties] = 1.0
        return torch.stack([perturbed_reward(tied, self.P, self.config.gamma, 0, 1, by) for by in (0.0, eps)])

    def update(self) -> Metrics:
        config, temperature = self.config, self.temperature
        rewards, mdp_rewards = self.string_rewards(config.eps), self.mdp_rewards(config.eps)
        # The tree: both policies climb, each string weighted by its probability or by how often it was drawn.
        logits = self.logits.detach().requires_grad_()
        log_p = self.log_probabilities(logits)
        share = log_p.exp().detach()
        if config.gradient == "sampled":
            drawn = torch.multinomial(share, config.batch, replacement=True, generator=self.rng.torch)
            share = one_hot(drawn, share.shape[1]).to(share.dtype).mean(dim=1)
        (gradient,) = torch.autograd.grad(ascent_objective(log_p, rewards, temperature, share), logits)
        self.logits = self.logits + config.lr * gradient
        # The MDP: one backup of both tables.
        before, self.Q = self.Q, self.backed_up(mdp_rewards)
        return {"residual": (self.Q - before).abs().max(), **self.figures(log_p.detach(), rewards, mdp_rewards)}

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Return log pi(y) [2, N] of both policies of the tree."""
        return torch.stack([self.tree.log_probabilities(one) for one in logits])

    def backed_up(self, mdp_rewards: Tensor) -> Tensor:
        """Return the MDP's tables [2, S, A] after one more backup."""
        rewards = mdp_rewards + self.config.beta * self.mdp_log_base
        return backup(self.Q, rewards, self.P, self.config.gamma, self.temperature)

    def figures(self, log_p: Tensor, rewards: Tensor, mdp_rewards: Tensor) -> Metrics:
        """How far the policies are apart, trained and optimal, and what the strength costs."""
        trained, optimum = log_p.exp(), gibbs_law(rewards, self.temperature)
        distance, least = total_variation(*trained), total_variation(*optimum)
        value = (trained * (rewards - self.temperature * log_p)).sum(dim=1)
        policies, gamma = soft_policy(self.Q, self.temperature), self.config.gamma
        return {
            "tv": distance,
            "tv_optimum": least,
            "tv_bound": self.bound(rewards, 0.0),
            "tv_error": (distance - least).abs(),
            "accuracy": (trained @ self.correct).mean(),
            "accuracy_optimum": (optimum @ self.correct).mean(),
            "shortfall": (soft_value(rewards, self.temperature) - value).mean().clamp(min=0),
            "mdp_tv": total_variation(*policies[:, 0]),
            "mdp_bound": self.bound(mdp_rewards, gamma),
            # By construction the best value of R_0 in state 0 is 1.
            "mdp_loss": 1 - policy_value(self.P, mdp_rewards[0], policies[0], gamma)[0],
        }

    def bound(self, rewards: Tensor, gamma: float) -> Tensor:
        """Return E8 for a pair of rewards, at most 1, which no two policies exceed."""
        if self.temperature == 0:
            return rewards.new_ones(())
        return policy_bound(rewards[0], rewards[1], self.temperature, gamma).clamp(max=1.0)

    def views(self) -> dict[str, View]:
        eps, temperature = self.config.eps, self.temperature
        trained = self.log_probabilities(self.logits).exp()
        optimum = gibbs_law(self.string_rewards(eps), temperature)
        policies = soft_policy(self.backed_up(self.mdp_rewards(eps)), temperature)[:, 0].cpu().numpy()
        actions = Bars(
            title="MDP: policy in state 0", y_label="probability", y_range=(0, 1),
            alt="Probability of each action in state 0 of the MDP, under R_0 and under R_eps, which raises action 1",
            labels=[*map(str, range(self.config.actions))], values={"R_0": policies[0], "R_eps": policies[1]},
        )  # fmt: skip
        return {"cliff": self.cliff(trained), "strings": self.strings(trained, optimum), "actions": actions}

    def cliff(self, trained: Tensor) -> View:
        """Draw the distance of the tree's two optima against eps, and that of the trained policies."""
        grid = torch.logspace(-6, 0, 61, dtype=torch.float64)
        rewards = self.string_rewards(grid.to(self.device).unsqueeze(-1))
        here = (grid.log10() - max(math.log10(max(abs(self.config.eps), 1e-6)), -5.9)).abs() < 0.16
        lines = {
            "optimum": total_variation(*gibbs_law(rewards, self.temperature)),
            "bound E8": torch.stack([self.bound(rewards[:, i], 0.0) for i in range(len(grid))]),
            "strength 0": total_variation(*gibbs_law(rewards - self.config.beta * self.log_base, 0.0)),
            "trained, here": torch.where(here, total_variation(*trained).cpu(), torch.nan),
        }
        return Lines(
            title="The cliff", x_label="eps", y_label="total variation", y_range=(-0.02, 1.05), log_x=True,
            alt="Total variation of the tree's two policies against eps: optimum, its bound, and without strength",
            x=grid.numpy(), y={name: line.cpu().numpy() for name, line in lines.items()},
        )  # fmt: skip

    def strings(self, trained: Tensor, optimum: Tensor) -> View:
        """Draw the mass of correct strings by their number of 2s, and of the wrong ones."""
        twos = (self.tree.strings == 2).sum(dim=1)
        kinds, kind = torch.where(self.correct > 0, twos, self.config.depth + 1).unique(return_inverse=True)
        laws = {"R+ optimum": optimum[0], "R+ trained": trained[0], "R- optimum": optimum[1], "R- trained": trained[1]}
        return Bars(
            title="Correct strings by their number of 2s", y_label="probability", y_range=(0, 1),
            alt="Probability of correct strings with none, one, two ... tokens 2 and of wrong strings, under R+ and R-",
            labels=[*map(str, kinds.tolist()[:-1]), "wrong"],
            values={name: kind.bincount(law).cpu().numpy() for name, law in laws.items()},
        )  # fmt: skip

    @torch.no_grad()
    def exact_figures(self) -> Metrics:
        """Sweep eps and alpha with the exact optima of both worlds; nothing is trained. The study's probe."""
        gamma, tied = self.config.gamma, torch.zeros_like(self.table[0])
        tied[: self.config.m_ties] = 1.0
        tree = _sweep(gibbs_law, self.string_rewards, 0.0, self.correct)
        mdp = _sweep(lambda R, a: soft_optimum(R, self.P, gamma, a)[1][..., 0, :], self.mdp_rewards, gamma, tied)
        return {f"{world}_{name}": v for world, found in (("tree", tree), ("mdp", mdp)) for name, v in found.items()}


def _sweep(
    solve: Callable[[Tensor, float], Tensor], pair: Callable[[float], Tensor], gamma: float, good: Tensor
) -> dict[str, float]:
    """Return one world's figures, from the laws [E, 2, N] that `solve` finds for the pairs of rewards of E eps.

    hard_tv: the least distance at alpha = 0. tightness: the largest by its bound. At eps 3e-5, slope: of log L on log
    alpha, L = distance / change of reward; price: the least step of the log mass off `good` [N] between alphas.
    """
    rewards = torch.stack([pair(eps) for eps in _EPSILONS])
    laws = {alpha: solve(rewards, alpha) for alpha in (0.0, *_ALPHAS)}
    distance = {alpha: total_variation(both[:, 0], both[:, 1]) for alpha, both in laws.items()}
    bounds = {alpha: torch.stack([policy_bound(one, two, alpha, gamma) for one, two in rewards]) for alpha in _ALPHAS}
    L = {alpha: float(distance[alpha][1] / (rewards[1, 0] - rewards[1, 1]).abs().max()) for alpha in _ALPHAS}
    wrong = {alpha: float((laws[alpha][1] @ (1 - good)).mean()) for alpha in _ALPHAS}
    return {
        "hard_tv": float(distance[0.0].min()),
        "tightness": max(float((distance[alpha] / bounds[alpha]).max()) for alpha in _ALPHAS),
        "slope": linear_regression([math.log(a) for a in _ALPHAS[:4]], [math.log(L[a]) for a in _ALPHAS[:4]]).slope,
        "price": min(math.log(wrong[b] / wrong[a]) for a, b in pairwise(_ALPHAS)),
        **{f"L_{alpha:g}": L[alpha] for alpha in _ALPHAS},
        **{f"accuracy_{alpha:g}": 1 - wrong[alpha] for alpha in _ALPHAS},
    }


_ALPHAS, _EPSILONS = (0.01, 0.03, 0.1, 0.3, 1.0), (1e-6, 3e-5, 1e-3, 0.1)  # the slope is that of the first four
_CARD = {"tie_break": 0.0, "eps": 3e-5, "actions": 5}

study = Study(
    claim="The optimal policy flips at any change of the reward; entropy makes it move in proportion, at a price.",
    learner=PolicyCliff,
    arms={
        "ascent, eps 0.1": {"eps": 0.1},
        "sampled, eps 0.1": {"gradient": "sampled", "eps": 0.1},
        "sampled, eps 3e-5": {"gradient": "sampled"},
        "sampled, alpha 0.03": {"gradient": "sampled", "alpha": 0.03},
        "sampled, alpha 0": {"gradient": "sampled", "alpha": 0.0},
    },
    criteria=(
        *(
            Criterion(f"{name}, {world}", f"{world}: {words}", ("ascent, eps 0.1", f"{world}_{metric}"),
                      above=above, below=below)
            for name, metric, above, below, words in (
                ("cliff", "hard_tv", 0.5, None, "least distance of the optima at alpha 0, for eps from 1e-6 to 0.1"),
                ("smooth", "slope", -1.1, -0.9, "slope of log L on log alpha, for alpha from 0.01 to 0.3"),
                ("bound", "tightness", 0.0, 1.0, "largest distance of the optima by its bound, over alpha and eps"),
                ("price", "price", 0.0, None, "least growth of the log mass off the best, from one alpha to the next"),
            )
            for world in ("tree", "mdp")
        ),
        *(
            Criterion(arm, f"{arm}: error of the trained distance", (arm, "tv_error"), above=-0.05, below=0.05)
            for arm in ("ascent, eps 0.1", "sampled, eps 0.1", "sampled, eps 3e-5", "sampled, alpha 0.03")
        ),
        Criterion("sampled, alpha 0", "sampled, alpha 0: the trained distance", ("sampled, alpha 0", "tv"),
                  above=0.5),
    ),
    smoke=Budget(seeds=1, settings={**_CARD, "states": 6, "batch": 16}, steps=20, probe="exact_figures"),
    fast=Budget(seeds=2, settings=_CARD, steps=1000, arms=("ascent, eps 0.1", "sampled, eps 0.1", "sampled, alpha 0"),
                probe="exact_figures"),
    full=Budget(seeds=20, settings=_CARD, steps=2000, probe="exact_figures"),
)  # fmt: skip
