"""All clients' adapters: for each client, its current version."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fellrec.errors import BackboneError, CheckpointError
from fellrec.functional.stacks import AdapterStack, RowStack, as_lazy
from fellrec.state.tensor_store import StoredTensors, TensorSpecs, TensorStore
from fellrec.types import Adapter


class AdapterBank:
    """The adapters, which are all that exists once per client.

    Adapters are never changed in place: a client gets another version. Several clients, and several banks, can refer to
    the same version, which is then stored once.

    Args:
        versions: One per client; further tensors in them are ignored.
        kinds: Parameter name → type and shape.
        tensor_store: Creates new versions; in memory by default.

    Example:
        >>> bank = AdapterBank.replicate({"w": torch.zeros(2)}, num_clients=3)
        >>> bank.store(1, {"w": torch.ones(2)})
        >>> bank.tensors["w"].sum(dim=1).tolist()
        [0.0, 2.0, 0.0]
    """

    def __init__(
        self, versions: Sequence[StoredTensors], kinds: TensorSpecs, tensor_store: TensorStore | None = None
    ) -> None:
        self.versions = list(versions)
        self.kinds = {name: kinds[name] for name in sorted(kinds)}
        self.tensor_store = tensor_store or TensorStore()

    @classmethod
    def replicate(cls, adapter: Adapter, num_clients: int) -> AdapterBank:
        """A bank in which every client has ``adapter``, stored once."""
        version = TensorStore().put(0, adapter)
        kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in adapter.items()}
        return cls([version] * num_clients, kinds)

    @property
    def adapter_bytes(self) -> int:
        """Bytes of one client's adapter."""
        return sum(kind.itemsize * shape.numel() for kind, shape in self.kinds.values())

    def __len__(self) -> int:
        return len(self.versions)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All clients' adapters, name → ``[C, *shape]``; a copy of all of them."""
        return dict(self.stack(range(len(self))))

    def row(self, client: int) -> dict[str, Tensor]:
        """One client's adapter; not to be changed."""
        tensors = self.versions[client].tensors()
        return {name: tensors[name] for name in self.kinds}

    def store(
        self, client: int, adapter: Mapping[str, Tensor], name: str = "", about: Mapping[str, str] | None = None
    ) -> None:
        """Give a client a copy of an adapter.

        Args:
            client: Its row.
            adapter: By parameter name.
            name: Of the version's file, see ``TensorStore.put``.
            about: Metadata for its file.

        Raises:
            BackboneError: If names or shapes differ.
            StorageError: If its file cannot be written.
        """
        self._check({key: tensor.shape for key, tensor in adapter.items()})
        ordered = {key: adapter[key].detach().to(kind) for key, (kind, _) in self.kinds.items()}
        self.versions[client] = self.tensor_store.put(client, ordered, name, about)

    def stack(self, clients: Sequence[int]) -> RowStack:
        """Some clients' current adapters, name → ``[N, *shape]``, read on access."""
        return self.stack_of([self.versions[client] for client in clients])

    def stack_of(self, versions: Sequence[StoredTensors]) -> RowStack:
        """Current or former versions, name → ``[N, *shape]``, read on access."""
        shapes = {name: shape for name, (_, shape) in self.kinds.items()}
        return RowStack(shapes, [version.tensors for version in versions])

    def replace(self, clients: Sequence[int], stack: AdapterStack) -> None:
        """Give some clients copies of other adapters; those of all other clients stay unchanged.

        Raises:
            BackboneError: If names, shapes or the number of clients differ.
            StorageError: If a file cannot be written.
        """
        lazy = as_lazy(stack)
        self._check(lazy.shapes)
        if lazy and lazy.num_rows != len(clients):
            raise BackboneError(f"{next(iter(lazy))} has rows for {lazy.num_rows} clients, expected {len(clients)}")
        for client, version in zip(clients, self.tensor_store.put_rows(clients, lazy, self.kinds), strict=True):
            self.versions[client] = version

    def check(self, versions: Iterable[StoredTensors]) -> None:
        """Check stored versions that are to be clients' adapters again, each once.

        Raises:
            BackboneError: If a name or shape differs.
            CheckpointError: If a value is not finite: training never stores one.
        """
        for version in {id(version): version for version in versions}.values():
            tensors = version.tensors()
            self._check({name: tensors[name].shape for name in self.kinds if name in tensors})
            for name in self.kinds:
                if not bool(tensors[name].isfinite().all()):
                    raise CheckpointError(f"{version.path or 'an adapter'}: {name} has values that are not finite")

    def _check(self, shapes: Mapping[str, torch.Size]) -> None:
        missing, surplus = sorted(set(self.kinds) - set(shapes)), sorted(set(shapes) - set(self.kinds))
        if missing or surplus:
            raise BackboneError(f"adapter names differ: missing {missing[:3]}, unexpected {surplus[:3]}")
        for name, (_, shape) in self.kinds.items():
            if shapes[name] != shape:
                raise BackboneError(f"{name} has shape {list(shapes[name])}, expected {list(shape)}")
