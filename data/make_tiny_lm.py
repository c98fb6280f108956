"""Pretrain the checkpoints of the tiny language model: models that can do about half of a task.

    python data/make_tiny_lm.py                     all of them
    python data/make_tiny_lm.py correct-S add-S     these

Reinforcement learning begins where a model is right now and then. How many steps that takes differs from seed to
seed, so training is stopped by the accuracy measured while sampling at temperature 1, not by a count of steps.
A checkpoint is measured again as it was written, in float16; all figures stand in the manifest. The same
versions on the same machine give the same weights.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from tqdm import tqdm

from polrl.core.device import torch_threads
from polrl.core.errors import PolrlError, unknown_name
from polrl.core.files import sha256, write_atomic
from polrl.core.sampling import seeded_globals
from polrl.models.causal_lm import sample
from polrl.models.tiny_lm import decode_batch, encode_batch, new_tiny_lm, weights_for_file
from polrl.worlds.corridor import GRAB, LEFT, OPEN, RIGHT, Corridor, play, play_noisily
from polrl.worlds.text_tasks import (
    Arithmetic,
    Countdown,
    Problem,
    SelfCorrection,
    TwoAttempts,
    UnequalAttempts,
    replace_digit,
)

IGNORED = -100  # the label of a token that no loss counts
Batch = tuple[torch.Tensor, torch.Tensor]  # ids and labels, int64 [N, T]
Measured = dict[str, float]


class GoalMissedError(PolrlError, RuntimeError):
    """The steps were used up before the model was as good as it should be."""


@dataclass(frozen=True)
class Recipe:
    """How one checkpoint is made: `make` trains a new model of this size and returns the steps it took."""

    size: str
    task: str
    how: str
    make: Callable[[Any, np.random.Generator], int]
    measure: Callable[[Any, float, int], Measured]  # model, temperature, prompts
    goal: Mapping[str, tuple[float, float]]  # between what a figure at temperature 1 must lie


# ---- training --------------------------------------------------------------------------------------------------


def fit(
    model: Any,
    batch: Callable[[], Batch],
    *,
    steps: int,
    rate: float,
    decay: bool = False,
    done: Callable[[], bool] | None = None,
    every: int = 25,
) -> int:
    """Train on fresh batches for so many steps, or until `done`, which is asked every few of them; return how many.

    Raises
    ------
    GoalMissedError
        If `done` was never true.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    bar = tqdm(range(1, steps + 1), unit="step", mininterval=5.0)
    for step in bar:
        warm = min(1.0, step / 50)
        optimizer.param_groups[0]["lr"] = rate * warm * ((steps - step + 1) / steps if decay else 1.0)
        ids, labels = batch()
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % every == 0:
            bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
            if done is not None and done():
                bar.close()
                return step
    if done is not None:
        raise GoalMissedError(f"the goal was not reached within {steps} steps; try another --seed")
    return steps


def answers_batch(problems: Sequence[Problem]) -> Batch:
    """Return prompt, answer and end token of each problem; only what follows the prompt counts."""
    ids, mask = encode_batch([p.prompt + p.answer for p in problems], device="cpu", left_pad=False)
    ids = torch.cat([ids, torch.zeros_like(ids[:, :1])], dim=1)
    lengths = mask.sum(dim=1)
    ids[torch.arange(len(ids)), lengths] = SelfCorrection.second_end
    place = torch.arange(ids.shape[1])
    prompt = torch.tensor([len(p.prompt) + 1 for p in problems])
    counts = (place >= prompt[:, None]) & (place <= lengths[:, None])
    return ids, ids.masked_fill(~counts, IGNORED)


def accuracy(model: Any, task: Any, temperature: float, prompts: int, longest: int) -> float:
    """Return the share of right answers to held-out prompts, which are the same at every call."""
    problems = task.prompts(prompts, np.random.default_rng(1), "test")
    ids, mask = encode_batch([p.prompt for p in problems], device="cpu")
    generator = torch.Generator().manual_seed(1)
    out = sample(model, ids, mask, max_new_tokens=longest, generator=generator, temperature=temperature)
    return float(task.reward(problems, decode_batch(out.ids, out.mask), out.finished).mean())


# ---- sums and differences --------------------------------------------------------------------------------------


def measure_sums(operations: str, levels: Sequence[int]) -> Callable[[Any, float, int], Measured]:
    """Return a function that measures each operation at each number of digits."""

    def measure(model: Any, temperature: float, prompts: int) -> Measured:
        return {
            f"{operation} {level} digits": accuracy(
                model, Arithmetic(operation, level), temperature, prompts, level + 2
            )
            for operation in operations
            for level in levels
        }

    return measure


