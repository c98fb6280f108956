"""`Learner`: one method. Subclasses say how it is set up, what one step is, how it is judged and shown."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch

from polrl.core.device import resolve_device
from polrl.core.errors import KnobError, unknown_name
from polrl.core.knobs import Config
from polrl.core.sampling import Generators, derive_seed, seeded_globals
from polrl.core.schedules import Schedule
from polrl.core.state import State, capture, restore
from polrl.core.views import Curve, View

C = TypeVar("C", bound=Config)
Metrics = dict[str, torch.Tensor | float]


class Learner(Generic[C]):
    """A method that can be driven, copied, saved and looked at.

    A subclass defines `setup`, `update`, and usually `evaluate` and `views`. Around them the base class keeps
    the promises that the lab and the tapes rest on: `setup` runs with the global generators seeded and put
    back; `update` counts steps and returns detached metrics; `evaluate` and `views` see networks in
    evaluation mode and a generator of their own, and leave no trace.

    Parameters
    ----------
    config : Config, optional
        A config of the class that the learner was declared with; it is copied.
    **settings
        Single settings, which take precedence over `config`.

    Attributes
    ----------
    config : Config
    device : torch.device
    rng : Generators
        The learner's own randomness; during `evaluate` and `views`, a separate one that starts alike each time.
    step : int
        Updates done.
    phase : str
        The phase in which the next update will run; "" for a learner without phases.
    phase_step : int
        Updates done in this phase.

    Examples
    --------
    >>> class Descent(Learner[Config]):
    ...     def setup(self):
    ...         self.x = torch.ones(())
    ...     def update(self):
    ...         self.x = 0.5 * self.x
    ...         return {"x": self.x}
    >>> learner = Descent()
    >>> learner.update()
    {'x': tensor(0.5000)}
    """

    Config: ClassVar[type[Config]] = Config
    #: The phases in their order; empty for a method that has none.
    phases: ClassVar[tuple[str, ...]] = ()
    #: The learning curves to show, the most telling first.
    curves: ClassVar[tuple[Curve, ...]] = ()
    #: Attributes that `setup` rebuilds and that never change (data sets, evaluation environments): not saved.
    constants: ClassVar[tuple[str, ...]] = ()
    #: Steps between two calls of `evaluate` while a run advances.
    evaluate_every: ClassVar[int] = 100

    config: C

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.Config = _declared_config(cls)
        for name, wrap in (("update", _counted), ("evaluate", _observing), ("views", _observing)):
            if name in vars(cls):
                setattr(cls, name, wrap(vars(cls)[name]))

    def __init__(self, config: C | None = None, **settings: Any) -> None:
        expected = type(self).Config
        if config is not None and type(config) is not expected:
            raise KnobError(
                f"config must be a {expected.__module__}.{expected.__qualname__}, got {type(config).__qualname__}"
            )
        given = {} if config is None else {name: getattr(config, name) for name in config.model_fields_set}
        self.config = typing.cast(C, expected(**{**given, **settings}))
        self.device = resolve_device(self.config.device)
        self.step = 0
        self.phase = self.phases[0] if self.phases else ""
        self.phase_step = 0
        self._schedules: dict[tuple[str, str], Schedule] = {}
        with seeded_globals(derive_seed(self.config.seed, "setup")):
            self.rng = Generators(self.config.seed, self.device)
            self.setup()
        self.config._begun = True

    # ---- what a method defines -------------------------------------------------------------------------------

    def setup(self) -> None:
        """Make networks, optimizers, data and environments from `self.config`."""
        raise NotImplementedError

    def update(self) -> Metrics:
        """Do one step of learning and return its metrics, each a scalar."""
        raise NotImplementedError

    def evaluate(self) -> Metrics:
        """Judge the present state: return, accuracy, exact regret ...; changes nothing."""
        return {}

    def views(self) -> dict[str, View]:
        """Draw the present state; changes nothing."""
        return {}

    @property
    def budget(self) -> int:
        """Steps of the whole training, where structure fixes them; 0 for a method that goes on for ever."""
        return 0

    # ---- phases and schedules --------------------------------------------------------------------------------

    def enter(self, phase: str) -> None:
        """Let the next update run in another phase."""
        if phase not in self.phases:
            raise unknown_name("phase", phase, self.phases)
        self.phase = phase
        self.phase_step = 0

    def schedule(self, knob: str, factor: Schedule, phase: str = "") -> None:
        """Multiply a knob by a schedule; in a method with phases, in the one that is named. Called in `setup`."""
        if knob not in self.config.knobs:
            raise unknown_name("knob", knob, self.config.knobs)
        if phase not in (self.phases or ("",)):
            raise unknown_name("phase", phase, self.phases)
        self._schedules[knob, phase] = factor

    def effective(self, knob: str) -> Any:
        """Return a knob's value after its schedule, as the next update will use it."""
        factor = self._schedules.get((knob, self.phase))
        value = getattr(self.config, knob)
        return value if factor is None else value * factor(self.phase_step)

    # ---- copies ----------------------------------------------------------------------------------------------

    def _skipped(self) -> frozenset[str]:
        return frozenset({"config", "device", "_schedules", *self.constants})

    def state(self) -> State:
        """Return everything that a copy needs to go on identically, knob values included."""
        captured = capture(self, self._skipped())
        knobs = {name: getattr(self.config, name) for name in self.config.knobs}
        return State({"attributes": captured.tree, "knobs": knobs}, captured.tensors)

    def load_state(self, state: State) -> None:
        """Take over a state that a learner of the same class and structure returned."""
        for name, value in state.tree["knobs"].items():
            self.config._set(name, value)
        restore(self, State(state.tree["attributes"], state.tensors), self._skipped())

    def fork(self) -> Self:
        """Return an independent learner in the same state, which goes on identically if left alone."""
        twin = type(self)(self.config.model_copy())
        twin.load_state(self.state())
        return twin

    def modules(self) -> Iterator[torch.nn.Module]:
        """Yield every network that the learner holds, also inside lists, tuples, dicts and dataclasses."""
        waiting: list[Any] = [value for name, value in vars(self).items() if name not in self.constants]
        while waiting:
            value = waiting.pop()
            if isinstance(value, torch.nn.Module):
                yield value
            elif isinstance(value, list | tuple):
                waiting.extend(value)
            elif isinstance(value, dict):
                waiting.extend(value.values())
            elif dataclasses.is_dataclass(value) and not isinstance(value, type):
                waiting.extend(vars(value).values())

    def parameters_finite(self) -> bool:
        """Return whether every parameter of every network is finite."""
        return all(bool(p.isfinite().all()) for module in self.modules() for p in module.parameters())

    @classmethod
    def slug(cls) -> str:
        """Return the method's name: its file's, for a method of polrl; module and class otherwise."""
        if cls.__module__.startswith("polrl."):
            return cls.__module__.rsplit(".", 1)[1]
        return f"{cls.__module__}:{cls.__qualname__}"


