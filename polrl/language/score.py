r"""Self-Correction via Reinforcement Learning (SCoRe): a model learns to mend its own first answer.

Asked to look at its answer again, with no hint that it was wrong, a language model tends to spoil it. Rewarding both
attempts does not teach it otherwise: on the training problems "answer as well as possible, then repeat it" earns as
much as "improve on the second try", and it is the one that learning finds. SCoRe keeps the model away from it in two
stages. Stage I rewards the second attempt only, while a strong KL penalty pins the first attempt to the base model, so
that the two come apart. Stage II rewards both, and pays a bonus for progress from the first attempt to the second.

Kumar, Zhuang, Agarwal, Su and others, arXiv 2409.12917; no official code. E1-E4 are what is maximised; E7 is the
estimator that E2-E6 lead to: REINFORCE with a leave-one-out baseline and the exact KL over the vocabulary. `beta2`
is the knob to drag first, and not the paper's `alpha`: Stage I shows its effect within seconds, and `alpha` does
nothing before Stage II. A tiny model needs a `beta2` above 1 to hold the first attempt. Where both attempts are alike,
any reward for the first soon leaves nothing to mend; the task "unequal" gives the second attempt what the first lacks,
room to work. Of E8 the edit-distance ratio is left out, for short answers hold hardly more than whether they changed.

`method="star"` is the card's baseline that learns without rewards; its loss, E9, has a number of this file's own. STaR
imitates those of its own second attempts that mended a wrong first one. Three times a copy of the model plays for a
third of the steps, while a student that begins as the base model imitates what is kept; then the student is the one
that plays. A step is one batch of rollouts and one gradient step, as everywhere here.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from pydantic import Field

import polrl
from polrl import Bars, Budget, Criterion, Curve, Learner, Metrics, Study, Tokens, View, equation, knob
from polrl.core.errors import KnobError
from polrl.core.sampling import Generators
from polrl.models.causal_lm import completion_logits, sample, token_log_probs
from polrl.models.tiny_lm import EOS, VOCABULARY, decode_batch, encode, load_tiny_lm
from polrl.worlds.text_tasks import Problem, SelfCorrection, TwoAttempts, UnequalAttempts, checked_rewards

Stage = Literal[1, 2]
STAR_ITERATIONS = 3  # of playing and imitating
SHOWN = 16  # problems in a view
#: What can become of a problem: wrong then right, right then wrong ...
OUTCOMES = ("mended", "spoilt", "wrong twice", "right twice")
BAR = encode("|")[0]  # ends the columns of an attempt


@dataclass(frozen=True)
class Form:
    """What a task of two attempts is played with and how it is shown."""

    task: Callable[[], TwoAttempts]
    model: str  # the checkpoint that is made for it
    in_a_line: int  # problems of a view


FORMS = {"alike": Form(SelfCorrection, "correct-S", 4), "unequal": Form(UnequalAttempts, "scratch-S", 2)}


class Config(polrl.Config):
    """Settings of the method.

    With the task "alike" both attempts are two digits, of which the base model gets four in ten wrong in the first, at
    temperature 1. With "unequal" the first has the length of a direct answer to a sum of two-digit numbers, which the
    base model has not learned to the end, and the second may work out the columns.
    """

    method: Literal["score", "star"] = "score"  # star: the baseline of E9, without stages
    task: Literal["alike", "unequal"] = "alike"
    model: str = ""  # a checkpoint of the tiny language model; the task's own if empty
    prompts: int = Field(24, ge=1)
    group: int = Field(4, ge=2)  # K rollouts a prompt: the leave-one-out baseline needs another one
    stage1_steps: int = Field(60, ge=0)  # 0 leaves Stage I out
    stage2_steps: int = Field(45, ge=0)
    test_samples: int = Field(4, ge=1)  # attempts at each held-out problem when it is judged

    beta2: float = knob(
        3.0, low=1e-3, high=10.0, scale="log", symbol=r"\beta_2", first=True, paper=0.1,
        help="price of the first attempt's KL in Stage I",
        at_low="the first attempt drifts and improves, the second copies it",
        at_high="the first attempt stays the base model's; the second, of the same weights, learns more slowly",
    )  # fmt: skip
    alpha: float = knob(
        10.0, low=0.0, high=20.0, symbol=r"\alpha", help="bonus for progress in Stage II",
        at_low="both attempts improve together, the second copies the first",
        at_high="the bonus rules: noisy steps, a spoilt answer is punished hard, the first attempt is neglected",
    )  # fmt: skip
    beta1: float = knob(
        0.01, low=0.0, high=1.0, scale="log_zero", smallest=1e-3, symbol=r"\beta_1",
        help="price of the KL of both attempts, in both stages", at_low="drift, the entropy collapses",
        at_high="both attempts stay the base model's",
    )  # fmt: skip
    gamma: float = knob(
        0.0, low=0.0, high=1.0, symbol=r"\gamma",
        help="share of the second attempt's reward that the first is credited with, in Stage II",
        at_low="each attempt is credited with its own reward",
        at_high="with a bonus above 1 a wrong first answer is worth more than a right one",
    )  # fmt: skip
    learning_rate: float = knob(
        5e-4, low=1e-6, high=5e-3, scale="log", symbol=r"\eta", paper=5e-6, help="of Adam",
        at_low="nothing moves", at_high="collapse",
    )  # fmt: skip


@equation("E1", r"\max_\theta\ \mathbb E\Big[\sum_{i=1}^{2} r(y_i,y^*)\Big]", source="Eq. 1, second version")
def multi_turn_objective(r1: torch.Tensor, r2: torch.Tensor) -> torch.Tensor:
    """Return the mean over rollouts of both attempts' rewards [B] together; the first version counts the last only."""
    return (r1 + r2).mean()


