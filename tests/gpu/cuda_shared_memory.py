"""CUDA shared memory against a whole service on GPUs: tensors in a client's GPU memory, in every
mix with inline ones, give the same bits; bad uses fail alone; clients and workers may die.

Needs python3 with grpcio and numpy, libcudart, and our own programs. Where there is no GPU it exits
with 77, saying so, which ctest takes for skipped:

    python3 tests/gpu/cuda_shared_memory.py --bin-dir build/release/bin [--workers 2]
"""

import argparse
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time

import grpc
import numpy as np

from cuda_client import Client, Cuda, Place, Region
from serve_on_gpu import SKIPPED, check, make_checkpoint, num_gpus, serving

TOPK = 4
MIB = 1 << 20


# ---- batches


def to_bf16(values):
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


class Batch:
    def __init__(self, options, tokens, datatype="BF16", seed=1):
        random = np.random.default_rng(seed)
        rows = random.standard_normal((tokens, options.hidden), dtype=np.float32)
        if datatype != "FP32":
            rows = to_bf16(rows) if datatype == "BF16" else rows.astype(np.float16)
        self.ids = np.stack([random.permutation(options.experts)[:TOPK] for _ in range(tokens)])
        self.ids = self.ids.astype(np.int32).reshape(tokens, TOPK)
        weights = random.random((tokens, TOPK), dtype=np.float32)
        self.tensors = [
            ("hidden_states", datatype, [tokens, options.hidden], rows.tobytes()),
            ("topk_ids", "INT32", [tokens, TOPK], self.ids.tobytes()),
            ("topk_weights", "FP32", [tokens, TOPK], weights.tobytes()),
        ]
        self.output_bytes = len(self.tensors[0][3])

    def wide(self):
        """The same, with ids of 64 bits."""
        name, _, shape, _ = self.tensors[1]
        self.tensors[1] = (name, "INT64", shape, self.ids.astype(np.int64).tobytes())
        return self

    def placed(self, region, which, start=0, step=256):
        """The inputs with those named in `which` in the region from `start` on, and the end."""
        inputs, at = [], start
        for name, datatype, shape, data in self.tensors:
            if name in which:
                data, at = region.put(at, data), at + (len(data) + step - 1) // step * step
            inputs.append((name, datatype, shape, data))
        return inputs, at


ALL = ("hidden_states", "topk_ids", "topk_weights")
MIXES = [ALL, ALL[:1], ALL[1:2], ALL[2:], ALL[1:], ()]


def same_bits(options, model, cuda, client):
    for device in range(num_gpus()):
        with Region(cuda, client, 8 * MIB, device) as region:
            for datatype in ("BF16", "FP32", "FP16"):
                for tokens in (1, 3, 48):
                    batch = Batch(options, tokens, datatype, seed=tokens)
                    expected = client.infer(model, batch.tensors)
                    for which in MIXES:
                        inputs, at = batch.placed(region, which)
                        place = region.put(at, b"\xff" * batch.output_bytes)
                        assert client.infer(model, inputs, place) == b""
                        assert region.get(at, batch.output_bytes) == expected, (which, datatype)
                        assert client.infer(model, inputs) == expected, (which, datatype)
        check(True, f"GPU {device}: every mix of places and types gives the bits of inline tensors")
    with Region(cuda, client, 8 * MIB) as region:
        batch = Batch(options, 37).wide()
        expected = client.infer(model, batch.tensors)
        for start in (2, 4, 8, 24):
            inputs, at = batch.placed(region, ALL, start, step=2)
            place = region.put(at + 2, bytes(batch.output_bytes))
            client.infer(model, inputs, place)
            assert region.get(at + 2, batch.output_bytes) == expected, start
        check(True, "unaligned tensors and ids of 64 bits give the same")
        inputs, _ = batch.placed(region, ("hidden_states",))
        client.infer(model, inputs, Place(region.name, 0, batch.output_bytes))
        got = region.get(0, batch.output_bytes)
        check(got == expected, "the output may take the input's place")
        routed = client.infer(model, batch.tensors[:1])
        inputs, _ = batch.placed(region, ("hidden_states",))
        check(client.infer(model, inputs[:1]) == routed, "the service routes rows in CUDA memory")


def refused(call, code, *texts):
    try:
        call()
    except grpc.RpcError as error:
        assert error.code() == getattr(grpc.StatusCode, code), error
        assert all(text in error.details() for text in texts), error.details()
        print(f"ok: {code}: {error.details()}", flush=True)
        return
    raise SystemExit(f"FAILED: expected {code} with {texts}")


