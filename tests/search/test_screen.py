"""What discards a candidate before it trains: filters, latency; what they find, who goes, and what is left of it."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from effbert.config import SearchConfig, SearchStage
from effbert.kernels import Expression
from effbert.search import proxies, screen
from effbert.search.agreement import of_filter
from effbert.search.latency import Latencies
from effbert.search.population import Evaluator, Outcome
from effbert.search.progress import Reporter
from effbert.search.sampler import RandomSampler
from effbert.search.screen import Screen, check_latency, make_screen
from effbert.search.stages import search_stage
from effbert.search.study import Study
from effbert.search.workers import Workers
from effbert.step import general_lesson
from effbert.workspace import model_inputs

HALF = SearchStage(cohort=2, filter="parameters").kept


def changed(workspace, folder=None, **changes):
    found = dataclasses.replace(workspace, config=dataclasses.replace(workspace.config, **changes))
    return dataclasses.replace(found, folder=folder) if folder else found


def test_components_are_counted_by_the_variance_they_carry():
    torch.manual_seed(0)
    assert proxies.components(torch.outer(torch.randn(50), torch.randn(8)), 0.99) == 1
    assert proxies.components(torch.randn(5000, 8), 0.99) == 8
    assert proxies.components(torch.randn(5000, 8), 0.5) in (4, 5)
    assert proxies.components(torch.ones(50, 8), 0.99) == 0
    spread = torch.linalg.qr(torch.randn(50, 50))[0][:, :2]
    spread = spread - spread.mean(dim=0)
    scaled = torch.linalg.qr(spread)[0] * torch.tensor([10.0, 1.0])
    assert proxies.components(scaled, 0.99) == 1 and proxies.components(scaled, 0.991) == 2


def test_the_first_linear_of_an_expression_is_cut_out():
    whole = Expression.parse("tanh(linear2_2(gelu(linear2_2(max(x,tanh(x)),wb1)),wb2))")
    assert str(proxies.up_to_first_linear(whole)) == "linear2_2(max(x,tanh(x)),wb1)"


def test_w_pca_is_that_of_the_extracted_candidate(workspace, supernet, architectures):
    batch = workspace.general_plan(1.0, 8, 0)[0]
    for architecture in architectures:
        model, seen = supernet.extract(architecture).eval(), []

        for layer, expression in zip(model.layers, architecture.layers, strict=True):
            for mlp in layer.mlps:
                mlp.register_forward_hook(
                    lambda mlp, arguments, _, expression=expression, seen=seen: seen.append(
                        torch.nn.functional.linear(
                            _before_first_linear(expression, arguments[0]), mlp.dense1.weight, mlp.dense1.bias
                        )
                    )
                )
        with torch.no_grad():
            model.trace(*model_inputs(batch))
        real = batch.attention_mask.bool()
        counted = sum(proxies.components(inner[real], 0.99) for inner in seen)
        assert len(seen) == sum(structure.stacks for structure in architecture.structures)
        parameters = proxies.make_filter("parameters", workspace, supernet)(architecture)
        assert proxies.w_pca(supernet, architecture, batch) == counted * parameters


def _before_first_linear(expression, x):
    """pre(x), by plain recursion."""
    from effbert.kernels.eager import ACTIVATIONS, binary

    def value(node):
        if node.op == "x":
            return x
        arguments = [value(argument) for argument in node.args]
        return ACTIVATIONS[node.op](*arguments) if len(arguments) == 1 else binary(node.op, *arguments, "truncate")

    (first,) = (node for node in expression.nodes if node.op == "linear" and node.args[1].op == "wb1")
    return value(first.args[0])


def test_the_supernet_filter_is_minus_the_loss_of_the_extracted_candidate(workspace, supernet, architectures):
    score = proxies.make_filter("supernet", workspace, supernet)
    size = workspace.config.supernet.per_device_train_batch_size
    batch, lesson = workspace.general_plan(1.0, size, 0)[0], general_lesson(workspace)
    for architecture in architectures[:2]:
        model = supernet.extract(architecture).eval()
        trace_of = lambda batch, number, targets, model=model: model.trace(*model_inputs(batch), targets=targets)  # noqa: E731
        with torch.no_grad():
            loss = lesson.loss(trace_of, model.fit_dense)(batch, 0)
        assert score(architecture) == pytest.approx(-float(loss), rel=1e-5)


def test_no_filter_and_an_unknown_one(workspace, supernet):
    assert proxies.make_filter("none", workspace, supernet) is None
    with pytest.raises(ValueError, match="unknown filter 'best': one of none, parameters"):
        proxies.make_filter("best", workspace, supernet)
    assert make_screen(workspace, supernet, workspace.config.stage1) is None


def test_a_filter_discards_the_worst_and_ties_go_by_key():
    filter_only = Screen(None, 0.0, lambda architecture: 0.0, HALF)
    found = {number: {screen.FILTER: score} for number, score in enumerate([3.0, 1.0, 2.0, 1.0])}
    gone = filter_only.discard(found, {number: str(9 - number) for number in found})
    assert gone == {1: "among the worst by the filter", 3: "among the worst by the filter"}
    one = filter_only.discard({7: {screen.FILTER: 0.0}}, {7: "key"})
    assert one == {}


def test_latency_goes_first_and_the_filter_chooses_among_the_rest():
    both = Screen(None, 10.0, lambda architecture: 0.0, HALF)
    found = {
        number: {screen.LATENCY: taken, screen.FILTER: score}
        for number, (taken, score) in enumerate([(11, 9.0), (9, 1.0), (8, 2.0)])
    }
    gone = both.discard(found, {number: str(number) for number in found})
    assert gone == {0: "takes 11.00 ms, over --max_latency_ms 10", 1: "among the worst by the filter"}


def test_a_stage_trains_only_what_the_filter_left_and_a_resume_does_not_look_again(tmp_path, space):
    settings = SearchStage(num_candidates=6, cohort=3, sampler="random", filter="parameters", filter_share=0.34)
    looked, trained = [], []

    def look(architecture):
        looked.append(architecture)
        return float(len(looked))

    def evaluate(members, share):
        trained.extend(number for number, _ in members)
        return [(number, Outcome(float(number), {"parameters": 1})) for number, _ in members]

    def run():
        evaluator = Evaluator(len, evaluate, Screen(None, 0.0, look, settings.kept))
        with Workers(tmp_path) as workers, Reporter() as reporter:
            stage = Study(tmp_path, workers=workers).stage("stage1")
            search_stage(stage, "stage1", space, settings, 0, evaluator, None, reporter, workers)
            return stage.evaluations()

    found = run()
    states = [evaluation.state for evaluation in found]
    assert states == ["pruned", "complete", "complete"] * 2 and trained == [1, 2, 4, 5] and len(looked) == 6
    assert found[0].attrs["discarded"] == "among the worst by the filter" and found[0].attrs["rungs"] == []
    assert run() == found and len(looked) == 6
    assert of_filter(found, screen.FILTER).estimate == pytest.approx(1.0) and of_filter(found[:2], "x") is None


def run_stage(folder, space, settings, evaluator):
    with Workers(folder) as workers, Reporter() as reporter:
        stage = Study(folder, workers=workers).stage("stage1")
        best = search_stage(stage, "stage1", space, settings, 0, evaluator, None, reporter, workers)
        return best, stage.evaluations()


def test_of_equal_candidates_the_one_that_costs_less_wins_where_costs_count(tmp_path, space):
    settings = SearchStage(num_candidates=3, cohort=3, sampler="random")

    def evaluate(members, share):
        return [(number, Outcome(0.5, {"parameters": 1, "flops": 9 - number})) for number, _ in members]

    for minimize, number in (((), 0), (("flops",), 2)):
        best, found = run_stage(tmp_path, space, settings, Evaluator(len, evaluate, None, minimize))
        assert str(best) == found[number].architecture


@pytest.mark.parametrize("apart", [False, True])
def test_a_rung_that_tells_nothing_apart_says_so(tmp_path, space, capsys, apart):
    settings = SearchStage(num_candidates=4, cohort=4, sampler="random", rungs=(0.5, 1.0))

    def evaluate(members, share):
        return [(number, Outcome(0.5 + apart * number / 10, {"parameters": 1})) for number, _ in members]

    run_stage(tmp_path, space, settings, Evaluator(len, evaluate))
    said = "0.5 of the budget tells none of 4 candidates apart: 2 go on by their names alone"
    assert (said in " ".join(capsys.readouterr().out.split())) != apart


def test_candidates_of_one_front_are_told_apart_by_their_values(tmp_path, space, capsys):
    settings = SearchStage(num_candidates=4, cohort=4, sampler="random", rungs=(0.5, 1.0))

    def evaluate(members, share):
        return [(n, Outcome(0.9 - n / 10, {"parameters": 1, "flops": 9 - n})) for n, _ in members]

    _, found = run_stage(tmp_path, space, settings, Evaluator(len, evaluate, None, ("flops",)))
    assert [evaluation.state for evaluation in found] == ["complete", "complete", "pruned", "pruned"]
    assert "by their names alone" not in " ".join(capsys.readouterr().out.split())


def test_where_costs_count_a_sampler_hears_anew_of_those_that_later_ones_beat(tmp_path, space, monkeypatch):
    settings = SearchStage(num_candidates=4, cohort=1, sampler="random")
    values, heard = [0.1, 0.2, 0.15, 0.4], []
    monkeypatch.setattr(RandomSampler, "revise", lambda self, ranks: heard.append(ranks))

    def evaluate(members, share):
        return [(number, Outcome(values[number], {"parameters": 1, "flops": 9 - number})) for number, _ in members]

    run_stage(tmp_path, space, settings, Evaluator(len, evaluate, None, ("flops",)))
    assert heard == [[0.0], [-1.0, 0.0], [-1.0, 0.0, 0.0], [-2.0, -1.0, -1.0, 0.0]]


def test_a_stage_whose_candidates_are_all_too_slow_says_so(tmp_path, space):
    settings = SearchStage(num_candidates=2, cohort=2, sampler="random")
    slow = Evaluator(len, None, Screen(SimpleNamespace(of=lambda architecture: 11.0), 10.0, None, HALF))
    with pytest.raises(ValueError, match=r"stage1: every candidate was discarded .* takes 11\.00 ms, over "):
        run_stage(tmp_path, space, settings, slow)


def test_the_winner_of_the_stage_before_is_never_discarded(tmp_path, space, architectures):
    settings = SearchStage(num_candidates=3, cohort=3, sampler="random", filter="parameters", filter_share=0.9)

    def evaluate(members, share):
        return [(number, Outcome(0.5, {"parameters": 1})) for number, _ in members]

    evaluator = Evaluator(len, evaluate, Screen(None, 0.0, lambda architecture: 1.0, settings.kept))
    with Workers(tmp_path) as workers, Reporter() as reporter:
        stage = Study(tmp_path, workers=workers).stage("stage2")
        search_stage(stage, "stage2", space, settings, 0, evaluator, architectures[0], reporter, workers)
        states = [evaluation.state for evaluation in stage.evaluations()]
    assert states[0] == "complete" and sorted(states[1:]) == ["complete", "pruned"]


def test_a_measured_latency_is_read_back(workspace, architectures, tmp_path):
    here = changed(workspace, tmp_path)
    first = Latencies(here).of(architectures[0])
    assert first > 0
    assert json.loads((tmp_path / "latency.json").read_text()) == {"cpu": {str(architectures[0]): first}}
    (tmp_path / "latency.json").write_text(json.dumps({"cpu": {str(architectures[0]): 123.0}}))
    assert Latencies(here).of(architectures[0]) == 123.0


def test_a_latency_that_nothing_reaches_is_said_before_anything_trains(workspace, space, tmp_path):
    with pytest.raises(ValueError, match=r"--max_latency_ms 1e-06: of 256 archite.* fastest takes") as caught:
        check_latency(changed(workspace, tmp_path, max_latency_ms=1e-6), space)
    assert "\n" not in str(caught.value)
    check_latency(changed(workspace, tmp_path, max_latency_ms=1e6), space)
    check_latency(workspace, space)


@pytest.mark.parametrize("seed", range(5))
def test_a_latency_that_few_architectures_reach_is_not_refused(workspace, space, tmp_path, monkeypatch, seed):
    def stacks(architecture):
        return sum(structure.stacks for structure in architecture.structures)

    rng = np.random.default_rng(seed)
    limit = float(np.quantile([stacks(space.sample(rng)) for _ in range(300)], 0.05))
    monkeypatch.setattr(Latencies, "of", lambda self, architecture: float(stacks(architecture)))
    check_latency(changed(workspace, tmp_path, max_latency_ms=limit, seed=seed), space)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda: SearchStage(filter_share=1.0), "filter_share is 1.0"),
        (lambda: SearchConfig("", stage3=SearchStage(filter="w-pca", cohort=2)), "stage3.filter is w-pca"),
        (lambda: SearchStage(filter="w-pca"), "discard nobody of a cohort of 1"),
        (lambda: SearchStage(filter="w-pca", cohort=3, filter_share=0.1), "discard nobody of a cohort of 3"),
        (lambda: SearchConfig("", max_latency_ms=-1.0), "max_latency_ms is -1.0"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        settings()
