"""Every worker is restarted, one after another, while requests come in at half of what is served
without that: none hangs, none is answered wrong, and a client that retries sees no failure."""

from checkpoints import relative_error
from infer import infer, random_batch
from rolling_load import TOKENS, half_load, wait_answers

WORKERS = 4


def restart(cluster, index):
    """SIGTERM, and another process in its place; returns once that one serves."""
    epoch = cluster.status().epoch
    assert cluster.workers[index].terminate() == 0
    pid = cluster.start_worker(index).pid
    cluster.wait_status(
        lambda s: s.state == "serving" and s.epoch > epoch and pid in [w.pid for w in s.workers],
        10,
        f"the new worker {index} serves",
    )


def test_rolling_restart_under_half_of_the_load_is_hidden_by_retries(
    checkpoint, start_cluster, rng
):
    served = checkpoint(experts=12, topk=3)
    with start_cluster(served, workers=WORKERS) as cluster:
        with half_load(cluster, duration_s=10) as rate:
            for index in range(WORKERS):
                restart(cluster, index)
                wait_answers(cluster, int(rate / 2))
        batch = random_batch(served.spec, rng, TOKENS)
        assert relative_error(infer(cluster, *batch), served.ffn(*batch)) <= 1e-5
