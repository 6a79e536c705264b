"""Use an engine from asyncio: many clients at once, one of which gives up.

    python examples/engine_asyncio.py

A handle is a `concurrent.futures.Future`, so `asyncio.wrap_future` makes it one to await. Who stops waiting cancels
the request, whose lanes are free again at the next step.

Takes 6 s of CPU time and prints:

    24 images for 8 clients
    one client gave up
    finished 24, cancelled 1
"""

import asyncio

from torch import Tensor

import adadiff


async def draw(engine: adadiff.Engine, seed: int, **settings: object) -> Tensor:
    return await asyncio.wrap_future(engine.submit(seed=seed, **settings))


async def client(engine: adadiff.Engine, number: int) -> int:
    """Comes a little later than the one before it, and asks for three images, one after the other."""
    await asyncio.sleep(0.02 * number)
    for i in range(3):
        await draw(engine, 10 * number + i, class_labels=number, steps=10 + number, policy="exit:budget=0.55")
    return 3


async def serve() -> None:
    engine = adadiff.Engine(adadiff.load("canvases"), capacity=16)
    images = await asyncio.gather(*(client(engine, number) for number in range(8)))
    print(f"{sum(images)} images for {len(images)} clients")
    try:
        await asyncio.wait_for(draw(engine, 99, class_labels=1, steps=1000), timeout=0.3)
    except TimeoutError:
        print("one client gave up")
    await asyncio.to_thread(engine.close)  # waits for what is in flight, and would hold the event loop
    print(f"finished {engine.report.finished}, cancelled {engine.report.cancelled}")


def main() -> None:
    asyncio.run(serve())


if __name__ == "__main__":
    main()
