"""State: what is saved comes back the same, what can't be saved says so, and damaged files are never believed."""

from __future__ import annotations

import collections
import copy
import dataclasses
import enum
import itertools
import json
import math
import pickle
import random
import re
import threading

import numpy as np
import pytest
import torch
from torch import nn

from polrl.core.errors import CheckpointError, StateError
from polrl.core.fake_device import pretended_cuda
from polrl.core.state import State, capture, restore


class Owner:
    """An object whose attributes are captured."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


def through_disk(state: State) -> State:
    return State.from_bytes(state.to_bytes({}), "test")[0]


def carried(source: Owner, target: Owner, disk: bool) -> Owner:
    """Take the state of one object to another, perhaps by way of a file."""
    state = capture(source)
    restore(target, through_disk(state) if disk else state)
    assert capture(target).digest() == state.digest()
    return target


disk_or_not = pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
Pair = collections.namedtuple("Pair", ["left", "right"])

VALUES = {
    "none": None,
    "bool": True,
    "int": -(2**80),
    "float": 0.1 + 0.2,
    "tiny": 5e-324,
    "negative_zero": -0.0,
    "nan": float("nan"),
    "infinity": float("-inf"),
    "text": 'é\n"$"',
    "list": [1, [2.0, "three"], None],
    "tuple": (1, (2, 3), []),
    "dict": {"a": 1, 2: "b", (3, "c"): None, None: 4, 1.5: True},
    "deque": collections.deque([1, 2, 3], maxlen=3),
    "endless_deque": collections.deque([1]),
    "set": {3, 1, (2, "x")},
    "frozenset": frozenset({3, 1}),
    "frozen_keys": {frozenset({1, 2}): "both", frozenset(): "none"},
    "float32_scalar": np.float32(0.1),
    "float64_scalar": np.float64(0.1),
    "int_scalar": np.int16(-3),
    "uint64_scalar": np.uint64(2**64 - 1),
    "bool_scalar": np.bool_(True),
    "half_scalar": np.float16(0.1),
    "nan_scalar": np.float32("nan"),
    "bool_array": np.array([True, False]),
    "zero_dimensional_array": np.array(2.5),
    "empty_array": np.zeros((0, 3), dtype=np.float32),
    "uint16_array": np.arange(4, dtype=np.uint16),
    "half_array": np.arange(4, dtype=np.float16),
    "complex_tensor": torch.tensor([1 + 2j], dtype=torch.complex64),
    "empty_vector": np.array([]),
    "strided_array": np.arange(24.0).reshape(4, 6)[::2, ::-3],
    "fortran_array": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "tensor": torch.arange(6.0).reshape(2, 3),
    "zero_dimensional_tensor": torch.tensor(7),
    "empty_tensor": torch.zeros(0, 2),
    "bool_tensor": torch.tensor([True, False]),
    "bfloat16_tensor": torch.tensor([1.5, 2.5], dtype=torch.bfloat16),
    "transposed_tensor": torch.arange(6.0).reshape(2, 3).T,
    "expanded_tensor": torch.arange(3.0).expand(2, 3),
}


def assert_alike(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(found, expected)
    elif isinstance(expected, np.ndarray | np.generic):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert np.array_equal(found, expected, equal_nan=True)
    elif isinstance(expected, list | tuple | collections.deque):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_alike(a, b)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_alike(found[key], expected[key])
    else:
        assert found == expected or repr(found) == repr(expected)
        assert not isinstance(expected, float) or math.copysign(1, found) == math.copysign(1, expected)


@disk_or_not
@pytest.mark.parametrize("name", VALUES)
def test_a_value_comes_back_alike(name, disk):
    value = VALUES[name]
    back = carried(Owner(value=copy.deepcopy(value)), Owner(value=None), disk).value
    assert_alike(back, value)
    if isinstance(value, collections.deque):
        assert back.maxlen == value.maxlen


@disk_or_not
def test_the_layout_in_memory_comes_back_and_with_it_the_last_bits(disk):
    make = torch.Generator().manual_seed(0)
    cube, vector = torch.randn(33, 5, 7, generator=make), torch.randn(33, generator=make)
    matrix, net = torch.randn(33, 33, generator=make), nn.Conv2d(3, 4, 3)
    source = Owner(
        net=net.to(memory_format=torch.channels_last),
        transposed=matrix.T,
        cube=cube.permute(2, 0, 1),
        flat=matrix[:, :1].T,
        column=matrix.T[:, :1],
        thin=cube[:, :1].permute(2, 1, 0),
        every_other=matrix[::2, ::3].T,
        fortran=np.asfortranarray(matrix.numpy()),
        numpy_transposed=matrix.double().numpy().T,
    )
    target = carried(source, Owner(net=nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)), disk)
    for name in ("transposed", "cube"):
        assert getattr(target, name).stride() == getattr(source, name).stride()
    for name in ("fortran", "numpy_transposed"):
        assert getattr(target, name).strides == getattr(source, name).strides
    assert torch.equal(target.net.weight, source.net.weight)
    assert torch.equal(target.transposed @ vector, source.transposed @ vector)
    assert torch.equal(target.cube.sum((0, 1)), source.cube.sum((0, 1)))
    assert np.array_equal(target.fortran @ vector.numpy(), source.fortran @ vector.numpy())


@disk_or_not
def test_the_copy_shares_no_memory_with_the_original(disk):
    source = Owner(tensor=torch.zeros(3), array=np.zeros(3), nested={"list": [np.zeros(2)]})
    state = capture(source)
    target = Owner()
    restore(target, through_disk(state) if disk else state)
    source.tensor += 1
    source.array += 1
    source.nested["list"][0] += 1
    target.tensor += 5
    target.array += 5
    again = Owner()
    restore(again, state)
    assert again.tensor.sum() == 0 and again.array.sum() == 0 and again.nested["list"][0].sum() == 0


@disk_or_not
def test_attributes_that_are_gone_are_deleted_and_skipped_ones_stay(disk):
    state = capture(Owner(kept=1, data="not saved"), skip=frozenset({"data"}))
    target = Owner(kept=0, later="made in a later phase", data="its own")
    restore(target, through_disk(state) if disk else state, skip=frozenset({"data"}))
    assert vars(target) == {"kept": 1, "data": "its own"}


@disk_or_not
def test_mapping_classes_and_their_factories_survive(disk):
    def make():
        return Owner(counts=collections.defaultdict(int), order=collections.OrderedDict(), tally=collections.Counter())

    source = make()
    source.counts["a"] += 3
    source.order["b"] = 1
    source.tally.update("aab")
    target = carried(source, make(), disk)
    target.counts["new"] += 1
    assert target.counts == {"a": 3, "new": 1}
    assert isinstance(target.order, collections.OrderedDict) and target.tally.most_common(1) == [("a", 2)]


@disk_or_not
def test_a_namedtuple_keeps_its_class(disk):
    back = carried(Owner(pair=Pair(torch.ones(2), [1])), Owner(pair=Pair(None, None)), disk).pair
    assert isinstance(back, Pair) and torch.equal(back.left, torch.ones(2)) and back.right == [1]


def test_a_namedtuple_that_setup_does_not_make_is_refused_rather_than_changed():
    state = capture(Owner(buffer=collections.deque([Pair(1, 2)])))
    with pytest.raises(StateError, match=r"buffer\[0\]"):
        restore(Owner(buffer=collections.deque()), state)


@dataclasses.dataclass(frozen=True)
class Inner:
    weights: torch.Tensor
    net: nn.Module


@dataclasses.dataclass
class Outer:
    inner: Inner
    count: int = 0
    names: list[str] = dataclasses.field(default_factory=list)


@disk_or_not
def test_nested_dataclasses_come_back_and_keep_their_networks(disk):
    source = Owner(outer=Outer(Inner(torch.ones(2), nn.Linear(2, 1)), 3, ["a"]))
    fresh = Owner(outer=Outer(Inner(torch.zeros(2), nn.Linear(2, 1))))
    net = fresh.outer.inner.net
    back = carried(source, fresh, disk).outer
    assert (back.count, back.names) == (3, ["a"])
    assert back.inner.net is net and torch.equal(net.weight, source.outer.inner.net.weight)


# ---- networks, parameters, optimizers ------------------------------------------------------------------------------


class Odd(nn.Module):
    """A module with everything that a state dict leaves out."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
        self.tied = self.body[2]
        self.register_buffer("hidden", torch.zeros(2), persistent=False)
        self.visits = 0

    def get_extra_state(self):
        return {"visits": self.visits}

    def set_extra_state(self, state):
        self.visits = state["visits"]


