"""The Helm chart's processes, run here as a cluster would run them: with the arguments, probes and
secrets that the chart renders, as plain processes of one machine in place of containers."""

import json
import pathlib
import re
import socket

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import chart
from certificates import Authority
from cluster import Program, free_ports, run_program, segments, unique_cluster_id, wait_until

WORKERS = 2
IPV6 = pathlib.Path("/proc/net/if_inet6")  # empty: there is none
SERVING = health_pb2.HealthCheckResponse.SERVING


class Kubelet:
    """Turns containers into command lines for this machine: volumes become directories, services
    this machine's ports, $(POD_NAME) a name."""

    def __init__(self, directory, rendered, claims, secrets):
        self.directory = directory
        self.claims = claims  # name -> directory
        self.secrets = secrets  # name -> {key: bytes}
        self.hosts = [service["metadata"]["name"] for service in rendered.of("Service")]

    def mount(self, role, volume):
        """The directory that stands for a volume of the pod."""
        if "persistentVolumeClaim" in volume:
            return self.claims[volume["persistentVolumeClaim"]["claimName"]]
        secret = volume["secret"]
        place = self.directory / role / volume["name"]
        place.mkdir(parents=True, exist_ok=True)
        held = self.secrets[secret["secretName"]]
        files = {i["path"]: held[i["key"]] for i in secret.get("items", [])} or held
        for name, content in files.items():
            (place / name).write_bytes(content)
        return place

    def arguments(self, role, pod, container):
        volumes = {v["name"]: v for v in pod["spec"]["volumes"]}
        words = [word.replace("$(POD_NAME)", "pod-0") for word in container["args"]]
        for mounted in container["volumeMounts"]:
            if mounted["mountPath"] == "/dev/shm":
                continue  # As it is: this machine's.
            place = self.mount(role, volumes[mounted["name"]])
            place = pathlib.Path(place, mounted.get("subPath", ""))
            words = [word.replace(f"={mounted['mountPath']}", f"={place}") for word in words]
        for host in self.hosts:
            words = [re.sub(rf"={re.escape(host)}:(?=\d)", "=localhost:", word) for word in words]
        return container["command"] + words


def healthy(probe):
    asked = probe["grpc"]
    with grpc.insecure_channel(f"127.0.0.1:{asked['port']}") as channel:
        request = health_pb2.HealthCheckRequest(service=asked["service"])
        try:
            return health_pb2_grpc.HealthStub(channel).Check(request, timeout=5).status == SERVING
        except grpc.RpcError:
            return False


@pytest.fixture(scope="module")
def secrets(tmp_path_factory):
    """By name, all that the value sets refer to."""
    authority = Authority(tmp_path_factory.mktemp("authority"))
    found = {}
    for name, roles in {"coordinator": [], "worker": ["worker"], "operator": ["operator"]}.items():
        issued = authority.issue(name, *roles)
        files = {"tls.crt": issued.cert, "tls.key": issued.key, "ca.crt": issued.ca}
        found[f"epserve-{name}-tls"] = {key: file.read_bytes() for key, file in files.items()}
    found["epserve-secrets"] = {
        "secrets": b"worker w-secret-0123456789\noperator o-secret-0123456789\n",
        "worker": b"w-secret-0123456789\n",
        "operator": b"o-secret-0123456789\n",
    }
    return found


def values(value_set, cluster_id, port):
    """Of the set, all but the backend and the ports, of which each test has its own."""
    ports = {"port": port, "metricsPort": port + 1, "healthPort": port + 2}
    changes = {
        "fullnameOverride": cluster_id,
        "backend": "host",
        "cudaSharedMemory": {"enabled": False},
        # Of a set's own choice where this machine has addresses of IPv6.
        **({} if socket.has_ipv6 and IPV6.read_text() else {"listenHost": "0.0.0.0"}),
        "workers": {"pods": 1, "perPod": WORKERS, "healthPort": port + 3},
        "coordinator": ports,
    }
    return chart.merged(chart.values(value_set), changes)


def flag_ranges(program):
    """flag -> (least, most), as the program's --help gives them."""
    help_text = run_program(program, "--help").stdout
    found = re.findall(r"--([a-z-]+) INT:INT in \[(\d+) - (\d+)\]", help_text)
    return {name: (int(least), int(most)) for name, least, most in found}


