"""Tile sizes of every kernel, in one table: kernel, architecture, bytes an element, problem size -> block sizes.

The table below is what runs by default. `effbert kernels tune` measures on the GPU at hand and writes a file of rules
of the same form; `EFFBERT_TILES=FILE` puts that file before the table. Nothing is ever measured during training.
"""

import fnmatch
import functools
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from effbert.kernels.launch import architecture, ceil_div, multiprocessors

ENVIRONMENT = "EFFBERT_TILES"
ANY_NUMBER = {"num_stages", "maxnreg", "PROGRAMS", "ELEMENTS"}  # all else of a tile is a power of two
MOST_ELEMENTS = 2**20  # of a tensor in Triton
SHORT_LOADS = 256  # more than any two heads have columns (`score_mse_direct`)
FILLED = 0.75  # of the multiprocessors' time, that programs of many rows must use (`choose_rows`)


class Question(NamedTuple):
    """What decides a tile: kernel, architecture ("sm_90", ...), bytes an element, problem size."""

    kernel: str
    architecture: str
    itemsize: int
    size: int


_asked: dict[Question, None] = {}


@dataclass(frozen=True)
class Rule:
    """`tile` (block sizes by their tl.constexpr names, num_warps, num_stages) for one kernel where the rest matches.

    architecture: pattern such as "sm_[91]*" (sm_90, sm_100) or "gfx9*"; "interpreter" is the CPU, whose tiles are small
    so that tests meet several of them. itemsize: bytes an element, None for any. up_to: largest problem size it holds
    for, None for any; what counts as the size of a problem is said beside each kernel's rules.
    """

    kernel: str
    tile: dict[str, int]
    architecture: str = "*"
    itemsize: int | None = None
    up_to: int | None = None

    def matches(self, kernel: str, architecture: str, itemsize: int, size: int) -> bool:
        """Whether this rule answers the question."""
        return (
            self.kernel == kernel
            and fnmatch.fnmatchcase(architecture, self.architecture)
            and self.itemsize in (None, itemsize)
            and (self.up_to is None or size <= self.up_to)
        )


