"""What is known of a candidate before it trains, and who is discarded for it: latency over its limit, a first filter.

Both cost a moment where training costs minutes. What was found is kept beside the candidate, and who goes follows from
that alone; a discarded candidate keeps its number, is pruned without a value, and no sampler learns from it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from effbert import random
from effbert.architecture import Architecture, count_flops
from effbert.config import SearchStage
from effbert.search.budget import survivors
from effbert.search.latency import Latencies
from effbert.search.proxies import Score, make_filter
from effbert.search.space import ArchitectureSpace
from effbert.supernet import Supernet
from effbert.workspace import Workspace

# Kept beside a candidate: what was found, that it was looked at, why it went, and that it stays whatever is found.
FILTER, LATENCY, SCREENED, DISCARDED, STAYS = "filter_score", "latency_ms", "screened", "discarded", "stays"
DRAWN, CHEAPEST = 256, 4  # architectures before a search whose latency is limited; measured, by either cost


@dataclass(frozen=True)
class Screen:
    """latencies, score: None where latency does not count, or there is no filter. max_latency_ms: 0 for no limit.
    kept: how many of so many candidates the filter leaves."""

    latencies: Latencies | None
    max_latency_ms: float
    score: Score | None
    kept: Callable[[int], int]

    def look(self, architecture: Architecture) -> dict[str, float]:
        """What is kept beside a candidate."""
        found = {} if self.latencies is None else {LATENCY: self.latencies.of(architecture)}
        return found if self.score is None else {**found, FILTER: self.score(architecture)}

    def discard(self, found: Mapping[int, Mapping], keys: Mapping[int, str]) -> dict[int, str]:
        """Of a cohort, by number, what `look` found: those that go, and why. One that STAYS does, and
        of those with a score at least one."""
        found = {number: attrs for number, attrs in found.items() if STAYS not in attrs}
        gone = {
            number: f"takes {attrs[LATENCY]:.2f} ms, over --max_latency_ms {self.max_latency_ms:g}"
            for number, attrs in found.items()
            if self.max_latency_ms and attrs[LATENCY] > self.max_latency_ms
        }
        scores = {number: attrs[FILTER] for number, attrs in found.items() if self.score and number not in gone}
        if scores:
            stay = survivors(scores, keys, self.kept(len(scores)))
            gone |= {number: "among the worst by the filter" for number in scores.keys() - set(stay)}
        return gone


def make_screen(workspace: Workspace, supernet: Supernet, settings: SearchStage) -> Screen | None:
    """The screen of a stage; None where nothing is asked for."""
    limit, score = workspace.config.max_latency_ms, make_filter(settings.filter, workspace, supernet)
    timed = limit or "latency" in workspace.config.minimize
    if not timed and score is None:
        return None
    return Screen(Latencies(workspace) if timed else None, limit, score, settings.kept)


def check_latency(workspace: Workspace, space: ArchitectureSpace) -> None:
    """ValueError where of DRAWN architectures those with the fewest stacked MLPs, and with the fewest FLOPs, are all
    slower than --max_latency_ms."""
    limit = workspace.config.max_latency_ms
    if not limit:
        return
    rng, latencies = random.generator(workspace.config.seed, "latency"), Latencies(workspace)
    costs = {}
    for _ in range(DRAWN):
        drawn = ArchitectureSpace.sample(space, rng)  # alike whatever the sampler
        flops = count_flops(drawn, space.dims, workspace.config.max_length).total
        costs[drawn] = sum(structure.stacks for structure in drawn.structures), flops
    tried = {
        architecture: None
        for by in (lambda one: costs[one], lambda one: costs[one][::-1])
        for architecture in sorted(costs, key=by)[:CHEAPEST]
    }
    if any(latencies.of(architecture) <= limit for architecture in tried):
        return
    fastest = min(tried, key=latencies.of)
    raise ValueError(
        f"--max_latency_ms {limit:g}: of {DRAWN} architectures within the other limits those with the fewest MLPs and "
        f"FLOPs were measured; the fastest takes {latencies.of(fastest):.2f} ms on {latencies.name}: {fastest}"
    )
