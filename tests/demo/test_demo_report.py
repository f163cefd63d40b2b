"""The demo's report: complete, self-contained, and sound as a document."""

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo_findings import findings
from openpi.shared.charts import Line, Rate, line_chart, rate_chart, smooth
from openpi_demo import machine
from openpi_demo.report import render
from openpi_demo.tabletop import PLACE, PROMPTS

VOID = {"meta", "br"}


class Outline(HTMLParser):
    """Every tag with its attributes, and whether tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def page(tmp_path):
    return render(findings(tmp_path), tmp_path)


@pytest.fixture
def outline(page):
    outline = Outline()
    outline.feed(page)
    return outline


def text_of(page: str) -> str:
    return re.sub(r"<[^>]*>", " ", page.partition("<body>")[2])


def test_every_tag_of_the_page_is_closed_in_order(outline):
    assert outline.open == []
    assert outline.tags


def test_the_page_refers_to_nothing_outside_itself(outline):
    sources = [attrs[key] for _, attrs in outline.tags for key in ("src", "href") if key in attrs]
    assert len(sources) == 3
    assert all(source.startswith("data:video/mp4;base64,") for source in sources)


def test_the_page_shows_rates_with_intervals_for_every_prompt(page):
    text = text_of(page)
    assert "11/12 = 92% [65%, 99%]" in text
    assert "0/12 = 0% [0%, 24%]" in text
    assert all(prompt in text for prompt in PROMPTS[PLACE])


def test_the_page_compares_right_and_swapped_prompts_in_the_same_scenes(page):
    text = " ".join(text_of(page).split())
    assert "told what it is judged by 6/6 " in text
    assert "told another prompt, judged by the first 1/6 = 17%" in text
    assert "told another prompt, judged by what it was told 5/6 = 83%" in text


def test_commands_and_machine_texts_are_escaped(page):
    assert "<span>&amp;</span>" in page
    assert "A &lt;fast&gt; one" in page


def test_a_stage_that_was_left_out_has_no_row(page):
    text = text_of(page)
    assert "Fine-tune" in text
    assert "Without the base" not in text


def test_a_comparison_without_the_base_appears_wherever_the_others_do(tmp_path):
    found = findings(tmp_path)
    found["evaluations"]["scratch"] = found["evaluations"]["before"]
    found["training"]["scratch"] = found["training"]["finetuned"]
    text = text_of(render(found, tmp_path))
    assert text.count("without the base") >= 4  # legend, table, and both loss curves


def test_a_quick_run_says_that_nothing_was_learnt(tmp_path):
    assert "A quick run" in render({**findings(tmp_path), "quick": True}, tmp_path)
    assert "A quick run" not in render(findings(tmp_path), tmp_path)


def test_a_missing_film_is_an_error_rather_than_an_empty_frame(tmp_path):
    found = findings(tmp_path)
    (tmp_path / "evaluations" / "after_videos" / "00.mp4").unlink()
    with pytest.raises(FileNotFoundError, match=r"00\.mp4"):
        render(found, tmp_path)


def test_the_page_names_what_trained_and_served(page):
    assert "trained and served with PyTorch" in text_of(page)


def test_machine_and_versions_are_filled_in():
    described = machine.describe_machine()
    assert int(described["cores"]) >= 1
    assert re.fullmatch(r"\d+\.\d GiB", described["memory"])
    assert machine.versions()["mujoco"][0].isdigit()


# --- charts -----------------------------------------------------------------------------------------------------

FINITE = st.floats(-1e6, 1e6)


def svg_of(chart: str) -> ElementTree.Element:
    return ElementTree.fromstring(chart[chart.index("<svg") :])


@given(st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=20))
def test_every_point_of_a_line_lies_inside_the_picture(points):
    svg = svg_of(line_chart([Line("a", points)], x_label="step", y_label="loss"))
    width, height = (float(side) for side in svg.attrib["viewBox"].split()[2:])
    polyline = svg.find("polyline")
    assert polyline is not None
    placed = [tuple(map(float, pair.split(","))) for pair in polyline.attrib["points"].split()]
    assert len(placed) == len(points)
    assert all(0 <= x <= width and 0 <= y <= height for x, y in placed)


def test_larger_values_are_drawn_higher_and_later_steps_further_right():
    svg = svg_of(line_chart([Line("a", [(0, 1.0), (10, 3.0)])], x_label="step", y_label="loss"))
    polyline = svg.find("polyline")
    assert polyline is not None
    (x0, y0), (x1, y1) = (tuple(map(float, pair.split(","))) for pair in polyline.attrib["points"].split())
    assert x1 > x0
    assert y1 < y0


POSITIVE = st.floats(1e-6, 1e6)


@given(st.lists(st.tuples(FINITE, POSITIVE), min_size=1, max_size=20))
def test_on_a_logarithmic_axis_every_point_lies_inside_the_picture_too(points):
    svg = svg_of(line_chart([Line("a", points)], x_label="step", y_label="loss", log_y=True))
    height = float(svg.attrib["viewBox"].split()[3])
    polyline = svg.find("polyline")
    assert polyline is not None
    assert all(0 <= float(pair.split(",")[1]) <= height for pair in polyline.attrib["points"].split())


@given(st.floats(1e-12, 1e12), st.floats(1e-12, 1e12))
def test_labels_of_a_logarithmic_axis_do_not_overlap(low, high):
    svg = svg_of(line_chart([Line("a", [(0, low), (1, high)])], x_label="step", y_label="loss", log_y=True))
    places = sorted(float(text.attrib["y"]) for text in svg.iter("text") if text.attrib["text-anchor"] == "end")
    assert len(places) >= 2 and min(np.diff(places)) >= 12  # of letters of 12 px


def test_equal_ratios_are_equally_far_apart_on_a_logarithmic_axis():
    chart = line_chart(
        [Line("a", [(0, 1.0), (1, 0.1), (2, 0.01), (3, 0.0)])], x_label="step", y_label="loss", log_y=True
    )
    polyline = svg_of(chart).find("polyline")
    assert polyline is not None
    heights = [float(pair.split(",")[1]) for pair in polyline.attrib["points"].split()]
    assert len(heights) == 3  # zero has no logarithm
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)


def test_values_that_are_not_finite_are_left_out_and_nothing_left_is_said():
    chart = line_chart([Line("a", [(0, float("nan"))])], x_label="step", y_label="validation <loss>")
    assert chart == '<p class="note">No values of validation &lt;loss&gt;.</p>'


def test_rates_are_placed_in_order_and_named_in_full():
    rates = [Rate("after", 0.9, 0.7, 1.0, "after"), Rate("before", 0.1, 0.0, 0.3, "before")]
    svg = svg_of(rate_chart([("a prompt", rates)]))
    after, before = (float(circle.attrib["cx"]) for circle in svg.iter("circle"))
    assert after > before
    assert [title.text for title in svg.iter("title")] == ["after: 90% (70% to 100%)", "before: 10% (0% to 30%)"]


@pytest.mark.parametrize("letters", [3, 82, 300])
def test_names_of_tasks_lie_inside_the_picture_and_are_there_in_full(letters):
    name = ("pick_up_the_black_bowl_" * 20)[:letters]
    svg = svg_of(rate_chart([(name, [Rate("success", 0.5, 0.2, 0.8, "after")])]))
    label = next(text for text in svg.iter("text") if "pic" in "".join(text.itertext()))
    shown = str(list(label.itertext())[-1])
    begin, width = float(label.attrib["x"]), 7 * len(shown)  # of letters of 12 px
    begin -= width if label.attrib["text-anchor"] == "end" else 0
    assert begin >= 0
    assert begin + width <= float(svg.attrib["viewBox"].split()[2])
    assert name in label.itertext()


@given(FINITE, st.integers(1, 30))
def test_smoothing_leaves_a_constant_alone(value, count):
    smoothed = smooth([(float(x), value) for x in range(count)])
    assert [y for _, y in smoothed] == pytest.approx([value] * count)


def test_smoothing_stays_between_the_extremes_and_reduces_jumps():
    smoothed = [y for _, y in smooth([(x, float(x % 2)) for x in range(20)])]
    assert min(smoothed[1:]) > 0 and max(smoothed) < 1
    assert max(smoothed[10:]) - min(smoothed[10:]) < 0.5
