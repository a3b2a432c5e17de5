"""Tuning: the search never loses, keeps to its time and its limits; what it writes is in force for its questions alone.

Costs are made up. The runs in the interpreter tell a tile's cost by the kernels that are launched with it, so they show
that a tile on trial gets from the file of rules into the launch.
"""

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effbert import kernels
from effbert.bench import climb, kernel_cases, tune
from effbert.bench.climb import Unusable
from effbert.kernels import eager, tiles
from effbert.kernels.aot import BuildError
from effbert.kernels.launch import recording
from effbert.kernels.tiles import RULES, Question, Rule

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
CASES = {case.name: case for case in kernel_cases.all_cases(kernel_cases.QUICK)}
LIMITS = climb.LIMITS
START = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}
ASKED = Question("linear_fwd", "sm_90", 2, 540)
powers = st.sampled_from([16, 32, 64, 128, 256])
gemm_tiles = st.fixed_dictionaries(
    {
        **dict.fromkeys(("BLOCK_M", "BLOCK_N", "BLOCK_K"), powers),
        "num_warps": st.sampled_from([1, 2, 4, 8, 16]),
        "num_stages": st.integers(1, 5),
    }
)
KERNELS = tuple(dict.fromkeys(rule.kernel for rule in RULES))
questions = st.builds(
    Question,
    st.sampled_from(KERNELS),
    st.sampled_from(["sm_80", "sm_90", "sm_100", "gfx942"]),
    st.sampled_from([2, 4]),
    st.integers(0, 5000),
)


@pytest.fixture(autouse=True)
def table_alone(monkeypatch):
    """No file in force, and one tile that these tests know for each op that they run."""
    dropout = Rule("dropout", {"ROWS": 4, "COLS": 16, "num_warps": 4})
    loss = Rule("soft_cross_entropy", {"ROWS": 4, "BLOCK": 8, "num_warps": 4})
    others = (rule for rule in RULES if rule.kernel not in (dropout.kernel, loss.kernel))
    monkeypatch.setattr(tiles, "RULES", (dropout, loss, *others))
    monkeypatch.delenv(tiles.ENVIRONMENT, raising=False)
    tiles.forget()
    yield
    tiles.forget()


def never():
    return False


def last(search):
    return {tuned.question: tuned for tuned in search}


def steps_from(best):
    """A cost with one valley: steps between a tile and `best`, plus what is always there."""

    def cost(tile):
        return 1 + sum(abs(math.log2(tile[name] / number)) for name, number in best.items() if name != "num_stages")

    return cost


@given(gemm_tiles)
def test_neighbours_are_one_step_away_and_within_limits(tile):
    found = climb.neighbours(tile, START)
    assert tile not in found and len({frozenset(other.items()) for other in found}) == len(found)
    for other in found:
        (name,) = (name for name in tile if tile[name] != other[name])
        assert LIMITS[name][0] <= other[name] <= LIMITS[name][1]
        assert abs(other[name] - tile[name]) == 1 if name == "num_stages" else other[name] / tile[name] in (0.5, 2)
    inside = sum(number not in LIMITS[name] for name, number in tile.items())
    assert len(found) == 2 * inside + (len(tile) - inside)


def test_numbers_without_limits_stay_near_where_they_began():
    start = {"ROWS": 1, "PROGRAMS": 12, "BLOCK": 2048}
    seen, waiting = [], [start]
    while waiting:
        tile = waiting.pop()
        if tile not in seen:
            seen.append(tile)
            waiting += climb.neighbours(tile, start)
    assert {tile["ROWS"] for tile in seen} == {1, 2, 4, 8}
    assert {tile["PROGRAMS"] for tile in seen} >= {1, 3, 6, 12, 24, 48, 96} and max(t["PROGRAMS"] for t in seen) <= 96
    assert {tile["BLOCK"] for tile in seen} == {2048 * 2**power for power in range(-3, 4)}
    assert climb.neighbours({}, {}) == []


