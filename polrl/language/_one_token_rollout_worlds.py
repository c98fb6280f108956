"""The two worlds of `one_token_rollout`: a tiny language model that learns to add, and one softmax over ten tokens.

A world gives references, says what the policy makes of them, judges it and draws it. Nothing in it changes once it is
made, so that all forks of a learner share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from polrl.core.learner import Metrics
from polrl.core.views import Bars, Heatmap, Tokens, View
from polrl.models.causal_lm import completion_logits
from polrl.models.tiny_lm import EOS, PAD, encode, encode_batch, load_tiny_lm
from polrl.worlds.text_tasks import Arithmetic, replace_digit

Tensor = torch.Tensor

REFERENCES = 4096  # noisy additions from which batches are drawn
DIGITS = "0123456789"


@dataclass(frozen=True)
class References:
    """N references.

    Attributes
    ----------
    prompts : Tensor, int64 [N, P]
        Of equal length, without padding.
    targets : Tensor, int64 [N, T]
        The reference tokens.
    mask : Tensor, float32 [N, T]
        1 on response tokens, 0 on padding.
    """

    prompts: Tensor
    targets: Tensor
    mask: Tensor

    def rows(self, index: Tensor) -> References:
        """Return some of the references."""
        return References(self.prompts[index], self.targets[index], self.mask[index])


def accuracy(log_pi: Tensor, problems: References) -> Tensor:
    """Return how often an answer drawn at temperature 1 is right, a scalar, for log-probabilities [N, T, V].

    One string alone is right, so its probability says exactly what drawing answers would estimate.
    """
    chosen = log_pi.gather(-1, problems.targets.unsqueeze(-1)).squeeze(-1)
    return (chosen * problems.mask).sum(dim=1).exp().mean()


class Additions:
    """Additions with two digits, some of them wrong, and a model that can already half add and half subtract.

    Parameters
    ----------
    checkpoint : str
        The model with which fine-tuning begins.
    noise : float
        Share of the references in which one digit is wrong.
    held_out : int
        Problems of each kind, with right answers, on which a policy is judged; none of them is a reference.
    rng : numpy.random.Generator
        Draws references and noise.

    Attributes
    ----------
    pace : float
        What the learning rate is multiplied with.
    shown : References
        What the pictures show: four references with an error, and four without.
    """

    pace = 1.0

    def __init__(
        self, checkpoint: str, noise: float, held_out: int, rng: np.random.Generator, device: torch.device
    ) -> None:
        self.checkpoint, self.device = checkpoint, device
        problems = Arithmetic("+").prompts(REFERENCES, rng)
        right = [problem.answer for problem in problems]
        wrong = rng.random(REFERENCES) < noise
        given = [replace_digit(a, rng) if w else a for a, w in zip(right, wrong, strict=True)]
        self.references = self.tokens([p.prompt for p in problems], given)
        long = np.array([len(answer) == 3 for answer in right])
        first = np.concatenate([np.flatnonzero(long & wrong)[:4], np.flatnonzero(~wrong)[:4]])
        self.shown = self.references.rows(torch.as_tensor(first, device=device))
        self.words = [(problems[i].prompt, given[i], right[i] if wrong[i] else "") for i in first]
        # Every seed is judged by the same problems.
        judged = np.random.default_rng(0)
        self.judged = {}
        for name, sign in (("accuracy", "+"), ("elsewhere", "-")):
            problems = Arithmetic(sign).prompts(held_out, judged, split="test")
            self.judged[name] = self.tokens([p.prompt for p in problems], [p.answer for p in problems])
        with torch.no_grad():
            start = self.new_policy()
            self.at_start = {n: torch.log_softmax(self.logits(start, r), dim=-1) for n, r in self.judged.items()}

    def tokens(self, prompts: list[str], answers: list[str]) -> References:
        """Return prompts and answers, each with the token that ends it, as references."""
        ids, _ = encode_batch(prompts, device=self.device)
        rows = [[*encode(answer), EOS] for answer in answers]
        width = max(map(len, rows))
        targets = torch.tensor([row + [PAD] * (width - len(row)) for row in rows], device=self.device)
        mask = torch.tensor([[1.0] * len(row) + [0.0] * (width - len(row)) for row in rows], device=self.device)
        return References(ids, targets, mask)

    def new_policy(self) -> nn.Module:
        """Return the model with which fine-tuning begins."""
        return load_tiny_lm(self.checkpoint, self.device)

    def new_optimizer(self, policy: nn.Module) -> torch.optim.Optimizer:
        """Return Adam with the tiny model's usual decay rates."""
        return torch.optim.Adam(policy.parameters(), betas=(0.9, 0.98))

    def draw(self, count: int, generator: torch.Generator) -> References:
        """Return a batch of references, drawn with replacement."""
        index = torch.randint(len(self.references.targets), (count,), generator=generator, device=self.device)
        return self.references.rows(index)

    def logits(self, policy: nn.Module, references: References) -> Tensor:
        """Return the logits [N, T, V] that predict each reference token."""
        prompts, targets, mask = references.prompts, references.targets, references.mask
        return completion_logits(policy, prompts, torch.ones_like(prompts), targets, mask)

    def judge(self, policy: nn.Module) -> Metrics:
        """Return the exact accuracy of answers drawn at temperature 1, and means over the tokens of right answers."""
        figures: dict[str, Tensor] = {}
        divergences = []
        for name, problems in self.judged.items():
            log_pi, start = torch.log_softmax(self.logits(policy, problems), dim=-1), self.at_start[name]
            tokens = problems.mask / problems.mask.sum()
            figures[name] = accuracy(log_pi, problems)
            divergences.append((tokens * (log_pi.exp() * (log_pi - start)).sum(dim=-1)).sum())
            if name == "accuracy":
                figures["token_entropy"] = -(tokens * (log_pi.exp() * log_pi).sum(dim=-1)).sum()
        forgotten = accuracy(self.at_start["elsewhere"], self.judged["elsewhere"]) - figures["elsewhere"]
        return {**figures, "forgotten": forgotten, "kl": torch.stack(divergences).mean()}

    def pictures(self, policy: Tensor, share: Tensor, push: Tensor) -> dict[str, View]:
        """Draw probabilities, hits and pushes, all [8, T, V], of the references that are shown."""
        lines, values = [], {"probability": policy, "hits": share}
        for prompt, given, right in self.words:
            lines.append([prompt, *given, "⏎", f"   (right: {right})" if right else ""])
        at_reference = {
            name: [
                [0.0, *row[:length].tolist(), 0.0]
                for row, length in zip(
                    table.gather(-1, self.shown.targets.unsqueeze(-1)).squeeze(-1),
                    self.shown.mask.sum(dim=1).int().tolist(),
                    strict=True,
                )
            ]
            for name, table in values.items()
        }
        columns = [*encode(DIGITS), EOS]
        given = self.words[0][1]
        return {
            "probability": Tokens(
                title="Probability of each reference token",
                alt="Eight references, four of them with a wrong digit; the bluer a token, the likelier it is",
                lines=lines,
                values=at_reference["probability"],
            ),
            "hits": Tokens(
                title="Share of the draws that hit it: what a reference token earns",
                alt="The same references; the bluer a token, the more of the draws equal it",
                lines=lines,
                values=at_reference["hits"],
            ),
            "push": Heatmap(
                title=f"Push on the logits, {self.words[0][0]}{given}",
                alt="For each token of the first reference, how far the step pushes the logit of each digit up or down",
                values=push[0, : len(given) + 1].cpu().numpy()[:, columns],
                row_labels=[*given, "⏎"],
                column_labels=[*DIGITS, "⏎"],
                x_label="token that is pushed",
                y_label="reference token",
                low=-0.5,
                high=0.5,
                diverging=True,
            ),
        }


