"""MiniRad: the committed files, the loader, and the script that made them."""

from __future__ import annotations

import gzip
import importlib.util
import json
import shutil
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from polrl.core.errors import DataError, KnobError
from polrl.core.files import sha256
from polrl.worlds import minirad
from polrl.worlds.minirad import load_minirad

DATA = Path(__file__).resolve().parents[2] / "data"
FOLDER = DATA / "minirad"


@pytest.fixture(scope="module")
def script() -> types.ModuleType:
    """Return data/make_minirad.py as a module."""
    spec = importlib.util.spec_from_file_location("make_minirad", DATA / "make_minirad.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    """Return the committed manifest."""
    return json.loads((FOLDER / "manifest.json").read_text())


@pytest.fixture
def copied_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make the loader read a copy of the data set, which a test may damage."""
    folder = Path(shutil.copytree(FOLDER, tmp_path / "minirad"))
    monkeypatch.setattr(minirad, "find_asset", lambda relative: folder)
    minirad._load.cache_clear()
    yield folder
    minirad._load.cache_clear()


def nifti(voxels: np.ndarray, datatype: int = 2, data_offset: int = 352) -> bytes:
    """Write a gzipped NIfTI-1 file by hand."""
    header = bytearray(data_offset)
    header[0:4] = (348).to_bytes(4, "little")
    header[40:56] = np.array([voxels.ndim, *voxels.shape, *[1] * (7 - voxels.ndim)], "<i2").tobytes()
    header[70:72] = np.array([datatype], "<i2").tobytes()
    header[108:112] = np.array([data_offset], "<f4").tobytes()
    header[344:348] = b"n+1\0"
    return gzip.compress(bytes(header) + voxels.tobytes(order="F"))


# The committed set and its loader


def test_shapes_types_and_forty_of_each_class() -> None:
    data = load_minirad()
    for images, labels in [(data.train_images, data.train_labels), (data.test_images, data.test_labels)]:
        assert images.shape == (1440, 1, 28, 28) and images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert torch.bincount(labels).tolist() == [40] * 36


def test_manifest_names_the_file_that_lies_beside_it(manifest: dict[str, Any]) -> None:
    content = (FOLDER / manifest["file"]).read_bytes()
    assert sha256(content) == manifest["sha256"]
    assert len(content) == manifest["bytes"]


def test_mean_and_deviation_are_those_of_the_training_pixels(manifest: dict[str, Any]) -> None:
    data = load_minirad()
    assert data.train_images.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert data.train_images.std(correction=0).item() == pytest.approx(1.0, abs=1e-5)
    pixels = data.to_pixels(data.train_images).double()
    assert pixels.mean().item() == pytest.approx(manifest["mean"], abs=1e-6)
    assert pixels.std(correction=0).item() == pytest.approx(manifest["standard_deviation"], abs=1e-6)


def test_to_pixels_gives_back_the_stored_bytes(manifest: dict[str, Any]) -> None:
    stored = safetensors.torch.load((FOLDER / manifest["file"]).read_bytes())
    data = load_minirad()
    pixels = data.to_pixels(data.test_images)
    assert pixels.min() >= 0.0 and pixels.max() <= 1.0
    torch.testing.assert_close(pixels * 255.0, stored["test_images"].float(), atol=1e-3, rtol=0.0)


def test_class_index_is_map_then_axis_then_slab() -> None:
    names = load_minirad().class_names
    assert len(names) == 36
    for map_index, map_name in enumerate(["T1", "GM", "WM"]):
        for axis in range(3):
            for slab in range(4):
                assert names[(map_index * 3 + axis) * 4 + slab] == f"{map_name} / axis {axis} / slab {slab}"


def test_no_picture_is_in_both_splits() -> None:
    data = load_minirad()
    train = {image.numpy().tobytes() for image in data.train_images}
    test = {image.numpy().tobytes() for image in data.test_images}
    assert len(train) == len(test) == 1440
    assert not train & test


def test_licence_notice_stands_in_all_three_places(manifest: dict[str, Any]) -> None:
    holder = "Copyright (C) 1993-2004 Louis Collins, McConnell Brain Imaging Centre"
    assert holder in manifest["licence"]["notice"]
    for file in [FOLDER / "LICENCE.txt", DATA / "README.md"]:
        assert holder in " ".join(file.read_text().split())


def test_per_class_keeps_the_first_training_images_of_each_class() -> None:
    whole, part = load_minirad(), load_minirad(per_class=10)
    assert torch.bincount(part.train_labels).tolist() == [10] * 36
    for label in range(36):
        first = whole.train_images[whole.train_labels == label][:10]
        assert torch.equal(part.train_images[part.train_labels == label], first)
    assert torch.equal(part.test_images, whole.test_images)


def test_learners_share_the_tensors() -> None:
    assert load_minirad("cpu", 10) is load_minirad(torch.device("cpu"), per_class=10)
    assert load_minirad(per_class=10) is not load_minirad(per_class=11)


@pytest.mark.parametrize("value", [0, -1, 41, 2.0, "10", True])
def test_bad_per_class_is_refused_with_the_value(value: object) -> None:
    with pytest.raises(KnobError, match="allowed") as refusal:
        load_minirad(per_class=value)  # type: ignore[arg-type]
    assert f"per_class={value!r}" in str(refusal.value)


def test_truncated_file_is_refused(copied_set: Path) -> None:
    file = copied_set / "minirad.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(DataError, match=r"minirad\.safetensors"):
        load_minirad()


def test_single_flipped_bit_is_refused(copied_set: Path, manifest: dict[str, Any]) -> None:
    file = copied_set / "minirad.safetensors"
    content = bytearray(file.read_bytes())
    content[1_000_000] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=manifest["sha256"]):
        load_minirad()


