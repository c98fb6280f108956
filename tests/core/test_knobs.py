"""Knobs and configs: what is taken, what is refused, and how values lie on a slider."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import pickle
from typing import Literal

import numpy as np
import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Tiny

import polrl
from polrl import Learner, Run, knob
from polrl.core.errors import DrivenConfigError, KnobError, StructureError, UnknownNameError


class Config(polrl.Config):
    size: int = 8
    name: str = "walk"
    widths: tuple[int, ...] = (4, 4)
    linear: float = knob(0.1, low=-0.3, high=0.7)
    log: float = knob(1e-2, low=1e-4, high=3.0, scale="log")
    log_zero: float = knob(0.5, low=0.0, high=20.0, scale="log_zero", smallest=1e-3)
    log_one_minus: float = knob(0.9, low=0.1, high=0.9997, scale="log_one_minus")
    signed_log: float = knob(0.0, low=-7.0, high=30.0, scale="signed_log", smallest=0.05)
    count: int = knob(2, low=1, high="size")
    stepped: int = knob(10, low=1, high=30, step=3)
    odd: int = knob(5, low=2, high=12, odd=True)
    log_count: int = knob(16, low=1, high=1000, scale="log")
    flag: bool = knob(True)
    score: Literal["kl", "tv", "chi"] = knob("tv")
    drag: float = knob(1.0, low=0.0, high=2.0, first=True, paper=1.5, help="the strength", at_low="off", at_high="on")


settings.register_profile("knobs", deadline=None, max_examples=60)
settings.load_profile("knobs")

KNOBS = Config.knobs
FLOATS = [name for name, k in KNOBS.items() if k.kind == "float"]
INTS = [name for name, k in KNOBS.items() if k.kind == "int"]


def allowed_ints(name: str, config: Config) -> list[int]:
    low, high = KNOBS[name].bounds(config)
    return [v for v in range(int(low), int(high) + 1) if KNOBS[name]._fits(v, config)]


# ---- the slider's travel -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOATS)
@given(position=st.floats(0.0, 1.0))
def test_float_positions_round_trip(name, position):
    declared = KNOBS[name]
    value = declared.from_position(position)
    low, high = declared.bounds()
    assert low <= value <= high
    assert declared.check(value) == value
    again = declared.to_position(value)
    if declared.scale == "log_zero" and position < 0.01:
        assert value == 0.0 and again == 0.0
    else:
        assert again == pytest.approx(position, abs=1e-6)


@pytest.mark.parametrize("name", FLOATS)
@given(share=st.floats(0.0, 1.0))
def test_float_values_round_trip(name, share):
    declared = KNOBS[name]
    low, high = declared.bounds()
    value = low + share * (high - low)
    if declared.scale == "log_zero" and 0 < value < declared.smallest:
        value = declared.smallest
    position = declared.to_position(value)
    assert 0.0 <= position <= 1.0
    assert declared.from_position(position) == pytest.approx(value, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", INTS)
def test_every_whole_value_has_its_place_on_the_slider(name):
    config = Config()
    values = allowed_ints(name, config)
    assert len(values) > 3
    for value in values:
        again = KNOBS[name].from_position(KNOBS[name].to_position(value, config), config)
        assert again == value and type(again) is int


@pytest.mark.parametrize("name", INTS)
@given(position=st.floats(0.0, 1.0))
def test_every_place_gives_an_allowed_whole_value(name, position):
    config = Config()
    assert KNOBS[name].from_position(position, config) in allowed_ints(name, config)


@pytest.mark.parametrize("name", FLOATS)
def test_ends_of_the_travel_are_the_exact_bounds(name):
    low, high = KNOBS[name].bounds()
    assert KNOBS[name].from_position(0.0) == low
    assert KNOBS[name].from_position(1.0) == high
    assert KNOBS[name].from_position(-3.0) == low and KNOBS[name].from_position(7.0) == high
    assert KNOBS[name].to_position(low) == 0.0
    assert KNOBS[name].to_position(high) == pytest.approx(1.0, abs=1e-15)


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.sampled_from(["linear", "log", "signed_log"]))
def test_ends_are_exact_for_any_bounds(first, second, scale):
    low, high = sorted((first, second))
    declared = polrl.core.knobs.Knob(low, low, high, scale, smallest=1e-3, name="k", kind="float")
    assert (declared.from_position(0.0), declared.from_position(1.0)) == (low, high)


def test_last_whole_value_on_the_travel_stays_within_the_bounds():
    assert KNOBS["odd"].from_position(0.0) == 3 and KNOBS["odd"].from_position(1.0) == 11
    assert KNOBS["stepped"].from_position(1.0) == 28


def test_log_zero_reaches_zero_and_its_smallest_value():
    declared = KNOBS["log_zero"]
    assert declared.from_position(0.0) == 0.0
    assert declared.from_position(0.0099) == 0.0
    assert declared.from_position(0.01) == pytest.approx(declared.smallest)
    assert declared.to_position(0.0) == 0.0
    assert declared.to_position(declared.smallest) == 0.01


def test_signed_log_passes_through_zero_and_keeps_order():
    declared = KNOBS["signed_log"]
    values = [declared.from_position(p / 200) for p in range(201)]
    assert values == sorted(values) and values[0] < 0 < values[-1]
    assert declared.from_position(declared.to_position(0.0)) == pytest.approx(0.0, abs=1e-12)


def test_a_bound_follows_structure():
    narrow, wide = Config(size=3), Config(size=100)
    assert KNOBS["count"].bounds(narrow) == (1, 3)
    assert KNOBS["count"].from_position(1.0, wide) == 100
    assert Config(size=100, count=77).count == 77
    with pytest.raises(KnobError, match=r"count must be a whole number from 1 to 3, got 4"):
        Config(size=3, count=4)
    with pytest.raises(KnobError, match=r"count must be a whole number from 1 to 3, got 4"):
        narrow.count = 4


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wrong", "allowed"),
    [
        ("linear", 0.71, "a number from -0.3 to 0.7"),
        ("linear", math.nan, "a number from"),
        ("linear", math.inf, "a number from"),
        ("linear", -math.inf, "a number from"),
        ("linear", True, "a number from"),
        ("linear", np.True_, "a number from"),
        ("linear", "0.1", "a number from"),
        ("linear", None, "a number from"),
        ("linear", [0.1], "a number from"),
        ("linear", np.array([0.1]), "a number from"),
        ("linear", 0.1 + 0j, "a number from"),
        ("linear", 10**400, "a number from"),
        ("linear", np.float32(np.nan), "a number from"),
        ("count", 9, "a whole number from 1 to 8"),
        ("count", 2.0, "a whole number from 1 to 8"),
        ("count", True, "a whole number from 1 to 8"),
        ("count", np.float64(2), "a whole number from 1 to 8"),
        ("count", 10**400, "a whole number from 1 to 8"),
        ("stepped", 2, "a whole number from 1 to 30 in steps of 3"),
        ("odd", 4, "an odd whole number from 2 to 12"),
        ("odd", 13, "an odd whole number from 2 to 12"),
        ("flag", 1, "True or False"),
        ("flag", "True", "True or False"),
        ("flag", None, "True or False"),
        ("score", "js", "one of 'kl', 'tv', 'chi'"),
        ("score", 0, "one of 'kl', 'tv', 'chi'"),
    ],
)
def test_a_wrong_value_is_refused_with_name_range_and_value(name, wrong, allowed):
    run = Run(Probe())
    old = getattr(run.learner.config, name)
    with pytest.raises(KnobError) as tuned:
        run.tune(**{name: wrong})
    with pytest.raises(KnobError) as built:
        Config(**{name: wrong})
    assert allowed in str(tuned.value)
    assert allowed in str(built.value) or allowed.replace("to 8", "to size") in str(built.value)
    for message in (str(tuned.value), str(built.value)):
        assert name in message and repr(wrong) in message
    assert getattr(run.learner.config, name) == old and run.tape.changes == []


class Probe(Learner[Config]):
    def setup(self):
        pass

    def update(self):
        return {"x": 0.0}


@pytest.mark.parametrize(
    ("name", "given_value", "taken"),
    [
        ("linear", np.float32(0.5), 0.5),
        ("linear", np.float64(0.5), 0.5),
        ("linear", np.int64(0), 0.0),
        ("linear", 0, 0.0),
        ("drag", 2, 2.0),
        ("count", np.int32(3), 3),
        ("count", np.uint8(3), 3),
        ("stepped", np.int64(13), 13),
        ("flag", np.False_, False),
        ("score", np.str_("kl"), "kl"),
    ],
)
def test_numpy_scalars_and_ints_become_plain_numbers(name, given_value, taken):
    run = Run(Probe())
    run.tune(**{name: given_value})
    for value in (getattr(run.learner.config, name), getattr(Config(**{name: given_value}), name)):
        assert value == taken and type(value) is type(taken)
    assert run.tape.changes[-1].value == taken


def test_unknown_names_are_refused_with_the_nearest_ones():
    for attempt in (lambda: Config(linaer=0.2), lambda: Run(Probe()).tune(linaer=0.2), lambda: Probe(linaer=0.2)):
        with pytest.raises(UnknownNameError, match="linaer.*did you mean.*linear"):
            attempt()
    with pytest.raises(UnknownNameError, match="linaer"):
        Config().linaer = 0.2


def test_structure_takes_strict_types_only():
    for wrong in ({"size": 8.0}, {"size": True}, {"size": "8"}, {"name": 1}, {"seed": -1}, {"seed": 2**32}):
        with pytest.raises(KnobError, match=next(iter(wrong))):
            Config(**wrong)
    assert Config(size=np.int64(9)).size == 9 and type(Config(size=np.int64(9)).size) is int
    assert Config(widths=[3, 2]).widths == (3, 2)
    with pytest.raises(KnobError, match="widths"):
        Config(widths=[3, 2.5])


# ---- who may change what -----------------------------------------------------------------------------------------


def test_an_undriven_config_takes_assignments_and_checks_them():
    config = Config()
    config.linear, config.size = 0.25, 30
    assert (config.linear, config.size) == (0.25, 30)
    with pytest.raises(KnobError, match="linear"):
        config.linear = 5.0
    with pytest.raises(KnobError, match="size"):
        config.size = "many"
    with pytest.raises(KnobError, match="count"):
        config.size = 1
    assert (config.linear, config.size) == (0.25, 30)


def test_structure_is_frozen_once_a_learner_was_built():
    learner = Probe(size=9)
    with pytest.raises(StructureError, match=r"size .*stays 9.*new run.*size=10"):
        learner.config.size = 10
    assert learner.config.size == 9
    learner.config.linear = 0.2  # not driven yet: knobs may still be assigned
    assert learner.config.linear == 0.2


def test_a_driven_config_refuses_assignment_and_names_tune():
    run = Run(Probe())
    with pytest.raises(DrivenConfigError, match=r"run\.tune\(linear=0\.2\)"):
        run.learner.config.linear = 0.2
    with pytest.raises(StructureError, match="new run"):
        run.tune(size=3)
    assert run.learner.config.linear == 0.1 and run.learner.config.size == 8


def test_tuning_structure_to_what_it_is_changes_nothing():
    run = Run(Probe())
    run.tune(size=8, linear=0.3)
    assert [(change.knob, change.value) for change in run.tape.changes] == [("linear", 0.3)]


def test_model_copy_is_undriven_and_checked():
    run = Run(Probe(size=9, linear=0.2))
    twin = run.learner.config.model_copy(update={"linear": 0.4, "size": 20})
    assert (twin.linear, twin.size) == (0.4, 20)
    twin.linear = 0.1
    twin.size = 12
    assert run.learner.config.linear == 0.2
    with pytest.raises(KnobError, match="linear"):
        run.learner.config.model_copy(update={"linear": 4.0})
    with pytest.raises(UnknownNameError, match="nothing"):
        run.learner.config.model_copy(update={"nothing": 4.0})


def test_deep_copies_and_pickles_of_a_driven_config_carry_its_values():
    config = Run(Probe(linear=0.2)).learner.config
    twin = copy.deepcopy(config)
    twin.linear = 0.3
    assert config.linear == 0.2
    assert pickle.loads(pickle.dumps(twin)).model_dump() == twin.model_dump()


def test_changed_lists_what_differs_from_the_defaults():
    assert Config().changed() == {}
    config = Config(linear=0.1, size=9, flag=False)
    config.score = "kl"
    assert config.changed() == {"size": 9, "flag": False, "score": "kl"}
    assert Config(**config.changed()) == config


def test_paper_values_can_be_tuned_at_once():
    assert Config().paper_values() == {"drag": 1.5}
    run = Run(Tiny(device="cpu"))
    run.tune(**run.learner.config.paper_values())
    assert run.learner.config.rate == 0.1


def test_the_first_knob_leads():
    assert next(iter(KNOBS)) == "drag"
    assert set(Config.structure()) == {"seed", "device", "size", "name", "widths"}


# ---- declarations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotation", "make", "reason"),
    [
        (float, lambda: knob(1.0), "needs low and high"),
        (float, lambda: knob(1.0, low=0.0), "needs low and high"),
        (float, lambda: knob(1.0, low=0.0, high=2.0, scale="log"), "needs low > 0"),
        (float, lambda: knob(1.0, low=0.5, high=2.0, scale="log_zero"), "needs low = 0"),
        (float, lambda: knob(1.0, low=0.0, high=2.0, scale="log_zero", smallest=0.0), "smallest > 0"),
        (float, lambda: knob(1.0, low=0.0, high=2.0, scale="log_zero", smallest=2.0), "smallest"),
        (float, lambda: knob(0.5, low=0.0, high=1.0, scale="log_one_minus"), "needs high < 1"),
        (float, lambda: knob(0.5, low=-1.0, high=1.0, scale="signed_log", smallest=0.0), "smallest > 0"),
        (float, lambda: knob(0.5, low=0.0, high=1.0, scale="cubic"), "cubic"),
        (float, lambda: knob(3.0, low=0.0, high=2.0), "bad must be a number from 0 to 2, got 3.0"),
        (float, lambda: knob(1.0, low=0.0, high=2.0, paper=9.0), "bad must be a number from 0 to 2, got 9.0"),
        (float, lambda: knob("1", low=0.0, high=2.0), "bad must be a number"),
        (float, lambda: knob(1.0, low=2.0, high=0.0), "low"),
        (float, lambda: knob(1.0, low=0.0, high="nowhere"), "nowhere"),
        (int, lambda: knob(2, low=1, high=9, step=2), "in steps of 2"),
        (int, lambda: knob(2, low=1, high=9, odd=True), "an odd whole number"),
        (int, lambda: knob(2.0, low=1, high=9), "bad must be a whole number"),
        (str, lambda: knob("a"), "must be annotated"),
        (float | None, lambda: knob(1.0, low=0.0, high=2.0), "must be annotated"),
        (Literal["a", "b"], lambda: knob("c"), "one of 'a', 'b'"),
    ],
)
def test_a_knob_that_cannot_work_is_refused_when_the_class_is_made(annotation, make, reason):
    with pytest.raises(TypeError, match=reason):
        type("Bad", (polrl.Config,), {"__annotations__": {"bad": annotation}, "__module__": __name__, "bad": make()})


def test_a_subclass_keeps_and_may_redeclare_the_knobs():
    class Wider(Config):
        linear: float = knob(5.0, low=0.0, high=10.0)
        more: float = knob(0.0, low=0.0, high=1.0)

    assert set(Wider.knobs) == {*KNOBS, "more"}
    assert Wider(linear=9.0).linear == 9.0
    assert KNOBS["linear"].high == 0.7


# ---- the command line --------------------------------------------------------------------------------------------


def test_tyro_parses_a_config():
    config = tyro.cli(Config, args=["--linear", "0.25", "--score", "kl", "--no-flag", "--size", "9", "--seed", "3"])
    assert (config.linear, config.score, config.flag, config.size, config.seed) == (0.25, "kl", False, 9, 3)
    assert config.log == KNOBS["log"].default and isinstance(config, Config)


@pytest.mark.parametrize("arguments", [["--linear", "9"], ["--score", "js"], ["--linaer", "0.2"], ["--size", "2.5"]])
def test_tyro_refuses_what_the_config_refuses(arguments):
    with pytest.raises((SystemExit, KnobError)), contextlib.redirect_stderr(io.StringIO()):
        tyro.cli(Config, args=arguments)


def test_tyro_help_shows_the_knobs_words_and_choices():
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as page:
        tyro.cli(Config, args=["--help"])
    text = page.getvalue()
    for words in ("the strength", "low: off", "high: on", "--linear", "{kl,tv,chi}"):
        assert words in text
