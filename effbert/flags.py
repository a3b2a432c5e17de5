"""Reading a command line: what every command that takes settings shares."""

import argparse
import dataclasses
import math
import os
import re
import sys
from collections.abc import Callable


def take_flag(arguments: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of --name (as `--name value` or `--name=value`) and the other arguments."""
    rest, value = [], None
    items = iter(arguments)
    for item in items:
        if item == f"--{name}":
            value = next(items, None)
            if value is None:
                raise ValueError(f"--{name} needs a value")
        elif item.startswith(f"--{name}="):
            value = item.split("=", 1)[1]
        else:
            rest.append(item)
    return value, rest


def preset(name: str | None, presets: dict, default):
    """The value a preset stands for; `default` where none is named."""
    if name is None:
        return default
    if name not in presets:
        raise ValueError(f"unknown preset {name!r}: one of {', '.join(presets)}")
    return presets[name]()


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are a ValueError of one line, as those of `parse`."""

    def error(self, message: str):
        """Raise it."""
        raise ValueError(f"{message} ({self.prog} --help lists the flags)")


def run_alone(main: Callable[[], int | None], name: str):
    """End the process with main()'s status, or with one line for bad input: for modules that python -m starts."""
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"{name}: {error}")


def parse(kind: type, arguments: list[str], program: str, **options):
    """Read a dataclass from the command line with tyro; its error box becomes one line, and so does a NaN."""
    import contextlib
    import io

    import tyro

    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            given = tyro.cli(kind, args=arguments, use_underscores=True, prog=program, **options)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        lines = [line.strip("│ ─").strip() for line in box.getvalue().splitlines() if line[:1] not in "╭╰├"]
        text = " ".join(line for line in lines if line and not line.startswith("For full helptext"))
        text = re.sub(
            r"^.*? -{8,} | -{8,}$", "", text
        )  # where the terminal has no box characters: title, rule, text, rule
        raise ValueError(f"{text or 'the arguments cannot be read'} ({program} --help lists the flags)") from None
    _refuse_nan(given)
    return given


def _refuse_nan(given, name: str = "") -> None:
    if dataclasses.is_dataclass(given):
        for field in dataclasses.fields(given):
            _refuse_nan(getattr(given, field.name), f"{name}.{field.name}".lstrip("."))
    elif isinstance(given, tuple):
        for value in given:
            _refuse_nan(value, name)
    elif isinstance(given, float) and math.isnan(given):
        raise ValueError(f"--{name} nan: it must be a number")


def quiet_libraries() -> None:
    """Progress bars, advice and errors of the libraries below would tear our own lines, which say the errors too."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
