"""
Name what can go wrong in a purification.

    PurificationError
    ├── InvalidParameter   the caller's: a hyper-parameter is out of its bounds
    ├── NotEnoughData      the caller's: no image is left to work or to measure on
    ├── NothingToMask      the caller's: the model has no weight that could be masked
    └── NotFinite          the caller's: the model's own outputs overflow

Each docstring is the default message, and each ``code`` is stable.
"""


class PurificationError(Exception):
    """The purification could not be carried out."""

    code = "purification-failed"

    def __init__(self, message: str | None = None) -> None:
        """Take *message*, or the docstring where there is nothing more to say."""
        super().__init__(message or (type(self).__doc__ or "").strip())


class InvalidParameter(PurificationError):
    """A hyper-parameter is out of its bounds; see the method's parameters."""

    code = "invalid-parameter"


class NotEnoughData(PurificationError):
    """No image is left; give at least one labelled image."""

    code = "not-enough-data"


class NothingToMask(PurificationError):
    """The model has no convolution to mask; set mask_linear to mask its linear layers."""

    code = "nothing-to-mask"


class NotFinite(PurificationError):
    """The model's loss is not a finite number; check the weights, mean and std."""

    code = "not-finite"
