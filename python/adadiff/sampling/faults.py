"""What an error that ends a forward pass is: for whoever runs the program, for want of memory, or of a sample."""

import threading

import torch


def is_interrupt(error: BaseException) -> bool:
    """Whether it is for whoever runs the program, as Ctrl-C is, and no fault of a sample's. Signal handlers run in the
    main thread only."""
    return not isinstance(error, Exception) and threading.current_thread() is threading.main_thread()


def is_memory_error(error: BaseException) -> bool:
    """Whether memory ran out; on a CPU PyTorch says so in words only."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
