"""Pages of runs: what they show, that they load nothing, and that what comes from files stays text."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning import bert, rows, trainer
from test_reports import accuracy
from zoo import ZOO

from hf_sparse import Report, SparseTrainer, SparsityConfig, SparsityError, inspect_checkpoint
from hf_sparse.checkpoint.pages import read_run
from hf_sparse.cli import main
from hf_sparse.report.frontier import best
from hf_sparse.report.history import History
from hf_sparse.report.html import number
from hf_sparse.report.kept import Kept
from hf_sparse.report.page import Run, comparison_page
from hf_sparse.report.parts import PARTS, bytes_by_part
from hf_sparse.report.report import weight_bytes
from hf_sparse.structure.blocks import LayerSizes, ModelStructure
from hf_sparse.structure.discovery import discover

SECTIONS = ["quality", "costs", "structure", "training", "family", "proof", "load", "made"]
VOID = {"meta", "br", "img", "link", "input", "hr"}
EVIL = '"><img src=x onerror=alert(1)><script>alert(2)</script>'


class Page(HTMLParser):
    """A page as a strict reader sees it: all tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.words.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(filter(None, self.words))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def assert_loads_nothing(page: Page) -> None:
    """Nothing but links that somebody has to click leads anywhere."""
    assert not {"img", "link", "iframe", "object", "embed", "base", "use", "image"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "style"} & set(attributes) and not any(
            name.startswith("on") for name in attributes
        )
        assert tag == "a" or "href" not in attributes
    assert "url(" not in page.source and "@import" not in page.source


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[SparseTrainer, Path]:
    """A short run with two targets, evaluated before, on the way and after."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    run = trainer(
        directory,
        sparsity=SparsityConfig(targets=[0.3, 0.6], sparsity_ramp=0.6),
        compute_metrics=accuracy,
        max_steps=48,
        logging_steps=4,
    )
    run.evaluate()
    run.train()
    run.evaluate()
    run.save_model()
    run.save_state()
    return run, directory


@pytest.fixture
def report(finished: tuple[SparseTrainer, Path]) -> Report:
    return Report.read(finished[1] / "report.json")


def test_saving_writes_a_page_that_has_everything_and_loads_nothing(finished: tuple[SparseTrainer, Path]) -> None:
    run, directory = finished
    text = (directory / "report.html").read_text()
    page, report = Page(text), json.loads((directory / "report.json").read_text())
    assert_loads_nothing(page)
    assert [heading["id"] for heading in page.of("h2")] == SECTIONS
    assert not page.of("script") and page.of("html")[0]["lang"] == "en"
    for model in ("dense", "pruned"):
        measured = report[model]
        for value in (f"{measured['parameters']:,}", f"{measured['latency_ms']:,.1f} ms"):
            assert value in page.text
        assert f"{measured['metrics']['evaluation']['accuracy']:.4f}" in page.text
        assert f"{measured['weight_bytes'] / 1e6:,.4g}" in page.text
    assert f"{report['achieved']:.1%} of the prunable parameters" in page.text and report["device"] in page.text
    for layer in report["layers"]:
        kept = report["kept"][layer["block"]]["units"] or "none"
        assert f"{layer['block']} {layer['kept']:,} {layer['units']:,} {kept}" in page.text
    shrinks = [line["step"] for line in run.state.log_history if "kept_attention" in line]
    assert shrinks and f"smaller at step {', '.join(map(str, shrinks))}" in page.text
    assert {"removed-0.3", "removed-0.6", "lambda", "Learning rate", "Density and its schedule"} <= set(page.words)
    drawn = [svg for svg in page.of("svg") if svg.get("role") == "img"]
    assert len(drawn) == len(page.of("figure")) and all(svg["aria-label"] for svg in drawn)
    assert f"{report['max_abs_diff']:.1e}" in page.text and "trust_remote_code=True" in page.text


def test_bytes_and_units_are_those_of_the_model(finished: tuple[SparseTrainer, Path], report: Report) -> None:
    run, _ = finished
    totals = [sum(sizes[i] for sizes in report.parts.values()) for i in (0, 1)]
    assert totals == [report.dense.weight_bytes, report.pruned.weight_bytes]
    assert report.parts["embeddings"][0] == report.parts["embeddings"][1]
    structure = discover(bert())
    prunable = sum(block.units * block.unit_cost for block in structure.blocks) * 4
    counted = bytes_by_part(bert(), structure)
    assert prunable <= counted["attention"] + counted["ffn"] < prunable + 2000  # biases of outputs stay
    for block, kept in report.kept.items():
        assert [unit for start, stop in kept.spans() for unit in range(start, stop)] == list(run.plan().kept[block])


@pytest.mark.parametrize("name", ["clip", "wav2vec2", "vit", "mixtral"])
def test_every_weight_belongs_to_one_part(name: str) -> None:
    model = ZOO[name].make()
    counted = bytes_by_part(model, ModelStructure(()))
    assert sum(counted.values()) == weight_bytes(model) and counted["norms"] > 0 and counted.keys() <= set(PARTS)


def test_the_command_writes_the_same_page(
    finished: tuple[SparseTrainer, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, directory = finished
    output = tmp_path / "page.html"
    main(["report", str(directory), "--output", str(output)])
    assert capsys.readouterr().out == f"the page is {output}\n"
    text = output.read_text().replace(json.dumps(str(directory)).replace('"', "&#34;"), "&#34;tiny&#34;")
    assert text == (directory / "report.html").read_text()
    with pytest.raises(SystemExit):
        main(["report", str(directory), "--output", str(output)])
    assert capsys.readouterr().err == f"error: {output} is there: give --overwrite, or another --output\n"
    main(["report", str(directory), "--output", str(output), "--overwrite"])


def test_several_runs_are_a_table_that_can_be_sorted_and_frontiers(
    finished: tuple[SparseTrainer, Path], tmp_path: Path
) -> None:
    members = [str(finished[1] / f"removed-{target}") for target in (0.3, 0.6)]
    main(["report", *members, "--output", str(tmp_path / "page.html")])
    page = Page((tmp_path / "page.html").read_text())
    assert_loads_nothing(page)
    assert len(page.of("script")) == 1 and page.of("table")[0]["class"] == "sortable"
    assert {"dense", "removed-0.3", "removed-0.6"} <= set(page.words) and len(page.of("figure")) == 3
    values = [cell["data-value"] for cell in page.of("td")]
    reports = [Report.read(Path(member) / "report.json") for member in members]
    assert str(reports[0].dense.weight_bytes / 1e6) in values and values.count("dense") == 1
    for report in reports:
        assert {str(report.pruned.weight_bytes / 1e6), str(report.achieved)} <= set(values)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda text: None, "has no report.json: give a directory"),
        (lambda text: text[:100], "is not a report of a pruning run"),
        (lambda text: text.replace('"units": 40', '"units": -40'), "a count is no whole number"),
        (lambda text: text.replace('"loss": 0.', '"loss": 1e300, "x": 0.'), "a measurement is too large"),
        (lambda text: text.replace('"schema": 2', '"schema": 3'), "its schema is 3"),
        (lambda text: text.replace('"units": "', '"units": "99999, '), "is not a range|more than it had"),
        (lambda text: text.replace("accuracy", "bleu").replace('"loss"', '"chrf"'), "no metric in common"),
    ],
)
def test_what_is_no_report_is_said_in_one_line(
    write: Any,
    reason: str,
    finished: tuple[SparseTrainer, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = write((finished[1] / "report.json").read_text())
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(SystemExit):
        main(["report", str(finished[1]), str(tmp_path), "--output", str(tmp_path / "page.html")])
    [line] = capsys.readouterr().err.splitlines()
    assert any(part in line for part in reason.split("|")) and not (tmp_path / "page.html").exists()


def test_a_report_of_an_earlier_version_has_a_page(finished: tuple[SparseTrainer, Path], tmp_path: Path) -> None:
    earlier = json.loads((finished[1] / "report.json").read_text())
    for name in ("schema", "parts", "kept"):
        del earlier[name]
    (tmp_path / "report.json").write_text(json.dumps(earlier))
    run = read_run(tmp_path)
    page = Page(run.page())
    assert run.report.schema == 1 and f"{earlier['pruned']['parameters']:,}" in page.text
    assert "did not count bytes by part" in page.text and "and not which" in page.text
    assert "there is no log of it" in page.text and "no checkpoint beside" in page.text


def test_names_from_files_stay_text(report: Report) -> None:
    origin = replace(report.origin, base_model=EVIL, dataset=EVIL, command=EVIL, task=EVIL)
    layers = [replace(layer, block=f"{EVIL}{layer.block}") for layer in report.layers]
    pruned = replace(report.pruned, metrics={EVIL: {EVIL: 0.5, **{f"{EVIL}{i}": math.nan for i in range(2000)}}})
    evil = replace(
        report, origin=origin, layers=tuple(layers), pruned=pruned, device=EVIL, versions={EVIL: EVIL}, kept={}
    )
    history = History.of(
        [
            {"step": 1, "loss": math.nan, f"eval_{EVIL}": 0.5, "density": 1.0},
            {"step": EVIL},
            {"step": 9, "lambda": 1e300},
        ]
    )
    run = Run(EVIL, evil, history, {EVIL: evil, "other": report}, [(EVIL, EVIL)])
    for text in (run.page(), comparison_page({EVIL: evil, "other": evil}), evil._repr_html_()):
        page = Page(text)
        assert_loads_nothing(page)
        assert EVIL in page.text and "unknown" in page.text
        assert len(page.of("script")) <= 1 and "alert" not in "".join(tag for tag, _ in page.tags)


def test_eighty_layers_are_a_small_page(report: Report) -> None:
    layers: list[LayerSizes] = []
    kept = {}
    heads, neurons = Kept.of(range(0, 64, 2), 1), Kept.of(range(0, 28672, 2), 0)
    for i in range(80):
        layers += [
            LayerSizes(f"model.layers.{i}.self_attn", "attention", i, 64, 32),
            LayerSizes(f"model.layers.{i}.mlp", "ffn", i, 28672, 14336),
        ]
        kept |= {layers[-2].block: heads, layers[-1].block: neurons}
    log = [{"step": step, "loss": 1 / (step + 1), "density": 0.5} for step in range(20_000)]
    text = Run("large", replace(report, layers=tuple(layers), kept=kept), History.of(log)).page()
    assert "2,560 of 5,120 kept" in Page(text).text and len(text) < 2 << 20
    assert "Of 20,000 logged values, evenly spaced ones are shown" in text and "all are in report.json" in text


def test_notebooks_show_the_same(finished: tuple[SparseTrainer, Path], report: Report) -> None:
    for shown in (report, inspect_checkpoint(finished[1])):
        page = Page(shown._repr_html_())
        assert_loads_nothing(page)
        assert f"{report.pruned.parameters:,}" in page.text and "Attention heads" in page.text


def test_the_progress_bar_says_how_dense_the_model_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = trainer(tmp_path, max_steps=8, logging_steps=2, disable_tqdm=False, train_dataset=rows(16))
    run.train()
    assert "density=1.000, target_density=0." in capfd.readouterr().err


@pytest.mark.parametrize(
    ("points", "lower", "expected"),
    [
        ([(1, 0.5), (2, 0.7), (3, 0.6)], False, [0, 1]),
        ([(3, 0.9), (1, 0.5), (1, 0.4)], False, [1, 0]),
        ([(1, 0.5), (2, 0.7), (3, 0.1)], True, [0, 2]),
        ([(1, math.nan), (2, 0.7)], False, [1]),
        ([], False, []),
    ],
)
def test_the_best_are_those_that_no_other_beats(
    points: Sequence[tuple[float, float]], lower: bool, expected: list[int]
) -> None:
    assert best(points, lower) == expected


def test_ranges_are_read_as_they_are_written() -> None:
    assert Kept.of([0, 1, 2, 5, 7, 8], 0) == Kept("0-2, 5, 7-8") and Kept.of([], 1).spans() == []
    assert Kept("0-2, 5", 2).spans() == [(0, 6), (10, 12)] and number(None) == number(math.inf) == "unknown"
    for text in ("3-1", "1, 0", "x", "1,2", "9" * 10, "<b>"):
        with pytest.raises(ValueError, match="not a range"):
            Kept(text).spans()


def test_a_log_that_is_none_is_said(tmp_path: Path) -> None:
    for text in ("", "[]", "{}", '{"log_history": 3}', '{"log_history": [3]}', "[" * 100_000):
        (tmp_path / "trainer_state.json").write_text(text)
        with pytest.raises(SparsityError, match="is not the state of a Trainer"):
            History.read(tmp_path / "trainer_state.json")