def bad_uses(options, model, cuda, client):
    batch = Batch(options, 20)
    with Region(cuda, client, 4 * MIB) as region:
        for handle, device, byte_size, code, text in (
            (region.handle[:63], 0, 64, "INVALID_ARGUMENT", "63"),
            (region.handle, 0, 0, "INVALID_ARGUMENT", "byte_size 0"),
            (region.handle, 0, 4 * MIB + 4096, "INVALID_ARGUMENT", "exceeds"),
            (bytes(64), 0, 64, "FAILED_PRECONDITION", "rank 0"),
            (region.handle, 99, 64, "FAILED_PRECONDITION", "device_id 99"),
        ):
            refused(lambda: client.register("bad", handle, device, byte_size), code, text)
        refused(lambda: client.register(region.name, region.handle, 0, 64), "ALREADY_EXISTS")
        check(client.listed() == {region.name}, "what was refused is not registered")
        client.register("again", region.handle, 0, 64)
        client.unregister("again")
        inputs, at = batch.placed(region, ALL)
        unknown = Place("nobody", 0, batch.output_bytes)
        refused(lambda: client.infer(model, inputs, unknown), "NOT_FOUND", "nobody")
        beyond = Place(region.name, 4 * MIB - 16, batch.output_bytes)
        refused(lambda: client.infer(model, inputs, beyond), "INVALID_ARGUMENT")
        shifted = Place(region.name, 2 * options.hidden, batch.output_bytes)
        refused(lambda: client.infer(model, inputs, shifted), "INVALID_ARGUMENT", "overlaps")
        expected = client.infer(model, batch.tensors)
        for row, bad in ((0, -2), (19, options.experts), (7, 1 << 30)):
            ids = batch.ids.copy()
            ids[row, 2] = bad
            place = region.put(at, ids.tobytes())
            wrong = [inputs[0], (*inputs[1][:3], place), inputs[2]]
            refused(lambda: client.infer(model, wrong), "INVALID_ARGUMENT",
                    f"topk_ids[{row},2] is {bad}")
        weights = np.full((20, TOPK), 0.5, np.float32)
        weights[11, 1] = np.nan
        place = region.put(at, weights.tobytes())
        wrong = [inputs[0], batch.tensors[1], (*inputs[2][:3], place)]
        refused(lambda: client.infer(model, wrong), "INVALID_ARGUMENT", "topk_weights[11,1]")
        check(client.infer(model, inputs) == expected, "the next request is none the worse")
    refused(lambda: client.infer(model, inputs), "NOT_FOUND")


def in_parallel(count, work):
    failures = []

    def run(index):
        try:
            work(index)
        except BaseException as error:  # noqa: BLE001: it is raised again below
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    return threads, failures


def join(threads, failures):
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def many_at_once(options, model, cuda, client):
    """Callers with all, some and none of their tensors on a GPU, one of them with bad ids."""
    with Region(cuda, client, 32 * MIB) as region:
        batches = [Batch(options, 5 + i, seed=100 + i) for i in range(6)]
        expected = [client.infer(model, batch.tensors) for batch in batches]
        requests = []
        for i, batch in enumerate(batches):
            inputs, at = batch.placed(region, MIXES[i], i * 4 * MIB)
            requests.append((inputs, Place(region.name, at, batch.output_bytes)))
        bad = Batch(options, 9)
        bad.tensors[1] = (*bad.tensors[1][:3], np.full((9, TOPK), 12345, np.int32).tobytes())
        bad_inputs, _ = bad.placed(region, ALL, 28 * MIB)

        def work(index):
            for _ in range(50):
                if index == len(requests):
                    try:
                        client.infer(model, bad_inputs)
                    except grpc.RpcError as error:
                        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
                        continue
                    raise AssertionError("bad ids were taken")
                inputs, output = requests[index]
                client.infer(model, inputs, output)

        join(*in_parallel(len(requests) + 1, work))
        for (_, output), wanted in zip(requests, expected):
            assert region.get(output.offset, output.byte_size) == wanted
    check(True, "many callers at once, one with bad ids: each gets what is its own")


