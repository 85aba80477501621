"""Message classes and stubs of this repository's .proto files, made at run time.

They live in a descriptor pool of their own, because tritonclient brings generated classes with the
same names into the default pool.
"""

import pathlib
import tempfile
import types

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
import grpc
from grpc_tools import protoc

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = ("inference/grpc_service.proto", "epserve/v1/admin.proto", "epserve/v1/control.proto")


def _load():
    with tempfile.TemporaryDirectory(prefix="epserve-protos-") as scratch:
        out = pathlib.Path(scratch) / "descriptors.pb"
        args = ["protoc", f"-I{ROOT / 'proto'}", "--include_imports", f"--descriptor_set_out={out}"]
        if protoc.main(args + [str(ROOT / "proto" / file) for file in FILES]) != 0:
            raise RuntimeError("protos: protoc failed")
        files = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    return pool


_POOL = _load()


def _messages(package):
    names = types.SimpleNamespace()
    for path in FILES:
        file = _POOL.FindFileByName(path)
        if file.package == package:
            for name, descriptor in file.message_types_by_name.items():
                setattr(names, name, message_factory.GetMessageClass(descriptor))
    return names


inference = _messages("inference")
epserve = _messages("epserve.v1")


class Stub:
    """One attribute for each method of `service`, as generated stubs have them."""

    def __init__(self, channel, service):
        for method in _POOL.FindServiceByName(service).methods:
            make = {
                (False, False): channel.unary_unary,
                (False, True): channel.unary_stream,
                (True, False): channel.stream_unary,
                (True, True): channel.stream_stream,
            }[(method.client_streaming, method.server_streaming)]
            call = make(
                f"/{service}/{method.name}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=message_factory.GetMessageClass(
                    method.output_type
                ).FromString,
            )
            setattr(self, method.name, call)


def front_door(channel):
    return Stub(channel, "inference.GRPCInferenceService")


def admin(channel):
    return Stub(channel, "epserve.v1.Admin")


def insecure_channel(target):
    unlimited = [
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
        # Every cluster is a server of its own; never share a connection through the global pool.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.max_reconnect_backoff_ms", 200),
    ]
    return grpc.insecure_channel(target, options=unlimited)
