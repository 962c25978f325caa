"""The filter work of `make bench-neighbors`: what a trigger costs when filters or limits leave its lists little to choose from.

Items are random unit vectors; every market holds a hundredth of them, but one that holds sixty; brands are twenty, so that three of each
cannot fill a list of a hundred; variants come in threes.
"""

import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from conf.settings import FilterSettings, LimitSettings, RetrievalSettings
from models.data import TRENDS, Ints
from models.eligibility import FilterColumn, FilterColumns
from models.merge import Policies, Policy
from models.neighbors import Counted, Retriever, build_index
from models.user_level import UserLevel

Json = dict[str, Any]
_DIMENSION = 63  # and the bias makes 64
_TRIGGERS = 256
_SHARED = FilterSettings(column="market", rule="shared", missing=False)
_CASES = {
    "no rule": {},
    "a market of 1 % shared": {"filters": [_SHARED]},
    "a market of 60 items shared": {"filters": [_SHARED]},
    "no variants": {"filters": [FilterSettings(column="parent", rule="different")]},
    "3 of each of 20 brands": {"limits": [LimitSettings(by="brand", at_most=3)]},
}


def filters(folder: Path, num_items: int) -> Iterator[Json]:
    """Milliseconds a trigger, one thread, of all three lists under each rule."""
    place = folder / f"filters-{num_items}"
    if not (place / "rare.npy").is_file():
        _lay(place, num_items)
    retriever, rare = Retriever.open(place), np.load(place / "rare.npy")
    for name, rules in _CASES.items():
        settings = RetrievalSettings(search="exact", list_length=100, **rules)  # type: ignore[arg-type]
        triggers = rare if "60" in name else np.arange(_TRIGGERS, dtype=np.int32) * (num_items // _TRIGGERS)
        retriever.retrieve(triggers[:1], _nothing_counted(1), _policies(1), settings=settings)  # maps what is looked at
        begin = time.perf_counter()
        lists = retriever.retrieve(triggers, _nothing_counted(len(triggers)), _policies(len(triggers)), settings=settings)
        seconds = (time.perf_counter() - begin) / len(triggers)
        lengths = np.diff(lists.heads["merged"].offsets)
        note = f"{1000 * seconds:.1f} ms a trigger; merged lists of {lengths.min()} to {lengths.max()}"
        row = {"work": f"lists under {name}", "size": num_items, "method": "mtmh", "runs": len(triggers), "note": note}
        yield row | dict.fromkeys(("median_s", "min_s", "max_s"), seconds)


def _nothing_counted(num_triggers: int) -> Counted:
    nothing = np.zeros(0, np.int64)
    indptr = np.zeros(num_triggers + 1, np.int64)
    return Counted(indptr=indptr, target=nothing.astype(np.int32), weight=nothing.astype(np.float32), num_user_days=nothing)


def _policies(num_triggers: int) -> Policies:
    return Policies.same(Policy(kind="blend", value=0.01, popularity_exponent=0.0), num_triggers)


def _lay(folder: Path, num_items: int) -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((num_items, _DIMENSION), np.float32)
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    vectors = tuple(np.column_stack([base, np.full(num_items, bias, np.float32)]) for bias in (1, 0))
    market = rng.integers(1, 100, num_items)
    rare = np.sort(rng.choice(num_items, 60, replace=False)).astype(np.int32)
    market[rare] = 0
    columns = {"market": market, "brand": rng.integers(0, 20, num_items), "parent": np.arange(num_items) // 3, "": np.zeros(num_items, int)}
    users = csr_array((np.ones(num_items, np.float32), (rng.integers(0, 1000, num_items), np.arange(num_items))), shape=(1000, num_items))
    build_index(
        folder,
        item_ids=[f"{number:07d}" for number in range(num_items)],
        head_vectors={"engagement": (vectors[0], vectors[1]), "relevance": (vectors[0], vectors[1])},
        content=base,
        popularity_p=rng.pareto(1, num_items).astype(np.float32) + 1,
        eligible=np.ones(num_items, np.bool_),
        new=np.zeros(num_items, np.bool_),
        category_codes=np.zeros((num_items, 1), np.int32),
        category_names=["all"],
        tags=FilterColumn.encode([None] * num_items),
        filters=FilterColumns(columns={name: _column(codes) for name, codes in columns.items()}, as_of=date(2024, 1, 1)),
        trends=np.zeros((num_items, len(TRENDS)), np.float32),
        user_level=UserLevel.of(users, min_users=2),
        scorer_file=None,
        settings=RetrievalSettings(search="exact"),
    )
    np.save(folder / "rare.npy", rare)


def _column(codes: Ints) -> FilterColumn:
    return FilterColumn(codes=codes.astype(np.int32)[:, None], values=[str(code) for code in range(int(codes.max()) + 1)])