@equation(
    "E2",
    r"\max_\theta\ \mathbb E_{y\sim\pi_\theta}\big[r(y)-\beta_1 D_{KL}(\pi_\theta(\cdot|x)\|\pi_{ref}(\cdot|x))\big]",
    source="Eq. 2",
)
def kl_regularized_objective(reward: torch.Tensor, kl: torch.Tensor, beta1: float) -> torch.Tensor:
    """Return the mean over rollouts of the reward [B] less beta1 times the rollout's KL [B], in nats."""
    return (reward - beta1 * kl).mean()


@equation(
    "E3",
    r"\max_\theta\ \mathbb E\big[r(y_2)-(\beta_1+\beta_2)D_{KL}^{(1)}-\beta_1 D_{KL}^{(2)}\big]",
    source="Eq. 3, with the ordinary penalty that it leaves out for brevity",
)
def stage_one_objective(
    r2: torch.Tensor, kl1: torch.Tensor, kl2: torch.Tensor, beta1: float, beta2: float
) -> torch.Tensor:
    """Return Stage I's objective from the second reward and both KL [B]: the first attempt earns nothing itself."""
    return (r2 - (beta1 + beta2) * kl1 - beta1 * kl2).mean()


@equation("E4", r"\max_\theta\ \mathbb E\Big[\sum_{i=1}^{2}\big\{r_i-\beta_1 D_{KL}^{(i)}\big\}\Big]", source="Eq. 4")
def stage_two_objective(
    r1: torch.Tensor, r2: torch.Tensor, kl1: torch.Tensor, kl2: torch.Tensor, beta1: float
) -> torch.Tensor:
    """Return Stage II's objective from both attempts' rewards and KL [B], at one price for both."""
    return (r1 - beta1 * kl1 + r2 - beta1 * kl2).mean()


