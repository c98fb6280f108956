"""polrl: policy regularization, taught by letting people touch it.

Sixty-one research methods, each one readable file, one notebook and one live lab. The names below are all
that a method's file needs::

    import polrl
    from polrl import Curve, Run, Study, equation, knob

They are loaded when they are first used, so that `import polrl` is quick and the command line answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Bars": "views",
    "Budget": "study",
    "Config": "knobs",
    "Criterion": "study",
    "Curve": "views",
    "Driver": "driver",
    "Dropout": "sampling",
    "Heatmap": "views",
    "Histogram": "views",
    "ImageGrid": "views",
    "Learner": "learner",
    "Lines": "views",
    "Metrics": "learner",
    "Points": "views",
    "Run": "run",
    "Study": "study",
    "Tape": "tape",
    "Tokens": "views",
    "View": "views",
    "catalog": "catalog",
    "equation": "equation",
    "equations": "equation",
    "knob": "knobs",
    "load_method": "catalog",
    "load_study": "catalog",
    "sample_bernoulli": "sampling",
    "sample_beta": "sampling",
    "sample_categorical": "sampling",
    "sample_gamma": "sampling",
    "sample_normal": "sampling",
    "sweep": "sweep",
}

__all__ = sorted([*_HOME, "__version__"])

if TYPE_CHECKING:
    from polrl.core.catalog import catalog, load_method, load_study
    from polrl.core.driver import Driver
    from polrl.core.equation import equation, equations
    from polrl.core.knobs import Config, knob
    from polrl.core.learner import Learner, Metrics
    from polrl.core.run import Run
    from polrl.core.sampling import (
        Dropout,
        sample_bernoulli,
        sample_beta,
        sample_categorical,
        sample_gamma,
        sample_normal,
    )
    from polrl.core.study import Budget, Criterion, Study
    from polrl.core.sweep import sweep
    from polrl.core.tape import Tape
    from polrl.core.views import Bars, Curve, Heatmap, Histogram, ImageGrid, Lines, Points, Tokens, View


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'polrl' has no attribute {name!r}")
    # Submodules named like what they define (catalog, sweep) must not be taken for it: always go through the map.
    value = getattr(importlib.import_module(f"polrl.core.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
