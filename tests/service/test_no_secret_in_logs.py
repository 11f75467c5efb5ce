"""Whatever secrets are sent, and wherever, the log of the running service holds none of them."""

import socket
from pathlib import Path

import httpx2 as httpx

from tests.service.forms import model_pt, samples_npz
from tests.support.stack import Stack, embedded_stack

MARK = "geheim5up3r"  # stands in everything that is secret


def send_raw(stack: Stack, request: bytes) -> None:
    """Send *request* as it is and read what comes."""
    port = int(stack.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(request)
        while connection.recv(4096):
            pass


def test_no_secret_is_logged(tmp_path: Path) -> None:
    """Headers, queries, bodies, malformed heads and the token leave no trace, not even in errors."""
    with embedded_stack(tmp_path, embedded_workers="0", auth="tokens", log_level="debug") as stack:
        token = stack.run("service", "tokens", "create", "ci").strip()
        secret = token.rpartition("_")[2]
        with stack.client as client:
            for value in (
                f"Bearer {token}",
                f"bearer  {token}",
                f"Bearer {token}x",
                f"Basic {MARK}",
                MARK,
                f"Bearer ww_{MARK}",
                f"Bearer {MARK}\xff",
                f"Bearer {'0' * 5000}{MARK}",
            ):
                headers = {
                    b"Authorization": value.encode("latin-1"),
                    b"Cookie": f"session={MARK}".encode(),
                    b"Proxy-Authorization": MARK.encode(),
                    b"X-Api-Key": MARK.encode(),
                    b"Idempotency-Key": MARK.encode(),
                    b"Referer": f"http://x/?{MARK}".encode(),
                    b"User-Agent": MARK.encode(),
                }
                for method, path in (
                    ("GET", f"/jobs?token={MARK}&after={MARK}"),
                    ("GET", f"/jobs/job_0/model?candidate={MARK}"),
                    ("POST", f"/jobs?wait={MARK}"),
                    ("PUT", f"/healthz?{MARK}"),
                    ("GET", f"/jobs/{token}"),
                ):
                    client.request(method, path, headers=headers)
            taken = client.post(
                "/jobs",
                headers={"Authorization": f"Bearer {token}", "Idempotency-Key": MARK},
                files={"model": (f"{MARK}.pt", model_pt()), "samples": ("s.npz", samples_npz())},
                data={"metadata": f'{{"key": "{MARK}"}}', "path": MARK},
            )
            assert taken.status_code == 202
            refused = client.post(
                "/jobs",
                headers={"Authorization": f"Bearer {token}"},
                files={"model": (f"{MARK}.pt", MARK.encode()), MARK: ("s.npz", b"")},
                data={"params": MARK, "architecture": MARK},
            )
            assert refused.status_code == 422
        head = f"Authorization: Bearer {token}\r\nCookie: {MARK}\r\n".encode()
        send_raw(stack, b"GET /?" + MARK.encode() + b" HTTP/9.9\r\n" + head + b"\r\n")
        send_raw(stack, b"GET / HTTP/1.1\r\n" + head + b"bad header " + MARK.encode() + b"\r\n\r\n")
        send_raw(stack, f"{MARK} {token}\r\n\r\n".encode())
        # An error that is ours, with everything on the stack: the table is gone.
        with stack.database.write() as session:
            session.connection().exec_driver_sql("DROP TABLE job_blobs")
            session.connection().exec_driver_sql("DROP TABLE tokens")
        broken = httpx.get(
            f"{stack.url}/jobs?{MARK}", headers={"Authorization": f"Bearer {token}", "Cookie": MARK}
        )
        assert broken.status_code in {500, 503}
    log = (tmp_path / "service.log").read_text()
    assert "database-failed" in log
    assert '"/healthz"' in log
    assert MARK not in log
    assert secret not in log
