"""The table that the fraud benchmarks share."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from assay_pipelines.datasets.catalogue import CATALOGUE, EVENTS, get_dataset
from assay_pipelines.options import RunOptions
from assay_platform.config import load_config


def ieee_options(call: argparse.Namespace, **schema: Any) -> RunOptions:
    """IEEE-CIS, its schema with changes. call: `data`, a folder with the table, and `rows`, how many of the newest."""
    config = load_config()
    folder = Path(call.data) if call.data else get_dataset("ieee-cis", config.paths.data)
    return RunOptions(
        config=config, application="fraud", data="ieee-cis", table=folder / EVENTS,
        schema=replace(CATALOGUE["ieee-cis"].schema(folder), **schema), schema_folder=folder,
        model_name="fraud-bench", max_rows=call.rows,
    )  # fmt: skip
