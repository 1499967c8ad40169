"""Work is held up until it was heard of, so that each test ends only if a line comes while a call is still busy."""

import logging
import re
import threading

import pytest

from tests.documents import data_config
from tests.pseudo_terminal import on_a_terminal
from v4train import terminal
from v4train.data import corpus
from v4train.data.cache import cached_folder
from v4train.data.sources import Document, find_documents
from v4train.data.tokenizer import TokenizerConfig, cached_tokenizer, train_tokenizer
from v4train.terminal import Work, format_duration

logger = logging.getLogger("v4train")

pytestmark = pytest.mark.timeout(60)


class Ear(logging.Handler):
    """Hears what is logged; `wait_for` returns the first line that matches."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._more = threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        with self._more:
            self.lines.append(record.getMessage())
            self._more.notify_all()

    def wait_for(self, pattern: str) -> str:
        def found() -> str | None:
            return next((line for line in self.lines if re.fullmatch(pattern, line)), None)

        with self._more:
            assert self._more.wait_for(found, timeout=30), self.lines
            return found()


@pytest.fixture
def ear(monkeypatch):
    monkeypatch.setattr(terminal, "PLAIN_LINE_SECONDS", 0.01)
    ear, level = Ear(), logger.level
    logger.addHandler(ear)
    logger.setLevel(logging.INFO)
    yield ear
    logger.removeHandler(ear)
    logger.setLevel(level)


def test_a_call_that_does_not_come_back_shows_life(ear):
    with Work("thinking"):
        ear.wait_for(r"thinking: \d:\d\d")


def test_work_on_text_says_how_much_is_done(ear):
    with Work("reading", 2_000_000) as work:
        assert list(work.counted(["é" * 200_000, "a" * 100_000])) == ["é" * 200_000, "a" * 100_000]
        ear.wait_for(r"reading: 0.5 of 2.0 MB, 0:00, ETA 0:00")
    with Work("reading") as work:
        work.advance(1_500_000)
        ear.wait_for(r"reading: 1.5 MB, 0:00")


def test_where_nothing_is_to_be_told_no_thread_is_started(ear):
    logger.setLevel(logging.WARNING)
    with Work("reading", 10) as work:
        work.advance(5)
        assert "v4train-work" not in [thread.name for thread in threading.enumerate()]
    assert ear.lines == []


def test_tokenising_in_a_run_is_heard_of(ear, tmp_path, monkeypatch):
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(f"text {number} " * 20_000)
    monkeypatch.setattr(corpus, "_CHUNK_BYTES", 1)
    read, seen = Document.read, []

    def heard_read(document: Document) -> str:
        seen.append(document.name)
        if len(seen) == 8:
            ear.wait_for(r"tokenising text: 1.0 of 1.1 MB, .*ETA 0:\d\d")
        return read(document)

    documents = find_documents(data_config(source="text", path=str(tmp_path)))
    monkeypatch.setattr(Document, "read", heard_read)
    corpus.tokenized(documents, train_tokenizer(["text"], 300), tmp_path / "cache")
    assert len(seen) == 8


def test_a_tokenizer_that_trains_is_heard_of(ear, tmp_path):
    def texts():
        yield "a text " * 100_000
        ear.wait_for(r"training the tokenizer: 0.7 MB, \d:\d\d")
        yield "another"

    config = TokenizerConfig(vocab_size=300, cache_dir=str(tmp_path), path=None, train_bytes=1_000_000)
    alone = train_tokenizer(["a text " * 100_000, "another"], 300)
    assert cached_tokenizer(config, "f", texts).fingerprint == alone.fingerprint


def test_who_waits_for_another_s_work_is_heard_of(ear, tmp_path):
    began = threading.Event()

    def build(folder):
        began.set()
        ear.wait_for(r"waiting for thing: \d:\d\d")
        (folder / "a").write_text("content")

    first = threading.Thread(target=cached_folder, args=(tmp_path, "thing", build))
    first.start()
    assert began.wait(30)
    cached_folder(tmp_path, "thing", lambda folder: pytest.fail("made twice"))
    first.join(30)
    assert not first.is_alive()


PROGRAM = """
import sys, threading
from pathlib import Path
from v4train import terminal
from v4train.train.progress import logger, setup_logging
terminal.PLAIN_LINE_SECONDS = 0.1
setup_logging(sys.argv[1], rank=0)
said = threading.Event()
logger.addFilter(lambda record: said.set() or True)
with terminal.Work("reading [all]", 4_000_000) as work:
    work.advance(1_000_000)
    assert said.wait(30)
"""


def test_a_terminal_gets_a_bar_and_the_log_file_the_lines(tmp_path):
    code, text = on_a_terminal(PROGRAM, str(tmp_path))
    assert code == 0, text
    assert "━" in text and "reading [all]" in text and "1.0 of 4.0 MB" in text and "ETA" not in text
    logged = (tmp_path / "log.txt").read_text()
    assert "reading [all]: 1.0 of 4.0 MB" in logged and "━" not in logged


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (90061, "1d 01:01:01")]
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text