def test_values_have_the_ranges_of_their_flags():
    schema = json.loads((chart.CHART_DIR / "values.schema.json").read_text())["properties"]
    coordinator, workers = schema["coordinator"]["properties"], schema["workers"]["properties"]
    common = {name: schema[name] for name in ("maxBatchTokens", "slots")}
    compared = set()
    for program, values in (
        ("epserve-coordinator", {**common, **coordinator}),
        ("epserve-worker", {**common, **workers}),
    ):
        ranges = flag_ranges(program)
        for name, rule in values.items():
            flag = re.sub("([A-Z])", lambda found: "-" + found[0].lower(), name)
            if flag in ranges:
                assert (rule["minimum"], rule["maximum"]) == ranges[flag], name
                compared.add(name)
    assert compared >= {
        *("maxBatchTokens", "slots", "queueCapacity", "maxHeldBytes", "batchWindowUs", "leaseMs"),
        *("formationTimeoutMs", "batchTimeoutMs", "drainTimeoutMs"),
        *("computeThreads", "peerTimeoutMs", "leaveTimeoutMs"),
    }


@pytest.mark.parametrize("value_set", ["cpu", "secrets", "tls"])
def test_pods_of_the_chart_serve(value_set, checkpoint, secrets, tmp_path):
    cluster_id = unique_cluster_id()
    rendered = chart.render(values(value_set, cluster_id, free_ports(3 + WORKERS)))
    model = checkpoint().path
    # The claim holds the checkpoint at the sub-path, if there is one.
    claims = {"models": model.parent}
    sub_path = chart.values(value_set)["checkpoint"].get("subPath")
    if sub_path is None:
        claims = {"models": model}
    elif not (model.parent / sub_path).exists():
        (model.parent / sub_path).symlink_to(model)
    kubelet = Kubelet(tmp_path, rendered, claims, secrets)
    pods = rendered.pods()
    (coordinator,) = pods["coordinator"]["spec"]["containers"]
    workers = pods["worker"]["spec"]["containers"]
    programs = {}

    def start(name, role, container):
        words = kubelet.arguments(role, pods[role], container)
        programs[name] = Program(tmp_path / f"{name}.log", *words)

    def await_probe(name, probe):
        def answered():
            assert programs[name].alive(), programs[name].log()
            return healthy(probe)

        wait_until(answered, 20, f"{name}: {probe}")

    try:
        # A worker that is there first lives, and is not ready.
        start("worker-0", "worker", workers[0])
        await_probe("worker-0", workers[0]["startupProbe"])
        assert not healthy(workers[0]["readinessProbe"])
        start("coordinator", "coordinator", coordinator)
        await_probe("coordinator", coordinator["startupProbe"])
        await_probe("worker-0", workers[0]["readinessProbe"])
        assert not healthy(coordinator["readinessProbe"])
        for index, worker in list(enumerate(workers))[1:]:
            start(f"worker-{index}", "worker", worker)
        await_probe("coordinator", coordinator["readinessProbe"])
        for index, worker in enumerate(workers):
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                await_probe(f"worker-{index}", worker[kind])
        (verify,) = rendered.verify()["spec"]["containers"]
        command, *arguments = kubelet.arguments("test", rendered.verify(), verify)
        model_name = chart.flag(verify, "--model")
        result = run_program(command, *arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        assert model_name == chart.flag(coordinator, "--model-name")

        # Without the coordinator a worker lives on, not ready, and comes back by itself.
        assert programs["coordinator"].terminate() == 0
        wait_until(lambda: not healthy(workers[0]["readinessProbe"]), 10, "not ready")
        assert healthy(workers[0]["livenessProbe"])
        start("coordinator", "coordinator", coordinator)
        await_probe("coordinator", coordinator["readinessProbe"])
        await_probe("worker-0", workers[0]["readinessProbe"])
        grace = pods["worker"]["spec"]["terminationGracePeriodSeconds"]
        for name in [f"worker-{i}" for i in range(WORKERS)] + ["coordinator"]:
            assert programs[name].terminate(grace) == 0, programs[name].log()
        assert segments(cluster_id) == []
    finally:
        for program in programs.values():
            if program.alive():
                program.kill()
