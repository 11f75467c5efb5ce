"""Small networks that a rewriting must leave as they are, or may change."""

import torch
from torch import Tensor, nn
from torch.nn import functional

PROBE = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def convolution(inputs: int) -> nn.Conv2d:
    """Return one whose outputs have either sign."""
    torch.manual_seed(0)
    return nn.Conv2d(inputs, 6, 3, padding=1)


def twice(first: nn.Module, *between: nn.Module) -> nn.Module:
    """Run the very same module before *between* and after it."""
    return nn.Sequential(first, *between, first)


class Beside(nn.Module):
    """Use what one module gives twice: in the next and beside it."""

    def __init__(self, first: nn.Module, then: nn.Module) -> None:
        super().__init__()
        self.first, self.then = first, then

    def forward(self, images: Tensor) -> Tensor:
        """Return what the second gives, with the mean of the first."""
        hidden: Tensor = self.first(images)
        answer: Tensor = self.then(hidden) + hidden.mean()
        return answer


class Undecided(nn.Module):
    """Decide by the values of the images, which cannot be traced."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Return what its layers give, of the images or of their negatives."""
        answer: Tensor = self.layers(images if images.sum() > 0 else -images)
        return answer


class Falling(nn.ELU):
    """Fall, though its parent rises."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the parent's answer with the other sign."""
        return -functional.elu(hidden)
