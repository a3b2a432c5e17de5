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
  teacher  fine-tune an encoder on a task: effbert teacher --teacher BERT --task mrpc --data_dir GLUE --output_dir mrpc
  pretrain distil a supernet, or one model, on text: effbert pretrain --teacher BERT --corpus TEXT --output_dir net
  distill  distil one model, on text and then a task: effbert distill --model efficientbert --start_from net/model
           --teacher mrpc/model --task mrpc --data_dir GLUE --corpus TEXT --output_dir student
  paper    a search, then winner and rivals on every task, as a plan that goes on where it stopped: effbert paper
           --preset paper-fast --teacher BERT --corpus TEXT --data_dir GLUE --output_dir runs/paper; --show: its state
  arch     parameters and FLOPs of an architecture, a named or a saved model: effbert arch efficientbert-tiny
  import   a checkpoint of the authors' as a transformers folder:
           effbert import ckpt_ep10.bin --architecture efficientbert --output_dir student
  report   one HTML page about a search or a plan, finished or under way: effbert report runs/demo
  evaluate official metrics of a saved model: effbert evaluate MODEL --task mnli --data_dir GLUE
  predict  the GLUE server's zip, or SQuAD's answers: effbert predict mrpc=MODEL rte=MODEL --output glue.zip; or a label
           for each of your own rows: effbert predict MODEL --predict_file rows.csv --text_columns text --output out.csv
  export   a folder to deploy, for transformers or ONNX Runtime: effbert export runs/demo/best --output_dir small
  kernels  the code generated for an expression: effbert kernels show "TEXT", with --ptx sm_90 its assembly;
           tile sizes measured on this GPU: effbert kernels tune --output tiles.json
  bench    every kernel built for GPUs that are not here, and its time predicted: effbert bench compile-report, effbert
           bench predict; kernels and one training step measured beside PyTorch: effbert bench kernels --output
           kernels.json, effbert bench step; what a candidate costs beside the published procedure:
           effbert bench search-cost --preset demo --output_dir runs/cost; what a search of the published size would
           take on a GPU that is not here: effbert bench forecast --gpu H200; how fast a model answers beside BERT-base
           and other small ones: effbert bench inference --output inference.json

effbert COMMAND --help lists a command's flags. EFFBERT_TRACEBACK=1 shows where an error came from."""


