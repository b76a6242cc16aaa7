"""Scores under bfloat16 mixed precision are computed in float32."""

from __future__ import annotations

from pathlib import Path

import torch

from fellrec.config.compose import compose
from fellrec.experiment.build import build_data, build_recommender
from fellrec.rankers.similarity import SimilarityRanker

SASREC = ["data.reader.num_users=80", "data.reader.num_items=300", "backbone=sasrec"]


def test_items_do_not_tie_in_mixed_precision(tmp_path: Path) -> None:
    """bf16 has 8 bits: among a few hundred near scores many are equal, and ties are broken against the target."""
    config = compose([*SASREC, f"cache_dir={tmp_path}", "trainer.precision=bf16-mixed"])
    recommender = build_recommender(config, build_data(config))
    module, histories = recommender.module, torch.tensor([[3, 7, 20], [5, -1, -1]])
    ranker = module.ranker
    assert isinstance(ranker, SimilarityRanker)
    module.eval()
    with torch.no_grad(), recommender.fabric.autocast():
        ranker.refresh(module.model)
        scores = ranker.scores(module.model, histories)
        queries = ranker.objective.queries(module.model, histories)
    items = ranker.objective.item_vectors(module.model).detach()
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), queries.double() @ items.double().T, rtol=1e-4, atol=1e-5)
    assert scores[0].unique().numel() == len(items)
