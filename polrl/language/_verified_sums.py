"""The world of the chapter's group methods: sums that a tiny language model answers and a program checks.

A world plays a policy (prompts, completions, rewards, log-probabilities), judges it on held-out prompts, and draws the
chapter's pictures. It holds the base model, and never changes: whatever moves belongs to the learner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from polrl import Bars, Heatmap, Tokens, View, equation
from polrl.core.errors import KnobError, unknown_name
from polrl.core.sampling import Generators
from polrl.language._group_policy import entropy, groups_of, token_mean
from polrl.models.causal_lm import Completions, completion_logits, sample, token_log_probs
from polrl.models.tiny_lm import BOS, EOS, PAD, VOCABULARY, decode_batch, encode_batch, load_tiny_lm
from polrl.worlds.text_tasks import Arithmetic, checked_rewards

#: Digits of the summands, and how often they are asked for.
DIGITS = {"add-S": {2: 1.0}, "add-mix-S": {1: 0.3, 2: 0.5, 3: 0.2}, "add-L": {2: 1.0}}
ATTEMPTS = 8  # answers to each held-out prompt
HARD = 2  # a held-out prompt is hard if the base model answers it right so many times of eight, or less often
#: One character for each special token, so that all tokens are as wide as one another.
SHOWN = {PAD: "□", BOS: "◁", EOS: "⏎"}


@dataclass
class Rollouts:
    """A batch of completions, group by group, with what is needed to learn from it more than once.

    Attributes
    ----------
    prompt_ids, prompt_mask : Tensor, int64 [N, P]
    ids : Tensor, int64 [N, T]
    mask : Tensor [N, T]
        1 on real tokens, the end token included.
    rewards : Tensor [N]
    old_logp, ref_logp : Tensor [N, T]
        Under the policy that sampled (which the first update on the batch fills in), and under the base model; both
        at the sampling temperature.
    temperature : float
        At which the completions were sampled.
    group_size : int
        Rows of one prompt, which is read once for all of them.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor
    rewards: torch.Tensor
    old_logp: torch.Tensor
    ref_logp: torch.Tensor
    temperature: float
    group_size: int = 1

    def logits(self, model: torch.nn.Module) -> torch.Tensor:
        """Return a model's logits for each token [N, T, V], at the temperature of the samples."""
        prompts = self.prompt_ids[:: self.group_size], self.prompt_mask[:: self.group_size]
        logits = completion_logits(model, *prompts, self.ids, self.mask, repeats=self.group_size)
        return logits / self.temperature


