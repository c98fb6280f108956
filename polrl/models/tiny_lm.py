"""The tiny language model: a Llama of 135,000 to 861,000 parameters over single characters, and its checkpoints.

Small enough to be trained by reinforcement on a laptop's CPU within seconds, and a true `LlamaForCausalLM` with a
true tokenizer, so that what is written for it runs on a large model unchanged. The checkpoints in `data/tiny_lm`
can already do half of a task, which is where reinforcement learning begins; `data/make_tiny_lm.py` made them.

`transformers` takes seconds to import: text becomes tokens here without it, and it is loaded with the first model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from polrl.core.errors import DataError, unknown_name
from polrl.core.files import find_asset, read_checked
from polrl.core.sampling import seeded_globals

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

CHARACTERS = "0123456789+-*/=(),;:|#?>. abcdefghijklmnopqrstuvwxyz"
VOCABULARY: tuple[str, ...] = ("<pad>", "<bos>", "<eos>", *CHARACTERS)
PAD, BOS, EOS = 0, 1, 2
CONTEXT = 128  # tokens

_INDEX = {token: index for index, token in enumerate(VOCABULARY)}


@dataclass(frozen=True)
class Size:
    """Width, depth and feed-forward width of a tiny language model; all have four attention heads."""

    hidden: int
    layers: int
    intermediate: int


SIZES = {
    "S": Size(64, 2, 256),  # 134,912 parameters: the fast forms
    "M": Size(96, 2, 256),  # 226,944
    "ML": Size(128, 2, 384),  # 433,664
    "L": Size(128, 4, 384),  # 860,160: the full forms
}


# ---- text and tokens -------------------------------------------------------------------------------------------


def encode(text: str) -> list[int]:
    """Return the token of each character, without a beginning or an end.

    Raises
    ------
    DataError
        If a character is not in the vocabulary.

    Examples
    --------
    >>> encode("7+5=")
    [10, 13, 8, 17]
    """
    try:
        return [_INDEX[character] for character in text]
    except KeyError as missing:
        character = missing.args[0]
        raise DataError(
            f"the character {character!r} at position {text.index(character)} of {text!r} is not in the tiny "
            f"vocabulary; allowed: {CHARACTERS!r}"
        ) from None


def decode(ids: Iterable[int] | torch.Tensor) -> str:
    """Return the text of some tokens, in which `<pad>`, `<bos>` and `<eos>` are left out; undoes `encode`.

    Raises
    ------
    DataError
        If there is no such token.
    """
    return "".join(VOCABULARY[token] for token in _checked_tokens(ids) if token > EOS)


def _checked_tokens(ids: Iterable[int] | torch.Tensor) -> list[int]:
    tokens = ids.tolist() if isinstance(ids, torch.Tensor) else [int(token) for token in ids]
    for position, token in enumerate(tokens):
        if not 0 <= token < len(VOCABULARY):
            raise DataError(f"there is no token {token} (position {position}); allowed: 0 to {len(VOCABULARY) - 1}")
    return tokens


def encode_batch(
    texts: Sequence[str], *, device: str | torch.device, left_pad: bool = True, bos: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens of several texts, padded to the longest one.

    Parameters
    ----------
    texts : sequence of str
        N texts.
    device : str or torch.device
        Where the tensors shall lie.
    left_pad : bool
        Put the padding before the text, as prompts need it: sampling goes on at the right end.
    bos : bool
        Let each text begin with `<bos>`.

    Returns
    -------
    ids : Tensor, int64 [N, P]
    mask : Tensor, int64 [N, P]
        1 on real tokens, 0 on padding.

    Raises
    ------
    DataError
        If there is no text, a text without any token, or a character outside the vocabulary.
    """
    rows = [[BOS, *encode(text)] if bos else encode(text) for text in texts]
    if not rows:
        raise DataError("texts is empty; at least one text is needed")
    if not all(rows):
        raise DataError(f"text {[len(row) for row in rows].index(0)} is empty, and without <bos> it has no token")
    width = max(map(len, rows))
    if all(len(row) == width for row in rows):
        ids = torch.tensor(rows, device=device)
        return ids, torch.ones_like(ids)
    gaps = [[PAD] * (width - len(row)) for row in rows]
    padded = [gap + row if left_pad else row + gap for row, gap in zip(rows, gaps, strict=True)]
    present = [[0] * len(gap) + [1] * len(row) if left_pad else [1] * len(row) + [0] * len(gap)
               for row, gap in zip(rows, gaps, strict=True)]  # fmt: skip
    return torch.tensor(padded, device=device), torch.tensor(present, device=device)


