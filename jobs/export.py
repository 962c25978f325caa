"""Write the current lists as one flat file, Parquet or CSV, a row a neighbor, for other people's tools."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow.csv import CSVWriter
from pyarrow.parquet import ParquetWriter

from conf.errors import MachineError, SettingsError
from conf.tables import ITEM_NEIGHBORS
from jobs.arguments import add_config, report_errors, settings_of
from jobs.reader import lake_root, open_table

_WRITERS = {".parquet": ParquetWriter, ".csv": CSVWriter}
_OF_LIST = ("item_id", "head", "run_date", "run_id")
_SCHEMA = pa.schema(
    [
        ("item_id", pa.string()),
        ("head", pa.string()),
        ("rank", pa.int32()),
        ("neighbor_id", pa.string()),
        ("score", pa.float64()),
        ("run_date", pa.date32()),
        ("run_id", pa.string()),
    ]
)


def neighbor_rows(batch: pa.RecordBatch) -> pa.Table:
    """item_id, head, run_date, run_id and neighbors -> a row a neighbor, with its rank from 1."""
    neighbors = batch.column("neighbors")
    parents = pc.list_parent_indices(neighbors)
    flat = pc.list_flatten(neighbors)
    lengths = pc.fill_null(pc.list_value_length(neighbors), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if len(lengths) else np.zeros(0, np.int64)
    columns = {name: pc.take(batch.column(name), parents) for name in _OF_LIST}
    columns["rank"] = pa.array(np.arange(len(flat)) - np.repeat(starts, lengths) + 1, pa.int32())
    columns |= {name: pc.struct_field(flat, name) for name in ("neighbor_id", "score")}
    return pa.Table.from_arrays([columns[name] for name in _SCHEMA.names], schema=_SCHEMA)


def export(root: str, out: str, *, head: str | None = None) -> int:
    """Write all lists; memory holds one batch, and an earlier file stays until the new one is whole.

    Args:
        root: of the lake.
        out: path that ends in .parquet or .csv.
        head: only the lists of this name; None: all.

    Returns:
        The number of rows.

    Raises:
        SettingsError: the path ends in something else.
        TableError: nothing is published yet.
        MachineError: the file cannot be written.
    """
    if (writer_of := _WRITERS.get(Path(out).suffix)) is None:
        raise SettingsError(f"--out {out} ends in {Path(out).suffix or 'nothing'}; wanted .parquet or .csv, which says what is written")
    num_rows, batches, partial = 0, _batches(root, head), Path(f"{out}.partial")
    try:
        with writer_of(partial, _SCHEMA) as writer:
            for batch in batches:
                rows = neighbor_rows(batch)
                writer.write_table(rows)
                num_rows += rows.num_rows
        partial.replace(out)
    except OSError as error:
        raise MachineError(f"cannot write {out}: {error}; name a file in a folder that is there, on a disk with room") from error
    return num_rows


def _batches(root: str, head: str | None) -> Iterator[pa.RecordBatch]:
    dataset = open_table(root, ITEM_NEIGHBORS).to_pyarrow_dataset()  # before anything is written: it may not be there
    wanted = None if head is None else pc.field("head") == head
    return iter(dataset.to_batches(columns=[*_OF_LIST, "neighbors"], filter=wanted, batch_size=16_384))


def main(argv: Sequence[str] | None = None) -> None:
    """Export."""
    parser = argparse.ArgumentParser(description="current lists to one file")
    parser.add_argument("--out", required=True, help="the file to write, .parquet or .csv")
    parser.add_argument("--head", help="only these lists, e.g. merged; default: all")
    add_config(parser, default="demo")

    def run() -> None:
        values = parser.parse_args(argv)
        settings = settings_of(values)
        if values.head is not None and values.head not in settings.list_names:
            raise SettingsError(f"no list named {values.head!r}; have {settings.list_names}")
        num_rows = export(lake_root(settings.lake), values.out, head=values.head)
        print(f"{num_rows:,} neighbors in {values.out}")

    report_errors(run)


if __name__ == "__main__":
    main()
