"""The names of the files that go from one stage of a job to the next, and no torch."""

WEIGHTS = "weights"
"""The state dict as safetensors, under the keys of the bare network."""

NAMES = "names"
"""JSON: the keys in their order, which of them are one tensor, and the prefix they had."""

SETS = ("samples", "evaluation", "triggered")
"""Images, labels and targets as safetensors, under the roles of the uploads."""

CHANGED = "changed"
"""The tensors that purification changed, as safetensors."""


def changed_name(number: int) -> str:
    """Return the name of the file with what the candidate *number* changes."""
    return f"{CHANGED}-{number}"
