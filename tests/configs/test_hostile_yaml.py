"""YAML that stands for more than it says, or for itself."""

import pytest

from configs.errors import ConfigError
from configs.reader import MAX_VALUES, parse_yaml, read_yaml


def laughs(n):
    """n levels of nine aliases each: 9^n values from a few hundred letters."""
    lines = ["a0: &a0 ha"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, n + 1)]
    return "\n".join(lines)


def test_aliases_of_aliases_are_refused_before_they_are_written_out():
    # 9^5 = 59049 leaves are the most within 100,000 values; with six levels they are 531441
    assert MAX_VALUES == 100_000
    with pytest.raises(ConfigError, match=r"x\.yaml: its aliases stand for more than 100,000"):
        parse_yaml(laughs(30), "x.yaml")
    with pytest.raises(ConfigError, match="more than 100,000"):
        parse_yaml(laughs(6), "x.yaml")


def test_plain_anchors_and_merge_keys_stay_what_they_were():
    text = "a: &a {x: 1, y: [1, 2]}\nb: *a\nc:\n  <<: *a\n  x: 2\n"
    value = parse_yaml(text, "x.yaml")
    assert value["b"] == {"x": 1, "y": [1, 2]}
    assert value["c"] == {"x": 2, "y": [1, 2]}
    assert parse_yaml("", "x.yaml") is None
    assert parse_yaml("2e-6", "x") == 2e-6


def test_a_key_that_a_merge_key_also_brings_is_there_once():
    text = "one: {two: {three: &three {<<: {key: 1}, key: 2}}}\ntop: {<<: *three}\n"
    assert parse_yaml(text, "x.yaml") == {"one": {"two": {"three": {"key": 2}}}, "top": {"key": 2}}


@pytest.mark.parametrize("text", ["&a [*a]", "a: &a {b: {c: *a}}"])
def test_a_value_that_holds_itself_is_refused(text):
    with pytest.raises(ConfigError, match="an alias stands within its own anchor"):
        parse_yaml(text, "x.yaml")


def test_what_is_nested_too_deep_is_one_error():
    with pytest.raises(ConfigError, match=r"x\.yaml: is nested too deep"):
        parse_yaml("a: " + "[" * 100_000, "x.yaml")


def test_two_documents_are_still_refused():
    with pytest.raises(ConfigError, match=r"x\.yaml: .*correct the YAML there"):
        parse_yaml("a: 1\n---\nb: 2\n", "x.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: !!int abc", "'abc' cannot be read as int"),
        ("a: !!int ''", "'' cannot be read as int"),
        ("a: !!int [1]", "cannot be read as int"),
        ("a: !!float abc", "'abc' cannot be read as float"),
        ("a: !!bool abc", "'abc' cannot be read as bool"),
        ("a: !!timestamp 2020-99-99", "'2020-99-99' cannot be read as timestamp"),
        ("a: !!timestamp soon", "'soon' cannot be read as timestamp"),
        ("a: " + "9" * 5000, "cannot be read as int"),
        ("a: 0x" + "f" * 5000, "cannot be read as int"),
        ("? [a, b]\n: 1", "found unhashable key"),
        ("? {a: b}\n: 1", "found unhashable key"),
        ("!!map a", "expected a mapping node"),
        ("!!set [a]", "expected a mapping node"),
        ("a: \0", r"the character U\+0000 may not stand in YAML"),
        ("a: \x07", r"the character U\+0007 may not stand in YAML"),
        ("a: \udcff", r"the character U\+DCFF may not stand in YAML"),
    ],
)
def test_a_value_that_is_not_what_its_tag_says_is_one_error(tmp_path, text, words):
    with pytest.raises(ConfigError, match=rf"x\.yaml: .*{words}.* \(line 1\); correct the YAML"):
        parse_yaml(text, "x.yaml")
    path = tmp_path / "x.yaml"
    path.write_bytes(f"# first\n{text}".encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=rf"x\.yaml: .*({words}.* \(line 2\)|not a text file)"):
        read_yaml(path)
