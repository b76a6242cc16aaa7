"""Configuration and command line: every choice composes, every mistake gets one clear line."""

from __future__ import annotations

import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fellrec.cli.main import VERBS, main
from fellrec.config.compose import compose
from fellrec.config.paths import conf_dir, group_choices
from fellrec.config.sweep import expand, sweeps
from fellrec.errors import ConfigError
from fellrec.functional.nested import flatten

NEEDS = {
    ("data", "ml_1m"): ["data.root=x"],
    ("data", "ml_100k"): ["data.root=x"],
    ("data", "ml_csv"): ["data.root=x"],
    ("data", "games"): ["data.root=x"],
    ("data", "toys"): ["data.root=x"],
    ("data", "federation"): ["data.members=[games,toys]", "data.member.games.root=x", "data.member.toys.root=x"],
    **{("data", f"ml_{size}m"): ["data.root=x"] for size in (20, 25, 32)},
    **{("data", f"amazon_{year}"): ["data.root=x"] for year in (2018, 2023)},
    ("data", "table"): ["data.path=x.csv"],
    ("data", "atomic"): ["data.root=x"],
    ("data", "ml_10m"): ["data.root=x"],
    ("data", "micro_lens"): ["data.root=x"],
    ("backbone", "hf"): ["backbone.path=x"],
    ("backbone", "smollm2"): ["backbone.path=x"],  # the package may be absent
    ("backbone", "minilm"): ["backbone.path=x"],
    ("participation", "trace"): ["participation.sampler.path=x"],
    ("partition", "attribute"): ["partition.column=x"],
    ("ranker", "likelihood"): ["objective=generative"],
    ("ranker", "grounding"): ["objective=generative"],
    ("ranker", "constrained"): ["objective=generative"],
    ("experiment", "demo_llm"): ["backbone.path=x"],
    ("experiment", "ml_1m_small"): ["data.root=x"],
}
CHOICES = [(group, choice) for group, choices in group_choices().items() for choice in choices]


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_names_classes_that_exist(group: str, choice: str) -> None:
    from hydra.utils import get_object

    config = compose([f"{group}={choice}", *NEEDS.get((group, choice), [])])
    targets = [value for key, value in flatten(OmegaConf.to_container(config)).items() if key.endswith("_target_")]
    assert len(targets) >= 6
    for target in targets:
        assert callable(get_object(target))


def test_every_yaml_file_is_a_choice() -> None:
    files = {path for path in conf_dir().rglob("*.yaml") if path.name != "config.yaml"}
    hidden = {path for path in files if path.stem.startswith(("_", "for_"))}
    assert len(files - hidden) == len(CHOICES)


def test_the_backbone_decides_the_adapter_and_the_objective_the_ranker() -> None:
    assert compose([]).adapter["_target_"].endswith("FullAdapter")
    assert compose(["backbone=hf", "backbone.path=x"]).adapter["_target_"].endswith("LoraAdapter")
    assert compose(["adapter=lora"]).adapter.rank == 8
    assert compose([]).ranker["_target_"].endswith("SimilarityRanker")
    assert compose(["objective=generative"]).ranker["_target_"].endswith("GroundingRanker")


@pytest.mark.parametrize(
    ("data", "template"),
    [
        ("ml_1m", "movie-1"),
        ("ml_100k", "movie-1"),
        ("ml_csv", "movie-1"),
        ("synthetic", "movie-1"),
        ("games", "game-1"),
        ("toys", "product-1"),
        ("atomic", "product-1"),
        ("micro_lens", "video-1"),
        ("micro_lens_shaped", "video-1"),
    ],
)
def test_the_data_decides_the_prompt_unless_it_is_given(data: str, template: str) -> None:
    overrides = [f"data={data}", "data.root=x", "objective=generative"]
    assert compose(overrides).objective.template == template
    assert compose([*overrides, "data.domain=video"]).objective.template == "video-1"
    assert compose([*overrides, "objective.template=product-1"]).objective.template == "product-1"


