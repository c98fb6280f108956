r"""Policy Gradient-Driven Noise Mask: a policy learns which noise to put over each image.

A classifier of medical images can tell the kind of picture from its grey levels alone, and once that shortcut
works it has little reason to learn what is inside. Noise on the input is the classical cure, but generic noise
often hurts. Here the noise is learned: a small policy network looks at each image and gives a Beta distribution
for every cell of a coarse grid; a mask is drawn, smoothed, and multiplied into the image. Classifier and policy
train together, the policy by REINFORCE with the classifier's cross-entropy as its cost. The "heated" classifier
that comes out is only an intermediate: the policy is dropped, and a short fine-tuning on clean images follows.

Yavuz and Yang, arXiv 2406.14568. Equations E2-E8, E11 and E12 follow the official code, with its peculiarities: E6
is the log of a sum of densities, not their joint log-density, and E7 thereby multiplies the classifier's learning
rate by about log D. E9 (textbook REINFORCE) and E10 (the strength) are additions for teaching. E1, the policy's
two heads, is a network: `polrl.models.convnet.TwoHeadedPolicy`.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch.nn import functional as F

import polrl
from polrl import (
    Budget,
    Criterion,
    Curve,
    Heatmap,
    Histogram,
    ImageGrid,
    Learner,
    Metrics,
    Study,
    View,
    equation,
    knob,
    sample_beta,
)
from polrl.core.schedules import cosine, warmup
from polrl.models.convnet import ConvNet, TwoHeadedPolicy
from polrl.worlds.batches import EpochBatches
from polrl.worlds.digits import linear_probe, load_digits_28
from polrl.worlds.minirad import first_of_each_class, load_minirad


class Config(polrl.Config):
    """Settings of the method; 28 x 28 pixels with an 8 x 8 grid keep the paper's 3.5 pixels a cell."""

    width: int = Field(8, ge=1)
    per_class: int = Field(10, ge=1, le=40)
    test_per_class: int = Field(8, ge=1, le=40)  # a few are judged quickly; the study takes all
    batch_size: int = Field(16, ge=2)  # half the paper's, for a quick answer in the lab; the study takes all 32
    grid: int = Field(8, ge=2, le=28)  # one cell alone can score below zero
    pretrain_epochs: int = Field(200, ge=0)
    finetune_epochs: int = Field(20, ge=0)

    mask_strength: float = knob(
        1.0, low=0.0, high=1.0, symbol="s", first=True, help="how much of the mask is put over the image",
        at_low="plain training", at_high="the whole mask: contrast falls to about a half",
    )  # fmt: skip
    blur_sigma: float = knob(
        6.0, low=0.3, high=8.0, symbol=r"\sigma", unit="pixels", help="width of the Gaussian that smooths the mask",
        at_low="separate blocks, strong local noise", at_high="nearly flat: the whole image grows darker or lighter",
    )  # fmt: skip
    blur_kernel: int = knob(
        13, low=1, high=13, odd=True, symbol="k", unit="pixels", help="side of the smoothing kernel",
        at_low="no smoothing", at_high="smoother",
    )  # fmt: skip
    policy_lr_ratio: float = knob(
        0.1, low=0.0, high=1.0, scale="log_zero", smallest=1e-3, symbol=r"\eta_\phi/\eta_\theta",
        help="the policy's learning rate by the classifier's", at_low="frozen policy: random masks",
        at_high="the policy chases the cross-entropy, masks drift to transparent",
    )  # fmt: skip
    base_mix: float = knob(
        0.9, low=0.0, high=1.0, symbol=r"\delta", help="share of the moving base in each image's mask",
        at_low="each image its own mask, high variance", at_high="one mask for all; the policy gets no gradient",
    )  # fmt: skip
    base_momentum: float = knob(
        0.99, low=0.9, high=0.999, scale="log_one_minus", symbol=r"\mu", help="inertia of the base",
        at_low="the base follows each batch", at_high="the base hardly leaves its random start",
    )  # fmt: skip
    score: Literal["lse", "joint"] = knob("lse", help="lse: the official code's score; joint: textbook REINFORCE")
    rescale_classifier: bool = knob(
        False, help="divide the classifier's gradient by the mean score, to undo the hidden learning rate of E7"
    )
    classifier_lr: float = knob(
        0.05, low=1e-3, high=1.0, scale="log", symbol=r"\eta_\theta", paper=0.1,
        help="learning rate of pretraining, before its cosine", at_low="slow", at_high="unstable",
    )  # fmt: skip
    finetune_lr: float = knob(
        0.01, low=1e-4, high=0.1, scale="log", paper=1e-3, help="learning rate of fine-tuning, after its warm-up",
        at_low="the heated weights barely move", at_high="forgets the pretraining",
    )  # fmt: skip
    weight_decay: float = knob(
        1e-4, low=1e-6, high=1e-2, scale="log", help="of both networks", at_low="none", at_high="strong"
    )


