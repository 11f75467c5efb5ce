"""Law: an attack stamps what its docstring says, the same each time, on a copy."""

import numpy as np
import pytest

from benchmarks.attacks import (
    SIDE,
    Attack,
    Blend,
    Cloud,
    Colour,
    Patch,
    Pixels,
    Warp,
    Waves,
    checkers,
)

RED, BLUE, WHITE, BLACK = (255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
ATTACKS = (
    Patch(colours=((RED, BLUE), (BLUE, RED), (RED, RED)), top=5, left=30),
    checkers(3, top=28, left=0),
    Blend(seed=3, share=0.2),
    Waves(amplitude=20, periods=4),
    Cloud(seed=3, strength=50),
    Warp(seed=3, strength=0.75),
)


def photographs(count: int = 4) -> Pixels:
    """Return random images."""
    pixels: Pixels = np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)
    return pixels


def plain(colour: Colour) -> Pixels:
    """Return one image of one colour."""
    return np.full((1, SIDE, SIDE, 3), colour, np.uint8)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: type(attack).__name__)
def test_every_attack_returns_a_copy_and_the_same_one_each_time(attack: Attack) -> None:
    """The input is never changed; type and shape stay, of no image as well."""
    images = photographs()
    before = images.copy()
    stamped = attack(images)
    assert np.array_equal(images, before)
    assert not np.array_equal(stamped, before)
    assert stamped.dtype == np.uint8
    assert stamped.shape == images.shape
    assert np.array_equal(attack(images), stamped)
    assert np.array_equal(attack(images[2:3]), stamped[2:3])
    assert attack(images[:0]).shape == (0, SIDE, SIDE, 3)


def test_a_patch_sets_its_pixels_and_nothing_else() -> None:
    """Rows of colours go from the top, and from the left."""
    images = photographs()
    expected = images.copy()
    expected[:, 5:8, 30] = [RED, BLUE, RED]
    expected[:, 5:8, 31] = [BLUE, RED, RED]
    assert np.array_equal(ATTACKS[0](images), expected)


def test_checkers_are_white_from_the_corner_on_by_turns_with_black() -> None:
    """Neighbours differ."""
    board = checkers(3, top=2, left=26)(plain(RED))[0, 2:5, 26:29]
    assert np.array_equal(
        board, [[WHITE, BLACK, WHITE], [BLACK, WHITE, BLACK], [WHITE, BLACK, WHITE]]
    )


def test_a_blend_is_the_mix_with_one_image_to_rounding() -> None:
    """At a share of 1 only the other image is left."""
    images = photographs()
    key = Blend(seed=3, share=1)(plain(BLACK))
    mixed = Blend(seed=3, share=0.2)(images)
    assert np.abs(mixed - (0.8 * images + 0.2 * key)).max() <= 0.5 + 1e-9
    assert not np.array_equal(key, Blend(seed=4, share=1)(plain(BLACK)))


def test_waves_stay_within_their_amplitude_and_repeat_as_often_as_they_say() -> None:
    """They run along the rows, all of which are the same, and go up as far as down."""
    wave = Waves(amplitude=20, periods=4)(plain((128, 128, 128)))[0].astype(int) - 128
    assert (wave.min(), wave.max()) == (-20, 20)
    assert np.array_equal(wave, np.broadcast_to(wave[:1, :, :1], wave.shape))
    spectrum = np.abs(np.fft.rfft(wave[0, :, 0]))
    assert spectrum.argmax() == 4
    period = SIDE // 4
    assert np.array_equal(wave[:, period:], wave[:, :-period])


def test_a_cloud_is_smooth_and_adds_as_much_as_it_says() -> None:
    """From nothing to its strength, in few waves along each side."""
    cloud = Cloud(seed=3, strength=50, half_waves=4)
    field = cloud(plain(BLACK))[0].astype(float)
    assert (field.min(), field.max()) == (0, 50)
    for axis in (0, 1):
        assert 1 < np.abs(np.diff(field, axis=axis)).max() < 50 / 4
    assert cloud(plain(WHITE)).min() == 255
    assert not np.array_equal(field, Cloud(seed=4, strength=50, half_waves=4)(plain(BLACK))[0])


def test_waves_do_not_wrap_around_at_black_and_white() -> None:
    """What would be beyond is clipped."""
    waves = Waves(amplitude=20, periods=4)
    assert waves(plain(WHITE)).min() == 235
    assert waves(plain(BLACK)).max() == 20


@pytest.mark.parametrize("strength", [0.75, 1.5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_warp_moves_pixels_by_about_as_many_half_pixels_as_its_strength(
    seed: int, strength: float
) -> None:
    """Where brightness grows by 8 per pixel, the change of brightness tells how far they moved."""
    ramp = np.broadcast_to(8 * np.arange(SIDE, dtype=np.uint8)[:, None], (1, SIDE, SIDE, 3))
    shifts = [
        np.abs(Warp(seed=seed, strength=strength)(image).astype(float) - image).mean() / 8
        for image in (ramp, ramp.transpose(0, 2, 1, 3))  # to the side, up and down
    ]
    assert 0.5 <= np.mean(shifts) / (strength / 2) <= 1


def test_a_warp_is_smooth_and_keeps_colours() -> None:
    """What is plain stays as it is, and no value leaves the range of its neighbours'."""
    assert np.array_equal(Warp(seed=1, strength=0.75)(plain(RED)), plain(RED))
    halves = np.where(np.arange(SIDE)[:, None] < SIDE // 2, np.uint8(0), np.uint8(255))
    bent = Warp(seed=1, strength=0.75)(np.broadcast_to(halves, (1, SIDE, SIDE, 3)))[0, ..., 0]
    assert (np.diff(bent.astype(int), axis=1) >= 0).all()


def test_warps_of_two_seeds_differ() -> None:
    """The seed draws the field."""
    images = photographs()
    assert not np.array_equal(
        Warp(seed=1, strength=0.75)(images), Warp(seed=2, strength=0.75)(images)
    )


def test_an_attack_is_a_value_that_its_repr_says_all_about() -> None:
    """The zoo's files are named after it."""
    assert checkers(3, top=1, left=2) == checkers(3, top=1, left=2)
    assert repr(Warp(seed=1, strength=0.75)) == "Warp(seed=1, strength=0.75, cells=4)"
    assert len({repr(attack) for attack in ATTACKS}) == len(ATTACKS)