@disk_or_not
def test_a_module_comes_back_whole(disk):
    source = Owner(net=Odd())
    source.net.hidden += 2
    source.net.visits = 5
    source.net.body[0].weight.requires_grad_(False)
    source.net.body(torch.randn(4, 2))
    source.net.body[1].eval()
    target = Owner(net=Odd())
    own = target.net
    carried(source, target, disk)
    assert target.net is own and own.tied is own.body[2]
    assert own.visits == 5 and torch.equal(own.hidden, torch.full((2,), 2.0))
    assert [p.requires_grad for p in own.parameters()] == [p.requires_grad for p in source.net.parameters()]
    assert [m.training for m in own.modules()] == [m.training for m in source.net.modules()]
    assert torch.equal(own.body[1].running_var, source.net.body[1].running_var)
    assert own.body[1].num_batches_tracked == 1


@disk_or_not
def test_aliases_of_parameters_stay_aliases(disk):
    def make():
        net, log_scale = nn.Linear(3, 2), torch.zeros((), requires_grad=True)
        lists = {"all": [*net.parameters(), log_scale], "first": (net.weight,)}
        shared = torch.zeros(2)
        optimizer = torch.optim.Adam(lists["all"])
        return Owner(lists=lists, alias=net.bias, net=net, log_scale=log_scale, one=shared, two=[shared], opt=optimizer)

    source = make()
    for _ in range(2):
        sum(p.sum() for p in source.lists["all"]).backward()
        source.opt.step()
    target = make()
    held = target.opt.param_groups[0]["params"]
    carried(source, target, disk)
    assert target.alias is target.net.bias and target.lists["first"][0] is target.net.weight
    assert all(a is b for a, b in zip(target.lists["all"], held, strict=True)) and held[-1] is target.log_scale
    assert target.one is target.two[0]
    assert torch.equal(target.log_scale, source.log_scale)


