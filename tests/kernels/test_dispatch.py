"""The choice of backend, and that importing kernels does nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

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
    with pytest.raises(ValueError, match="one of auto, eager"), kernels.use_backend("triton"):
        pass


def test_the_environment_chooses_the_backend(monkeypatch):
    monkeypatch.setenv("EFFBERT_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="'nonsense'"):
        dispatch.current()
    with kernels.use_backend("eager"):
        assert dispatch.current() == "eager"


def run(code, *path):
    search = "".join(f"sys.path.insert(0, {str(entry)!r}); " for entry in path)
    return subprocess.run(
        [sys.executable, "-c", f"import sys; {search}{code}"], capture_output=True, text=True, cwd=ROOT, check=False
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
