"""What stdin, stdout and stderr of the daemons may be without harm to the service."""

import contextlib
import os

from cluster import wait_until


def serve_and_drain(cluster):
    """Each program has more to log, and still they run, serve and drain."""
    cluster.workers[0].kill()
    wait_until(lambda: not cluster.is_ready(), 20, "the worker is missed")
    cluster.start_worker(0)
    cluster.wait_ready()
    assert cluster.workers[0].terminate() == 0
    assert cluster.coordinator.terminate() == 0


def test_daemons_whose_log_nobody_reads_any_more_serve_and_drain(checkpoint, start_cluster):
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.closing(os.fdopen(writer, "wb", buffering=0)) as stderr:
        with start_cluster(checkpoint(), workers=1, program_options={"stderr": stderr}) as cluster:
            serve_and_drain(cluster)


def test_daemons_whose_log_waits_for_its_reader_serve_and_drain(checkpoint, start_cluster):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writer, b"." * 4096):
            pass
    os.set_blocking(writer, True)
    with open(reader, "rb") as log, contextlib.closing(os.fdopen(writer, "wb", 0)) as stderr:
        with start_cluster(checkpoint(), workers=1, program_options={"stderr": stderr}) as cluster:
            serve_and_drain(cluster)
            # Who reads again gets what has waited.
            cluster.start_coordinator()
            stderr.close()
            while b"listening" not in (text := log.readline()):
                assert text, "the log has ended"


def test_daemons_without_standard_streams_give_their_numbers_to_dev_null(checkpoint, start_cluster):
    def close():
        os.close(0)
        os.close(2)

    with start_cluster(checkpoint(), workers=1, program_options={"preexec_fn": close}) as cluster:
        for program in (cluster.coordinator, cluster.workers[0]):
            for number in (0, 2):
                assert os.readlink(f"/proc/{program.pid}/fd/{number}") == "/dev/null"
        serve_and_drain(cluster)