@disk_or_not
def test_two_names_of_one_array_stay_one_array(disk):
    array, items = np.zeros(3), [1]
    target = carried(Owner(a=array, b={"x": array}, c=items), Owner(), disk)
    target.a[0] = 9
    assert target.b["x"][0] == 9


@pytest.mark.parametrize("saved", [True, False])
def test_a_parameter_that_is_frozen_or_freed_stays_the_optimizers_own(saved):
    def make(grad):
        theta = torch.zeros(2, requires_grad=True)
        owner = Owner(theta=theta, optimizer=torch.optim.SGD([theta], lr=0.1))
        theta.requires_grad_(grad)
        return owner

    source, target = make(saved), make(not saved)
    with torch.no_grad():
        source.theta += 1
    restore(target, capture(source))
    assert target.theta is target.optimizer.param_groups[0]["params"][0]
    assert target.theta.requires_grad is saved and target.theta.sum() == 2


OPTIMIZERS = {
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.8, 0.9)),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}
SCHEDULERS = {
    "none": lambda o: None,
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 9),
    "one_cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=20, cycle_momentum=False),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.2, 3, cycle_momentum=False),
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[3],
    ),
}


class Trained(Owner):
    """A network, an optimizer, a scheduler and a generator of its own."""

    def __init__(self, optimizer, scheduler):
        self.net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        groups = [{"params": self.net[0].parameters(), "lr": 0.05}, {"params": self.net[2].parameters()}]
        parameters = list(self.net.parameters()) if optimizer == "lbfgs" else groups
        self.optimizer = OPTIMIZERS[optimizer](parameters)
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)
        self.generator = torch.Generator().manual_seed(0)

    def train(self, steps):
        losses = []
        for _ in range(steps):
            x = torch.randn(8, 2, generator=self.generator)

            def closure(x=x):
                self.optimizer.zero_grad()
                loss = (self.net(x) - x.prod(1, keepdim=True)).square().mean()
                loss.backward()
                return loss

            losses.append(self.optimizer.step(closure).item())
            if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                self.scheduler.step(losses[-1])
            elif self.scheduler is not None:
                self.scheduler.step()
        return losses, [group["lr"] for group in self.optimizer.param_groups]


