"""A tiny Hugging Face causal model (tied weights) that samples with a cache and learns by REINFORCE."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import polrl
from polrl import Bars, Curve, Learner, knob, sample_categorical


class Config(polrl.Config):
    length: int = 5
    kl: float = knob(0.1, low=0.0, high=2.0, first=True)
    temperature: float = knob(1.0, low=0.2, high=2.0)
    baseline: bool = knob(True)


class LanguageSampler(Learner[Config]):
    curves = (Curve(("reward",), "Reward"), Curve(("kl",), "KL to the start"))

    def setup(self):
        shape = LlamaConfig(
            vocab_size=12, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
        )  # fmt: skip
        self.model = LlamaForCausalLM(shape).to(self.device)
        self.reference = LlamaForCausalLM(shape).to(self.device).requires_grad_(False)
        self.reference.load_state_dict(self.model.state_dict())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def sample(self, batch):
        tokens = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        cache = None
        with torch.no_grad():
            for _ in range(self.config.length):
                out = self.model(tokens[:, -1:] if cache else tokens, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                drawn = sample_categorical(out.logits[:, -1] / self.config.temperature, self.rng.torch)
                tokens = torch.cat([tokens, drawn[:, None]], 1)
        return tokens

    def log_probabilities(self, model, tokens):
        logits = model(tokens[:, :-1]).logits.log_softmax(-1)
        return logits.gather(-1, tokens[:, 1:, None])[..., 0]

    def update(self):
        tokens = self.sample(8)
        reward = (tokens[:, 1:] == 3).float().mean(1)
        advantage = reward - reward.mean() * self.config.baseline
        own, start = (self.log_probabilities(m, tokens) for m in (self.model, self.reference))
        kl = (own - start).sum(1)
        loss = -((advantage - self.config.kl * kl.detach())[:, None] * own).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"reward": reward.mean(), "kl": kl.mean(), "loss": loss}

    def evaluate(self):
        return {"greedy_reward": (self.sample(16)[:, 1:] == 3).float().mean()}

    def views(self):
        first = self.model(torch.zeros(1, 1, dtype=torch.long, device=self.device)).logits[0, -1].softmax(-1)
        labels = [chr(97 + i) for i in range(12)]
        return {
            "first_token": Bars(
                title="First token", alt="Probability of each first token", labels=labels, values={"model": first.cpu()}
            )
        }
