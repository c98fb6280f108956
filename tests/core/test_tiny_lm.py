"""The tiny language model: characters, sizes, checkpoints."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polrl.core.errors import DataError, UnknownNameError
from polrl.core.files import sha256
from polrl.core.sampling import seeded_globals
from polrl.models import tiny_lm
from polrl.models.tiny_lm import (
    BOS,
    CHARACTERS,
    EOS,
    PAD,
    SIZES,
    VOCABULARY,
    checkpoint_names,
    decode,
    decode_batch,
    encode,
    encode_batch,
    load_tiny_lm,
    make_tokenizer,
    new_tiny_lm,
    read_manifest,
    weights_for_file,
)
from polrl.worlds.text_tasks import Arithmetic, SelfCorrection, UnequalAttempts

DATA = Path(__file__).resolve().parents[2] / "data"
FOLDER = DATA / "tiny_lm"


@pytest.fixture(scope="module")
def script() -> types.ModuleType:
    """Return data/make_tiny_lm.py as a module."""
    spec = importlib.util.spec_from_file_location("make_tiny_lm", DATA / "make_tiny_lm.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make the loader read a copy of the checkpoints, which a test may damage."""
    folder = Path(shutil.copytree(FOLDER, tmp_path / "tiny_lm"))
    monkeypatch.setattr(tiny_lm, "find_asset", lambda relative: folder)
    yield folder


# ---- characters ------------------------------------------------------------------------------------------------


def test_vocabulary_is_that_of_the_card() -> None:
    assert VOCABULARY[:3] == ("<pad>", "<bos>", "<eos>") and (PAD, BOS, EOS) == (0, 1, 2)
    assert "".join(VOCABULARY[3:]) == "0123456789+-*/=(),;:|#?>. abcdefghijklmnopqrstuvwxyz"
    assert len(VOCABULARY) == len(set(VOCABULARY)) == 55


def test_every_character_makes_the_round_trip() -> None:
    assert decode(encode(CHARACTERS)) == CHARACTERS
    assert encode("") == [] and decode([]) == ""
    assert decode(torch.tensor([BOS, *encode("1 + 2"), EOS, PAD])) == "1 + 2"


