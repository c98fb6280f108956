"""Updates of TD3+BC beside d3rlpy's, and beside a plain PyTorch loop; all three take the same steps.

10^5 random transitions with 17 observation and 6 action dimensions, batches of 256, networks of 256-256, one thread;
drawing the batch is part of an update. What d3rlpy does around one (logging, progress) is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.timing import interleaved, repeat, timed
from polrl.offline._td3 import Actor, Batch, TwinCritic
from polrl.offline.td3_bc import TD3BC
from polrl.worlds.offline_data import OfflineData

STATES, ACTIONS = 17, 6
EPISODES, LENGTH = 100, 1000
WIDTH, BATCH = 256, 256
DISCOUNT, TAU, ALPHA, RATE, NOISE, CLIP, EVERY = 0.99, 0.005, 2.5, 3e-4, 0.2, 0.5, 2


def random_episodes(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return observations, actions and rewards [episodes, steps + 1, ...]; the last step only ends an episode."""
    count = (EPISODES, LENGTH + 1)
    observations = rng.normal(size=(*count, STATES)).astype(np.float32)
    actions = rng.uniform(-1, 1, size=(*count, ACTIONS)).astype(np.float32)
    return observations, actions, rng.normal(size=count).astype(np.float32)


def as_offline_data(observations: np.ndarray, actions: np.ndarray, rewards: np.ndarray) -> OfflineData:
    """Return the episodes as polrl's tensors."""

    def rows(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).flatten(0, 1)

    starts = LENGTH * torch.arange(EPISODES)
    return OfflineData(
        observations=rows(observations[:, :-1]),
        actions=rows(actions[:, :-1]),
        rewards=rows(rewards[:, :-1]),
        next_observations=rows(observations[:, 1:]),
        terminals=torch.zeros(EPISODES * LENGTH),
        episode_starts=starts,
        episode_ends=starts + LENGTH,
        name="random",
        task="",
        action_low=-torch.ones(ACTIONS),
        action_high=torch.ones(ACTIONS),
    )


def ours(data: OfflineData) -> TD3BC:
    """Return polrl's learner on these data; there is no task in which it could be tried."""
    with mock.patch("polrl.offline._td3.load_problem", return_value=(data, None)):
        return TD3BC(
            width=WIDTH, batch_size=BATCH, discount=DISCOUNT, tau=TAU, alpha=ALPHA, learning_rate=RATE,
            policy_noise=NOISE, noise_clip=CLIP, policy_freq=EVERY, device="cpu",
        )  # fmt: skip


class PlainLoop:
    """TD3+BC as one would write it with PyTorch alone."""

    def __init__(self, data: OfflineData) -> None:
        self.columns = (data.observations, data.actions, data.rewards, data.next_observations, data.terminals)
        self.actor, self.critic = Actor(STATES, ACTIONS, WIDTH, torch.ones(ACTIONS)), TwinCritic(STATES, ACTIONS, WIDTH)
        self.actor_target, self.critic_target = copy.deepcopy(self.actor), copy.deepcopy(self.critic)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=RATE)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=RATE)
        self.step = 0

    def batch(self) -> Batch:
        rows = torch.randint(len(self.columns[0]), (BATCH,))
        s, a, r, s2, d = (column[rows] for column in self.columns)
        return s, a, r, s2, d

    def update(self) -> torch.Tensor:
        self.step += 1
        s, a, r, s2, d = self.batch()
        with torch.no_grad():
            noise = (NOISE * torch.randn_like(a)).clamp(-CLIP, CLIP)
            q = torch.minimum(*self.critic_target(s2, (self.actor_target(s2) + noise).clamp(-1, 1)))
            y = r + DISCOUNT * (1 - d) * q
        q1, q2 = self.critic(s, a)
        critic_loss = F.mse_loss(q1, y) + F.mse_loss(q2, y)
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_optimizer.step()
        if self.step % EVERY == 0:
            action = self.actor(s)
            q = self.critic.first(s, action)
            actor_loss = F.mse_loss(action, a) - ALPHA * q.mean() / q.abs().mean().detach()
            self.actor_optimizer.zero_grad()
            actor_loss.backward()
            self.actor_optimizer.step()
            for target, online in ((self.critic_target, self.critic), (self.actor_target, self.actor)):
                for old, new in zip(target.parameters(), online.parameters(), strict=True):
                    old.data.copy_(TAU * new.data + (1 - TAU) * old.data)
        return critic_loss.detach()


