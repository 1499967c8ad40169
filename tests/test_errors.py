"""The error that rank 0 sends to the others."""

import pickle
from pathlib import Path

from v4train.errors import ConfigError


def test_it_survives_the_way_to_another_rank():
    error = ConfigError("run.dir", Path("a"), "a rule", "a remedy")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is ConfigError
    assert str(again) == str(error) == "run.dir=a: a rule; a remedy"
    assert again.key == "run.dir"
