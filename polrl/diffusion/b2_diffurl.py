r"""B²-DiffuRL: train the last denoising steps first, and compare samples that branch from one state.

A reward that comes only with the finished picture is sparse: policy gradient over the denoising steps (`ddpo`) gives
every step of a chain the same credit, those that did nothing, or harm, with the rest. The paper finds credit in two
ways. Backward progressive training trains only the last k steps at first, whose way to the reward is short, and then
lengthens the trained suffix towards the noise (E5). Branch-based sampling runs the steps before the suffix once, copies
the state, and lets each copy go on with its own noise: copies can differ only by what the trained steps did. Of each
branch the best and the worst are kept, if they stand out (E7, E8), and the rest is dropped.

Hu et al., arXiv 2503.11240, CVPR 2025. E1-E4 and E6, the chain, its log-probabilities and the clipped loss, are
DDPO's, in `ddpo`. E9 is `update` itself: two epochs of shuffled samples, each with its steps in an order of its own
(`_chain.shuffle_pairs`), AdamW, gradient norm clipped at 1; the whole network is trained here, not a low-rank addition.
E10, which compares with the branch's mean, is an addition for teaching; branches that tie have no gradient there and
are left out. The card has no E11-E14, and E15-E17 (DPPO) belong
to `diffusion_policy`.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from polrl import Budget, Criterion, Curve, ImageGrid, Metrics, Points, Study, View, equation, knob
from polrl.diffusion._chain import ChainConfig, DenoisingLearner, RingWorld, roll_out, shuffle_pairs
from polrl.diffusion.ddpo import DDPO, append_rewards, clipped_loss, noise_penalty, prompt_advantages


class Config(ChainConfig):
    """Settings of B²-DiffuRL; DDPO is `suffix_start` = `steps`, `branches` = 1 and `selection` = "none"."""

    growth_stages: int = Field(36, ge=1)  # after which all steps are trained; the paper's run has 100
    memory: int = Field(8, ge=0)  # earlier stages whose rewards count in E7

    suffix_start: int = knob(
        8, low=1, high="steps", symbol="k_L", first=True, paper=14, unit="steps",
        help="how many of the last steps are trained at first",
        at_low="the class is decided before: nothing to learn from", at_high="all steps from the start, as in DDPO",
    )  # fmt: skip
    branches: int = knob(
        4, low=1, high=8, symbol="B", paper=5, help="samples that go on from one state",
        at_low="nothing to compare with", at_high="fewer different states",
    )  # fmt: skip
    selection: Literal["best_worst", "group", "none"] = knob(
        "best_worst",
        help="best_worst: E8; group: less the branch's mean (E10); none: all, with DDPO's advantages",
    )
    pos_threshold: float = knob(
        0.5, low=0.0, high=1.5, symbol=r"\tau_+", help="a branch's best is kept if its score is at least this",
        at_low="every branch gives a winner", at_high="few samples are kept, slow",
    )  # fmt: skip
    neg_threshold: float = knob(
        0.5, low=0.0, high=1.5, symbol=r"-\tau_-", help="a branch's worst is kept if its score is below minus this",
        at_low="nearly every branch gives a loser", at_high="few samples are kept, slow",
    )  # fmt: skip
    neg_weight: float = knob(
        1.0, low=0.0, high=2.0, symbol=r"\beta_2", help="weight of the losers", at_low="only winners are imitated",
        at_high="losers are pushed away hard",
    )  # fmt: skip
    clip_range: float = knob(
        0.1, low=1e-4, high=1.0, scale="log", symbol="e", help="how far a step's ratio may move in a stage",
        at_low="tiny steps", at_high="large updates, which may collapse",
    )  # fmt: skip
    kl_weight: float = knob(
        0.0, low=0.0, high=10.0, scale="log_zero", smallest=1e-3, symbol=r"w_{\rm KL}",
        help="price of predicting another noise than the pretrained network (DPOK)",
        at_low="diversity is lost", at_high="stays at the pretrained model",
    )  # fmt: skip


@equation(
    "E5",
    r"k_s=\min\Big(k_L+\Big\lfloor\frac{s\,(S-k_L+1)}N\Big\rfloor,\;S\Big)",
    source="run_process.sh",
)
def suffix_length(stage: int, suffix_start: int, steps: int, growth_stages: int) -> int:
    """Return how many of the last steps stage s trains; from stage N on, all.

    Raises
    ------
    ValueError
        If the suffix is not from 1 to `steps` long.
    """
    if not 1 <= suffix_start <= steps:
        raise ValueError(f"suffix_start must be from 1 to the {steps} steps, got {suffix_start!r}")
    return min(suffix_start + stage * (steps - suffix_start + 1) // growth_stages, steps)


@equation(
    "E7",
    r"z=\frac{r-\mathrm{mean}}{\mathrm{std}+10^{-8}}\;\text{ over the prompt's rewards of this and the last 8 stages}",
    source="run_select.py",
)
def prompt_scores(
    reward: torch.Tensor, prompts: torch.Tensor, past: torch.Tensor, past_prompts: torch.Tensor
) -> torch.Tensor:
    """Return scores [n] of rewards [n], normalised by prompt together with past ones [m]; unbiased std, 0 for one."""
    rewards, every = torch.cat([reward, past]), torch.cat([prompts, past_prompts])
    own = (prompts.unsqueeze(1) == every.unsqueeze(0)).to(reward.dtype)  # [n, n + m]
    count = own.sum(dim=1)
    mean = own @ rewards / count
    squares = (own * (rewards - mean.unsqueeze(1)).square()).sum(dim=1)
    return (reward - mean) / ((squares / (count - 1).clamp(min=1)).sqrt() + 1e-8)


@equation(
    "E8",
    r"\text{of each branch keep }\arg\max z\text{ if }\max z\ge\tau_+\text{, and }\arg\min z\text{ if }\min z<\tau_-;"
    r"\qquad\hat A=z",
    source="run_select.py",
)
def best_and_worst(score: torch.Tensor, positive_threshold: float, negative_threshold: float) -> torch.Tensor:
    """Return which of the scores [P, B] are kept, as int64 numbers into their P * B entries: by branch, best first."""
    (most, best), (least, worst) = score.max(dim=1), score.min(dim=1)
    start = torch.arange(len(score), device=score.device) * score.shape[1]
    numbers = torch.stack([start + best, start + worst], dim=1)
    return numbers[torch.stack([most >= positive_threshold, least < negative_threshold], dim=1)]


@equation(
    "E10",
    r"\hat A=\frac{r-\mathrm{mean}_{\rm branch}\,r}{\mathrm{std}_{\rm batch}\,r+10^{-6}}",
    source="teaching extension",
)
def group_advantages(reward: torch.Tensor) -> torch.Tensor:
    """Return advantages [P, B] of rewards [P, B]: the prefix's part is gone; population std of the whole batch."""
    return (reward - reward.mean(dim=1, keepdim=True)) / (reward.std(correction=0) + 1e-6)


