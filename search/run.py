"""A whole search, from text to table, in one folder: the same call again goes on where the last one stopped."""

import dataclasses
import json
import math
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path

import torch

from effbert import __version__
from effbert.architecture import Architecture
from effbert.config import SearchConfig, SearchStage, as_dict
from effbert.errors import first_line
from effbert.files import read_kept, remove_partial, write_atomic
from effbert.parallel import ALONE, World
from effbert.search import forecast, report
from effbert.search.agreement import Interval, kendall, of_filter, of_rungs
from effbert.search.final import BEST, final_rows, rows, teacher_row
from effbert.search.pareto import best_front
from effbert.search.population import KEPT_TEACHER, Evaluator, remove_stale, trained_candidates
from effbert.search.progress import Reporter
from effbert.search.record import AGREEMENT, MACHINE_FILE, training_files
from effbert.search.released import ReleasedSpace
from effbert.search.report_html import write_report
from effbert.search.screen import FILTER, STAYS, check_latency
from effbert.search.shared import shared_candidates, shared_supernet
from effbert.search.space import ArchitectureSpace
from effbert.search.stages import candidate_start, run_cohort, search_stage, warm_supernet
from effbert.search.study import GIVEN_PATHS, RunFolder, StageStudy, Study
from effbert.search.workers import SHARING
from effbert.workspace import Workspace, open_teachers, open_workspace

REFRESH_SECONDS = 30.0  # between two reports while candidates come in


def run_search(
    config: SearchConfig, reporter: Reporter | None = None, world: World = ALONE, final: bool = True
) -> dict:
    """Run or resume the search that `config` describes; returns what <output_dir>/results.json holds. Not `final`, it
    ends with stage 3 and returns the winner alone.

    world: the processes that run it together, all of which call this. The supernets and the final distillation are
    data-parallel, everything else happens on the first while the others wait.

    Several such calls may run at once, with one configuration and one folder: candidates they share, and what is made
    once one of them makes while the others wait. ValueError or FileNotFoundError, in one line, where the input, the
    folder or the storage will not do.
    """
    folder = Path(config.output_dir)
    reporter = reporter or Reporter(shown=world.is_first)
    with reporter as reporter, claimed(config, world, reporter, GIVEN_PATHS) as claim:
        with study_of(config, claim) as study:
            turn = turns(world, study)
            with turn("tokenizer, data and teachers"):
                try:
                    if study is not None:
                        tidy(study, reporter)
                        note_machine(folder, config.num_threads)
                    workspace = world.first_then_all(
                        lambda: open_workspace(config, folder, reporter.say, world, first_space)
                    )
                    coarse = coarse_space(workspace, reporter)
                    world.on_first(check_latency, workspace, coarse)
                except Exception:
                    if claim is not None:
                        claim.abandon()
                    raise
                if world.size > 1:
                    reporter.say(
                        f"{world.size} processes share the batches of supernets and final rows; one does all the rest"
                    )
                world.first_then_all(lambda: open_teachers(workspace, reporter.say, reporter.steps))
            winner = three_stages(workspace, coarse, study, reporter, turn)
            if not final:
                return {"winner": str(winner)}
            with turn("the final distillation"):
                return finish(workspace, winner, coarse, study, reporter)


def claimed(
    config: SearchConfig, world: World, reporter: Reporter, by_content: Sequence[str] = ()
) -> AbstractContextManager[RunFolder | None]:
    """The run's folder, joined by the first process only. The number of processes is part of what a run is: batches
    grow with it. by_content: as RunFolder's."""
    if not world.is_first:
        return nullcontext()
    processes = {"processes": world.size} if world.size > 1 else {}
    return RunFolder(config.output_dir, as_dict(config) | processes, reporter.say, by_content)


def study_of(config: SearchConfig, claim: RunFolder | None) -> AbstractContextManager[Study | None]:
    """The study of a claimed folder; the processes beside the first have none."""
    if claim is None:
        return nullcontext()
    return closing(Study(claim.path, config.storage, claim.id, claim.workers))


