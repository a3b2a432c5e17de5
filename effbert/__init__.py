"""effbert: find and train small BERTs on one GPU, fast.

Importing it registers the model type "effbert" with the Auto classes of transformers; everything else loads on use.
"""

from pathlib import Path as _Path

__version__ = "0.1.0"

_root = _Path(__file__).resolve().parent.parent
if (_root / "setup.py").exists() and (_root / "kernels").is_dir():
    __path__.append(str(_root))  # run from a checkout: effbert.kernels, effbert.search, effbert.bench lie beside us

from effbert.early import one_line_if_stopped as _one_line_if_stopped  # noqa: E402  (needs the __path__ above)

with _one_line_if_stopped():
    from effbert.model import register as _register

    _register()
