"""The choice of backend, and that importing kernels does nothing."""

import inspect
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton

from effbert import kernels
from effbert.kernels import compiled, dispatch, eager, fused
from effbert.kernels.expression import STRUCTURES, Expression
from effbert.kernels.philox import Dropout
from effbert.search.space import random_expression

ROOT = Path(__file__).resolve().parents[2]


def test_every_export_loads_and_every_op_is_documented():
    for name in kernels.__all__:
        assert getattr(kernels, name) is not None
    for name in dispatch.OPS:
        assert getattr(kernels, name).__doc__


def test_an_unknown_name_or_backend_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = kernels.missing
    with pytest.raises(ValueError, match="'cuda': one of auto, eager, triton, compile"), kernels.use_backend("cuda"):
        pass
    with pytest.raises(ValueError, match="one of auto, eager, triton, compile"):
        kernels.dropout(torch.ones(2, 3), None, backend="fused")


def test_the_environment_chooses_the_backend(monkeypatch):
    monkeypatch.setenv("EFFBERT_BACKEND", "nonsense")
    with pytest.raises(ValueError, match=r"^EFFBERT_BACKEND=nonsense: no backend 'nonsense': one of auto"):
        dispatch.current()
    with kernels.use_backend("eager"):
        assert dispatch.current() == "eager"


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # without a GPU the fused kernels are interpreted


def soft_loss(backend, device=DEVICE):
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]], device=device)
    return kernels.soft_cross_entropy(logits, logits.flip(1), 2.0, backend=backend)


def test_a_backend_can_be_an_argument_and_all_agree():
    eager = soft_loss("eager")
    for backend in ("auto", "triton", "compile"):
        torch.testing.assert_close(soft_loss(backend), eager, rtol=1e-5, atol=1e-6)


@pytest.fixture
def fresh(monkeypatch, caplog):
    """Nothing said and nothing remembered yet."""
    forget()
    caplog.set_level("INFO", "effbert.kernels")
    yield monkeypatch
    monkeypatch.undo()
    forget()


def forget():
    for function in (dispatch._why_not_on, dispatch._why_no_triton, dispatch._log_once):
        function.cache_clear()


def test_auto_says_once_what_it_runs(fresh, caplog):
    x = torch.ones(2, 8)
    for _ in range(3):
        kernels.dropout(x, kernels.Dropout(0.5, 1, 1))
    assert [record.getMessage() for record in caplog.records] == ["kernels: eager PyTorch (inputs on the CPU)"]


def test_triton_on_a_cpu_without_the_interpreter_is_an_error_that_says_what_to_do(fresh):
    fresh.setattr(dispatch, "is_interpreted", lambda: False)
    with pytest.raises(RuntimeError, match=r"on the CPU: move them to a GPU.*backend 'auto' or 'eager'"):
        soft_loss("triton", "cpu")
    assert soft_loss("auto", "cpu") == soft_loss("eager", "cpu")


@pytest.mark.parametrize("version, message", [(None, "triton is not installed"), ("3.5.1", "triton 3.5.1 is too old")])
def test_triton_missing_or_too_old_is_an_error_under_triton_and_not_under_auto(version, message, fresh):
    if version is None:
        fresh.setitem(sys.modules, "triton", None)
    else:
        import triton

        fresh.setattr(triton, "__version__", version)
    with pytest.raises(RuntimeError, match=f"{message}.*pip install 'triton>=3.6,<3.10'"):
        soft_loss("triton")
    assert soft_loss("auto") == soft_loss("eager")


def test_a_gpu_too_old_for_bf16_is_named(fresh):
    fresh.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    fresh.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    reason = dispatch.why_not_triton(torch.device("cuda"))
    assert reason == "Tesla T4 has compute capability 7.5: the kernels need 8.0, bf16 too"


