"""Names of tests."""

import re


def named(value: object) -> str:
    """`value` as text without addresses: processes that share the tests out must know them by the same names."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
