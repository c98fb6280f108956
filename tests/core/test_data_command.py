"""`polrl data` and the library half behind it: what is there, whether it is whole, making and fetching."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from polrl.__main__ import main
from polrl.core import data as sets
from polrl.core.errors import DataError, UnknownNameError
from polrl.core.files import sha256


@pytest.fixture(autouse=True)
def minari(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test a Minari folder of its own, which is not there yet."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a project with its own data in the place of polrl's."""
    monkeypatch.setattr(sets, "asset_roots", lambda: [tmp_path / "nowhere", tmp_path / "project"])
    folder = tmp_path / "project" / "data"
    folder.mkdir(parents=True)
    return folder


def add_set(folder: Path, manifest: dict, **files: bytes) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def add_minari(root: Path, name: str, rows: object = 7) -> Path:
    folder = root / name / "data"
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text(json.dumps({"total_steps": rows, "dataset_id": name}))
    (folder / "main_data.hdf5").write_bytes(b"x" * 1000)
    return folder.parent


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["data", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# ------------------------------------------------------------------------------------------------------------ manifests


def test_any_folder_with_a_manifest_is_a_data_set(project):
    add_set(project / "many", {"title": "Many files", "files": {"a": sha256(b"a"), "b": sha256(b"b")}}, a=b"a", b=b"b")
    add_set(project / "one", {"name": "single", "description": "A file. More.", "file": "c", "sha256": sha256(b"c")}, c=b"c")  # fmt: skip
    told = {"name": "deep-set", "kind": "rows", "form": "minari", "id": "deep/set-v0", "rows": 5, "returns": {"mean": -2.5}, "files": {}}  # fmt: skip
    add_set(project / "offline" / "deep" / "set-v0", told)
    (project / "no_manifest").mkdir()
    many, deep, one = sets.included_sets()
    assert (many.name, many.kind, many.rows, many.mean_return) == ("many", "Many files", None, None)
    assert (one.name, one.kind, dict(one.files)) == ("single", "A file", {"c": sha256(b"c")})
    assert (deep.name, deep.form, deep.id, deep.rows, deep.mean_return) == (
        "deep-set",
        "minari",
        "deep/set-v0",
        5,
        -2.5,
    )
    assert one.nbytes == 1 + (one.folder / "manifest.json").stat().st_size
    assert [sets.check_files(each) for each in (many, deep, one)] == [2, 0, 1]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": 3}', '{"file": "a"}', '{"files": {}, "rows": "x"}'])
def test_a_manifest_that_cannot_be_read_is_told_and_hides_no_other_set(project, text):
    add_set(project / "bad", {}).joinpath("manifest.json").write_text(text)
    add_set(project / "good", {"title": "Good", "files": {}})
    bad, good = sets.included_sets()
    assert bad.name == "bad" and "manifest.json can't be read" in bad.problem and not good.problem
    with pytest.raises(DataError, match="bad.*manifest.json can't be read"):
        sets.check_files(bad)


@pytest.mark.parametrize("content", [b"B", b"", None])
def test_a_file_that_is_missing_truncated_or_altered_is_found(project, content):
    folder = add_set(project / "one", {"file": "b", "sha256": sha256(b"b")}, b=b"b")
    if content is None:
        (folder / "b").unlink()
    else:
        (folder / "b").write_bytes(content)
    with pytest.raises(DataError, match="the data file .*one/b"):
        sets.check_files(sets.find_set("one"))


def test_local_minari_sets_are_found_but_not_half_downloaded_ones(minari):
    assert sets.local_minari_sets() == []
    add_minari(minari, "mujoco/hopper/medium-v0", 12)
    add_minari(minari, ".fetch-abc/mujoco/hopper/expert-v0")
    add_minari(minari, "broken-v0", None)
    broken, hopper = sets.local_minari_sets()
    assert (hopper.name, hopper.rows, hopper.form) == ("mujoco/hopper/medium-v0", 12, "minari") and hopper.nbytes > 1000
    assert "metadata.json can't be read" in broken.problem


def test_a_set_is_found_by_name_or_id(project, minari):
    add_set(project / "a", {"name": "hopper-tiny", "id": "hopper/tiny-v0", "files": {}})
    add_minari(minari, "mujoco/x-v0")
    assert sets.find_set("hopper-tiny") == sets.find_set("hopper/tiny-v0")
    assert sets.find_set("mujoco/x-v0").folder == minari / "mujoco/x-v0"
    with pytest.raises(UnknownNameError, match="did you mean hopper-tiny"):
        sets.find_set("hopper-tinny")


def test_the_minari_folder_is_minaris_own(monkeypatch, tmp_path):
    from minari.storage.datasets_root_dir import get_dataset_path

    assert sets.minari_folder() == get_dataset_path()
    monkeypatch.delenv("MINARI_DATASETS_PATH")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sets.minari_folder() == get_dataset_path()


# ------------------------------------------------------------------------------------------------------------ the command


def test_list_shows_what_comes_with_polrl_and_what_is_local(capsys, minari, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    add_minari(minari, "mujoco/hopper/medium-v0", 1234)
    code, out, _ = run(capsys, "list")
    lines = {line.split()[0]: line for line in out.splitlines() if line.split()}
    assert code == 0
    assert (
        "19,800" in lines["pendulum-mixed"] and "0.6" in lines["pendulum-mixed"] and "-743" in lines["pendulum-mixed"]
    )
    assert "brain" in lines["minirad"] or "slices" in lines["minirad"]
    assert "1,234" in lines["mujoco/hopper/medium-v0"]


def test_list_imports_no_torch():
    script = "import sys; from polrl.__main__ import main; main(['data', 'list']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False")


def test_check_of_one_set_says_what_was_checked(capsys):
    code, out, _ = run(capsys, "check", "pendulum-mixed")
    assert code == 0 and "2 file(s) as the manifest says; 19,800 rows in order" in out
    code, out, _ = run(capsys, "check", "minirad")
    assert code == 0 and "ok      minirad: 1 file(s) as" in out


def test_check_of_all_goes_on_after_a_failure_and_returns_1(capsys, project, minari):
    add_set(project / "a", {"title": "A", "files": {"x": sha256(b"other")}}, x=b"x")
    add_set(project / "b", {"title": "B", "files": {"x": sha256(b"x")}}, x=b"x")
    add_minari(minari, "local/set-v0")
    code, out, err = run(capsys, "check")
    assert code == 1
    assert "FAILED  a: the data file" in err and "truncated or altered" in err
    assert "FAILED  local/set-v0" in err and "can't be read" in err
    assert "ok      b" in out


def test_check_of_an_unknown_set_suggests_the_nearest(capsys):
    code, _, err = run(capsys, "check", "minirat")
    assert code == 2 and "did you mean minirad" in err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["lst"], "did you mean list"),
        (["make"], "kinds: "),
        (["make", "--steps", "3"], "kinds: "),
        (["make", "offlin"], "did you mean offline"),
        (["fetch"], "was not understood"),
        (["list", "x"], "was not understood"),
        (["check", "a", "b"], "was not understood"),
        (["check", "--all"], "was not understood"),
    ],
)
def test_what_is_not_understood_is_exit_code_2_with_a_hint(capsys, words, part):
    code, _, err = run(capsys, *words)
    assert code == 2 and part in err


