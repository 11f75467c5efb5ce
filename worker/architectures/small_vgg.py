"""
Build ``small_vgg``: six convolutions in three stages, as in the checkpoints of I-BAU.

Zeng et al., "Adversarial Unlearning of Backdoors via Implicit Hypergradient", ICLR 2022.
Pooling, ELU and dropout have no weights, but they take up their numbers in ``features``.
"""

from torch import Tensor, nn

from common.catalogue.architectures import SmallVggArguments

DROPOUT_BY_STAGE = (0.3, 0.4, 0.4)


class SmallVgg(nn.Module):
    """Classify images of one fixed size by three stages of two convolutions each."""

    def __init__(self, *, classes: int, channels: int, width: int, input_size: int) -> None:
        """Draw the initial weights from torch's global generator."""
        super().__init__()
        layers: list[nn.Module] = []
        inputs = channels
        for stage, dropout in enumerate(DROPOUT_BY_STAGE):
            outputs = width * 2**stage
            for _ in range(2):
                convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
                layers += [convolution, nn.BatchNorm2d(outputs), nn.ELU()]
                inputs = outputs
            layers += [nn.MaxPool2d(2), nn.Dropout(dropout)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs * (input_size // 8) ** 2, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(B, classes)`` for images ``(B, C, H, W)``."""
        logits: Tensor = self.classifier(self.features(images).flatten(start_dim=1))
        return logits


def build_small_vgg(args: SmallVggArguments) -> nn.Module:
    """Return a fresh ``small_vgg``."""
    return SmallVgg(
        classes=args.classes,
        channels=args.channels,
        width=args.width,
        input_size=args.input_size,
    )
