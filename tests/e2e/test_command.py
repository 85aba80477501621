"""The epserve command: each of its subcommands, against what Python computes on its own."""

import json
import signal

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import checkpoints
from checkpoints import relative_error
from cluster import (
    Program,
    processes_mentioning,
    run_program,
    segments,
    unique_cluster_id,
    wait_until,
)
from infer import TOLERANCE, random_batch


@pytest.fixture(scope="module")
def cluster(checkpoint, start_cluster):
    with start_cluster(checkpoint(experts=10, topk=3), workers=2) as running:
        yield running


# ---- make-checkpoint


@pytest.mark.parametrize(
    "layout, dtype",
    [
        ("mixtral", "fp32"),
        ("mixtral", "bf16"),
        ("qwen3_moe", "fp16"),
        ("deepseek_v3", "bf16"),
        ("deepseek_v3", "fp8"),
    ],
)
def test_made_checkpoint_opens_in_safetensors_and_serves_verified(
    tmp_path, start_cluster, layout, dtype
):
    directory = tmp_path / f"made-{layout}-{dtype}"
    result = run_program(
        "epserve", "make-checkpoint", "--output", directory, "--architecture", layout,
        "--dtype", dtype, "--hidden", 128, "--intermediate", 160, "--experts", 8, "--topk", 2,
        "--layers", 2,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] == layout
    shapes = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}
    experts = [name for name in shapes if ".experts.7." in name and "scale" not in name]
    assert len(experts) == 3 * 2
    assert {tuple(shapes[name]) for name in experts} == {(160, 128), (128, 160)}
    assert any("scale_inv" in name for name in shapes) == (dtype == "fp8")
    served = checkpoints.Checkpoint(directory, checkpoints.Spec(), {})
    with start_cluster(served, workers=2) as cluster:
        result = run_program(
            "epserve", "verify", "--server", cluster.target, "--checkpoint", directory
        )
        assert result.returncode == 0, result.stdout + result.stderr


def test_making_a_checkpoint_over_an_existing_one_is_refused(checkpoint):
    directory = checkpoint().path
    before = (directory / "config.json").read_text()
    result = run_program("epserve", "make-checkpoint", "--output", directory)
    assert result.returncode > 0
    assert directory.name in result.stderr
    assert (directory / "config.json").read_text() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_make_checkpoint_leaves_nothing(tmp_path, number):
    directory = tmp_path / "new" / "checkpoint"
    program = Program(
        tmp_path / "make.log", "epserve", "make-checkpoint", "--output", directory,
        "--layers", 64, "--hidden", 2048, "--intermediate", 2048, "--shards", 300,
    )  # fmt: skip
    try:
        wait_until(
            lambda: list(directory.glob("model-00002-*.partial-*")), 30, "the second shard"
        )
        program.send(number)
        assert program.wait(10) == -number
    finally:
        if program.alive():
            program.kill()
    assert not (tmp_path / "new").exists()


