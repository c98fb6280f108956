"""Build MiniRad: 36 classes of 28x28 brain slices, cut from the MNI ICBM152 2009a volumes.

The three volumes (T1, grey matter, white matter) travel inside the `nilearn` wheel, which polrl does
not depend on: the script reads them from an installed nilearn, without importing it, or from a wheel:

    pip download --no-deps nilearn==0.14.1
    python data/make_minirad.py --wheel nilearn-0.14.1-py3-none-any.whl

A class is a map, an axis and a level; all of it is one averaged brain, and what varies within a class
is the slice and the synthetic distortion. `--medmnist NAME` instead takes a truly multi-organ set from
the `medmnist` package, for whoever is online; its output is not part of the repository.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import importlib.util
import itertools
import json
import textwrap
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from scipy import ndimage
from tqdm import tqdm

from polrl.core.files import sha256, write_atomic

Arrays = dict[str, np.ndarray]

NILEARN = "nilearn==0.14.1"  # a release known to carry the three volumes
FOLDER = "nilearn/datasets/data"
# Each map's file and its sha256: another atlas under the same name would give other pictures.
MAPS = {
    "T1": (
        "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz",
        "421a10e872fd6cadae7f61d358dffbcc1795a497d61ee76c5dda2503e1a1e9e6",
    ),
    "GM": (
        "mni_icbm152_gm_tal_nlin_sym_09a_converted.nii.gz",
        "97a5ca69bd24db37a9cb7b32525e1733a209af904129bf1cd36da06d24243bed",
    ),
    "WM": (
        "mni_icbm152_wm_tal_nlin_sym_09a_converted.nii.gz",
        "382d92812de4744f9c86c7a0e4f680dc317a0a50e4da1f0153618a6798c7b7db",
    ),
}
VOLUME_SHAPE = (197, 233, 189)  # voxels of 1 mm: left to right, back to front, bottom to top
# Slices that show brain (on axis 0 it begins near slice 30). Axis 0 stops before the midline: the halves look alike.
SLICE_RANGE = ((30, 98), (35, 200), (25, 150))
SLABS = 4
BLOCK = 4  # slices; blocks alternate between train and test, so that no slice is in both
CANVAS, SIDE = 240, 28  # pixels before and after resampling

# In the order of the class index, ((map * 3) + axis) * 4 + slab.
CLASSES = list(itertools.product(MAPS, range(3), range(SLABS)))
CLASS_NAMES = [f"{name} / axis {axis} / slab {slab}" for name, axis, slab in CLASSES]

NOTICE = """\
Copyright (C) 1993-2004 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute, \
McGill University. Permission to use, copy, modify, and distribute this software and its documentation \
for any purpose and without fee is hereby granted, provided that the above copyright notice appear in \
all copies. The authors and McGill University make no representations about the suitability of this \
software for any purpose. It is provided "as is" without express or implied warranty. The authors are \
not responsible for any data loss, equipment damage, property loss, or injury to subjects or patients \
resulting from the use or misuse of this software package."""
CITATION = (
    "V. Fonov, A. C. Evans, K. Botteron, C. R. Almli, R. C. McKinstry, D. L. Collins and the Brain "
    "Development Cooperative Group. Unbiased average age-appropriate atlases for pediatric studies. "
    "NeuroImage 54 (2011) 313-327."
)


def read_nifti(compressed: bytes) -> np.ndarray:
    """Read a gzipped, little-endian, three-dimensional NIfTI-1 volume of uint8.

    Parameters
    ----------
    compressed
        The bytes of a `.nii.gz` file.

    Returns
    -------
    uint8 array, indexed by the file's three axes.

    Raises
    ------
    ValueError
        If the bytes are not such a volume, or end too early.
    """
    raw = gzip.decompress(compressed)
    if len(raw) < 352 or raw[:4] != (348).to_bytes(4, "little") or raw[344:347] != b"n+1":
        raise ValueError("not a little-endian single-file NIfTI-1 volume")
    dimensions = np.frombuffer(raw, "<i2", count=8, offset=40)
    datatype = int(np.frombuffer(raw, "<i2", count=1, offset=70)[0])
    data_offset = int(np.frombuffer(raw, "<f4", count=1, offset=108)[0])  # vox_offset, a float
    if datatype != 2:
        raise ValueError(f"NIfTI datatype {datatype} is not read here; allowed: 2 (uint8)")
    rank, *sizes = (int(size) for size in dimensions)
    if rank < 3 or any(size != 1 for size in sizes[3:rank]):
        raise ValueError(f"NIfTI dimensions {dimensions.tolist()} are not three-dimensional")
    shape = tuple(sizes[:3])
    voxels = int(np.prod(shape))
    if len(raw) < data_offset + voxels:
        raise ValueError(f"NIfTI data end early: {len(raw) - data_offset} of {voxels} voxels")
    return np.frombuffer(raw, np.uint8, voxels, data_offset).reshape(shape, order="F")


def read_sources(wheel: Path | None) -> tuple[dict[str, bytes], str]:
    """Return the three compressed volumes by map name, and the nilearn version they come from.

    Raises
    ------
    FileNotFoundError
        If there is no nilearn to read, or it carries no such file.
    ValueError
        If a file is not the one that MiniRad is made of, or `wheel` is not a wheel.
    """
    help_text = f"a release that carries the volumes: pip download --no-deps {NILEARN}"
    try:
        if wheel is not None:
            with zipfile.ZipFile(wheel) as archive:
                files = {name: archive.read(f"{FOLDER}/{file}") for name, (file, _) in MAPS.items()}
            version = wheel.name.split("-")[1]
        else:
            spec = importlib.util.find_spec("nilearn")
            if spec is None or spec.origin is None:
                raise FileNotFoundError(f"nilearn is not installed and --wheel is not given; {help_text}")
            folder = Path(spec.origin).parent.parent / FOLDER
            files = {name: (folder / file).read_bytes() for name, (file, _) in MAPS.items()}
            version = importlib.metadata.version("nilearn")
    except KeyError as missing:
        raise FileNotFoundError(f"{wheel}: {missing.args[0]}; {help_text}") from None
    except (zipfile.BadZipFile, IndexError):
        raise ValueError(f"{wheel} is not a nilearn wheel; {help_text}") from None
    for name, (file, expected) in MAPS.items():
        found = sha256(files[name])
        if found != expected:
            raise ValueError(f"{file}: sha256 {found}, expected {expected}; {help_text}")
    return files, version


def slab_slices(axis: int, slab: int, split: int) -> np.ndarray:
    """Return the positions along `axis` that belong to a slab and to a split (0 train, 1 test)."""
    low, high = SLICE_RANGE[axis]
    edges = np.linspace(low, high, SLABS + 1).round().astype(int)
    positions = np.arange(edges[slab], edges[slab + 1])
    return positions[(positions - low) // BLOCK % 2 == split]


def smooth_slice(volume: np.ndarray, axis: int, position: int) -> np.ndarray:
    """Return one slice, upright, on a black canvas, in [0, 1], blurred against aliasing."""
    upright = np.rot90(np.moveaxis(volume, axis, 0)[position]) / 255.0
    margins = [(CANVAS - size) // 2 for size in upright.shape]
    padding = [(m, CANVAS - size - m) for m, size in zip(margins, upright.shape, strict=True)]
    return ndimage.gaussian_filter(np.pad(upright, padding), sigma=2.5)


def distort(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a random 28x28 uint8 view of a canvas: moved, resampled, then changed in brightness."""
    angle = rng.normal(0.0, 0.2)
    scale = np.exp(rng.normal(0.0, 0.12))
    shear = rng.normal(0.0, 0.08)
    shift = rng.normal(0.0, 8.0, size=2)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    # The affine map and the resampling in one step: from a small pixel to its place on the canvas.
    matrix = rotation @ np.array([[1.0, shear], [0.0, 1.0]]) * scale * (CANVAS / SIDE)
    offset = (CANVAS - 1) / 2 + shift - matrix @ np.full(2, (SIDE - 1) / 2)
    image = ndimage.affine_transform(canvas, matrix, offset, output_shape=(SIDE, SIDE), order=1)

    image = image ** np.exp(rng.normal(0.0, 0.2))
    image = image * rng.uniform(0.6, 1.0)
    image = image + rng.normal(0.0, 0.06, size=image.shape)
    return np.round(image.clip(0.0, 1.0) * 255.0).astype(np.uint8)


