"""Classifies errors of a forward pass: an interrupt, out of memory, or a sample's own."""

import threading

import torch


def is_interrupt(error: BaseException) -> bool:
    """Whether the error interrupts the program, as Ctrl-C does, rather than belonging to a sample. Signal handlers run
    in the main thread only."""
    return not isinstance(error, Exception) and threading.current_thread() is threading.main_thread()


def is_memory_error(error: BaseException) -> bool:
    """Whether memory ran out; on a CPU PyTorch tells by the message only."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