SCRIPTS = [
    "seed=3",
    "run_dir=x",
    "trainer.num_rounds=3",
    "trainer.local_epochs=2",
    "trainer.batch_size=8",
    "data.max_train_samples=100",
    "data.max_users=50",
    "partition.num_clients=4",
]
"""Settings that scripts can rely on, with values."""


@pytest.mark.parametrize("rule", ["fellrec", "fedavg", "local", "uniform", "centralized"])
def test_the_keys_that_scripts_rely_on(rule: str) -> None:
    config = compose([f"aggregation={rule}", *SCRIPTS])
    given = [override.partition("=") for override in SCRIPTS]
    assert {key: str(OmegaConf.select(config, key)) for key, _, _ in given} == {key: value for key, _, value in given}


@pytest.mark.parametrize("override", ["aggregation.alpha=0.3", "aggregation.beta=2", "aggregation.temperature=0.1"])
def test_the_settings_of_fellrec_that_scripts_rely_on(override: str) -> None:
    key, _, value = override.partition("=")
    assert str(OmegaConf.select(compose(["aggregation=fellrec", override]), key)) == value


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["aggregation=fedavgg"], "unknown aggregation 'fedavgg'; choose from: fedavg, "),
        (["data=ml_1mm"], "unknown data 'ml_1mm'; choose from: ml_1m, "),
        (["trainer.num_round=3"], "unknown setting 'trainer.num_round'; choose from: trainer.num_rounds, "),
        (["trainr.num_rounds=3"], "unknown setting 'trainr.num_rounds'; choose from: trainer.num_rounds"),
        (["aggregation.alfa=3"], "unknown setting 'aggregation.alfa'; choose from: aggregation.alpha"),
        (["trainer.metric=ndgc_at_10"], "unknown trainer.metric 'ndgc_at_10'; choose from: ndcg_at_10, "),
        (["trainer.num_rounds=0"], "trainer.num_rounds=0 is not allowed: a whole number of at least 1"),
        (["trainer.num_rounds=abc"], "trainer.num_rounds=abc is not allowed: a whole number of at least 1"),
        (["trainer.learning_rate=-1"], "trainer.learning_rate=-1 is not allowed: a number above 0"),
        (["trainer.learning_rate=nan"], "trainer.learning_rate=nan is not allowed"),
        (["participation.rate=0"], "participation.rate=0 is not allowed: a number in (0, 1]"),
        (["data.public_user_rate=1"], "data.public_user_rate=1 is not allowed: a number in [0, 1)"),
        (["trainer.cutoffs=[]"], "trainer.cutoffs=[] is not allowed"),
        (["trainer.devices=0"], "trainer.devices=0 is not allowed: a whole number of at least 1, or auto"),
        (
            ["references.show=[popularty]"],
            "references.show=['popularty'] is not allowed: a list, each once, of random, ",
        ),
        (["references.show=[mf,mf]"], "references.show=['mf', 'mf'] is not allowed: a list, each once, of random, "),
        (["references.shrink=-1"], "references.shrink=-1 is not allowed: a number of at least 0"),
        (["+trainer.num_round=3"], "unknown setting 'trainer.num_round'; choose from: trainer.num_rounds, "),
        (["+sed=3"], "unknown setting 'sed'; choose from: seed, "),
        (["aggregation=fedavg", "aggregation.alpha=0.3"], "unknown setting 'aggregation.alpha'; choose from: "),
        (["aggregation.alpha=-1"], "aggregation.alpha=-1 is not allowed: a number of at least 0"),
        (["backbone.pretrain.steps=0"], "backbone.pretrain.steps=0 is not allowed: a whole number of at least 1"),
        (["adapter.layers=feet"], "adapter.layers=feet is not allowed: head, body or tail, or several of them joined"),
        (["data.reader.num_items=7"], "data.reader.num_items=7 is not allowed: a whole number of at least 20, or null"),
        (["data=ml_1m"], "data.root needs a value: give data.root="),
        (["~trainer.num_rounds"], "trainer.num_rounds needs a value: give trainer.num_rounds="),
        (["backbone.name=tny"], "unknown backbone.name 'tny'; choose from: tiny, "),
        (["aggregation=null"], "unknown aggregation 'null'; choose from: "),
        (["backbone=hf"], "backbone.path needs a value: give backbone.path="),
        (["a=b=[c"], "cannot"),
    ],
)
def test_mistakes_name_the_key_the_value_and_what_is_allowed(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    assert message in str(caught.value)


def test_all_problems_are_named_at_once() -> None:
    wrong = ["seed=-1", "trainer.num_rounds=0", "trainer.metric=x", "split.head_layers=-1", "aggregation.beta=0"]
    wrong += ["data=ml_1m", "data.core=-1", "launcher.nodes=0", "objective.temperature=0"]
    with pytest.raises(ConfigError) as caught:
        compose(wrong)
    lines = str(caught.value).splitlines()
    keys = sorted(item.partition("=")[0] for item in wrong if item != "data=ml_1m")
    named = sorted(key for key in keys if any(key in line for line in lines))
    assert (named, len(lines)) == (keys, len(keys) + 1), "and that data.root has no value"


def test_sweeps_expand_to_every_combination() -> None:
    combinations = expand(["aggregation=fedavg,fellrec", "seed=0,1", "trainer.cutoffs=[5,10]"])
    assert combinations == [
        [f"aggregation={rule}", f"seed={seed}", "trainer.cutoffs=[5,10]"]
        for rule in ("fedavg", "fellrec")
        for seed in (0, 1)
    ]


@pytest.mark.parametrize(
    ("overrides", "runs"),
    [
        (
            ["aggregation=fedavg,fellrec", "aggregation.alpha=0.3,0.7"],
            [
                ["aggregation=fedavg"],
                ["aggregation=fellrec", "aggregation.alpha=0.3"],
                ["aggregation=fellrec", "aggregation.alpha=0.7"],
            ],
        ),
        (
            ["aggregation=local,updatemixing,fellrec", "aggregation.attention=false", "aggregation.own_share=0.5"],
            [
                ["aggregation=local"],
                ["aggregation=updatemixing", "aggregation.attention=false", "aggregation.own_share=0.5"],
                ["aggregation=fellrec", "aggregation.attention=false"],
            ],
        ),
        (
            ["aggregation=fellrec", "aggregation.alpha=0.3,0.7"],
            [["aggregation=fellrec", f"aggregation.alpha={alpha}"] for alpha in (0.3, 0.7)],
        ),
        (["aggregation=fedavg", "aggregation.alpha=0.3"], [["aggregation=fedavg", "aggregation.alpha=0.3"]]),
    ],
)
def test_a_setting_of_rules_is_for_those_of_the_sweep_that_have_it(overrides: list[str], runs: list[list[str]]) -> None:
    """Where one rule is named, nothing is left out, so that composing refuses what it does not have."""
    assert expand(overrides) == runs


def test_a_sweep_that_every_rule_has_all_settings_of_stays_one_sweep() -> None:
    sweep = ["aggregation=updatemixing,fellrec", "aggregation.attention=true,false", "seed=0,1"]
    assert sweeps(sweep) == [sweep]


def test_what_all_runs_share_is_for_those_that_have_it_and_a_runs_own_is_its_own() -> None:
    runs = [["aggregation=fedavg"], ["aggregation=fellrec", "aggregation.beta=2"]]
    assert expand(["seed=0", "aggregation.alpha=0.3"], runs) == [
        ["seed=0", "aggregation=fedavg"],
        ["seed=0", "aggregation.alpha=0.3", "aggregation=fellrec", "aggregation.beta=2"],
    ]
    own = [["aggregation=fedavg", "aggregation.alpha=0.3"], ["aggregation=fellrec"]]
    assert expand([], own) == own, "composing refuses the first"


def test_a_setting_that_no_rule_of_a_sweep_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'aggregation.alpah'; choose from: aggregation.alpha, "):
        expand(["aggregation=fedavg,fellrec", "aggregation.alpah=0.3"])


def test_a_rule_of_ones_own_in_a_sweep_has_the_arguments_of_its_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rules.py").write_text(
        "from fellrec.aggregation import FedAvg\n"
        "class MedianOfFriends(FedAvg):\n    def __init__(self, friends: int):\n        self.friends = friends\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mine = "aggregation._target_=my_rules.MedianOfFriends"
    assert expand(["+aggregation.friends=3,5"], [[mine], ["aggregation=fedavg"]]) == [
        ["+aggregation.friends=3", mine],
        ["+aggregation.friends=5", mine],
        ["aggregation=fedavg"],
    ]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([verb, "--help"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    assert f"fellrec {verb}" in shown
    assert "examples:" in shown


def test_help_starts_at_once() -> None:
    """The help text of every verb needs no heavy import."""
    code = "import sys; import fellrec.cli.main; fellrec.cli.main.command_parser(); print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for module in ("torch", "hydra", "mlflow", "transformers", "pandas"):
        assert f"'{module}'" not in loaded


@pytest.mark.parametrize("group", ["aggregation", "ranker"], ids=["more than a buffer", "less than a buffer"])
def test_a_reader_that_leaves_ends_a_command_without_a_traceback(group: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "fellrec", "list", group]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def refused_without_heavy_imports(*commands: str) -> str:
    """What is printed by commands that end with status 1 before PyTorch is imported."""
    code = f"""
import sys
from fellrec.cli.main import main
for words in {commands}:
    try:
        main(words.split())
    except SystemExit as stop:
        assert stop.code == 1, words
    heavy = {{"torch", "lightning", "transformers", "mlflow", "pandas"}} & sys.modules.keys()
    assert not heavy, (words, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_mistakes_are_found_without_heavy_imports() -> None:
    """A wrong choice is refused by every verb that takes settings before PyTorch is imported."""
    verbs = ("train", "compare", "plan", "submit", "prepare", "check-rule fedavg")
    said = refused_without_heavy_imports(*(f"{verb} backbone=tinny" for verb in verbs))
    assert said.count("unknown backbone 'tinny'") == 6


def test_a_wrong_directory_is_refused_without_heavy_imports() -> None:
    """By every verb that computes with a finished run."""
    said = refused_without_heavy_imports(
        "evaluate nowhere", "recommend nowhere --client 0 --history Heat", "attack nowhere"
    )
    assert said.count("nowhere has no config.yaml; give the directory of a run") == 3


def test_without_a_verb_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([])
    assert not done.value.code
    shown = capsys.readouterr()
    assert all(verb in shown.out for verb in VERBS)
    assert not shown.err


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert not done.value.code
    assert capsys.readouterr().out.startswith("fellrec ")


@pytest.mark.parametrize(("verb", "hint"), [("trian", "did you mean train?"), ("xyzzy", "choose from: prepare, train")])
def test_a_wrong_verb_is_told_the_nearest(verb: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([verb])
    assert f"unknown verb '{verb}'; {hint}" in capsys.readouterr().err


def test_bash_completes_verbs_options_and_groups() -> None:
    """In a real shell, by the function that the script defines."""
    words = {"fellrec tra": "train", "fellrec train --show": "--show-config", "fellrec train aggr": "aggregation="}
    script = 'eval "$("$@")"; shift $#\n' + "\n".join(
        f"COMP_WORDS=({line}); COMP_CWORD={line.count(' ')}; COMPREPLY=(); _shtab_fellrec; echo ${{COMPREPLY[0]}}"
        for line in words
    )
    command = [sys.executable, "-m", "fellrec", "completion", "bash"]
    done = subprocess.run(["bash", "-c", script, "bash", *command], capture_output=True, text=True, check=False)
    assert done.stdout.split() == list(words.values()), done.stderr


def test_bash_adds_no_space_after_a_group(tmp_path: Path) -> None:
    """Typed into an interactive shell: the choice follows the completed group; a verb is followed by a space."""
    (tmp_path / "rc").write_text(
        f"""eval "$({shlex.quote(sys.executable)} -m fellrec completion bash)"\nfellrec() {{ printf '<%s>' "$@"; exit; }}\n"""
    )
    ours, theirs = pty.openpty()
    command = ["bash", "--noprofile", "--rcfile", str(tmp_path / "rc"), "-i"]
    shell = subprocess.Popen(
        command, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, text=True, start_new_session=True
    )
    os.write(ours, b"fellrec tra\taggr\tfedavg\n")
    try:
        shown, _ = shell.communicate(timeout=120)
    finally:
        shell.kill()
        os.close(ours)
        os.close(theirs)
    assert shown == "<train><aggregation=fedavg>"


def test_a_rule_of_ones_own_is_named_beside_those_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_named_rules.py").write_text(
        "from fellrec.aggregation import FedAvg\n"
        "class Median(FedAvg):\n    def __init__(self, friends: int = 2):\n        self.friends = friends\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mine = "aggregation._target_=my_named_rules.Median"
    assert expand(["aggregation=fedavg,my_named_rules.Median,local", "seed=0,1"]) == [
        [rule, seed] for rule in ("aggregation=fedavg", mine, "aggregation=local") for seed in ("seed=0", "seed=1")
    ]
    assert expand(["+aggregation.friends=3"], [["aggregation=my_named_rules.Median,fedavg"]]) == [
        ["+aggregation.friends=3", mine],
        ["aggregation=fedavg"],
    ], "a setting is for the rules that have it"
    config = compose(["aggregation=my_named_rules.Median", "+aggregation.friends=3"])
    assert OmegaConf.to_container(config.aggregation) == {"_target_": "my_named_rules.Median", "friends": 3}
    with pytest.raises(ConfigError, match="unknown aggregation 'fedavgg'"):
        compose(["aggregation=fedavgg"])


@pytest.mark.parametrize("arguments", [["trian"], ["train", "--frmat", "json"], ["evaluate"]])
def test_wrong_words_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2
    assert "usage: fellrec" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["partition.num_clients=99999"], "partition.num_clients=99999 must be at most the number of users"),
        (["trainer.cutoffs=[5,10,100]"], "invalid cutoff 100; allowed are integers from 1 to 60"),
        (["split.head_layers=9"], "split.head_layers=9 and split.tail_layers=1 do not fit"),
        (
            ["adapter=lora", "adapter.target_modules=[q_prj]"],
            "'q_prj' matches no module of the backbone; it has q_proj",
        ),
        (["aggregation=fellrec", "aggregation.alpha=-1"], "alpha"),
        (["aggregation._target_=my.Rule"], "aggregation._target_=my.Rule cannot be imported"),
        (["objective._target_=fellrec.nothing"], "objective._target_=fellrec.nothing cannot be imported"),
        (["tracking.uri=http://127.0.0.1:9"], "tracking.uri=http://127.0.0.1:9 cannot be used"),
        (["data.reader.num_items=7"], "data.reader.num_items=7 is not allowed: a whole number of at least 20, or null"),
    ],
)
def test_bad_input_gets_one_message_and_leaves_nothing(
    overrides: list[str],
    message: str,
    tiny_overrides: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        main(["train", *tiny_overrides, *overrides])
    shown = capsys.readouterr()
    assert done.value.code == 1
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["split.head_layers=9"], "do not fit"),
        (["objective=generative", "objective.softmax=catalogue"], "choose ranker=constrained"),
        (
            ["objective=generative", "ranker=constrained", "ranker.num_beams=0"],
            "ranker.num_beams=0 is not allowed: a whole number of at least 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_a_backbone_is_pretrained(
    overrides: list[str], message: str, tiny_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["train", *tiny_overrides, *overrides, f"cache_dir={tmp_path}", f"run_dir={tmp_path / 'run'}"])
    shown = capsys.readouterr().err
    assert message in shown
    assert "pre-training" not in shown
    assert not list(tmp_path.glob("backbones/*"))


def test_a_missing_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["prepare", "data=ml_1m", "data.root=nowhere", f"cache_dir={tmp_path}"])
    assert done.value.code == 1
    assert "data.root=" in (shown := capsys.readouterr().err)
    assert "nowhere is not a directory" in shown
