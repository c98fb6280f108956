"""An image network with batch norm, dropout, two phases, two optimizers and a schedule."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import polrl
from polrl import Curve, Dropout, ImageGrid, Learner, knob
from polrl.core.schedules import cosine


class Config(polrl.Config):
    width: int = 4
    pretrain_steps: int = 5
    label_smoothing: float = knob(0.1, low=0.0, high=0.5, first=True)
    lr: float = knob(0.05, low=1e-3, high=0.2, scale="log")
    finetune_lr: float = knob(0.01, low=1e-4, high=0.1, scale="log")


class ImageNetwork(Learner[Config]):
    phases = ("pretrain", "finetune")
    curves = (Curve(("loss",), "Loss"), Curve(("accuracy",), "Accuracy"))
    constants = ("images", "labels")

    def setup(self):
        width, make = self.config.width, torch.Generator().manual_seed(0)
        self.images = torch.rand(64, 1, 8, 8, generator=make).to(self.device)
        self.labels = (self.images.mean(dim=(1, 2, 3)) > 0.5).long()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(),
            Dropout(0.2, self.rng.torch), nn.Linear(36 * width, 2),
        ).to(self.device)  # fmt: skip
        self.pretrainer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        self.finetuner = torch.optim.AdamW(self.net[-1].parameters(), lr=0.1)
        self.best = torch.zeros((), device=self.device)
        self.schedule("lr", cosine(self.config.pretrain_steps), phase="pretrain")

    def update(self):
        optimizer, name = {"pretrain": (self.pretrainer, "lr"), "finetune": (self.finetuner, "finetune_lr")}[self.phase]
        optimizer.param_groups[0]["lr"] = self.effective(name)
        batch = torch.randint(64, (8,), generator=self.rng.torch, device=self.device)
        logits = self.net(self.images[batch])
        loss = F.cross_entropy(logits, self.labels[batch], label_smoothing=self.config.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        accuracy = (logits.argmax(1) == self.labels[batch]).float().mean()
        self.best = torch.maximum(self.best, accuracy)
        if self.phase == "pretrain" and self.phase_step + 1 == self.config.pretrain_steps:
            self.enter("finetune")
        return {"loss": loss, "best": self.best}

    def evaluate(self):
        return {"accuracy": (self.net(self.images).argmax(1) == self.labels).float().mean()}

    def views(self):
        filters = self.net[0].weight[:, 0].detach().cpu().numpy()
        return {"filters": ImageGrid(title="Filters", alt="The first layer's filters", images=filters[None], low=-1)}