def test_help_names_every_action(capsys):
    for words in (["--help"], ["fetch", "--help"], ["check", "-h"]):
        code, out, _ = run(capsys, *words)
        assert code == 0 and all(action in out for action in ("list", "check", "make", "fetch"))
    assert run(capsys)[0] == 2


def test_make_runs_the_script_with_its_options(project, capfd):
    (project / "make_thing.py").write_text("import sys; print('made', sys.argv[1:]); sys.exit(3)")
    assert sets.makers() == {"thing": project / "make_thing.py"}
    assert main(["data", "make", "thing", "--steps", "5", "--help"]) == 3
    assert "made ['--steps', '5', '--help']" in capfd.readouterr().out


def test_make_says_what_the_generator_needs(capfd, tmp_path):
    try:
        import stable_baselines3  # noqa: F401

        pytest.skip("Stable-Baselines3 is installed")
    except ImportError:
        pass
    assert main(["data", "make", "offline", "--task", "Pendulum-v1", "--work", str(tmp_path / "work")]) == 1
    assert "pip install stable-baselines3" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------------------- fetching


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Put a package of the name minari before the real one, whose download does what a test says."""

    def answer(body: str) -> None:
        folder = tmp_path / "fake"
        folder.mkdir(exist_ok=True)
        lines = ["import json, os, pathlib, sys", "def download_dataset(name):", *(f"    {line}" for line in body.split("\n"))]  # fmt: skip
        (folder / "minari.py").write_text("\n".join(lines))
        monkeypatch.setenv("PYTHONPATH", str(folder))

    return answer


WRITE = """root = pathlib.Path(os.environ["MINARI_DATASETS_PATH"])
for each in (name, "mujoco/part-v0"):
    (root / each / "data").mkdir(parents=True)
    (root / each / "data" / "metadata.json").write_text(json.dumps({"total_steps": 3}))
