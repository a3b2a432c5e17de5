"""Training checkpoints: everything a phase needs to go on exactly where it stopped, in one atomic file.

The file is read with `weights_only`, so a pickle that carries code is refused and never run; its fingerprint ties it to
the phase and configuration that wrote it.
"""

from pathlib import Path

import torch

from effbert.files import atomic_path

FORMAT = 1


def save(path: str | Path, fingerprint: str, state: dict) -> None:
    """Write `state` (nested dicts and lists of tensors, numbers and strings) to `path`, all or nothing."""
    with atomic_path(path) as temporary:
        with open(temporary, "wb") as file:  # given a path, torch hides that the disk is full
            torch.save({"format": FORMAT, "fingerprint": fingerprint, "state": state}, file)


def load(path: str | Path, fingerprint: str) -> dict:
    """The state saved at `path`; ValueError in one line where it is damaged, unsafe, or of another phase or setting."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        kind = "holds more than tensors and is not executed" if "weights" in str(error).lower() else "is damaged"
        raise ValueError(f"checkpoint {path} {kind}: delete it to restart this phase") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or "state" not in content:
        raise ValueError(f"checkpoint {path} is of another version of effbert: delete it to restart this phase")
    if content["fingerprint"] != fingerprint:
        raise ValueError(
            f"checkpoint {path} belongs to {content['fingerprint']!r}, not to {fingerprint!r}: "
            "delete it to restart this phase"
        )
    return content["state"]


def own_memory(model: torch.nn.Module) -> torch.nn.Module:
    """`model` with every weight in memory of its own.

    transformers leaves loaded weights as views into the mapped file, and the alignment of a matrix changes the last bit
    of its products: a resumed run must not differ from an undisturbed one by that.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model
