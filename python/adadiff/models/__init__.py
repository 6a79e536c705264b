"""The networks. A further one is a file with its `Family`, and a line here."""

from . import dit, mmdit, pixart, uvit
from .interface import Family

FAMILIES: dict[str, Family] = {"uvit": uvit.FAMILY, "dit": dit.FAMILY, "pixart": pixart.FAMILY, "mmdit": mmdit.FAMILY}
