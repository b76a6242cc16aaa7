"""Wrong overrides and changed stored configurations: each is accepted or refused by one message, nothing is trained."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml
from fuzz.mutations import inputs
from fuzz.outcomes import Outcomes

from fellrec.config.compose import compose
from fellrec.config.overrides import parse, text_settings
from fellrec.config.stored import read_config, to_yaml
from fellrec.config.sweep import expand
from fellrec.experiment.classes import check_classes
from fellrec.functional.nested import flatten

MOST_LETTERS = 1500
"""A message that lists choices has some hundred letters."""
HYDRAS = ("Exception", "mismatched input", "no viable")
"""Words of Hydra's own messages."""

VALUES = (
    *(
        "",
        "null",
        "true",
        "0",
        "-1",
        "0.5",
        "1e400",
        "nan",
        "99999999999999999999",
        "x",
        "[]",
        "[10,10]",
        "[[1]]",
        "{}",
    ),
    *(
        "{a: 1}",
        "1,2",
        "range(1,3)",
        "${seed}",
        "${oc.env:NOT_THERE}",
        "${nothing}",
        "${",
        "'a",
        "a=b",
        "a (b)",
        "\n",
        "~",
    ),
)
KEYS = (
    *("seed", "run_dir", "data.root", "data.name", "data.core", "trainer.num_rounds", "trainer.cutoffs"),
    *("trainer.plugins", "trainer.devices", "partition.num_clients", "aggregation.alpha", "references.show"),
    *("tracking.experiment", "launcher.options", "exchange.transforms", "callbacks.progress", "holdout._target_"),
)
WRONG = (
    *("", "=", "a", "=3", "~", "~data", "~data.reader", "~callbacks", "~x", "~seed", "+x=1", "++a.b=1", "x=1", "-m"),
    *("trainer.num_rounds 3", "trainer.num_rounds:3", "trainer/num_rounds=3", "--trainer.num_rounds=3", "seed:=3"),
    *("trainer[num_rounds]=3", "a..b=1", ".seed=1", "seed.=1", "seed.x=1", "trainer.num_rounds.x=1", "${x}=1", "@=1"),
    *("trainer=null", "trainer=5", "trainer={a: 1}", "trainer={num_rounds: 0}", "data=null", "data=[a]", "data=a/b"),
    *("data=../data/ml_1m", "data@x=synthetic", "+data=ml_1m", "aggregation=[fedavg]", "aggregation=fedavg,local"),
    *("experiment=null", "experiment=x", "hydra/launcher=x", "hydra.searchpath=[file:///nope]", "hydra.searchpath=5"),
    *("hydra.job.chdir=true", "hydra=x", "+hydra.x=1", "data.reader=5", "data.reader=null", "data.reader={}"),
    *("callbacks=null", "callbacks.progress={}", "+callbacks.x=5", "+callbacks.x={}", "+callbacks.x._target_=5"),
    *("+callbacks.x._target_=os.system", "holdout._target_=os.system", "partition._target_=subprocess.Popen"),
    *("ranker._target_=fellrec.state.files.os.system", "ranker._target_=fellrec.__main__.main", "adapter._target_=a b"),
    *("objective._target_=..", "objective._target_=fellrec", "exchange.transforms=[{_target_: os.system}]"),
    *("exchange.transforms=[5]", "trainer.plugins=[x]", "trainer.plugins=[{_target_: builtins.exec}]", "resume=", "resume=x"),
    *("data.name=a/b", "data.name=..", "data.name='a\nb'", "run_dir='a\nb'", "cache_dir=", "backbone.name=5"),
    *("trainer.metric=5", "trainer.timeout_seconds=inf", "seed=1.0", "seed='1'", "seed=0x10", "seed=3,", "seed=(", "seed=\\"),
)  # fmt: skip


def changed(text: str, draw: random.Random) -> str:
    """A text with some letters removed, doubled, replaced or inserted."""
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(text) + 1)
        piece = draw.choice(("", text[at : at + 1] * 2, draw.choice("=.,:/@+~[]{}()'\"\\$ \t\n\0é"), "${", "=="))
        text = text[:at] + piece + text[at + draw.randint(0, 1) :]
    return text


def test_wrong_overrides_get_one_message() -> None:
    with Outcomes("overrides, composed", seconds=20, letters=MOST_LETTERS, foreign=HYDRAS) as outcomes:
        for text in WRONG:
            outcomes.of(lambda text=text: check_classes(compose([text])), text)
        for draw in inputs(20):
            text = f"{draw.choice(KEYS)}={draw.choice(VALUES)}"
            outcomes.of(lambda text=text: check_classes(compose([text])), text)


def test_texts_that_are_no_overrides_get_one_message() -> None:
    """Read and expanded only, which is where Hydra's grammar is."""
    keys = [*KEYS, *sorted(text_settings())]
    with Outcomes("overrides, read", letters=MOST_LETTERS, foreign=HYDRAS) as outcomes:
        for draw in inputs(1000):
            text = changed(f"{draw.choice(keys)}={draw.choice(VALUES)}", draw)
            outcomes.of(lambda text=text: parse(expand([text])[0]), text)


def test_what_is_read_as_text_is_what_was_written() -> None:
    """Every value that is not quoted, a sweep or an interpolation is taken as it stands, and a second time too."""
    with Outcomes("overrides, as text") as outcomes:
        for draw in inputs(500):
            value = changed("runs/büro (1)=[x]", draw)
            if "$" in value or "," in value or "'" in value or '"' in value or "\\" in value or value != value.strip():
                continue
            outcomes.of(lambda value=value: _check_as_text(value), value)


def _check_as_text(value: str) -> None:
    (item,) = parse([f"run_dir={value}"])
    assert str(item.value()) == value
    assert str(parse([str(item.input_line)])[0].value()) == value


def test_changed_configurations_of_runs_get_one_message(tmp_path: Path) -> None:
    text = to_yaml(compose([]))
    keys = sorted(flatten(yaml.safe_load(text)))
    with Outcomes("configurations of runs", seconds=20, letters=MOST_LETTERS, foreign=HYDRAS) as outcomes:
        for draw in inputs(100):
            new = changed(text, draw) if draw.random() < 0.4 else _with_another_value(text, keys, draw)
            (tmp_path / "config.yaml").write_text(new)
            outcomes.of(lambda: check_classes(read_config(tmp_path)), new)


def _with_another_value(text: str, keys: list[str], draw: random.Random) -> str:
    """Another value, or none, for one setting, or a key less."""
    values: tuple[Any, ...] = (None, -1, 0.5, "x", [], {}, {"_target_": "os.system"}, True, "${seed}", 10**30, [None])
    config = yaml.safe_load(text)
    *parents, last = draw.choice(keys).split(".")
    node = config
    for name in parents[: draw.randint(0, len(parents))]:
        if not isinstance(node[name], dict):
            break
        node = node[name]
    key = last if last in node else draw.choice(sorted(node))
    if draw.random() < 0.2:
        del node[key]
    else:
        node[key] = draw.choice(values)
    return str(yaml.safe_dump(config))
