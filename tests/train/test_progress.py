"""Output is checked where it ends up: captured standard output, log.txt, and a real pseudo-terminal."""

import logging
import subprocess
import sys

import pytest

from tests.pseudo_terminal import on_a_terminal
from v4train.train.progress import Progress, setup_logging, start_table

logger = logging.getLogger("v4train")


class Clock:
    """Time that moves only when told to."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def run_steps(total, start=0, seconds_per_step=1.0, rank=0):
    clock = Clock()
    with Progress(total, start, rank, clock=clock) as progress:
        for step in range(start + 1, total + 1):
            clock.seconds += seconds_per_step
            progress.update(step, loss=8 / step, tokens_per_second=1234.5, lr=1e-3)
            if step == 15:
                progress.note("validation [bold] loss 3.2")


def test_plain_output_says_each_tenth_and_the_same_reaches_the_log_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # must not bring control characters into a file
    setup_logging(tmp_path, rank=0)
    start_table([("model", "small [2 layers]"), ("layout", "single")], title="v4train")
    run_steps(20)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["v4train", "  model   small [2 layers]", "  layout  single"]
    steps = [int(line.split()[1].split("/")[0]) for line in lines if line.startswith("step")]
    assert steps == [1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    assert "step 10/20  loss 0.8000  lr 0.001  1,234 tok/s  ETA 0:10" in lines
    assert lines[-1].endswith("ETA 0:00") and "validation [bold] loss 3.2" in lines
    logged = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" INFO ", 1)[1] for line in logged] == lines


def test_a_slow_run_shows_life_between_tenths(tmp_path, capsys):
    setup_logging(tmp_path, rank=0)
    run_steps(1000, start=996, seconds_per_step=31.0)
    run_steps(50_000, start=49_990, seconds_per_step=10.0)
    steps = [line.split()[1].split("/")[0] for line in capsys.readouterr().out.splitlines()]
    assert steps == ["997", "998", "999", "1000", "49991", "49994", "49997", "50000"]


def test_time_left_ignores_the_first_step_which_holds_start_up(tmp_path, capsys):
    setup_logging(tmp_path, rank=0)
    clock = Clock()
    progress = Progress(11, 0, clock=clock)
    for seconds in (100.0, 2.0, 2.0, 2.0):
        clock.seconds += seconds
        progress.update(int(clock.seconds - 98) // 2, 1.0, 1.0)
    assert "step  4/11" in (last := capsys.readouterr().out.splitlines()[-1]) and last.endswith("ETA 0:14")


def test_other_ranks_are_silent_but_for_warnings(tmp_path, capsys):
    setup_logging(tmp_path / "run", rank=3)
    run_steps(20, rank=3)
    logger.info("nothing")
    logger.warning("slow link")
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "rank 3: WARNING: slow link\n"
    assert not (tmp_path / "run").exists()


def test_setting_up_again_replaces_and_appends(tmp_path, capsys):
    for _ in range(2):
        setup_logging(tmp_path, rank=0)
        logger.warning("once a set-up")
    assert capsys.readouterr().out == "warning: once a set-up\n" * 2
    assert (tmp_path / "log.txt").read_text().count("WARNING once a set-up") == 2


PROGRAM = """
import sys
from v4train.train.progress import Progress, logger, setup_logging, start_table
setup_logging(sys.argv[1], rank=0)
start_table([("model", "small [2 layers]")], title="v4train")
with Progress(20, 0) as progress:
    for step in range(1, 21):
        progress.update(step, loss=8 / step, tokens_per_second=1000)
        if step == 15:
            progress.note("validation [bold] loss 3.2")
logger.error("finished")
"""


@pytest.mark.timeout(60)
def test_a_terminal_gets_a_bar_and_the_log_file_stays_plain(tmp_path):
    code, text = on_a_terminal(PROGRAM, str(tmp_path))
    assert code == 0, text
    assert "━" in text and "\x1b[" in text and "step 20/20" in text and "loss 0.4000" in text
    assert text.count("small [2 layers]") == 1 and "validation [bold] loss 3.2" in text and "error: finished" in text
    assert "ETA 0:00\r\nstep" not in text  # the plain lines are not repeated on the terminal
    logged = (tmp_path / "log.txt").read_text()
    assert "\x1b" not in logged and "━" not in logged
    assert "step 20/20  loss 0.4000" in logged and "  model  small [2 layers]" in logged


STAGES = """
from v4train.train.progress import stages
with stages() as say:
    say("reading [model]")
    say("writing")
"""


@pytest.mark.timeout(60)
def test_stages_are_a_spinner_on_a_terminal_and_lines_elsewhere():
    code, text = on_a_terminal(STAGES)
    assert code == 0 and "\x1b[" in text and "reading [model]\n" not in text.replace("\r", "")
    piped = subprocess.run([sys.executable, "-c", STAGES], capture_output=True, text=True, timeout=50)
    assert (piped.returncode, piped.stdout, piped.stderr) == (0, "", "reading [model]\nwriting\n")
