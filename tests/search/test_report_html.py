"""The report page: it shows what the run's folder holds, says what is not there yet, and changes nothing."""

import dataclasses
import json
import math
import re
import shutil
import sqlite3
import subprocess
import types
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effbert.__main__ import main
from effbert.architecture import PUBLISHED, Architecture, Dimensions
from effbert.search import figures, report_html, run
from effbert.search.agreement import paired_difference
from effbert.search.record import STAGES, read_record
from effbert.search.space import ArchitectureSpace
from effbert.search.study import Study

NASTY = "</title></svg><script>alert(1)</script> & \"'\x00\ud800"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NAMESPACE = "{http://www.w3.org/2000/svg}"
FINAL = {"parameters": 900, "flops": 5_000_000, "latency_ms": 2.5, "latency_spread_ms": 0.1, "architecture": PUBLISHED}


def make_config(folder, **more):
    stage = {"num_candidates": 6, "cohort": 3, "rungs": [1 / 3, 1.0]}
    student = {"hidden_size": 540, "intermediate_size": 540}
    config = {"task": "builtin-topic", "seed": 3, "student": student, "stage1": stage, "stage2": stage, **more}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"effbert_run": config}))


def make_study(folder):
    """Stage 1 with every state: two cohorts of three, in each of which one goes on; stage 2 with two of one size."""
    study = Study(folder)
    stage = study.stage("stage1")
    for number in range(6):
        stage.begin(number, PUBLISHED, f"key {number}")
    for number, low in enumerate((0.50, 0.40, None, 0.55, 0.45, 0.60)):
        if low is not None:
            stage.report(number, 0, low, parameters=1000 + number, seconds=1.0, tokens=10, shares=[1 / 3])
    for number, value in ((0, 0.70), (3, 0.65)):
        epochs = [{"loss": 3.0, "accuracy": value - 0.2}, {"loss": 2.0, "accuracy": value}]
        costs = {"parameters": 1000 + number, "flops": 2000 - number, "seconds": 4.0, "tokens": 40}
        shares = {"shares": [1 / 3, 1.0], "jackknife": [value - 0.01 * number, value + 0.01, value, value]}
        stage.complete(number, value, scores=epochs[-1], epochs=epochs, best_epoch=1, hits="0101", **costs, **shares)
    stage.prune(1)
    stage.prune(4)
    stage.fail(2, NASTY.replace("\ud800", ""), seconds=0.5)
    stage = study.stage("stage2")
    for number in range(2):
        stage.begin(number, PUBLISHED, f"key {number}")
        stage.complete(number, 0.7 + number / 10, parameters=1000, scores={"accuracy": 0.7 + number / 10})


def make_results(folder):
    scores = {"teacher": 0.9, "winner": 0.8, "published": 0.75}
    spreads = {"teacher": None, "winner": 0.01, "published": 0.02}
    rows = [{"row": n, "score": s, "spread": spreads[n], "repeats": 2, **FINAL} for n, s in scores.items()]
    results = {
        "task": "builtin-topic",
        "metric": "accuracy",
        "winner": PUBLISHED,
        "table": rows,
        "results": [
            {"row": row["row"], "repeat": 0, "scores": {"accuracy": row["score"]}, "seconds": 7} for row in rows
        ],
        "device": "abacus, 2 threads",
        "versions": {"effbert": "0.1.0"},
        "finished": "2026-11-22 19:00:00",
    }
    (folder / "results.json").write_text(json.dumps(results))
    agreement = {"stage": "stage1", "what": "rung 33% against full budget", "kendall": 0.5, "low": 0.1, "high": 0.8}
    unknown = {**agreement, "what": "all equal", "kendall": None, "low": None, "high": None}
    (folder / "agreement.json").write_text(json.dumps([{**agreement, "candidates": 12}, unknown]))
    (folder / "supernet").mkdir()
    (folder / "supernet" / "training.json").write_text('{"seconds": 60.0, "tokens": 1000}')


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run ?#{}"
    make_config(folder)
    make_study(folder)
    make_results(folder)
    return folder


