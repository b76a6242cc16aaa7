"""What the process that others are forked from imports and computes once: nearly all that a tiny run does but train."""

from __future__ import annotations

import importlib
import io

import sqlalchemy.orm
from mlflow.utils.requirements_utils import warn_dependency_requirement_mismatches

from fellrec.cli.main import command_parser
from fellrec.config.compose import compose
from fellrec.report.plots import heat_map

for _name in (
    *(
        "mlflow.pyfunc",
        "mlflow.store.tracking.sqlalchemy_store",
        "alembic.command",
        "git",
        "pandas.io.formats.csvs",
        "pyarrow.dataset",
        "pyarrow.parquet",
    ),
    *("sqlalchemy.dialects.sqlite", "torch.distributed.run", "mlflow.tracking.client"),
    *(f"fellrec.callbacks.{name}" for name in ("diagnostics", "lora", "matrices", "model", "outputs", "rounds")),
    *(f"fellrec.callbacks.{name}" for name in ("system", "user_groups", "progress", "costs", "mlflow_logging")),
    *(
        "fellrec.experiment.run",
        "fellrec.aggregation.fellrec",
        "fellrec.experiment.results",
        "fellrec.experiment.session",
    ),
    *("fellrec.rankers.similarity", "fellrec.report.comparison", "fellrec.report.cost_tables"),
):
    importlib.import_module(_name)

compose([])
command_parser()
sqlalchemy.orm.configure_mappers()
warn_dependency_requirement_mismatches(["torch"])  # reads what packages are installed, as MLflow does for a model
heat_map([[1.0]], [0], "", True).savefig(io.BytesIO())
