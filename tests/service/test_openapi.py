"""``/openapi.json`` tells the whole truth, and can be read by machines."""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from common.settings import Settings
from service.app import create_app
from service.problems import STATUSES
from service.uploads import FILES, REQUIRED, TEXTS
from tests.service.conftest import PROBLEM_MEMBERS, Service

VERBS = {"get", "head", "post", "delete"}


@cache
def document() -> dict[str, Any]:
    """Return the document."""
    return create_app(Settings(data_dir=Path("unused"), embedded_workers=0)).openapi()


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Return path, verb and description of everything that can be asked."""
    for path, verbs in document()["paths"].items():
        for verb, operation in verbs.items():
            yield path, verb, operation


def references(value: Any) -> Iterator[str]:
    """Return every reference below *value*."""
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for child in value.values():
            yield from references(child)
    elif isinstance(value, list):
        for child in value:
            yield from references(child)


def test_it_is_served(service: Service) -> None:
    """Anybody can read it, without a token."""
    answer = service.client.get("/openapi.json")
    assert answer.status_code == 200
    assert answer.json() == json.loads(json.dumps(document()))


@pytest.mark.filterwarnings("error")
def test_it_is_made_without_a_warning(tmp_path: Path) -> None:
    """No two operations share a name, which is what the framework warns of."""
    create_app(Settings(data_dir=tmp_path, embedded_workers=0)).openapi()


def test_it_says_how_to_show_a_token() -> None:
    """Every address of a job asks for a bearer token, so that generated clients can send one."""
    (name, scheme), *others = document()["components"]["securitySchemes"].items()
    assert not others
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    for path, _, operation in operations():
        assert ("/jobs" in path) == ("security" in operation)
        for needed in operation.get("security", []):
            assert set(needed) == {name}


@pytest.mark.parametrize(
    ("verb", "path", "scope"),
    [
        ("post", "/jobs", "submit"),
        ("post", "/jobs/{job_id}/cancel", "submit"),
        ("delete", "/jobs/{job_id}", "admin"),
    ],
)
def test_it_says_which_scope_changes_something(verb: str, path: str, scope: str) -> None:
    """Whatever changes a job names its scope, which is explained where tokens are."""
    operation = document()["paths"][path][verb]
    assert operation["security"] == [{"HTTPBearer": [scope]}]
    assert f"`{scope}`" in document()["components"]["securitySchemes"]["HTTPBearer"]["description"]


def test_whatever_only_looks_takes_the_scope_read() -> None:
    """Every GET that needs a token needs one that may read, and no other scope."""
    for _, verb, operation in operations():
        if verb == "get" and "security" in operation:
            assert operation["security"] == [{"HTTPBearer": ["read"]}]


def test_it_has_the_shape_of_openapi() -> None:
    """Version, title, and what every operation needs are there; every reference leads somewhere."""
    found = document()
    assert found["openapi"].startswith("3.1")
    assert found["info"]["title"] == "Weightwash"
    assert found["info"]["version"]
    names = [operation["operationId"] for _, _, operation in operations()]
    assert len(names) == len(set(names))
    for path, verb, operation in operations():
        assert verb in VERBS
        assert operation["summary"]
        declared = {p["name"] for p in operation.get("parameters", []) if p["in"] == "path"}
        assert declared == set(re.findall(r"{(\w+)}", path))
        for status, response in operation["responses"].items():
            assert status.isdigit()
            assert response["description"]
    for reference in references(found):
        target: Any = found
        for step in reference.removeprefix("#/").split("/"):
            target = target[step]


def test_post_jobs_documents_every_field() -> None:
    """The form's fields are those that are read, each with a sentence."""
    body = document()["paths"]["/jobs"]["post"]["requestBody"]
    schema = body["content"]["multipart/form-data"]["schema"]
    assert set(schema["properties"]) == {*FILES, *TEXTS}
    assert set(schema["required"]) == set(REQUIRED)
    assert schema["additionalProperties"] is False
    assert all(field["description"] for field in schema["properties"].values())
    assert {name for name, field in schema["properties"].items() if "format" in field} == set(FILES)


def test_post_jobs_documents_its_queries_and_headers() -> None:
    """What may stand beside the form is documented too."""
    parameters = document()["paths"]["/jobs"]["post"]["parameters"]
    assert {(p["in"], p["name"]) for p in parameters} == {
        ("header", "Idempotency-Key"),
        ("query", "wait"),
        ("query", "dry_run"),
    }


def test_every_problem_has_its_status_documented() -> None:
    """Each status of the table, but for a wrong verb's, stands at the operations on jobs."""
    wanted = {str(status) for status in STATUSES.values()} - {"405"}
    for path, _, operation in operations():
        if path.startswith("/jobs"):
            assert wanted <= set(operation["responses"]), path


def test_problems_are_documented_as_what_they_are() -> None:
    """A problem is application/problem+json and has the members of RFC 9457 and ours."""
    assert set(document()["components"]["schemas"]["ProblemView"]["properties"]) == PROBLEM_MEMBERS
    for path, _, operation in operations():
        for status, response in operation["responses"].items():
            if path.startswith("/jobs") and int(status) >= 400:
                assert set(response["content"]) == {"application/problem+json"}
                (reference,) = references(response)
                assert reference.endswith("/ProblemView")


@pytest.mark.parametrize(
    ("path", "verb", "statuses"),
    [
        ("/jobs", "post", {"200", "202"}),
        ("/jobs", "get", {"200"}),
        ("/jobs/{job_id}", "get", {"200", "304"}),
        ("/jobs/{job_id}", "delete", {"204"}),
        ("/jobs/{job_id}/cancel", "post", {"200"}),
        ("/jobs/{job_id}/model", "get", {"200", "206", "304"}),
        ("/jobs/{job_id}/model.sha256", "get", {"200"}),
        ("/jobs/{job_id}/triggers.npz", "get", {"200", "206", "304"}),
        ("/jobs/{job_id}/triggers/{number}.png", "get", {"200", "206", "304"}),
        ("/jobs/{job_id}/report.json", "get", {"200"}),
        ("/readyz", "get", {"200", "503"}),
    ],
)
def test_every_good_status_is_documented(path: str, verb: str, statuses: set[str]) -> None:
    """What is answered when all is well stands there, and nothing that never is."""
    documented = document()["paths"][path][verb]["responses"]
    good = {status for status in documented if status < "400"}
    assert good | ({"503"} if path == "/readyz" else set()) == statuses
    assert path != "/readyz" or "Readiness" in str(documented["503"])
