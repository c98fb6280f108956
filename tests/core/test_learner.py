"""Learner: finding its config, building, copying, phases and schedules."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from tiny import Config as TinyConfig
from tiny import Phased, Tiny
from torch import nn

import polrl
from polrl import Learner, knob
from polrl.core.errors import KnobError, UnknownNameError
from polrl.core.schedules import linear_decay


def module(name, **contents):
    """Make a module as if it were a method's file."""
    made = types.ModuleType(name)
    vars(made).update(contents)
    sys.modules[name] = made
    return made


@pytest.fixture(autouse=True)
def _no_modules_left():
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("made_up"):
            del sys.modules[name]


class BaseConfig(polrl.Config):
    rate: float = knob(0.1, low=0.0, high=1.0, first=True)


class MoreConfig(BaseConfig):
    constraint: float = knob(0.5, low=0.0, high=1.0)


class Base(Learner[BaseConfig]):
    def setup(self):
        self.x = 0.0

    def update(self):
        self.x += self.config.rate
        return {"x": self.x}

    def evaluate(self):
        return {"x": self.x}


# ---- the config ------------------------------------------------------------------------------------------------------


def test_a_learner_finds_the_config_in_its_brackets():
    assert Base.Config is BaseConfig and Base().config.rate == 0.1


def test_a_learner_finds_the_config_in_its_own_module():
    module("made_up_method", Config=MoreConfig)
    assert type("Method", (Learner,), {"__module__": "made_up_method"}).Config is MoreConfig


def test_a_subclass_of_a_baseline_finds_the_config_in_its_own_module():
    module("made_up_variant", Config=MoreConfig)
    variant = type("Variant", (Base,), {"__module__": "made_up_variant"})
    assert variant.Config is MoreConfig and variant(constraint=0.2).config.constraint == 0.2


def test_a_subclass_keeps_the_baselines_config_where_it_has_none():
    module("made_up_plain")
    module("made_up_other", Config=TinyConfig)
    for name in ("made_up_plain", "made_up_other"):
        assert type("Variant", (Base,), {"__module__": name}).Config is BaseConfig


def test_settings_go_before_the_config_and_the_config_is_copied():
    config = BaseConfig(rate=0.2, seed=3)
    learner = Base(config, rate=0.3)
    assert (learner.config.rate, learner.config.seed) == (0.3, 3) and learner.config is not config
    config.rate = 0.9
    assert learner.config.rate == 0.3


def test_a_config_of_another_class_is_refused():
    with pytest.raises(KnobError, match="config must be a .*BaseConfig, got Config"):
        Base(TinyConfig())


@pytest.mark.parametrize("name", ["nowhere", "cuda:x", ""])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(KnobError, match="device"):
        Base(device=name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(KnobError, match="torch finds none here; use 'auto' or 'cpu'"):
        Base(device="cuda")


# ---- steps and copies --------------------------------------------------------------------------------------------------


def test_calling_the_baselines_update_is_one_step():
    class Variant(Base):
        def update(self):
            return {**super().update(), "more": 1.0}

    learner = Variant()
    assert learner.update() == {"x": 0.1, "more": 1.0} and learner.step == 1


def test_an_update_that_fails_is_no_step():
    class Failing(Base):
        def update(self):
            raise RuntimeError("no")

    learner = Failing()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            learner.update()
    assert learner.step == 0 and "_updating" not in vars(learner)


def test_metrics_are_copies_without_a_graph():
    class Showing(Tiny):
        def update(self):
            return {**super().update(), "weight": self.net.weight[0, 0]}

    learner = Showing(device="cpu")
    first = learner.update()
    kept = float(first["weight"])
    learner.update()
    assert float(first["weight"]) == kept != learner.net.weight[0, 0].item()
    assert not any(value.requires_grad for value in first.values())


def test_a_fork_shares_data_but_nothing_that_learns():
    class Shared(Tiny):
        constants = ("data",)
        table = torch.zeros(3)

        def setup(self):
            super().setup()
            self.data = self.table

    learner = Shared(device="cpu")
    for _ in range(3):
        learner.update()
    twin = learner.fork()
    assert twin.data is learner.data and twin.net is not learner.net
    before = learner.state().digest()
    assert twin.state().digest() == before
    twin.update()
    assert learner.state().digest() == before != twin.state().digest()
    learner.update()
    assert learner.state().digest() == twin.state().digest()


def test_networks_in_any_container_are_found():
    class Holding(Base):
        def setup(self):
            super().setup()
            self.one = nn.Linear(1, 1)
            self.more = {"a": [nn.Linear(1, 1), (nn.Linear(1, 1),)], "b": 3}

    learner = Holding()
    assert len(list(learner.modules())) == 3 and learner.parameters_finite()
    with torch.no_grad():
        learner.more["a"][1][0].weight.fill_(float("inf"))
    assert not learner.parameters_finite()


def test_looking_sees_evaluation_mode_and_a_generator_of_its_own():
    class Looking(Tiny):
        def evaluate(self):
            assert not self.net.training and not torch.is_grad_enabled()
            return {"drawn": torch.rand((), generator=self.rng.torch)}

    learner = Looking(device="cpu")
    learner.net.train()
    own = learner.rng
    assert learner.evaluate() == learner.evaluate()
    assert learner.rng is own and learner.net.training and torch.is_grad_enabled()
    learner.update()
    assert learner.evaluate() == Looking(device="cpu").evaluate(), "alike at every step"
    assert learner.evaluate() != Looking(device="cpu", seed=1).evaluate()


# ---- phases and schedules ------------------------------------------------------------------------------------------------


def test_phase_steps_count_from_the_phases_beginning():
    learner = Phased(device="cpu")
    seen = []
    for _ in range(6):
        seen.append((learner.phase, learner.phase_step))
        learner.update()
    assert seen == [("first", 0), ("first", 1), ("first", 2), ("first", 3), ("second", 0), ("second", 1)]
    with pytest.raises(UnknownNameError, match="did you mean first"):
        learner.enter("frist")


class ScheduledConfig(polrl.Config):
    lr: float = knob(0.5, low=0.0, high=1.0, first=True)


def scheduled(knob_name="lr", phase=""):
    class Scheduled(Learner[ScheduledConfig]):
        phases = ("first", "second") if phase != "none" else ()

        def setup(self):
            self.schedule(knob_name, linear_decay(4), **({} if phase in ("", "none") else {"phase": phase}))

        def update(self):
            value = self.effective("lr")
            if self.phase == "first" and self.phase_step == 1:
                self.enter("second")
            return {"lr": value}

    return Scheduled


def test_a_schedule_multiplies_the_knob_as_it_is_now():
    learner = scheduled(phase="none")()
    assert [learner.update()["lr"] for _ in range(2)] == [0.5, 0.375]
    learner.config.lr = 1.0
    assert [learner.update()["lr"] for _ in range(4)] == [0.5, 0.25, 0.25, 0.25]
    assert learner.effective("lr") == 0.25


def test_a_schedule_holds_in_its_own_phase_and_counts_its_steps():
    learner = scheduled(phase="second")()
    assert [learner.update()["lr"] for _ in range(5)] == [0.5, 0.5, 0.5, 0.375, 0.25]


@pytest.mark.parametrize(
    ("name", "phase", "words"),
    [
        ("rl", "none", "unknown knob 'rl'; did you mean lr"),
        ("lr", "secnod", "unknown phase 'secnod'"),
        ("lr", "", "phase"),
    ],
)
def test_a_schedule_that_would_never_hold_is_refused(name, phase, words):
    with pytest.raises(UnknownNameError, match=words):
        scheduled(name, phase)()