(root / "mujoco" / "namespace_metadata.json").write_text("{}")"""


def test_a_fetched_set_lands_in_the_minari_folder_with_its_parts(capsys, server, minari):
    server(WRITE)
    code, out, _ = run(capsys, "fetch", "mujoco/hopper/medium-v0")
    assert code == 0 and "fetched: mujoco/hopper/medium-v0, mujoco/part-v0" in out
    assert (minari / "mujoco/hopper/medium-v0/data/metadata.json").is_file()
    assert (minari / "mujoco/namespace_metadata.json").is_file()
    assert [path.name for path in minari.iterdir()] == ["mujoco"]
    server("raise RuntimeError('asked again')")
    code, out, _ = run(capsys, "fetch", "mujoco/hopper/medium-v0")
    assert code == 0 and "there already" in out


def test_a_set_that_is_there_stays_when_it_comes_again_as_a_part(server, minari):
    old = add_minari(minari, "mujoco/part-v0", 99)
    server(WRITE)
    assert sets.fetch("mujoco/hopper/medium-v0") == ["mujoco/hopper/medium-v0"]
    assert json.loads((old / "data" / "metadata.json").read_text())["total_steps"] == 99


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (
            "raise ConnectionError('Name or service not known')",
            "server could not be reached.*Name or service not known",
        ),
        (f"{WRITE}\nraise OSError('connection lost')", "server could not be reached.*connection lost"),
        ('raise ValueError("Couldn\'t find any version")', "medium-v0 can't be fetched: Couldn't find any version"),
        ("pass", "sent no data set under mujoco/hopper/medium-v0"),
        ("sys.exit(5)", "no reason given"),
    ],
)
def test_a_failed_fetch_returns_1_with_the_reason_and_leaves_nothing(capsys, server, minari, body, part):
    import re

    server(body)
    code, _, err = run(capsys, "fetch", "mujoco/hopper/medium-v0")
    assert code == 1 and re.search(part, err), err
    assert list(minari.iterdir()) == []
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["hopper", "../x-v0", "/abs/x-v0", "a//b-v0", "hf://farama/x-v0", "x-v0; ls", ""])
def test_what_is_no_minari_id_is_refused_before_anything_is_asked(name, server, minari):
    server("raise RuntimeError('asked')")
    with pytest.raises(DataError, match="is no Minari id"):
        sets.fetch(name)
    assert not minari.exists()


def test_without_minari_the_extra_is_named(monkeypatch, minari):
    find_spec = sets.importlib.util.find_spec
    for missing, extra in (("minari", "polrl[course]"), ("huggingface_hub", "minari[hf]")):
        monkeypatch.setattr(
            sets.importlib.util, "find_spec", lambda name, missing=missing: None if name == missing else find_spec(name)
        )
        with pytest.raises(ImportError, match=rf"needs {missing}") as caught:
            sets.fetch("mujoco/hopper/medium-v0")
        assert extra in str(caught.value)
    assert not minari.exists()


def test_the_environment_of_this_process_stays(server, minari):
    server(WRITE)
    sets.fetch("mujoco/hopper/medium-v0")
    assert os.environ["MINARI_DATASETS_PATH"] == str(minari)