def build(volumes: Mapping[str, np.ndarray], seed: int, train: int, test: int) -> Arrays:
    """Cut, distort and label the pictures of all classes.

    Parameters
    ----------
    volumes : mapping from T1, GM and WM to uint8 arrays, [197, 233, 189]
    seed : int
        Seeds everything; each class and split has its own generator, so that pictures stay when counts change.
    train, test : int
        Pictures a class.

    Returns
    -------
    dict
        `train_images` and `test_images`, uint8 [36 * count, 1, 28, 28], class by class; `train_labels` and
        `test_labels`, int64.

    Raises
    ------
    ValueError
        If a volume has another shape.
    """
    for name in MAPS:
        if volumes[name].shape != VOLUME_SHAPE:
            raise ValueError(f"volume {name} has shape {volumes[name].shape}; allowed: {VOLUME_SHAPE}")
    counts = {"train": train, "test": test}
    images: dict[str, list[np.ndarray]] = {split: [] for split in counts}
    for index, (name, axis, slab) in enumerate(tqdm(CLASSES, desc="MiniRad", unit="class")):
        for parity, (split, count) in enumerate(counts.items()):
            rng = np.random.default_rng([seed, index, parity])
            positions = rng.permutation(slab_slices(axis, slab, parity))[:count]
            canvases = [smooth_slice(volumes[name], axis, position) for position in positions]
            # Every slice is used before one comes again.
            images[split] += [distort(canvases[i % len(canvases)], rng) for i in range(count)]
    return pack(images, counts, len(CLASSES))