@given(gemm_tiles, gemm_tiles)
def test_the_bottom_of_a_valley_is_reached(start, best):
    cost = steps_from(best)
    tuned = last(climb.climb(ASKED, start, lambda question, tile: cost(tile), never))[ASKED]
    assert {**tuned.tile, "num_stages": 0} == {**best, "num_stages": 0}
    assert (tuned.before_ms, tuned.after_ms) == (cost(start), 1)


@settings(max_examples=60)
@given(gemm_tiles, st.randoms(use_true_random=False), st.floats(0, 0.5))
def test_nothing_worse_than_the_start_and_nothing_unusable_is_kept(start, random, share):
    costs = {}

    def trial(question, tile):
        cost = costs.setdefault(frozenset(tile.items()), None if random.random() < share else random.uniform(1, 2))
        if cost is None and tile != start:
            raise Unusable(random.choice(["spills", "wrong result"]))
        return cost or 1.5

    steps = list(climb.climb(ASKED, start, trial, never))
    taken = [tuned.after_ms for tuned in steps]
    for before, after in itertools.pairwise(taken):
        assert after == before or after < (1 - climb.GAIN) * before
    final = steps[-1]
    assert final.after_ms == trial(ASKED, final.tile) and final.before_ms == taken[0]
    assert final.trials == len(steps) - 1 == len(costs) - 1
    assert sum(final.unusable.values()) == sum(
        cost is None for key, cost in costs.items() if key != frozenset(start.items())
    )
    for tile in climb.neighbours(final.tile, start):
        cost = costs[frozenset(tile.items())]
        assert cost is None or tile == start or cost >= (1 - climb.GAIN) * final.after_ms


@pytest.mark.parametrize(("cost", "kept"), [(0.985, False), (0.975, True)])
def test_a_gain_counts_from_two_percent(cost, kept):
    better = START | {"num_stages": 2}
    tuned = last(climb.climb(ASKED, START, lambda question, tile: cost if tile == better else 1.0, never))[ASKED]
    assert (tuned.tile == better) is kept


def test_a_gain_by_a_faster_clock_is_none():
    clock = itertools.count()
    tuned = last(climb.climb(ASKED, START, lambda question, tile: 1.0 if next(clock) < 3 else 0.5, never))[ASKED]
    assert tuned.tile == START


def test_a_start_that_is_unusable_is_passed_over():
    def measure(answers, question):
        if question == ASKED:
            raise Unusable("spills")
        return steps_from(START | {"num_warps": 8})(answers[question])

    other = ASKED._replace(size=180)
    assert last(climb.search({ASKED: START, other: START}, measure, never)).keys() == {other}


@given(st.floats(0, 60), st.floats(0.5, 5))
def test_no_trial_begins_after_the_end(budget, seconds):
    now, begun = [0.0], []

    def measure(answers, question):
        begun.append(now[0])
        now[0] += seconds
        return steps_from(START | {"BLOCK_M": 16, "num_warps": 16})(answers[question])

    starts = {ASKED._replace(size=size): START for size in (1, 2, 3)}
    for _ in climb.search(starts, measure, lambda: now[0] >= budget):
        pass
    assert all(at < budget + seconds for at in begun)  # a winner's rival is measured anew within its trial
    assert bool(begun) is (budget > 0)


def test_later_questions_are_measured_with_the_best_tiles_of_earlier_ones():
    other, seen = ASKED._replace(kernel="linear_dgrad"), []

    def measure(answers, question):
        seen.append((question, dict(answers)))
        return steps_from(START | {"num_warps": 8})(answers[question])

    found = last(climb.search({ASKED: START, other: START}, measure, never))
    assert found[other].tile["num_warps"] == 8
    assert all(answers[ASKED]["num_warps"] == 8 for question, answers in seen if question == other)


