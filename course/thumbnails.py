"""Makes the gallery's small pictures: each built method, trained for a moment, and its first view.

python course/thumbnails.py                 those that are missing or older than their method
python course/thumbnails.py noise_mask      those whose name contains a word, in any case
python course/thumbnails.py --check         say which are missing or old
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from polrl.core.catalog import Entry, catalog, fingerprint, load_method
from polrl.core.files import write_atomic
from polrl.core.run import Run
from polrl.core.views import ImageGrid, View
from polrl_widgets.static_views import draw_view, few_colors, new_figure, to_png

FOLDER = Path(__file__).resolve().parent / "pictures" / "thumbnails"
INCHES = (240 / 110, 160 / 110)  # new_figure draws 110 pixels an inch
MAX_BYTES = 15_000
STEPS = 150
SECONDS = 20.0


def short_run(slug: str) -> View:
    """Train a method with its defaults for a moment; returns its first view."""
    run = Run(load_method(slug)(), threads=1)
    until = time.monotonic() + SECONDS
    while run.step < STEPS and time.monotonic() < until:
        run.advance(10)
    return next(iter(run.views().values()))


def draw(view: View, **texts: str) -> bytes:
    """Draw a view as a thumbnail: as the lab draws it, without words, for they could not be read; keeps `texts`."""
    if isinstance(view, ImageGrid):
        figure = _draw_images(view)
    else:
        figure = draw_view(view, new_figure(*INCHES))
        for axes in figure.axes:
            _strip(axes)
        for bar in figure.axes[1:]:  # a colour bar
            bar.remove()
    figure.alt = view.alt
    png = to_png(figure)
    for colors in (128, 64, 32, 16):
        small = few_colors(png, colors, **texts)
        if len(small) <= MAX_BYTES:
            return small
    raise ValueError(f"the thumbnail of {view.title!r} has {len(small):,} bytes, at most {MAX_BYTES:,} are allowed")


def _draw_images(view: ImageGrid) -> Any:
    """Draw as many of a grid's images as can be told apart."""
    pixels = view.to_bytes()[:3, :5]
    figure = new_figure(*INCHES)
    for place, axes in enumerate(figure.subplots(*pixels.shape[:2], squeeze=False).ravel()):
        axes.imshow(pixels[divmod(place, pixels.shape[1])], cmap="gray", vmin=0, vmax=255)
        axes.set_axis_off()
    return figure


def _strip(axes: Any) -> None:
    axes.set(title="", xlabel="", ylabel="")
    axes.set_title("", loc="left")
    axes.tick_params(labelbottom=False, labelleft=False, labelright=False)
    if axes.get_legend():
        axes.get_legend().remove()


def is_fresh(entry: Entry) -> bool:
    """True if a method's thumbnail was made from the code that stands there now."""
    from PIL import Image

    path = FOLDER / f"{entry.slug}.png"
    if entry.path is None or not path.exists():
        return False
    with Image.open(path) as image:
        return image.info.get("polrl") == fingerprint(entry.path)


def make(entry: Entry) -> int:
    """Make a method's thumbnail; returns its bytes."""
    assert entry.path is not None
    small = draw(short_run(entry.slug), polrl=fingerprint(entry.path))
    write_atomic(FOLDER / f"{entry.slug}.png", small)
    return len(small)


def main() -> int:
    """Make or check; returns 1 if one is old or can't be made."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("word", nargs="?", default="", help="only methods whose name contains it")
    parser.add_argument("--check", action="store_true", help="only say which are missing or old")
    options = parser.parse_args()
    bad = 0
    for entry in catalog().values():
        if not entry.built or options.word not in entry.slug:
            continue
        fresh = is_fresh(entry)
        if options.check:
            bad += not fresh
            print(f"{'ok  ' if fresh else 'OLD '} {entry.slug}")
        elif options.word or not fresh:
            try:
                print(f"{entry.slug}: {make(entry):,} bytes", flush=True)
            except Exception as error:
                bad += 1
                print(f"{entry.slug}: FAILED: {type(error).__name__}: {error}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