def build_medmnist(name: str, seed: int, train: int, test: int) -> tuple[Arrays, dict[str, Any]]:
    """Draw pictures of a two-dimensional, single-label MedMNIST set, which is downloaded; colour becomes grey.

    Returns
    -------
    tuple
        The arrays, as of `build`, and what a manifest says about the set.

    Raises
    ------
    ImportError
        If the `medmnist` package is not installed.
    RuntimeError
        If the set can't be downloaded.
    ValueError
        If the name, the kind of set or a count is not allowed.
    """
    try:
        import medmnist
    except ImportError:
        raise ImportError("--medmnist needs the medmnist package: pip install medmnist") from None
    allowed = sorted(
        key
        for key, info in medmnist.INFO.items()
        if info["task"] in ("multi-class", "binary-class", "ordinal-regression") and not key.endswith("3d")
    )
    if name not in allowed:
        raise ValueError(f"--medmnist {name}; allowed: {', '.join(allowed)}")
    info = medmnist.INFO[name]
    counts = {"train": train, "test": test}
    images: dict[str, list[np.ndarray]] = {split: [] for split in counts}
    for parity, (split, count) in enumerate(counts.items()):
        whole = getattr(medmnist, info["python_class"])(split=split, download=True, size=SIDE)
        grey = whole.imgs if whole.imgs.ndim == 3 else whole.imgs.mean(axis=-1).round().astype(np.uint8)
        for label in range(len(info["label"])):
            members = np.flatnonzero(whole.labels[:, 0] == label)
            if len(members) < count:
                raise ValueError(f"{name}: --{split} {count}, but class {label} has {len(members)} pictures")
            rng = np.random.default_rng([seed, label, parity])
            images[split] += list(grey[rng.permutation(members)[:count]])
    about = {
        "name": name,
        "description": info["description"],
        "source": {"package": f"medmnist {medmnist.__version__}", "url": info["url"]},
        "licence": {"name": info["license"], "notice": f"{name}, a part of MedMNIST, {info['license']}"},
        "citation": "J. Yang et al. MedMNIST v2. Scientific Data 10 (2023) 41.",
        "class_names": [info["label"][str(label)] for label in range(len(info["label"]))],
    }
    return pack(images, counts, len(info["label"])), about


