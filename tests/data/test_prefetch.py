"""Reading ahead: order, errors in their turn, an end without hanging. Every wait has a limit."""

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest

from v4train.data.prefetch import Prefetch

LIMIT = 20  # seconds until a test that hangs fails


@pytest.fixture
def within():
    """Calls a function in another thread, so that a call that never returns is an error."""
    pool = ThreadPoolExecutor(1)
    yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=LIMIT)
    pool.shutdown(wait=False)


def counting(name):
    numbers = count()
    return lambda: (name, next(numbers))


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 8])
def test_each_sequence_comes_in_its_order(workers, within):
    prefetch = Prefetch({name: counting(name) for name in "abc"}, workers, ahead=2)
    order = "aaaaaaaaaabcabcbbbbbcca"
    found = [within(prefetch.take, key) for key in order]
    expected = {name: counting(name) for name in "abc"}
    assert found == [expected[key]() for key in order]
    within(prefetch.stop)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_none_is_an_item_and_what_is_raised_comes_in_its_turn(workers, within):
    items = iter([1, None, 2])

    def read():
        try:
            return next(items)
        except StopIteration:
            raise OSError("broken") from None

    prefetch = Prefetch({"a": read, "b": counting("b")}, workers, ahead=10)
    assert [within(prefetch.take, "a") for _ in range(3)] == [1, None, 2]
    for _ in range(2):  # again and again, where nothing else is to come
        with pytest.raises(OSError, match="broken"):
            within(prefetch.take, "a")
    assert [within(prefetch.take, "b") for _ in range(15)] == [("b", i) for i in range(15)]  # the thread goes on
    within(prefetch.stop)


def test_no_more_waits_than_ahead_and_each_sequence_has_one_thread(within):
    calls, threads = {"a": 0, "b": 0}, {"a": set(), "b": set()}
    reached = {name: threading.Event() for name in calls}

    def reader(name):
        def read():
            calls[name] += 1
            threads[name].add(threading.get_ident())
            if calls[name] >= 5:
                reached[name].set()
            return calls[name]

        return read

    prefetch = Prefetch({name: reader(name) for name in calls}, 2, ahead=3)
    for name in calls:
        assert [within(prefetch.take, name) for _ in range(2)] == [1, 2]
        assert reached[name].wait(LIMIT)
    within(prefetch.stop)
    assert calls == {"a": 5, "b": 5}  # two taken, three waiting
    assert len(threads["a"]) == len(threads["b"]) == 1 and threads["a"] != threads["b"]


def test_stop_ends_the_threads(within):
    before = threading.active_count()
    prefetch = Prefetch({i: counting(i) for i in range(4)}, 4, ahead=2)
    own = [thread for thread in threading.enumerate() if thread.name.startswith("v4train-data")]
    assert len(own) == 4 and all(thread.daemon for thread in own)
    within(prefetch.stop)
    within(prefetch.stop)
    assert not any(thread.is_alive() for thread in own) and threading.active_count() <= before + 1
    with pytest.raises(RuntimeError):
        within(prefetch.take, 0)


def test_a_take_that_waits_ends_with_stop(within):
    reading, go_on = threading.Event(), threading.Event()

    def read():
        reading.set()
        assert go_on.wait(LIMIT)
        return 1

    prefetch = Prefetch({"a": read}, 1, ahead=1)
    assert reading.wait(LIMIT)
    with ThreadPoolExecutor(2) as pool:
        taking, stopping = pool.submit(prefetch.take, "a"), pool.submit(prefetch.stop)
        with pytest.raises(RuntimeError):
            taking.result(timeout=LIMIT)
        go_on.set()  # stop waits for the read under way
        stopping.result(timeout=LIMIT)


def test_many_sequences_few_workers_no_deadlock(within):
    prefetch = Prefetch({i: counting(i) for i in range(50)}, 3, ahead=1)
    found = [within(prefetch.take, key) for key in [*range(49, -1, -1), *range(50), *[7] * 30]]
    assert found[-1] == (7, 31) and found[50] == (0, 1)
    within(prefetch.stop)
