"""What a candidate costs: the published procedure, what a good engineer would write today, and ours, side by side.

    effbert bench search-cost --preset demo --output_dir runs/cost --candidates 24

The one idea: all procedures are modes of the same engine, run on one list of candidates from one warm supernet, with
one teacher, data and machine, scored on the whole official validation split; each in a process of its own, for its
memory. Cost is the wall time for the list over its length. The settings are those of `effbert search`, the budget that
of --stage1. Agreement is Kendall's tau with the published values at full budget: first of the published procedure at
another seed, which is the ceiling, then of ours; with halving of what a sampler is told of each candidate. Ours is
compared with itself at another seed too. The published procedure ranks by the task's metric, ours by --ranking_metric,
and both are compared by the area under the ROC curve too. The place of a procedure's best candidate is that
among the published values. A mode that is done is not run again.
"""

import dataclasses
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from effbert import random
from effbert.architecture import Architecture
from effbert.bench.measure import machine
from effbert.config import PRESETS, SearchConfig, as_dict, published
from effbert.data.encode import EncodedTask
from effbert.files import write_atomic
from effbert.flags import parse, preset, quiet_libraries, take_flag
from effbert.graphs import launches
from effbert.kernels import dispatch, use_backend
from effbert.search.agreement import kendall
from effbert.search.budget import fitness
from effbert.search.population import trained_candidates
from effbert.search.progress import Reporter
from effbert.search.run import coarse_space
from effbert.search.space import ArchitectureSpace
from effbert.search.stages import candidate_start, run_cohort
from effbert.search.study import CONFIG_FILE, Evaluation, Study
from effbert.search.workers import Workers
from effbert.workspace import Workspace, open_teachers, open_workspace, pick_device

dispatch.BACKENDS |= {"modern": "effbert.bench.modern", "published": "effbert.bench.published"}
PLAN, RESULT = "plan.json", "search-cost.json"
BOTH_BY_AREA = "both by roc_auc"
ABOUT = (
    f"{__doc__.splitlines()[0]} --preset NAME, one of {', '.join(PRESETS)}, sets the defaults below; "
    "--candidates N says how many are trained by each (24); --mode NAME runs one procedure on a list that is there."
)


@dataclass(frozen=True)
class Mode:
    """A procedure. what: in words. backend: of the ops. together: candidates share batches and the teacher's pass,
    and on a CPU its kept outputs and the cores. bf16: autocast, on a GPU. products: PyTorch's
    float32_matmul_precision, "highest" beside autocast. buckets: batches of like length. halving: over the rungs of
    stage 1. published: the loss too is the published one, over padding. ranking_metric: in place of --ranking_metric.
    scored_epochs: of stage 1. seed: added to the run's. gpu: on a GPU only. graphs: steps are recorded as CUDA
    graphs, on a GPU."""

    what: str
    backend: str = "auto"
    together: bool = True
    bf16: bool = True
    products: str = "highest"
    buckets: bool = True
    halving: bool = False
    published: bool = False
    ranking_metric: str = ""
    scored_epochs: str = "last"
    seed: int = 0
    gpu: bool = False
    graphs: bool = True


PUBLISHED = Mode(
    "the published procedure", "published", False, False, buckets=False, published=True, ranking_metric="task",
    scored_epochs="all", graphs=False,
)  # fmt: skip
MODERN = Mode(
    "bf16 on a GPU, fused attention, dynamic padding; one at a time", "modern", together=False, ranking_metric="task",
    scored_epochs="all", graphs=False,
)  # fmt: skip
OURS = Mode("ours", halving=True, products="medium")
FULL = dataclasses.replace(OURS, what="ours, all at full budget", halving=False)
MODES = {
    "published": PUBLISHED,
    "published again": dataclasses.replace(PUBLISHED, what="the published procedure at another seed", seed=1),
    "published, medium products": dataclasses.replace(
        PUBLISHED, what="the published procedure with TF32 on a GPU, oneDNN's products on a CPU", products="medium"
    ),
    "modern": MODERN,
    "ours": OURS,
    "ours full": FULL,
    "ours full again": dataclasses.replace(FULL, what="ours, all at full budget, at another seed", seed=1),
    "ours full, one at a time": dataclasses.replace(FULL, what="without the shared teacher", together=False),
    "ours full, padded": dataclasses.replace(FULL, what="without buckets", buckets=False),
    "ours full, all epochs scored": dataclasses.replace(FULL, what="scored after every epoch", scored_epochs="all"),
    "ours full, highest products": dataclasses.replace(FULL, what="without oneDNN's products", products="highest"),
    "ours full, eager": dataclasses.replace(FULL, what="without kernels", backend="modern", gpu=True),
    "ours full, no graphs": dataclasses.replace(FULL, what="without CUDA graphs", graphs=False, gpu=True),
    "ours full, fp32": dataclasses.replace(FULL, what="without bf16", bf16=False, products="highest", gpu=True),
}


