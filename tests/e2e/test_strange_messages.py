"""One message of a stranger, whatever is in it, costs the others nothing: no worker is lost for it,
nobody waits for it, and the coordinator grows by little more than its bytes."""

import pathlib

import grpc
import pytest

import protos
from infer import infer, random_batch
from raw_calls import FRONT_DOOR
from wire_bytes import field, varint

SIZE = 64 << 20
# Its bytes, what gRPC holds of them meanwhile, and the allocator's leavings.
MOST_GROWTH = 3 * SIZE


def tensor(content):
    return field(5, field(1, b"topk_ids") + field(2, b"INT64") + content)


MESSAGES = {
    "unknown empty fields": lambda: (varint(15 << 3 | 2) + b"\0") * (SIZE // 2),
    "unknown numbers": lambda: (varint(15 << 3) + b"\1") * (SIZE // 2),
    "unknown group": lambda: varint(15 << 3 | 3) + b"\x7a\0" * (SIZE // 2) + varint(15 << 3 | 4),
    "unknown fields of a tensor": lambda: field(5, b"\x7a\0" * (SIZE // 2)),
    "unknown fields of a parameter": lambda: field(4, field(2, b"\x7a\0" * (SIZE // 2))),
    "shape": lambda: tensor(field(3, b"\1" * SIZE)),
    "packed numbers": lambda: tensor(field(5, field(3, b"\1" * SIZE))),
    "numbers not packed": lambda: tensor(field(5, b"\x18\1" * (SIZE // 2))),
    "numbers that no tensor has": lambda: tensor(field(5, field(5, b"\1" * SIZE))),
    "floats": lambda: tensor(field(5, field(6, b"\1" * SIZE))),
    "name": lambda: field(1, b"m" * SIZE),
}


@pytest.fixture(scope="module")
def cluster(checkpoint, start_cluster):
    served = checkpoint(hidden=256, intermediate=32)
    with start_cluster(served, workers=2) as running:
        yield running


def peak_bytes(cluster):
    """The most memory that the coordinator has had since the last reset_peak."""
    status = pathlib.Path(f"/proc/{cluster.coordinator.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def reset_peak(cluster):
    pathlib.Path(f"/proc/{cluster.coordinator.pid}/clear_refs").write_text("5")


def send(cluster, method, message):
    with protos.insecure_channel(cluster.target) as channel:
        call = channel.unary_unary(method, lambda sent: sent, lambda got: got)
        with pytest.raises(grpc.RpcError) as caught:
            call(message, timeout=60)
    return caught.value


def check_harmless(cluster, rng, method, message):
    batch = random_batch(cluster.checkpoint.spec, rng, 3)
    infer(cluster, *batch)
    epoch = cluster.status().epoch
    reset_peak(cluster)
    before = peak_bytes(cluster)
    error = send(cluster, method, message)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
    assert "limit" in error.details() or "exceeds" in error.details() or "not a" in error.details()
    infer(cluster, *batch)
    assert cluster.status().epoch == epoch, "no worker was lost"
    assert peak_bytes(cluster) - before < MOST_GROWTH


@pytest.mark.parametrize("kind", MESSAGES)
def test_request_of_any_form_is_refused_at_little_cost(cluster, rng, kind):
    check_harmless(cluster, rng, FRONT_DOOR + "ModelInfer", MESSAGES[kind]())


@pytest.mark.parametrize(
    "method",
    [
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "/grpc.channelz.v1.Channelz/GetServers",
        "/epserve.v1.Admin/GetClusterStatus",
        "/epserve.v1.Admin/DrainWorker",
        "/epserve.v1.Control/Connect",
        FRONT_DOOR + "ServerLive",
        FRONT_DOOR + "ModelMetadata",
        FRONT_DOOR + "SystemSharedMemoryRegister",
    ],
)
def test_message_to_a_method_without_tensors_is_refused_unread(cluster, rng, method):
    check_harmless(cluster, rng, method, MESSAGES["unknown empty fields"]())
