"""What each side of a recommender that was built holds in memory: real parameters, counted."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig

from fellrec.experiment.build import Recommender, build_adapter
from fellrec.experiment.federation import head_layers_of
from fellrec.models.backbone import DTYPES
from fellrec.models.partial import empty_body
from fellrec.models.split import SplitModel, bytes_of_parts
from fellrec.report.costs import Storage


def storage_of(config: DictConfig, recommender: Recommender) -> Storage:
    """Bytes of the parameters on the clients' and on the server's side, LoRA's included.

    What is in this process is counted as it is. A server in another process has what its share of the backbone's files
    says, with the adapter that it attaches. Where clients have different heads, the client is that with the deepest.
    """
    model = recommender.module.model
    held = bytes_of_parts(model, dict(model.model.named_parameters()))
    heads = heads_of(config, recommender)
    client = max(head.stored_bytes for head in heads) if heads else held["head"] + held["tail"]
    if recommender.server is not None:
        body = recommender.server.model
    elif config.split.transport == "distributed":
        body = _server_elsewhere(config, recommender)
    else:
        return Storage(client, held["body"])
    return Storage(client, sum(bytes_of_parts(body, dict(body.model.named_parameters())).values()))


@dataclass(frozen=True)
class Head:
    """The head of one client.

    Attributes:
        num_layers: Layers after the embedding.
        stored_bytes: Parameters of the client's head and tail, with its part of the adapter.
    """

    num_layers: int
    stored_bytes: int


def heads_of(config: DictConfig, recommender: Recommender) -> list[Head]:
    """The head of each client where they differ; empty if all have the same."""
    model, depths = recommender.module.model, head_layers_of(config, recommender.datamodule)
    if len(model.cuts) < 2:
        return []
    sizes = {name: parameter.numel() * parameter.element_size() for name, parameter in model.model.named_parameters()}
    stored = {
        depth: sum(size for name, size in sizes.items() if cut.part_of(name, model.arch) != "body")
        for depth, cut in model.cuts.items()
    }
    return [Head(depth, stored[depth]) for depth in depths]


def _server_elsewhere(config: DictConfig, recommender: Recommender) -> SplitModel:
    folder, split = recommender.backbone.folder, config.split
    assert folder is not None
    dtype = DTYPES[config.backbone.get("dtype") or "float32"]
    body = SplitModel(
        empty_body(folder, split.head_layers, split.tail_layers, dtype), split.head_layers, split.tail_layers
    )
    build_adapter(config).attach(body.model, body.arch, config.seed, body.part_of)
    return body
