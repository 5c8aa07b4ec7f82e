"""An HTTP proxy that makes an S3 server worse: some requests get 500 or 503 SlowDown, some connections are cut.

A connection is cut before the request reaches the server, or after it did its work (the answer is lost), or in the middle of
the answer's body; half of the cuts are resets.
"""

from __future__ import annotations

import http.client
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ANSWERS = {
    "500": ("InternalError", "We encountered an internal error"),
    "503": ("SlowDown", "Please reduce your request rate"),
    "403": ("AccessDenied", "Access Denied"),
    "409": ("ConditionalRequestConflict", "A conflicting conditional operation is in progress"),
    "412": ("PreconditionFailed", "At least one of the pre-conditions you specified did not hold"),
    "404": ("NoSuchUpload", "The specified upload does not exist"),
    "507": ("XMinioStorageFull", "Storage backend has reached its minimum free drive threshold"),
}
NOT_DELETED = b"<DeleteResult><Error>%s<Code>AccessDenied</Code><Message>Access Denied</Message></Error></DeleteResult>"
FATES = ("500", "503", "cut before", "cut after", "cut within", "reset before", "reset after", "reset within")


class FaultyS3:
    """A context manager; `url` is the endpoint. `faults` counts what was done to how many `requests`.

    `script`: fates of the next requests, instead of drawn ones: one of FATES or ANSWERS, "nothing listed" (an empty
    listing), "not deleted" (a delete request that the server refuses for its first object), or "served".
    `rule`: of the method and path of each request, its fate; "" for a drawn one. `delay_s`: before each answer.
    """

    def __init__(self, upstream: str, error_rate: float = 0.05, drop_rate: float = 0.02, seed: int = 0) -> None:
        self.upstream = upstream.removeprefix("http://")
        self.error_rate, self.drop_rate = error_rate, drop_rate
        self.requests, self.faults = 0, 0
        self.script: list[str] = []
        self.rule: Callable[[str, str], str] = lambda method, path: ""
        self.delay_s = 0.0
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fate = proxy._fate(self.command, self.path)
                time.sleep(proxy.delay_s)
                if fate in ANSWERS:
                    code, message = ANSWERS[fate]
                    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
                    return self._answer(int(fate), body.encode())
                if fate == "nothing listed":
                    return self._answer(200, b"<ListBucketResult></ListBucketResult>")
                if fate == "not deleted":
                    return self._answer(200, NOT_DELETED % re.findall(rb"<Key>.*?</Key>", body)[0])
                if fate.endswith("before"):
                    return self._cut(fate)
                connection = http.client.HTTPConnection(proxy.upstream, timeout=60)
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                data = answer.read()
                connection.close()
                if fate.endswith("after"):
                    return self._cut(fate)
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in {"transfer-encoding", "connection", "content-length"}:
                        self.send_header(name, value)
                length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
                self.send_header("Content-Length", length or "0")
                self.end_headers()
                if self.command == "HEAD":
                    return None
                if fate.endswith("within") and data:
                    self.wfile.write(data[: len(data) // 2])
                    return self._cut(fate)
                self.wfile.write(data)
                return None

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

            def _answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def _cut(self, fate: str) -> None:
                self.close_connection = True
                self.wfile.flush()
                if fate.startswith("reset"):
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                else:
                    self.connection.shutdown(socket.SHUT_RDWR)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # a client that was killed

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def _fate(self, method: str, path: str) -> str:
        with self._lock:
            self.requests += 1
            if ruled := self.rule(method, path):
                fate = ruled
            elif self.script:
                fate = self.script.pop(0)
            elif self._random.random() < self.error_rate:
                fate = self._random.choice(FATES[:2])
            elif self._random.random() < self.drop_rate:
                fate = self._random.choice(FATES[2:])
            else:
                return "served"
            self.faults += fate != "served"
            return fate

    def __enter__(self) -> FaultyS3:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