@given(st.lists(questions, min_size=1, max_size=6, unique=True), st.integers(0, 6000), st.data())
def test_rules_answer_their_questions_and_leave_what_lies_beyond(asked, size, data):
    answers = {}
    for question in asked:
        tile = tiles.answer(RULES, question)
        better = climb.neighbours(tile, tile)
        answers[question] = data.draw(st.sampled_from([tile, *better]))
    rules = climb.rules_of(answers, RULES)
    table = (*rules, *RULES)
    for question, tile in answers.items():
        assert tiles.answer(table, question) == tile
    for question in [*asked, *data.draw(st.lists(questions, max_size=3))]:
        question = question._replace(size=size)
        covering = sorted(other for other in answers if other[:3] == question[:3] and other.size >= size)
        answer = tiles.answer(table, question)
        if not covering:
            assert answer == tiles.answer(RULES, question)
        else:
            assert answer in (tiles.answer(RULES, question), answers[covering[0]])
    changed = {question.kernel for question, tile in answers.items() if tile != tiles.answer(RULES, question)}
    assert {rule.kernel for rule in rules} == changed


def test_rules_do_not_cross_a_border_of_the_table():
    short, middle, long, better = ({"BLOCK": 2**power} for power in range(4))
    table = (Rule("k", short, up_to=32), Rule("k", middle, "sm_9*", up_to=1024), Rule("k", long))
    rules = climb.rules_of({Question("k", "sm_90", 2, 3000): better}, table)
    for size, tile in (
        (1, short),
        (32, short),
        (33, middle),
        (1024, middle),
        (1025, better),
        (3000, better),
        (3001, long),
    ):
        assert tiles.answer((*rules, *table), Question("k", "sm_90", 2, size)) == tile
    assert tiles.answer((*rules, *table), Question("k", "sm_90", 4, 3000)) == long


@pytest.fixture
def few_tiles(monkeypatch):
    """Nothing but num_warps may change, from 4 to 2: runs in the interpreter are slow."""
    monkeypatch.setattr(climb, "LIMITS", {"num_warps": (2, 4), "COLS": (16, 16)})
    monkeypatch.setattr(climb, "REACH", 1)


def launched(name):
    """A timer: cheap where the kernel `name` is launched with few columns and few warps; nothing is run."""

    def timer(call):
        with recording("interpreter") as launches:
            call()
        tiles_seen = [{**launch.arguments, **launch.options} for launch in launches if launch.name == name]
        assert tiles_seen
        return sum(tile["COLS"] / 32 + tile["num_warps"] for tile in tiles_seen)

    return timer


def run(output, *names, seconds=1e9, timer=None, clock=itertools.count):
    setting = kernel_cases.Setting.of(CPU)
    ticks = clock()
    timer = launched("dropout_kernel") if timer is None else timer
    tune.tune([CASES[name] for name in names], setting, output, seconds, timer, lambda: next(ticks))
    return json.loads(output.read_text())


def test_a_run_in_the_interpreter_writes_rules_that_then_hold(tmp_path, monkeypatch, capsys, few_tiles):
    output = tmp_path / "sub" / "tiles.json"
    record = run(output, "dropout")
    (tuned,) = record["tuned"]
    question = Question(**tuned["question"])
    assert question == Question("dropout", "interpreter", 4, 24)
    assert tuned["cases"] == ["dropout"] and tuned["start"] == tiles.answer(tiles.RULES, question)
    assert tuned["tile"] == tuned["start"] | {"num_warps": 2} and tuned["after_ms"] < tuned["before_ms"]
    assert tuned["trials"] == 1 and tuned["unusable"] == {} and record["left_out"] == {}
    assert {"device", "driver", "versions", "dtype"} <= record.keys() and record["dtype"] == "float32"
    assert tiles.ENVIRONMENT not in os.environ
    said = capsys.readouterr().out
    assert "dropout, size 24: " in said and f"{output}: 1 better tiles for 1 of 1 questions" in said
    monkeypatch.setenv(tiles.ENVIRONMENT, str(output))
    assert tiles.choose("dropout", CPU, torch.float32, 24) == tuned["tile"]
    assert tiles.choose("dropout", CPU, torch.float32, 25) == tuned["start"]


