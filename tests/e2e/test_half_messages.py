"""Callers who together send more of messages that they do not finish than gRPC may buffer: they are
ended, those that hold most first, and nobody else is."""

import pathlib
import threading

import pytest

from cluster import SLOWNESS, wait_until
from infer import Load, random_batch
from raw_calls import FRONT_DOOR, FillingCall

MIB = 1 << 20
FILLERS = 5
HALF_MIB = 200
REFUSED = 'epserve_refused_total{reason="half_messages"}'


def resident_mib(program):
    status = pathlib.Path(f"/proc/{program.pid}/status").read_text()
    (line,) = [each for each in status.splitlines() if each.startswith("VmRSS:")]
    return int(line.split()[1]) / 1024


@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer"])
def test_who_fills_the_buffers_is_ended_and_nobody_else(checkpoint, start_cluster, rng, method):
    served = checkpoint()
    # A machine that is busy with all these bytes must not lose its workers for that.
    patience = ["--lease-ms", 10_000]
    with start_cluster(served, workers=2, coordinator_args=patience) as cluster:
        batch = random_batch(served.spec, rng, 16)
        before, epoch = resident_mib(cluster.coordinator), cluster.status().epoch
        fillers = [
            FillingCall(cluster.port, FRONT_DOOR + method, 250 * MIB) for _ in range(FILLERS)
        ]
        threads = [
            threading.Thread(target=each.fill, args=(HALF_MIB * MIB,)) for each in fillers
        ]
        most = before
        try:
            with Load(cluster, batch, served.ffn(*batch), concurrency=2,
                      timeout_s=20 * SLOWNESS) as load:  # fmt: skip
                wait_until(lambda: load.count() > 10, 20, "others are served")
                for thread in threads:
                    thread.start()
                while any(thread.is_alive() for thread in threads):
                    most = max(most, resident_mib(cluster.coordinator))
                    threads[0].join(0.02)
                served_by_now = load.count()
                wait_until(lambda: load.count() > served_by_now + 10, 20, "others are served")
            ended = sum(each.has_ended() for each in fillers)
        finally:
            for each in fillers:
                each.close()
        # What is not ended holds less than three quarters of a GiB.
        sent = sum(each.sent for each in fillers if not each.ended)
        assert 0 < ended < FILLERS and sent < 800 * MIB, (ended, sent / MIB)
        assert {call[2] for call in load.calls} == {"OK"}
        assert cluster.metrics()[REFUSED] == ended
        assert cluster.status().epoch == epoch, "no worker's stream was ended"
        grown = most - before
        assert grown < 1000, f"the coordinator has grown by {grown:.0f} MiB"
        lines = [x for x in cluster.coordinator.log().splitlines() if "connection_ended" in x]
        assert len(lines) == 1 and "peer=ipv4:127.0.0.1:" in lines[0], lines
