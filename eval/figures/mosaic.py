"""`python -m eval.figures.mosaic FILMS... --output PICTURE.gif`: films of many tasks side by side, one moving picture.

rollouts/*.gif of eval.compare -> tiles of one size, row by row in the order given -> one GIF of common colours

A film that is shorter than the picture begins again.

Invariant: equal films give equal bytes.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image, ImageSequence, UnidentifiedImageError

from schemas.files import atomic_write
from schemas.ranges import require
from schemas.result import ResultError
from schemas.terminal import command

GROUND = (24, 24, 24)
GAP = 2  # pixels between tiles
FRAME_MS = 100  # as in the films


@dataclass(frozen=True)
class Options:
    """Join films into one."""

    films: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """GIF files, such as results/compare/rollouts/*.gif."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("mosaic.gif")
    columns: int = 6
    side: int = 96
    """Height and width of a tile in pixels; a film keeps its proportions in it."""
    seconds: float = 6.0
    colours: int = 128
    """Of the whole picture; fewer make it smaller."""


def check(options: Options) -> None:
    """ValueError names an option whose value makes no sense."""
    for name, value, least, most in (
        ("films", len(options.films), 1, 4096),
        ("columns", options.columns, 1, 64),
        ("side", options.side, 8, 1024),
        ("seconds", options.seconds, FRAME_MS / 1000, 600),
        ("colours", options.colours, 2, 256),
    ):
        require(name, value, least, most)


def tiles(path: Path, side: int, frames: int) -> list[Image.Image]:
    """`frames` pictures (side, side) of a film, again from its start where it is shorter. ResultError for what is no
    film."""
    shown: list[Image.Image] = []
    try:
        with Image.open(path) as film:
            for frame in ImageSequence.Iterator(film):
                same = max(1, round(film.info.get("duration", FRAME_MS) / FRAME_MS))  # equal frames are stored as one
                shown += [_fitted(frame.convert("RGB"), side)] * same
                if len(shown) >= frames:
                    break
    except (OSError, UnidentifiedImageError) as error:
        raise ResultError(f"{path}: not a film ({error}); give GIF files of eval.compare's rollouts folder") from None
    return [shown[n % len(shown)] for n in range(frames)]


def _fitted(frame: Image.Image, side: int) -> Image.Image:
    """In the middle of a square, as large as it goes."""
    share = side / max(frame.size)
    width, height = (max(1, round(length * share)) for length in frame.size)
    tile = Image.new("RGB", (side, side), GROUND)
    tile.paste(frame.resize((width, height), Image.Resampling.LANCZOS), ((side - width) // 2, (side - height) // 2))
    return tile


def mosaic(options: Options) -> bytes:
    """The GIF, under options that `check` let pass."""
    count, frames = len(options.films), max(1, round(options.seconds * 1000 / FRAME_MS))
    columns, step = min(options.columns, count), options.side + GAP
    size = columns * step - GAP, math.ceil(count / columns) * step - GAP
    pictures = [Image.new("RGB", size, GROUND) for _ in range(frames)]
    for number, path in enumerate(options.films):
        row, column = divmod(number, columns)
        for picture, tile in zip(pictures, tiles(path, options.side, frames)):
            picture.paste(tile, (column * step, row * step))
    some = np.concatenate([np.asarray(picture) for picture in pictures[:: max(1, frames // 8)]])
    palette = Image.fromarray(some).quantize(options.colours, Image.Quantize.MEDIANCUT)
    few = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    file = BytesIO()
    few[0].save(file, "GIF", save_all=True, append_images=few[1:], duration=FRAME_MS, loop=0, optimize=False)
    return file.getvalue()


@command
def main() -> int:
    """The command; its exit status."""
    options = tyro.cli(Options, prog="python -m eval.figures.mosaic", description=(__doc__ or "").splitlines()[0])
    try:
        check(options)
        body = mosaic(options)
        with atomic_write(options.output) as file:
            file.write(body)
    except (ResultError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: {len(options.films)} films, {len(body) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
