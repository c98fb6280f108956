r"""Diffusion policy, fine-tuned by policy gradients through its denoising steps (DPPO).

A diffusion policy draws a chunk of actions by denoising it in K small steps, under the present observation. Cloned
from demonstrations it holds what a single Gaussian would average away: two ways round an obstacle, a start to the left
or to the right. But it is no better than its demonstrators, and worse where they never were. Reinforcement can go on
from there: each denoising step is a Gaussian with a known density, so environment steps with K denoising steps inside
make one long decision process, and PPO applies to it. Left alone that is unsteady, since every step of a long chain
gets the credit of a whole chunk. DPPO keeps it in check: only the last K' steps learn, the earlier ones stay the
pretrained network's; noisier steps get less credit; their ratios are clipped closer; and the steps' noise has a floor,
for exploration without a density that explodes. `bc_weight` goes on cloning beside it.

Ren et al., arXiv 2409.00588, and Chi et al., arXiv 2303.04137 (the policy). The facts are those that the card of
`b2_diffurl` gives of DPPO, E15-E17, and its E2 to E4 and E6 are used in DPPO's form. E1 is `Pendulums` and `act`
together; E5 and E7 to E10 belong to `b2_diffurl`, E11 to E14 do not exist.
The world is Pendulum-v1, and the demonstrators are weak and shaky; see `polrl.worlds.demonstrations`.
"""

from __future__ import annotations

import copy
import math

import torch
from pydantic import Field

import polrl
from polrl import (
    Bars,
    Budget,
    Criterion,
    Curve,
    Heatmap,
    Histogram,
    Learner,
    Lines,
    Metrics,
    Study,
    View,
    equation,
    knob,
)
from polrl.core.errors import KnobError
from polrl.diffusion._diffusion_policy_world import Pendulums
from polrl.models.diffusion import DenoisingChain, ResidualMLP, add_noise, average_weights, cosine_schedule
from polrl.models.mlp import MLP
from polrl.worlds.batches import EpochBatches
from polrl.worlds.demonstrations import STEPS, load_demonstrations

REWARD_SCALE = 0.01  # what the critic sees of a reward, so that values are of order ten
CLONING_RATE = 3e-3  # of AdamW, falling to 0 over the epochs
TESTS = 8  # episodes of an evaluation


class Config(polrl.Config):
    """Settings; a chunk of 4 actions, 10 denoising steps and small networks suffice for a pendulum."""

    demonstrations: int = Field(20, ge=1, le=1000)  # episodes
    pretrain_epochs: int = Field(40, ge=0)
    denoising_steps: int = Field(10, ge=2, le=100)  # K
    finetuned_steps: int = Field(5, ge=1)  # K'; at most K
    chunk: int = Field(4, ge=1, le=STEPS)  # actions that are drawn at once
    environments: int = Field(16, ge=1)
    horizon: int = Field(25, ge=1)  # chunks that each environment plays in an iteration
    width: int = Field(64, ge=4)

    bc_weight: float = knob(
        0.0, low=0.0, high=10.0, scale="log_zero", smallest=1e-3, symbol=r"w_{\rm BC}", first=True,
        help="how much cloning goes on beside the reward", at_low="only the reward counts: off to where it is high",
        at_high="stays with the demonstrators, faults and all",
    )  # fmt: skip
    noise_floor: float = knob(
        0.1, low=0.01, high=0.5, scale="log", symbol=r"\sigma_{\min}", paper=0.1,
        help="least standard deviation of a step, in sampling and density",
        at_low="hardly explores, ratios explode", at_high="explores, with a shaky hand",
    )  # fmt: skip
    denoising_discount: float = knob(
        0.99, low=0.1, high=1.0, symbol=r"\gamma_d", paper=0.99, help="credit of a step beside the one after it",
        at_low="only the last, cleanest step learns", at_high="all steps have the same credit",
    )  # fmt: skip
    clip_end: float = knob(
        0.02, low=1e-3, high=0.5, scale="log", symbol="e_1", paper=0.01,
        help="clip range of the last step", at_low="tiny updates", at_high="large updates, which may collapse",
    )  # fmt: skip
    clip_start: float = knob(
        0.02, low=1e-3, high=0.5, scale="log", symbol="e_0", paper=0.01,
        help="clip range of the first step that learns", at_low="noisy steps hardly learn", at_high="as `clip_end`",
    )  # fmt: skip
    learning_rate: float = knob(
        3e-4, low=1e-5, high=1e-2, scale="log", symbol=r"\eta", help="of the denoiser, while fine-tuning",
        at_low="hardly moves", at_high="forgets what was cloned",
    )  # fmt: skip
    epochs: int = knob(5, low=1, high=20, paper=5, help="passes over an iteration's samples")
    discount: float = knob(
        0.99, low=0.8, high=0.999, scale="log_one_minus", symbol=r"\gamma", paper=0.99, help="a chunk"
    )
    gae_lambda: float = knob(0.95, low=0.0, high=1.0, symbol=r"\lambda", paper=0.95, help="of the advantages")


