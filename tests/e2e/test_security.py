"""Who may call what: certificates, secrets, and neither."""

import shutil
import socket
import ssl

import grpc
import pytest

import protos
from certificates import Authority
from checkpoints import relative_error
from cluster import SLOWNESS, Program, run_program, wait_until
from infer import infer, random_batch
from raw_calls import PREFACE, SETTINGS, frame


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def everybody(authority):
    """Certificates: coordinator (a server), worker, frontend, operator."""
    roles = {"coordinator": [], "worker": ["worker"], "frontend": ["frontend"],
             "operator": ["operator"]}  # fmt: skip
    return {name: authority.issue(name, *granted) for name, granted in roles.items()}


def secure_channel(identity):
    credentials = grpc.ssl_channel_credentials(
        identity.ca.read_bytes(), identity.key.read_bytes(), identity.cert.read_bytes()
    )
    return lambda target: grpc.secure_channel(target.replace("127.0.0.1", "localhost"), credentials)


@pytest.fixture(scope="module")
def cluster(checkpoint, start_cluster, everybody, tmp_path_factory):
    health = f"unix:{tmp_path_factory.mktemp('health')}/socket"
    options = dict(
        coordinator_args=[
            *everybody["coordinator"].flags,
            f"--health-listen={health}",
            "--plaintext-metrics",
        ],
        worker_args=everybody["worker"].flags,
        open_channel=secure_channel(everybody["operator"]),
    )
    with start_cluster(checkpoint(), workers=2, **options) as running:
        running.health = health
        yield running


def test_everybody_does_what_is_theirs(cluster, everybody, rng):
    batch = random_batch(cluster.checkpoint.spec, rng, 9)
    for name in ("frontend", "operator"):
        channel = secure_channel(everybody[name])(cluster.target)
        with channel:
            reply = protos.front_door(channel).ServerReady(
                protos.inference.ServerReadyRequest(), timeout=10
            )
            assert reply.ready, name
    assert relative_error(infer(cluster, *batch), cluster.checkpoint.ffn(*batch)) <= 1e-5
    assert len(cluster.status().workers) == 2


