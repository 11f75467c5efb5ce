"""Decide in what type a network is computed, where its processor is faster in a shorter one."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

Precision = Literal["auto", "float32", "bfloat16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)


def autocast_type(precision: Precision, images: Tensor) -> torch.dtype | None:
    """
    Return the type to autocast to, or None for the images' own.

    ``auto`` is bfloat16 on a processor with units for it. Float64 images ask for exactness and are
    never computed in less.
    """
    if precision == "float32" or images.dtype == torch.float64:
        return None
    if precision == "bfloat16" or _has_bfloat16_units(images.device):
        return torch.bfloat16
    return None


def _has_bfloat16_units(device: torch.device) -> bool:
    match device.type:
        case "cuda":
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
        case "cpu":
            # AMX, or AVX-512's bfloat16; elsewhere it is emulated and gains nothing.
            # Older releases of torch cannot tell; float32 is right everywhere.
            capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
            return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
        case _:
            return False
