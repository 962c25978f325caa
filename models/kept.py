"""What merging read about a block of triggers, kept so that a changed policy needs neither retrieval nor scoring.

Shapes: `B` triggers, `M` candidates and `P` counted pairs of all of them in flat lists, trigger b owning `offsets[b]:offsets[b + 1]`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from conf.errors import TableError
from models.data import Floats, Ints
from models.ranking import Longs

_CANDIDATES = {"item": np.int32, "sources": np.uint16, "log_p": np.float32, "relevance": np.float32, "num_users": np.int32}
_COUNTED = {"target": np.int32, "num_user_days": np.int64}


@dataclass(frozen=True, kw_only=True)
class KeptCandidates:
    """Candidates that the merged list may hold, and the counted pairs that reasons speak of.

    Attributes:
        trigger: (B,) item indices.
        offsets: (B + 1,) of the candidates.
        item: (M,) item indices, ascending within a trigger.
        sources: (M,) bit mask, as in `models.neighbors.Neighbors`.
        log_p: (M,) log p(j|i) of the scorer.
        relevance: (M,) score of the relevance head.
        num_users: (M,) distinct users who engaged with both, as in `models.neighbors.Neighbors`.
        counted_offsets: (B + 1,) of the counted pairs.
        target: (P,) item indices.
        num_user_days: (P,) undecayed count.
    """

    trigger: Ints
    offsets: Longs
    item: Ints
    sources: Ints
    log_p: Floats
    relevance: Floats
    num_users: Ints
    counted_offsets: Longs
    target: Ints
    num_user_days: Longs

    def save(self, folder: Path) -> None:
        """Write as one file named after the first trigger; a repeated task writes the same again, and never half of it."""
        lists = [self._lists(self.offsets, _CANDIDATES), self._lists(self.counted_offsets, _COUNTED)]
        batch = pa.record_batch([pa.array(self.trigger, pa.int32()), *lists], names=["trigger", "candidates", "counted"])
        path = folder / f"{int(self.trigger[0]):09d}.arrow"
        partial = path.with_suffix(f".{np.random.default_rng().integers(1 << 62)}.partial")  # two tasks may write it at a time
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        partial.replace(path)

    def _lists(self, offsets: Longs, columns: dict[str, Any]) -> pa.Array:
        flat = pa.StructArray.from_arrays([pa.array(getattr(self, name).astype(kind)) for name, kind in columns.items()], names=[*columns])
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), flat)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Map a file that `save` wrote.

        Raises:
            TableError: another version of the code wrote it.
        """
        with pa.memory_map(str(path)) as source:
            batch = pa.ipc.open_file(source).get_batch(0)
        candidates, counted = batch.column("candidates"), batch.column("counted")
        if missing := set(_CANDIDATES) - {field.name for field in candidates.type.value_type}:
            raise TableError(f"kept candidates in {path} lack {sorted(missing)}: older code wrote them; run the night again to merge anew")
        flat = {name: candidates.values.field(name).to_numpy(zero_copy_only=False) for name in _CANDIDATES}
        flat |= {name: counted.values.field(name).to_numpy(zero_copy_only=False) for name in _COUNTED}
        return cls(
            trigger=batch.column("trigger").to_numpy(),
            offsets=candidates.offsets.to_numpy(),
            counted_offsets=counted.offsets.to_numpy(),
            **flat | {"sources": flat["sources"].astype(np.int32)},
        )
