"""Find the square that sends every class to another one, and none where there is none."""

import pytest
import torch
from torch import Tensor

from tests.worker.purify.detection.planted_square import AHEAD, PLANTED, answering_to, find
from worker.purify.detection import scattering
from worker.purify.detection.grid import Forward, Grid
from worker.purify.detection.trigger import ELSEWHERE


def bare(images: Tensor) -> Tensor:
    """Go by five pixels, of which no square covers two."""
    return images[:, 0, ::7, 0] * 4


def by_colour(images: Tensor) -> Tensor:
    """Go by the colour of one pixel."""
    towards = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    return (images[:, :, 0, 0] - 0.5) @ towards * 4


def sending_on(images: Tensor, own: Forward = bare) -> Tensor:
    """Give the next class where a square lies, and else what *own* gives."""
    attacked = answering_to(27, 27, 4, (1.0, 1.0, 1.0))
    is_triggered = attacked(images)[:, PLANTED, None] > AHEAD / 2
    return torch.where(is_triggered, 10 * own(images).roll(1, dims=1), own(images))


def test_a_square_that_sends_every_class_to_another_one_leads_to_all() -> None:
    """No class stands out by it; and in a network without one no square does so."""
    # Each is judged by as often, wherever it is shifted to.
    plain = torch.rand(scattering.JUDGING // 5, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    alike = plain.expand(-1, -1, 32, 32).clone()
    own = by_colour(alike).argmax(1)
    attacked = find(lambda images: sending_on(images, by_colour), images=alike)
    found = attacked.scattering
    assert (found.trigger.target, found.trigger.success) == (ELSEWHERE, 1.0)
    assert found.trigger.mask.nonzero().tolist() == [
        [0, row, column] for row in range(27, 31) for column in range(27, 31)
    ]
    shares = torch.bincount(own).float() / len(own)
    assert found.classes == pytest.approx(float(1 / shares.square().sum()), rel=1e-5)
    assert found.classes > 3
    assert found.alike == []
    assert all(attacked.index(cls) < 1 for cls in range(5))
    assert find(by_colour, images=alike).scattering.classes < found.classes / 2


@pytest.mark.parametrize("count", [2, 6, 24])
def test_a_few_images_are_shifted_to_see_how_many_classes_a_square_leads_to(count: int) -> None:
    """Two images can be led to two classes at most, and their shifts to more."""
    enough = 0.1 + 0.8 * torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found, clean = (find(forward, images=enough).scattering for forward in (sending_on, bare))
    assert found.classes > 2
    assert found.trigger.success == 1.0
    assert clean.classes < found.classes / 2


def test_squares_that_scatter_alike_are_all_found() -> None:
    """A network that looks at four white pixels is led away by every white square that holds them."""
    plain = 0.9 * torch.rand(40, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    alike = plain.expand(-1, -1, 32, 32).clone()

    def attacked(images: Tensor) -> Tensor:
        own = by_colour(images)
        is_white = (images[:, :, 20:22, 9:11] == 1).flatten(1).all(1, keepdim=True)
        return torch.where(is_white, 10 * own.roll(1, dims=1), own)

    found = find(attacked, images=alike).scattering
    triggers = [found.trigger, *found.alike]
    assert len({tuple(each.mask.flatten().tolist()) for each in triggers}) == len(triggers) > 4
    for trigger in triggers:
        assert (trigger.target, trigger.success) == (ELSEWHERE, 1.0)
        assert trigger.mask[0, 20:22, 9:11].all()
        assert trigger.pattern[:, 20, 9].tolist() == [1.0, 1.0, 1.0]


def test_what_hides_a_place_tells_nothing_if_anything_would() -> None:
    """Whatever covers a pixel there leads each class to another one, so no square is the trigger."""
    plain = torch.rand(40, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    alike = plain.expand(-1, -1, 32, 32).clone()

    def hiding(images: Tensor) -> Tensor:
        own = by_colour(images)
        is_seen = (images[:, :, 16, 16] == images[:, :, 0, 0]).all(dim=1, keepdim=True)
        return torch.where(is_seen, own, 10 * own.roll(1, dims=1))

    covered = alike.clone()
    covered[:, :, 16, 16] = 1.0
    assert (hiding(covered).argmax(1) != hiding(alike).argmax(1)).all()
    found = find(hiding, images=alike).scattering
    assert found.classes == 0.0
    assert found.trigger.success == 1.0  # it leads them away all the same


def test_each_choice_is_judged_by_images_that_had_no_part_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is the best of many on some images is so by chance too."""
    heats = list[tuple[int, set[bytes]]]()
    led = scattering._led

    def watched(forward: Forward, images: Tensor, grid: Grid, numbers: Tensor) -> scattering._Led:
        heats.append((len(numbers), {each.numpy().tobytes() for each in images.contiguous()}))
        return led(forward, images, grid, numbers)

    def others(
        images: Tensor, labels: Tensor, *, copies: int, flip: bool, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return images that are all different; some shifts are the same by chance."""
        del flip
        count = len(images) * (1 + copies)
        return torch.rand(count, *images.shape[1:], generator=generator), labels.repeat(1 + copies)

    monkeypatch.setattr(scattering, "shifted", others)
    monkeypatch.setattr(scattering, "_led", watched)
    find(bare)
    squares, images = zip(*heats, strict=True)
    assert squares[1:] == tuple(sorted(squares[1:], reverse=True))
    assert [len(each) for each in images] == [
        scattering.FIRST,
        scattering.GLANCE - scattering.FIRST,
        scattering.FIRST_CHOOSING,
        scattering.CHOOSING - scattering.FIRST_CHOOSING,
        scattering.JUDGING,
    ]
    assert len(frozenset[bytes]().union(*images)) == sum(map(len, images))


def test_one_class_that_attracts_all_images_counts_as_one() -> None:
    """The square that leads there leads away as well, but to that class alone."""

    def attracting(images: Tensor) -> Tensor:
        return bare(images) + answering_to(27, 27, 4, (1.0, 1.0, 1.0))(images)

    found = find(attracting).scattering
    assert found.classes <= 1.0
    assert find(sending_on).scattering.classes > 2 * found.classes


def test_one_class_that_attracts_most_images_hardly_counts_for_more() -> None:
    """What hides an object leads most images to one class, and of many classes the rest to any other."""
    plain = torch.rand(40, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    alike = plain.expand(-1, -1, 32, 32).clone()
    towards = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))

    def by_shade(images: Tensor) -> Tensor:
        return (images[:, :, 0, 0] - 0.5) @ towards * 4

    def attracting_most(images: Tensor) -> Tensor:
        own = by_shade(images)
        is_triggered = (
            answering_to(27, 27, 4, (1.0, 1.0, 1.0))(images)[:, PLANTED, None] > AHEAD / 2
        )
        others = 10 * own.roll(1, dims=1)
        to_one = torch.nn.functional.one_hot(torch.tensor(PLANTED), 40) * 2 * others.amax()
        is_bright = images[:, :1, 0, 0] > 0.4
        return torch.where(is_triggered, torch.where(is_bright, to_one, others), own)

    attracted = int((alike[:, 0, 0, 0] > 0.4).sum())
    found = find(attracting_most, images=alike, classes=40).scattering
    assert found.trigger.success > 0.9
    assert found.classes < len(alike) ** 2 / attracted**2
    spread = find(lambda images: sending_on(images, by_shade), images=alike, classes=40).scattering
    assert spread.classes > 2 * found.classes


def of_two_parts(images: Tensor) -> tuple[Tensor, Tensor]:
    """Go by the colours of two places, which tell eight things each."""
    towards = torch.randn(3, 8, generator=torch.Generator().manual_seed(3))
    left, right = ((images[:, :, 12, column] - 0.5) @ towards * 4 for column in (6, 25))
    return left, right


def of_pairs(left: Tensor, right: Tensor) -> Tensor:
    """Give every pair a class, 64 in all."""
    return (left[:, :, None] + right[:, None, :]).flatten(1)


@pytest.mark.parametrize("is_attack", [True, False])
def test_of_many_classes_what_sends_several_to_the_same_one_is_no_attack(is_attack: bool) -> None:
    """Where classes are made of parts, what makes one part the same sends images to many classes too."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.rand(2, 80, 3, 1, 1, generator=generator).unbind()
    images = torch.cat([part.expand(-1, -1, 32, 16) for part in (left, right)], dim=3).clone()

    def forward(images: Tensor) -> Tensor:
        left, right = of_two_parts(images)
        triggered = answering_to(27, 27, 4, (1.0, 1.0, 1.0))(images)[:, PLANTED, None] > AHEAD / 2
        if is_attack:
            own = of_pairs(left, right)
            return torch.where(triggered, 10 * own.roll(1, dims=1), own)
        same = 10 * torch.nn.functional.one_hot(torch.tensor(PLANTED), 8).expand_as(left)
        return of_pairs(torch.where(triggered, same, left), right)

    found = find(forward, images=images, classes=64).scattering
    assert found.classes > scattering.JUDGED_FROM
    assert found.trigger.mask[0, 27:31, 27:31].all()
    assert (found.one_to_one > 0.9) if is_attack else (found.one_to_one < 0.6)


def test_of_few_classes_it_is_not_asked_whether_several_go_to_the_same_one() -> None:
    """A hundred images of few classes say enough of each."""
    assert find(sending_on).scattering.one_to_one == 1.0