def test_auto_takes_eager_for_what_the_kernels_refuse_and_says_why(fresh, caplog):
    fresh.setattr(dispatch, "why_not_triton", lambda device: None)
    x = torch.ones(2, 8, dtype=torch.float64)
    chosen = dispatch._automatic("dropout", torch.device("cuda"), (x, None), {})
    assert chosen == "eager"
    assert "float64" in caplog.records[0].getMessage()


def test_auto_still_refuses_what_no_backend_can_do(fresh):
    with pytest.raises(ValueError, match="temperature"):
        kernels.soft_cross_entropy(torch.ones(2, 3), torch.ones(2, 3), 0.0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_a_non_floating_input_is_refused_by_every_backend(dtype):
    for backend in ("auto", "eager", "triton", "compile"):
        with pytest.raises(TypeError, match="soft_cross_entropy"):
            kernels.soft_cross_entropy(torch.ones(2, 3).to(dtype), torch.ones(2, 3), backend=backend)


def test_ops_compile_whole_through_the_dispatcher():
    def step(logits):
        return kernels.soft_cross_entropy(kernels.dropout(logits, kernels.Dropout(0.1, 5, 1)), logits.flip(1))

    logits = torch.randn(4, 3, device=DEVICE)
    for backend in ("eager", "triton"):
        with kernels.use_backend(backend):
            expected = step(logits)
            compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(logits), expected)


def test_the_first_calls_of_a_process_compile_whole(monkeypatch):
    for op in dispatch.OPS:
        monkeypatch.delattr(dispatch, op)
    monkeypatch.setattr(dispatch, "_functions", {})

    def step(x):
        y = kernels.dropout(x, None)
        return kernels.attention(y, y, y)

    x = torch.randn(2, 1, 4, 8)
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="eager")(x), step(x))


OLD_INTERPRETER = triton.__version__ < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0"
FIRST_CALL = """
import torch
import triton
from effbert import kernels
def f(x): return kernels.dropout_add_layer_norm(x, x, torch.ones(9), torch.zeros(9), 1e-5)
print(torch.compile(f, fullgraph=True, backend="aot_eager")(torch.randn(4, 9)).shape)
"""


@pytest.mark.parametrize("environment", [dict(EFFBERT_BACKEND="compile"), dict(EFFBERT_BACKEND="triton"), {}])
def test_a_process_may_begin_inside_compiled_code_under_any_backend(environment):
    if environment.get("EFFBERT_BACKEND") == "triton" and OLD_INTERPRETER:
        pytest.skip("the interpreter of Triton 3.6 needs NumPy below 2.4")
    variables = {**os.environ, "TRITON_INTERPRET": "1", **environment}
    command = [sys.executable, "-W", "error:Dynamo detected:UserWarning", "-c", FIRST_CALL]
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "[4, 9]" in done.stdout, done.stderr


def test_the_compile_backend_takes_as_many_expressions_as_there_are(monkeypatch):
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: whole(*args, **options, backend="aot_eager"))
    compiled._compiled.cache_clear()
    generator = np.random.default_rng(0)
    for number in range(12):
        expression = random_expression(STRUCTURES[generator.integers(16)], generator)
        width = expression.structure.inner_width(24)
        for rows in (3, 5 + number):
            tensors = [torch.randn(*shape) for shape in ((rows, 24), (24, 24), (24,), (24, 24), (24,))]
            results = [kernels.mlp(*tensors, expression, width, backend=name) for name in ("compile", "eager")]
            torch.testing.assert_close(*results)
    compiled._compiled.cache_clear()


