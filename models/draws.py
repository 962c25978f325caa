"""Random numbers that belong to items: what is drawn for an item depends on its id, the seed and what the draw is for, on nothing else.

So an item that arrives tonight changes the draws of no other, and two nights with nearly the same data train nearly the same model. Drawing
by position would deal everything anew as soon as one index shifts. Numbers come from splitmix64 (Steele, Lea, Flood 2014) over the key.

Shapes: `N` items.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

Keys = npt.NDArray[np.uint64]
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def item_keys(item_ids: Iterable[str]) -> Keys:
    """(N,) 64-bit hashes of ids."""
    digests = b"".join(hashlib.blake2b(item_id.encode(), digest_size=8).digest() for item_id in item_ids)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def uniform(keys: Keys, *purpose: int) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1), one a key; `purpose` are numbers at least 0: seed, step, what is drawn."""
    mixed = keys
    for number in purpose:
        mixed = _mix(mixed + np.uint64((number + 1) * _GOLDEN & _MASK))
    return np.asarray((mixed >> np.uint64(11)) * 2.0**-53, dtype=np.float64)


def normal(keys: Keys, width: int, *, seed: int) -> npt.NDArray[np.float32]:
    """(N, width) of a standard normal distribution."""
    out = np.empty((len(keys), width), dtype=np.float32)
    for column in range(width):
        out[:, column] = ndtri(np.maximum(uniform(keys, seed, column), 1e-16))
    return out


def choose(keys: Keys, count: int, *purpose: int) -> npt.NDArray[np.int64]:
    """Ascending places of `count` of the keys, each set equally likely; another key in or out changes at most one of them."""
    if count >= len(keys):
        return np.arange(len(keys))
    return np.sort(np.argpartition(uniform(keys, *purpose), count)[:count])


def _mix(x: Keys) -> Keys:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
