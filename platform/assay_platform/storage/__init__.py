"""Files that are either whole or absent."""

from assay_platform.storage.files import atomic_file, atomic_folder, write_bytes, write_json

__all__ = ["atomic_file", "atomic_folder", "write_bytes", "write_json"]
