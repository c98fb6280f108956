r"""Group policy gradients in one notation: advantages, token losses, aggregations, KL estimators, entropy.

The chapter's methods differ in a few lines each. What they share stands here, under the numbers of the shared card:
B1 to B22. Each function is pure, takes any float dtype and returns what is to be MINIMISED.

Shapes. N completions of at most T tokens, in groups of one prompt each: `rewards` [N], `group` int64 [N] (any labels,
in any order), `mask` [N, T] with 1 on real tokens, the end token included, and 0 on padding; `logp`, `old_logp` and
`ref_logp` [N, T] are the log-probabilities of the sampled tokens under the policy (with the gradient), the policy that
sampled, and the frozen reference (both constants, detached here). `adv` is [N], or [N, T] where a method credits
tokens; it is a constant, too. A token loss is [N, T], and an aggregation (B13 to B16) makes the scalar.

Padding may hold anything, NaN included: it is set to 0 before it is exponentiated or summed. A row or a batch without a
single real token contributes 0. A group of one has nobody to be compared with and keeps its reward, as in verl.

Shapes that do not fit, rewards that are not finite and strengths out of range raise a ValueError, unknown modes an
UnknownNameError; both name what was given. The card's RLOO has no number of its own: it is B3, B5 and B16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch

from polrl.core.equation import equation
from polrl.core.errors import unknown_name

Tensor = torch.Tensor
StdMode = Literal["population", "unbiased", "none"]
Aggregation = Literal["seq_mean", "token_mean", "seq_sum_const", "seq_sum"]


# ---- shapes and masks ----------------------------------------------------------------------------------------


def groups_of(count: int, group_size: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the group [count * group_size], int64, of rows that lie group by group: 0, 0, ..., 1, 1, ..."""
    return torch.arange(count, device=device).repeat_interleave(group_size)


def _same_group(rewards: Tensor, group: Tensor) -> Tensor:
    """Return which rows share a group, bool [N, N]: needs no number of groups, and no order."""
    if rewards.dim() != 1 or rewards.shape != group.shape:
        raise ValueError(
            f"rewards and group must be [N], one number a completion each, got shapes {list(rewards.shape)} and "
            f"{list(group.shape)}"
        )
    if not len(rewards):
        raise ValueError("rewards must hold at least one completion, got none")
    if group.is_floating_point() or group.dtype == torch.bool:
        raise ValueError(f"group must hold whole numbers, the index of each row's prompt, got {group.dtype}")
    if not rewards.is_floating_point():
        raise ValueError(f"rewards must be floating point, got {rewards.dtype}")
    return group.unsqueeze(1) == group.unsqueeze(0)


