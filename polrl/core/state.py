"""The whole state of a learner as plain data: what fork, rewind, save and resume are made of.

`capture` walks the attributes of an object and returns a `State`: a tree that JSON can hold, and the tensors
that the tree points to. `restore` writes such a state into an object that `setup()` has just built, or into
the one it came from. Nothing is pickled, and one mechanism serves copies in memory and files on disk.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import enum
import hashlib
import inspect
import json
import math
import pathlib
import random
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors.torch
import torch

from polrl.core.errors import CheckpointError, StateError

_PLAIN = (type(None), bool, int, float, str)
_CONSTANT = (torch.device, torch.dtype, np.dtype, pathlib.PurePath, types.ModuleType, type)


@dataclasses.dataclass(frozen=True)
class State:
    """The state of an object at one moment.

    Attributes
    ----------
    tree : object
        Nested dicts and lists of plain values; a tensor stands as {"$": "tensor", "slot": n}.
    tensors : dict of str to Tensor
        Copies on the CPU, one for each slot; two attributes that held one tensor share a slot.
    """

    tree: Any
    tensors: dict[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Size of all tensors, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def digest(self) -> str:
        """Return the SHA-256 of everything; equal states have equal digests."""
        content = hashlib.sha256(json.dumps(self.tree, sort_keys=True).encode())
        for slot in sorted(self.tensors):
            tensor = self.tensors[slot]
            content.update(f"{slot}{tensor.dtype}{tuple(tensor.shape)}".encode())
            if tensor.numel():
                content.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return content.hexdigest()

    def to_bytes(self, notes: Mapping[str, Any]) -> bytes:
        """Return one safetensors file with the state, its digest, and `notes` (plain values) beside it."""
        text = json.dumps(dict(notes))
        metadata = {"state": json.dumps(self.tree), "notes": text, "digest": self._seal(text)}
        return safetensors.torch.save(self.tensors, metadata)

    def _seal(self, notes: str) -> str:
        """Return the digest of the state together with the notes beside it."""
        return hashlib.sha256(f"{self.digest()}{notes}".encode()).hexdigest()

    @classmethod
    def from_bytes(cls, content: bytes, name: str) -> tuple[State, dict[str, Any]]:
        """Read what `to_bytes` wrote.

        Raises
        ------
        CheckpointError
            If the bytes are truncated, altered, or not such a file (a pickle, for example).
        """
        try:
            tensors = safetensors.torch.load(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            metadata = header["__metadata__"]
            state = cls(json.loads(metadata["state"]), tensors)
            notes = json.loads(metadata["notes"])
        except Exception as error:
            raise CheckpointError(
                f"{name} is not a whole safetensors checkpoint of polrl ({error}); nothing else is ever loaded"
            ) from error
        if state._seal(metadata["notes"]) != metadata.get("digest"):
            raise CheckpointError(f"{name} was altered since it was written: its checksum does not match")
        return state, notes


def capture(owner: object, skip: frozenset[str] = frozenset()) -> State:
    """Return the state of an object's attributes, except those named in `skip`.

    Raises
    ------
    StateError
        If an attribute can't be saved; the message says which, and what to do.
    """
    encoder = _Encoder(_device_of(owner))
    tree = {
        name: encoder.encode(value, name)
        for name, value in vars(owner).items()
        if name not in skip and not isinstance(value, property)
    }
    return State(tree, encoder.tensors)


def restore(owner: object, state: State, skip: frozenset[str] = frozenset()) -> None:
    """Write a captured state into an object of the same class and structure.

    Raises
    ------
    StateError
        If the object does not have the parts that the state describes.
    """
    decoder = _Decoder(state.tensors, _device_of(owner))
    attributes = vars(owner)
    # Modules first: tensors elsewhere may be their parameters or buffers, and must stay the same objects.
    names = sorted(state.tree, key=lambda name: '"$": "module"' not in json.dumps(state.tree[name]))
    for name in names:
        decoded = decoder.decode(state.tree[name], attributes.get(name), name)
        if attributes.get(name) is not decoded:
            attributes[name] = decoded
    for name in set(attributes) - set(state.tree) - skip:
        del attributes[name]


def _device_of(owner: object) -> torch.device:
    device = getattr(owner, "device", None)
    return device if isinstance(device, torch.device) else torch.device("cpu")


class _Encoder:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.tensors: dict[str, torch.Tensor] = {}
        self._slots: dict[int, str] = {}
        self._held: list[Any] = []  # keeps what was seen alive, so that ids stay unique
        self._open: set[int] = set()

    def encode(self, value: Any, path: str) -> Any:
        if isinstance(value, _PLAIN) and not isinstance(value, enum.Enum | np.number):
            return value
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if isinstance(value, _CONSTANT) or inspect.isroutine(value):
            return {"$": "constant"}
        if id(value) in self._open:
            raise StateError(f"{path} refers back to something that holds it; a learner's state must be a tree")
        self._open.add(id(value))
        try:
            return self._composite(value, path)
        finally:
            self._open.discard(id(value))

    def _composite(self, value: Any, path: str) -> Any:
        if isinstance(value, np.ndarray | np.generic):
            return self._array(value, path)
        if isinstance(value, torch.nn.Module):
            return self._module(value, path)
        if isinstance(value, torch.Generator):
            return {"$": "generator", "state": self._tensor(value.get_state(), path)}
        if isinstance(value, np.random.Generator):
            return {"$": "numpy_generator", "state": self.encode(value.bit_generator.state, path)}
        if isinstance(value, random.Random):
            return {"$": "python_random", "state": self.encode(value.getstate(), path)}
        if callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None)):
            return {"$": "object", "state": self.encode(value.state_dict(), path + ".state_dict()")}
        if dataclasses.is_dataclass(value):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            return {"$": "dataclass", "fields": {k: self.encode(v, f"{path}.{k}") for k, v in fields.items()}}
        return self._container(value, path)

    def _container(self, value: Any, path: str) -> Any:
        if isinstance(value, dict):
            items = [[self.encode(k, path), self.encode(v, f"{path}[{k!r}]")] for k, v in value.items()]
            return {"$": "dict", "items": items}
        names = {list: "list", tuple: "tuple", collections.deque: "deque", set: "set", frozenset: "frozenset"}
        if isinstance(value, tuple(names)):
            kind = next(names[k] for k in names if isinstance(value, k))
            items_of: Any = value
            ordered = sorted(items_of, key=repr) if isinstance(value, set | frozenset) else items_of
            items = [self.encode(v, f"{path}[{i}]") for i, v in enumerate(ordered)]
            named = list(getattr(value, "_fields", ()))
            return {"$": kind, "items": items, "maxlen": getattr(value, "maxlen", None), "named": named}
        raise StateError(
            f"{path} is a {type(value).__module__}.{type(value).__qualname__}, which can't be saved; give its class "
            "state_dict() and load_state_dict(), or name the attribute in `constants` if it never changes"
        )

    def _tensor(self, value: torch.Tensor, path: str) -> dict[str, Any]:
        if value.grad_fn is not None:
            raise StateError(f"{path} is a tensor that still holds its graph; keep `.detach()` of it")
        if value.layout is not torch.strided or value.dtype == torch.complex128:
            raise StateError(f"{path} is a {value.layout} tensor of {value.dtype}, which no checkpoint file can hold")
        # The order of the dimensions in memory is kept: sums over another one differ in their last bits.
        order = list(range(value.dim()))
        if not value.is_contiguous():
            order.sort(key=lambda d: value.stride(d) if value.shape[d] > 1 else math.inf, reverse=True)
        slot = self._slot(value, lambda: value.detach().permute(order).to("cpu", copy=True).contiguous())
        tree = {"$": "tensor", "slot": slot, "grad": value.requires_grad, "order": order}
        # What stays on the CPU although its owner does not is told from what is on the owner's device.
        return {**tree, "host": True} if value.device.type == "cpu" != self._device.type else tree

    def _array(self, value: Any, path: str) -> dict[str, Any]:
        if value.dtype.kind not in "biuf" or value.dtype.itemsize > 8:
            raise StateError(f"{path} is an array of {value.dtype}; only real numbers and booleans can be saved")
        if isinstance(value, np.generic):
            return {"$": "numpy_scalar", "dtype": value.dtype.name, "value": value.item()}
        native = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("=")).reshape(np.shape(value))
        order = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
        return {"$": "array", "slot": self._slot(value, lambda: torch.from_numpy(native.copy())), "order": order}

    def _slot(self, value: Any, copied: Callable[[], torch.Tensor]) -> str:
        """Keep a copy of a tensor or array, once, and return its slot."""
        if id(value) not in self._slots:
            self._slots[id(value)] = str(len(self.tensors))
            self.tensors[self._slots[id(value)]] = copied()
            self._held.append(value)
        return self._slots[id(value)]

    def _module(self, module: torch.nn.Module, path: str) -> dict[str, Any]:
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        extra = {
            name: self.encode(part.get_extra_state(), f"{path}.{name}")
            for name, part in module.named_modules()
            if type(part).get_extra_state is not torch.nn.Module.get_extra_state
        }
        return {
            "$": "module",
            "tensors": {name: self._tensor(tensor, f"{path}.{name}") for name, tensor in named},
            "training": [name for name, part in module.named_modules() if part.training],
            "extra": extra,
        }


class _Decoder:
    def __init__(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self._tensors, self._device = tensors, device
        self._made: dict[str, torch.Tensor] = {}
        self._arrays: dict[str, np.ndarray[Any, Any]] = {}

    def decode(self, tree: Any, target: Any, path: str) -> Any:
        if not isinstance(tree, dict):
            return tree
        return getattr(self, "_" + tree["$"])(tree, target, path)

    def _expect(self, kind: type | tuple[type, ...], target: Any, path: str) -> None:
        if not isinstance(target, kind):
            raise StateError(
                f"{path} is missing or of another kind ({type(target).__name__}) in the learner that setup() built; "
                f"modules, optimizers and generators must all be made in setup()"
            )

    def _saved(self, reference: Any) -> torch.Tensor:
        order = reference["order"]
        return self._tensors[reference["slot"]].permute([order.index(d) for d in range(len(order))])

    def _constant(self, tree: Any, target: Any, path: str) -> Any:
        return target

    def _tensor(self, tree: Any, target: Any, path: str) -> torch.Tensor:
        slot, saved = tree["slot"], self._saved(tree)
        fits = isinstance(target, torch.Tensor) and target.shape == saved.shape and target.dtype == saved.dtype
        if slot in self._made:
            return self._made[slot]
        if fits and target.is_leaf and (target.requires_grad or tree["grad"]):
            # Optimizers hold this very tensor: write into it.
            with torch.no_grad():
                target.copy_(saved)
            self._made[slot] = target.requires_grad_(tree["grad"])
        else:
            device = torch.device("cpu") if tree.get("host") else self._device
            if isinstance(target, torch.Tensor):
                device = target.device
            self._made[slot] = saved.to(device, copy=True).requires_grad_(tree["grad"])
        return self._made[slot]

    def _array(self, tree: Any, target: Any, path: str) -> Any:
        if tree["slot"] not in self._arrays:
            self._arrays[tree["slot"]] = self._tensors[tree["slot"]].numpy().copy(order=tree["order"])
        return self._arrays[tree["slot"]]

    def _numpy_scalar(self, tree: Any, target: Any, path: str) -> Any:
        return np.dtype(tree["dtype"]).type(tree["value"])

    def _module(self, tree: Any, target: Any, path: str) -> torch.nn.Module:
        self._expect(torch.nn.Module, target, path)
        named = dict(target.named_parameters(remove_duplicate=False))
        named.update(target.named_buffers(remove_duplicate=False))
        if set(named) != set(tree["tensors"]):
            differing = ", ".join(sorted(set(named) ^ set(tree["tensors"]))[:3])
            raise StateError(f"{path} has other parameters than the saved one: {differing}")
        with torch.no_grad():
            for name, reference in tree["tensors"].items():
                saved, here = self._saved(reference), named[name]
                if here.shape != saved.shape:
                    raise StateError(f"{path}.{name} has shape {tuple(here.shape)}, saved was {tuple(saved.shape)}")
                here.copy_(saved)
                here.requires_grad_(reference["grad"])
                self._made[reference["slot"]] = here
        for name, part in target.named_modules():
            part.training = name in tree["training"]
            if name in tree["extra"]:
                part.set_extra_state(self.decode(tree["extra"][name], None, path))
        return target

    def _generator(self, tree: Any, target: Any, path: str) -> torch.Generator:
        self._expect(torch.Generator, target, path)
        target.set_state(self._tensors[tree["state"]["slot"]])
        return target

    def _numpy_generator(self, tree: Any, target: Any, path: str) -> Any:
        self._expect(np.random.Generator, target, path)
        target.bit_generator.state = self.decode(tree["state"], None, path)
        return target

    def _python_random(self, tree: Any, target: Any, path: str) -> Any:
        self._expect(random.Random, target, path)
        target.setstate(self.decode(tree["state"], None, path))
        return target

    def _object(self, tree: Any, target: Any, path: str) -> Any:
        if not hasattr(target, "load_state_dict"):
            self._expect((), target, path)
        device = self._device
        if isinstance(target, torch.optim.Optimizer):  # it puts moments where the parameters are, counts of steps not
            self._device = torch.device("cpu")
        target.load_state_dict(self.decode(tree["state"], target.state_dict(), path))
        self._device = device
        return target

    def _dataclass(self, tree: Any, target: Any, path: str) -> Any:
        if not dataclasses.is_dataclass(target):
            raise StateError(f"{path} is not the dataclass that was saved; make it in setup()")
        made = object.__new__(type(target))
        for name, field in tree["fields"].items():
            decoded = self.decode(field, getattr(target, name, None), f"{path}.{name}")
            object.__setattr__(made, name, decoded)
        return made

    def _dict(self, tree: Any, target: Any, path: str) -> dict[Any, Any]:
        old = target if isinstance(target, dict) else {}
        made = copy.copy(old)  # a defaultdict keeps its factory
        made.clear()
        for key_tree, value in tree["items"]:
            key = self.decode(key_tree, None, path)
            made[key] = self.decode(value, old.get(key), f"{path}[{key!r}]")
        return made

    def _items(self, tree: Any, target: Any, path: str) -> list[Any]:
        old = list(target) if isinstance(target, list | tuple) and len(target) == len(tree["items"]) else None
        return [self.decode(item, old[i] if old else None, f"{path}[{i}]") for i, item in enumerate(tree["items"])]

    def _list(self, tree: Any, target: Any, path: str) -> list[Any]:
        return self._items(tree, target, path)

    def _tuple(self, tree: Any, target: Any, path: str) -> tuple[Any, ...]:
        items = self._items(tree, target, path)
        if not tree["named"]:
            return tuple(items)
        if list(getattr(target, "_fields", ())) != tree["named"]:
            raise StateError(f"{path} is a namedtuple that setup() does not make; keep a plain tuple or a dict there")
        return type(target)(*items)

    def _deque(self, tree: Any, target: Any, path: str) -> collections.deque[Any]:
        return collections.deque(self._items(tree, target, path), maxlen=tree["maxlen"])

    def _set(self, tree: Any, target: Any, path: str) -> set[Any]:
        return set(self._items(tree, target, path))

    def _frozenset(self, tree: Any, target: Any, path: str) -> frozenset[Any]:
        return frozenset(self._items(tree, target, path))
