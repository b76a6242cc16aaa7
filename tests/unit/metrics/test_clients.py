import os
from pathlib import Path

import pytest
import torch
from preloaded import Preloaded
from scripts import load_script

from fellrec.functional.ranking import ranking_metrics
from fellrec.metrics import NDCG, ClientRankingMetrics

SCRIPT = Path(__file__).parent / "two_processes.py"


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPT)


def assert_same(first, second):
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for name in first:
            assert_same(first[name], second[name])
    elif isinstance(first, torch.Tensor):
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    else:
        assert first == second


def test_figures_are_means_over_users_and_clients(script):
    users, clients, ranks, rows = script.problem()
    result = script.filled(ClientRankingMetrics(4, (5, 10)), torch.arange(200)).compute()
    order = users.argsort()
    assert_same(result["items"], users[order][:, None] * 10 + torch.arange(3))
    assert_same(result["scores"], -result["items"].float())
    assert_same(result["is_tied"], users[order] % 2 == 0)
    expected = ranking_metrics(ranks, rows, 200, (5, 10))
    assert_same(result["users"], users[order])
    assert_same(result["client_of_user"], clients[order])
    for name, values in expected.items():
        assert_same(result["per_user"][name], values[order])
        assert result["pooled"][name] == pytest.approx(values.mean().item(), rel=1e-12)
        for client in range(3):
            mean = result["per_client"][name][client].item()
            assert mean == pytest.approx(values[clients == client].mean().item(), rel=1e-12)
        assert result["per_client"][name][3].isnan()


def test_batches_do_not_matter(script):
    chosen = torch.randperm(200, generator=torch.Generator().manual_seed(9))
    whole = script.filled(ClientRankingMetrics(4, (5, 10)), torch.arange(200), 200).compute()
    assert_same(script.filled(ClientRankingMetrics(4, (5, 10)), chosen, 7).compute(), whole)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["interleaved", "padded", "one_idle"])
def test_two_processes_equal_one_exactly(script, tmp_path, case):
    outputs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    commands = [[str(SCRIPT), str(rank), "2", str(tmp_path / "store"), str(outputs[rank]), case] for rank in range(2)]
    for process in [Preloaded(command, tmp_path, os.environ) for command in commands]:
        code, shown = process.finish()
        assert code == 0, shown
    results = [torch.load(output, weights_only=True) for output in outputs]

    alone = script.filled(ClientRankingMetrics(4, (5, 10)), torch.arange(200)).compute()
    scores = torch.randn(20, 50, generator=torch.Generator().manual_seed(1))
    none = torch.tensor([], dtype=torch.long)
    ndcg = NDCG(10)
    ndcg.update(scores, torch.arange(20), torch.arange(20), none, none)
    for result in results:
        assert_same(result["clients"], alone)
        assert result["ndcg"].item() == pytest.approx(ndcg.compute().item(), rel=1e-14)


def test_users_without_targets_are_not_evaluated():
    metric = ClientRankingMetrics(2, (5,))
    metric.update(torch.tensor([8, 3]), torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([1]))
    evaluation = metric.evaluation("val", 4)
    assert evaluation.per_user["ndcg_at_5"].tolist() == [1.0]
    assert evaluation.client_of_user.tolist() == [1]
    assert evaluation.per_client["hr_at_5"].isnan().tolist() == [True, False]
    assert evaluation.summary["num_users"] == 1
    assert evaluation.summary["num_clients_without_users"] == 1
    assert (evaluation.stage, evaluation.round_index) == ("val", 4)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_no_user_at_all_is_nan():
    result = ClientRankingMetrics(2, (5,)).compute()
    assert result["per_client"]["mrr_at_5"].isnan().all()


def test_reset_forgets(script):
    metric = script.filled(ClientRankingMetrics(4, (5, 10)), torch.arange(200))
    metric.compute()
    metric.reset()
    metric.update(torch.tensor([1, 2]), torch.tensor([0, 0]), torch.tensor([0, 9]), torch.tensor([0, 1]))
    result = metric.compute()
    assert result["pooled"]["hr_at_5"] == 0.5
    assert result["items"].numel() == 0, "rankings were not given this time"


def test_reports_are_gathered_with_the_users():
    """Client 0 has two users, client 1 has one. Hits at 1 are 1, 0, 0, so means over clients are 1/2 and 0."""
    users, clients, rows = torch.arange(3), torch.tensor([0, 0, 1]), torch.arange(3)
    ranks, report = torch.tensor([0, 1, 1]), torch.tensor([[7.0], [8.0], [9.0]])
    whole, first, second = (ClientRankingMetrics(3, (1, 2), reported=("length",)) for _ in range(3))
    whole.update(users, clients, ranks, rows, report)
    expected = whole.evaluation("val", 0)
    assert expected.summary["hr_at_1/mean"] == 0.25
    assert expected.summary["hr_at_2/pooled"] == 1

    first.update(users[2:], clients[2:], ranks[2:], rows[:1], report[2:])
    second.update(users[:2], clients[:2], ranks[:2], rows[:2], report[:2])
    second.add(*first.take())
    evaluation = second.evaluation("val", 0)
    assert evaluation.reported["length"].tolist() == [7, 8, 9]
    assert_same(dict(evaluation.summary), dict(expected.summary))
    assert [len(part) for part in first.take()] == [0] * 6, "taken once"


def test_other_rankers_report_nothing():
    metric = ClientRankingMetrics(3, (1, 2), reported=("length",))
    metric.update(torch.arange(2), torch.tensor([0, 1]), torch.tensor([0, 1]), torch.arange(2))
    assert metric.evaluation("val", 0).reported["length"].isnan().all()