@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [*((name, "none") for name in OPTIMIZERS), *(("adam", name) for name in SCHEDULERS if name != "none")],
)
def test_optimizers_and_schedulers_go_on_identically(optimizer, scheduler):
    source = Trained(optimizer, scheduler)
    source.train(4)
    state = capture(source)
    future = source.train(5)
    for other in (state, through_disk(state)):
        twin = Trained(optimizer, scheduler)
        restore(twin, other)
        assert twin.train(5) == future
    restore(source, state)
    assert source.train(5) == future, "going back in place"


class Counter:
    """An object that saves itself, with parts that never change among what it saves."""

    def __init__(self, count):
        self.count, self.array, self.kind = count, np.full(2, float(count)), torch.float64

    def state_dict(self):
        return {"count": self.count, "array": self.array, "kind": self.kind, "function": len}

    def load_state_dict(self, state):
        vars(self).update(state)


def test_tensors_that_setup_did_not_make_come_back_to_the_device_they_were_on():
    class Owner:
        def __init__(self) -> None:
            self.device = torch.device("cuda")
            self.rows, self.named, self.latest = [], {}, None

    with pretended_cuda() as tags:
        owner, fresh = Owner(), Owner()
        owner.rows = [torch.ones(2, device="cuda"), torch.zeros(2)]
        owner.named["best"], owner.latest = torch.full((3,), 2.0, device="cuda"), torch.ones(1, device="cuda")
        restore(fresh, capture(owner))
        assert [row in tags for row in fresh.rows] == [True, False]
        assert fresh.named["best"] in tags and fresh.latest in tags
        assert fresh.rows[0] is not owner.rows[0] and fresh.named["best"].sum().item() == 6
        assert capture(fresh).digest() == capture(owner).digest()


@disk_or_not
def test_an_object_with_a_state_dict_gets_all_of_it_back(disk):
    target = Owner(counter=Counter(0))
    counter = target.counter
    restore(target, (through_disk if disk else copy.copy)(capture(Owner(counter=Counter(3)))))
    assert target.counter is counter and (counter.count, counter.array.tolist()) == (3, [3.0, 3.0])
    assert counter.kind is torch.float64 and counter.function is len


# ---- generators ------------------------------------------------------------------------------------------------------

GENERATORS = {
    "torch": (lambda: torch.Generator().manual_seed(3), lambda g: torch.randn(5, generator=g).tolist()),
    "python": (lambda: random.Random(3), lambda g: [g.gauss(0, 1) for _ in range(3)]),
    **{
        kind: (
            lambda kind=kind: np.random.Generator(getattr(np.random, kind)(3)),
            lambda g: [*g.standard_normal(3), g.integers(9), *g.random(2, dtype=np.float32)],
        )
        for kind in ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
    },
}


@disk_or_not
@pytest.mark.parametrize("kind", GENERATORS)
def test_a_generator_goes_on_where_it_was(kind, disk):
    make, draw = GENERATORS[kind]
    source = Owner(generator=make())
    draw(source.generator)
    target = carried(source, Owner(generator=make()), disk)
    assert draw(target.generator) == draw(source.generator)


# ---- what can't be saved ---------------------------------------------------------------------------------------------


class Plain:
    pass


class Colour(enum.Enum):
    RED = 1


