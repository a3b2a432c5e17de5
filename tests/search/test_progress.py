"""What a person sees: lines with seconds, and what the project logs."""

import io
import logging

from rich.console import Console

from effbert.search.progress import Reporter


def test_the_projects_log_is_shown_while_the_reporter_is_open():
    output, log = io.StringIO(), logging.getLogger("effbert.kernels")
    with Reporter(Console(file=output, width=100)) as reporter:
        log.info("kernels: eager PyTorch (inputs on the CPU)")
        reporter.say("[a] line")
    log.info("afterwards")
    lines = output.getvalue().splitlines()
    assert [line.split(" s ")[1].strip() for line in lines] == [
        "kernels: eager PyTorch (inputs on the CPU)",
        "[a] line",
    ]
    assert not logging.getLogger("effbert").handlers
