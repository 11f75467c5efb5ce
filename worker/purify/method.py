"""What every method of purification takes and gives back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from worker.purify.detection.recovered import Recovered
from worker.purify.detection.verdict import Verdict
from worker.purify.masking import fold, renew
from worker.purify.metrics import Preprocess

Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in all after each of them; what it raises ends the run."""

Record = Mapping[str, float]
"""What one epoch came to, by the names that the method's own documentation gives."""


@dataclass(frozen=True, kw_only=True)
class Purified:
    """
    Hold what a method wants changed, by the names of the model's parameters and buffers.

    Attributes:
        masks: A float32 factor in [0, 1] for each value of a parameter, on the CPU.
        values: New values, on the CPU, for tensors that a method rewrites instead of masking.
        history: One record per epoch, for methods that have epochs.
        computed_in: The type that the network was computed in.
        verdict: What a method that looks for backdoors says of the model as it came.
        findings: Why, in plain values; the method's own documentation says which.
        triggers: The triggers that were recovered and unlearned.
        candidates: What ``values`` is in each result that could be chosen, in the order of
            ``findings["candidates"]``; nothing stands for the model as it came.
    """

    masks: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Tensor] = field(default_factory=dict)
    history: tuple[Record, ...] = ()
    computed_in: str = "float32"
    verdict: Verdict | None = None
    findings: Mapping[str, object] = field(default_factory=dict)
    triggers: tuple[Recovered, ...] = ()
    candidates: tuple[Mapping[str, Tensor], ...] = ()

    def apply(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """
        Return *state_dict* with the changes, in its order and in each tensor's own dtype.

        A value that the method did not change keeps its bits; tensors without any change are
        passed on as they are, not copied.

        Raises:
            KeyError: A change has no tensor of its name.
        """
        if unknown := (self.masks.keys() | self.values.keys()) - state_dict.keys():
            raise KeyError(f"no tensor for the changes of {sorted(unknown)}")
        changed = dict(state_dict)
        for name, values in self.values.items():
            changed[name] = renew(changed[name], values)
        for name, mask in self.masks.items():
            changed[name] = fold(changed[name], mask)
        return changed


class Method(Protocol):
    """Purify a model with a few clean images; hyper-parameters are the constructor's fields."""

    def cost(self, images: int) -> int:
        """Return about how many forward passes of one image a run with *images* samples takes."""

    def purify(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        preprocess: Preprocess | None = None,
        seed: int,
        progress: Progress | None = None,
    ) -> Purified:
        """
        Return the changes that purify *model*, which is read only.

        The work is done on the device of the model, in float64 for float64 images and in float32
        otherwise. Torch's global generator is neither used nor changed.

        Args:
            images: Clean images ``(N, C, H, W)`` in [0, 1].
            labels: Their classes ``(N,)`` int64.
            preprocess: Applied to images right before the model, such as mean and std.

        Raises:
            PurificationError: The input does not allow it; the class says why.
        """
