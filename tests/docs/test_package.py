"""The wheel and the source distribution: complete, without tests, and stronger than look-alikes.

Built once, without the network: the source distribution from a copy of the checkout, the wheel from
the source distribution, as `make dist` does. The wheel is installed into an empty folder and run
from another one that holds files and folders of the packages' names.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from launch.commands.doctor import requirements
from launch.licences import NOT_INSTALLED, NOT_STATED, licence_of, licences_page
from tests.docs.blocks import ROOT, read

pytestmark = pytest.mark.slow

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TOOL = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
PACKAGES = sorted({name.partition(".")[0] for name in TOOL["packages"]})
BESIDE = ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md", "CITATION.cff")
BUILD = "import sys; from setuptools import build_meta as b; getattr(b, sys.argv[1])(sys.argv[2])"
NAME = f"obm_warmstart-{PROJECT['version']}"
DECOY = "raise SystemExit('a look-alike was imported')\n"


def build(kind, source, target):
    """One of setuptools' hooks, as pip and build call them."""
    run = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(target)],
        cwd=source, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with source distribution and wheel."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    for name in (*PACKAGES, "tests"):
        # other tests may be writing bytecode there
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.tmp")
        )
    for name in BESIDE:
        shutil.copy(ROOT / name, source / name)
    # what a checkout that was worked in holds
    (source / "merge/__pycache__").mkdir()
    (source / "merge/__pycache__/old.cpython-311.pyc").write_bytes(b"stale")
    (source / "runs").mkdir()
    (source / "runs/big.safetensors").write_bytes(b"weights")
    build("build_sdist", source, folder)
    with tarfile.open(folder / f"{NAME}.tar.gz") as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # not before 3.11.4
        archive.extractall(folder / "unpacked")
    build("build_wheel", folder / "unpacked" / NAME, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    return zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl")


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """An empty folder into which the wheel alone was installed."""
    target = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
         "--no-compile", "--target", str(target), str(built / f"{NAME}-py3-none-any.whl")],
        check=True,
    )  # fmt: skip
    return target


@pytest.fixture
def elsewhere(tmp_path):
    """A folder of files and folders that bear the packages' names, and end whoever imports them."""
    for name in PACKAGES:
        (tmp_path / f"{name}.py").write_text(DECOY)
    for name in ("configs", "merge", "launch", "environments"):
        (tmp_path / f"{name}.py").unlink()
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(DECOY)
    (tmp_path / "launch/train.sh").write_text("exit 97\n")
    (tmp_path / "configs/demo.yaml").write_text("nonsense: true\n")
    return tmp_path


@pytest.fixture
def run(installed, elsewhere):
    """Runs a command there with the installed package in front of the checkout."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {
        "PYTHONPATH": str(installed), "OBM_KERNELS": "numpy", "OMP_NUM_THREADS": "1",
        "PATH": f"{installed / 'bin'}{os.pathsep}{Path(sys.executable).parent}"
                f"{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip

    def run(*command):
        return subprocess.run(
            command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False
        )

    return run


def shipped():
    """Every file of the packages' folders, caches aside."""
    files = (path for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file())
    return {
        str(path.relative_to(ROOT))
        for path in files
        if "__pycache__" not in path.parts and path.suffix not in (".pyc", ".nbi", ".nbc")
    }


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel):
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == shipped()
    kinds = {Path(name).suffix for name in held}
    assert kinds >= {".yaml", ".css", ".js", ".html", ".sh", ".json", ".png", ".safetensors"}


def test_the_wheel_carries_licence_and_door(wheel):
    names = {name.partition(".dist-info/")[2] for name in wheel.namelist()}
    assert "licenses/LICENSE" in names
    doors = wheel.read(f"{NAME}.dist-info/entry_points.txt").decode()
    assert "obm = launch.cli:main" in doors
    described = wheel.read(f"{NAME}.dist-info/METADATA").decode()
    assert f"\nVersion: {PROJECT['version']}\n" in described
    assert "\nLicense-Expression: Apache-2.0\n" in described


def test_the_source_distribution_holds_the_same_and_its_papers(built):
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    made = {name for name in names if name == "PKG-INFO" or ".egg-info/" in name}
    assert names - made - {"setup.cfg"} == shipped() | set(BESIDE)


