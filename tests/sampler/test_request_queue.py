"""The queue of an engine without a thread, whose users' signal handlers submit between any two calls of its own."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from adadiff.engine.request_queue import SLACK, RequestQueue


@dataclass(eq=False)
class Waiting:
    """What the queue reads of a handle. meanwhile: called when it is asked whether it has ended."""

    submitted: float
    priority: int = 0
    ended: bool = False
    deadline: float = math.inf
    kind: None = None
    meanwhile: list[Callable[[], None]] = field(default_factory=list)

    @property
    def over(self) -> bool:
        if self.meanwhile:
            self.meanwhile.pop()()
        return self.ended


def drained(queue: RequestQueue) -> list[Waiting]:
    found = []
    while (handle := queue.first()) is not None:
        queue.take(handle)
        found.append(handle)
    return found


@pytest.mark.parametrize("at", [0, SLACK, 2 * SLACK - 1])
@pytest.mark.parametrize("priority", [0, 5])
def test_a_request_that_comes_while_the_queue_is_made_anew_is_kept(at: int, priority: int) -> None:
    queue = RequestQueue(10.0)
    handles = [Waiting(i, ended=i % 2 == 0) for i in range(2 * SLACK)]
    for handle in handles:
        queue.add(handle)
    late = Waiting(1000, priority)
    handles[at].meanwhile.append(lambda: queue.add(late))
    assert not queue.full(2 * SLACK)  # made anew, without those that have ended
    assert not handles[at].meanwhile
    wanted = [handle for handle in handles if not handle.ended] + [late]
    assert drained(queue) == sorted(wanted, key=lambda handle: handle.submitted - 10 * handle.priority)


def test_who_was_first_is_taken_and_not_who_has_come_before_it_since() -> None:
    queue = RequestQueue(10.0)
    handles = [Waiting(i) for i in range(5)]
    for handle in handles:
        queue.add(handle)
    first = queue.first()
    earlier = Waiting(0.5, priority=3)
    queue.add(earlier)
    queue.take(first)
    assert first is handles[0]
    assert drained(queue) == [earlier, *handles[1:]]