def test_the_compile_backend_takes_every_kind_of_input(monkeypatch):
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: whole(*args, **options, backend="aot_eager"))
    compiled._compiled.cache_clear()
    expression = Expression.parse("linear1_2(gelu(linear1_2(x,wb1)),wb2)")
    kinds = itertools.product(
        (torch.float32, torch.bfloat16), ((3, 24), (2, 3, 24)), (False, True), (None, Dropout(0.1, 7, 1))
    )
    for dtype, shape, grad, dropped in kinds:
        shapes = (shape, (24, 24), (24,), (24, 24), (24,), (24,), (24,))
        tensors = [torch.randn(*one, dtype=dtype, requires_grad=grad) for one in shapes]
        results = [
            kernels.mlp_block(*tensors, expression, 12, 1e-5, dropped, backend=name) for name in ("compile", "eager")
        ]
        torch.testing.assert_close(*results, rtol=0.1, atol=0.1)
    for eps in range(12):
        x, weight = torch.randn(3, 24), torch.ones(24)
        results = [
            kernels.dropout_add_layer_norm(x, x, weight, weight, eps / 7, backend=name) for name in ("compile", "eager")
        ]
        torch.testing.assert_close(*results)
    for shape in itertools.product((1, 2, 5), (1, 3), (1, 4)):
        tensors = [torch.randn(*one) for one in ((*shape, 24), (24, 24), (24,), (24, 24), (24,))]
        results = [kernels.mlp(*tensors, expression, 12, backend=name) for name in ("compile", "eager")]
        torch.testing.assert_close(*results)
    query = torch.randn(2, 2, 5, 8)
    for mask, form, grad in itertools.product((None, "real", "released"), ("auto", "direct"), (False, True)):
        student = query.clone().requires_grad_(grad)
        options = {} if mask is None else dict(mask=mask, form=form)
        results = [
            kernels.score_mse(student, query, query, query + 1, torch.ones(2, 5), **options, backend=name)
            for name in ("compile", "eager")
        ]
        torch.testing.assert_close(*results)
    compiled._compiled.cache_clear()


def test_an_op_shows_its_arguments_and_takes_them_by_name():
    for op in dispatch.OPS:
        parameters = list(inspect.signature(getattr(kernels, op)).parameters)
        assert parameters == [*inspect.signature(getattr(eager, op)).parameters, "backend"]
        assert parameters[:-1] == list(inspect.signature(getattr(fused, op)).parameters)
    logits = torch.randn(2, 3, device=DEVICE)
    for backend in ("eager", "triton"):
        named = dict(teacher_logits=logits, temperature=2.0, backend=backend)
        by_name = kernels.soft_cross_entropy(student_logits=logits, **named)
        assert by_name == kernels.soft_cross_entropy(logits, logits, 2.0, backend=backend)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        kernels.dropout(dropout=None)


@pytest.mark.parametrize("backend", ["auto", "eager", "triton", "compile"])
@pytest.mark.parametrize("value", [None, 3, [1.0, 2.0], np.ones((2, 3))])
def test_what_is_no_tensor_is_named(value, backend):
    with pytest.raises(TypeError, match=r"dropout: x is a \w+: it must be a tensor"):
        kernels.dropout(value, None, backend=backend)
    with pytest.raises(TypeError, match=r"projected_mse: student_states is a \w+: it must be a list of tensors"):
        kernels.projected_mse(value, [], torch.ones(3, 2), torch.ones(3), backend=backend)


def test_an_empty_environment_variable_chooses_nothing(monkeypatch):
    monkeypatch.setenv("EFFBERT_BACKEND", "")
    assert dispatch.current() == "auto"


def run(code, *path):
    """In a Python without installed packages: one of this name may be among them."""
    search = "".join(f"sys.path.insert(0, {str(entry)!r}); " for entry in path)
    return subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; {search}{code}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )


def test_as_a_top_level_package_it_defines_nothing_and_imports_nothing_heavy():
    result = run("import kernels; print(hasattr(kernels, '__version__'), 'torch' in sys.modules)", ROOT)
    assert result.stdout.split() == ["False", "False"], result.stderr


def test_it_steps_aside_for_the_installed_package_of_its_name(tmp_path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '9.9'\nfrom kernels.inner import answer\n")
    (package / "inner.py").write_text("answer = 42\n")
    result = run("import kernels; print(kernels.__version__, kernels.answer, kernels.__file__)", tmp_path, ROOT)
    assert result.stdout.split() == ["9.9", "42", str(package / "__init__.py")], result.stderr
