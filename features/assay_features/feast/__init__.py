"""Definitions behind Feast: a columnar offline store, and the repository of one model's features.

Importing `feast` takes seconds, so nothing here is imported by `assay --help` or by the package above.
"""
