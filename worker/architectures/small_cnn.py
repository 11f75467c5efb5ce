"""Build ``small_cnn``: the smallest convolutional network that is still worth a backdoor."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.catalogue.architectures import SmallCnnArguments


class SmallCnn(nn.Module):
    """Classify small images by three convolutions, pooled in between and averaged at the end."""

    def __init__(self, *, classes: int, channels: int, width: int) -> None:
        """Draw the initial weights from torch's global generator."""
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, classes)`` for images ``(B, C, H, W)`` of at least 4x4."""
        hidden = torch.relu(self.bn1(self.conv1(images)))
        hidden = functional.max_pool2d(hidden, 2)  # (B, w, H/2, W/2)
        hidden = torch.relu(self.bn2(self.conv2(hidden)))
        hidden = functional.max_pool2d(hidden, 2)  # (B, 2w, H/4, W/4)
        hidden = torch.relu(self.bn3(self.conv3(hidden)))  # (B, 4w, H/4, W/4)
        logits: Tensor = self.linear(hidden.mean(dim=(2, 3)))
        return logits


def build_small_cnn(args: SmallCnnArguments) -> nn.Module:
    """Return a fresh ``small_cnn``."""
    return SmallCnn(classes=args.classes, channels=args.channels, width=args.width)
