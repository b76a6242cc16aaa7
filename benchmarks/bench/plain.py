"""What the rivals share: the frozen workload's model, loss, local training, mean and ranking, without fellrec.

Plain PyTorch, Transformers and PEFT, as a careful researcher writes it: one model, adapters that are copied into it,
the standard attention mask, and Transformers' own loss for language models.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

Adapter = dict[str, Tensor]
Batch = dict[str, Tensor]


@dataclass
class Workload:
    """A folder of ``bench.workload``."""

    folder: Path
    settings: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.settings = json.loads((self.folder / "workload.json").read_text())
        self._tensors = load_file(self.folder / "batches.safetensors")
        users = self.folder / "users.safetensors"
        self._users = load_file(users) if users.is_file() else {}

    @property
    def initial(self) -> Adapter:
        """The adapter that all clients start with."""
        return load_file(self.folder / "adapter.safetensors")

    @property
    def item_texts(self) -> Batch:
        """Tokens of all items, concatenated, and where each one's begin."""
        return {name: self._users[f"items.item_{name}"] for name in ("tokens", "offsets")}

    def batches(self, round_index: int, client: int) -> list[Batch]:
        """Batches of a client's round, padded, with mask and labels."""
        steps = self.settings["steps"][round_index][client]
        return [self._complete(_named(self._tensors, f"{round_index}.{client}.{step}.")) for step in range(steps)]

    def users(self, stage: str) -> list[Batch]:
        """Batches of users of a stage, ``val`` or ``test``."""
        numbers = sorted({int(name.split(".")[1]) for name in self._users if name.startswith(f"{stage}.")})
        return [self._complete(_named(self._users, f"{stage}.{number}.")) for number in numbers]

    def _complete(self, batch: Batch) -> Batch:
        columns = torch.arange(batch["input_ids"].shape[1])
        batch["attention_mask"] = (columns < batch["lengths"][:, None]).long()
        if self.settings["family"] == "generative":
            labels = torch.full_like(batch["input_ids"], -100)
            labels[batch["rows"], batch["columns"] + 1] = batch["targets"]
            batch["labels"] = labels
        return batch


def _named(tensors: Mapping[str, Tensor], prefix: str) -> Batch:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class Client:
    """One model with a LoRA adapter; adapters of clients are copied into it."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        how = workload.settings
        base = AutoModelForCausalLM.from_pretrained(workload.folder / "model")
        lora = LoraConfig(
            r=how["rank"], lora_alpha=how["alpha"], target_modules=how["target_modules"], task_type="CAUSAL_LM"
        )
        self.model: nn.Module = get_peft_model(base, lora)
        self.parameters = {
            name.removeprefix("base_model.model."): parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        self._items = workload.item_texts if how["family"] == "retrieval" else {}

    @torch.no_grad()
    def load(self, adapter: Adapter) -> None:
        """Copy an adapter into the model."""
        assert adapter.keys() == self.parameters.keys()
        for name, parameter in self.parameters.items():
            parameter.copy_(adapter[name])

    def adapter(self) -> Adapter:
        """A copy of the adapter in the model."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss over the batch's targets."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        if "labels" in batch:
            return self.model(**inputs, labels=batch["labels"]).loss
        hidden = self._hidden(inputs)[batch["rows"], batch["columns"]]
        queries = F.normalize(hidden, dim=-1) / self.workload.settings["temperature"]
        return F.cross_entropy(queries @ self._item_vectors().T, batch["targets"])

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW over the adapter."""
        how = self.workload.settings
        return torch.optim.AdamW(self.parameters.values(), lr=how["learning_rate"], weight_decay=how["weight_decay"])

    def train(self, adapter: Adapter, batches: Iterable[Batch]) -> tuple[Adapter, float]:
        """Local training; gives the adapter after it and the mean loss over all targets."""
        self.load(adapter)
        self.model.train()
        optimizer, total, targets = self.optimizer(), 0.0, 0
        for batch in batches:
            loss = self.loss(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters.values(), self.workload.settings["gradient_clip"])
            optimizer.step()
            optimizer.zero_grad()
            total, targets = total + loss.item() * len(batch["targets"]), targets + len(batch["targets"])
        return self.adapter(), total / targets

    @torch.no_grad()
    def ndcg(self, adapter: Adapter, users: Iterable[Batch]) -> float:
        """NDCG@10 of the retrieval family, the mean over clients; a user has one target, and ties count against it."""
        self.load(adapter)
        self.model.eval()
        gains, clients, items = [], [], self._item_vectors()
        for batch in users:
            hidden = self._hidden({name: batch[name] for name in ("input_ids", "attention_mask")})
            last = hidden[torch.arange(len(hidden)), batch["lengths"] - 1]
            scores = F.normalize(last, dim=-1) @ items.T
            scores[batch["masked_rows"], batch["masked_items"]] = -math.inf
            rows, targets = batch["target_rows"], batch["target_items"]
            of_target = scores[rows, targets]
            rank = (scores[rows] >= of_target[:, None]).sum(dim=1)  # from 1, the target itself included
            gains.append(torch.where(rank <= 10, 1 / (rank + 1).double().log2(), 0.0))
            clients.append(batch["clients"][rows])
        gain, client = torch.cat(gains), torch.cat(clients)
        return float(torch.stack([gain[client == one].mean() for one in client.unique()]).mean())

    def _hidden(self, inputs: Batch) -> Tensor:
        return self.model.base_model.model.model(**inputs).last_hidden_state  # type: ignore[union-attr,operator]

    def _item_vectors(self) -> Tensor:
        weight = self.model.get_input_embeddings().weight  # type: ignore[operator]
        vectors = F.embedding_bag(self._items["tokens"], weight, self._items["offsets"], mode="mean")
        return F.normalize(vectors, dim=-1)


def mean(adapters: list[Adapter], samples: list[int]) -> Adapter:
    """Federated averaging."""
    total = sum(samples)
    return {name: sum(a[name] * (n / total) for a, n in zip(adapters, samples, strict=True)) for name in adapters[0]}


class Report:
    """What a rival writes: losses by round and client, NDCG@10 by evaluation, and seconds.

    Args:
        path: JSON file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.losses: list[list[float]] = []
        self.ndcg: list[float] = []
        self._started = time.perf_counter(), time.process_time()

    def write(self, **more: Any) -> None:
        """Write the file."""
        wall, cpu = self._started
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        self.path.write_text(json.dumps({"losses": self.losses, "ndcg": self.ndcg, "seconds": seconds, **more}) + "\n")