def _gemm(m: int, n: int, k: int, num_warps: int, num_stages: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": num_warps, "num_stages": num_stages}


def _weights(rows: int, cols: int, depth: int) -> dict[str, int]:
    return {"ROWS": rows, "COLS": cols, "DEPTH": depth}


def _pair(m: int, n: int, num_warps: int, num_stages: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": num_warps, "num_stages": num_stages}


def _gram(block: int, columns: int, num_warps: int, num_stages: int) -> dict[str, int]:
    return {"BLOCK": block, "COLUMNS": columns, "num_warps": num_warps, "num_stages": num_stages}


def _whole(m: int, e: int, k: int, num_warps: int, num_stages: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_E": e, "BLOCK_K": k, "num_warps": num_warps, "num_stages": num_stages}


def _rows(m: int, n: int, k: int, elements: int, num_warps: int, num_stages: int) -> dict[str, int]:
    return _gemm(m, n, k, num_warps, num_stages) | {"ELEMENTS": elements}


# Left to itself NVIDIA's assembler may spill 8 to 40 bytes so that more programs fit at once; with this, which is all
# that 8 warps or fewer can have, it spills only where these do not suffice.
ALL_REGISTERS = {"maxnreg": 255}

# The first rule that matches holds.
RULES: tuple[Rule, ...] = (
    # score_mse_direct: size = columns of a student's and a teacher's tile together, and SHORT_LOADS more where many
    # loads take less than 8 elements, each with an address of its own; BLOCK_M held, BLOCK_N going by. IEEE fp32 has no
    # matrix instructions and keeps its operands in registers: small tiles, 8 warps (16 would have half the registers
    # each). At 192 columns a head of 64 meets one of 128, at 256 both have 128.
    Rule("score_mse_direct", dict(BLOCK_M=32, BLOCK_N=16, num_warps=4, num_stages=1), "interpreter"),
    Rule("score_mse_direct", dict(BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=1), "gfx*", itemsize=4, up_to=128),
    Rule("score_mse_direct", dict(BLOCK_M=32, BLOCK_N=16, num_warps=4, num_stages=1), "gfx*", itemsize=4),  # 32: spills
    Rule("score_mse_direct", _pair(64, 32, 4, 1), "gfx*", up_to=SHORT_LOADS + 192),
    Rule("score_mse_direct", _pair(32, 32, 4, 1), "gfx*"),
    Rule("score_mse_direct", _pair(32, 16, 8, 1) | ALL_REGISTERS, itemsize=4, up_to=192),
    Rule("score_mse_direct", _pair(16, 16, 8, 1) | ALL_REGISTERS, itemsize=4),
    Rule("score_mse_direct", dict(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=1), "sm_90*", up_to=128),
    Rule("score_mse_direct", _pair(128, 32, 8, 1) | ALL_REGISTERS, "sm_90*", up_to=192),
    Rule("score_mse_direct", _pair(128, 16, 8, 1) | ALL_REGISTERS, "sm_90*", up_to=256),
    Rule("score_mse_direct", _pair(128, 32, 8, 1) | ALL_REGISTERS, "sm_10*", up_to=256),
    Rule("score_mse_direct", _pair(128, 32, 8, 1) | ALL_REGISTERS, up_to=96),  # two heads of 64 take 255 and spill
    Rule("score_mse_direct", _pair(128, 32, 8, 1), up_to=128),
    Rule("score_mse_direct", dict(BLOCK_M=64, BLOCK_N=32, num_warps=8, num_stages=1), up_to=256),
    Rule("score_mse_direct", _pair(64, 16, 8, 1) | ALL_REGISTERS, up_to=SHORT_LOADS + 128),
    Rule("score_mse_direct", _pair(32, 16, 8, 1) | ALL_REGISTERS),
    # score_mse_gram: size as above; BLOCK positions at a time, COLUMNS of the Gram matrices a program.
    Rule("score_mse_gram", _gram(32, 64, 4, 1), "interpreter"),
    Rule("score_mse_gram", _gram(32, 32, 4, 1), "gfx*", up_to=SHORT_LOADS + 192),
    Rule("score_mse_gram", _gram(16, 16, 4, 1), "gfx*"),
    Rule("score_mse_gram", _gram(16, 32, 8, 1) | ALL_REGISTERS, itemsize=4, up_to=256),
    Rule("score_mse_gram", _gram(16, 16, 8, 1) | ALL_REGISTERS, itemsize=4),
    Rule("score_mse_gram", _gram(64, 64, 8, 2), "sm_90*", up_to=128),
    Rule("score_mse_gram", _gram(64, 64, 8, 2) | ALL_REGISTERS, "sm_1*", up_to=128),
    Rule("score_mse_gram", _gram(64, 32, 8, 1) | ALL_REGISTERS, "sm_1*", up_to=256),
    Rule("score_mse_gram", _gram(64, 32, 8, 1), up_to=256),
    Rule("score_mse_gram", _gram(32, 16, 8, 1) | ALL_REGISTERS),
    # score_mse_bwd: size = elements of one gradient.
    Rule("score_mse_bwd", dict(BLOCK=128, num_warps=4), "interpreter"),
    Rule("score_mse_bwd", dict(BLOCK=2048, num_warps=4)),
    # dropout: size = columns; elementwise.
    Rule("dropout", dict(ROWS=8, COLS=32, num_warps=4), "interpreter"),
    Rule("dropout", dict(ROWS=32, COLS=64, num_warps=4)),
    # norm_fwd, norm_bwd: size = columns of the tile. PROGRAMS of a multiprocessor, each on ROWS rows at a time. One row
    # on one warp needs no sum across warps; its registers set how many warps fit.
    Rule("norm_fwd", dict(ROWS=8, PROGRAMS=1, num_warps=4), "interpreter"),
    Rule("norm_fwd", dict(ROWS=1, PROGRAMS=16, num_warps=1), up_to=576),
    Rule("norm_fwd", dict(ROWS=1, PROGRAMS=8, num_warps=2), up_to=1152),
    Rule("norm_fwd", dict(ROWS=1, PROGRAMS=4, num_warps=4), up_to=2304),
    Rule("norm_fwd", dict(ROWS=1, PROGRAMS=2, num_warps=8), up_to=4608),
    Rule("norm_fwd", dict(ROWS=1, PROGRAMS=1, num_warps=16)),
    Rule("norm_bwd", dict(ROWS=8, PROGRAMS=1, num_warps=4), "interpreter"),
    Rule("norm_bwd", dict(ROWS=1, PROGRAMS=12, num_warps=1), up_to=384),
    Rule("norm_bwd", dict(ROWS=1, PROGRAMS=5, num_warps=4), up_to=768),
    Rule("norm_bwd", dict(ROWS=1, PROGRAMS=4, num_warps=4), up_to=1152),
    Rule("norm_bwd", dict(ROWS=1, PROGRAMS=2, num_warps=8), up_to=2304),
    Rule("norm_bwd", dict(ROWS=1, PROGRAMS=1, num_warps=16)),
    # reduce: size is not used; a tile has BLOCK elements, parts times columns.
    Rule("reduce", dict(BLOCK=512, num_warps=4), "interpreter"),
    Rule("reduce", dict(BLOCK=2048, num_warps=4)),
    # linear_fwd: size = statements of the longer of its slots' sources, each of which may hold a tile in registers. M
    # is thousands of rows, so programs are plenty; 64 columns waste little of 540.
    Rule("linear_fwd", _gemm(32, 32, 32, 4, 1), "interpreter"),
    Rule("linear_fwd", _gemm(64, 32, 32, 8, 2), "sm_1*", itemsize=4),
    Rule("linear_fwd", _gemm(64, 64, 32, 8, 2), itemsize=4),
    Rule("linear_fwd", _gemm(128, 64, 64, 8, 2), "gfx*"),
    Rule("linear_fwd", _gemm(128, 64, 64, 8, 3), up_to=8),
    Rule("linear_fwd", _gemm(64, 64, 64, 8, 3), "sm_8*"),
    Rule("linear_fwd", _gemm(128, 32, 64, 8, 3), "sm_1*"),
    Rule("linear_fwd", _gemm(128, 64, 64, 8, 3)),
    # linear_dgrad: size = statements of the slot's source.
    Rule("linear_dgrad", _gemm(32, 32, 32, 4, 1), "interpreter"),
    Rule("linear_dgrad", _gemm(64, 64, 32, 8, 2), itemsize=4, up_to=10),
    Rule("linear_dgrad", _gemm(64, 32, 32, 8, 2), itemsize=4),
    Rule("linear_dgrad", _gemm(128, 64, 64, 8, 2), "gfx*", up_to=8),
    Rule("linear_dgrad", _gemm(64, 64, 64, 8, 2), "gfx*"),
    Rule("linear_dgrad", _gemm(128, 64, 64, 8, 3) | ALL_REGISTERS, "sm_8*", up_to=8),
    Rule("linear_dgrad", _gemm(128, 64, 64, 8, 4), "sm_1*", up_to=8),
    Rule("linear_dgrad", _gemm(128, 64, 64, 8, 3), up_to=8),
    Rule("linear_dgrad", _gemm(64, 64, 64, 8, 3)),
    # linear_gradients: size as above. Weight gradients: ROWS at a time into COLS outputs by DEPTH inputs.
    Rule("linear_gradients", _gemm(32, 32, 32, 4, 1) | _weights(32, 32, 32), "interpreter"),
    Rule("linear_gradients", _gemm(64, 64, 32, 8, 2) | _weights(32, 64, 32), itemsize=4, up_to=8),
    Rule("linear_gradients", _gemm(64, 32, 32, 8, 2) | _weights(32, 64, 32), itemsize=4),
    Rule("linear_gradients", _gemm(128, 64, 64, 8, 2) | _weights(64, 128, 64), "gfx*", up_to=8),
    Rule("linear_gradients", _gemm(64, 64, 64, 8, 2) | _weights(64, 64, 32), "sm_8*", up_to=5),
    Rule("linear_gradients", _gemm(64, 32, 64, 8, 2) | _weights(64, 64, 32), "sm_8*"),
    Rule("linear_gradients", _gemm(128, 64, 64, 8, 3) | _weights(64, 128, 64), "sm_9*", up_to=8),
    Rule("linear_gradients", _gemm(64, 64, 64, 8, 3) | _weights(64, 128, 64), "sm_[91]*"),
    Rule("linear_gradients", _gemm(64, 64, 64, 8, 2) | _weights(64, 128, 64)),
    # mlp_block: size = columns of a row; no tile means separate kernels (effbert.kernels.whole_block says why).
    Rule("mlp_block", {}, "interpreter"),
    Rule("mlp_block", {}, "gfx*"),
    Rule("mlp_block", _whole(64, 32, 64, 8, 3), itemsize=2, up_to=256),
    Rule("mlp_block", {}),
    # row_block_*: size = statements of the longest slot's source. ELEMENTS of whole rows are normalised at a time. No
    # tile, wider rows, or rows too few to fill the card (`choose_rows`), means separate kernels.
    Rule("row_block_fwd", _rows(32, 32, 32, 512, 4, 1), "interpreter"),
    Rule("row_block_fwd", {}, itemsize=4),
    Rule("row_block_fwd", {}, "gfx*"),
    Rule("row_block_fwd", _rows(64, 128, 64, 4096, 8, 3) | ALL_REGISTERS, "sm_[91]*", up_to=10),
    Rule("row_block_fwd", _rows(64, 64, 64, 4096, 8, 3) | ALL_REGISTERS, "sm_[91]*"),
    Rule("row_block_fwd", _rows(64, 128, 64, 8192, 16, 3), up_to=10),
    Rule("row_block_fwd", _rows(64, 64, 64, 4096, 16, 3)),
    Rule("row_block_bwd", _rows(32, 32, 32, 512, 4, 1), "interpreter"),
    Rule("row_block_bwd", {}, itemsize=4),
    Rule("row_block_bwd", {}, "gfx*"),
    Rule("row_block_bwd", _rows(64, 64, 64, 4096, 8, 3), up_to=8),
    Rule("row_block_bwd", _rows(64, 32, 64, 2048, 8, 3)),
    # slot_bwd: size = columns; elementwise.
    Rule("slot_bwd", {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}, "interpreter"),
    Rule("slot_bwd", {"BLOCK_M": 16, "BLOCK_N": 256, "num_warps": 8, "num_stages": 1}),
    # attention_fwd, _bwd: size = sequence length; _wide where a head of student or teacher is wider than 64. A backward
    # tile whose BLOCK_N holds the whole sequence is the one-role form. Registers decide. attention_delta: head size.
    Rule("attention_fwd", _pair(16, 32, 4, 1), "interpreter"),
    Rule("attention_fwd", _pair(16, 16, 8, 2) | ALL_REGISTERS, "sm_*", itemsize=4),  # 1 stage takes twice the registers
    Rule("attention_fwd", _pair(16, 16, 8, 1), itemsize=4),
    Rule("attention_fwd", _pair(64, 32, 4, 1), up_to=64),
    Rule("attention_fwd", _pair(128, 32, 8, 1), "sm_9*"),
    Rule("attention_fwd", _pair(64, 32, 4, 1)),
    Rule("attention_fwd_wide", _pair(16, 32, 4, 1), "interpreter"),
    Rule("attention_fwd_wide", _pair(16, 16, 8, 2) | ALL_REGISTERS, "sm_*", itemsize=4),
    Rule("attention_fwd_wide", _pair(16, 16, 8, 1), itemsize=4),
    Rule("attention_fwd_wide", _pair(64, 32, 8, 1)),
    Rule("attention_bwd", _pair(16, 32, 4, 1), "interpreter"),
    Rule("attention_bwd", _pair(16, 16, 8, 1) | ALL_REGISTERS, "sm_*", itemsize=4),
    Rule("attention_bwd", _pair(16, 16, 8, 1), itemsize=4),
    Rule("attention_bwd", _pair(32, 32, 4, 1) | ALL_REGISTERS, "sm_8*"),
    Rule("attention_bwd", _pair(32, 64, 8, 2), "sm_9*", up_to=64),  # 1 stage spills with two heads of 64
    Rule("attention_bwd", _pair(32, 64, 8, 1) | ALL_REGISTERS, "sm_1*", up_to=64),
    Rule("attention_bwd", _pair(32, 128, 8, 2), "sm_9*", up_to=128),  # 1 stage spills with two heads of 64
    Rule("attention_bwd", _pair(32, 128, 8, 1), "sm_[91]*", up_to=128),
    Rule("attention_bwd", _pair(32, 64, 8, 2), "sm_9*"),  # 64 queries spill with heads of 32, 1 stage with one of 45
    Rule("attention_bwd", _pair(32, 64, 4, 1), "gfx*", up_to=64),
    Rule("attention_bwd", _pair(16, 128, 8, 1), "gfx*", up_to=128),
    Rule("attention_bwd", _pair(32, 64, 4, 1) | ALL_REGISTERS, "sm_1*"),
    Rule("attention_bwd", _pair(32, 64, 4, 1)),
    Rule("attention_bwd_wide", _pair(16, 16, 4, 1), "interpreter"),
    Rule("attention_bwd_wide", _pair(16, 16, 8, 1) | ALL_REGISTERS, "sm_*", itemsize=4),
    Rule("attention_bwd_wide", _pair(16, 16, 4, 1), itemsize=4),  # gfx*: threads of 4 warps have 512 registers
    Rule("attention_bwd_wide", _pair(16, 32, 8, 1), "gfx*"),
    Rule("attention_bwd_wide", _pair(32, 32, 8, 1) | ALL_REGISTERS),
    Rule("attention_delta", {"BLOCK_M": 16, "num_warps": 4}),
    # projected_mse_*: size = output columns. Thousands of tiles a launch; large ones for fewer reads of L2, by count.
    Rule("projected_mse_fwd", _gemm(16, 32, 32, 4, 1), "interpreter"),
    Rule("projected_mse_fwd", _gemm(64, 64, 32, 8, 2), itemsize=4),
    Rule("projected_mse_fwd", _gemm(128, 64, 64, 8, 2), "gfx*"),
    Rule("projected_mse_fwd", _gemm(128, 256, 64, 8, 3), "sm_[91]*"),
    Rule("projected_mse_fwd", _gemm(128, 128, 64, 8, 3)),
    Rule("projected_mse_dgrad", _gemm(32, 16, 32, 4, 1), "interpreter"),
    Rule("projected_mse_dgrad", _gemm(128, 64, 16, 8, 3), itemsize=4),
    Rule("projected_mse_dgrad", _gemm(128, 128, 64, 8, 2), "gfx*"),
    Rule("projected_mse_dgrad", _gemm(256, 128, 64, 8, 3), "sm_[91]*"),
    Rule("projected_mse_dgrad", _gemm(128, 128, 64, 8, 3)),
    Rule("projected_mse_wgrad", _gemm(16, 32, 32, 4, 1), "interpreter"),
    Rule("projected_mse_wgrad", _gemm(32, 64, 64, 8, 2), itemsize=4),
    Rule("projected_mse_wgrad", _gemm(64, 256, 128, 8, 3), "sm_[91]*"),
    Rule("projected_mse_wgrad", _gemm(64, 128, 128, 8, 2), "gfx*"),
    Rule("projected_mse_wgrad", _gemm(64, 128, 128, 8, 3)),
    # soft_cross_entropy: size = classes. Up to 1024 a program has whole rows, several where they are short.
    Rule("soft_cross_entropy", dict(ROWS=4, BLOCK=8, num_warps=4), "interpreter"),
    Rule("soft_cross_entropy", dict(ROWS=256, BLOCK=4, num_warps=4), up_to=4),
    Rule("soft_cross_entropy", dict(ROWS=32, BLOCK=32, num_warps=4), up_to=32),
    Rule("soft_cross_entropy", dict(ROWS=2, BLOCK=256, num_warps=4), up_to=256),
    Rule("soft_cross_entropy", dict(ROWS=1, BLOCK=1024, num_warps=8), up_to=1024),
    Rule("soft_cross_entropy", dict(ROWS=1, BLOCK=2048, num_warps=8)),
)


def choose(kernel: str, device: torch.device, dtype: torch.dtype, size: int) -> dict[str, int]:
    """Block sizes, num_warps and num_stages of `kernel`, ready to be passed to `launch` as keywords."""
    return _choose(Question(kernel, architecture(device), dtype.itemsize, size), os.environ.get(ENVIRONMENT))


_few = False  # of the whole process: autograd runs backward in threads of its own


@contextmanager
def few_compilations() -> Iterator[None]:
    """Inside it, rows in plenty too go through separate kernels, which more expressions share: for models that train
    too briefly to win back what compiling kernels of their own takes. It holds for all threads of the process."""
    global _few
    before, _few = _few, True
    try:
        yield
    finally:
        _few = before


def choose_rows(
    kernel: str, device: torch.device, dtype: torch.dtype, size: int, rows: int, cols: int
) -> dict[str, int]:
    """`choose` for a kernel of which each program has BLOCK_M whole rows, of `rows` of `cols`; ROWS for ELEMENTS.

    {} inside `few_compilations`, where a row has more than ELEMENTS, or where programs would leave too much of a GPU
    idle: those of one length run in rounds, one for each multiprocessor, so the last round must be full, or rounds
    many, enough for FILLED of all the time.
    """
    tile = dict(choose(kernel, device, dtype, size))
    elements = tile.pop("ELEMENTS", 0)
    if _few or elements < cols:
        return {}
    programs, together = ceil_div(rows, tile["BLOCK_M"]), multiprocessors(device)
    if programs < FILLED * together * ceil_div(programs, together):
        return {}
    return tile | {"ROWS": min(tile["BLOCK_M"], 1 << (elements // cols).bit_length() - 1)}


@functools.lru_cache(maxsize=4096)
def _choose(question: Question, path: str | None) -> dict[str, int]:
    _asked[question] = None
    return answer((*(read_rules(path) if path else ()), *RULES), question)


def answer(rules: Iterable[Rule], question: Question) -> dict[str, int]:
    """The tile of the first rule that matches; ValueError where none does."""
    for rule in rules:
        if rule.matches(*question):
            return rule.tile
    raise ValueError(
        f"no tile for {question.kernel} on {question.architecture}: effbert.kernels.tiles has no rule that matches"
    )


def asked() -> tuple[Question, ...]:
    """What `choose` was asked since the last `forget`, each question once, in the order of first asking."""
    return tuple(_asked)


def forget() -> None:
    """Forget the questions asked and their answers: files of rules are then read anew."""
    _asked.clear()
    _choose.cache_clear()


def read_rules(path: str | Path) -> tuple[Rule, ...]:
    """The rules of a file that `effbert kernels tune` wrote; ValueError with one line where it is not one."""
    try:
        return tuple(_checked(**rule) for rule in json.loads(Path(path).read_text(encoding="utf-8"))["rules"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{ENVIRONMENT}={path} is no file of tile rules ({reason}); effbert kernels tune writes one"
        ) from None


def _checked(**fields) -> Rule:
    rule = Rule(**fields)
    known = [other.tile for other in RULES if other.kernel == rule.kernel]
    if not known:
        raise ValueError(f"no kernel {rule.kernel!r}")
    if not isinstance(rule.tile, dict) or not any(rule.tile.keys() == tile.keys() for tile in known):
        raise ValueError(f"a tile of {rule.kernel} has {', '.join(max(known, key=len))}, not {rule.tile}")
    limits = [limit for limit in (rule.itemsize, rule.up_to) if limit is not None]
    numbers = [*rule.tile.values(), *limits]
    if not isinstance(rule.architecture, str) or any(type(number) is not int for number in numbers):
        raise TypeError(f"{rule}: whole numbers and a pattern are needed")
    if min(rule.tile.values(), default=1) < 1 or min(limits, default=0) < 0:
        raise ValueError(f"{rule}: a tile needs numbers above 0, itemsize and up_to none below it")
    blocks = sorted(rule.tile[name] for name in rule.tile.keys() - ANY_NUMBER)
    if any(number & (number - 1) for number in blocks) or math.prod(blocks[-2:]) > MOST_ELEMENTS:
        raise ValueError(
            f"{rule}: block sizes and num_warps are powers of two, and two blocks at most {MOST_ELEMENTS:,}"
        )
    if rule.tile.get("num_warps", 1) > 32 or rule.tile.get("maxnreg", 1) > 255:
        raise ValueError(f"{rule}: num_warps is at most 32, maxnreg at most 255")
    return rule
