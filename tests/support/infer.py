"""Requests to the front door, built field by field, so that a test can get any of them wrong."""

import threading
import time

import grpc
import ml_dtypes
import numpy as np

import protos

DATATYPES = {
    np.dtype(np.float32): "FP32",
    np.dtype(np.float16): "FP16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float64): "FP64",
    np.dtype(np.int32): "INT32",
    np.dtype(np.int64): "INT64",
}
NUMPY_TYPES = {name: dtype for dtype, name in DATATYPES.items()}
BF16 = np.dtype(ml_dtypes.bfloat16)
# What a request in each type may differ from the fp64 reference, relative L2.
TOLERANCE = {np.dtype(np.float32): 1e-5, np.dtype(np.float16): 1e-2, BF16: 1e-2}


def add_input(request, name, array, raw=True):
    tensor = request.inputs.add(
        name=name, datatype=DATATYPES[array.dtype], shape=list(array.shape)
    )
    if raw:
        request.raw_input_contents.append(array.tobytes())
    elif array.dtype == np.float32:
        tensor.contents.fp32_contents.extend(array.ravel().tolist())
    elif array.dtype == np.int32:
        tensor.contents.int_contents.extend(array.ravel().tolist())
    else:
        tensor.contents.int64_contents.extend(array.ravel().tolist())
    return tensor


def make_request(model, hidden, ids=None, weights=None, layer=None, raw=True, request_id=""):
    request = protos.inference.ModelInferRequest(model_name=model, id=request_id)
    if layer is not None:
        request.parameters["layer"].int64_param = layer
    add_input(request, "hidden_states", hidden, raw)
    if ids is not None:
        add_input(request, "topk_ids", ids, raw)
    if weights is not None:
        add_input(request, "topk_weights", weights, raw)
    return request


def output_of(response):
    """The one output tensor as an array."""
    assert [tensor.name for tensor in response.outputs] == ["hidden_states"]
    assert len(response.raw_output_contents) == 1
    tensor = response.outputs[0]
    flat = np.frombuffer(response.raw_output_contents[0], NUMPY_TYPES[tensor.datatype])
    return flat.reshape(list(tensor.shape))


def infer(cluster, hidden, ids=None, weights=None, layer=None, timeout_s=30, **options):
    """Sends one request to the cluster's model and returns its output."""
    request = make_request(cluster.checkpoint.name, hidden, ids, weights, layer, **options)
    return output_of(cluster.front_door.ModelInfer(request, timeout=timeout_s))


def random_batch(spec, rng, num_tokens, dtype=np.float32, topk=None, id_type=np.int32):
    """hidden, ids (distinct within a row where E allows it), weights."""
    topk = spec.topk if topk is None else topk
    hidden = rng.standard_normal((num_tokens, spec.hidden)).astype(dtype)
    order = np.argsort(rng.random((num_tokens, max(spec.experts, topk))), axis=1)
    ids = (order[:, :topk] % spec.experts).astype(id_type)
    weights = rng.uniform(0.05, 1.0, (num_tokens, topk)).astype(np.float32)
    return hidden, ids, weights


class Load:
    """Threads that send the same kind of request one after another until stopped. Every answer is
    compared with the reference; the outcome of each call is kept."""

    def __init__(self, cluster, batch, want, concurrency=4, timeout_s=20):
        self._cluster = cluster
        self._batch = batch
        self._want = want
        self._timeout_s = timeout_s
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.calls = []  # (started, ended, grpc code or "OK" or "WRONG", details)
        self._threads = [threading.Thread(target=self._run) for _ in range(concurrency)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def count(self, outcome="OK"):
        with self._lock:
            return sum(call[2] == outcome for call in self.calls)

    def _run(self):
        channel = protos.insecure_channel(self._cluster.target)
        stub = protos.front_door(channel)
        request = make_request(self._cluster.checkpoint.name, *self._batch)
        while not self._stop.is_set():
            started = time.monotonic()
            try:
                got = output_of(stub.ModelInfer(request, timeout=self._timeout_s))
                difference = np.linalg.norm(got.astype(np.float64) - self._want)
                right = difference <= 1e-5 * np.linalg.norm(self._want)
                outcome, details = ("OK", "") if right else ("WRONG", f"off by {difference}")
            except grpc.RpcError as error:
                outcome, details = error.code().name, error.details()
                self._stop.wait(0.02)
            with self._lock:
                self.calls.append((started, time.monotonic(), outcome, details))
        channel.close()
