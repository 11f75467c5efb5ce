"""Stand-ins for triggers: where they are, what they lead to, and that they stay images."""

import pytest
import torch
from torch import Tensor

from worker.purify import variants
from worker.purify.detection.trigger import ELSEWHERE, Trigger
from worker.purify.variants import stamp_variants

IMAGES = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)).mul(0.5)


def forward(images: Tensor) -> Tensor:
    """Answer 1 for a red corner and 2 for a bright image; 0 otherwise."""
    red = 4 * (images[:, 0, :2, :2].mean((1, 2)) - 0.6)
    bright = 20 * (images.mean((1, 2, 3)) - 0.35)
    return torch.stack([torch.zeros_like(red), red, bright], dim=1)


def corner(target: int = 1) -> Trigger:
    """Return a trigger of the corner's first pixel."""
    mask = torch.zeros(1, 8, 8)
    mask[0, 0, 0] = 0.9
    return Trigger(target=target, mask=mask, pattern=torch.full((3, 8, 8), 0.5), success=1.0)


def stamped(*, reach: int, seed: int = 0) -> Tensor:
    """Return the images under variants of that trigger."""
    generator = torch.Generator().manual_seed(seed)
    return stamp_variants(forward, IMAGES, [corner()], reach=reach, generator=generator)


@pytest.mark.parametrize("reach", [0, 1, 2])
def test_variants_stay_within_reach_and_use_it(reach: int) -> None:
    """Pixels farther away than *reach* keep their bits; those within change on some image."""
    changed = (stamped(reach=reach) != IMAGES).any(1).any(0)
    near = torch.zeros(8, 8, dtype=torch.bool)
    near[: reach + 1, : reach + 1] = True
    assert torch.equal(changed, near)


def test_variants_differ_in_colour_and_are_sharpened() -> None:
    """No two images carry the same, all are in [0, 1], and wide ones lead to the target."""
    found = stamped(reach=1)
    assert bool(((found >= 0) & (found <= 1)).all())
    assert len({tuple(pixel.tolist()) for pixel in found[:, :, 0, 0]}) > 20
    before = float(IMAGES[:, 0, :2, :2].mean())
    assert float(found[:, 0, :2, :2].mean()) > before + 0.15
    assert torch.equal(found, stamped(reach=1))
    assert not torch.equal(found, stamped(reach=1, seed=1))


def test_what_leads_elsewhere_is_sharpened_away_from_the_own_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every image here is a 0, and the sharper the corner, the less it is one."""
    own = torch.zeros(len(IMAGES), dtype=torch.int64)
    assert torch.equal(forward(IMAGES).argmax(1), own)

    def lead() -> float:
        generator = torch.Generator().manual_seed(0)
        found = stamp_variants(forward, IMAGES, [corner(ELSEWHERE)], reach=1, generator=generator)
        return float((forward(found)[:, 0] - forward(found)[:, 1:].amax(1)).mean())

    sharp = lead()
    monkeypatch.setattr(variants, "SHARPENING_STEPS", 0)
    assert sharp < lead() - 0.2


def test_triggers_take_turns() -> None:
    """Every second image has the second one's place."""
    other = Trigger(target=1, mask=corner().mask.flip(-1), pattern=corner().pattern, success=1.0)
    found = stamp_variants(
        forward,
        IMAGES,
        [corner(), other],
        reach=0,
        generator=torch.Generator().manual_seed(0),
    )
    changed = (found != IMAGES).any(1)
    assert bool(changed[::2, 0, 0].all())
    assert not bool(changed[::2, 0, 7].any())
    assert bool(changed[1::2, 0, 7].all())
