"""The code of the MLflow model of a run: MLflow runs this file and asks the object that it sets (models from code).

It must not import fellrec before it is loaded: in an environment made from the model's requirements, fellrec comes with
the model.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel


class ClientModels(PythonModel):
    """Recommends with the model of the client that each row names."""

    def load_context(self, context):  # type: ignore[no-untyped-def]  # MLflow reads type hints as a schema
        """Load the models of all clients."""
        if importlib.util.find_spec("fellrec") is None:
            sys.path.append(context.artifacts["source"])
        from fellrec.experiment.bundle import load_bundle

        self.models = load_bundle(Path(context.artifacts["bundle"]))

    def predict(self, context, model_input: pd.DataFrame, params=None):  # type: ignore[no-untyped-def]  # else it warns
        """One list of items for each row.

        Args:
            context: Of MLflow.
            model_input: Columns ``client``, from 0, and ``history``, a list of titles, oldest first.
            params: ``k``, the length of the lists.

        Returns:
            Columns ``item_ids``, ``titles`` and ``scores``, lists with the best item first.
        """
        k = int((params or {}).get("k", 10))
        lists = [
            self.models.recommend(int(client), [str(title) for title in history], k)
            for client, history in zip(model_input["client"], model_input["history"], strict=True)
        ]
        return pd.DataFrame(
            {
                "item_ids": [[item.item_id for item in items] for items in lists],
                "titles": [[item.title for item in items] for items in lists],
                "scores": [[item.score for item in items] for items in lists],
            }
        )


mlflow.models.set_model(ClientModels())
