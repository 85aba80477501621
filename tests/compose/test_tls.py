"""The stack with deploy/compose/compose.tls.yaml on top: who has no certificate reaches nothing."""

import http.client
import json
import pathlib
import ssl
import subprocess

import grpc
import pytest

import protos
from checkpoints import relative_error
from cluster import ROOT, SLOWNESS, wait_until
from infer import infer, random_batch
from stack import Stack

PARTS = ("coordinator", "worker", "operator", "frontend", "metrics")


def make_certificates(directory):
    script = ROOT / "deploy" / "compose" / "make-certificates.sh"
    subprocess.run([script, directory], check=True, capture_output=True, timeout=60)


def channel_of(part):
    credentials = grpc.ssl_channel_credentials(
        *((part / file).read_bytes() for file in ("ca.crt", "tls.key", "tls.crt"))
    )
    return lambda target: grpc.secure_channel(target.replace("127.0.0.1", "localhost"), credentials)


@pytest.fixture(scope="module")
def certificates(daemon, tmp_path_factory):
    directory = tmp_path_factory.mktemp("certificates")
    # The containers' users walk through it.
    for folder in [directory, *directory.parents]:
        if folder.name.startswith(("pytest-", "certificates")):
            folder.chmod(0o755)
    make_certificates(directory)
    return directory


@pytest.fixture(scope="module")
def secure(daemon, served, certificates):
    running = Stack(
        daemon, served, ("compose.yaml", "compose.tls.yaml"), "tls",
        {"EPSERVE_TLS_DIR": str(certificates)}, channel_of(certificates / "frontend"),
    )  # fmt: skip
    try:
        running.up()
        yield running
    finally:
        running.down()


@pytest.fixture(autouse=True)
def logs(request, secure):
    """A failed test shows the containers' logs."""
    failed = request.session.testsfailed
    yield
    if request.session.testsfailed > failed:
        print(secure.compose("logs", "--no-color", "--tail=20", check=False).stdout)


def scrape(secure, context):
    """(status, serial number of the coordinator's certificate) of a scrape from this machine."""
    kind = http.client.HTTPSConnection if context else http.client.HTTPConnection
    options = {"context": context} if context else {}
    connection = kind("localhost", secure.metrics_port, timeout=10 * SLOWNESS, **options)
    try:
        connection.request("GET", "/metrics")
        shown = connection.sock.getpeercert() if context else {}
        reply = connection.getresponse()
        reply.read()
        return reply.status, shown.get("serialNumber")
    finally:
        connection.close()


def context_of(part, with_certificate=True):
    context = ssl.create_default_context(cafile=str(part / "ca.crt"))
    if with_certificate:
        context.load_cert_chain(part / "tls.crt", part / "tls.key")
    return context


def test_keys_are_for_their_users_alone(certificates):
    for part in PARTS:
        status = (certificates / part / "tls.key").stat()
        assert status.st_mode & 0o777 == 0o400
        assert status.st_uid == (65534 if part == "metrics" else 10001)
    assert (certificates / "ca.key").stat().st_mode & 0o777 == 0o600


def test_frontend_is_answered_and_operates_nothing(secure, served, rng):
    batch = random_batch(served.spec, rng, 100)
    assert relative_error(infer(secure, *batch), served.ffn(*batch)) <= 1e-5
    with pytest.raises(grpc.RpcError) as caught:
        secure.status()
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED


def test_operator_verifies_and_watches_from_a_client_container(secure):
    result = secure.run_client("epserve", "verify", "--checkpoint=/checkpoint", "--json")
    assert json.loads(result.stdout), result.stdout
    status = json.loads(secure.run_client("epserve", "status", "--json").stdout)
    assert len(status["workers"]) == 4


def test_containers_are_healthy_by_a_port_that_nobody_else_reaches(secure):
    for service in ("coordinator", "worker-3"):
        wait_until(
            lambda service=service: secure.inspect(service)["State"]["Health"]["Status"]
            == "healthy",
            30,
            f"{service} is healthy",
        )
    published = secure.inspect("coordinator")["NetworkSettings"]["Ports"]
    assert {port for port, at in published.items() if at} == {"8001/tcp", "8002/tcp"}
    beyond = secure.run_client(
        "env", "-u", "EPSERVE_TLS_CERT", "-u", "EPSERVE_TLS_KEY", "-u", "EPSERVE_TLS_CA",
        "epserve", "health", "--server=coordinator:8003", "--timeout=3", check=False,
    )  # fmt: skip
    assert beyond.returncode != 0


def test_plaintext_reaches_neither_port(secure):
    with protos.insecure_channel(secure.target) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            protos.front_door(channel).ServerLive(
                protos.inference.ServerLiveRequest(), timeout=3 * SLOWNESS
            )
    unreachable = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    assert caught.value.code() in unreachable
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        scrape(secure, None)


def test_metrics_are_for_their_role(secure, certificates):
    assert scrape(secure, context_of(certificates / "metrics"))[0] == 200
    assert scrape(secure, context_of(certificates / "frontend"))[0] == 403
    with pytest.raises((ssl.SSLError, ConnectionError, http.client.HTTPException)):
        scrape(secure, context_of(certificates / "metrics", with_certificate=False))


def test_prometheus_scrapes_over_tls(secure):
    wait_until(
        lambda: secure.query('epserve_workers{job="epserve",state="serving"} == 4'),
        30,
        "Prometheus has scraped",
    )
    (target,) = secure.prometheus("targets")["activeTargets"]
    assert target["scrapeUrl"].startswith("https://") and target["health"] == "up", target


def test_renewed_certificates_are_taken_up_and_nobody_is_cut_off(
    secure, certificates, served, rng
):
    scraper = context_of(certificates / "metrics")
    _, before = scrape(secure, scraper)
    started = secure.inspect("coordinator")["State"]["StartedAt"]
    make_certificates(pathlib.Path(certificates))
    wait_until(lambda: scrape(secure, scraper)[1] != before, 20, "the new certificate is shown")
    # The workers' streams outlive it, and new connections are made with what is new.
    batch = random_batch(served.spec, rng, 20)
    assert relative_error(infer(secure, *batch), served.ffn(*batch)) <= 1e-5
    with channel_of(certificates / "frontend")(secure.target) as channel:
        reply = protos.front_door(channel).ServerReady(
            protos.inference.ServerReadyRequest(), timeout=10 * SLOWNESS
        )
    assert reply.ready
    assert secure.inspect("coordinator")["State"]["StartedAt"] == started
