"""The table of tiles: it answers every question, the first rule that matches holds, and a file is put before it."""

import fnmatch
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effbert.kernels import tiles
from effbert.kernels.launch import recording
from effbert.kernels.tiles import RULES, Question, Rule, few_compilations, read_rules

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942", "interpreter")
KERNELS = tuple(dict.fromkeys(rule.kernel for rule in RULES))
LARGEST = 2**62
CPU = torch.device("cpu")
questions = st.builds(
    Question,
    st.sampled_from(KERNELS),
    st.sampled_from([*ARCHITECTURES, "sm_89", "gfx1100"]),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(0, LARGEST),
)


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.delenv(tiles.ENVIRONMENT, raising=False)
    tiles.forget()
    yield
    tiles.forget()


@pytest.fixture
def in_force(tmp_path, monkeypatch):
    """Put rules, or any text, in force through a file; returns its path."""

    def write(content):
        path = tmp_path / "tiles.json"
        if not isinstance(content, str):
            content = json.dumps({"device": "x", "rules": [asdict(rule) for rule in content]})
        path.write_text(content)
        monkeypatch.setenv(tiles.ENVIRONMENT, str(path))
        return path

    return write


def borders(kernel):
    """Sizes at which the answer for `kernel` may change, with those beside them and the extremes."""
    limits = {rule.up_to for rule in RULES if rule.kernel == kernel and rule.up_to is not None}
    return sorted({0, 1, *limits, *(limit + 1 for limit in limits), LARGEST})


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_has_a_tile_for_everything_and_no_rule_is_in_vain(kernel):
    used = set()
    for architecture in ARCHITECTURES:
        for itemsize in (2, 4):
            for size in borders(kernel):
                tile = tiles.answer(RULES, Question(kernel, architecture, itemsize, size))
                used.add(id(tile))
    assert used == {id(rule.tile) for rule in RULES if rule.kernel == kernel}


@pytest.mark.parametrize("kernel", KERNELS)
def test_tiles_of_a_kernel_have_the_same_names_and_numbers_that_triton_takes(kernel):
    found = [rule.tile for rule in RULES if rule.kernel == kernel and rule.tile]
    assert len({frozenset(tile) - {"maxnreg"} for tile in found}) <= 1
    for tile in found:
        for name, number in tile.items():
            assert number >= 1
            if name not in ("num_stages", "PROGRAMS", "maxnreg"):
                assert number & (number - 1) == 0, (name, number)


