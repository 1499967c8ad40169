"""`v4train.analysis.turns`: programs step one at a time, in turns, and what a dying one does."""

import sys
import textwrap

import pytest

from v4train.analysis.turns import take_turns

PROGRAM = """
import sys, time
from v4train.analysis.turns import serve
name, log = sys.argv[1:]
def step():
    if name == "dies":
        sys.exit(3)
    with open(log, "a") as file:
        file.write(f"{name}+ ")
    time.sleep(0.01)
    with open(log, "a") as file:
        file.write(f"{name}- ")
    print("whatever else")
serve(step, lambda: {"of": name})
"""


@pytest.fixture
def commands(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    log = tmp_path / "log"
    return lambda *names: {name: ([sys.executable, str(program), name, str(log)], None) for name in names}, log


def test_one_at_a_time_every_other_round_in_reverse(commands):
    made, log = commands
    seconds, figures = take_turns(made("a", "b"), rounds=2, warm_up=1)
    assert log.read_text().split() == ["a+", "a-", "b+", "b-", "b+", "b-", "a+", "a-", "a+", "a-", "b+", "b-"]
    assert set(seconds) == {"a", "b"} and all(len(of) == 2 and min(of) >= 0.01 for of in seconds.values())
    assert figures == {"a": {"of": "a"}, "b": {"of": "b"}}


def test_a_program_that_ends_early_is_an_error(commands):
    made, _ = commands
    with pytest.raises(RuntimeError, match="exit code 3"):
        take_turns(made("a", "dies"), rounds=1, warm_up=0)
