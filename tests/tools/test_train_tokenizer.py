"""`tools/train_tokenizer.py`: a tokenizer.json from a corpus, and one line for bad input."""

import importlib.util

import pytest

from tests.runs import tiny
from v4train.data import Tokenizer
from v4train.errors import ConfigError

SPEC = importlib.util.find_spec("tools.train_tokenizer")


@pytest.fixture
def main():
    module = importlib.util.module_from_spec(SPEC)
    SPEC.loader.exec_module(module)
    return module.main


def test_it_writes_a_tokenizer_that_loads(main, tmp_path, capsys):
    out = tmp_path / "tokenizer.json"
    main([f"out={out}", *tiny(tmp_path, "none")])
    tokenizer = Tokenizer.load(out)
    assert tokenizer.vocab_size == 320
    assert tokenizer.decode(tokenizer.encode("def wrap(text):\n")) == "def wrap(text):\n"
    assert "320 entries" in capsys.readouterr().out


def test_without_a_file_to_write_it_says_so(main):
    with pytest.raises(ConfigError, match="^out="):
        main(["data=stdlib"])