def unregister_in_use(options, model, cuda, client, service):
    epoch = service.status()["epoch"]
    batch = Batch(options, 64)
    region = Region(cuda, client, 8 * MIB)
    inputs, at = batch.placed(region, ALL)
    output = Place(region.name, at, batch.output_bytes)
    ended = []

    def work(_):
        while True:
            try:
                client.infer(model, inputs, output)
                ended.append("OK")
            except grpc.RpcError as error:
                ended.append(error.code().name)
                return

    threads, failures = in_parallel(4, work)
    time.sleep(0.3)
    started = time.monotonic()
    region.client.unregister(region.name)
    took_ms = 1000 * (time.monotonic() - started)
    cuda.use(0)
    cuda.free(region.address)
    join(threads, failures)
    check(ended.count("NOT_FOUND") == 4 and set(ended) == {"OK", "NOT_FOUND"},
          f"unregistered in use in {took_ms:.1f} ms, after {ended.count('OK')} requests")
    check(service.status()["epoch"] == epoch, "and no worker was lost over it")


def nothing_is_left(cuda, client):
    cuda.use(0)
    before = cuda.free_bytes()
    for _ in range(4):
        with Region(cuda, client, 1 << 30):
            pass
    lost = before - cuda.free_bytes()
    check(lost < 64 * MIB, f"four regions of 1 GiB came and went, and {lost >> 20} MiB are missing")


def be_killed(options):
    """The child of killed_client: requests without end, from memory of its own."""
    cuda, client = Cuda(), Client(options.service)
    batch = Batch(options, 256)
    region = Region(cuda, client, 64 * MIB)
    inputs, at = batch.placed(region, ALL)
    client.infer("model", inputs, Place(region.name, at, batch.output_bytes))
    print(region.name, flush=True)
    while True:
        client.infer("model", inputs, Place(region.name, at, batch.output_bytes))


def killed_client(options, model, client, service):
    epoch = service.status()["epoch"]
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], f"--be-killed={client.target}"],
            stdout=subprocess.PIPE, text=True)
        name = child.stdout.readline().strip()
        time.sleep(0.1)
        child.send_signal(signal.SIGKILL)
        child.wait()
        check(name in client.listed(), "a client is killed in mid-request")
        client.unregister(name)
        assert len(client.infer(model, Batch(options, 8).tensors)) > 0
    check(service.status()["epoch"] == epoch, "the service goes on as if nothing had happened")


def killed_worker(options, model, cuda, client, service):
    batch = Batch(options, 30)
    with Region(cuda, client, 4 * MIB) as region:
        inputs, at = batch.placed(region, ALL)
        expected = client.infer(model, inputs)
        epoch = service.status()["epoch"]
        os.kill(service.worker_pids()[-1], signal.SIGKILL)
        service.wait_until_serving(after_epoch=epoch)
        check(client.infer(model, inputs) == expected,
              "a worker that is started again has the regions from before")


class Target:
    """A service by its address alone."""

    def __init__(self, address):
        self.address = address

    def facts(self):
        return {"grpc": self.address}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bin-dir", default="build/release/bin")
    parser.add_argument("--backend", choices=["cuda", "nccl"], default="cuda")
    parser.add_argument("--workers", type=int, default=0, help="default: the GPUs, 2 at least")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=256)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--be-killed", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.topk, options.checkpoint = TOPK, "bf16"
    gpus = num_gpus()
    if gpus < (2 if options.backend == "nccl" else 1):
        print(f"skipped: --backend={options.backend} needs GPUs, and there are {gpus}")
        return SKIPPED
    options.workers = options.workers or max(2, gpus)
    options.up_flag = ["--allow-client-shm", "--model-name=model"]
    if options.be_killed:
        options.service = Target(options.be_killed)
        return be_killed(options)
    with tempfile.TemporaryDirectory(prefix="epserve-gpu-") as name:
        directory = pathlib.Path(name)
        make_checkpoint(options, directory)
        with serving(options, directory, "shared") as service:
            cuda, client, model = Cuda(), Client(service), "model"
            same_bits(options, model, cuda, client)
            bad_uses(options, model, cuda, client)
            many_at_once(options, model, cuda, client)
            unregister_in_use(options, model, cuda, client, service)
            nothing_is_left(cuda, client)
            killed_client(options, model, client, service)
            killed_worker(options, model, cuda, client, service)
            check(not client.listed(), "every region is unregistered")
            check(service.stop() == 0, "epserve up stopped with 0")
    return 0


if __name__ == "__main__":
    sys.exit(main())