class B2DiffuRL(DenoisingLearner[Config]):
    """Sample prefixes, branch, select, train the suffix; a step is one stage."""

    curves = (
        *DenoisingLearner.curves,
        Curve(("suffix",), "Trained steps", "of the last"),
        Curve(("kept_share",), "Samples kept for training", "share"),
    )

    def setup(self) -> None:
        super().setup()
        self.kept = torch.zeros(0, device=self.device)
        self.kept_prompts = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.past = torch.zeros(0, device=self.device)  # rewards of the last stages, their prompts and stage numbers
        self.past_prompts = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.past_stages = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.final = torch.zeros(0, self.denoiser.dimension, device=self.device)  # the last stage, for the picture
        self.credit = torch.zeros(0, device=self.device)

    @property
    def suffix(self) -> int:
        config = self.config
        return suffix_length(self.step, config.suffix_start, config.steps, config.growth_stages)

    def update(self) -> Metrics:
        config, chain, k = self.config, self.chain(), self.suffix
        prompts = self.draw_classes(max(1, config.samples // config.branches))
        stage = roll_out(self.denoiser, chain, prompts, self.rng.torch, k, config.branches)
        self.evaluations += stage.evaluations
        reward, y = self.world.reward(stage.final, stage.classes), stage.classes
        advantage, selected = self.select(reward, y)

        losses, clipped = [], []
        for _ in range(config.epochs):
            for sample, j in shuffle_pairs(selected, k, config.minibatch, self.rng.torch):
                x, old, i = stage.before[sample, j], stage.log_probability[sample, j], stage.first + j
                noise = chain.predict(self.denoiser, x, i, y[sample])
                log_probability = chain.log_probability(stage.after[sample, j], chain.step(x, noise, i))
                loss = clipped_loss(
                    log_probability, old, advantage[sample], config.clip_range, config.adv_clip, 1.0, config.neg_weight
                )
                if config.kl_weight > 0:
                    with torch.no_grad():
                        pretrained_noise = chain.predict(self.pretrained, x, i, y[sample])
                    loss = loss + noise_penalty(noise, pretrained_noise, config.kl_weight)
                    self.evaluations += len(x)
                self.descend(loss)
                self.evaluations += 3 * len(x)  # forwards once, backwards counts twice
                losses.append(loss.detach())
                clipped.append((log_probability.detach() - old).expm1().abs() > config.clip_range)
        nothing = torch.zeros(1, device=self.device)  # a stage in which no sample stood out
        self.final, self.credit = stage.final, torch.zeros_like(advantage).index_copy(0, selected, advantage[selected])
        return {
            "loss": torch.stack(losses or [nothing[0]]).mean(),
            "batch_reward": reward.mean(),
            "clipped": torch.cat(clipped or [nothing]).float().mean(),
            "suffix": float(k),
            "kept_share": len(selected) / len(y),
            **self.follow(),
        }

    def select(self, reward: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return advantages [n] and the numbers of the samples to be trained on, for rewards and prompts [n]."""
        config = self.config
        everyone = torch.arange(len(y), device=self.device)
        by_branch = reward.reshape(-1, config.branches)
        self.kept, self.kept_prompts = append_rewards(self.kept, self.kept_prompts, reward, y, config.buffer_size)
        recent = self.past_stages >= self.step - config.memory
        past, past_prompts = self.past[recent], self.past_prompts[recent]
        self.past, self.past_prompts = torch.cat([past, reward]), torch.cat([past_prompts, y])
        self.past_stages = torch.cat([self.past_stages[recent], torch.full_like(y, self.step)])
        if config.selection == "none":
            return prompt_advantages(reward, y, self.kept, self.kept_prompts, config.min_count), everyone
        if config.selection == "group":
            tied = by_branch.amin(dim=1) == by_branch.amax(dim=1)  # no advantage, no gradient: not worth evaluating
            return group_advantages(by_branch).flatten(), everyone[~tied.repeat_interleave(config.branches)]
        score = prompt_scores(reward, y, past, past_prompts)
        return score, best_and_worst(score.reshape_as(by_branch), config.pos_threshold, -config.neg_threshold)

    def views(self) -> dict[str, View]:
        pictures = super().views()
        won, lost = self.credit > 0, self.credit < 0
        if isinstance(self.world, RingWorld):
            groups = {"not used": ~won & ~lost, "pushed away": lost, "imitated": won}
            pictures["stage"] = Points(
                title="The last stage's samples, and what was made of them",
                alt="Finished points of the last stage: those imitated, those pushed away, and those not used",
                groups={name: self.final[which].cpu().numpy() for name, which in groups.items()},
                x_range=(-3.0, 3.0),
                y_range=(-3.0, 3.0),
            )
        elif len(self.final):
            rows = min(4, len(self.final) // self.config.branches)
            images = self.final[: rows * self.config.branches].reshape(rows, self.config.branches, 8, 8)
            pictures["stage"] = ImageGrid(
                title="Branches of the last stage",
                alt="Finished images of the last stage: a row for each prefix, a column for each branch",
                images=images.cpu().numpy(),
                low=-1.0,
                high=1.0,
            )
        return pictures


study = Study(
    claim="Training the last steps first, on branches, reaches the same alignment with fewer network evaluations than "
    "DDPO, and as much diversity.",
    learner=B2DiffuRL,
    arms={
        "DDPO": {"learner": DDPO},
        "backward": {"branches": 1, "selection": "none"},
        "backward, best and worst": {},
        "backward, group": {"selection": "group"},
    },
    # Evaluations: 1 a sampled row, 3 a trained one. The target is an alignment of 0.96, reached as `follow` says.
    criteria=(
        Criterion(
            "cheaper",
            "with branches, the best and the worst kept, alignment 0.96 takes at most 80 % of DDPO's network "
            "evaluations (difference of logarithms above 0.223)",
            plus=("DDPO", "log_evaluations_to_target"),
            minus=("backward, best and worst", "log_evaluations_to_target"),
            above=0.2231,
        ),
        Criterion(
            "as diverse",
            "its diversity there is at most 0.03 below DDPO's",
            plus=("backward, best and worst", "diversity_at_target"),
            minus=("DDPO", "diversity_at_target"),
            above=-0.03,
        ),
        Criterion(
            "cheaper, group",
            "compared with the branch's mean, it takes at most 80 % as well",
            plus=("DDPO", "log_evaluations_to_target"),
            minus=("backward, group", "log_evaluations_to_target"),
            above=0.2231,
        ),
        Criterion(
            "as diverse, group",
            "and its diversity there is at most 0.03 below DDPO's",
            plus=("backward, group", "diversity_at_target"),
            minus=("DDPO", "diversity_at_target"),
            above=-0.03,
        ),
        Criterion(
            "all arrive",
            "every run with branches reaches the target within the budget",
            plus=("backward, best and worst", "reached_target"),
            above=0.99,
        ),
    ),
    smoke=Budget(seeds=1, settings={"samples": 16, "measured": 32}, steps=3),
    fast=Budget(seeds=2, settings={"measured": 256}, steps=56, arms=("DDPO", "backward, best and worst")),
    full=Budget(seeds=5, settings={"measured": 512}, steps=60),
)
