"""Train the small diffusion models of data/diffusion: `python data/make_diffusion.py [--out FOLDER] [--only NAME]`.

A few CPU-minutes on one thread. Weights are safetensors; `manifest.json` holds their digests, recipes, seeds and
measured quality. The same versions on the same machine give the same bytes.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from polrl.core.files import sha256, write_atomic
from polrl.core.progress import progress
from polrl.core.sampling import seeded_globals
from polrl.models.diffusion import (
    DenoisingChain,
    EDMDenoiser,
    Ring,
    average_weights,
    build_model,
    cosine_schedule,
    draw_denoising_loss,
    edm_loss,
)
from polrl.models.diffusion_quality import (
    digit_accuracy,
    load_digits_8,
    pixel_std,
    ring_quality,
    sliced_wasserstein,
    wasserstein_floor,
)

Draw = Callable[[int, torch.Generator], tuple[torch.Tensor, torch.Tensor]]
RING = {"dimension": 2, "classes": 8, "width": 64, "blocks": 2, "features": 16}
DIGITS = {"dimension": 64, "classes": 10, "width": 128, "blocks": 3, "features": 32}
MODELS: dict[str, dict[str, Any]] = {
    "ring-small": {
        "kind": "noise",
        "network": RING,
        "data": "ring of 8 Gaussians, radius 2, std 0.15",
        "recipe": {"batch": 256, "steps": 2000, "lr": 3e-3, "p_drop": 0.15},
    },
    "ring-noisy": {
        "kind": "noise",
        "network": RING,
        "data": "the same ring; each label replaced with probability 0.5 by a uniformly random one",
        "recipe": {"batch": 256, "steps": 2500, "lr": 3e-3, "p_drop": 0.15, "random_labels": 0.5},
    },
    "digits-default": {
        "kind": "noise",
        "network": DIGITS,
        "data": "1500 of scikit-learn's 8x8 digits, pixels in [-1, 1]",
        "recipe": {"batch": 128, "steps": 4000, "lr": 2e-3, "p_drop": 0.15},
    },
    "digits-noisy": {
        "kind": "noise",
        "network": DIGITS,
        "data": "the same digits; each label replaced with probability 0.5 by a uniformly random one",
        "recipe": {"batch": 128, "steps": 4000, "lr": 2e-3, "p_drop": 0.15, "random_labels": 0.5},
    },
    "digits-edm": {
        "kind": "edm",
        "network": DIGITS,
        "data": "1500 of scikit-learn's 8x8 digits, pixels in [-1, 1]",
        "recipe": {"batch": 128, "steps": 3000, "lr": 2e-3, "p_drop": 0.15},
    },
    "digits-classifier": {
        "kind": "classifier",
        "network": {"dimension": 64, "classes": 10, "width": 64},
        "data": "1500 of scikit-learn's 8x8 digits, pixels in [-1, 1]",
        "recipe": {"batch": 128, "steps": 600, "lr": 3e-3, "noise": 0.1},
    },
}


def ring_batch(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw points of the ring."""
    y = torch.randint(Ring().classes, (count,), generator=generator)
    return Ring().sample(y, generator), y


