"""A pytest plugin (-p benchmarks.gpu.shards --shard 2/8): runs every eighth of the selected tests, from the third on.

Used without pytest-xdist to run several processes, as Triton compiles on one core only.
"""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="0/1", metavar="I/N", help="run tests I, I + N, I + 2 N, ... of those selected")


@pytest.hookimpl(trylast=True)  # after the selection by markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    first, number = map(int, config.getoption("--shard").split("/"))
    chosen = items[first::number]
    kept = set(map(id, chosen))
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = chosen