def run(arguments: list[str], world: World = ALONE) -> int:
    """Run one command; returns the exit status. ValueError and OSError carry one line for the person.

    world: the processes that all run it, where it `is_shared`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from effbert import __version__

        print(__version__)
        return 0
    if arguments[0] not in COMMANDS:
        raise ValueError(f"unknown command {arguments[0]!r}: one of {', '.join(COMMANDS)}; effbert --help tells more")
    refuse_repeats(arguments[1:])
    if is_shared(arguments):
        return COMMANDS[arguments[0]](arguments[1:], world)
    return COMMANDS[arguments[0]](arguments[1:])


def is_shared(arguments: list[str]) -> bool:
    """Whether several processes run this command together; any other one of them does while the rest wait."""
    return bool(arguments) and arguments[0] in SHARED and not PRINTING.intersection(arguments)


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
        "--dry_run forecasts what it costs in one process, from a few real steps or at --flops_per_second, and starts "
        "nothing."
    )
    config = parse(SearchConfig, arguments, "effbert search", default=start, description=about)
    check_search(config, name, kept=not dry)
    quiet_libraries()
    from effbert.search.run import dry_run, run_search

    if dry:
        print("\n".join(dry_run(config, _rate(assumed))))
    elif assumed is not None:
        raise ValueError("--flops_per_second is for --dry_run: a search takes the time it takes")
    else:
        run_search(config, world=world)
    return 0


def teacher(arguments: list[str], world: World = ALONE) -> int:
    """effbert teacher: fine-tune an encoder on a task."""
    from effbert.config import TeacherConfig
    from effbert.search.runs import run_teacher

    return _single(TeacherConfig, run_teacher, "effbert teacher", arguments, world)


def pretrain(arguments: list[str], world: World = ALONE) -> int:
    """effbert pretrain: general distillation of a supernet or one model."""
    from effbert.config import PretrainConfig
    from effbert.search.runs import check_sizes, refuse_diverged, run_pretraining

    return _single(PretrainConfig, run_pretraining, "effbert pretrain", arguments, world, check_sizes, refuse_diverged)


def distill(arguments: list[str], world: World = ALONE) -> int:
    """effbert distill: general, then task distillation of one model."""
    from effbert.config import DistillConfig
    from effbert.search.runs import check_sizes, refuse_diverged, run_distillation

    return _single(DistillConfig, run_distillation, "effbert distill", arguments, world, check_sizes, refuse_diverged)


def paper(arguments: list[str], world: World = ALONE) -> int:
    """effbert paper: a search, and its winner and rivals distilled on every task."""
    from effbert.search.paper import PAPERS, PaperConfig, run_paper, show_plan

    name, arguments = take_flag(arguments, "preset")
    show, arguments = "--show" in arguments, [argument for argument in arguments if argument != "--show"]
    start = preset(name, PAPERS, PaperConfig(output_dir=""))
    about = (
        f"{PaperConfig.__doc__.splitlines()[0]} --preset NAME, one of {', '.join(PAPERS)}, sets the defaults below. "
        "--show prints what is done and what is left in --output_dir, and starts nothing."
    )
    config = parse(PaperConfig, arguments, "effbert paper", default=start, description=about)
    if show:
        from rich.console import Console

        if not config.output_dir:
            raise ValueError("--output_dir is missing, the folder of the plan to show")
        Console().print(show_plan(config))
        return 0
    check_search(config, name)
    quiet_libraries()
    run_paper(config, world=world)
    return 0


def check_search(config, name: str | None, kept: bool = True) -> None:
    """ValueError where a search of preset `name` lacks what only a person can give; `kept` in a folder or not."""
    if kept and not config.output_dir:
        raise ValueError("--output_dir is missing, the folder that the run is kept in")
    if name in (None, "paper", "paper-fast") and not config.teacher:
        raise ValueError("--teacher is missing, a BERT-like encoder; --preset demo trains a small one")
    if not config.corpus:
        raise ValueError("--corpus is missing, plain text for general distillation: a text file or a folder of them")
    if name == "paper" and not (config.candidate_corpus or config.start_from):
        raise ValueError(
            "--candidate_corpus is missing, the text that the published candidates learn from: Wikipedia alone"
        )


def _single(
    kind,
    run,
    program: str,
    arguments: list[str],
    world: World,
    check=lambda config: None,
    judge=lambda results: None,
) -> int:
    config = parse(kind, arguments, program)
    quiet_libraries()
    check(config)
    judge(run(config, world=world))
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

        run: the --output_dir of a search or a plan. output: where to write the page; RUN/report.html where it is not
        given. storage: the search's --storage, where that holds a password: the run keeps it without.
        """

        run: tyro.conf.Positional[str]
        output: str | None = None
        storage: str = ""

    given = parse(Arguments, arguments, "effbert report")
    from effbert.search.report_html import write_report

    print(write_report(given.run, given.output, given.storage))
    return 0


def export(arguments: list[str]) -> int:
    """effbert export: write a student as a folder to deploy and say what is in it."""
    import tyro

    from effbert.export import ExportConfig
    from effbert.export import export as write
    from effbert.pace import on_stderr

    @dataclass(frozen=True)
    class Arguments:
        """A trained student as a folder to deploy.

        model: Folder that a student was saved in, such as a search's best/.
        """

        model: tyro.conf.Positional[str]
        settings: tyro.conf.OmitArgPrefixes[ExportConfig]

    given = parse(Arguments, arguments, "effbert export")
    quiet_libraries()
    with on_stderr():
        print("\n".join(write(given.model, given.settings)))
    return 0


def evaluate(arguments: list[str]) -> int:
    """effbert evaluate: the official metrics of a saved model."""
    from effbert.answers import main_evaluate
    from effbert.pace import on_stderr

    with on_stderr():
        return main_evaluate(arguments) or 0


def predict(arguments: list[str]) -> int:
    """effbert predict: what the GLUE server and SQuAD's scripts take, and answers to one's own rows."""
    from effbert.answers import main_predict
    from effbert.pace import on_stderr

    with on_stderr():
        return main_predict(arguments) or 0


