import errno
import io
import os
import random
import socket

import pytest

from tests.serving import serve
from v4train.data import remote
from v4train.data.remote import RemoteFile, Retry, open_remote

CONTENT = random.Random(0).randbytes(100_000)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 16_384)
    monkeypatch.setattr(remote, "_PIECE", 1_000)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


def patience(attempts=3):
    waits = []
    return waits, Retry(attempts, 0.5, 3.0, waits.append)


def test_waits_double_up_to_the_longest_and_then_it_is_over():
    waits, retry = patience(5)
    failures = 0
    for _ in range(5):
        failures = retry.wait(failures, "a", ValueError("cause"))
    assert waits == [0.5, 1.0, 2.0, 3.0, 3.0]
    with pytest.raises(ConnectionError, match="a: attempt 6 failed too: cause"):
        retry.wait(failures, "a", ValueError("cause"))


@pytest.mark.parametrize("ranges", [True, False])
def test_whole_file_and_any_part_of_it(ranges):
    with serve({"a": CONTENT}, ranges=ranges) as served, open_remote(served.url + "a", "a", patience()[1]) as file:
        assert file.read() == CONTENT
        assert file.seek(0, io.SEEK_END) == len(CONTENT)
        numbers = random.Random(1)
        for _ in range(30):
            start, length = numbers.randrange(len(CONTENT)), numbers.randrange(40_000)
            assert file.seek(start) == start
            assert file.read(length) == CONTENT[start : start + length]
        assert file.seek(-10, io.SEEK_END) == len(CONTENT) - 10 and file.read() == CONTENT[-10:]
        assert file.seek(len(CONTENT) + 5) and file.read(1) == b""