def _declared_config(cls: type[Learner[Any]]) -> type[Config]:
    """Find the config class: `Learner[Config]`, or a class `Config` in the learner's own module."""
    for base in vars(cls).get("__orig_bases__", ()):
        for argument in typing.get_args(base):
            if isinstance(argument, type) and issubclass(argument, Config):
                return argument
    own = getattr(sys.modules.get(cls.__module__), "Config", None)
    if isinstance(own, type) and issubclass(own, cls.Config):
        return own
    return cls.Config


def _counted(update: Callable[[Any], Metrics]) -> Callable[[Any], Metrics]:
    """Let an update count its steps and hand out detached metrics."""

    @functools.wraps(update)
    def counted(self: Learner[Any]) -> Metrics:
        if self.__dict__.get("_updating"):
            return update(self)  # a subclass called super().update(): one step all the same
        phase = self.phase
        self.__dict__["_updating"] = True
        try:
            metrics = update(self)
        finally:
            del self.__dict__["_updating"]
        self.step += 1
        if self.phase == phase:
            self.phase_step += 1
        # Copies, because they are read later: a metric may be a parameter, which the next update changes in place.
        return {name: v.detach().clone() if isinstance(v, torch.Tensor) else v for name, v in metrics.items()}

    return counted


def _observing(look: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Let a function look at a learner without leaving a trace."""

    @functools.wraps(look)
    def observed(self: Learner[Any]) -> Any:
        with _untouched(self):
            return look(self)

    return observed


@contextlib.contextmanager
def _untouched(learner: Learner[Any]) -> Iterator[None]:
    modules = list(learner.modules())
    parts = [part for module in modules for part in module.modules()]
    training = [part.training for part in parts]
    buffers = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    rng = learner.rng
    learner.rng = Generators(learner.config.seed, learner.device, "observe")
    for part in parts:
        part.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        learner.rng = rng
        for part, was in zip(parts, training, strict=True):
            part.training = was