def arch(arguments: list[str]) -> int:
    """effbert arch: print what an architecture has and costs, with and without the training-only projection."""
    import tyro

    from effbert.architecture import Dimensions, attention_head_size
    from effbert.models import Sizes, sizes_of

    if "preset" in (argument.partition("=")[0].lstrip("-") for argument in arguments):
        raise ValueError("--preset is a search's: --sizes_of MODEL takes the sizes of a model")
    other, arguments = take_flag(arguments, "sizes_of")
    if "(" in (other or ""):
        raise ValueError(f"--sizes_of {other}: an architecture has no sizes: give a model's name or folder")

    def read(sizes: Sizes):
        @dataclass(frozen=True)
        class Arguments:
            """Parameters and FLOPs of an architecture by part.

            text: an expression a layer, joined by ", "; or a model, whose sizes are then the defaults below: a name,
            such as efficientbert, or the folder that a student or a BERT is saved in. --sizes_of MODEL takes those of
            another one.
            """

            text: tyro.conf.Positional[str]
            length: int = min(128, sizes.longest)
            num_labels: int = sizes.num_labels
            dims: tyro.conf.OmitArgPrefixes[Dimensions] = dataclasses.field(default=sizes.dims)

        return parse(Arguments, arguments, "effbert arch")

    of_text = sizes_of(read(Sizes(None, Dimensions())).text)
    given = read(sizes_of(other) if other else of_text)
    attention_head_size(given.dims.hidden_size, given.dims.num_attention_heads)
    for flag in ("length", "num_labels"):
        if getattr(given, flag) < 1:
            raise ValueError(f"--{flag} {getattr(given, flag)}: must be at least 1")
    print_costs(of_text.architecture, given.dims, given.length, given.num_labels, of_text.head)
    return 0


def import_(arguments: list[str]) -> int:
    """effbert import: a checkpoint of the authors' as a transformers folder."""
    import tyro

    @dataclass(frozen=True)
    class Arguments:
        """A student or supernet in the authors' checkpoint format, as a folder that transformers loads.

        checkpoint: their file. architecture: an expression a layer, joined by ", ", the name of a published model such
        as efficientbert, whose sizes the file must have, or "supernet" for all weights and heads of one. output_dir: a
        new folder. num_attention_heads: which the file does not tell. task: whose labels its head has, such as mnli; of
        several heads the one to keep. vocab: BERT's vocab.txt, for a tokenizer.
        """

        checkpoint: tyro.conf.Positional[str]
        architecture: str
        output_dir: str
        num_attention_heads: int = 12
        task: str | None = None
        vocab: str | None = None

    given = parse(Arguments, arguments, "effbert import")
    quiet_libraries()
    from effbert.model import without_pooler
    from effbert.released import import_checkpoint, save_imported

    model = import_checkpoint(given.checkpoint, given.architecture, given.num_attention_heads, given.task)
    save_imported(model, given.output_dir, given.vocab)
    without = "" if given.vocab else ", without a tokenizer: --vocab adds one"
    print(
        f"{given.output_dir}: {type(model).__name__}, {model.num_parameters():,} parameters{without}",
        *without_pooler(model),
        sep="\n",
    )
    return 0


def print_costs(architecture, dims, length: int, num_labels: int, head: str | None) -> None:
    """The table of `effbert arch`; head as in effbert.models.Sizes."""
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
    of_head = [parameters.head(num_labels), flops.head(num_labels, length if head == "spans" else 1)]
    of_pooler = [0, 0] if head == "spans" else [parameters.pooler, flops.pooler]
    if head == "classification":
        line("pooler", *of_pooler)
    if head:
        line(f"head of {num_labels}", *of_head)
        deployed = map(sum, zip([parameters.total, flops.total], of_pooler, of_head, strict=True))
        line(f"deployed: encoder, {'pooler, ' if head == 'classification' else ''}head", *deployed)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def second_word(command: str, arguments: list[str], known: dict):
    """The function that `effbert COMMAND WORD` names, and the arguments after WORD; --help in its place lists all."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"effbert {command} WORD, one of {', '.join(known)}; effbert {command} WORD --help lists its flags")
        raise SystemExit(0)
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
    from effbert.kernels import Expression

    expression = Expression.parse(given.text).check()
    if given.ptx is None:
        from effbert.kernels.codegen import source_of

        print(source_of(expression))
    else:
        print_assembly(expression, given.ptx)
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
    "overhead": "overhead",
    "kernels": "kernels",
    "step": "step",
    "search-cost": "search_cost",
    "inference": "inference",
    "samplers": "samplers",
    "rank-agreement": "rank_agreement",
    "forecast": "forecast",
}


def bench(arguments: list[str]) -> int:
    """effbert bench WORD."""
    import importlib

    module, rest = second_word("bench", arguments, BENCHMARKS)
    return importlib.import_module(f"effbert.bench.{module}").main(rest) or 0


SHARED = ("search", "teacher", "pretrain", "distill", "paper")  # commands that several processes run together
PRINTING = {"-h", "--help", "--dry_run", "--show"}  # with which they only print

COMMANDS = {
    "search": search,
    "teacher": teacher,
    "pretrain": pretrain,
    "distill": distill,
    "paper": paper,
    "arch": arch,
    "import": import_,
    "report": report,
    "evaluate": evaluate,
    "predict": predict,
    "export": export,
    "kernels": kernels,
    "bench": bench,
}