@pytest.mark.parametrize("text", ["", '{"file": ', "[]", "{}", "\udcff", '{"file": "minirad.safetensors"}'])
def test_damaged_manifest_is_refused(copied_set: Path, text: str) -> None:
    (copied_set / "manifest.json").write_text(text, errors="surrogateescape")
    with pytest.raises(DataError, match="README"):
        load_minirad()


# The script


def test_nifti_is_read_in_fortran_order_from_its_data_offset(script: types.ModuleType) -> None:
    voxels = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    assert np.array_equal(script.read_nifti(nifti(voxels)), voxels)
    assert np.array_equal(script.read_nifti(nifti(voxels, data_offset=416)), voxels)


def test_nifti_that_is_something_else_is_refused(script: types.ModuleType) -> None:
    voxels = np.zeros((2, 3, 4), np.uint8)
    with pytest.raises(ValueError, match="NIfTI-1"):
        script.read_nifti(gzip.compress(b"x" * 400))
    with pytest.raises(ValueError, match="datatype 16"):
        script.read_nifti(nifti(voxels, datatype=16))
    with pytest.raises(ValueError, match="three-dimensional"):
        script.read_nifti(nifti(np.zeros((2, 3, 4, 5), np.uint8)))
    with pytest.raises(ValueError, match="20 of 24 voxels"):
        script.read_nifti(gzip.compress(gzip.decompress(nifti(voxels))[:-4]))


def test_train_and_test_share_no_slice_and_leave_none_out(script: types.ModuleType) -> None:
    for axis, (low, high) in enumerate(script.SLICE_RANGE):
        slabs = [script.slab_slices(axis, slab, split) for slab in range(4) for split in (0, 1)]
        assert sorted(np.concatenate(slabs)) == list(range(low, high))
        train = np.concatenate([script.slab_slices(axis, slab, 0) for slab in range(4)])
        assert all((position - low) % 8 < 4 for position in train)


@pytest.fixture(scope="module")
def synthetic_volumes(script: types.ModuleType) -> dict[str, np.ndarray]:
    """Return noise of the right shape in place of the atlas."""
    rng = np.random.default_rng(0)
    return {name: rng.integers(0, 256, script.VOLUME_SHAPE, dtype=np.uint8) for name in script.MAPS}


