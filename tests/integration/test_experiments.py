"""Experiments and benchmarks run from end to end on a few synthetic users, so that they do not rot."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import DictConfig
from preloaded import program, python

from fellrec.attacks import check_names
from fellrec.cli import attack
from fellrec.cli.main import main
from fellrec.config.compose import compose
from fellrec.experiment.build import build_rule
from fellrec.experiment.variants import check_comparable, configurations
from fellrec.experiment.versions import git_commit

ROOT = Path(__file__).resolve().parents[2]


def cells(markdown: Path) -> pd.DataFrame:
    """The first table of a Markdown file."""
    lines = [line for line in markdown.read_text().split("\n\n")[0].splitlines() if not line.startswith("|---")]
    header, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return pd.DataFrame(rows, columns=header)


def test_the_sweep_over_depths_and_its_report(tmp_path: Path, tiny_overrides: list[str], empty_store: Path) -> None:
    """LLaMA-7B, METHOD §4: a layer has 202,383,360 weights of 6,738,415,616; 31 − k of them are on the server."""
    environment = {
        **os.environ,
        "PYTHON": program(),
        "DEPTHS": "0,1",
        "ROUNDS": "1",
        "MODEL": " ".join(
            [
                "backbone.num_layers=3",
                *(item for item in tiny_overrides if "backbone" in item and "num_layers" not in item),
            ]
        ),
        "PLANNED_DEPTHS": "1,14,21,22",
    }
    small = [*(item for item in tiny_overrides if "backbone" not in item), "data.max_users=40"]
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    script = ROOT / "experiments" / "split_depth" / "sweep.sh"
    command = ["sh", str(script), "out", *small, f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    measured, planned = cells(out / "measured.md"), cells(out / "planned.md")
    assert measured["k"].tolist() == ["0", "1"]
    assert "*Measured*: commit " in (out / "measured.md").read_text()
    assert (measured["NDCG@10"] == measured["NDCG@10 unsplit"]).all()
    assert measured["client MB"].astype(float).is_monotonic_increasing
    assert planned["k + m"].tolist() == ["2", "15", "22", "23"]
    assert planned["storage saved, %"].astype(float).tolist() == pytest.approx(
        [100 * (31 - k) * 202_383_360 / 6_738_415_616 for k in (1, 14, 21, 22)], abs=0.01
    )
    assert "storage saved, %: 28 is reached up to k = 21 (k + m = 22), which saves 30.0 %" in done.stdout
    assert "compute saved, %: 48 is reached up to k = 14" in done.stdout
    plans = json.loads((out / "llama_2_7b.json").read_text())
    assert plans[0]["backbone"] == "llama_2_7b"
    assert matplotlib.image.imread(out / "split_depth.png").std() > 0.02


DATA = ("ml_1m", "games", "micro_lens_shaped")
SWEEPS = {
    "main_table": (2, {f"{data}_{family}": 2 for data in DATA for family in ("retrieval", "generative")}),
    "ablation": (2, {"games": 8, "ml_1m": 8}),
    "alpha_beta": (1, {"games": 11}),
    "clients": (1, {**{f"kmeans_{n}": 3 for n in (3, 5, 10, 20)}, "random_5": 3, "per_user": 3}),
    "cross_domain": (
        3,
        {f"{model}_2{part}": runs for model in ("tiny", "minilm") for part, runs in (("", 6), ("_halves", 3))},
    ),
    "markov_bar": (1, {"ml_1m": 1}),
    "few_shot": (1, {"samples_1024": 4, "samples_null": 4}),
    "generative_targets": (1, {f"{s}_{t}": 1 for s in ("vocabulary", "catalogue") for t in ("one", "every")}),
    "poisoning": (0, dict.fromkeys(("none", "label_flip", "sign_flip", "scale", "copy", "not_finite"), 6)),
    "rules": (
        2,
        {"games/fellrec": 3, "games/fedbuff": 3, "ml_1m/fellrec": 1, "ml_1m/fedbuff": 1}
        | {"ml_1m_lora/fellrec": 1, "ml_1m_lora/hetlora": 1},
    ),
}
"""Of each sweep: how many folders of data it takes, and its cells with their runs for one seed."""


def composed(name: str, folders: int, out: Path, tools: Path, **variables: str) -> dict[str, list[DictConfig]]:
    """The configurations of each cell that a sweep would run; of its Python, only what chooses settings is run."""
    words = 'for word in "$@"; do printf "%s\\n" "$word"; done; printf "\\n"'
    python = f'case "$1" in *chosen.py) exec "{sys.executable}" "$@" ;; esac'
    for tool, line in (("say", words), ("choose", python)):
        (tools / tool).write_text(f"#!/bin/sh\n{line}\n")
        (tools / tool).chmod(0o755)
    own = {"FELLREC": str(tools / "say"), "PYTHON": str(tools / "choose"), "SEEDS": "7", "DATA": " ".join(DATA)}
    if name == "rules":  # all of them would take a minute
        own |= {"DATA": "games ml_1m ml_1m_lora", "RULES": "fellrec fedbuff hetlora"}
    if name == "main_table":
        own |= {"RULES": "local,fellrec"}
    if name == "cross_domain":  # a federation takes a second to compose
        own |= {"CLIENTS": "2"}
    own |= variables
    script = ROOT / "experiments" / name / "sweep.sh"
    command = ["sh", str(script), str(out), *["somewhere"] * folders, "trainer.weight_decay=0.5"]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, check=True)
    found = {}
    for text in done.stdout.strip().split("\n\n"):
        verb, *rest = text.split("\n")
        assert verb == "compare"
        runs = [rest[place + 1] for place, word in enumerate(rest) if word == "--run"]
        overrides = [word for place, word in enumerate(rest) if word != "--run" and rest[place - 1] != "--run"]
        configs = configurations(overrides, runs)
        check_comparable(configs)
        assert {config.trainer.weight_decay for config in configs} == {0.5}, "further overrides reach every run"
        assert {config.seed for config in configs} == {7}
        found[str(Path(configs[0].run_dir).relative_to(out))] = configs
    return found


@pytest.mark.parametrize("name", SWEEPS)
def test_what_a_sweep_runs_can_be_composed(name: str, tmp_path: Path) -> None:
    """The runs themselves take an hour; that each of their commands is one is seen without them."""
    folders, expected = SWEEPS[name]
    found = composed(name, folders, tmp_path / "out", tmp_path)
    assert {cell: len(configs) for cell, configs in found.items()} == expected


def spoken(name: str, tmp_path: Path, **variables: str) -> list[list[str]]:
    """The words of each command of a sweep over MovieLens-1M that is not one of comparisons."""
    say = tmp_path / "say"
    say.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done; printf "\\n"\n')
    say.chmod(0o755)
    script = ROOT / "experiments" / name / "sweep.sh"
    command = ["sh", str(script), str(tmp_path / "out"), "somewhere", "trainer.weight_decay=0.5"]
    environment = {**os.environ, "FELLREC": str(say), "PYTHON": "true", **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [text.split("\n") for text in done.stdout.strip().split("\n\n")]


def test_what_the_sweep_over_privacy_runs_can_be_composed_and_attacked(tmp_path: Path) -> None:
    """Every private run is one that is allowed, every run with noise has a cut, and each run is attacked."""
    said = spoken("privacy", tmp_path, EPSILONS="none 8", NOISES="0 3", GRADIENT_NOISES="0.5")
    configs = {Path(c.run_dir).name: c for c in (compose(words) for verb, *words in said if verb == "train")}
    for name, config in configs.items():
        build_rule(config)
        assert config.trainer.weight_decay == 0.5, "further overrides reach every run"
        assert (config.privacy.unit, config.partition.num_clients is None) == (
            ("user", True) if name.endswith("_8") else ("none", name.startswith("epsilon"))
        )
    noises = {name: c.split.hidden_noise for name, c in configs.items() if c.split.transport == "inprocess"}
    assert noises == {"noise_0_0": 0, "noise_0_3": 3, "noise_1_0": 0, "noise_1_3": 3, "gradient_0.5": 0}
    assert configs["gradient_0.5"].split.gradient_noise == 0.5
    assert [Path(words[0]).name for verb, *words in said if verb == "attack"] == list(configs)
    assert len(configs) == 2 + 4 + 4 + 1


def test_what_the_sweep_over_leakage_runs_can_be_composed_and_attacked(tmp_path: Path) -> None:
    said = spoken("leakage", tmp_path, SEEDS="0,1")
    for verb, *words in said:
        if verb == "train":
            config = compose(words)
            build_rule(config)
            assert config.trainer.weight_decay == 0.5, "further overrides reach every run"
        else:
            asked, others = attack._asked(words[1:])
            attack._settings(asked)
            check_names(asked["attack"].split(","))
            assert not others
    runs = [
        f"{cell}-s{seed}" for cell in ("tiny", "tiny_full", "sasrec", "sasrec_sampled", "smollm2") for seed in (0, 1)
    ]
    assert [Path(words[0]).name for verb, *words in said if verb == "attack"] == runs


def test_what_attacks_found_over_seeds(tmp_path: Path) -> None:
    """Mean and deviation by hand; a line of the figure for each attack that has the metric."""
    for seed, share in ((0, 0.2), (1, 0.6)):
        folder = tmp_path / "out" / f"tiny-s{seed}" / "attack"
        folder.mkdir(parents=True)
        (folder.parent / "versions.json").write_text(json.dumps({"git_commit": "1234567", "num_threads": 1}))
        found = [
            {"attack": "inverter", "depth": depth, "users_per_client": None, "metrics": {"token_at_1": share}}
            for depth in (0, 2)
        ]
        found.append({"attack": "update_rows", "depth": None, "users_per_client": 5, "metrics": {"item_recall": share}})
        found.append({"attack": "membership", "depth": None, "users_per_client": None, "metrics": {"member_auc": 0.5}})
        (folder / "attack.json").write_text(json.dumps({"findings": found}))
    code, shown = python([str(ROOT / "experiments" / "leakage" / "report.py"), str(tmp_path / "out")], tmp_path)
    assert code == 0, shown
    for row in (
        "| tiny | 2 | inverter | 0.400 ±0.283 |",  # √((0.2² + 0.2²) / 1)
        "| tiny | 5 | update_rows | 0.400 ±0.283 |",
        "| tiny | membership | 0.500 ±0.000 |",
        "*Measured*: commit 1234567",
    ):
        assert row in shown
    assert matplotlib.image.imread(tmp_path / "out" / "leakage.png").std() > 0.02


def test_the_main_table_compares_seven_rules(tmp_path: Path) -> None:
    """In every cell the same ones, so they are composed for one."""
    rules = "local,fedavg,uniform,fellrec,persistence,updatemixing,centralized"
    script = (ROOT / "experiments" / "main_table" / "sweep.sh").read_text()
    (default,) = re.findall(r"^rules=\$\{RULES:-(.+)\}$", script, re.MULTILINE)
    assert default == rules
    found = composed("main_table", 2, tmp_path / "out", tmp_path, RULES=default, DATA="ml_1m", FAMILIES="retrieval")
    assert {cell: len(configs) for cell, configs in found.items()} == {"ml_1m_retrieval": 7}


def test_the_final_runs_take_what_validation_chose(tmp_path: Path) -> None:
    """What was tried lies there, so it is not run again; then each rule has the settings that were best."""
    chosen = {"local": "local learning_rate=0.004", "fellrec": "fellrec alpha=0.7 learning_rate=0.001"}
    for data in ("ml_1m", "games"):
        folder = tmp_path / "out" / "tuning" / data / "comparison"
        folder.mkdir(parents=True)
        (folder / "comparison.json").write_text(json.dumps({"chosen_on_validation": chosen}))
    found = composed("does_fellrec_help", 2, tmp_path / "out", tmp_path)
    assert list(found) == ["ml_1m", "games"]
    for configs in found.values():
        chosen = [(item.aggregation._target_.split(".")[-1], item.trainer.learning_rate) for item in configs]
        assert chosen == [("Local", 0.004), ("FELLRec", 0.001)]
        assert configs[1].aggregation.alpha == 0.7


def test_the_sweep_of_pretrained_models_takes_the_learning_rate_that_validation_chose(tmp_path: Path) -> None:
    """FELLRec without one half has that of the whole rule."""
    chosen = {"fedavg": "fedavg learning_rate=0.0003", "fellrec": "fellrec learning_rate=0.0001"}
    for model in ("minilm_lora", "smollm2_lora"):
        folder = tmp_path / "out" / "tuning" / f"ml_1m_{model}" / "comparison"
        folder.mkdir(parents=True)
        (folder / "comparison.json").write_text(json.dumps({"chosen_on_validation": chosen}))
    found = composed("real_models", 2, tmp_path / "out", tmp_path, DATA="ml_1m", MODELS="minilm_lora smollm2_lora")
    assert list(found) == [
        f"ml_1m_{model}{part}" for model in ("minilm_lora", "smollm2_lora") for part in ("", "_halves")
    ]
    assert [config.trainer.learning_rate for config in found["ml_1m_minilm_lora"]] == [3e-4, 1e-4]
    for configs in (found["ml_1m_minilm_lora_halves"], found["ml_1m_smollm2_lora_halves"]):
        rules = [config.aggregation for config in configs]
        assert [(rule.heating, rule.attention) for rule in rules] == [(False, True), (True, False)]
        assert {config.trainer.learning_rate for config in configs} == {1e-4}
        assert {(config.adapter.rank, config.adapter.alpha, config.adapter.dropout) for config in configs} == {
            (8, 16, 0.05)
        }


def test_the_report_of_a_sweep(
    tmp_path: Path, lean_overrides: list[str], empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two cells; its figures are those of the comparisons, and a pair's difference is that of the users' values."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, "mlflow.db")
    for cell, steps in (("few", 1), ("more", 3)):
        sweep = ["aggregation=local,fellrec", "seed=0,1", f"trainer.max_local_steps={steps}"]
        main(["compare", *lean_overrides, *sweep, "trainer.num_rounds=1", "references.show=[]", f"run_dir=out/{cell}"])
    script = ROOT / "experiments" / "report.py"
    code, shown = python([str(script), "out", "fellrec-local"], tmp_path)
    assert code == 0, shown
    commit = git_commit()[:7] + ("-dirty" if git_commit().endswith("-dirty") else "")
    line = f"*Measured*: commit {commit}, {torch.get_num_threads()} thread, seeds 0, 1."
    for name in ("report.md", "pairs.md", "few/comparison/significance.md"):
        assert f"|\n\n{line}\n" in Path("out", name).read_text()
    table, pairs = pd.read_csv("out/report.csv"), cells(Path("out/pairs.md"))
    assert table["cell"].tolist() == ["few"] * 2 + ["more"] * 2
    assert pairs["cell"].tolist() == ["few", "more"]
    for cell, shown in zip(("few", "more"), pairs["pooled"], strict=True):
        lines = json.loads(Path(f"out/{cell}/comparison/comparison.json").read_text())["rules"]
        some = table[table["cell"] == cell]
        assert some["mean"].tolist() == [line["mean"]["ndcg_at_10/mean"] for line in lines.values()]
        pooled = dict(zip(some["rule"], some["pooled"], strict=True))
        assert float(shown) == pytest.approx(pooled["fellrec"] - pooled["local"], abs=6e-5)
    assert matplotlib.image.imread("out/report.png").std() > 0.02

    older = Path("out/few/comparison/comparison.json")
    without = {name: value for name, value in json.loads(older.read_text()).items() if name != "measured"}
    older.write_text(json.dumps(without))
    versions = json.loads(Path("out/more/local-s0/versions.json").read_text())
    for run in Path("out/few").glob("*/versions.json"):
        run.write_text(json.dumps({**versions, "num_threads": "9"}))
    assert python([str(script), "out"], tmp_path)[0] == 0
    for each in (
        f"few: commit {commit}, 9 threads, seeds 0, 1",
        f"more: commit {commit}, {torch.get_num_threads()} thread",
    ):
        assert each in Path("out/report.md").read_text(), "cells of a sweep that was continued with another number"
    assert python([str(script), "few"], tmp_path) == (1, "few contains no finished comparison\n")


def test_the_table_of_rules(tmp_path: Path) -> None:
    """Of each cell what validation selects, and its worst share of what local training reaches."""

    def line(rule: str, validation: float, per_client: list[float]) -> dict[str, Any]:
        mean = sum(per_client) / len(per_client)
        figures = {"mean": mean, "coefficient_of_variation": 0.5, "worst": min(per_client)}
        cost = {"round_bytes": 2_500_000.0, "num_rounds": 8}
        run = {"seed": 0, "per_client": {"ndcg_at_10": per_client}, "cost": cost}
        values = {f"ndcg_at_10/{name}": value for name, value in figures.items()}
        return {"kind": "learned", "rule": rule, "validation": validation, "mean": values} | {
            "seconds_per_round": 3.0,
            "runs": [run],
        }

    cells = {
        "local": [line("local learning_rate=0.1", 0.2, [0.1, 0.4]), line("local learning_rate=0.2", 0.1, [0.9, 0.9])],
        "ditto": [line("ditto lam=1", 0.1, [0.8, 0.8]), line("ditto lam=2", 0.3, [0.2, 0.6])],
    }
    for name, lines in cells.items():
        folder = tmp_path / name / "comparison"
        folder.mkdir(parents=True)
        measured = {"fellrec": "1", "git_commit": "1234567", "num_threads": "1", "seeds": [0]}
        found = {"rules": {item["rule"]: item for item in lines}, "measured": measured}
        (folder / "comparison.json").write_text(json.dumps(found))
    code, shown = python([str(ROOT / "experiments" / "rules" / "report.py"), str(tmp_path)], tmp_path)
    assert code == 0, shown
    table = pd.read_csv(tmp_path / "rules.csv")
    assert table["rule"].tolist() == ["ditto", "local"], "the best mean first"
    assert table["settings"].tolist() == ["lam=2", "learning_rate=0.1"]
    assert table["worst_share_of_local"].tolist() == pytest.approx([1.5, 1.0])
    assert "| Ditto | lam=2 | 0.4000 | 0.50 | 0.2000 | 150% | 2.5 | 3.0 |" in shown
    assert "*Measured*: commit 1234567, 1 thread, seed 0." in shown


def test_what_matrices_say_of_domains(tmp_path: Path) -> None:
    """Four clients of two domains, by hand: the means over pairs of the same domain, and over the others."""
    cell = tmp_path / "tiny_2"
    (cell / "comparison").mkdir(parents=True)
    (cell / "fellrec-s0").mkdir()
    figures = {"ndcg_at_10/mean": 0.25, "ndcg_at_10/worst": 0.1, "member/films/ndcg_at_10/mean": 0.3}
    figures["member/clips/ndcg_at_10/mean"] = 0.2
    line = {"mean": figures, "sd": dict.fromkeys(figures, 0.01), "runs": [{"seed": 0}]}
    members = {"films": {"clients": [0, 1], "items": 5}, "clips": {"clients": [2, 3], "items": 7}}
    found = {"rules": {"fellrec": line}, "members": members, "users_per_client": [1, 1, 1, 1]}
    (cell / "comparison" / "comparison.json").write_text(json.dumps(found))
    near, far = 0.8, 0.2
    similarity = np.array([[1, near, far, far], [near, 1, far, far], [far, far, 1, near], [far, far, near, 1]])
    mixing = similarity / similarity.sum(axis=1, keepdims=True)  # rows sum to 2.2
    rounds = {"rounds": np.array([0, 4]), "similarity": np.stack([similarity] * 2), "mixing": np.stack([mixing] * 2)}
    np.savez(cell / "fellrec-s0" / "matrices.npz", **rounds)
    code, shown = python([str(ROOT / "experiments" / "cross_domain" / "report.py"), str(tmp_path)], tmp_path)
    assert code == 0, shown
    assert "| tiny_2 | FELLRec | 0.3000 | 0.2000 | 0.2500 | 0.1000 |" in shown
    for number in (1, 5):
        assert f"| tiny_2 | FELLRec | {number} | 0.800 | 0.200 | 0.455 | 0.364 | 0.091 |" in shown


def test_the_benchmark_of_the_cut(tmp_path: Path, tiny_overrides: list[str]) -> None:
    script = ROOT / "benchmarks" / "split_throughput.py"
    options = ["--rounds", "2", "--repeats", "1", "--parts", "inprocess,packing"]
    small = [*tiny_overrides, "backbone.num_layers=4", "data.max_users=40"]
    code, shown = python([str(script), *options, *small], tmp_path)
    assert code == 0, shown
    for text in ("| processes | s/round |", "| float32 |", "| int8 |"):
        assert text in shown
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"