def tidy(study: Study, reporter: Reporter) -> None:
    """Reach the storage, and sweep the folder where no other worker is in it. A storage that has nothing of a search
    which had begun is one that was lost: candidates are proposed by their numbers, so all come again. ValueError where
    other workers are at it, whose storage is another one then."""
    others = study.workers.others()
    if others:
        reporter.say(f"joining {len(others)} other workers in {study.output_dir}")
    else:
        remove_partial(study.output_dir)
    if "stage1" not in study.reach() and (study.output_dir / "stage1").is_dir():
        if others:
            raise ValueError(
                f"{study.where} has no candidate of this search, at which {len(others)} other workers are: give "
                "--storage the database that they share, or where it is lost, stop them and start one alone"
            )
        reporter.say(f"{study.where} has no candidate of this search, which had begun: its stages begin anew")
        study.stage("stage1")  # at once: who joins from here on finds it


Turn = Callable[[str], AbstractContextManager[None]]


def turns(world: World, study: Study | None) -> Turn:
    """`Workers.turn` for all processes of a world together: no one goes on before the first has it."""

    @contextmanager
    def turn(what: str) -> Iterator[None]:
        with nullcontext() if study is None else study.workers.turn(what):
            world.wait()
            yield

    return turn


def dry_run(config: SearchConfig, flops_per_second: float | None = None) -> list[str]:
    """What `run_search` would cost, as text, from a few real steps here or at an assumed rate; nothing is kept."""
    with tempfile.TemporaryDirectory() as folder, Reporter() as reporter:
        workspace = open_workspace(config, Path(folder), reporter.say, check=first_space)
        check_latency(workspace, coarse_space(workspace, reporter))
        if flops_per_second is None:
            rates = forecast.measure(workspace)
        else:
            given = config, workspace.student_config(), workspace.teacher_config
            rates = forecast.assume(*given, flops_per_second, flops_per_second)
        return forecast.lines_of_workspace(workspace, rates)


def coarse_space(workspace: Workspace, reporter: Reporter) -> ArchitectureSpace:
    """`first_space`, and what is said of it."""
    low, high = workspace.config.band(workspace.student_config())
    reporter.say(f"a candidate has {low:,} to {high:,} parameters, with the projection, without pooler and head")
    return first_space(workspace)


def first_space(workspace: Workspace) -> ArchitectureSpace:
    """The space of stage 1; ValueError where no architecture is within the limits."""
    config, dims = workspace.config, workspace.student_config()
    low, high = config.band(dims)
    return space_of(config.stage1)(
        "coarse",
        dims,
        config.student.num_hidden_layers,
        low,
        high,
        max_flops=config.max_flops,
        length=config.max_length,
    )


def space_of(settings: SearchStage) -> type[ArchitectureSpace]:
    """The kind of space that a stage's sampler draws from."""
    return ReleasedSpace if settings.sampler == "released" else ArchitectureSpace


def three_stages(
    workspace: Workspace, coarse: ArchitectureSpace, study: Study | None, reporter: Reporter, turn: Turn
) -> Architecture:
    """Coarse, operations, fine; each stage starts from the winner of the one before. Returns the last winner."""
    config, on_first = workspace.config, workspace.world.on_first
    with turn("the supernet"):
        candidates, supernet = candidate_start(workspace, reporter)

    def space(stage: str, base: Architecture, settings: SearchStage) -> ArchitectureSpace:
        kind, band = space_of(settings), config.band(coarse.dims)
        return kind(
            stage, coarse.dims, coarse.num_layers, *band, base, max_flops=coarse.max_flops, length=coarse.length
        )

    def run(name: str, settings, where: ArchitectureSpace, evaluator: Evaluator, first) -> Architecture:
        stage = open_stage(study, name)
        best = search_stage(
            stage, name, where, settings, config.seed, evaluator, first, reporter, study.workers, pages.refresh
        )
        pages.write()
        reporter.say(f"{name}: {best}")
        return best

    pages = Pages(workspace.folder, study, config, reporter.say)

    on_first(begin, study)
    trained = trained_candidates(candidates, supernet, "stage1", config.stage1, reporter)
    found = on_first(run, "stage1", config.stage1, coarse, trained, None)
    trained = trained_candidates(candidates, supernet, "stage2", config.stage2, reporter)
    found = on_first(run, "stage2", config.stage2, space("operations", found, config.stage2), trained, found)
    fine = space("fine", found, config.stage3)
    with turn("stage 3's supernet"):
        shared = shared_supernet(workspace, warm_supernet(workspace, reporter), fine, config.stage3, reporter)
    winner = on_first(run, "stage3", config.stage3, fine, shared_candidates(workspace, shared), found)
    if config.agreement_candidates:
        on_first(train_alone, workspace, study, fine, reporter)
        on_first(pages.write)
    with turn("clearing up"):
        on_first(shutil.rmtree, workspace.folder / KEPT_TEACHER, True)
    return winner