def digit_batch(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw training digits with replacement."""
    digits = load_digits_8()
    chosen = torch.randint(len(digits.train), (count,), generator=generator)
    return digits.train[chosen], digits.train_labels[chosen]


def with_random_labels(draw: Draw, classes: int, share: float) -> Draw:
    """Let a share of the labels be replaced by uniformly random ones, drawn anew for each batch."""

    def noisy(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = draw(count, generator)
        other = torch.randint(classes, (count,), generator=generator)
        return x, torch.where(torch.rand(count, generator=generator) < share, other, y)

    return noisy


def loss_of(kind: str, recipe: dict[str, Any], draw: Draw) -> Callable[[Any, torch.Generator], torch.Tensor]:
    """Return a function that draws a batch and gives a model's loss on it."""
    alpha_bar = cosine_schedule(dtype=torch.float32)

    def noise(model: Any, generator: torch.Generator) -> torch.Tensor:
        x, y = draw(recipe["batch"], generator)
        return draw_denoising_loss(model, x, y, alpha_bar, generator, recipe["p_drop"])

    def edm(model: EDMDenoiser, generator: torch.Generator) -> torch.Tensor:
        x, y = draw(recipe["batch"], generator)
        sigma = torch.exp(-1.0 + 1.2 * torch.randn(len(x), 1, generator=generator))
        seen = x + sigma * torch.randn(x.shape, generator=generator)
        dropped = torch.rand(len(x), generator=generator) < recipe["p_drop"]
        return edm_loss(model.denoised(seen, sigma, torch.where(dropped, model.classes, y)), x, sigma)

    def classifier(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
        x, y = draw(recipe["batch"], generator)
        return nn.functional.cross_entropy(model(x + recipe["noise"] * torch.randn(x.shape, generator=generator)), y)

    return {"noise": noise, "edm": edm, "classifier": classifier}[kind]


def train(name: str, seed: int) -> nn.Module:
    """Train one model as its recipe says and return its averaged weights."""
    about = MODELS[name]
    recipe = about["recipe"]
    draw = with_random_labels(
        digit_batch if name.startswith("digits") else ring_batch,
        about["network"]["classes"],
        recipe.get("random_labels", 0.0),
    )
    loss_on = loss_of(about["kind"], recipe, draw)
    generator = torch.Generator().manual_seed(seed)
    with seeded_globals(seed):
        model = build_model(about["kind"], about["network"])
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe["lr"], weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["lr"], recipe["steps"], pct_start=0.1)
    for step in progress(range(recipe["steps"]), recipe["steps"], name):
        loss = loss_on(model, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average_weights(average, model, step)
    return average.eval()


def measure(name: str, model: Any) -> dict[str, Any]:
    """Return a model's quality, from samples with seed 0; a row a sampler."""
    return {"noise": measure_noise, "edm": measure_edm, "classifier": measure_classifier}[MODELS[name]["kind"]](model)


def measure_noise(model: Any) -> dict[str, Any]:
    rows = {}
    for eta, guidance in ((0.0, 1.0), (0.0, 2.0), (1.0, 1.0)):
        clip = 2.5 if model.dimension == 2 else 1.0
        chain = DenoisingChain(cosine_schedule(), 20, eta=eta, clip=clip, guidance=guidance)
        rows[f"DDIM 20 steps, eta {eta:g}, guidance {guidance:g}, clip {clip:g}"] = judge(
            lambda y, g, chain=chain: chain.sample(model, y, g), model
        )
    return rows


def measure_edm(model: EDMDenoiser) -> dict[str, Any]:
    return {
        f"Heun 18 levels, guidance {w:g}": judge(lambda y, g, w=w: model.sample(y, g, guidance=w), model)
        for w in (1.0, 2.0)
    }


def judge(sample: Callable[..., torch.Tensor], model: Any, count: int = 1000) -> dict[str, float]:
    """Measure `count` samples of random classes; distances stand beside their floor at the same number."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(model.classes, (count,), generator=generator)
    x = sample(y, generator)
    if model.dimension == 2:
        quality = ring_quality(x, y)
        draw = Ring().sample
        real, other = (draw(torch.randint(8, (n,), generator=generator), generator) for n in (4000, count))
        figures = {"accuracy": quality.wanted, "spread": quality.spread, "off_mode": quality.off}
    else:
        digits = load_digits_8()
        real, other = digits.train, digits.held_out
        figures = {"accuracy": digit_accuracy(x, y), "pixel_std": pixel_std(x)}
    figures["distance"] = sliced_wasserstein(x, other, generator)
    figures["distance_floor"] = wasserstein_floor(real, other, count, generator)
    return {key: round(float(value), 4) for key, value in figures.items()}


def measure_classifier(model: nn.Module) -> dict[str, float]:
    digits = load_digits_8()
    with torch.no_grad():
        right = (model(digits.held_out).argmax(1) == digits.held_out_labels).double().mean()
    return {"held_out_accuracy": round(float(right), 4)}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Train the small diffusion models.")
    parser.add_argument("--out", type=Path, default=Path("data/diffusion"))
    parser.add_argument("--only", choices=MODELS, action="append", help="train this one and keep the others")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    path = options.out / "manifest.json"
    manifest: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {"files": {}, "models": {}}
    torch.set_num_threads(1)
    for name in options.only or MODELS:
        began = time.process_time()
        model = train(name, options.seed)
        content = safetensors.torch.save(model.state_dict())
        file = f"{name}.safetensors"
        write_atomic(options.out / file, content)
        manifest["files"][file] = sha256(content)
        manifest["models"][name] = {
            "file": file,
            **MODELS[name],
            "parameters": sum(p.numel() for p in model.parameters()),
            "seed": options.seed,
            "quality": measure(name, model),
        }
        whole = {
            "title": "Small pretrained diffusion models",
            "script": "data/make_diffusion.py",
            "licence": "weights made by this project, under its licence; scikit-learn's digits are BSD-3-Clause",
            "optimizer": "AdamW, weight decay 1e-4, one cycle with 10 % warm-up, weights averaged with decay "
            "min(0.999, (i + 1) / (i + 10))",
            "schedule": "cosine, T = 100, t_max = 0.97; the EDM model: log sigma ~ N(-1, 1.2^2), sigma_data = 0.5",
            **{key: dict(sorted(manifest[key].items())) for key in ("files", "models")},
        }
        write_atomic(path, json.dumps(whole, indent=2) + "\n")
        print(
            f"{name}: {len(content):,} bytes, {time.process_time() - began:.0f} CPU-s",
            manifest["models"][name]["quality"],
        )


if __name__ == "__main__":
    main()
