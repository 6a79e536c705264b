"""The networks. To add one, write a file with a `Family` and list it here."""

from . import dit, mmdit, pixart, uvit
from .interface import Family

FAMILIES: dict[str, Family] = {"uvit": uvit.FAMILY, "dit": dit.FAMILY, "pixart": pixart.FAMILY, "mmdit": mmdit.FAMILY}
