"""Ahead-of-time builds: what is compiled is what a launch would compile, and the numbers read from it are real.

Kernels imported under TRITON_INTERPRET=1 cannot be compiled, so one child process without it gathers the facts.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from effbert.kernels import aot
from effbert.kernels.launch import Launch, launch, recording

ROOT = Path(__file__).resolve().parents[2]
KERNELS = """
import torch
import triton
import triton.language as tl
from effbert.kernels import aot
from effbert.kernels.launch import launch, recording


@triton.jit
def double(x):
    return x * 2.0


@triton.jit
def negate(x):
    return -x


@triton.jit(do_not_specialize=["rows"])
def rowwise_kernel(x, y, extra, rows, cols, scale, flag, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    value = tl.load(x + row * cols + at, mask=(at < cols) & (row < rows), other=0.0).to(tl.float32)
    if extra is not None:
        value += tl.load(extra + at, mask=at < cols, other=0.0)
    if flag:
        value *= scale
    tl.store(y + row * cols + at, FUNCTION(value), mask=at < cols)


@triton.jit
def product_kernel(a, b, c, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tile = i[:, None] * BLOCK + i[None, :]
    total = tl.dot(tl.load(a + tile), tl.load(b + tile), input_precision=PRECISION)
    tl.store(c + tile, total)


@triton.jit
def greedy_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    kept = tl.load(x + i)
    tl.store(y + i, kept / tl.sum(kept))  # every value waits in registers for the sum


@triton.jit
def exponential_product_kernel(a, b, c, depth, ENTERED: tl.constexpr, PLAIN: tl.constexpr, BLOCK: tl.constexpr):
    row, col, k = tl.arange(0, 2 * BLOCK), tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    total = tl.zeros([2 * BLOCK, BLOCK], tl.float32)
    if ENTERED:
        tl.assume(depth > 0)
    for start in range(0, depth, BLOCK):
        at = start + k
        x = tl.load(a + row[:, None] * BLOCK + at[None, :], mask=(at < depth)[None, :], other=0.0)
        y = tl.load(b + at[:, None] * BLOCK + col[None, :], mask=(at < depth)[:, None], other=0.0)
        if not PLAIN:
            x = tl.exp(x.to(tl.float32)).to(x.dtype)
        total = tl.dot(x, y, total)
    tl.store(c + row[:, None] * BLOCK + col[None, :], total * 2)


@triton.jit
def broken_kernel(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), no_such_name)


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def rowwise(x, y, extra, rows, cols, scale=1.5, flag=True, function=double):
    launch(rowwise_kernel, (rows,), x, y, extra, rows, cols, scale, flag, FUNCTION=function, BLOCK=64)
"""
FACTS = """
import json

from child_kernels import *
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

facts = {}

x, y, half = empty(8, 64), empty(8, 64), empty(9, 64, dtype=torch.bfloat16)
with recording("sm_90") as launches:
    rowwise(x, y, None, 8, 64)
    rowwise(x, y, None, 80, 64)  # the same: rows are not specialised
    rowwise(x, y, None, 8, 48)  # the same: also divisible by 16
    rowwise(x, y, None, 8, 64, flag=False)  # the same: nor is a bool
    rowwise(x, y, None, 8, 63)
    rowwise(x, y, None, 8, 1)
    rowwise(x, y, None, 8, 2**33)
    rowwise(x, y, x, 8, 64)
    rowwise(x.view(-1)[1:], y, None, 8, 64)  # not 16-byte aligned
    rowwise(half[1:], half, None, 8, 64)
    rowwise(x, y, None, 8, 64, function=negate)
built = [aot.build(one, "sm_90") for one in launches]


class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


driver.set_active(Driver())
launched = [one.kernel.run(grid=one.grid, warmup=True, **one.arguments, **one.options) for one in launches]
facts["launches"] = {
    "same": [one.assembly == other.asm["ptx"] for one, other in zip(built, launched)],
    "keys": [one.key for one in built],
    "compiled": [id(one) for one in launched],  # Triton gives the same object for the same compilation
    "counts": [count for _, count in aot.build_all(launches, "sm_90", workers=2).values()],
    "unbuilt": [aot.compilation_key(one, "sm_90") for one in launches],
}

facts["products"] = {}
half = (torch.bfloat16, "ieee", 64), (torch.float16, "ieee", 64)
full = (torch.float32, "tf32", 64), (torch.float32, "ieee", 32)
for architecture in aot.TARGETS:
    with recording(architecture) as launches:
        for dtype, precision, block in half + full:
            a = empty(64, 64, dtype=dtype)
            launch(product_kernel, (1,), a, a, empty(64, 64), PRECISION=precision, BLOCK=block)
    for one, _ in aot.build_all(launches, architecture).values():
        named = one.name == "product_kernel" in one.assembly and one.architecture == architecture
        numbers = named, one.registers, one.stack, one.shared, one.warps, one.seconds
        facts["products"][f"{architecture} {' '.join(one.products)}"] = [*numbers, *one.matrix_instructions]

facts["spills"] = {}
for architecture in ("sm_90", "gfx942"):
    with recording(architecture) as launches:
        launch(greedy_kernel, (1,), empty(2**17), empty(2**17), BLOCK=2**17, num_warps=16)
    first, again, anew = (aot.build(launches[0], architecture, anew=anew) for anew in (False, False, True))
    stacks, seconds = ([getattr(one, what) for one in (first, again, anew)] for what in ("stack", "seconds"))
    facts["spills"][architecture] = stacks, seconds, first.key == again.key == anew.key

with recording("sm_90") as launches:
    half = empty(1024, 64, dtype=torch.bfloat16)
    for entered, plain in ((False, False), (True, False), (False, True)):
        launch(
            exponential_product_kernel, (1,), half, half, half, 512, ENTERED=entered, PLAIN=plain, BLOCK=64,
            num_warps=8, num_stages=3,
        )
facts["serialised"] = [aot.serialises(aot.build(one, "sm_90")) for one in launches]

with recording("sm_80") as launches:
    launch(broken_kernel, (1,), empty(16), BLOCK=16)
    rowwise(empty(1, 64), empty(1, 64), None, 1, 64)
failures = []
others = aot.build_all(launches, "sm_80", failures=failures)
try:
    aot.build_all(launches, "sm_80")
except aot.BuildError as error:
    facts["broken"] = [str(failure) for failure in failures], [one.name for one, _ in others.values()], str(error)
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aot")
    (folder / "child_kernels.py").write_text(KERNELS)
    (folder / "child.py").write_text(FACTS)
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables |= {
        "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(ROOT)]),
        "TRITON_CACHE_DIR": str(folder / "cache"),
    }
    command = [sys.executable, "-W", "ignore", str(folder / "child.py")]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_products_that_wait_for_each_other_are_told(facts):
    """One that stands behind other work in a loop which might not be entered does, the others do not."""
    assert facts["serialised"] == [True, False, False]


def test_what_is_built_is_what_a_launch_would_compile(facts):
    """Triton's own `run`, with a stand-in for the driver, gives the same assembly; the keys tell apart what it does."""
    launches = facts["launches"]
    assert all(launches["same"]) and len(launches["same"]) == 11
    keys, compiled = launches["keys"], launches["compiled"]
    assert [keys.index(key) for key in keys] == [compiled.index(one) for one in compiled]
    assert keys[0] == keys[1] == keys[2] == keys[3] and len(set(keys)) == 8
    assert launches["counts"] == [4, *[1] * 7] and launches["unbuilt"] == keys


def test_numbers_and_matrix_instructions_on_every_architecture(facts):
    kinds = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
    products = ("bf16", "fp16", "tf32", "fp32")
    assert set(facts["products"]) == {f"{architecture} {product}" for architecture in kinds for product in products}
    for name, (named, registers, stack, shared, warps, seconds, *matrix) in facts["products"].items():
        architecture, product = name.split()
        assert named and 16 <= registers <= 255 and stack == 0 and shared >= 4096 and warps == 4 and seconds > 0, name
        if product != "fp32":
            assert matrix == [kinds[architecture]], name
        elif architecture != "gfx942":  # AMD has IEEE fp32 matrix instructions
            assert matrix == [], name


def test_spills_are_seen_and_a_cached_build_gives_the_same(facts):
    for architecture, (stacks, seconds, same_key) in facts["spills"].items():
        assert stacks[0] > 0 and len(set(stacks)) == 1 and same_key, (architecture, stacks)
        assert seconds[1] < min(seconds[0], seconds[2]), (architecture, seconds)  # 10 ms against a second


def test_a_kernel_that_does_not_compile_is_named_and_the_others_are_built(facts):
    failures, names, raised = facts["broken"]
    assert failures == [raised] and "\n" not in raised and names == ["rowwise_kernel"]
    assert raised.startswith("broken_kernel does not compile for sm_80: ") and "no_such_name" in raised


def test_a_limit_of_registers_is_an_option_only_where_it_is_given():
    kernel = SimpleNamespace(arg_names=["x"])
    with recording("sm_90") as launches:
        launch(kernel, (1,), 1, num_warps=8)
        launch(kernel, (1,), 1, num_warps=8, maxnreg=255)
    plain = {"num_warps": 8, "num_stages": 2}
    assert [one.options for one in launches] == [plain, plain | {"maxnreg": 255}]
    assert launches[1].arguments == {"x": 1}


def test_bad_requests_are_one_line(monkeypatch):
    launch = Launch(len, (1,), {}, {})
    with pytest.raises(ValueError, match="unknown architecture 'sm_75': one of sm_80, sm_90, sm_100, gfx942"):
        aot.build(launch, "sm_75")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 keeps kernels from being compiled: unset it"):
        aot.build(launch, "sm_80")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 keeps"):  # unset too late: these are no compiled kernels
        aot.build(launch, "sm_80")
    aot._backend.cache_clear()
    monkeypatch.setitem(sys.modules, "triton.compiler", None)
    with pytest.raises(ValueError, match=r"needs triton >=3\.6,<3\.10"):
        aot.build(launch, "sm_80")
