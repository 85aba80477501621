"""The whole service on GPUs: up --backend=cuda, verify, bench, a worker killed under load.

Needs python3 and our own programs alone. Where there is no GPU it exits with 77, saying so, which
ctest takes for skipped:

    python3 tests/gpu/serve_on_gpu.py --bin-dir build/release/bin [--workers 2] [--checkpoint fp8]
"""

import argparse
import contextlib
import ctypes
import json
import os
import pathlib
import signal
import struct
import subprocess
import sys
import tempfile
import time

SKIPPED = 77
READY_S = 60
# The coordinator gives a silent worker up after a lease of 1 s; a killed one's stream ends at once.
AGAIN_READY_S = 30
CHECKPOINTS = {
    "bf16": ["--architecture=qwen3_moe", "--dtype=bf16"],
    "fp8": ["--architecture=deepseek_v3", "--dtype=fp8"],
}
MAX_ERROR = {"bf16": "1e-2", "fp8": "6e-2"}


def num_gpus():
    """GPUs that the driver shows this process."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def check(condition, what):
    if not condition:
        raise SystemExit(f"FAILED: {what}")
    print(f"ok: {what}", flush=True)


class Service:
    """One `epserve up`, its log in a file."""

    def __init__(self, options, directory, name):
        self.bin_dir = pathlib.Path(options.bin_dir)
        self.ready_file = directory / f"{name}.ready"
        self.log_dir = directory / f"{name}.logs"
        self.log_dir.mkdir()
        self.num_workers = options.workers
        self.process = subprocess.Popen(
            [
                self.bin_dir / "epserve", "up", f"--checkpoint={directory / 'model'}",
                f"--workers={options.workers}", f"--backend={options.backend}",
                "--listen=127.0.0.1:0",
                "--metrics-listen=off", f"--cluster-id=gpu-{os.getpid()}",
                f"--ready-file={self.ready_file}", f"--log-dir={self.log_dir}",
                f"--ready-timeout={READY_S}", *options.up_flag,
            ],
        )

    def facts(self):
        pairs = (line.split("=", 1) for line in self.ready_file.read_text().splitlines())
        return dict(pairs)

    def worker_pids(self):
        facts = self.facts()
        return [int(facts[f"worker_{i}_pid"]) for i in range(self.num_workers)]

    def wait_until_ready(self):
        deadline = time.monotonic() + READY_S + 10
        while not self.ready_file.exists():
            code = self.process.poll()
            if code is not None or time.monotonic() > deadline:
                raise SystemExit(f"FAILED: epserve up is not ready (exit code {code})")
            time.sleep(0.02)

    def run(self, command, *flags, timeout_s=120):
        """A command of ours against the service: exit code and what it printed."""
        done = subprocess.run(
            [self.bin_dir / "epserve", command, f"--server={self.facts()['grpc']}", *flags],
            stdout=subprocess.PIPE, text=True, timeout=timeout_s, check=False,
        )
        return done.returncode, done.stdout

    def start(self, command, *flags):
        return subprocess.Popen(
            [self.bin_dir / "epserve", command, f"--server={self.facts()['grpc']}", *flags],
            stdout=subprocess.PIPE, text=True,
        )

    def status(self):
        code, out = self.run("status", "--json")
        return json.loads(out) if code == 0 else None

    def wait_until_serving(self, after_epoch=0):
        """Seconds until the service serves, in an epoch after `after_epoch`."""
        started = time.monotonic()
        while True:
            state = self.status()
            waited = time.monotonic() - started
            if state and state["state"] == "serving" and state["epoch"] > after_epoch:
                return waited
            if waited > AGAIN_READY_S:
                raise SystemExit(f"FAILED: not serving after {waited:.1f} s: {state}")
            time.sleep(0.02)

    def log(self):
        return "".join(path.read_text() for path in sorted(self.log_dir.iterdir()))

    def show_logs(self):
        for path in sorted(self.log_dir.iterdir()):
            print(f"--- {path.name}\n{path.read_text()[-6000:]}", flush=True)

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


@contextlib.contextmanager
def serving(options, directory, name):
    service = Service(options, directory, name)
    try:
        service.wait_until_ready()
        yield service
    except BaseException:
        service.show_logs()
        raise
    finally:
        if service.process.poll() is None:
            service.stop()


def make_checkpoint(options, directory):
    subprocess.run(
        [
            pathlib.Path(options.bin_dir) / "epserve", "make-checkpoint",
            f"--output={directory / 'model'}", *CHECKPOINTS[options.checkpoint],
            f"--hidden={options.hidden}", f"--intermediate={options.intermediate}",
            f"--experts={options.experts}", f"--topk={options.topk}", "--layers=2",
        ],
        check=True, stdout=subprocess.DEVNULL,
    )


def verify(service, options, directory):
    code, out = service.run(
        "verify", f"--checkpoint={directory / 'model'}",
        f"--max-error={MAX_ERROR[options.checkpoint]}", "--tokens=48", "--json",
    )
    print(out.strip(), flush=True)
    check(code == 0, "verify: every batch is right in every type")


def bench(service, options):
    for tokens in options.bench_tokens:
        code, out = service.run("bench", f"--tokens={tokens}", "--requests=300", "--json")
        print(f"bench {tokens} tokens: {out.strip()}", flush=True)
        check(code == 0, f"bench: {tokens} tokens, no failures")


def kill_under_load(service):
    """Kills one worker in mid-batch: requests fail fast, the rest live on, and it serves again."""
    before = service.worker_pids()
    epoch = service.status()["epoch"]
    load = service.start(
        "bench", "--tokens=256", "--duration=8", "--concurrency=4", "--allow-errors", "--json"
    )
    time.sleep(2)
    victim = len(before) - 1
    os.kill(before[victim], signal.SIGKILL)
    took_s = service.wait_until_serving(after_epoch=epoch)
    print(f"serving again {took_s:.2f} s after the kill", flush=True)
    out, _ = load.communicate(timeout=60)
    print(f"load over the kill: {out.strip()}", flush=True)
    after = service.worker_pids()
    check(after[victim] != before[victim], "the killed worker has been started again")
    check(after[:victim] == before[:victim], "no other worker was restarted")
    for pid in after:
        os.kill(pid, 0)


def pause_worker(service):
    """A worker that is slow for a while, within its lease, costs time and no request."""
    load = service.start("bench", "--tokens=256", "--duration=2", "--concurrency=2", "--json")
    time.sleep(0.7)
    slow = service.worker_pids()[-1]
    os.kill(slow, signal.SIGSTOP)
    time.sleep(0.4)
    os.kill(slow, signal.SIGCONT)
    load.communicate(timeout=60)
    check(load.returncode == 0, "a peer that is slow for 0.4 s is not taken for dead")


def write_request(path, options):
    """An input file of `epserve infer`: one token of zeros for every expert in turn."""
    tokens = options.experts
    ids = [[(t + k) % options.experts for k in range(options.topk)] for t in range(tokens)]
    parts = [
        ("hidden_states", "BF16", [tokens, options.hidden], bytes(2 * tokens * options.hidden)),
        ("topk_ids", "I32", [tokens, options.topk],
         b"".join(struct.pack("<i", i) for row in ids for i in row)),
        ("topk_weights", "F32", [tokens, options.topk],
         struct.pack("<f", 0.5) * (tokens * options.topk)),
    ]
    header, at = {}, 0
    for name, dtype, shape, data in parts:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(part[3] for part in parts))


def silent_peer_is_named(options, directory):
    """Past --peer-timeout-ms the request fails, saying who waited for whom; then all is well."""
    options.up_flag += ["--peer-timeout-ms=300", "--lease-ms=4000"]
    if options.backend == "cuda":  # Counts over NVLink: the first that ranks wait for each other.
        options.up_flag.append("--count-exchange=device")
    write_request(directory / "request", options)
    with serving(options, directory, "impatient") as service:
        silent = service.worker_pids()[-1]
        os.kill(silent, signal.SIGSTOP)
        failed = subprocess.run(
            [service.bin_dir / "epserve", "infer", f"--server={service.facts()['grpc']}",
             f"--input={directory / 'request'}", f"--output={directory / 'answer'}"],
            stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )
        os.kill(silent, signal.SIGCONT)
        print(failed.stderr.strip(), flush=True)
        check(failed.returncode != 0, "a request whose worker is silent fails")
        wanted = "ms for rank" if options.backend == "cuda" else "rank"
        check(wanted in failed.stderr, "its error names the stage, the ranks and how long")
        service.wait_until_serving()
        verify(service, options, directory)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bin-dir", default="build/release/bin")
    parser.add_argument("--backend", choices=["cuda", "nccl", "host"], default="cuda",
                        help="host: try this script without a GPU")
    parser.add_argument("--workers", type=int, default=0, help="default: the GPUs, 2 at least")
    parser.add_argument("--checkpoint", choices=sorted(CHECKPOINTS), default="bf16")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--topk", type=int, default=4)
    parser.add_argument("--bench-tokens", type=int, nargs="*", default=[1, 128, 1024])
    parser.add_argument("--up-flag", action="append", default=[], help="handed to epserve up")
    options = parser.parse_args()
    gpus = num_gpus()
    least = {"host": 0, "cuda": 1, "nccl": 2}[options.backend]
    if gpus < least:
        print(f"skipped: --backend={options.backend} needs {least} GPUs, and there are {gpus}")
        return SKIPPED
    options.workers = options.workers or max(2, gpus)
    with tempfile.TemporaryDirectory(prefix="epserve-gpu-") as name:
        directory = pathlib.Path(name)
        make_checkpoint(options, directory)
        started = time.monotonic()
        with serving(options, directory, "first") as service:
            print(f"ready after {time.monotonic() - started:.2f} s", flush=True)
            if options.backend != "host":
                kind = "fd" if options.backend == "cuda" else "nccl"
                check(f"handle_type={kind}" in service.log(), "the log says which handles are used")
            verify(service, options, directory)
            bench(service, options)
            pause_worker(service)
            kill_under_load(service)
            verify(service, options, directory)
            check(service.stop() == 0, "epserve up stopped with 0")
        silent_peer_is_named(options, directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
