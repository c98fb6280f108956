r"""Knobs: the numbers a learner may turn while a method trains, and the config that holds them.

The same declaration validates values, makes the command line and makes the slider::

    class Config(polrl.Config):
        width: int = 16                                              # structure: fixed once a run has begun
        strength: float = knob(1.0, low=0.0, high=4.0, symbol=r"\alpha", first=True,
                               at_low="plain training", at_high="copies the teacher")
"""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from polrl.core.errors import DrivenConfigError, KnobError, StructureError, unknown_name

Scale = Literal["linear", "log", "log_zero", "log_one_minus", "signed_log"]
Bound = float | str | None


@dataclass(frozen=True)
class Knob:
    """What is known of one knob.

    Attributes
    ----------
    name : str
        The name of the field in the config.
    kind : {"float", "int", "bool", "choice"}
    default : float, int, bool or str
    low, high : float, int or str
        Both ends, included; a string names the structural setting that holds the bound.
    scale : {"linear", "log", "log_zero", "log_one_minus", "signed_log"}
        How the slider's travel maps to values. "log_zero" puts 0 at the low end and continues
        logarithmically from `smallest`; "signed_log" runs through zero, linear within `smallest`.
    smallest : float
        The smallest non-zero magnitude of "log_zero" and "signed_log".
    step : int
        Spacing of an int knob, counted from `low`.
    odd : bool
        True if an int knob takes odd values only.
    options : tuple of str
        What a choice knob takes.
    symbol : str
        The paper's letter, as LaTeX.
    help, at_low, at_high : str
        What it is; what the low end does; what the high end does.
    first : bool
        True for the knob to drag first.
    paper : float, int, bool, str or None
        The paper's value, where it differs from the default.
    unit : str
    """

    default: Any
    low: Bound = None
    high: Bound = None
    scale: Scale = "linear"
    smallest: float = 0.0
    step: int = 1
    odd: bool = False
    symbol: str = ""
    help: str = ""
    at_low: str = ""
    at_high: str = ""
    first: bool = False
    paper: Any = None
    unit: str = ""
    name: str = ""
    kind: str = ""
    options: tuple[str, ...] = ()

    def bounds(self, config: object = None) -> tuple[float, float]:
        """Return both ends, looking up those that a structural setting of `config` holds."""
        ends = []
        for end, default in ((self.low, -math.inf), (self.high, math.inf)):
            if isinstance(end, str):
                end = getattr(config, end) if config is not None else default
            ends.append(default if end is None else end)
        return ends[0], ends[1]

    def allowed(self, config: object = None) -> str:
        """Say in words what the knob takes."""
        if self.kind == "bool":
            return "True or False"
        if self.kind == "choice":
            return "one of " + ", ".join(map(repr, self.options))
        low, high = (
            end if isinstance(end, str) and config is None else f"{value:g}"
            for end, value in zip((self.low, self.high), self.bounds(config), strict=True)
        )
        number = {"float": "a number", "int": "an odd whole number" if self.odd else "a whole number"}[self.kind]
        every = f" in steps of {self.step}" if self.kind == "int" and self.step != 1 else ""
        return f"{number} from {low} to {high}{every}"

    def check(self, value: Any, config: object = None) -> Any:
        """Return `value` as the knob's own type, or say why it can't be taken.

        Parameters
        ----------
        value : float, int, bool, str or numpy scalar
        config : Config, optional
            Where bounds that depend on structure are looked up.

        Raises
        ------
        KnobError
            With the knob's name, the value and what is allowed.
        """
        plain = value.item() if isinstance(value, np.generic) else value
        if not self._fits(plain, config):
            raise KnobError(f"{self.name} must be {self.allowed(config)}, got {value!r}")
        return float(plain) if self.kind == "float" else plain

    def _fits(self, value: Any, config: object) -> bool:
        if self.kind == "bool":
            return isinstance(value, bool)
        if self.kind == "choice":
            return isinstance(value, str) and value in self.options
        types = (int, float) if self.kind == "float" else (int,)
        if isinstance(value, bool) or not isinstance(value, types):
            return False
        if isinstance(value, float) and not math.isfinite(value):
            return False
        low, high = self.bounds(config)
        if not low <= value <= high:
            return False
        if self.kind == "int" and self.odd:
            return value % 2 == 1
        return self.kind == "float" or math.isinf(low) or (value - low) % self.step == 0

    def to_position(self, value: float, config: object = None) -> float:
        """Return where on the slider's travel, from 0 to 1, a value lies."""
        low, high = self.bounds(config)
        if high <= low:
            return 0.0
        if self.scale == "log_zero":
            if value <= self.smallest:
                return 0.0 if value <= 0 else _ZERO_WIDTH
            share = math.log(value / self.smallest) / math.log(high / self.smallest)
            return _ZERO_WIDTH + (1 - _ZERO_WIDTH) * share
        curve, _ = _CURVES[self.scale]
        ends = curve(low, self.smallest), curve(high, self.smallest)
        return (curve(value, self.smallest) - ends[0]) / (ends[1] - ends[0])

    def from_position(self, position: float, config: object = None) -> float | int:
        """Return the value at a place, from 0 to 1, on the slider's travel; the inverse of `to_position`."""
        low, high = self.bounds(config)
        position = min(1.0, max(0.0, position))
        if position in (0.0, 1.0):  # exactly the bounds, whatever a curve rounds
            value = high if position else low
        elif self.scale == "log_zero":
            if position < _ZERO_WIDTH:
                return 0.0
            share = (position - _ZERO_WIDTH) / (1 - _ZERO_WIDTH)
            value = self.smallest * math.exp(share * math.log(high / self.smallest))
        else:
            curve, inverse = _CURVES[self.scale]
            ends = curve(low, self.smallest), curve(high, self.smallest)
            value = inverse(ends[0] + position * (ends[1] - ends[0]), self.smallest)
        value = min(high, max(low, value))
        if self.kind == "int":
            step = 2 if self.odd else self.step
            start = low + (1 - low % 2) if self.odd else low
            value = start + step * round((value - start) / step)
            return int(value if value <= high else value - step)
        return value


