"""Freed memory that the process keeps, and the settings that a process must be started with."""

import os
import subprocess
import sys

import pytest

from v4train.train.allocator import TUNABLES, restart_tuned, tuned_environment

RUN = {"capture_output": True, "text": True, "timeout": 100, "check": True}
PROGRAM = """
import resource, sys, torch
from v4train.train.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step = [torch.ones(12 * 2**20) for _ in range(3)]  # of 48 MiB: glibc's own threshold never rises that far
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(4):
    faults()
print(sum(faults() for _ in range(8)))
"""


def faults_of_later_steps(what):
    command = [sys.executable, "-c", PROGRAM, what]
    return int(subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout)


def test_memory_taken_again_is_mapped_already():
    """glibc's; elsewhere there is nothing to tell."""
    assert faults_of_later_steps("keep") < faults_of_later_steps("default") / 4


THREADS = """
import os, threading, torch
from v4train.train.allocator import keep_freed_memory
keep_freed_memory()
end = threading.Event()
def copy(made):
    torch.ones(12 * 2**20)  # 48 MiB
    made.set()
    end.wait()
def resident():  # no peak: that of a process starts from its parent's
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
before = resident()
for _ in range(4):
    threading.Thread(target=copy, args=[made := threading.Event()]).start()
    made.wait()
print(resident() - before)
end.set()
"""


def test_what_a_thread_has_freed_serves_the_others():
    """Four threads, one after another, take 48 MiB: twice at most in all, and without the setting once each."""
    plain = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    mebibytes = [
        float(subprocess.run([sys.executable, "-c", THREADS], env=environment, **RUN).stdout)
        for environment in (tuned_environment(plain), plain)
    ]
    assert mebibytes[0] < 2.5 * 48 < 3.5 * 48 < mebibytes[1]


def test_what_the_environment_says_of_the_allocator_stays():
    assert tuned_environment({"A": "b"}) == {"A": "b", "GLIBC_TUNABLES": settings_of(TUNABLES)}
    said = "glibc.malloc.tcache_count=3:glibc.malloc.check=1"
    mixed = tuned_environment({"GLIBC_TUNABLES": said})
    others = {name: value for name, value in TUNABLES.items() if not name.endswith("tcache_count")}
    assert mixed == {"GLIBC_TUNABLES": f"{said}:{settings_of(others)}"}
    assert tuned_environment(mixed) == mixed


def settings_of(tunables):
    return ":".join(f"{name}={value}" for name, value in tunables.items())


def test_a_program_starts_once_more_in_its_place(tmp_path):
    """One process, with the arguments and the interpreter's options it was started with."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "print(os.getpid(), flush=True)\n"
        "from v4train.train.allocator import restart_tuned\n"
        "restart_tuned()\n"
        "print(os.environ['GLIBC_TUNABLES'], sys.argv[1:], sys.flags.dev_mode)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-X", "dev", str(program), "a b", "--c=d"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=True)
    *starts, last = done.stdout.splitlines()
    assert len(starts) == 2 and len(set(starts)) == 1
    assert last == f"{settings_of(TUNABLES)} ['a b', '--c=d'] True"


def test_a_tuned_program_goes_on(monkeypatch):
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("started again"))
    monkeypatch.setenv("GLIBC_TUNABLES", settings_of(TUNABLES))
    restart_tuned()
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))  # not glibc
    monkeypatch.delenv("GLIBC_TUNABLES")
    restart_tuned()