@equation("E5", r"\tilde r_1=r_1,\qquad \tilde r_2=r_2+\alpha(r_2-r_1)", source="Eq. 5")
def shaped_rewards(
    r1: torch.Tensor, r2: torch.Tensor, alpha: float, stage: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pay the second attempt for progress, from rewards [B]; in Stage I return 0 and the plain second reward."""
    if _checked_stage(stage) == 1:
        return torch.zeros_like(r1), r2
    return r1, r2 + alpha * (r2 - r1)


@equation("E6", r"R_1=\tilde r_1+\gamma\,\tilde r_2,\qquad R_2=\tilde r_2,\qquad \gamma=0", source="App. A.2")
def attempt_returns(
    shaped1: torch.Tensor, shaped2: torch.Tensor, gamma: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Credit each attempt [B] with its own reward, and the first with a share of the second's; the paper's is 0."""
    return shaped1 + gamma * shaped2, shaped2


@equation("E7a", r"A^{(k)}=R^{(k)}-\frac1{K-1}\sum_{j\ne k}R^{(j)}", source="derived; Ahmadian and others, RLOO")
def leave_one_out(returns: torch.Tensor, group: int) -> torch.Tensor:
    """Compare each rollout [B] with the mean of the others of its prompt, which lie next to it, `group` by `group`."""
    if group < 2:
        raise ValueError(f"group must be at least 2, for each rollout is compared with the others; got {group!r}")
    if returns.ndim != 1 or len(returns) % group:
        raise ValueError(f"returns must be [B] with B a multiple of group={group}, got shape {tuple(returns.shape)}")
    rows = returns.reshape(-1, group)
    others = (rows.sum(dim=1, keepdim=True) - rows) / (group - 1)
    return (rows - others).reshape(-1)


@equation("E7b", r"KL_t=\sum_v\pi_\theta(v)\log\frac{\pi_\theta(v)}{\pi_{ref}(v)}", source="derived")
def token_kl(logits: torch.Tensor, ref_logits: torch.Tensor) -> torch.Tensor:
    """Sum over the vocabulary [..., V] how far each token's distribution is from the reference's, a constant."""
    log_pi, log_ref = logits.log_softmax(dim=-1), ref_logits.detach().log_softmax(dim=-1)
    return (log_pi.exp() * (log_pi - log_ref)).sum(dim=-1)


@equation(
    "E7c",
    r"\text{Stage I: }c_1=\beta_1+\beta_2,\ c_2=\beta_1;\qquad \text{Stage II: }c_1=c_2=\beta_1",
    source="Eqs. 3 and 4",
)
def kl_weights(beta1: float, beta2: float, stage: int) -> tuple[float, float]:
    """Return the price of each attempt's KL."""
    return (beta1 + beta2 if _checked_stage(stage) == 1 else beta1), beta1


@equation(
    "E9",
    r"L=-\frac1{|D|}\sum_{b\in D}\sum_{t\in m_2}\log\pi_\theta(y_t),\qquad D=\{b: r_1=0,\ r_2=1\}",
    source="STaR, as the card has it: imitation of own traces, wrong first and then right",
)
def imitation_loss(logits: torch.Tensor, ids: torch.Tensor, m2: torch.Tensor) -> torch.Tensor:
    """Return how unlikely second attempts are, a scalar: the sum over their tokens, the mean over traces.

    Parameters
    ----------
    logits : Tensor, [B, T, V]
        What PREDICTS each token of the traces that were kept.
    ids : Tensor, int64 [B, T]
    m2 : Tensor, [B, T]
        1 on the tokens of the second attempt; the first, which was wrong, is read and not learned.
    """
    logits = logits.where(m2.unsqueeze(-1) > 0, 0.0)
    return -(m2 * token_log_probs(logits, ids)).sum(dim=1).mean()


@dataclass(frozen=True)
class Surrogate:
    """The loss of E7 and its parts, each a scalar: L = policy + c1 kl1 + c2 kl2."""

    loss: torch.Tensor
    policy: torch.Tensor
    kl1: torch.Tensor
    kl2: torch.Tensor


@equation(
    "E7",
    r"L=-\frac1B\sum_b\sum_i\mathrm{sg}[A_{i,b}]\sum_{t\in m_i}\log\pi_\theta(y_t)"
    r"+\sum_i c_i\,\frac1B\sum_b\sum_{t\in m_i}KL_t",
    source="derived from E2-E6",
)
def surrogate_loss(
    logits: torch.Tensor, ref_logits: torch.Tensor, ids: torch.Tensor, m1: torch.Tensor, m2: torch.Tensor,
    return1: torch.Tensor, return2: torch.Tensor, group: int, c1: float, c2: float,
) -> Surrogate:  # fmt: skip
    """Return REINFORCE with a leave-one-out baseline for each attempt, and both KL: sums over tokens, means over rows.

    Parameters
    ----------
    logits, ref_logits : Tensor, [B, T, V]
        What PREDICTS each token, under the policy and under the base model (a constant).
    ids : Tensor, int64 [B, T]
    m1, m2 : Tensor, [B, T]
        1 on the tokens of each attempt, the end token included; 0 on prompt, instruction and padding.
    return1, return2 : Tensor, [B]
        What each attempt is credited with, constants; the rows of one prompt lie next to each other.
    group : int
        Rows a prompt, K.
    c1, c2 : float
        Price of each attempt's KL.

    Raises
    ------
    ValueError
        If shapes do not fit, the group is smaller than 2, or B is not a multiple of it.
    """
    _check_masks(logits, ref_logits, ids, m1, m2)
    written = ((m1 + m2) > 0).unsqueeze(-1)
    # What stands at other places must not matter, a NaN on padding included.
    logits, ref_logits = (values.where(written, 0.0) for values in (logits, ref_logits))
    log_probs = logits.log_softmax(dim=-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    by_token = token_kl(logits, ref_logits)
    advantages = [leave_one_out(returns.detach(), group) for returns in (return1, return2)]
    credit = advantages[0].unsqueeze(1) * m1 + advantages[1].unsqueeze(1) * m2
    policy = -(credit * log_probs).sum(dim=1).mean()
    kl1, kl2 = ((mask * by_token).sum(dim=1).mean() for mask in (m1, m2))
    return Surrogate(policy + c1 * kl1 + c2 * kl2, policy, kl1, kl2)


@equation(
    "E8",
    r"\Delta=\mathrm{Acc@t2}-\mathrm{Acc@t1}=\Delta^{i\to c}-\Delta^{c\to i},\quad "
    r"\Delta^{i\to c}=\tfrac1N\#\{r_1=0,r_2=1\},\ \Delta^{c\to i}=\tfrac1N\#\{r_1=1,r_2=0\}",
    source="Sec. 3",
)
def self_correction_metrics(r1: torch.Tensor, r2: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return both accuracies, their difference, and what was mended and spoilt, as shares of ALL N problems [N]."""
    if r1.shape != r2.shape or not r1.numel():
        raise ValueError(f"r1 and r2 must have one shape and a row at least, got {[*r1.shape]} and {[*r2.shape]}")
    return {
        "accuracy_t1": r1.mean(),
        "accuracy_t2": r2.mean(),
        "delta": r2.mean() - r1.mean(),
        "i_to_c": ((1 - r1) * r2).mean(),
        "c_to_i": (r1 * (1 - r2)).mean(),
    }


def _checked_stage(stage: int) -> int:
    if stage not in (1, 2):
        raise ValueError(f"stage must be 1 or 2, got {stage!r}")
    return stage


def _check_masks(
    logits: torch.Tensor, ref_logits: torch.Tensor, ids: torch.Tensor, m1: torch.Tensor, m2: torch.Tensor
) -> None:
    shapes = [tuple(values.shape) for values in (logits, ref_logits, ids, m1, m2)]
    rows = shapes[2]
    if len(shapes[0]) != 3 or shapes[0] != shapes[1] or any(s != rows for s in (shapes[0][:2], *shapes[3:])):
        raise ValueError(f"need logits and ref_logits [B, T, V], ids, m1 and m2 [B, T]; got {shapes}")


@dataclass(frozen=True)
class Attempts:
    """Two attempts at each of N problems: P tokens of prompt, then T of first attempt, instruction, second attempt."""

    prompt_ids: torch.Tensor  # [N, P]
    prompt_mask: torch.Tensor
    ids: torch.Tensor  # [N, T]
    mask: torch.Tensor  # 0 on padding alone
    m1: torch.Tensor  # 1 on the tokens of the first attempt, its end included
    m2: torch.Tensor
    texts: tuple[list[str], list[str]]  # as the verifier reads them, without their ends
    r1: torch.Tensor  # [N], 1 for a right attempt; one without an end is wrong
    r2: torch.Tensor

    def logits(self, model: torch.nn.Module) -> torch.Tensor:
        """Return what predicts each token [N, T, V] under a model."""
        return completion_logits(model, self.prompt_ids, self.prompt_mask, self.ids, self.mask)


@dataclass(frozen=True)
class Traces:
    """What STaR imitates: N prompts of P tokens, and both attempts with padding to T, the longest that there can be."""

    prompt_ids: torch.Tensor  # [N, P]
    ids: torch.Tensor  # [N, T]
    mask: torch.Tensor  # 0 on padding alone
    m2: torch.Tensor  # 1 on the tokens of the second attempt

    def joined(self, played: Attempts, chosen: torch.Tensor) -> Traces:
        """Return these and the chosen rows, bool [B], of a batch."""
        pad = (0, self.ids.shape[1] - played.ids.shape[1])
        new = (played.prompt_ids, *(torch.nn.functional.pad(x, pad) for x in (played.ids, played.mask, played.m2)))
        mine = (self.prompt_ids, self.ids, self.mask, self.m2)
        return Traces(*(torch.cat([old, rows[chosen]]) for old, rows in zip(mine, new, strict=True)))

    def drawn(self, rows: torch.Tensor) -> Traces:
        """Return these rows, int64 [B]."""
        return Traces(self.prompt_ids[rows], self.ids[rows], self.mask[rows], self.m2[rows])

    def logits(self, model: torch.nn.Module) -> torch.Tensor:
        """Return what predicts each token [N, T, V] under a model."""
        return completion_logits(model, self.prompt_ids, torch.ones_like(self.prompt_ids), self.ids, self.mask)


class SCoRe(Learner[Config]):
    """Two attempts at each sum, rewarded by stage; a step is one batch of rollouts and one gradient step."""

    phases = ("stage1", "stage2")
    constants = ("reference", "task", "held_out", "base")
    evaluate_every = 10
    curves = (
        Curve(("accuracy_t1", "accuracy_t2"), "Accuracy of both attempts (held-out problems)", "share right"),
        Curve(("i_to_c", "c_to_i"), "Mended and spoilt by the second attempt", "share of all problems"),
        Curve(("same_answer",), "Second answer repeats the first", "share of problems"),
        Curve(("kl_t1", "kl_t2"), "KL of each attempt to the base model", "nats"),
    )

    def setup(self) -> None:
        config = self.config
        if config.method == "star" and config.stage1_steps:
            raise KnobError(f"stage1_steps={config.stage1_steps}; allowed: 0 with method='star', which has no stages")
        form = FORMS[config.task]
        self.task = form.task()
        self.model, reference = (load_tiny_lm(config.model or form.model, self.device) for _ in range(2))
        self.reference = reference.requires_grad_(False).eval()
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.held_out = self.task.problems("test") * config.test_samples
        # With the noise of `evaluate`, so that a difference to the base model is the weights' alone.
        judged = Generators(config.seed, self.device, "observe")
        with torch.no_grad():
            self.base = self.figures(self.attempt(self.reference, self.held_out, judged.torch))
        if config.method == "star":
            self.player, self.traces = copy.deepcopy(self.reference), self.no_traces()
        if config.stage1_steps == 0:
            self.enter("stage2")

    @property
    def budget(self) -> int:
        return self.config.stage1_steps + self.config.stage2_steps

    @property
    def stage(self) -> Stage:
        return 1 if self.phase == "stage1" else 2

    def update(self) -> Metrics:
        return self.reinforce() if self.config.method == "score" else self.imitate()

    def play(self, model: torch.nn.Module) -> Attempts:
        """Let a model try new problems, each as often as the group is large."""
        problems = self.task.prompts(self.config.prompts, self.rng.numpy, split="train")
        return self.attempt(model, [p for p in problems for _ in range(self.config.group)], self.rng.torch)

    def reinforce(self) -> Metrics:
        """Take a step of E7."""
        config, stage = self.config, self.stage
        played = self.play(self.model)
        shaped1, shaped2 = shaped_rewards(played.r1, played.r2, config.alpha, stage)
        gamma = config.gamma if stage == 2 else 0.0  # in Stage I the first attempt has no reward, not even a share
        return1, return2 = attempt_returns(shaped1, shaped2, gamma)
        c1, c2 = kl_weights(config.beta1, config.beta2, stage)
        with torch.no_grad():
            ref_logits = played.logits(self.reference)
        parts = surrogate_loss(
            played.logits(self.model), ref_logits, played.ids, played.m1, played.m2,
            return1, return2, config.group, c1, c2,
        )  # fmt: skip

        norm = self.descend(parts.loss)
        if stage == 1 and self.phase_step + 1 >= config.stage1_steps:
            self.enter("stage2")
        return {
            "batch_t1": played.r1.mean(),
            "batch_t2": played.r2.mean(),
            "policy_loss": parts.policy,
            "batch_kl1": parts.kl1,
            "batch_kl2": parts.kl2,
            "gradient_norm": norm,
        }

    def imitate(self) -> Metrics:
        """Let the player play, keep what it mended, and let the student imitate as many of the kept traces."""
        if self.phase_step and self.phase_step % math.ceil(self.budget / STAR_ITERATIONS) == 0:  # the next iteration
            self.player.load_state_dict(self.model.state_dict())
            self.model.load_state_dict(self.reference.state_dict())
            self.optimizer = torch.optim.Adam(self.model.parameters())
            self.traces = self.no_traces()
        played = self.play(self.player)
        self.traces = self.traces.joined(played, (played.r1 == 0) & (played.r2 == 1))
        kept, found = len(self.traces.ids), {"batch_t1": played.r1.mean(), "batch_t2": played.r2.mean()}
        if kept:
            rows = torch.randint(kept, (len(played.ids),), generator=self.rng.torch, device=self.device)
            batch = self.traces.drawn(rows)
            loss = imitation_loss(batch.logits(self.model), batch.ids, batch.m2)
            found |= {"imitation_loss": loss.detach(), "gradient_norm": self.descend(loss)}
        return {**found, "traces": float(kept)}

    def no_traces(self) -> Traces:
        """Return traces of no rows, with room for the longest attempts."""
        prompt, _ = self.task.first_prompts(self.held_out[:1], self.device)
        longest = self.task.first_tokens + 1 + self.task.second_tokens
        ids = torch.zeros(0, longest, dtype=torch.int64, device=self.device)
        return Traces(prompt[:0], ids, ids.float(), ids.float())

    def descend(self, loss: torch.Tensor) -> torch.Tensor:
        """Take a step of Adam; returns the gradient's norm before it was clipped to 1."""
        self.optimizer.param_groups[0]["lr"] = self.config.learning_rate
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return norm

    def attempt(self, model: torch.nn.Module, problems: list[Problem], generator: torch.Generator) -> Attempts:
        """Let a model try each problem, show it the instruction, and let it try again."""
        task, device = self.task, self.device
        prompt_ids, prompt_mask = task.first_prompts(problems, device)
        answer = partial(sample, model, generator=generator)
        first = answer(prompt_ids, prompt_mask, eos=task.first_end, max_new_tokens=task.first_tokens)
        shown = task.second_prompts(prompt_ids, prompt_mask, first)
        second = answer(*shown, eos=task.second_end, max_new_tokens=task.second_tokens)
        asked = torch.full_like(prompt_ids[:, :1], task.instruction)
        before, after, one = torch.zeros_like(first.mask), torch.zeros_like(second.mask), torch.ones_like(asked)
        texts = decode_batch(first.ids, first.mask, task.first_end), decode_batch(second.ids, second.mask)
        r1, r2 = (
            checked_rewards(task.reward, problems, answers, tried.finished)
            for answers, tried in zip(texts, (first, second), strict=True)
        )
        ids = torch.cat([first.ids, asked, second.ids], dim=1)
        mask = torch.cat([first.mask, one, second.mask], dim=1)
        m1 = torch.cat([first.mask, 0 * one, after], dim=1)
        m2 = torch.cat([before, 0 * one, second.mask], dim=1)
        return Attempts(prompt_ids, prompt_mask, ids, mask, m1, m2, texts, r1, r2)

    def figures(self, played: Attempts) -> dict[str, torch.Tensor]:
        """Return E8, the share of second answers that repeat the first, and of those that show columns if they may."""

        def share(rows: list[bool]) -> torch.Tensor:
            return torch.tensor(rows, device=self.device).to(played.r1.dtype).mean()

        final, (first, second) = self.task.final_answer, played.texts
        same = [final(one) == final(two) for one, two in zip(first, second, strict=True)]
        found = {**self_correction_metrics(played.r1, played.r2), "same_answer": share(same)}
        if self.config.task == "unequal":
            found["scratchpad"] = share(["|" in text for text in second])
        return found

    def evaluate(self) -> Metrics:
        """E8 at temperature 1 on held-out problems, the KL of each attempt, and the distance from the base model."""
        played = self.attempt(self.model, self.held_out, self.rng.torch)
        found = self.figures(played)
        kl = token_kl(played.logits(self.model), played.logits(self.reference))
        return {
            **found,
            "kl_t1": (played.m1 * kl).sum(dim=1).mean(),
            "kl_t2": (played.m2 * kl).sum(dim=1).mean(),
            "delta_gain": found["delta"] - self.base["delta"],
            "t1_shift": found["accuracy_t1"] - self.base["accuracy_t1"],
            "not_spoilt": 1 - found["c_to_i"],
        }

    def views(self) -> dict[str, View]:
        played = self.attempt(self.model, self.held_out, self.rng.torch)
        kl = token_kl(played.logits(self.model), played.logits(self.reference))
        rewarded = self.config.method == "score"
        return {
            "flow": self.picture_flow(self.figures(played)),
            "attempts": self.picture_attempts(played),
            **({"credit": self.picture_credit()} if rewarded else {}),
            "distance": self.picture_distance(played, kl),
        }

    def picture_flow(self, now: dict[str, torch.Tensor]) -> View:
        """Draw where the problems go from the first attempt to the second, beside the base model."""
        return Bars(
            title="From the first attempt to the second",
            alt="Shares of held-out problems mended, spoilt, wrong twice and right twice, now and under the base model",
            labels=OUTCOMES,
            values={name: outcomes(figures) for name, figures in {"base model": self.base, "now": now}.items()},
            y_label="share of all problems",
            y_range=(0, 1),
        )

    def picture_attempts(self, played: Attempts) -> View:
        """Draw what is answered to the same problems with the same noise, so that only the weights change it."""
        in_a_line = FORMS[self.config.task].in_a_line
        lines: list[list[str]] = [[] for _ in range(SHOWN // in_a_line)]
        verdicts: list[list[float]] = [[] for _ in lines]
        marks = (2 * played.r1 - 1).unsqueeze(1) * played.m1 + (2 * played.r2 - 1).unsqueeze(1) * played.m2
        rows = zip(self.held_out, played.ids.tolist(), played.mask.tolist(), marks.tolist(), strict=True)
        for number, (problem, ids, mask, row) in enumerate(itertools.islice(rows, SHOWN)):
            written = [t for t, present in enumerate(mask) if present and ids[t] != EOS]
            lines[number // in_a_line] += [*problem.prompt, *(VOCABULARY[ids[t]] for t in written), *"   "]
            verdicts[number // in_a_line] += [0.0] * len(problem.prompt) + [row[t] for t in written] + [0.0] * 3
        return Tokens(
            title="Sixteen sums, each with first attempt ; ? second attempt (blue right, orange wrong)",
            alt="Both attempts at sixteen held-out sums, each coloured by whether it is right",
            lines=lines,
            values=verdicts,
            low=-1.0,
            diverging=True,
        )

    def picture_credit(self) -> View:
        """Draw what each outcome earns in this stage with the present bonus."""
        first = torch.tensor([0.0, 1.0, 0.0, 1.0])  # mended, spoilt, wrong twice, right twice
        second = torch.tensor([1.0, 0.0, 0.0, 1.0])
        gamma = self.config.gamma if self.stage == 2 else 0.0
        credit = attempt_returns(*shaped_rewards(first, second, self.config.alpha, self.stage), gamma)
        return Bars(
            title=f"What each attempt is credited with in Stage {'I' * self.stage}",
            alt="Credit of the first and of the second attempt when a problem is mended, spoilt, wrong or right twice",
            labels=OUTCOMES,
            values=dict(zip(("first attempt", "second attempt"), (values.numpy() for values in credit), strict=True)),
            y_label="reward with bonus",
        )

    def picture_distance(self, played: Attempts, kl: torch.Tensor) -> View:
        """Draw how far each token's distribution is from the base model's, KL [N, T], averaged over problems."""
        means = kl_by_place(played, kl) if self.config.task == "alike" else kl_by_part(played, kl)
        return Bars(
            title="Distance from the base model, by token",
            alt="Mean KL of a token's distribution from the base model's, for both attempts' parts and their ends",
            labels=tuple(means),
            values={"KL": list(means.values())},
            y_label="nats",
        )


def outcomes(figures: dict[str, torch.Tensor]) -> list[float]:
    """Return the shares of `OUTCOMES` that the figures of E8 imply."""
    mended, spoilt, t1 = (float(figures[name]) for name in ("i_to_c", "c_to_i", "accuracy_t1"))
    return [mended, spoilt, 1 - t1 - mended, t1 - spoilt]


def kl_by_place(played: Attempts, kl: torch.Tensor) -> dict[str, float]:
    """Return the mean KL [N, T] of both attempts' digits and ends, which have places of their own; 0 where none is."""
    means: dict[str, float] = {}
    for which, mask in (("1st", played.m1), ("2nd", played.m2)):
        there = mask.sum(dim=0)
        by_place = ((mask * kl).sum(dim=0) / there.clamp(min=1))[there > 0].tolist()
        tens, ones, end = [*by_place, 0.0, 0.0, 0.0][:3]
        means |= {f"{which} tens": tens, f"{which} ones": ones, f"{which} end": end}
    return means


def kl_by_part(played: Attempts, kl: torch.Tensor) -> dict[str, float]:
    """Return the mean KL [N, T] of a token of the columns, the answer and the end of each attempt; 0 where none is."""
    means: dict[str, float] = {}
    for which, mask, end in (("1st", played.m1, TwoAttempts.first_end), ("2nd", played.m2, TwoAttempts.second_end)):
        bars = mask * (played.ids == BAR)
        # Where a bar stands here or later the answer has not begun.
        columns = mask * (bars.flip(1).cumsum(dim=1).flip(1) > 0)
        ends = mask * (played.ids == end)
        parts = {"columns": columns, "answer": mask - columns - ends, "end": ends}
        for name, part in parts.items():
            means[f"{which} {name}"] = float((part * kl).sum() / part.sum().clamp(min=1))
    return means


UNEQUAL = {"task": "unequal", "test_samples": 1}

study = Study(
    claim="Stage I parts the second attempt from the first; with the bonus it goes on mending where naive RL copies.",
    learner=SCoRe,
    # All arms draw as many rollouts, but for the one that ends where the others enter Stage II. Where the attempts are
    # unequal one look at each held-out sum will do, for there are ten times as many and the second attempt is long.
    arms={
        "naive two-turn RL": {"stage1_steps": 0, "stage2_steps": 105, "alpha": 0.0},
        "Stage I": {"stage1_steps": 60, "stage2_steps": 0},
        "Stage II": {"stage1_steps": 0, "stage2_steps": 105},
        "Stage I and II": {},
        "Stage I and II, no bonus": {"alpha": 0.0},
        "STaR": {"method": "star", "stage1_steps": 0, "stage2_steps": 105},
        "unequal: naive two-turn RL": {**UNEQUAL, "stage1_steps": 0, "stage2_steps": 105, "alpha": 0.0},
        "unequal: Stage I and II": {**UNEQUAL},
        "unequal: Stage I and II, no bonus": {**UNEQUAL, "alpha": 0.0},
    },
    criteria=(
        Criterion(
            "collapse",
            "naive two-turn RL ends with the second answer repeating the first in more than 90 % of problems",
            plus=("naive two-turn RL", "same_answer"),
            above=0.9,
        ),
        Criterion(
            "no progress",
            "naive two-turn RL ends with a delta below 0.03",
            plus=("naive two-turn RL", "delta"),
            above=-1.0,
            below=0.03,
        ),
        Criterion(
            "parted",
            "after Stage I, delta is at least 0.10 above the base model's",
            plus=("Stage I", "delta_gain"),
            above=0.10,
        ),
        Criterion(
            "pinned",
            "after Stage I, the first attempt's accuracy is within 0.05 of the base model's",
            plus=("Stage I", "t1_shift"),
            above=-0.05,
            below=0.05,
        ),
        Criterion(
            "progress",
            "after both stages, SCoRe's delta is at least 0.05 above naive two-turn RL's",
            plus=("Stage I and II", "delta"),
            minus=("naive two-turn RL", "delta"),
            above=0.05,
        ),
        Criterion(
            "spoils least",
            "after both stages, SCoRe spoils fewer right first answers than the best of the other arms",
            plus=("Stage I and II", "not_spoilt"),
            minus=(("naive two-turn RL", "Stage II", "Stage I and II, no bonus", "STaR"), "not_spoilt"),
        ),
        Criterion(
            "progress, unequal",
            "with unequal attempts, SCoRe's delta is at least 0.05 above naive two-turn RL's after both stages",
            plus=("unequal: Stage I and II", "delta"),
            minus=("unequal: naive two-turn RL", "delta"),
            above=0.05,
        ),
        Criterion(
            "spoils fewer, unequal",
            "with unequal attempts, SCoRe spoils fewer right first answers than naive two-turn RL",
            plus=("unequal: Stage I and II", "not_spoilt"),
            minus=("unequal: naive two-turn RL", "not_spoilt"),
        ),
    ),
    smoke=Budget(
        seeds=1,
        settings={"prompts": 4, "group": 2, "test_samples": 1, "stage1_steps": 2, "stage2_steps": 2},
        steps=4,
    ),
    fast=Budget(seeds=2, settings={"prompts": 16}, steps=50, arms=("naive two-turn RL", "Stage I")),
    full=Budget(seeds=3, settings={"test_samples": 8}),
)
