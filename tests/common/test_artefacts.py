"""What lies beside a model is found again in the job's row."""

from common.artefacts import (
    TRIGGERS,
    Artefact,
    as_row,
    candidate_name,
    candidates_among,
    from_row,
    trigger_image_name,
    trigger_images_among,
)

ONE, OTHER = Artefact(sha256="a" * 64, bytes=1), Artefact(sha256="b" * 64, bytes=2)


def test_row_holds_every_artefact() -> None:
    """``from_row(as_row(a)) == a``; a row from before there were artefacts has none."""
    artefacts = {candidate_name(0): ONE, candidate_name(1): OTHER}
    assert from_row(as_row(artefacts)) == artefacts
    assert from_row(None) == {}


def test_files_of_one_kind_come_in_their_order() -> None:
    """They are counted from 0, whatever the order of the row and whatever lies beside them."""
    for name, among in (
        (candidate_name, candidates_among),
        (trigger_image_name, trigger_images_among),
    ):
        artefacts = {name(10): ONE, TRIGGERS: ONE, name(2): OTHER}
        assert among(artefacts) == [OTHER, ONE]
