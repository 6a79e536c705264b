"""Compaction: which lanes still run, and in which rows. Formula in reference.py; the state is kept on the host
(active_set.py) or on a GPU (device_set.py)."""

from adadiff_kernels.compaction.active_set import ActiveSet, take_rows
from adadiff_kernels.compaction.device_set import CountSnapshot, DeviceSet, PinnedCount
from adadiff_kernels.compaction.reference import MAX_LANES, exit_rows_reference

__all__ = [
    "MAX_LANES",
    "ActiveSet",
    "CountSnapshot",
    "DeviceSet",
    "PinnedCount",
    "exit_rows_reference",
    "take_rows",
]
