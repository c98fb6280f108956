"""What DDPO and B2-DiffuRL share: two worlds with a reward, stages of sampled chains, measures and pictures.

Denoising is the Markov decision process of the card's E1: the state is (class, step, sample), the action the next
sample, and the reward comes after the last step. `roll_out` plays it; `DenoisingLearner` holds everything around the
update.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from pydantic import Field

import polrl
from polrl import Curve, ImageGrid, Learner, Lines, Metrics, Points, View, knob
from polrl.models.diffusion import STD_FLOOR, DenoisingChain, Ring, Step, cosine_schedule, load_denoiser
from polrl.models.diffusion_quality import class_spread, load_digits_8


class ChainConfig(polrl.Config):
    """What both methods' settings have in common."""

    world: Literal["ring", "digits"] = "ring"
    reward: Literal["class", "hackable"] = "class"  # hackable: the way along the diagonal; the digit's mean ink
    radius: float = Field(0.6, gt=0)  # of the disc around the wanted centre in which a point of the ring is right
    steps: int = Field(20, ge=2, le=100)
    samples: int = Field(64, ge=2)  # finished samples a stage
    minibatch: int = Field(512, ge=1)  # pairs of sample and step
    epochs: int = Field(2, ge=1)
    buffer_size: int = Field(16, ge=2)  # newest rewards kept for each prompt
    min_count: int = Field(16, ge=1)  # while fewer are kept, the whole batch is compared with instead
    measured: int = Field(256, ge=16)  # fresh samples after each stage, for the curves only
    target: float = Field(0.96, gt=0, lt=1)  # the alignment to which the evaluations are counted

    eta: float = knob(
        1.0, low=0.1, high=1.0, symbol=r"\eta", help="noise of the sampler's steps: what the policy explores with",
        at_low="hardly any exploration, and large ratios", at_high="the noise of DDPM",
    )  # fmt: skip
    adv_clip: float = knob(
        5.0, low=1.0, high=10.0, help="bound of the advantages", at_low="a rare success counts like any other",
        at_high="a rare success counts a lot",
    )  # fmt: skip
    learning_rate: float = knob(
        3e-4, low=1e-5, high=3e-3, scale="log", help="of AdamW", at_low="hardly moves",
        at_high="unlearns to denoise",
    )  # fmt: skip


# ---- the worlds --------------------------------------------------------------------------------------------------


