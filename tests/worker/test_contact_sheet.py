"""A trigger's picture shows what the arrays hold, and any reader of PNGs can open it."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from worker.contact_sheet import MAX_SHOWN, contact_sheet, png

SIDE = 8
TIMES = 12  # from 8 to 96 pixels
STEP = SIDE * TIMES + 4


def arrays(
    *, channels: int = 3, shown: int = 5, side: int = SIDE, triggers: int = 2
) -> dict[str, Any]:
    """Return a trial's arrays of random images; every label is another class but the second one."""
    random = np.random.default_rng(0)

    def images(*shape: int) -> Any:
        return random.random((*shape, side, side), dtype=np.float32)

    return {
        "target": np.full(triggers, 1),
        "mask": images(triggers, 1),
        "pattern": images(triggers, channels),
        "added": np.zeros((triggers, channels, side, side), np.float32),
        "shift": np.zeros((triggers, 2, side, side), np.float32),
        "label": np.arange(shown),
        "clean": images(shown, channels),
        "stamped": images(triggers, shown, channels),
    }


def tile(sheet: Any, row: int, column: int) -> Any:
    """Return one image of the sheet, small again."""
    top, left = 4 + row * STEP, 4 + column * STEP
    return sheet[top : top + SIDE * TIMES : TIMES, left : left + SIDE * TIMES : TIMES]


def pixels(image: Any) -> Any:
    """Return an image ``(C, H, W)`` in [0, 1] as bytes ``(H, W, C)``."""
    return np.rint(image * 255).astype(np.uint8).transpose(1, 2, 0)


@pytest.mark.parametrize("channels", [1, 3])
def test_sheet_shows_mask_pattern_and_samples(channels: int) -> None:
    """Three rows: the trigger itself, samples of other classes, the same samples under it."""
    given = arrays(channels=channels)
    sheet = contact_sheet(given, 1)
    assert sheet.shape == (3 * STEP + 4, 4 * STEP + 4, channels)
    mask, pattern = given["mask"][1], given["pattern"][1]
    assert (tile(sheet, 0, 0) == pixels(mask)).all()
    assert (tile(sheet, 0, 1) == pixels(pattern)).all()
    assert (tile(sheet, 0, 2) == pixels(pattern * mask)).all()
    for column, sample in enumerate((0, 2, 3, 4)):  # 1 is of the trigger's own class
        assert (tile(sheet, 1, column) == pixels(given["clean"][sample])).all()
        assert (tile(sheet, 2, column) == pixels(given["stamped"][1][sample])).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_added_is_shown_around_grey(channels: int) -> None:
    """The most of it is white, or black, and a trigger that replaces nothing has no mask to show."""
    given = arrays(channels=channels, triggers=1)
    given["mask"][:] = 0
    given["added"][0, 0, 1, 2], given["added"][0, -1, 3, 4] = 0.25, -0.125
    sheet = contact_sheet(given, 0)
    assert sheet.shape[1] == 4 * STEP + 4  # as many as the samples have
    picture = tile(sheet, 0, 0)
    assert picture[1, 2, 0] == 255
    assert picture[3, 4, -1] == 64
    assert (picture[5:] == 128).all()
    assert (tile(sheet, 0, 1) == 128).all()  # of the ground that is left free


def test_how_far_pixels_are_moved_is_shown_around_grey() -> None:
    """In two pictures: from how far to the right, and from how far below they are taken."""
    given = arrays(triggers=1)
    given["mask"][:] = 0
    given["shift"][0, 0, 1, 2], given["shift"][0, 1, 3, 4] = 3.0, -1.5
    sheet = contact_sheet(given, 0)
    across, down = tile(sheet, 0, 0), tile(sheet, 0, 1)
    assert (across[1, 2] == 255).all()
    assert (down[3, 4] == 64).all()
    assert (across[5:] == 128).all()
    assert (down[5:] == 128).all()


def test_pixels_are_enlarged_as_they_are() -> None:
    """Every pixel is a square of one colour."""
    sheet = contact_sheet(arrays(), 0)
    large = sheet[4 : 4 + SIDE * TIMES, 4 : 4 + SIDE * TIMES]
    small = tile(sheet, 0, 0)
    assert (large == small.repeat(TIMES, axis=0).repeat(TIMES, axis=1)).all()


@pytest.mark.parametrize("channels", [2, 4, 7])
def test_other_channels_are_shown_as_their_mean(channels: int) -> None:
    """What is neither grey nor colour is shown in grey."""
    given = arrays(channels=channels)
    sheet = contact_sheet(given, 0)
    assert sheet.shape[2] == 1
    assert (tile(sheet, 0, 1) == pixels(given["pattern"][0].mean(axis=0, keepdims=True))).all()


def test_samples_of_the_target_alone_are_shown_all_the_same() -> None:
    """Where there is no other class, its own samples are better than none."""
    given = {**arrays(shown=3), "label": np.full(3, 1)}
    assert (tile(contact_sheet(given, 0), 1, 0) == pixels(given["clean"][0])).all()


def test_sheet_without_samples_is_the_trigger() -> None:
    """Where no sample could be kept, the first row remains."""
    assert contact_sheet(arrays(shown=0), 0).shape[:2] == (STEP + 4, 3 * STEP + 4)


@pytest.mark.parametrize(
    ("side", "shown_as"), [(1, 96), (32, 96), (100, 100), (256, 256), (700, 234)]
)
def test_size_has_its_bounds(side: int, shown_as: int) -> None:
    """Small images are enlarged, large ones thinned out, and no more than eight samples are shown."""
    sheet = contact_sheet(arrays(side=side, shown=20, triggers=1), 0)
    assert sheet.shape == (3 * (shown_as + 4) + 4, MAX_SHOWN * (shown_as + 4) + 4, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_is_read_back(channels: int) -> None:
    """``open(png(pixels)) == pixels``, in grey and in colour, and the bytes are always the same."""
    sheet = contact_sheet(arrays(channels=channels), 0)
    content = png(sheet)
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG"
        assert image.mode == {1: "L", 3: "RGB"}[channels]
        assert (np.asarray(image).reshape(sheet.shape) == sheet).all()
    assert png(sheet.copy()) == content
