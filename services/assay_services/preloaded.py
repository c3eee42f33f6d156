"""What the process that others are forked from imports: all that they need, and nothing that starts a thread."""

import gc

import assay_services.front
import assay_services.scorer  # noqa: F401

# Forked processes share these objects as long as nobody writes to them, as collections of garbage would.
gc.freeze()
