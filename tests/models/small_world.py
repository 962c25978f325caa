"""Small training data with known neighbors, as arrays and as Delta tables.

Item b-c belongs to bundle b and category c. Users engage inside a bundle; content tells the category alone.
"""

from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
from deltalake import write_deltalake

from conf.settings import HeadSettings, ModelSettings, RetrievalSettings, TrainingSettings
from models.data import TRENDS, Examples, Floats, History, Sparse, TableRef, TrainingData, load_training_data, sparse_rows
from models.draws import item_keys
from models.mtmh import Mtmh
from models.scorer import CandidateSource, Widths
from models.spec import TrainingSpec
from models.start import candidate_source, head_vectors
from models.user_level import UserLevel

RUN_DATE = date(2024, 4, 9)
LANDMARK = date(2024, 3, 1)
HOLDOUT_FROM = date(2024, 4, 5)
HALF_LIFE = 30.0


@dataclass(frozen=True, kw_only=True)
class SmallWorld:
    """Sizes and seed; the last item is new (content only), the one before it has neither content nor history."""

    num_bundles: int = 15
    num_categories: int = 5
    num_users: int = 60
    seed: int = 5
    num_missing: int = 0  # of the last baskets, which have not happened yet
    num_stray: int = 0  # items of other bundles in every basket, so that counts and lists have noise

    @property
    def num_known(self) -> int:
        return self.num_bundles * self.num_categories

    @property
    def item_ids(self) -> list[str]:
        known = [f"b{b:02d}-c{c}" for b in range(self.num_bundles) for c in range(self.num_categories)]
        return [*known, "x-empty", "y-new-c0"]

    def bundle_of(self, item: int) -> set[int]:
        start = item // self.num_categories * self.num_categories
        return set(range(start, start + self.num_categories)) - {item}

    def category_of(self, item: int) -> set[int]:
        return set(range(item % self.num_categories, self.num_known, self.num_categories)) - {item}

    def content(self) -> np.ndarray:
        rows = np.zeros((self.num_known + 2, 8), np.float32)
        rows[np.arange(self.num_known), np.arange(self.num_known) % self.num_categories] = 1
        rows[-1, 0] = 1
        return rows

    def baskets(self) -> list[tuple[int, date, list[int]]]:
        """(user, day, items of one bundle); popularity falls with the bundle's number."""
        rng = np.random.default_rng(self.seed)
        share = 1 / (1 + np.arange(self.num_bundles))
        out = []
        for user in range(self.num_users):
            for _ in range(6):
                bundle = int(rng.choice(self.num_bundles, p=share / share.sum()))
                items = rng.choice(self.num_categories, int(rng.integers(3, self.num_categories + 1)), replace=False)
                day = LANDMARK + timedelta(days=int(rng.integers(40)))
                strays = rng.choice(self.num_known, self.num_stray) if self.num_stray else items[:0]
                out.append((user, day, sorted({*(bundle * self.num_categories + items).tolist(), *strays.tolist()})))
        return sorted(out, key=lambda basket: basket[1])[: len(out) - self.num_missing]

    def tables(self) -> dict[str, pa.Table]:
        """The columns that training reads, by table name."""
        ids = self.item_ids
        pairs: dict[tuple[date, int, int], set[int]] = {}
        seen: dict[tuple[date, int], set[int]] = {}
        for user, day, items in self.baskets():
            for i in items:
                seen.setdefault((day, i), set()).add(user)
                for j in set(items) - {i}:
                    pairs.setdefault((day, i, j), set()).add(user)
        daily = [
            {"event_date": d, "trigger_item_id": ids[i], "target_item_id": ids[j], "num_users": len(u)}
            for (d, i, j), u in pairs.items()
            if ids[i] < ids[j]
        ]
        sums: dict[tuple[int, ...], list[float]] = {}
        for key, users in [*pairs.items(), *seen.items()]:
            weight = len(users) * 2 ** ((key[0] - LANDMARK).days / HALF_LIFE)
            total = sums.setdefault(key[1:], [0.0, 0.0])
            total[0] += weight
            total[1] += weight if key[0] < HOLDOUT_FROM else 0
        days = {"landmark_date": LANDMARK, "holdout_from": HOLDOUT_FROM}
        weights = {key: {"weight": w[0], "fit_weight": w[1], **days} for key, w in sums.items()}
        events = [{"user_id": f"u{u}", "item_id": ids[i], "event_date": d} for u, d, items in self.baskets() for i in items]
        near = [(i, j, 1.0) for i in range(self.num_known) for j in sorted(self.category_of(i))[:10]]
        unlike = [(i, j, 0.0) for i in range(self.num_known) for j in sorted(self.bundle_of(i))]
        features = [
            {"item_id": item_id, "item_index": i, "content_vector": row, "eligible": item_id != "x-empty"}
            for i, (item_id, row) in enumerate(zip(ids, self.content().tolist(), strict=True))
        ]
        rows = {
            "engagements": events,
            "co_engagement_daily": daily,
            "co_engagement_pairs": [
                {"trigger_item_id": ids[k[0]], "target_item_id": ids[k[1]], **w} for k, w in weights.items() if len(k) == 2
            ],
            "item_popularity": [{"item_id": ids[k[0]], **w} for k, w in weights.items() if len(k) == 1],
            "item_features": features,
            "relevance_examples": [{"item_id": ids[i], "other_item_id": ids[j], "target": t} for i, j, t in near + unlike],
        }
        return {name: pa.Table.from_pylist(content) for name, content in rows.items()}

    def write(self, folder: Path) -> dict[str, TableRef]:
        """Delta tables below a folder, pinned."""
        for name, table in self.tables().items():
            write_deltalake(str(folder / name), table)
        return {name: TableRef(uri=str(folder / name), version=0) for name in self.tables()}

    def load(self, folder: Path) -> TrainingData:
        """Training data through Delta."""
        return load_training_data(self.write(folder), run_date=RUN_DATE, half_life_days=HALF_LIFE, symmetric=True)


