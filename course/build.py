"""Executes the course's notebooks in fast mode and writes them as they are committed; or checks that they are fresh.

python course/build.py                 all notebooks
python course/build.py noise_mask      those whose name contains a word
python course/build.py --check         say which committed notebooks are older than the code they show
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from polrl.core.catalog import PACKAGE, fingerprint
from polrl.core.files import write_atomic

COURSE = Path(__file__).resolve().parent
MAX_BYTES = 500_000


def notebooks(word: str = "") -> list[Path]:
    """Return the course's notebooks in their order, without the assignments."""
    found = [
        path
        for path in sorted(COURSE.rglob("*.ipynb"))
        if "assignments" not in path.parts and ".ipynb_checkpoints" not in path.parts
    ]
    return [path for path in found if word in path.stem]


def code_digest(notebook: dict[str, Any]) -> str:
    """Return a digest of what a notebook runs: its own cells and the files of the methods that it imports."""
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    content = hashlib.sha256("\n".join(sources).encode())
    for module in sorted(set(re.findall(r"from polrl\.([\w.]+) import", "\n".join(sources)))):
        folder, *names = module.split(".")
        path = PACKAGE.joinpath(folder, *names).with_suffix(".py")
        if names and folder != "core" and path.exists():  # methods and their worlds, not what drives them
            content.update(fingerprint(path).encode())
    # Results are shown too: a new one makes the notebook old.
    for slug in sorted(set(re.findall(r'kept_result\("(\w+)"\)', "\n".join(sources)))):
        result = COURSE / "results" / f"{slug}.json"
        content.update(result.read_bytes() if result.exists() else b"none")
    return content.hexdigest()[:16]


def execute(path: Path) -> float:
    """Execute one notebook in fast mode and write it back, cleaned; returns the seconds it took."""
    import nbformat
    import papermill

    os.environ["POLRL_MODE"] = "fast"
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        done = Path(folder) / path.name
        papermill.execute_notebook(path, done, cwd=path.parent, progress_bar=False, kernel_name="python3")
        notebook = nbformat.read(done, as_version=4)
    seconds = time.monotonic() - began
    clean(notebook)
    notebook.metadata["polrl"] = {"code": code_digest(notebook)}
    text = nbformat.writes(notebook) + "\n"
    if len(text) > MAX_BYTES:
        raise ValueError(f"{path.name} has {len(text):,} bytes, at most {MAX_BYTES:,} are allowed")
    write_atomic(path, text)
    return seconds


def clean(notebook: Any) -> None:
    """Remove what differs from run to run or machine to machine: widget state, times, versions."""
    notebook.metadata.pop("widgets", None)
    notebook.metadata.pop("papermill", None)
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        for name in ("papermill", "execution", "collapsed", "ExecuteTime"):
            cell.metadata.pop(name, None)
        for output in cell.get("outputs", []):
            output.get("metadata", {}).pop("application/vnd.jupyter.widget-view+json", None)


def outdated(path: Path) -> str:
    """Say why a committed notebook is not what runs today; "" if it is."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    kept = notebook["metadata"].get("polrl", {}).get("code")
    if kept is None:
        return "never executed with `make course`"
    return "" if kept == code_digest(notebook) else "older than the code that it shows; run `make course`"


def main() -> int:
    """Execute or check; returns 1 if a notebook is outdated or fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("word", nargs="?", default="", help="only notebooks whose name contains it")
    parser.add_argument("--check", action="store_true", help="only say which notebooks are outdated")
    options = parser.parse_args()
    bad = 0
    for path in notebooks(options.word):
        name = path.relative_to(COURSE)
        if options.check:
            reason = outdated(path)
            bad += bool(reason)
            print(f"{'OLD ' if reason else 'ok  '} {name} {reason}")
            continue
        try:
            print(f"{name}: {execute(path):.0f} s", flush=True)
        except Exception as error:
            bad += 1
            print(f"{name}: FAILED: {error}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
