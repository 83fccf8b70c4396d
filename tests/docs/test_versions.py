"""docs/versions.md and constraints.txt: what pyproject.toml asks for, what is installed here."""

import re
import tomllib
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from launch.commands.doctor import NOT_TESTED, constraints, requirements, versions_page
from tests.docs.blocks import ROOT, read

AGAIN = "make the page again: obm doctor --markdown > docs/versions.md"
PINS_AGAIN = "make the file again: obm doctor --constraints > constraints.txt"


def rows(page):
    """name -> (asked for, tested)."""
    found = re.findall(r"^\| (\S+) \| `([^`]+)` \| (\S+(?: \S+)?) \| ", page, flags=re.M)
    return {name: (asked, tested) for name, asked, tested in found}


def versions_of_page():
    """name, (asked for, tested) of every package; none may be called not tested."""
    found = rows(read("docs/versions.md"))
    missing = {name for name, (_, tested) in found.items() if tested == NOT_TESTED}
    assert not missing, f"{missing} is not tested; install it, then {AGAIN}"
    return list(found.items())


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


def pins(text):
    """name -> version that pip is held to."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {name: version for name, _, version in (line.partition("==") for line in lines)}


def test_a_fresh_installation_has_the_versions_of_the_page():
    page = {name: Version(tested).public for name, (_, tested) in versions_of_page()}
    assert pins(read("constraints.txt")) == page, PINS_AGAIN
    makefile = read("Makefile")
    assert re.search(r"^INSTALL = .* --constraint constraints\.txt$", makefile, flags=re.M)
    assert re.search(r"^\$\(STAMP\):.* constraints\.txt$", makefile, flags=re.M)


def test_every_build_of_torch_fits_its_pin(obm, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "2.13.0+cpu")
    code, out, _ = obm("doctor", "--constraints")
    assert (code, out) == (0, constraints())
    pin = SpecifierSet(f"=={pins(out)['torch']}")
    assert all(pin.contains(version) for version in ("2.13.0", "2.13.0+cpu", "2.13.0+cu130"))
    assert out.splitlines()[0] == read("constraints.txt").splitlines()[0]


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