def test_frontends_certificate_neither_drains_nor_joins(cluster, everybody, tmp_path):
    with secure_channel(everybody["frontend"])(cluster.target) as channel:
        for call in (
            lambda: protos.admin(channel).GetClusterStatus(
                protos.epserve.GetClusterStatusRequest(), timeout=10
            ),
            lambda: protos.admin(channel).DrainWorker(
                protos.epserve.DrainWorkerRequest(worker_id="w0"), timeout=10
            ),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
            assert "operator" in caught.value.details()
    arguments = [
        *("--checkpoint", cluster.checkpoint.path, "--cluster-id", cluster.id),
        *("--coordinator", cluster.target, "--worker-id", "intruder"),
        *everybody["frontend"].flags,
    ]
    intruder = Program(tmp_path / "intruder.log", "epserve-worker", *arguments)
    try:
        wait_until(lambda: "needs the role worker" in intruder.log(), 20, "the refusal")
    finally:
        intruder.kill()
    assert {w.worker_id for w in cluster.status().workers} == {"w0", "w1"}
    log = cluster.coordinator.log()
    assert log.count("call_refused method=/epserve.v1.Control/Connect") == 1, log
    assert cluster.is_ready()


def test_workers_certificate_is_no_frontend(cluster, everybody):
    with secure_channel(everybody["worker"])(cluster.target) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            protos.front_door(channel).ServerReady(
                protos.inference.ServerReadyRequest(), timeout=10
            )
        assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED


def identity_of(kind, authority, directory):
    """What a caller of that kind shows; None: nothing."""
    if kind == "wrong authority":
        return Authority(directory / "other", "another authority").issue("operator", "operator")
    return authority.issue("late", "operator", days=-1) if kind == "expired" else None


def is_let_in(port, source, kind, ca, identity):
    """Whether a caller at that address of this machine gets an answer after its handshake."""
    address = ("127.0.0.1", port)
    with socket.create_connection(address, 10 * SLOWNESS, (source, 0)) as connection:
        try:
            if kind != "plaintext":
                context = ssl.create_default_context(cafile=ca)
                context.set_alpn_protocols(["h2"])
                if identity:
                    context.load_cert_chain(identity.cert, identity.key)
                connection = context.wrap_socket(connection, server_hostname="localhost")
            connection.sendall(PREFACE + frame(SETTINGS, 0, 0))
            # With TLS 1.3 a caller learns only now that its certificate was refused.
            answer = connection.recv(9)
            return len(answer) == 9 and answer[3] == SETTINGS
        except (ssl.SSLError, ConnectionError):
            return False


REFUSED_KINDS = ["none", "wrong authority", "expired", "plaintext"]
HANDSHAKES = 'epserve_refused_total{reason="handshake"}'


@pytest.mark.parametrize("kind", REFUSED_KINDS)
def test_caller_without_a_good_certificate_is_refused_and_the_service_unharmed(
    cluster, authority, everybody, tmp_path, rng, kind
):
    before = cluster.metrics()[HANDSHAKES]
    source = f"127.0.0.{10 + REFUSED_KINDS.index(kind)}"
    identity = identity_of(kind, authority, tmp_path)
    for _ in range(5):
        assert not is_let_in(cluster.port, source, kind, authority.cert, identity)
    wait_until(lambda: cluster.metrics()[HANDSHAKES] >= before + 5, 10, "all are counted")
    assert cluster.metrics()[HANDSHAKES] == before + 5
    lines = [x for x in cluster.coordinator.log().splitlines() if f"{source}:" in x]
    assert len(lines) == 1, lines
    assert f" tls_handshake_refused peer=ipv4:{source}:" in lines[0]
    good = everybody["operator"]
    assert is_let_in(cluster.port, source, kind="good", ca=authority.cert, identity=good)
    batch = random_batch(cluster.checkpoint.spec, rng, 7)
    assert relative_error(infer(cluster, *batch), cluster.checkpoint.ffn(*batch)) <= 1e-5
    assert len(cluster.status().workers) == 2


@pytest.mark.parametrize("kind", ["none", "wrong authority", "expired"])
def test_worker_without_a_good_certificate_does_not_join(
    cluster, authority, everybody, tmp_path, kind
):
    """As the worker's own program finds it: it says so, and goes on trying."""
    before = cluster.metrics()[HANDSHAKES]
    identity = identity_of(kind, authority, tmp_path)
    if kind == "none":
        arguments = []
    else:
        arguments = [f"--tls-cert={identity.cert}", f"--tls-key={identity.key}",
                     f"--tls-ca={authority.cert}"]  # fmt: skip
    intruder = Program(
        tmp_path / "intruder.log", "epserve-worker",
        *("--checkpoint", cluster.checkpoint.path, "--cluster-id", cluster.id),
        *("--coordinator", cluster.target, "--worker-id", "intruder"), *arguments,
    )  # fmt: skip
    try:
        wait_until(lambda: cluster.metrics()[HANDSHAKES] > before, 20, "the refusal")
        assert intruder.alive()
    finally:
        intruder.kill()
    assert {w.worker_id for w in cluster.status().workers} == {"w0", "w1"}
    assert cluster.is_ready()


@pytest.mark.parametrize("kind", REFUSED_KINDS)
def test_call_without_a_good_certificate_is_unavailable(cluster, authority, tmp_path, kind):
    ca, shown = authority.cert.read_bytes(), identity_of(kind, authority, tmp_path)
    pair = (shown.key.read_bytes(), shown.cert.read_bytes()) if shown else ()
    target = cluster.target.replace("127.0.0.1", "localhost")
    channel = (
        grpc.insecure_channel(target)
        if kind == "plaintext"
        else grpc.secure_channel(target, grpc.ssl_channel_credentials(ca, *pair))
    )
    with channel:
        with pytest.raises(grpc.RpcError) as caught:
            protos.admin(channel).GetClusterStatus(
                protos.epserve.GetClusterStatusRequest(), timeout=3 * SLOWNESS
            )
    refusals = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    assert caught.value.code() in refusals


def test_plaintext_health_port_answers_probes_and_nothing_else(cluster):
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(cluster.health) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        reply = health.Check(health_pb2.HealthCheckRequest(service="readiness"), timeout=10)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            protos.front_door(channel).ServerReady(
                protos.inference.ServerReadyRequest(), timeout=10
            )
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert "needs TLS" in caught.value.details()


def test_renewed_certificates_are_taken_up_without_a_restart(
    checkpoint, start_cluster, tmp_path
):
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    files = tmp_path / "files"
    files.mkdir()

    def install(authority):
        for name, roles in (("all", ["worker", "operator"]),):
            made = authority.issue(name, *roles)
            for source, target in ((made.cert, "cert"), (made.key, "key"), (made.ca, "ca")):
                shutil.copy(source, files / f"{target}.next")
        for target in ("cert", "key", "ca"):
            (files / f"{target}.next").replace(files / target)

    install(old)
    flags = [f"--tls-{name}={files / name}" for name in ("cert", "key", "ca")]
    options = dict(coordinator_args=flags, worker_args=flags)
    first = old.issue("operator", "operator")
    with start_cluster(checkpoint(), workers=2, open_channel=secure_channel(first),
                       **options) as cluster:  # fmt: skip
        install(new)
        second = new.issue("operator", "operator")

        def answers():
            with secure_channel(second)(cluster.target) as channel:
                try:
                    return protos.admin(channel).GetClusterStatus(
                        protos.epserve.GetClusterStatusRequest(), timeout=2
                    )
                except grpc.RpcError:
                    return None

        status = wait_until(answers, 20, "the new certificate is shown and accepted")
        assert len(status.workers) == 2, "those that were connected stay so"


def test_command_speaks_tls(cluster, everybody):
    server = ["--server", cluster.target]
    result = run_program("epserve", "status", *server, *everybody["operator"].flags, "--json")
    assert result.returncode == 0, result.stderr
    refused = run_program("epserve", "status", *server, *everybody["frontend"].flags)
    assert refused.returncode != 0
    assert "needs the role operator" in refused.stderr
    verified = run_program(
        "epserve", "verify", *server, *everybody["frontend"].flags,
        "--checkpoint", cluster.checkpoint.path, "--batches", 1,
    )  # fmt: skip
    assert verified.returncode == 0, verified.stderr
    half = run_program("epserve", "status", *server, everybody["operator"].flags[0])
    assert half.returncode == 2
    assert "--tls-key" in half.stderr


@pytest.fixture(scope="module")
def secrets(tmp_path_factory):
    directory = tmp_path_factory.mktemp("secrets")
    lines = []
    for role in ("frontend", "worker", "operator"):
        secret = f"{role}-secret-0123456789abcdef"
        (directory / role).write_text(secret + "\n")
        lines.append(f"{role} {secret}")
    (directory / "all").write_text("# role secret\n" + "\n".join(lines) + "\n")
    return directory


def test_secrets_stand_in_for_certificates(checkpoint, start_cluster, secrets, rng):
    def open_channel(target):
        secret = (secrets / "operator").read_text().strip()

        class Shower(grpc.UnaryUnaryClientInterceptor):
            def intercept_unary_unary(self, continuation, details, request):
                metadata = [*(details.metadata or ()), ("authorization", f"Bearer {secret}")]
                return continuation(details._replace(metadata=metadata), request)

        return grpc.intercept_channel(protos.insecure_channel(target), Shower())

    options = dict(
        coordinator_args=[f"--secrets-file={secrets / 'all'}"],
        worker_args=[f"--secret-file={secrets / 'worker'}"],
        open_channel=open_channel,
    )
    with start_cluster(checkpoint(), workers=2, **options) as cluster:
        batch = random_batch(cluster.checkpoint.spec, rng, 5)
        assert relative_error(infer(cluster, *batch), cluster.checkpoint.ffn(*batch)) <= 1e-5
        server = ["--server", cluster.target]
        for secret, code in (("operator", 0), ("frontend", 1), (None, 1)):
            flags = [f"--secret-file={secrets / secret}"] if secret else []
            result = run_program("epserve", "status", *server, *flags)
            assert result.returncode == code, result.stderr
            if code:
                assert "needs the role operator" in result.stderr
            assert "secret-0123456789" not in result.stderr
        assert "secret-0123456789" not in cluster.logs(100000)


def test_renewed_secrets_are_taken_up_by_all_without_a_restart(
    checkpoint, start_cluster, tmp_path
):
    files = {name: tmp_path / name for name in ("all", "worker", "operator")}

    def install(suffix):
        for name, text in (
            ("worker", f"worker-secret-{suffix}\n"),
            ("operator", f"operator-secret-{suffix}\n"),
            (
                "all",
                f"worker worker-secret-{suffix}\nfrontend frontend-secret-{suffix}\n"
                f"operator operator-secret-{suffix}\n",
            ),
        ):
            (tmp_path / "next").write_text(text)
            (tmp_path / "next").replace(files[name])

    shown = {"suffix": "0123456789"}

    class Shower(grpc.UnaryUnaryClientInterceptor):
        def intercept_unary_unary(self, continuation, details, request):
            secret = f"Bearer frontend-secret-{shown['suffix']}"
            metadata = [*(details.metadata or ()), ("authorization", secret)]
            return continuation(details._replace(metadata=metadata), request)

    install(shown["suffix"])
    options = dict(
        coordinator_args=[f"--secrets-file={files['all']}"],
        worker_args=[f"--secret-file={files['worker']}"],
        open_channel=lambda t: grpc.intercept_channel(protos.insecure_channel(t), Shower()),
    )
    with start_cluster(checkpoint(), workers=2, **options) as cluster:
        watcher = Program(
            tmp_path / "watcher.log", "epserve", "status", "--watch=0.1", "--json",
            "--server", cluster.target, "--secret-file", files["operator"],
        )  # fmt: skip
        cluster.programs.append(watcher)
        wait_until(watcher.output, 10, "a status")
        install("9876543210")
        wait_until(lambda: not cluster.is_ready(), 10, "the old secret is refused")
        shown["suffix"] = "9876543210"
        assert cluster.is_ready(), "the workers that were connected stay so"
        # From here on the old secret is refused to everybody: a further status shows the new one.
        seen = watcher.output().count("\n")
        wait_until(lambda: watcher.output().count("\n") > seen + 10, 10, "further statuses")
        watcher.kill()
        pids = [worker.pid for worker in cluster.workers.values()]
        cluster.coordinator.kill()
        cluster.start_coordinator()
        cluster.wait_ready()
        assert [w.pid for w in cluster.workers.values() if w.alive()] == pids


def test_server_that_would_be_open_to_other_machines_is_refused(checkpoint, everybody, tmp_path):
    base = ["--checkpoint", checkpoint().path, "--metrics-listen=off"]
    result = run_program("epserve-coordinator", *base, "--listen=0.0.0.0:0")
    assert result.returncode == 2
    assert "--insecure" in result.stderr and "--tls-cert" in result.stderr
    no_ca = everybody["coordinator"].flags[:2]
    result = run_program("epserve-coordinator", *base, *no_ca)
    assert result.returncode == 2
    assert "--tls-ca" in result.stderr
    short = tmp_path / "short"
    short.write_text("worker abc\n")
    result = run_program("epserve-coordinator", *base, "--listen=127.0.0.1:0",
                         f"--secrets-file={short}")  # fmt: skip
    assert result.returncode != 0
    assert "line 1" in result.stderr and "abc" not in result.stderr
