"""Makes the C allocator keep the memory of usual messages, and give back that of huge ones."""

import ctypes

# From <malloc.h> of glibc.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

_KEPT_BYTES = 256 * 2**20
_LARGEST_HEAP_BLOCK_BYTES = 32 * 2**20


def keep_freed_memory() -> None:
    """Stops glibc from giving freed buffers back to the system at once; does nothing with another C library.

    A message with camera images is larger than the default thresholds (128 KiB), so every request would map, fault
    in and unmap its buffers page by page: parsing a 450 kB frame took 0.4 ms instead of 0.03 ms.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_HEAP_BLOCK_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def give_back() -> None:
    """Gives freed memory back to the system, after messages that are much larger than usual."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(_KEPT_BYTES)