def main(arguments: list[str]) -> int:
    """Run what is missing, write <output_dir>/search-cost.json, print the table."""
    mode, arguments = take_flag(arguments, "mode")
    name, arguments = take_flag(arguments, "preset")
    count, arguments = take_flag(arguments, "candidates")
    if count is not None and (not count.isdecimal() or int(count) < 2):
        raise ValueError(f"--candidates {count}: give a number of at least 2")
    config = parse(
        SearchConfig,
        arguments,
        "effbert bench search-cost",
        default=preset(name, PRESETS, SearchConfig("")),
        description=ABOUT,
    )
    if config.stage1.filter != "none" or config.max_latency_ms or config.minimize:
        raise ValueError(
            "bench search-cost trains a whole list of candidates by one metric: leave out --stage1.filter, "
            "--max_latency_ms and --minimize"
        )
    if not config.output_dir:
        raise ValueError("bench search-cost needs --output_dir, the folder that results are kept in")
    quiet_libraries()
    if mode is not None:
        run_mode(config, mode)
        return 0
    folder = Path(config.output_dir)
    prepare(config, folder, int(count or 24))
    for mode, settings in MODES.items():
        if on_gpu(config) or not settings.gpu:
            _in_own_process(mode, folder, arguments, name)
    result = summarise(folder, config)
    write_atomic(folder / RESULT, json.dumps(result, indent=1))
    print("\n".join(table(result)))
    return 0