class Page(HTMLParser):
    """A page whose tags are closed in order: its ids, and the text in each section, table and article."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.text, self.ids, self.open, self.tags, self.words = text, [], [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []
        drawn = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
        self.figures = {svg[0].get("id").removesuffix("-title"): svg for svg in drawn}
        assert len(self.figures) == len(drawn)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag not in ("meta", "link", "br"):
            self.open.append((tag, attributes.get("id")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for tag, name in self.open:
            if tag == "section":
                self.words[name] = self.words.get(name, "") + data + " "
            elif tag == "header":
                self.words["header"] = self.words.get("header", "") + data + " "


def read(folder) -> Page:
    return Page(report_html.write_report(folder).read_text(encoding="utf-8"))


def groups(svg, kind, tag):
    return [
        item
        for group in svg.iter(f"{NAMESPACE}g")
        if group.get("class") == kind
        for item in group.iter(NAMESPACE + tag)
    ]


def labels(svg, kind):
    return [item.text for item in svg.iter(f"{NAMESPACE}text") if item.get("class") == kind]


def test_the_page_needs_nothing_else_and_every_figure_says_what_it_shows(whole):
    page = read(whole)
    assert not re.search(r"<script|<link|<img|@import|url\(|src=", page.text)
    assert all(found.startswith("#") for found in re.findall(r'href="([^"]*)"', page.text))
    assert len(page.ids) == len(set(page.ids))
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "prefers-color-scheme:dark" in page.text
    assert len(page.figures) >= 14
    for name, svg in page.figures.items():
        assert svg.get("viewBox") and svg.get("aria-labelledby") == f"{name}-title {name}-desc"
        assert len(svg[0].text) > 3 and len(svg[1].text) > 3 and len(svg) > 2
    for tag, attributes in page.tags:
        assert tag != "th" or attributes["scope"] in ("col", "row")


def test_every_candidate_and_the_best_so_far_are_drawn(whole):
    page = read(whole)
    parts = [[value - 0.01 * number, value + 0.01, value, value] for number, value in ((0, 0.70), (3, 0.65))]
    ahead = paired_difference(0.7, 0.65, parts).as_difference
    told = f"Candidate 0 is best with accuracy 0.7000, ahead of candidate 3 by {ahead}."
    assert any(told in words for words in page.words.values())
    svg = page.figures["stage1-progress"]
    counts = {kind: len(groups(svg, kind, "circle")) for kind in ("complete", "pruned", "running")}
    assert counts == {"complete": 2, "pruned": 2, "running": 1}
    assert len(groups(svg, "failed", "path")) == 1
    hints = [title.text for title in groups(svg, "pruned", "title")]
    assert hints[0] == "candidate 1: 0.4000 at 33% of the budget, 1,001 parameters"
    (line,) = groups(svg, "best", "polyline")
    heights = [float(point.split(",")[1]) for point in line.get("points").split()]
    assert heights == sorted(heights, reverse=True)
    assert heights[-1] == min(float(dot.get("cy")) for dot in groups(svg, "complete", "circle"))
    assert labels(svg, "mark") == ["0.7000"]


def test_the_front_is_marked_and_equal_costs_are_told(whole):
    page = read(whole)
    parameters, flops = (page.figures[f"stage1-front-{cost}"] for cost in ("parameters", "flops"))
    assert len(groups(parameters, "front", "circle")) == 1 and len(groups(parameters, "dominated", "circle")) == 1
    assert len(groups(flops, "front", "circle")) == 2 and not groups(flops, "dominated", "circle")
    assert labels(parameters, "mark") == ["0"] and sorted(labels(flops, "mark")) == ["0", "3"]
    assert "The same for all 2 candidates: 1,000 parameters." in page.words["front"]
    assert "stage2-front-parameters" not in page.figures


def test_rungs_count_who_reached_them(whole):
    page = read(whole)
    bars = page.figures["stage1-rungs"]
    assert labels(bars, "name") == ["33%", "100%"]
    assert [text.split(" ·")[0] for text in labels(bars, "tick")] == ["5 reached it", "2 reached it"]
    widths = [(rect.get("class"), float(rect.get("width"))) for rect in bars.iter(f"{NAMESPACE}rect")]
    assert widths == [("bar complete", 144), ("bar pruned", 144), ("bar running", 72), ("bar complete", 144)]
    values = page.figures["stage1-rung-values"]
    assert len(groups(values, "complete", "polyline")) == 2 and len(groups(values, "pruned", "circle")) == 2
    assert "This stage has not begun." in page.words["rungs"]


def test_what_a_filter_or_a_limit_discarded_is_told_and_reached_no_rung(tmp_path):
    make_config(tmp_path, stage1={"num_candidates": 4, "cohort": 4, "rungs": [1 / 3, 1.0]})
    stage = Study(tmp_path).stage("stage1")
    for number in range(4):
        stage.begin(number, PUBLISHED, str(number))
    stage.prune(0, discarded="among the worst by the filter")
    for number in (1, 2):
        stage.prune(number, discarded=f"takes {number}1.00 ms, over --max_latency_ms 10")
    stage.complete(3, 0.5, shares=[1.0])  # left alone: trained on the whole budget at once
    page = read(tmp_path)
    assert "3 discarded before training" in page.words["progress"] and "stopped early" not in page.words["progress"]
    assert "2 discarded before training: over --max_latency_ms 10" in page.words["progress"]
    assert "1 discarded before training: among the worst by the filter" in page.words["progress"]
    assert labels(page.figures["stage1-rungs"], "name") == ["100%"]
    assert "1 reached it" in labels(page.figures["stage1-rungs"], "tick")[0]


def test_candidates_that_train_alone_are_no_stage_of_the_search(tmp_path):
    make_config(tmp_path, agreement_candidates=2, stage3={"num_candidates": 2})
    study = Study(tmp_path)
    for name, values in (("stage3", (0.6, 0.7)), ("agreement", (0.9, None))):
        stage = study.stage(name)
        for number, value in enumerate(values):
            stage.begin(number, PUBLISHED, str(number))
            if value is not None:
                stage.complete(number, value, shares=[1.0], parameters=1000, seconds=2.0)
    page = read(tmp_path)
    assert "of 2 candidates of stage 3 that train alone 1 are done" in page.words["header"]
    for said in ("best of stage3 so far 0.7000", "candidates evaluated 2 of 14"):
        assert said in page.words["header"]
    assert "agreement candidates" in page.words["cost"]


def test_where_costs_count_the_best_so_far_is_that_of_the_front(tmp_path):
    make_config(tmp_path, minimize=["flops"])
    stage = Study(tmp_path).stage("stage1")
    for number, flops in enumerate((9, 5)):
        stage.begin(number, PUBLISHED, str(number))
        stage.complete(number, 0.5, shares=[1.0], flops=flops, parameters=1000)
    assert "Best of stage1 so far, candidate 1." in read(tmp_path).words["winner"]


def test_agreement_has_intervals_and_a_table(whole):
    page = read(whole)
    svg = page.figures["rank-agreement"]
    (bar,) = (path for path in svg.iter(f"{NAMESPACE}path") if path.get("class") == "interval")
    low, high = map(float, re.fullmatch(r"M([\d.]+) \d+H([\d.]+)", bar.get("d")).groups())
    (dot,) = svg.iter(f"{NAMESPACE}circle")
    assert (float(dot.get("cx")) - low) / (high - low) == pytest.approx((0.5 - 0.1) / (0.8 - 0.1), abs=0.01)
    assert "0.500 0.100 0.800 12" in page.words["agreement"] and "all equal – – – –" in page.words["agreement"]


def test_learning_curves_follow_the_metric(whole):
    page = read(whole)
    svg = page.figures["stage1-curves"]
    assert len(groups(svg, "thin complete", "polyline")) == 2 and len(groups(svg, "best", "circle")) == 2
    assert svg[1].text.endswith("candidate 0: 0.5000, 0.7000")
    assert "No loss and no score after several epochs is recorded" in page.words["curves"]
    assert "stopped early" not in figcaptions(page)["stage1-curves"]  # such a one is scored once


def figcaptions(page):
    """Text below each figure, by name."""
    pairs = re.findall(r"<figure>(<svg.*?</svg>)(?:<figcaption>(.*?)</figcaption>)?</figure>", page.text, re.DOTALL)
    return {re.search(r'id="([^"]*)-title"', svg)[1]: re.sub("<.*?>", "", caption) for svg, caption in pairs}


def curve(*losses, share=1.0):
    return [(share * (place + 1) / len(losses), loss) for place, loss in enumerate(losses)]


@pytest.fixture
def trained(tmp_path):
    """One epoch each: whole budget twice, one stopped at half of it, one diverged, one under way; then a final row."""
    make_config(tmp_path)
    stage = Study(tmp_path).stage("stage1")
    losses = ((5.0, 2.0), (5.0, 3.0), (6.0, 4.0), (5.0, 9e9), (4.0, 3.5))
    for number, ends in enumerate(losses):
        stage.begin(number, PUBLISHED, str(number))
        share = 1.0 if number < 2 else 0.5
        kept = {"general": curve(*ends, share=share), "task": [] if number == 3 else curve(7.0, share=share)}
        attrs = {"losses": kept, "scores": {"accuracy": 0.5}, "epochs": [{"accuracy": 0.5}]}
        if number < 2:
            stage.complete(number, 0.7 - number / 10, shares=[0.5, 1.0], **attrs)
        elif number == 3:
            stage.fail(number, "loss grown", **attrs)
        else:
            stage.report(number, 0, 0.5, shares=[0.5], **attrs)
    stage.prune(2)
    for folder, phases in (("supernet", ("general",)), ("stage3/supernet", ("general", "tasks"))):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "training.json").write_text('{"seconds": 60.0, "tokens": 1000}')
        (tmp_path / folder / "losses.json").write_text(json.dumps({phase: curve(8.0, 5.0, 4.5) for phase in phases}))
    (tmp_path / "final").mkdir()
    for name in ("winner", "published"):
        row = {"row": name, "repeat": 0, "scores": {"accuracy": 0.8}, "seconds": 5, **FINAL}
        row |= {"losses": {"general": [], "task": curve(6.0, 1.5)}}
        (tmp_path / "final" / f"{name}-0.json").write_text(json.dumps(row))
    return tmp_path


def points(line):
    return [tuple(map(float, point.split(","))) for point in line.get("points").split()]


def test_every_trained_candidate_has_a_loss_curve_over_the_share_of_the_budget_it_had(trained):
    page = read(trained)
    svg = page.figures["stage1-losses-general"]
    for phase, said in (("general", "loss on text"), ("task", "loss on the task")):
        assert said in "".join(page.figures[f"stage1-losses-{phase}"].itertext()).replace("training loss", "")
    ends = {
        kind: [points(line)[-1] for line in groups(svg, f"thin {kind}", "polyline")]
        for kind in ("complete", "pruned", "failed", "running")
    }
    assert {kind: len(found) for kind, found in ends.items()} == {"complete": 2, "pruned": 1, "failed": 1, "running": 1}
    (best,) = groups(svg, "best", "polyline")
    assert points(best)[-1] == max(ends["complete"], key=lambda end: end[1])  # lowest on the page
    (left, _), whole = points(best)[0], ends["complete"][0][0]  # from half the budget to all of it
    assert ends["pruned"][0][0] == left < whole
    assert ends["failed"][0][1] == min(y for found in ends.values() for _, y in found) >= 0  # cut off, others not flat
    assert svg[1].text == "5 candidates; the best, candidate 0: from 5 to 2"
    task = page.figures["stage1-losses-task"]
    assert len(groups(task, "thin pruned", "circle")) == 1 and not groups(task, "thin failed", "circle")
    legends = figcaptions(page)
    for word in ("whole budget", "stopped early", "failed", "under way", "candidate 0, the best"):
        assert word in legends["stage1-losses-general"]
    assert "stage1-curves" not in page.figures


def test_supernets_and_final_rows_have_loss_curves(trained):
    page = read(trained)
    assert page.figures["supernet-losses-general"][1].text == "from 8 to 4.5"
    final = page.figures["final-losses-task"]
    assert len(groups(final, "best", "polyline")) == len(groups(final, "complete", "polyline")) == 1
    assert "final-losses-general" not in page.figures
    stage = Study(trained).stage("stage3")
    stage.begin(0, PUBLISHED, "key")
    stage.complete(0, 0.7, scores={"accuracy": 0.7})
    page = read(trained)
    assert page.figures["stage3-supernet-losses-tasks"][1].text == "from 8 to 4.5"
    assert "scored without training" in page.words["curves"]


def test_a_stage_without_any_value_tells_why(tmp_path):
    make_config(tmp_path)
    study = Study(tmp_path)
    for name, settle in (
        ("stage1", lambda stage, number: stage.fail(number, f"loss grown from 6.{number} to {number}e+17")),
        ("stage2", lambda stage, number: stage.prune(number, discarded=f"takes {number} ms, over --max_latency_ms 1")),
    ):
        stage = study.stage(name)
        for number in range(6):
            stage.begin(number, PUBLISHED, str(number))
            settle(stage, number)
        page = read(tmp_path)
        if name == "stage1":
            assert "stage1, 6 of 6 candidates, 6 of which failed." in page.words["header"]
    words = page.words["progress"]
    assert "yet" not in words and words.count("Of 6 candidates none has a value.") == 2
    assert re.search(r"×\s+6 failed", words)
    assert "6 failed: loss grown from 6.0 to 0e+17, the first of them" in words
    assert "6 discarded before training: over --max_latency_ms 1" in words


def test_a_stage_whose_candidates_diverged_before_any_loss_was_kept_has_a_page(tmp_path):
    make_config(tmp_path)
    stage = Study(tmp_path).stage("stage1")
    for number, losses in enumerate(({"general": []}, {"general": [(0.5, 7.0)], "task": []})):
        stage.begin(number, PUBLISHED, str(number))
        stage.fail(number, "loss not finite at step 1", losses=losses, seconds=1.0, tokens=1)
        page = read(tmp_path)
        assert "loss not finite at step 1" in page.words["progress"]
        assert list(page.figures).count("stage1-losses-general") == number


@pytest.mark.parametrize(
    "settings,metric,ranking",
    [
        ({}, "accuracy", "accuracy"),
        ({"ranking_metric": "roc_auc"}, "accuracy", "roc_auc"),
        ({"task": "CoLA", "ranking_metric": "task"}, "mcc", "mcc"),
        ({"task": "STS-B", "ranking_metric": "roc_auc"}, "pearson", "pearson"),
        ({"task": "squad", "ranking_metric": "roc_auc"}, "f1", "f1"),
        ({"task": "mine", "train_file": "a.csv", "ranking_metric": "roc_auc"}, "accuracy", "roc_auc"),
        ({"task": "mine", "train_file": "a.csv", "task_kind": "regression"}, "pearson", "pearson"),
        ({"task": "of another version"}, "value", "value"),
    ],
)
def test_before_the_first_score_the_configuration_tells_the_metrics(tmp_path, settings, metric, ranking):
    make_config(tmp_path, **settings)
    assert report_html.metrics_of(read_record(tmp_path)) == (metric, ranking)
    assert f"metric {metric} what ranks candidates {ranking}" in read(tmp_path).words["settings"]


def test_an_open_run_tells_on_what_it_was_begun(tmp_path):
    make_config(tmp_path)
    assert "device of the latencies not recorded" in read(tmp_path).words["settings"]
    run.note_machine(tmp_path)
    words = read(tmp_path).words["settings"]
    assert f"device of the latencies {run.machine()['device']}" in words and f"torch {torch.__version__}" in words
    kept = '{"device": "of the first worker"}'
    (tmp_path / "machine.json").write_text(kept)
    run.note_machine(tmp_path)
    assert "of the first worker" in read(tmp_path).words["settings"]


def test_agreement_of_too_few_candidates_says_so(tmp_path):
    make_config(tmp_path)
    study = Study(tmp_path)
    make_study(tmp_path)
    config = types.SimpleNamespace(
        stage1=types.SimpleNamespace(filter="none"), stage2=None, agreement_candidates=0, storage=""
    )
    run.Pages(tmp_path, study, config, print).write()
    (entry,) = json.loads((tmp_path / "agreement.json").read_text())
    assert entry["what"] == "rung 0.33 against full budget, among those that went on" and entry["candidates"] == 2
    pruned = Study(tmp_path).stage("stage2")
    pruned.begin(2, PUBLISHED, "key 2")
    pruned.report(2, 0, 0.4, shares=[1 / 3])
    pruned.prune(2)
    run.Pages(tmp_path, study, config, print).write()
    page = read(tmp_path)
    assert "stage2: rung 0.33 against full budget, among those that went on too few – – 0" in page.words["agreement"]


def test_costs_add_up(whole):
    page = read(whole)
    assert labels(page.figures["cost-parts"], "name") == ["supernet", "stage1 candidates", "final rows"]
    # supernet 60, candidates 4 + 4 whole, 1 + 1 stopped, 0.5 failed, 1 under way, final 3 x 7
    assert "stage1 candidates 11.5 12% 2 0 110" in page.words["cost"] and "all 92.5 100%" in page.words["cost"]
    assert "92 s" in page.words["header"]


def test_the_final_table_and_the_settings(whole):
    page = read(whole)
    assert "winner 0.8000 ± 0.0100 900 5.0 2.50" in page.words["final"]
    assert "The winner's accuracy: -0.1000 against teacher, +0.0500 against published." in page.words["final"]
    assert len(list(page.figures["final-scores"].iter(f"{NAMESPACE}circle"))) == 3
    assert "Finished 2026-11-22 19:00:00." in page.words["header"]
    for words in ("seed 3", "abacus, 2 threads", "effbert 0.1.0", '"hidden_size": 540'):
        assert words in page.words["settings"]


def test_the_winner_is_drawn_layer_by_layer(whole):
    page = read(whole)
    layers = Architecture.parse(PUBLISHED).layers
    trees = [page.figures[f"layer-{number}"] for number in range(1, 7)]
    for layer, svg in zip(layers, trees, strict=True):
        nodes = [node for node in svg.iter(f"{NAMESPACE}g") if node.get("class", "").startswith("node")]
        edges = [path for path in svg.iter(f"{NAMESPACE}path") if path.get("class") == "edge"]
        sheets = [rect for rect in svg.iter(f"{NAMESPACE}rect") if rect.get("class") == "sheet"]
        assert len(nodes) == len(layer.nodes) - 2 == len(edges) + 1  # a weight is drawn with its linear
        assert len(sheets) == layer.structure.stacks
    assert labels(trees[0], "name") == ["tanh", "W2  270→540", "gelu", "W1  540→270", "x"]
    assert labels(trees[3], "name") == ["W2  270→540", "gelu", "W1  540→270", "max", "x", "tanh", "x"]
    assert (
        "4 in a row, inner width 270 of 540, 1,170,720 parameters".replace("1,170,720", f"{4 * 293_490:,}")
        in (page.words["winner"])
    )


@given(st.integers(0, 10_000))
def test_nodes_of_a_tree_never_overlap_and_stay_in_the_picture(seed):
    space = ArchitectureSpace("coarse", Dimensions(), 6, 15_000_000, 16_000_000)
    layer = space.sample(np.random.default_rng(seed)).layers[seed % 6]
    svg = ElementTree.fromstring(figures.tree("t", "title", "text", layer, 540, 270))
    _, _, width, height = map(float, svg.get("viewBox").split())
    boxes = []
    for node in svg.iter(f"{NAMESPACE}g"):
        rect = node.find(f"{NAMESPACE}rect")
        boxes.append([float(rect.get(key)) for key in ("x", "y", "width", "height")])
    for x, y, w, h in boxes:
        assert 0 <= x and x + w <= width and 0 <= y and y + h <= height
    for index, (x, y, w, h) in enumerate(boxes):
        for other_x, other_y, *_ in boxes[:index]:
            assert abs(x - other_x) >= w or abs(y - other_y) >= h


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e9), st.booleans())
def test_ticks_are_round_and_their_labels_differ(low, span, whole):
    high = low + span
    found = figures.ticks(low, high, 5, whole)
    assert len(found) <= 6 and (whole or len(found) >= 2)
    assert all(low - 1e-6 * span <= tick <= high + 1e-6 * span for tick in found)
    names = figures.tick_labels(found)
    assert len(set(names)) == len(names)
    assert span < abs(low) / 1000 or all(len(name) <= 9 for name in names)
    assert not whole or all(float(tick).is_integer() for tick in found)


def test_the_best_so_far_rises_by_steps():
    points = [(0, 0.5), (1, 0.4), (2, 0.7), (3, 0.7)]
    assert figures.best_so_far(points) == [(0, 0.5), (0, 0.5), (1, 0.5), (2, 0.5), (2, 0.7), (3, 0.7)][1:]


def test_nothing_from_outside_becomes_markup(tmp_path):
    make_config(tmp_path, task=NASTY, stage1={"cohort": 1, "note": NASTY})
    make_study(tmp_path)
    make_results(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    results |= {"winner": NASTY, "metric": NASTY, "device": NASTY, "table": [{**results["table"][0], "row": NASTY}]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = read(tmp_path)
    assert "<script" not in page.text and "\x00" not in page.text
    assert "alert(1)" in page.words["winner"] and "It cannot be drawn" in page.words["winner"]
    assert "alert(1)" in page.words["final"] and "alert(1)" in page.words["progress"]


def test_a_run_that_has_just_begun_says_what_is_not_there(tmp_path):
    make_config(tmp_path)
    page = read(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "report.html"]
    assert not page.figures
    assert "no candidate has been proposed yet" in page.words["header"]
    for section in ("final", "winner", "progress", "front", "rungs", "agreement", "curves", "cost"):
        assert re.search("not begun|not there|none of its|No candidate|No training", page.words[section]), section
    (tmp_path / "study.db").touch()  # killed before the tables were made
    assert read(tmp_path).words == page.words


def test_a_run_under_way_shows_the_best_so_far(tmp_path):
    make_config(tmp_path)
    stage = Study(tmp_path).stage("stage1")
    stage.begin(0, PUBLISHED, "key")
    page = read(tmp_path)
    assert "stage1, 0 of 6 candidates" in page.words["header"] and "none has a value yet" in page.words["progress"]
    stage.complete(0, 0.6, scores={"accuracy": 0.6}, parameters=1000)
    (tmp_path / "final").mkdir()
    row = {"row": "winner", "repeat": 0, "scores": {"accuracy": 0.8}, "seconds": 5, **FINAL}
    (tmp_path / "final" / "winner-0.json").write_text(json.dumps(row))
    page = read(tmp_path)
    assert "1 rows of the final table are done" in page.words["header"]
    assert "winner 0.8000 900" in page.words["final"] and "rows are missing" in page.words["final"]
    lost = {**row, "row": "published", "scores": None, "diverged": "loss not finite at step 3"}
    (tmp_path / "final" / "published-0.json").write_text(json.dumps(lost))
    page = read(tmp_path)
    assert "published diverged 900" in page.words["final"] and "against" not in page.words["final"]
    (tmp_path / "final" / "winner-0.json").write_text(json.dumps({**lost, "row": "winner"}))
    page = read(tmp_path)
    assert "winner diverged 900" in page.words["final"] and "final-scores" not in page.figures
    (tmp_path / "final" / "winner-0.json").write_text(json.dumps(row))
    assert "Best of stage1 so far, candidate 0." in page.words["winner"] and "layer-6" in page.figures


def test_a_plan_is_shown_by_its_search_and_its_table(tmp_path):
    folder = tmp_path / "plan"
    folder.mkdir()
    steps = [{"step": name, "result": result} for name, result in (("search", "winner.json"), ("last", "last.json"))]
    (folder / "plan.json").write_text(json.dumps(steps))
    with pytest.raises(ValueError, match="search is no run"):
        read_record(folder)
    make_config(folder / "search")
    stage = Study(folder / "search").stage("stage1")
    stage.begin(0, PUBLISHED, "key")
    assert "stage1, 0 of 6 candidates" in read(folder).words["header"]
    (folder / "winner.json").write_text(json.dumps({"winner": PUBLISHED}))
    page = read(folder)
    assert "The search is finished, 1 of 2 steps of its plan are left." in page.words["header"]
    assert "Winner of the search" in page.words["winner"] and "after the last of them" in page.words["final"]
    model = {"score": 0.5, "spread": 0.25, "diverged": 0, "seeds": [{"parameters": 7, "flops": 5e6}]}
    teacher = {"scores": {"f1": 0.75}, "parameters": 9, "flops": 6e6}
    tasks = [{"task": "qqp", "metric": "f1", "teacher": teacher, "models": {"winner": model, "plain": model}}]
    (folder / "results.json").write_text(json.dumps({"tasks": tasks, "finished": "at noon", "device": "abacus"}))
    (folder / "last.json.left-out").touch()
    page = read(folder / "search")
    assert "The search is finished, so is its plan." in page.words["header"] and page.words == read(folder).words
    assert "at noon" in page.words["settings"] and "abacus" in page.words["settings"]
    assert "teacher 0.7500 9 6 winner 0.5000 ± 0.2500 7 5 plain" in page.words["final"]
    (folder / "plan.json").write_text('{"another": "program\'s"}')
    assert "stage1, 0 of 6 candidates" in read(folder / "search").words["header"]
    with pytest.raises(ValueError, match="is no run"):
        read_record(folder)


def test_a_database_that_is_not_there_is_not_made(whole, tmp_path):
    with pytest.raises(ValueError, match=r"nothere\.db: no study there: .*nothere\.db does not exist"):
        read_record(whole, f"sqlite:///{tmp_path / 'nothere.db'}")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_no_search_is_said_to_be_none(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"effbert_run": {"run": "PretrainConfig", "model": "supernet"}}))
    with pytest.raises(ValueError, match="is a run of another command"):
        read_record(tmp_path)


def test_a_page_that_cannot_be_drawn_is_said_and_ends_no_search(whole, monkeypatch):
    said = []
    monkeypatch.setattr(report_html, "page", lambda record: math.log10(0))
    study = Study(shutil.copytree(whole, whole.parent / "undrawn"))
    assert not run.write_page(study.output_dir, study, said.append)
    assert len(said) == 1 and said[0].startswith("report.html is not written: ")
    assert said[0].endswith(error_of(math.log10, 0))
    monkeypatch.undo()
    assert run.write_page(study.output_dir, study, said.append)
    assert len(said) == 1 and (study.output_dir / "report.html").exists()


def error_of(function, *arguments):
    with pytest.raises(ValueError) as caught:
        function(*arguments)
    return str(caught.value)


@pytest.mark.parametrize("apart", [0, 1, 3])
def test_values_that_only_rounding_tells_apart_are_drawn(apart):
    low = 0.5933333333333333
    low, high = figures._widened([low, low + apart * np.spacing(low)])
    found = figures.ticks(low, high)
    assert len(set(figures.tick_labels(found))) == len(found) > 1
    assert figures.tick_labels([7.0, 7.0]) == ["7", "7"] and figures.tick_labels([0.25]) == ["0.25"]


def test_reading_agrees_with_the_study_and_changes_nothing(whole):
    report_html.write_report(whole)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in whole.rglob("*") if path.is_file()}
    record = read_record(whole)
    study = Study(shutil.copytree(whole, whole.parent / "copy"))  # Study makes the stage that is missing
    for name in STAGES:
        expected = study.stage(name).evaluations()
        without_hits = [{key: value for key, value in e.attrs.items() if key != "hits"} for e in expected]
        pairs = zip(expected, without_hits, strict=True)
        assert record.stages[name] == [dataclasses.replace(e, attrs=attrs) for e, attrs in pairs]
    assert {e.state for e in record.stages["stage1"]} == {"complete", "pruned", "failed", "running"}
    report_html.write_report(whole)
    report = whole / report_html.REPORT_FILE
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in whole.rglob("*") if path.is_file()}
    assert after.pop(report)[1] == before.pop(report)[1]
    assert after == before


@pytest.mark.parametrize(
    "name,content,words",
    [
        ("config.json", "{}", "is no run"),
        ("config.json", "{", "config.json: cannot be read as JSON"),
        ("results.json", "[]", "results.json: holds a list, a dict belongs there"),
        ("agreement.json", "{}", "agreement.json: holds a dict, a list belongs there"),
        ("agreement.json", "[1, 2]", "no page can be drawn of this run, a file of it may be damaged: AttributeError: "),
        ("study.db", "no database, and longer than the head of one" * 9, "study.db: cannot be read as a study"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, capsys, name, content, words):
    make_config(tmp_path)
    (tmp_path / name).write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert words in line and line.count("\n") == 1 and not (tmp_path / "report.html").exists()


def test_the_command_says_where_the_page_is(whole, tmp_path, capsys):
    where = tmp_path / "page.html"
    assert main(["report", str(whole), "--output", str(where)]) == 0
    assert capsys.readouterr().out.strip() == str(where) and len(read(whole).figures) == len(
        Page(where.read_text()).figures
    )
    for arguments, words in (
        ([str(tmp_path)], "is no run: give the --output_dir of a search"),
        ([str(tmp_path / "nowhere")], "is no run"),
        ([str(whole), "--output", str(tmp_path)], "give a file name in a folder that exists"),
        ([str(whole), "--output", str(tmp_path / "no" / "page.html")], "give a file name in a folder that exists"),
        ([], "effbert report"),
    ):
        assert main(["report", *arguments]) == 2
        line = capsys.readouterr().err
        assert words in line and line.count("\n") == 1


def test_a_search_may_write_while_the_report_is_read(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    with sqlite3.connect(folder / "study.db") as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("DELETE FROM trials")
        assert len(read(folder).figures) == len(read(whole).figures)
        writer.rollback()


MEASURE = """<script>
addEventListener("load", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
  document.body.style.width = "360px";
  const faults = [];
  for (const svg of document.querySelectorAll("svg")) {
    const view = svg.viewBox.baseVal, name = svg.querySelector("title").id, box = svg.getBBox();
    const shown = svg.getBoundingClientRect();
    if (!(box.width > 20 && box.height > 20 && shown.width > 100)) faults.push(name + " is empty");
    for (const text of svg.querySelectorAll("text:not([transform])")) {
      const own = text.getBBox();
      if (own.x < -1 || own.y < -1 || own.x + own.width > view.width + 1 || own.y + own.height > view.height + 1)
        faults.push(name + " cuts " + text.textContent);
      const space = text.parentNode.querySelector(":scope > rect");
      if (text.closest(".node") && own.width > space.getBBox().width)
        faults.push(name + " overfills " + text.textContent);
    }
  }
  for (const part of document.querySelectorAll("p, h2, article, figure, .tiles, .scroll"))
    if (part.getBoundingClientRect().right > document.body.getBoundingClientRect().right)
      faults.push("wider than a phone: " + part.outerHTML.slice(0, 60));
  document.title = document.querySelectorAll("svg").length + " figures; " + faults.join("; ");
});
</script>"""


def test_a_browser_draws_every_figure_on_a_phone(whole, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)} in PATH")
    page = read(whole)
    file = tmp_path / "page.html"
    file.write_text(page.text.replace("</body>", MEASURE + "</body>"), encoding="utf-8")
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}")
    more = ("--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom", file.as_uri())
    done = subprocess.run([browser, *flags, *more], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert ":CONSOLE:" not in done.stderr
    (title,) = re.findall(r"<head>.*?<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title == f"{len(page.figures)} figures; "
