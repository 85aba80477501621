"""Calls written to a socket byte by byte, so that they can stop anywhere."""

import socket
import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 4, 6, 8
END_HEADERS, ACK = 4, 1
METHODS = "/inference.GRPCInferenceService/"


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(
        ">I", stream
    ) + payload  # fmt: skip


def header(name, value):
    """HPACK: a literal that is neither indexed nor compressed; both shorter than 127 bytes."""
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


class HalfCall:
    """A connection with one call whose message is announced whole and sent in part."""

    def __init__(self, port, message_bytes, sent, method="ModelInfer"):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        headers = b"".join(
            header(*pair)
            for pair in (
                (":method", "POST"),
                (":scheme", "http"),
                (":path", METHODS + method),
                (":authority", "localhost"),
                ("content-type", "application/grpc"),
                ("te", "trailers"),
            )
        )
        start = b"\0" + struct.pack(">I", message_bytes) + sent
        self.socket.sendall(
            PREFACE
            + frame(SETTINGS, 0, 0)
            + frame(HEADERS, END_HEADERS, 1, headers)
            + frame(DATA, 0, 1, start)
        )

    def wait_until_taken(self):
        """Returns once the server has answered a ping that was sent after the half message."""
        self.socket.sendall(frame(PING, 0, 0, b"8 bytes!"))
        while True:
            head = self._receive(9)
            payload = self._receive(int.from_bytes(head[:3], "big"))
            if head[3] == PING and head[4] & ACK:
                assert payload == b"8 bytes!"
                return

    def _receive(self, count):
        received = b""
        while len(received) < count:
            part = self.socket.recv(count - len(received))
            assert part, "the server closed the connection"
            received += part
        return received

    def close(self):
        self.socket.close()