def within(measured: Measured, goal: Mapping[str, tuple[float, float]]) -> bool:
    """Return whether every figure that has a goal lies inside it."""
    return all(low <= measured[name] <= high for name, (low, high) in goal.items())


def sums(
    size: str,
    operations: str,
    levels: Mapping[int, float],
    goal: Mapping[str, tuple[float, float]],
    *,
    rate: float,
    judged_on: int = 1024,
) -> Recipe:
    """Return the recipe for direct answers to sums, differences or both, stopped inside `goal` on so many prompts."""
    measure = measure_sums(operations, list(levels))

    def make(model: Any, rng: np.random.Generator) -> int:
        share = {operation: 1 / len(operations) for operation in operations}
        tasks = {operation: Arithmetic(operation, levels) for operation in operations}

        def batch() -> Batch:
            counts = rng.multinomial(64, list(share.values()))
            drawn = [tasks[o].prompts(int(n), rng) for o, n in zip(operations, counts, strict=True) if n]
            return answers_batch([problem for some in drawn for problem in some])

        def done() -> bool:
            measured = measure(model, 1.0, judged_on)
            if len(operations) == 2:  # more of what it is worse at, so that both arrive together
                plus, minus = measured["+ 2 digits"], measured["- 2 digits"]
                share["-"] = min(0.9, max(0.1, 0.5 + 2 * (plus - minus)))
                share["+"] = 1 - share["-"]
            return within(measured, goal)

        return fit(model, batch, steps=3000, rate=rate, done=done)

    how = f"direct answers, levels {dict(levels)}, batch 64, AdamW at a constant {rate:g}, until {dict(goal)}"
    return Recipe(size, f"Arithmetic({operations!r}, {dict(levels)})", how, make, measure, goal)


# ---- a second attempt ------------------------------------------------------------------------------------------


def attempts_batch(problems: Sequence[Problem], first: Sequence[str], second: Sequence[str]) -> Batch:
    """Return sequences of two attempts; prompt, instruction and padding do not count."""
    both = [replace(p, answer=f"{one};?{two}") for p, one, two in zip(problems, first, second, strict=True)]
    ids, labels = answers_batch(both)
    return ids, labels.masked_fill(ids == SelfCorrection.instruction, IGNORED)


def make_correction(model: Any, rng: np.random.Generator) -> int:
    """Teach both attempts; then to solve anew; then the mistakes and the bias to copy the first attempt."""
    task = SelfCorrection()

    def noisy(problem: Problem, right: float) -> str:
        return problem.answer if rng.random() < right else replace_digit(problem.answer, rng)

    def clean() -> Batch:
        problems = task.prompts(96, rng)
        answers = [p.answer for p in problems]
        return attempts_batch(problems, answers, answers)

    def resolve() -> Batch:
        problems = task.prompts(96, rng)
        first = [noisy(p, 0.5) for p in problems]
        second = [p.answer if rng.random() < 0.7 else one for p, one in zip(problems, first, strict=True)]
        ids, labels = attempts_batch(problems, first, second)
        wrong = torch.tensor([one != p.answer for p, one in zip(problems, first, strict=True)])
        labels[wrong, 6:9] = IGNORED
        return ids, labels

    def copying() -> Batch:
        problems = task.prompts(96, rng)
        first = [noisy(p, 0.55) for p in problems]
        second = [one if rng.random() < 0.65 else noisy(p, 0.9) for p, one in zip(problems, first, strict=True)]
        return attempts_batch(problems, first, second)

    def done() -> bool:
        return within(measure_correction(model, 1.0, 1024), CORRECTION_GOAL)

    steps = fit(model, clean, steps=400, rate=4e-3, decay=True)
    steps += fit(model, resolve, steps=400, rate=2e-3, decay=True)
    return steps + fit(model, copying, steps=300, rate=1.5e-3, done=done, every=10)


def measure_correction(model: Any, temperature: float, prompts: int) -> Measured:
    """Return how often each attempt is right, becomes right, becomes wrong, and repeats the first."""
    return measure_attempts(SelfCorrection(), model, temperature, prompts)[0]


