"""A Docker daemon of the tests' own: on its own socket, in folders that go with it, touching
neither the machine's network nor another daemon."""

import ctypes
import os
import pathlib
import shutil
import subprocess
import tempfile

from cluster import ROOT, wait_until

# Debian's: another docker on PATH may be of another version than its daemon.
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


class CommandFailed(AssertionError):
    """A program that had to succeed did not."""


def run(*words, timeout_s=120, check=True, env=None):
    """Runs a program to its end; returns the CompletedProcess with text output."""
    result = subprocess.run(
        list(map(str, words)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        cwd=ROOT,
        env={"PATH": PATH, "HOME": "/nonexistent", "LC_ALL": "C.UTF-8", **(env or {})},
    )
    if check and result.returncode != 0:
        raise CommandFailed(
            f"{' '.join(map(str, words))} ended with {result.returncode}:\n"
            f"{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
        )
    return result


def mounts_below(folder):
    """Mount points below `folder`."""
    points = [line.split()[1] for line in pathlib.Path("/proc/self/mounts").open()]
    return [point for point in points if point.startswith(f"{folder}/")]


def enter_network_of_its_own():
    """Moves this process, and what it starts from now on, into a network namespace that has
    nothing but a loopback interface. Another daemon's firewall does not reach there, and what is
    made there goes with it. No thread that uses the network may run yet."""
    clone_newnet = 0x40000000
    if ctypes.CDLL(None, use_errno=True).unshare(clone_newnet) != 0:
        raise OSError(ctypes.get_errno(), "unshare of the network namespace")
    run("ip", "link", "set", "lo", "up")


class Folders:
    """Where a daemon keeps its data and its sockets; remove() leaves nothing of them."""

    def __init__(self, data_parent):
        """`data_parent` is on a disk with room for images."""
        # Short: the daemon makes Unix sockets below it, whose paths may have 107 bytes.
        self.run = pathlib.Path(tempfile.mkdtemp(prefix="epd-", dir="/tmp"))
        pathlib.Path(data_parent).mkdir(parents=True, exist_ok=True)
        self.data = pathlib.Path(tempfile.mkdtemp(prefix="docker-", dir=data_parent))

    def remove(self):
        for folder in (self.run, self.data):
            # Deepest first. What stayed mounted would be emptied by rmtree.
            for point in sorted(mounts_below(folder), key=len, reverse=True):
                run("umount", "--lazy", point, check=False)
            shutil.rmtree(folder)


class Daemon:
    """dockerd from construction to stop(), in the network namespace of its caller. One on the
    folders of an earlier one has its images."""

    def __init__(self, folders):
        self.folder = folders.run
        self.log_path = self.folder / "dockerd.log"
        self.env = {"DOCKER_HOST": f"unix://{self.folder}/docker.sock", "DOCKER_BUILDKIT": "1"}
        # containerd takes no name that ends in "_", which a temporary folder's may.
        name = self.folder.name.replace("_", "0")
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [
                    # Should the tests be killed, the daemon stops its containers and ends.
                    *("/usr/bin/setpriv", "--pdeathsig", "TERM"),
                    "/usr/sbin/dockerd",
                    f"--host={self.env['DOCKER_HOST']}",
                    f"--data-root={folders.data}",
                    f"--exec-root={self.folder}/exec",
                    f"--pidfile={self.folder}/pid",
                    f"--containerd-namespace={name}",
                    f"--containerd-plugins-namespace={name}-plugins",
                    # Images are built with the caller's own network. Containers meet on bridges
                    # that compose makes and removes; docker-proxy publishes their ports.
                    "--bridge=none",
                    "--iptables=false",
                    "--ip6tables=false",
                    "--ip-forward=false",
                    "--ip-masq=false",
                    "--userland-proxy=true",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PATH": PATH},
            )
        try:
            wait_until(self._answers, 60, "dockerd answers")
        except BaseException:
            log = self.log_path.read_text(errors="replace")[-4000:]
            self.stop()
            raise CommandFailed(f"dockerd does not start:\n{log}") from None

    def _answers(self):
        if self.process.poll() is not None:
            raise CommandFailed(f"dockerd ended with {self.process.returncode}")
        return self.docker("version", check=False).returncode == 0

    def docker(self, *words, **options):
        return run("/usr/bin/docker", *words, env=self.env, **options)

    def stop(self):
        """Ends the daemon, which stops its containers."""
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
