import os

import pytest

from molediff.workers import ordered


def test_results_come_in_order_and_one_by_one():
    seen = []

    def watched():
        for i in range(3):
            seen.append(i)
            yield i

    results = ordered(lambda x: 10 * x, watched())
    assert next(results) == 0
    assert seen == [0]
    assert list(results) == [10, 20]


def test_a_process_that_dies_costs_one_item_only(capfd):
    def fragile(x):
        if x == 1:
            os._exit(1)
        return x, os.environ["OMP_NUM_THREADS"]

    found = list(ordered(fragile, iter(range(4)), processes=2))
    assert found == [(0, "1"), None, (2, "1"), (3, "1")]


@pytest.mark.parametrize("processes", [1, -1])
def test_numbers_of_processes_that_make_no_sense(processes):
    with pytest.raises(ValueError, match="0 .this process. or at least 2"):
        ordered(abs, [1], processes)
