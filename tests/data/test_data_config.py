"""The YAML of the groups `data` and `tokenizer` fills their dataclasses; its defaults work as they stand."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.documents import data_config
from v4train.data import DataConfig, TokenizerConfig, check_data, find_documents
from v4train.data.config import SourceConfig
from v4train.errors import ConfigError

CONF = Path(__file__).parents[2] / "conf"
SHIPPED = sorted(path.stem for path in (CONF / "data").glob("[!_]*.yaml"))


def merged(file):
    evaluation = OmegaConf.load(CONF / "evaluation/default.yaml")
    values = OmegaConf.merge(OmegaConf.structured(DataConfig), *_with_defaults(file))
    return OmegaConf.create({"data": values, "evaluation": evaluation}).data


def _with_defaults(file):
    own = OmegaConf.load(CONF / f"data/{file}.yaml")
    before = [name for name in own.pop("defaults", []) if name != "_self_"]
    return [*(values for name in before for values in _with_defaults(name)), own]


def load(options, file, **rest):
    config = OmegaConf.merge(OmegaConf.structured(options), OmegaConf.load(CONF / file))
    return OmegaConf.to_object(OmegaConf.create({"part": config, **rest})["part"])


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_group_fills_the_dataclass(name):
    config = OmegaConf.to_object(merged(name))
    assert isinstance(config, DataConfig)
    complete = config.path is not None or config.source == "stdlib" or config.sources
    if complete:
        check_data(config)
    else:  # it says what is to be named
        with pytest.raises(ConfigError, match=r"^data\.(path|source)=None: "):
            check_data(config)


def test_stdlib():
    config = OmegaConf.to_object(merged("stdlib"))
    assert config.source == "stdlib" and config.path is None
    assert list(config.named_sources) == ["stdlib"]


def test_text_takes_a_list_from_the_command_line(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    config = merged("text")
    config.path = [str(tmp_path / "a.txt"), str(tmp_path / "b*")]
    assert len(find_documents(config).train) == 1  # a DictConfig, its path a ListConfig
    assert len(find_documents(OmegaConf.to_object(config)).validation) == 1


def test_a_source_of_a_mixture_has_the_groups_values_where_it_sets_none():
    own = {"source": "jsonl", "path": ["x", "y"], "epochs": 2}
    config = data_config(path="files", epochs=5, retries=3, sources={"a": {}, "b": own})
    sources = config.named_sources
    assert list(sources) == ["a", "b"] and all(type(source) is SourceConfig for source in sources.values())
    chosen = [(source.source, source.path, source.epochs, source.retries) for source in sources.values()]
    assert chosen == [("text", "files", 5, 3), ("jsonl", ["x", "y"], 2, 3)]
    alone = data_config(path="files", epochs=5, retries=3).named_sources
    assert alone == {"text": sources["a"]}


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
