"""The data sets at hand: those that come with polrl, each told by its manifest, and those in the Minari folder.

A manifest is a `manifest.json` beside the data. It names the files with their sha256, either as
{"files": {name: sha256, ...}} or as {"file": name, "sha256": digest}; everything else in it is for people.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from polrl.core.errors import DataError, unknown_name
from polrl.core.files import asset_roots, read_checked


@dataclass(frozen=True)
class DataSet:
    """What is known of a data set without reading its arrays.

    Attributes
    ----------
    name : str
        What it is called: "minirad", "hopper-medium", or the Minari id of a local set.
    folder : Path
        Where it lies.
    kind : str
        What it holds, in a few words.
    form : str
        "minari" for transitions in Minari's form, "" for anything else.
    id : str
        Its Minari id, "" if it has none.
    rows : int, optional
        Rows, pictures, texts, whatever there is one of in a line.
    nbytes : int
        Size on the disk.
    mean_return : float, optional
        Mean return of its episodes.
    files : mapping of str to str
        The sha256 of each file, by its path in `folder`; empty if no manifest tells.
    problem : str
        Why its manifest can't be read; "" if it can.
    """

    name: str
    folder: Path
    kind: str = ""
    form: str = ""
    id: str = ""
    rows: int | None = None
    nbytes: int = 0
    mean_return: float | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""


def data_folder() -> Path | None:
    """Return the folder of the data that come with polrl, None where it was installed without them."""
    return next((root / "data" for root in asset_roots() if (root / "data").is_dir()), None)


def minari_folder() -> Path:
    """Return the folder in which Minari keeps its data sets; it may not be there yet."""
    named = os.environ.get("MINARI_DATASETS_PATH")
    return Path(named) if named is not None else Path.home() / ".minari" / "datasets"


def included_sets() -> list[DataSet]:
    """Return the data sets that come with polrl: every folder under `data/` that holds a manifest."""
    root = data_folder()
    return [] if root is None else [_from_manifest(path) for path in sorted(root.rglob("manifest.json"))]


def local_minari_sets() -> list[DataSet]:
    """Return the data sets in the Minari folder, fetched ones and those made there."""
    root = minari_folder()
    return [_from_metadata(folder, root) for folder in _minari_sets_under(root)]


def _minari_sets_under(root: Path) -> list[Path]:
    found = sorted(root.rglob("data/metadata.json")) if root.is_dir() else []
    folders = [path.parents[1] for path in found]
    return [folder for folder in folders if not any(part[0] == "." for part in folder.relative_to(root).parts)]


def _from_manifest(path: Path) -> DataSet:
    folder = path.parent
    nbytes = _size(folder)
    try:
        manifest = json.loads(path.read_bytes())
        files = manifest["files"] if "files" in manifest else {manifest["file"]: manifest["sha256"]}
        files = {str(name): str(digest) for name, digest in files.items()}
        rows, returns = manifest.get("rows"), manifest.get("returns", {})
        return DataSet(
            name=str(manifest.get("name", folder.name)),
            folder=folder,
            kind=str(manifest.get("kind") or manifest.get("title") or manifest.get("description", "").split(". ")[0]),
            form=str(manifest.get("form", "")),
            id=str(manifest.get("id", "")),
            rows=None if rows is None else int(rows),
            nbytes=nbytes,
            mean_return=None if returns.get("mean") is None else float(returns["mean"]),
            files=files,
        )
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        return DataSet(name=folder.name, folder=folder, nbytes=nbytes, problem=f"{path} can't be read: {error!r}")


def _from_metadata(folder: Path, root: Path) -> DataSet:
    name, nbytes = folder.relative_to(root).as_posix(), _size(folder)
    path = folder / "data" / "metadata.json"
    try:
        rows = json.loads(path.read_bytes())["total_steps"]
        files: Mapping[str, str] = {}
        kind, mean_return = "Minari", None
        if (folder / "manifest.json").exists():
            told = _from_manifest(folder / "manifest.json")
            kind, mean_return, files = told.kind, told.mean_return, told.files
        return DataSet(name, folder, kind, "minari", name, int(rows), nbytes, mean_return, files)
    except (OSError, KeyError, TypeError, ValueError) as error:
        return DataSet(
            name, folder, "Minari", "minari", name, nbytes=nbytes, problem=f"{path} can't be read: {error!r}"
        )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def find_set(name: str) -> DataSet:
    """Find a data set by its name or its Minari id.

    Raises
    ------
    UnknownNameError
        If there is none of that name; names the nearest.
    """
    sets = [*included_sets(), *local_minari_sets()]
    for each in sets:
        if name == each.name:
            return each
    for each in sets:
        if name == each.id:
            return each
    raise unknown_name("data set", name, [each.name for each in sets])


def check_files(data_set: DataSet) -> int:
    """Compare a data set's files with the digests of its manifest; return how many there are.

    Raises
    ------
    DataError
        If the manifest can't be read, or a file is missing, truncated or altered.
    """
    if data_set.problem:
        raise DataError(data_set.problem)
    for name, digest in data_set.files.items():
        read_checked(data_set.folder / name, digest)
    return len(data_set.files)


def makers() -> dict[str, Path]:
    """Return the scripts that make the data, by the name that `polrl data make` takes: data/make_NAME.py."""
    root = data_folder()
    found = sorted(root.glob("make_*.py")) if root is not None else []
    return {path.stem.removeprefix("make_"): path for path in found}


def make(name: str, options: Sequence[str]) -> int:
    """Run the script that makes a kind of data, with its own options; return its exit code.

    Raises
    ------
    UnknownNameError
        If there is no such script; names the nearest.
    """
    scripts = makers()
    if name not in scripts:
        raise unknown_name("maker of data", name, scripts)
    return subprocess.run([sys.executable, str(scripts[name]), *options]).returncode


def fetch(dataset_id: str) -> list[str]:
    """Download an official Minari set, and those that it is made of, into the Minari folder.

    The download goes to a folder beside it and is moved when it is complete, so nothing half-written is left.

    Parameters
    ----------
    dataset_id : str
        Such as "mujoco/hopper/medium-v0".

    Returns
    -------
    list of str
        The ids of the sets that were added; none if they were all there.

    Raises
    ------
    ImportError
        If Minari, or what it downloads with, is not installed.
    DataError
        If the id is not of Minari's form, the server can't be reached, has no such set, or sends what can't be read.
    """
    if not re.fullmatch(r"([\w-]+/)*[\w-]+-v\d+", dataset_id):
        raise DataError(f"{dataset_id!r} is no Minari id; allowed: such as mujoco/hopper/medium-v0")
    root = minari_folder()
    if (root / dataset_id / "data").is_dir():
        return []
    for package, extra in (("minari", "polrl[course]"), ("huggingface_hub", "minari[hf]")):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f'fetching needs {package}, which is not installed: pip install "{extra}"')
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".fetch-") as temporary:
        # A process of its own: Minari takes its folder from the environment, which belongs to the whole process.
        done = subprocess.run(
            [sys.executable, "-c", "import sys, minari; minari.download_dataset(sys.argv[1])", dataset_id],
            env={**os.environ, "MINARI_DATASETS_PATH": temporary},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            raise DataError(_why_not_fetched(dataset_id, done.stderr))
        if not (Path(temporary) / dataset_id / "data" / "metadata.json").is_file():
            raise DataError(f"Minari's server sent no data set under {dataset_id}; nothing was kept")
        return _move_sets(Path(temporary), root)


def _why_not_fetched(dataset_id: str, complaints: str) -> str:
    """Tell a server that can't be reached from one that answers no."""
    lines = [line.strip() for line in complaints.splitlines() if line.strip()]
    last = lines[-1] if lines else "no reason given"
    if last.startswith("ValueError:"):
        return f"{dataset_id} can't be fetched: {last.removeprefix('ValueError:').strip()}"
    return f"Minari's server could not be reached, nothing was fetched of {dataset_id}: {last}"


def _move_sets(source: Path, root: Path) -> list[str]:
    """Move whole sets, and the files that tell of their name spaces, to where Minari looks for them."""
    moved = []
    for folder in _minari_sets_under(source):
        name = folder.relative_to(source).as_posix()
        if not (root / name).exists():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder, root / name)
            moved.append(name)
    for path in source.rglob("namespace_metadata.json"):
        target = root / path.relative_to(source)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)
    return moved
