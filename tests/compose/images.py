"""The images of the tests: a base made with debootstrap where no registry is, epserve's own from
built programs, and Debian's Prometheus."""

import contextlib
import os
import pathlib
import shutil
import tempfile

from cluster import BIN_DIR, ROOT
from docker_daemon import run

BASE = "epserve-test-base:bookworm"
EPSERVE = "epserve-test:prebuilt"
CUDA_DEVEL = "epserve-test-cuda:devel"
CUDA_RUNTIME = "epserve-test-cuda:runtime"
EPSERVE_CUDA = "epserve-test:cuda"
PROMETHEUS = "epserve-test-prometheus:debian"
PROGRAMS = ("epserve", "epserve-coordinator", "epserve-worker")


def base_tarball(cache):
    """A minimal Debian 12 as a tarball in `cache`, made once."""
    tarball = pathlib.Path(cache) / "debian-bookworm.tar"
    if tarball.is_file():
        return tarball
    tarball.parent.mkdir(parents=True, exist_ok=True)
    root = tempfile.mkdtemp(prefix="debootstrap-", dir=cache)
    try:
        run("debootstrap", "--variant=minbase", "bookworm", root, timeout_s=600)
        partial = tarball.with_suffix(".partial")
        run(
            "tar", "--create", "--directory", root, "--file", partial, "--one-file-system",
            "--exclude=./var/cache/apt/archives/*", "--exclude=./var/lib/apt/lists/*", ".",
            timeout_s=120,
        )  # fmt: skip
        os.replace(partial, tarball)
    finally:
        shutil.rmtree(root)
    return tarball


def build(daemon, cache):
    """Puts the three images into the daemon."""
    daemon.docker("import", base_tarball(cache), BASE)
    build_epserve(daemon, cache)
    build_prometheus(daemon, cache)


@contextlib.contextmanager
def context_in(cache):
    """A folder to build an image of."""
    context = pathlib.Path(tempfile.mkdtemp(prefix="context-", dir=cache))
    try:
        yield context
    finally:
        shutil.rmtree(context)


# What compiling needs of a CUDA toolkit: no library of mathematics, none to run with.
TOOLKIT = (
    "bin", "include", "nvvm", "targets",
    "lib/libcudadevrt.a", "lib/libcudart.so", "lib/libcudart.so.13", "lib/libcudart_static.a",
    "lib/stubs",
)  # fmt: skip


def toolkit():
    """The CUDA toolkit of this machine's nvcc; None where there is none."""
    nvcc = shutil.which("nvcc")
    return pathlib.Path(nvcc).resolve().parents[1] if nvcc else None


def build_from_source_with_cuda(daemon, cache):
    """The whole of the real Dockerfile, on stand-ins of CUDA's images: Debian and the toolkit to
    compile on, Debian and NCCL to run on."""
    with context_in(cache) as context:
        for part in TOOLKIT:
            (context / "cuda" / part).parent.mkdir(parents=True, exist_ok=True)
            run("cp", "--archive", toolkit() / part, context / "cuda" / part)
        run("cp", "--dereference", toolkit() / "lib" / "libnccl.so.2", context)
        daemon.docker(
            "build", "--network=none", "--tag", CUDA_DEVEL, "--target=devel", "--build-arg",
            f"BASE_IMAGE={BASE}", "--file", ROOT / "tests/compose/cuda.Dockerfile", context,
            timeout_s=300,
        )  # fmt: skip
        daemon.docker(
            "build", "--network=none", "--tag", CUDA_RUNTIME, "--target=runtime", "--build-arg",
            f"BASE_IMAGE={BASE}", "--file", ROOT / "tests/compose/cuda.Dockerfile", context,
            timeout_s=300,
        )  # fmt: skip
    daemon.docker(
        "build", "--network=host", "--tag", EPSERVE_CUDA, "--build-arg",
        f"BUILD_IMAGE={CUDA_DEVEL}", "--build-arg", f"BASE_IMAGE={CUDA_RUNTIME}", "--build-arg",
        "EPSERVE_CUDA=ON", "--file", ROOT / "deploy/docker/Dockerfile", ROOT,
        timeout_s=3600,
    )  # fmt: skip


def build_prometheus(daemon, cache):
    """The program of this machine's package, run as the public image runs it."""
    with context_in(cache) as context:
        shutil.copy2("/usr/bin/prometheus", context)
        daemon.docker(
            "build", "--network=none", "--tag", PROMETHEUS, "--build-arg", f"BASE_IMAGE={BASE}",
            "--file", ROOT / "tests" / "compose" / "prometheus.Dockerfile", context,
            timeout_s=120,
        )  # fmt: skip


def build_epserve(daemon, cache):
    """The runtime stage of the real Dockerfile, with the programs under test put in."""
    with context_in(cache) as context:
        programs = context / "build" / "release" / "bin"
        programs.mkdir(parents=True)
        for name in PROGRAMS:
            shutil.copy2(BIN_DIR / name, programs / name)
        (context / "deploy").mkdir()
        shutil.copy2(ROOT / "deploy" / "install-deps.sh", context / "deploy")
        daemon.docker(
            "build", "--network=host", "--tag", EPSERVE, "--target=prebuilt",
            "--build-arg", f"BASE_IMAGE={BASE}", "--file", ROOT / "deploy/docker/Dockerfile",
            context, timeout_s=300,
        )  # fmt: skip
