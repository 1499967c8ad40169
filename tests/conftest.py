"""What every test runs under: no network, reproducible random numbers, a logger that no earlier test has changed."""

import logging
import os

import pytest
from hypothesis import settings

# Before any library reads them; child processes inherit them too.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads warn in every forked child
if "PYTEST_XDIST_WORKER" in os.environ:  # two threads each on two cores are slower than one
    os.environ["OMP_NUM_THREADS"] = "1"

# derandomize: the same examples on every run, and no database in the checkout
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Continuous integration sets V4TRAIN_SKIPS=fail: all that a test may need is installed there."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("V4TRAIN_SKIPS") == "fail":
        report.outcome, report.longrepr = "failed", f"{report.longrepr[2]}, and V4TRAIN_SKIPS=fail"
    return report


@pytest.fixture(autouse=True)
def _restore_logger():
    """`setup_logging` adds handlers and stops propagation, which would blind `caplog` in later tests."""
    logger = logging.getLogger("v4train")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    for handler in set(logger.handlers) - set(handlers):
        handler.close()
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


@pytest.fixture
def one_thread():
    """Small products gain little from a second thread, and lose a lot where another program wants the core."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
