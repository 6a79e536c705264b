"""Which lanes still run, and in which rows: formula in reference.py; kept by the host (active_set.py) or by a GPU
(device_set.py)."""

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
