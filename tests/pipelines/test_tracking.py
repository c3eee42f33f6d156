"""What a run says of the code that it ran."""

import re
from pathlib import Path

import pytest
from assay_pipelines.tracking import _code_version


def test_code_is_named_by_its_commit_or_where_there_is_no_git_by_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert re.fullmatch(r"[0-9a-f]{40}|assay \d.*", _code_version())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _code_version().startswith("assay ")
