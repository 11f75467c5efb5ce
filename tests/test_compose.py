"""The stack of ``docker-compose.yml`` is valid, closed, and runs nothing as root."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.settings import Settings

ROOT = Path(__file__).parents[1]
PROGRAMS = Path(sys.executable).parent  # where the wheels of the `dev` extra put theirs
BASE = ("docker-compose.yml",)
GPU = (*BASE, "docker-compose.gpu.yml")
PASSWORDS = {"POSTGRES_PASSWORD": "postgres-secret", "REDIS_PASSWORD": "redis-secret"}

Config = dict[str, Any]


def compose(files: tuple[str, ...], **variables: str) -> subprocess.CompletedProcess[str]:
    """Resolve *files* with nothing set but *variables*; a developer's own ``.env`` is not read."""
    command = [str(PROGRAMS / "docker-compose"), "--env-file", os.devnull]
    for name in files:
        command += ["--file", str(ROOT / name)]
    return subprocess.run(
        [*command, "config", "--format", "json"],
        env={"PATH": os.defpath, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def resolved(files: tuple[str, ...], **variables: str) -> Config:
    """Return the resolved configuration of *files* with both passwords set."""
    result = compose(files, **PASSWORDS, **variables)
    assert result.returncode == 0, result.stderr
    config: Config = json.loads(result.stdout)
    return config


def stages() -> dict[str, str]:
    """Return the text of each build stage by its name."""
    text = (ROOT / "Dockerfile").read_text()
    found = re.split(r"^FROM \S+ AS (\S+)$", text, flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))


@pytest.fixture(scope="module", params=[BASE, GPU], ids=["base", "gpu"])
def services(request: pytest.FixtureRequest) -> Config:
    """Return the services of the stack, without and with the GPU file."""
    found: Config = resolved(request.param)["services"]
    return found


@pytest.mark.parametrize("name", sorted(PASSWORDS))
@pytest.mark.parametrize("value", [None, ""])
def test_no_password_has_a_default(name: str, value: str | None) -> None:
    """Without either password, or with an empty one, nothing starts and the message names it."""
    variables = {key: word for key, word in PASSWORDS.items() if key != name}
    if value is not None:
        variables[name] = value
    result = compose(BASE, **variables)
    assert result.returncode != 0
    assert name in result.stderr


def test_the_stack_is_whole(services: Config) -> None:
    """Both sides start after the migration, which starts after Postgres is healthy."""
    assert set(services) == {"postgres", "redis", "migrate", "service", "worker"}
    assert services["migrate"]["depends_on"]["postgres"]["condition"] == "service_healthy"
    assert services["migrate"]["restart"] == "no"
    for name in ("service", "worker"):
        migrated = services[name]["depends_on"]["migrate"]
        assert migrated["condition"] == "service_completed_successfully"
    for name in ("postgres", "redis"):
        assert services[name]["healthcheck"]["test"]


def test_only_the_service_publishes_a_port_and_on_loopback(services: Config) -> None:
    """One port is published, the service's, on 127.0.0.1."""
    ports = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert set(ports) == {"service"}
    assert [(port["host_ip"], port["target"]) for port in ports["service"]] == [("127.0.0.1", 8000)]


def test_the_published_port_can_be_chosen() -> None:
    """WEIGHTWASH_PORT moves the published port, and 8000 is its default."""
    for variables, expected in (({}, "8000"), ({"WEIGHTWASH_PORT": "9000"}, "9000")):
        service = resolved(BASE, **variables)["services"]["service"]
        assert service["ports"][0]["published"] == expected
        assert service["environment"]["WEIGHTWASH_PORT"] == "8000"


def test_every_container_is_hardened(services: Config) -> None:
    """Every container has a read-only root, no capability, no way to gain rights, and limits."""
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not {"cap_add", "privileged", "devices", "network_mode", "pid"} & set(service), name
        assert int(service["mem_limit"]) > 0, name
        assert service["pids_limit"] > 0, name
        assert any(mount.startswith("/tmp:") for mount in service["tmpfs"]), name


def test_no_container_runs_as_root(services: Config) -> None:
    """Every container names a numeric user and group, neither of them 0."""
    for name, service in services.items():
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"]), name


def test_nothing_of_the_host_is_mounted(services: Config) -> None:
    """All mounts are named volumes; the data volume is shared by the two sides alone."""
    mounts = {
        name: [(mount["type"], mount["source"]) for mount in service.get("volumes", [])]
        for name, service in services.items()
    }
    assert {kind for found in mounts.values() for kind, _ in found} == {"volume"}
    assert {name for name, found in mounts.items() if ("volume", "data") in found} == {
        "service",
        "worker",
    }


def test_only_the_service_is_on_a_network_with_a_way_out() -> None:
    """Everything is on the internal network, and the service alone on a second one."""
    config = resolved(BASE)
    assert config["networks"]["internal"]["internal"] is True
    networks = {name: set(service["networks"]) for name, service in config["services"].items()}
    assert networks.pop("service") == {"internal", "edge"}
    assert all(found == {"internal"} for found in networks.values())


def test_both_sides_use_one_database_one_broker_and_one_blob_folder(services: Config) -> None:
    """Service and worker agree on all three; tokens are required and no worker is embedded."""
    service, worker = (services[name]["environment"] for name in ("service", "worker"))
    for name in ("DATABASE_URL", "BROKER_URL", "BLOB_URL", "DATA_DIR"):
        assert service[f"WEIGHTWASH_{name}"] == worker[f"WEIGHTWASH_{name}"]
    assert service["WEIGHTWASH_DATABASE_URL"] == (
        "postgresql+psycopg://weightwash:postgres-secret@postgres/weightwash"
    )
    assert service["WEIGHTWASH_BROKER_URL"] == "redis://:redis-secret@redis:6379/0"
    assert service["WEIGHTWASH_AUTH"] == "tokens"
    assert service["WEIGHTWASH_EMBEDDED_WORKERS"] == "0"


def test_a_container_may_use_its_whole_grace(services: Config) -> None:
    """The runtime waits longer than a worker's 30 s of grace before it kills."""
    assert services["worker"]["stop_grace_period"] == "45s"
    assert services["service"]["stop_grace_period"] == "40s"


def test_the_gpu_file_gives_the_worker_a_gpu_and_changes_nothing_else() -> None:
    """The two configurations differ in the worker's reservation and its device."""
    base, gpu = resolved(BASE), resolved(GPU)
    base_device = base["services"]["worker"]["environment"].pop("WEIGHTWASH_DEVICE")
    gpu_device = gpu["services"]["worker"]["environment"].pop("WEIGHTWASH_DEVICE")
    deploy = gpu["services"]["worker"].pop("deploy")
    assert (base_device, gpu_device) == ("auto", "cuda:0")
    assert deploy["resources"]["reservations"]["devices"] == [
        {"capabilities": ["gpu"], "count": 1, "driver": "nvidia"}
    ]
    assert base == gpu


def test_the_dockerfile_passes_its_linter() -> None:
    """Hadolint has nothing to say."""
    result = subprocess.run(
        [PROGRAMS / "hadolint", "--no-color", ROOT / "Dockerfile"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_each_image_holds_its_own_side_alone() -> None:
    """The service's image gets no file of the worker and not its dependencies; nor the reverse."""
    found = stages()
    for side, other in (("service", "worker"), ("worker", "service")):
        copied = [line for line in found[side].splitlines() if line.startswith(("COPY", "ADD"))]
        assert any(f"--from={side}-dependencies" in line for line in copied)
        assert any(f"/code/{side} " in line for line in copied)
        assert not any(other in line for line in copied)
        assert f"-r {side}.txt" in found[f"{side}-dependencies"]
        assert other not in found[f"{side}-dependencies"]
        assert "USER 10001:10001\n" in found[side]
    shared = re.findall("^COPY.*$", found["runtime"], flags=re.MULTILINE)
    assert shared
    assert not any(side in line for line in shared for side in ("service", "worker"))


@pytest.mark.parametrize("name", ["migrate", "service", "worker"])
def test_every_container_of_ours_has_settings_that_it_accepts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What image and stack set together is accepted, and is what the container was meant to get."""
    service = resolved(BASE)["services"][name]
    image = stages()["runtime"] + stages()[service["build"]["target"]]
    variables = dict(re.findall(r"\b(WEIGHTWASH_[A-Z_]+)=(\S+)", image))
    assert variables
    variables |= {key: value for key, value in service["environment"].items() if value is not None}
    for variable in [key for key in os.environ if key.startswith("WEIGHTWASH_")]:
        monkeypatch.delenv(variable)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    settings = Settings()
    known = {f"WEIGHTWASH_{field.upper()}" for field in Settings.model_fields}
    assert set(variables) <= known
    assert settings.resolved_database_url.startswith("postgresql+psycopg://")
    assert settings.resolved_blob_url == "file:///data/blobs"
    assert settings.upload_dir == Path("/data/uploads")
    assert settings.resolved_scratch_dir == Path("/scratch")
    if name == "service":
        assert settings.requires_tokens
        assert settings.embedded_workers == 0
