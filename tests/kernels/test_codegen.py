"""Slot functions: values and gradients against eager and autograd, few of them, and a cache that survives abuse."""

import ast
import hashlib
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effbert.kernels import activations, codegen, eager
from effbert.kernels.codegen import slot_functions, source_of
from effbert.kernels.expression import BINARY, STRUCTURES, Expression, ExpressionError
from effbert.kernels.launch import launch
from effbert.search.space import random_expression

ROOT = Path(__file__).resolve().parents[2]
ROWS, X_WIDTH, WIDTH = 4, 24, 32
SLOTS = (("pre", "x"), ("mid", "h"), ("post", "y"))
drawn = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@triton.jit
def apply_kernel(
    v, x, g, v_again, y, dv, dx, x_width,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, USES_X: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    at = row * COLS + col
    inside = col < x_width
    if USES_X:
        x_tile = tl.load(x + row * x_width + col, mask=inside & (row < ROWS), other=0.0)
    else:
        x_tile = 0.0
    tl.store(y + at, FORWARD(tl.load(v + at), x_tile, inside))
    gradient, x_gradient = BACKWARD(tl.load(v_again + at), x_tile, inside, tl.load(g + at))
    tl.store(dv + at, gradient)
    if USES_X:
        tl.store(dx + at, x_gradient)


@pytest.fixture(autouse=True, scope="module")
def cache_of_this_file(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFBERT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def forget():
    codegen._load.cache_clear()
    slot_functions.cache_clear()
    codegen._temporary_folders.clear()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of one test; functions loaded before are forgotten."""
    monkeypatch.setenv("EFFBERT_CACHE", str(tmp_path))
    forget()
    yield tmp_path / "kernels"
    forget()


def expression_of(seed):
    return random_expression(STRUCTURES[seed % 16], np.random.default_rng(seed))


def function_of(tree, combine="truncate"):
    """The function of a slot `mid` that is this tree of h and x."""
    first = re.sub(r"\bh\b", "linear(x,wb1)", tree)
    return slot_functions(f"linear({first},wb2)", combine).mid


def inputs(seed, x_width, device):
    generator = torch.Generator().manual_seed(seed)
    draw = (torch.randn(ROWS, width, generator=generator) * 2 for width in (WIDTH, x_width, WIDTH))
    return [tensor.to(device) for tensor in draw]


def run(function, v, x, g):
    """The value and the gradients of v and x, which is zero beyond x; v is NaN where the flags call it unread."""
    again = v if function.backward_uses_value else torch.full_like(v, float("nan"))
    y, dv, dx = (torch.empty_like(v) for _ in range(3))
    launch(
        apply_kernel, (1,), v, x, g, again, y, dv, dx, x.shape[1],
        FORWARD=function.forward, BACKWARD=function.backward, USES_X=function.uses_x, ROWS=v.shape[0], COLS=v.shape[1],
    )  # fmt: skip
    if not function.uses_x:
        return y, dv, torch.zeros_like(x)
    assert not dx[:, x.shape[1] :].any()
    return y, dv, dx[:, : x.shape[1]]


def evaluate(tree, value, v, x, combine):
    if not tree.args:
        return v if tree.op == value else x
    args = [evaluate(arg, value, v, x, combine) for arg in tree.args]
    return eager.binary(tree.op, *args, combine) if tree.op in eager.BINARY else eager.ACTIVATIONS[tree.op](*args)


def reference(tree, value, v, x, g, combine, dtype):
    v, x = (tensor.to(dtype, copy=True).requires_grad_() for tensor in (v, x))
    y = evaluate(tree, value, v, x, combine)
    return y.detach(), *torch.autograd.grad(y, (v, x), g.to(dtype), materialize_grads=True)


def check_slot(expression, slot, value, combine, x_width, seed, device, check_error):
    function = getattr(slot_functions(expression, combine), slot)
    tree = getattr(expression.slots(), slot)
    tensors = inputs(seed, x_width, device)
    plain = reference(tree, value, *tensors, combine, torch.float32)
    exact = reference(tree, value, *tensors, combine, torch.float64)
    for what, *three in zip(("value", "dv", "dx"), run(function, *tensors), plain, exact, strict=True):
        check_error(*three, floor=8, what=f"{what} of {function.text}")


@drawn
@given(seed=st.integers(0, 2**32))
def test_drawn_slots_give_eager_values_and_gradients(seed, device, check_error):
    for slot, value in SLOTS:
        check_slot(expression_of(seed), slot, value, "truncate", WIDTH, seed, device, check_error)


@st.composite
def mixing_expressions(draw):
    """Expressions whose `mid` joins h and x, so that the padding variant matters."""
    first = draw(st.sampled_from(("linear1_1(x,wb1)", "relu(linear1_1(x,wb1))", "linear1_1(tanh(x),wb1)")))
    second = draw(st.sampled_from(("x", "sigmoid(x)", "mul(x,tanh(x))")))
    third = draw(st.sampled_from(("swish(x)", "max(gelu(x),x)")))
    outer, inner = draw(st.permutations(BINARY))[:2]
    return Expression.parse(f"linear1_1({outer}(elu({inner}({first},{second})),{third}),wb2)").check()


@pytest.mark.parametrize("combine", eager.FILL)
@drawn
@given(expression=mixing_expressions(), seed=st.integers(0, 2**32))
def test_padding_variants_give_eager_values_and_gradients(combine, expression, seed, device, check_error):
    assert slot_functions(expression, combine).mid.needs_inside
    for x_width in (X_WIDTH, WIDTH):
        check_slot(expression, "mid", "h", combine, x_width, seed, device, check_error)


@pytest.mark.parametrize("combine", eager.FILL)
@pytest.mark.parametrize("op", eager.BINARY)
def test_what_fills_up_gets_no_gradient(op, combine, device):
    function = function_of(f"{op}(h,x)", combine)
    v = torch.full((1, WIDTH), eager.FILL[combine]["max"], device=device)  # ties with what max is filled up with
    x, g = torch.zeros(1, X_WIDTH, device=device), torch.ones(1, WIDTH, device=device)
    tree = Expression.parse(f"linear1_1({op}(linear1_1(x,wb1),x),wb2)").slots().mid
    for ours, plain in zip(run(function, v, x, g), reference(tree, "h", v, x, g, combine, v.dtype), strict=True):
        assert torch.equal(ours, plain)
    if op == "max":
        assert torch.equal(run(function, v, x, g)[1][:, X_WIDTH:], g[:, X_WIDTH:] / 2)


def row(values, device):
    tensor = torch.zeros(1, WIDTH, device=device)
    tensor[0, : len(values)] = torch.tensor(values, device=device)
    return tensor


def test_ties_in_max_share_the_gradient_equally(device):
    v, x = row([1.0, 2.0, -3.0], device), row([1.0, -2.0, 3.0], device)
    y, dv, dx = run(function_of("max(h,x)"), v, x, torch.ones_like(v))
    assert y[0, :3].tolist() == [1.0, 2.0, 3.0]
    assert dv[0, :3].tolist() == [0.5, 1.0, 0.0]
    assert dx[0, :3].tolist() == [0.5, 0.0, 1.0]
    of_one_value = slot_functions("linear(gelu(linear(max(x,relu(x)),wb1)),wb2)").pre
    y, dv, _ = run(of_one_value, v, x, torch.ones_like(v))
    assert y[0, :3].tolist() == [1.0, 2.0, 0.0]
    assert dv[0, :3].tolist() == [1.0, 1.0, 0.0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@drawn
@given(seed=st.integers(0, 2**32))
def test_nan_and_infinity_reach_the_value_as_in_pytorch(seed, device):
    special = [float("nan"), float("inf"), -float("inf"), 0.0, 1.5]
    v, x = (row(values, device) for values in ([a for a in special for _ in special], special * len(special)))
    for slot, value in SLOTS:
        expression = expression_of(seed)
        function = getattr(slot_functions(expression), slot)
        plain = evaluate(getattr(expression.slots(), slot), value, v, x, "truncate")
        ours = run(function, v, x, torch.ones_like(v))[0]
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6, equal_nan=True)


@triton.jit
def activation_kernel(x, y, d, ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tile = tl.load(x + at)
    tl.store(y + at, ACTIVATION(tile))
    tl.store(d + at, GRADIENT(tile, tl.full([BLOCK], 1.0, tl.float32)))


def activation(name, x):
    y, d = torch.empty_like(x), torch.empty_like(x)
    pair = getattr(activations, name), getattr(activations, f"{name}_grad")
    launch(activation_kernel, (1,), x, y, d, ACTIVATION=pair[0], GRADIENT=pair[1], BLOCK=x.numel())
    return y, d


def activation_in_pytorch(name, x):
    x = x.clone().requires_grad_()
    y = eager.ACTIVATIONS[name](x)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("name", eager.ACTIVATIONS)
def test_activations_hold_from_zero_to_the_largest_numbers(name, device, check_error):
    moderate = torch.cat([torch.linspace(-30, 30, 1024), torch.linspace(-2, 2, 1024)]).to(device)
    double = activation_in_pytorch(name, moderate.double())
    for results in zip(activation(name, moderate), activation_in_pytorch(name, moderate), double, strict=True):
        check_error(*results)
    at_zero = torch.tensor([0.0, -0.0], device=device)
    for ours, plain in zip(activation(name, at_zero), activation_in_pytorch(name, at_zero), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)
    sizes = torch.tensor([88.0, 104.0, 1e4, 1e9, 3e14, 1e15, 1e20, 3e38])
    huge = torch.cat([sizes, -sizes]).to(device)
    at_1e4 = activation_in_pytorch(name, torch.tensor([1e4, -1e4], device=device))
    value, gradient = activation(name, huge)
    torch.testing.assert_close(gradient, at_1e4[1].repeat_interleave(8), rtol=1e-5, atol=1e-30)
    slope = torch.where(huge > 0, 1.0, 0.01) if name in ("relu", "gelu", "swish", "elu", "leaky_relu") else None
    if name == "leaky_relu":
        torch.testing.assert_close(value, huge * slope)
    elif slope is not None:
        torch.testing.assert_close(value, torch.where(huge > 0, huge, at_1e4[0][1]))
    else:
        torch.testing.assert_close(value, at_1e4[0].repeat_interleave(8))


@pytest.mark.parametrize("name", ("tanh", "elu"))
def test_small_arguments_keep_their_relative_accuracy(name, device):
    size = torch.logspace(-30, 0, 512)
    x = torch.cat([size, -size]).to(device)
    exact = eager.ACTIVATIONS[name](x.double())
    torch.testing.assert_close(activation(name, x)[0].double(), exact, rtol=1e-6, atol=0)


def test_slots_that_are_one_function_share_it():
    first = slot_functions("tanh(linear4_2(gelu(linear4_2(add(gelu(x),x),wb1)),wb2))")
    other = slot_functions("add(gelu(linear1_1(tanh(linear1_1(gelu(x),wb1)),wb2)),x)")
    assert first.mid is other.pre, "gelu(h) and gelu(x)"
    assert first.post is other.mid, "tanh(y) and tanh(h)"
    assert first.pre is not other.post, "add(gelu(x),x) of one value, add(gelu(y),x) of two"
    assert slot_functions("max(x,linear(relu(linear(x,wb1)),wb2))").post is function_of("max(h,x)")
    assert function_of("add(mul(h,x),x)") is function_of("add(x,mul(x,h))")
    expression = Expression.parse("linear2_1(gelu(linear2_1(x,wb1)),wb2)")
    assert slot_functions(expression) == slot_functions(str(expression.without_structure()))


def test_padding_makes_another_function_only_where_it_fills_something():
    for combine in eager.FILL:
        assert function_of("gelu(h)", combine) is function_of("gelu(h)")
        outside_mid = slot_functions("max(linear(relu(linear(max(x,tanh(x)),wb1)),wb2),x)", combine)
        assert not outside_mid.pre.needs_inside and not outside_mid.post.needs_inside
        assert function_of("add(h,x)", combine) is not function_of("add(h,x)")
    assert function_of("add(h,mul(x,tanh(x)))", "pad") is function_of("add(h,mul(x,tanh(x)))", "pad_released")
    assert function_of("max(h,x)", "pad") is not function_of("max(h,x)", "pad_released")
    assert function_of("max(h,x)", "pad").text != function_of("max(h,x)", "pad_released").text


@pytest.mark.parametrize(
    "tree,uses_x,backward_uses_value,backward_uses_x",
    [
        ("gelu(h)", False, True, False),
        ("add(h,x)", True, False, False),
        ("mul(h,x)", True, True, True),
        ("add(h,tanh(x))", True, False, True),
        ("add(relu(h),x)", True, True, False),
        ("max(h,x)", True, True, True),
    ],
)
def test_flags_say_what_is_read(tree, uses_x, backward_uses_value, backward_uses_x):
    function = function_of(tree)
    flags = function.uses_x, function.backward_uses_value, function.backward_uses_x
    assert flags == (uses_x, backward_uses_value, backward_uses_x)
    assert not function.is_identity and not function.needs_inside


def test_an_empty_slot_is_the_identity():
    slots = slot_functions("linear(relu(linear(x,wb1)),wb2)")
    assert slots.pre is slots.post and slots.pre.is_identity
    assert not (slots.pre.uses_x or slots.pre.backward_uses_value or slots.pre.backward_uses_x)


@drawn
@given(seed=st.integers(0, 2**32), combine=st.sampled_from(codegen.COMBINES))
def test_sources_state_the_expression_and_compute_nothing_twice_or_in_vain(seed, combine):
    slots = slot_functions(expression_of(seed), combine)
    for function in (slots.pre, slots.mid, slots.post):
        module = ast.parse(function.source)
        assert ast.get_docstring(module).startswith(function.text)
        for definition in (node for node in module.body if isinstance(node, ast.FunctionDef)):
            *statements, _ = definition.body
            assert len({ast.unparse(statement.value) for statement in statements}) == len(statements)
            names = [node for node in ast.walk(definition) if isinstance(node, ast.Name)]
            assert {name.id for name in names} == {name.id for name in names if isinstance(name.ctx, ast.Load)}


def test_common_parts_are_computed_once_in_each_direction():
    pre = slot_functions("linear(gelu(linear(add(max(x,tanh(x)),mul(x,tanh(x))),wb1)),wb2)").pre
    assert pre.source.count(" = tanh(v)") == 2
    assert pre.source.count("tanh_grad(v, ") == 1, "the gradients of both uses are added up first"


def test_source_of_prints_all_three_slots_and_loads_nothing(cache):
    text = source_of("max(linear4_2(gelu(linear4_2(gelu(x),wb1)),wb2),x)")
    assert "# pre, gelu(x)\n" in text and "# post, max(y,x)\n" in text
    assert "# mid, gelu(h): the function of pre\n" in text
    assert text.count("def forward") == 2
    assert not cache.exists()


def test_bad_expressions_and_combines_are_refused():
    with pytest.raises(ExpressionError, match="exactly one wb1 and one wb2"):
        slot_functions("linear(gelu(linear(gelu(x),wb2)),wb2)")
    with pytest.raises(ValueError, match="combine 'cut': one of truncate, pad, pad_released"):
        slot_functions("linear(gelu(linear(x,wb1)),wb2)", "cut")


def test_files_are_written_once_and_read_after_that(cache):
    function = function_of("gelu(h)")
    path = cache / f"{function.name}.py"
    assert path.read_text() == function.source
    os.utime(path, (1, 1))
    forget()
    assert function_of("gelu(h)").name == function.name
    assert path.stat().st_mtime == 1
    assert sorted(file.name for file in cache.iterdir()) == sorted(
        f"{name}.py" for name in {function.name, slot_functions("linear(gelu(linear(x,wb1)),wb2)").pre.name}
    )


@pytest.mark.parametrize("damage", [b"", b"def forward(v, x, ", b"\xff\xfe\x00", b"raise SystemExit('not ours')\n"])
def test_damaged_files_are_written_again(cache, damage, device):
    function = function_of("sigmoid(h)")
    path = cache / f"{function.name}.py"
    path.write_bytes(damage)
    forget()
    v = row([0.0], device)
    assert run(function_of("sigmoid(h)"), v, v, v)[0][0, 0].item() == 0.5
    assert path.read_text() == function.source


def test_a_cache_that_cannot_be_written_is_replaced_for_the_process_with_one_warning(cache, device):
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning) as caught:
        function = function_of("tanh(h)")
        function_of("max(h,x)")
    (message,) = [str(warning.message) for warning in caught]
    assert str(cache) in message and "set EFFBERT_CACHE" in message and "\n" not in message
    v = row([0.0], device)
    assert run(function, v, v, v)[0][0, 0].item() == 0.0


def test_a_write_that_fails_leaves_no_temporary_file(cache):
    folder = cache / f"{function_of('elu(h)').name}.py"
    folder.unlink()
    folder.mkdir()
    forget()
    with pytest.warns(UserWarning, match="cannot write generated kernels"):
        function_of("elu(h)")
    assert not [path for path in cache.iterdir() if path.suffix == ".tmp"]


def test_the_cache_is_where_the_user_says(monkeypatch):
    monkeypatch.setenv("EFFBERT_CACHE", "/a")
    assert codegen.cache_dir() == Path("/a/kernels")
    monkeypatch.delenv("EFFBERT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert codegen.cache_dir() == Path("/b/effbert/kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert codegen.cache_dir() == Path("/c/.cache/effbert/kernels")


def load_twelve(_):
    return [slot_functions(expression_of(seed)).mid.name for seed in range(12)]


def test_many_processes_may_share_a_cache(cache):
    names = load_twelve(0)
    for name in names[::2]:
        (cache / f"{name}.py").write_bytes(b"def forward(")
    for name in set(names[1::2]) - set(names[::2]):
        (cache / f"{name}.py").unlink()
    forget()
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(load_twelve, range(4), chunksize=1) == [names] * 4
    for path in cache.iterdir():
        assert path.suffix == ".py", "no temporary file is left"
        assert hashlib.sha256(path.read_bytes()).hexdigest()[:16] in path.stem


BUILD = """
import json
import torch
import triton
import triton.language as tl
from effbert.kernels.aot import build
from effbert.kernels.codegen import slot_functions
from effbert.kernels.launch import launch, recording

{kernel}

operands = [torch.empty(16, 64, device="meta") for _ in range(7)]
found = []
for architecture, slot, text, combine in {functions!r}:
    function = getattr(slot_functions(text, combine), slot)
    with recording(architecture) as launches:
        launch(
            apply_kernel, (1,), *operands, 50, FORWARD=function.forward, BACKWARD=function.backward,
            USES_X=function.uses_x, ROWS=16, COLS=64,
        )
    built = build(launches[0], architecture)
    found.append((built.stack, built.assembly.count("ex2.approx")))
print(json.dumps(found))
"""


def test_functions_compile_without_spills_and_share_exponentials(tmp_path):
    functions = [
        ("sm_90", "pre", "linear(gelu(linear(max(x,tanh(x)),wb1)),wb2)", "truncate"),
        ("gfx942", "mid", "linear(elu(max(linear(x,wb1),gelu(x))),wb2)", "pad"),
    ]
    script = tmp_path / "build.py"
    script.write_text(BUILD.format(kernel=inspect.getsource(apply_kernel.fn), functions=functions))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert all(stack == 0 for stack, _ in found)
    elements_a_thread = 16 * 64 // 128
    assert found[0][1] == 2 * elements_a_thread, "one exponential for tanh(v), one for all of the gradient"


def test_without_a_home_folder_the_cache_is_a_temporary_one(cache, monkeypatch):
    monkeypatch.setenv("EFFBERT_CACHE", "~nobody-of-this-name/cache")
    with pytest.warns(UserWarning, match="cannot write generated kernels to ~nobody-of-this-name/cache"):
        assert slot_functions(str(expression_of(3)), "truncate").mid.forward is not None