def pack(images: Mapping[str, list[np.ndarray]], counts: Mapping[str, int], classes: int) -> Arrays:
    """Stack pictures that come class by class, and label them."""
    arrays: Arrays = {}
    for split, count in counts.items():
        arrays[f"{split}_images"] = np.stack(images[split])[:, None]
        arrays[f"{split}_labels"] = np.repeat(np.arange(classes, dtype=np.int64), count)
    return arrays


def describe_minirad(nilearn_version: str) -> dict[str, Any]:
    """Return what the manifest says about MiniRad, apart from its numbers."""
    return {
        "name": "minirad",
        "description": (
            "28x28 grey slices of the MNI ICBM152 2009a nonlinear symmetric atlas. A class is a map (T1, grey "
            "matter GM, white matter WM), an axis (0 sagittal, 1 coronal, 2 axial) and a slab, one of four levels "
            "along the axis; its index is ((map * 3) + axis) * 4 + slab. Train and test take alternating blocks "
            "of four slices. "
            "One averaged brain: the variation of the pixels is synthetic, so this is recognition of view and "
            "level, never diagnosis."
        ),
        "source": {
            "wheel": f"nilearn-{nilearn_version}-py3-none-any.whl",
            "files": {f"{FOLDER}/{file}": digest for file, digest in MAPS.values()},
        },
        "licence": {"name": "ICBM152 notice of the McConnell Brain Imaging Centre", "notice": NOTICE},
        "citation": CITATION,
        "class_names": CLASS_NAMES,
    }


def write_set(folder: Path, arrays: Arrays, about: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Write the arrays, their manifest and the licence; return the manifest."""
    content = safetensors.numpy.save(arrays)
    pixels = arrays["train_images"] / 255.0
    manifest = {
        **about,
        "script": "data/make_minirad.py",
        "seed": seed,
        "file": f"{about['name']}.safetensors",
        "bytes": len(content),
        "sha256": sha256(content),
        "arrays": {name: {"dtype": str(a.dtype), "shape": list(a.shape)} for name, a in arrays.items()},
        "train_per_class": len(arrays["train_labels"]) // len(about["class_names"]),
        "test_per_class": len(arrays["test_labels"]) // len(about["class_names"]),
        "mean": float(pixels.mean()),
        "standard_deviation": float(pixels.std()),
    }
    write_atomic(folder / manifest["file"], content)
    write_atomic(folder / "LICENCE.txt", textwrap.fill(about["licence"]["notice"], 80) + "\n")
    write_atomic(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    return manifest


def positive(text: str) -> int:
    """Parse a count for the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a whole number from 1")
    return int(text)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Build the MiniRad data set.")
    parser.add_argument("--out", type=Path, help="folder to write to; data/minirad, or data/NAME with --medmnist")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=positive, default=40, help="training pictures a class")
    parser.add_argument("--test", type=positive, default=40, help="test pictures a class")
    parser.add_argument("--wheel", type=Path, help=f"a wheel of {NILEARN}, if nilearn is not installed")
    parser.add_argument("--medmnist", metavar="NAME", help="a MedMNIST set instead (online), such as organamnist")
    options = parser.parse_args(arguments)
    try:
        if options.medmnist:
            arrays, about = build_medmnist(options.medmnist, options.seed, options.train, options.test)
        else:
            files, version = read_sources(options.wheel)
            volumes = {name: read_nifti(content) for name, content in files.items()}
            arrays = build(volumes, options.seed, options.train, options.test)
            about = describe_minirad(version)
        folder = options.out or Path("data") / about["name"]
        manifest = write_set(folder, arrays, about, options.seed)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        parser.exit(1, f"make_minirad: {error}\n")
    print(f"{folder / manifest['file']}: {manifest['bytes']:,} bytes, sha256 {manifest['sha256']}")


if __name__ == "__main__":
    main()