def with_graph():
    return (torch.ones(2, requires_grad=True) * 2).sum()


def cycle():
    items = [1]
    items.append({"back": items})
    return items


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (with_graph, r"value is a tensor that still holds its graph; keep `\.detach\(\)`"),
        (lambda: [{"x": with_graph()}], r"value\[0\]\['x'\] is a tensor that still holds its graph"),
        (lambda: (i for i in range(3)), "value is a builtins.generator, which can't be saved"),
        (threading.Lock, "value is a _thread.lock, which can't be saved"),
        (Plain, r"value is a .*Plain, which can't be saved; give its class state_dict\(\)"),
        (lambda: {"deep": [Plain()]}, r"value\['deep'\]\[0\] is a .*Plain"),
        (lambda: Colour.RED, "value is a .*Colour, which can't be saved"),
        (lambda: b"bytes", "value is a builtins.bytes, which can't be saved"),
        (cycle, r"value\[1\]\['back'\] refers back to something that holds it"),
        (lambda: np.array([None, 1]), "value is an array of object; only real numbers and booleans can be saved"),
        (lambda: np.array(["a"]), "value is an array of <U1"),
        (lambda: np.zeros(2, dtype=[("a", int)]), "value is an array of "),
        (lambda: np.zeros(2, dtype=np.longdouble), "value is an array of "),
        (lambda: np.datetime64("2026-01-01"), "value is an array of "),
        (lambda: torch.zeros(2).to_sparse(), "value is a torch.sparse_coo tensor"),
        (lambda: torch.zeros(2, dtype=torch.complex128), "value is a .* tensor of torch.complex128"),
        (lambda: np.array([1 + 2j]), "value is an array of complex128"),
        (lambda: np.complex64(1j), "value is an array of complex64"),
        (lambda: np.random.RandomState(0), "value is a numpy.*RandomState, which can't be saved"),
    ],
)
def test_what_cannot_be_saved_is_named_with_its_place(make, reason):
    with pytest.raises(StateError, match=reason):
        capture(Owner(fine=1, value=make()))


def test_arrays_of_the_other_byte_order_come_back_with_their_values():
    back = carried(Owner(value=np.arange(3, dtype=">f8")), Owner(), disk=True).value
    assert np.array_equal(back, np.arange(3.0))


def test_the_same_object_twice_is_no_cycle():
    shared = [1]
    assert capture(Owner(a=[shared, shared])).tree["a"]["items"][0] == capture(Owner(a=shared)).tree["a"]


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        (nn.Linear(2, 1), None, r"value is missing or of another kind \(NoneType\).*must all be made in setup\(\)"),
        (torch.optim.SGD([torch.zeros(1)], lr=1.0), None, "value is missing or of another kind"),
        (torch.Generator(), "text", r"another kind \(str\)"),
        (np.random.default_rng(0), None, "value is missing"),
        (random.Random(0), None, "value is missing"),
        (nn.Linear(2, 1), nn.Linear(2, 1, bias=False), "other parameters than the saved one: bias"),
        (nn.Linear(2, 1), nn.Linear(3, 1), r"value\.weight has shape \(1, 3\), saved was \(1, 2\)"),
        (Outer(None), 3, "value is not the dataclass that was saved"),
    ],
)
def test_a_state_that_does_not_fit_says_what_is_missing(source, target, reason):
    with pytest.raises(StateError, match=reason):
        restore(Owner(value=target), capture(Owner(value=source)))


# ---- the digest ------------------------------------------------------------------------------------------------------


def digest(**attributes):
    return capture(Owner(**attributes)).digest()


