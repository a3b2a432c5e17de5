"""The choice of backend, and that importing kernels does nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from effbert import kernels
from effbert.kernels import dispatch

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
    with pytest.raises(ValueError, match="'nonsense'"):
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
        torch.testing.assert_close(soft_loss(backend), eager, rtol=1e-6, atol=1e-7)


@pytest.fixture
def fresh(monkeypatch, caplog):
    """Nothing said and nothing remembered yet."""
    forget()
    caplog.set_level("INFO", "effbert.kernels")
    yield monkeypatch
    monkeypatch.undo()
    forget()


def forget():
    for function in (dispatch.why_not_triton, dispatch._why_no_triton, dispatch._log_once):
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
