"""The image with the CUDA backend, built from source by deploy/docker/Dockerfile to its end.

It compiles everything, kernels too, which takes minutes, so it runs where it is asked for:
EPSERVE_CUDA_IMAGE=1, on a machine with nvcc. NVIDIA's images are stood in for by Debian's with this
machine's toolkit, without any library of mathematics, and with NCCL."""

import os

import pytest

import images

pytestmark = pytest.mark.skipif(
    os.environ.get("EPSERVE_CUDA_IMAGE") != "1",
    reason="compiles everything in a container; EPSERVE_CUDA_IMAGE=1 runs it",
)


@pytest.fixture(scope="module")
def in_image(daemon):
    """Runs a program in a container of the image."""

    def run(*words, **options):
        return daemon.docker(
            "run", "--rm", "--network=none", "--read-only", "--cap-drop=ALL", images.EPSERVE_CUDA,
            *words, **options,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("program", images.PROGRAMS)
def test_program_starts_and_wants_no_library_of_the_toolkit(in_image, program):
    assert in_image(program, "--version").stdout.split()[0] == program
    needed = in_image("ldd", f"/usr/local/bin/{program}").stdout
    assert "libgrpc" in needed
    for word in ("not found", "libcu", "libnv", "libnccl"):
        assert word not in needed


def test_worker_has_the_cuda_backend(in_image):
    result = in_image(
        "epserve-worker", "--backend=cuda", "--checkpoint=/nowhere", "--worker-id=w", check=False
    )
    assert result.returncode == 1
    assert "is not in this build" not in result.stderr, result.stderr


def test_nccl_of_the_base_image_is_where_the_loader_looks_and_has_what_it_needs(in_image):
    assert "not found" not in in_image("ldd", "/usr/lib/x86_64-linux-gnu/libnccl.so.2").stdout
    assert "libnccl.so.2" in in_image("/sbin/ldconfig", "--print-cache").stdout