# "log_zero" keeps the first hundredth of the travel for zero itself, so that zero can be reached by hand.
_ZERO_WIDTH = 0.01

_CURVES: dict[str, tuple[Any, Any]] = {
    "linear": (lambda x, _: x, lambda y, _: y),
    "log": (lambda x, _: math.log(x), lambda y, _: math.exp(y)),
    "log_one_minus": (lambda x, _: -math.log(1 - x), lambda y, _: 1 - math.exp(-y)),
    "signed_log": (lambda x, s: math.asinh(x / s), lambda y, s: s * math.sinh(y)),
}


def knob(
    default: Any,
    *,
    low: Bound = None,
    high: Bound = None,
    scale: Scale = "linear",
    smallest: float | None = None,
    step: int = 1,
    odd: bool = False,
    symbol: str = "",
    help: str = "",
    at_low: str = "",
    at_high: str = "",
    first: bool = False,
    paper: Any = None,
    unit: str = "",
) -> Any:
    """Declare a knob as a field of a `Config`; its type is the field's annotation.

    A float or an int knob needs `low` and `high`; a choice is annotated `Literal["a", "b"]`. The meaning of
    the arguments is that of the attributes of `Knob`.

    Returns
    -------
    pydantic field
        To be assigned in the body of a `Config`.
    """
    if smallest is None:
        smallest = float(high) / 1000 if isinstance(high, int | float) and high else 1e-3
    declared = Knob(default, low, high, scale, smallest, step, odd, symbol, help, at_low, at_high, first, paper, unit)
    words = [help, f"low: {at_low}" if at_low else "", f"high: {at_high}" if at_high else ""]
    return Field(default, description="; ".join(filter(None, words)), json_schema_extra={"knob": declared})  # type: ignore[dict-item]


def _finish(name: str, declared: Knob, annotation: Any) -> Knob:
    """Add to a declared knob what only its field knows, and refuse declarations that can't work."""
    if typing.get_origin(annotation) is Literal:
        kind, options = "choice", typing.get_args(annotation)
    else:
        kind, options = getattr(annotation, "__name__", str(annotation)), ()
    if kind not in ("float", "int", "bool", "choice"):
        raise TypeError(f"knob {name!r} must be annotated float, int, bool or Literal[...], got {annotation!r}")
    finished = replace(declared, name=name, kind=kind, options=options)
    if kind in ("float", "int"):
        if finished.low is None or finished.high is None:
            raise TypeError(f"knob {name!r} needs low and high")
        low, high = finished.bounds()
        if finished.scale not in typing.get_args(Scale):
            raise TypeError(f"knob {name!r} has an unknown scale {finished.scale!r}")
        if low >= high:
            raise TypeError(f"knob {name!r} needs low < high, got {low:g} and {high:g}")
        if finished.scale == "log" and low <= 0:
            raise TypeError(f"knob {name!r} has a log scale, which needs low > 0, got {low:g}")
        if finished.scale == "log_zero" and (low != 0 or not 0 < finished.smallest < high):
            raise TypeError(f"knob {name!r} has a log_zero scale, which needs low = 0 and smallest > 0 and below high")
        if finished.scale == "signed_log" and finished.smallest <= 0:
            raise TypeError(f"knob {name!r} has a signed_log scale, which needs smallest > 0")
        if finished.scale == "log_one_minus" and high >= 1:
            raise TypeError(f"knob {name!r} has a log_one_minus scale, which needs high < 1, got {high:g}")
    try:
        finished.check(finished.default)
        finished.check(finished.default if finished.paper is None else finished.paper)
    except KnobError as error:
        raise TypeError(f"{error}, as its default or paper's value") from None
    return finished


