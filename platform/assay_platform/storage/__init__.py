"""Files that are either whole or absent; values in hot, warm and cold tiers; a log that survives a kill."""

from assay_platform.storage.files import atomic_file, atomic_folder, write_bytes, write_json

__all__ = ["atomic_file", "atomic_folder", "write_bytes", "write_json"]
