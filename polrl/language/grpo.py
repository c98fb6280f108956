r"""GRPO: a language model learns from rewards that a program can check; the chapter's baseline.

A prompt is answered several times, each answer is checked, and what did better than the group's mean is made
likelier. The group replaces a learned value function: the advantage is the reward, standardised among the answers to
the same prompt (B4). Each sampled batch may be used for several updates; then the policy is no longer the one that
sampled, the ratio of their probabilities corrects for it, and a clip stops what has moved far enough (B7).

What goes wrong: a few noisy rewards decide about every token, so a long step forgets what the base model knew; and
only rewarded answers count, so entropy falls, groups agree (all right or all wrong), and a group that agrees teaches
nothing. Three strengths hold against it: the KL divergence from the base model (B21), an entropy bonus (B22), and
the clip. How a sum over tokens becomes one number (B13 to B16), and whether a group's spread is divided out, decides
which answers and which prompts count.

The world: a tiny Llama over characters that adds numbers of two digits and gets four in ten right (`add-S`, or
`add-L` with six times the parameters), or of one to three digits (`add-mix-S`). Shao et al., arXiv 2402.03300. There
is no card of this paper: its equations are those of the chapter's shared card, B1 to B22, in `_group_policy.py`, and
the numbers are this file's own. E1 and E2 below are figures to look at, not parts of the update.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

import polrl
from polrl import Budget, Criterion, Curve, Learner, Metrics, Study, View, equation, knob
from polrl.language._group_policy import (
    Aggregation,
    StdMode,
    aggregate,
    clip_loss,
    entropy,
    grpo_advantage,
    informative,
    k3,
    token_mean,
    token_ratio,
)
from polrl.language._verified_sums import VerifiedSums
from polrl.models.causal_lm import token_log_probs


class Config(polrl.Config):
    """Settings. `t_max` is the longest completion, and the constant of the aggregation `seq_sum_const`."""

    checkpoint: Literal["add-S", "add-mix-S", "add-L"] = "add-S"
    prompts: int = Field(16, ge=1, description="prompts a batch")
    group_size: int = Field(8, ge=2, description="completions a prompt")
    t_max: int = Field(6, ge=1, le=64, description="tokens a completion, at most")
    held_out: int = Field(60, ge=3, description="held-out prompts to be judged on")

    beta: float = knob(
        0.0, low=0.0, high=10.0, scale="log_zero", smallest=1e-3, symbol=r"\beta", first=True,
        help="what a nat of divergence from the base model costs", at_low="goes wherever the rewards lead",
        at_high="the base model is copied, nothing is learned",
    )  # fmt: skip
    entropy: float = knob(
        0.0, low=0.0, high=1.0, scale="log_zero", smallest=1e-3, symbol="c_H",
        help="what a nat of entropy earns", at_low="answers become certain", at_high="answers become noise",
    )  # fmt: skip
    clip_low: float = knob(
        0.2, low=0.0, high=1.0, symbol=r"\varepsilon_{low}", help="how far a bad token's ratio may fall below 1",
        at_low="a bad token is pushed down in a batch's first update only", at_high="down to nothing",
    )  # fmt: skip
    clip_high: float = knob(
        0.2, low=0.0, high=5.0, scale="log_zero", smallest=0.01, symbol=r"\varepsilon_{high}",
        help="how far a good token's ratio may rise above 1", at_low="a good token is pushed up in a batch's first "
        "update only", at_high="hardly any limit: rare tokens may take over in one batch",
    )  # fmt: skip
    reuse: int = knob(
        2, low=1, high=16, symbol=r"\mu", help="updates from one sampled batch",
        at_low="on-policy: nothing is ever clipped", at_high="cheap, stale: the clip has work to do",
    )  # fmt: skip
    temperature: float = knob(
        1.0, low=0.2, high=2.0, symbol="T", help="of the samples, and of the policy that is trained on them",
        at_low="groups agree and teach nothing", at_high="noise is scored",
    )  # fmt: skip
    learning_rate: float = knob(
        2e-4, low=1e-5, high=1e-2, scale="log", symbol=r"\eta", help="of Adam",
        at_low="hardly moves", at_high="forgets how to add",
    )  # fmt: skip
    std_mode: StdMode = knob("population", help="what an advantage is divided by: the spread of its group, or nothing")
    aggregation: Aggregation = knob("seq_mean", help="how the tokens' losses become one number: B13 to B16")


@equation(
    "E1",
    r"w(p)=\frac1G\sum_i|A_i|=\begin{cases}2\sqrt{p(1-p)}&\text{divided by the spread}\\2p(1-p)&\text{not}\end{cases}",
    source="derived from B2 and B4",
)
def group_weight(pass_rate: torch.Tensor, by_spread: bool) -> torch.Tensor:
    """Return how much a prompt with rewards 0 and 1 counts, by the share of right answers in its group, 0 < p < 1."""
    variance = pass_rate * (1 - pass_rate)
    return 2 * (variance.sqrt() if by_spread else variance)


@equation(
    "E2",
    r"\frac{\sum m\,(1-M)}{\sum m},\quad 1-M=\mathbb 1[A>0\wedge\rho>1+\varepsilon_{high}]"
    r"+\mathbb 1[A<0\wedge\rho<1-\varepsilon_{low}]",
    source="derived from B7",
)
def clipped_share(
    ratio: torch.Tensor, adv: torch.Tensor, mask: torch.Tensor, eps_low: float, eps_high: float
) -> torch.Tensor:
    """Return the share of real tokens [N, T], a scalar, whose gradient the clip has stopped."""
    adv = adv.unsqueeze(1)
    stopped = ((adv > 0) & (ratio > 1 + eps_high)) | ((adv < 0) & (ratio < 1 - eps_low))
    return token_mean(stopped.to(ratio.dtype), mask)


class GRPO(Learner[Config]):
    """Sample groups, check, standardise, clip; a step is one gradient step on the latest batch."""

    constants = ("world",)
    evaluate_every = 25
    curves = (
        Curve(("batch_reward", "accuracy"), "Right answers", "share"),
        Curve(("entropy", "mean_entropy"), "Entropy of a token", "nats"),
        Curve(("kl", "mean_kl"), "KL of a token from the base model", "nats"),
        Curve(("clipped", "groups_that_differ"), "Tokens clipped; groups that teach", "share"),
    )

    def setup(self) -> None:
        c = self.config
        self.world = VerifiedSums(
            c.checkpoint, prompts=c.prompts, group_size=c.group_size, t_max=c.t_max, held_out=c.held_out,
            rng=self.rng, seed=c.seed, device=self.device,
        )  # fmt: skip
        self.policy = self.world.new_policy()
        self.optimizer = torch.optim.Adam(self.policy.parameters(), fused=True)
        self.batch = self.world.play(self.policy, c.temperature, self.rng)  # for the pictures before the first update
        with torch.no_grad():  # log-probabilities of the batch before the last update
            self.before = token_log_probs(self.batch.logits(self.policy), self.batch.ids)
        self.uses = c.reuse

    def update(self) -> Metrics:
        config, world = self.config, self.world
        if self.uses >= config.reuse or self.batch.temperature != config.temperature:
            self.batch, self.uses = world.play(self.policy, config.temperature, self.rng), 0
        self.uses += 1
        batch, mask = self.batch, self.batch.mask

        adv = grpo_advantage(batch.rewards, world.group, config.std_mode)  # B4
        logits = batch.logits(self.policy)
        logp = token_log_probs(logits, batch.ids)
        if self.uses == 1:
            batch.old_logp = logp.detach()  # nothing has changed since it was sampled
        ratio = token_ratio(logp, batch.old_logp, mask)  # 1 in the first of a batch's updates
        drift = k3(logp, batch.ref_logp, mask)  # B21
        token_loss = clip_loss(ratio, adv, config.clip_low, config.clip_high) + config.beta * drift  # B7
        uncertainty = token_mean(entropy(logits), mask)  # B22
        loss = aggregate(token_loss, mask, config.aggregation, config.t_max) - config.entropy * uncertainty

        self.optimizer.param_groups[0]["lr"] = config.learning_rate
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()

        self.before = logp.detach()
        return {
            "batch_reward": batch.rewards.mean(),
            "entropy": uncertainty,
            "kl": token_mean(drift, mask),
            "clipped": clipped_share(ratio, adv, mask, config.clip_low, config.clip_high),
            "groups_that_differ": informative(batch.rewards, world.group).float().mean(),
            "tokens": mask.sum(dim=1).mean(),
        }

    def evaluate(self) -> Metrics:
        """Judge on held-out prompts: accuracy, pass@8, entropy, KL, length, and the gains over the base model."""
        figures, base = self.world.judge(self.policy), self.world.base_figures
        gains = ("accuracy", "accuracy_on_hard", "pass_at_8", "mean_entropy")
        return {**figures, **{f"gain_in_{name}": figures[name] - base[name] for name in gains}}

    def views(self) -> dict[str, View]:
        adv = grpo_advantage(self.batch.rewards, self.world.group, self.config.std_mode)
        return self.world.pictures(self.policy, self.batch, self.before, adv, self.rng)


study = Study(
    claim="Group-relative rewards teach sums never trained on; KL and clip hold the policy near the base model.",
    learner=GRPO,
    arms={
        "GRPO": {},
        "KL": {"beta": 1.0},
        "no spread": {"std_mode": "none"},
        "Dr. GRPO": {"std_mode": "none", "aggregation": "seq_sum_const"},
        "stale": {"reuse": 8},
        "stale, no clip": {"reuse": 8, "clip_low": 1.0, "clip_high": 5.0},
    },
    criteria=(
        Criterion(
            "learns",
            "GRPO raises the accuracy on held-out sums by at least 15 points over the base model",
            plus=("GRPO", "gain_in_accuracy"),
            above=0.15,
        ),
        Criterion(
            "leash",
            "a KL strength of 1 keeps a token nearer to the base model, by at least 0.05 nats",
            plus=("GRPO", "mean_kl"),
            minus=("KL", "mean_kl"),
            above=0.05,
        ),
        Criterion(
            "price",
            "the KL has a price: without it the accuracy is higher",
            plus=("GRPO", "accuracy"),
            minus=("KL", "accuracy"),
        ),
        Criterion(
            "spread",
            "dividing by the group's spread makes prompts that the base model fails count more, and be learned better",
            plus=("GRPO", "accuracy_on_hard"),
            minus=("no spread", "accuracy_on_hard"),
        ),
        Criterion(
            "no bias to see",
            "with answers of nearly one length, Dr. GRPO's accuracy is GRPO's, within 5 points",
            plus=("Dr. GRPO", "accuracy"),
            minus=("GRPO", "accuracy"),
            above=-0.05,
            below=0.05,
        ),
        Criterion(
            "clip holds",
            "with eight updates a batch, the policy goes farther from the base model without the clip",
            plus=("stale, no clip", "mean_kl"),
            minus=("stale", "mean_kl"),
        ),
        Criterion(
            "clip helps",
            "with eight updates a batch, the accuracy is higher with the clip",
            plus=("stale", "accuracy"),
            minus=("stale, no clip", "accuracy"),
        ),
    ),
    smoke=Budget(seeds=1, steps=3, settings={"prompts": 3, "group_size": 4, "held_out": 6}),
    fast=Budget(seeds=2, steps=40, arms=("GRPO", "KL")),
    full=Budget(seeds=4, steps=100, settings={"held_out": 120}),
)