# ---- infer


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_infer_answers_a_safetensors_file_with_a_safetensors_file(cluster, rng, tmp_path, dtype):
    served = cluster.checkpoint
    hidden, ids, weights = random_batch(served.spec, rng, 9, dtype)
    tensors = {"hidden_states": hidden, "topk_ids": ids, "topk_weights": weights}
    save_file(tensors, tmp_path / "in.safetensors")
    result = run_program(
        "epserve", "infer", "--server", cluster.target, "--layer", 1,
        "--input", tmp_path / "in.safetensors", "--output", tmp_path / "out.safetensors",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    got = load_file(tmp_path / "out.safetensors")["hidden_states"]
    assert got.dtype == dtype
    assert relative_error(got, served.ffn(hidden, ids, weights, 1)) <= TOLERANCE[dtype]


def test_infer_without_ids_lets_the_service_route(cluster, rng, tmp_path):
    served = cluster.checkpoint
    hidden = served.tokens_away_from_ties(rng, 9)
    save_file({"hidden_states": hidden}, tmp_path / "in.safetensors")
    result = run_program(
        "epserve", "infer", "--server", cluster.target,
        "--input", tmp_path / "in.safetensors", "--output", tmp_path / "out.safetensors",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    got = load_file(tmp_path / "out.safetensors")["hidden_states"]
    assert relative_error(got, served.served(hidden)) <= 1e-5


def test_infer_of_a_wrong_batch_fails_with_the_services_message(cluster, rng, tmp_path):
    hidden, ids, weights = random_batch(cluster.checkpoint.spec, rng, 4)
    ids[2, 1] = 99
    tensors = {"hidden_states": hidden, "topk_ids": ids, "topk_weights": weights}
    save_file(tensors, tmp_path / "in.safetensors")
    result = run_program(
        "epserve", "infer", "--server", cluster.target,
        "--input", tmp_path / "in.safetensors", "--output", tmp_path / "out.safetensors",
    )  # fmt: skip
    assert result.returncode > 0
    assert "99" in result.stderr
    assert not (tmp_path / "out.safetensors").exists()


def test_infer_of_a_file_that_is_not_there_names_it(cluster, tmp_path):
    result = run_program(
        "epserve", "infer", "--server", cluster.target,
        "--input", tmp_path / "nowhere.safetensors", "--output", tmp_path / "out.safetensors",
    )  # fmt: skip
    assert result.returncode > 0
    assert "nowhere.safetensors" in result.stderr


# ---- verify


def test_verify_of_a_right_service_passes_and_prints_the_error(cluster):
    result = run_program(
        "epserve", "verify", "--server", cluster.target, "--checkpoint", cluster.checkpoint.path
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "error" in result.stdout


def test_verify_against_another_checkpoint_fails(cluster, checkpoint):
    other = checkpoint(experts=10, topk=3, seed=99)
    result = run_program(
        "epserve", "verify", "--server", cluster.target, "--checkpoint", other.path,
        "--model", cluster.checkpoint.name,
    )  # fmt: skip
    assert result.returncode > 0
    assert "error" in (result.stdout + result.stderr)


# ---- bench


def test_bench_in_a_closed_loop_prints_one_json_object(cluster):
    result = run_program(
        "epserve", "bench", "--server", cluster.target, "--tokens", 16, "--concurrency", 3,
        "--requests", 60, "--warmup", 5, "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert (figures["requests"], figures["succeeded"], figures["errors"]) == (60, 60, {})
    assert 0 < figures["request_us"]["p50"] <= figures["request_us"]["p99"]


def test_bench_over_streams_answers_every_request(cluster):
    result = run_program(
        "epserve", "bench", "--server", cluster.target, "--tokens", 8, "--concurrency", 2,
        "--streaming", "--requests", 60, "--warmup", 5, "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert (figures["streaming"], figures["succeeded"]) == (True, 60)


@pytest.mark.parametrize("routing", ["given", "server"])
def test_bench_trace_shows_requests_and_every_workers_phases_on_one_clock(
    cluster, tmp_path, routing
):
    path = tmp_path / "trace.json"
    result = run_program(
        "epserve", "bench", "--server", cluster.target, "--tokens", 16, "--concurrency", 2,
        "--requests", 30, "--warmup", 3, "--routing", routing, "--trace", path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    slices = [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"]
    requests = {e["name"]: e for e in slices if e["pid"] == 1}
    assert len(requests) == 30
    phases = [e for e in slices if e["pid"] == 2]
    ranks = range(cluster.num_workers)
    for name, request in requests.items():
        own = [e for e in phases if e["args"]["request"] == name]
        assert {e["tid"] for e in own if e["name"] == "experts"} == set(ranks)
        # Within the request, but for what the clients' clock reading is late by.
        for phase in own:
            assert phase["ts"] >= request["ts"] - 1000
            assert phase["ts"] + phase["dur"] <= request["ts"] + request["dur"] + 1000
        exchange = "device" if routing == "server" else "coordinator"
        assert request["args"]["count_exchange"] == exchange
        assert request["args"]["epserve_counts_us"] >= 0
        assert any(e["name"] == "counts" for e in own) == (routing == "server")


def test_bench_in_an_open_loop_keeps_its_rate(cluster):
    result = run_program(
        "epserve", "bench", "--server", cluster.target, "--tokens", 4, "--rate", 100,
        "--requests", 100, "--warmup", 0, "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["succeeded"] == 100
    assert 0.7 <= figures["seconds"] <= 3


def test_bench_without_json_prints_a_table(cluster):
    result = run_program(
        "epserve", "bench", "--server", cluster.target, "--tokens", 4, "--requests", 20
    )
    assert result.returncode == 0, result.stderr
    assert "p50" in result.stdout and "p99" in result.stdout


def test_bench_without_a_service_fails():
    result = run_program("epserve", "bench", "--server", "127.0.0.1:1", "--requests", 2)
    assert result.returncode > 0
    assert "127.0.0.1:1" in result.stderr


# ---- health


@pytest.mark.parametrize("service", ["liveness", "readiness"])
def test_health_of_a_ready_service_exits_with_0(cluster, service):
    result = run_program("epserve", "health", "--server", cluster.target, "--service", service)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{service}: serving\n"


def test_health_without_workers_is_live_and_not_ready(checkpoint, start_cluster):
    with start_cluster(checkpoint(experts=10, topk=3), workers=2, start=False) as cluster:
        cluster.start_coordinator()
        live = run_program("epserve", "health", "--server", cluster.target, "--service=liveness")
        assert live.returncode == 0, live.stderr
        ready = run_program("epserve", "health", "--server", cluster.target)
        assert ready.returncode == 1
        assert "UNAVAILABLE" in ready.stderr and "'readiness' is NOT_SERVING" in ready.stderr


def test_health_without_a_service_fails():
    result = run_program("epserve", "health", "--server", "127.0.0.1:1", "--timeout", 2)
    assert result.returncode == 1
    assert "127.0.0.1:1" in result.stderr


# ---- status


def test_status_prints_a_table_of_workers_epoch_and_queue(cluster):
    result = run_program("epserve", "status", "--server", cluster.target)
    assert result.returncode == 0, result.stderr
    for word in ("w0", "w1", str(cluster.status().epoch), "serving", cluster.checkpoint.name):
        assert word in result.stdout


def test_status_without_a_service_fails():
    result = run_program("epserve", "status", "--server", "127.0.0.1:1")
    assert result.returncode > 0
    assert "127.0.0.1:1" in result.stderr


def test_status_watch_repeats_until_interrupted(cluster, tmp_path):
    watch = Program(
        tmp_path / "watch.log", "epserve", "status", "--server", cluster.target, "--watch=0.1",
    )  # fmt: skip
    try:
        wait_until(lambda: watch.output().count("w1") >= 3, 10, "the table came three times")
        watch.send(signal.SIGINT)
        watch.wait(5)
    finally:
        if watch.alive():
            watch.kill()


# ---- up


class Up:
    """`epserve up` with two workers on free ports."""

    def __init__(self, directory, checkpoint, *args):
        self.cluster_id = unique_cluster_id()
        self.ready_file = directory / "ready"
        self.program = Program(
            directory / "up.log", "epserve", "up",
            "--checkpoint", checkpoint.path, "--workers", 2, "--cluster-id", self.cluster_id,
            "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0",
            "--ready-file", self.ready_file, *args,
        )  # fmt: skip

    def wait_ready(self):
        """Returns what the ready file says."""

        def ready():
            assert self.program.alive(), self.program.log()
            return self.ready_file.exists()

        wait_until(ready, 20, "epserve up serves")
        lines = self.ready_file.read_text().splitlines()
        self.ready = dict(line.split("=", 1) for line in lines)
        return self.ready

    @property
    def target(self):
        return self.ready["grpc"]

    def assert_nothing_left(self):
        wait_until(lambda: not processes_mentioning(self.cluster_id), 5, "every process ended")
        assert not segments(self.cluster_id)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.program.alive():
            self.program.terminate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_serves_until_told_to_stop_and_leaves_nothing(checkpoint, tmp_path, number):
    served = checkpoint()
    with Up(tmp_path, served) as up:
        up.wait_ready()
        assert len(processes_mentioning(up.cluster_id)) == 4
        verify = run_program(
            "epserve", "verify", "--server", up.target, "--checkpoint", served.path
        )
        assert verify.returncode == 0, verify.stdout + verify.stderr
        bench = run_program(
            "epserve", "bench", "--server", up.target, "--tokens", 8, "--requests", 50, "--json"
        )
        assert bench.returncode == 0, bench.stderr
        up.program.send(number)
        assert up.program.wait() == 0, up.program.log()
        up.assert_nothing_left()


def test_up_killed_outright_takes_its_children_with_it(checkpoint, tmp_path):
    with Up(tmp_path, checkpoint()) as up:
        up.wait_ready()
        up.program.kill()
        up.assert_nothing_left()


def test_up_on_a_damaged_checkpoint_fails_and_leaves_nothing(tmp_path):
    broken = checkpoints.write(tmp_path / "broken", checkpoints.Spec())
    (broken.path / "model.safetensors").write_bytes(b"\0" * 64)
    with Up(tmp_path, broken) as up:
        assert up.program.wait(20) > 0
        assert "model.safetensors" in up.program.log()
        up.assert_nothing_left()


# ---- microbench


def test_microbench_prints_one_json_object_with_its_figures():
    result = run_program(
        "epserve-microbench", "alltoallv", "--backend=host", "--ranks=4", "--tokens=128",
        "--hidden=256", "--topk=8", "--experts=64", "--dtype=bf16", "--json", timeout_s=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    for name in (
        "dispatch_us_p50",
        "dispatch_us_p99",
        "combine_us_p50",
        "combine_us_p99",
        "remote_bytes_per_rank",
        "copy_limit_us",
    ):
        assert figures[name] > 0, name
    # Each of 4 ranks sends its 128 tokens to about 3 * (1 - (3/4)^8) = 2.7 others, 512 B a row.
    expected = 128 * 3 * (1 - 0.75**8) * 512
    assert np.isclose(figures["remote_bytes_per_rank"], expected, rtol=0.25)
