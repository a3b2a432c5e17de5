"""The one line that the person at the keyboard reads: errors of the libraries below, and what is no model."""

from collections.abc import Iterable, Sequence
from pathlib import Path


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something; the error's type where it has no message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def first_of(names: Iterable[str], most: int = 6) -> str:
    """Names as text, of more than `most` the first and how many there are."""
    names = sorted(names)
    more = f" ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more


RUN_STUDENTS = ("best", "model", "model-*", "export/*")  # where the folder of a run has its models
RUN_TEACHERS = ("model", "teacher/tasks/*", "teacher/base", "teacher-*/model")
RUN_STARTS = ("supernet", "stage3/supernet", *RUN_STUDENTS)


def refuse_run(where: str, folder: Path, places: Sequence[str]) -> None:
    """ValueError, with the models that lie in it, where a folder holds no weights but is that of a run with some.

    where: names the folder in the error. places: where to look, as globs from the folder.
    """
    if any(folder.glob("*.safetensors")):
        return
    found = [path.parent for place in places for path in sorted(folder.glob(f"{place}/model.safetensors"))]
    if found:
        given = ", ".join(map(str, found[:3])) + (f" or {len(found) - 3} more" if len(found) > 3 else "")
        raise ValueError(f"{where} is the folder of a run: give a model in it, {given}")
