"""Preset of the service's own method."""

import pytest
from pydantic import ValidationError

from common.catalogue.auto import AUTO, AutoParameters
from common.catalogue.method import ImageShape


def resolve(
    image_shape: ImageShape = (3, 32, 32), classes: int = 10, **given: object
) -> dict[str, object]:
    """Return all parameters for one sample per class."""
    params = AutoParameters.model_validate(given)
    return AUTO.resolve(
        params, count=classes, classes=classes, image_shape=image_shape
    ).model_dump()


def test_preset_fills_everything_and_keeps_what_is_given() -> None:
    """No field stays open, and a given one is taken as it is."""
    assert None not in resolve().values()
    assert resolve(strengths=[0.5], force=True)["strengths"] == [0.5]
    assert resolve(strengths=[0.5], force=True)["force"] is True
    assert resolve(steps=7) == {**resolve(), "steps": 7}


@pytest.mark.parametrize(
    ("image_shape", "reach"),
    [((1, 8, 8), 1), ((3, 32, 32), 2), ((3, 64, 32), 2), ((3, 224, 224), 14)],
)
def test_reach_grows_with_the_image(image_shape: ImageShape, reach: int) -> None:
    """A trigger is widened by a sixteenth of the shorter side, and by a pixel at least."""
    assert resolve(image_shape)["reach"] == reach


def test_small_images_are_searched_longer() -> None:
    """The searches on a result are as thorough as the first one, unless they are told otherwise."""
    small, middle, large = (resolve(shape) for shape in ((1, 8, 8), (1, 28, 28), (3, 32, 32)))
    assert [found["steps"] for found in (small, middle, large)] == [300, 200, 100]
    for found in (small, middle, large):
        assert found["restart_steps"] == found["steps"]
    assert resolve(restart_steps=7) == {**large, "restart_steps": 7}


def test_only_what_may_be_mirrored_is() -> None:
    """Grey images and many classes are mostly digits, letters or signs."""
    assert resolve()["flip"] is True
    assert resolve((1, 32, 32))["flip"] is False
    assert resolve(classes=43)["flip"] is False


@pytest.mark.parametrize(
    "given",
    [{"steps": 0}, {"strengths": []}, {"strengths": [0.0]}, {"strengths": [1.5]}, {"ridge": 0.0},
     {"strengths": [float("inf")]}, {"reach": -1}, {"tau": 1.0}, {"force": 1}, {"epochs": 3}],
)  # fmt: skip
def test_bad_values_are_refused(given: dict[str, object]) -> None:
    """Out of bounds, of another type, or of another method."""
    with pytest.raises(ValidationError):
        AutoParameters.model_validate(given)
