"""A step of GRPO beside TRL's trainer, with the same model; one-token rollout beside plain fine-tuning.

GRPO: an untrained Llama of 860,160 parameters, 8 prompts a step, 8 completions each of 8 tokens at most, one update a
batch, on one thread; a step is sampling, rewards and update. TRL is spared what polrl has not: gradient checkpointing,
logging, saving. It runs with a KL term (beta 0.04) and without. Without one TRL leaves the base model out, polrl reads
it all the same, for the KL curve; so only with one is the work the same. Beside each ratio stands what nobody who
trains this model can do without: one forward and backward pass over the samples, by TRL's step. A rollout step draws
K = 256 tokens at each position of the batch.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import tempfile
import time
from typing import Any

import numpy as np
import torch

from benchmarks.timing import interleaved, repeat, timed
from polrl.language.grpo import GRPO
from polrl.language.one_token_rollout import OneTokenRollout, sft_loss
from polrl.models.causal_lm import token_log_probs
from polrl.models.tiny_lm import make_tokenizer, new_tiny_lm
from polrl.worlds.text_tasks import Arithmetic

PROMPTS, GROUP, TOKENS, RATE = 8, 8, 8, 2e-4
SAMPLES = PROMPTS * GROUP


# ---- GRPO beside TRL -------------------------------------------------------------------------------------------


def our_grpo(model: torch.nn.Module, beta: float) -> GRPO:
    """Return polrl's learner with this model in place of the checkpoint."""
    learner = GRPO(
        prompts=PROMPTS, group_size=GROUP, t_max=TOKENS, reuse=1, beta=beta, learning_rate=RATE, held_out=3,
        device="cpu",
    )  # fmt: skip
    learner.policy = model
    learner.world.base = copy.deepcopy(model).eval().requires_grad_(False)
    learner.optimizer = torch.optim.Adam(model.parameters(), fused=True)
    learner.update()
    return learner


def their_grpo(model: torch.nn.Module, beta: float, steps: int, folder: str) -> Any:
    """Return TRL's trainer for the same model, sums, rewards and update."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    sums = Arithmetic("+").prompts(2000, np.random.default_rng(0))

    def right(completions: list[str], answer: list[str], **columns: object) -> list[float]:
        return [float(text == wanted) for text, wanted in zip(completions, answer, strict=True)]

    return GRPOTrainer(
        model=model,
        reward_funcs=right,
        # Its tokenizer puts no beginning before a text.
        train_dataset=Dataset.from_list([{"prompt": "<bos>" + p.prompt, "answer": p.answer} for p in sums]),
        processing_class=make_tokenizer(),
        args=GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=SAMPLES,
            gradient_accumulation_steps=1,
            num_generations=GROUP,
            max_completion_length=TOKENS,
            num_iterations=1,
            steps_per_generation=1,
            beta=beta,
            loss_type="grpo",
            epsilon=0.2,
            temperature=1.0,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            max_steps=steps,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        ),
    )


def compare_grpo(beta: float, rounds: int, steps: int) -> dict[str, float]:
    """Let TRL train, and polrl do as many steps whenever TRL has done so many; the first turn of each warms up."""
    from transformers import PrinterCallback, TrainerCallback

    torch.manual_seed(0)
    model = new_tiny_lm("L")
    learner = our_grpo(copy.deepcopy(model), beta)
    work, bare = repeat(learner.update), repeat(lambda: one_pass(learner))
    ours, theirs, passes, lengths = [], [], [], []

    class Turns(TrainerCallback):
        begun = time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step % steps == 0:
                theirs.append(time.process_time() - self.begun)
                ours.append(timed(lambda: work(steps))[1])
                passes.append(timed(lambda: bare(steps))[1])
                lengths.append(float(learner.batch.mask.sum(dim=1).mean()))
                self.begun = time.process_time()

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model.config._name_or_path = folder  # where TRL reads its base model
        trainer = their_grpo(model, beta, steps * (rounds + 1), folder)
        trainer.remove_callback(PrinterCallback)  # the output is ours
        trainer.add_callback(Turns())
        trainer.train()
    written, their_written = statistics.mean(lengths), trainer.state.log_history[-1]["completions/mean_length"]
    if abs(written - their_written) > 0.5:
        raise RuntimeError(f"not the same work: {written:.2f} tokens a sample here, {their_written:.2f} in TRL")
    ratios = [a / b for a, b in zip(ours[1:], theirs[1:], strict=True)]
    figures = {
        "time of a GRPO step / TRL's": statistics.median(ratios),
        "lowest of the rounds": min(ratios),
        "highest of the rounds": max(ratios),
        "forward and backward alone / TRL's step": statistics.median(passes[1:]) / statistics.median(theirs[1:]),
        "polrl, samples a second": SAMPLES * steps / statistics.median(ours[1:]),
        "TRL, samples a second": SAMPLES * steps / statistics.median(theirs[1:]),
        "polrl, tokens a sample": written,
        "TRL, tokens a sample": their_written,
    }
    return {f"beta {beta:g}: {name}": value for name, value in figures.items()}


def one_pass(learner: GRPO) -> None:
    """Read a batch forwards and backwards, and change nothing."""
    token_log_probs(learner.batch.logits(learner.policy), learner.batch.ids).mean().backward()
    learner.optimizer.zero_grad()


# ---- one-token rollout beside plain fine-tuning -----------------------------------------------------------------


class PlainTuning:
    """Supervised fine-tuning and nothing else: the same references, forward pass, mean and optimizer."""

    def __init__(self, learner: OneTokenRollout) -> None:
        self.world, self.rate, self.count = learner.world, learner.config.learning_rate, learner.config.batch_size
        self.generator = torch.Generator().manual_seed(0)
        self.policy = copy.deepcopy(learner.policy)
        self.optimizer = self.world.new_optimizer(self.policy)
        self.optimizer.param_groups[0]["lr"] = self.rate

    def update(self) -> torch.Tensor:
        batch = self.world.draw(self.count, self.generator)
        loss = sft_loss(self.world.logits(self.policy, batch), batch.targets, batch.mask)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def compare_rollout(size: str, rounds: int, steps: int) -> float:
    """Return the time of a rollout step with K = 256 by that of a plain step, with a model of one size."""
    learner = OneTokenRollout(num_samples=256, held_out=1, device="cpu")
    if size != "S":
        torch.manual_seed(0)
        learner.policy = new_tiny_lm(size)
        learner.optimizer = learner.world.new_optimizer(learner.policy)
    plain = PlainTuning(learner)
    for work in (learner.update, plain.update):
        repeat(work)(3)
    return interleaved(repeat(learner.update), repeat(plain.update), steps, rounds)


def main(words: list[str]) -> None:
    """Measure and print one JSON object; ratios above 1 mean that polrl is slower."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks language")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=5, help="of GRPO in each round; four times as many of the rollout")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    report: dict[str, float] = {}
    for size in ("S", "L"):
        name = f"time of a one-token rollout step / plain fine-tuning's, size {size}"
        report[name] = compare_rollout(size, options.rounds, 4 * options.steps)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for beta in (0.04, 0.0):
        report |= compare_grpo(beta, options.rounds, options.steps)
    print(json.dumps({name: round(value, 3) for name, value in report.items()}, indent=2))
