"""Items that came after training, and files of lines that all processes of a model name share."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from assay_features.events import canonical_key
from assay_features.schema import ItemTable
from assay_platform.errors import DataError

Row = dict[str, str]


def parse_items(records: Sequence[Mapping[str, Any]], table: ItemTable) -> list[Row]:
    """Rows of the item table as text; a list of categories becomes one text.

    Raises:
        DataError: a column is not known, a value is no text, number or list of them, or an id is missing or twice.
    """
    columns = dict.fromkeys((table.id, *table.text, *table.categorical))
    rows: list[Row] = []
    seen: set[str] = set()
    for number, record in enumerate(records):
        row: Row = {}
        for name, value in record.items():
            where = f"items[{number}].{name}"
            if name not in columns:
                raise DataError(f"{where}: is not a column of the item table; allowed are {', '.join(columns)}")
            try:
                parts = [canonical_key(part) for part in (value if isinstance(value, list) else [value])]
            except ValueError as error:
                raise DataError(f"{where}: {error}") from error
            text = "|".join(part for part in parts if part is not None)
            if text:
                row[name] = text
        if table.id not in row:
            raise DataError(f"items[{number}].{table.id}: is missing")
        if row[table.id] in seen:
            raise DataError(f"items[{number}].{table.id}: {row[table.id]!r} is there twice")
        seen.add(row[table.id])
        rows.append(row)
    return rows


class SharedLines:
    """JSON lines, appended whole and never changed, so that whoever reads sees complete ones only.

    sync: each is on disk when `add` returns; else when the system writes it.
    """

    def __init__(self, path: Path, *, sync: bool = True) -> None:
        self._path, self._sync = path, sync

    def size(self) -> int:
        """Bytes; 0 before the first line."""
        try:
            return self._path.stat().st_size
        except FileNotFoundError:
            return 0

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """One line each."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, text.encode())
            if self._sync:
                os.fsync(file)
        finally:
            os.close(file)

    def since(self, offset: int) -> tuple[list[Any], int]:
        """Lines from a byte on, and where to go on."""
        if self.size() <= offset:
            return [], offset
        with self._path.open("rb") as file:
            file.seek(offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        return [json.loads(line) for line in whole.splitlines()], offset + len(whole)