class Peer:
    """d3rlpy's TD3+BC on the same episodes."""

    def __init__(self, observations: np.ndarray, actions: np.ndarray, rewards: np.ndarray) -> None:
        with contextlib.redirect_stdout(sys.stderr):  # it tells what it does on the output that is ours
            import d3rlpy

            ends = np.zeros(rewards.shape, dtype=np.float32)
            ends[:, -1] = 1
            self.data = d3rlpy.dataset.MDPDataset(
                observations.reshape(-1, STATES), actions.reshape(-1, ACTIONS), rewards.reshape(-1),
                np.zeros(rewards.size, dtype=np.float32), timeouts=ends.reshape(-1),
            )  # fmt: skip
            self.method = d3rlpy.algos.TD3PlusBCConfig(
                batch_size=BATCH, gamma=DISCOUNT, tau=TAU, alpha=ALPHA, actor_learning_rate=RATE,
                critic_learning_rate=RATE, target_smoothing_sigma=NOISE, target_smoothing_clip=CLIP,
                update_actor_interval=EVERY,
            ).create(device="cpu:0")  # fmt: skip
            self.method.build_with_dataset(self.data)
        if self.data.transition_count != EPISODES * LENGTH:
            raise RuntimeError(f"d3rlpy sees {self.data.transition_count} transitions, not {EPISODES * LENGTH}")

    def update(self) -> float:
        loss: float = self.method.update(self.data.sample_transition_batch(BATCH))["critic_loss"]
        return loss

    def networks(self) -> list[nn.Module]:
        """Return the actor and the critics; the targets are still the same."""
        modules = self.method.impl.modules
        return [modules.policy, modules.q_funcs]


@torch.no_grad()
def copy_weights(networks: list[nn.Module], learner: TD3BC | PlainLoop) -> None:
    """Let a learner begin with these weights, actor and critics, the targets too."""
    for targets in ([learner.actor, learner.critic], [learner.actor_target, learner.critic_target]):
        for source, target in zip(networks, targets, strict=True):
            for new, old in zip(source.parameters(), target.parameters(), strict=True):
                old.copy_(new)


def check_same_steps(learner: TD3BC, plain: PlainLoop, peer: Peer | None, updates: int = 6) -> None:
    """Let all begin with one set of weights, batch and noise, and compare what becomes of critics and actors."""
    if peer:
        peer.method.set_grad_step(1)  # the actor's turn, then, is the second update everywhere
    start = peer.networks() if peer else [copy.deepcopy(plain.actor), copy.deepcopy(plain.critic)]
    copy_weights(start, learner)
    copy_weights(start, plain)
    for update in range(updates):
        if peer:
            drawn = peer.data.sample_transition_batch(BATCH)
            s, a, r, s2, d = (
                torch.from_numpy(np.asarray(x, dtype=np.float32))
                for x in (drawn.observations, drawn.actions, drawn.rewards, drawn.next_observations, drawn.terminals)
            )
            batch: Batch = (s, a, r.squeeze(1), s2, d.squeeze(1))
        else:
            batch = plain.batch()
        losses: list[Any] = []
        with (
            mock.patch.object(learner, "batch", return_value=(None, batch)),
            mock.patch.object(plain, "batch", return_value=batch),
        ):
            learner.rng.torch.manual_seed(update)
            losses.append(learner.update()["critic_loss"])
            torch.manual_seed(update)
            losses.append(plain.update())
        if peer:
            torch.manual_seed(update)
            losses.append(torch.tensor(peer.method.update(drawn)["critic_loss"]))
        for loss in losses[1:]:
            torch.testing.assert_close(losses[0], loss, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        found = [learner.actor(batch[0]), plain.actor(batch[0])]
        if peer:
            found.append(peer.networks()[0](batch[0]).squashed_mu)
    for actions in found[1:]:
        torch.testing.assert_close(found[0], actions, rtol=1e-4, atol=1e-5)


def milliseconds(work: Callable[[], object], updates: int) -> float:
    """Return the mean processor time of an update: on one thread it is what a free machine would take."""
    return 1e3 * timed(lambda: repeat(work)(updates))[1] / updates


def main(words: list[str]) -> None:
    """Measure and print one JSON object; ratios above 1 mean that polrl is slower."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks offline")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--updates", type=int, default=40, help="in each round")
    options = parser.parse_args(words)

    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - d3rlpy draws its batches with the global generator
    episodes = random_episodes(np.random.default_rng(0))
    data = as_offline_data(*episodes)
    peer, learner, plain = Peer(*episodes), ours(data), PlainLoop(data)
    # polrl standardises the states first, which are standard already, within a few per mille.
    check_same_steps(learner, plain, peer)
    steps, rounds = options.updates, options.rounds
    report = {
        "time of a TD3+BC update / d3rlpy's": interleaved(repeat(learner.update), repeat(peer.update), steps, rounds),
        "time of a TD3+BC update / a plain PyTorch loop's": interleaved(
            repeat(learner.update), repeat(plain.update), steps, rounds
        ),
    }
    for name, work in (("polrl", learner.update), ("d3rlpy", peer.update), ("plain loop", plain.update)):
        report[f"{name}, ms an update"] = milliseconds(work, steps * rounds // 3)
    print(json.dumps({name: round(value, 3) for name, value in report.items()}, indent=2))
