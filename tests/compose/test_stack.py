"""The stack as it is meant to run: served, verified, confined, and stopped without a trace."""

import contextlib
import json
import os
import re

import numpy as np
import pytest

import protos
from checkpoints import relative_error
from cluster import BIN_DIR, ROOT, wait_until
from images import BASE, EPSERVE, PROGRAMS
from infer import infer, make_request, random_batch
from stack import WORKERS

USER = 10001


def test_image_says_whose_it_is_what_it_runs_and_how_it_is_asked_for_its_health(stack):
    image = json.loads(stack.daemon.docker("image", "inspect", EPSERVE).stdout)[0]["Config"]
    assert image["User"] == f"{USER}:{USER}"
    assert set(image["ExposedPorts"]) == {"8001/tcp", "8002/tcp"}
    assert image["Healthcheck"]["Test"] == ["CMD", "epserve", "health", "--service=liveness"]
    labels = image["Labels"]
    version = stack.run_client("epserve", "--version").stdout.split()[-1]
    assert labels["org.opencontainers.image.title"] == "epserve"
    assert labels["org.opencontainers.image.version"] == version


def test_image_adds_to_its_base_what_the_manual_says(stack):
    def megabytes(name):
        return json.loads(stack.daemon.docker("image", "inspect", name).stdout)[0]["Size"] / 1e6

    added = megabytes(EPSERVE) - megabytes(BASE)
    programs = sum((BIN_DIR / name).stat().st_size for name in PROGRAMS) / 1e6
    print(f"the image adds {added:.1f} MB, of which {programs:.1f} MB are programs")
    manual = (ROOT / "deploy" / "README.md").read_text()
    said = re.search(r"adds (\d+) MB to its base: (\d+) MB of Debian's libraries and (\d+)", manual)
    whole, libraries, stripped = map(int, said.groups())
    assert whole == libraries + stripped
    assert abs(added - programs - libraries) <= 2
    # Those under test have their symbols, and kernels where nvcc is.
    assert stripped < programs < 3 * stripped


@pytest.mark.parametrize("service", ["coordinator", "worker-2"])
def test_containers_are_confined(stack, service):
    config = stack.inspect(service)["HostConfig"]
    assert config["ReadonlyRootfs"]
    assert config["CapDrop"] == ["ALL"]
    assert "no-new-privileges:true" in config["SecurityOpt"]
    status = stack.compose("exec", "-T", service, "cat", "/proc/1/status").stdout
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split() == [str(USER)] * 4
    assert int(fields["CapEff"], 16) == 0
    written = stack.compose("exec", "-T", service, "touch", "/usr/local/bin/x", check=False)
    assert written.returncode != 0 and "Read-only file system" in written.stderr


@pytest.mark.parametrize("service", ["coordinator", "worker-1"])
def test_container_is_healthy_once_requests_are_served(stack, service):
    wait_until(
        lambda: stack.inspect(service)["State"]["Health"]["Status"] == "healthy",
        20,
        "the container is healthy",
    )


def test_answers_through_the_published_port_equal_the_reference(stack, served, rng):
    for dtype, tolerance in ((np.float32, 1e-5), (np.float16, 1e-2)):
        batch = random_batch(served.spec, rng, 200, dtype)
        assert relative_error(infer(stack, *batch), served.ffn(*batch)) <= tolerance


def test_verify_and_bench_pass_in_a_client_container(stack):
    result = stack.run_client("epserve", "verify", "--checkpoint=/checkpoint", "--json")
    assert json.loads(result.stdout), result.stdout
    result = stack.run_client("epserve", "bench", "--requests=200", "--concurrency=4", "--json")
    assert json.loads(result.stdout), result.stdout


def test_workers_of_different_containers_are_members_under_their_names(stack):
    workers = stack.status().workers
    assert sorted(worker.worker_id for worker in workers) == list(WORKERS)
    assert len({worker.node for worker in workers}) == len(WORKERS), "each in a container"


def test_rows_go_through_memory_that_every_container_maps(stack):
    # Where it could not be made or mapped, coordinator and workers say so and use messages.
    logs = "".join(stack.log(service) for service in ("coordinator", *WORKERS))
    assert '"event":"epoch_started"' in logs
    assert "row_arena" not in logs


def test_gpu_worker_in_a_container_without_a_gpu_ends_and_says_why(stack):
    result = stack.run_client(
        "epserve-worker", "--backend=cuda", "--checkpoint=/checkpoint", "--worker-id=gpu",
        check=False,
    )  # fmt: skip
    assert result.returncode == 1
    # The second: programs built where no nvcc was.
    reasons = ("need a GPU and its driver", "is not in this build")
    assert any(reason in result.stderr for reason in reasons), result.stderr


@contextlib.contextmanager
def region_of_another_container(stack, content):
    """A file in the containers' /dev/shm as one of them would make it; registered as "region"."""
    path = stack.shm_folder / "client-region"
    path.write_bytes(content)
    path.chmod(0o600)
    os.chown(path, USER, USER)
    inference = protos.inference
    try:
        stack.front_door.SystemSharedMemoryRegister(
            inference.SystemSharedMemoryRegisterRequest(
                name="region", key=f"/{path.name}", byte_size=len(content)
            ),
            timeout=5,
        )
        yield path
        stack.front_door.SystemSharedMemoryUnregister(
            inference.SystemSharedMemoryUnregisterRequest(name="region"), timeout=5
        )
    finally:
        path.unlink()


def test_region_made_in_another_container_is_read_and_written_in_place(stack, served, rng):
    hidden, ids, weights = random_batch(served.spec, rng, 16)
    request = make_request(served.name, hidden, ids, weights)
    request.raw_input_contents.pop(0)  # hidden_states, which is in the region.
    output = request.outputs.add(name="hidden_states")
    for tensor, offset in ((request.inputs[0], 0), (output, hidden.nbytes)):
        tensor.parameters["shared_memory_region"].string_param = "region"
        tensor.parameters["shared_memory_byte_size"].int64_param = hidden.nbytes
        tensor.parameters["shared_memory_offset"].int64_param = offset
    with region_of_another_container(stack, hidden.tobytes() + bytes(hidden.nbytes)) as path:
        stack.front_door.ModelInfer(request, timeout=10)
        written = path.read_bytes()
    assert written[: hidden.nbytes] == hidden.tobytes()
    got = np.frombuffer(written[hidden.nbytes :], hidden.dtype).reshape(hidden.shape)
    assert relative_error(got, served.ffn(hidden, ids, weights)) <= 1e-5
