"""Pictures of what is being learned, as plain data: a learner fills them, the lab and the notebooks draw them.

A view holds numpy arrays and words, no drawing code, so that `polrl` needs no plotting library and the same
view serves the live lab (a canvas in the page) and the static form (matplotlib in an executed notebook).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def _array(name: str, values: npt.ArrayLike, ndim: Sequence[int]) -> npt.NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64).copy()  # the learner goes on while the picture is drawn
    if array.ndim not in ndim:
        raise ValueError(f"{name} must have {' or '.join(map(str, ndim))} dimensions, got shape {array.shape}")
    return array


@dataclass(frozen=True, kw_only=True)
class View:
    """What every picture has.

    Parameters
    ----------
    title : str
        A few words above the picture.
    alt : str
        One sentence that says what the picture shows, for people who can't see it.
    """

    title: str
    alt: str


@dataclass(frozen=True, kw_only=True)
class ImageGrid(View):
    """Small images side by side.

    Parameters
    ----------
    images : array, [rows, columns, H, W] grey or [rows, columns, H, W, 3] colour
        Pixel values; `low` is drawn black, `high` white.
    row_labels, column_labels : sequence of str
        Words beside the rows and above the columns; empty for none.
    """

    images: npt.ArrayLike
    row_labels: Sequence[str] = ()
    column_labels: Sequence[str] = ()
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        images = _array("images", self.images, (4, 5))
        if images.ndim == 5 and images.shape[-1] != 3:
            raise ValueError(f"colour images must end in 3 channels, got shape {images.shape}")
        for name, labels, count in (
            ("row_labels", self.row_labels, images.shape[0]),
            ("column_labels", self.column_labels, images.shape[1]),
        ):
            if labels and len(labels) != count:
                raise ValueError(f"{name} must have {count} words, got {len(labels)}")
        object.__setattr__(self, "images", images)

    def to_bytes(self) -> npt.NDArray[np.uint8]:
        """Return the images as grey levels or colours from 0 to 255, for the page."""
        scaled = (np.asarray(self.images) - self.low) / (self.high - self.low)
        return np.asarray(np.clip(np.nan_to_num(scaled), 0, 1) * 255, dtype=np.uint8)


@dataclass(frozen=True, kw_only=True)
class Bars(View):
    """One bar a label.

    Parameters
    ----------
    labels : sequence of str
    values : mapping of str to array, [len(labels)]
        One group of bars a name.
    y_label : str
    y_range : (float, float), optional
        A fixed range, so that the picture does not jump while it runs.
    """

    labels: Sequence[str]
    values: Mapping[str, npt.ArrayLike]
    y_label: str = ""
    y_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        values = {name: _array(name, group, (1,)) for name, group in self.values.items()}
        for name, group in values.items():
            if len(group) != len(self.labels):
                raise ValueError(f"bars {name!r} must have {len(self.labels)} values, got {len(group)}")
        object.__setattr__(self, "values", values)


@dataclass(frozen=True, kw_only=True)
class Histogram(View):
    """How often values fall between edges.

    Parameters
    ----------
    edges : array, [n + 1]
    counts : mapping of str to array, [n]
        One outline a name; drawn as given (normalise before if it shall be a density).
    """

    edges: npt.ArrayLike
    counts: Mapping[str, npt.ArrayLike]
    x_label: str = ""
    y_label: str = "share"

    def __post_init__(self) -> None:
        edges = _array("edges", self.edges, (1,))
        counts = {name: _array(name, group, (1,)) for name, group in self.counts.items()}
        for name, group in counts.items():
            if len(group) != len(edges) - 1:
                raise ValueError(f"counts {name!r} must have {len(edges) - 1} values, got {len(group)}")
        object.__setattr__(self, "edges", edges)
        object.__setattr__(self, "counts", counts)


@dataclass(frozen=True, kw_only=True)
class Lines(View):
    """Curves over a common axis.

    Parameters
    ----------
    x : array, [n]
    y : mapping of str to array, [n]
        NaN where a curve has no value.
    y_range : (float, float), optional
        A fixed range, so that the picture does not jump while it runs.
    log_x, log_y : bool
        True for logarithmic axes, on which only values above zero are drawn.
    """

    x: npt.ArrayLike
    y: Mapping[str, npt.ArrayLike]
    x_label: str = ""
    y_label: str = ""
    y_range: tuple[float, float] | None = None
    log_x: bool = False
    log_y: bool = False

    def __post_init__(self) -> None:
        x = _array("x", self.x, (1,))
        y = {name: _array(name, line, (1,)) for name, line in self.y.items()}
        for name, line in y.items():
            if line.shape != x.shape:
                raise ValueError(f"line {name!r} must have {x.size} values, got {line.size}")
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "y", y)


@dataclass(frozen=True, kw_only=True)
class Heatmap(View):
    """A matrix as colours: a policy, a value function, a transport plan.

    Parameters
    ----------
    values : array, [rows, columns]
    low, high : float, optional
        The ends of the colour scale; the extremes of `values` where they are not given.
    diverging : bool
        True for signed values: zero in the middle of a two-sided colour scale.
    """

    values: npt.ArrayLike
    row_labels: Sequence[str] = ()
    column_labels: Sequence[str] = ()
    x_label: str = ""
    y_label: str = ""
    low: float | None = None
    high: float | None = None
    diverging: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", _array("values", self.values, (2,)))


@dataclass(frozen=True, kw_only=True)
class Points(View):
    """Clouds of points in the plane: actions over data actions, generated samples.

    Parameters
    ----------
    groups : mapping of str to array, [n, 2]
        Drawn in order, the later on top.
    x_range, y_range : (float, float), optional
        Fixed axes, so that the picture does not jump while it runs.
    """

    groups: Mapping[str, npt.ArrayLike]
    x_label: str = ""
    y_label: str = ""
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        groups = {name: _array(name, points, (2,)) for name, points in self.groups.items()}
        for name, points in groups.items():
            if points.shape[1] != 2:
                raise ValueError(f"points {name!r} must have shape [n, 2], got {points.shape}")
        object.__setattr__(self, "groups", groups)


@dataclass(frozen=True, kw_only=True)
class Tokens(View):
    """A text whose tokens are coloured by a number each.

    Parameters
    ----------
    lines : sequence of sequence of str
        The tokens of each line of text.
    values : sequence of array
        One number a token, line by line.
    """

    lines: Sequence[Sequence[str]]
    values: Sequence[npt.ArrayLike]
    low: float = 0.0
    high: float = 1.0
    diverging: bool = False

    def __post_init__(self) -> None:
        values = tuple(_array("values", row, (1,)) for row in self.values)
        if [len(row) for row in values] != [len(line) for line in self.lines]:
            raise ValueError("values must hold one number a token, line by line")
        object.__setattr__(self, "values", values)


@dataclass(frozen=True)
class Curve:
    """A learning curve that a learner declares: which metrics share one chart.

    Parameters
    ----------
    metrics : str or tuple of str
        Names that `update()` or `evaluate()` returns.
    title : str
    y_label : str
    log : bool
        True for a logarithmic axis.
    """

    metrics: tuple[str, ...]
    title: str
    y_label: str = ""
    log: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.metrics, str):
            object.__setattr__(self, "metrics", (self.metrics,))