@pytest.mark.parametrize(("text", "words"), [("3×5", "'×' at position 1"), ("A", "'A' at position 0"), ("1\n", r"\\n")])
def test_foreign_character_is_refused(text: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        encode(text)


@pytest.mark.parametrize("token", [-1, 55])
def test_foreign_token_is_refused(token: int) -> None:
    with pytest.raises(DataError, match=f"no token {token} .position 1"):
        decode([5, token])


def test_batches_are_padded_on_the_side_that_was_asked_for() -> None:
    ids, mask = encode_batch(["12", "3"], device="cpu")
    assert ids.tolist() == [[BOS, 4, 5], [PAD, BOS, 6]] and mask.tolist() == [[1, 1, 1], [0, 1, 1]]
    ids, mask = encode_batch(["12", "3"], device="cpu", left_pad=False, bos=False)
    assert ids.tolist() == [[4, 5], [6, PAD]] and mask.tolist() == [[1, 1], [1, 0]]
    ids, mask = encode_batch(["12", "34"], device="cpu")
    assert ids.tolist() == [[BOS, 4, 5], [BOS, 6, 7]] and mask.all() and ids.dtype == torch.int64


def test_empty_batches_are_refused() -> None:
    with pytest.raises(DataError, match="at least one"):
        encode_batch([], device="cpu")
    with pytest.raises(DataError, match="text 1 is empty"):
        encode_batch(["1", ""], device="cpu", bos=False)
    assert encode_batch([""], device="cpu")[0].tolist() == [[BOS]]


def test_completions_show_what_a_verifier_must_not_overlook() -> None:
    ids = torch.tensor([[4, 5, EOS, PAD], [4, BOS, 5, EOS], [EOS, PAD, PAD, PAD], [4, 5, 6, 7], [4, PAD, EOS, PAD]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]).float()
    assert decode_batch(ids, mask) == ["12", "1<bos>2", "", "1234", "1<pad>"]
    semicolon = encode(";")[0]
    row = torch.tensor([[4, semicolon, semicolon], [4, EOS, semicolon]])
    assert decode_batch(row, torch.ones(2, 3), semicolon) == ["1;", "1<eos>"]


def test_tokenizer_agrees_with_the_dictionary(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    made = make_tokenizer()
    made.save_pretrained(tmp_path)
    for tokenizer in (made, PreTrainedTokenizerFast.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert len(tokenizer) == 55
        assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (PAD, BOS, EOS)
        for text in ("37+85=|ab c", CHARACTERS, " ", "a  b"):
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == encode(text)
            assert tokenizer.decode(encode(text)) == text
        assert tokenizer("<bos>12<eos>", add_special_tokens=False)["input_ids"] == [BOS, 4, 5, EOS]
        padded = tokenizer(["12", "3"], padding=True, add_special_tokens=False)
        assert padded["input_ids"] == [[4, 5], [PAD, 6]] and padded["attention_mask"] == [[1, 1], [0, 1]]


def test_text_becomes_tokens_without_transformers() -> None:
    program = (
        "import sys, polrl.models.causal_lm, polrl.worlds.text_tasks, polrl.worlds.corridor\n"
        "from polrl.models.tiny_lm import *\n"
        "assert decode(encode('1+1=')) == '1+1=' and checkpoint_names()\n"
        "assert 'transformers' not in sys.modules and 'tokenizers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# ---- sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "parameters"), [("S", 134_912), ("M", 226_944), ("ML", 433_664), ("L", 860_160)])
def test_sizes(size: str, parameters: int) -> None:
    model = new_tiny_lm(size)
    assert model.num_parameters() == parameters
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model(torch.zeros(1, 128, dtype=torch.long)).logits.shape == (1, 128, 55)


def test_unknown_size_is_refused() -> None:
    assert set(SIZES) == {"S", "M", "ML", "L"}
    with pytest.raises(UnknownNameError, match="XL.*did you mean L"):
        new_tiny_lm("XL")


def test_weights_follow_the_global_generator() -> None:
    drawn = []
    for seed in (0, 0, 1):
        with seeded_globals(seed):
            drawn.append(torch.cat([p.detach().reshape(-1) for p in new_tiny_lm().parameters()]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


# ---- checkpoints -----------------------------------------------------------------------------------------------


def test_manifest_names_the_files_that_lie_beside_it() -> None:
    manifest = read_manifest()
    assert manifest["title"]
    for entry in manifest["checkpoints"].values():
        assert {"size", "task", "recipe", "steps", "seed", "measured"} <= set(entry)
        assert {"sampled", "greedy", "prompts"} <= set(entry["measured"])
    for name, digest in manifest["files"].items():
        assert sha256((FOLDER / name).read_bytes()) == digest
    assert {file.name for file in FOLDER.iterdir()} == {"manifest.json", *manifest["files"]}
    assert {entry["file"] for entry in manifest["checkpoints"].values()} == set(manifest["files"])


def test_checkpoints_are_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 6_000_000


@pytest.mark.parametrize("name", checkpoint_names())
def test_checkpoint_does_what_its_manifest_says(name: str, script: types.ModuleType) -> None:
    model, entry, recipe = load_tiny_lm(name), read_manifest()["checkpoints"][name], script.RECIPES[name]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.num_parameters() == entry["parameters"]
    assert recipe.task == entry["task"] and recipe.how == entry["recipe"]
    prompts = 256
    measured = recipe.measure(model, 1.0, prompts)
    for figure, value in entry["measured"]["sampled"].items():
        spread = 4 * (max(value * (1 - value), 0.02) / prompts) ** 0.5
        assert abs(measured[figure] - value) < spread, figure
    for figure, (low, high) in recipe.goal.items():
        assert low - 0.05 <= entry["measured"]["sampled"][figure] <= high + 0.05, figure


def test_scratchpad_model_errs_at_first_mostly_copies_and_sometimes_works(script: types.ModuleType) -> None:
    """What its study needs, whatever the recipe's goal says: room above the first attempt, and a way to fill it."""
    measured = script.measure_scratch(load_tiny_lm("scratch-S"), 1.0, 512)
    assert 0.15 < measured["t1"] < 0.45
    assert measured["t1"] - 0.05 < measured["t2"] < 0.55
    assert 0.15 < measured["scratchpad"] < 0.5
    assert measured["scratchpad right"] > measured["t1"]


def test_loading_leaves_the_global_generator_alone_and_shares_nothing() -> None:
    name = checkpoint_names()[0]
    before = torch.get_rng_state()
    first, second = load_tiny_lm(name), load_tiny_lm(name)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        first.model.norm.weight.add_(1)
    assert not torch.equal(first.model.norm.weight, second.model.norm.weight)


def test_unknown_checkpoint_gets_the_nearest_names() -> None:
    with pytest.raises(UnknownNameError, match="did you mean .*add-S"):
        load_tiny_lm("ad-S")


def test_single_flipped_bit_and_truncation_are_refused(copied: Path) -> None:
    name = checkpoint_names()[0]
    file = copied / f"{name}.safetensors"
    content = bytearray(file.read_bytes())
    content[100_000] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="truncated or altered"):
        load_tiny_lm(name)
    file.write_bytes(content[:-1])
    with pytest.raises(DataError, match="truncated or altered"):
        load_tiny_lm(name)
    file.unlink()
    with pytest.raises(DataError, match="can't be read"):
        load_tiny_lm(name)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"checkpoints": {"a": {}}, "files": {}}', '{"checkpoints": 3}'])
def test_damaged_manifest_is_refused(copied: Path, text: str) -> None:
    (copied / "manifest.json").write_text(text)
    with pytest.raises(DataError, match="README"):
        load_tiny_lm("add-S")


def test_file_of_another_size_is_refused(copied: Path) -> None:
    name = checkpoint_names()[0]
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["checkpoints"][name]["size"] = "M"
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="not a model of size M"):
        load_tiny_lm(name)
    manifest["checkpoints"][name]["size"] = "XXL"
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="README"):
        load_tiny_lm(name)


def test_file_that_lacks_weights_or_is_no_safetensors_is_refused(copied: Path) -> None:
    import safetensors.torch

    name = checkpoint_names()[0]
    file = copied / f"{name}.safetensors"
    manifest = json.loads((copied / "manifest.json").read_text())
    weights = safetensors.torch.load(file.read_bytes())
    weights.pop("model.norm.weight")
    for content, words in ((safetensors.torch.save(weights), "model.norm.weight"), (b"pickle", "not a model")):
        file.write_bytes(content)
        manifest["files"][file.name] = sha256(content)
        (copied / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(DataError, match=words):
            load_tiny_lm(name)


# ---- the script ------------------------------------------------------------------------------------------------


def test_answers_and_their_end_count_and_nothing_else(script: types.ModuleType) -> None:
    ids, labels = script.answers_batch([Arithmetic().problem(37, 85, "+", 2), Arithmetic().problem(1, 2, "+", 2)])
    assert ids.tolist() == [[BOS, *encode("37+85=122"), EOS], [BOS, *encode("01+02=3"), EOS, PAD, PAD]]
    assert labels.tolist() == [
        [*[-100] * 7, *encode("122"), EOS],
        [*[-100] * 7, *encode("3"), EOS, -100, -100],
    ]


def test_attempts_are_thirteen_tokens_and_the_instruction_does_not_count(script: types.ModuleType) -> None:
    problems = SelfCorrection().problems("train")[:1]
    ids, labels = script.attempts_batch(problems, ["41"], ["42"])
    assert decode(ids[0]) == f"{problems[0].prompt}41;?42"
    assert ids.shape == (1, 13) and int(ids[0, -1]) == EOS
    kept = labels[0] != -100
    assert decode(ids[0][kept]) == "41;42" and torch.equal(ids[0][kept], labels[0][kept])


def test_attempts_of_unequal_lengths_are_padded_and_padding_does_not_count(script: types.ModuleType) -> None:
    problems = [p for p in UnequalAttempts().problems("train") if p.numbers in ((10, 12), (37, 86))]
    ids, labels = script.attempts_batch(problems, ["20", "123"], [problems[0].answer, "123"])
    assert [decode(row) for row in ids] == ["10+12=20;?0+2+0:2,1+1+0:2|22", "37+86=123;?123"]
    for row, label, kept in zip(ids, labels, ["20;0+2+0:2,1+1+0:2|22", "123;123"], strict=True):
        assert label[label != -100].tolist() == [*encode(kept), EOS]
        assert torch.equal(row[label != -100], label[label != -100])


def test_wrong_first_attempts_of_the_scratchpad_are_shown_and_not_taught(
    script: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[Any] = []
    monkeypatch.setattr(script, "fit", lambda model, batch, **_: batches.append(batch()) or 0)
    script.make_scratch(None, np.random.default_rng(0))
    wrong, copied, kinds = 0, 0, set()
    for ids, label in zip(*batches[0], strict=True):
        prompt, _, rest = decode(ids).partition("=")
        first, _, second = rest.partition(";?")
        total = str(sum(map(int, prompt.split("+"))))
        taught = decode(label[label != -100])
        assert taught == (f"{first};{second}" if first == total else second)
        assert second == first or second.rpartition("|")[2] == total
        wrong, copied = wrong + (first != total), copied + (second == first)
        kinds.add((first == total, second == first))
    assert len(kinds) == 4 and 30 < wrong < 66 and 45 < copied < 80


def test_training_repeats_itself_and_stops_when_it_is_done(script: types.ModuleType) -> None:
    weights = []
    for _ in range(2):
        with seeded_globals(0):
            model = new_tiny_lm()
        rng = np.random.default_rng(0)
        steps = script.fit(
            model, lambda: script.answers_batch(Arithmetic().prompts(8, rng)), steps=9, rate=1e-3,  # noqa: B023
            done=lambda: True, every=3,
        )  # fmt: skip
        assert steps == 3
        weights.append(weights_for_file(model))
    assert weights[0] == weights[1]
    with pytest.raises(script.GoalMissedError, match="within 2 steps"):
        script.fit(model, lambda: script.answers_batch(Arithmetic().prompts(8, rng)), steps=2, rate=1e-3, done=bool)


def test_script_writes_a_checkpoint_that_loads(
    script: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = script.sums("S", "+", {1: 1.0}, {"+ 1 digits": (0.0, 1.0)}, rate=1e-3)
    quick = script.Recipe(
        "S", "t", "h", lambda model, rng: 7, lambda model, t, n: {"x": shown.measure(model, t, 8)}, {}
    )
    monkeypatch.setattr(script, "RECIPES", {"one-S": quick, "two-S": quick})
    script.main(["one-S", "--out", str(tmp_path)])
    script.main(["two-S", "--out", str(tmp_path), "--seed", "1"])
    monkeypatch.setattr(tiny_lm, "find_asset", lambda relative: tmp_path)
    assert checkpoint_names() == ("one-S", "two-S")
    with seeded_globals(1):
        expected = new_tiny_lm().half().float()
    for name, parameter in load_tiny_lm("two-S").named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name))
    assert read_manifest()["checkpoints"]["two-S"]["steps"] == 7
    with pytest.raises(SystemExit):
        script.main(["three-S", "--out", str(tmp_path)])
    assert "did you mean" in capsys.readouterr().err


def test_measured_as_written(script: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    recipe = script.Recipe("S", "t", "h", lambda model, rng: 0, lambda model, t, n: seen.append(model) or {}, {})
    monkeypatch.setattr(script, "RECIPES", {"x-S": recipe})
    script.build("x-S", tmp_path, 0)
    assert all(torch.equal(p, p.half().float()) for p in seen[0].parameters())
