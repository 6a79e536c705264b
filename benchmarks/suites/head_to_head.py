"""Our policies beside other packages and published methods, on one trained network, in batches of 1 and 8.

All draw the same samples. Quality is that of batches of 8; what a method does to batch-mates shows when the same
samples are drawn one at a time. Seconds are those of drawing one batch, on one thread, eager and with torch.compile, in
rounds in which all take turns; the faster way counts. Finished rows are not measured again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata

from torch import Tensor
from tqdm import tqdm

from benchmarks.baselines.contenders import COMPILED, EAGER, Contender, Contenders, Settings, drawn, forget
from benchmarks.harness import interleave, threads
from benchmarks.rows import Row, Rows, say
from benchmarks.suites.drawing import Artist, Method, fingerprint, kept_images, seeds_and_labels
from benchmarks.suites.judging import Judging, judging_of_model
from benchmarks.suites.mates import CHANGED
from benchmarks.suites.network import compiles

SUITE = "head-to-head"
BATCHES = (1, 8)


@dataclass(frozen=True)
class Sizes:
    """samples: for quality; alone: as many of them are drawn one at a time as well. limit: seconds of timing for a
    batch size."""

    settings: Settings
    samples: int = 512
    alone: int = 128
    reference_steps: int = 100
    repeats: int = 9
    limit: float = 900.0
    turn: float = 0.2


FULL = Sizes(Settings())
QUICK = Sizes(
    Settings(8, (4,), (0.6,), (0.3,), (2,), (0.3,), (1e-3,), (0.5,), trained_on=64),
    samples=16, alone=8, reference_steps=12, repeats=3, limit=20.0, turn=0.0,
)  # fmt: skip


@dataclass(frozen=True)
class HeadToHead:
    """data: that the model draws."""

    rows: Rows
    data: str
    model: str
    sizes: Sizes

    def run(self) -> None:
        with threads(1):
            say(f"{SUITE}: {self.model}, one thread")
            chosen = list(Contenders(self.model, self.sizes.settings, self.rows.folder / "cache").all())
            for one in tqdm(chosen, desc="settings", disable=None):
                self.quality(one)
            for batch in BATCHES:
                self.speed(chosen, batch)

    def quality(self, one: Contender) -> None:
        samples, alone = self.sizes.samples, self.sizes.alone
        if self._row("quality", one, samples=samples) is not None:
            return
        seeds, labels = self._seeds(samples)
        images = drawn(one, self.model, seeds, labels, max(BATCHES))
        furthest = (drawn(one, self.model, seeds[:alone], labels[:alone], 1) - images[:alone]).abs().flatten(1).amax(1)
        self.rows.write(
            SUITE,
            "quality",
            one.name,
            self._parameters(one, samples=samples),
            dtype="float32",
            decides=one.decides,
            alone=alone,
            changed=float((furthest > CHANGED).double().mean()),
            furthest=float(furthest.max()),
            packages=packages(),
            **self._judging().measure(images, labels, self._reference()),
        )

    def speed(self, chosen: Sequence[Contender], batch: int) -> None:
        missing = [one for one in chosen if self._row("speed", one, batch=batch) is None]
        if not missing:
            return
        timed, given = [chosen[0], *(m for m in missing if m != chosen[0])], self._seeds(batch)
        forget()
        first = {(one.name, one.steps): one for one in timed}.values()
        compiled = compiles(*(partial(drawn, one, self.model, *given, batch, COMPILED) for one in first))
        ways = (EAGER, COMPILED) if compiled else (EAGER,)
        say(f"{SUITE}: seconds of {len(timed)} settings, batch {batch}")
        measured = interleave(
            {_name(one, way): partial(drawn, one, self.model, *given, batch, way) for one in timed for way in ways},
            self.sizes.repeats,
            limit=self.sizes.limit,
            turn=self.sizes.turn,
            label=f"batch {batch}",
        )
        fastest = {one: min(ways, key=lambda way: measured.median(_name(one, way))) for one in timed}
        for one in missing:
            name = _name(one, fastest[one])
            share = measured.ratio(name, _name(chosen[0], fastest[chosen[0]]))
            self.rows.write(
                SUITE,
                "speed",
                one.name,
                self._parameters(one, batch=batch),
                dtype="float32",
                **measured.row(name),
                way=fastest[one],
                seconds_per_image=measured.median(name) / batch,
                of_full=share.median,
                of_full_spread=[share.quantile(0.2), share.quantile(0.8)],
                packages=packages(),
            )

    def _parameters(self, one: Contender, **more: object) -> dict[str, object]:
        own = {"data": self.data, "setting": one.setting, "steps": self.sizes.settings.steps}
        return own | {"checkpoint": fingerprint(self.model)} | more

    def _row(self, kind: str, one: Contender, **more: object) -> Row | None:
        return self.rows.find(SUITE, kind, one.name, self._parameters(one, **more))

    def _judging(self) -> Judging:
        return judging_of_model(self.data, self.model)

    def _seeds(self, n: int) -> tuple[Tensor, Tensor]:
        return seeds_and_labels(0, n, self._judging().judge.classes)

    def _reference(self) -> Tensor:
        """Images of the full network with many steps."""
        method = Method("reference", self.model, steps=self.sizes.reference_steps, batch=64)
        with Artist.of(1) as artist:
            return kept_images(self.rows.folder / "cache", artist, method, *self._seeds(self.sizes.samples), run=0)


def _name(one: Contender, way: str) -> str:
    return f"{one.title}, {way}"


@cache
def packages() -> dict[str, str]:
    """Versions of the packages that are compared."""
    return {name: metadata.version(name) for name in ("diffusers", "cache-dit")}