def _group_statistics(rewards: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's deviation from its group's mean, mean squared deviation of the group and group size, [N].

    Rows of a group whose rewards are all equal deviate by exactly 0, which a rounded mean would not give. A group of
    one gets mean 0 (and, in B4, a spread of 1): plain REINFORCE.
    """
    rewards = rewards.detach()
    same = _same_group(rewards, group)
    bad = ~rewards.isfinite()
    if bool(bad.any()):  # it would spread to the other groups
        row = int(bad.nonzero()[0])
        raise ValueError(f"rewards must be finite, got {float(rewards[row])!r} in row {row}")
    size = same.sum(dim=1).to(rewards.dtype)
    shares = same.to(rewards.dtype) / size.unsqueeze(1)
    deviation = torch.where(informative(rewards, group), rewards - shares @ rewards, torch.zeros_like(rewards))
    return torch.where(size > 1, deviation, rewards), shares @ deviation.square(), size


def informative(rewards: Tensor, group: Tensor) -> Tensor:
    """Return which rows belong to a group that teaches something, bool [N]: rewards differ, or it is a group of one."""
    same = _same_group(rewards, group)
    differs = (same & (rewards.unsqueeze(0) != rewards.unsqueeze(1))).any(dim=1)
    return differs | (same.sum(dim=1) == 1)


def _check_tokens(mask: Tensor, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or tensor.shape != mask.shape:
            raise ValueError(
                f"{name} and mask must have the same shape [N, T], got {list(tensor.shape)} and {list(mask.shape)}"
            )


def on_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Return values [N, T] on real tokens and 0 on padding, whatever padding holds: NaN times 0 is NaN."""
    _check_tokens(mask, values=values)
    return torch.where(mask > 0, values, torch.zeros_like(values))


def _each(adv: Tensor, like: Tensor) -> Tensor:
    """Return constant advantages that broadcast to a loss [N, T] or [N]."""
    adv = adv.detach()
    if adv.shape == like.shape:
        return adv
    if adv.shape != like.shape[:1]:
        raise ValueError(
            f"adv must have one number a completion, [{like.shape[0]}], or one a token, {list(like.shape)}, "
            f"got shape {list(adv.shape)}"
        )
    return adv.unsqueeze(1)


# ---- advantages ----------------------------------------------------------------------------------------------


@equation("B1", r"A_i=R_i-b", source="Williams 1992")
def reinforce_advantage(rewards: Tensor, baseline: Tensor | float) -> Tensor:
    """Return rewards less a baseline [N]: a constant, a running mean, or one number a row that the prompt decides."""
    baseline = torch.as_tensor(baseline, dtype=rewards.dtype, device=rewards.device)
    if baseline.dim() and baseline.shape != rewards.shape:
        raise ValueError(
            f"baseline must be one number or one a completion, {list(rewards.shape)}, got shape {list(baseline.shape)}"
        )
    return (rewards - baseline).detach()


@equation("B2", r"A_i=R_i-\bar R_{g(i)}", source="Dr. GRPO, arXiv 2503.20783")
def group_mean_advantage(rewards: Tensor, group: Tensor) -> Tensor:
    """Return rewards less the mean of their group [N]; a group of one keeps its reward."""
    return _group_statistics(rewards, group)[0]


@equation(
    "B3",
    r"A_i=R_i-\frac1{G-1}\sum_{j\ne i}R_j=\frac G{G-1}(R_i-\bar R_{g(i)})",
    source="RLOO, arXiv 2402.14740",
)
def rloo_advantage(rewards: Tensor, group: Tensor) -> Tensor:
    """Return rewards less the mean of the group's other rewards [N]; a group of one keeps its reward."""
    deviation, _, size = _group_statistics(rewards, group)
    return deviation * torch.where(size > 1, size / (size - 1).clamp(min=1), torch.ones_like(size))


@equation("B4", r"A_i=\frac{R_i-\bar R_{g(i)}}{\sigma_{g(i)}+\epsilon}", source="GRPO, arXiv 2402.03300")
def grpo_advantage(rewards: Tensor, group: Tensor, std_mode: StdMode = "population", eps: float = 1e-6) -> Tensor:
    """Return rewards standardised within their group [N]; 0 where all of a group's are equal.

    `std_mode` divides the sum of squares by G ("population") or G - 1 ("unbiased"), or leaves out the division
    ("none": B2). A group of one is divided by 1 + eps.
    """
    if std_mode not in get_args(StdMode):
        raise unknown_name("std_mode", std_mode, get_args(StdMode))
    if eps < 0:
        raise ValueError(f"eps must be 0 or above, got {eps!r}")
    deviation, variance, size = _group_statistics(rewards, group)
    if std_mode == "none":
        return deviation
    if std_mode == "unbiased":
        variance = variance * size / (size - 1).clamp(min=1)
    spread = torch.where(size > 1, variance.sqrt(), torch.ones_like(size)) + eps
    return torch.where(deviation == 0, deviation, deviation / spread)


# ---- ratios --------------------------------------------------------------------------------------------------


def log_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """Return log pi - log pi_old [N, T], 0 on padding; the old log-probabilities are a constant."""
    _check_tokens(mask, logp=logp, old_logp=old_logp)
    return on_tokens(logp, mask) - on_tokens(old_logp.detach(), mask)


def token_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """Return the ratio pi / pi_old of each token [N, T], 1 on padding."""
    return log_ratio(logp, old_logp, mask).exp()


@equation(
    "B11",
    r"s_i=\exp\Big(\frac1{L_i}\sum_t m_{i,t}(\ell_{i,t}-\ell^{old}_{i,t})\Big)",
    source="GSPO, arXiv 2507.18071",
)
def sequence_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """Return the geometric mean of each completion's token ratios [N]."""
    return (log_ratio(logp, old_logp, mask).sum(dim=1) / _lengths(mask, logp)).exp()


@equation("B12", r"\rho_i=\exp(\ell_i-\ell_i^{old})=\prod_t\rho_{i,t}", source="TOPR, arXiv 2503.14286")
def trajectory_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """Return the ratio of whole completions [N]: unbiased as a weight, but its variance grows exponentially."""
    return log_ratio(logp, old_logp, mask).sum(dim=1).exp()


# ---- token losses --------------------------------------------------------------------------------------------


@equation("B5", r"\mathcal l=-A_i\,\ell_{i,t}", source="Williams 1992")
def reinforce_loss(logp: Tensor, adv: Tensor) -> Tensor:
    """Return the loss of each token [N, T] whose gradient is REINFORCE's; its value means nothing."""
    return -_each(adv, logp) * logp


@equation("B6", r"\mathcal l=-A_i\,\rho_{i,t}", source="arXiv 1707.06347, Eq. 6")
def importance_loss(ratio: Tensor, adv: Tensor) -> Tensor:
    """Return the unclipped surrogate of each token [N, T] from its ratio, or of each completion [N] from B11 or B12."""
    return -_each(adv, ratio) * ratio


@equation(
    "B7",
    r"\mathcal l=-\min\big(\rho A,\ \mathrm{clip}(\rho,1-\varepsilon_{low},1+\varepsilon_{high})\,A\big)",
    source="arXiv 1707.06347, Eq. 7",
)
def clip_loss(ratio: Tensor, adv: Tensor, eps_low: float = 0.2, eps_high: float = 0.2) -> Tensor:
    """Return the clipped surrogate, shaped like the ratio: no gradient where the policy has gone far enough already."""
    if not 0 <= eps_low <= 1 or eps_high < 0:
        raise ValueError(
            f"eps_low must be from 0 to 1 and eps_high 0 or above, got eps_low={eps_low!r} and eps_high={eps_high!r}"
        )
    adv = _each(adv, ratio)
    return -torch.minimum(ratio * adv, ratio.clamp(1 - eps_low, 1 + eps_high) * adv)


@equation(
    "B8",
    r"A<0:\ \mathcal l=\min\big(\max(-\rho A,-\mathrm{clip}(\rho)A),\,-cA\big),\qquad A\ge0:\ \text{as B7}",
    source="arXiv 1912.09729; verl clip_ratio_c",
)
def dual_clip_loss(ratio: Tensor, adv: Tensor, eps_low: float = 0.2, eps_high: float = 0.2, c: float = 3.0) -> Tensor:
    """Return B7, bounded by c |A| where the advantage is negative and the ratio has exploded."""
    if c <= 1:
        raise ValueError(f"c must be above 1, or it would cut what is on-policy, got {c!r}")
    loss, each = clip_loss(ratio, adv, eps_low, eps_high), _each(adv, ratio)
    return torch.where(each < 0, torch.minimum(loss, -c * each), loss)


@equation(
    "B9",
    r"\mathcal l=-\min\big(\rho A,\ \mathrm{clip}(\rho,0.8,1.28)\,A\big)",
    source="DAPO, arXiv 2503.14476",
)
def clip_higher_loss(ratio: Tensor, adv: Tensor) -> Tensor:
    """Return B7 with DAPO's sides: what is rare may grow further than what is common may shrink."""
    return clip_loss(ratio, adv, eps_low=0.2, eps_high=0.28)


@equation("B10", r"\mathcal l=-\mathrm{sg}[\min(\rho,\varepsilon_{max})]\,A\,\ell", source="CISPO, arXiv 2506.13585")
def cispo_loss(logp: Tensor, ratio: Tensor, adv: Tensor, eps_max: float) -> Tensor:
    """Return REINFORCE [N, T] weighted by a clipped ratio: the weight is bounded, the gradient never vanishes."""
    if eps_max <= 0:
        raise ValueError(f"eps_max must be above 0, got {eps_max!r}")
    return -ratio.detach().clamp(max=eps_max) * _each(adv, logp) * logp


@equation(
    "B11b",
    r"\mathcal l_i=-\min\big(s_iA_i,\ \mathrm{clip}(s_i,1-\varepsilon_{low},1+\varepsilon_{high})\,A_i\big)",
    source="GSPO, arXiv 2507.18071",
)
def gspo_loss(
    logp: Tensor, old_logp: Tensor, adv: Tensor, mask: Tensor, eps_low: float = 3e-4, eps_high: float = 4e-4
) -> Tensor:
    """Return the clipped loss of each completion [N]; its aggregation is the plain mean over completions."""
    return clip_loss(sequence_ratio(logp, old_logp, mask), adv, eps_low, eps_high)


# ---- aggregations --------------------------------------------------------------------------------------------


def _lengths(mask: Tensor, like: Tensor) -> Tensor:
    """Return the number of real tokens of each row [N], 1 for an empty row: what is divided by it is 0 there."""
    return (mask > 0).sum(dim=1).clamp(min=1).to(like.dtype)


@equation("B13", r"\frac1N\sum_i\frac1{L_i}\sum_t m_{i,t}\,\mathcal l_{i,t}", source="GRPO, arXiv 2402.03300")
def seq_mean(loss: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over completions of their mean over tokens: a token of a short completion weighs more."""
    return (on_tokens(loss, mask).sum(dim=1) / _lengths(mask, loss)).sum() / max(len(loss), 1)


@equation("B14", r"\frac{\sum_{i,t}m_{i,t}\,\mathcal l_{i,t}}{\sum_{i,t}m_{i,t}}", source="DAPO, arXiv 2503.14476")
def token_mean(loss: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over all real tokens: each weighs alike; 0 if there is none."""
    return on_tokens(loss, mask).sum() / (mask > 0).sum().clamp(min=1).to(loss.dtype)


@equation(
    "B15",
    r"\frac1{N\,T_{max}}\sum_i\sum_t m_{i,t}\,\mathcal l_{i,t}",
    source="Dr. GRPO, arXiv 2503.20783",
)
def seq_sum_const(loss: Tensor, mask: Tensor, t_max: float) -> Tensor:
    """Return the mean over completions of their sum over tokens, divided by a constant.

    `t_max` must not be the width of the present batch, or the scale of the loss would follow its longest completion.
    """
    if t_max <= 0:
        raise ValueError(f"t_max must be above 0, got {t_max!r}")
    return seq_sum(loss, mask) / t_max


@equation("B16", r"\frac1N\sum_i\sum_t m_{i,t}\,\mathcal l_{i,t}", source="RLOO, arXiv 2402.14740")
def seq_sum(loss: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over completions of their sum over tokens: the gradient of whole completions."""
    return on_tokens(loss, mask).sum() / max(len(loss), 1)


def aggregate(loss: Tensor, mask: Tensor, mode: Aggregation, t_max: float) -> Tensor:
    """Return the scalar of a token loss [N, T] by one of B13 to B16; `t_max` is the constant of B15."""
    modes: dict[str, Callable[[], Tensor]] = {
        "seq_mean": lambda: seq_mean(loss, mask),
        "token_mean": lambda: token_mean(loss, mask),
        "seq_sum_const": lambda: seq_sum_const(loss, mask, t_max),
        "seq_sum": lambda: seq_sum(loss, mask),
    }
    if mode not in modes:
        raise unknown_name("aggregation", mode, modes)
    return modes[mode]()


# ---- KL estimators and entropy -------------------------------------------------------------------------------


@equation("B20", r"k_1=\ell-\ell^{ref}", source="Schulman 2020, Approximating KL divergence")
def k1(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """Return the plain estimate of KL(pi || ref) [N, T]: unbiased, of either sign; as a loss its mean gradient is 0."""
    return log_ratio(logp, ref_logp, mask)


@equation("B20b", r"k_2=\tfrac12(\ell^{ref}-\ell)^2", source="Schulman 2020, Approximating KL divergence")
def k2(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """Return half the squared log-ratio [N, T]: biased, but as a loss its mean gradient is that of KL(pi || ref)."""
    return 0.5 * log_ratio(logp, ref_logp, mask).square()


@equation("B21", r"k_3=e^{d}-d-1,\quad d=\ell^{ref}-\ell", source="Schulman 2020, Approximating KL divergence")
def k3(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """Return the estimate of KL(pi || ref) that is never negative [N, T]; as a loss it follows KL(ref || pi)."""
    d = -log_ratio(logp, ref_logp, mask)
    return d.exp() - d - 1


@equation("B22", r"H_{i,t}=-\sum_v\pi_\theta(v|\cdot)\log\pi_\theta(v|\cdot)", source="textbook")
def entropy(logits: Tensor) -> Tensor:
    """Return the entropy [...] of the next token from full logits [..., V], those that are minus infinity included."""
    log_pi = torch.log_softmax(logits, dim=-1)
    return -(log_pi.exp() * log_pi.clamp(min=torch.finfo(log_pi.dtype).min)).sum(dim=-1)


# ---- recipes -------------------------------------------------------------------------------------------------


@equation(
    "B17",
    r"\frac1N\sum_i\frac1{L_i}\sum_t m_{i,t}\big(\mathcal l^{clip}_{i,t}+\beta\,k_{3,i,t}\big)",
    source="GRPO, arXiv 2402.03300, Eq. 3",
)
def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor,
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    beta: float,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    std_mode: StdMode = "population",
) -> Tensor:
    """Return GRPO's scalar loss: B4, B7 and B13, with the KL estimate B21 inside the same aggregation."""
    clipped = clip_loss(token_ratio(logp, old_logp, mask), grpo_advantage(rewards, group, std_mode), eps_low, eps_high)
    return seq_mean(clipped + beta * k3(logp, ref_logp, mask), mask)


@equation(
    "B18",
    r"\frac1{N\,T_{max}}\sum_i\sum_t m_{i,t}\,\mathcal l^{clip}_{i,t},\quad A_i=R_i-\bar R_{g(i)}",
    source="Dr. GRPO, arXiv 2503.20783",
)
def dr_grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    t_max: float,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
) -> Tensor:
    """Return Dr. GRPO's scalar loss: B2, B7 and B15: no division by a spread or by a length, no KL."""
    adv = group_mean_advantage(rewards, group)
    return seq_sum_const(clip_loss(token_ratio(logp, old_logp, mask), adv, eps_low, eps_high), mask, t_max)


@equation(
    "B19",
    r"\frac{\sum_{i\in\mathcal K}\sum_t m_{i,t}\,\mathcal l^{clip}_{i,t}}{\sum_{i\in\mathcal K}\sum_t m_{i,t}},\quad"
    r"\mathcal K=\{i:\text{rewards of }g(i)\text{ differ}\}",
    source="DAPO, arXiv 2503.14476",
)
def dapo_loss(
    logp: Tensor, old_logp: Tensor, rewards: Tensor, group: Tensor, mask: Tensor, std_mode: StdMode = "population"
) -> Tensor:
    """Return DAPO's scalar loss: B4, B9 and B14 over the groups whose rewards differ; 0 if there is none."""
    kept = mask * informative(rewards, group).unsqueeze(1).to(mask.dtype)
    loss = clip_higher_loss(token_ratio(logp, old_logp, mask), grpo_advantage(rewards, group, std_mode))
    return token_mean(loss, kept)
