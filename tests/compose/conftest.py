"""Fixtures of the tests in containers: one daemon, its images and one stack for all of them."""

import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

import numpy as np
import pytest

import checkpoints
import images
from docker_daemon import Daemon, Folders, enter_network_of_its_own
from stack import WORKERS, Stack

CACHE = ROOT / "build" / "compose"
TOOLS = (
    "/usr/sbin/dockerd",
    "/usr/bin/docker",
    "/usr/bin/docker-compose",
    "/usr/sbin/debootstrap",
    "/usr/bin/prometheus",
)

_stacks = []


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A failed test shows the containers' logs."""
    report = (yield).get_result()
    if report.failed:
        for stack in _stacks:
            logs = stack.compose("logs", "--no-color", "--tail=40", check=False).stdout
            report.sections.append((f"stack {stack.project}", logs))


@pytest.fixture(scope="session")
def daemon():
    if os.geteuid() != 0:
        pytest.skip("a Docker daemon needs root; run as root, or with sudo")
    missing = [tool for tool in TOOLS if not pathlib.Path(tool).exists()]
    assert not missing, f"missing {missing}; run deploy/install-deps.sh --tests"
    folders = Folders(CACHE)
    try:
        # Building needs the machine's network, for Debian's packages; nothing after it does.
        builder = Daemon(folders)
        try:
            images.build(builder, CACHE)
            if os.environ.get("EPSERVE_CUDA_IMAGE") == "1":
                assert images.toolkit(), "EPSERVE_CUDA_IMAGE=1, but nvcc is not on PATH"
                images.build_from_source_with_cuda(builder, CACHE)
        finally:
            builder.stop()
        enter_network_of_its_own()
        running = Daemon(folders)
        try:
            yield running
            left = running.docker("ps", "--all", "--quiet").stdout.split()
        finally:
            running.stop()
    finally:
        folders.remove()
    assert not left, f"containers left: {left}"


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    spec = checkpoints.Spec(experts=8, topk=2)
    checkpoint = checkpoints.write(tmp_path_factory.mktemp("checkpoints") / "tiny", spec)
    # The containers' user is nobody's.
    for path in [checkpoint.path, *checkpoint.path.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    return checkpoint


@pytest.fixture(scope="session")
def stack(daemon, served):
    running = Stack(daemon, served)
    _stacks.append(running)
    try:
        running.up()
        yield running
    finally:
        running.down()
        _stacks.remove(running)


@pytest.fixture(autouse=True)
def whole(request):
    """Every test of the stack finds it whole and leaves it so: serving, by the same containers."""
    if "stack" not in request.fixturenames:
        yield
        return
    stack = request.getfixturevalue("stack")
    stack.wait_status(lambda s: s.state == "serving" and len(s.workers) == 4, 20, "all serve")
    yield
    stack.wait_status(lambda s: s.state == "serving" and len(s.workers) == 4, 20, "all serve")
    for service in ("coordinator", *WORKERS):
        assert stack.inspect(service)["RestartCount"] == 0, f"{service} was restarted by itself"


@pytest.fixture
def rng(request):
    """Fresh random numbers, the same at every run of one test."""
    return np.random.default_rng(list(request.node.nodeid.encode()))