def make_spec(folder: Path, tables: dict[str, TableRef] | None = None, **training: object) -> TrainingSpec:
    """A quick training of both heads."""
    heads = {"engagement": HeadSettings(engagement=1.0, relevance=0.05), "relevance": HeadSettings(relevance=1.0, affinity=2.0)}
    quick: dict[str, object] = {"device": "cpu", "num_steps": 12, "batch_size": 32, "num_validation_triggers": 60, "timeout_seconds": 60}
    return TrainingSpec(
        tables=tables or {},
        run_date=RUN_DATE,
        half_life_days=HALF_LIFE,
        symmetric=True,
        min_users=2,
        folder=str(folder),
        model=ModelSettings(heads=heads, dimension=16, hidden_dimension=24),
        training=TrainingSettings.model_validate(quick | training),
        widths=Widths.of(RetrievalSettings()),
    )


def empty_history(num_items: int, num_users: int = 2) -> History:
    """Nobody did anything."""
    pairs, users = (sparse_rows([], [], [], (rows, num_items)) for rows in (num_items, num_users))
    return make_history(pairs, users, np.zeros(num_items, np.float32))


def make_history(pairs: Sparse, user_items: Sparse, popularity: Floats) -> History:
    """A history of which nobody knows the days."""
    trends = np.zeros((len(popularity), len(TRENDS)), np.float32)
    keys = item_keys(map(str, range(len(popularity))))
    return History(pairs=pairs, user_items=user_items, popularity=popularity, trends=trends, keys=keys)


def source_of(data: TrainingData, model: Mtmh, *, min_users: int) -> CandidateSource:
    """Candidates as of what `data.full` knows."""
    return candidate_source(data, head_vectors(model), UserLevel.of(data.full.user_items, min_users=min_users))


def no_examples() -> Examples:
    """No graded pair."""
    return Examples(trigger=np.zeros(0, np.int32), other=np.zeros(0, np.int32), target=np.zeros(0, np.float32))
