"""An HTTP server on the loopback that fails on demand."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Served:
    """What a server has, how it behaves, and what it was asked for. All of it may be changed while it runs."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)  # path without the leading "/"
    ranges: bool = True  # whether it honours Range
    longest: int = 1 << 60  # bytes it answers a range request with
    tag: str = '"1"'  # ETag of every file
    # One for each coming request: None for a good answer, a status, or ~n to hang up after n bytes of the body.
    faults: list[int | None] = field(default_factory=list)
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # path and Range of each
    moved: dict[str, str] = field(default_factory=dict)  # path -> address it redirects to
    authorized: list[str | None] = field(default_factory=list)  # Authorization of each request
    connections: set[tuple[str, int]] = field(default_factory=set)


@contextmanager
def serve(files: dict[str, bytes], **behaviour) -> Iterator[Served]:
    served = Served(files=files, **behaviour)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # header and body are two writes: 40 ms a request otherwise

        def do_GET(self) -> None:
            path, span = self.path[1:], self.headers["Range"]
            served.requests.append((path, span))
            served.authorized.append(self.headers["Authorization"])
            served.connections.add(self.client_address)
            fault = served.faults.pop(0) if served.faults else None
            content = served.files.get(path.partition("?")[0])
            if path in served.moved:
                self._answer(302, b"", None, None, served.moved[path])
            elif content is None or (fault or 0) >= 100:
                self._answer(fault if content is not None else 404, b"no")
            elif not (span and served.ranges):
                self._answer(200, content, fault)
            else:
                start, _, end = span.removeprefix("bytes=").partition("-")
                start = int(start)
                end = min(int(end), start + served.longest - 1, len(content) - 1)
                if start >= len(content):
                    self._answer(416, b"", None, f"bytes */{len(content)}")
                else:
                    self._answer(206, content[start : end + 1], fault, f"bytes {start}-{end}/{len(content)}")

        def _answer(
            self,
            status: int,
            body: bytes,
            fault: int | None = None,
            span: str | None = None,
            location: str | None = None,
        ) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", served.tag)
            if span:
                self.send_header("Content-Range", span)
            if location:
                self.send_header("Location", location)
            self.end_headers()
            try:
                self.wfile.write(body if fault is None else body[:~fault])
            except ConnectionError:  # the client has hung up
                self.close_connection = True
            self.close_connection = self.close_connection or fault is not None

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served.url = f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
