"""The page in a real browser, and what can be said of it without one."""

import csv
import io
import json
import re
import tomllib
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

import pytest

from compare.errors import CompareError
from compare.page import DETAILS, MAX_BYTES, Arms, Page, Section, render, thinned, write_page
from compare.page_data import behaviour_of, curves_from_csv
from compare.report import write_report
from compare.report_page import Record, build_page, kind_of, read_record, write_report_page
from compare.runs import read_run
from tests.compare import pages
from tests.compare.browser import DESKTOP, PHONE, open_page

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
ARMS = {"obm": 0.5, "vlm": 0.1, "ties": 0.45, "task_arithmetic": 0.4}
EVIL = '"><img src=x onerror=alert(1)><script>alert(2)</script>'


def all_records(**more):
    pairs = [pages.pair("obm", other, 0.1, 0.05) for other in ("vlm", "ties", "task_arithmetic")]
    return [
        Record("comparison", "compare", pages.comparison(ARMS, pairs=pairs, **more)),
        Record("floor", "floor", pages.floor(ARMS)),
        Record("ablation", "ablation", pages.ablation()),
        Record("transfer", "transfer", pages.transfer()),
        Record("merge", "obm", pages.merge()),
    ]


@pytest.fixture
def page_file(tmp_path):
    path = tmp_path / "compare.html"
    write_report_page(path, all_records(), title="A page", files=["compare.json"])
    return path


# ---- without a browser


