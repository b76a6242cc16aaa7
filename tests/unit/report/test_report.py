"""``fellrec report`` on runs written by hand: figures, names that are markup, wrong input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from report_runs import write_pair, write_run

from fellrec.cli.main import main
from fellrec.report.figures import mixing_curves, slope_lines
from fellrec.report.folders import run_folders
from fellrec.report.page import latex
from fellrec.report.report_tables import ReportTable, results_table, settings_table
from fellrec.report.runs import check_comparable, comparison_of, labelled, read_run

FIGURES = ("clients", "spread", "learning", "mixing", "cost")
HOSTILE = "<script>alert('x')</script> & \"$\\frac$\"\x07_%"


class Page(HTMLParser):
    """The page's elements and the cells of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.cells: list[str] = []
        self._is_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._is_cell = tag in ("td", "th")
        if self._is_cell:
            self.cells.append("")
        assert not [name for name, value in attributes if name.startswith("on") or (name == "src" and value)]

    def handle_endtag(self, tag: str) -> None:
        self._is_cell = False

    def handle_data(self, data: str) -> None:
        if self._is_cell:
            self.cells[-1] += data


def figures_of(text: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", text, re.DOTALL)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clients, the first with two users; known values of two rules with two seeds; and their report."""
    folder = tmp_path_factory.mktemp("small") / "films"
    values = {("FedAvg", 0): [0.2, 0.4, 0.6, 0.3], ("FedAvg", 1): [0.2, 0.6, 0.6, 0.6]}
    values |= {("FELLRec", 0): [0.5, 0.5, 0.8, 0.2], ("FELLRec", 1): [0.5, 0.7, 0.4, 0.5]}
    for (rule, seed), own in values.items():
        write_run(folder / f"{rule}-{seed}", rule, seed, own, [0, 0, 1, 2])
    main(["report", str(folder)])
    return folder


def test_the_page_has_the_figures_of_the_runs(small: Path) -> None:
    """FedAvg: client means (0.3, 0.6, 0.3), (0.4, 0.6, 0.6) → 0.4, 0.5333; FELLRec: (0.5, 0.8, 0.2), (0.6, 0.4, 0.5) → 0.5.

    FedAvg's deviation over seeds is 0.1333 / √2; pooled it has (1.5 + 2.0) / 8, its worst clients are 0.3 and 0.4, and
    FELLRec's 0.2 and 0.4. Client 0 has (0.3 + 0.4) / 2 and (0.5 + 0.6) / 2. FELLRec is better for clients 0 and not for 1
    (0.6, 0.6) and 2 (0.45, 0.35).
    """
    text = (small / "report" / "report.html").read_text()
    page = Page(text)
    assert {"0.4667 ±0.0943", "0.5000 ±0.0000", "0.4375 ±0.0884", "0.3500 ±0.0707", "0.3000 ±0.1414"} <= set(page.cells)
    assert {"0.3500", "0.5500", "0.6000", "0.4500"} <= set(page.cells)
    assert "better for 1 of 3 clients" in text
    assert len(figures_of(text)) == len(FIGURES)
    assert "script" not in page.tags


def test_numbers_and_figures_are_files_of_their_own(small: Path) -> None:
    folder = small / "report"
    assert {path.stem for path in (folder / "figures").glob("*.pdf")} == set(FIGURES)
    assert all(path.read_bytes().startswith(b"%PDF") for path in (folder / "figures").iterdir())
    results = pd.read_csv(folder / "tables" / "results.csv").set_index("rule")
    for rule in ("fedavg", "fellrec"):
        runs = [json.loads(path.read_text()) for path in small.glob("*/results.json")]
        own = pd.DataFrame([run["summary"] for run in runs if run["rule"] == rule])
        for name in ("mean", "pooled", "std", "coefficient_of_variation", "worst"):
            column = own[f"ndcg_at_10/{name}"]
            assert results.loc[rule, f"ndcg_at_10_{name}"] == pytest.approx(column.mean())
            assert results.loc[rule, f"ndcg_at_10_{name}_sd"] == pytest.approx(column.std())
    assert results.loc["fellrec", "user_difference"] == pytest.approx((4.1 - 3.5) / 8)
    costs = pd.read_csv(folder / "tables" / "cost.csv")
    assert costs["round_up_bytes"].tolist() == [3_000_000, 3_000_000]
    assert costs["seconds_per_round"].tolist() == [3.0, 3.0]
    assert r"\toprule" in (folder / "tables" / "results.tex").read_text()


def test_a_report_is_not_overwritten(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (small / "report" / "report.html").stat().st_mtime_ns
    with pytest.raises(SystemExit) as stop:
        main(["report", str(small)])
    assert stop.value.code == 1
    assert "exists and is not empty; remove it, or give another folder by --output" in capsys.readouterr().err
    assert (small / "report" / "report.html").stat().st_mtime_ns == before


@pytest.mark.slow
def test_many_clients(tmp_path: Path) -> None:
    folder = write_pair(tmp_path / "runs", 500, seeds=(0,))
    main(["report", str(folder)])
    text = (folder / "report" / "report.html").read_text()
    drawn = figures_of(text)
    assert len(drawn) == len(FIGURES)
    clients = pd.read_csv(folder / "report" / "tables" / "clients.csv")
    assert len(clients) == 500
    better = int((clients["fellrec"] > clients["fedavg"]).sum())
    assert f"better for {better} of 500 clients" in drawn[0]
    assert len(text) < 1_000_000


def test_names_that_are_markup_or_formulas_are_text(tmp_path: Path) -> None:
    """Every figure is well-formed XML, no element comes from a name, and a dollar sign begins no formula."""
    for rule in ("FedAvg", "FELLRec"):
        own = {"trainer": {"note": HOSTILE if rule == "FELLRec" else "plain"}}
        write_run(tmp_path / rule, rule, 0, [0.1, 0.2], [0, 1], name=HOSTILE, settings=own, rounds=0)
    main(["report", str(tmp_path / "FedAvg"), str(tmp_path / "FELLRec"), "--output", str(tmp_path / "out")])
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert "<script" not in text.lower()
    assert "&lt;script&gt;" in text
    assert "\x07" not in text
    for figure in figures_of(text):
        xml.etree.ElementTree.fromstring(figure)
    source = (tmp_path / "out" / "tables" / "results.tex").read_text()
    assert r"\$\textbackslash{}frac\$" in source
    assert not re.search(
        r"(?<!\\)[%&#_](?![^\n]*\\\\)", source.split(r"\midrule")[1].replace(r"\\", "").replace(" & ", "")
    )


def test_lines_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    for number, rate in enumerate((0.001, 0.01)):
        own = {
            "trainer": {"learning_rate": rate},
            "aggregation": {"_target_": "fellrec.aggregation.FELLRec", "alpha": 0.7},
        }
        write_run(tmp_path / f"a{number}", "FELLRec", 0, [0.1, 0.2], [0, 1], settings=own)
    write_run(tmp_path / "b", "FedAvg", 0, [0.1, 0.3], [0, 1], settings={"trainer": {"learning_rate": 0.001}})
    runs = labelled([read_run(folder) for folder in run_folders(tmp_path)])
    assert [run.result.name for run in runs] == [
        "fedavg learning_rate=0.001",
        "fellrec learning_rate=0.001",
        "fellrec learning_rate=0.01",
    ]
    table = settings_table(runs)
    assert table is not None
    shown = table.numbers.set_index("setting")
    assert shown.loc["trainer.learning_rate"].tolist() == ["0.001", "0.001", "0.01"]
    assert shown.loc["aggregation.alpha"].tolist() == ["–", "0.7", "0.7"]
    assert list(shown.index) == ["aggregation._target_", "trainer.learning_rate", "aggregation.alpha"]


def test_without_fedavg_or_rounds_there_is_still_a_report(tmp_path: Path) -> None:
    """One rule alone: nothing to compare, and no rounds.csv."""
    write_run(tmp_path / "one", "Krum", 0, [0.1, 0.2], [0, 1], rounds=0)
    main(["report", str(tmp_path / "one")])
    page = (tmp_path / "one" / "report" / "report.html").read_text()
    assert "None of the runs has rounds.csv" in page
    comparison = comparison_of(labelled([read_run(tmp_path / "one")]))
    assert slope_lines(comparison) == ("krum", [])
    assert mixing_curves({"krum": []}) is None


def test_intervals_need_six_users(tmp_path: Path) -> None:
    write_run(tmp_path / "few", "FedAvg", 0, [0.1] * 5, [0, 1, 2, 2, 2])
    write_run(tmp_path / "more", "FedAvg", 0, [0.1] * 6, [0, 1, 2, 2, 2, 2])
    tables = [results_table(comparison_of([read_run(tmp_path / name)]), 10) for name in ("few", "more")]
    assert [table.text.iloc[0, 2] for table in tables] == ["0.1000", "0.1000\n[0.1000, 0.1000]"]


def test_latex_escapes_and_emphasises() -> None:
    text = pd.DataFrame({"rule": ["100 %_~"], "p": ["0.1"]})
    source = latex(ReportTable("results", text, text, frozenset({(0, "p")})))
    assert r"100 \%\_\textasciitilde{} & \textbf{0.1} \\" in source


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"key": "other", "name": "games"},
            "different data, partitions or holdouts (films, key 1234; games, key other",
        ),
        ({"settings": {"trainer": {"metric": "recall_at_10"}}}, "selected by ndcg_at_10 and recall_at_10"),
        ({}, "have the same settings and seed (fedavg, seed 0); give one of them"),
    ],
)
def test_runs_that_cannot_be_compared(
    change: dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "a", "FedAvg", 0, [0.1, 0.2], [0, 1])
    write_run(tmp_path / "b", "FedAvg", 0, [0.1, 0.2], [0, 1], **change)
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert message in error
    assert str(tmp_path / "a") in error
    assert str(tmp_path / "b") in error
    assert not (tmp_path / "out").exists()


