"""What the house costs: `Run` beside the bare loop, and a method beside the same networks written straight down."""

from __future__ import annotations

import argparse
import json
import tracemalloc
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

import polrl
from benchmarks.timing import interleaved
from polrl import Learner, Run, knob
from polrl.foundations.noise_mask import NoiseMask, log_density, render_mask
from polrl_widgets.board import Board, Chart, Track, TrackFrame


def bare_loop(learner: Learner) -> Callable[[int], None]:
    """Return a function that calls `update()` and nothing else."""

    def work(steps: int) -> None:
        for _ in range(steps):
            learner.update()

    return work


def plain_noise_mask(learner: NoiseMask) -> Callable[[int], None]:
    """Return the same training as a plain PyTorch script would have it, on copies of the same networks."""
    config, data, size = learner.config, learner.data, learner.config.batch_size
    classifier, policy = learner.classifier, learner.policy
    base_a, base_b = learner.base_a, learner.base_b
    sgd = torch.optim.SGD(classifier.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    policy_sgd = torch.optim.SGD(policy.parameters(), lr=0.005, momentum=0.9, weight_decay=1e-4)

    def work(steps: int) -> None:
        nonlocal base_a, base_b
        for step in range(steps):
            place = step % (len(data.train_labels) // size)
            if place == 0:
                order = torch.randperm(len(data.train_labels))
            batch = order[place * size : (place + 1) * size]
            x, y = data.train_images[batch], data.train_labels[batch]
            u, v = policy(x)
            a, b = (0.9 * base_a + 0.1 * u).clamp(-3, 4), (0.9 * base_b + 0.1 * v).clamp(-3, 4)
            base_a = 0.99 * base_a + 0.01 * u.detach().mean(0, keepdim=True)
            base_b = 0.99 * base_b + 0.01 * v.detach().mean(0, keepdim=True)
            mask = torch.distributions.Beta(a.detach().exp(), b.detach().exp()).sample().clamp(1e-6, 1 - 1e-6)
            masked = x * render_mask(mask, 28, config.blur_kernel, config.blur_sigma)
            cost = F.cross_entropy(classifier(masked), y)
            loss = torch.logsumexp(log_density(a, b, mask), dim=1).mean() * cost
            sgd.zero_grad()
            policy_sgd.zero_grad()
            loss.backward()
            sgd.step()
            policy_sgd.step()

    return work


class Config(polrl.Config):
    """Settings of the long run."""

    rate: float = knob(0.1, low=0.0, high=1.0, first=True)


class Cheap(Learner[Config]):
    """A step of next to no work, to see what a long run keeps in memory."""

    def setup(self) -> None:
        self.net = torch.nn.Linear(100, 100)
        self.value = torch.zeros(())

    def update(self) -> polrl.Metrics:
        self.value = self.value + self.config.rate
        return {"value": self.value, "square": self.value * self.value, "half": self.value / 2}


def memory_of_a_long_run(steps: int) -> float:
    """Return the megabytes that a run with rewinding holds after so many steps."""
    run = Run(Cheap(), threads=1)
    tracemalloc.start()
    run.advance(steps)
    python = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return (python + sum(state.nbytes for _, state in run._snapshots)) / 1e6


def message_bytes(until: int) -> float:
    """Return the median size of a redraw's message after so many steps, four curves with ten new points each."""

    class Unsent(Board):
        def send(self, content: dict, buffers: list[bytes] | None = None) -> None:
            pass

    board = Unsent([Chart(n, n, (n,)) for n in "abcd"], [Track("t", "Run")])
    board._hear(None, {"type": "hello"}, [])  # a page that keeps up
    sizes = []
    for step in range(0, until, 10):
        x = np.arange(step, step + 10)
        before = board.bytes_sent
        board.frame({"t": TrackFrame(step=step, points={name: (x, np.sin(x / 50)) for name in "abcd"})})
        board.flush()
        sizes.append(board.bytes_sent - before)
    return float(np.median(sizes[-50:]))


def main(words: list[str]) -> None:
    """Measure and print one JSON object; ratios above 1 mean that polrl is slower."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks core")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    settings = {"device": "cpu", "pretrain_epochs": 4000}
    run = Run(NoiseMask(**settings), threads=1, evaluate_every=0)
    bare, plain = bare_loop(NoiseMask(**settings)), plain_noise_mask(NoiseMask(**settings))
    for work in (run.advance, bare, plain):
        work(20)
    report = {
        "time of Run / time of the bare loop": interleaved(run.advance, bare, options.steps, options.rounds),
        "time of NoiseMask.update / time of a plain PyTorch loop": interleaved(
            bare, plain, options.steps, options.rounds
        ),
        "megabytes after 100,000 steps with rewinding": memory_of_a_long_run(100_000),
        "bytes of a redraw after 100,000 steps / after 1,000": message_bytes(100_000) / message_bytes(1_000),
        "bytes of a redraw after 1,000 steps": message_bytes(1_000),
    }
    print(json.dumps({name: round(value, 3) for name, value in report.items()}, indent=2))
