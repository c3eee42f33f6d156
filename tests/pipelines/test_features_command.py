"""`assay features …` on a user's own table."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from assay_features.batch import features_at
from assay_features.feast.repository import FeatureRepository
from assay_features.schema import ACCOUNT, read_schema
from assay_pipelines.cli import main
from assay_pipelines.datasets.table import load_table
from assay_pipelines.features import default_plan_of
from assay_platform.config import load_config


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["features", *arguments])
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def with_accounts(schema: Path) -> None:
    """Let accounts be told by what they have spent."""
    text = schema.read_text().replace('"lat"]', '"lat", "spent"]')
    schema.write_text(text + '[account]\ntotal = "spent"\nwithin = ["country"]\n')


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.ray
def test_from_a_plan_to_pushed_events(
    home: Path, fraud_files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], ray_session: str, tmp_path: Path
) -> None:
    table, schema = map(str, fraud_files)
    assert run(capsys, "list")[1].startswith("no features yet")
    plan_file = tmp_path / "plan.json"
    code, out, _ = run(capsys, "plan", "--schema", schema, "--out", str(plan_file))
    assert code == 0
    assert "Window(entity='card_id', aggregate='count', length_s=3600)" in out
    plan = json.loads(plan_file.read_text())
    plan["definitions"].append(
        {
            "kind": "Window",
            "entity": ["card_id", "store_id"],
            "aggregate": "distinct",
            "column": "provider",
            "length_s": 86400,
        }
    )
    plan_file.write_text(json.dumps(plan))
    backfill = ("backfill", "fraud", "--data", table, "--schema", schema, "--plan", str(plan_file), "--partitions", "2")
    code, out, err = run(capsys, *backfill)
    assert code == 0, err
    assert "3,000 events" in out
    code, again, err = run(capsys, *backfill)
    assert again == out
    assert "nothing left to do" in err
    rows = json.loads(run(capsys, "list", "--json")[1])
    assert {row["model"] for row in rows} == {"fraud-payments"}
    name = "card_id_and_store_id__provider__distinct__1d"
    assert name in {row["name"] for row in rows}
    assert "aggregate='distinct'" in run(capsys, "show", name)[1]
    code, _, err = run(capsys, "show", "distinct__1d")
    assert code == 2
    assert name in err

    newest = pd.read_csv(table).tail(5)
    more = newest.assign(transaction_id=[f"new{i}" for i in range(5)], datetime=newest["datetime"] + 60)
    more = pd.concat([newest.tail(1), more, more.head(1)])
    more.to_csv(tmp_path / "more.csv", index=False)
    assert (
        "5 accepted, 2 known already, 0 too late"
        in run(capsys, "push", "fraud-payments", str(tmp_path / "more.csv"))[1]
    )
    assert "0 accepted, 7 known already" in run(capsys, "push", "fraud-payments", str(tmp_path / "more.csv"))[1]
    assert "keys online" in run(capsys, "materialize", "fraud-payments")[1]
    assert "0 accepted, 7 known already" in run(capsys, "push", "fraud-payments", str(tmp_path / "more.csv"))[1]


def test_verify_compares_every_cell(
    home: Path, fraud_files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    table, schema = map(str, fraud_files)
    code, out, _ = run(capsys, "verify", "fraud", "--data", table, "--schema", schema, "--rows", "200")
    assert code == 0
    assert "200 events, 4,800 cells: stream and batch agree" in out


def test_features_of_reports_are_verified_and_published_apart(
    home: Path, fraud_files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], ray_session: str
) -> None:
    table, schema = map(str, fraud_files)
    with fraud_files[1].open("a") as file:
        file.write("[labels]\ndelay_days = 0.5\n")
    code, out, err = run(capsys, "verify", "fraud", "--data", table, "--schema", schema, "--rows", "300")
    assert code == 0, err
    assert "stream and batch agree" in out
    code, out, err = run(capsys, "backfill", "fraud", "--data", table, "--schema", schema)
    assert code == 0, err
    assert out.count("keys online") == 2
    frauds = int(pd.read_csv(table)["fraud"].sum())
    assert "3,000 events" in out.splitlines()[0]
    # The offline files hold one row a (key, moment of a report), and no label before its report.
    folders = home.glob("**/backfill/*/features/card_id")
    [reported] = [frame for frame in map(pd.read_parquet, folders) if "card_id__fraud__sum__30d" in frame]
    assert 0 < len(reported) <= frauds
    assert reported["card_id__fraud__sum__30d"].iloc[0] == 0
    newest = pd.read_csv(table).tail(1).assign(transaction_id="new")
    newest["datetime"] += 60
    newest.to_csv(home.parent / "more.csv", index=False)
    assert "1 accepted" in run(capsys, "push", "fraud-payments", str(home.parent / "more.csv"))[1]


def test_accounts_go_on_from_a_backfill(
    home: Path, fraud_files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], ray_session: str, tmp_path: Path
) -> None:
    table, schema = fraud_files
    with_accounts(schema)
    whole = pd.read_csv(table).assign(country="NO")
    whole.to_csv(table, index=False)
    first, rest = tmp_path / "payments.csv", tmp_path / "rest.csv"
    code, out, err = run(capsys, "verify", "fraud", "--data", str(table), "--schema", str(schema), "--rows", "150")
    assert code == 0, err
    whole.iloc[:2900].to_csv(first, index=False)
    whole.iloc[2900:].to_csv(rest, index=False)
    code, out, err = run(capsys, "backfill", "fraud", "--data", str(first), "--schema", str(schema))
    assert code == 0, err
    code, out, err = run(capsys, "push", "fraud-payments", str(rest))
    assert code == 0, err
    assert "100 accepted" in out

    parsed = read_schema(schema)
    whole.to_csv(table, index=False)
    events = load_table(table, parsed).events
    assert len(set(events.keys[ACCOUNT])) < 250, "150 cards and some that began anew by chance"
    plan = default_plan_of(parsed)
    repository = FeatureRepository(load_config().paths.feature_repositories / "fraud-payments")
    later = np.full(len(events), events.time_us[-1] + 60_000_000)
    asked = replace(events, time_us=later)
    online = repository.online(plan).read({ACCOUNT: asked.keys[ACCOUNT].tolist()}, later).values
    repository.close()
    batch = features_at(plan, events, asked)
    assert len(online) == 12
    for name, column in online.items():
        np.testing.assert_allclose(column, batch[name], rtol=1e-9, err_msg=name)


def test_wrong_calls_say_what_is_known(
    home: Path, fraud_files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    table, schema = map(str, fraud_files)
    assert run(capsys, "push", "nothing", table)[0] == 2
    assert run(capsys, "materialize", "nothing")[0] == 2
    for content, message in (
        ("[]", "is not a feature plan"),
        ("{", "cannot be read"),
        ('{"definitions": [{"kind": "Magic"}]}', "unknown feature kind 'Magic'"),
        ('{"definitions": [{"kind": "Latest", "entity": "card_id", "column": "colour"}]}', "no column 'colour'"),
    ):
        (tmp_path / "plan.json").write_text(content)
        code, _, err = run(
            capsys, "backfill", "fraud", "--data", table, "--schema", schema, "--plan", str(tmp_path / "plan.json")
        )
        assert code == 2, err
        assert message in err
    broken = tmp_path / "broken.csv"
    shutil.copy(table, broken)
    with broken.open("a") as file:
        file.write("t9999,yesterday,0,1.0,c1,s1,alpha,NO,59\n")
    (tmp_path / "plan.json").write_text('{"definitions": [{"kind": "SinceLatest", "entity": "card_id"}]}')
    code, _, err = run(capsys, "verify", "fraud", "--data", str(broken), "--schema", schema)
    assert code == 2
    assert "column 'datetime', row 3001: 'yesterday'" in err


def test_discovery_prints_what_it_tried_and_what_it_kept(
    home: Path, fraud_files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Fraud in this table depends on raw columns alone, so there is nothing to find."""
    table, schema = map(str, fraud_files)
    code, out, err = run(capsys, "discover", "fraud", "--data", table, "--schema", schema)
    assert code == 0, err
    assert "candidates" in out
    assert "so nothing is kept" in out
    num_candidates = int(out.split(" candidates")[0].split()[-1])
    code, out, err = run(capsys, "discover", "fraud", "--data", table, "--schema", schema, "--label-delay", "0.5")
    assert code == 0, err
    assert int(out.split(" candidates")[0].split()[-1]) > num_candidates
    code, _, err = run(capsys, "discover", "fraud", "--data", table, "--schema", schema, "--label-delay", "400")
    assert code == 2
    assert "--label-delay 400: expected 0 to 365 days" in err
