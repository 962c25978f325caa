"""An optional encoder of what items say: a sentence-transformers model from a local folder, instead of the built-in TF-IDF and SVD.

The package is imported where it is used (`requirements-sentences.in`); nothing is ever fetched, and weights are read from safetensors only.
An item's text is its title, text, category path, tags and attributes, as far as no judge reads them.

Shapes: `N` items, `D` numbers a vector, which the model decides.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from conf.errors import MachineError, SettingsError

COLUMNS = ("title", "text", "categories", "tags", "attributes")
_BATCH = 64  # texts encoded together: more do not get faster on a CPU
_MARK = "modules.json"  # every folder of such a model has one


@dataclass(frozen=True)
class SentenceEncoder:
    """A model folder, opened once in each process that encodes."""

    folder: str

    def check(self) -> None:
        """Whether this machine can encode.

        Raises:
            SettingsError: the folder holds no such model.
            MachineError: the package is not installed.
        """
        if not (Path(self.folder) / _MARK).is_file():
            raise SettingsError(
                f"features.sentence_model is {self.folder}, where no {_MARK} is; wanted the folder of a sentence-transformers model, "
                "at this place on every worker"
            )
        _opened(self.folder)

    @property
    def length(self) -> int:
        """D."""
        return int(_opened(self.folder).get_embedding_dimension())

    def encode(self, items: pa.Table) -> NDArray[np.float32]:
        """(N, D) unit rows of N items with COLUMNS; zeros for an item without a word."""
        texts = [_text(*row) for row in zip(*(items[name].to_pylist() for name in COLUMNS), strict=True)]
        some = [row for row, text in enumerate(texts) if text]
        vectors = np.zeros((len(texts), self.length), dtype=np.float32)
        if some:
            given = [texts[row] for row in some]
            vectors[some] = _opened(self.folder).encode(given, batch_size=_BATCH, normalize_embeddings=True, show_progress_bar=False)
        return vectors


@lru_cache(maxsize=1)
def _opened(folder: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise MachineError(
            "features.sentence_model needs the optional package sentence-transformers, which is not installed here; "
            "pip install -r requirements-sentences.in, or set features.sentence_model=null for the built-in vectors"
        ) from error
    return SentenceTransformer(folder, device="cpu", local_files_only=True, model_kwargs={"use_safetensors": True})


def _text(
    title: str | None,
    text: str | None,
    categories: Sequence[str | None] | None,
    tags: Sequence[str | None] | None,
    attributes: Iterable[tuple[str, str | None]] | None,
) -> str:
    """One text of everything that is there, what is most telling first: models read the beginning."""
    labels = [*(categories or []), *(tags or []), *(value for _, value in attributes or [])]
    parts = (title, text, ", ".join(label for label in labels if label))
    return ". ".join(part.strip() for part in parts if part and part.strip())
