"""Starts coordinators and workers as child processes, and takes them down without a trace."""

import contextlib
import itertools
import os
import pathlib
import random
import signal
import socket
import subprocess
import time
import urllib.request

import grpc

import protos

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN_DIR = pathlib.Path(os.environ.get("EPSERVE_BIN_DIR", ROOT / "build" / "release" / "bin"))
# Multiplies every deadline: for binaries that a sanitizer slows down.
SLOWNESS = float(os.environ.get("EPSERVE_TEST_SLOWNESS", "1"))
PORT_RANGE = pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range")
SHM_DIR = pathlib.Path("/dev/shm")
SESSION = f"e2e{os.getpid()}x"

_numbers = itertools.count(1)
live_clusters = []


def program(name):
    return str(BIN_DIR / name)


def unique_cluster_id():
    return f"{SESSION}{next(_numbers):03d}"


def free_ports(count=1):
    """The first of `count` free ports in a row, for what cannot be told to take any. They are none
    of those that the system hands out by itself, so that no connection takes one meanwhile."""
    low, high = map(int, PORT_RANGE.read_text().split())
    first, last = (low - 16_384, low) if low > 20_000 else (high + 1, 65_536)
    while True:
        base = random.randrange(first, last - count)
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
            for port in range(base, base + count):
                probes.enter_context(socket.socket()).bind(("0.0.0.0", port))
            return base


def segments(cluster_id):
    """Shared-memory segments that carry the cluster's id."""
    return sorted(path.name for path in SHM_DIR.glob(f"epserve-{cluster_id}*"))


def processes_mentioning(word):
    """Pids, other than this one, whose command line holds `word`."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if word.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                pass  # It ended meanwhile.
    return found


def wait_until(condition, timeout_s, what):
    """Polls `condition` until it is truthy and returns its value; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s * SLOWNESS
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s * SLOWNESS:.1f} s: {what}")
        time.sleep(0.01)


def run_program(name, *args, timeout_s=60, **options):
    """Runs one of the programs to its end; returns the CompletedProcess with text output."""
    return subprocess.run(
        [program(name), *map(str, args)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s * SLOWNESS,
        check=False,
        **options,
    )


class Program:
    """A child process whose stderr, and beside it stdout, go to files."""

    def __init__(self, log_path, name, *args, **options):
        """`options` are Popen's, in place of those files too."""
        self.name = name
        self.log_path = pathlib.Path(log_path)
        self.output_path = self.log_path.with_suffix(".out")
        with open(self.log_path, "ab") as log, open(self.output_path, "ab") as output:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": log}
            self.process = subprocess.Popen(
                [program(name), *map(str, args)], **{**streams, **options}
            )

    @property
    def pid(self):
        return self.process.pid

    def alive(self):
        return self.process.poll() is None

    def log(self):
        return self.log_path.read_text(errors="replace")

    def output(self):
        return self.output_path.read_text(errors="replace")

    def send(self, number):
        self.process.send_signal(number)

    def pause(self):
        """SIGSTOP; returns once every thread has stopped, which takes a busy machine its time."""
        self.send(signal.SIGSTOP)

        def stopped():
            tasks = pathlib.Path(f"/proc/{self.pid}/task").iterdir()
            states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks]
            return set(states) == {"T"}

        wait_until(stopped, 10, f"{self.name} has stopped")

    def resume(self):
        self.send(signal.SIGCONT)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def wait(self, timeout_s=20):
        """Exit code; fails if the process does not end in time."""
        try:
            return self.process.wait(timeout_s * SLOWNESS)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self.name} (pid {self.pid}) still runs after {timeout_s * SLOWNESS:.0f} s"
            ) from None

    def terminate(self, timeout_s=20):
        """SIGTERM, then the exit code."""
        if self.alive():
            self.send(signal.SIGTERM)
        return self.wait(timeout_s)


