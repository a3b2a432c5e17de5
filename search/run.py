"""A whole search, from text to table, in one folder: the same call again goes on where the last one stopped."""

import platform
import time
from pathlib import Path

import torch

from effbert import __version__
from effbert.architecture import Architecture
from effbert.config import SearchConfig, as_dict
from effbert.files import remove_partial, write_atomic
from effbert.search import report
from effbert.search.final import final_row, rows, teacher_row
from effbert.search.progress import Reporter
from effbert.search.space import ArchitectureSpace
from effbert.search.stages import (
    search_stage,
    shared_candidate,
    shared_supernet,
    trained_candidate,
    warm_supernet,
)
from effbert.search.study import RunFolder, Study
from effbert.workspace import Workspace, open_workspace


def run_search(config: SearchConfig, reporter: Reporter | None = None) -> dict:
    """Run or resume the search that `config` describes; returns what <output_dir>/results.json holds.

    ValueError or FileNotFoundError, in one line, where the input or the folder will not do.
    """
    reporter = reporter or Reporter()
    with RunFolder(config.output_dir, as_dict(config)) as folder:
        path = Path(folder.path)
        remove_partial(path)
        workspace = open_workspace(config, path, reporter.say)
        winner, spaces = three_stages(workspace, Study(path), reporter)
        return finish(workspace, winner, spaces["coarse"], reporter)


def three_stages(workspace: Workspace, study: Study, reporter: Reporter) -> tuple[Architecture, dict]:
    """Coarse, operations, fine; each stage starts from the winner of the one before."""
    config = workspace.config
    dims = workspace.student_config()
    low, high = config.band(dims)
    layers = config.student.num_hidden_layers
    reporter.say(f"a candidate has {low:,} to {high:,} parameters, with the projection, without pooler and head")

    def space(stage: str, base: Architecture | None = None) -> ArchitectureSpace:
        return ArchitectureSpace(stage, dims, layers, low, high, base)

    spaces = {"coarse": space("coarse")}
    supernet = warm_supernet(workspace, reporter)

    def stage(number: int, settings, where: ArchitectureSpace, evaluate, first) -> Architecture:
        name = f"stage{number}"
        best = search_stage(study.stage(name), name, where, settings, config.seed, evaluate, first, reporter)
        reporter.say(f"{name}: {best}")
        return best

    coarse = stage(1, config.stage1, spaces["coarse"], _trained(workspace, supernet, 1), None)
    spaces["operations"] = space("operations", coarse)
    chosen = stage(2, config.stage2, spaces["operations"], _trained(workspace, supernet, 2), coarse)
    spaces["fine"] = space("fine", chosen)
    shared = shared_supernet(workspace, supernet, spaces["fine"], config.stage3, reporter)
    winner = stage(3, config.stage3, spaces["fine"], shared_candidate(workspace, shared), chosen)
    return winner, spaces


def _trained(workspace: Workspace, supernet, number: int):
    settings = {1: workspace.config.stage1, 2: workspace.config.stage2}[number]
    return trained_candidate(workspace, supernet, f"stage{number}", settings)


def finish(workspace: Workspace, winner: Architecture, space: ArchitectureSpace, reporter: Reporter) -> dict:
    """Distil the rows of the final table, write best/ and results.json, print the table."""
    config, spec = workspace.config, workspace.main_task.spec
    supernet = warm_supernet(workspace, reporter)
    results = [teacher_row(workspace)]
    for row in rows(workspace, winner, space):
        results += [final_row(workspace, supernet, row, repeat, reporter) for repeat in range(config.seeds)]
    metric = spec.metrics[0]
    table = report.summarise(results, metric)
    summary = {
        "task": spec.name,
        "metric": metric,
        "seed": config.seed,
        "max_length": config.max_length,
        "winner": str(winner),
        "layers": [str(layer) for layer in winner.layers],
        "table": table,
        "results": results,
        "seconds": {"final rows": sum(result.get("seconds", 0.0) for result in results)},
        "device": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"effbert": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    report.write_results(workspace.folder, summary)
    write_atomic(workspace.folder / "best" / "README.md", report.model_card(summary))
    reporter.console.print(report.as_rich_table(table, metric, config.max_length))
    reporter.say(f"the winner is in {workspace.folder / 'best'}")
    return summary
