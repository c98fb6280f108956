"""The checks of the three exercises in the notebook on one-token rollout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from polrl.core.exercise import Case, Feedback, call, check, checker, require
from polrl.language.one_token_rollout import logit_gradient, rollout_policy, token_weights

Tensor = torch.Tensor
Answer = Callable[..., Any]


def _draws(batch: int, length: int, count: int, tokens: int, seed: int) -> Tensor:
    return torch.randint(tokens, (batch, length, count), generator=torch.Generator().manual_seed(seed))


def _counts(sampled: Tensor, V: int) -> Tensor:
    return torch.nn.functional.one_hot(sampled, V).double().sum(dim=-2)


def _is_reference(targets: Tensor, V: int) -> Tensor:
    return torch.nn.functional.one_hot(targets, V).bool()


def _weights(
    reference: Callable[[Tensor, float], Tensor] = lambda share, beta: share,
    others: Callable[[Tensor, float], Tensor] = lambda share, beta: beta * share,
    share: Callable[[Tensor], Tensor] = lambda counts: counts / counts.sum(dim=-1, keepdim=True),
) -> Answer:
    """Return an answer to exercise 1 with one of its parts replaced."""

    def answer(sampled: Tensor, targets: Tensor, beta: float, V: int) -> Tensor:
        shares = share(_counts(sampled, V))
        return torch.where(_is_reference(targets, V), reference(shares, beta), others(shares, beta))

    return answer


_WEIGHT_MISTAKES: dict[str, Answer] = {
    "The weights are not divided by K: E5 takes the mean over the draws.": _weights(share=lambda counts: counts),
    "Every token counts once here, however often it was drawn: duplicates count, and the mean is over K draws.": (
        _weights(share=lambda counts: (counts > 0).double() / (counts > 0).sum(dim=-1, keepdim=True))
    ),
    "The reference weighs 1 even where it was not drawn; that is SFT. Its weight is n/K.": _weights(
        reference=lambda share, beta: torch.ones_like(share)
    ),
    "Draws of the reference earn beta like all others; they earn 1.": _weights(
        reference=lambda share, beta: beta * share
    ),
    "Wrong draws earn nothing here; they earn beta.": _weights(others=lambda share, beta: 0 * share),
    "Wrong tokens that were never drawn have a weight too; only draws earn.": _weights(
        others=lambda share, beta: beta * torch.ones_like(share)
    ),
    "Wrong draws earn minus beta here; beta carries its own sign.": _weights(others=lambda share, beta: -beta * share),
    "Wrong draws earn as much as right ones: beta is missing.": _weights(others=lambda share, beta: share),
    "The reference's weight is (1 - beta) n/K here: E10 splits the loss like that, but then adds beta n/K again.": (
        _weights(reference=lambda share, beta: (1 - beta) * share)
    ),
}


@checker
def check_otr_weights(function: Any) -> Feedback:
    """Judge exercise 1, `otr_weights(sampled, targets, beta, V)`: the weights w of E8, from the draws themselves.

    Parameters
    ----------
    function : callable
        Of draws int64 [B, T, K], references int64 [B, T], beta and the number of tokens; returns float [B, T, V].
    """
    shapes = ((1, 1, 4, 3, -0.5), (2, 3, 8, 5, -0.1), (3, 2, 16, 4, 0.4))
    cases = []
    for seed, (batch, length, count, V, beta) in enumerate(shapes):
        sampled, targets = _draws(batch, length, count, V, seed), _draws(batch, length, 1, V, seed + 9)[..., 0]
        if batch > 1:  # one position at which the reference was never drawn
            sampled[0, 0] = torch.where(sampled[0, 0] == targets[0, 0], (targets[0, 0] + 1) % V, sampled[0, 0])
        weights = token_weights(_counts(sampled, V) / count, targets, beta)
        arguments = {"sampled": sampled, "targets": targets, "beta": beta, "V": V}
        cases.append(Case(arguments, {"weights": weights}, _WEIGHT_MISTAKES))
    first = cases[0].arguments
    found = call(function, *(x.clone() if isinstance(x, Tensor) else x for x in first.values()), hint=_WEIGHT_HINT)
    require(isinstance(found, Tensor) and found.is_floating_point(), "Return a tensor of floating-point numbers.")
    require(not found.requires_grad, "The weights must be constants for autograd: detach them.")
    return check(
        _in_float64(function),
        cases,
        hint=_WEIGHT_HINT,
        praise="E8 needs nothing else: the gradient by the logits is W pi - w. Where the reference was not drawn, "
        "only wrong draws are pushed.",
    )


_WEIGHT_HINT = "Count the draws of each token, divide by K, and multiply by what the token earns."


def _in_float64(function: Any) -> Any:
    """Let a function's tensor come out in float64; its errors are still reported at its own lines."""

    @functools.wraps(function)
    def answer(*arguments: Any) -> Any:
        result = function(*arguments)
        return result.double() if isinstance(result, Tensor) else result

    return answer


