"""Programs on a terminal, which pipes are not."""

import os
import pty
import subprocess
import sys


def on_a_terminal(program: str, *arguments: str) -> tuple[int, str]:
    """Exit code of a program of Python and what it shows."""
    terminal, end_of_program = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdout=end_of_program, stderr=end_of_program, env=environment
    )
    os.close(end_of_program)
    shown = b""
    try:
        while piece := os.read(terminal, 65536):
            shown += piece
    except OSError:  # Linux's way of saying that the other end is closed
        pass
    os.close(terminal)
    return process.wait(), shown.decode()