def test_the_digest_sees_every_difference():
    one_bit = np.nextafter(np.float32(1), np.float32(2))
    kinds = [
        {"x": torch.tensor([1.0, 0.0])},
        {"x": torch.tensor([float(one_bit), 0.0])},
        {"x": torch.tensor([1.0, -0.0])},
        {"x": torch.tensor([[1.0, 0.0]])},
        {"x": torch.tensor([1.0, 0.0], dtype=torch.float64)},
        {"x": torch.tensor([1.0, 0.0]).view(torch.int32)},
        {"x": np.array([1.0, 0.0], dtype=np.float32)},
        {"x": torch.tensor([1.0, 0.0]), "y": 0},
        {"z": torch.tensor([1.0, 0.0])},
        {"x": [1.0, 0.0]},
        {"x": (1.0, 0.0)},
        {"x": [1, 0]},
        {"x": [True, False]},
        {"x": [1.0, -0.0]},
        {"x": np.float32(1)},
        {"x": np.float64(1)},
        {"x": 1.0},
        {"x": {"a": 1, "b": 2}},
        {"x": {1, 2}},
        {"x": frozenset({1, 2})},
    ]
    digests = [digest(**kind) for kind in kinds]
    for (a, first), (b, second) in itertools.combinations(enumerate(digests), 2):
        assert first != second, (kinds[a], kinds[b])
    assert digests == [digest(**copy.deepcopy(kind)) for kind in kinds]


# ---- files -----------------------------------------------------------------------------------------------------------


def small_file() -> tuple[State, bytes]:
    rng = np.random.default_rng(0)
    state = capture(Owner(a=torch.arange(3.0), b={"x": 1e-05, "y": [True]}, rng=rng))
    return state, state.to_bytes({"step": 12, "tape": {"method": "m", "values": [0.1, 1e-05]}})


def test_bytes_round_trip_with_their_notes():
    state, content = small_file()
    again, notes = State.from_bytes(content, "test")
    assert again.digest() == state.digest() and again.tree == state.tree
    assert notes == {"step": 12, "tape": {"method": "m", "values": [0.1, 1e-05]}}
    assert capture(Owner()).digest() == through_disk(capture(Owner())).digest()


def test_a_truncated_file_is_refused():
    _, content = small_file()
    for length in [*range(0, len(content), 7), len(content) - 1]:
        with pytest.raises(CheckpointError, match=r"my file is not a whole|my file was altered"):
            State.from_bytes(content[:length], "my file")


def test_a_flipped_bit_anywhere_is_noticed():
    state, content = small_file()
    bits = random.Random(0)
    for place in range(len(content)):
        altered = bytearray(content)
        altered[place] ^= 1 << bits.randrange(8)
        with pytest.raises(CheckpointError):
            State.from_bytes(bytes(altered), "my file")
            pytest.fail(f"byte {place}: {content[place : place + 1]!r} became {bytes(altered[place : place + 1])!r}")


def test_a_longer_file_is_refused():
    _, content = small_file()
    with pytest.raises(CheckpointError):
        State.from_bytes(content + b"\0" * 8, "my file")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("form", ["pickle", "torch", "numpy", "hidden"])
def test_a_pickle_is_refused_and_never_executed(form, tmp_path):
    trap = tmp_path / "executed"
    file = tmp_path / "state.safetensors"
    if form == "torch":
        torch.save(Payload(trap), file)
    elif form == "numpy":
        np.save(tmp_path / "state", np.array([Payload(trap)], dtype=object))
        file = tmp_path / "state.npy"
    else:
        payload = pickle.dumps(Payload(trap))
        state, content = small_file()
        file.write_bytes(payload if form == "pickle" else content + payload)
    with pytest.raises(CheckpointError, match="nothing else is ever loaded"):
        State.from_bytes(file.read_bytes(), str(file))
    assert not trap.exists()
    if form == "pickle":
        pickle.loads(file.read_bytes()).close()
        assert trap.exists(), "the trap itself works"


def test_other_files_are_refused():
    import safetensors.torch

    plain = safetensors.torch.save({"weight": torch.zeros(2)})
    foreign = safetensors.torch.save({"weight": torch.zeros(2)}, {"state": "{}", "notes": "{}", "digest": "0"})
    for content in (b"", b"\0" * 64, b"{}", plain, foreign, json.dumps({"state": {}}).encode()):
        with pytest.raises(CheckpointError, match=re.escape("runs/a/state")):
            State.from_bytes(content, "runs/a/state")
