"""Bad input: the same line from whichever rank and program."""

import pickle
from pathlib import Path

import pytest

from v4train.errors import ConfigError, refusing_bad_input
from v4train.overrides import composed


def test_it_survives_the_way_to_another_rank():
    error = ConfigError("run.dir", Path("a"), "a rule", "a remedy")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is ConfigError
    assert str(again) == str(error) == "run.dir=a: a rule; a remedy"
    assert again.key == "run.dir"


def test_bad_input_ends_a_program_with_one_line_and_code_2(capsys):
    with pytest.raises(SystemExit) as end, refusing_bad_input():
        raise ConfigError("out", "", "a folder is needed", "give out=shards/")
    assert end.value.code == 2 and capsys.readouterr().err == "error: out=: a folder is needed; give out=shards/\n"


def test_so_does_a_key_that_was_taken_away(capsys):
    with pytest.raises(SystemExit) as end, refusing_bad_input():
        composed("pretrain", ["~model.name"]).model.name  # noqa: B018
    assert end.value.code == 2 and capsys.readouterr().err.startswith("error: model.name=missing: it has no value;")
    with pytest.raises(ZeroDivisionError), refusing_bad_input():
        1 / 0  # noqa: B018
