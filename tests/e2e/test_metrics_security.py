"""Who may scrape: certificates, secrets, neither, and everybody where that is asked for."""

import http.client
import socket
import ssl
import time

import pytest

from certificates import Authority
from cluster import SLOWNESS, run_program, wait_until

SECRET = "a-secret-of-the-scraper-01234567"


def context_of(ca, identity=None):
    context = ssl.create_default_context(cafile=str(ca))
    if identity is not None:
        context.load_cert_chain(identity.cert, identity.key)
    return context


def scrape(port, context=None, path="/metrics", secret=None):
    """(status, body) of a scrape; over TLS where there is a context."""
    kind = http.client.HTTPSConnection if context else http.client.HTTPConnection
    options = {"context": context} if context else {}
    connection = kind("localhost", port, timeout=10 * SLOWNESS, **options)
    try:
        connection.request(
            "GET", path, headers={"Authorization": f"Bearer {secret}"} if secret else {}
        )
        reply = connection.getresponse()
        return reply.status, reply.read().decode()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def cluster(checkpoint, start_cluster, authority):
    """A coordinator with TLS and no workers: scrapes need none."""
    flags = authority.issue("coordinator").flags
    with start_cluster(checkpoint(), workers=1, coordinator_args=flags, start=False) as running:
        running.start_coordinator()
        yield running


@pytest.mark.parametrize("role", ["metrics", "operator"])
def test_scraper_and_operator_may_scrape(cluster, authority, role):
    context = context_of(authority.cert, authority.issue(role, role))
    status, body = scrape(cluster.metrics_port, context)
    assert status == 200
    assert "\nepserve_queue_depth 0" in body


@pytest.mark.parametrize("role", ["frontend", "worker"])
def test_other_roles_may_not(cluster, authority, role):
    context = context_of(authority.cert, authority.issue(role, role))
    status, body = scrape(cluster.metrics_port, context)
    assert status == 403
    assert f"the caller is {role}" in body and "epserve_" not in body


def test_certificate_without_a_role_is_not_enough(cluster, authority):
    context = context_of(authority.cert, authority.issue("nobody"))
    status, body = scrape(cluster.metrics_port, context)
    assert status == 401 and "epserve_" not in body


@pytest.mark.parametrize("kind", ["none", "wrong authority", "expired", "plaintext"])
def test_caller_without_a_good_certificate_gets_nothing(cluster, authority, tmp_path, kind):
    context = None
    if kind == "none":
        context = context_of(authority.cert)
    elif kind == "wrong authority":
        other = Authority(tmp_path / "other", "another authority").issue("scraper", "metrics")
        context = context_of(authority.cert, other)
    elif kind == "expired":
        context = context_of(authority.cert, authority.issue("late", "metrics", days=-1))
    with pytest.raises((ssl.SSLError, ConnectionError, http.client.HTTPException)):
        scrape(cluster.metrics_port, context)
    wait_until(lambda: "http_handshake_refused" in cluster.coordinator.log(), 5, "the log's line")
    good = context_of(authority.cert, authority.issue("scraper", "metrics"))
    assert scrape(cluster.metrics_port, good)[0] == 200


def test_callers_who_stop_halfway_delay_no_scrape(cluster, authority):
    """Before the handshake, within it, and within the request."""
    good = context_of(authority.cert, authority.issue("scraper", "metrics"))
    sockets = [socket.create_connection(("localhost", cluster.metrics_port)) for _ in range(20)]
    try:
        for half in sockets[:10]:
            half.sendall(b"\x16\x03\x01\x02\x00")  # the head of a handshake's record
        sockets[0:1] = [good.wrap_socket(
            socket.create_connection(("localhost", cluster.metrics_port)),
            server_hostname="localhost",
        ), sockets[0]]  # fmt: skip
        sockets[0].sendall(b"GET /metrics HTTP/1.1\r\n")
        start = time.monotonic()
        assert scrape(cluster.metrics_port, good)[0] == 200
        assert time.monotonic() - start < 3 * SLOWNESS
    finally:
        for half in sockets:
            half.close()


