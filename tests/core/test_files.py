"""Files: written whole or not at all, and read only if they are the ones that were meant."""

from __future__ import annotations

import errno
import os
import stat
import threading

import pytest

from polrl.core import files
from polrl.core.errors import DataError
from polrl.core.files import find_asset, read_checked, sha256, write_atomic


def left_over(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("content", "read"), [(b"\x00bytes\r\n", b"\x00bytes\r\n"), ("Größe\n", "Größe\n".encode()), ("", b"")]
)
def test_content_is_written_as_it_is(tmp_path, content, read):
    write_atomic(tmp_path / "new" / "folder" / "file", content)
    assert (tmp_path / "new" / "folder" / "file").read_bytes() == read
    write_atomic(tmp_path / "new" / "folder" / "file", "other")
    assert left_over(tmp_path / "new" / "folder") == ["file"]


@pytest.mark.parametrize("step", ["fdopen", "fsync", "chmod", "replace"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("existed", [True, False])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step, failure, existed):
    path = tmp_path / "file"
    if existed:
        path.write_text("old")

    def fail(*arguments, **more):
        raise failure

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(failure)):
        write_atomic(path, "new")
    monkeypatch.undo()
    assert left_over(tmp_path) == (["file"] if existed else [])
    assert not existed or path.read_text() == "old"
    write_atomic(path, "new")
    assert path.read_text() == "new"


def test_a_full_disk_in_mid_file_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")
    real = os.fdopen

    def filling(*arguments, **more):
        file = real(*arguments, **more)

        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *exception):
                file.close()

            def write(self, data):
                file.write(data[:3])
                file.flush()
                raise OSError(errno.ENOSPC, "No space left on device")

        return Full()

    monkeypatch.setattr(os, "fdopen", filling)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "a longer content")
    assert path.read_text() == "old" and left_over(tmp_path) == ["file"]


def test_no_handle_stays_open_after_a_failure(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "replace", fail)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(5):
        with pytest.raises(OSError, match="broken"):
            write_atomic(tmp_path / "file", "new")
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after == before


def test_a_folder_in_the_way_is_an_error(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError):
        write_atomic(tmp_path / "file", "new")
    assert left_over(tmp_path) == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_files_get_the_ordinary_permissions(tmp_path):
    write_atomic(tmp_path / "atomic", "x")
    (tmp_path / "ordinary").write_text("x")
    assert stat.S_IMODE((tmp_path / "atomic").stat().st_mode) == 0o666 & ~files._UMASK
    if os.umask(os.umask(files._UMASK)) is not None:
        assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_reader_sees_the_old_or_the_new_and_never_a_part(tmp_path):
    path, contents = tmp_path / "file", [str(i) * 20_000 for i in range(5)]
    write_atomic(path, contents[0])
    done = threading.Event()
    seen = set()

    def read():
        while not done.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(60):
        write_atomic(path, contents[i % 5])
    done.set()
    reader.join(30)
    assert seen and seen <= set(contents)


def test_a_checked_file_is_the_one_that_was_meant(tmp_path):
    path = tmp_path / "data.bin"
    path.write_bytes(b"content")
    digest = sha256(b"content")
    assert read_checked(path, digest) == b"content"
    assert digest == "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"
    for wrong in (b"conten", b"Content", b""):
        path.write_bytes(wrong)
        with pytest.raises(
            DataError, match=r"data\.bin is not the one its manifest names .*truncated or altered"
        ) as raised:
            read_checked(path, digest)
        assert digest in str(raised.value) and sha256(wrong) in str(raised.value)
    path.unlink()
    with pytest.raises(DataError, match=r"data\.bin can't be read: No such file"):
        read_checked(path, digest)


def test_assets_are_found_in_the_first_folder_that_has_them(tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    write_atomic(second / "data" / "only", "2")
    write_atomic(second / "data" / "both", "2")
    write_atomic(first / "data" / "both", "1")
    monkeypatch.setattr(files, "asset_roots", lambda: [first, second])
    assert find_asset("data/both").read_text() == "1" and find_asset("data/only").read_text() == "2"
    with pytest.raises(FileNotFoundError, match="data/none was not found; looked in: .*first, .*second"):
        find_asset("data/none")