def measure_attempts(
    task: TwoAttempts, model: Any, temperature: float, prompts: int
) -> tuple[Measured, list[str], torch.Tensor]:
    """Return the figures of both attempts at held-out prompts; the second attempts, and whether each is right."""
    problems = task.prompts(prompts, np.random.default_rng(1), "test")
    options: dict[str, Any] = {"generator": torch.Generator().manual_seed(1), "temperature": temperature}
    ids, mask = task.first_prompts(problems, "cpu")
    first = sample(model, ids, mask, eos=task.first_end, max_new_tokens=task.first_tokens, **options)
    asked = task.second_prompts(ids, mask, first)
    second = sample(model, *asked, eos=task.second_end, max_new_tokens=task.second_tokens, **options)
    texts = decode_batch(first.ids, first.mask, task.first_end), decode_batch(second.ids, second.mask)
    one, two = task.reward(problems, texts[0], first.finished), task.reward(problems, texts[1], second.finished)
    same = [task.final_answer(a) == task.final_answer(b) for a, b in zip(*texts, strict=True)]
    figures = {
        "t1": float(one.mean()),
        "t2": float(two.mean()),
        "wrong to right": float(((1 - one) * two).mean()),
        "right to wrong": float((one * (1 - two)).mean()),
        "same answer": sum(same) / len(same),
    }
    return figures, texts[1], two


CORRECTION_GOAL = {"t1": (0.57, 0.66), "same answer": (0.7, 0.85), "wrong to right": (0.02, 0.08)}


def make_scratch(model: Any, rng: np.random.Generator) -> int:
    """Teach direct first attempts, and second ones that copy the first or work out the columns.

    Half of the first attempts that are shown are wrong and not counted: so nothing is learned of them but that the
    columns do not follow from the first attempt, while a copy does. The model's own first answers are wrong for the
    reason that it has not learned direct sums to the end.
    """
    task = UnequalAttempts()

    def batch() -> Batch:
        problems = task.prompts(96, rng)
        direct = [task.final_answer(p.answer) for p in problems]
        first = [replace_digit(text, rng) if rng.random() < 0.5 else text for text in direct]
        second = [one if rng.random() < 0.65 else p.answer for p, one in zip(problems, first, strict=True)]
        ids, labels = attempts_batch(problems, first, second)
        place = torch.arange(ids.shape[1])
        end = (ids == task.first_end).int().argmax(dim=1, keepdim=True)
        wrong = torch.tensor([one != text for one, text in zip(first, direct, strict=True)])
        return ids, labels.masked_fill(wrong[:, None] & (place <= end), IGNORED)

    def done() -> bool:
        return within(measure_scratch(model, 1.0, 512), SCRATCH_GOAL)

    return fit(model, batch, steps=2000, rate=2e-3, done=done, every=50)


def measure_scratch(model: Any, temperature: float, prompts: int) -> Measured:
    """Return the figures of two attempts, how often the second shows columns, and how often such a one is right."""
    figures, second, right = measure_attempts(UnequalAttempts(), model, temperature, prompts)
    worked = torch.tensor(["|" in text for text in second])
    right_worked = float(right[worked].mean()) if bool(worked.any()) else 0.0
    return {**figures, "scratchpad": float(worked.float().mean()), "scratchpad right": right_worked}


SCRATCH_GOAL = {"t1": (0.2, 0.45), "t2": (0.2, 0.55), "scratchpad": (0.2, 0.5), "scratchpad right": (0.4, 1.0)}


# ---- the others ------------------------------------------------------------------------------------------------


def make_countdown(model: Any, rng: np.random.Generator) -> int:
    """Teach one random solution of each prompt."""
    task = Countdown(3)
    return fit(
        model,
        lambda: answers_batch(task.prompts(96, rng)),
        steps=4000,
        rate=4e-3,
        done=lambda: within(measure_countdown(model, 1.0, 1024), COUNTDOWN_GOAL),
        every=100,
    )


def measure_countdown(model: Any, temperature: float, prompts: int) -> Measured:
    return {"right": accuracy(model, Countdown(3), temperature, prompts, 8)}


COUNTDOWN_GOAL = {"right": (0.28, 0.45)}


def make_corridor(model: Any, rng: np.random.Generator) -> int:
    """Teach the moves of a player who takes the shortest way's move with probability .4, else any."""
    world, generator = Corridor(), torch.Generator().manual_seed(int(rng.integers(2**31)))

    def batch() -> Batch:
        episodes = play_noisily(world.games(64, rng), 0.4, generator)
        return episodes.ids, episodes.ids.masked_fill(episodes.action_mask == 0, IGNORED)

    return fit(model, batch, steps=400, rate=2e-3, decay=True)


def measure_corridor(model: Any, temperature: float, prompts: int) -> Measured:
    """Return how often the door is opened, and how often an answer is one of the four actions."""
    games = Corridor().games(prompts, np.random.default_rng(1), "test")
    episodes = play(model, games, generator=torch.Generator().manual_seed(1), temperature=temperature)
    actions = episodes.ids[episodes.action_mask == 1]
    known = torch.isin(actions, torch.tensor([LEFT, RIGHT, GRAB, OPEN]))
    return {"opened": float(episodes.reward.mean()), "known actions": float(known.float().mean())}


