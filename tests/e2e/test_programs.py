"""What every program does on --help, --version, wrong flags and a taken port."""

import json
import socket

import pytest

from cluster import run_program, unique_cluster_id, wait_until

PROGRAMS = ["epserve-coordinator", "epserve-worker", "epserve", "epserve-microbench"]
COMMANDS = ["up", "infer", "verify", "bench", "status", "health", "drain", "make-checkpoint"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_goes_to_stdout_with_exit_code_0(program):
    result = run_program(program, "--help")
    assert result.returncode == 0
    assert program in result.stdout
    assert "--version" in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_shows_its_flags_and_defaults(command):
    assert command in run_program("epserve", "--help").stdout
    result = run_program("epserve", command, "--help")
    assert result.returncode == 0
    assert "--" in result.stdout


@pytest.mark.parametrize("program", PROGRAMS)
def test_version_is_semantic_and_exits_with_0(program):
    result = run_program(program, "--version")
    assert result.returncode == 0
    number = result.stdout.split()[-1]
    assert len(number.split(".")) == 3, result.stdout


@pytest.mark.parametrize("program", PROGRAMS)
def test_unknown_flag_is_named_and_fails(program, tmp_path):
    required = {
        "epserve-coordinator": ["--checkpoint", tmp_path],
        "epserve-worker": ["--checkpoint", tmp_path],
        "epserve": ["status"],
        "epserve-microbench": ["alltoallv"],
    }
    result = run_program(program, *required[program], "--no-such-flag")
    assert result.returncode == 2
    assert result.stderr.startswith(f"{program}: ")
    assert "no-such-flag" in result.stderr


@pytest.mark.parametrize("program", ["epserve-coordinator", "epserve-worker"])
def test_unknown_flag_is_named_before_one_that_is_missing(program):
    result = run_program(program, "--chekpoint", "/nowhere")
    assert result.returncode == 2
    assert "--chekpoint" in result.stderr


@pytest.mark.parametrize("program", ["epserve-coordinator", "epserve-worker"])
@pytest.mark.parametrize("level", ["info", "error"])
def test_last_line_of_a_program_that_fails_is_json_where_logs_are(program, level, tmp_path):
    result = run_program(
        program, "--checkpoint", tmp_path / "nowhere", "--log-format=json", "--log-level", level
    )
    assert result.returncode == 1
    lines = [json.loads(line) for line in result.stderr.splitlines()]
    assert lines[-1]["event"] == "failed"
    assert lines[-1]["level"] == "ERROR"
    assert "nowhere" in lines[-1]["error"]


def test_bench_refuses_a_trace_that_it_could_not_write_before_it_calls_anybody(tmp_path):
    result = run_program(
        "epserve", "bench", "--server=127.0.0.1:1", "--trace", tmp_path / "nowhere" / "x"
    )
    assert result.returncode == 1
    assert "INVALID_ARGUMENT" in result.stderr
    assert "nowhere/x" in result.stderr


@pytest.mark.parametrize("program", ["epserve-coordinator", "epserve-worker"])
def test_missing_checkpoint_flag_is_named_and_fails(program):
    result = run_program(program)
    assert result.returncode > 0
    assert "--checkpoint" in result.stderr


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--workers", "0"),
        ("--workers", "four"),
        ("--queue-capacity", "-1"),
        ("--max-batch-tokens", "12x"),
        ("--trigger", "sometimes"),
        ("--count-exchange", "streams"),
        ("--log-format", "xml"),
        ("--listen", "nonsense"),
        ("--listen", "127.0.0.1:70000"),
        ("--lease-ms", ""),
    ],
)
def test_bad_value_of_a_coordinator_flag_is_named_and_fails(checkpoint, flag, value):
    served = checkpoint()
    result = run_program("epserve-coordinator", "--checkpoint", served.path, flag, value)
    assert result.returncode > 0
    assert flag in result.stderr


def test_listening_beyond_this_machine_needs_a_flag_of_its_own(checkpoint):
    served = checkpoint()
    result = run_program(
        "epserve-coordinator", "--checkpoint", served.path, "--listen", "0.0.0.0:0", timeout_s=10
    )
    assert result.returncode > 0
    assert "--insecure" in result.stderr


@pytest.mark.parametrize("flag", ["--listen", "--metrics-listen"])
def test_taken_port_is_named_and_fails(checkpoint, flag):
    served = checkpoint()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        addresses = {"--listen": "127.0.0.1:0", "--metrics-listen": "127.0.0.1:0"}
        addresses[flag] = f"127.0.0.1:{port}"
        result = run_program(
            "epserve-coordinator",
            *("--checkpoint", served.path),
            *("--cluster-id", unique_cluster_id()),
            *(word for pair in addresses.items() for word in pair),
            timeout_s=20,
        )
    assert result.returncode > 0
    assert str(port) in result.stderr


def test_of_two_addresses_the_taken_one_is_named(checkpoint):
    served = checkpoint()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = run_program(
            "epserve-coordinator",
            *("--checkpoint", served.path),
            *("--cluster-id", unique_cluster_id()),
            *("--listen", address),
            *("--listen", "127.0.0.1:0"),
            *("--metrics-listen", "off"),
            timeout_s=20,
        )
    assert result.returncode == 1
    assert f"address {address} cannot be bound" in result.stderr


def test_port_of_a_running_coordinator_is_not_shared(checkpoint, start_cluster):
    with start_cluster(checkpoint(), workers=1) as cluster:
        result = run_program(
            "epserve-coordinator",
            *("--checkpoint", cluster.checkpoint.path),
            *("--cluster-id", unique_cluster_id()),
            *("--listen", cluster.target),
            *("--metrics-listen", "off"),
            timeout_s=20,
        )
        assert result.returncode > 0
        assert str(cluster.port) in result.stderr
        assert cluster.is_ready()


def test_json_log_is_one_object_a_line_and_flags_come_from_the_environment(
    checkpoint, start_cluster, monkeypatch
):
    monkeypatch.setenv("EPSERVE_LOG_FORMAT", "json")
    monkeypatch.setenv("EPSERVE_QUEUE_CAPACITY", "17")
    with start_cluster(checkpoint(), workers=1) as cluster:
        assert cluster.status().queue_capacity == 17
        for program in (cluster.coordinator, cluster.workers[0]):
            lines = program.log().splitlines()
            assert lines
            assert all("event" in json.loads(line) for line in lines)


def test_bad_value_in_the_environment_fails(checkpoint, monkeypatch):
    monkeypatch.setenv("EPSERVE_QUEUE_CAPACITY", "many")
    served = checkpoint()
    result = run_program("epserve-coordinator", "--checkpoint", served.path, timeout_s=10)
    assert result.returncode > 0
    assert "many" in result.stderr


def test_front_door_listens_on_a_unix_socket(checkpoint, start_cluster, tmp_path):
    address = f"unix:{tmp_path}/door"
    arguments = ["--listen", address]
    with start_cluster(checkpoint(), workers=1, coordinator_args=arguments):
        result = run_program("epserve", "status", "--server", address)
        assert result.returncode == 0, result.stderr
        assert "w0" in result.stdout


def test_worker_waits_for_a_coordinator_that_comes_later(checkpoint, start_cluster):
    with start_cluster(checkpoint(), workers=1) as cluster:
        cluster.coordinator.kill()
        cluster.start_worker(1)
        wait_until(lambda: cluster.workers[1].log(), 5, "the worker has logged its start")
        assert cluster.workers[0].terminate() == 0
        cluster.start_coordinator()
        cluster.wait_ready()
        assert [worker.worker_id for worker in cluster.status().workers] == ["w1"]