def test_a_question_of_two_cases_is_measured_on_both(tmp_path):
    def timer(call):
        with recording("interpreter") as launches:
            call()
        (forward,) = (launch for launch in launches if launch.name == "soft_cross_entropy_fwd_kernel")
        return forward.options["num_warps"]

    cases = [CASES["soft_cross_entropy C=3"], CASES["soft_cross_entropy C=50"]]
    runner = tune.Runner(kernel_cases.Setting.of(CPU), (), tmp_path, timer)
    for case in (*cases, cases[0]):
        runner.add(case)
    three, fifty = (Question("soft_cross_entropy", "interpreter", 4, size) for size in (3, 50))
    assert runner.asking_cases(three) == [cases[0].name] * 2 and runner.asking_cases(fifty) == [cases[1].name]
    tile = runner.starts[three]
    assert runner.measure({three: tile}, three) == 2 * tile["num_warps"]
    assert runner.measure({three: tile | {"num_warps": 16}}, three) == 2 * 16
    assert runner.measure({three: tile | {"num_warps": 16}}, fifty) == runner.starts[fifty]["num_warps"]
    rules = [Rule(**rule) for rule in runner.rules({fifty: tile | {"num_warps": 16}})]
    assert tiles.answer(rules, three) == tile and tiles.answer(rules, fifty) == tile | {"num_warps": 16}


def stand_in(monkeypatch, behaviour):
    """The dropout op as `behaviour(tile, result)` has it, with a timer that finds fewer columns and rows the faster."""

    def dropout(x, dropout, backend):
        tile = tiles.choose("dropout", x.device, x.dtype, x.shape[-1])
        return behaviour(tile, eager.dropout(x, dropout))

    def timer(call):
        tile = tiles.choose("dropout", CPU, torch.float32, 24)
        return 10 + math.log2(tile["COLS"]) + math.log2(tile["ROWS"])

    monkeypatch.setattr(kernels, "dropout", dropout)
    monkeypatch.setitem(climb.LIMITS, "COLS", (1, 256))
    return timer


def test_tiles_with_wrong_results_or_without_a_build_are_passed_over_and_counted(tmp_path, monkeypatch):
    from triton.runtime.errors import OutOfResources

    def behaviour(tile, result):
        if tile["ROWS"] == 1:
            raise OutOfResources(2, 1, "shared memory")
        if tile["num_warps"] == 8:
            raise BuildError("does not build")
        return result * (2 if tile["COLS"] < 8 else 1)

    (tuned,) = run(tmp_path / "t.json", "dropout", timer=stand_in(monkeypatch, behaviour))["tuned"]
    assert tuned["tile"] == {"ROWS": 2, "COLS": 8, "num_warps": 4}
    assert tuned["unusable"] == {"OutOfResources": 2, "wrong result": 1, "BuildError": 1}


def test_another_error_ends_the_run_and_nothing_found_is_lost(tmp_path, monkeypatch):
    def behaviour(tile, result):
        if tile["COLS"] == 4:
            raise KeyError("a mistake in a kernel")
        return result

    output = tmp_path / "t.json"
    with pytest.raises(KeyError):
        run(output, "dropout", timer=stand_in(monkeypatch, behaviour))
    assert tiles.ENVIRONMENT not in os.environ
    (rule,) = tiles.read_rules(output)
    assert rule.tile["COLS"] == 8 and rule.up_to == 24
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]


def test_a_case_that_does_not_run_is_left_out_with_its_reason(tmp_path, monkeypatch, capsys):
    def behaviour(tile, result):
        return result * 2

    record = run(tmp_path / "t.json", "dropout", timer=stand_in(monkeypatch, behaviour))
    assert record["left_out"] == {"dropout": "wrong result"} and record["rules"] == record["tuned"] == []
    assert "left out: dropout: wrong result" in capsys.readouterr().out


