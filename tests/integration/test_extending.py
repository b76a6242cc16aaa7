"""What a user adds from outside: callbacks, transforms and rules by configuration; the public names in a notebook."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fellrec
from fellrec.cli.main import main
from fellrec.errors import ConfigError

MODULE = '''
import json
import torch
from fellrec import FederatedCallback
from fellrec.aggregation import FedAvg
from fellrec.federated.exchange import Transform


class Mine(FederatedCallback):
    def __init__(self, run_dir, threshold: float = 1.0):
        self.path, self.threshold, self.rounds = run_dir / "mine.json", threshold, []

    def on_round_end(self, record):
        self.rounds.append([trained.loss for trained in record.trained])
        self.path.write_text(json.dumps(self.rounds))
        if self.threshold > min(self.rounds[-1]):
            self.events.stop()

    def state_dict(self):
        return {"rounds": self.rounds}

    def load_state_dict(self, state):
        self.rounds = state["rounds"]


class Bfloat16(Transform):
    """Halves what is sent."""

    def encode(self, payload, row, round_index):
        return {name: tensor.to(torch.bfloat16) for name, tensor in payload.items()}

    def decode(self, payload):
        return {name: tensor.float() for name, tensor in payload.items()}


class ChangesTheBase(FedAvg):
    """Adds 0.01 to every weight of one matrix in the first round."""

    def aggregate(self, updates, round_index):
        mixed = super().aggregate(updates, round_index)
        if round_index == 0:
            name = next(name for name in updates.end if "lora_B" in name)
            other = name.replace("lora_B", "lora_A")
            weight = name.replace("lora_B.default", "base_layer")
            left = torch.full((updates.end[name].shape[1], 1), 0.01)
            mixed.base.update({f"{weight}|left": left, f"{weight}|right": torch.ones(1, updates.end[other].shape[2])})
        return mixed
'''


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    return tmp_path


def ledger(run: Path) -> list[dict[str, str]]:
    names, *rows = [line.split(",") for line in (run / "ledger.csv").read_text().splitlines()]
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_a_callback_of_the_user_is_one_class_and_one_override(workplace: Path, tiny_overrides: list[str]) -> None:
    """It is given what its constructor names, keeps its state through a resume, and can end the run."""
    mine = ["+callbacks.mine._target_=my_module.Mine"]
    main(["train", *tiny_overrides, *mine, "+callbacks.mine.threshold=0", "run_dir=run", "references.show=[]"])
    whole = json.loads((workplace / "run" / "mine.json").read_text())
    assert [len(losses) for losses in whole] == [3, 3]
    main(["train", *tiny_overrides, *mine, "+callbacks.mine.threshold=1e9", "run_dir=short", "references.show=[]"])
    assert json.loads((workplace / "short" / "mine.json").read_text()) == whole[:1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+callbacks.mine._target_=my_module.Bfloat16", "callbacks.mine._target_=my_module.Bfloat16 is not a subclass"),
        ("+callbacks.mine._target_=my_module.Absent", "callbacks.mine._target_=my_module.Absent cannot be imported"),
    ],
)
def test_what_is_not_a_callback_is_refused_before_data_are_read(
    workplace: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    for name in ("ratings.dat", "movies.dat"):
        (workplace / name).write_text("cannot be read as ratings or movies")
    with pytest.raises(SystemExit):
        main(["train", override, "data=ml_1m", "data.root=.", "run_dir=run"])
    assert message in capsys.readouterr().err
    assert not (workplace / "run").exists()


def test_callbacks_of_the_package_can_be_left_out(workplace: Path, tiny_overrides: list[str]) -> None:
    main(["train", *tiny_overrides, "~callbacks.outputs", "run_dir=run", "references.show=[]"])
    run = workplace / "run"
    assert not (run / "results.json").exists()
    assert (run / "checkpoints").is_dir()


def test_a_transform_changes_what_is_sent_and_its_size(workplace: Path, tiny_overrides: list[str]) -> None:
    """The bytes in the ledger are those of the payload, not of a constant."""
    given = [*tiny_overrides, "aggregation=fedavg", "references.show=[]"]
    main(["train", *given, "run_dir=plain"])
    main(["train", *given, "exchange.transforms=[{_target_: my_module.Bfloat16}]", "run_dir=half"])
    sent = {
        run: [
            int(row["bytes"]) for row in ledger(workplace / run) if (row["kind"], row["direction"]) == ("adapter", "up")
        ]
        for run in ("plain", "half")
    }
    assert sent["plain"]
    assert sent["half"] == [number // 2 for number in sent["plain"]]


def test_a_changed_base_is_exported_and_loads_with_transformers_and_peft(
    workplace: Path, tiny_overrides: list[str], cache: Path
) -> None:
    """One matrix is the pretrained one plus 0.01 everywhere, all others are unchanged."""
    given = [*tiny_overrides, "adapter=lora", "references.show=[]", "trainer.num_rounds=1", "trainer.select=client"]
    main(["train", *given, "aggregation._target_=my_module.ChangesTheBase", "run_dir=run"])
    main(["train", *given, "aggregation=fedavg", "adapter=full", "trainer.learning_rate=1e-30", "run_dir=still"])
    adapters = workplace / "run" / "adapters"
    changed = load_file(adapters / "base_01" / "model.safetensors")
    before = load_file(workplace / "still" / "adapters" / "client_00" / "model.safetensors")
    (moved,) = [name for name in changed if not torch.equal(changed[name], before[name])]
    assert torch.equal(changed[moved], before[moved] + 0.01)
    named = json.loads((adapters / "client_00" / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(named)
    assert isinstance(PeftModel.from_pretrained(model, str(adapters / "client_00")), PeftModel)


def test_a_notebook_needs_ten_lines(workplace: Path, tiny_overrides: list[str]) -> None:
    class Counts(fellrec.FederatedCallback):
        rounds = 0

        def on_round_end(self, record: object) -> None:
            self.rounds += 1

    counts = Counts()
    config = fellrec.compose([*tiny_overrides, "aggregation=fedavg", "run_dir=run"])
    run = fellrec.build(config, callbacks=[counts])
    result = run.execute()
    stored = json.loads((workplace / "run" / "results.json").read_text())
    assert result.evaluation.summary["ndcg_at_10/mean"] == stored["summary"]["ndcg_at_10/mean"]
    assert (run.run_dir, counts.rounds) == (workplace / "run", 2)
    assert set(fellrec.__all__) <= set(dir(fellrec))


@pytest.mark.parametrize(
    ("override", "message"),
    [("trainer.devices=2", "start several by fellrec train"), ("split.transport=distributed", "trainer.devices=3")],
)
def test_a_notebook_is_one_process(workplace: Path, tiny_overrides: list[str], override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fellrec.build(fellrec.compose([*tiny_overrides, override]))
