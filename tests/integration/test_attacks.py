"""``fellrec attack`` on finished runs: what the server sees is what the model computes, and what is reported of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

import fellrec
from fellrec.attacks import BASELINES, ON_CUT
from fellrec.attacks.findings import Finding
from fellrec.attacks.membership import known_users, member_auc, row_losses, rows_of
from fellrec.attacks.observe import Tap, observe, one_step, with_items
from fellrec.attacks.settings import AttackSettings
from fellrec.attacks.update import first_update
from fellrec.cli.main import main
from fellrec.config.stored import read_config
from fellrec.cut.client_model import CutClientModel
from fellrec.experiment.attack import attack, with_depths
from fellrec.experiment.restore import restore
from fellrec.federated.client_model import WholeClientModel
from fellrec.federated.ledger import Ledger
from fellrec.federated.records import Job, ScoreJob
from fellrec.federated.selection import Selection
from fellrec.tracking.run_log import id_of_run
from fellrec.tracking.store import make_client

ROWS = 9
OWN = ["backbone.num_layers=4", "adapter=lora", "adapter.dropout=0", "trainer.num_rounds=1", "split.head_layers=2"]


@pytest.fixture(scope="module")
def run_dir(lean_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a head of two layers of four, and LoRA without dropout, which would change hidden states."""
    folder = tmp_path_factory.mktemp("attacked") / "run"
    fellrec.run([*lean_overrides, *OWN, "tracking.uri=null", f"run_dir={folder}"])
    return folder


@pytest.fixture(scope="module")
def findings(run_dir: Path) -> dict[tuple[str, int | None], Finding]:
    found = attack(run_dir, read_config(run_dir), list(ON_CUT), [0, 2], AttackSettings(rows=ROWS, inverter_steps=60))
    return {(finding.attack, finding.depth): finding for finding in found}


