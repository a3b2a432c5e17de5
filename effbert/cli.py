"""The commands, each a function that imports what it needs when it runs."""

import dataclasses
import os
import sys
from collections import Counter
from dataclasses import dataclass

USAGE = """usage: effbert COMMAND ...

  search   find a small BERT: effbert search --preset demo --output_dir runs/demo
  arch     parameters and FLOPs of an architecture: effbert arch "TEXT" --preset efficientbert
  kernels  the code generated for an expression: effbert kernels show "TEXT", with --ptx sm_90 its assembly;
           tile sizes measured on this GPU: effbert kernels tune --output tiles.json
  bench    every kernel built for GPUs that are not here, and its time predicted: effbert bench compile-report, effbert
           bench predict; kernels and one training step measured beside PyTorch: effbert bench kernels --output
           kernels.json, effbert bench step

effbert COMMAND --help lists a command's flags. EFFBERT_TRACEBACK=1 shows where an error came from."""


def run(arguments: list[str]) -> int:
    """Run one command; returns the exit status. ValueError and OSError carry one line for the person."""
    commands = {"search": search, "arch": arch, "kernels": kernels, "bench": bench}
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
    return commands[arguments[0]](arguments[1:])


def refuse_repeats(arguments: list[str]) -> None:
    """ValueError where a flag is given twice: the parser would keep the last one and say nothing."""
    flags = [argument.split("=", 1)[0].replace("-", "_") for argument in arguments if argument.startswith("--")]
    twice = [flag for flag, count in Counter(flags).items() if count > 1]
    if twice:
        raise ValueError(f"--{twice[0].lstrip('_')} is given {Counter(flags)[twice[0]]} times: give it once")


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


def parse(kind: type, arguments: list[str], program: str, **options):
    """Read a dataclass from the command line with tyro; its error box becomes one line."""
    import contextlib
    import io

    import tyro

    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(kind, args=arguments, use_underscores=True, prog=program, **options)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        lines = [line.strip("│ ─").strip() for line in box.getvalue().splitlines() if line[:1] not in "╭╰├"]
        text = " ".join(line for line in lines if line and not line.startswith("For full helptext"))
        raise ValueError(f"{text or 'the arguments cannot be read'} ({program} --help lists the flags)") from None


def search(arguments: list[str]) -> int:
    """effbert search: run or resume a whole search."""
    from effbert.config import PRESETS, SearchConfig

    name, arguments = take_flag(arguments, "preset")
    start = preset(name, PRESETS, SearchConfig(output_dir=""))
    about = (
        f"{SearchConfig.__doc__.splitlines()[0]} --preset NAME, one of {', '.join(PRESETS)}, sets the defaults below."
    )
    config = parse(SearchConfig, arguments, "effbert search", default=start, description=about)
    if not config.output_dir:
        raise ValueError("search needs --output_dir, the folder that the run is kept in")
    if name is None and not config.teacher:
        raise ValueError("search needs --teacher, a BERT-like encoder, or --preset demo, which trains a small one")
    quiet_libraries()
    from effbert.search.run import run_search

    run_search(config)
    return 0


def quiet_libraries() -> None:
    """Progress bars and advice of the libraries below would tear our own lines."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


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


def bench(arguments: list[str]) -> int:
    """effbert bench WORD."""
    from effbert.bench import compile_report, predict, step
    from effbert.bench import kernels as kernel_benchmarks

    known = {
        "compile-report": compile_report.main,
        "predict": predict.main,
        "kernels": kernel_benchmarks.main,
        "step": step.main,
    }
    function, rest = second_word("bench", arguments, known)
    return function(rest) or 0