# ---- exercise 2 ----------------------------------------------------------------------------------------------


def _slope(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    leaf = logits.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


def _both(
    law: Callable[[Tensor, float], Tensor] = lambda z, kappa: torch.softmax(z.detach() / kappa, dim=0),
    log_pi: Callable[[Tensor, float], Tensor] = lambda z, kappa: torch.log_softmax(z, dim=0),
    earned: Callable[[float], tuple[float, float]] = lambda beta: (1.0, beta),
    dft: Callable[[Tensor], Tensor] = lambda log_p: -log_p.detach().exp() * log_p,
    sign: float = 1.0,
) -> Answer:
    """Return an answer to exercise 2 with one of its parts replaced."""

    def answer(logits: Tensor, target: int, beta: float, kappa: float) -> tuple[Tensor, Tensor]:
        def otr_loss(z: Tensor) -> Tensor:
            right, wrong = earned(beta)
            reward = torch.full_like(logits, wrong)
            reward[target] = right
            return -(law(z, kappa) * reward * log_pi(z, kappa)).sum()

        first = _slope(otr_loss, logits)
        return sign * first, sign * _slope(lambda z: dft(torch.log_softmax(z, dim=0)[target]), logits)

    return answer


_GRADIENT_MISTAKES: dict[str, Answer] = {
    "Both point uphill: these are the gradients of losses, which are minimised.": _both(sign=-1.0),
    "A gradient passes through pi' in OTR: draws are a constant, stop it there.": _both(
        law=lambda z, kappa: torch.softmax(z / kappa, dim=0)
    ),
    "A gradient passes through the weight pi(x) in DFT; E9 stops it.": _both(dft=lambda log_p: -log_p.exp() * log_p),
    "The loss holds log pi', at temperature kappa; only the draws are warm, log pi is at temperature 1.": _both(
        log_pi=lambda z, kappa: torch.log_softmax(z / kappa, dim=0)
    ),
    "The draws come from pi here; they come from pi', the softmax of the logits divided by kappa.": _both(
        law=lambda z, kappa: torch.softmax(z.detach(), dim=0)
    ),
    "The logits are multiplied by kappa; a temperature divides.": _both(
        law=lambda z, kappa: torch.softmax(z.detach() * kappa, dim=0)
    ),
    "Wrong tokens earn nothing here; they earn beta.": _both(earned=lambda beta: (1.0, 0.0)),
    "The reference earns 1 - beta here; it earns 1.": _both(earned=lambda beta: (1 - beta, beta)),
    "The reference earns beta like all others; it earns 1.": _both(earned=lambda beta: (beta, beta)),
    "DFT's weight is missing: that is the gradient of SFT.": _both(dft=lambda log_p: -log_p),
}


def check_both_gradients(function: Any) -> Feedback:
    """Judge exercise 2, `both_gradients(logits, target, beta, kappa)`: of E7 and of E9, at one position.

    Parameters
    ----------
    function : callable
        Of logits float64 [V], the reference token (an int), beta and kappa; returns the gradient of OTR's exact loss
        and that of DFT's, both by the logits, [V].
    """
    cases = []
    for seed, (count, target, beta, kappa) in enumerate(((3, 1, -0.5, 1.0), (4, 0, 0.4, 1.0), (5, 2, -0.2, 1.3))):
        logits = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        hit = torch.nn.functional.one_hot(torch.tensor(target), count).double()
        weights = token_weights(rollout_policy(logits, kappa), torch.tensor(target), beta)
        expected = {
            "gradient of OTR": logit_gradient(logits, weights),
            "gradient of DFT": logit_gradient(logits, hit * torch.softmax(logits, dim=0)),
        }
        arguments = {"logits": logits, "target": target, "beta": beta, "kappa": kappa}
        cases.append(Case(arguments, expected, _GRADIENT_MISTAKES, tolerance=1e-8))
    return check(
        function,
        cases,
        hint="E8 gives both: for DFT, w is pi(x) at the reference and zero elsewhere.",
        praise="At kappa = 1 the first is (1 - beta) times the second, exactly: there beta is only a learning rate. "
        "At kappa = 1.3 it is not.",
    )


# ---- exercise 3 ----------------------------------------------------------------------------------------------


def _trained(
    law: Callable[[Tensor, float], Tensor] = lambda z, kappa: torch.softmax(z / kappa, dim=0),
    wrong: Callable[[float], float] = lambda beta: beta,
    average: Callable[[Tensor], Tensor] = lambda q: q,
    mixed: Callable[[float], float] = lambda mix: mix,
    sign: float = 1.0,
) -> Answer:
    """Return an answer to exercise 3 with one of its parts replaced."""

    def answer(q: Tensor, kappa: float, beta: float, mix_sft: float) -> Tensor:
        z, q = torch.zeros_like(q), average(q)
        mix, beta = mixed(mix_sft), wrong(beta)
        for _ in range(1000):
            drawn = law(z, kappa)
            # A token is the reference with probability q, and another one is with 1 - q.
            w = (1 - mix) * drawn * (q + beta * (1 - q)) + mix * q
            z = (z - 2 * sign * (w.sum() * torch.softmax(z, dim=0) - w)).clamp(-50, 50)
        return torch.softmax(z, dim=0)

    return answer


def _most_frequent(q: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(q.argmax(), len(q)).to(q)


_FIXED_POINT_MISTAKES: dict[str, Answer] = {
    "The steps go uphill on the loss: subtract the gradient.": _trained(sign=-1.0),
    "Only the most frequent reference is taught here: average the gradient over all references, with weights q.": (
        _trained(average=_most_frequent)
    ),
    "The draws come from pi, not from pi': kappa is missing.": _trained(law=lambda z, kappa: torch.softmax(z, dim=0)),
    "The logits are multiplied by kappa; a temperature divides.": _trained(
        law=lambda z, kappa: torch.softmax(z * kappa, dim=0)
    ),
    "Wrong draws earn nothing here; they earn beta.": _trained(wrong=lambda beta: 0.0),
    "Wrong draws earn minus beta here; beta carries its own sign.": _trained(wrong=lambda beta: -beta),
    "This is where SFT ends, at q, whatever mix_sft says: the references must be weighed by how often they are "
    "drawn.": _trained(mixed=lambda mix: 1.0),
    "The share of SFT is missing: add mix_sft times its gradient.": _trained(mixed=lambda mix: 0.0),
    "mix_sft is the wrong way round: 1 is plain SFT.": _trained(mixed=lambda mix: 1 - mix),
}


@functools.cache
def _fixed_point_cases() -> tuple[Case, ...]:
    """Return settings whose ends differ; the first one tells all mistakes apart."""
    q = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)
    other = torch.tensor([0.15, 0.25, 0.1, 0.5], dtype=torch.float64)
    settings = ((q, 2.0, 0.4, 0.35), (q, 1.3, -0.1, 1.0), (q, 1.3, -0.1, 0.0), (other, 1.3, 0.5, 0.0))
    return tuple(
        Case(
            {"q": references, "kappa": kappa, "beta": beta, "mix_sft": mix},
            {"policy": _trained()(references, kappa, beta, mix)},
            _FIXED_POINT_MISTAKES,
            tolerance=0.005,
        )
        for references, kappa, beta, mix in settings
    )


@checker
def check_fixed_point(function: Any) -> Feedback:
    """Judge exercise 3, `expected_fixed_point(q, kappa, beta, mix_sft)`: where the exact mean update leads.

    Parameters
    ----------
    function : callable
        Of the references' frequencies, float64 [V], the two strengths and the share of SFT; returns the probabilities
        [V] of the one softmax, trained from uniform logits until it rests.
    """
    feedback = check(
        function,
        _fixed_point_cases(),
        hint="Start from logits of zero and take a few thousand steps with the gradient W pi - w of E8, averaged over "
        "the references: w = pi' (q + beta (1 - q)).",
        praise="SFT ends at q, noise included; OTR puts more than 0.99 on the most frequent reference, until a beta "
        "near one flattens everything.",
    )
    if feedback.state == "wrong" and "expected" in feedback.words:
        return Feedback("wrong", f"{feedback.words} Is it at rest? Twice as many steps must change nothing.")
    return feedback