class Softmax(nn.Module):
    """Ten logits."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(10))

    def forward(self, count: int) -> Tensor:
        """Return the same logits for every reference [count, 1, 10]."""
        return self.logits.expand(count, 1, -1)


class OneSoftmax:
    """One position, ten tokens, and thirty references: 21 with the right token, one with each of the others.

    A batch is always all of them, so that every step meets the noise of 30 % exactly.
    """

    pace = 1000.0  # gradient descent on ten logits needs longer steps than Adam on a network
    right = 3

    def __init__(self, device: torch.device) -> None:
        self.device = device
        tokens = [self.right] * 21 + [token for token in range(10) if token != self.right]
        targets = torch.tensor(tokens, device=device).unsqueeze(1)
        self.shown = References(torch.zeros_like(targets), targets, torch.ones(30, 1, device=device))
        self.law = torch.bincount(targets[:, 0], minlength=10) / 30

    def new_policy(self) -> nn.Module:
        """Return a uniform policy."""
        return Softmax().to(self.device)

    def new_optimizer(self, policy: nn.Module) -> torch.optim.Optimizer:
        """Return plain gradient descent."""
        return torch.optim.SGD(policy.parameters(), lr=self.pace)

    def draw(self, count: int, generator: torch.Generator) -> References:
        """Return all references."""
        return self.shown

    def logits(self, policy: nn.Module, references: References) -> Tensor:
        """Return the logits [30, 1, 10]."""
        return policy(len(references.targets))

    def judge(self, policy: nn.Module) -> Metrics:
        """Return the probability of the right token, entropy, KL from uniform, and the distance from the references."""
        log_pi = torch.log_softmax(policy(1)[0, 0], dim=0)
        entropy = -(log_pi.exp() * log_pi).sum()
        return {
            "accuracy": log_pi[self.right].exp(),
            "token_entropy": entropy,
            "kl": float(np.log(10)) - entropy,
            "distance_from_references": (log_pi.exp() - self.law).abs().sum() / 2,
        }

    def pictures(self, policy: Tensor, share: Tensor, push: Tensor) -> dict[str, View]:
        """Draw policy, draws and push, all [30, 1, 10], by token."""
        labels = [f"{token}✓" if token == self.right else str(token) for token in range(10)]
        common: dict[str, Any] = {"labels": labels}
        laws = {"references": self.law, "policy": policy[0, 0], "draws": share.mean(dim=(0, 1))}
        return {
            "laws": Bars(
                title="References, policy and draws",
                alt="Share of each token in the references, probability under the policy, share of the draws",
                values={name: law.cpu().numpy() for name, law in laws.items()},
                y_label="probability",
                y_range=(0, 1),
                **common,
            ),
            "push": Bars(
                title="What this step raises and lowers",
                alt="Mean over the references of the push on each token's logit",
                values={"push": push.mean(dim=(0, 1)).cpu().numpy()},
                y_label="push on the logit",
                y_range=(-0.2, 0.2),
                **common,
            ),
        }
