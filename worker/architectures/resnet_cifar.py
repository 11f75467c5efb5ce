"""
Build ResNets for small images: a 3x3 stem without pooling, then four stages.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016. The keys are those of the
CIFAR variant in common use. The last pooling averages over whatever is left of the image, so that
every input size works.
"""

import torch
from torch import Tensor, nn

from common.catalogue.architectures import ResNetArguments


class BasicBlock(nn.Module):
    """Add two 3x3 convolutions to the input, which is projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        """Draw the initial weights from torch's global generator."""
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``(B, outputs, H/stride, W/stride)``."""
        residual = torch.relu(self.bn1(self.conv1(hidden)))
        residual = self.bn2(self.conv2(residual))
        return torch.relu(residual + self.shortcut(hidden))


class ResNet18(nn.Module):
    """Classify small images by eight basic blocks."""

    def __init__(self, *, classes: int, channels: int, width: int) -> None:
        """Draw the initial weights from torch's global generator."""
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, stride=1)
        self.layer2 = _stage(width, 2 * width, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, stride=2)
        self.layer4 = _stage(4 * width, 8 * width, stride=2)
        self.linear = nn.Linear(8 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, classes)`` for images ``(B, C, H, W)``."""
        hidden = torch.relu(self.bn1(self.conv1(images)))
        hidden = self.layer4(self.layer3(self.layer2(self.layer1(hidden))))
        logits: Tensor = self.linear(hidden.mean(dim=(2, 3)))
        return logits


def build_resnet18_cifar(args: ResNetArguments) -> nn.Module:
    """Return a fresh ``resnet18_cifar``."""
    return ResNet18(classes=args.classes, channels=args.channels, width=args.width)


def _stage(inputs: int, outputs: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(
        BasicBlock(inputs, outputs, stride=stride), BasicBlock(outputs, outputs, stride=1)
    )
