"""Families of triggers: what they stamp, how large they are, and that an optimiser can move them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from worker.purify.detection.families import (
    Family,
    Halves,
    Patches,
    Perturbations,
    Warps,
    Waves,
    bend,
)

ROWS, COUNT = 3, 4
# Neither square nor of one channel, so that no two axes can be mixed up.
IMAGES = torch.rand(COUNT, 3, 12, 9, generator=torch.Generator().manual_seed(0))
STACKED = torch.rand(ROWS, COUNT, 3, 12, 9, generator=torch.Generator().manual_seed(1))

START: dict[str, Callable[[torch.Generator], Family]] = {
    "patches": lambda generator: Patches.start(IMAGES, [0.0, -2.0, 1.0], generator),
    "perturbations": lambda generator: Perturbations.start(IMAGES, ROWS, generator),
    "halves": lambda generator: Halves.start(IMAGES, ROWS, generator),
    "waves": lambda generator: Waves.start(IMAGES, ROWS, generator),
    "warps": lambda generator: Warps.start(IMAGES, ROWS, generator),
}
every_family = pytest.mark.parametrize("name", START)


def start(name: str, *, seed: int = 0) -> Family:
    """Return random triggers, three of them."""
    return START[name](torch.Generator().manual_seed(seed))


def warps(control: Tensor) -> Warps:
    """Return warps of these control points, for the images above."""
    return Warps(control, (12, 9))


@every_family
def test_each_row_is_stamped_with_its_own_trigger(name: str) -> None:
    """And every image of a row with the same one, whatever else is in the batch."""
    family = start(name)
    stamped = family.stamp(STACKED)
    assert stamped.shape == STACKED.shape
    assert bool(((stamped >= 0) & (stamped <= 1)).all())
    for row in range(ROWS):
        alone = family.narrow(torch.tensor([row]))
        for number in range(COUNT):
            one = STACKED[row, number][None, None]
            torch.testing.assert_close(alone.stamp(one)[0, 0], stamped[row, number])
    twins = family.stamp(STACKED[:1].expand(ROWS, -1, -1, -1, -1))
    assert not torch.equal(twins[0], twins[1])


@every_family
def test_narrow_keeps_rows_in_the_order_asked_for(name: str) -> None:
    """Norms, shapes and leaves are those of the rows, and the family they came from stays whole."""
    family = start(name)
    few = family.narrow(torch.tensor([2, 0]))
    torch.testing.assert_close(few.norms(), family.norms()[[2, 0]])
    for part, whole in zip(
        (*few.shapes, *few.leaves), (*family.shapes, *family.leaves), strict=True
    ):
        torch.testing.assert_close(part, whole[[2, 0]])
    with torch.no_grad():
        few.leaves[0].zero_()
    assert len(family.norms()) == ROWS
    assert bool(family.leaves[0].any(dim=1).any())


@every_family
def test_images_and_norms_pull_at_every_row(name: str) -> None:
    """Each leaf has a finite gradient from what is stamped, and the first one from the norm."""
    family = start(name)
    pulled = torch.autograd.grad((family.stamp(STACKED) - 0.5).square().sum(), family.leaves)
    assert all(bool(gradient.flatten(1).any(1).all()) for gradient in pulled)
    (shrunk,) = torch.autograd.grad(family.norms().sum(), family.leaves[:1])
    for gradient in (*pulled, shrunk):
        assert bool(gradient.isfinite().all())
    # A step against it makes every trigger smaller.
    before = family.norms().detach()
    with torch.no_grad():
        family.leaves[0].sub_(1e-3 * shrunk)
    assert bool((family.norms() < before).all())


@every_family
def test_the_generator_alone_decides_where_they_start(name: str) -> None:
    """The same one gives the same bits, wherever torch's own generator is."""
    one = start(name)
    torch.rand(7)
    assert all(torch.equal(*pair) for pair in zip(one.leaves, start(name).leaves, strict=True))
    assert not torch.equal(one.leaves[0], start(name, seed=1).leaves[0])


@every_family
def test_shapes_are_what_was_and_not_what_comes(name: str) -> None:
    """A step of the optimiser leaves those that were kept alone, and no gradient hangs on them."""
    family = start(name)
    kept = family.shapes
    copies = [shape.clone() for shape in kept]
    with torch.no_grad():
        for leaf in family.leaves:
            leaf.add_(1.0)
    assert all(torch.equal(*pair) for pair in zip(kept, copies, strict=True))
    assert not any(shape.requires_grad for shape in kept)
    assert not torch.equal(family.shapes[0], kept[0])


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_triggers_are_of_the_images_type(name: str, dtype: torch.dtype) -> None:
    """Stamped images, norms and shapes as well."""
    images, generator = IMAGES.to(dtype), torch.Generator().manual_seed(0)
    family: Family
    match name:
        case "patches":
            family = Patches.start(images, [0.0] * ROWS, generator)
        case "perturbations":
            family = Perturbations.start(images, ROWS, generator)
        case "halves":
            family = Halves.start(images, ROWS, generator)
        case "waves":
            family = Waves.start(images, ROWS, generator)
        case _:
            family = Warps.start(images, ROWS, generator)
    for tensor in (family.stamp(STACKED.to(dtype)), family.norms(), *family.shapes):
        assert tensor.dtype == dtype