@equation(
    "pass@k", r"\mathrm{pass@}k=1-\binom{n-c}{k}\Big/\binom nk", source="unbiased, from c right answers among n >= k"
)
def pass_at_k(right: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Return the chance [...] that k answers hold a right one, if `right` [...] of n answers were right.

    Raises
    ------
    ValueError
        If k is not from 1 to n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k must be from 1 to n={n}, got {k!r}")
    places = torch.arange(k, device=right.device, dtype=right.dtype)
    return 1 - ((n - right.unsqueeze(-1) - places).clamp(min=0) / (n - places)).prod(dim=-1)


@equation(
    "KL",
    r"\mathrm{KL}_{i,t}=\sum_v\pi_\theta(v|\cdot)\log\frac{\pi_\theta(v|\cdot)}{\pi_{ref}(v|\cdot)}",
    source="textbook: what B20 and B21 estimate",
)
def token_kl(logits: torch.Tensor, ref_logits: torch.Tensor) -> torch.Tensor:
    """Return the KL divergence from the reference at each place [...], exactly, from full logits [..., V]."""
    log_pi, log_ref = torch.log_softmax(logits, dim=-1), torch.log_softmax(ref_logits, dim=-1)
    return (log_pi.exp() * (log_pi - log_ref)).sum(dim=-1)


class VerifiedSums:
    """Sums of two digits (`add-S`, `add-L`) or of one to three (`add-mix-S`), and a model that half knows them.

    Parameters
    ----------
    checkpoint : str
        The base model, one of `DIGITS`; it decides the task.
    prompts, group_size : int
        Prompts of a batch, and completions of each; N = prompts * group_size.
    t_max : int
        Tokens of a completion, at most; a longer one is cut off and earns 0.
    held_out : int
        Prompts on which a policy is judged, as many of each number of digits.
    rng : Generators
        Draws the held-out prompts.
    seed : int
        Of the noise under which policies are judged, the same for all of them.
    device : torch.device

    Attributes
    ----------
    group : Tensor, int64 [N]
        The prompt of each row of a batch.
    hard : Tensor, bool [M]
        Which of the M held-out prompts the base model answers right two times of eight or less often.
    base_figures : dict of str to Tensor
        What `judge` says of the base model.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        prompts: int,
        group_size: int,
        t_max: int,
        held_out: int,
        rng: Generators,
        seed: int,
        device: torch.device,
    ) -> None:
        if checkpoint not in DIGITS:
            raise unknown_name("checkpoint", checkpoint, DIGITS)
        self.digits = tuple(DIGITS[checkpoint])
        if held_out < len(self.digits):
            raise KnobError(
                f"held_out must be {len(self.digits)} or more, a prompt each number of digits, got {held_out}"
            )
        self.checkpoint, self.device, self.seed = checkpoint, device, seed
        self.prompts, self.group_size, self.t_max = prompts, group_size, t_max
        self.task = Arithmetic("+", DIGITS[checkpoint])
        self.group = groups_of(prompts, group_size, device)
        self.base = load_tiny_lm(checkpoint, device).eval().requires_grad_(False)
        each = held_out // len(self.digits)
        self.test = [p for n in self.digits for p in Arithmetic("+", n).prompts(each, rng.numpy, "test")]
        self.shown = [self.test[i * len(self.test) // 24] for i in range(24)]
        # With the noise of `judge`: what the base model is hardly able to do, before anything was learned.
        # Judged as a policy is, with weights that take gradients: torch multiplies others by another routine on some
        # processors, and a policy that has learned nothing would gain a rounding error.
        start = self.new_policy()
        self.hard = self.attempt(start)[-1].sum(dim=1) <= HARD
        self.base_figures = self.judge(start)

    def new_policy(self) -> torch.nn.Module:
        """Return a policy that starts as the base model."""
        return load_tiny_lm(self.checkpoint, self.device)

    def play(self, policy: torch.nn.Module, temperature: float, rng: Generators) -> Rollouts:
        """Let a policy answer new prompts, `group_size` times each, and check the answers."""
        prompts, group_size = self.task.prompts(self.prompts, rng.numpy), self.group_size
        problems = [p for p in prompts for _ in range(group_size)]
        ids, mask = encode_batch([p.prompt for p in prompts], device=self.device)
        done = sample(
            policy, ids, mask, max_new_tokens=self.t_max, generator=rng.torch, temperature=temperature,
            repeats=group_size,
        )  # fmt: skip
        ids, mask = (x.repeat_interleave(group_size, dim=0) for x in (ids, mask))
        rewards = checked_rewards(self.task.reward, problems, decode_batch(done.ids, done.mask), done.finished)
        none = torch.zeros_like(done.mask)
        rollouts = Rollouts(ids, mask, done.ids, done.mask, rewards, none, none, temperature, group_size)
        with torch.no_grad():
            rollouts.ref_logp = token_log_probs(rollouts.logits(self.base), done.ids)
        return rollouts

    def attempt(self, policy: torch.nn.Module) -> tuple[Completions, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Let a policy answer the M held-out prompts at temperature 1, always with the same noise.

        Returns
        -------
        completions : Completions, of 8 M rows
        prompt_ids, prompt_mask : Tensor [M, P]
        right : Tensor [M, 8]
        """
        problems = [p for p in self.test for _ in range(ATTEMPTS)]
        ids, mask = encode_batch([p.prompt for p in self.test], device=self.device)
        noise = Generators(self.seed, self.device, "judge").torch
        done = sample(policy, ids, mask, max_new_tokens=self.t_max, generator=noise, repeats=ATTEMPTS)
        right = self.task.reward(problems, decode_batch(done.ids, done.mask), done.finished)
        return done, ids, mask, right.reshape(-1, ATTEMPTS)

    @torch.no_grad()
    def judge(self, policy: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return a policy's figures on the held-out prompts, at temperature 1.

        Returns
        -------
        dict
            accuracy, also on the hard prompts, and by digits if there are several; pass_at_8; mean_entropy, mean_kl
            (exact, from the base model) and mean_tokens of a completion.
        """
        done, ids, mask, right = self.attempt(policy)
        logits, base = (
            completion_logits(m, ids, mask, done.ids, done.mask, repeats=ATTEMPTS) for m in (policy, self.base)
        )
        figures = {
            "accuracy": right.mean(),
            "accuracy_on_hard": token_mean(right, self.hard.unsqueeze(1).expand(right.shape)),
            "pass_at_8": pass_at_k(right.sum(dim=1), ATTEMPTS, 8).mean(),
            "mean_entropy": token_mean(entropy(logits), done.mask),
            "mean_kl": token_mean(token_kl(logits, base), done.mask),
            "mean_tokens": done.mask.sum(dim=1).mean(),
        }
        if len(self.digits) > 1:
            by_digits = right.reshape(len(self.digits), -1).mean(dim=1)
            figures |= {f"accuracy_{n}_digits": by_digits[i] for i, n in enumerate(self.digits)}
        return figures

    # ---- pictures --------------------------------------------------------------------------------------------

    def pictures(
        self, policy: torch.nn.Module, rollouts: Rollouts, before: torch.Tensor, adv: torch.Tensor, rng: Generators
    ) -> dict[str, View]:
        """Draw the state of a learner.

        Parameters
        ----------
        policy : Module
        rollouts : Rollouts
            The latest batch.
        before : Tensor [N, T]
            Log-probabilities of its tokens before the latest update.
        adv : Tensor [N]
            Its advantages.
        rng : Generators
            That of `views`, which starts alike each time.
        """
        change = (token_log_probs(rollouts.logits(policy), rollouts.ids) - before) * rollouts.mask
        return {
            "answers": self.picture_answers(policy, rollouts.temperature, rng),
            "update": self.picture_update(rollouts, change),
            "groups": self.picture_groups(rollouts, adv),
            **self.picture_references(policy),
        }

    def picture_answers(self, policy: torch.nn.Module, temperature: float, rng: Generators) -> Tokens:
        """Draw sampled answers to held-out prompts, right or wrong; the noise is the same each time."""
        ids, mask = encode_batch([p.prompt for p in self.shown], device=self.device)
        done = sample(policy, ids, mask, max_new_tokens=self.t_max, generator=rng.torch, temperature=temperature)
        right = self.task.reward(self.shown, decode_batch(done.ids, done.mask), done.finished)
        values = (2 * right - 1).unsqueeze(1).expand(done.ids.shape)
        return token_picture(
            "Sampled answers: right (blue) or wrong (orange), always with the same noise",
            "Twenty-four sampled answers to held-out prompts, blue where right and orange where wrong",
            [p.prompt for p in self.shown],
            done.ids,
            done.mask,
            values,
            in_a_line=4,
            diverging=True,
        )

    def picture_update(self, rollouts: Rollouts, change: torch.Tensor) -> Tokens:
        """Draw the change of the log-probability of what was sampled by the latest update: groups that differ first."""
        rewards = rollouts.rewards.reshape(self.prompts, self.group_size)
        order = (rewards.std(dim=1, correction=0) > 0).to(torch.int64).argsort(descending=True, stable=True)[:6]
        rows = (
            order.unsqueeze(1) * self.group_size + torch.arange(min(self.group_size, 8), device=self.device)
        ).flatten()
        texts = decode_batch(rollouts.prompt_ids[rows], rollouts.prompt_mask[rows], eos=-1)
        heads = [t.removeprefix("<bos>") if i % min(self.group_size, 8) == 0 else "" for i, t in enumerate(texts)]
        return token_picture(
            "The latest update pushed these tokens up (blue) and down (orange); a line for a prompt",
            "Completions of up to six prompts, each token coloured by the change of its log-probability (to 0.5 nats)",
            heads,
            rollouts.ids[rows],
            rollouts.mask[rows],
            change[rows],
            in_a_line=min(self.group_size, 8),
            diverging=True,
            reach=0.5,
        )

    def picture_groups(self, rollouts: Rollouts, adv: torch.Tensor) -> Heatmap:
        """Draw the advantages of the latest batch, a row for a prompt, the best answers to the left."""
        values = adv.reshape(self.prompts, self.group_size).sort(dim=1, descending=True).values
        texts = decode_batch(rollouts.prompt_ids[:: self.group_size], rollouts.prompt_mask[:: self.group_size], eos=-1)
        return Heatmap(
            title="Advantages: groups that agree are white",
            alt="Advantage of each answer, sorted within its prompt's row; rows whose answers earn the same are white",
            values=values.cpu().numpy(),
            row_labels=[text.removeprefix("<bos>") for text in texts],
            x_label="answers to the prompt, the best first",
            low=-3.0,
            high=3.0,
            diverging=True,
        )

    def picture_references(self, policy: torch.nn.Module) -> dict[str, View]:
        """Draw the probability of each character of right answers, and entropy and KL by its place."""
        problems = self.shown
        ids, mask = encode_batch([p.prompt for p in problems], device=self.device)
        answers, real = encode_batch([p.answer for p in problems], device=self.device, left_pad=False, bos=False)
        end = torch.full_like(answers[:, :1], EOS)
        ids_out = torch.cat([answers, end * 0], dim=1).scatter(1, real.sum(dim=1, keepdim=True), end)
        real = torch.cat([torch.ones_like(end), real], dim=1)
        logits, base = (completion_logits(m, ids, mask, ids_out, real) for m in (policy, self.base))
        places = ["1st", "2nd", "3rd", "4th", "5th"][: real.shape[1] - 1]
        by_place = [
            ((values * real).sum(dim=0) / real.sum(dim=0))[: len(places)].cpu().numpy()
            for values in (entropy(logits), token_kl(logits, base))
        ]
        return {
            "right_answers": token_picture(
                "Probability of each token of the right answer, white to dark",
                "Twenty-four right answers to held-out prompts, each token the darker the likelier it is",
                [p.prompt for p in problems],
                ids_out,
                real,
                token_log_probs(logits, ids_out).exp(),
                in_a_line=4,
            ),
            "by_place": Bars(
                title="By place in the right answer",
                alt="For each place in the answer, the policy's entropy and its divergence from the base model",
                labels=places,
                values=dict(zip(("entropy", "KL from the base"), by_place, strict=True)),
                y_label="nats",
                y_range=(0.0, 1.5),
            ),
        }


def token_picture(
    title: str,
    alt: str,
    heads: Sequence[str],
    ids: torch.Tensor,
    mask: torch.Tensor,
    values: torch.Tensor,
    *,
    in_a_line: int,
    diverging: bool = False,
    reach: float = 1.0,
) -> Tokens:
    """Return a picture of N completions whose tokens are coloured, after heads (prompts) that are not.

    Parameters
    ----------
    heads : sequence of str
        What is written before each completion.
    ids, mask, values : Tensor, [N, T]
        Tokens, 1 where they are real, and the number that colours each.
    in_a_line : int
        Completions in one line.
    diverging : bool
        True for signed values, from -reach to reach; otherwise from 0 to reach.
    """
    pieces: list[tuple[list[str], list[float]]] = []
    for head, tokens, present, colours in zip(heads, ids.tolist(), mask.tolist(), values.tolist(), strict=True):
        real = [(SHOWN.get(t, VOCABULARY[t]), c) for t, m, c in zip(tokens, present, colours, strict=True) if m]
        pieces.append(([*head, *(text for text, _ in real)], [*(0.0 for _ in head), *(number for _, number in real)]))
    widths = [max(map(len, (text for text, _ in pieces[column::in_a_line])), default=0) for column in range(in_a_line)]
    for i, (text, numbers) in enumerate(pieces):
        text.append(" " * (widths[i % in_a_line] - len(text) + 2))  # columns stand one below the other
        numbers.append(0.0)
    rows = [pieces[i : i + in_a_line] for i in range(0, len(pieces), in_a_line)]
    return Tokens(
        title=title,
        alt=alt,
        lines=[[token for text, _ in row for token in text] for row in rows],
        values=[[number for _, numbers in row for number in numbers] for row in rows],
        low=-reach if diverging else 0.0,
        high=reach,
        diverging=diverging,
    )
