r"""DDPO: policy gradient through the steps of a diffusion sampler; the baseline of this chapter.

A diffusion sampler takes S small random steps from noise to a picture, and only the picture can be judged. Each step
is a Gaussian, so its probability is known, and the chain is a Markov decision process whose actions are the steps
(E1). Policy gradient makes the steps of well-rewarded chains likelier. PPO's clipped ratio, taken for each step by
itself and not for the chain, allows several passes over the same samples. Advantages compare a sample with recent
ones for the same prompt. What goes wrong: every step of a chain gets the same credit, and whatever the reward does
not mention is given up: samples of a class grow alike, and a reward that can be gamed is gamed. `kl_weight` adds
DPOK's penalty: stay near the noise that the pretrained network predicts.

Black et al., arXiv 2305.13301 (DDPO); Fan et al., arXiv 2305.16381 (DPOK). The numbers are those of the card of
`b2_diffurl`. E1 is the setting, played by `_chain.roll_out`. E3 and E4, the DDIM step and its log-probability, are
`polrl.models.diffusion.ddim_step` and `step_log_probability`; where predicted data are clipped, the noise is computed
anew there, which the official code does not do. E5 belongs to `b2_diffurl`. Of DPOK the learner takes the penalty, E6b;
its surrogate, E6d, stands beside DDPO's to be compared with, and its value network is left out.
"""

from __future__ import annotations

import torch

from polrl import Budget, Criterion, Metrics, Study, equation, knob
from polrl.diffusion._chain import ChainConfig, DenoisingLearner, roll_out, shuffle_pairs


class Config(ChainConfig):
    """Settings of DDPO; a clip range of 0.1 is the toy's, whose ratios average over two dimensions only."""

    kl_weight: float = knob(
        0.0, low=0.0, high=10.0, scale="log_zero", smallest=1e-3, symbol=r"w_{\rm KL}", first=True, paper=0.01,
        help="price of predicting another noise than the pretrained network",
        at_low="a reward that can be gamed is gamed, samples grow alike", at_high="stays at the pretrained model",
    )  # fmt: skip
    clip_range: float = knob(
        0.1, low=1e-4, high=1.0, scale="log", symbol="e", paper=1e-4, help="how far a step's ratio may move in a stage",
        at_low="tiny steps", at_high="large updates, which may collapse",
    )  # fmt: skip


@equation(
    "E2",
    r"\nabla J=\mathbb E\Big[\sum_i\rho_i\,r\,\nabla\log p_\theta(x^{(i+1)}|x^{(i)},c)\Big],\qquad "
    r"\rho_i=\frac{p_\theta(x^{(i+1)}|x^{(i)},c)}{p_{\theta_{\rm old}}(x^{(i+1)}|x^{(i)},c)}",
    source="DDPO, Eq. 4 and 5",
)
def importance_objective(
    log_probability: torch.Tensor, old_log_probability: torch.Tensor, reward: torch.Tensor
) -> torch.Tensor:
    """Return an objective, a scalar, whose gradient uphill is E2, from log-probabilities [n, k] and rewards [n].

    The ratio is each step's own, not a product over the chain; with the old equal to the present ones it is 1, and
    the gradient is the score function's.
    """
    ratio = (log_probability - old_log_probability.detach()).exp()
    return (reward.detach().unsqueeze(1) * ratio).sum(dim=1).mean()


@equation(
    "E6",
    r"L=\mathrm{mean}\,\max\big\{-\tilde A\rho,\;-\tilde A\,\mathrm{clip}(\rho,1-e,1+e)\big\},\quad "
    r"\rho=\exp(\ell^\theta-\ell^{\rm old}),\quad\tilde A=\mathrm{clip}(\hat A,-a,a)\,w,\quad "
    r"w=\beta_1\text{ if }\hat A>0\text{, else }\beta_2",
    source="ddpo-pytorch, train.py; weights: B2-DiffuRL, run_train.py",
)
def clipped_loss(
    log_probability: torch.Tensor,
    old_log_probability: torch.Tensor,
    advantage: torch.Tensor,
    clip_range: float,
    adv_clip: float = 5.0,
    positive_weight: float = 1.0,
    negative_weight: float = 1.0,
) -> torch.Tensor:
    """Return the surrogate, a scalar to be minimised, from pairs of sample and step, all [m].

    For an advantage above 0 the gradient stops where the ratio exceeds 1 + e, below 0 where it falls below 1 - e.
    """
    ratio = (log_probability - old_log_probability.detach()).exp()
    credit = advantage.detach().clamp(-adv_clip, adv_clip)
    credit = torch.where(credit > 0, positive_weight * credit, negative_weight * credit)
    return torch.maximum(-credit * ratio, -credit * ratio.clamp(1 - clip_range, 1 + clip_range)).mean()


