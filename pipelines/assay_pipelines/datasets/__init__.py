"""Public data sets, fetched once and never committed; and tables that a user brings."""

from assay_pipelines.datasets.catalogue import CATALOGUE, Dataset, get_dataset
from assay_pipelines.datasets.table import LoadedTable, load_table

__all__ = ["CATALOGUE", "Dataset", "LoadedTable", "get_dataset", "load_table"]