def prepare(config: SearchConfig, folder: Path, count: int) -> None:
    """Teacher, warm supernet and the list of candidates, made once. ValueError where the folder is a run's."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / PLAN).exists() and (folder / CONFIG_FILE).exists():
        raise ValueError(f"{folder} holds a run: give the comparison an --output_dir of its own")
    with Reporter() as reporter:
        workspace = open_workspace(config, folder, reporter.say)
        space = coarse_space(workspace, reporter)
        _settle(config, folder, space, count)
        open_teachers(workspace, reporter.say, reporter.steps)
        candidate_start(workspace, reporter)


def _settle(config: SearchConfig, folder: Path, space: ArchitectureSpace, count: int) -> None:
    drawn = [space.sample(random.generator(config.seed, "search cost", number)) for number in range(count - 1)]
    plan = {
        "configuration": as_dict(config),
        "candidates": [str(architecture) for architecture in (published(space.num_layers), *drawn)],
    }
    path = folder / PLAN
    if path.exists() and json.loads(path.read_text()) != json.loads(json.dumps(plan)):
        raise ValueError(
            f"{folder} holds a comparison with other settings: use another --output_dir or the same settings"
        )
    write_atomic(path, json.dumps(plan, indent=1))


def _in_own_process(mode: str, folder: Path, arguments: Sequence[str], preset_name: str | None) -> None:
    if _file(folder, mode).exists():
        return
    more = ["--preset", preset_name] if preset_name else []
    command = [sys.executable, "-m", "effbert", "bench", "search-cost", "--mode", mode, *more, *arguments]
    alone = {**os.environ, "WORLD_SIZE": "1"}  # whatever started this process
    done = subprocess.run(command, env=alone, check=False)
    if done.returncode:
        raise ValueError(f"mode {mode!r} ended with exit status {done.returncode}; what it printed stands above")


def _file(folder: Path, mode: str) -> Path:
    return folder / "modes" / f"{mode.replace(', ', '-').replace(' ', '-')}.json"


def run_mode(config: SearchConfig, name: str) -> None:
    """All candidates by one mode: values, wall seconds, peak memory."""
    if name not in MODES:
        raise ValueError(f"--mode {name}: one of {', '.join(MODES)}")
    folder, mode = Path(config.output_dir), MODES[name]
    if not (folder / PLAN).exists():
        raise ValueError(f"{folder} holds no comparison yet: run it without --mode first")
    texts = json.loads((folder / PLAN).read_text())["candidates"]
    candidates = [Architecture.parse(text) for text in texts]
    changed = configured(config, mode)
    target = _file(folder, name)
    scratch = target.with_suffix("")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    with Reporter() as reporter, Workers(scratch) as workers, use_backend(mode.backend):
        workspace = open_workspace(changed, folder, reporter.say)
        space = coarse_space(workspace, reporter)
        open_teachers(workspace, reporter.say)
        workspace, supernet = candidate_start(workspace, reporter)
        workspace = dataclasses.replace(on_held_out(workspace), folder=scratch)
        stage = Study(scratch, workers=workers).stage("stage1")
        for number, architecture in enumerate(candidates):
            stage.begin(number, str(architecture), space.key(architecture))
        evaluator = trained_candidates(workspace, supernet, "stage1", changed.stage1, reporter)
        reporter.say(f"{name}: {mode.what}, {len(candidates)} candidates")
        line = reporter.stage(name, len(candidates), 0)
        begun = time.perf_counter()
        with nullcontext() if mode.graphs else launches():
            run_cohort(stage, list(enumerate(candidates)), space, changed.stage1, evaluator, line, workers)
        seconds = time.perf_counter() - begun
    result = {
        "mode": name,
        **asdict(mode) | {"bf16": mode.bf16 and on_gpu(config)},
        "seconds": seconds,
        "seconds_each": seconds / len(candidates),
        "peak_memory": peak_memory(config),
        "values": [evaluation.value for evaluation in stage.evaluations()],
        "scores": [evaluation.attrs.get("scores") for evaluation in stage.evaluations()],
        "rungs": [evaluation.attrs["rungs"] for evaluation in stage.evaluations()],
        "states": [evaluation.state for evaluation in stage.evaluations()],
        "tokens": sum(evaluation.attrs["tokens"] for evaluation in stage.evaluations()),
    }
    write_atomic(target, json.dumps(result, indent=1))


def configured(config: SearchConfig, mode: Mode) -> SearchConfig:
    """The settings under which stage 1 does what `mode` says."""
    phases = {
        name: dataclasses.replace(getattr(config.stage1, name), bf16=mode.bf16 and on_gpu(config))
        for name in ("general_phase", "task_phase")
    }
    rungs = config.stage1.rungs if mode.halving else (1.0,)
    loss = config.loss
    if mode.published:
        loss = dataclasses.replace(loss, loss_mask="released", score_form="direct")
    return dataclasses.replace(
        config,
        seed=config.seed + mode.seed,
        float32_matmul_precision="highest" if mode.bf16 and on_gpu(config) else mode.products,
        population=0 if mode.together else 1,
        teacher_cache=config.teacher_cache if mode.together else 0.0,
        pad_to_max_length=not mode.buckets,
        loss=loss,
        ranking_metric=mode.ranking_metric or config.ranking_metric,
        stage1=dataclasses.replace(
            config.stage1, rungs=rungs, ranking_share=1.0, scored_epochs=mode.scored_epochs, **phases
        ),
    )


def on_held_out(workspace: Workspace) -> Workspace:
    """The workspace with the official validation split as the rows that rank."""
    name, task = workspace.main_task.spec.name, workspace.main_task
    held_out = workspace.held_out[name]
    raw = dataclasses.replace(task.raw, validation=held_out.raw.validation)
    return dataclasses.replace(workspace, tasks={name: EncodedTask(raw, task.train, held_out.validation)})


def on_gpu(config: SearchConfig) -> bool:
    """Whether the comparison runs on a GPU."""
    return pick_device(config.device).type == "cuda"


def peak_memory(config: SearchConfig) -> int:
    """Bytes at the peak: of the GPU's memory where it runs on one, else of the process."""
    if on_gpu(config):
        return torch.cuda.max_memory_allocated(pick_device(config.device))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def summarise(folder: Path, config: SearchConfig) -> dict:
    """All modes that ran, the ratios between them, and how far they agree."""
    modes = {name: json.loads(_file(folder, name).read_text()) for name in MODES if _file(folder, name).exists()}
    base = modes["published"]
    agreement = {}
    for name, mode in modes.items():
        if name != "published":
            agreement[name] = _agreement(base["values"], told(mode))
    first = [rungs[0] for rungs in modes["ours"]["rungs"] if rungs]
    if len(first) == len(base["values"]):
        agreement["ours, first rung"] = _agreement(base["values"], first)
        agreement["first rung against our full budget"] = _agreement(modes["ours full"]["values"], first)
    areas = {name: _areas(mode) for name, mode in modes.items() if not mode["halving"]}
    for name, values in areas.items():
        if name != "published":
            agreement[f"{name}, {BOTH_BY_AREA}"] = _agreement(areas["published"], values)
    if "ours full again" in modes:
        agreement["ours against ours at another seed"] = _agreement(
            modes["ours full"]["values"], modes["ours full again"]["values"]
        )
    return {
        "machine": machine(pick_device(config.device)),
        "configuration": as_dict(config),
        "candidates": json.loads((folder / PLAN).read_text())["candidates"],
        "modes": modes,
        "ratios": {name: base["seconds"] / mode["seconds"] for name, mode in modes.items()},
        "agreement": agreement,
        "places": {name: place_of_best(base["values"], told(mode)) for name, mode in modes.items()},
    }


