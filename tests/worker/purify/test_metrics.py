"""Law: the metrics are the field's, and an image of the target class never counts as attacked."""

import pytest
import torch
from torch import Tensor, nn

from worker.purify.errors import NotEnoughData
from worker.purify.metrics import (
    accuracy,
    agreement,
    attack_success_rate,
    fidelity,
    predict,
    robust_accuracy,
)

LABELS = torch.tensor([0, 1, 2, 3])
PREDICTIONS = torch.tensor([0, 0, 2, 1])


def test_accuracy_and_agreement_count_equal_answers() -> None:
    """Two of four are right; a model agrees with itself."""
    assert accuracy(PREDICTIONS, LABELS) == 0.5
    assert agreement(PREDICTIONS, PREDICTIONS) == 1.0


def test_attack_success_leaves_out_the_target_class() -> None:
    """Of the three images that are not class 0, one is sent to 0 and one to its own class."""
    assert attack_success_rate(PREDICTIONS, LABELS, 0) == pytest.approx(1 / 3)
    assert robust_accuracy(PREDICTIONS, LABELS, 0) == pytest.approx(1 / 3)


def test_target_may_differ_per_image() -> None:
    """All-to-all: each image has its own target."""
    target = (LABELS + 1) % 4
    predictions = torch.tensor([1, 2, 0, 3])
    assert attack_success_rate(predictions, LABELS, target) == 0.5
    assert robust_accuracy(predictions, LABELS, target) == 0.25


def test_nothing_to_measure_on_is_an_error() -> None:
    """No image, or only images of the target class, is never a rate of 0."""
    with pytest.raises(NotEnoughData):
        accuracy(LABELS[:0], LABELS[:0])
    with pytest.raises(NotEnoughData):
        attack_success_rate(torch.zeros(3), torch.zeros(3), 0)


def test_fidelity_rewards_erasure_and_kept_accuracy() -> None:
    """(1 - ASR'/ASR)(ACC'/ACC); ACC'/ACC for a clean model; None where a number is missing."""
    assert fidelity(0.8, 0.6, 1.0, 0.25) == pytest.approx(0.75 * 0.75)
    assert fidelity(0.8, 0.6, None, None) == pytest.approx(0.75)
    assert fidelity(0.8, 0.6, 0.0, 0.0) == pytest.approx(0.75)
    assert fidelity(0.8, 0.6, 1.0, None) is None
    assert fidelity(0.0, 0.6, 1.0, 0.0) is None


def test_predict_is_independent_of_the_batch_size() -> None:
    """Every image gets its class, in order, whatever the batches; preprocess comes first."""
    images = torch.eye(5).reshape(5, 5, 1, 1)
    model = nn.Flatten()

    def reverse(batch: Tensor) -> Tensor:
        return batch.flip(1)

    assert predict(model, images, batch_size=2).tolist() == [0, 1, 2, 3, 4]
    assert predict(model, images, batch_size=5, preprocess=reverse).tolist() == [4, 3, 2, 1, 0]
    assert predict(model, images[:0]).tolist() == []