def decode_batch(ids: torch.Tensor, mask: torch.Tensor, eos: int = EOS) -> list[str]:
    """Return the text of each completion: what a verifier reads.

    Parameters
    ----------
    ids : Tensor, int64 [N, T]
        Sampled tokens.
    mask : Tensor [N, T]
        1 on real tokens.
    eos : int
        The token that ended the completions; it is left out at the end of a text, and only there.

    Returns
    -------
    list of str
        Other special tokens are written out (`<bos>`), so that no verifier takes them for nothing.
    """
    texts = []
    for row, present in zip(ids.tolist(), mask.tolist(), strict=True):
        tokens = _checked_tokens([token for token, real in zip(row, present, strict=True) if real])
        if tokens and tokens[-1] == eos:
            tokens.pop()
        texts.append("".join(VOCABULARY[token] for token in tokens))
    return texts


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return the same characters as a tokenizer of `transformers`, which can be saved and loaded offline."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = tokenizers.Tokenizer(models.WordLevel(dict(_INDEX), unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


# ---- models ----------------------------------------------------------------------------------------------------


def new_tiny_lm(size: str = "S") -> LlamaForCausalLM:
    """Return an untrained model on the CPU; its weights are drawn from torch's global generator.

    A learner calls this in `setup()`, which seeds that generator and puts it back.

    Parameters
    ----------
    size : {"S", "M", "ML", "L"}

    Raises
    ------
    UnknownNameError
        If there is no such size.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if size not in SIZES:
        raise unknown_name("size of the tiny language model", size, SIZES)
    shape = SIZES[size]
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=shape.intermediate,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )


def read_manifest() -> dict[str, Any]:
    """Return what is known about the checkpoints: size, task, recipe, steps, seed, measured accuracies.

    Raises
    ------
    FileNotFoundError
        If the checkpoints are not there.
    DataError
        If the manifest was truncated or altered.
    """
    path = find_asset("data/tiny_lm") / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        if not all(entry["size"] in SIZES and entry["file"] in manifest["files"]
                   for entry in manifest["checkpoints"].values()):  # fmt: skip
            raise ValueError("it names a size or a file that does not exist")
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} can't be read ({error!r}); data/README.md says how to make it") from error
    return manifest


def checkpoint_names() -> tuple[str, ...]:
    """Return the names of the checkpoints that `load_tiny_lm` knows."""
    return tuple(sorted(read_manifest()["checkpoints"]))


def load_tiny_lm(name: str, device: str | torch.device = "cpu") -> LlamaForCausalLM:
    """Load a checkpoint that comes with polrl, as a model of its own, in float32.

    Parameters
    ----------
    name : str
        One of `checkpoint_names()`: the task and the size, such as "add-S".
    device : str or torch.device

    Raises
    ------
    UnknownNameError
        If there is no such checkpoint; the nearest names are given.
    FileNotFoundError
        If the checkpoints are not there.
    DataError
        If a file was truncated or altered.

    Examples
    --------
    >>> load_tiny_lm("add-S").num_parameters()
    134912
    """
    manifest = read_manifest()
    if name not in manifest["checkpoints"]:
        raise unknown_name("checkpoint of the tiny language model", name, manifest["checkpoints"])
    entry = manifest["checkpoints"][name]
    path = find_asset("data/tiny_lm") / entry["file"]
    content = read_checked(path, manifest["files"][entry["file"]])
    with seeded_globals(0):  # the weights drawn here are overwritten; the caller's generators must not notice
        model: Any = new_tiny_lm(entry["size"])
    try:
        weights = {key: value.float() for key, value in safetensors.torch.load(content).items()}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:  # the head shares the embedding's weights
            raise DataError(f"{path} is not a model of size {entry['size']}: {sorted({*missing, *unexpected})[:3]}")
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise DataError(f"{path} is not a model of size {entry['size']}: {error}") from error
    return model.to(device)


def weights_for_file(model: LlamaForCausalLM) -> bytes:
    """Return a model's weights as a safetensors file in float16, which is what the checkpoints hold."""
    named = {name: value.detach().to("cpu", torch.float16) for name, value in model.named_parameters()}
    return safetensors.torch.save(named)
