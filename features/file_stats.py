"""Delta's statistics of a file that Spark has not written, by which readers skip it: of all plain columns, or readers lose rows.

Where a file states the ends of some columns and not those of others, delta-rs compares the others with null, which no row survives: a
filtered `to_pyarrow_dataset` then returns nothing, without a word.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc


@dataclass
class FileStats:
    """Of the rows written so far, which hold no null.

    Attributes:
        num_rows: of the file.
        ends: least and greatest value by column, of those that have an order.
    """

    num_rows: int = 0
    ends: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def add(self, rows: pa.Table) -> None:
        """Count rows in. Of coded columns the dictionary counts, which may hold more than the rows do: bounds may be loose."""
        if not rows.num_rows:
            return
        self.num_rows += rows.num_rows
        for column, values in zip(rows.schema, rows.columns, strict=True):
            if not pa.types.is_nested(column.type):
                found = [end for part in _parts(values) for end in pc.min_max(part).as_py().values()]
                found += self.ends.get(column.name, ())
                self.ends[column.name] = min(found), max(found)

    def as_json(self) -> str:
        """As a commit states them."""
        low, high = ({name: _plain(ends[place]) for name, ends in self.ends.items()} for place in (0, 1))
        return json.dumps({"numRecords": self.num_rows, "minValues": low, "maxValues": high, "nullCount": dict.fromkeys(self.ends, 0)})


def _parts(values: pa.ChunkedArray) -> Iterator[pa.Array]:
    for chunk in values.chunks:
        part = chunk.dictionary if pa.types.is_dictionary(chunk.type) else chunk
        if len(part):
            yield part


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, date) else value
