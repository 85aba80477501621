"""Calls written to a socket byte by byte, so that they can stop anywhere."""

import select
import socket
import struct

from cluster import SLOWNESS

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RESET, SETTINGS, PING, GO_AWAY, WINDOW = 0, 1, 3, 4, 6, 7, 8
INITIAL_WINDOW = 4  # of SETTINGS
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


def headers_of(method):
    fields = {
        ":method": "POST", ":scheme": "http", ":path": method, ":authority": "x",
        "content-type": "application/grpc", "te": "trailers",
    }  # fmt: skip
    return b"".join(literal(name, value) for name, value in fields.items())


class HalfCall:
    """A call over a socket of our own: its headers, and the beginning of its message."""

    def __init__(self, port, method, message_bytes=1000, sent=b"\n" * 100):
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.settimeout(20 * SLOWNESS)
        headers = headers_of(method)
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


class FillingCall:
    """A call that sends its message as fast as it is let, and stops before the end of it."""

    def __init__(self, port, method, message_bytes):
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.settimeout(60 * SLOWNESS)  # much is to be read before
        opening = frame(SETTINGS, 0, 0) + frame(HEADERS, END_HEADERS, 1, headers_of(method))
        self.socket.sendall(PREFACE + opening)
        self.windows = {0: 65535, 1: 65535}
        self.initial_window = 65535
        self.head = b"\0" + struct.pack(">I", message_bytes)
        self.unread = b""
        self.sent = 0
        self.ended = False

    def fill(self, num_bytes):
        """Sends until so much is sent, or the server ends the call, or lets nothing more come."""
        while self.sent < num_bytes and not self.ended:
            size = min(*self.windows.values(), 16384, num_bytes - self.sent)
            writers = [self.socket] if size > 0 else []
            readable, writable, _ = select.select([self.socket], writers, [], 10 * SLOWNESS)
            if not readable and not writable:
                return
            try:
                if readable:
                    self._read()
                if writable and not self.ended:
                    data, self.head = self.head[:size], self.head[size:]
                    self.socket.sendall(frame(DATA, 0, 1, data + bytes(size - len(data))))
                    self.sent += size
                    for stream in self.windows:
                        self.windows[stream] -= size
            except ConnectionError:
                self.ended = True

    def has_ended(self):
        """Whether the server has ended the call, by what has come until now."""
        try:
            while not self.ended and select.select([self.socket], [], [], 0)[0]:
                self._read()
        except ConnectionError:
            self.ended = True
        return self.ended

    def _read(self):
        got = self.socket.recv(65536)
        self.ended = not got
        self.unread += got
        while len(self.unread) >= 9:
            size = int.from_bytes(self.unread[:3], "big")
            if len(self.unread) < 9 + size:
                return
            kind, flags = self.unread[3], self.unread[4]
            stream = int.from_bytes(self.unread[5:9], "big")
            self._take(kind, flags, stream, self.unread[9 : 9 + size])
            self.unread = self.unread[9 + size :]

    def _take(self, kind, flags, stream, payload):
        if kind == WINDOW:
            self.windows[stream] += int.from_bytes(payload, "big")
        elif kind == SETTINGS and not flags & ACK:
            for setting, value in struct.iter_unpack(">HI", payload):
                if setting == INITIAL_WINDOW:
                    self.windows[1] += value - self.initial_window
                    self.initial_window = value
            self.socket.sendall(frame(SETTINGS, ACK, 0))
        elif kind == PING and not flags & ACK:
            self.socket.sendall(frame(PING, ACK, 0, payload))
        elif kind in (RESET, GO_AWAY) or (kind == HEADERS and flags & END_STREAM):
            self.ended = True

    def close(self):
        self.socket.close()


class UnreadCall(FillingCall):
    """A call that sends its whole message, and takes of the answer what fits an HTTP/2 window of
    64 KiB until it is asked for the rest."""

    def __init__(self, port, method, message, *further):
        super().__init__(port, method, len(message))
        self.head += message
        for other in further:
            self.head += b"\0" + struct.pack(">I", len(other)) + other
        self.answer = b""
        self.trailers = b""
        self.fill(len(self.head))
        assert not self.head, "the server takes no more of the message"
        self.socket.sendall(frame(DATA, END_STREAM, 1))

    def wait_begun(self):
        """Returns once the window is full: the answer is on its way, and cannot go on."""
        while len(self.answer) < 65535:
            assert not self.ended, "the answer ended within the window"
            self._read()

    def read_answer(self):
        """The message that the server answers with."""
        for stream in (0, 1):
            self.socket.sendall(frame(WINDOW, 0, stream, struct.pack(">I", 1 << 30)))
        while not self.ended:
            self._read()
        (size,) = struct.unpack(">I", self.answer[1:5])
        assert self.answer[0] == 0 and len(self.answer) == 5 + size
        return self.answer[5:]

    def wait_end(self):
        """The trailers, once the server has ended the call, with the answer unread."""
        while not self.ended:
            self._read()
        return self.trailers

    def _take(self, kind, flags, stream, payload):
        super()._take(kind, flags, stream, payload)
        if kind == DATA and stream == 1:
            self.answer += payload
        if kind == HEADERS and flags & END_STREAM:
            self.trailers = payload
