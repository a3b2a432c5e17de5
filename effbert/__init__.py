"""effbert: find and train small BERTs on one GPU, fast.

Importing it registers the model type "effbert" with the Auto classes of transformers; everything else loads on use.
"""

from pathlib import Path as _Path

__version__ = "0.1.0"

_root = _Path(__file__).resolve().parent.parent
if (_root / "setup.py").exists() and (_root / "kernels").is_dir():
    __path__.append(str(_root))  # run from a checkout: effbert.kernels, effbert.search, effbert.bench lie beside us

from effbert.model import register as _register  # noqa: E402  (needs the __path__ above)

_register()
