"""Write the current lists as one flat Parquet file, a row a neighbor, for other people's tools."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from conf.tables import ITEM_NEIGHBORS
from jobs.arguments import add_config, report_errors, settings_of
from jobs.reader import lake_root, open_table

_SCHEMA = pa.schema(
    [("item_id", pa.string()), ("head", pa.string()), ("rank", pa.int32()), ("neighbor_id", pa.string()), ("score", pa.float64())]
)


def neighbor_rows(batch: pa.RecordBatch) -> pa.Table:
    """item_id, head, neighbors -> item_id, head, rank (from 1), neighbor_id, score."""
    neighbors = batch.column("neighbors")
    parents = pc.list_parent_indices(neighbors)
    flat = pc.list_flatten(neighbors)
    lengths = pc.fill_null(pc.list_value_length(neighbors), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if len(lengths) else np.zeros(0, np.int64)
    ranks = np.arange(len(flat)) - np.repeat(starts, lengths) + 1
    columns = [
        pc.take(batch.column("item_id"), parents),
        pc.take(batch.column("head"), parents),
        pa.array(ranks, pa.int32()),
        pc.struct_field(flat, "neighbor_id"),
        pc.struct_field(flat, "score"),
    ]
    return pa.Table.from_arrays(columns, schema=_SCHEMA)


def _batches(root: str) -> Iterator[pa.RecordBatch]:
    dataset = open_table(root, ITEM_NEIGHBORS).to_pyarrow_dataset()  # before anything is written: it may not be there
    return iter(dataset.to_batches(columns=["item_id", "head", "neighbors"], batch_size=16_384))


def export(root: str, out: str) -> int:
    """Write all lists and return the number of rows; memory holds one batch, and an earlier file stays until the new one is whole."""
    num_rows, batches = 0, _batches(root)
    partial = Path(f"{out}.partial")
    with pq.ParquetWriter(partial, _SCHEMA) as writer:
        for batch in batches:
            rows = neighbor_rows(batch)
            writer.write_table(rows)
            num_rows += rows.num_rows
    partial.replace(out)
    return num_rows


def main(argv: Sequence[str] | None = None) -> None:
    """Export."""
    parser = argparse.ArgumentParser(description="current lists to one Parquet file")
    parser.add_argument("--out", required=True, help="the file to write")
    add_config(parser, default="demo")

    def run() -> None:
        values = parser.parse_args(argv)
        num_rows = export(lake_root(settings_of(values).lake), values.out)
        print(f"{num_rows:,} neighbors in {values.out}")

    report_errors(run)


if __name__ == "__main__":
    main()
