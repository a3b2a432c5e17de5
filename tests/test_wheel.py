"""A wheel built from the tree installs elsewhere, imports, and answers --help, from any folder."""

import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    source = folder / "source"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("the tree is no git checkout, so its files cannot be told from build leftovers")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*build, str(source)], check=True)
    return next(folder.glob("effbert-*.whl"))


def test_an_installed_wheel_imports_and_runs(wheel, tmp_path):
    venv.create(tmp_path / "venv", system_site_packages=False, with_pip=False)
    site = next((tmp_path / "venv" / "lib").glob("python*")) / "site-packages"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True)
    packages = {path.name for path in site.iterdir()}
    assert "effbert" in packages and not {"kernels", "search", "bench", "tests"} & packages
    # the libraries below come from this environment, without its editable install of effbert
    here = [entry for entry in sys.path if entry.endswith("site-packages")]
    (site / "libraries.pth").write_text("\n".join(here))
    python = tmp_path / "venv" / "bin" / "python"
    code = (
        "import effbert, effbert.kernels, effbert.search.run, effbert.bench, effbert.data.builtin;"
        "from effbert.kernels import mlp; print(effbert.__file__)"
    )
    shown = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert Path(shown.stdout.strip()).is_relative_to(site)
    helped = subprocess.run([python, "-m", "effbert", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert helped.returncode == 0 and "effbert search" in helped.stdout
