"""Values of settings that are of another type, too large or not on one line, and all that is wrong at once."""

from __future__ import annotations

import dataclasses
import re
import resource
from collections.abc import Mapping
from typing import Any, get_type_hints

import pytest
from pandas import DataFrame

from fellrec.cli.main import main
from fellrec.config.compose import compose
from fellrec.config.registry import CHOICES, GROUPS
from fellrec.config.sweep import expand
from fellrec.data.schema import Catalogue
from fellrec.data.table_settings import ColumnSettings
from fellrec.errors import BackboneError, ConfigError
from fellrec.experiment.classes import check_classes
from fellrec.experiment.fabric import build_fabric
from fellrec.functional.participation import cohort
from fellrec.functional.ranges import LARGEST, out_of_range, ranges
from fellrec.models.sasrec import build_sasrec
from fellrec.models.settings import PretrainSettings, SasrecSettings, TinySettings
from fellrec.models.tiny import build_tiny

KINDS = [
    ("", GROUPS[""]),
    *GROUPS.items(),
    *((key, kind) for key, kinds in CHOICES.items() for kind in kinds.values()),
    ("backbone.pretrain", PretrainSettings),
    ("data.columns", ColumnSettings),
]
FREE = {
    ("data", "expected"),
    ("data.reader", "columns"),
    ("launcher", "options"),
    ("launcher", "environment"),
    ("backbone", "pretrain"),
}
"""Settings that are mappings."""


def problems(*overrides: str) -> list[str]:
    """The lines of the refusal of a configuration; none if it is accepted."""
    try:
        check_classes(compose(list(overrides)))
    except ConfigError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize(
    ("group", "kind"), KINDS, ids=lambda value: value if isinstance(value, str) else value.__name__
)
def test_no_setting_takes_any_value(group: str, kind: type) -> None:
    """A mapping, a list of lists and an object are what no setting is; a whole number of 31 digits is none either."""
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        if (group, field.name) in FREE:
            continue
        assert field.name in ranges(kind), f"{group}.{field.name}: {hints[field.name]}"
        wrong: list[Any] = [{"a": 1}, object(), [[["x"]]], {}]
        if field.name == "plugins" or field.name == "transforms":
            wrong = [{"a": 1}, object(), "x", 5]
        for value in wrong:
            assert out_of_range(kind, {field.name: value}, group), f"{group}.{field.name}={value}"


