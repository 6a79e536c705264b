"""The networks. A further one is a file with its `Family`, and a line here."""

from . import dit, uvit
from .interface import Family

FAMILIES: dict[str, Family] = {"uvit": uvit.FAMILY, "dit": dit.FAMILY}