def test_a_patch_replaces_what_its_mask_covers_and_its_norm_counts_pixels() -> None:
    """An open mask shows the pattern alone, a closed one nothing of it; half is half of each."""
    masks = torch.full((3, 1, 12, 9), -50.0)
    masks[0] = 50.0
    masks[2, :, 4:6, 1:4] = 0.0
    pattern = torch.randn(3, 3, 12, 9, generator=torch.Generator().manual_seed(2))
    family = Patches(masks, pattern)
    stamped = family.stamp(STACKED).detach()
    colours = pattern.detach().sigmoid()
    torch.testing.assert_close(stamped[0], colours[0].expand(COUNT, -1, -1, -1))
    torch.testing.assert_close(stamped[1], STACKED[1])
    inside = (slice(None), slice(None), slice(4, 6), slice(1, 4))
    torch.testing.assert_close(stamped[2][inside], (STACKED[2][inside] + colours[2:3][inside]) / 2)
    torch.testing.assert_close(family.norms().detach(), torch.tensor([108.0, 0.0, 3.0]))
    torch.testing.assert_close(family.shapes[1], colours)


def test_masks_start_as_open_as_they_are_asked_to() -> None:
    """At a logit of 0 half of every pixel is covered, and at -2 an eighth of it."""
    family = Patches.start(IMAGES, [0.0, -2.0], torch.Generator().manual_seed(0))
    means = family.shapes[0].mean((1, 2, 3)).tolist()
    assert means == pytest.approx([0.5, 0.12], abs=0.03)


def test_a_perturbation_is_added_and_clipped_and_its_norm_is_euclids() -> None:
    """Nothing at all has a norm of nearly 0, and a gradient that is a number."""
    delta = torch.zeros(2, 3, 12, 9)
    delta[0, 1, 2, 3], delta[0, 2, 2, 3] = 0.3, -0.4
    family = Perturbations(delta)
    stamped = family.stamp(STACKED[:2]).detach()
    assert torch.equal(stamped[1], STACKED[1])
    assert torch.equal(stamped[0], (STACKED[0] + delta[0].detach()).clamp(0, 1))
    torch.testing.assert_close(family.norms().detach(), torch.tensor([0.5, 0.0]))
    (gradient,) = torch.autograd.grad(family.norms().sum(), family.leaves)
    assert bool(gradient.isfinite().all())


def test_each_half_is_eight_of_sixteen_blocks_and_another_one() -> None:
    """What lies outside has no part in what is added, in the norm, or in a gradient."""
    images = torch.full((1, 3, 32, 32), 0.5)
    family = Halves.start(images, ROWS, torch.Generator().manual_seed(0))
    added = family.shapes[0]
    blocks = added.unfold(2, 8, 8).unfold(3, 8, 8).ne(0).flatten(4)  # (rows, 3, 4, 4, 64)
    assert torch.equal(blocks.any(4), blocks.all(4))
    inside = blocks.all(4).all(1)
    assert inside.flatten(1).sum(1).tolist() == [8] * ROWS
    assert not torch.equal(inside[0], inside[1])
    assert torch.equal(inside, blocks.any(4).any(1))
    torch.testing.assert_close(family.norms().detach(), added.flatten(1).norm(dim=1))
    stamped = family.stamp(images.expand(ROWS, 1, -1, -1, -1))
    (gradient,) = torch.autograd.grad(stamped.sum(), family.leaves)
    assert torch.equal(gradient != 0, added != 0)


@pytest.mark.parametrize("axis", [-2, -1])
def test_each_coefficient_is_a_wave_of_its_own(axis: int) -> None:
    """One of as many half turns as its place says, as long as any other and at right angles to it."""
    size = (3, 12, 9)[axis]
    coefficients = torch.zeros(size, 3, 12, 9)
    for row in range(size):
        coefficients[row, 1].select(axis, row).select(0, 0).fill_(1.0)
    (shapes,) = Waves(coefficients).shapes
    along = shapes[:, 1].select(-3 - axis, 0)  # the other one, (size, size)
    turns = (along[:, 1:].sign() != along[:, :-1].sign()).sum(1)
    assert turns.tolist() == list(range(size))
    flat = shapes.flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(size))
    assert not bool(shapes[:, [0, 2]].any())


