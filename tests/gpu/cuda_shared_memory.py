"""CUDA shared memory against a whole service on GPUs: tensors in a client's GPU memory, in every mix
with inline ones, give the same bits; bad uses fail alone; clients and workers may die.

Needs python3 with grpcio and numpy, libcudart, and our own programs. Where there is no GPU it exits
with 77, saying so, which ctest takes for skipped:

    python3 tests/gpu/cuda_shared_memory.py --bin-dir build/release/bin [--workers 2]
"""

import argparse
import contextlib
import ctypes
import itertools
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

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from serve_on_gpu import SKIPPED, check, make_checkpoint, num_gpus, serving  # noqa: E402

TOPK = 4
MIB = 1 << 20
_names = itertools.count(1)


# ---- memory of a GPU


class Cuda:
    """What is needed of libcudart."""

    def __init__(self):
        for name in ("libcudart.so", "libcudart.so.13", "libcudart.so.12"):
            with contextlib.suppress(OSError):
                self.lib = ctypes.CDLL(name)
                return
        raise SystemExit("FAILED: libcudart is not on LD_LIBRARY_PATH")

    def call(self, function, *arguments):
        code = getattr(self.lib, function)(*arguments)
        if code != 0:
            raise RuntimeError(f"{function} failed with {code}")

    def use(self, device):
        self.call("cudaSetDevice", ctypes.c_int(device))

    def malloc(self, byte_size):
        pointer = ctypes.c_void_p()
        self.call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(byte_size))
        return pointer.value

    def free(self, address):
        self.call("cudaFree", ctypes.c_void_p(address))

    def handle(self, address):
        handle = (ctypes.c_char * 64)()
        self.call("cudaIpcGetMemHandle", ctypes.byref(handle), ctypes.c_void_p(address))
        return bytes(handle)

    def copy_in(self, address, data):
        self.call("cudaMemcpy", ctypes.c_void_p(address), ctypes.c_char_p(data),
                  ctypes.c_size_t(len(data)), ctypes.c_int(1))
        self.call("cudaDeviceSynchronize")

    def copy_out(self, address, byte_size):
        buffer = ctypes.create_string_buffer(byte_size)
        self.call("cudaMemcpy", buffer, ctypes.c_void_p(address), ctypes.c_size_t(byte_size),
                  ctypes.c_int(2))
        return buffer.raw

    def free_bytes(self):
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value


# ---- the few messages of the protocol, without generated code


def varint(value):
    out = bytearray()
    value &= (1 << 64) - 1
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def fields(data):
    at = 0

    def read_varint():
        nonlocal at
        shift = value = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = read_varint()
        if key & 7 == 0:
            yield key >> 3, read_varint()
        else:
            size = read_varint()
            yield key >> 3, data[at:at + size]
            at += size


class Place:
    """Bytes of a region."""

    def __init__(self, region, offset, byte_size):
        self.region, self.offset, self.byte_size = region, offset, byte_size

    def parameters(self, number):
        values = (("shared_memory_region", field(3, self.region)),
                  ("shared_memory_offset", field(2, self.offset)),
                  ("shared_memory_byte_size", field(2, self.byte_size)))
        return b"".join(field(number, field(1, key) + field(2, value)) for key, value in values)


class Client:
    def __init__(self, service):
        self.target = service.facts()["grpc"]
        self.channel = grpc.insecure_channel(
            self.target, options=[("grpc.max_receive_message_length", -1)])

    def call(self, method, message, timeout=30):
        stub = self.channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
        return stub(message, timeout=timeout)

    def register(self, name, handle, device, byte_size):
        self.call("CudaSharedMemoryRegister",
                  field(1, name) + field(2, handle) + field(3, device) + field(4, byte_size))

    def unregister(self, name):
        self.call("CudaSharedMemoryUnregister", field(1, name))

    def listed(self):
        reply = self.call("CudaSharedMemoryStatus", b"")
        return {dict(fields(entry))[1].decode() for _, entry in fields(reply)}

    def infer(self, model, inputs, output=None, timeout=30):
        """inputs: [(name, datatype, shape, bytes or Place)]. The output's bytes, b"" in a region."""
        message, raw = field(1, model), b""
        for name, datatype, shape, content in inputs:
            tensor = field(1, name) + field(2, datatype)
            tensor += b"".join(field(3, size) for size in shape)
            if isinstance(content, Place):
                tensor += content.parameters(4)
            else:
                raw += field(7, content)
            message += field(5, tensor)
        wanted = field(1, "hidden_states")
        if output is not None:
            wanted += output.parameters(2)
        reply = self.call("ModelInfer", message + field(6, wanted) + raw, timeout)
        return next(value for number, value in fields(reply) if number == 6)


class Region:
    """Memory of a GPU, registered. A context manager: leaving it unregisters and frees."""

    def __init__(self, cuda, client, byte_size, device=0):
        self.cuda, self.client, self.device = cuda, client, device
        self.byte_size = byte_size
        self.name = f"region-{os.getpid()}-{next(_names)}"
        cuda.use(device)
        self.address = cuda.malloc(byte_size)
        self.handle = cuda.handle(self.address)
        client.register(self.name, self.handle, device, byte_size)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.unregister(self.name)
        self.cuda.use(self.device)
        self.cuda.free(self.address)

    def put(self, offset, data):
        self.cuda.use(self.device)
        self.cuda.copy_in(self.address + offset, data)
        return Place(self.name, offset, len(data))

    def get(self, offset, byte_size):
        self.cuda.use(self.device)
        return self.cuda.copy_out(self.address + offset, byte_size)


# ---- batches


def to_bf16(values):
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


class Batch:
    def __init__(self, options, tokens, datatype="BF16", seed=1):
        random = np.random.default_rng(seed)
        rows = random.standard_normal((tokens, options.hidden), dtype=np.float32)
        rows = {"BF16": to_bf16, "FP16": lambda v: v.astype(np.float16)}.get(datatype, np.copy)(rows)
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
MIXES = [ALL, ("hidden_states",), ("topk_ids",), ("topk_weights",), ("topk_ids", "topk_weights"), ()]


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
        check(region.get(0, batch.output_bytes) == expected, "the output may take the input's place")
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
        refused(lambda: client.register("short", region.handle[:63], 0, 64), "INVALID_ARGUMENT", "63")
        refused(lambda: client.register("empty", region.handle, 0, 0), "INVALID_ARGUMENT")
        refused(lambda: client.register("long", region.handle, 0, 4 * MIB + 4096),
                "INVALID_ARGUMENT", "exceeds", "rank")
        refused(lambda: client.register("stale", bytes(64), 0, 64), "FAILED_PRECONDITION", "rank 0")
        refused(lambda: client.register("far", region.handle, 99, 64), "FAILED_PRECONDITION", "99")
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
