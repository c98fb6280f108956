"""The benchmarks beside peers: importable without any of them, and all sides do the same work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import language, offline

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_PEERS = """
import sys
for peer in ("d3rlpy", "trl", "datasets", "diffusers", "ot"):
    sys.modules[peer] = None  # importing it fails
import benchmarks.{name}
"""


@pytest.mark.parametrize("name", ["offline", "language"])
def test_imports_need_no_peer(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PEERS.format(name=name)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def few_episodes(monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, ...]:
    for size, value in {"EPISODES": 3, "LENGTH": 200, "WIDTH": 16, "BATCH": 32}.items():
        monkeypatch.setattr(offline, size, value)
    return offline.random_episodes(np.random.default_rng(0))


def test_the_data_are_transitions_within_episodes(few_episodes: tuple[np.ndarray, ...]) -> None:
    observations, actions, rewards = few_episodes
    data = offline.as_offline_data(*few_episodes)
    assert data.observations.shape == (600, 17) and data.actions.shape == (600, 6) and len(data) == 600
    for row, (episode, step) in {0: (0, 0), 199: (0, 199), 200: (1, 0), 599: (2, 199)}.items():
        np.testing.assert_array_equal(data.observations[row], observations[episode, step])
        np.testing.assert_array_equal(data.next_observations[row], observations[episode, step + 1])
        np.testing.assert_array_equal(data.actions[row], actions[episode, step])
        assert data.rewards[row] == rewards[episode, step]
    assert data.episode_starts.tolist() == [0, 200, 400] and data.episode_ends.tolist() == [200, 400, 600]


def test_the_plain_loop_takes_the_learners_steps(few_episodes: tuple[np.ndarray, ...]) -> None:
    torch.manual_seed(0)
    data = offline.as_offline_data(*few_episodes)
    offline.check_same_steps(offline.ours(data), offline.PlainLoop(data), None)


@pytest.mark.parametrize(
    ("changed", "value"),
    [("DISCOUNT", 0.9), ("NOISE", 0.15), ("CLIP", 0.2), ("ALPHA", 2.0), ("TAU", 0.5), ("RATE", 2e-4)],
)
def test_other_steps_are_noticed(
    few_episodes: tuple[np.ndarray, ...], changed: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    data = offline.as_offline_data(*few_episodes)
    learner = offline.ours(data)
    monkeypatch.setattr(offline, changed, value)
    with pytest.raises(AssertionError):
        offline.check_same_steps(learner, offline.PlainLoop(data), None, updates=12)


def test_grpo_runs_with_the_model_that_was_put_in() -> None:
    torch.manual_seed(0)
    model = language.new_tiny_lm("L")
    before = model.model.embed_tokens.weight.detach().clone()
    learner = language.our_grpo(model, beta=0.04)
    assert learner.policy is model and model.num_parameters() == 860_160
    assert learner.batch.ids.shape[0] == language.SAMPLES and learner.batch.ids.shape[1] <= language.TOKENS
    assert learner.optimizer.param_groups[0]["params"][0] is next(model.parameters())
    torch.testing.assert_close(learner.world.base.model.embed_tokens.weight, before, rtol=0, atol=0)
    learner.update()
    assert learner.uses == 1  # a new batch for each update
    before = learner.state().digest()
    language.one_pass(learner)
    assert learner.state().digest() == before and all(p.grad is None for p in model.parameters())


def test_plain_tuning_learns_what_a_rollout_step_with_only_sft_learns() -> None:
    learner = language.OneTokenRollout(mix_sft=1.0, held_out=1, device="cpu")
    plain = language.PlainTuning(learner)
    plain.generator.set_state(learner.rng.torch.get_state())
    plain.update(), learner.update()
    for ours, theirs in zip(plain.policy.parameters(), learner.policy.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