class RingWorld:
    """Points of a ring of eight Gaussians, under a network that learned half of its labels at random."""

    model = "ring-noisy"
    clip = 2.5

    def __init__(self, reward: str, radius: float, device: torch.device) -> None:
        self.kind, self.radius, self.ring = reward, radius, Ring()
        self.classes, self.data_std = self.ring.classes, self.ring.std
        self.centres = self.ring.centres(torch.zeros(1, device=device))

    def right(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return whether points [n, 2] lie within the radius of the wanted centres, bool [n]."""
        return (x - self.centres[y]).norm(dim=1) < self.radius

    def reward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the reward [n] of finished points."""
        return self.right(x, y).to(x.dtype) if self.kind == "class" else x.sum(dim=1) / math.sqrt(2)

    def on_data(self, x: torch.Tensor) -> torch.Tensor:
        """Return whether points lie within 0.6 of any centre, bool [n]."""
        return torch.cdist(x, self.centres).amin(dim=1) < 0.6


class DigitWorld:
    """8 x 8 digits, under a network that learned half of its labels at random, judged by a small classifier."""

    model = "digits-noisy"
    clip = 1.0

    def __init__(self, reward: str, device: torch.device) -> None:
        self.kind, self.classes = reward, 10
        self.classifier = load_denoiser("digits-classifier", device).requires_grad_(False)
        digits = load_digits_8(str(device))
        real = torch.ones_like(digits.train_labels, dtype=torch.bool)
        self.data_std = class_spread(digits.train, digits.train_labels, real, self.classes)

    def right(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return whether the classifier takes images [n, 64] for the wanted digits, bool [n]."""
        return self.classifier(x).argmax(dim=1) == y

    def reward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the reward [n] of finished images."""
        return self.right(x, y).to(x.dtype) if self.kind == "class" else x.mean(dim=1)

    def on_data(self, x: torch.Tensor) -> torch.Tensor:
        """Return whether the classifier is sure of some digit, to 0.9, bool [n]."""
        return torch.softmax(self.classifier(x), dim=1).amax(dim=1) > 0.9


# ---- one stage ---------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """The sampled chains of one stage: n = prefixes x branches samples, k trained steps each.

    Attributes
    ----------
    before, after : Tensor, [n, k, d]
        States and actions of the trained steps.
    log_probability : Tensor, [n, k]
        Of the actions, when they were drawn.
    first : int
        Number of the first trained step, S - k.
    classes : Tensor, int64 [n]
    final : Tensor, [n, d]
    evaluations : int
        Rows that went through the network.
    """

    before: torch.Tensor
    after: torch.Tensor
    log_probability: torch.Tensor
    first: int
    classes: torch.Tensor
    final: torch.Tensor
    evaluations: int


@torch.no_grad()
def roll_out(
    denoiser: Any,
    chain: DenoisingChain,
    classes: torch.Tensor,
    generator: torch.Generator,
    suffix: int | None = None,
    branches: int = 1,
) -> Stage:
    """Sample a prefix for each class [P], copy it `branches` times, and go on with noise of each copy's own.

    Parameters
    ----------
    suffix : int, optional
        k: only the last so many steps branch and are kept for training; all steps if not given.

    Returns
    -------
    Stage
        With the branches of a prefix side by side.
    """
    first = chain.steps - (chain.steps if suffix is None else suffix)
    x = torch.randn(len(classes), denoiser.dimension, generator=generator, device=classes.device)
    for i in range(first):
        x = draw_step(chain.step(x, chain.predict(denoiser, x, i, classes), i), generator)
    evaluations = first * len(classes)
    x, classes = x.repeat_interleave(branches, dim=0), classes.repeat_interleave(branches)
    states, log_probability = [x], []
    for i in range(first, chain.steps):
        step = chain.step(x, chain.predict(denoiser, x, i, classes), i)
        x = draw_step(step, generator)
        states.append(x)
        log_probability.append(chain.log_probability(x, step))
    path = torch.stack(states, dim=1)
    evaluations += (chain.steps - first) * len(classes)
    return Stage(path[:, :-1], path[:, 1:], torch.stack(log_probability, dim=1), first, classes, x, evaluations)


def draw_step(step: Step, generator: torch.Generator) -> torch.Tensor:
    """Return mean + std * xi, [n, d]."""
    noise = torch.randn(step.mean.shape, generator=generator, device=step.mean.device, dtype=step.mean.dtype)
    return step.mean + step.std * noise


def shuffle_pairs(
    samples: torch.Tensor, length: int, size: int, generator: torch.Generator
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return one epoch's minibatches of at most `size` pairs: sample number and trained step, both int64.

    Samples are shuffled, and for each sample the order of its steps; a minibatch takes the next step of one sample
    after the other.
    """
    if len(samples) == 0:
        return []
    order = samples[torch.randperm(len(samples), generator=generator, device=samples.device)]
    steps = torch.rand(length, len(samples), generator=generator, device=samples.device).argsort(dim=0)
    return list(zip(order.repeat(length).split(size), steps.flatten().split(size), strict=True))


@dataclass
class Trace:
    """Chains followed step by step.

    Attributes
    ----------
    y : Tensor, int64 [n]
    states : Tensor, [S + 1, n, d]
    reward : Tensor, [S]
        Mean reward of the data that each step predicts.
    kl : Tensor, [S]
        Divergence of each step from the pretrained sampler's, the mean over chains, in nats.
    """

    y: torch.Tensor
    states: torch.Tensor
    reward: torch.Tensor
    kl: torch.Tensor


# ---- the learner around the update -------------------------------------------------------------------------------

C = TypeVar("C", bound=ChainConfig)


class DenoisingLearner(Learner[C]):
    """A pretrained sampler that is being fine-tuned; a step is one stage: sample chains, then train on them."""

    constants = ("world", "pretrained", "alpha_bar")
    evaluate_every = 10
    curves: ClassVar[tuple[Curve, ...]] = (
        Curve(("fresh_alignment", "alignment", "batch_reward"), "Alignment, and reward of the stage", "share right"),
        Curve(("fresh_diversity", "diversity"), "Diversity", "share of the data's spread"),
        Curve(("thousand_evaluations",), "Network evaluations", "thousands"),
        Curve(("clipped",), "Pairs whose ratio is clipped", "share"),
    )

    def setup(self) -> None:
        config = self.config
        self.world: RingWorld | DigitWorld
        if config.world == "ring":
            self.world = RingWorld(config.reward, config.radius, self.device)
        else:
            self.world = DigitWorld(config.reward, self.device)
        self.alpha_bar = cosine_schedule()
        self.pretrained = load_denoiser(self.world.model, self.device).requires_grad_(False)
        self.denoiser = copy.deepcopy(self.pretrained).requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.denoiser.parameters(), weight_decay=1e-4)
        self.evaluations = 0
        # Alignment, diversity and evaluations after the last three stages, and where the target was reached.
        self.recent = torch.zeros(0, 3, device=self.device)
        self.reached = torch.zeros((), dtype=torch.bool, device=self.device)
        self.at_target = torch.zeros(3, device=self.device)

    @property
    def suffix(self) -> int:
        """Steps that the next stage trains, counted from the end."""
        return self.config.steps

    def chain(self) -> DenoisingChain:
        """Return the sampler's chain with the present eta."""
        return DenoisingChain(
            self.alpha_bar,
            self.config.steps,
            eta=self.config.eta,
            clip=self.world.clip,
            floor=STD_FLOOR,
            device=self.device,
        )

    def draw_classes(self, count: int) -> torch.Tensor:
        """Return random classes, int64 [count]."""
        return torch.randint(self.world.classes, (count,), generator=self.rng.torch, device=self.device)

    def descend(self, loss: torch.Tensor) -> None:
        """Take one step of AdamW, with the gradient's norm clipped at 1."""
        self.optimizer.param_groups[0]["lr"] = self.config.learning_rate
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), 1.0)
        self.optimizer.step()

    @torch.no_grad()
    def judge(self, count: int) -> dict[str, torch.Tensor]:
        """Sample all classes alike: the share of right samples, and their spread within a class, by the data's."""
        y = torch.arange(count, device=self.device) % self.world.classes
        x = self.chain().sample(self.denoiser, y, self.rng.torch)
        right = self.world.right(x, y)
        return {
            "alignment": right.float().mean(),
            "diversity": class_spread(x, y, right, self.world.classes) / self.world.data_std,
            "mean_reward": self.world.reward(x, y).mean(),
            "on_data": self.world.on_data(x).float().mean(),
        }

    @torch.no_grad()
    def follow(self) -> Metrics:
        """Measure after a stage, and note what reaching the target took.

        The target counts as reached at the middle of the first three stages whose mean alignment is at least
        `target`: one lucky measurement is not enough, and looking at three does not make a method late. Before that,
        "to the target" is all that was spent so far. Measuring itself is not counted.
        """
        judged = self.judge(self.config.measured)
        spent = torch.tensor(float(self.evaluations), device=self.device)
        now = torch.stack([judged["alignment"], judged["diversity"], spent])
        self.recent = torch.cat([self.recent, now.unsqueeze(0)])[-3:]
        mean = self.recent.mean(dim=0)
        middle = torch.stack([mean[0], mean[1], self.recent[len(self.recent) // 2, 2]])
        there = (mean[0] >= self.config.target) & (len(self.recent) == 3)
        self.at_target = torch.where(self.reached, self.at_target, torch.where(there, middle, now))
        self.reached = self.reached | there
        return {
            "fresh_alignment": judged["alignment"],
            "fresh_diversity": judged["diversity"],
            "thousand_evaluations": self.evaluations / 1000,
        }

    def evaluate(self) -> Metrics:
        """Judge 1,000 samples; add the divergence from the pretrained sampler, and what the target has cost."""
        return {
            **self.judge(1000),
            "kl": self.trace(200).kl.sum(),
            "reached_target": self.reached.float(),
            "log_evaluations_to_target": self.at_target[2].clamp(min=1).log(),
            "diversity_at_target": self.at_target[1],
        }

    # ---- pictures ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def trace(self, count: int) -> Trace:
        """Follow chains of all classes, step by step; inside `views` always from the same noise."""
        chain, world = self.chain(), self.world
        y = torch.arange(count, device=self.device) % world.classes
        x = torch.randn(count, self.denoiser.dimension, generator=self.rng.torch, device=self.device)
        states, reward, kl = [x], [], []
        for i in range(chain.steps):
            step = chain.step(x, chain.predict(self.denoiser, x, i, y), i)
            before = chain.step(x, chain.predict(self.pretrained, x, i, y), i)
            kl.append(((step.mean - before.mean).square().sum(1) / (2 * step.std.square())).mean())
            reward.append(world.reward(step.predicted, y).mean())
            x = draw_step(step, self.rng.torch)
            states.append(x)
        return Trace(y, torch.stack(states), torch.stack(reward), torch.stack(kl))

    def views(self) -> dict[str, View]:
        trace = self.trace(40 * self.world.classes)
        number = np.arange(1, self.config.steps + 1)
        trained = np.where(number > self.config.steps - self.suffix, 0.0, math.nan)
        return {
            "samples": self._cloud(trace) if isinstance(self.world, RingWorld) else self._digits(trace),
            "path": self._path(trace),
            "decided": Lines(
                title="What each step has decided",
                alt="Mean reward of the data that each denoising step predicts; a line at 0 marks the trained steps",
                x=number,
                y={"reward so far": trace.reward.cpu().numpy(), "trained steps": trained},
                x_label="denoising step",
                y_label="reward",
                y_range=(-0.03, 1.03) if self.config.reward == "class" else None,
            ),
            "kl_by_step": Lines(
                title="How far each step has moved",
                alt="KL divergence of each denoising step from the pretrained sampler's",
                x=number,
                y={"KL from the pretrained step": trace.kl.cpu().numpy()},
                x_label="denoising step",
                y_label="nats",
                log_y=True,
            ),
        }

    def _cloud(self, trace: Trace) -> View:
        """Finished points, by whether they are where they were asked to be."""
        assert isinstance(self.world, RingWorld)
        x, right = trace.states[-1], self.world.right(trace.states[-1], trace.y)
        return Points(
            title="Samples from fixed noise",
            alt="Sampled points in the plane, right and wrong ones, over the eight centres of the ring",
            groups={
                "wrong class": x[~right].cpu().numpy(),
                "right class": x[right].cpu().numpy(),
                "centres": self.world.centres.cpu().numpy(),
            },
            x_range=(-3.0, 3.0),
            y_range=(-3.0, 3.0),
        )

    def _digits(self, trace: Trace) -> View:
        """Finished images, a column a digit."""
        images = trace.states[-1][: 4 * self.world.classes].reshape(4, self.world.classes, 8, 8)
        return ImageGrid(
            title="Samples from fixed noise",
            alt="Four sampled images for each digit that was asked for, a column a digit",
            images=images.cpu().numpy(),
            column_labels=[str(digit) for digit in range(self.world.classes)],
            low=-1.0,
            high=1.0,
        )

    def _path(self, trace: Trace) -> View:
        """The way from noise to data as a strip of pictures."""
        chosen = np.linspace(0, self.config.steps, 6).round().astype(int)
        shown = trace.states[torch.from_numpy(chosen).to(self.device)].cpu().numpy()
        if isinstance(self.world, RingWorld):
            edges = np.linspace(-3, 3, 29)
            maps = [np.histogram2d(x[:, 1], x[:, 0], bins=[edges, edges])[0][::-1] for x in shown]
            images, low = np.stack([image / max(image.max(), 1) for image in maps])[None], 0.0
            alt = "Density of the points after some of the denoising steps, from noise to the ring"
        else:
            images, low = shown[:, :4].transpose(1, 0, 2).reshape(4, len(chosen), 8, 8), -1.0
            alt = "Four chains after some of the denoising steps, from noise to a digit"
        labels = [f"step {i}" for i in chosen]
        return ImageGrid(title="From noise to data", alt=alt, images=images, column_labels=labels, low=low, high=1.0)
