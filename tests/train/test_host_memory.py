"""How much main memory a process has left, by files as the kernel writes them; and what fits on hosts."""

import psutil
import pytest

from v4train.train import host_memory

GIB = 1 << 30


@pytest.fixture(autouse=True)
def _host(monkeypatch):
    memory = psutil.virtual_memory()._replace(available=100 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def group(root, path, limit, used):
    folder = root / "sys/fs/cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")


def inside(root, path):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"1:cpu:/old\n0::{path}\n")


def test_without_control_groups_it_is_the_hosts(tmp_path):
    assert host_memory.available(tmp_path) == 100 * GIB


@pytest.mark.parametrize(("job", "step", "left"), [("max", 20, 14), (12, "max", 5), (200, 300, 100), (12, 4, 0)])
def test_each_group_above_may_limit_it(tmp_path, job, step, left):
    inside(tmp_path, "/job/step")
    for path, limit, used in (("job", job, 7), ("job/step", step, 6)):
        group(tmp_path, path, limit if limit == "max" else limit * GIB, used * GIB)
    assert host_memory.available(tmp_path) == left * GIB


def test_a_container_sees_its_own_group_as_the_root(tmp_path):
    inside(tmp_path, "/outside/of/it")
    group(tmp_path, "", 10 * GIB, 4 * GIB)
    assert host_memory.available(tmp_path) == 6 * GIB


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([("a", 10, 80), ("a", 10, 90)], (True, 20, 80)),  # a quarter, together
        ([("a", 10, 79), ("a", 10, 90)], (False, 20, 79)),
        ([("a", 10, 100), ("b", 30, 100)], (False, 30, 100)),  # on one host of two
    ],
)
def test_the_copies_of_all_ranks_of_a_host_must_fit(monkeypatch, ranks, expected):
    monkeypatch.setattr(host_memory, "gathered", lambda own: ranks)
    assert host_memory.fits(10) == expected
