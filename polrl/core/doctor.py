"""`polrl doctor`: looks at the machine and the installation, and says what to do about what it finds."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from polrl.core.errors import PolrlError
from polrl.core.files import find_asset


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    good: bool
    words: str


def examine() -> list[Finding]:
    """Look at everything; nothing is changed."""
    looks: dict[str, Callable[[], Finding]] = {
        "Python": _python,
        "torch": _torch,
        "packages": _packages,
        "widgets": _widgets,
        "course": _course,
        "data": _data,
        "runs": _runs,
    }
    findings = []
    for name, look in looks.items():
        try:
            findings.append(look())
        except Exception as error:
            findings.append(Finding(name, False, f"{type(error).__name__}: {error}"))
    return findings


def _python() -> Finding:
    here = ".".join(map(str, sys.version_info[:3]))
    return Finding("Python", sys.version_info >= (3, 11), f"{here} at {sys.executable} (3.11 or newer is needed)")


def _torch() -> Finding:
    import torch

    from polrl.core.device import resolve_device

    device = resolve_device("auto")
    result = float((torch.ones(8, device=device) * 2).sum())
    words = f"{torch.__version__} computes on {device}, {torch.get_num_threads()} threads, {os.cpu_count()} cores"
    return Finding("torch", result == 16.0, words)


def _packages() -> Finding:
    needed = ("numpy", "scipy", "pandas", "pydantic", "tyro", "joblib", "safetensors", "matplotlib", "gymnasium")
    found, missing = [], []
    for name in needed:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    words = ", ".join(found) + (f"; MISSING: {', '.join(missing)}" if missing else "")
    return Finding("packages", not missing, words)


def _widgets() -> Finding:
    missing = [name for name in ("ipywidgets", "anywidget", "plotly") if importlib.util.find_spec(name) is None]
    if missing:
        return Finding("widgets", False, f"the lab needs {', '.join(missing)}: pip install 'polrl[course]'")
    front = "JupyterLab is installed" if importlib.util.find_spec("jupyterlab") else "JupyterLab is NOT installed"
    return Finding("widgets", True, f"ipywidgets {version('ipywidgets')}, anywidget {version('anywidget')}; {front}")


def _course() -> Finding:
    return Finding("course", True, str(find_asset("course/index.ipynb")))


def _data() -> Finding:
    from polrl.core.data import check_files, included_sets

    sets = included_sets()
    if not sets:
        raise PolrlError("no data set was found")
    for data_set in sets:
        check_files(data_set)
    checked = [data_set.name for data_set in sets]
    return Finding("data", True, f"{', '.join(checked)}: checksums hold")


def _runs() -> Finding:
    from polrl.core.store import list_runs, runs_root

    root = runs_root()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=root):
        pass
    free = shutil.disk_usage(root).free / 1e9
    words = f"{len(list_runs())} runs in {root}; {free:.1f} GB free"
    return Finding("runs", free > 0.5, words)
