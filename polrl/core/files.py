"""Files that survive a crash: atomic writing, checksums, and where course and data lie."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polrl.core.errors import DataError


def _read_umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


# Read once while importing: reading it means setting it for a moment, which threads would notice.
_UMASK = _read_umask()


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a whole file or leave the old one untouched.

    The content goes to a temporary file in the same folder, is forced to the disk, and then takes the
    name in one step: a crash, a kill or a full disk never leaves half a file under `path`.

    Parameters
    ----------
    path : Path
        Where the file shall stand; its folder is made if it is missing.
    content : bytes or str
        The whole content; text is written as UTF-8.

    Raises
    ------
    OSError
        If the disk is full or the folder can't be written; the old file still stands.
    """
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)  # mkstemp makes private files; these are ordinary ones
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def to_json(value: Any, indent: int | None = None) -> str:
    """Return JSON in which numbers that are not finite, which JSON does not know, stand as words."""
    return json.dumps(_in_words(value), indent=indent, allow_nan=False)


def _in_words(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _in_words(entry) for key, entry in value.items()}
    return [_in_words(entry) for entry in value] if isinstance(value, list | tuple) else value


def from_json(text: str) -> Any:
    """Read what `to_json` wrote."""
    return _in_numbers(json.loads(text))


def _in_numbers(value: Any) -> Any:
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _in_numbers(entry) for key, entry in value.items()}
    return [_in_numbers(entry) for entry in value] if isinstance(value, list) else value


def sha256(content: bytes) -> str:
    """Return the SHA-256 digest of some bytes, as 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def read_checked(path: Path, expected: str) -> bytes:
    """Read a file and make sure that it is the one that was meant.

    Parameters
    ----------
    path : Path
        The file.
    expected : str
        Its SHA-256 digest, from the manifest beside it.

    Raises
    ------
    DataError
        If the file is missing, truncated or altered.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"the data file {path} can't be read: {error.strerror}") from error
    found = sha256(content)
    if found != expected:
        raise DataError(
            f"the data file {path} is not the one its manifest names ({len(content):,} bytes, sha256 {found}, "
            f"expected {expected}): it was truncated or altered; restore it, or make it anew as data/README.md says"
        )
    return content


def asset_roots() -> list[Path]:
    """Return the folders that may hold `course/` and `data/`: the checkout first, then installed copies."""
    checkout = Path(__file__).resolve().parents[2]
    roots = [checkout] if (checkout / "data" / "README.md").exists() else []
    for base in {sysconfig.get_path("data"), sys.prefix}:
        roots.append(Path(base) / "share" / "polrl")
    return roots


def find_asset(relative: str) -> Path:
    """Find a file or folder of the project, such as `data/minirad` or `course/index.ipynb`.

    Parameters
    ----------
    relative : str
        The path inside the project, with forward slashes.

    Raises
    ------
    FileNotFoundError
        If neither a checkout nor the installed package has it.
    """
    roots = asset_roots()
    for root in roots:
        if (root / relative).exists():
            return root / relative
    looked = ", ".join(str(root) for root in roots)
    raise FileNotFoundError(f"{relative} was not found; looked in: {looked}")