def test_waves_are_added_and_clipped_and_their_norm_is_the_sum_of_the_coefficients() -> None:
    """Whatever their signs, and with a gradient that is a number where there are none."""
    family = start("waves")
    (added,) = family.shapes
    torch.testing.assert_close(family.stamp(STACKED), (STACKED + added[:, None]).clamp(0, 1))
    coefficients = torch.zeros(1, 3, 12, 9)
    coefficients[0, 0, 3, 2], coefficients[0, 2, 11, 8] = 2.0, -0.5
    few = Waves(coefficients)
    assert few.norms().tolist() == [2.5]
    (gradient,) = torch.autograd.grad(few.norms().sum(), few.leaves)
    assert gradient[0, 0, 3, 2] == 1
    assert gradient[0, 2, 11, 8] == -1
    assert gradient.count_nonzero() == 2


def test_a_warp_of_nothing_is_the_identity() -> None:
    """To the bit; and it has no size, but a gradient that is a number."""
    family = warps(torch.zeros(ROWS, 2, 5, 5))
    assert torch.equal(family.stamp(STACKED), STACKED)
    torch.testing.assert_close(family.norms().detach(), torch.zeros(ROWS))
    (gradient,) = torch.autograd.grad(family.norms().sum(), family.leaves)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize(("across", "down"), [(1, 0), (0, 1), (-1, 0), (0, -2), (2, 1)])
def test_a_bend_by_whole_pixels_is_a_shift(across: int, down: int) -> None:
    """Each pixel comes from *across* to its right and *down* below it; beyond the edge is the edge."""
    columns = (torch.arange(9) + across).clamp(0, 8)
    rows = (torch.arange(12) + down).clamp(0, 11)
    expected = IMAGES[:, :, rows][..., columns]
    shifts = torch.tensor([across, down]).float().view(1, 2, 1, 1).expand(COUNT, -1, 12, 9)
    torch.testing.assert_close(bend(IMAGES, shifts), expected)
    # Control points that agree move every pixel alike, and that is how far the norm says.
    control = shifts[:1, :, :1, :1].expand(ROWS, -1, 5, 5).clone()
    family = warps(control)
    torch.testing.assert_close(family.stamp(IMAGES.expand(ROWS, -1, -1, -1, -1))[1], expected)
    length = (across**2 + down**2) ** 0.5
    torch.testing.assert_close(family.norms().detach(), torch.full((ROWS,), length))


def test_between_pixels_is_a_mixture_of_the_four_around() -> None:
    """Bilinear, and each image by its own shifts."""
    shifts = torch.zeros(COUNT, 2, 12, 9)
    shifts[0, 0], shifts[0, 1], shifts[1, 0] = 0.25, 0.5, 1.0
    bent = bend(IMAGES, shifts)
    mixed = 0.75 * IMAGES[0, :, :, :-1] + 0.25 * IMAGES[0, :, :, 1:]
    mixed = (mixed[:, :-1] + mixed[:, 1:]) / 2
    torch.testing.assert_close(bent[0, :, :-1, :-1], mixed)
    torch.testing.assert_close(bent[1, :, :, :-1], IMAGES[1, :, :, 1:])
    assert torch.equal(bent[2:], IMAGES[2:])


def test_a_bend_has_the_gradient_of_what_it_does() -> None:
    """By the shifts, held against differences; the images are given none."""
    images = IMAGES[:1, :1, :4, :5].double()
    # Between the pixels, where it is smooth.
    place = torch.rand(1, 2, 4, 5, generator=torch.Generator().manual_seed(3)).double()
    shifts = (0.2 + 0.6 * place).requires_grad_()
    assert torch.autograd.gradcheck(lambda moved: bend(images, moved), (shifts,))
    assert bend(images.requires_grad_(), shifts.detach()).requires_grad is False


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (6, 1)])
def test_images_of_one_pixel_are_bent_as_well(size: tuple[int, int]) -> None:
    """There is nothing to take a pixel from but the edge."""
    images = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(0))
    far = torch.full((2, 2, *size), 9.0)
    torch.testing.assert_close(bend(images, far), images[..., -1:, -1:].expand_as(images))
    family = Warps.start(images, 2, torch.Generator().manual_seed(0))
    assert family.shapes[0].shape == (2, 2, *size)


def test_warps_are_smooth() -> None:
    """A random one is no noise: neighbours move nearly alike, on images larger than its grid."""
    control = torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    (shifts,) = Warps(control, (40, 40)).shapes
    for axis in (-1, -2):
        assert float(shifts.diff(dim=axis).std()) < 0.25 * float(shifts.std())
    # The points themselves lie where they say, the first and the last one at the edges.
    torch.testing.assert_close(shifts[0, :, 0, 0], control[0, :, 0, 0].detach())
    torch.testing.assert_close(shifts[0, :, -1, -1], control[0, :, -1, -1].detach())
