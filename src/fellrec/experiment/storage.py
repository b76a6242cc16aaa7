"""What each side of a recommender that was built holds in memory: real parameters, counted."""

from __future__ import annotations

from omegaconf import DictConfig

from fellrec.experiment.build import Recommender, build_adapter
from fellrec.models.backbone import DTYPES
from fellrec.models.partial import empty_body
from fellrec.models.split import SplitModel, bytes_of_parts
from fellrec.report.costs import Storage


def storage_of(config: DictConfig, recommender: Recommender) -> Storage:
    """Bytes of the parameters on the clients' and on the server's side, LoRA's included.

    What is in this process is counted as it is. A server in another process has what its share of the backbone's files
    says, with the adapter that it attaches.
    """
    model = recommender.module.model
    held = bytes_of_parts(model, dict(model.model.named_parameters()))
    client = held["head"] + held["tail"]
    if recommender.server is not None:
        body = recommender.server.model
    elif config.split.transport == "distributed":
        body = _server_elsewhere(config, recommender)
    else:
        return Storage(client, held["body"])
    return Storage(client, sum(bytes_of_parts(body, dict(body.model.named_parameters())).values()))


def _server_elsewhere(config: DictConfig, recommender: Recommender) -> SplitModel:
    folder, split = recommender.backbone.folder, config.split
    assert folder is not None
    dtype = DTYPES[config.backbone.get("dtype") or "float32"]
    body = SplitModel(
        empty_body(folder, split.head_layers, split.tail_layers, dtype), split.head_layers, split.tail_layers
    )
    build_adapter(config).attach(body.model, body.arch, config.seed, body.part_of)
    return body
