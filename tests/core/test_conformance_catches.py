"""The conformance suite notices what it is for: learners with one fault each, and the check that must fail."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import polrl
from polrl import Curve, Heatmap, Learner, Lines, knob, sample_normal
from polrl.core import conformance
from polrl.core.conformance import ALL_CHECKS, Case
from polrl.core.errors import DivergedError, StateError, UnknownNameError
from polrl.core.fake_device import DeviceMixError


class Config(polrl.Config):
    size: int = 3
    rate: float = knob(0.1, low=0.0, high=0.5, first=True)
    pull: float = knob(0.1, low=0.0, high=1.0)


class Sound(Learner[Config]):
    """A learner without a fault: the ones below change one thing each."""

    curves = (Curve("loss", "Loss"), Curve("norm", "Norm"))
    constants: tuple[str, ...] = ("data",)

    def setup(self):
        make = torch.Generator().manual_seed(0)
        self.data = torch.randn(16, self.config.size, generator=make).to(self.device)
        self.net = nn.Sequential(nn.Linear(self.config.size, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).to(self.device)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)

    def loss(self):
        rows = torch.randint(16, (8,), generator=self.rng.torch, device=self.device)
        return (self.net(self.data[rows]) - self.data[rows].sum(1, keepdim=True)).square().mean()

    def step_with(self, loss):
        self.optimizer.param_groups[0]["lr"] = self.config.rate
        loss = loss + self.config.pull * self.net[2].weight.square().sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss}

    def update(self):
        return self.step_with(self.loss())

    def evaluate(self):
        return {"norm": self.net[2].weight.norm()}

    def views(self):
        weight = self.net[2].weight.detach().cpu()
        return {"weight": Heatmap(title="Weight", alt="The weights", values=weight)}


def fails(learner, check, reason, error=AssertionError, **case):
    """The named check must fail on the learner, with these words; on the sound one it passes."""
    with pytest.raises(error, match=reason):
        getattr(conformance, f"check_{check}")(Case(learner, **case))


@pytest.mark.parametrize("check", ALL_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_a_sound_learner_passes(check):
    check(Case(Sound))


# ---- randomness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.randn(1),
        np.random.rand,
        random.random,
        lambda: nn.Dropout(0.5)(torch.ones(2)),
        lambda: nn.Linear(1, 1),
    ],
    ids=["torch", "numpy", "python", "dropout", "layer"],
)
def test_global_randomness_in_update_is_caught(draw):
    class Drawing(Sound):
        def update(self):
            draw()
            return super().update()

    fails(Drawing, "update", r"moved a global random generator")


@pytest.mark.parametrize("where", ["evaluate", "views"])
def test_global_randomness_in_looking_is_caught(where):
    class Drawing(Sound):
        def evaluate(self):
            if where == "evaluate":
                np.random.rand()
            return super().evaluate()

        def views(self):
            if where == "views":
                torch.rand(1)
            return super().views()

    fails(Drawing, "observation_is_pure", "moved a global random generator")
    if where == "evaluate":
        fails(Drawing, "update", "moved a global random generator")


def test_global_randomness_in_setup_is_seeded_and_so_no_fault():
    class Drawing(Sound):
        def setup(self):
            super().setup()
            self.start = float(np.random.rand() + random.random() + torch.rand(()))

    conformance.check_builds_alike(Case(Drawing))
    assert Drawing(device="cpu", seed=1).start != Drawing(device="cpu", seed=2).start


def test_building_from_the_clock_is_caught():
    count = itertools.count()

    class Counting(Sound):
        def setup(self):
            super().setup()
            self.start = next(count)

    fails(Counting, "builds_alike", "two learners of the same seed begin differently")


def test_a_generator_of_its_own_that_setup_does_not_seed_is_caught():
    class Unseeded(Sound):
        def setup(self):
            super().setup()
            self.own = np.random.default_rng()

    fails(Unseeded, "builds_alike", "begin differently")


# ---- looking -----------------------------------------------------------------------------------------------------------


def test_batch_norm_in_train_mode_while_evaluating_is_put_back():
    class Training(Sound):
        def evaluate(self):
            self.net.train()
            self.net(self.data)
            return super().evaluate()

    conformance.check_observation_is_pure(Case(Training))


def test_buffers_are_put_back_even_if_evaluating_fails():
    class Failing(Sound):
        def evaluate(self):
            self.net.train()
            self.net(self.data)
            raise RuntimeError("no judge")

    learner = Failing(device="cpu")
    before = learner.state().digest()
    with pytest.raises(RuntimeError, match="no judge"):
        learner.evaluate()
    assert learner.state().digest() == before


def test_batch_norm_inside_a_dataclass_is_put_back_too():
    @dataclasses.dataclass
    class Networks:
        own: Any

    class Wrapped(Sound):
        def setup(self):
            super().setup()
            self.networks = {"all": [Networks(nn.BatchNorm1d(self.config.size).to(self.device))]}

        def evaluate(self):
            norm = self.networks["all"][0].own
            assert not norm.training, "networks are in evaluation mode"
            return {**super().evaluate(), "mean": norm(self.data).mean()}

    conformance.check_observation_is_pure(Case(Wrapped))


def remember(learner):
    learner.seen = [*getattr(learner, "seen", []), learner.step]


def train_once(learner):
    with torch.no_grad():
        learner.net[2].weight += 0.1


@pytest.mark.parametrize("change", [remember, train_once])
@pytest.mark.parametrize("where", ["evaluate", "views"])
def test_looking_that_changes_the_learner_is_caught(change, where):
    class Changing(Sound):
        def evaluate(self):
            if where == "evaluate":
                change(self)
            return super().evaluate()

        def views(self):
            if where == "views":
                change(self)
            return super().views()

    fails(Changing, "observation_is_pure", r"evaluate\(\) or views\(\) changed the learner")


def test_views_that_count_somewhere_else_are_caught():
    count = itertools.count()

    class Counting(Sound):
        def views(self):
            return {"count": Lines(title="Count", alt="A count", x=[0], y={"n": [next(count)]})}

    fails(Counting, "observation_is_pure", "view count looks different the second time")


def test_evaluating_with_a_random_answer_is_caught():
    source = np.random.default_rng(0)

    class Random(Sound):
        def evaluate(self):
            return {"norm": source.random()}

    fails(Random, "observation_is_pure", "two answers for one state")


class Corridor:
    """An environment that saves itself."""

    def __init__(self):
        self.place = 0

    def reset(self):
        self.place = 0

    def walk(self):
        self.place += 1
        return self.place

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def test_an_evaluation_environment_that_goes_on_is_caught():
    class Walking(Sound):
        constants = ("data", "judge")

        def setup(self):
            super().setup()
            self.judge = Corridor()

        def evaluate(self):
            return {"norm": self.judge.walk()}

    fails(Walking, "observation_is_pure", "two answers for one state")


def test_an_evaluation_in_the_training_environment_is_caught():
    class Walking(Sound):
        def setup(self):
            super().setup()
            self.task = Corridor()

        def evaluate(self):
            self.task.reset()
            return {"norm": self.task.walk()}

    fails(Walking, "observation_is_pure", "changed the learner")


def test_training_in_the_evaluation_environment_is_caught():
    class Walking(Sound):
        constants = ("data", "judge")

        def setup(self):
            super().setup()
            self.judge = Corridor()

        def update(self):
            return {**super().update(), "place": self.judge.walk()}

        def evaluate(self):
            self.judge.reset()
            return {"norm": self.judge.walk()}

    fails(Walking, "observation_is_pure", "with and without evaluation: the metrics differ")


@pytest.mark.parametrize(
    ("views", "reason"),
    [
        (lambda: {}, "shows at least one view"),
        (lambda: {"a": [1, 2]}, "view a is a list, not a View"),
        (lambda: {"a": Lines(title="", alt="x", x=[0], y={})}, "lacks a title or the words"),
        (lambda: {"a": Lines(title="x", alt="", x=[0], y={})}, "lacks a title or the words"),
    ],
)
def test_views_that_show_nothing_are_caught(views, reason):
    class Showing(Sound):
        def views(self):
            return views()

    fails(Showing, "observation_is_pure", reason)


# ---- metrics -----------------------------------------------------------------------------------------------------------


def metric(name, make):
    class Measuring(Sound):
        def update(self):
            return {**super().update(), name: make(self)}

    return Measuring


def test_a_metric_with_its_graph_is_detached():
    conformance.check_update(Case(metric("weight", lambda learner: learner.net[2].weight.sum())))


def test_bad_metrics_are_caught():
    fails(metric("row", lambda learner: torch.zeros(2)), "update", "metric row is not a scalar")
    fails(
        metric("odd", lambda learner: math.nan if learner.step == 2 else 0.0), "update", "metric odd is nan at step 3"
    )
    fails(metric("odd", lambda learner: torch.tensor(math.inf)), "update", "metric odd is inf at step 1")


def test_no_metrics_are_caught():
    class Silent(Sound):
        def update(self):
            super().update()
            return {}

    fails(Silent, "update", "returned no metrics")


def test_curves_that_show_nothing_are_caught():
    class Misspelt(Sound):
        curves = (Curve(("loss", "rewrad"), "Reward"),)

    class Curveless(Sound):
        curves = ()

    fails(Misspelt, "update", "curve 'Reward' shows rewrad, which neither")
    fails(Curveless, "update", "declares at least one curve")


def test_a_step_that_is_not_one_step_is_caught():
    class Twice(Sound):
        def update(self):
            metrics = super().update()
            self.step += 1
            return metrics

    fails(Twice, "update", r"update\(\) must be one step")


# ---- phases --------------------------------------------------------------------------------------------------------------


class Phased(Sound):
    phases = ("first", "second")

    def setup(self):
        super().setup()
        self.later = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)

    def update(self):
        metrics = super().update()
        if self.phase == "first" and self.phase_step == 3:
            self.enter("second")
        return metrics


def test_a_phase_that_is_never_entered_is_caught():
    class Stuck(Phased):
        def enter(self, phase):
            pass

    fails(Stuck, "update", r"of the phases \('first', 'second'\) only \['first'\] were entered")


def test_a_phase_of_another_name_is_caught():
    class Wrong(Phased):
        def enter(self, phase):
            super().enter("secnod")

    fails(Wrong, "update", "unknown phase 'secnod'; did you mean second", UnknownNameError)


def test_an_optimizer_that_a_later_phase_makes_is_caught():
    class Lazy(Phased):
        def update(self):
            if self.phase == "second" and not hasattr(self, "fresh"):
                self.fresh = torch.optim.Adam(self.net.parameters())
            return super().update()

    for check in ("fork", "resume"):
        fails(Lazy, check, r"fresh is missing .* must all be made in setup\(\)", StateError)


# ---- state ---------------------------------------------------------------------------------------------------------------


class Tally:
    """A plain object without a state_dict."""

    def __init__(self):
        self.count = 0


def in_an_object(learner):
    learner.hidden.count += 1
    return learner.hidden.count


def with_hidden(make, read):
    """Make a learner with something in `self.hidden` that every update moves on, to a number in its metrics."""

    class Hiding(Sound):
        def setup(self):
            super().setup()
            self.hidden = make()

        def update(self):
            return {**super().update(), "hidden": read(self)}

    return Hiding


def a_closure():
    count = 0

    def call():
        nonlocal count
        count += 1
        return count

    return call


def a_default():
    return lambda seen=[]: seen.append(0) or len(seen)


def a_method():
    tally = Tally()
    return functools.partial(in_an_object, type("Holder", (), {"hidden": tally}))


@pytest.mark.parametrize("check", ["fork", "resume"])
def test_a_state_in_a_plain_object_is_caught(check):
    fails(with_hidden(Tally, in_an_object), check, "hidden is a .*Tally, which can't be saved; give", StateError)
    fails(with_hidden(a_method, lambda learner: learner.hidden()), check, "hidden is a functools.partial", StateError)


@pytest.mark.parametrize("check", ["fork", "rewind", "resume"])
@pytest.mark.parametrize("make", [a_closure, a_default])
def test_a_state_in_a_function_is_caught(make, check):
    fails(with_hidden(make, lambda learner: learner.hidden()), check, "differ")


@pytest.mark.parametrize("check", ["fork", "resume"])
def test_a_state_in_an_attribute_of_a_module_is_caught(check):
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * self.calls

    class Hiding(Sound):
        def setup(self):
            super().setup()
            self.net[2] = Counting(4, 1).to(self.device)

    fails(Hiding, check, "the metrics differ")


@pytest.mark.parametrize("check", ["fork", "resume"])
def test_gradients_that_are_kept_from_one_update_to_the_next_are_caught(check):
    class Accumulating(Sound):
        def update(self):
            (self.loss() + self.config.pull * self.config.rate).backward()
            if self.step % 2:
                self.optimizer.step()
                self.optimizer.zero_grad()
            return {"loss": self.net[2].weight.norm()}

    fails(Accumulating, check, "differ", steps=5)


def test_a_tensor_that_still_has_its_graph_is_caught():
    class Keeping(Sound):
        def update(self):
            self.last = self.loss()
            return super().update()

    fails(Keeping, "fork", "last is a tensor that still holds its graph", StateError)


SHARED = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))


def test_a_data_set_that_is_not_named_as_constant_is_caught():
    class Sharing(Sound):
        constants = ()

        def setup(self):
            super().setup()
            self.data = SHARED

    fails(Sharing, "builds_alike", "share .*name data sets in `constants`")


def test_a_buffer_that_learners_share_through_a_closure_is_caught():
    class Sharing(Sound):
        shared = torch.zeros(2)

        def setup(self):
            super().setup()
            shared = self.shared
            self.read = lambda: shared

    fails(Sharing, "fork", "shares 1 tensors with its parent")


def through_a_class(learner):
    type(learner).total += learner.config.seed + 1
    return float(type(learner).total % 17)


@pytest.mark.parametrize("check", ["fork", "threads"])
def test_learners_that_meet_in_a_class_attribute_are_caught(check):
    class Meeting(Sound):
        total = 0

        def update(self):
            return {**super().update(), "total": through_a_class(self)}

    fails(Meeting, check, "differ" if check == "fork" else "two threads disturb each other")


@pytest.mark.parametrize("kind", ["tensor", "array", "list"])
def test_constants_that_change_are_caught(kind):
    class Changing(Sound):
        def setup(self):
            super().setup()
            self.data = {"tensor": self.data, "array": self.data.cpu().numpy(), "list": [self.data, {"more": 1}]}[kind]

        def update(self):
            data = self.data[0] if kind == "list" else self.data
            data[0, 0] += 1.0
            return self.step_with(torch.as_tensor(data, device=self.device).sum() * 0 + self.net[2].weight.sum())

    fails(Changing, "update", "update.* changed what `constants` names: data")


# ---- knobs -----------------------------------------------------------------------------------------------------------------


def test_a_knob_that_is_read_once_is_caught():
    class Cached(Sound):
        def setup(self):
            super().setup()
            self.cached = self.config.pull

        def step_with(self, loss):
            self.optimizer.param_groups[0]["lr"] = self.config.rate
            (loss + self.cached).backward()
            self.optimizer.step()
            return {"loss": loss}

    fails(Cached, "knobs_act", "pull is not read at every update of any phase")


def test_a_knob_that_is_never_read_is_caught_in_short_phases_too():
    class Short(Phased):
        phases = ("first", "second", "third")

        def update(self):
            self.optimizer.param_groups[0]["lr"] = self.config.rate
            loss = self.loss()
            loss.backward()
            self.optimizer.step()
            if self.phase != "third":
                self.enter({"first": "second", "second": "third"}[self.phase])
            return {"loss": loss}

        def evaluate(self):
            return {"norm": self.config.pull * 1.0}

    fails(Short, "knobs_act", "pull is not read at every update of any phase")


def test_a_knob_that_is_read_now_and_then_is_caught():
    class Sometimes(Sound):
        def step_with(self, loss):
            return super().step_with(loss) if self.step % 2 else {"loss": loss * self.config.rate}

    fails(Sometimes, "knobs_act", "pull is not read at every update")


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_an_end_of_a_knob_that_diverges_is_caught(end):
    class Fragile(Sound):
        def step_with(self, loss):
            return super().step_with(loss * (math.nan if self.config.pull == end else 1.0))

    fails(Fragile, "knobs_act", f"loss was not finite at step 1; the last change was pull={end}", DivergedError)


class NoneFirst(polrl.Config):
    rate: float = knob(0.1, low=0.0, high=0.5)
    pull: float = knob(0.1, low=0.0, high=1.0)


class TwoFirst(polrl.Config):
    rate: float = knob(0.1, low=0.0, high=0.5, first=True)
    pull: float = knob(0.1, low=0.0, high=1.0, first=True)


class Knobless(polrl.Config):
    rate: float = 0.1


class Walk(Learner):
    """A learner for any config."""

    curves = (Curve("x", "X"),)

    def setup(self):
        self.x = 0.0

    def update(self):
        self.x += self.config.rate
        return {"x": self.x}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (NoneFirst, "exactly one knob is the one to drag first"),
        (TwoFirst, "exactly one knob is the one to drag first"),
        (Knobless, "at least one knob"),
    ],
)
def test_knobs_without_one_to_begin_with_are_caught(config, reason):
    class Walking(Walk, Learner[config]):
        pass

    fails(Walking, "knobs_refuse", reason)


# ---- devices ---------------------------------------------------------------------------------------------------------------


def on_a_device(name, compute):
    class Mixing(Sound):
        def update(self):
            compute(self)
            return super().update()

    Mixing.__name__ = name
    return Mixing


@pytest.mark.parametrize(
    ("compute", "reason"),
    [
        (lambda self: self.data + torch.ones(16, 3), "tensors of two devices"),
        (lambda self: self.data[torch.ones(16, dtype=torch.bool)] @ torch.ones(3), "tensors of two devices"),
        (lambda self: self.net(torch.ones(2, 3)), "tensors of two devices"),
        (lambda self: torch.where(torch.ones(16, 3) > 0, self.data, self.data), "tensors of two devices"),
        (lambda self: torch.stack([self.data, torch.zeros(16, 3)]), "tensors of two devices"),
        (lambda self: self.data.numpy(), r"call \.cpu\(\) first"),
        (lambda self: np.asarray(self.data), r"call \.cpu\(\) first"),
        (lambda self: self.net[2].weight.detach().numpy(), r"call \.cpu\(\) first"),
        (lambda self: torch.ones(2).cuda(), r"use `\.to\(self\.device\)`"),
        (lambda self: torch.ones(2).to("cpu").cuda(), r"use `\.to\(self\.device\)`"),
        (lambda self: nn.Linear(1, 1).cuda(), r"use `\.to\(self\.device\)`"),
        (lambda self: sample_normal(self.data, 1.0, self.rng.cpu), "generator of another device"),
        (lambda self: torch.randn(2, generator=self.rng.cpu, device=self.device), "generator of another device"),
        (lambda self: torch.randperm(4, generator=self.rng.torch), "generator of another device"),
        (lambda self: self.data.uniform_(generator=self.rng.cpu), "generator of another device"),
    ],
    ids=[
        "sum", "mask", "input", "where", "stack", "numpy", "asarray", "parameter_numpy", "cuda", "back_and_cuda",
        "module_cuda", "cpu_generator", "cpu_generator_by_hand", "device_generator_on_cpu", "in_place",
    ],
)  # fmt: skip
def test_mixed_devices_are_caught(compute, reason):
    fails(on_a_device("Mixing", compute), "device", reason, DeviceMixError)


@pytest.mark.parametrize(
    "compute",
    [
        lambda self: self.data + torch.ones(16, 3, device=self.device),
        lambda self: self.data + torch.ones(16, 3).to(self.device),
        lambda self: self.data + torch.ones(16, 3).to(self.data),
        lambda self: self.data + torch.tensor(2.0) + 1,
        lambda self: torch.as_tensor(self.data.cpu().numpy() + 1, device=self.device) + self.data,
        lambda self: self.data.cpu() + torch.ones(16, 3),
        lambda self: float(self.data.sum()) + self.data[0, 0].item(),
        lambda self: self.data + torch.ones_like(self.data) + self.data.new_zeros(16, 3),
        lambda self: self.data[torch.randperm(16, generator=self.rng.cpu).to(self.device)] + self.data,
        lambda self: torch.randn(2, generator=self.rng.torch, device=self.device) + self.data[0, :2],
        lambda self: self.data + torch.arange(3, device=self.data.device),
        lambda self: self.data[torch.randperm(16, generator=self.rng.torch, device=self.rng.torch.device)],
    ],
    ids=[
        "made_there", "moved", "moved_to_tensor", "scalar", "by_numpy", "copied_back", "item", "alike", "permutation",
        "drawn", "device_of_tensor", "device_of_generator",
    ],
)  # fmt: skip
def test_what_works_on_a_device_passes(compute):
    conformance.check_device(Case(on_a_device("Sensible", compute)))


def test_a_network_left_on_the_cpu_is_caught():
    class Left(Sound):
        def setup(self):
            super().setup()
            self.spare = nn.Linear(2, 2)

    fails(Left, "device", "parameter weight is not on the learner's device")