def test_the_installed_package_wins_over_look_alikes(run, installed):
    assert run("obm", "--version").stdout == f"obm-warmstart {PROJECT['version']}\n"
    code = f"import {', '.join(PACKAGES)}; print([m.__file__ for m in ({', '.join(PACKAGES)})])"
    found = run(sys.executable, "-P", "-c", code)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count(str(installed)) == len(PACKAGES)
    # the look-alikes do end whoever finds them
    assert "a look-alike" in run(sys.executable, "-c", "import train").stderr


def test_a_study_and_a_training_are_planned_from_anywhere(run):
    demo = run("obm", "demo", "--dry-run")
    assert demo.returncode == 0, demo.stderr
    assert "obm" in demo.stdout
    study = run("obm", "study", "demo", "--dry-run")
    assert study.returncode == 0, study.stderr
    training = run("obm", "train", "--dry-run", "--config", "demo")
    assert training.returncode == 0, training.stderr
    assert "expected on 1 x h100" in training.stdout


def test_the_launchers_door_of_the_installed_package_is_its_own(run, installed):
    """As `deepspeed launch/train.sh` starts it in every process."""
    settings = str(installed / "configs/demo.yaml")
    door = run(
        sys.executable, str(installed / "launch/train.sh"), "--dry-run", "--config", settings
    )
    assert door.returncode == 0, door.stderr
    assert "max_steps" in door.stdout


def test_a_merge_runs_from_anywhere(run, elsewhere):
    merged = run(
        "obm", "merge", "--config", "demo", "--output", "out", "merge.method=task_arithmetic",
    )  # fmt: skip
    assert merged.returncode == 0, merged.stderr
    record = json.loads((elsewhere / "out/merge.json").read_text())
    assert record["method"] == "task_arithmetic"
    assert record["versions"]["obm-warmstart"] == PROJECT["version"]
    assert run("obm", "merge", "verify", "out").returncode == 0


# ---------------------------------------------------------------- papers


def test_the_changelog_has_the_version_below_what_is_unreleased():
    headings = re.findall(r"^## (.*)$", read("CHANGELOG.md"), flags=re.M)
    assert headings[0] == "Unreleased"
    assert headings[1].split(" ")[0] == PROJECT["version"]


def test_the_citation_has_what_its_schema_asks_for():
    """Citation File Format 1.2.0: required keys, and those of a reference."""
    cited = yaml.safe_load(read("CITATION.cff"))
    assert {"authors", "cff-version", "message", "title"} <= set(cited)
    assert cited["cff-version"] == "1.2.0"
    assert cited["type"] in ("software", "dataset")
    assert cited["title"] == PROJECT["name"]
    assert str(cited["version"]) == PROJECT["version"]
    assert cited["license"] == PROJECT["license"]
    assert cited["keywords"] == PROJECT["keywords"]
    [paper] = cited["references"]
    assert {"authors", "title", "type"} <= set(paper)
    for author in (*cited["authors"], *paper["authors"]):
        assert "name" in author or {"family-names", "given-names"} <= set(author)
    assert [i["value"] for i in paper["identifiers"]] == ["arXiv:2603.01416"]
    assert "2603.01416" in paper["url"]


def test_every_direct_dependency_has_a_licence_on_its_page():
    page = read("docs/licences.md")
    rows = dict(re.findall(r"^\| (\S+) \| ([^|]+) \| ", page, flags=re.M)[1:])
    names = {r.name for needed in requirements().values() for r in needed} - {"obm-warmstart"}
    assert set(rows) - {"---"} == names, "make it again: python -m launch.licences"
    assert NOT_STATED not in rows.values()
    assert NOT_INSTALLED not in rows.values()
    assert page.startswith(licences_page().partition("| package")[0])


def test_a_licence_is_read_from_expression_classifier_or_text(monkeypatch):
    from email.message import Message
    from importlib import metadata

    def package(**fields):
        message = Message()
        for name, values in fields.items():
            for value in values if isinstance(values, list) else [values]:
                message[name.replace("_", "-")] = value
        monkeypatch.setattr(metadata, "metadata", lambda name: message)
        return licence_of("any")

    osi = "License :: OSI Approved"
    assert package(License_Expression="MIT", License="old") == "MIT"
    assert package(Classifier=[osi, f"{osi} :: MIT License"]) == "MIT License"
    assert package(Classifier=["Topic :: Games"], License="BSD") == "BSD"
    assert package(License="Permission is hereby granted, " * 9) == NOT_STATED
    assert package() == NOT_STATED
