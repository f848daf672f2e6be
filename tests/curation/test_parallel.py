"""Processes side by side: results in order, few items at a time, and an end in every case."""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from mmssl.curation.parallel import check_jobs, ordered_map


def slow_first(shared: int, item: int) -> tuple[int, int]:
    time.sleep(0.2 if item % 5 == 0 else 0)
    return shared * item, os.getpid()


def die(shared: None, item: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(shared: None, item: int) -> int:
    if item == 3:
        raise ValueError(f"not {item}")
    return item


@pytest.mark.parametrize("jobs", [1, 3])
def test_results_come_in_order_and_items_are_taken_as_needed(jobs: int) -> None:
    taken = []

    def items() -> Iterator[int]:
        for i in range(40):
            taken.append(i)
            yield i

    processes = set()
    for i, (result, process) in enumerate(ordered_map(slow_first, 7, items(), jobs)):
        assert result == 7 * i
        assert len(taken) <= i + 1 + 3 * jobs
        processes.add(process)
    assert i == 39
    assert (os.getpid() in processes) == (jobs == 1)


def test_errors_come_through() -> None:
    for jobs in (1, 2):
        results = ordered_map(refuse, None, range(9), jobs)
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="not 3"):
            next(results)
    with pytest.raises(ChildProcessError, match="one of 2 processes was killed, most often for want of memory"):
        list(ordered_map(die, None, range(4), 2))
    with pytest.raises(ValueError, match="jobs is 0"):
        check_jobs(0)
    assert check_jobs(None) >= 1