class Elements(HTMLParser):
    """Elements of a page by name, with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_nothing_in_the_page_points_outside_of_it(page_file):
    text = page_file.read_text()
    # a namespace is a name, not an address
    assert not re.search(r"\w+://|url\(", text.replace("http://www.w3.org/2000/svg", ""))
    for tag, attributes in Elements(text).found:
        assert tag not in ("iframe", "object", "embed", "img", "base")
        assert "src" not in attributes, tag
        assert not any(name.startswith("on") for name in attributes), attributes
        # the policy forbids them, so they would be lost
        assert "style" not in attributes, tag
        if tag == "a":
            assert not attributes["href"].startswith(("/", "//")), attributes


def test_names_and_commands_are_data_everywhere():
    arms = {"obm": 0.5, EVIL: 0.3}
    floor = pages.floor(arms)
    floor["arms"][EVIL]["recipe"] = EVIL
    ablation = pages.ablation()
    ablation["axes"][0] |= {"name": EVIL, "setting": EVIL}
    ablation["axes"][0]["points"][0]["value"] = EVIL
    merge = pages.merge()
    merge["settings"]["scope"] = {EVIL: EVIL}
    merge["parents"]["base"]["source"] = EVIL
    merge["tensors"][f"model.layers.0.mlp.{EVIL}.weight"] = {
        "group": "linear",
        **pages.figures(True, 0.1),
    }
    comparison = pages.comparison(
        arms, target=EVIL, command=EVIL, commit=EVIL, hardware=EVIL, versions={EVIL: [EVIL]}
    )
    for result in comparison["arms"].values():
        result["by_group"][EVIL] = {"floor": 0.1, "ceiling": 0.2}
    records = [Record("comparison", EVIL, comparison), Record("floor", EVIL, floor),
               Record("floor", EVIL, floor), Record("ablation", EVIL, ablation),
               Record("merge", EVIL, merge)]  # fmt: skip
    text = render(build_page(records, title=EVIL, files=[EVIL]))
    tags = [tag for tag, _ in Elements(text).found]
    assert "img" not in tags
    # the data blocks of the figures, the arms', and the page's own
    assert "alert(2)</script>" not in text
    assert all(not name.startswith("on") for _, found in Elements(text).found for name in found)


def test_the_policy_names_exactly_the_inline_style_and_script(page_file):
    import base64
    import hashlib

    text = page_file.read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_every_figure_holds_its_data_and_identifiers_are_unique(page_file):
    text = page_file.read_text()
    found = Elements(text).found
    identifiers = [attributes["id"] for _, attributes in found if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)
    figures = [attributes for tag, attributes in found if tag == "figure"]
    blocks = re.findall(r'<script type="application/json" class="data">(.*?)</script>', text)
    assert len(figures) == len(blocks) > 15
    for block in blocks:
        data = json.loads(block)
        assert data["rows"]
        assert {len(row) for row in data["rows"]} == {len(data["columns"])}
    # the figures of the merge carry its numbers
    kept = next(b for b in map(json.loads, blocks) if "saliency_kept" in b["columns"])
    assert kept["rows"][0] == ["vlm", 0, "q", 0.8]


def test_curves_of_an_old_report_come_from_its_csv():
    text = (
        "arm,seed,step,tokens,accuracy,searched,search_rate_text,search_rate_image,calls_per_episode\n"
        "obm,0,0,0,0.2,0.5,0.4,0.3,3\n"
        "obm,0,5,100,0.4,1.0,1.0,0.0,5\n"
        "obm,1,0,0,0.4,0.5,0.4,0.3,3\n"
        "obm,1,5,300,0.6,1.0,1.0,0.0,7\n"
    )
    curves = curves_from_csv(text, smoothing=2, bootstrap=0)["obm"]
    accuracy = curves["accuracy"]
    assert accuracy["steps"] == [0, 5]
    assert accuracy["tokens"] == [0, 200]
    assert accuracy["device_s"] == [None, None]
    # smoothed: .2, .3 and .4, .5
    assert accuracy["mean"] == pytest.approx([0.3, 0.4])
    assert accuracy["per_seed"] == [[0.2, 0.4], [0.4, 0.6]]
    # searched .5, text .4, image .3: both .2, text alone .2, image alone .1, none .5
    ways = {way: curves[f"behaviour/{way}"]["mean"][0] for way in ("both", "text_only", "none")}
    assert ways == {"both": pytest.approx(0.2), "text_only": pytest.approx(0.2), "none": 0.5}
    assert curves["behaviour/image_only"]["mean"][0] == pytest.approx(0.1)
    # no share, so its band is not cut at 1: smoothed 4 and 5, mean 4.5
    assert curves["calls_per_episode"]["high"][1] > 5
    assert behaviour_of({"searched": [[1.0]]}) == {}


def test_the_committed_results_make_a_page(tmp_path):
    files = [file for file in RESULTS.glob("*.json") if kind_of(json.loads(file.read_text()))]
    assert {read_record(file).kind for file in files} >= {"comparison", "floor"}
    for file in files:
        path = tmp_path / f"{file.stem}.html"
        detail = write_report_page(path, [read_record(file)], title=file.stem)
        assert detail is DETAILS[0]
        body = path.read_text().split("<script>")[0]
        for mistake in ("nan", "None", "undefined"):
            assert not re.search(rf">[^<]*\b{mistake}\b[^<]*<", body), (file, mistake)


def test_files_are_known_by_their_content(tmp_path):
    made = {
        "comparison": pages.comparison(ARMS), "floor": pages.floor(ARMS),
        "ablation": pages.ablation(), "transfer": pages.transfer(), "merge": pages.merge(),
    }  # fmt: skip
    for kind, data in made.items():
        assert kind_of(data) == kind
        (tmp_path / "x.json").write_text(json.dumps(data))
        assert read_record(tmp_path / "x.json").kind == kind
    assert kind_of([1]) is None
    (tmp_path / "merge.json").write_text('{"arms": 1}')
    with pytest.raises(CompareError, match=r"merge\.json: not a file that a page shows; name the"):
        read_record(tmp_path / "merge.json")
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(CompareError, match=r"torn\.json: not JSON"):
        read_record(tmp_path / "torn.json")
    with pytest.raises(CompareError, match=r"gone\.json: cannot be read \(No such file"):
        read_record(tmp_path / "gone.json")


def wrong_values():
    """(kind, content) with one value of each place set to 3, and with all values of a key."""
    made = {
        "comparison": pages.comparison(ARMS), "floor": pages.floor(ARMS),
        "ablation": pages.ablation(), "transfer": pages.transfer(), "merge": pages.merge(),
    }  # fmt: skip
    keys = {
        "comparison": ("target", "arms"), "floor": ("reference", "arms", "seeds", "differences"),
        "ablation": ("axes", "arms", "reference", "seeds"), "transfer": ("worlds", "arms", "seeds"),
        "merge": ("parents", "groups", "tensors", "totals"),
    }  # fmt: skip
    for kind, data in made.items():
        for key in keys[kind]:
            yield kind, data | {key: 3}
            if isinstance(data[key], dict) and key != "worlds":  # of those only the names are shown
                yield kind, data | {key: dict.fromkeys(data[key], 3)}
        if kind != "merge":
            yield kind, data | {"arms": {}}
            arms = {arm: dict.fromkeys(parts, 3) for arm, parts in data["arms"].items()}
            yield kind, data | {"arms": arms}


@pytest.mark.parametrize(("kind", "data"), wrong_values())
def test_a_file_of_the_right_keys_and_wrong_values_is_refused(tmp_path, kind, data):
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(data))
    assert kind_of(data) == kind
    with pytest.raises(CompareError, match=rf"--with .*wrong\.json: .*{kind}.*; restore the file"):
        read_record(path)


def test_a_file_that_is_nested_too_deep_or_no_text_is_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[" * 100_000)
    with pytest.raises(CompareError, match=r"--with .*x\.json: is nested too deep; "):
        read_record(path)
    path.write_text(json.dumps(pages.comparison(ARMS)))
    path.with_suffix(".csv").write_bytes(b"arm\xff")
    with pytest.raises(CompareError, match=r"x\.csv: cannot be read \(not a text file\); "):
        read_record(path)


def test_a_large_study_stays_below_five_megabytes(tmp_path):
    arms = {f"arm{i}": 0.1 + 0.04 * i for i in range(20)}
    summary = pages.comparison(arms, target="arm0", n_points=200, n_seeds=10)
    for curves in summary["curves"].values():
        for metric in ("searched", "entity", "passage", "calls_per_episode"):
            curves[metric] = curves["accuracy"]
        for curve in curves.values():
            # as long as real numbers are
            curve["per_seed"] = [[v + 1e-5 * i for i, v in enumerate(s)] for s in curve["per_seed"]]
    path = tmp_path / "large.html"
    detail = write_report_page(path, [Record("comparison", "large", summary)], title="Large")
    assert path.stat().st_size <= MAX_BYTES
    assert detail is not DETAILS[0]
    assert detail.note in path.read_text()
    # all of them would not fit
    assert len(render(build_page([Record("comparison", "large", summary)], title=""))) > MAX_BYTES


def test_a_page_that_is_too_large_is_not_written(tmp_path):
    page = Page("t", "", "", Arms([]), None, [Section("a", "A", "x" * MAX_BYTES)])
    with pytest.raises(CompareError, match="more than 5"):
        write_page(tmp_path / "page.html", page)
    assert list(tmp_path.iterdir()) == []


def test_thinning_keeps_both_ends():
    assert thinned(5, 10) == [0, 1, 2, 3, 4]
    assert thinned(101, 5) == [0, 25, 50, 75, 100]


def test_labels_that_would_coincide_fall_back_to_the_names():
    arms = Arms(["obm", "OBM", "ties"])
    assert [arms.label(name) for name in arms.names] == ["obm", "OBM", "TIES"]


def test_style_and_script_are_in_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["compare"]
    for name in ("page.css", "page.js"):
        assert (ROOT / "compare" / name).is_file()
        assert any(fnmatch(name, pattern) for pattern in patterns)


def test_a_report_has_its_page_and_the_verdict_on_top_of_the_md(make_run, tmp_path):
    runs = [
        read_run(make_run(arm, seed, [v + spread * seed for v in curve]))
        for arm, curve, spread in (("obm", [0.3, 0.5, 0.7], 0.01), ("vlm", [0.0, 0.1, 0.1], 0.0))
        for seed in (0, 1, 2)
    ]
    (tmp_path / "floor.json").write_text(json.dumps(pages.floor({"obm": 0.5, "ties": 0.4})))
    output = tmp_path / "report"
    write_report(runs, output, command="obm compare", beside=[tmp_path / "floor.json"])
    lines = (output / "compare.md").read_text().splitlines()
    assert lines[2] == "**obm is ahead of every other start after training.**"
    text = (output / "compare.html").read_text()
    assert "OBM is ahead of every other start after training." in text
    assert "Every start before any training" in text
    assert 'href="compare.csv"' in text
    # an unknown file leaves nothing behind
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(CompareError, match="not a file that a page shows"):
        write_report(runs, tmp_path / "none", command="c", beside=[tmp_path / "other.json"])
    assert not (tmp_path / "none").exists()


def test_a_share_of_groups_is_not_said_to_be_one_of_steps():
    summary = pages.comparison(ARMS)
    for result in summary["arms"].values():
        result["stability"] = {"zero_signal": 0.25}
    text = render(build_page([Record("comparison", "compare", summary)], title=""))
    assert "groups without signal" in text
    assert "groups that taught nothing because every episode earned the same" in text
    assert "steps without signal" not in text


def test_intervals_that_are_not_there_do_not_overlap():
    one, three = (pages.comparison(ARMS, half=half) for half in (None, 0.5))
    text = render(build_page([Record("comparison", "compare", three)], title=""))
    assert "Its interval overlaps with all others in seen, unseen." in text
    text = render(build_page([Record("comparison", "compare", one)], title=""))
    assert "overlaps" not in text


def test_only_intervals_that_are_there_overlap_with_another():
    summary = pages.comparison(ARMS, half=0.5)
    del summary["arms"]["ties"]["intervals"]["seen.ceiling"]
    text = render(build_page([Record("comparison", "compare", summary)], title=""))
    assert "Its interval overlaps with all others in unseen." in text
    assert "Its interval overlaps with all that can be judged in seen." in text


# ---- in Chromium


def cell_texts(tab, table, column):
    rows = f"{table} tbody tr > :nth-child({column})"
    return tab.page.eval_on_selector_all(rows, "cells => cells.map(c => c.innerText.trim())")


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("device", "viewport"), [("phone", PHONE), ("desktop", DESKTOP)])
def test_the_page_is_quiet_and_fits(browser, page_file, scheme, device, viewport):
    with open_page(browser, page_file, scheme=scheme, viewport=viewport) as tab:
        tab.page.wait_for_timeout(200)
        assert tab.errors == []
        assert tab.requests == []
        assert not tab.overflows()
        ground = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(246, 245, 241)", "dark": "rgb(14, 18, 23)"}[scheme]
        tab.screenshot(f"page-{device}-{scheme}", full=True)
        # what is drawn can be seen
        boxes = tab.page.eval_on_selector_all(
            "svg.chart", "charts => charts.map(c => c.getBoundingClientRect().width)"
        )
        assert sum(width > 100 for width in boxes) > 15


@pytest.mark.browser
def test_tables_sort_by_number_with_the_mouse_and_the_keyboard(browser, page_file):
    with open_page(browser, page_file) as tab:
        table = "#numbers table"
        head = tab.page.locator(f"{table} thead th").nth(3)
        assert head.inner_text() == "ceiling"
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == "descending"
        assert cell_texts(tab, table, 1) == ["OBM", "TIES", "task arithmetic", "plain VLM"]
        head.locator("button").press("Enter")
        assert head.get_attribute("aria-sort") == "ascending"
        # 0.10 [0.05, 0.15] is a number, and its interval does not count
        assert cell_texts(tab, table, 4)[0].startswith("0.10")
        assert cell_texts(tab, table, 1) == ["plain VLM", "task arithmetic", "TIES", "OBM"]
        first = tab.page.locator(f"{table} thead th").nth(0)
        first.locator("button").click()
        assert head.get_attribute("aria-sort") == "none"
        assert cell_texts(tab, table, 1) == ["OBM", "plain VLM", "task arithmetic", "TIES"]
        assert tab.errors == []


@pytest.mark.browser
def test_a_click_on_an_arm_hides_it_everywhere(browser, page_file):
    with open_page(browser, page_file) as tab:
        chip = tab.page.locator(".legend button", has_text="TIES")
        row = tab.page.locator("#numbers tbody tr", has_text="TIES")
        curve = tab.page.locator("#fig-accuracy .wide-only svg > g[data-arm='2']:not(.end)")
        dots = tab.page.locator("#fig-floor-parts .wide-only g[data-arm='2']").first
        for shown in (row, curve, dots):
            assert shown.is_visible()
        chip.click()
        assert chip.get_attribute("aria-pressed") == "false"
        for hidden in (row, curve, dots):
            assert not hidden.is_visible()
        chip.click()
        assert row.is_visible()
        # twice: alone
        chip.dblclick()
        assert tab.page.locator("#numbers tbody tr:visible").count() == 1
        tab.page.locator(".legend button", has_text="show all").click()
        assert tab.page.locator("#numbers tbody tr:visible").count() == 4


@pytest.mark.browser
def test_the_x_axis_can_be_tokens_or_device_time(browser, page_file):
    with open_page(browser, page_file) as tab:
        svg = tab.page.locator("#fig-accuracy .wide-only svg")
        mean = svg.locator("g[data-arm='0'] .mean").first
        before = mean.get_attribute("d")
        tab.page.get_by_label("tokens", exact=True).check()
        assert svg.locator("text.name").text_content() == "tokens sampled by the policy"
        assert svg.locator("g.x text").last.text_content() == "4000"
        # tokens grow as steps do here, so the curve lies where it lay
        assert numbers_in(mean.get_attribute("d")) == pytest.approx(numbers_in(before), abs=0.11)
        tab.page.get_by_label("device time").check()
        # 10 s to 90 s of one device; longer ones are in minutes or hours
        assert svg.locator("text.name").text_content() == "device-seconds, preparation included"
        assert svg.locator("g.x text").all_text_contents() == ["10", "20", "30", "40", "50", "60",
                                                               "70", "80", "90"]  # fmt: skip
        tab.page.get_by_label("steps", exact=True).check()
        assert numbers_in(mean.get_attribute("d")) == pytest.approx(numbers_in(before), abs=0.11)
        assert tab.errors == []


def numbers_in(path):
    return [float(n) for n in re.findall(r"-?[\d.]+", path)]


@pytest.mark.browser
def test_the_saved_csv_is_the_figure_s_data(browser, page_file, tmp_path):
    summary = all_records()[0].data
    with open_page(browser, page_file) as tab:
        with tab.page.expect_download() as waiting:
            tab.page.locator("#fig-accuracy [data-get=csv]").click()
        assert waiting.value.suggested_filename == "accuracy.csv"
        text = Path(waiting.value.path()).read_text()
        assert tab.requests == []
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == len(ARMS) * 5
    for arm, curves in summary["curves"].items():
        mine = [row for row in rows if row["arm"] == arm]
        curve = curves["accuracy"]
        for column, name in (("step", "steps"), ("tokens", "tokens"), ("device_s", "device_s"),
                             ("mean", "mean"), ("low", "low"), ("high", "high")):  # fmt: skip
            assert [float(row[column]) for row in mine] == pytest.approx(curve[name], rel=1e-5)
        for seed in range(3):
            values = [float(row[f"seed_{seed}"]) for row in mine]
            assert values == pytest.approx(curve["per_seed"][seed], rel=1e-5)


@pytest.mark.browser
def test_a_name_with_a_comma_is_quoted_in_the_saved_csv(browser, tmp_path):
    name = 'odd, "name"'
    path = tmp_path / "odd.html"
    write_report_page(
        path, [Record("comparison", "odd", pages.comparison({"obm": 0.5, name: 0.1}, target=name))],
        title="Odd",
    )  # fmt: skip
    with open_page(browser, path) as tab:
        with tab.page.expect_download() as waiting:
            tab.page.locator("#fig-accuracy [data-get=csv]").click()
        rows = list(csv.DictReader(io.StringIO(Path(waiting.value.path()).read_text())))
    assert {row["arm"] for row in rows} == {"obm", name}


@pytest.mark.browser
@pytest.mark.parametrize("figure", ["accuracy", "behaviour", "floor-parts", "merge-density"])
def test_a_saved_picture_stands_alone(browser, page_file, tmp_path, figure):
    with open_page(browser, page_file, scheme="dark") as tab:
        with tab.page.expect_download() as waiting:
            tab.page.locator(f"#fig-{figure} [data-get=svg]").click()
        path = tmp_path / waiting.value.suggested_filename
        waiting.value.save_as(path)
        assert tab.errors == []
        # the theme is what it was
        assert tab.page.evaluate("document.documentElement.dataset.theme") is None
    text = path.read_text()
    assert "var(--" not in text
    assert 'fill="#ffffff"' in text
    # colours are named in the picture itself
    named = {"accuracy": ">task arithmetic<", "behaviour": ">text only<", "floor-parts": ">TIES<",
             "merge-density": ">agent<"}  # fmt: skip
    assert named[figure] in text
    with open_page(browser, path) as tab:
        assert tab.errors == []
        colours = set(re.findall(r'(?:stroke|fill)="(rgb[^"]+)"', text))
        assert len(colours) > 3
        tab.screenshot(f"saved-{figure}")


@pytest.mark.browser
def test_numbers_show_under_the_pointer_and_by_the_arrow_keys(browser, page_file):
    with open_page(browser, page_file) as tab:
        tip = tab.page.locator("#tip")
        svg = tab.page.locator("#fig-accuracy .wide-only svg")
        svg.scroll_into_view_if_needed()
        box = svg.bounding_box()
        tab.page.mouse.move(box["x"] + 60, box["y"] + box["height"] / 2)
        assert tip.is_visible()
        # the first evaluation: floors are half of the ceilings, the best on top
        assert tip.inner_text().split("\n")[0] == "optimizer steps: 0"
        assert "OBM" in tip.locator(".tip-row").first.inner_text()
        assert "0.250" in tip.locator(".tip-row").first.inner_text()
        tab.page.mouse.move(5, 5)
        assert not tip.is_visible()
        svg.focus()
        svg.press("ArrowLeft")
        assert tip.inner_text().split("\n")[0] == "optimizer steps: 20"
        svg.press("ArrowLeft")
        assert tip.inner_text().split("\n")[0] == "optimizer steps: 15"
        tab.page.keyboard.press("Escape")
        assert not tip.is_visible()


@pytest.mark.browser
def test_the_theme_can_be_chosen(browser, page_file):
    with open_page(browser, page_file, scheme="light") as tab:
        button = tab.page.locator("#theme")
        grounds = []
        for _ in range(3):
            grounds.append(tab.page.evaluate("getComputedStyle(document.body).backgroundColor"))
            button.click()
        # auto and light are light here, dark is not
        assert grounds == ["rgb(246, 245, 241)", "rgb(246, 245, 241)", "rgb(14, 18, 23)"]
        assert button.inner_text() == "theme: auto"


@pytest.mark.browser
def test_print_is_light_and_without_controls(browser, page_file):
    with open_page(browser, page_file, scheme="dark") as tab:
        tab.page.emulate_media(media="print", color_scheme="dark")
        ground = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == "rgb(255, 255, 255)"
        ink = tab.page.evaluate("getComputedStyle(document.body).color")
        assert ink == "rgb(26, 31, 38)"
        for control in ("#theme", ".tools", "nav.contents", ".switch"):
            assert not tab.page.locator(control).first.is_visible(), control
        assert tab.page.locator("#fig-accuracy .wide-only svg").is_visible()
        assert not tab.overflows()
        tab.screenshot("page-print", full=True)


@pytest.mark.browser
def test_without_scripts_everything_is_there_to_read(browser, page_file):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_file.resolve().as_uri())
    assert page.locator("#fig-accuracy .wide-only svg .mean").first.is_visible()
    assert page.locator("#numbers tbody tr").count() == 4
    assert not page.locator("#theme").is_visible()
    assert not page.locator(".tools").first.is_visible()
    context.close()
