"""Randomness that belongs to one learner: generators made from its seed, and draws that take a generator.

torch hides global randomness in many places: layers draw their first weights from the global generator, and
`Distribution.sample`, `nn.Dropout` and Hugging Face `generate` take no generator at all. Here are the
replacements, and the lock under which networks are built.
"""

from __future__ import annotations

import contextlib
import random
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

_GLOBAL_RANDOMNESS = threading.RLock()


def derive_seed(seed: int, purpose: str) -> int:
    """Return a seed for one purpose, independent of those for other purposes, from 0 to 2**63 - 1."""
    words = np.random.SeedSequence([seed, zlib.crc32(purpose.encode())]).generate_state(2, np.uint32)
    return (int(words[0]) << 31) ^ int(words[1])


class Generators:
    """The generators of one learner.

    Attributes
    ----------
    torch : torch.Generator
        For draws on the learner's device.
    cpu : torch.Generator
        For draws on the CPU, such as the order of a data set; on a CPU learner still a stream of its own.
    numpy : numpy.random.Generator
        For numpy and scipy.
    """

    def __init__(self, seed: int, device: torch.device, purpose: str = "train") -> None:
        self.torch = torch.Generator(device=device).manual_seed(derive_seed(seed, purpose))
        self.cpu = torch.Generator().manual_seed(derive_seed(seed, purpose + "/cpu"))
        self.numpy = np.random.default_rng(derive_seed(seed, purpose + "/numpy"))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all three generators."""
        return {
            "torch": self.torch.get_state(),
            "cpu": self.cpu.get_state(),
            "numpy": self.numpy.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set all three generators to a state that `state_dict` returned."""
        self.torch.set_state(state["torch"])
        self.cpu.set_state(state["cpu"])
        self.numpy.bit_generator.state = state["numpy"]


@contextlib.contextmanager
def seeded_globals(seed: int) -> Iterator[None]:
    """Seed the global generators of torch, numpy and Python inside the block, and restore them after it.

    Networks are built in such a block. One lock for the whole process keeps two learners that are built in
    two threads apart, which saving and restoring alone would not.
    """
    with _GLOBAL_RANDOMNESS:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            torch.random.default_generator.manual_seed(seed)
            if cuda is not None:
                torch.cuda.manual_seed_all(seed)
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            torch.set_rng_state(states[2])
            if cuda is not None:
                torch.cuda.set_rng_state_all(cuda)


def sample_normal(
    mean: torch.Tensor, standard_deviation: torch.Tensor | float, generator: torch.Generator
) -> torch.Tensor:
    """Draw from N(mean, sd^2), reparameterised: gradients pass to both arguments; the shape is that of `mean`."""
    noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return mean + standard_deviation * noise


@torch.no_grad()
def sample_gamma(concentration: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw from Gamma(concentration, 1), elementwise, as a constant for autograd."""
    return torch._standard_gamma(concentration, generator=generator)


@torch.no_grad()
def sample_beta(alpha: torch.Tensor, beta: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw from Beta(alpha, beta), elementwise, as a constant for autograd.

    Returns
    -------
    Tensor
        Of the common shape of both, in [0, 1]; in float32 exactly 0 or 1 can occur when alpha or beta is
        below 1, so clamp before taking logarithms.
    """
    alpha, beta = torch.broadcast_tensors(alpha, beta)
    first = sample_gamma(alpha.contiguous(), generator)
    second = sample_gamma(beta.contiguous(), generator)
    # Both gammas may underflow to zero when the concentrations are tiny: half is as good as either end.
    total = first + second
    return torch.where(total > 0, first / total, torch.full_like(total, 0.5))


@torch.no_grad()
def sample_categorical(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw an index from softmax(logits) over the last dimension; returns int64 [...], a constant for autograd."""
    flat = torch.softmax(logits, dim=-1).reshape(-1, logits.shape[-1])
    return torch.multinomial(flat, 1, generator=generator).reshape(logits.shape[:-1])


@torch.no_grad()
def sample_bernoulli(probability: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw 0 or 1 with the given probabilities, elementwise, as a constant for autograd."""
    return torch.bernoulli(probability, generator=generator)


class Dropout(torch.nn.Module):
    """`nn.Dropout` with a generator of the learner's own.

    Parameters
    ----------
    p : float
        The share of entries set to zero while training, from 0 to below 1.
    generator : torch.Generator
        On the device of the inputs; usually `learner.rng.torch`.
    """

    def __init__(self, p: float, generator: torch.Generator) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p must be from 0 to below 1, got {p!r}")
        self.p = p
        self._generator = [generator]  # in a list, so that copies of the module's state leave it alone

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x with entries dropped and the rest scaled by 1 / (1 - p) in train mode, x itself otherwise."""
        if not self.training or self.p == 0:
            return x
        keep = torch.rand(x.shape, generator=self._generator[0], device=x.device, dtype=x.dtype) >= self.p
        return x * keep / (1 - self.p)
