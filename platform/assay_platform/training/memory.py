"""Memory that a step frees stays with the process for the next one.

The C library gives large buffers back to the system as soon as they are freed and asks for them again a moment later,
and the system clears every page anew. A training step on a CPU frees and asks for the same few megabytes a hundred
times; on two busy cores a tenth to a third of its time went into that.
"""

import ctypes
from functools import cache

# Names of <malloc.h>, which Python does not have.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Larger ones, such as whole tables, go back: pieces of them would be kept long after they are needed.
_KEPT_BUFFER, _KEPT_IN_ALL = 64 << 20, 256 << 20


@cache
def keep_freed_memory() -> bool:
    """Ask the C library to keep what it can; whether it will. Of no effect where it is not GNU's."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEPT_BUFFER) and mallopt(_M_TRIM_THRESHOLD, _KEPT_IN_ALL))