def append_rewards(
    kept: torch.Tensor, kept_prompts: torch.Tensor, reward: torch.Tensor, prompts: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rewards and prompts with new ones [n] added to those kept [m], and only the newest `size` of a prompt."""
    rewards, every = torch.cat([kept, reward]), torch.cat([kept_prompts, prompts])
    same = every.unsqueeze(0) == every.unsqueeze(1)
    newer = same.triu(diagonal=1).sum(dim=1)  # how many of the same prompt came later
    return rewards[newer < size], every[newer < size]


@equation(
    "E6a",
    r"\hat A=\frac{r-\mathrm{mean}}{\mathrm{std}+10^{-6}}\;\text{ over the newest rewards for the prompt, or over the "
    r"whole batch while they are fewer than }n_{\min}",
    source="ddpo-pytorch, stat_tracking.py",
)
def prompt_advantages(
    reward: torch.Tensor, prompts: torch.Tensor, kept: torch.Tensor, kept_prompts: torch.Tensor, min_count: int
) -> torch.Tensor:
    """Return advantages [n] of a batch whose rewards were already added to those kept [m]; population std."""
    own = (prompts.unsqueeze(1) == kept_prompts.unsqueeze(0)).to(reward.dtype)  # [n, m]
    count = own.sum(dim=1)
    mean = own @ kept / count
    std = ((own * (kept - mean.unsqueeze(1)).square()).sum(dim=1) / count).sqrt()
    enough = count >= min_count
    mean = torch.where(enough, mean, reward.mean())
    std = torch.where(enough, std, reward.std(correction=0))
    return (reward - mean) / (std + 1e-6)


@equation(
    "E6b",
    r"w_{\rm KL}\,\mathrm{mean}\,(\epsilon_\theta-\epsilon_{\rm pre})^2",
    source="DPOK, train_online_pg.py",
)
def noise_penalty(noise: torch.Tensor, pretrained_noise: torch.Tensor, kl_weight: float) -> torch.Tensor:
    """Return DPOK's penalty, a scalar: the mean over pairs and dimensions [m, d] of the squared change of the noise."""
    return kl_weight * (noise - pretrained_noise.detach()).square().mean()


@equation(
    "E6c",
    r"\mathrm{KL}=\frac{\kappa^2}{2\sigma^2}\,\|\epsilon_\theta-\epsilon_{\rm pre}\|^2,\quad "
    r"\kappa=\sqrt{1-\bar\alpha'-\sigma^2}-\sqrt{\bar\alpha'(1-\bar\alpha)/\bar\alpha}",
    source="derived from E3; the factor that DPOK's code drops",
)
def step_divergence(
    noise: torch.Tensor, pretrained_noise: torch.Tensor, noise_weight: torch.Tensor, std: torch.Tensor
) -> torch.Tensor:
    """Return the divergence [m] of a step from the pretrained one, for noise [m, d] and kappa and sigma [m, 1].

    Exact where no predicted data are clipped; kappa is `DenoisingChain.noise_weight`.
    """
    return ((noise_weight / std).square() * (noise - pretrained_noise).square()).sum(dim=1) / 2


@equation(
    "E6d",
    r"L=-w_r\,\mathrm{mean}\,(r-V)\,\mathrm{clip}(\rho,1-e,1+e)\quad\text{beside E6b}",
    source="DPOK, train_online_pg.py",
)
def dpok_loss(
    log_probability: torch.Tensor,
    old_log_probability: torch.Tensor,
    advantage: torch.Tensor,
    clip_range: float = 1e-4,
    reward_weight: float = 100.0,
) -> torch.Tensor:
    """Return DPOK's surrogate, a scalar to be minimised, from pairs of sample and step, all [m], without its penalty.

    There is no maximum as in E6, only the clipped ratio: outside the range no pair has a gradient, also where the
    step has gone the wrong way and E6 would bring it back. `advantage` is r - V, a constant.
    """
    ratio = (log_probability - old_log_probability.detach()).exp()
    return -reward_weight * (advantage.detach() * ratio.clamp(1 - clip_range, 1 + clip_range)).mean()


class DDPO(DenoisingLearner[Config]):
    """Sample whole chains, credit every step with the sample's advantage, clip; a step is one stage."""

    def setup(self) -> None:
        super().setup()
        self.kept = torch.zeros(0, device=self.device)
        self.kept_prompts = torch.zeros(0, dtype=torch.int64, device=self.device)

    def update(self) -> Metrics:
        config, chain = self.config, self.chain()
        stage = roll_out(self.denoiser, chain, self.draw_classes(config.samples), self.rng.torch)
        self.evaluations += stage.evaluations
        reward, y = self.world.reward(stage.final, stage.classes), stage.classes
        self.kept, self.kept_prompts = append_rewards(self.kept, self.kept_prompts, reward, y, config.buffer_size)
        advantage = prompt_advantages(reward, y, self.kept, self.kept_prompts, config.min_count)

        everyone = torch.arange(len(y), device=self.device)
        losses, clipped = [], []
        for _ in range(config.epochs):
            for sample, j in shuffle_pairs(everyone, chain.steps, config.minibatch, self.rng.torch):
                x, old = stage.before[sample, j], stage.log_probability[sample, j]
                noise = chain.predict(self.denoiser, x, j, y[sample])
                log_probability = chain.log_probability(stage.after[sample, j], chain.step(x, noise, j))
                loss = clipped_loss(log_probability, old, advantage[sample], config.clip_range, config.adv_clip)
                if config.kl_weight > 0:
                    with torch.no_grad():
                        pretrained_noise = chain.predict(self.pretrained, x, j, y[sample])
                    loss = loss + noise_penalty(noise, pretrained_noise, config.kl_weight)
                    self.evaluations += len(x)
                self.descend(loss)
                self.evaluations += 3 * len(x)  # forwards once, backwards counts twice
                losses.append(loss.detach())
                clipped.append((log_probability.detach() - old).expm1().abs() > config.clip_range)
        return {
            "loss": torch.stack(losses).mean(),
            "batch_reward": reward.mean(),
            "clipped": torch.cat(clipped).float().mean(),
            **self.follow(),
        }


study = Study(
    claim="Policy gradient through the denoising steps raises the reward; DPOK's penalty keeps samples on the data.",
    learner=DDPO,
    arms={
        "class": {},
        "hackable": {"reward": "hackable"},
        "hackable, penalty": {"reward": "hackable", "kl_weight": 0.3},
    },
    criteria=(
        Criterion(
            "aligned",
            "of 1,000 samples at least 95 % land in the class that was asked for (58 % before)",
            plus=("class", "alignment"),
            above=0.95,
        ),
        Criterion(
            "gamed",
            "left alone, fewer than half of the samples that chase the hackable reward stay within 0.6 of a centre",
            plus=("hackable", "on_data"),
            below=0.5,
        ),
        Criterion(
            "held",
            "with the penalty at least 90 % stay there",
            plus=("hackable, penalty", "on_data"),
            above=0.9,
        ),
        Criterion(
            "still earns",
            "with the penalty the mean reward still rises from about 0 by at least 0.5",
            plus=("hackable, penalty", "mean_reward"),
            above=0.5,
        ),
    ),
    smoke=Budget(seeds=1, settings={"samples": 16, "measured": 32}, steps=3),
    fast=Budget(seeds=2, settings={"measured": 64}, steps=25),
    full=Budget(seeds=5, settings={"measured": 64}, steps=40),
)