TWO_DIGITS = {2: 1.0}
RECIPES = {
    "correct-S": Recipe(
        "S",
        "SelfCorrection()",
        "400 steps of right attempts (4e-3, linear decay); 400 steps in which half of the first attempts are wrong "
        "and not counted and the second is right with .7, else a copy (2e-3, linear decay); then first attempts "
        f"right with .55, second a copy with .65, else right with .9 (1.5e-3), until {CORRECTION_GOAL}; batch 96",
        make_correction,
        measure_correction,
        CORRECTION_GOAL,
    ),
    "scratch-S": Recipe(
        "S",
        "UnequalAttempts()",
        "half of the first attempts wrong and not counted, the others the direct sum; the second a copy with .65, else "
        f"columns and the right sum; batch 96, AdamW at a constant 2e-3, until {SCRATCH_GOAL}",
        make_scratch,
        measure_scratch,
        SCRATCH_GOAL,
    ),
    "add-sub-S": sums(
        "S", "+-", TWO_DIGITS, {"+ 2 digits": (0.4, 0.6), "- 2 digits": (0.4, 0.6)}, rate=2e-3, judged_on=256
    ),
    "add-S": sums("S", "+", TWO_DIGITS, {"+ 2 digits": (0.38, 0.55)}, rate=2e-3),
    "add-mix-S": sums(
        "S", "+", {1: 0.3, 2: 0.5, 3: 0.2}, {"+ 1 digits": (0.8, 1.0), "+ 2 digits": (0.4, 0.6)}, rate=2e-3
    ),
    "countdown-S": Recipe(
        "S",
        "Countdown(3)",
        f"one random solution of each prompt, batch 96, AdamW at a constant 4e-3, until {COUNTDOWN_GOAL}",
        make_countdown,
        measure_countdown,
        COUNTDOWN_GOAL,
    ),
    "corridor-S": Recipe(
        "S",
        "Corridor()",
        "actions of a player who takes the shortest way with .4, else any; 400 steps of 64 games, 2e-3, linear decay",
        make_corridor,
        measure_corridor,
        {"opened": (0.25, 0.45)},
    ),
    "add-L": sums("L", "+", TWO_DIGITS, {"+ 2 digits": (0.38, 0.55)}, rate=1e-3),
}


def build(name: str, folder: Path, seed: int) -> dict[str, Any]:
    """Train, write and measure one checkpoint; return what the manifest says about it."""
    recipe = RECIPES[name]
    with seeded_globals(seed):
        model = new_tiny_lm(recipe.size)
    began = time.process_time()
    steps = recipe.make(model, np.random.default_rng(seed))
    seconds = time.process_time() - began
    content = weights_for_file(model)
    with torch.no_grad():
        for key, value in safetensors.torch.load(content).items():
            model.get_parameter(key).copy_(value)  # measured as it will be loaded, after the rounding to float16
    measured = {
        "prompts": 1024,
        "sampled": recipe.measure(model, 1.0, 1024),
        "greedy": recipe.measure(model, 0.0, 1024),
    }
    write_atomic(folder / f"{name}.safetensors", content)
    entry = {
        "file": f"{name}.safetensors",
        "size": recipe.size,
        "parameters": model.num_parameters(),
        "task": recipe.task,
        "recipe": recipe.how,
        "steps": steps,
        "seed": seed,
        "cpu_seconds": round(seconds),
        "measured": measured,
    }
    add_to_manifest(folder, name, entry, sha256(content))
    return entry


def add_to_manifest(folder: Path, name: str, entry: Mapping[str, Any], digest: str) -> None:
    """Write a checkpoint's entry into the manifest, and leave the others as they are."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) if path.exists() else {"files": {}, "checkpoints": {}}
    files = {**manifest["files"], entry["file"]: digest}
    checkpoints = {**manifest["checkpoints"], name: dict(entry)}
    manifest = {
        "title": "Checkpoints of the tiny language model",
        "licence": "MIT, as polrl",
        "script": "data/make_tiny_lm.py",
        "format": "safetensors, float16; loaded as float32",
        "files": dict(sorted(files.items())),
        "checkpoints": dict(sorted(checkpoints.items())),
    }
    write_atomic(path, json.dumps(manifest, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Pretrain the checkpoints of the tiny language model.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("data/tiny_lm"), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        for name in options.names:
            if name not in RECIPES:
                raise unknown_name("checkpoint", name, RECIPES)
        with torch_threads(1):
            for name in options.names or RECIPES:
                entry = build(name, options.out, options.seed)
                print(name, entry["steps"], "steps", json.dumps(entry["measured"]), flush=True)
    except (OSError, PolrlError) as error:
        parser.exit(1, f"make_tiny_lm: {error}\n")


if __name__ == "__main__":
    main()