def test_without_time_there_is_a_file_all_the_same(tmp_path):
    record = run(tmp_path / "t.json", "dropout", seconds=0)
    assert record["left_out"] == {"dropout": "no time left"}
    assert tiles.read_rules(tmp_path / "t.json") == ()


def test_an_earlier_file_is_gone_on_from_and_never_overwritten_unasked(tmp_path, monkeypatch, few_tiles):
    output = tmp_path / "t.json"
    tile = {"ROWS": 8, "COLS": 64, "num_warps": 4}
    reduce = Rule("reduce", {"BLOCK": 128, "num_warps": 2})
    content = json.dumps({"rules": [asdict(rule) for rule in (Rule("dropout", tile), reduce)]})
    output.write_text(content)
    with pytest.raises(
        FileExistsError, match=r"t\.json exists: choose a new --output, or go on from it: EFFBERT_TILES="
    ):
        run(output, "dropout")
    assert output.read_text() == content
    monkeypatch.setenv(tiles.ENVIRONMENT, str(output))
    (tuned,) = run(output, "dropout")["tuned"]
    assert tuned["start"] == tile and tuned["tile"] == tile | {"num_warps": 2}
    assert os.environ[tiles.ENVIRONMENT] == str(output)
    assert tiles.choose("dropout", CPU, torch.float32, 24) == tuned["tile"]
    assert tiles.choose("dropout", CPU, torch.float32, 10**6) == tile
    assert tiles.choose("reduce", CPU, torch.float32, 0) == reduce.tile


def test_spilling_tiles_are_refused_except_where_the_table_has_them(tmp_path, monkeypatch, few_tiles):
    def build_all(launches, architecture):
        built.extend(launch.options["num_warps"] for launch in launches)
        return {str(launch.options): (SimpleNamespace(stack=8), 1) for launch in launches}

    built = []
    monkeypatch.setattr(tune.aot, "TARGETS", {"interpreter": None})
    monkeypatch.setattr(tune.aot, "compilation_key", lambda launch, architecture: str(launch.options))
    monkeypatch.setattr(tune.aot, "build_all", build_all)
    (tuned,) = run(tmp_path / "t.json", "dropout")["tuned"]
    assert tuned["tile"] == tuned["start"] and tuned["trials"] == 1
    assert tuned["unusable"] == {"spills": 1} and built == [4, 4, 2, 2]  # forward and backward


def test_bad_arguments_are_one_line(tmp_path, monkeypatch):
    output = ["--output", str(tmp_path / "t.json")]
    with pytest.raises(ValueError, match=r"^--ops mlp,mpl: no such op mpl; known: mlp_block, score_mse, "):
        tune.main([*output, "--ops", "mlp,mpl"])
    monkeypatch.setattr(tune, "device_to_measure", lambda: CPU)
    with pytest.raises(ValueError, match=r"^no GPU: tiles are tuned on the GPU that they are for"):
        tune.main(output)
    assert not list(tmp_path.iterdir())


def test_the_command_needs_no_search_libraries_and_ends_with_one_line_without_a_gpu(tmp_path):
    program = (
        "import sys, runpy; sys.modules |= dict.fromkeys(('tyro', 'optuna', 'datasets'));"
        f"sys.argv = ['tune', '--output', {str(tmp_path / 't.json')!r}];"
        "runpy.run_module('effbert.bench.tune', run_name='__main__')"
    )
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.strip().splitlines()[-1].startswith("bench.tune: no GPU: ") and "Traceback" not in done.stderr


@pytest.mark.gpu
def test_a_gpu_is_tuned(tmp_path):
    output = tmp_path / "t.json"
    assert tune.main(["--output", str(output), "--ops", "dropout,soft_cross_entropy", "--minutes", "0.5"]) == 0
    record = json.loads(output.read_text())
    assert record["left_out"] == {} and record["tuned"] and record["driver"]
    for tuned in record["tuned"]:
        assert tuned["trials"] > 0 and 0 < tuned["after_ms"] <= tuned["before_ms"]
    tiles.read_rules(output)
