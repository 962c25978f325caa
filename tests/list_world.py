"""A lake with published lists and kept candidates, laid without Spark: what rollback, merging again and online publication work on.

Tables have the columns of conf/tables.py; lists come from the retriever over a small random world.
"""

import json
import re
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
from deltalake import DeltaTable, write_deltalake
from scipy.sparse import csr_array

from conf.settings import Settings, load_settings
from conf.tables import CONTRACT_VERSION, ITEM_NEIGHBORS, ITEM_NEIGHBORS_HISTORY, MERGE_POLICY, RUNS, Table
from jobs.ledger import Ledger, StageRecord
from jobs.publication import publish_run
from jobs.reader import artifacts_of, lake_root, open_table
from models.data import TRENDS
from models.eligibility import FilterColumn, FilterColumns
from models.merge import read_policies
from models.neighbors import Counted, Retriever, build_index
from models.user_level import UserLevel
from tests.worlds import write_config

_SIMPLE = {
    "string": pa.string(),
    "double": pa.float64(),
    "bigint": pa.int64(),
    "int": pa.int32(),
    "boolean": pa.bool_(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us", tz="UTC"),
}


def arrow_type(ddl: str) -> pa.DataType:
    """A Spark SQL type of conf/tables.py as Arrow's."""
    if ddl in _SIMPLE:
        return _SIMPLE[ddl]
    kind, inner = re.fullmatch(r"(\w+)<(.*)>", ddl).groups()
    if kind == "array":
        return pa.list_(arrow_type(inner))
    parts = re.findall(r"((?:[^,<]|<[^>]*>)+)", inner)
    if kind == "map":
        return pa.map_(*map(arrow_type, parts))
    return pa.struct([(name, arrow_type(rest)) for name, _, rest in (part.partition(":") for part in parts)])


def arrow_schema(table: Table) -> pa.Schema:
    """A table's columns."""
    return pa.schema([pa.field(column.name, arrow_type(column.type), column.nullable) for column in table.columns])


@dataclass(kw_only=True)
class ListWorld:
    """One lake; nights are written by `night`, with item ids i000, i001, …; every fifth item is new.

    Attributes:
        folder: where settings and lake lie.
        overrides: further sections of the settings file.
    """

    folder: Path
    num_items: int = 90
    overrides: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        retrieval = {"list_length": 6, "num_candidates_head": 12, "block_size": 16}
        self.config = write_config(self.folder, retrieval=retrieval, **self.overrides)
        for table in (ITEM_NEIGHBORS, ITEM_NEIGHBORS_HISTORY, MERGE_POLICY, RUNS):
            DeltaTable.create(f"{self.root}/{table.name}", schema=arrow_schema(table), mode="error")
        self.set_policy(kind="blend", value=0.01)

    @property
    def settings(self) -> Settings:
        return load_settings(str(self.config))

    @property
    def root(self) -> str:
        return lake_root(load_settings(str(self.folder / "own.yaml")).lake)

    @property
    def ledger(self) -> Ledger:
        return Ledger(root=self.root)

    def set_policy(self, **values: object) -> int:
        """Replace the one row of merge_policy; returns its version."""
        row = {"scope": "default", "popularity_exponent": 0.0, **values}
        write_deltalake(
            f"{self.root}/{MERGE_POLICY.name}", pa.Table.from_pylist([row], schema=arrow_schema(MERGE_POLICY)), mode="overwrite"
        )
        return open_table(self.root, MERGE_POLICY).version()

    def night(self, run_date: date, *, seed: int, num_items: int | None = None, publish: bool = True, status: str = "succeeded") -> str:
        """Retrieve, write history in two files, keep candidates, publish; returns the run id."""
        run_id = f"{run_date}-{seed:08x}"
        lists = self._lists(run_id, seed, num_items or self.num_items)
        rows = {"run_date": run_date, "run_id": run_id, "model_version": f"model-{seed}", "contract_version": CONTRACT_VERSION}
        half = len(lists) // 2 // 3 * 3
        for part in (lists.slice(0, half), lists.slice(half)):
            columns = [
                part[c.name] if c.name in part.column_names else pa.array([rows[c.name]] * len(part), arrow_type(c.type))
                for c in ITEM_NEIGHBORS_HISTORY.columns
            ]
            table = pa.table(columns, schema=arrow_schema(ITEM_NEIGHBORS_HISTORY))
            write_deltalake(f"{self.root}/{ITEM_NEIGHBORS_HISTORY.name}", table, mode="append")
        outputs = {ITEM_NEIGHBORS_HISTORY.name: open_table(self.root, ITEM_NEIGHBORS_HISTORY).version()}
        if publish and status == "succeeded":
            version = open_table(self.root, ITEM_NEIGHBORS).version()
            outputs[ITEM_NEIGHBORS.name] = publish_run(self.root, run_id, expected=version, inputs={})
        self._record(run_id, run_date, status, outputs)
        return run_id

    def _lists(self, run_id: str, seed: int, num_items: int) -> pa.Table:
        """Rows of all lists by item and head; leaves index and candidates behind."""
        rng, night = np.random.default_rng(seed), artifacts_of(self.settings.lake, run_id)
        vectors = {head: tuple(rng.standard_normal((2, num_items, 7)).astype(np.float32)) for head in ("engagement", "relevance")}
        content = rng.standard_normal((num_items, 4)).astype(np.float32)
        codes = rng.integers(0, 4, (num_items, 1)).astype(np.int32)
        build_index(
            night / "index",
            item_ids=[f"i{item:03d}" for item in range(num_items)],
            head_vectors=vectors,
            content=content / np.linalg.norm(content, axis=1, keepdims=True),
            popularity_p=rng.pareto(1, num_items).astype(np.float32) + 1,
            eligible=rng.random(num_items) < 0.9,
            new=np.arange(num_items) % 5 == 0,
            category_codes=codes,
            tags=FilterColumn.encode([None] * num_items),
            category_names=[f"section {code}" for code in range(4)],
            trends=np.zeros((num_items, len(TRENDS)), np.float32),
            user_level=UserLevel.of(csr_array((rng.random((30, num_items)) < 0.1).astype(np.float32)), min_users=2),
            filters=FilterColumns.encode({}, coarsest=[f"section {code}" for code in codes[:, 0]], as_of=date(2024, 1, 1)),
            scorer_file=None,
            settings=self.settings.retrieval,
        )
        retriever, trigger = Retriever.open(night / "index"), np.arange(num_items, dtype=np.int32)
        target = (trigger[:, None] + np.arange(1, 4)) % num_items
        counted = Counted(
            indptr=np.arange(num_items + 1) * 3,
            target=target.ravel().astype(np.int32),
            weight=rng.random(num_items * 3).astype(np.float32),
            num_user_days=rng.integers(2, 9, num_items * 3),
        )
        policies = read_policies(open_table(self.root, MERGE_POLICY).to_pyarrow_table().to_pylist())
        found = retriever.retrieve(trigger, counted, retriever.policies_for(policies, trigger), settings=self.settings.retrieval, keep=True)
        (night / "candidates").mkdir()
        for kept in found.kept:
            kept.save(night / "candidates")
        return pa.Table.from_batches([retriever.to_arrow(found)]).sort_by([("item_id", "ascending"), ("head", "ascending")])

    def _record(self, run_id: str, run_date: date, status: str, outputs: dict[str, int]) -> None:
        ended = datetime.now(UTC)
        self.ledger.append(
            StageRecord(
                run_id=run_id,
                run_date=run_date,
                stage="publish_neighbors",
                attempt=1,
                status=status,
                started_at=ended - timedelta(seconds=1),
                ended_at=ended,
                seconds=1.0,
                input_versions={MERGE_POLICY.name: open_table(self.root, MERGE_POLICY).version(), "item_features": 7},
                output_versions=outputs,
                fingerprint="f",
                settings_fingerprint="s",
                metrics={},
                error=None if status == "succeeded" else "GateError: coverage: found 0.1, wanted at least 0.95",
            )
        )

    def current(self) -> dict[tuple[str, str], dict[str, object]]:
        """(item, head) to row of item_neighbors."""
        rows = open_table(self.root, ITEM_NEIGHBORS).to_pyarrow_table().to_pylist()
        return {(row["item_id"], row["head"]): row for row in rows}

    def metadata(self) -> dict[str, object]:
        """Of the newest commit of item_neighbors."""
        return json.loads(open_table(self.root, ITEM_NEIGHBORS).history(1)[0]["userMetadata"])
