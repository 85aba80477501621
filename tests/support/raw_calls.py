"""Calls written to a socket byte by byte, so that they can stop anywhere."""

import socket
import struct

from cluster import SLOWNESS

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, PING = 0, 1, 4, 6
END_STREAM, END_HEADERS, ACK = 1, 4, 1
FRONT_DOOR = "/inference.GRPCInferenceService/"


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(
        ">I", stream
    ) + payload  # fmt: skip


def literal(name, value):
    """A header field in HPACK, as it is: neither indexed nor compressed."""
    fields = (name.encode(), value.encode())
    return b"\0" + b"".join(bytes((len(field),)) + field for field in fields)


class HalfCall:
    """A call over a socket of our own: its headers, and the beginning of its message."""

    def __init__(self, port, method, message_bytes=1000, sent=b"\n" * 100):
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.settimeout(20 * SLOWNESS)
        headers = b"".join(
            literal(name, value)
            for name, value in {
                ":method": "POST", ":scheme": "http", ":path": method, ":authority": "x",
                "content-type": "application/grpc", "te": "trailers",
            }.items()
        )  # fmt: skip
        self.socket.sendall(
            PREFACE
            + frame(SETTINGS, 0, 0)
            + frame(HEADERS, END_HEADERS, 1, headers)
            + frame(DATA, 0, 1, b"\0" + struct.pack(">I", message_bytes) + sent)
        )

    def frames(self):
        """(kind, flags, stream, payload) of what comes."""
        with self.socket.makefile("rb") as incoming:
            while head := incoming.read(9):
                payload = incoming.read(int.from_bytes(head[:3], "big"))
                yield head[3], head[4], int.from_bytes(head[5:9], "big"), payload

    def wait_end(self):
        """The trailers, once the server has ended the call."""
        for kind, flags, stream, payload in self.frames():
            if stream == 1 and kind == HEADERS and flags & END_STREAM:
                return payload
        raise AssertionError("the connection ended without trailers")

    def wait_until_taken(self):
        """Returns once the server has answered a ping that was sent after the half message."""
        self.socket.sendall(frame(PING, 0, 0, b"8 bytes!"))
        for kind, flags, _, payload in self.frames():
            if kind == PING and flags & ACK:
                assert payload == b"8 bytes!"
                return
        raise AssertionError("the connection ended without an answer to a ping")

    def close(self):
        self.socket.close()
