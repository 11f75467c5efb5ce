"""
Build the pre-activation ResNet for small images that BackdoorBench trains.

He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016. As in the CIFAR variant in
common use, and unlike the paper, nothing normalises between the last block and the last layer.
"""

import torch
from torch import Tensor, nn

from common.catalogue.architectures import ResNetArguments


class PreActivationBlock(nn.Module):
    """Normalise and rectify before each convolution; project where the shape changes."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        """Draw the initial weights from torch's global generator."""
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``(B, outputs, H/stride, W/stride)``."""
        activated = torch.relu(self.bn1(hidden))
        # Only the projection sees the activated input; the identity carries the raw one.
        shortcut = hidden if self.shortcut is None else self.shortcut(activated)
        residual: Tensor = self.conv2(torch.relu(self.bn2(self.conv1(activated))))
        return residual + shortcut


class PreActivationResNet18(nn.Module):
    """Classify small images by eight pre-activation blocks."""

    def __init__(self, *, classes: int, channels: int, width: int) -> None:
        """Draw the initial weights from torch's global generator."""
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.layer1 = _stage(width, width, stride=1)
        self.layer2 = _stage(width, 2 * width, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, stride=2)
        self.layer4 = _stage(4 * width, 8 * width, stride=2)
        self.linear = nn.Linear(8 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, classes)`` for images ``(B, C, H, W)``."""
        hidden = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(images)))))
        logits: Tensor = self.linear(hidden.mean(dim=(2, 3)))
        return logits


def build_preact_resnet18_cifar(args: ResNetArguments) -> nn.Module:
    """Return a fresh ``preact_resnet18_cifar``."""
    return PreActivationResNet18(classes=args.classes, channels=args.channels, width=args.width)


def _stage(inputs: int, outputs: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(
        PreActivationBlock(inputs, outputs, stride=stride),
        PreActivationBlock(outputs, outputs, stride=1),
    )
