"""Weights learn from right gradients on processors without the newest vector instructions too."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from worker.purify.workpiece import prepare

SHORTCUT = """
import torch
from torch import nn
from worker.purify.workpiece import prepare

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, {channels}, 3, padding=1), nn.Conv2d({channels}, 8, 1, stride={stride}),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(),
)
images, labels = torch.rand(16, 3, 32, 32), torch.arange(16) % 8

def gradients(images):
    work = prepare(model, images, labels, None)
    work.model.requires_grad_()
    loss = nn.functional.cross_entropy(work.logits(work.images), labels)
    return torch.autograd.grad(loss, list(work.model.parameters()))

for found, expected in zip(gradients(images), gradients(images.double()), strict=True):
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)
"""


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE"])
@pytest.mark.parametrize("channels", [4, 12])
@pytest.mark.parametrize("stride", [2, (2, 1)])
def test_a_narrow_shortcut_learns_from_right_gradients(
    instructions: str, channels: int, stride: object
) -> None:
    """In a process of its own: with channels last, oneDNN writes past its workspace here."""
    done = subprocess.run(
        [sys.executable, "-c", SHORTCUT.format(channels=channels, stride=stride)],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": instructions, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("came_in_channels_last", [False, True])
@pytest.mark.parametrize(
    ("shortcut", "is_channels_last"),
    [
        (nn.Conv2d(4, 8, 1, stride=2), False),
        (nn.Conv2d(16, 8, 1, stride=2), True),
        (nn.Conv2d(16, 8, 1, stride=2, groups=2), False),
        (nn.Conv2d(4, 8, 1), True),
        (nn.Conv2d(4, 8, 3, stride=2, padding=1), True),
    ],
)
def test_only_networks_that_need_it_go_without_channels_last(
    shortcut: nn.Conv2d, is_channels_last: bool, came_in_channels_last: bool
) -> None:
    """The others keep the faster layout, in their weights and in the images, however these came."""
    model = nn.Sequential(
        nn.Conv2d(3, shortcut.in_channels, 3), shortcut, nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    images = torch.rand(2, 3, 8, 8)
    if came_in_channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)

    work = prepare(model, images, torch.tensor([0, 1]), None)

    for tensor in (work.model.get_parameter("0.weight"), work.images):
        assert tensor.is_contiguous(memory_format=torch.channels_last) == is_channels_last