def begin(study: Study) -> None:
    """Make the first stage, before the folder by which who joins tells that the search was begun (`tidy`)."""
    study.stage("stage1")


def open_stage(study: Study, name: str) -> StageStudy:
    """A stage of the study, rid of what dead workers left of it."""
    with study.workers.turn(SHARING):
        stage = study.stage(name)
        going = [evaluation.number for evaluation in stage.evaluations() if evaluation.state == "running"]
        remove_stale(study.output_dir / name, going)
    return stage


def train_alone(workspace: Workspace, study: Study, space: ArchitectureSpace, reporter: Reporter) -> None:
    """Train the first --agreement_candidates of stage 3 by themselves, as stage 1 does with its whole budget."""
    settings = dataclasses.replace(workspace.config.stage1, rungs=(1.0,), filter="none")
    scored = [evaluation for evaluation in study.stage("stage3").evaluations() if evaluation.state == "complete"]
    chosen = scored[: workspace.config.agreement_candidates]
    stage, members = open_stage(study, AGREEMENT), [(e.number, Architecture.parse(e.architecture)) for e in chosen]
    with study.workers.turn(SHARING):
        known = {evaluation.number for evaluation in stage.evaluations()}
        for number, architecture in members:
            if number not in known:  # it was within the limits then, as measured
                stage.begin(number, str(architecture), space.key(architecture), **{STAYS: True})
    finished = sum(evaluation.state != "running" for evaluation in stage.evaluations())
    line = reporter.stage(AGREEMENT, len(members), finished)
    trained = trained_candidates(*candidate_start(workspace, reporter), AGREEMENT, settings, reporter)
    run_cohort(stage, members, space, settings, trained, line, study.workers)
    line.close()


def write_page(folder: Path, study: Study, say: Callable[[str], None]) -> bool:
    """report.html, and whether it is there. One that cannot be drawn is said, and ends no search."""
    try:
        write_report(folder, storage=study.url)
    except ValueError as error:
        say(f"report.html is not written: {first_line(error)}")
        return False
    return True


class Pages:
    """report.html and agreement.json, written anew while a search runs, but seldom: they cost time."""

    def __init__(self, folder: Path, study: Study, config: SearchConfig, say: Callable[[str], None]):
        self.folder, self.study, self.config, self.say = folder, study, config, say
        self.written = 0.0

    def refresh(self) -> None:
        """Write where the last time is long enough ago."""
        if time.monotonic() - self.written > REFRESH_SECONDS:
            self.write()

    def write(self) -> None:
        """Write both files."""
        entries = []
        for name in ("stage1", "stage2"):
            settings = getattr(self.config, name)
            for share, found in of_rungs(self.study.stage(name).evaluations()).items():
                entry = {"stage": name, "what": f"rung {share:.2g} against full budget, among those that went on"}
                entries.append(entry | _tau(found))
            found = of_filter(self.study.stage(name).evaluations(), FILTER)
            if found is not None:
                what = f"filter {settings.filter} against full budget, among those it let through"
                entries.append({"stage": name, "what": what} | _tau(found))
        found = self._shared_weights()
        if found is not None:
            entries.append({"stage": "stage3", "what": "shared weights against training alone"} | _tau(found))
        write_atomic(self.folder / "agreement.json", json.dumps(entries, indent=1))
        write_page(self.folder, self.study, self.say)
        self.written = time.monotonic()

    def _shared_weights(self) -> Interval | None:
        """Agreement of stage 3's scores with training alone, where candidates have both."""
        if not self.config.agreement_candidates:
            return None
        alone = {e.number: e.value for e in self.study.stage(AGREEMENT).evaluations() if e.state == "complete"}
        shared = [e for e in self.study.stage("stage3").evaluations() if e.number in alone]
        return kendall([e.value for e in shared], [alone[e.number] for e in shared]) if len(shared) > 1 else None


def _tau(found: Interval) -> dict:
    """An entry of agreement.json, null where it is undefined: all values equal, or too few candidates."""
    numbers = {"kendall": found.estimate, "low": found.low, "high": found.high}
    return {name: number if math.isfinite(number) else None for name, number in numbers.items()} | {
        "candidates": found.count
    }


