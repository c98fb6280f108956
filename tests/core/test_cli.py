"""The command line as a person at a terminal meets it."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from polrl.__main__ import lab_arguments, main
from polrl.core.store import list_runs

SMALL = ["--width", "4", "--per-class", "4", "--pretrain-epochs", "1", "--finetune-epochs", "1"]


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("POLRL_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("POLRL_MODE", "smoke")


def run(capsys, *words):
    try:
        code = main(list(words))
    except SystemExit as stop:  # tyro's own way out
        code = stop.code
    return code, *capsys.readouterr()


def test_list_shows_all_sixty_one_methods_and_imports_no_torch():
    script = "import sys; from polrl.__main__ import main; main(['list']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False")
    assert "noise_mask" in done.stdout and "planned" in done.stdout
    assert "adaptive_guidance" in done.stdout


def test_info_tells_a_stranger_what_a_method_is(capsys):
    code, out, _ = run(capsys, "info", "noise_mask")
    assert code == 0
    for part in ("2406.14568", "mask_strength", "E7", "Claim", "Phases: pretrain, finetune", "0 to 1"):
        assert part in out, part


def test_info_on_a_planned_method_says_so(capsys):
    code, out, _ = run(capsys, "info", "prdc")
    assert code == 0 and ("planned" in out or "Knobs" in out)


def test_unknown_method_suggests_the_nearest(capsys):
    code, _, err = run(capsys, "train", "noise_maks")
    assert code == 2 and "noise_mask" in err


def test_unknown_command_suggests_the_nearest(capsys):
    code, _, err = run(capsys, "trian")
    assert code == 2 and "train" in err


def test_no_command_prints_usage(capsys):
    code, out, _ = run(capsys)
    assert code == 2 and "polrl list" not in out and "train SLUG" in out


def test_train_saves_and_resumes(capsys):
    code, out, _ = run(capsys, "train", "noise_mask", *SMALL)
    assert code == 0 and "balanced_accuracy" in out
    folder = re.search(r"saved in (.*)", out).group(1)
    step = int(re.search(r"step (\d+)", out).group(1))
    code, out, _ = run(capsys, "train", "noise_mask", "--resume", folder, "--steps", "3")
    assert code == 0 and f"step {step + 3}" in out
    assert [str(info.path) for info in list_runs()] == [folder]


def test_resuming_a_spent_run_says_how_to_go_on(capsys):
    _, out, _ = run(capsys, "train", "noise_mask", *SMALL)
    folder = re.search(r"saved in (.*)", out).group(1)
    code, _, err = run(capsys, "train", "noise_mask", "--resume", folder)
    assert code == 2 and "--steps" in err


def test_value_out_of_range_is_refused_with_its_range(capsys):
    code, _, err = run(capsys, "train", "noise_mask", "--mask-strength", "7")
    assert code == 2 and "mask_strength" in err and "0 to 1" in err and "7" in err


def test_misspelt_option_is_refused_with_the_nearest(capsys):
    code, out, err = run(capsys, "train", "noise_mask", "--mask-strenth", "0.5")
    assert code == 2 and "mask-strength" in out + err


def test_study_smoke_prints_verdicts(capsys):
    code, out, _ = run(capsys, "study", "noise_mask", "--smoke")
    assert code == 0 and out.count("SHOWN") >= 3


def test_sweep_prints_a_row_a_point_and_resumes(capsys):
    words = ["sweep", "noise_mask", "--over", "mask_strength=0,1", "--steps", "2", "--jobs", "1", *SMALL]
    code, out, _ = run(capsys, *words)
    assert code == 0
    table = [line.split() for line in out.strip().splitlines()]
    assert table[0][:2] == ["mask_strength", "seed"] and len(table) == 3
    again = run(capsys, *words)
    assert again[:2] == (code, out)


def test_sweep_refuses_unknown_knobs_and_bad_forms(capsys):
    code, _, err = run(capsys, "sweep", "noise_mask", "--over", "mask_strenth=0,1")
    assert code == 2 and "mask_strength" in err
    code, _, err = run(capsys, "sweep", "noise_mask", "--over", "mask_strength")
    assert code == 2 and "NAME=VALUE" in err
    code, _, err = run(capsys, "sweep", "noise_mask", "--over", "mask_strength=a,b")
    assert code == 2 and "numbers" in err


def test_runs_lists_and_cleans(capsys):
    run(capsys, "train", "noise_mask", *SMALL)
    code, out, _ = run(capsys, "runs")
    assert code == 0 and "1 runs" in out
    code, out, _ = run(capsys, "runs", "--clean", "--keep", "0")
    assert code == 0 and "deleted 1 runs" in out and "0 runs" in out


def test_doctor_looks_at_everything(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0, out
    for part in ("Python", "torch", "minirad", "course"):
        assert part in out


def test_lab_serves_this_machine_only_with_port_retries(tmp_path):
    words = lab_arguments(tmp_path, 9999)
    assert "--ServerApp.ip=localhost" in words and "--ServerApp.port=9999" in words
    assert any(word.startswith("--ServerApp.port_retries=") for word in words)
    assert not any("token=''" in word or "token=" == word[-6:] for word in words)


def test_syllabus_names_sixty_one_methods_in_eleven_chapters():
    from polrl.core.catalog import syllabus

    chapters = syllabus()
    assert len(chapters) == 11
    slugs = [method["slug"] for chapter in chapters for method in chapter["methods"]]
    assert len(slugs) == len(set(slugs)) == 61
    assert json.dumps(chapters)