def test_build_repeats_itself_and_follows_the_seed(
    script: types.ModuleType, synthetic_volumes: dict[str, np.ndarray], tmp_path: Path
) -> None:
    about = script.describe_minirad("0.0")
    built = [script.build(synthetic_volumes, seed, train=2, test=1) for seed in (0, 0, 1)]
    first, second, other = (script.write_set(tmp_path / str(i), arrays, about, 0) for i, arrays in enumerate(built))
    assert first == second
    assert first["sha256"] != other["sha256"]
    assert built[0]["train_images"].shape == (72, 1, 28, 28)
    assert built[0]["test_labels"].tolist() == list(range(36))


def test_pictures_stay_when_the_counts_change(
    script: types.ModuleType, synthetic_volumes: dict[str, np.ndarray]
) -> None:
    few = script.build(synthetic_volumes, 0, train=1, test=1)
    more = script.build(synthetic_volumes, 0, train=1, test=2)
    assert np.array_equal(few["train_images"], more["train_images"])


def test_volume_of_another_shape_is_refused(script: types.ModuleType) -> None:
    with pytest.raises(ValueError, match=r"volume T1 has shape \(2, 3, 4\)"):
        script.build(dict.fromkeys(script.MAPS, np.zeros((2, 3, 4), np.uint8)), 0, train=1, test=1)


def test_missing_nilearn_says_what_to_download(
    script: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        script.main(["--out", str(tmp_path / "out")])
    assert ended.value.code == 1
    assert "pip download --no-deps nilearn==" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_wheel_without_the_volumes_or_with_other_ones_is_refused(script: types.ModuleType, tmp_path: Path) -> None:
    text = tmp_path / "nilearn-0.14.1-py3-none-any.whl"
    text.write_text("not a zip archive")
    with pytest.raises(ValueError, match="not a nilearn wheel"):
        script.read_sources(text)

    empty, altered = tmp_path / "nilearn-0.1-py3-none-any.whl", tmp_path / "nilearn-0.2-py3-none-any.whl"
    zipfile.ZipFile(empty, "w").close()
    with pytest.raises(FileNotFoundError, match="pip download"):
        script.read_sources(empty)

    with zipfile.ZipFile(altered, "w") as archive:
        for file, _ in script.MAPS.values():
            archive.writestr(f"{script.FOLDER}/{file}", nifti(np.zeros((2, 3, 4), np.uint8)))
    with pytest.raises(ValueError, match="sha256"):
        script.read_sources(altered)


def test_medmnist_option_writes_the_same_format(
    script: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Colours:
        """Stands for a class of the medmnist package: twelve colour pictures in two classes."""

        def __init__(self, split: str, download: bool, size: int) -> None:
            rng = np.random.default_rng(len(split))
            self.imgs = rng.integers(0, 256, (12, size, size, 3), dtype=np.uint8)
            self.labels = np.array([[i % 2] for i in range(12)], np.uint8)

    common = {"description": "Two colours.", "url": "https://example.org", "license": "CC BY 4.0"}
    two = {"label": {"0": "a", "1": "b"}}
    package = types.ModuleType("medmnist")
    package.__dict__.update(
        __version__="3",
        Colours=Colours,
        INFO={
            "colours": {**common, **two, "task": "binary-class", "python_class": "Colours"},
            "many": {**common, **two, "task": "multi-label, binary-class", "python_class": "Colours"},
        },
    )
    monkeypatch.setitem(sys.modules, "medmnist", package)
    out = tmp_path / "colours"
    script.main(["--medmnist", "colours", "--out", str(out), "--train", "6", "--test", "3"])
    written = json.loads((out / "manifest.json").read_text())
    assert written["arrays"]["train_images"] == {"dtype": "uint8", "shape": [12, 1, 28, 28]}
    assert written["class_names"] == ["a", "b"]
    assert sha256((out / "colours.safetensors").read_bytes()) == written["sha256"]

    for arguments, message in [(["many"], "allowed: colours"), (["colours", "--train", "7"], "has 6 pictures")]:
        with pytest.raises(SystemExit):
            script.main(["--medmnist", *arguments])
        assert message in capsys.readouterr().err


def test_missing_medmnist_says_what_to_install(
    script: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "medmnist", None)
    with pytest.raises(SystemExit):
        script.main(["--medmnist", "organamnist"])
    assert "pip install medmnist" in capsys.readouterr().err
