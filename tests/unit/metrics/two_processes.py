"""One of several processes that evaluate users together; run by test_clients.py.

Usage: two_processes.py RANK NUM_PROCESSES STORE OUTPUT CASE
"""

import sys

import torch


def problem():
    """200 users of 4 clients, one of them empty, with one to three targets each."""
    generator = torch.Generator().manual_seed(5)
    users = torch.randperm(1000, generator=generator)[:200]
    clients = torch.randint(0, 3, (200,), generator=generator)
    rows = torch.arange(200).repeat_interleave(torch.randint(1, 4, (200,), generator=generator))
    ranks = torch.arange(len(rows)) * 7 % 31  # neighbours differ, so ranks are distinct within a user
    return users, clients, ranks, rows


def filled(metric, chosen, batch_size=13):
    """Feed ``metric`` the users at positions ``chosen`` in batches, each with three made-up first items."""
    from fellrec.functional.first_items import FirstItems

    users, clients, ranks, rows = problem()
    for batch in chosen.split(batch_size):
        position = torch.full((len(users),), -1)
        position[batch] = torch.arange(len(batch))
        inside = position[rows] >= 0
        items = users[batch, None] * 10 + torch.arange(3)
        first = FirstItems(items, -items.float(), users[batch] % 2 == 0)
        metric.update(users[batch], clients[batch], ranks[inside], position[rows][inside], first=first)
    return metric


def main(rank, num_processes, store, output, case):
    """Evaluate some of the users and save what all processes get together."""
    from fellrec.metrics import NDCG, ClientRankingMetrics

    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=num_processes)
    everyone = torch.arange(200)
    parts = {
        "interleaved": [everyone[0::2], everyone[1::2]],
        "padded": [everyone[:101], everyone[100:]],  # user 100 twice, as a padding sampler does
        "one_idle": [everyone, everyone[:0]],
    }
    metric = ClientRankingMetrics(4, (5, 10))
    part = parts[case][rank]
    result = (filled(metric, part) if len(part) else metric).compute()

    scores = torch.randn(20, 50, generator=torch.Generator().manual_seed(1))
    none = torch.tensor([], dtype=torch.long)
    ndcg = NDCG(10)
    ndcg.update(scores[rank::2], torch.arange(10), torch.arange(20)[rank::2], none, none)
    torch.save({"clients": result, "ndcg": ndcg.compute()}, output)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
