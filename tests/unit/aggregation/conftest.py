import pytest
import torch

from fellrec.federated.records import Updates


@pytest.fixture
def make_updates():
    """A function that makes random updates of ``n`` clients."""

    def make(num_clients: int = 4, seed: int = 0) -> Updates:
        generator = torch.Generator().manual_seed(seed)
        start = {
            "a": torch.randn(1, 3, 2, generator=generator).expand(num_clients, -1, -1).clone(),
            "b": torch.randn(1, 5, generator=generator).expand(num_clients, -1).clone(),
        }
        end = {name: p + 0.1 * torch.randn(p.shape, generator=generator) for name, p in start.items()}
        losses = 2 + 0.1 * torch.rand(num_clients, generator=generator, dtype=torch.float64)
        samples = torch.randint(1, 100, (num_clients,), generator=generator).double()
        return Updates(tuple(range(0, 2 * num_clients, 2)), start, end, losses, samples)

    return make
