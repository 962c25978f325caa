"""Baselines of kept libraries: ALS (`implicit`) and item2vec (`gensim`), item-to-item by cosine of the item vectors.

Both libraries are optional and imported where they are used. The contract of a list is that of models.baselines; an item that the method
never saw has no vector, so it has no list and is in none.

Shapes: `T` triggers, `N` items, `U` users, `F` factors.
"""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix

from conf.errors import MachineError
from models.baselines import content_lists
from models.data import Bools, Floats, Ints, Sparse


def als_lists(
    triggers: Ints, *, user_items: Sparse, eligible: Bools, k: int, factors: int = 64, seed: int = 0, num_threads: int = 1
) -> Ints:
    """Nearest items by the factors of implicit-feedback ALS (Hu, Koren, Volinsky 2008).

    Args:
        triggers: (T,) item indices.
        user_items: (U, N) confidence, at least 0.
        eligible: (N,) may be listed.
        k: list length.
        factors: F.
        seed: of the start.
        num_threads: of the library; 0 takes all cores.

    Raises:
        MachineError: `implicit` is not installed.
    """
    vectors = als_vectors(user_items, factors=factors, seed=seed, num_threads=num_threads)
    return content_lists(triggers, content=vectors, eligible=eligible, k=k)


def item2vec_lists(
    triggers: Ints,
    *,
    sequences: Sequence[Sequence[int]],
    eligible: Bools,
    k: int,
    dimension: int = 64,
    window: int = 5,
    num_epochs: int = 5,
    seed: int = 0,
) -> Ints:
    """Nearest items by skip-gram vectors of items that are engaged near each other (Barkan, Koenigstein 2016, arXiv 1603.04259).

    Args:
        triggers: (T,) item indices.
        sequences: item indices of each session or user, in order of time.
        eligible: (N,) may be listed.
        k: list length.
        dimension: of the vectors.
        window: positions to either side that count as near; baskets, which have no order, want their full length.
        num_epochs: passes over the sequences.
        seed: of the start.

    Raises:
        MachineError: `gensim` is not installed.
    """
    num_items = len(eligible)
    vectors = item2vec_vectors(sequences, num_items=num_items, dimension=dimension, window=window, num_epochs=num_epochs, seed=seed)
    return content_lists(triggers, content=vectors, eligible=eligible, k=k)


def als_vectors(user_items: Sparse, *, factors: int, seed: int, num_threads: int) -> Floats:
    """(N, F) unit item factors, zero rows for items without a user."""
    try:
        from implicit.als import AlternatingLeastSquares
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise _not_installed("ALS", "implicit") from error
    with threadpool_limits(1, "blas"):  # BLAS threads inside the library's own threads cost it a factor of ten
        model = AlternatingLeastSquares(factors=factors, random_state=seed, num_threads=num_threads, use_gpu=False)
        model.fit(csr_matrix(user_items, dtype=np.float32), show_progress=False)
    num_users = np.bincount(user_items.indices, minlength=user_items.shape[1])
    return _unit(np.where(num_users[:, None] > 0, model.item_factors, 0))  # three conjugate-gradient steps leave some of a random start


def item2vec_vectors(
    sequences: Sequence[Sequence[int]], *, num_items: int, dimension: int, window: int, num_epochs: int, seed: int, num_threads: int = 1
) -> Floats:
    """(N, D) unit item vectors, zero rows for items in no sequence; with more than one thread the scheduler has its share in them."""
    try:
        from gensim.models import Word2Vec
    except ImportError as error:
        raise _not_installed("item2vec", "gensim") from error
    sentences = [[str(item) for item in sequence] for sequence in sequences]
    vectors = np.zeros((num_items, dimension), dtype=np.float32)
    if any(sentences):  # the library refuses to train on nothing
        model = Word2Vec(
            sentences, vector_size=dimension, window=window, epochs=num_epochs, seed=seed, sg=1, min_count=1, workers=num_threads
        )
        vectors[[int(word) for word in model.wv.index_to_key]] = model.wv.vectors
    return _unit(vectors)


def _not_installed(method: str, package: str) -> MachineError:
    return MachineError(
        f"{method} needs the optional package {package}, which is not installed here; pip install {package}, or leave {method} out"
    )


def _unit(rows: Floats) -> Floats:
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(np.divide(rows, norm, out=np.zeros(rows.shape), where=norm > 0), dtype=np.float32)
