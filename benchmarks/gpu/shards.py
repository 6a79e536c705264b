"""A plugin of pytest (-p benchmarks.gpu.shards --shard 2/8): every eighth of the chosen tests, the third one first.

Stands in for pytest-xdist, where that is missing: Triton compiles on one core, and each process has one.
"""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="0/1", metavar="I/N", help="the tests I, I + N, I + 2 N, ... of those chosen")


@pytest.hookimpl(trylast=True)  # after those that markers leave out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    first, number = map(int, config.getoption("--shard").split("/"))
    chosen = items[first::number]
    kept = set(map(id, chosen))
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = chosen
