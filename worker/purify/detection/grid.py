"""
Cover a place of an image with a small square: which ones there are, and what a network says under them.

There are few enough of them to try all, which no search by gradient can replace: a network may answer to
a patch only where it was trained to, to the pixel.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from worker.purify.detection.trigger import Trigger
from worker.purify.errors import NotFinite
from worker.purify.workpiece import at_once, laid_out

Forward = Callable[[Tensor], Tensor]

SIDES, OF = (1, 2, 3, 4, 5), 32  # pixels, of an image of 32; in larger ones as much more
STRIDE = 4  # pixels, of an image of 32; larger ones are multiples of it mostly
MAX_COLOURED = 3  # channels, of which all corners of the colour cube are tried; of more, two
TRIED = 11_000  # groups of them, about, of three channels

# Several are tried at once, on different parts of the image, where there are many.
FEW = 5_000  # squares, up to which each is tried alone
TOGETHER = 2  # along each side of the image, at most
COVERED = 0.1  # of the image, at most
NOTHING = -1  # in place of a square


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Say which squares there are: each a place and a side, and one of the plain images."""

    places: Tensor  # (M, 3) int64: top, left, side
    kinds: Tensor  # (K, C, H, W)

    @classmethod
    def over(cls, image: Tensor) -> "Grid":
        """Return the squares of images like *image* ``(C, H, W)``, plain ones and chequered."""
        channels, height, width = image.shape
        shortest = min(height, width)
        steps = [max(1, length // OF) for length in (height, width)]
        places = [
            (top, left, side)
            for side in sorted({max(1, round(side * shortest / OF)) for side in SIDES})
            for top in range(0, height - side + 1, steps[0])
            for left in range(0, width - side + 1, steps[1])
        ]
        corners = (
            list(product((1.0, 0.0), repeat=channels))
            if channels <= MAX_COLOURED
            else [(1.0,) * channels, (0.0,) * channels]
        )
        plain = torch.tensor(corners).to(image)[:, :, None, None].expand(-1, -1, height, width)
        rows, columns = (
            torch.arange(length, device=image.device) // step
            for length, step in zip((height, width), steps, strict=True)
        )
        board = ((rows[:, None] + columns) % 2).to(image).expand(channels, -1, -1)
        kinds = torch.cat([plain, torch.stack([board, 1 - board])])
        return cls(places=torch.tensor(places, device=image.device), kinds=kinds)

    def __len__(self) -> int:
        return len(self.places) * len(self.kinds)

    @property
    def step(self) -> int:
        """Pixels that are as much of these images as one is of an image of 32."""
        return max(1, min(self.kinds.shape[2:]) // OF)

    def groups(self) -> Tensor:
        """
        Return all squares in groups that are tried at once, ``(G, M)``; ``NOTHING`` fills up the rows.

        Those of a group are of one side, far from each other, and each of another kind. Groups at the
        same places follow each other, as many as there are kinds.
        """
        kinds = len(self.kinds)
        parts = [self._apart(side) for side in torch.unique(self.places[:, 2]).tolist()]
        most = max(part.shape[1] for part in parts)
        places = torch.cat(
            [functional.pad(part, (0, most - part.shape[1]), value=NOTHING) for part in parts]
        )
        first, along = (torch.arange(n, device=places.device) for n in (kinds, most))
        kind = (first[:, None] + along) % kinds  # (kinds, M)
        numbers = places[:, None] * kinds + kind
        return torch.where(places[:, None] == NOTHING, NOTHING, numbers).flatten(0, 1)

    def _apart(self, side: int) -> Tensor:
        """Return the places of squares of *side* in such groups, ``(N, M)``."""
        places = (self.places[:, 2] == side).nonzero()[:, 0]
        down, across = (len(torch.unique(self.places[places, axis])) for axis in (0, 1))
        height, width = self.kinds.shape[2:]
        along = 1
        if len(self) > FEW:
            along = max(1, min(TOGETHER, int((COVERED * height * width) ** 0.5 / side)))
        high, wide = -(-down // along), -(-across // along)
        missing = (0, wide * along - across, 0, high * along - down)
        spread = functional.pad(places.view(down, across), missing, value=NOTHING)
        # Neighbours in a group are a whole tile apart.
        tiles = spread.view(along, high, along, wide).permute(1, 3, 0, 2)
        return tiles.reshape(high * wide, along * along)

    def masks(self, numbers: Tensor) -> Tensor:
        """Return which pixels they cover, ``(B, 1, H, W)``."""
        top, left, side = self.places[numbers // len(self.kinds)].T[:, :, None].unbind()
        height, width = self.kinds.shape[2:]
        rows, columns = (torch.arange(n, device=numbers.device) for n in (height, width))
        down = (rows >= top) & (rows < top + side)
        across = (columns >= left) & (columns < left + side)
        covered: Tensor = (down[:, :, None] & across[:, None, :])[:, None]
        return covered

    def patterns(self, numbers: Tensor) -> Tensor:
        """Return what they are cut out of, ``(B, C, H, W)``."""
        found: Tensor = self.kinds[numbers % len(self.kinds)]
        return found

    def trigger(self, number: int, target: int, success: float) -> Trigger:
        """Return square *number* as what leads to *target*."""
        at = torch.tensor([number], device=self.places.device)
        return Trigger(
            target=target,
            mask=self.masks(at)[0].to(self.kinds.dtype),
            pattern=self.kinds[number % len(self.kinds)],  # a view: there may be many classes
            success=success,
        )

    def is_largest(self, mask: Tensor) -> bool:
        """Whether *mask*, of one of the squares, covers as much as any does."""
        return float(mask.sum()) >= float(self.places[:, 2].max() ** 2)

    def with_other_kinds(self, numbers: Tensor) -> Tensor:
        """Return all squares that lie where one of *numbers* does, those of one place together."""
        kinds = torch.arange(len(self.kinds), device=numbers.device)
        places: Tensor = torch.unique(numbers // len(self.kinds))
        return (places[:, None] * len(self.kinds) + kinds).flatten()

    def within(self, number: int) -> Tensor:
        """Return the squares of its kind within square *number*, itself too, or one step beyond."""
        place, kind = divmod(number, len(self.kinds))
        step = self.step
        first, side = self.places[:, :2], self.places[:, 2:]
        inside = (first >= first[place] - step) & (
            first + side <= first[place] + side[place] + step
        )
        found: Tensor = inside.all(1).nonzero()[:, 0] * len(self.kinds) + kind
        return found

    def steps_away(self, number: int) -> Tensor:
        """
        Return the squares like *number* that lie whole strides away, itself too.

        A network that goes by strides of so many pixels answers to the same there, but for the edges.
        """
        place, kind = divmod(number, len(self.kinds))
        apart = (self.places - self.places[place]) % torch.tensor(
            [STRIDE * self.step, STRIDE * self.step, self.places.max() + 1],
            device=self.places.device,
        )
        found: Tensor = (apart == 0).all(1).nonzero()[:, 0] * len(self.kinds) + kind
        return found

    def margins_under(
        self, forward: Forward, images: Tensor, on: Tensor, numbers: Tensor
    ) -> Tensor:
        """
        Return the margins of *images* ``(N, C, H, W)`` under squares, ``(B, classes)``.

        Args:
            on: Which image each is tried on, ``(B,)``.
            numbers: ``(B,)``, or ``(B, M)`` for several squares on each, as in ``groups``.
        """

        def under(on: Tensor, numbers: Tensor) -> Tensor:
            stamped = images[on]
            for each in numbers.view(len(numbers), -1).unbind(1):
                there = (each != NOTHING)[:, None, None, None]
                stamped = torch.where(self.masks(each) & there, self.patterns(each), stamped)
            return margins(forward(laid_out(stamped)))

        size = at_once(images)
        parts = zip(torch.split(on, size), torch.split(numbers, size), strict=True)
        with torch.no_grad():
            return torch.cat([under(*part) for part in parts])

    def margins_under_each(self, forward: Forward, images: Tensor, numbers: Tensor) -> Tensor:
        """Return those of every image ``(N, C, H, W)`` under every square, ``(B, N, classes)``."""
        each = torch.arange(len(images), device=images.device).repeat(len(numbers))
        squares = numbers.repeat_interleave(len(images))
        found = self.margins_under(forward, images, each, squares)
        return found.view(len(numbers), len(images), -1)


def margins(logits: Tensor) -> Tensor:
    """
    Return how far each class is ahead of the best other one, ``(B, classes)``.

    Raises:
        NotFinite: The logits are not, or there is no second class to get ahead of.
    """
    if logits.shape[1] < 2 or not bool(logits.isfinite().all()):
        raise NotFinite
    (first, second), (leader, _) = (each.unbind(1) for each in logits.topk(2, dim=1))
    ahead = logits - first[:, None]
    return ahead.scatter(1, leader[:, None], (first - second)[:, None])
