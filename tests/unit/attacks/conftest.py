"""A small public model, and a client's whose head is random and whose tokens have secret numbers."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import pytest
import torch

from fellrec.attacks.public import Public, token_counts
from fellrec.data.schema import Catalogue
from fellrec.models.backbone import Backbone
from fellrec.models.objectives.retrieval import RetrievalObjective
from fellrec.models.settings import RetrievalSettings, TinySettings
from fellrec.models.split import SplitModel
from fellrec.models.tiny import build_tiny

NOUNS = ("kettle", "lamp", "rope", "saw", "tent", "vase", "wheel", "yarn", "anvil", "boat", "crown", "drum")
TITLES = tuple(f"{colour} {noun}" for colour in ("amber", "blue", "coral") for noun in NOUNS)
CATALOGUE = Catalogue(tuple(map(str, range(len(TITLES)))), TITLES, pd.DataFrame(index=range(len(TITLES))))


def tiny(seed: int) -> Backbone:
    sizes = TinySettings(vocab_size=400, hidden_size=32, num_layers=4, num_heads=2, seed=seed)
    return build_tiny([f"{title}\n" for title in TITLES], sizes)


@pytest.fixture(scope="session")
def public() -> Public:
    backbone = tiny(0)
    objective = RetrievalObjective(backbone.tokenizer, CATALOGUE, 10, RetrievalSettings())
    model = SplitModel(backbone.model, (0, 2), 1).eval()
    counts = torch.arange(1.0, len(TITLES) + 1, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    items = [torch.randint(len(TITLES), (16, 9), generator=draw) for _ in range(4)]
    texts = [objective.collate(some, torch.ones_like(some, dtype=torch.bool))["input_ids"] for some in items]
    return Public(model, objective, counts, token_counts(objective, counts, model.num_embeddings), texts, seed=0)


@pytest.fixture(scope="session")
def secret_head(public: Public) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Hidden states of a client with random layers, whose token ``v`` has the public embedding of another token."""
    model = SplitModel(tiny(1).model, (0, 2), 1).eval()
    weight = public.model.model.get_input_embeddings().weight
    secret = torch.randperm(len(weight), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.model.get_input_embeddings().weight.copy_(weight[secret])

    @torch.no_grad()
    def head(ids: torch.Tensor, depth: int) -> torch.Tensor:
        with model.at_depth(depth):
            return model.head(ids)

    return head
