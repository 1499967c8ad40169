"""Files on HTTP servers, read as if they were local: by ranges, and again after every failure."""

import errno
import io
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import requests
import urllib3

BLOCK = 4 << 20  # bytes a range request asks for
_PIECE = 1 << 16  # bytes taken from a response at a time
_TIMEOUT = (10, 60)  # seconds to connect; without a byte
_PASSING = (requests.RequestException, urllib3.exceptions.HTTPError)  # failures that may be over at the next attempt

_PASSING_STATUS = (408, 425, 429)  # of the 4xx: timeout, too early, too many requests
_PROBE = "bytes=0-0"

logger = logging.getLogger("v4train")


@dataclass(frozen=True)
class Retry:
    """How often and how patiently a failed network read is tried again."""

    attempts: int  # further ones after the first
    first_wait: float = 0.5  # seconds; doubles with each failure
    longest_wait: float = 30.0  # seconds
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False, compare=False)

    def wait(self, failures: int, name: str, cause: Exception) -> int:
        """Wait after a failure.

        Args:
            failures: how many there were before this one, without any progress in between.
            name: what was being read.
        Returns:
            The number of failures with this one.
        Raises:
            ConnectionError: the attempts are used up.
        """
        if failures >= self.attempts:
            raise ConnectionError(f"{name}: attempt {failures + 1} failed too: {cause}") from cause
        seconds = min(self.longest_wait, self.first_wait * 2**failures)
        logger.warning("%s: %s; again in %g s (%d of %d)", name, cause, seconds, failures + 1, self.attempts)
        self.sleep(seconds)
        return failures + 1


def open_remote(url: str, name: str, retry: Retry) -> BinaryIO:
    """The file at `url` for reading: seekable, buffered. `name` is for messages. Raises as `files.open_file`."""
    remote = RemoteFile(url, name, retry)
    if remote.ranged:
        return io.BufferedReader(remote, BLOCK)
    with remote:
        return remote.copy()


class RemoteFile(io.RawIOBase):
    """A file on an HTTP server, read by range requests that are repeated until they succeed."""

    def __init__(self, url: str, name: str, retry: Retry) -> None:
        super().__init__()
        self._name, self._url, self._retry = name, url, retry
        self._position, self._version = 0, None
        self._session = requests.Session()
        self._session.headers["Accept-Encoding"] = "identity"
        self._session.headers.update(_hub_headers(url))
        self.ranged, self.size = self._probe()

    def _probe(self) -> tuple[bool, int | None]:
        """Whether the server knows ranges, and the file's size."""
        failures = 0
        while True:
            try:
                with self._get(_PROBE) as response:
                    response.raw.read(1)  # leaves the connection usable
                    return response.status_code != 200, self._version[0]
            except _PASSING as error:
                failures = self._retry.wait(failures, self._name, error)

    def _get(self, span: str | None) -> requests.Response:
        """The response to a request for a range, its body yet to be read."""
        headers = {} if span is None else {"Range": span}
        try:
            response = self._session.get(self._url, headers=headers, stream=True, timeout=_TIMEOUT)
        except ValueError as error:  # requests' word for a malformed address
            raise FileNotFoundError(errno.ENOENT, str(error), self._url) from error
        status, size = response.status_code, response.headers.get("Content-Length", "")
        answered = response.headers.get("Content-Range", "")
        if status in (206, 416):
            size = answered.rpartition("/")[2]
        if status == 200 or (status == 416 and span == _PROBE):  # no ranges; an empty file has none
            return self._same_version(response, size)
        if status == 206 and size.isdecimal() and answered.startswith(span.replace("=", " ").partition("-")[0] + "-"):
            return self._same_version(response, size)
        response.close()
        if status == 206:
            raise requests.HTTPError(f"asked for {span}, the server sent {answered or 'parts'}")
        if status == 416:
            raise self._changed(f"it no longer has {span}")
        if 400 <= status < 500 and status not in _PASSING_STATUS:
            raise FileNotFoundError(errno.ENOENT, f"HTTP {status} {response.reason}", self._name)
        raise requests.HTTPError(f"HTTP {status} {response.reason}")

    def _same_version(self, response: requests.Response, size: str) -> requests.Response:
        version = (int(size) if size.isdecimal() else None, response.headers.get("ETag", "").removeprefix("W/"))
        self._version = self._version or version
        if version != self._version:
            response.close()
            raise self._changed(f"size and ETag were {self._version}, now they are {version}")
        return response

    def _changed(self, how: str) -> OSError:
        return OSError(errno.ESTALE, f"changed on the server while it was read: {how}", self._name)

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self.size - self._position)]
        done = failures = 0
        while done < len(view):
            before = done
            try:
                with self._get(f"bytes={self._position + done}-{self._position + len(view) - 1}") as response:
                    if response.status_code != 206:
                        raise requests.HTTPError("the server answered a range request with the whole file")
                    while done < len(view) and (piece := response.raw.read(min(_PIECE, len(view) - done))):
                        view[done : done + len(piece)] = piece
                        done += len(piece)
                if done == before:  # less than asked for is allowed
                    raise requests.HTTPError(f"nothing came from byte {self._position + done} on")
            except _PASSING as error:
                failures = self._retry.wait(failures if done == before else 0, self._name, error)
        self._position += done
        return done

    def readall(self) -> bytes:
        return self.read(max(0, self.size - self._position))  # in one request; the inherited one asks for 8 kB each

    def copy(self) -> BinaryIO:
        """The whole file in a temporary one, for servers without ranges; a repeated request skips what is there."""
        target = tempfile.TemporaryFile(prefix="v4train-")
        done = failures = 0
        while True:
            before, reached = done, 0
            try:
                with self._get(None) as response:
                    while piece := response.raw.read(_PIECE):
                        reached += len(piece)
                        target.write(piece[len(piece) - max(0, reached - done) :])
                        done = max(done, reached)
                break
            except _PASSING as error:
                failures = self._retry.wait(failures if done == before else 0, self._name, error)
        target.seek(0)
        return target

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def close(self) -> None:
        if not self.closed:
            self._session.close()
        super().close()


def _hub_headers(url: str) -> dict[str, str]:
    """The Hub's own headers (who asks, for gated datasets) where `url` is the Hub's; other servers get none."""
    if "/resolve/" not in url:
        return {}
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers

    return build_hf_headers() if url.startswith(f"{constants.ENDPOINT}/") else {}
