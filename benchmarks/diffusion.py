"""DDIM sampling beside diffusers' scheduler, with the same network, noise and steps; both give the same samples."""

from __future__ import annotations

import argparse
import json

import torch

from benchmarks.timing import interleaved, repeat
from polrl.models.diffusion import DenoisingChain, class_denoiser, cosine_schedule

STEPS = 20


def main(words: list[str]) -> None:
    """Measure and print one JSON object; ratios above 1 mean that polrl is slower."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks diffusion")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(words)
    from diffusers import DDIMScheduler

    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = class_denoiser(dimension=64, classes=10, width=128, blocks=3, features=32).eval()
    torch.nn.init.normal_(network.head.weight, std=0.05)  # an untrained head answers 0 to everything
    alpha_bar = cosine_schedule()
    chain = DenoisingChain(alpha_bar, STEPS, eta=0.0, clip=1.0)
    scheduler = DDIMScheduler(
        num_train_timesteps=len(alpha_bar) - 1,
        trained_betas=(1 - alpha_bar[1:] / alpha_bar[:-1]).tolist(),
        clip_sample=True,
        clip_sample_range=1.0,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(STEPS)
    report = {}
    for count in (64, 1000):
        start, y = torch.randn(count, 64), torch.arange(count) % 10
        generator = torch.Generator().manual_seed(0)

        def ours(start=start, y=y, generator=generator):
            return chain.sample(network, y, generator, start=start)

        @torch.no_grad()
        def theirs(start=start, y=y):
            x = start
            for t in scheduler.timesteps:
                noise = network(x, t + 1, y)  # their level 0 is the first with noise, ours is 1
                x = scheduler.step(noise, t, x, eta=0.0, use_clipped_model_output=True).prev_sample
            return x

        torch.testing.assert_close(ours(), theirs(), rtol=1e-3, atol=1e-3)
        steps = max(1, 640 // count)
        name = f"time of DDIM sampling / diffusers' with the same network, {count} samples"
        report[name] = round(interleaved(repeat(ours), repeat(theirs), steps, options.rounds), 3)
    print(json.dumps(report, indent=2))