@pytest.mark.parametrize(
    "key",
    [
        "trainer.num_rounds",
        "data.core",
        "data.max_history",
        "holdout.min_length",
        "trainer.batch_size",
        "partition.num_factors",
    ],
)
def test_whole_numbers_have_an_end(key: str) -> None:
    (line,) = problems(f"{key}={10**30}")
    assert line.startswith(f"{key}={10**30} is not allowed: a whole number of at least ")
    assert line.endswith(f"; at most {LARGEST}")


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("backbone.hidden_size=1000000000", "a whole number from 1 to 65536"),
        ("backbone.vocab_size=1000000000", "a whole number from 259 to 1048576"),
        ("backbone.max_position_embeddings=1000000000", "a whole number from 1 to 1048576"),
        ("data.reader.num_users=1000000000", "a whole number from 1 to 10000000"),
        ("data.reader.num_groups=1000000000", "a whole number from 1 to 10000"),
        ("data.seed=-1", "a whole number from 0 to 4294967295"),
        ("backbone.seed=4294967296", "a whole number from 0 to 4294967295"),
        ("objective.item_fields=[]", "a list of different names, such as [title,genre]"),
        ("objective.item_fields=[title,title]", "a list of different names"),
        ("objective.history_fields=[1]", "a list of different names"),
        ("data.core='a\nb'", "a whole number of at least 0"),
        ("trainer.num_rounds='3'", "a whole number of at least 1"),
        ("trainer.num_rounds=null", "a whole number of at least 1"),
        ("callbacks.matrices.heat_maps=[-1]", "a list of rounds, from 0"),
        ("callbacks.diagnostics.every=0", "a whole number of at least 1"),
    ],
)  # fmt: skip
def test_a_value_is_named_with_what_is_allowed_on_one_line(override: str, allowed: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (line,) = problems(override)
    key, _, value = override.partition("=")
    assert line.startswith(f"{key}=")
    assert f" is not allowed: {allowed}" in line
    if value in ("'3'", "null"):
        assert line.startswith(f"{override} is")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "nothing of that size is made"


def test_a_reader_without_a_folder_is_one_line() -> None:
    assert problems("data=atomic", "data.root=null") == [
        "data.reader.root=null is not allowed: the directory of the files, given as data.root"
    ]
    assert problems("data=atomic") == ["data.root needs a value: give data.root=…"]


def test_a_mistyped_key_hides_no_other_problem() -> None:
    wrong = [
        "trainer.num_round=3",
        "data.cor=1",
        "trainer.num_rounds 3",
        "trainer.batch_size=0",
        "partition.num_clients=-2",
    ]
    starts = [
        "cannot read the override 'trainer.num_rounds 3'",
        "unknown setting 'trainer.num_round'; choose from: trainer.num_rounds",
        "unknown setting 'data.cor'; choose from: data.core",
        "partition.num_clients=-2 is not allowed",
        "trainer.batch_size=0 is not allowed",
    ]
    found = problems(*wrong)
    assert len(found) == len(starts)
    assert all(any(line.startswith(start) for line in found) for start in starts), found


def test_a_mistyped_choice_is_said_alone_because_the_others_depend_on_it() -> None:
    """With the default choice in its place, right settings of the one that is meant would be called unknown."""
    (line,) = problems("adapter=lorra", "adapter.rank=4", "data=atomic", "data.root=x", "trainer.batch_size=3")
    assert line.startswith("unknown adapter 'lorra'; choose from: lora")


def test_a_class_of_ones_own_is_given_what_its_annotations_say(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "annotated_rule.py").write_text(
        "from typing import TYPE_CHECKING\n"
        "from fellrec.federated.callback import FederatedCallback\n"
        "if TYPE_CHECKING:\n    from nowhere import Unknown\n\n"
        "class Mine(FederatedCallback):\n"
        "    def __init__(self, threshold: 'float' = 1.0, other: 'Unknown' = None, name: str = 'x'):\n        pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    given = "+callbacks.mine._target_=annotated_rule.Mine"
    assert problems(given, "+callbacks.mine.threshold=2", "+callbacks.mine.other=[1]") == []
    assert problems(given, "+callbacks.mine.threshold=high", "+callbacks.mine.name=[1]") == [
        "callbacks.mine.threshold=high is not allowed: a number",
        "callbacks.mine.name=[1] is not allowed: text",
    ]


def test_item_fields_that_the_data_do_not_have_are_refused() -> None:
    """Only genre is skipped: the default has it, and many data sets do not."""
    catalogue = Catalogue(("a", "b"), ("Heat", "Up"), DataFrame({"brand": ["X", None]}))
    assert catalogue.texts(["title", "genre"]) == ["Heat", "Up"]
    assert catalogue.texts(["brand", "title"]) == ["X Heat", "Up"]
    for fields in (["title", "brnd"], ["genre"], ["category"]):
        with pytest.raises(ConfigError, match=f"unknown item field '{fields[-1]}'; choose from: "):
            catalogue.texts(fields)


def test_a_lack_of_memory_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from fellrec.cli import prepare

    errors: Mapping[str, Exception] = {
        "out of memory": RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
        "out of memory: use": MemoryError("Unable to allocate 9 PiB"),
        "out of GPU memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    }
    for start, error in errors.items():

        def fail(options: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(prepare, "run", fail)
        with pytest.raises(SystemExit) as stop:
            main(["prepare"])
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 1
        assert line.startswith(f"fellrec prepare: {start}")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["seed=range(0,0)"], "seed=range(0,0) gives no value, so the sweep has no run"),
        (["seed=range(0,1000000000)"], "gives more than 10,000 values, which is the limit of a sweep"),
        (["seed=range(0,1000)", "data.seed=range(0,1000)"], "the sweep has 1,000,000 runs; at most 10,000 are allowed"),
    ],
)
def test_a_sweep_has_runs_but_not_without_end(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expand(given)
    assert message in str(caught.value)


def test_processes_that_the_cores_of_a_node_cannot_run_are_not_started() -> None:
    """A thousand would fill the memory of any machine before the first one trains."""
    with pytest.raises(ConfigError, match=r"trainer.devices=1000 is not allowed on the CPU: at most \d+ processes"):
        build_fabric(compose(["trainer.devices=1000", "trainer.accelerator=cpu"]))
    assert build_fabric(compose(["trainer.devices=4", "trainer.accelerator=cpu"])).world_size == 4


@pytest.mark.parametrize("backbone", ["tiny", "sasrec"])
def test_a_model_that_does_not_fit_into_the_memory_is_not_built(backbone: str) -> None:
    """Weights, gradients and two moments in 4 bytes: a layer has 16 D² (Llama) or 6 D² (SASRec) and more."""
    sizes = TinySettings(hidden_size=65_536) if backbone == "tiny" else SasrecSettings(hidden_size=65_536)
    with pytest.raises(BackboneError) as caught:
        build_tiny(["a"], sizes) if isinstance(sizes, TinySettings) else build_sasrec(["a"], sizes)
    found = re.search(
        r"hidden_size=65536, backbone.num_layers=(\d): training the model needs ([\d,]+) GB", str(caught.value)
    )
    assert found
    least = 4 * 4 * int(found[1]) * (8 if backbone == "tiny" else 6) * 65_536**2 / 1e9
    assert least <= float(found[2].replace(",", "")) <= 3 * least


@pytest.mark.parametrize("rate", [1e-300, 1e-9, 0.001])
def test_a_round_has_at_least_one_client(rate: float) -> None:
    assert [len(cohort(5, rate, seed=0, round_index=number)) for number in range(20)] == [1] * 20


def test_waiting_has_an_end() -> None:
    """Of what a clock can count."""
    found = problems("trainer.timeout_seconds=1e30")
    assert "trainer.timeout_seconds=1e+30 is not allowed: a number above 0, at most 1e9" in found
    assert problems("trainer.plugins=[{}]") == [
        "trainer.plugins needs a _target_: the name of a class, such as my_module.Mine"
    ]
