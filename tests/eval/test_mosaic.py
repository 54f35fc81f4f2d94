"""Films side by side: each in its place, whole in its tile, begun again where it is shorter."""

import numpy as np
import pytest
from PIL import Image

from eval.figures.mosaic import GAP, GROUND, Options, mosaic
from schemas.result import ResultError
from tests.conftest import run

RED, BLUE, GREEN, WHITE = (250, 0, 0), (0, 0, 250), (0, 250, 0), (250, 250, 250)


def film(path, size, colours):
    frames = [Image.new("RGB", size, colour) for colour in colours]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    return path


@pytest.fixture
def films(tmp_path):
    return (
        film(tmp_path / "square.gif", (20, 20), [RED, BLUE]),
        film(tmp_path / "wide.gif", (40, 20), [GREEN] * 2 + [WHITE] * 2),
        film(tmp_path / "high.gif", (10, 30), [WHITE, RED]),
    )


def test_each_film_is_in_its_place_and_begins_again(films, tmp_path):
    options = Options(films, columns=2, side=16, seconds=0.5)
    (tmp_path / "all.gif").write_bytes(mosaic(options))
    with Image.open(tmp_path / "all.gif") as found:
        assert (found.size, found.n_frames, found.info["duration"]) == ((2 * 16 + GAP,) * 2, 5, 100)
        shown = []
        for number in range(5):
            found.seek(number)
            shown.append(np.asarray(found.convert("RGB")).astype(int))
    centres = [(8, 8), (8, 16 + GAP + 8), (16 + GAP + 8, 8)]
    wanted = [
        [RED, GREEN, WHITE], [BLUE, GREEN, RED], [RED, WHITE, WHITE], [BLUE, WHITE, RED], [RED, GREEN, WHITE],
    ]  # fmt: skip
    for frame, colours in zip(shown, wanted):
        for (row, column), colour in zip(centres, colours):
            assert np.abs(frame[row, column] - colour).max() < 8
        assert np.abs(frame[1, 16 + GAP + 8] - GROUND).max() < 8  # above the wide one
        assert np.abs(frame[16 + GAP + 8, 1] - GROUND).max() < 8  # beside the high one
        assert np.abs(frame[-8, -8] - GROUND).max() < 8  # a place without a film
    assert mosaic(options) == (tmp_path / "all.gif").read_bytes()


@pytest.mark.process
def test_what_is_no_film_is_named(films, tmp_path):
    (tmp_path / "text.gif").write_text("no film")
    for bad in ("text.gif", "missing.gif"):
        with pytest.raises(ResultError, match=f"{bad}: not a film"):
            mosaic(Options((films[0], tmp_path / bad)))
    done = run("eval.figures.mosaic", films[0], "--columns", "0", check=False)
    assert done.returncode == 1 and "--columns 0: must be from 1 to 64" in done.stderr