def test_reading_in_order_asks_for_each_block_once_over_one_connection():
    with serve({"a": CONTENT}) as served, open_remote(served.url + "a", "a", patience()[1]) as file:
        while file.read(1_234):
            pass
        spans = [span for _, span in served.requests]
        assert spans[:3] == ["bytes=0-0", "bytes=0-16383", "bytes=16384-32767"]
        assert len(spans) == 1 + -(-len(CONTENT) // 16_384)
        assert len(served.connections) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_dropped_in_the_body_goes_on_from_the_byte_reached(ranges):
    waits, retry = patience()
    faults = [None, ~5_000, 503, 429, ~7_000, ~0, 500]  # three failures at byte 5,000, then three at a later one
    with serve({"a": CONTENT}, ranges=ranges, faults=faults) as served:
        with open_remote(served.url + "a", "a", retry) as file:
            assert file.read() == CONTENT
        assert waits == [0.5, 1.0, 2.0, 0.5, 1.0, 2.0]
        assert not served.faults
        if ranges:
            asked = [int(span.removeprefix("bytes=").partition("-")[0]) for _, span in served.requests]
            assert asked[:8] == [0, 0, 5_000, 5_000, 5_000, 12_000, 12_000, 12_000]


def test_a_server_may_send_less_than_it_was_asked_for():
    waits, retry = patience()
    with serve({"a": CONTENT}, longest=3_000) as served, open_remote(served.url + "a", "a", retry) as file:
        assert file.read() == CONTENT and waits == []
        served.longest = 0
        file.seek(0)
        with pytest.raises(ConnectionError, match="nothing came from byte 0 on"):
            file.read()


@pytest.mark.parametrize("ranges", [True, False])
def test_attempts_used_up(ranges):
    waits, retry = patience(2)
    with serve({"part/a": CONTENT}, ranges=ranges, faults=[None, ~5_000, 503, 503, 503]) as served:
        with pytest.raises(ConnectionError, match="part/a: attempt 3 failed too: HTTP 503"):
            with open_remote(served.url + "part/a", "part/a", retry) as file:
                file.read()
    assert waits == [0.5, 1.0]


def test_nobody_listening():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/a"
        waits, retry = patience(2)
        with pytest.raises(ConnectionError, match="^a: attempt 3 failed too: .*refused"):
            open_remote(url, "a", retry)
    assert waits == [0.5, 1.0]


def test_a_server_that_says_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(remote, "_TIMEOUT", (0.05, 0.05))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        waits, retry = patience(1)
        with pytest.raises(ConnectionError, match="(?i)timed out"):
            open_remote(f"http://127.0.0.1:{silent.getsockname()[1]}/a", "a", retry)
    assert waits == [0.5]


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_what_the_server_refuses_is_not_asked_for_again(status):
    waits, retry = patience()
    with serve({"a": CONTENT}, faults=[status]) as served:
        with pytest.raises(FileNotFoundError, match=f"HTTP {status}"):
            open_remote(served.url + "a", "a", retry)
        assert len(served.requests) == 1
    assert waits == []


def test_vanished_while_it_is_read():
    with serve({"a": CONTENT}) as served, open_remote(served.url + "a", "a", patience()[1]) as file:
        assert file.read(100) == CONTENT[:100]
        del served.files["a"]
        with pytest.raises(FileNotFoundError, match="HTTP 404"):
            file.read()


@pytest.mark.parametrize("change", ["content", "size", "shorter"])
def test_changed_while_it_is_read(change):
    with serve({"a": CONTENT}) as served, open_remote(served.url + "a", "a", patience()[1]) as file:
        file.read(100)
        if change == "content":
            served.tag = '"2"'
        else:
            served.files["a"] = CONTENT + b"x" if change == "size" else CONTENT[:10_000]
        with pytest.raises(OSError, match="changed on the server") as raised:
            file.read()
    assert raised.value.errno == errno.ESTALE


def test_changed_while_it_is_copied():
    with serve({"a": CONTENT}, ranges=False, faults=[None, ~50]) as served:
        retry = Retry(3, sleep=lambda _: served.files.update(a=CONTENT + b"x"))
        with pytest.raises(OSError, match="changed on the server"):
            open_remote(served.url + "a", "a", retry)


@pytest.mark.parametrize("ranges", [True, False])
def test_empty_file(ranges):
    with serve({"a": b""}, ranges=ranges) as served, open_remote(served.url + "a", "a", patience()[1]) as file:
        assert file.read() == b""


def test_size_is_known_before_anything_is_read():
    with serve({"a": CONTENT}) as served, RemoteFile(served.url + "a", "a", patience()[1]) as file:
        assert file.size == len(CONTENT) and file.ranged
        served.ranges = False
        with RemoteFile(served.url + "a", "a", patience()[1]) as whole:
            assert whole.size == len(CONTENT) and not whole.ranged


def test_temporary_copy_goes_when_closed(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with serve({"a": CONTENT}, ranges=False) as served:
        open_remote(served.url + "a", "a", patience()[1]).close()
    assert os.listdir(tmp_path) == []


def test_the_hub_gets_its_token_and_the_servers_it_sends_us_to_do_not(monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils.build_hf_headers", lambda: {"Authorization": "Bearer secret"})
    with serve({"a": CONTENT, "resolve/b": CONTENT}) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url.rstrip("/"))
        hub.moved["resolve/a"] = hub.url.replace("127.0.0.1", "localhost") + "a"
        with open_remote(hub.url + "resolve/a", "a", patience()[1]) as file:
            assert file.seek(50_000) and file.read(1_000) == CONTENT[50_000:51_000]
        assert [path for path, _ in hub.requests] == ["resolve/a", "a"] * 2
        assert hub.authorized == ["Bearer secret", None] * 2
    with serve({"resolve/b": CONTENT}) as other:
        open_remote(other.url + "resolve/b", "b", patience()[1]).close()
        assert other.authorized == [None]


def test_an_address_that_is_none():
    with pytest.raises(FileNotFoundError):
        open_remote("http://", "a", patience()[1])