class Config(BaseModel):
    """The settings of a learner: knobs, which may move while it trains, and structure, which may not.

    Parameters
    ----------
    seed : int
        The one number from which all randomness of the learner follows.
    device : str
        "auto" takes CUDA, then MPS, then the CPU; or the name of a torch device.

    Raises
    ------
    KnobError
        If a value is out of range, of the wrong type, NaN or infinite.
    UnknownNameError
        If there is no setting of that name; the nearest names are suggested.
    """

    model_config = ConfigDict(strict=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    seed: int = Field(0, ge=0, lt=2**32, description="all randomness follows from this number")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps ...")

    knobs: ClassVar[Mapping[str, Knob]] = {}
    _driven: bool = PrivateAttr(False)
    _begun: bool = PrivateAttr(False)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        found = {}
        for name, field in cls.model_fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, dict) and isinstance(extra.get("knob"), Knob):
                found[name] = _finish(name, typing.cast(Knob, extra["knob"]), field.annotation)
        for name, declared in found.items():
            for end in (declared.low, declared.high):
                if isinstance(end, str) and (end not in cls.model_fields or end in found):
                    raise TypeError(f"knob {name!r} has the bound {end!r}, which is not a structural setting")
        cls.knobs = dict(sorted(found.items(), key=lambda item: not item[1].first))

    def __init__(self, **values: Any) -> None:
        fields = type(self).model_fields
        for name in values:
            if name not in fields:
                raise unknown_name("knob or setting", name, fields)
        for name, declared in self.knobs.items():
            if name in values:
                values[name] = declared.check(values[name])
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors()]
            raise KnobError("; ".join(problems)) from None
        for name, declared in self.knobs.items():
            declared.check(getattr(self, name), self)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        # JSON has no tuples and numpy has scalars of its own: both stand for plain Python values.
        if isinstance(value, np.generic):
            return value.item()
        return tuple(map(cls._plain, value)) if isinstance(value, list) else value

    @classmethod
    def structure(cls) -> list[str]:
        """Return the names of the settings that are fixed once a run has begun."""
        return [name for name in cls.model_fields if name not in cls.knobs]

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
            return
        if self._driven:
            raise DrivenConfigError(f"a run drives this config; instead of assigning, use run.tune({name}={value!r})")
        self._set(name, value)

    def _set(self, name: str, value: Any) -> Any:
        """Validate and set one value; the driver's own way in."""
        if name not in type(self).model_fields:
            raise unknown_name("knob or setting", name, type(self).model_fields)
        if name in self.knobs:
            value = self.knobs[name].check(value, self)
        elif self._begun:
            if value == getattr(self, name):
                return value
            raise StructureError(
                f"{name} is structure and stays {getattr(self, name)!r} once a run has begun (asked for: {value!r}); "
                f"start a new run with {name}={value!r}"
            )
        else:
            value = getattr(type(self)(**{**self.model_dump(), name: value}), name)
        self.__dict__[name] = value
        self.__pydantic_fields_set__.add(name)
        return value

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return an undriven copy; unlike pydantic's, the updated values are validated."""
        return type(self)(**{**self.model_dump(), **(update or {})})

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self.model_copy()

    def changed(self) -> dict[str, Any]:
        """Return the settings that differ from their defaults, for "copy as code"."""
        fields = type(self).model_fields
        return {name: value for name, value in self.model_dump().items() if value != fields[name].default}

    def paper_values(self) -> dict[str, Any]:
        """Return the paper's value of every knob for which it is known to differ from the default."""
        return {name: declared.paper for name, declared in self.knobs.items() if declared.paper is not None}
