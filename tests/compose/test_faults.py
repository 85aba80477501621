"""What is killed, cut off, paused or replaced in containers costs no more than it must."""

import json
import time

import pytest

from checkpoints import relative_error
from cluster import SLOWNESS, wait_until
from infer import Load, infer, random_batch
from rolling_load import half_load, wait_answers
from stack import WORKERS

# A call that waits for longer than the longest failover here has hung.
HUNG_S = 15


@pytest.fixture
def load(stack, served, rng):
    """Requests without end; at the end of the test none may have hung or been answered wrong."""
    batch = random_batch(served.spec, rng, 32)
    with Load(stack, batch, served.ffn(*batch), timeout_s=HUNG_S * SLOWNESS) as running:
        wait_until(lambda: running.count() > 20, 20, "requests are served")
        running.expected = {"OK", "UNAVAILABLE"}
        yield running
        before = running.count()
        wait_until(lambda: running.count() > before + 20, 20, "requests are served at the end")
    wrong = [call for call in running.calls if call[2] not in running.expected]
    assert not wrong


def first_good_after(load, began):
    """Seconds from `began` to the end of the first good call that started after it."""

    def ended():
        times = [call[1] for call in load.calls if call[2] == "OK" and call[0] > began]
        return min(times, default=None)

    return wait_until(ended, 20, "a good answer") - began


def times_loaded(stack, service):
    return stack.log(service).count('"weights_loaded"')


def started_at(stack, *services):
    return [stack.inspect(service)["State"]["StartedAt"] for service in services]


def test_killed_worker_costs_unavailable_and_serves_within_3_s_of_its_start(stack, load):
    others = ("coordinator", "worker-0", "worker-1", "worker-3")
    since = started_at(stack, *others)
    epoch = stack.status().epoch
    stack.docker("kill", "worker-2", "--signal=KILL")
    assert stack.inspect("worker-2")["State"]["ExitCode"] == 137
    wait_until(lambda: load.count("UNAVAILABLE") >= 4, 5, "requests hear of it")
    stack.docker("start", "worker-2")
    took = first_good_after(load, time.monotonic())
    print(f"served {took:.2f} s after docker start returned")
    assert took <= 3 * SLOWNESS
    assert stack.status().epoch > epoch
    assert started_at(stack, *others) == since
    assert times_loaded(stack, "worker-0") == 1


def test_killed_coordinator_comes_back_to_workers_that_kept_their_weights(stack, load):
    workers = ("worker-0", "worker-1", "worker-3")
    loaded = [times_loaded(stack, worker) for worker in workers]
    epoch = stack.status().epoch
    stack.docker("kill", "coordinator", "--signal=KILL")
    wait_until(lambda: load.count("UNAVAILABLE") >= 4, 5, "requests hear of it")
    stack.docker("start", "coordinator")
    took = first_good_after(load, time.monotonic())
    print(f"served {took:.2f} s after docker start returned")
    assert took <= 3 * SLOWNESS
    assert stack.status().epoch > epoch
    assert [times_loaded(stack, worker) for worker in workers] == loaded


def test_stopped_coordinator_drains_and_exits_with_0(stack, load):
    stack.docker("stop", "coordinator", "--time=15")
    state = stack.inspect("coordinator")["State"]
    assert state["ExitCode"] == 0 and not state["Running"]
    stack.docker("start", "coordinator")
    first_good_after(load, time.monotonic())
    events = [json.loads(line)["event"] for line in stack.log("coordinator").splitlines()]
    assert "drained" in events
    # What it had taken it answered: others were refused, or found nobody to connect to, or the next
    # coordinator before its workers.
    reasons = {call[3] for call in load.calls if call[2] == "UNAVAILABLE"}
    refusals = ("draining", "shutting down", "failed to connect", "closed", "reset", "joined")
    assert all(any(word in reason for word in refusals) for reason in reasons), reasons


def test_stopped_worker_finishes_its_batches_and_exits_with_0(stack, load):
    stack.docker("stop", "worker-1", "--time=30")
    state = stack.inspect("worker-1")["State"]
    assert state["ExitCode"] == 0 and not state["Running"]
    stack.docker("start", "worker-1")
    first_good_after(load, time.monotonic())


def test_paused_worker_is_fenced_and_readmitted(stack, load):
    epoch = stack.status().epoch
    stack.docker("pause", "worker-1")
    try:
        stack.wait_status(
            lambda s: "worker-1" not in [w.worker_id for w in s.workers], 10, "it is given up"
        )
    finally:
        stack.docker("unpause", "worker-1")
    took = first_good_after(load, time.monotonic())
    print(f"served {took:.2f} s after docker unpause returned")
    assert stack.status().epoch > epoch
    assert times_loaded(stack, "worker-1") >= 1


def test_worker_cut_off_from_the_network_is_fenced_and_readmitted(stack, load):
    epoch = stack.status().epoch
    loaded = times_loaded(stack, "worker-3")
    with stack.cut_off("worker-3"):
        stack.wait_status(
            lambda s: "worker-3" not in [w.worker_id for w in s.workers], 10, "it is given up"
        )
        assert stack.inspect("worker-3")["State"]["Running"]
    took = first_good_after(load, time.monotonic())
    print(f"served {took:.2f} s after docker network connect returned")
    assert stack.status().epoch > epoch
    assert times_loaded(stack, "worker-3") == loaded, "it kept its weights"


def test_rolling_restart_of_all_workers_under_half_of_the_load_is_hidden_by_retries(
    stack, served, rng
):
    # Docker takes its time to start a container where cores are short.
    with half_load(stack, duration_s=30, attempts=400, timeout_s=60) as rate:
        for worker in WORKERS:
            epoch = stack.status().epoch
            stack.docker("restart", worker, "--time=40")
            assert stack.inspect(worker)["State"]["Running"]
            stack.wait_status(
                lambda s, epoch=epoch: s.state == "serving" and s.epoch > epoch,
                20,
                f"{worker} serves again",
            )
            wait_answers(stack, int(rate / 2))
    batch = random_batch(served.spec, rng, 64)
    assert relative_error(infer(stack, *batch), served.ffn(*batch)) <= 1e-5


@pytest.mark.parametrize("service", ["worker-0", "coordinator"])
def test_container_made_anew_finds_the_memory_of_the_others(stack, served, rng, service):
    before = stack.inspect(service)["Id"]
    stack.compose("up", "-d", "--no-deps", "--force-recreate", service)
    assert stack.inspect(service)["Id"] != before
    stack.wait_ready(20)
    stack.wait_status(lambda s: len(s.workers) == 4, 20, "all are members")
    batch = random_batch(served.spec, rng, 64)
    assert relative_error(infer(stack, *batch), served.ffn(*batch)) <= 1e-5
    assert "row_arena" not in stack.log(service)
