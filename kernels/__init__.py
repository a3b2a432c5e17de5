"""Fused ops for candidate MLPs and distillation losses; tensors only, nothing of BERT.

Importing this package does nothing: the names below load on first use. With the repository root on `sys.path` this
folder is also found as top-level `kernels`, the name of a Hugging Face package that transformers imports; there it
steps aside for the installed one.
"""

import importlib

_EXPORTS = {
    "Expression": "expression",
    "ExpressionError": "expression",
    "Structure": "expression",
    "STRUCTURES": "expression",
    "Dropout": "philox",
    "attention": "dispatch",
    "distill_attention": "dispatch",
    "gradients_in_place": "library",
    "few_compilations": "tiles",
    "dropout": "dispatch",
    "dropout_add_layer_norm": "dispatch",
    "mlp": "dispatch",
    "mlp_block": "dispatch",
    "projected_mse": "dispatch",
    "score_mse": "dispatch",
    "soft_cross_entropy": "dispatch",
    "use_backend": "dispatch",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _step_aside():
    """Let the installed package of this name take our place in sys.modules, where there is one."""
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    here = Path(__file__).resolve().parent.parent
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    spec = PathFinder.find_spec("kernels", elsewhere)
    if spec is not None and spec.loader is not None:
        module = module_from_spec(spec)
        sys.modules["kernels"] = module
        spec.loader.exec_module(module)


if __name__ == "kernels":
    _step_aside()
