"""A client with tensors in GPU memory, of libcudart and gRPC alone: no generated code."""

import contextlib
import ctypes
import itertools
import os

import grpc

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
        """inputs: [(name, datatype, shape, bytes or Place)]. The output's bytes, b"" in a place."""
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
