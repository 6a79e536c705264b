"""A few-step student draws first, a teacher where an oracle asks for better (Starodubcev et al., CVPR 2024)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cascade:
    """path: a file of `adadiff distill`, with the student, the oracle and its quantiles. Spelled "cascade:FILE"."""

    path: str

    def __str__(self) -> str:
        return f"cascade:{self.path}"