@equation(
    "E2",
    r"L_{\rm BC}=\mathrm{mean}\,\big\|\epsilon_\theta(a_t,t,s)-\epsilon\big\|^2,\quad "
    r"a_t=\sqrt{\bar\alpha_t}\,a+\sqrt{1-\bar\alpha_t}\,\epsilon",
    source="Ho et al. 2020; Chi et al. 2023",
)
def cloning_loss(predicted: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error, a scalar, of the noise seen in demonstrated chunks [m, n]."""
    return (predicted - noise.detach()).square().mean()


@equation(
    "E15",
    r"\ell_j=\mathop{\mathrm{mean}}_{\text{chunk},\,d}\ \mathrm{clip}\Big[-\frac{(a'-m_j)^2}{2\sigma_j^2}"
    r"-\log\sigma_j-\tfrac12\log2\pi,\ -5,\ 2\Big],\quad\sigma_j\leftarrow\max(\sigma_j,\sigma_{\min}),"
    r"\quad j=0..K'-1",
    source="dppo, diffusion_vpg.py",
)
def clamped_log_probability(after: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, floor: float) -> torch.Tensor:
    """Return the log-probability [m] of a denoising step, clamped by element before it is averaged.

    Parameters
    ----------
    after, mean : Tensor, [m, n]
        What the step led to, a constant, and its mean; n is the chunk's length times the action's dimensions.
    std : Tensor, [m, 1] or a scalar
        Of the step, without its floor.
    floor : float
        Least standard deviation, above 0.

    Raises
    ------
    ValueError
        If the floor is not above 0: a step without noise has no density.
    """
    if not floor > 0:
        raise ValueError(f"floor must be above 0, got {floor!r}: a step without noise has no density")
    sigma = std.clamp(min=floor)
    density = -(after.detach() - mean).square() / (2 * sigma.square()) - sigma.log() - 0.5 * math.log(2 * math.pi)
    return density.clamp(-5.0, 2.0).flatten(1).mean(dim=1)


@equation(
    "E16a",
    r"\delta_t=r_t+\gamma(1-d_t)V(s_{t+1})-V(s_t),\qquad A_t=\delta_t+\gamma\lambda(1-e_t)A_{t+1}",
    source="generalised advantage estimation, Schulman et al. 2016",
)
def generalized_advantages(
    reward: torch.Tensor,
    value: torch.Tensor,
    next_value: torch.Tensor,
    terminated: torch.Tensor,
    ended: torch.Tensor,
    discount: float,
    gae_lambda: float,
) -> torch.Tensor:
    """Return the advantages [T, n] of the chunks, a constant.

    Parameters
    ----------
    reward, value, next_value : Tensor, [T, n]
        The reward of each chunk, and the critic before and after it; after an ended episode, of its last observation.
    terminated : Tensor, bool [T, n]
        d: the task itself ended, nothing follows.
    ended : Tensor, bool [T, n]
        e: the episode ended, by the task or by its time limit; what follows is another one.
    """
    surprise = (reward + discount * next_value * ~terminated - value).detach()
    kept = discount * gae_lambda * (~ended).to(surprise.dtype)
    advantage, following = torch.zeros_like(surprise), torch.zeros_like(surprise[0])
    for t in range(len(surprise) - 1, -1, -1):
        following = surprise[t] + kept[t] * following
        advantage[t] = following
    return advantage


@equation(
    "E16",
    r"\tilde A_j=\frac{A-\mathrm{mean}(A)}{\mathrm{std}(A)+10^{-8}}\;\gamma_d^{\,K'-1-j}",
    source="dppo, diffusion_ppo.py",
)
def denoising_advantages(
    advantage: torch.Tensor, step: torch.Tensor, finetuned_steps: int, denoising_discount: float
) -> torch.Tensor:
    """Return the credit [m] of a minibatch: normalised first (unbiased std), then discounted by the denoising step.

    Parameters
    ----------
    advantage : Tensor, [m]
        Of the chunk that the step belongs to; at least two.
    step : Tensor, int64 [m]
        j, from 0 (noisiest) to K' - 1 (cleanest).
    """
    if len(advantage) < 2:
        raise ValueError(f"a minibatch of {len(advantage)} has no standard deviation; at least 2 are needed")
    normalised = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    return (normalised * denoising_discount ** (finetuned_steps - 1 - step)).detach()


@equation(
    "E17",
    r"e_j=e_0+(e_1-e_0)\,\frac{e^{3u}-1}{e^3-1},\quad u=\frac j{K'-1};\qquad e_0\to e_1\text{ where }K'=1",
    source="dppo, diffusion_ppo.py",
)
def clip_schedule(
    step: torch.Tensor, finetuned_steps: int, start: float, end: float, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return the clip range [m] of denoising steps j, int64 [m]: from `start` (noisy) to `end` (clean).

    A single step is the last one and gets `end`; the paper's code divides by zero there.
    """
    j = step.to(dtype)
    u = j / (finetuned_steps - 1) if finetuned_steps > 1 else torch.ones_like(j)
    return start + (end - start) * torch.expm1(3 * u) / math.expm1(3)


@equation(
    "E6",
    r"L=\mathrm{mean}\,\max\big\{-\tilde A_j\rho_j,\;-\tilde A_j\,\mathrm{clip}(\rho_j,1-e_j,1+e_j)\big\},"
    r"\quad\rho_j=\exp(\ell_j-\ell_j^{\rm old})",
    source="PPO, Schulman et al. 2017; dppo, diffusion_ppo.py",
)
def clipped_loss(
    log_probability: torch.Tensor, old_log_probability: torch.Tensor, credit: torch.Tensor, clip_range: torch.Tensor
) -> torch.Tensor:
    """Return the surrogate, a scalar to be minimised, from pairs of chunk and denoising step, all [m]."""
    ratio = (log_probability - old_log_probability.detach()).exp()
    clipped = torch.minimum(torch.maximum(ratio, 1 - clip_range), 1 + clip_range)
    return torch.maximum(-credit.detach() * ratio, -credit.detach() * clipped).mean()


@equation("E6a", r"L_V=\tfrac12\,\mathrm{mean}\,(V(s)-G)^2,\qquad G=A+V_{\rm old}(s)", source="dppo, diffusion_ppo.py")
def value_loss(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return half the mean squared error, a scalar, of values and constant targets [m]."""
    return 0.5 * (value - target.detach()).square().mean()


@equation(
    "E6b",
    r"\widehat{\mathrm{KL}}=\mathrm{mean}\big[(\rho-1)-\log\rho\big]",
    source="Schulman's note on approximating KL; dppo stops an epoch above 1",
)
def approximate_kl(log_probability: torch.Tensor, old_log_probability: torch.Tensor) -> torch.Tensor:
    """Return an estimate, a scalar of at least 0, of how far the policy has moved from the one that sampled [m]."""
    log_ratio = (log_probability - old_log_probability).detach()
    return (log_ratio.expm1() - log_ratio).mean()


@equation(
    "E6c",
    r"\mathrm{KL}_i=\frac{\|m_i-m_i^{\rm pre}\|^2}{2\max(\sigma_i,\sigma_{\min})^2}",
    source="derived: two Gaussians of one standard deviation",
)
def step_divergence(mean: torch.Tensor, pretrained_mean: torch.Tensor, std: torch.Tensor, floor: float) -> torch.Tensor:
    """Return the divergence [m], in nats, of a denoising step from the pretrained one, for their means [m, n]."""
    return (mean - pretrained_mean).square().sum(dim=1) / (2 * std.clamp(min=floor).square()).flatten()


class DiffusionPolicy(Learner[Config]):
    """Clone demonstrations (a step is an epoch), then play, judge and reinforce (a step is an iteration of PPO)."""

    phases = ("pretrain", "finetune")
    constants = ("observations", "actions", "chain", "judge", "shown")
    evaluate_every = 10
    curves = (
        Curve(("mean_return", "batch_return"), "Return of an episode", "reward"),
        Curve(("kl_to_pretrained",), "KL of a chunk from the pretrained policy", "nats"),
        Curve(("cloning_loss",), "Cloning loss of the network that acts", "squared noise"),
        Curve(("approximate_kl", "clipped"), "How far an iteration moves", "nats; share of ratios"),
        Curve(("value_loss",), "Loss of the critic"),
    )

    def setup(self) -> None:
        c = self.config
        if c.finetuned_steps > c.denoising_steps:
            raise KnobError(f"finetuned_steps={c.finetuned_steps}; allowed: 1 to denoising_steps={c.denoising_steps}")
        self.observations, self.actions = load_demonstrations(c.demonstrations, self.device).windows(c.chunk)
        self.chain = DenoisingChain(
            cosine_schedule(c.denoising_steps), c.denoising_steps, eta=1.0, clip=1.0, device=self.device
        )
        label = torch.nn.Linear(self.observations.shape[1], c.width)
        self.denoiser = ResidualMLP(c.chunk, label, width=c.width, blocks=2, features=16, levels=c.denoising_steps).to(
            self.device
        )
        self.pretrained = copy.deepcopy(self.denoiser).requires_grad_(False)  # while cloning: the averaged weights
        self.critic = MLP([self.observations.shape[1], 64, 64, 1]).to(self.device)
        self.cloning = torch.optim.AdamW(self.denoiser.parameters(), fused=True)
        self.tuning = torch.optim.AdamW(self.denoiser.parameters(), weight_decay=0.0, fused=True)
        self.judging = torch.optim.Adam(self.critic.parameters(), lr=1e-3, fused=True)
        self.batches = EpochBatches(len(self.actions), min(128, len(self.actions)), self.rng.torch)
        self.world = Pendulums(c.environments, c.seed, self.device)
        self.judge, self.shown = Pendulums(TESTS, 0, self.device), Pendulums(2, 0, self.device)
        if c.pretrain_epochs == 0:
            self.enter("finetune")

    def update(self) -> Metrics:
        return self.clone_demonstrations() if self.phase == "pretrain" else self.reinforce()

    def clone_demonstrations(self) -> Metrics:
        """Do one epoch of denoising the demonstrators' chunks."""
        losses = []
        self.cloning.param_groups[0]["lr"] = CLONING_RATE * (1 - self.phase_step / self.config.pretrain_epochs)
        for number in range(self.batches.per_epoch):
            loss = self.cloning_loss(self.batches.draw(), self.config.denoising_steps)
            self.cloning.zero_grad()
            loss.backward()
            self.cloning.step()
            average_weights(self.pretrained, self.denoiser, self.phase_step * self.batches.per_epoch + number)
            losses.append(loss.detach())
        if self.phase_step + 1 >= self.config.pretrain_epochs:
            self.denoiser.load_state_dict(self.pretrained.state_dict())
            self.enter("finetune")
        return {"cloning_loss": torch.stack(losses).mean()}

    def cloning_loss(self, batch: torch.Tensor, levels: int) -> torch.Tensor:
        """Return E2 of demonstrations at noise drawn from the lowest so many levels."""
        actions = self.actions[batch]
        t = torch.randint(1, levels + 1, (len(batch),), generator=self.rng.torch, device=self.device)
        noise = torch.randn(actions.shape, generator=self.rng.torch, device=self.device)
        noised = add_noise(actions, noise, self.chain.alpha_bar.flip(0)[t].unsqueeze(1))
        return cloning_loss(self.denoiser(noised, t, self.observations[batch]), noise)

    def reinforce(self) -> Metrics:
        """Play, estimate advantages, and take several clipped passes over all pairs of chunk and denoising step."""
        config, last = self.config, self.config.finetuned_steps
        played = self.play()
        target = (played["advantage"] + played["value"]).repeat_interleave(last)
        advantage, observation = (played[name].repeat_interleave(last, dim=0) for name in ("advantage", "observation"))
        before, after, old = (played[name].flatten(0, 1) for name in ("before", "after", "log_probability"))
        j = torch.arange(last, device=self.device).repeat(len(played["advantage"]))
        seen: dict[str, list[torch.Tensor]] = {
            "value_loss": [],
            "clipped": [],
            "approximate_kl": [],
            "cloning_loss": [],
        }

        self.tuning.param_groups[0]["lr"] = config.learning_rate
        for _ in range(config.epochs):
            order = torch.randperm(len(old), generator=self.rng.torch, device=self.device)
            for pairs in order.tensor_split(max(1, len(order) // 500)):
                step, y = j[pairs], observation[pairs]
                log_probability = self.log_probability(self.denoiser, before[pairs], after[pairs], step, y)
                credit = denoising_advantages(advantage[pairs], step, last, config.denoising_discount)
                clip_range = clip_schedule(step, last, config.clip_start, config.clip_end)
                loss = clipped_loss(log_probability, old[pairs], credit, clip_range)
                if config.bc_weight > 0:
                    cloning = self.cloning_loss(self.batches.draw(), last)
                    loss = loss + config.bc_weight * cloning
                    seen["cloning_loss"].append(cloning.detach())
                value = value_loss(self.critic(y)[:, 0], target[pairs])
                self.descend(loss, value)
                moved = approximate_kl(log_probability, old[pairs])
                seen["value_loss"].append(value.detach())
                seen["approximate_kl"].append(moved)
                seen["clipped"].append(
                    ((log_probability.detach() - old[pairs]).expm1().abs() > clip_range).float().mean()
                )
            if moved > 1:
                break
        figures = {name: torch.stack(values).mean() for name, values in seen.items() if values}
        return {**figures, "batch_return": played["reward"].mean() * STEPS / config.chunk}

    def descend(self, loss: torch.Tensor, value: torch.Tensor) -> None:
        """Take a step of the denoiser and one of the critic, whose loss weighs a half."""
        self.tuning.zero_grad()
        self.judging.zero_grad()
        (loss + 0.5 * value).backward()
        torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), 1.0)
        self.tuning.step()
        self.judging.step()

    def log_probability(
        self,
        network: ResidualMLP,
        before: torch.Tensor,
        after: torch.Tensor,
        step: torch.Tensor,
        observation: torch.Tensor,
    ) -> torch.Tensor:
        """Return E15 [m] of steps j of the K' that learn, under a network."""
        i = step + self.config.denoising_steps - self.config.finetuned_steps
        taken = self.chain.step(before, self.chain.predict(network, before, i, observation), i)
        return clamped_log_probability(after, taken.mean, taken.std, self.config.noise_floor)

    @property
    def acting(self) -> ResidualMLP:
        """The network whose steps are played: while cloning, its averaged weights."""
        return self.pretrained if self.phase == "pretrain" else self.denoiser

    @torch.no_grad()
    def act(
        self, observation: torch.Tensor, start: torch.Tensor, network: ResidualMLP | None = None
    ) -> list[torch.Tensor]:
        """Denoise chunks from noise [n, T_a] under observations [n, d]: returns all K + 1 stages.

        The first K - K' steps are the pretrained network's; the others those of `network`, by default the acting one.
        """
        c, stages = self.config, [start]
        learning = self.acting if network is None else network
        for i in range(c.denoising_steps):
            acting = learning if i >= c.denoising_steps - c.finetuned_steps else self.pretrained
            taken = self.chain.step(stages[-1], self.chain.predict(acting, stages[-1], i, observation), i)
            xi = torch.randn(start.shape, generator=self.rng.torch, device=self.device)
            stages.append(taken.mean + taken.std.clamp(min=c.noise_floor) * xi)
        return stages

    @torch.no_grad()
    def play(self) -> dict[str, torch.Tensor]:
        """Play every environment for `horizon` chunks; returns rows [horizon * environments, ...]."""
        c, world, rows = self.config, self.world, []
        for _ in range(c.horizon):
            observation = world.observe()
            start = torch.randn(len(observation), c.chunk, generator=self.rng.torch, device=self.device)
            stages = torch.stack(self.act(observation, start)[-c.finetuned_steps - 1 :], dim=1)
            outcome = world.play(stages[:, -1].clamp(-1, 1))
            rows.append({
                "observation": observation, "before": stages[:, :-1], "after": stages[:, 1:],
                "last": outcome.last, "reward": outcome.reward, "terminated": outcome.terminated,
                "ended": outcome.terminated | outcome.truncated,
            })  # fmt: skip
        played = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        value, next_value = (self.critic(played[name])[..., 0] for name in ("observation", "last"))
        played["value"] = value
        played["advantage"] = generalized_advantages(
            REWARD_SCALE * played["reward"], value, next_value, played["terminated"], played["ended"], c.discount,
            c.gae_lambda,
        )  # fmt: skip
        before, after = (played[name].flatten(0, 2) for name in ("before", "after"))
        old = self.log_probability(
            self.denoiser, before, after, torch.arange(c.finetuned_steps, device=self.device).repeat(value.numel()),
            played["observation"].flatten(0, 1).repeat_interleave(c.finetuned_steps, dim=0),
        )  # fmt: skip
        played["log_probability"] = old.view(*value.shape, -1)
        return {name: column.flatten(0, 1) for name, column in played.items()}

    # ---- looking -------------------------------------------------------------------------------------------------

    def evaluate(self) -> Metrics:
        """Return over whole episodes, and the divergence of the chunks that were played from the pretrained policy."""
        returns, observations, stages = self.try_out()
        divergence = self.divergence(observations, stages)
        return {"mean_return": returns.mean(), "kl_to_pretrained": divergence.sum(dim=1).mean()}

    def try_out(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Play the test episodes; returns their returns [n], observations [M, d] and stages [M, K' + 1, T_a]."""
        c, judge = self.config, self.judge
        judge.reset(seed=1000)
        total = torch.zeros(TESTS, device=self.device)
        observations, stages = [], []
        for _ in range(math.ceil(STEPS / c.chunk)):
            observation = judge.observe()
            start = torch.randn(len(observation), c.chunk, generator=self.rng.torch, device=self.device)
            chain = self.act(observation, start)
            total += judge.play(chain[-1].clamp(-1, 1)).reward
            observations.append(observation)
            stages.append(torch.stack(chain[-c.finetuned_steps - 1 :], dim=1))
        return total, torch.cat(observations), torch.cat(stages)

    def divergence(self, observation: torch.Tensor, stages: torch.Tensor) -> torch.Tensor:
        """Return the divergence [M, K'] of each step that learns from the pretrained one, where the policy has been."""
        c, columns = self.config, []
        for j in range(c.finetuned_steps):
            i, x = c.denoising_steps - c.finetuned_steps + j, stages[:, j]
            mean, pretrained = (
                self.chain.step(x, self.chain.predict(network, x, i, observation), i).mean
                for network in (self.acting, self.pretrained)
            )
            columns.append(step_divergence(mean, pretrained, self.chain.std[i], c.noise_floor))
        return torch.stack(columns, dim=1)

    def views(self) -> dict[str, View]:
        hanging = torch.tensor([[-1.0, 0.0, 0.0]], device=self.device).expand(500, 3)
        start = torch.randn(500, self.config.chunk, generator=self.rng.torch, device=self.device)
        noise = self.rng.torch.get_state()
        now = self.act(hanging, start)
        self.rng.torch.set_state(noise)  # the same noise for both
        before = self.act(hanging, start, self.pretrained)
        return {
            "first_push": self._first_push(now[-1], before[-1]),
            "path": self._path(now),
            "swing_up": self._swing_up(),
            "policy": self._policy(),
            "kl_by_step": self._kl_by_step(hanging, now),
        }

    def _first_push(self, now: torch.Tensor, before: torch.Tensor) -> View:
        edges = torch.linspace(-1.5, 1.5, 31)
        counts = {
            name: torch.histc(chunk[:, 0].cpu().clamp(-1.5, 1.5), 30, -1.5, 1.5) / len(chunk)
            for name, chunk in (("pretrained", before), ("now", now))
        }
        return Histogram(
            title="First push from rest, hanging down",
            alt="Distribution of the first torque from rest, under the pretrained policy and the present one",
            edges=edges.numpy(),
            counts={name: count.numpy() for name, count in counts.items()},
            x_label="torque, share of the limit (cut off at 1 when played)",
        )

    def _path(self, stages: list[torch.Tensor]) -> View:
        values = torch.stack([stage[:6, 0] for stage in stages]).cpu().numpy()
        return Lines(
            title="Six first pushes being denoised",
            alt="Value of the first action after each denoising step, from noise to the action, for six draws",
            x=list(range(len(stages))),
            y={f"draw {number + 1}": values[:, number] for number in range(values.shape[1])},
            x_label=f"denoising step (the last {self.config.finetuned_steps} learn)",
            y_label="action",
        )

    def _swing_up(self) -> View:
        judge, heights = self.shown, []
        judge.reset(seed=1000)
        for _ in range(math.ceil(STEPS / self.config.chunk)):
            observation = judge.observe()
            heights.append(observation[:, 0])
            start = torch.randn(len(observation), self.config.chunk, generator=self.rng.torch, device=self.device)
            judge.play(self.act(observation, start)[-1].clamp(-1, 1))
        height = torch.stack(heights).cpu().numpy()
        return Lines(
            title="Height of the pole in two test episodes",
            alt="Height of the pole's end over time in two episodes, from -1 hanging to 1 upright",
            x=[0.05 * self.config.chunk * number for number in range(len(height))],
            y={f"episode {number + 1}": height[:, number] for number in range(height.shape[1])},
            x_label="seconds",
            y_label="height",
            y_range=(-1.05, 1.05),
        )

    def _policy(self) -> View:
        angle, velocity = torch.linspace(-math.pi, math.pi, 25), torch.linspace(8, -8, 17)
        grid = torch.cartesian_prod(velocity, angle).to(self.device)
        observation = torch.stack([grid[:, 1].cos(), grid[:, 1].sin(), grid[:, 0]], dim=1)
        draws = 4
        start = torch.randn(draws * len(grid), self.config.chunk, generator=self.rng.torch, device=self.device)
        torque = self.act(observation.repeat(draws, 1), start)[-1][:, 0].clamp(-1, 1).view(draws, -1).mean(dim=0)
        return Heatmap(
            title="Torque by angle and velocity",
            alt="Mean of four first torques drawn for each angle, across, and angular velocity, upwards",
            values=torque.reshape(len(velocity), len(angle)).cpu().numpy(),
            row_labels=[f"{v:g}" if i % 4 == 0 else "" for i, v in enumerate(velocity.tolist())],
            column_labels=[f"{math.degrees(a):.0f}" if i % 6 == 0 else "" for i, a in enumerate(angle.tolist())],
            x_label="angle, degrees (0 upright)",
            y_label="velocity, rad/s",
            low=-1.0,
            high=1.0,
            diverging=True,
        )

    def _kl_by_step(self, observation: torch.Tensor, stages: list[torch.Tensor]) -> View:
        learning = torch.stack(stages[-self.config.finetuned_steps - 1 :], dim=1)
        divergence = self.divergence(observation, learning).mean(dim=0).cpu().numpy()
        first = self.config.denoising_steps - self.config.finetuned_steps
        return Bars(
            title="KL of each step from the pretrained one",
            alt="Divergence of each denoising step that learns from the pretrained step, for a pendulum at rest",
            labels=[str(first + j + 1) for j in range(len(divergence))],
            values={"KL": divergence},
            y_label="nats",
        )


study = Study(
    claim="Fine-tuning the last denoising steps by their policy gradient makes a cloned diffusion policy better than "
    "cloning left it; cloning on keeps it near, at a price.",
    learner=DiffusionPolicy,
    arms={
        "last 5 steps": {},
        "all 10 steps": {"finetuned_steps": 10},
        "cloning beside it": {"bc_weight": 1.0},
    },
    criteria=(
        Criterion(
            "gain",
            "fine-tuning raises the mean return by more than 100 over the cloned policy",
            plus=("last 5 steps", "mean_return"),
            minus=("last 5 steps", "mean_return@pretrain"),
            above=100.0,
        ),
        Criterion(
            "suffix",
            "fine-tuning the last 5 of 10 steps ends no more than 50 below fine-tuning all of them",
            plus=("last 5 steps", "mean_return"),
            minus=("all 10 steps", "mean_return"),
            above=-50.0,
        ),
        Criterion(
            "leash",
            "with cloning beside it the policy stays nearer to the pretrained one, by 0.1 nats a chunk",
            plus=("last 5 steps", "kl_to_pretrained"),
            minus=("cloning beside it", "kl_to_pretrained"),
            above=0.1,
        ),
        Criterion(
            "price",
            "and gains less: its return ends lower",
            plus=("last 5 steps", "mean_return"),
            minus=("cloning beside it", "mean_return"),
            above=0.0,
        ),
    ),
    smoke=Budget(
        seeds=1,
        settings={"demonstrations": 1, "pretrain_epochs": 1, "environments": 2, "horizon": 2, "epochs": 1, "width": 8},
        steps=2,
    ),
    fast=Budget(seeds=2, settings={"environments": 8, "pretrain_epochs": 30}, steps=45, arms=("last 5 steps",)),
    full=Budget(seeds=5, steps=100),
)
