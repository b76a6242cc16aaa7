"""Models of a finished run outside it: as an MLflow model, and merged into a Transformers folder."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import torch
from mlflow.tracking import MlflowClient
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fellrec.cli.main import main


@pytest.fixture(scope="module")
def trained(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of LoRA adapters, and the store that its model was registered in."""
    folder = tmp_path_factory.mktemp("served")
    store = f"tracking.uri=sqlite:///{folder / 'mlflow.db'}"
    lora = ["adapter=lora", "trainer.num_rounds=1", "trainer.learning_rate=0.05"]
    more = ["references.show=[]", f"run_dir={folder / 'run'}", store, "tracking.register_model=movies"]
    with warnings.catch_warnings(record=True) as shown:
        main(["train", *tiny_overrides, *lora, *more])
    assert not [warning for warning in shown if "predict" in str(warning.message)], "users cannot do anything about it"
    return folder


def test_the_registered_model_answers_as_recommend_does(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each client's own model, without pickles; the run's page in MLflow names the model."""
    client = MlflowClient(tracking_uri=f"sqlite:///{trained / 'mlflow.db'}")
    (run,) = client.search_runs(["1"])
    (output,) = run.outputs.model_outputs
    (version,) = client.search_model_versions("name = 'movies'")
    assert (version.run_id, version.source) == (
        run.info.run_id,
        client.get_logged_model(output.model_id).artifact_location,
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{trained / 'mlflow.db'}")
    model = mlflow.pyfunc.load_model("models:/movies/1")
    titles = pd.read_parquet(trained / "run/model/artifacts/bundle/catalogue.parquet")["title"].tolist()[3:6]
    asked = pd.DataFrame({"client": [0, 2], "history": [titles, titles]})
    answers: list[dict[str, Any]] = model.predict(asked, params={"k": 7}).to_dict("records")
    capsys.readouterr()
    for number, answer in zip((0, 2), answers, strict=True):
        how = ["--client", str(number), "-k", "7", "--format", "json", "--history", *titles]
        main(["recommend", str(trained / "run"), *how])
        items = json.loads(capsys.readouterr().out)["items"]
        assert answer["item_ids"] == [item["item_id"] for item in items]
        assert answer["scores"] == [item["score"] for item in items]
    assert answers[0]["scores"] != answers[1]["scores"], "clients have models of their own"
    written = {path.suffix for path in (trained / "run" / "model").rglob("*")}
    assert not written & {".pkl", ".bin", ".pt", ".pickle"}
    needed = (trained / "run" / "model" / "requirements.txt").read_text().split()
    assert {"torch", "transformers", "peft"} <= {line.partition("==")[0] for line in needed}


def test_a_merged_model_is_the_adapter_on_its_backbone(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PEFT adds the adapter to the backbone by itself; the merged folder needs neither PEFT nor fellrec."""
    capsys.readouterr()
    main(["export", str(trained / "run"), "--client", "1", "--merge"])
    folder = Path(capsys.readouterr().out.strip())
    merged = AutoModelForCausalLM.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(trained / "run/model/artifacts/bundle/backbone")
    tokens = torch.tensor([[5, 9, 2, 7]])
    with torch.no_grad():
        plain = base(tokens).logits
        wrapped = PeftModel.from_pretrained(base, str(trained / "run" / "adapters" / "client_01"))
        torch.testing.assert_close(merged(tokens).logits, wrapped(tokens).logits, rtol=1e-4, atol=1e-4)
        how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert merged.generate(tokens, **how).tolist() == wrapped.generate(input_ids=tokens, **how).tolist()
    assert (merged(tokens).logits - plain).abs().max() > 1e-3, "the adapter has an effect"
    for arguments, said in (
        (["--client", "1", "--merge"], "exists and is not empty"),
        (["--client", "9", "--merge", "--output", "new"], "--client 9 is not allowed: the run has clients 0 to 2"),
        (["--merge"], "--merge needs --client N"),
    ):
        with pytest.raises(SystemExit) as done:
            main(["export", str(trained / "run"), *arguments])
        assert done.value.code == 1
        assert said in capsys.readouterr().err