def test_what_the_tap_keeps_are_the_hidden_states_of_transformers(run_dir: Path) -> None:
    """The head of two layers gives Hugging Face's third hidden state, of the same adapter on the whole model."""
    config = read_config(run_dir)
    recommender, federation = restore(run_dir, config.copy())
    score_job = federation.selection.score_jobs()[0]
    cut_config = config.copy()
    with_depths(cut_config, [1, 2])
    cut_recommender, cut_federation = restore(run_dir, cut_config, recommender.data, "inprocess")
    with_items(cut_recommender.datamodule)
    link = cut_recommender.link
    assert link is not None
    tap = Tap(link.transport)
    link.connect(tap, Ledger())
    for depth in (2, 1):
        client = CutClientModel(WholeClientModel(cut_recommender.module, cut_recommender.base), link, [depth] * 3)
        trainer = one_step(cut_federation.executor.trainer, client)  # type: ignore[attr-defined]
        seen = observe(trainer, tap, Job(score_job.row, 0, 1, 0, score_job.adapter))
        whole, model = WholeClientModel(recommender.module, recommender.base), recommender.module.model.eval()
        with torch.no_grad(), whole.evaluating(score_job, "test", 0):
            for ids, first, second in zip(seen.ids, seen.first, seen.second, strict=True):
                states = model.model(input_ids=ids, output_hidden_states=True).hidden_states
                torch.testing.assert_close(first, states[depth], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(second, states[3], rtol=1e-4, atol=1e-5)
        assert [gradient.shape for gradient in seen.second_gradient] == [state.shape for state in seen.second]
        assert [gradient.shape for gradient in seen.first_gradient] == [state.shape for state in seen.first]
        assert all(bool((gradient != 0).any()) for gradient in seen.second_gradient)


def test_recovery_is_total_at_depth_0_and_above_both_baselines(
    findings: dict[tuple[str, int | None], Finding],
) -> None:
    assert findings["nearest_embedding", 0].metrics["token_at_1"] == 1.0
    assert findings["nearest_embedding", 0].metrics["title_at_1"] == 1.0
    assert findings["nearest_embedding", 0].metrics["rouge_l"] == 1.0
    for name in BASELINES:
        for metric in ("token_at_1", "title_at_1", "rouge_l"):
            assert findings[name, 0].metrics[metric] < 0.5 < findings["nearest_embedding", 2].metrics[metric]
    for finding in findings.values():
        assert all(0 <= value <= 1 for value in finding.metrics.values())
        for name, value in finding.metrics.items():
            if name.endswith("_at_10"):
                assert value >= finding.metrics[name.replace("_10", "_1")]


def test_the_verb_writes_what_it_prints(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], findings: dict[tuple[str, int | None], Finding]
) -> None:
    output = tmp_path / "out"
    words = ["attack", str(run_dir), "attack=nearest_embedding", "split.head_layers=0,2", f"attack.rows={ROWS}"]
    main([*words, "--output", str(output), "--format", "json"])
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((output / "attack.json").read_text()) == printed
    assert {path.suffix for path in output.glob("leakage.*")} == {".pdf", ".svg", ".png"}
    for plain in printed["findings"]:
        assert plain["metrics"] == pytest.approx(findings[plain["attack"], plain["depth"]].metrics)
    table = pd.read_csv(output / "attack.csv")
    assert list(zip(table["attack"], table["depth"])) == [(one["attack"], one["depth"]) for one in printed["findings"]]
    with pytest.raises(SystemExit):
        main([*words, "--output", str(output)])
    assert "exists and is not empty; remove it, or give another folder by --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["attack=nearest_embeding"], "unknown attack 'nearest_embeding'; choose from: nearest_embedding"),
        (["split.head_layers=0,4"], "split.head_layers=4 and split.tail_layers=1 do not fit"),
        (["split.head_layers=3"], "leave the server nothing of the backbone's 4 layers"),
        (
            ["split.head_layers=deep"],
            "split.head_layers=deep is not allowed: whole numbers of at least 0, such as 0,1,2",
        ),
        (["attack.rows=0"], "attack.rows=0 is not allowed: a whole number of at least 1"),
        (["attack.row=1"], "unknown setting 'attack.row'; choose from: attack.rows"),
        (["trainer.seed=1"], "'trainer.seed=1' is not allowed: a run keeps its own configuration"),
    ],
)
def test_what_is_wrong_is_refused_before_data_are_read(
    run_dir: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("fellrec.experiment.attack.data_of")
    with pytest.raises(SystemExit):
        main(["attack", str(run_dir), *words])
    assert message in capsys.readouterr().err
    assert not (run_dir / "attack").exists()


@pytest.fixture(scope="module")
def of_items(lean_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with item ids."""
    folder = tmp_path_factory.mktemp("of_items") / "run"
    lean = [item for item in lean_overrides if not item.startswith("backbone.")]
    fellrec.run([*lean, "backbone=sasrec", "trainer.num_rounds=1", "tracking.uri=null", f"run_dir={folder}"])
    return folder


def test_what_does_not_fit_a_run_is_refused_without_pytorch(of_items: Path) -> None:
    """Importing PyTorch takes longer than reading the titles of a run from the cache."""
    code = (
        "import sys; from fellrec.cli.main import main\n"
        f"run = {str(of_items)!r}\n"
        "for words in (['attack', run, 'attack=gradient'], ['recommend', run, '--client', '0', '--history', 'No such film'],\n"
        "              ['recommend', run, '--client', '99', '--history', 'No such film']):\n"
        "    try: main(words)\n"
        "    except SystemExit as stop: print(stop.code)\n"
        "print([name for name in ('torch', 'lightning', 'transformers', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"] * 3 + ["[]"], done.stderr
    for message in (
        "backbone=sasrec reads item ids",
        "no item is called 'No such film'",
        "client 99 is not allowed: the run has",
    ):
        assert message in done.stderr


def test_first_updates_give_the_items_of_training_away(of_items: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of an item table, every row is an item: far above chance, which is n of I items."""
    main(["attack", str(of_items), "attack.users_per_client=[1,5]", "attack.update_clients=4", "--format", "json"])
    printed = json.loads(capsys.readouterr().out)["findings"]
    recall = {(one["attack"], one["users_per_client"]): one["metrics"]["item_recall"] for one in printed}
    assert {name for name, _ in recall} == {"update_rows", "update_scores", *BASELINES}
    for users in (1, 5):
        assert recall["update_rows", users] > 0.8
        assert recall["update_scores", users] > recall["chance", users]
    assert recall["chance", 1] < 0.3


def test_members_are_told_from_others_after_overtraining(of_items: Path) -> None:
    """A client that trains 40 epochs gives its members away; the initial model, which knows no user, does not."""
    recommender, federation = restore(of_items, read_config(of_items), transport="none")
    trainer = federation.executor.trainer  # type: ignore[attr-defined]
    trainer.settings = replace(trainer.settings, local_epochs=40, max_local_steps=None, learning_rate=1e-2)
    initial, module = federation.population.initial, recommender.module
    model = WholeClientModel(module, recommender.base)
    data = recommender.data
    users = known_users(data, 100, seed=0)
    users = users[data.client_of_user[users] == 0]
    rows = [rows_of(data, users, is_member) for is_member in (True, False)]
    assert [row[row >= 0][-1] for row in rows[1]] == [data.valid.row(user)[0] for user in users]
    assert [row[row >= 0][-1] for row in rows[0]] == [data.train.row(user)[-1] for user in users]
    overtrained = first_update(trainer, 0, initial)
    auc = {}
    for name, adapter in (("overtrained", overtrained), ("initial", initial)):
        job = ScoreJob(0, adapter, (0,))
        auc[name] = member_auc(*(row_losses(module, model, job, row, recommender.fabric, 0) for row in rows))
    assert auc["overtrained"] > max(0.65, auc["initial"] + 0.1)


def test_adapters_are_attacked_beside_what_knows_no_user(of_items: Path) -> None:
    names = ["membership", "client_inference"]
    found = attack(of_items, read_config(of_items), names, None, AttackSettings(users=12))
    assert [one.attack for one in found] == [
        "membership", "membership_calibrated", "initial_model", "client_inference", "largest_client",
    ]  # fmt: skip
    assert all(0 <= value <= 1 for one in found for value in one.metrics.values())


def test_clients_with_one_adapter_cannot_be_told_apart(of_items: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shared(selection: Selection) -> list[ScoreJob]:
        return [ScoreJob(0, selection.population.initial, (0, 1, 2))]

    monkeypatch.setattr(Selection, "score_jobs", shared)
    with pytest.raises(fellrec.FellrecError, match="this run has selected one adapter for all"):
        attack(of_items, read_config(of_items), ["client_inference"], None, AttackSettings())


def test_the_callback_logs_leakage_beside_the_metrics_and_changes_none(
    run_dir: Path,
    lean_overrides: list[str],
    tmp_path: Path,
    empty_store: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = shutil.copy(empty_store, tmp_path / "mlflow.db")
    folder = tmp_path / "run"
    added = ["+callbacks.leakage._target_=fellrec.callbacks.Leakage", "+callbacks.leakage.rows=6"]
    fellrec.run([*lean_overrides, *OWN, *added, f"tracking.uri=sqlite:///{store}", f"run_dir={folder}"])
    before, after = (json.loads((one / "results.json").read_text())["summary"] for one in (run_dir, folder))
    assert before == after
    lines = [line for path in (folder / "outbox").iterdir() for line in path.read_text().splitlines()]
    logged = [json.loads(line) for line in lines if '"leakage/' in line]
    metrics = {name: value for one in logged for name, value in one["metrics"].items()}
    assert {one["step"] for one in logged} == {0}
    assert {name.split("/")[1] for name in metrics} == {"nearest_embedding", "logit_lens"}
    assert metrics["leakage/nearest_embedding/token_at_1"] > 0.5
    assert all(0 <= value <= 1 for value in metrics.values())
    main(["attack", str(folder), "attack=public_tail", "split.head_layers=0,2", "attack.rows=3", "--log"])
    run_id = id_of_run(folder)
    assert run_id is not None
    history = make_client(f"sqlite:///{store}").get_metric_history(run_id, "attack/public_tail/target_at_10")
    found = json.loads((folder / "attack" / "attack.json").read_text())["findings"]
    expected = {one["depth"]: one["metrics"]["target_at_10"] for one in found if one["attack"] == "public_tail"}
    assert {point.step: point.value for point in history} == expected
    with pytest.raises(SystemExit):
        main(["attack", str(run_dir), "--log"])
    assert "is not tracked by MLflow; leave out --log" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (["backbone=sasrec"], "callbacks.leakage recovers text: it needs backbone=tiny or backbone=hf"),
        (["+callbacks.leakage.attacks=[inverter]"], "callbacks.leakage.attacks=['inverter'] is not allowed: a list"),
    ],
)
def test_the_callback_refuses_what_it_cannot_attack(
    lean_overrides: list[str], tmp_path: Path, added: list[str], message: str
) -> None:
    lean = [item for item in lean_overrides if not item.startswith("backbone.")]
    target = "+callbacks.leakage._target_=fellrec.callbacks.Leakage"
    with pytest.raises(fellrec.FellrecError) as error:
        fellrec.run([*lean, target, *added, "tracking.uri=null", f"run_dir={tmp_path / 'run'}"])
    assert message in str(error.value)


def test_lora_has_no_rows(run_dir: Path) -> None:
    with pytest.raises(fellrec.FellrecError, match="adapter=lora does not train: use attack=update_scores"):
        attack(run_dir, read_config(run_dir), ["update_rows"], None, AttackSettings())


def test_item_ids_are_no_text(run_dir: Path) -> None:
    config = read_config(run_dir)
    config.backbone.name = "sasrec"
    with pytest.raises(fellrec.FellrecError, match="backbone=sasrec reads item ids"):
        attack(run_dir, config, ["logit_lens"], None, AttackSettings())


def test_a_run_that_is_not_finished_is_refused(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "begun"
    other.mkdir()
    (other / "config.yaml").write_text((run_dir / "config.yaml").read_text())
    with pytest.raises(SystemExit):
        main(["attack", str(other)])
    assert "has no checkpoint, and nothing to evaluate" in capsys.readouterr().err
