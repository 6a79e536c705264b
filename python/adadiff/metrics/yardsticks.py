"""Yardsticks: everything needed to measure images of one shape: a judge, features, and a reference."""

from dataclasses import dataclass
from pathlib import Path

from .extractors import FEATURES, Features, features_from
from .judges import Judge, judge_of
from .references import Reference, ReferenceFiles, extract, open_reference


@dataclass(frozen=True)
class Yardstick:
    """judge: for accuracy, or None. features: for distances, `dims` numbers for each image; None: no distances. files:
    real images or statistics; None: the held-out images of `held_out`."""

    judge: Judge | None = None
    features: Features | None = None
    dims: int = 0
    files: ReferenceFiles | None = None
    held_out: Judge | None = None

    @classmethod
    def of(
        cls,
        shape: tuple[int, int, int],
        judge: Judge | None,
        features: str | None = None,
        reference: str | Path | None = None,
    ) -> "Yardstick":
        """For images of `shape`. features: a name, see `features_from`; default: those of the judge. reference: a path,
        see `open_reference`; default: held-out images of the judge, or of the judge with the name of the features.
        Without features, no distances are measured.

        Raises ValueError if these do not fit together. Only headers and statistics are read.
        """
        files = None if reference is None else open_reference(reference)
        name = features or (None if judge is None else judge.name)
        if name is None:
            if files is not None:
                raise ValueError(
                    f"distances to a reference are between features of images: give --features, {FEATURES.forms()}"
                )
            return cls(judge)
        space = features_from(name)
        dims = space.dims(shape)
        held_out = judge or judge_of(shape, name=name)
        if files is not None:
            files.check(dims, shape, space)
        elif held_out is None:
            raise ValueError(
                f"the features {name} need real images to compare: give --reference, a folder or .npz file"
            )
        return cls(judge, space, dims, files, held_out)

    def too_few(self, n: int) -> list[str]:
        """A warning for each of the two sets, n samples and real images, that is too small for a covariance."""
        if self.features is None:
            return []
        counts = {"samples": n}
        if self.files is None:
            counts["real images"] = len(self.held_out.held_out()[0])
        elif self.files.statistics is None:
            counts["real images"] = self.files.images.count
        return [
            f"{count} {what} are too few for a covariance of {self.dims} features: the Fréchet distance comes out too "
            f"large; take more than {self.dims}, better ten times as many"
            for what, count in counts.items()
            if count <= self.dims
        ]

    def reference(self, progress: bool = False) -> Reference | None:
        """The reference for distances, or None. Extracts features of real images, which takes time."""
        if self.features is None:
            return None
        if self.files is not None:
            return self.files.read(self.features, progress)
        return Reference.of(extract(self.features, [self.held_out.held_out()[0]]))
