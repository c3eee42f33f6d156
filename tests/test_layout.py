"""The traps of the layout: see docs/decisions/0001-house.md."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE_ROOTS = {
    "platform": "assay_platform",
    "features": "assay_features",
    "pipelines": "assay_pipelines",
    "services": "assay_services",
}


def test_each_source_root_holds_exactly_one_package() -> None:
    for root, package in SOURCE_ROOTS.items():
        packages = [path.parent.name for path in (ROOT / root).glob("*/__init__.py")]
        assert packages == [package]


def test_no_source_root_and_no_test_folder_is_a_package() -> None:
    assert not [root for root in SOURCE_ROOTS if (ROOT / root / "__init__.py").exists()]
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_every_folder_of_a_package_is_a_package_with_a_docstring() -> None:
    for root, package in SOURCE_ROOTS.items():
        for folder in {path.parent for path in (ROOT / root / package).rglob("*.py")}:
            assert (folder / "__init__.py").read_text().startswith('"""'), folder


def test_the_standard_platform_module_still_imports_from_the_root() -> None:
    code = "import platform; platform.system()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_lock_pins_every_direct_dependency_and_no_local_path() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = (ROOT / "requirements.lock").read_text().splitlines()
    names = {line.partition("==")[0].lower().replace("_", "-") for line in locked}
    wanted = {dependency.split(">")[0].split("[")[0].strip().lower() for dependency in project["dependencies"]}
    assert wanted <= names
    assert all("==" in line and "/" not in line and "@" not in line for line in locked)


def test_help_answers_without_the_heavy_libraries() -> None:
    code = (
        "import sys\nfrom assay_pipelines.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'ray', 'feast', 'mlflow', 'torch', 'pandas', 'numpy'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=30)
