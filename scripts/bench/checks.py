"""Checks as Envoy sends them, and a client that sends many of them: gRPC over HTTP/2 with prior knowledge, no library."""

import socket
import struct

PATH = "/envoy.service.auth.v3.Authorization/Check"
PROMPT = "Why is the sky blue? Answer in one sentence. " * 7
BODY = '{"messages":[{"role":"user","content":"%s"}],"model":"gpt-4o-mini"}' % PROMPT


def number(value):
    """A varint of Protocol Buffers."""
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)


def field(tag, value):
    """A field that has a length."""
    value = value.encode() if isinstance(value, str) else value
    return number(tag << 3 | 2) + number(len(value)) + value


def check(key, source="10.1.2.3"):
    """About what Envoy sends for a chat completion, framed as a message of gRPC: a kilobyte, whose model is held against
    a list."""
    headers = {
        ":authority": "llm.example.com",
        ":method": "POST",
        ":path": "/v1/chat/completions",
        ":scheme": "https",
        "authorization": f"Bearer {key}",
        "accept": "application/json",
        "content-type": "application/json",
        "content-length": str(len(BODY)),
        "x-envoy-auth-partial-body": "false",
        "user-agent": "OpenAI/Python 2.8.1",
        "x-forwarded-proto": "https",
        "x-request-id": "6f1f2f6e-5d2a-4e0b-9d1c-2b1a0c9d8e7f",
        "x-stainless-lang": "python",
    }
    http = field(1, "5577006791947779410") + field(2, "POST")
    http += b"".join(field(3, field(1, name) + field(2, value)) for name, value in headers.items())
    http += field(4, "/v1/chat/completions") + field(5, "llm.example.com") + field(6, "https")
    http += field(10, "HTTP/1.1") + field(12, BODY)
    peer = lambda address: field(1, field(1, field(2, address)))
    attributes = field(1, peer(source)) + field(2, peer("10.1.2.4")) + field(4, field(2, http))
    message = field(1, attributes)
    return b"\0" + struct.pack(">I", len(message)) + message


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


DATA, HEADERS, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
LARGEST = 0x7FFFFFFF


class Client:
    """One connection."""

    def __init__(self, address):
        self.socket = socket.create_connection(address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.unread = b""
        self.stream = 1
        self.waiting = 0
        fields = [(":method", "POST"), (":scheme", "http"), (":path", PATH), (":authority", "keyward")]
        fields += [("content-type", "application/grpc"), ("te", "trailers")]
        text = lambda value: bytes([len(value)]) + value.encode()
        self.head = b"".join(b"\0" + text(name) + text(value) for name, value in fields)
        settings = struct.pack(">HI", 4, LARGEST)
        hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, settings)
        self.socket.sendall(hello + frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", LARGEST - 65535)))

    def close(self):
        self.socket.close()

    def send(self, messages):
        """Sends a call for each message, all at once."""
        out = bytearray()
        for message in messages:
            out += frame(HEADERS, END_HEADERS, self.stream, self.head)
            for start in range(0, len(message), 16384):
                part = message[start : start + 16384]
                last = start + 16384 >= len(message)
                out += frame(DATA, END_STREAM if last else 0, self.stream, part)
            self.stream += 2
        self.waiting += len(messages)
        self.socket.sendall(out)

    def receive(self, still_waiting=0, keep=False):
        """Reads until at most so many calls have no answer; the messages by stream, where they are wanted."""
        messages = {}
        while self.waiting > still_waiting:
            at, unread = 0, self.unread
            while len(unread) - at >= 9:
                length = int.from_bytes(unread[at : at + 3], "big")
                if len(unread) - at < 9 + length:
                    break
                kind, flags = unread[at + 3], unread[at + 4]
                if kind == DATA and keep:
                    stream = int.from_bytes(unread[at + 5 : at + 9], "big")
                    messages[stream] = messages.get(stream, b"") + unread[at + 9 : at + 9 + length]
                elif kind == PING and not flags & ACK:
                    self.socket.sendall(frame(PING, ACK, 0, unread[at + 9 : at + 17]))
                elif kind == GOAWAY:
                    raise ConnectionError("the server goes away")
                if kind in (DATA, HEADERS) and flags & END_STREAM:
                    self.waiting -= 1
                at += 9 + length
            self.unread = unread[at:]
            if self.waiting > still_waiting:
                more = self.socket.recv(1 << 20)
                if not more:
                    raise ConnectionError("the server has closed the connection")
                self.unread += more
        return messages

    def ask_all(self, messages):
        """The answers to calls that are sent at once, less gRPC's frame, in their order; empty where one has none."""
        first = self.stream
        self.send(messages)
        answers = self.receive(keep=True)
        return [answers.get(first + 2 * index, b"")[5:] for index in range(len(messages))]

    def ask(self, message):
        """One call's answer, less gRPC's frame."""
        return self.ask_all([message])[0]


def is_allow(answer):
    """An allow has an empty status at the beginning, and then an `OkHttpResponse`."""
    return answer[:3] == b"\x0a\x00\x1a"
