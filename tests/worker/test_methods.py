"""Law: the worker has every method that the catalogue offers, with its parameters."""

from common.artefacts import MAX_CANDIDATES
from common.catalogue import methods as catalogue
from common.catalogue.auto import AutoParameters
from worker.methods import METHODS
from worker.purify.auto import PARTS


def test_worker_and_catalogue_have_the_same_methods() -> None:
    """What the service accepts the worker can run; ``none`` alone needs nothing to run."""
    assert set(METHODS) | {"none"} == set(catalogue.METHODS)


def test_every_resolved_parameter_is_a_field_of_the_method() -> None:
    """A preset, fully resolved, builds the method, with a cost that grows with the samples."""
    for name, build in METHODS.items():
        entry = catalogue.METHODS[name]
        params = entry.resolve(entry.parameters(), count=20, classes=10, image_shape=(3, 32, 32))
        method = build(**params.model_dump())
        assert method.cost(200) >= method.cost(20) >= 0


def test_there_is_a_place_for_every_candidate_of_auto() -> None:
    """As many strengths as a job may give, for each part, and the model as it came."""
    schema = AutoParameters.model_json_schema()["properties"]["strengths"]
    (most,) = [kind["maxItems"] for kind in schema["anyOf"] if "maxItems" in kind]
    assert PARTS * most + 1 == MAX_CANDIDATES