def _areas(mode: dict) -> list[float | None]:
    """Each candidate's area under the ROC curve, where it has one."""
    return [scores.get("roc_auc") if scores else None for scores in mode["scores"]]


def told(mode: dict) -> list[float | None]:
    """What a sampler is told of each candidate: its value at full budget, or what halving makes of its last rung."""
    each = zip(mode["values"], mode["states"], mode["rungs"], strict=True)
    cohort = [
        Evaluation(number, "", value, state, {"rungs": rungs}) for number, (value, state, rungs) in enumerate(each)
    ]
    return list(fitness(cohort, max(map(len, mode["rungs"]), default=0)).values())


def place_of_best(base: list, values: list) -> int | None:
    """The place, from 1, that the first of the highest `values` has among those of `base`; None where it has none."""
    scored = [number for number, value in enumerate(values) if value is not None]
    best = max(scored, key=values.__getitem__, default=None)
    if best is None or base[best] is None:
        return None
    return 1 + sum(value is not None and value > base[best] for value in base)


def _agreement(first: list, second: list) -> dict | None:
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    if len(pairs) < 2:
        return None
    found = asdict(kendall(*zip(*pairs, strict=True)))
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def table(result: dict) -> list[str]:
    """Seconds a candidate, ratio to the published procedure, memory, place of the best, agreement."""
    heads = f"{'mode':28}{'s each':>9}{'times':>8}{'MiB':>8}{'place':>7}"
    lines = [f"{heads}  agreement with the published values"]
    for name, mode in result["modes"].items():
        cost = f"{mode['seconds_each']:9.2f}{result['ratios'][name]:8.1f}{mode['peak_memory'] / 2**20:8.0f}"
        place, tau = result["places"][name] or "-", _tau_text(result["agreement"].get(name))
        lines.append(f"{name:28}{cost}{place:>7}  {tau}".rstrip())
    more = ("ours against ours at another seed", "ours, first rung", "first rung against our full budget")
    for name in (*more, *(name for name in result["agreement"] if name.endswith(BOTH_BY_AREA))):
        if result["agreement"].get(name):
            lines.append(f"{name}: {_tau_text(result['agreement'][name])}")
    return lines


def _tau_text(found: dict | None) -> str:
    if found is None:
        return ""
    estimate, *ends = ("-" if found[name] is None else f"{found[name]:.2f}" for name in ("estimate", "low", "high"))
    return f"{estimate} ({' to '.join(ends)})"
