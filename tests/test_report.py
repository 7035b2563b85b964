"""The demo end to end on tiny phantoms, its page, and going on after an interruption."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import emae
from emae import PhantomConfig, _datasets, _demo
from emae._report import Line, line_chart, paint_alike, ticks, verdict, write_report
from emae._runs import load_run, load_tensors

SMALL = "model.encoder.width=24 model.encoder.depth=1 model.encoder.heads=2 schedule.warmup=1 schedule.batch=1 " \
        "schedule.report_every=2 schedule.validate_every=3 crop=[4,32,32]".split()  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    """The phantom data set and the demo's schedule, made so small that all of it takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        for split, seed in (("train", 1), ("validation", 2), ("test", 3)):
            config = PhantomConfig(shape=(8, 64, 64), seed=seed, missing_sections=0, shifted_sections=0)
            patch.setitem(_datasets.PHANTOMS, split, config)
        patch.setitem(_demo.SHORT, "phantom", (
            [*SMALL, "schedule.steps=3", "model.decoder_width=24", "model.decoder_depth=1", "model.decoder_heads=2"],
            [*SMALL, "schedule.steps=6", "schedule.checkpoint_every=3", "model.channels=[8,8,8,8]"]))  # fmt: skip
        yield


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "runs"
    return emae.demo("phantom", out, say=lambda text: None).parent


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.cells = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.sources += [value for key, value in attrs if key in ("src", "href", "srcset")]
        if tag not in ("meta", "img", "br", "line", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def test_page_is_whole_and_needs_nothing_else(made):
    text = (made / "index.html").read_text()
    page = Page(text)
    assert not page.open  # every tag is closed
    assert len(page.sources) == 4 * 4 + 4 * 5 and all(s.startswith("data:image/png;base64,") for s in page.sources)
    assert not re.search(r"https?:|@import|url\(|<script|<link", text)
    assert text.count("<polyline") == 5 + 4 + 2


def test_scores_on_the_page_are_those_of_the_labels_on_disk(made):
    cells = Page((made / "index.html").read_text()).cells
    true = emae.open_labels("phantom/test")
    files = {"fine-tuned from pre-training": "pretrained/test.zarr", "the same, from scratch": "scratch/test.zarr",
             "classical: watershed and agglomeration on smoothed raw": "classical.zarr"}  # fmt: skip
    for row, file in files.items():
        scores = emae.score(true=true, predicted=emae.open_volume(made / file))
        where = cells.index(row)
        assert cells[where + 1] == f"{scores.adapted_rand_error:.3f}"
        assert cells[where + 6] == str(scores.predicted_objects)


def test_the_demo_folder_is_a_run_to_predict_with(made):
    run, other = load_run(made), load_run(made / "pretrained")
    assert run.decoder.threshold == other.decoder.threshold is not None
    raw = emae.open_volume("phantom/test", box="0:4,0:32,0:32")
    assert np.array_equal(np.asarray(emae.predict(run, raw)), np.asarray(emae.predict(other, raw)))


def test_interrupted_it_goes_on_and_ends_the_same(made, tiny, tmp_path, monkeypatch):
    out = tmp_path / "demo"
    honest = _demo.finetune

    def killed(config, folder, **options):
        if folder.name == "scratch":
            raise KeyboardInterrupt
        return honest(config, folder, **options)

    monkeypatch.setattr(_demo, "finetune", killed)
    with pytest.raises(KeyboardInterrupt):
        emae.demo("phantom", out, say=lambda text: None)
    assert list(json.loads((out / "demo.json").read_text())["results"]) == ["pretrained"]
    monkeypatch.setattr(_demo, "finetune", honest)
    said = []
    emae.demo("phantom", out, say=said.append)
    assert any("finished already" in text for text in said)  # nothing was trained again
    unbroken, again = (json.loads((folder / "demo.json").read_text())["results"] for folder in (made, out))
    assert {k: v["scores"] for k, v in unbroken.items()} == {k: v["scores"] for k, v in again.items()}
    ours, theirs = (load_tensors(folder / "weights.safetensors") for folder in (out, made))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours.keys() | theirs.keys())


def test_what_is_there_is_not_lost(made, tmp_path):
    page = (made / "index.html").read_bytes()
    with pytest.raises(FileExistsError, match="holds a demo of phantom"):
        emae.demo("phantom", made, resume=False)
    assert (made / "index.html").read_bytes() == page
    (tmp_path / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="no demo of ours"):
            emae.demo("phantom", tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="did you mean 'phantom'"):
        emae.demo("phantm", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_absent_data_is_told_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("EMAE_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="EMAE_DATA"):
        emae.demo("fib25", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_page_can_be_made_again(made):
    first = (made / "index.html").read_bytes()
    (made / "index.html").unlink()
    assert write_report(made).read_bytes() == first


def test_ticks_by_hand():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.61, 0.94) == [0.7, 0.8, 0.9]
    assert ticks(3, 3) == [3]


def test_line_chart_puts_points_where_they_belong():
    svg = line_chart([Line("a <b>", [0, 5, 10], [0, 1, 0.5], "#000")], "step", "loss")
    points = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]+)"', svg)[1].split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.1) and y0 - y1 == pytest.approx(2 * (y2 - y1), abs=0.2) and y1 < y0
    assert "a &lt;b&gt;" in svg and "<b>" not in svg


def test_paint_alike_by_hand():
    true = np.array([[[1, 1, 1, 1, 2, 2, 3, 3]]])
    predicted = np.array([[[7, 7, 7, 5, 9, 9, 9, 0]]])  # 5 is a split of 1; 9 merges 2 and one voxel of 3
    assert paint_alike(true, predicted)[0, 0].tolist() == [1, 1, 1, 5 + 4, 2, 2, 2, 0]


def test_verdict_says_when_the_aim_was_missed():
    def of(pretrained, scratch, classical):
        errors = {"pretrained": pretrained, "scratch": scratch, "classical": classical}
        return verdict({"results": {k: {"scores": {"adapted_rand_error": v}} for k, v in errors.items()}})

    assert "67% below" in of(0.1, 0.2, 0.3) and "missed" not in of(0.1, 0.2, 0.3) and "lowered" in of(0.1, 0.2, 0.3)
    assert "missed" in of(0.25, 0.2, 0.3) and "did not lower" in of(0.25, 0.2, 0.3)
    assert "did not lower" in of(0.2, 0.2, 0.3)
    assert "33% above" in of(0.4, 0.2, 0.3)