@equation("E2", r"a=\delta\,\bar a+(1-\delta)\,u", source="MaskGenerator.forward")
def mix_with_base(base: torch.Tensor, raw: torch.Tensor, base_mix: float) -> torch.Tensor:
    """Mix the moving base [1, D] with an image's raw outputs [B, D], before the base moves."""
    return base_mix * base + (1 - base_mix) * raw


@equation("E3", r"\bar a\leftarrow\mu\,\bar a+(1-\mu)\,\mathrm{mean}_B\,\mathrm{sg}[u]", source="MaskGenerator.forward")
def move_base(base: torch.Tensor, raw: torch.Tensor, base_momentum: float) -> torch.Tensor:
    """Move the base [1, D] towards the batch's mean raw output; no gradient passes."""
    return base_momentum * base.detach() + (1 - base_momentum) * raw.detach().mean(dim=0, keepdim=True)


@equation("E4", r"m_{ij}\sim\mathrm{Beta}(e^{a_{ij}},e^{b_{ij}})", source="train_one_epoch.py")
def sample_mask(a: torch.Tensor, b: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw the mask's cells [B, D], kept within [1e-6, 1 - 1e-6]; a constant for autograd."""
    return sample_beta(a.detach().exp(), b.detach().exp(), generator).clamp(1e-6, 1 - 1e-6)


@equation("E5", r"M=\mathrm{Blur}_{k,\sigma}(\mathrm{Up}(m)),\qquad \tilde x=x\odot M", source="train_one_epoch.py")
def render_mask(mask: torch.Tensor, size: int, kernel: int, sigma: float) -> torch.Tensor:
    """Enlarge cells [B, D] (row-major) to [B, 1, size, size] by nearest neighbour and blur, mirroring at the edges."""
    grid = _checked_grid(mask, size, kernel, sigma)
    half = kernel // 2
    offsets = torch.arange(-half, half + 1, dtype=mask.dtype, device=mask.device)
    weights = torch.softmax(-(offsets**2) / (2 * sigma**2), dim=0)
    # Both are linear, and treat rows and columns alike: one matrix [grid, size] does them.
    rows = F.interpolate(torch.eye(grid, dtype=mask.dtype, device=mask.device).unsqueeze(1), size=size)
    spread = F.conv1d(F.pad(rows, (half, half), mode="reflect"), weights.reshape(1, 1, -1)).squeeze(1)
    return (spread.T @ mask.reshape(-1, grid, grid) @ spread).unsqueeze(1)


def _checked_grid(mask: torch.Tensor, size: int, kernel: int, sigma: float) -> int:
    """Return the grid's side, and refuse what can't be rendered."""
    grid = round(mask.shape[-1] ** 0.5)
    if grid * grid != mask.shape[-1]:
        raise ValueError(f"mask must hold a square number of cells, got {mask.shape[-1]}")
    if sigma <= 0:
        raise ValueError(f"sigma must be above 0, got {sigma!r}")
    if kernel % 2 == 0 or not 1 <= kernel < 2 * size:
        raise ValueError(f"kernel must be odd and below twice the size {size}, got {kernel!r}")
    return grid


def log_density(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return log Beta(m; e^a, e^b) of each cell [B, D]; the mask is a constant."""
    alpha, beta, mask = a.exp(), b.exp(), mask.detach()
    log_norm = torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)
    return (alpha - 1) * mask.log() + (beta - 1) * torch.log1p(-mask) - log_norm


@equation("E6", r"\ell_i=\log\sum_{j=1}^{D}\exp(\log p_{ij})", source="train_one_epoch.py")
def lse_score(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the log of the SUM of the cells' densities [B]; REINFORCE would take the sum of their logs."""
    return torch.logsumexp(log_density(a, b, mask), dim=1)


@equation("E7", r"L=\Big(\tfrac1B\sum_i\ell_i\Big)\cdot\mathrm{CE}(f_\theta(\tilde x),y)", source="train_one_epoch.py")
def joint_objective(score: torch.Tensor, cross_entropy: torch.Tensor) -> torch.Tensor:
    """Return the one loss of both networks, from scores [B] and cross-entropies by image [B]."""
    return score.mean() * cross_entropy.mean()


@equation(
    "E8",
    r"\frac{\partial L}{\partial a_{ij}}=\frac{\mathrm{CE}}B\,w_{ij}\,\alpha_{ij}"
    r"\big(\psi(\alpha_{ij}+\beta_{ij})-\psi(\alpha_{ij})+\log m_{ij}\big),\quad "
    r"w_{i\cdot}=\mathrm{softmax}_j(\log p_{i\cdot})",
    source="derived",
)
def joint_objective_gradient(
    a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor, cross_entropy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of E7 by a and by b, both [B, D], in closed form."""
    alpha, beta = a.exp(), b.exp()
    share = torch.softmax(log_density(a, b, mask), dim=1) * cross_entropy.mean() / len(mask)
    both = torch.digamma(alpha + beta)
    by_a = share * alpha * (both - torch.digamma(alpha) + mask.log())
    by_b = share * beta * (both - torch.digamma(beta) + torch.log1p(-mask))
    return by_a, by_b


@equation(
    "E9",
    r"L=\tfrac1B\sum_i\mathrm{sg}[c_i-\bar c]\sum_j\log p_{ij}+\tfrac1B\sum_i c_i",
    source="teaching extension",
)
def reinforce_objective(joint: torch.Tensor, cross_entropy: torch.Tensor) -> torch.Tensor:
    """Return textbook REINFORCE: joint log-densities [B] credited with each image's own cost [B], less the mean."""
    advantage = (cross_entropy - cross_entropy.mean()).detach()
    return (advantage * joint).mean() + cross_entropy.mean()


@equation("E10", r"\tilde x=x\odot\big((1-s)+s\,M\big)", source="teaching extension")
def mask_image(images: torch.Tensor, rendered: torch.Tensor, mask_strength: float) -> torch.Tensor:
    """Put a share of the mask [B, 1, H, W] over normalised images [B, C, H, W]; 1 is the paper's, 0 leaves them."""
    return images * ((1 - mask_strength) + mask_strength * rendered)


@equation("E11", r"\theta_0=\tfrac13\big(\theta_{-3}+\theta_{-2}+\theta_{-1}\big)", source="utils/weight_averaging.py")
def average_checkpoints(checkpoints: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the mean of a network's last checkpoints, where fine-tuning begins; counters keep the last value."""
    last = checkpoints[-1]
    return {
        name: torch.stack([c[name] for c in checkpoints]).mean(dim=0) if value.is_floating_point() else value
        for name, value in last.items()
    }


@equation("E12", r"m\sim\mathrm{Beta}(e^{\bar a},e^{\bar b})", source="evaluate.py")
def heated_mask(base_a: torch.Tensor, base_b: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw ONE mask [1, D] for a whole batch from the base [1, D]; the encoder is not asked."""
    return sample_mask(base_a, base_b, generator)


class NoiseMask(Learner[Config]):
    """Pretraining under the learned mask, then fine-tuning on clean images; a step is one minibatch."""

    phases = ("pretrain", "finetune")
    constants = ("data", "seen", "unseen")
    evaluate_every = 220
    curves = (
        Curve(("balanced_accuracy", "heated_accuracy", "train_accuracy"), "Accuracy", "share right"),
        Curve(("cross_entropy",), "Cross-entropy", "nats", log=True),
        Curve(("mask_mean",), "Mean mask value", "0 dark, 1 clear"),
        Curve(("log_score",), "Mean score of the masks", "nats"),
    )

    def setup(self) -> None:
        config = self.config
        self.data = load_minirad(self.device, config.per_class)
        self.batches = EpochBatches(len(self.data.train_labels), config.batch_size, self.rng.torch)
        self.seen = first_of_each_class(self.data.train_images, self.data.train_labels, config.test_per_class)
        self.unseen = first_of_each_class(self.data.test_images, self.data.test_labels, config.test_per_class)
        cells = config.grid**2
        self.classifier = ConvNet(config.width, len(self.data.class_names)).to(self.device)
        self.policy = TwoHeadedPolicy(cells).to(self.device)
        self.base_a, self.base_b = (torch.rand(1, cells, device=self.device, generator=self.rng.torch) for _ in "ab")
        self.classifier_optimizer, self.policy_optimizer, self.finetune_optimizer = (
            torch.optim.SGD(network.parameters(), lr=1.0, momentum=0.9)
            for network in (self.classifier, self.policy, self.classifier)
        )
        self.checkpoints: list[dict[str, torch.Tensor]] = []
        self.pretrain_steps = config.pretrain_epochs * self.batches.per_epoch
        self.finetune_steps = config.finetune_epochs * self.batches.per_epoch
        if self.pretrain_steps:
            self.schedule("classifier_lr", cosine(self.pretrain_steps), phase="pretrain")
        else:
            self.enter("finetune")
        # The paper warms up over 7 of its 10 epochs.
        self.schedule("finetune_lr", warmup(round(0.7 * self.finetune_steps)), phase="finetune")

    @property
    def budget(self) -> int:
        return self.pretrain_steps + self.finetune_steps

    def update(self) -> Metrics:
        batch = self.batches.draw()
        images, labels = self.data.train_images[batch], self.data.train_labels[batch]
        return self.pretrain(images, labels) if self.phase == "pretrain" else self.finetune(images, labels)

    def pretrain(self, images: torch.Tensor, labels: torch.Tensor) -> Metrics:
        config = self.config
        a, b, rendered, mask = self.draw_masks(images)
        cross_entropy = F.cross_entropy(
            self.classifier(mask_image(images, rendered, config.mask_strength)), labels, reduction="none"
        )
        if config.score == "lse":
            score = lse_score(a, b, mask)
            # A mean score below zero would make the classifier climb: not a number, and the guard stops the run.
            score = score.where(score.mean() > 0, torch.nan)
            loss = joint_objective(score, cross_entropy)
            factor = score.detach().mean()
        else:
            score = log_density(a, b, mask).sum(dim=1)
            loss = reinforce_objective(score, cross_entropy)
            factor = torch.ones_like(loss.detach())
        for optimizer, ratio in ((self.classifier_optimizer, 1.0), (self.policy_optimizer, config.policy_lr_ratio)):
            group = optimizer.param_groups[0]
            group["lr"], group["weight_decay"] = self.effective("classifier_lr") * ratio, config.weight_decay
            optimizer.zero_grad()
        loss.backward()
        if config.rescale_classifier:
            torch._foreach_div_([p.grad for p in self.classifier.parameters() if p.grad is not None], factor)
        self.classifier_optimizer.step()
        self.policy_optimizer.step()
        self.end_epoch()
        return {
            "cross_entropy": cross_entropy.mean(),
            "log_score": score.mean(),
            "mask_mean": mask.mean(),
        }

    def draw_masks(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Ask the policy about images, draw masks, and let the base follow: E2-E5."""
        config = self.config
        raw_a, raw_b = self.policy(images)
        a = mix_with_base(self.base_a, raw_a, config.base_mix).clamp(-3, 4)
        b = mix_with_base(self.base_b, raw_b, config.base_mix).clamp(-3, 4)
        if self.policy.training and config.policy_lr_ratio > 0:  # a frozen policy's base stays where it began
            self.base_a = move_base(self.base_a, raw_a, config.base_momentum)
            self.base_b = move_base(self.base_b, raw_b, config.base_momentum)
        mask = sample_mask(a, b, self.rng.torch)
        return a, b, render_mask(mask, images.shape[-1], config.blur_kernel, config.blur_sigma), mask

    def end_epoch(self) -> None:
        """Keep the last three epochs' weights; after the last, take their mean (E11) and go over to fine-tuning."""
        done = self.phase_step + 1
        if done % self.batches.per_epoch == 0 and done > self.pretrain_steps - 3 * self.batches.per_epoch:
            self.checkpoints = [*self.checkpoints, {k: v.clone() for k, v in self.classifier.state_dict().items()}]
        if done == self.pretrain_steps:
            self.classifier.load_state_dict(average_checkpoints(self.checkpoints))
            self.enter("finetune")

    def finetune(self, images: torch.Tensor, labels: torch.Tensor) -> Metrics:
        """One step on clean images; the policy is out of the game."""
        group = self.finetune_optimizer.param_groups[0]
        group["lr"], group["weight_decay"] = self.effective("finetune_lr"), self.config.weight_decay
        cross_entropy = F.cross_entropy(self.classifier(images), labels)
        self.finetune_optimizer.zero_grad()
        cross_entropy.backward()
        self.finetune_optimizer.step()
        return {"cross_entropy": cross_entropy}

    def evaluate(self) -> Metrics:
        """Accuracy on clean test and training images, the gap, and the heated accuracy under one mask (E12)."""
        config, (images, labels) = self.config, self.unseen
        mask = heated_mask(self.base_a, self.base_b, self.rng.torch)
        rendered = render_mask(mask, images.shape[-1], config.blur_kernel, config.blur_sigma)
        a, b, _, drawn = self.draw_masks(self.seen[0])
        test = self.accuracy_by_class(images, labels).mean()
        train = self.accuracy_by_class(*self.seen).mean()
        return {
            "balanced_accuracy": test,
            "train_accuracy": train,
            "gap": train - test,
            "heated_accuracy": self.accuracy_by_class(
                mask_image(images, rendered, config.mask_strength), labels
            ).mean(),
            "policy_mask_mean": drawn.mean(),
            "policy_score": lse_score(a, b, drawn).mean(),
        }

    def accuracy_by_class(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the share of each class's images that is told right, [classes]."""
        classes = len(self.data.class_names)
        logits = torch.cat([self.classifier(part) for part in images.split(90)])  # small parts stay in the cache
        right = (logits.argmax(dim=1) == labels).float()
        return torch.zeros(classes, device=self.device).index_add(0, labels, right) / labels.bincount(minlength=classes)

    @torch.no_grad()
    def transfer(self) -> Metrics:
        """Accuracy of a linear classifier of digits, never seen in training, on the encoder's features."""
        images, labels = load_digits_28(str(self.device))
        self.classifier.eval()
        features = torch.cat([self.classifier.features(part) for part in images.split(180)])
        self.classifier.train()
        return {"transfer_accuracy": linear_probe(features, labels, per_class=20)}

    def views(self) -> dict[str, View]:
        data, config = self.data, self.config
        images = data.test_images[:: len(data.test_images) // 8][:8]
        _, _, rendered, drawn = self.draw_masks(images)
        masked = mask_image(images, rendered, config.mask_strength)
        effective = (1 - config.mask_strength) + config.mask_strength * rendered
        rows = torch.stack([data.to_pixels(images), effective, data.to_pixels(masked)])[:, :, 0]
        edges = torch.linspace(0, 1, 26)
        counts = torch.histc(drawn.cpu(), bins=25, min=0, max=1) / drawn.numel()
        over = " (not used while fine-tuning)" if self.phase == "finetune" else ""
        accuracy = self.accuracy_by_class(data.test_images[::10], data.test_labels[::10])  # four of each class
        return {
            "mask": ImageGrid(
                title=f"The mask on test images{over}",
                alt="Eight test images; below each the mask that the policy draws for it, and the masked image",
                images=rows.cpu().numpy(),
                row_labels=("image", "mask", "masked"),
            ),
            "mask_values": Histogram(
                title="Values of the mask's cells",
                alt="How often each value between 0, dark, and 1, clear, is drawn for a cell of the mask",
                edges=edges.numpy(),
                counts={"cells": counts.numpy()},
                x_label="mask value",
            ),
            "accuracy_by_class": Heatmap(
                title="Accuracy by class (clean test images)",
                alt="Share of test images told right; a row for each kind of picture, a column for each level",
                values=accuracy.reshape(-1, 4).cpu().numpy(),
                row_labels=[name.rsplit(" / ", 1)[0] for name in data.class_names[::4]],
                column_labels=[name.rsplit(" / ", 1)[1] for name in data.class_names[:4]],
                low=0.0,
                high=1.0,
            ),
        }


# The classifier's gradient is divided by the score in every arm: all have the same learning rate, log 64 times 0.05.
_FAIR = {"rescale_classifier": True, "classifier_lr": 0.2, "batch_size": 32, "test_per_class": 40}

study = Study(
    claim="Pretraining under a learned noise mask, then fine-tuning on clean images, beats ordinary training.",
    learner=NoiseMask,
    arms={
        "clean": {**_FAIR, "mask_strength": 0.0},
        "random mask": {**_FAIR, "policy_lr_ratio": 0.0},
        "learned mask": _FAIR,
        "textbook REINFORCE": {**_FAIR, "score": "joint"},
    },
    criteria=(
        Criterion(
            "recovery",
            "fine-tuning lifts the heated model's accuracy on clean test images by at least 0.05",
            plus=("learned mask", "balanced_accuracy"),
            minus=("learned mask", "balanced_accuracy@pretrain"),
            above=0.05,
        ),
        Criterion(
            "benefit",
            "after fine-tuning, the learned mask's accuracy is above clean training's at equal learning rate",
            plus=("learned mask", "balanced_accuracy"),
            minus=("clean", "balanced_accuracy"),
        ),
        Criterion(
            "clearer",
            "the learned policy's masks grow clearer than the frozen policy's",
            plus=("learned mask", "policy_mask_mean@pretrain"),
            minus=("random mask", "policy_mask_mean@pretrain"),
        ),
        Criterion(
            "hidden pull",
            "the learned policy's masks move towards uniform ones: their score falls below the frozen policy's",
            plus=("random mask", "policy_score@pretrain"),
            minus=("learned mask", "policy_score@pretrain"),
        ),
    ),
    smoke=Budget(
        seeds=1,
        settings={"per_class": 4, "width": 4, "pretrain_epochs": 2, "finetune_epochs": 1},
        probe="transfer",
    ),
    fast=Budget(
        seeds=2,
        settings={"pretrain_epochs": 24, "finetune_epochs": 6},
        arms=("clean", "random mask", "learned mask"),
    ),
    full=Budget(seeds=5, settings={"width": 16, "pretrain_epochs": 40, "finetune_epochs": 10}, probe="transfer"),
)
