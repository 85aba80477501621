"""Large replies are sent from the memory that the workers wrote them to. It must stay as it is
until the caller has taken the reply, whatever comes meanwhile, and a caller that takes none keeps
nobody else waiting."""

import pathlib

import numpy as np
import pytest

import protos
from checkpoints import relative_error
from cluster import wait_until
from infer import BF16, TOLERANCE, infer, make_request, output_of, random_batch
from raw_calls import FRONT_DOOR, UnreadCall

TOKENS = 1200  # Of 1024 elements: more than the megabyte from which on outputs are not copied.


@pytest.fixture(scope="module")
def cluster(checkpoint, start_cluster):
    limit = ["--max-batch-tokens", TOKENS]
    served = checkpoint(hidden=1024, intermediate=32, num_moe_layers=1)
    with start_cluster(
        served, workers=2, coordinator_args=[*limit, "--lease-ms", 1000], worker_args=limit
    ) as running:
        yield running


class Held:
    """A reply that its caller does not take yet."""

    def __init__(self, cluster, rng, dtype):
        batch = random_batch(cluster.checkpoint.spec, rng, TOKENS, dtype)
        self.want = cluster.checkpoint.ffn(*batch)
        self.tolerance = TOLERANCE[np.dtype(dtype)]
        message = make_request(cluster.checkpoint.name, *batch).SerializeToString()
        port = int(cluster.target.rsplit(":", 1)[1])
        self.call = UnreadCall(port, FRONT_DOOR + "ModelInfer", message)
        self.call.wait_begun()

    def check(self):
        reply = protos.inference.ModelInferResponse.FromString(self.call.read_answer())
        self.call.close()
        assert relative_error(output_of(reply), self.want) <= self.tolerance


def check_others_are_served(cluster, rng, rounds=3):
    for _ in range(rounds):
        for dtype in (np.float32, BF16):
            batch = random_batch(cluster.checkpoint.spec, rng, TOKENS, dtype)
            error = relative_error(infer(cluster, *batch), cluster.checkpoint.ffn(*batch))
            assert error <= TOLERANCE[np.dtype(dtype)]


@pytest.mark.parametrize("dtypes", [[np.float32], [BF16], [BF16, np.float32, BF16, BF16]])
def test_reply_that_is_taken_late_is_what_it_was(cluster, rng, dtypes):
    held = [Held(cluster, rng, dtype) for dtype in dtypes]
    check_others_are_served(cluster, rng)
    for one in held:
        one.check()
    check_others_are_served(cluster, rng, 1)


def test_callers_that_vanish_keep_nobody_waiting(cluster, rng):
    for _ in range(5):
        for dtype in (np.float32, BF16):
            Held(cluster, rng, dtype).call.close()
    check_others_are_served(cluster, rng, 2)


def arenas(cluster):
    """How many epochs' memory the coordinator has mapped."""
    maps = pathlib.Path(f"/proc/{cluster.coordinator.pid}/maps").read_text().splitlines()
    return sum("/dev/shm/epserve" in line for line in maps)


def test_reply_outlives_the_epoch_that_it_is_of(cluster, rng):
    assert arenas(cluster) == 1
    held = Held(cluster, rng, np.float32)
    epoch = cluster.status().epoch
    cluster.workers[1].kill()
    cluster.start_worker(1)
    cluster.wait_status(
        lambda s: s.state == "serving" and s.epoch > epoch, 20, "a new epoch serves"
    )
    check_others_are_served(cluster, rng, 2)
    assert arenas(cluster) == 2
    held.check()
    wait_until(lambda: arenas(cluster) == 1, 10, "the old epoch's memory is given back")
    check_others_are_served(cluster, rng, 1)
