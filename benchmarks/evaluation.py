"""Users per second of full-ranking evaluation: fellrec and torchmetrics' retrieval classes, on the same scores.

    python benchmarks/evaluation.py [--users 6040] [--items 3706] [--reference-users 600] [--repeats 3]

Random scores of the size of MovieLens-1M, one target and 100 masked items per user, batches of 256 users. fellrec
computes the rank of each target, and from it NDCG, recall, hit rate and reciprocal rank at 5, 10, 20 and 50.
torchmetrics gets the unmasked scores of every (user, item) pair and computes the four metrics at 10 only, user by
user; it is timed on fewer users. Both are timed alternately, medians are reported, and the values must agree.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR, RetrievalNormalizedDCG, RetrievalRecall

from fellrec.functional.first_items import first_items
from fellrec.functional.ranking import ranking_metrics, target_ranks

BATCH, MASKED, CUTOFFS = 256, 100, (5, 10, 20, 50)


def main() -> None:
    options = _options()
    scores, targets, masked = problem(options.users, options.items)
    some = min(options.reference_users, options.users)
    ours_s, kept_s, theirs_s = [], [], []
    for _ in range(options.repeats):
        seconds, ours = timed(lambda: evaluate(scores, targets, masked, keeps_first=False))
        ours_s.append(seconds)
        kept_s.append(timed(lambda: evaluate(scores, targets, masked, keeps_first=True))[0])
        seconds, theirs = timed(lambda: reference(scores[:some], targets[:some], masked[:some]))
        theirs_s.append(seconds)
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name][:some].mean(), value, rtol=0, atol=1e-6)
    rates = {
        "fellrec, 4 metrics at 4 cutoffs": options.users / statistics.median(ours_s),
        "fellrec, with the first 50 items stored": options.users / statistics.median(kept_s),
        f"torchmetrics, 4 metrics at 1 cutoff ({some} users)": some / statistics.median(theirs_s),
    }
    slowest = rates[next(reversed(rates))]
    print("| implementation | users/s | ratio |\n|---|---|---|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:,.0f} | {rate / slowest:.1f} |")


def problem(num_users: int, num_items: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores ``[U, I]``, a target ``[U]`` and masked items ``[U, 100]`` of each user."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(num_users, num_items, generator=generator)
    chosen = torch.stack([torch.randperm(num_items, generator=generator)[: MASKED + 1] for _ in range(num_users)])
    scores[torch.arange(num_users), chosen[:, 0]] += 2.0
    return scores, chosen[:, 0], chosen[:, 1:]


def evaluate(scores: Tensor, targets: Tensor, masked: Tensor, keeps_first: bool) -> dict[str, Tensor]:
    """Metrics of every user by fellrec's functions, in batches as in a run."""
    parts = []
    for start in range(0, len(scores), BATCH):
        part = slice(start, start + BATCH)
        rows = torch.arange(len(scores[part]))
        wanted, left_out = (rows, targets[part]), (rows.repeat_interleave(MASKED), masked[part].flatten())
        ranks = target_ranks(scores[part], *wanted, *left_out)
        parts.append(ranking_metrics(ranks, rows, len(rows), CUTOFFS))
        if keeps_first:
            first_items(scores[part], wanted, left_out, None, max(CUTOFFS))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def reference(scores: Tensor, targets: Tensor, masked: Tensor) -> dict[str, Tensor]:
    """Means over users, by torchmetrics."""
    metrics = MetricCollection(
        {
            "ndcg_at_10": RetrievalNormalizedDCG(top_k=10),
            "recall_at_10": RetrievalRecall(top_k=10),
            "hr_at_10": RetrievalHitRate(top_k=10),
            "mrr_at_10": RetrievalMRR(top_k=10),
        }
    )
    for start in range(0, len(scores), BATCH):
        part = slice(start, start + BATCH)
        is_target, is_kept = torch.zeros_like(scores[part]).bool(), torch.ones_like(scores[part]).bool()
        is_target.scatter_(1, targets[part, None], True)
        is_kept.scatter_(1, masked[part], False)
        users = torch.arange(start, start + len(is_kept))[:, None].expand_as(is_kept)
        metrics.update(scores[part][is_kept], is_target[is_kept], indexes=users[is_kept])
    return {name: value.double() for name, value in metrics.compute().items()}


def timed(work: Callable[[], dict[str, Tensor]]) -> tuple[float, dict[str, Tensor]]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=6040)
    parser.add_argument("--items", type=int, default=3706)
    parser.add_argument("--reference-users", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
