"""A pretended accelerator for tests: computes on the CPU, and complains as CUDA would when devices mix."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_CUDA = torch.device("cuda", 0)
_COPY = torch.ops.aten.copy_
_FREE = (_COPY, torch.ops.aten._to_copy, torch.ops.aten.set_)  # may take tensors of two devices


class DeviceMixError(RuntimeError):
    """Tensors of two devices met in one operation, or one left its device unasked."""


class _Tags:
    """Which storages and generators count as being on the accelerator."""

    def __init__(self) -> None:
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.generators: list[torch.Generator] = []

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage  # held, so that the address is not used again

    def __contains__(self, tensor: object) -> bool:
        return isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata in self.storages


class _Functions(TorchFunctionMode):
    """Sees calls as they are written: which device they name, and what they ask of tensors."""

    def __init__(self, tags: _Tags) -> None:
        super().__init__()
        self.tags = tags
        self.inherited: list[bool] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        owner = args[0] if args else None
        if func == torch.Tensor.device.__get__:
            return _CUDA if owner in self.tags else func(*args)
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return owner in self.tags
        if func == torch.Tensor.is_cpu.__get__:  # type: ignore[attr-defined]
            return owner not in self.tags
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and owner in self.tags:
            raise DeviceMixError("a tensor on the accelerator can't become a numpy array; call .cpu() first")
        if name == "cuda":
            raise DeviceMixError("`.cuda()` names a device; use `.to(self.device)`")
        target, args, kwargs = self._target(name, args, kwargs)
        flat = list(_leaves((args, kwargs)))
        here = any(x in self.tags for x in flat)
        for generator in (x for x in flat if isinstance(x, torch.Generator)):
            meant = here if target is None else target.type == "cuda"
            if (generator in self.tags.generators) != meant:
                raise DeviceMixError(f"{name} got a generator of another device than its tensors")
        self.inherited.append(here)
        try:
            result = func(*args, **kwargs)
        finally:
            self.inherited.pop()
        if target is not None:
            result = self._moved(result, owner, target)
        return result

    def _target(self, name: str, args: Any, kwargs: Any) -> tuple[torch.device | None, Any, Any]:
        """Find the device that a call names, and have the call made on the CPU."""
        if name == "cpu":
            return torch.device("cpu"), args, kwargs
        named: list[torch.device] = []

        def on_cpu(value: Any) -> Any:
            named.append(torch.device(value))
            return torch.device("cpu")

        if kwargs.get("device") is not None:
            kwargs["device"] = on_cpu(kwargs["device"])
        if name == "to":
            rest = [on_cpu(x) if isinstance(x, torch.device | str | int) and _is_device(x) else x for x in args[1:]]
            if len(args) > 1 and isinstance(args[1], torch.Tensor):
                named.append(_CUDA if args[1] in self.tags else torch.device("cpu"))
            args = (args[0], *rest)
        return (named[0] if named else None), args, kwargs

    def _moved(self, result: Any, owner: Any, target: torch.device) -> Any:
        if not isinstance(result, torch.Tensor):
            return result
        tagged = result in self.tags
        if target.type == "cuda" and not tagged:
            if isinstance(owner, torch.Tensor) and result.untyped_storage()._cdata == owner.untyped_storage()._cdata:
                result = result.clone()
            self.tags.add(result)
        elif target.type == "cpu" and tagged:
            with _no_modes():
                result = result.detach().clone() if not result.requires_grad else result.clone()
        return result


class _Dispatch(TorchDispatchMode):
    """Sees the operations that are carried out: whether the devices of their tensors agree."""

    def __init__(self, tags: _Tags, functions: _Functions) -> None:
        super().__init__()
        self.tags = tags
        self.functions = functions

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in _leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        here = any(x in self.tags for x in tensors)
        if here and func.overloadpacket not in _FREE and any(x not in self.tags and x.dim() > 0 for x in tensors):
            shapes = [f"{tuple(x.shape)} on {'cuda' if x in self.tags else 'cpu'}" for x in tensors]
            raise DeviceMixError(f"{func} got tensors of two devices: {', '.join(shapes)}")
        result = func(*args, **kwargs)
        # A factory called inside a composite operation takes the device of that operation's tensors.
        inherited = not tensors and bool(self.functions.inherited) and self.functions.inherited[-1]
        if (here and func.overloadpacket is not _COPY) or inherited:
            for tensor in _leaves((result,)):
                if isinstance(tensor, torch.Tensor):
                    self.tags.add(tensor)
        return result


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    """Yield what a call got, without the lists, tuples and dicts around it."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _leaves(value)
        elif isinstance(value, dict):
            yield from _leaves(value.values())
        else:
            yield value


def _is_device(value: Any) -> bool:
    if isinstance(value, torch.device):
        return True
    return isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda", "mps")


def _no_modes() -> Any:
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


@contextlib.contextmanager
def pretended_cuda() -> Iterator[_Tags]:
    """Let `device="cuda"` work inside the block, on the CPU, with errors where a real device would give them.

    Raises
    ------
    DeviceMixError
        In the block, where tensors or generators of two devices meet, a tensor on the device is turned into
        a numpy array, or `.cuda()` is called.
    """
    tags = _Tags()
    real = torch.Generator

    class Generator(real):  # type: ignore[misc, valid-type]
        def __new__(cls, device: Any = "cpu") -> Any:
            made = super().__new__(cls, device="cpu")
            if torch.device(device).type == "cuda":
                tags.generators.append(made)
            return made

        def __init__(self, device: Any = "cpu") -> None:
            pass

        @property
        def device(self) -> torch.device:
            return _CUDA if self in tags.generators else torch.device("cpu")

    functions = _Functions(tags)
    with (
        mock.patch.object(torch, "Generator", Generator),
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        functions,
        _Dispatch(tags, functions),
    ):
        yield tags
