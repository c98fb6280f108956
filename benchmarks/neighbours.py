"""The search for nearest pairs beside scipy's KD-tree on rows [beta s, a], built anew whenever beta changes."""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Iterator

import numpy as np
import torch
from scipy.spatial import cKDTree

from benchmarks.timing import timed
from polrl.worlds.neighbours import NearestPairs

Asked = tuple[torch.Tensor, torch.Tensor]
#: States, actions: 4, 14 and 23 columns.
SIZES = ((3, 1), (11, 3), (17, 6))
BATCH = 256


def scattered(count: int, ds: int, da: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return normal states and uniform actions: the hardest data for any tree."""
    return rng.normal(size=(count, ds)), rng.uniform(-1, 1, size=(count, da))


def recorded(count: int, ds: int, da: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return smooth trajectories of 1,000 steps, with actions that depend on the state and noise."""
    steps = 1000
    size = (count // steps, 1, 4, ds)
    phase = 0.05 * np.arange(1, 5)[:, None] * np.arange(steps)[None, :, None, None] + rng.uniform(0, 6, size=size)
    states = (np.sin(phase) * rng.normal(size=size)).sum(axis=2).reshape(count, ds)
    states = (states - states.mean(axis=0)) / states.std(axis=0)
    return states, np.tanh(0.5 * states @ rng.normal(size=(ds, da)) + 0.3 * rng.normal(size=(count, da)))


class AsOnTheCard:
    """The card's way: a tree with beta in its rows."""

    def __init__(self, states: torch.Tensor, actions: torch.Tensor) -> None:
        self.states, self.actions, self.beta = states.double().numpy(), actions.double().numpy(), 0.0

    def query(self, states: torch.Tensor, actions: torch.Tensor, beta: float) -> torch.Tensor:
        """Return the nearest rows [B]."""
        if beta != self.beta:
            self.beta, self.tree = beta, cKDTree(np.concatenate([beta * self.states, self.actions], axis=1))
        asked = np.concatenate([beta * states.double().numpy(), actions.double().numpy()], axis=1)
        return torch.from_numpy(self.tree.query(asked, k=[1])[1][:, 0])


def batches(states: torch.Tensor, actions: torch.Tensor, rng: np.random.Generator) -> Iterator[Asked]:
    """Yield states of the data with actions that a policy on the way might take: between two logged ones, and noise."""
    while True:
        own, other = torch.from_numpy(rng.integers(len(states), size=(2, BATCH)))
        noise = torch.from_numpy(rng.normal(size=(BATCH, actions.shape[1]), scale=0.2)).float()
        yield states[own], (0.75 * actions[own] + 0.25 * actions[other] + noise).clamp(-1, 1)


def compare(states: torch.Tensor, actions: torch.Tensor, beta: float, rounds: int, rng: np.random.Generator) -> dict:
    """Return ratios (ours / the card's), interleaved, and our longest call in milliseconds."""
    ours, card = NearestPairs(states, actions), AsOnTheCard(states, actions)
    asked = batches(states, actions, rng)
    longest = 0.0
    report = {}
    for name, standing in (("moving", 1), ("ten alike", 10), ("standing", 0)):
        ratios = []
        if not standing:  # the trees are there: only questions are timed
            for _ in range(3):
                question = next(asked)
                for search in (ours, card):
                    search.query(*question, beta)
        for turn in range(rounds):
            now = beta * (1 + 0.01 * (turn + 1)) if standing else beta
            questions = [next(asked) for _ in range(standing or 5)]
            spent = [0.0, 0.0]
            for question in questions:
                asks = [functools.partial(search.query, *question, now) for search in (ours, card)]
                found, took = zip(*map(timed, asks), strict=True)
                assert torch.equal(*found), "the two searches disagree"
                spent = [before + more for before, more in zip(spent, took, strict=True)]
                longest = max(longest, took[0])
            ratios.append(spent[0] / spent[1])
        report[name] = statistics.median(ratios)
    return {**{n: round(r, 3) for n, r in report.items()}, "longest call, ms": round(1e3 * longest, 1)}


def main(words: list[str]) -> None:
    """Measure and print one JSON object; ratios above 1 mean that polrl is slower."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks neighbours")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--betas", type=float, nargs="+", default=[0.2, 2.0, 50.0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    report = {}
    for make in (scattered, recorded):
        for count in options.rows:
            for ds, da in SIZES:
                rng = np.random.default_rng(0)
                data = [torch.from_numpy(x).float() for x in make(count, ds, da, rng)]
                for beta in options.betas:
                    name = f"{make.__name__}, {count:,} rows, {ds + da} columns, beta {beta:g}"
                    report[name] = compare(data[0], data[1], beta, options.rounds, rng)
                    print(f"{name}: {report[name]}", flush=True)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
