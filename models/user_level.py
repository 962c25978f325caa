"""User-level co-engagement: which items a trigger's users engaged with at any time, beyond the window that pairs are counted in.

    C_user(i, j) = sum over users u of both of 1 / (items of u),   0 where fewer than `min_users` users engaged with both

A user with a thousand items says little about any two of them, hence the division. Habits of a household that never share a basket, and
tastes that span months, are seen here and in no window. The matrix is never formed: rows are made for a block of triggers at a time.

Shapes: `N` items, `U` users, `B` triggers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array, diags_array

from models.data import Ints, Sparse

_STEM = "user_level"


@dataclass(frozen=True, kw_only=True)
class UserLevel:
    """Users and items, both ways round.

    Attributes:
        items_users: (N, U) 1 where the user engaged with the item.
        users_items: (U, N) complex: real part 1 / (items of the user), imaginary part 1, so that one product adds up both.
        min_users: distinct users below which a pair is not known (privacy).
    """

    items_users: Sparse
    users_items: csr_array
    min_users: int

    @classmethod
    def of(cls, user_items: Sparse, *, min_users: int) -> Self:
        """From (U, N) ones."""
        num_items = np.maximum(np.diff(user_items.indptr), 1).astype(np.float32)
        weighted = diags_array((1 / num_items + 1j).astype(np.complex64)).dot(user_items)
        return cls(items_users=user_items.T.tocsr(), users_items=weighted.tocsr().astype(np.complex64), min_users=min_users)

    def rows(self, triggers: Ints) -> Sparse:
        """(B, N) rows of C_user without the triggers themselves; columns ascend."""
        return self.rows_and_users(triggers)[0]

    def rows_and_users(self, triggers: Ints) -> tuple[Sparse, Ints]:
        """`rows`, and for each of their P stored values how many distinct users engaged with both."""
        both = self.items_users[triggers].astype(np.complex64).dot(self.users_items).tocsr()
        both.sort_indices()
        row = np.repeat(np.arange(len(triggers)), np.diff(both.indptr))
        keep = (both.data.imag > self.min_users - 0.5) & (both.indices != triggers[row])
        indptr = np.concatenate([[0], np.cumsum(np.bincount(row[keep], minlength=len(triggers)))])
        rows = csr_array((both.data.real[keep], both.indices[keep], indptr), shape=both.shape, dtype=np.float32)
        return rows, np.rint(both.data.imag[keep]).astype(np.int32)

    def save(self, folder: Path) -> None:
        """Write arrays that any number of processes can map."""
        for name, array in self._arrays().items():
            np.save(folder / f"{_STEM}-{name}.npy", array)

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        meta = np.array([*self.items_users.shape, self.min_users], np.int64)
        sides = {"items": self.items_users, "users": self.users_items}
        return {"meta": meta} | {f"{side}-{part}": getattr(m, part) for side, m in sides.items() for part in ("data", "indices", "indptr")}

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Map what `save` wrote.

        Raises:
            FileNotFoundError: nothing was saved there.
        """

        def load(name: str) -> npt.NDArray[Any]:
            return np.asarray(np.load(folder / f"{_STEM}-{name}.npy", mmap_mode="r"))

        num_items, num_users, min_users = load("meta").tolist()
        sides = (
            csr_array(tuple(load(f"{side}-{part}") for part in ("data", "indices", "indptr")), shape=shape, copy=False)
            for side, shape in (("items", (num_items, num_users)), ("users", (num_users, num_items)))
        )
        items_users, users_items = sides
        return cls(items_users=items_users, users_items=users_items, min_users=min_users)