@pytest.mark.parametrize("architecture", ["gfx942", "gfx90a", "interpreter"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_registers_are_limited_on_nvidia_alone(kernel, architecture):
    for itemsize in (2, 4):
        for size in borders(kernel):
            assert "maxnreg" not in tiles.answer(RULES, Question(kernel, architecture, itemsize, size))


@given(questions)
def test_the_first_rule_that_matches_holds(question):
    matching = [
        rule
        for rule in RULES
        if rule.kernel == question.kernel
        and fnmatch.fnmatchcase(question.architecture, rule.architecture)
        and (rule.itemsize is None or rule.itemsize == question.itemsize)
        and (rule.up_to is None or rule.up_to >= question.size)
    ]
    assert tiles.answer(RULES, question) is matching[0].tile


def test_each_condition_of_a_rule_decides():
    rule = Rule("k", {}, "sm_9*", 2, 64)
    assert rule.matches("k", "sm_90", 2, 64)
    for other in (("l", "sm_90", 2, 64), ("k", "sm_80", 2, 64), ("k", "sm_90", 4, 64), ("k", "sm_90", 2, 65)):
        assert not rule.matches(*other)
    assert Rule("k", {}).matches("k", "anything", 3, LARGEST)


def test_a_choice_follows_device_dtype_and_size():
    interpreted = tiles.choose("linear_fwd", CPU, torch.float32, 540)
    with recording("sm_90"):
        half = tiles.choose("linear_fwd", torch.device("meta"), torch.bfloat16, 540)
        full = tiles.choose("linear_fwd", torch.device("meta"), torch.float32, 540)
    assert interpreted == tiles.answer(RULES, Question("linear_fwd", "interpreter", 4, 540))
    assert half == tiles.answer(RULES, Question("linear_fwd", "sm_90", 2, 540))
    assert full == tiles.answer(RULES, Question("linear_fwd", "sm_90", 4, 540))
    assert half != full != interpreted


@pytest.mark.parametrize(
    "rows, cols, architecture, multiprocessors, dtype, together",
    [
        (8192, 544, "sm_90", 132, torch.bfloat16, 4),  # 128 programs for 132
        (64 * 99, 544, "sm_90", 132, torch.bfloat16, 4),
        (64 * 99 - 64, 544, "sm_90", 132, torch.bfloat16, 0),  # fewer than three quarters
        (8192, 544, "sm_80", 108, torch.bfloat16, 0),  # the second round has 20 of 108
        (32768, 544, "sm_80", 108, torch.bfloat16, 8),
        (8192, 2048, "sm_90", 132, torch.float16, 2),
        (8192, 4096, "sm_90", 132, torch.float16, 1),
        (8192, 8192, "sm_90", 132, torch.float16, 0),  # a row does not fit
        (8192, 16, "sm_90", 132, torch.float16, 64),
        (8192, 544, "sm_90", 132, torch.float32, 0),
        (8192, 544, "gfx942", 80, torch.bfloat16, 0),
        (0, 544, "sm_90", 132, torch.bfloat16, 4),
    ],
)
def test_programs_of_whole_rows_must_fill_the_card(rows, cols, architecture, multiprocessors, dtype, together):
    with recording(architecture, multiprocessors):
        tile = tiles.choose_rows("row_block_fwd", torch.device("meta"), dtype, 4, rows, cols)
    assert tile.get("ROWS", 0) == together and "ELEMENTS" not in tile


def test_few_compilations_hold_in_every_thread_and_only_inside():
    def rows_together():
        with recording("sm_90", 132):
            return bool(tiles.choose_rows("row_block_fwd", torch.device("meta"), torch.bfloat16, 4, 8192, 544))

    with few_compilations(), few_compilations(), ThreadPoolExecutor(1) as pool:
        assert not rows_together() and not pool.submit(rows_together).result()
    assert rows_together()


def test_an_unknown_kernel_is_one_line():
    with pytest.raises(ValueError, match=r"^no tile for nosuch on interpreter: .* has no rule that matches$"):
        tiles.choose("nosuch", CPU, torch.float32, 1)


def test_the_questions_asked_are_told_once_and_in_order():
    for size in (7, 3, 7):
        tiles.choose("dropout", CPU, torch.float16, size)
    first = Question("dropout", "interpreter", 2, 7), Question("dropout", "interpreter", 2, 3)
    assert tiles.asked() == first
    tiles.forget()
    assert tiles.asked() == ()
    tiles.choose("dropout", CPU, torch.float16, 3)
    assert tiles.asked() == first[1:]


def test_a_file_is_put_before_the_table(in_force, monkeypatch):
    tile = {"ROWS": 2, "COLS": 32, "num_warps": 1}
    table = tiles.choose("dropout", CPU, torch.float32, 100)
    in_force([Rule("dropout", tile, "interpreter", 4, 100)])
    assert tiles.choose("dropout", CPU, torch.float32, 100) == tile
    for dtype, size in ((torch.float32, 101), (torch.float16, 100)):
        assert tiles.choose("dropout", CPU, dtype, size) == table != tile
    monkeypatch.delenv(tiles.ENVIRONMENT)
    assert tiles.choose("dropout", CPU, torch.float32, 100) == table


def test_the_whole_table_survives_a_file(in_force):
    assert tiles.read_rules(in_force(RULES)) == RULES


def test_a_file_is_read_once_until_forgotten(in_force):
    path = in_force([Rule("dropout", {"ROWS": 2, "COLS": 32, "num_warps": 1})])
    assert tiles.choose("dropout", CPU, torch.float32, 1)["ROWS"] == 2
    path.write_text("gone")
    assert tiles.choose("dropout", CPU, torch.float32, 1)["ROWS"] == 2
    tiles.forget()
    with pytest.raises(ValueError, match="no file of tile rules"):
        tiles.choose("dropout", CPU, torch.float32, 1)


DROPOUT = {"ROWS": 4, "COLS": 16, "num_warps": 4}
BROKEN = {
    "empty": "",
    "half": '{"rules": [{"kernel": "drop',
    "another kind of file": "[1, 2]",
    "no rules": '{"cases": []}',
    "rules that are a number": '{"rules": 3}',
    "rules that are text": '{"rules": "dropout"}',
    "no tile": '{"rules": [{"kernel": "dropout"}]}',
    "an unknown field": json.dumps({"rules": [{"kernel": "dropout", "tile": DROPOUT, "speed": 1}]}),
    "an unknown kernel": json.dumps({"rules": [{"kernel": "nosuch", "tile": DROPOUT}]}),
    "a tile that is a number": json.dumps({"rules": [{"kernel": "dropout", "tile": 3}]}),
    "a tile of another kernel": json.dumps({"rules": [{"kernel": "reduce", "tile": DROPOUT}]}),
    "a tile with a number missing": json.dumps({"rules": [{"kernel": "dropout", "tile": {"ROWS": 4, "COLS": 16}}]}),
    "a tile with text": json.dumps({"rules": [{"kernel": "dropout", "tile": DROPOUT | {"ROWS": "4"}}]}),
    "a tile with zero": json.dumps({"rules": [{"kernel": "dropout", "tile": DROPOUT | {"ROWS": 0}}]}),
    "a size that is text": json.dumps({"rules": [{"kernel": "dropout", "tile": DROPOUT, "up_to": "540"}]}),
    "a size below zero": json.dumps({"rules": [{"kernel": "dropout", "tile": DROPOUT, "up_to": -1}]}),
    "an architecture that is a number": json.dumps(
        {"rules": [{"kernel": "dropout", "tile": DROPOUT, "architecture": 90}]}
    ),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_one_clear_line(content, in_force):
    path = in_force(content)
    with pytest.raises(ValueError, match="no file of tile rules") as refused:
        tiles.choose("dropout", CPU, torch.float32, 1)
    line = str(refused.value)
    assert line.startswith(f"EFFBERT_TILES={path} ") and "effbert kernels tune" in line and "\n" not in line


def test_bytes_that_are_no_text_are_one_clear_line(in_force):
    in_force("").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no file of tile rules"):
        tiles.choose("dropout", CPU, torch.float32, 1)


def test_a_missing_file_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv(tiles.ENVIRONMENT, str(tmp_path / "nowhere.json"))
    with pytest.raises(ValueError, match=r"nowhere\.json is no file of tile rules \(.*No such file"):
        tiles.choose("dropout", CPU, torch.float32, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(BLOCK_M=48), "powers of two"),
        (dict(num_warps=3), "powers of two"),
        (dict(BLOCK_M=2**20), "two blocks at most"),
        (dict(num_warps=64), "num_warps is at most 32"),
        (dict(maxnreg=256), "maxnreg at most 255"),
    ],
)
def test_tiles_that_no_kernel_can_have_are_refused_in_a_line(tmp_path, changes, message):
    known = next(rule for rule in RULES if rule.kernel == "attention_fwd" and "maxnreg" in rule.tile)
    file = tmp_path / "tiles.json"
    file.write_text(json.dumps({"rules": [{"kernel": "attention_fwd", "tile": known.tile | changes}]}))
    with pytest.raises(ValueError, match=message) as caught:
        read_rules(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_all_rules_of_the_table_are_such_as_a_file_may_have(tmp_path):
    file = tmp_path / "tiles.json"
    file.write_text(json.dumps({"rules": [asdict(rule) for rule in RULES]}))
    assert read_rules(file) == RULES
