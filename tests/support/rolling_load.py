"""A service under half of the load that it can take, asked by two callers that differ in their
retries alone, while its parts are replaced one after another."""

import contextlib
import json
import subprocess

from cluster import SLOWNESS, program

TOKENS = 32


def start_bench(target, timeout_s, *flags):
    return subprocess.Popen(
        [
            *(program("epserve"), "bench", f"--server={target}", f"--tokens={TOKENS}"),
            *("--dtype=fp32", f"--timeout={timeout_s * SLOWNESS}", "--warmup=0"),
            *("--allow-errors", "--json"),
            *flags,
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def report(running, timeout_s):
    output, errors = running.communicate(timeout=timeout_s * SLOWNESS)
    assert running.returncode == 0, errors
    return json.loads(output)


def wait_answers(cluster, count):
    """Waits until `count` more requests have been answered with a result."""
    least = cluster.status().requests_ok + count
    cluster.wait_status(lambda s: s.requests_ok >= least, 20, f"{count} more answers")


@contextlib.contextmanager
def half_load(cluster, duration_s, attempts=50, timeout_s=20):
    """Yields the requests that each of the two callers begins in a second. At the end each has
    ended: those without retries with a result or a refusal, those with retries with a result.
    `attempts` and `timeout_s` are of a request, and last for far longer than an outage."""
    measured = start_bench(cluster.target, timeout_s, "--concurrency=4", "--duration=1")
    capacity = report(measured, 10 + timeout_s)
    assert capacity["succeeded"] == capacity["requests"], capacity
    rate = capacity["requests_per_second"] / 4
    load = (f"--rate={rate:.1f}", f"--duration={duration_s * SLOWNESS}")
    callers = [
        start_bench(cluster.target, timeout_s, *load, f"--attempts={each}")
        for each in (1, attempts)
    ]
    try:
        wait_answers(cluster, int(rate / 2))
        yield rate
        plain, retrying = (report(caller, duration_s + 2 * timeout_s) for caller in callers)
    finally:
        for caller in callers:
            caller.kill()
            caller.communicate()
    print(f"of {plain['requests']} without retries: {plain['errors']}")
    # What found the queue full, where this machine is slower than it was while its capacity was
    # measured, says RESOURCE_EXHAUSTED. Whatever does not end in time: DEADLINE_EXCEEDED.
    codes = {name.lower() for name in plain["errors"]}
    assert "unavailable" in codes, plain["errors"]
    assert codes <= {"unavailable", "resource_exhausted"}, plain["errors"]
    assert plain["succeeded"] > plain["requests"] / 4, plain
    assert retrying["errors"] == {} and retrying["succeeded"] == retrying["requests"], retrying
    assert retrying["requests"] > 0.9 * plain["requests"], "its load came as fast"
