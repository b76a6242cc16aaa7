"""All clients' adapters: one stacked tensor per parameter name, clients first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fellrec.errors import BackboneError
from fellrec.types import Adapter, AdapterStack


class AdapterBank:
    """Clients differ only in their adapters, so this is all that exists once per client.

    Args:
        tensors: Parameter name → ``[C, *shape]``; taken over, not copied.
        num_clients: C, where there may be no tensors.

    Example:
        >>> bank = AdapterBank.replicate({"w": torch.zeros(2)}, num_clients=3)
        >>> bank.store(1, {"w": torch.ones(2)})
        >>> bank.tensors["w"].sum(dim=1).tolist()
        [0.0, 2.0, 0.0]
    """

    def __init__(self, tensors: Mapping[str, Tensor], num_clients: int | None = None) -> None:
        self.tensors = {name: tensors[name] for name in sorted(tensors)}
        # The tensors tell, unless there are none: the server of a backbone whose body is not trained has such a bank.
        self.num_clients = len(next(iter(tensors.values()))) if num_clients is None else num_clients

    @classmethod
    def replicate(cls, adapter: Adapter, num_clients: int) -> AdapterBank:
        """A bank in which every client has a copy of ``adapter``."""
        return cls(
            {
                name: tensor.detach().cpu().expand(num_clients, *tensor.shape).clone()
                for name, tensor in adapter.items()
            },
            num_clients,
        )

    @classmethod
    def repeat(cls, adapter: Adapter, num_clients: int) -> AdapterBank:
        """A bank in which every client has ``adapter`` itself: it takes the memory of one, and is not to be changed."""
        tensors = {name: tensor.detach().cpu().expand(num_clients, *tensor.shape) for name, tensor in adapter.items()}
        return cls(tensors, num_clients)

    def __len__(self) -> int:
        return self.num_clients

    @property
    def nbytes(self) -> int:
        """Bytes of all adapters."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def row(self, client: int) -> dict[str, Tensor]:
        """One client's adapter, sharing memory with the bank."""
        return {name: tensor[client] for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def copy_to(self, parameters: Mapping[str, nn.Parameter], client: int) -> None:
        """Write one client's adapter into the backbone's parameters.

        Raises:
            BackboneError: If names or shapes differ.
        """
        self._check({name: parameter.shape for name, parameter in parameters.items()})
        for name, tensor in self.tensors.items():
            parameters[name].copy_(tensor[client])

    @torch.no_grad()
    def store(self, client: int, adapter: Mapping[str, Tensor]) -> None:
        """Copy an adapter into one client's row.

        Raises:
            BackboneError: If names or shapes differ.
        """
        self._check({name: tensor.shape for name, tensor in adapter.items()})
        for name, tensor in self.tensors.items():
            tensor[client].copy_(adapter[name])

    def stack(self, clients: Sequence[int]) -> dict[str, Tensor]:
        """A copy of some clients' adapters, name → ``[N, *shape]``."""
        rows = torch.tensor(clients, dtype=torch.long)
        return {name: tensor[rows] for name, tensor in self.tensors.items()}

    def replace(self, clients: Sequence[int], stack: AdapterStack) -> None:
        """Write some clients' adapters; those of all other clients stay as they are.

        Raises:
            BackboneError: If names, shapes or the number of clients differ.
        """
        self._check({name: tensor.shape[1:] for name, tensor in stack.items()})
        for name, tensor in stack.items():  # a single row would be broadcast to all clients
            if len(tensor) != len(clients):
                raise BackboneError(f"{name} has rows for {len(tensor)} clients, expected {len(clients)}")
        rows = torch.tensor(clients, dtype=torch.long)
        for name, tensor in self.tensors.items():
            tensor[rows] = stack[name].to(tensor)

    def load_state_dict(self, tensors: AdapterStack) -> None:
        """Take over what was saved from ``tensors`` of a bank of the same shape.

        Raises:
            BackboneError: If names, shapes or the number of clients differ.
        """
        self.replace(range(len(self)), tensors)

    def _check(self, shapes: Mapping[str, torch.Size]) -> None:
        missing, surplus = sorted(set(self.tensors) - set(shapes)), sorted(set(shapes) - set(self.tensors))
        if missing or surplus:
            raise BackboneError(f"adapter names differ: missing {missing[:3]}, unexpected {surplus[:3]}")
        for name, tensor in self.tensors.items():
            if shapes[name] != tensor.shape[1:]:
                raise BackboneError(f"{name} has shape {list(shapes[name])}, expected {list(tensor.shape[1:])}")
