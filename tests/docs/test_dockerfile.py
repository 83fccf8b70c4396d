"""The Dockerfile, as far as it can be checked without building it."""

import fnmatch
import json
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.docs.blocks import ROOT

KNOWN = ("FROM", "ARG", "RUN", "WORKDIR", "COPY", "USER", "ENV", "CMD")
SECRET = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?)(?:=|\s|$)", re.I)


@pytest.fixture(scope="module")
def steps():
    """(instruction, arguments), continued lines joined."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and line[0] != "#"]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def places(steps, instruction, words=""):
    return [i for i, (name, rest) in enumerate(steps) if name == instruction and words in rest]


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_line_is_a_known_instruction(steps):
    assert {name for name, _ in steps} <= set(KNOWN)
    assert steps[0][0] == "FROM"
    assert steps[-1][0] == "CMD"


def test_python_is_pinned_to_a_patch_that_the_package_allows(steps, project):
    [(_, image)] = [step for step in steps if step[0] == "FROM"]
    match = re.fullmatch(r"python:(3\.\d+\.\d+)-slim-\w+", image)
    assert match, "name the whole version, not a moving tag"
    assert SpecifierSet(project["project"]["requires-python"]).contains(match[1])


def test_torch_is_the_version_that_the_tests_ran_with(steps, project):
    [torch] = [rest.partition("=")[2] for name, rest in steps if rest.startswith("TORCH=")]
    assert f"torch=={torch}\n" in (ROOT / "constraints.txt").read_text()
    [asked] = [
        Requirement(line).specifier
        for line in project["project"]["dependencies"]
        if line.startswith("torch>")
    ]
    assert asked.contains(torch)


def test_a_compiler_is_there_for_tritons_kernels(steps):
    """hadolint DL3009, DL3015: no lists of packages, and nothing that was not asked for."""
    [place] = places(steps, "RUN", "apt-get install -y --no-install-recommends gcc libc6-dev")
    assert steps[place][1].startswith("apt-get update && ")
    assert steps[place][1].split("&&")[-1].split() == ["rm", "-rf", "/var/lib/apt/lists/*"]


def test_what_changes_seldom_comes_first(steps):
    [torch] = places(steps, "RUN", "torch==$TORCH")
    [package] = places(steps, "RUN", '--constraint constraints.txt ".[')
    copies = places(steps, "COPY")
    assert torch < min(copies) <= max(copies) < package
    assert all("--no-cache-dir" in rest for _, rest in steps if "pip install" in rest)


def test_it_copies_the_packages_and_nothing_else(steps, project):
    copied = {word for name, rest in steps if name == "COPY" for word in rest.split()[:-1]}
    packages = {name.partition(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    assert copied == packages | {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    assert all(Path(ROOT, name).exists() for name in copied)


def test_the_context_holds_what_is_copied_and_nothing_else(steps):
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and line[0] != "#"]
    copied = {word for name, rest in steps if name == "COPY" for word in rest.split()[:-1]}
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule[0] == "!"} == copied
    for name in (".git", "runs", ".venv", "tests", "docs", ".netrc"):
        is_kept = any(rule[0] == "!" and fnmatch.fnmatch(name, rule[1:]) for rule in rules)
        assert not is_kept, name


def test_it_ends_as_a_user_who_is_not_root(steps):
    [user] = places(steps, "USER")
    assert steps[user][1] not in ("root", "0")
    made = [rest for name, rest in steps[:user] if name == "RUN" and "useradd" in rest]
    assert made
    assert steps[user][1] in made[0].split()
    assert not [name for name, rest in steps[user:] if name == "RUN"]


def test_no_secret_and_no_download_stands_in_it(steps):
    for name, rest in steps:
        if name in ("ARG", "ENV"):
            assert not SECRET.search(rest), rest
        assert "curl" not in rest
        assert "wget" not in rest
        assert name != "ADD"
    text = (ROOT / "Dockerfile").read_text()
    assert "@" not in re.sub(r"^#.*$", "", text, flags=re.M), "no login in an address"


def test_its_extras_exist(steps, project):
    [extras] = re.findall(r'"\.\[([\w,]+)\]"', "\n".join(rest for _, rest in steps))
    assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"])


def test_it_starts_a_verb(steps):
    from launch.cli import VERBS

    program, verb = re.findall(r'"(\w+)"', steps[-1][1])
    assert program == "obm"
    assert verb in VERBS


def test_the_command_is_a_list_so_that_signals_reach_it(steps):
    """hadolint DL3025: in a string a shell would stand between Docker and the program."""
    assert json.loads(steps[-1][1]) == ["obm", "doctor"]


def test_every_variable_is_declared_before_it_is_used_and_quoted(steps):
    """hadolint DL3044, SC2086; within one pip argument quotes go round the whole of it."""
    declared = set()
    for name, rest in steps:
        used = set(re.findall(r"\$\{?(\w+)", rest))
        assert used <= declared, f"{used - declared} in {name} {rest}"
        if name in ("ARG", "ENV"):
            declared |= set(re.findall(r"(\w+)=", rest))
        unquoted = re.sub(r'"[^"]*"', "", rest) if name == "RUN" else ""
        assert "$" not in unquoted, rest


def test_folders_are_absolute_and_set_before_anything_is_copied(steps):
    """hadolint DL3000, DL3003, DL3045."""
    assert all(rest.startswith("/") for name, rest in steps if name == "WORKDIR")
    assert min(places(steps, "WORKDIR")) < min(places(steps, "COPY"))
    assert not [
        rest for name, rest in steps if name == "RUN" and re.search(r"\bcd\b|\bsudo\b", rest)
    ]


def test_every_copied_folder_keeps_its_name(steps):
    """COPY merge . would spill the folder's files into the working directory."""
    for name, rest in steps:
        *sources, target = rest.split()
        if name == "COPY" and len(sources) == 1:
            assert target == sources[0]
        elif name == "COPY":
            assert target == "./"
            assert all(Path(ROOT, source).is_file() for source in sources)


def test_what_it_was_made_with_is_what_the_documents_name():
    text = (ROOT / "Dockerfile").read_text()
    shown = (ROOT / "README.md").read_text()
    [command] = re.findall(r"^#   docker build --tag (\S+) \.$", text, flags=re.M)
    assert f"docker build --tag {command} ." in shown
    [run] = re.findall(r"^#   (docker run .*)$", text, flags=re.M)
    assert f" {command} obm demo" in run
    assert run in shown
