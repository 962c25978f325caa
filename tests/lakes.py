"""A lake written by hand, without Spark: what the explorer reads of a published night and of the one before."""

from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import write_deltalake

from conf.settings import Settings, load_settings
from conf.tables import (
    CO_ENGAGEMENT_PAIRS,
    ITEM_ANNOTATIONS,
    ITEM_FEATURES,
    ITEM_NEIGHBORS,
    ITEM_NEIGHBORS_HISTORY,
    ITEM_POPULARITY,
    RELEVANCE_FEEDBACK,
    RUNS,
    Table,
)
from models.list_rows import ARROW_SCHEMA
from tests.worlds import write_config

NIGHT = date(2024, 3, 31)
START = datetime(1970, 1, 1, tzinfo=UTC)
RUN, RUN_BEFORE = "2024-03-31-aaaaaaaa", "2024-03-30-bbbbbbbb"
_TYPES = {
    "string": pa.string(), "double": pa.float64(), "bigint": pa.int64(), "int": pa.int32(), "boolean": pa.bool_(), "date": pa.date32(),
    "timestamp": pa.timestamp("us", "UTC"), "array<string>": pa.list_(pa.string()), "array<double>": pa.list_(pa.float64()),
    "array<float>": pa.list_(pa.float32()), "map<string,string>": pa.map_(pa.string(), pa.string()),
    "map<string,bigint>": pa.map_(pa.string(), pa.int64()), "map<string,double>": pa.map_(pa.string(), pa.float64()),
}  # fmt: skip
Lists = Mapping[tuple[str, str], Sequence[str]]
"""Neighbor ids by item and head."""


def write_table(root: Path, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of a declared table; what a row leaves out is null, or zero where the table wants a number."""
    fields = [
        pa.field(c.name, _TYPES.get(c.type, ARROW_SCHEMA.field("neighbors").type), nullable=c.nullable)
        for c in table.columns
        if _fits(c.type)
    ]
    schema = pa.schema(fields)
    whole = [{field.name: row.get(field.name, _nothing(field)) for field in fields} for row in rows]
    write_deltalake(str(root / table.name), pa.Table.from_pylist(whole, schema=schema), mode="append")


def _fits(type_: str) -> bool:
    return type_ in _TYPES or type_.startswith("array<struct")


def _nothing(field: pa.Field) -> Any:
    if field.nullable:
        return None
    if pa.types.is_list(field.type) or pa.types.is_map(field.type):
        return []
    return {pa.string(): "", pa.bool_(): False, pa.date32(): NIGHT, pa.timestamp("us", "UTC"): datetime(2024, 4, 1, tzinfo=UTC)}.get(
        field.type, 0
    )


def write_lake(folder: Path, items: Sequence[Mapping[str, Any]], *, lists: Lists, before: Lists, **sections: object) -> Settings:
    """The tables of a night and of the one before it; items need item_id, title and num_user_days."""
    settings = load_settings(str(write_config(folder, **sections)))
    root = Path(settings.lake.root)
    known = [
        {"in_catalog": True, "eligible": True, "age_days": 30, "categories": ["shop"], "item_index": index} | dict(item)
        for index, item in enumerate(items)
    ]
    write_table(root, ITEM_FEATURES, known)
    engaged = [item for item in known if item["num_user_days"]]
    write_table(root, ITEM_POPULARITY, [{"item_id": item["item_id"], "num_users": item["num_user_days"]} for item in engaged])
    pairs = [
        {"trigger_item_id": left["item_id"], "target_item_id": right["item_id"], "num_user_days": 2, "cosine": right["num_user_days"] / 100}
        for left in engaged
        for right in engaged
        if left is not right
    ]
    write_table(root, CO_ENGAGEMENT_PAIRS, pairs)
    texts = [{"item_id": item["item_id"], "text": item.get("text"), "event_timestamp": START, "created_timestamp": START} for item in known]
    later = datetime.combine(NIGHT + timedelta(days=1), time(), UTC)
    late = [row | {"text": "known too late", "created_timestamp": later, "event_timestamp": later - timedelta(days=1)} for row in texts]
    write_table(root, ITEM_ANNOTATIONS, [*texts, *late])
    write_table(root, ITEM_NEIGHBORS, _rows(lists, RUN, NIGHT))
    write_table(root, ITEM_NEIGHBORS_HISTORY, [*_rows(lists, RUN, NIGHT), *_rows(before, RUN_BEFORE, NIGHT - timedelta(days=1))])
    write_table(root, RELEVANCE_FEEDBACK, [])
    versions = {
        table.name: 0
        for table in (ITEM_ANNOTATIONS, ITEM_FEATURES, ITEM_POPULARITY, CO_ENGAGEMENT_PAIRS, ITEM_NEIGHBORS, ITEM_NEIGHBORS_HISTORY)
    }
    runs = [(RUN, NIGHT), (RUN_BEFORE, NIGHT - timedelta(days=1))]
    done = {"stage": "publish_neighbors", "status": "succeeded", "attempt": 1, "output_versions": list(versions.items())}
    write_table(root, RUNS, [done | {"run_id": run_id, "run_date": run_date} for run_id, run_date in runs])
    return settings


def _rows(lists: Lists, run_id: str, run_date: date) -> list[dict[str, Any]]:
    return [
        {"run_id": run_id, "run_date": run_date, "item_id": item_id, "head": head, "neighbors": _neighbors(ids)}
        for (item_id, head), ids in lists.items()
    ]


def _neighbors(ids: Sequence[str]) -> list[dict[str, Any]]:
    common = {"reason": "same <i>shop</i>; found by counts", "sources": ["counts"], "num_user_days": 2, "relevance": 0.5, "filled": False}
    return [common | {"neighbor_id": item_id, "score": 1 / rank} for rank, item_id in enumerate(ids, start=1)]
