"""Synthetic catalogs with known neighbors.

The bundle world: item b-c belongs to bundle b and category c. Users buy inside a bundle; text and category only tell c. So the items
engaged together with an item are exactly the rest of its bundle, and the relevant ones exactly the rest of its category: the two goals
never agree, and the answer of each is known.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

START = datetime(2024, 3, 1)
_WORDS = ("apple pie", "garden hose", "wool scarf", "chess board", "tea kettle", "rain boots")


@dataclass(frozen=True, kw_only=True)
class BundleWorld:
    """Sizes and seed of a world; `num_days` days from START."""

    num_bundles: int = 12
    num_categories: int = 5
    num_users: int = 80
    num_days: int = 40
    sessions_per_user: int = 6
    seed: int = 3

    def item_id(self, bundle: int, category: int) -> str:
        """Id of an item."""
        return f"b{bundle:02d}-c{category}"

    def bundle_of(self, item_id: str) -> set[str]:
        """The other items of an item's bundle: its engagement neighbors."""
        bundle = int(item_id[1:3])
        return {self.item_id(bundle, category) for category in range(self.num_categories)} - {item_id}

    def category_of(self, item_id: str) -> set[str]:
        """The other items of an item's category: its relevance neighbors."""
        category = int(item_id[-1])
        return {self.item_id(bundle, category) for bundle in range(self.num_bundles)} - {item_id}

    def events(self) -> pd.DataFrame:
        """Columns who, what, at (timestamp), basket: baskets of three to all items of one bundle."""
        rng = np.random.default_rng(self.seed)
        rows = []
        for user in range(self.num_users):
            for session in range(self.sessions_per_user):
                at = START + timedelta(seconds=int(rng.integers(self.num_days * 86_400)))
                bundle = int(rng.integers(self.num_bundles))
                size = int(rng.integers(3, self.num_categories + 1))
                chosen = rng.choice(self.num_categories, size=size, replace=False)
                rows += [(f"u{user:03d}", self.item_id(bundle, int(category)), at, f"s{user:03d}-{session}") for category in chosen]
        return pd.DataFrame(rows, columns=["who", "what", "at", "basket"]).assign(
            at=lambda f: f["at"].astype("datetime64[us]").dt.tz_localize("UTC")
        )

    def items(self) -> pd.DataFrame:
        """Columns sku, name, words, section: the text and the category tell c and nothing of b."""
        rows = [
            (self.item_id(b, c), _WORDS[c].title(), _WORDS[c], f"section {c}")
            for b in range(self.num_bundles)
            for c in range(self.num_categories)
        ]
        return pd.DataFrame(rows, columns=["sku", "name", "words", "section"])

    def write(self, folder: Path) -> None:
        """Lay `events/` and `items/` below the folder as Parquet."""
        for name, frame in (("events", self.events()), ("items", self.items())):
            (folder / name).mkdir(parents=True, exist_ok=True)
            frame.to_parquet(folder / name / "part-0.parquet", index=False)


def write_config(folder: Path, **sections: object) -> Path:
    """A user's own settings file for a world that lies in `folder`; further sections override by name."""
    content = {
        "lake": {"root": str(folder / "lake")},
        "source": {
            "events": {
                "path": str(folder / "events"),
                "columns": {"user_id": "who", "item_id": "what", "engaged_at": "at", "session_id": "basket"},
            },
            "items": {
                "path": str(folder / "items"),
                "columns": {"item_id": "sku", "title": "name", "text": "words", "categories": ["section"]},
            },
        },
        "pairs": {"window": {"kind": "session", "symmetric": True}, "half_life_days": 30, "rebuild_below": 0, "max_stale_share": 0.5},
        "features": {"content_dimensions": 8, "num_content_examples": 10},
        "model": {
            "dimension": 16,
            "hidden_dimension": 16,
            "heads": {"relevance": {"relevance": 1.0, "affinity": 0.0}},  # content alone, so that its answer is known too
        },
        "training": {"num_steps": 20, "batch_size": 64, "num_validation_triggers": 20, "num_threads": 1},
        "retrieval": {"list_length": 10},
        "evaluation": {"horizon_days": 7, "num_bootstrap": 50, "cutoffs": [5]},
        "spark": {"driver_memory": "2g", "shuffle_partitions": 2},
    }
    content |= sections
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
