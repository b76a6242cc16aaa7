"""torchmetrics classes over one rank computation, and the summary of an evaluation."""

from fellrec.metrics.clients import ClientRankingMetrics
from fellrec.metrics.ranking import MRR, NDCG, HitRate, RankingMetric, Recall
from fellrec.metrics.summary import client_means, summarise

__all__ = ["MRR", "NDCG", "ClientRankingMetrics", "HitRate", "RankingMetric", "Recall", "client_means", "summarise"]
