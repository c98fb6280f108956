"""MiniRad: small brain slices in 36 classes, map by axis by level; real images for the noise-mask chapter.

The map (T1, grey matter, white matter) is plain from the grey levels alone, the level along the axis is not:
a classifier can take the shortcut that the noise-mask paper complains about. All slices come from one averaged
brain, so this is recognition of view and level, never diagnosis; data/README.md tells how the set was made.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

import safetensors
import safetensors.torch
import torch

from polrl.core.errors import DataError, KnobError
from polrl.core.files import find_asset, read_checked


@dataclass(frozen=True)
class MiniRad:
    """The data set as tensors on one device; learners share them, so they are not to be changed in place.

    Attributes
    ----------
    train_images, test_images : torch.Tensor, float32 [N, 1, 28, 28]
        (pixel - mean) / std, where pixels lie in [0, 1].
    train_labels, test_labels : torch.Tensor, int64 [N]
        ((map * 3) + axis) * 4 + slab, with the maps in the order T1, GM, WM.
    class_names : tuple of str
        Such as "T1 / axis 0 / slab 1", in the order of the labels.
    mean, std : float
        Of all the pixels of the training images, whatever part of them was loaded.
    """

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    class_names: tuple[str, ...]
    mean: float
    std: float

    def to_pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Map normalised images, of any shape, back to pixels in [0, 1], for looking at them."""
        return (images * self.std + self.mean).clamp(0.0, 1.0)


def load_minirad(device: str | torch.device = "cpu", per_class: int | None = None) -> MiniRad:
    """Load MiniRad; the same arguments give the same tensors again.

    Parameters
    ----------
    device : str or torch.device
        Where the tensors shall lie.
    per_class : int, optional
        Keep the first so many training images of each class; all by default. The test images stay.

    Raises
    ------
    FileNotFoundError
        If the data set is not there.
    DataError
        If its file or manifest was truncated or altered.
    KnobError
        If there are not `per_class` training images in a class.

    Examples
    --------
    >>> data = load_minirad(per_class=10)
    >>> data.train_images.shape
    torch.Size([360, 1, 28, 28])
    """
    if isinstance(per_class, bool) or not isinstance(per_class, int | None):
        raise KnobError(f"per_class={per_class!r}; allowed: a whole number from 1, or None for all")
    return _load(str(torch.device(device)), per_class)


@lru_cache(maxsize=8)
def _load(device: str, per_class: int | None) -> MiniRad:
    folder = find_asset("data/minirad")
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        content = read_checked(folder / manifest["file"], manifest["sha256"])
        arrays = safetensors.torch.load(content)
        available = int(manifest["train_per_class"])
        class_names = tuple(manifest["class_names"])
        mean, std = float(manifest["mean"]), float(manifest["standard_deviation"])
    except DataError:
        raise
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise DataError(
            f"the data set in {folder} can't be read: {error!r}; data/README.md says how to make it"
        ) from error
    if per_class is not None and not 1 <= per_class <= available:
        raise KnobError(f"per_class={per_class}; allowed: 1 to {available} training images a class, or None for all")

    def normalise(images: torch.Tensor) -> torch.Tensor:
        return ((images.float() / 255.0 - mean) / std).to(device)

    train_labels = arrays["train_labels"]
    kept = torch.cat([torch.nonzero(train_labels == label)[:per_class, 0] for label in range(len(class_names))])
    return MiniRad(
        train_images=normalise(arrays["train_images"][kept]),
        train_labels=train_labels[kept].to(device),
        test_images=normalise(arrays["test_images"]),
        test_labels=arrays["test_labels"].to(device),
        class_names=class_names,
        mean=mean,
        std=std,
    )


def first_of_each_class(images: torch.Tensor, labels: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first images of each class, at most `count`, and their labels; the labels are in ascending order."""
    place = torch.arange(len(labels), device=labels.device) - torch.searchsorted(labels, labels)
    return images[place < count], labels[place < count]
