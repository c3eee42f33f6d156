"""Settings: defaults, a file, and errors that name the setting."""

from pathlib import Path

import pytest
from assay_platform.config import load_config
from assay_platform.errors import ConfigError


def test_without_a_file_state_lives_where_assay_home_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))
    config = load_config()
    assert config.paths.home == tmp_path / "home"
    assert config.tracking_uri == f"sqlite:///{tmp_path}/home/mlflow.db"
    assert config.service.host == "127.0.0.1"


def test_a_file_overrides_defaults(tmp_path: Path) -> None:
    file = tmp_path / "assay.toml"
    file.write_text('[service]\nport = 9000\n[tracking]\nuri = "http://127.0.0.1:5000"\n')
    config = load_config(file)
    assert config.service.port == 9000
    assert config.tracking_uri == "http://127.0.0.1:5000"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[service]\nport = 99999", "service.port is 99999"),
        ('[service]\nport = "x"', "service.port is 'x'"),
        ("[service]\nprot = 1", "service.prot"),
        ("[servce]\n", r"\[servce\]"),
        ("[service", "not valid TOML"),
        ("[service]\nmax_batch = 0", "max_batch is 0"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "assay.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=named):
        load_config(file)


def test_a_named_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.toml"):
        load_config(tmp_path / "nothing.toml")
