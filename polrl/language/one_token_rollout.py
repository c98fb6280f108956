r"""One-Token Rollout (OTR): supervised fine-tuning that learns only as much as the model itself would have said.

Supervised fine-tuning (SFT) raises the probability of every reference token, and most where the model holds it for
unlikely. There it also does the most harm: an error in the references is learned as eagerly as a fact, and what the
model knew before is bent. Reinforcement learning spares what is never sampled. OTR buys that for the price of one
token: at each position of the reference text the model draws K candidates for the next token from its own
distribution. One that equals the reference earns 1, any other earns beta < 1, and a policy-gradient step follows. A
reference token that the model never draws is not learned; no sentence is ever written.

The reward of the wrong draws, beta, is the knob. Below zero they are pushed down; towards one every draw earns alike,
and nothing is learned from the references.

Two worlds: a tiny language model that adds and subtracts, fine-tuned on additions of which 30 % are wrong; and one
softmax over ten tokens, in which everything can be followed exactly.

Ming, Wu, Hu, He and Yu, arXiv 2509.26313, without official code. E1 to E6 are the paper's; E6 is the form that
`update` uses, with E7 in place of the draws if asked. E8 is what `views` draws. E9 is Dynamic Fine-Tuning (DFT), the
paper's rival: E7 with kappa = 1 and beta = 0. E10, not needed for training, says what OTR is made of.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

import polrl
from polrl import Budget, Criterion, Curve, Learner, Metrics, Study, View, equation, knob
from polrl.language._one_token_rollout_worlds import Additions, OneSoftmax

Tensor = torch.Tensor


class Config(polrl.Config):
    """Settings; `checkpoint`, `noise`, `batch_size` and `held_out` are the additions'."""

    world: Literal["additions", "one_softmax"] = "additions"
    checkpoint: str = "add-sub-S"
    noise: float = Field(0.3, ge=0.0, le=1.0)  # share of the references with one wrong digit
    batch_size: int = Field(64, ge=1)
    held_out: int = Field(256, ge=1)  # problems of each kind on which the model is judged

    beta: float = knob(
        -0.1, low=-1.0, high=0.9, symbol=r"\beta", first=True, help="what a draw that is not the reference earns",
        at_low="own wrong draws are pushed down hard: the policy sharpens", at_high="all draws earn alike: no learning",
    )  # fmt: skip
    kappa: float = knob(
        1.3, low=0.5, high=5.0, scale="log", symbol=r"\kappa", help="temperature of the draws",
        at_low="greedy draws: unlikely references are ignored", at_high="draws like dice: SFT, a V-th as fast",
    )  # fmt: skip
    num_samples: int = knob(
        256, low=1, high=256, scale="log", symbol="K", help="draws at each position",
        at_low="a reference is hit or missed: noisy, most positions silent", at_high="close to the exact expectation",
    )  # fmt: skip
    rollout: Literal["sampled", "exact"] = knob("sampled", help="draws, or their expectation")
    mix_sft: float = knob(
        0.0, low=0.0, high=1.0, symbol=r"\lambda", help="share of plain SFT in the loss", at_low="OTR", at_high="SFT"
    )
    learning_rate: float = knob(
        1e-3, low=1e-4, high=3e-3, scale="log", symbol=r"\eta", help="of Adam; one softmax takes 1000 times as much",
        at_low="hardly moves", at_high="forgets the other task within a few steps",
    )  # fmt: skip


