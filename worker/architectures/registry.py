"""Find the builder of a built-in architecture by the name the catalogue gives it."""

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel
from torch import nn

from worker.architectures.preact_resnet_cifar import build_preact_resnet18_cifar
from worker.architectures.resnet_cifar import build_resnet18_cifar
from worker.architectures.small_cnn import build_small_cnn
from worker.architectures.small_vgg import build_small_vgg

# Any: each builder takes the arguments model that the catalogue pairs with its name.
BUILDERS: Mapping[str, Callable[[Any], nn.Module]] = {
    "small_cnn": build_small_cnn,
    "small_vgg": build_small_vgg,
    "resnet18_cifar": build_resnet18_cifar,
    "preact_resnet18_cifar": build_preact_resnet18_cifar,
}


def build(name: str, args: BaseModel) -> nn.Module:
    """
    Return a freshly initialised model in training mode, on the CPU.

    Args:
        args: The model ``common.catalogue.architectures.ARCHITECTURES[name].arguments``.

    Raises:
        KeyError: No built-in architecture has this name.
    """
    return BUILDERS[name](args)
