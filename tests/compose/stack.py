"""The stack of deploy/compose/compose.yaml under a project name of its own. It offers what
tests/support asks of a cluster (target, checkpoint, front_door), so that its load runs here too."""

import contextlib
import json
import os
import pathlib
import urllib.parse
import urllib.request

import grpc
import yaml

import protos
from cluster import ROOT, SLOWNESS, free_ports, wait_until
from docker_daemon import run
from images import EPSERVE, PROMETHEUS

COMPOSE_DIR = ROOT / "deploy" / "compose"
WORKERS = ("worker-0", "worker-1", "worker-2", "worker-3")


def compose_environment(checkpoint_dir, **settings):
    """The variables that the compose files read."""
    return {
        "EPSERVE_IMAGE": EPSERVE,
        "PROMETHEUS_IMAGE": PROMETHEUS,
        "EPSERVE_CHECKPOINT": str(checkpoint_dir),
        "EPSERVE_SHM_SIZE": "1g",
        "EPSERVE_TLS_DIR": "/etc/epserve/tls",
        **settings,
    }


def compose_config(env, *files):
    """The compose files put together and checked, as compose itself reads them."""
    flags = [word for file in files for word in ("-f", COMPOSE_DIR / file)]
    result = run("/usr/bin/docker-compose", *flags, "config", env=env)
    return yaml.safe_load(result.stdout)


class Stack:
    def __init__(
        self, daemon, checkpoint, files=("compose.yaml",), name="", settings=None,
        open_channel=protos.insecure_channel,
    ):  # fmt: skip
        self.daemon = daemon
        self.checkpoint = checkpoint
        self.files = files
        self.project = f"epservetest{os.getpid()}{name}"
        self.port = free_ports(3)
        self.metrics_port, self.prometheus_port = self.port + 1, self.port + 2
        self.env = {
            **daemon.env,
            **compose_environment(
                checkpoint.path,
                EPSERVE_MODEL_NAME=checkpoint.name,
                EPSERVE_CLUSTER_ID=self.project,
                EPSERVE_ALLOW_CLIENT_SHM="true",
                EPSERVE_PORT=str(self.port),
                EPSERVE_METRICS_PORT=str(self.metrics_port),
                PROMETHEUS_PORT=str(self.prometheus_port),
                **(settings or {}),
            ),
        }
        self.channel = open_channel(self.target)

    # ---- compose and docker

    def compose(self, *words, **options):
        files = [word for file in self.files for word in ("-f", COMPOSE_DIR / file)]
        return run(
            "/usr/bin/docker-compose", "--ansi", "never", "-p", self.project, *files, *words,
            env=self.env, **options,
        )  # fmt: skip

    def up(self):
        self.compose("up", "-d")
        self.wait_ready(60)

    def down(self):
        self.channel.close()
        self.compose("down", "--volumes", "--timeout", 20)

    def container(self, service):
        return f"{self.project}_{service}_1"

    def docker(self, verb, service, *words, **options):
        """docker VERB WORDS CONTAINER"""
        return self.daemon.docker(*verb.split(), *words, self.container(service), **options)

    def inspect(self, service):
        return json.loads(self.docker("inspect", service).stdout)[0]

    def log(self, service):
        result = self.docker("logs", service)
        return result.stdout + result.stderr

    def run_client(self, *words, **options):
        """The words in a client container of their own, to their end."""
        return self.compose("run", "--rm", "-T", "client", *words, **options)

    @contextlib.contextmanager
    def cut_off(self, service):
        """The service's container without its network."""
        network = f"{self.project}_default"
        self.docker("network disconnect", service, network)
        try:
            yield
        finally:
            self.docker("network connect", service, network)

    @property
    def shm_folder(self):
        """The containers' /dev/shm, seen from here."""
        volume = f"{self.project}_shm"
        return pathlib.Path(
            self.daemon.docker("volume", "inspect", "-f", "{{.Mountpoint}}", volume).stdout.strip()
        )

    # ---- calls

    @property
    def target(self):
        return f"127.0.0.1:{self.port}"

    @property
    def front_door(self):
        return protos.front_door(self.channel)

    def status(self):
        return protos.admin(self.channel).GetClusterStatus(
            protos.epserve.GetClusterStatusRequest(), timeout=5 * SLOWNESS
        )

    def is_ready(self):
        try:
            request = protos.inference.ServerReadyRequest()
            return self.front_door.ServerReady(request, timeout=5 * SLOWNESS).ready
        except grpc.RpcError:
            return False

    def wait_ready(self, timeout_s):
        wait_until(self.is_ready, timeout_s, "the service is ready")

    def wait_status(self, condition, timeout_s, what):
        """Waits for a cluster status that meets `condition`; returns it."""

        def check():
            with contextlib.suppress(grpc.RpcError):
                status = self.status()
                return status if condition(status) else None

        return wait_until(check, timeout_s, what)

    # ---- Prometheus

    def prometheus(self, path, **parameters):
        """The `data` of an answer of Prometheus' HTTP interface."""
        query = urllib.parse.urlencode(parameters)
        url = f"http://127.0.0.1:{self.prometheus_port}/api/v1/{path}?{query}"
        with urllib.request.urlopen(url, timeout=10 * SLOWNESS) as reply:
            answer = json.load(reply)
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression):
        return self.prometheus("query", query=expression)["result"]
