"""docs/versions.md: what pyproject.toml asks for, and versions that are installed here."""

import re
import tomllib
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from launch.commands.doctor import NOT_TESTED, requirements, versions_page
from tests.docs.blocks import ROOT, read

UNTESTED = {"wandb-workspaces"}
"""Packages that the page may call not tested: they speak to a service that is not at hand."""
AGAIN = "make the page again: obm doctor --markdown > docs/versions.md"


def rows(page):
    """name -> (asked for, tested)."""
    found = re.findall(r"^\| (\S+) \| `([^`]+)` \| (\S+(?: \S+)?) \| ", page, flags=re.M)
    return {name: (asked, tested) for name, asked, tested in found}


def versions_of_page():
    """Rows with a version; of extras that need a service some packages are not tested."""
    found = rows(read("docs/versions.md"))
    missing = {name for name, (_, tested) in found.items() if tested == NOT_TESTED}
    assert missing <= UNTESTED, f"{missing - UNTESTED} is not tested; install it, then {AGAIN}"
    return [(name, row) for name, row in found.items() if name not in missing]


def declared():
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = table["optional-dependencies"].values()
    lines = [*table["dependencies"], *(line for extra in extras for line in extra)]
    return {r.name: r for r in map(Requirement, lines) if r.name != "obm-warmstart"}


def test_the_page_names_what_pyproject_asks_for_and_nothing_else():
    page = rows(read("docs/versions.md"))
    assert set(page) == set(declared()), AGAIN
    for name, requirement in declared().items():
        assert SpecifierSet(page[name][0]) == requirement.specifier, f"{name}: {AGAIN}"


def test_every_tested_version_is_one_that_is_allowed():
    for name, (asked, tested) in versions_of_page():
        assert SpecifierSet(asked).contains(tested, prereleases=True), f"{name} {tested}: {AGAIN}"


def test_the_tests_run_with_the_versions_of_the_page():
    """Up to the patch: another minor version has not been tested."""
    for name, (_, tested) in versions_of_page():
        here, page = Version(metadata.version(name)), Version(tested)
        assert here.release[:2] == page.release[:2], f"{name} {here} is installed; {AGAIN}"


def test_the_page_is_what_doctor_prints(obm):
    code, out, _ = obm("doctor", "--markdown")
    assert code == 0
    assert out == versions_page()
    assert rows(out).keys() == rows(read("docs/versions.md")).keys()
    strip = re.compile(r"^(\| .* \||Python .*)$", re.M)
    assert strip.sub("", out) == strip.sub("", read("docs/versions.md")), AGAIN


def test_an_installed_package_knows_its_extras_without_the_checkout(monkeypatch):
    lines = ["torch>=2.6", 'starlette>=0.47; extra == "serve"', 'pytest>=8; extra == "dev"',
             'uvloop>=0.21; sys_platform == "nowhere" and extra == "serve"']  # fmt: skip
    monkeypatch.setattr("launch.commands.doctor.__file__", "/nowhere/launch/commands/doctor.py")
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    monkeypatch.setattr(metadata, "metadata", lambda name: Extras())
    found = {extra: [r.name for r in needed] for extra, needed in requirements().items()}
    assert found == {"": ["torch"], "serve": ["starlette"], "dev": ["pytest"]}


class Extras:
    def get_all(self, name):
        return ["serve", "dev"]
