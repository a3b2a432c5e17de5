"""The commands, each a function that imports what it needs when it runs."""

import dataclasses
import sys
from collections import Counter
from dataclasses import dataclass

from effbert.flags import parse, preset, quiet_libraries, take_flag
from effbert.parallel import ALONE, World

USAGE = """usage: effbert COMMAND ...

  search   find a small BERT: effbert search --preset demo --output_dir runs/demo; with a process for each of two GPUs:
           torchrun --nproc-per-node 2 -m effbert search ...
  arch     parameters and FLOPs of an architecture: effbert arch "TEXT" --preset efficientbert
  report   one HTML page about a search, finished or under way: effbert report runs/demo
  evaluate official metrics of a saved model: effbert evaluate MODEL --task mnli --data_dir GLUE
  predict  the GLUE server's zip, or SQuAD's answers: effbert predict mrpc=MODEL rte=MODEL --output glue.zip
  kernels  the code generated for an expression: effbert kernels show "TEXT", with --ptx sm_90 its assembly;
           tile sizes measured on this GPU: effbert kernels tune --output tiles.json
  bench    every kernel built for GPUs that are not here, and its time predicted: effbert bench compile-report, effbert
           bench predict; kernels and one training step measured beside PyTorch: effbert bench kernels --output
           kernels.json, effbert bench step; what a candidate costs beside the published procedure:
           effbert bench search-cost --preset demo --output_dir runs/cost; what a search of the published size would
           take on a GPU that is not here: effbert bench forecast --gpu H200

effbert COMMAND --help lists a command's flags. EFFBERT_TRACEBACK=1 shows where an error came from."""