class Cluster:
    """One coordinator and its workers on a checkpoint. A context manager: leaving it stops all,
    and fails if a process or a shared-memory segment is left."""

    def __init__(
        self, directory, checkpoint, workers=4, coordinator_args=(), worker_args=(), start=True,
        open_channel=protos.insecure_channel, program_options=None,
    ):  # fmt: skip
        self.directory = pathlib.Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.checkpoint = checkpoint
        self.num_workers = workers
        self.open_channel = open_channel
        self.program_options = program_options or {}
        self.coordinator_args = list(coordinator_args)
        self.worker_args = list(worker_args)
        self.id = unique_cluster_id()
        self.coordinator = None
        self.port = 0
        self.metrics_port = 0
        self.workers = {}
        self.programs = []
        self._channel = None
        live_clusters.append(self)
        if start:
            try:
                self.start_coordinator()
                for index in range(workers):
                    self.start_worker(index)
                self.wait_ready()
            except BaseException as error:
                logs = self.logs()
                self.destroy()
                raise AssertionError(f"{error}\n{logs}") from error

    # ---- processes

    def start_coordinator(self):
        """Starts it; on its earlier ports if it had any."""
        port_file = self.directory / "port"
        metrics_port_file = self.directory / "metrics-port"
        port_file.unlink(missing_ok=True)
        metrics_port_file.unlink(missing_ok=True)
        self.coordinator = Program(
            self.directory / "coordinator.log",
            "epserve-coordinator",
            *("--checkpoint", self.checkpoint.path),
            *("--cluster-id", self.id),
            *("--workers", self.num_workers),
            *("--listen", f"127.0.0.1:{self.port}"),
            *("--metrics-listen", f"127.0.0.1:{self.metrics_port}"),
            *("--port-file", port_file),
            *("--metrics-port-file", metrics_port_file),
            *self.coordinator_args,
            **self.program_options,
        )
        self.programs.append(self.coordinator)

        def port(file):
            if not self.coordinator.alive():
                raise AssertionError(
                    f"the coordinator ended with {self.coordinator.wait()}: "
                    f"{self.coordinator.log()}"
                )
            return file.exists() and file.read_text().strip()

        self.port = int(wait_until(lambda: port(port_file), 10, "the port file"))
        self.metrics_port = int(
            wait_until(lambda: port(metrics_port_file), 10, "the metrics port file")
        )
        return self.coordinator

    def start_worker(self, index, *args):
        worker = Program(
            self.directory / f"worker{index}.log",
            "epserve-worker",
            *("--checkpoint", self.checkpoint.path),
            *("--cluster-id", self.id),
            *("--coordinator", self.target),
            *("--worker-id", f"w{index}"),
            *self.worker_args,
            *args,
            **self.program_options,
        )
        self.workers[index] = worker
        self.programs.append(worker)
        return worker

    def logs(self, lines=40):
        parts = []
        for path in sorted(self.directory.glob("*.log")):
            tail = path.read_text(errors="replace").splitlines()[-lines:]
            parts.append("\n".join([f"---- {path.name}", *tail]))
        return "\n".join(parts)

    # ---- calls

    @property
    def target(self):
        return f"127.0.0.1:{self.port}"

    @property
    def channel(self):
        if self._channel is None:
            self._channel = self.open_channel(self.target)
        return self._channel

    @property
    def front_door(self):
        return protos.front_door(self.channel)

    @property
    def admin(self):
        return protos.admin(self.channel)

    def is_ready(self):
        try:
            return self.front_door.ServerReady(
                protos.inference.ServerReadyRequest(), timeout=5 * SLOWNESS
            ).ready
        except grpc.RpcError:
            return False

    def wait_ready(self, timeout_s=20):
        wait_until(self.is_ready, timeout_s, "the service is ready")

    def wait_not_ready(self, timeout_s=5):
        wait_until(lambda: not self.is_ready(), timeout_s, "the service is not ready")

    def status(self):
        return self.admin.GetClusterStatus(
            protos.epserve.GetClusterStatusRequest(), timeout=5 * SLOWNESS
        )

    def wait_status(self, condition, timeout_s, what):
        """Waits for a cluster status that meets `condition`; returns it."""

        def check():
            status = self.status()
            return status if condition(status) else None

        return wait_until(check, timeout_s, what)

    def metrics_text(self):
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=5 * SLOWNESS) as reply:
            return reply.read().decode()

    def metrics(self):
        """{'name{labels}': value} of the metrics endpoint."""
        values = {}
        for line in self.metrics_text().splitlines():
            if line and not line.startswith("#"):
                key, _, value = line.rpartition(" ")
                values[key] = float(value)
        return values

    # ---- the end

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is not None:
            self.destroy()
        else:
            self.stop()

    def stop(self):
        """SIGTERM to all that still run; each must exit 0, and nothing may be left."""
        try:
            running = [p for p in self.programs if p.alive()]
            for child in running:
                if child is not self.coordinator:
                    child.send(signal.SIGTERM)
            codes = {f"{p.name} {p.pid}": p.wait() for p in running if p is not self.coordinator}
            if self.coordinator in running:
                codes["coordinator"] = self.coordinator.terminate()
            bad = {name: code for name, code in codes.items() if code != 0}
            assert not bad, f"exit codes after SIGTERM: {bad}\n{self.logs()}"
            left = segments(self.id)
            assert not left, f"left in /dev/shm: {left}\n{self.logs()}"
        finally:
            self.destroy()

    def destroy(self):
        """Takes down whatever is left, without asking."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        for child in self.programs:
            if child.alive():
                child.kill()
        for name in segments(self.id):
            (SHM_DIR / name).unlink(missing_ok=True)
        if self in live_clusters:
            live_clusters.remove(self)
