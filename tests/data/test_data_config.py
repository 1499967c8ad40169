"""The YAML of the groups `data` and `tokenizer` fills their dataclasses, and its defaults work as they stand."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from v4train.data import DataConfig, TokenizerConfig, check_data, find_documents

CONF = Path(__file__).parents[2] / "conf"


def load(options, file, **rest):
    config = OmegaConf.merge(OmegaConf.structured(options), OmegaConf.load(CONF / file))
    return OmegaConf.to_object(OmegaConf.create({"part": config, **rest})["part"])


def test_stdlib():
    config = load(DataConfig, "data/stdlib.yaml")
    assert config.source == "stdlib" and config.path is None
    check_data(config)


def test_text_takes_a_list_from_the_command_line(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    config = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.load(CONF / "data/text.yaml"))
    config.path = [str(tmp_path / "a.txt"), str(tmp_path / "b*")]
    assert len(find_documents(config).train) == 1  # a DictConfig, its path a ListConfig
    assert len(find_documents(OmegaConf.to_object(config)).validation) == 1


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({"XDG_CACHE_HOME": "/x"}, "/x/v4train"),
        ({"HOME": "/h"}, "/h/.cache/v4train"),
        ({}, "./.cache/v4train"),
    ],
)
def test_cache_dir(monkeypatch, environment, expected):
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = load(TokenizerConfig, "tokenizer/bpe.yaml", model={"vocab_size": 512})
    assert (config.vocab_size, config.cache_dir) == (512, expected)
