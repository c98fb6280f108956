"""Transport plans beside POT's smooth solvers, by time to the same value of the dual.

    python -m benchmarks transport [--sizes 100 1000 4000] [--rounds 3] [--iterations 60]

Both sides run scipy's L-BFGS-B from zero on the same problem with the same tolerance and the same most iterations, so
both make the same steps, up to rounding; the values that they reach are given beside the ratio of processor times. POT
is no dependency of polrl: `make bench-peers` makes an environment that has it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.timing import timed
from polrl.transport.sparsity_constrained_ot import dual, semi_dual, solve
from polrl.worlds.point_clouds import PointClouds

#: Name, regularizer here, POT's name for it, cap (0: none), formulation.
CASES = (
    ("4-sparse, semi-dual", "k_sparse", "sparsity_constrained", 4, "semi_dual"),
    ("4-sparse, dual", "k_sparse", "sparsity_constrained", 4, "dual"),
    ("quadratic, semi-dual", "quadratic", "l2", 0, "semi_dual"),
    ("quadratic, dual", "quadratic", "l2", 0, "dual"),
)
GAMMA = 10.0
TOLERANCE = 1e-9


def peer(clouds: PointClouds, kind: str, cap: int, formulation: str, iterations: int) -> Callable[[], Any]:
    """Return POT's solve of the same problem, from the cost to the plan; it returns its potentials."""
    from ot.smooth import smooth_ot_dual, smooth_ot_semi_dual

    transport = {"dual": smooth_ot_dual, "semi_dual": smooth_ot_semi_dual}[formulation]
    a, b, cost = (x.numpy() for x in (clouds.a, clouds.b, clouds.cost))
    options = {"reg": GAMMA, "reg_type": kind, "stopThr": TOLERANCE, "numItermax": iterations, "log": True}
    if cap:
        options["max_nz"] = cap

    def work() -> Any:
        with contextlib.redirect_stdout(io.StringIO()):  # its projection prints a shape at every call
            return transport(a, b, cost, **options)[1]

    return work


def ours(clouds: PointClouds, regularizer: str, cap: int, formulation: str, iterations: int) -> Callable[[], Any]:
    """Return this library's solve of the same problem, from the cost to the plan."""

    def work() -> Any:
        return solve(
            clouds.cost,
            clouds.a,
            clouds.b,
            gamma=GAMMA,
            max_nz=cap or None,
            regularizer=regularizer,
            formulation=formulation,
            tol=TOLERANCE,
            max_iter=iterations,
        )

    return work


def value(clouds: PointClouds, potentials: Any, regularizer: str, cap: int, formulation: str) -> float:
    """Return what E3 or E5 is worth at the potentials that POT found."""
    k, masses = cap or len(clouds.a), (clouds.a, clouds.b, clouds.cost, GAMMA)
    alpha = torch.as_tensor(potentials["alpha"])
    if formulation == "semi_dual":
        return float(semi_dual(alpha, *masses, k, regularizer)[0])
    return float(dual(alpha, torch.as_tensor(potentials["beta"]), *masses, k, regularizer)[0])


def main(words: list[str]) -> None:
    """Measure and print one JSON object; ratios below 1 mean that polrl is faster."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks transport")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000, 4000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=60)
    options = parser.parse_args(words)
    try:
        import ot
    except ImportError:
        print("skipped: POT is not installed here (see the head of benchmarks/transport.py)")
        return
    torch.set_num_threads(1)
    report: dict[str, Any] = {"POT": ot.__version__}
    for size in options.sizes:
        clouds = PointClouds.make(size, size, 0)
        for name, regularizer, kind, cap, formulation in CASES:
            sides = (
                ours(clouds, regularizer, cap, formulation, options.iterations),
                peer(clouds, kind, cap, formulation, options.iterations),
            )
            ratios = []
            for _ in range(options.rounds):
                (found, seconds), (potentials, their_seconds) = (timed(side) for side in sides)
                ratios.append(seconds / their_seconds)
            theirs = value(clouds, potentials, regularizer, cap, formulation)
            report[f"{name}, n = {size}: time / POT's"] = round(statistics.median(ratios), 3)
            report[f"{name}, n = {size}: value less POT's, relative"] = float(
                f"{(float(found.value) - theirs) / abs(theirs):.1e}"
            )
            print(
                f"{name}, n = {size}: {statistics.median(ratios):.3f} ({seconds:.2f} s, {found.iterations} iterations)",
                flush=True,
            )
    print(json.dumps(report, indent=2))
