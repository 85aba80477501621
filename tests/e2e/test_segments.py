"""Shared memory: a serving cluster's segments have no names, and a crash's are reclaimed."""

import collections
import pathlib
import re

from checkpoints import relative_error
from cluster import SHM_DIR, segments, wait_until
from infer import infer, random_batch

LEASE_MS = 3000


def heaps(cluster_id):
    """The workers' segments alone: the coordinator's row arena carries no worker's rank."""
    return [name for name in segments(cluster_id) if re.search(r"-[01]-[0-9a-f]{16}$", name)]


def test_serving_cluster_has_no_named_segment(checkpoint, start_cluster):
    with start_cluster(checkpoint(), workers=3) as cluster:
        assert not segments(cluster.id)


def shared_bytes(cluster):
    """Bytes of all segments that the cluster's processes map, with a name or without."""
    sizes = {}
    for child in cluster.programs:
        own = collections.Counter()
        for line in pathlib.Path(f"/proc/{child.pid}/maps").read_text().splitlines():
            if f"/dev/shm/epserve-{cluster.id}" in line:
                span, _, _, _, inode, *_ = line.split()
                begin, end = (int(word, 16) for word in span.split("-"))
                own[inode] += end - begin
        for inode, size in own.items():
            sizes[inode] = max(size, sizes.get(inode, 0))
    return sum(sizes.values())


def test_shared_memory_stays_within_what_the_manual_reckons(checkpoint, start_cluster):
    """Also where a worker stands still, and with it all that it maps of the epoch before."""
    served, workers, slots, tokens = checkpoint(hidden=256), 2, 2, 1024
    arguments = ["--slots", slots, "--max-batch-tokens", tokens]
    with start_cluster(
        served, workers=workers, coordinator_args=arguments, worker_args=arguments
    ) as cluster:
        heap = int(re.search(r"heap_bytes=(\d+)", cluster.workers[0].log())[1])
        rows = (slots + 1) * tokens * served.spec.hidden * 8
        rule = 2 * workers * heap + rows
        serving = shared_bytes(cluster)
        assert 0.9 * workers * heap <= serving <= rule / 2 * 1.02
        cluster.start_worker(workers)
        cluster.wait_status(lambda s: len(s.workers) == workers + 1, 20, "a worker stands by")
        epoch = cluster.status().epoch
        cluster.workers[0].pause()
        try:
            cluster.wait_status(
                lambda s: s.state == "serving" and s.epoch > epoch, 20, "the standby has its place"
            )
            assert 0.95 * rule <= shared_bytes(cluster) <= 1.02 * rule
        finally:
            cluster.workers[0].resume()
        wait_until(
            lambda: shared_bytes(cluster) <= serving, 20, "it lets go of the epoch before"
        )


def test_segments_left_by_a_crash_are_reclaimed_at_the_next_start(
    checkpoint, start_cluster, rng
):
    served = checkpoint()
    arguments = ["--lease-ms", LEASE_MS, "--allow-client-shm"]
    with start_cluster(served, workers=2, coordinator_args=arguments, start=False) as cluster:
        cluster.start_coordinator()
        for index in range(2):
            cluster.start_worker(index)
        # A fresh coordinator whose workers write to clients' regions waits one lease. One worker
        # stops shortly before its end, so that the other has made its heap and waits for a peer
        # when both are killed.
        cluster.wait_status(
            lambda s: [w.state for w in s.workers].count("loaded") == 2
            and s.uptime_ms > LEASE_MS * 2 / 3,
            10,
            "both have loaded",
        )
        cluster.workers[1].pause()
        wait_until(lambda: heaps(cluster.id), 10, "a heap exists by name")
        cluster.workers[0].kill()
        cluster.workers[1].kill()
        assert heaps(cluster.id), "the crash left nothing to reclaim"

        # What another cluster or another program left is not this cluster's to remove.
        foreign = [
            SHM_DIR / f"epserve-{cluster.id}-other-1-0-0123456789abcdef",
            SHM_DIR / f"epserve-{cluster.id}-notes",
        ]
        for path in foreign:
            path.touch()
        try:
            cluster.start_worker(0)
            cluster.start_worker(1)
            cluster.wait_ready()
            left = {n for n in segments(cluster.id) if not n.endswith(".sock")}  # still served
            assert left == {path.name for path in foreign}
        finally:
            for path in foreign:
                path.unlink()
        batch = random_batch(served.spec, rng, 12)
        assert relative_error(infer(cluster, *batch), served.ffn(*batch)) <= 1e-5
