"""An HTTP proxy that makes an S3 server worse: some requests get 500 or 503 SlowDown, some connections are cut.

A connection is cut before the request reaches the server, or after it did its work (the answer is lost), or in the middle of
the answer's body.
"""

from __future__ import annotations

import http.client
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate</Message></Error>"
INTERNAL = b"<Error><Code>InternalError</Code><Message>We encountered an internal error</Message></Error>"


class FaultyS3:
    """A context manager; `url` is the endpoint. `faults` counts what was done to how many `requests`."""

    def __init__(self, upstream: str, error_rate: float = 0.05, drop_rate: float = 0.02, seed: int = 0) -> None:
        self.upstream = upstream.removeprefix("http://")
        self.error_rate, self.drop_rate = error_rate, drop_rate
        self.requests, self.faults = 0, 0
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fate = proxy._fate()
                if fate == "500":
                    return self._answer(500, INTERNAL)
                if fate == "503":
                    return self._answer(503, SLOW_DOWN)
                if fate == "cut before":
                    return self._cut()
                connection = http.client.HTTPConnection(proxy.upstream, timeout=60)
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                data = answer.read()
                connection.close()
                if fate == "cut after":
                    return self._cut()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in {"transfer-encoding", "connection", "content-length"}:
                        self.send_header(name, value)
                length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
                self.send_header("Content-Length", length or "0")
                self.end_headers()
                if self.command == "HEAD":
                    return None
                if fate == "cut within" and data:
                    self.wfile.write(data[: len(data) // 2])
                    return self._cut()
                self.wfile.write(data)
                return None

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

            def _answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def _cut(self) -> None:
                self.close_connection = True
                self.wfile.flush()
                self.connection.shutdown(2)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # a client that was killed

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def _fate(self) -> str:
        with self._lock:
            self.requests += 1
            draw, kind = self._random.random(), self._random.random()
            if draw >= self.error_rate + self.drop_rate:
                return "served"
            self.faults += 1
            if draw < self.error_rate:
                return "500" if kind < 0.5 else "503"
            return "cut before" if kind < 1 / 3 else "cut after" if kind < 2 / 3 else "cut within"

    def __enter__(self) -> FaultyS3:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