def run(arguments: list[str], world: World = ALONE) -> int:
    """Run one command; returns the exit status. ValueError and OSError carry one line for the person.

    world: the processes that all run it, a search only."""
    commands = {
        **{"search": search, "arch": arch, "report": report, "kernels": kernels, "bench": bench},
        **{"evaluate": evaluate, "predict": predict},
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from effbert import __version__

        print(__version__)
        return 0
    if arguments[0] not in commands:
        raise ValueError(f"unknown command {arguments[0]!r}: one of {', '.join(commands)}; effbert --help tells more")
    refuse_repeats(arguments[1:])
    if arguments[0] == "search":
        return search(arguments[1:], world)
    if world.size > 1:
        raise ValueError(f"effbert {arguments[0]} is for one process: start it without torchrun")
    return commands[arguments[0]](arguments[1:])


def refuse_repeats(arguments: list[str]) -> None:
    """ValueError where a flag is given twice: the parser would keep the last one and say nothing."""
    flags = [argument.split("=", 1)[0].replace("-", "_") for argument in arguments if argument.startswith("--")]
    twice = [flag for flag, count in Counter(flags).items() if count > 1]
    if twice:
        raise ValueError(f"--{twice[0].lstrip('_')} is given {Counter(flags)[twice[0]]} times: give it once")


def search(arguments: list[str], world: World = ALONE) -> int:
    """effbert search: run or resume a whole search."""
    from effbert.config import PRESETS, SearchConfig

    name, arguments = take_flag(arguments, "preset")
    assumed, arguments = take_flag(arguments, "flops_per_second")
    dry, arguments = "--dry_run" in arguments, [argument for argument in arguments if argument != "--dry_run"]
    start = preset(name, PRESETS, SearchConfig(output_dir=""))
    about = (
        f"{SearchConfig.__doc__.splitlines()[0]} --preset NAME, one of {', '.join(PRESETS)}, sets the defaults below. "
        "--dry_run forecasts what it costs, from a few real steps or at --flops_per_second, and starts nothing."
    )
    config = parse(SearchConfig, arguments, "effbert search", default=start, description=about)
    if not config.output_dir and not dry:
        raise ValueError("search needs --output_dir, the folder that the run is kept in")
    if name in (None, "paper", "paper-fast") and not config.teacher:
        raise ValueError("search needs --teacher, a BERT-like encoder, or --preset demo, which trains a small one")
    if not config.corpus:
        raise ValueError("search needs --corpus, plain text for general distillation: a text file or a folder of them")
    quiet_libraries()
    from effbert.search.run import dry_run, run_search

    if dry and world.size > 1:
        raise ValueError("--dry_run forecasts a search in one process: start it without torchrun")
    if dry:
        print("\n".join(dry_run(config, _rate(assumed))))
    elif assumed is not None:
        raise ValueError("--flops_per_second is for --dry_run: a search takes the time it takes")
    else:
        run_search(config, world=world)
    return 0


def _rate(text: str | None) -> float | None:
    """FLOP/s above 0; None stays None."""
    if text is None:
        return None
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise ValueError(f"--flops_per_second {text}: give a number above 0, such as 2e14")
    return rate


def report(arguments: list[str]) -> int:
    """effbert report: write the page about a run and say where it is."""
    import tyro

    @dataclass(frozen=True)
    class Arguments:
        """One HTML page about a run, finished or under way, that needs no other file and no network.

        run: the --output_dir of a search. output: where to write the page; RUN/report.html where it is not given.
        storage: the search's --storage, where that holds a password: the run keeps it without.
        """

        run: tyro.conf.Positional[str]
        output: str | None = None
        storage: str = ""

    given = parse(Arguments, arguments, "effbert report")
    from effbert.search.report_html import write_report

    print(write_report(given.run, given.output, given.storage))
    return 0


def evaluate(arguments: list[str]) -> int:
    """effbert evaluate: the official metrics of a saved model."""
    from effbert.answers import main_evaluate

    return main_evaluate(arguments) or 0


def predict(arguments: list[str]) -> int:
    """effbert predict: what the GLUE server and SQuAD's scripts take."""
    from effbert.answers import main_predict

    return main_predict(arguments) or 0


def arch(arguments: list[str]) -> int:
    """effbert arch: print what an architecture has and costs, with and without the training-only projection."""
    import tyro

    from effbert.architecture import Architecture, Dimensions
    from effbert.config import DIMENSIONS

    name, arguments = take_flag(arguments, "preset")
    sizes = preset(name, DIMENSIONS, Dimensions())

    @dataclass(frozen=True)
    class Arguments:
        """Parameters and FLOPs of an architecture by part."""

        text: tyro.conf.Positional[str]
        length: int = 128
        num_labels: int = 3
        dims: tyro.conf.OmitArgPrefixes[Dimensions] = dataclasses.field(default=sizes)

    given = parse(Arguments, arguments, "effbert arch")
    print_costs(Architecture.parse(given.text), given.dims, given.length, given.num_labels)
    return 0


def print_costs(architecture, dims, length: int, num_labels: int) -> None:
    """The table of `effbert arch`."""
    from rich.console import Console
    from rich.table import Table

    from effbert.architecture import count_flops, count_parameters

    parameters, flops = count_parameters(architecture, dims), count_flops(architecture, dims, length)
    table = Table(title=f"{len(architecture.layers)} layers, hidden_size {dims.hidden_size}, length {length}")
    for column in ("part", "parameters", "MFLOPs"):
        table.add_column(column, justify="left" if column == "part" else "right")

    def line(part, count, cost):
        table.add_row(part, f"{count:,}", f"{cost / 1e6:,.1f}")

    line("embeddings", parameters.embeddings, flops.embeddings)
    line("attention", parameters.attention, flops.attention)
    for number, layer in enumerate(architecture.layers):
        line(f"mlp {number + 1}  {layer}", parameters.mlp[number], flops.mlp[number])
    line("encoder", parameters.total, flops.total)
    line("fit_dense (training only)", parameters.fit_dense, flops.fit_dense)
    line("encoder with fit_dense", parameters.total_with_projection, flops.total_with_projection)
    line("pooler", parameters.pooler, flops.pooler)
    line(f"head of {num_labels}", parameters.head(num_labels), flops.head(num_labels))
    deployed = [part.total + part.pooler + part.head(num_labels) for part in (parameters, flops)]
    line("deployed: encoder, pooler, head", *deployed)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def second_word(command: str, arguments: list[str], known: dict):
    """The function that `effbert COMMAND WORD` names, and the arguments after WORD."""
    if not arguments or arguments[0] not in known:
        found = f"unknown {arguments[0]!r}" if arguments else "a word is missing"
        raise ValueError(f"effbert {command}: {found}: one of {', '.join(known)}")
    return known[arguments[0]], arguments[1:]


def kernels(arguments: list[str]) -> int:
    """effbert kernels WORD."""
    from effbert.bench import tune

    function, rest = second_word("kernels", arguments, {"show": kernels_show, "tune": tune.main})
    return function(rest) or 0


def kernels_show(arguments: list[str]) -> int:
    """effbert kernels show: print the elementwise functions of an expression, or the kernels they end up in."""
    import tyro

    @dataclass(frozen=True)
    class Arguments:
        """The Triton functions generated for an expression's three slots.

        ptx: print instead what `mlp` launches at the published shape, built for this architecture, for example sm_90.
        """

        text: tyro.conf.Positional[str]
        ptx: str | None = None

    given = parse(Arguments, arguments, "effbert kernels show")
    if given.ptx is None:
        from effbert.kernels.codegen import source_of

        print(source_of(given.text))
    else:
        from effbert.kernels import Expression

        print_assembly(Expression.parse(given.text).check(), given.ptx)
    return 0


def print_assembly(expression, architecture: str) -> None:
    """The kernels of one forward and backward of `mlp`, each below a comment with its resources."""
    from effbert.bench.meta_cases import mlp_cases, record
    from effbert.kernels.aot import build_all

    comment = ";" if architecture.startswith("gfx") else "//"
    launches = record(mlp_cases(expression)[0], architecture, "bf16")
    for built, count in build_all(launches, architecture).values():
        times = f", {count} launches" if count > 1 else ""
        memory = f"{built.stack} bytes of stack, {built.shared} bytes of shared memory"
        matrix = ", ".join(built.matrix_instructions) or "no matrix instructions"
        print(f"{comment} {built.name} on {architecture}{times}: {built.registers} registers, {memory}, {matrix}")
        print(built.assembly)


BENCHMARKS = {
    "compile-report": "compile_report",
    "predict": "predict",
    "kernels": "kernels",
    "step": "step",
    "search-cost": "search_cost",
    "samplers": "samplers",
    "forecast": "forecast",
}


def bench(arguments: list[str]) -> int:
    """effbert bench WORD."""
    import importlib

    module, rest = second_word("bench", arguments, BENCHMARKS)
    return importlib.import_module(f"effbert.bench.{module}").main(rest) or 0