def finish(
    workspace: Workspace, winner: Architecture, space: ArchitectureSpace, study: Study, reporter: Reporter
) -> dict:
    """Distil the rows of the final table, write best/ and results.json, print the table."""
    supernet, on_first = warm_supernet(workspace, reporter), workspace.world.on_first
    results = [on_first(teacher_row, workspace)]
    lines = rows(workspace, winner, space, on_first(others_on_front, study, workspace.config))
    for repeat in range(workspace.config.seeds):
        results += final_rows(workspace, supernet, lines, repeat, reporter)
    return on_first(conclude, workspace, winner, study, results, reporter)


def conclude(workspace: Workspace, winner: Architecture, study: Study, results: list[dict], reporter: Reporter) -> dict:
    """Write results.json and the report, print the table."""
    config, spec = workspace.config, workspace.main_task.spec
    metric = spec.metrics[0]
    table = report.summarise(results, metric)
    summary = {
        "task": spec.name,
        "kind": spec.kind,
        "metric": metric,
        "seed": config.seed,
        "start_from": list(config.start_from),
        "max_length": config.max_length,
        "winner": str(winner),
        "layers": [str(layer) for layer in winner.layers],
        "table": table,
        "results": results,
        "seconds": training_seconds(workspace.folder, study, results),
        "processes": workspace.world.size,
    }
    file = workspace.folder / "results.json"
    summary |= surroundings_of(file, summary) or surroundings()
    write_atomic(file, json.dumps(summary, indent=1))
    best = workspace.folder / BEST
    found = any(result["row"] == "winner" and result["scores"] for result in results)
    if found and best.exists():
        write_atomic(best / "README.md", report.model_card(summary))
    written = write_page(workspace.folder, study, reporter.say)
    chosen = report.chosen_by(config.final.task_phase.load_best_model_at_end)
    title = f"{metric} on held-out rows{chosen}; costs of the deployed model at length {config.max_length}"
    report.print_table(reporter.console, title, report.table_rows(table, metric))
    compared = report.verdict(table, results, metric)
    if compared:
        reporter.say(compared)
    lost = "the winner diverged under every seed, so there is no best/: effbert distill takes other learning rates"
    where = f"the winner is in {best}" if found else lost
    reporter.say(f"{where}; a report is in {workspace.folder / 'report.html'}" if written else where)
    return summary


def surroundings_of(file: Path, summary: dict) -> dict:
    """The `surroundings` that results.json has already, where all else in it is `summary`; {} elsewhere."""
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # none yet, or a damaged one, which is written anew
        return {}
    found = {name: value for name, value in before.items() if name not in summary} if isinstance(before, dict) else {}
    return found if found and before == json.loads(json.dumps(summary)) | found else {}


def surroundings() -> dict:
    """On what, with what and when results came about."""
    return {**machine(), "finished": time.strftime("%Y-%m-%d %H:%M:%S")}


def machine(threads: int = 0) -> dict:
    """On what and with what this process works; threads: those that it is going to use, 0 for those that it does."""
    return {
        "device": f"{platform.processor() or platform.machine()}, {threads or torch.get_num_threads()} threads",
        "versions": {"effbert": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def note_machine(folder: Path, threads: int = 0) -> None:
    """Keep in a run's folder on what it was begun, where no worker has: the report of an open run tells it."""
    file = folder / MACHINE_FILE
    if not file.exists():
        write_atomic(file, json.dumps(machine(threads), indent=1))


def others_on_front(study: Study, config: SearchConfig) -> list[Architecture]:
    """Stage 3's best on the Pareto front beside its winner; none where the metric alone counts."""
    if not config.minimize:
        return []
    front = best_front(study.stage("stage3").evaluations(), config.minimize)
    return [Architecture.parse(evaluation.architecture) for evaluation in front[1 : 1 + config.final.num_front]]


def training_seconds(folder: Path, study: Study, results: list[dict]) -> dict[str, float]:
    """Seconds spent in training loops and on stage 3's scores, by part, from what each part kept beside its outcome."""
    parts = {
        str(file.parent.relative_to(folder)): read_kept(file, "counts its seconds no more", "seconds")["seconds"]
        for file in training_files(folder)
    }
    for name in ("stage1", "stage2", "stage3", *([AGREEMENT] if (folder / AGREEMENT).exists() else [])):
        parts[f"{name} candidates"] = sum(e.attrs.get("seconds", 0.0) for e in study.stage(name).evaluations())
    parts["final rows"] = sum(result.get("seconds", 0.0) for result in results)
    return parts
