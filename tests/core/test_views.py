"""Views: they take what learners have, say what does not fit, and never change under the eyes of who draws them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from polrl import Bars, Curve, Heatmap, Histogram, ImageGrid, Lines, Points, Tokens, View

WORDS = {"title": "Title", "alt": "What it shows"}


# How each view takes an array, of what shape, and where it then is.
MAKERS = {
    "image_grid": (lambda x: ImageGrid(**WORDS, images=x), (1, 2, 3, 3), lambda v: v.images),
    "bars": (lambda x: Bars(**WORDS, labels=["a", "b"], values={"n": x}), (2,), lambda v: v.values["n"]),
    "counts": (lambda x: Histogram(**WORDS, edges=[0, 1, 2], counts={"n": x}), (2,), lambda v: v.counts["n"]),
    "edges": (lambda x: Histogram(**WORDS, edges=x, counts={}), (3,), lambda v: v.edges),
    "x": (lambda x: Lines(**WORDS, x=x, y={}), (3,), lambda v: v.x),
    "y": (lambda x: Lines(**WORDS, x=[0, 1, 2], y={"n": x}), (3,), lambda v: v.y["n"]),
    "heatmap": (lambda x: Heatmap(**WORDS, values=x), (2, 3), lambda v: v.values),
    "points": (lambda x: Points(**WORDS, groups={"n": x}), (4, 2), lambda v: v.groups["n"]),
    "tokens": (lambda x: Tokens(**WORDS, lines=[["a", "b"]], values=[x]), (2,), lambda v: v.values[0]),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    "kind", [np.float64, np.float32, np.int64, bool, torch.float64, torch.float32, torch.bool, list]
)
def test_a_view_holds_a_copy_as_float64(name, kind):
    make, shape, own = MAKERS[name]
    numbers = np.arange(1, 1 + math.prod(shape)).reshape(shape)
    if isinstance(kind, torch.dtype):
        source = torch.as_tensor(numbers).to(kind)
    else:
        source = numbers.tolist() if kind is list else numbers.astype(kind)
    expected = np.asarray(source, dtype=np.float64).copy()
    view = make(source)
    source[0] = source[0] * 0
    assert isinstance(view, View)
    assert own(view).dtype == np.float64 and np.array_equal(own(view), expected), "what comes later must not show"


@pytest.mark.parametrize("name", MAKERS)
def test_a_wrong_number_of_dimensions_is_named(name):
    make, _, _ = MAKERS[name]
    with pytest.raises(ValueError, match=r"must have .* dimensions, got shape \(1, 1, 1\)"):
        make(np.zeros((1, 1, 1)))
    with pytest.raises(ValueError, match=r"got shape \(\)"):
        make(1.0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: ImageGrid(**WORDS, images=np.zeros((1, 1, 2, 2, 4))),
            r"must end in 3 channels, got shape \(1, 1, 2, 2, 4\)",
        ),
        (
            lambda: ImageGrid(**WORDS, images=np.zeros((1, 2, 2, 2)), row_labels=["a", "b"]),
            "row_labels must have 1 words, got 2",
        ),
        (
            lambda: ImageGrid(**WORDS, images=np.zeros((1, 2, 2, 2)), column_labels=["a"]),
            "column_labels must have 2 words",
        ),
        (lambda: Bars(**WORDS, labels=["a"], values={"one": [1, 2]}), "bars 'one' must have 1 values, got 2"),
        (lambda: Histogram(**WORDS, edges=[0, 1], counts={"one": [1, 2]}), "counts 'one' must have 1 values, got 2"),
        (lambda: Lines(**WORDS, x=[0, 1], y={"one": [1]}), "line 'one' must have 2 values, got 1"),
        (
            lambda: Points(**WORDS, groups={"one": np.zeros((3, 3))}),
            r"points 'one' must have shape \[n, 2\], got \(3, 3\)",
        ),
        (lambda: Tokens(**WORDS, lines=[["a", "b"]], values=[[1.0]]), "one number a token"),
        (lambda: Tokens(**WORDS, lines=[["a"]], values=[]), "one number a token"),
        (lambda: Heatmap(values=[[1]]), "title"),
    ],
)
def test_what_does_not_fit_is_named(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make()


def test_images_become_bytes_between_their_ends():
    images = [[[[-1.0, 0.0, 0.5, 1.0, 2.0, float("nan"), float("inf"), float("-inf")]]]]
    levels = ImageGrid(**WORDS, images=images).to_bytes()
    assert levels.dtype == np.uint8 and levels.tolist() == [[[[0, 0, 127, 255, 255, 0, 255, 0]]]]
    shifted = ImageGrid(**WORDS, images=[[[[-1.0, 0.0, 1.0]]]], low=-1.0, high=1.0)
    assert shifted.to_bytes().tolist() == [[[[0, 127, 255]]]]


def test_views_cannot_be_reassigned():
    view = Heatmap(**WORDS, values=[[1.0]])
    with pytest.raises(dataclasses.FrozenInstanceError):
        view.title = "other"


def test_one_metric_may_be_given_by_its_name():
    assert Curve("loss", "Loss").metrics == ("loss",)
    assert Curve(("loss", "kl"), "Both").metrics == ("loss", "kl")