def test_only_the_metrics_are_there(cluster, authority):
    good = context_of(authority.cert, authority.issue("scraper", "metrics"))
    assert scrape(cluster.metrics_port, good, path="/")[0] == 404
    assert scrape(cluster.metrics_port, good, path="/metrics?x=1")[0] == 200


def test_renewed_files_are_taken_up_without_a_restart(checkpoint, start_cluster, tmp_path):
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    files = tmp_path / "files"
    files.mkdir()

    def install(authority):
        made = authority.issue("coordinator")
        for source, target in ((made.cert, "cert"), (made.key, "key"), (made.ca, "ca")):
            (files / "next").write_bytes(source.read_bytes())
            (files / "next").replace(files / target)

    install(old)
    flags = [f"--tls-{name}={files / name}" for name in ("cert", "key", "ca")]
    before = context_of(old.cert, old.issue("scraper", "metrics"))
    after = context_of(new.cert, new.issue("scraper", "metrics"))
    with start_cluster(checkpoint(), workers=1, coordinator_args=flags, start=False) as cluster:
        cluster.start_coordinator()
        assert scrape(cluster.metrics_port, before)[0] == 200
        with pytest.raises(ssl.SSLError):
            scrape(cluster.metrics_port, after)
        # Half of a renewal changes nothing: a key that is not the certificate's is not taken up.
        (files / "key").write_bytes(new.issue("other").key.read_bytes())
        wait_until(lambda: "files_not_reloaded" in cluster.coordinator.log(), 10, "the refusal")
        assert scrape(cluster.metrics_port, before)[0] == 200
        install(new)

        def answers():
            try:
                return scrape(cluster.metrics_port, after)[0] == 200
            except ssl.SSLError:
                return False

        wait_until(answers, 20, "the new certificate is shown and accepted")
        with pytest.raises((ssl.SSLError, ConnectionError, http.client.HTTPException)):
            scrape(cluster.metrics_port, before)


@pytest.mark.parametrize("tls", [False, True])
def test_secret_stands_in_for_a_certificate_and_is_read_again(
    checkpoint, start_cluster, authority, tmp_path, tls
):
    secrets = tmp_path / "secrets"
    secrets.write_text(f"metrics {SECRET}\nfrontend {SECRET}-of-a-frontend\n")
    flags = [f"--secrets-file={secrets}"]
    if tls:  # Without --tls-ca, callers show no certificates.
        flags += authority.issue("coordinator").flags[:2]
    context = context_of(authority.cert) if tls else None
    with start_cluster(checkpoint(), workers=1, coordinator_args=flags, start=False) as cluster:
        cluster.start_coordinator()

        def status(secret):
            return scrape(cluster.metrics_port, context, secret=secret)[0]

        assert status(SECRET) == 200
        assert status(f"{SECRET}-of-a-frontend") == 403
        assert status("wrong-secret-wrong-secret") == 401
        assert status(None) == 401
        secrets.write_text("metrics short\n")
        wait_until(lambda: "files_not_reloaded" in cluster.coordinator.log(), 10, "the refusal")
        assert status(SECRET) == 200, "a bad file changes nothing"
        secrets.write_text(f"metrics {SECRET}-renewed\n")
        wait_until(lambda: status(f"{SECRET}-renewed") == 200, 10, "the new secret is accepted")
        assert status(SECRET) == 401
        assert SECRET not in cluster.coordinator.log()


def test_plaintext_metrics_are_for_everybody(checkpoint, start_cluster, authority):
    flags = [*authority.issue("coordinator").flags, "--plaintext-metrics"]
    with start_cluster(checkpoint(), workers=1, coordinator_args=flags, start=False) as cluster:
        cluster.start_coordinator()
        assert scrape(cluster.metrics_port)[0] == 200


def test_metrics_beyond_this_machine_need_tls_secrets_or_the_flag(checkpoint):
    result = run_program(
        "epserve-coordinator", "--checkpoint", checkpoint().path, "--listen=127.0.0.1:0",
        "--metrics-listen=0.0.0.0:0",
    )  # fmt: skip
    assert result.returncode == 2
    assert "--plaintext-metrics" in result.stderr and "--tls-cert" in result.stderr