def test_runs_on_other_users_cannot_be_compared(tmp_path: Path) -> None:
    first = read_run(write_run(tmp_path / "a", "FedAvg", 0, [0.1, 0.2, 0.3], [0, 1, 1]))
    other = write_run(tmp_path / "b", "FELLRec", 0, [0.1, 0.2, 0.3], [0, 1, 1])
    users = pd.read_parquet(other / "users.parquet")
    users.iloc[:2].to_parquet(other / "users.parquet")
    with pytest.raises(Exception, match="tested on different users"):
        check_comparable([first, read_run(other)])


def test_wrong_runs_are_refused_without_heavy_imports(tmp_path: Path) -> None:
    """A folder that does not exist, one that is not finished, and a report that exists."""
    unfinished = write_run(tmp_path / "run", "FedAvg", 0, [0.1], [0])
    (unfinished / "results.json").unlink()
    (tmp_path / "old" / "report").mkdir(parents=True)
    (tmp_path / "old" / "report" / "report.html").touch()
    code = """import sys
from fellrec.cli.main import main
for word in sys.argv[1:]:
    try:
        main(["report", word])
    except SystemExit as stop:
        print(stop.code)
print(*{"torch", "pandas", "matplotlib", "mlflow", "jinja2"} & set(sys.modules))
"""
    words = [str(tmp_path / name) for name in ("run", "none", "old")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"] * 3
    for message in ("has no results.json; resume it: fellrec train resume=", "none does not exist", "is not empty"):
        assert message in done.stderr


def test_wrong_runs_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_pair(tmp_path / "runs", 2, seeds=(0,))
    (folder / "FELLRec-0" / "results.json").unlink()
    damaged = write_run(tmp_path / "damaged", "FedAvg", 0, [0.1], [0])
    (damaged / "users.parquet").write_text("nothing")
    wrong = {
        str(
            folder
        ): f"{folder / 'FELLRec-0'} has no results.json; resume it: fellrec train resume={folder / 'FELLRec-0'}",
        str(tmp_path / "runz"): "runz does not exist; similar: ",
        str(damaged): "the results in ",
        str(tmp_path): "",
    }
    (tmp_path / "none").mkdir()
    wrong[str(tmp_path / "none")] = "has no config.yaml; give the directory of a run"
    del wrong[str(tmp_path)]
    for word, message in wrong.items():
        with pytest.raises(SystemExit) as stop:
            main(["report", word, "--output", str(tmp_path / "out")])
        assert stop.value.code == 1
        assert message in capsys.readouterr().err
    (folder / "runs.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(["report", str(folder), "--output", str(tmp_path / "out")])
    assert f"resume the whole: fellrec compare resume={folder} " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["report", str(folder / "FedAvg-0"), "--cutoff", "7", "--output", str(tmp_path / "out")])
    assert "--cutoff 7 is not among those of the runs: 5, 10" in capsys.readouterr().err
