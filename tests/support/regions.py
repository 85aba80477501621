"""System shared memory of a client, and requests whose tensors lie in it."""

import itertools
import os
import pathlib

import numpy as np

import protos
from infer import DATATYPES

_numbers = itertools.count(1)


class Region:
    """A shared-memory object, registered under `name` with a cluster. A context manager: leaving
    it unregisters it and removes the object."""

    def __init__(self, cluster, byte_size, name=None, key=None, offset=0, prefix="e2e-"):
        self.cluster = cluster
        self.name = name or f"region{next(_numbers)}"
        self.owns_object = key is None
        self.key = key or f"{prefix}{os.getpid()}-{self.name}"
        self.path = pathlib.Path("/dev/shm", self.key)
        if self.owns_object:
            self.path.write_bytes(bytes(byte_size))
        cluster.front_door.SystemSharedMemoryRegister(
            protos.inference.SystemSharedMemoryRegisterRequest(
                name=self.name, key=f"/{self.key}", offset=offset, byte_size=byte_size
            ),
            timeout=10,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.unregister()
        finally:
            if self.owns_object:
                self.path.unlink()

    def unregister(self, timeout_s=20):
        """Returns once nobody uses it any more."""
        self.unregister_later().result(timeout_s)

    def unregister_later(self):
        return self.cluster.front_door.SystemSharedMemoryUnregister.future(
            protos.inference.SystemSharedMemoryUnregisterRequest(name=self.name), timeout=30
        )

    def is_listed(self):
        regions = self.cluster.front_door.SystemSharedMemoryStatus(
            protos.inference.SystemSharedMemoryStatusRequest(), timeout=10
        ).regions
        return self.name in regions

    def write(self, offset, array):
        with open(self.path, "r+b") as file:
            file.seek(offset)
            file.write(np.ascontiguousarray(array).tobytes())

    def read(self, offset, dtype, shape):
        with open(self.path, "rb") as file:
            file.seek(offset)
            count = int(np.prod(shape))
            return np.frombuffer(file.read(count * np.dtype(dtype).itemsize), dtype).reshape(shape)

    def truncate(self, byte_size):
        os.truncate(self.path, byte_size)


def set_window(parameters, region, byte_size, offset):
    parameters["shared_memory_region"].string_param = region.name
    parameters["shared_memory_byte_size"].int64_param = byte_size
    parameters["shared_memory_offset"].int64_param = offset


def region_request(model, batch, source=None, target=None, request_id=""):
    """A request whose hidden states lie in source = (region, offset), where given, and whose output
    goes to target = (region, offset). Ids and weights are inline. Writes the hidden states."""
    request = protos.inference.ModelInferRequest(model_name=model, id=request_id)
    for name, array in zip(("hidden_states", "topk_ids", "topk_weights"), batch):
        tensor = request.inputs.add(
            name=name, datatype=DATATYPES[array.dtype], shape=list(array.shape)
        )
        if name == "hidden_states" and source is not None:
            region, offset = source
            region.write(offset, array)
            set_window(tensor.parameters, region, array.nbytes, offset)
        else:
            request.raw_input_contents.append(array.tobytes())
    output = request.outputs.add(name="hidden_states")
    if target is not None:
        region, offset = target
        set_window(output.parameters, region, batch[0].nbytes, offset)
    return request


def open_descriptors(pid, region):
    """How many descriptors of the process are of the region's object."""
    count = 0
    for link in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        try:
            count += os.readlink(link).startswith(str(region.path))
        except OSError:
            pass  # It was closed meanwhile.
    return count