def mean_by_sequence(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean [] over sequences of the mean over response tokens, for values and mask [B, T].

    Every sequence counts alike, however long it is; one without any response token counts as zero.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    if values.shape != mask.shape or values.dim() != 2:
        raise ValueError(f"the mask must be [B, T] = {[*values.shape]} as the targets are, got {[*mask.shape]}")
    mask = mask.to(values.dtype)
    return ((values * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()


def check_tokens(table: Tensor, tokens: Tensor) -> None:
    """Raise ValueError unless a table [..., V] has one token for each of its positions [...]."""
    if table.shape[:-1] != tokens.shape:
        raise ValueError(f"one token for each of the positions {[*table.shape[:-1]]} is needed, got {[*tokens.shape]}")


def at(table: Tensor, tokens: Tensor) -> Tensor:
    """Return the entry of a table [..., V] at the token of each position [...]."""
    check_tokens(table, tokens)
    return table.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


@equation("E1", r"L_{\rm SFT}=-\frac1T\sum_t\log\pi(x_t|s_t)", source="Eq. 1")
def sft_loss(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Return the loss of supervised fine-tuning, a scalar: logits [B, T, V], targets int64 [B, T], mask [B, T]."""
    return mean_by_sequence(-at(torch.log_softmax(logits, dim=-1), targets), mask)


@equation(
    "E2",
    r"\nabla J_t=\mathbb E_{a\sim\pi(\cdot|s_t)}\big[r(s_t,a)\,\nabla\log\pi(a|s_t)\big],\qquad"
    r"\frac{\partial J_t}{\partial l_{t,v}}=\pi(v)\Big(r(v)-\sum_a\pi(a)\,r(a)\Big)",
    source="Sec. 3",
)
def one_step_gradient(logits: Tensor, reward: Tensor) -> Tensor:
    """Return the policy gradient by the logits [..., V] of a rollout of one token, for each token's reward [..., V]."""
    pi = torch.softmax(logits, dim=-1)
    return pi * (reward - (pi * reward).sum(dim=-1, keepdim=True))


@equation("E3", r"\pi'(a|s_t)=\mathrm{softmax}(l_t/\kappa)_a,\qquad a_{t,1..K}\sim\pi'\ \text{i.i.d.}", source="Sec. 3")
def rollout_policy(logits: Tensor, kappa: float) -> Tensor:
    """Return the probabilities [..., V] from which the candidates are drawn, a constant for autograd.

    Raises
    ------
    ValueError
        If kappa is not above 0.
    """
    if not kappa > 0:
        raise ValueError(f"kappa must be above 0, got {kappa!r}")
    return torch.softmax(logits.detach() / kappa, dim=-1)


@torch.no_grad()
def draw_shares(probabilities: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
    """Draw K tokens at each position, with replacement, and return which share N(v)/K fell on each token [..., V].

    Sorted uniform numbers are the partial sums of exponential ones over their total: no sorting is needed, and the
    draws that fell on a token are those between two steps of the distribution function. Half the time of
    `torch.multinomial` and a histogram.

    Raises
    ------
    ValueError
        If there is not at least one draw.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples!r}")
    flat = probabilities.reshape(-1, probabilities.shape[-1])
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))  # sums in half precision would lose tokens
    uniform = torch.rand(len(flat), num_samples + 1, generator=generator, device=flat.device, dtype=flat.dtype)
    arrivals = -torch.log1p(-uniform).cumsum(dim=1)
    steps = flat.cumsum(dim=1)
    steps = steps[:, :-1] / steps[:, -1:] * arrivals[:, -1:]
    below = torch.searchsorted(arrivals[:, :-1].contiguous(), steps)
    none, every = below.new_zeros(len(flat), 1), below.new_full((len(flat), 1), num_samples)
    counts = torch.diff(below, dim=1, prepend=none, append=every)
    return (counts.to(flat.dtype) / num_samples).to(probabilities.dtype).reshape(probabilities.shape)


@equation("E4", r"R(a,x_t)=\begin{cases}1&a=x_t\\ \beta&\text{else}\end{cases}", source="Sec. 3")
def reward(sampled: Tensor, targets: Tensor, beta: float, dtype: torch.dtype | None = None) -> Tensor:
    """Return the reward [..., K] of the draws [..., K], for reference tokens [...]; in torch's default dtype."""
    check_tokens(sampled, targets)
    earned = torch.full(sampled.shape, beta, dtype=dtype or torch.get_default_dtype(), device=sampled.device)
    return earned.masked_fill(sampled == targets.unsqueeze(-1), 1.0)


@equation(
    "E5",
    r"L_{\rm OTR}=-\frac1T\sum_t\frac1K\sum_{j=1}^K\mathrm{sg}\big(R(a_{t,j},x_t)\big)\,\log\pi(a_{t,j}|s_t)",
    source="Eq. 8",
)
def rollout_loss(logits: Tensor, sampled: Tensor, targets: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Return the loss, a scalar, from the draws themselves, int64 [B, T, K]; log pi is at temperature 1."""
    check_tokens(logits, targets)
    log_pi = torch.log_softmax(logits, dim=-1).gather(-1, sampled)
    return mean_by_sequence(-(reward(sampled, targets, beta, log_pi.dtype) * log_pi).mean(dim=-1), mask)


def token_weights(share: Tensor, targets: Tensor, beta: float) -> Tensor:
    """Return w_v = R(v, x_t) N_t(v)/K [..., V], a constant: how far each token's log-probability is pushed up."""
    share = share.detach()
    return (beta * share).scatter(-1, targets.unsqueeze(-1), at(share, targets).unsqueeze(-1))


@equation(
    "E6",
    r"L_{\rm OTR}=-\frac1T\sum_t\Big[\frac{n_t}K\log\pi(x_t|s_t)+"
    r"\beta\sum_{v\ne x_t}\frac{N_t(v)}K\log\pi(v|s_t)\Big]",
    source="Sec. 3",
)
def count_loss(logits: Tensor, share: Tensor, targets: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Return the same loss, a scalar, from the share N_t(v)/K of the draws on each token [B, T, V]."""
    weights = token_weights(share, targets, beta)
    return mean_by_sequence(-(weights * torch.log_softmax(logits, dim=-1)).sum(dim=-1), mask)


@equation(
    "E7",
    r"L_{\rm exact}=-\frac1T\sum_t\Big[\mathrm{sg}(\pi'(x_t))\log\pi(x_t)+"
    r"\beta\sum_{v\ne x_t}\mathrm{sg}(\pi'(v))\log\pi(v)\Big]",
    source="derived: the limit of infinitely many draws",
)
def exact_loss(logits: Tensor, targets: Tensor, mask: Tensor, beta: float, kappa: float) -> Tensor:
    """Return the loss that the draws have on average, a scalar."""
    return count_loss(logits, rollout_policy(logits, kappa), targets, mask, beta)


@equation(
    "E8",
    r"\frac{\partial L_t}{\partial l_{t,v}}=W\,\pi(v)-w_v,\qquad w_v=R(v,x_t)\,\frac{N_t(v)}K,\quad W=\sum_vw_v",
    source="derived; times 1/T",
)
def logit_gradient(logits: Tensor, weights: Tensor) -> Tensor:
    """Return the gradient [..., V] of a position's loss by its logits, for `token_weights` [..., V]."""
    return weights.sum(dim=-1, keepdim=True) * torch.softmax(logits, dim=-1) - weights


@equation("E9", r"L_{\rm DFT}=-\frac1T\sum_t\mathrm{sg}(\pi(x_t))\log\pi(x_t)", source="Sec. 3.4: the rival")
def dft_loss(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Return the loss of Dynamic Fine-Tuning, a scalar: each token weighed by the probability that it has."""
    log_pi = at(torch.log_softmax(logits, dim=-1), targets)
    return mean_by_sequence(-log_pi.detach().exp() * log_pi, mask)


@equation(
    "E10",
    r"L_t=(1-\beta)\,P(x_t)\,(-\log\pi(x_t))+\beta\,\mathrm{CE}(\mathrm{sg}\,P,\pi),\qquad"
    r"\mathrm{CE}(P,\pi)=-\sum_vP(v)\log\pi(v),\quad P=N_t/K\ \text{or}\ \pi'",
    source="derived",
)
def decomposed_loss(logits: Tensor, share: Tensor, targets: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Return E6 as reweighted SFT plus beta times "stay with your own samples", a scalar."""
    log_pi, share = torch.log_softmax(logits, dim=-1), share.detach()
    reweighted = -(1 - beta) * at(share, targets) * at(log_pi, targets)
    return mean_by_sequence(reweighted - beta * (share * log_pi).sum(dim=-1), mask)


class OneTokenRollout(Learner[Config]):
    """Fine-tuning on references by one-token rollouts; a step is one batch of references."""

    constants = ("world",)
    evaluate_every = 25
    curves = (
        Curve(("accuracy", "elsewhere"), "Right answers: taught, and not taught", "probability"),
        Curve(("hit_fraction", "reference_probability"), "Reference drawn, and its probability", "mean over tokens"),
        Curve(("entropy",), "Entropy of a token", "nats"),
        Curve(("kl",), "KL of a token from the start", "nats"),
    )

    def setup(self) -> None:
        config = self.config
        self.world: Additions | OneSoftmax
        if config.world == "additions":
            self.world = Additions(config.checkpoint, config.noise, config.held_out, self.rng.numpy, self.device)
        else:
            self.world = OneSoftmax(self.device)
        self.policy = self.world.new_policy()
        self.optimizer = self.world.new_optimizer(self.policy)

    def update(self) -> Metrics:
        config = self.config
        batch = self.world.draw(config.batch_size, self.rng.torch)
        logits = self.world.logits(self.policy, batch)  # one forward pass serves both the draws and the loss

        share = self.rolled_out(logits)
        rollout = count_loss(logits, share, batch.targets, batch.mask, config.beta)
        imitation = sft_loss(logits, batch.targets, batch.mask)
        loss = (1 - config.mix_sft) * rollout + config.mix_sft * imitation

        self.optimizer.param_groups[0]["lr"] = config.learning_rate * self.world.pace
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

        log_pi, tokens = torch.log_softmax(logits.detach(), dim=-1), batch.mask / batch.mask.sum()
        return {
            "loss": loss,
            "hit_fraction": (tokens * at(share, batch.targets)).sum(),
            "reference_probability": (tokens * at(log_pi, batch.targets).exp()).sum(),
            "entropy": -(tokens * (log_pi.exp() * log_pi).sum(dim=-1)).sum(),
        }

    def rolled_out(self, logits: Tensor) -> Tensor:
        """Return which share of the draws falls on each token [B, T, V]: of K draws, or on average."""
        config, probabilities = self.config, rollout_policy(logits, self.config.kappa)
        if config.rollout == "exact":
            return probabilities
        return draw_shares(probabilities, config.num_samples, self.rng.torch)

    def evaluate(self) -> Metrics:
        """Judge the policy: right answers where it is taught and where not, entropy, KL from where it began."""
        return self.world.judge(self.policy)

    def views(self) -> dict[str, View]:
        config, shown = self.config, self.world.shown
        logits = self.world.logits(self.policy, shown)
        share = self.rolled_out(logits)
        weights = (1 - config.mix_sft) * token_weights(share, shown.targets, config.beta)
        weights.scatter_add_(
            -1, shown.targets.unsqueeze(-1), weights.new_full((*shown.targets.shape, 1), config.mix_sft)
        )
        return self.world.pictures(torch.softmax(logits, dim=-1), share, -logit_gradient(logits, weights))


_SFT, _DFT = {"mix_sft": 1.0}, {"rollout": "exact", "kappa": 1.0, "beta": 0.0}
_SOFTMAX = {"world": "one_softmax", "learning_rate": 3e-3}  # long steps: 100 of them converge

study = Study(
    claim="From references of which 30 % are wrong, OTR learns to add better than SFT, and unlearns subtraction less.",
    learner=OneTokenRollout,
    arms={
        "SFT": _SFT,
        "OTR": {"num_samples": 64},
        "OTR exact": {"rollout": "exact"},
        "DFT": _DFT,
        "SFT, no errors": {**_SFT, "noise": 0.0},  # controls: what the errors have to do with it
        "OTR, no errors": {"num_samples": 64, "noise": 0.0},
        "softmax, SFT": {**_SOFTMAX, **_SFT},
        "softmax, OTR": {**_SOFTMAX, "num_samples": 64},
        "softmax, DFT": {**_SOFTMAX, **_DFT},
        "softmax, beta 0.6": {**_SOFTMAX, "rollout": "exact", "beta": 0.6},
    },
    criteria=(
        Criterion("noise", "OTR's accuracy on additions exceeds SFT's by 10 points or more",
                  ("OTR", "accuracy"), ("SFT", "accuracy"), above=0.1),
        Criterion("forgetting", "OTR loses less accuracy on subtractions than SFT",
                  ("SFT", "forgotten"), ("OTR", "forgotten")),
        Criterion("cap", "SFT stays near the references' 70 %: below 75 %", ("SFT", "accuracy"), below=0.75),
        Criterion("SFT copies", "one softmax: SFT ends at the references' own 0.7, within 0.01",
                  ("softmax, SFT", "accuracy"), above=0.69, below=0.71),
        Criterion("OTR decides", "one softmax: OTR puts more than 0.99 on the reference that is most frequent",
                  ("softmax, OTR", "accuracy"), above=0.99),
        Criterion("DFT decides", "one softmax: so does DFT", ("softmax, DFT", "accuracy"), above=0.99),
        Criterion("beta flattens", "one softmax: with beta = 0.6 less than 0.5 is left of it",
                  ("softmax, beta 0.6", "accuracy"), below=0.5),
    ),
    smoke=Budget(seeds=1, steps=3, settings={"batch_size": 4, "held_out": 8}, arms=("SFT", "OTR", "softmax, OTR")),
    fast=Budget(seeds=3, steps=100, settings={"batch_size": 32, "held_out": 128},
                arms=("SFT", "OTR", "softmax, SFT", "softmax, OTR", "softmax, DFT", "softmax, beta 0.6")),
    full=Budget(seeds=5, steps=300),
)  # fmt: skip
