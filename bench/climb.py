"""The search behind `effbert kernels tune`: hill climbing over tiles, and what was found as rules for the table.

Nothing here knows what a millisecond is: whoever calls it says what a tile costs, a GPU or a made-up function.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from effbert.kernels import tiles
from effbert.kernels.tiles import Question, Rule

GAIN = 0.02  # smaller differences are noise
LIMITS = {"num_warps": (1, 16), "num_stages": (1, 5), "maxnreg": (64, 255)}
LIMITS |= dict.fromkeys(("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_E", "COLS", "COLUMNS"), (16, 256))
REACH = 8  # other numbers (rows, programs, elements of a vector) stay within this factor of where they began

Tile = dict[str, int]


class Unusable(Exception):
    """A tile that cannot be used; the message says why in a word or two."""


@dataclass(frozen=True)
class Tuned:
    """Where the search for one question stands: its first tile and the best one, and what was measured with each.

    trials: tiles tried besides the first. unusable: how many of these could not be used, by reason.
    """

    question: Question
    start: Tile
    tile: Tile
    before_ms: float
    after_ms: float
    trials: int
    unusable: dict[str, int]

    def __str__(self):
        times = f"{1e3 * self.before_ms:.1f} -> {1e3 * self.after_ms:.1f} µs"
        return f"{self.question.kernel}, size {self.question.size}: {times}, {self.start} -> {self.tile}"


def search(
    starts: Mapping[Question, Tile],
    measure: Callable[[Mapping[Question, Tile], Question], float],
    out_of_time: Callable[[], bool],
) -> Iterator[Tuned]:
    """Climb for one question after the other, with the best tiles of the earlier ones; yields as `climb` does.

    measure(tiles, question): milliseconds of what asks `question`, with these tiles; raises Unusable.
    """
    best: dict[Question, Tile] = {}

    def trial(question, tile):
        return measure(best | {question: tile}, question)

    for question, start in starts.items():
        if not out_of_time():
            for tuned in climb(question, start, trial, out_of_time):
                best[question] = tuned.tile
                yield tuned


def climb(
    question: Question, start: Tile, trial: Callable[[Question, Tile], float], out_of_time: Callable[[], bool]
) -> Iterator[Tuned]:
    """Move to the first neighbour that is better by GAIN, as long as there is one.

    Yields at first and after each trial; nothing where the start itself is unusable. What seems better has to be so
    again beside the present tile measured anew, since a GPU's clock drifts.
    """
    try:
        first = trial(question, start)
    except Unusable:
        return
    tuned, tried, waiting = Tuned(question, start, start, first, first, 0, {}), [start], neighbours(start, start)
    yield tuned
    while waiting and not out_of_time():
        tile = waiting.pop(0)
        tried.append(tile)
        tuned = replace(tuned, trials=tuned.trials + 1)
        try:
            milliseconds = trial(question, tile)
            needed = milliseconds / (1 - GAIN)
            better = needed < tuned.after_ms and needed < trial(question, tuned.tile)
        except Unusable as error:
            reason, better = str(error), False
            tuned = replace(tuned, unusable=tuned.unusable | {reason: tuned.unusable.get(reason, 0) + 1})
        if better:
            tuned = replace(tuned, tile=tile, after_ms=milliseconds)
            waiting = [tile for tile in neighbours(tile, start) if tile not in tried]
        yield tuned


def neighbours(tile: Tile, start: Tile) -> list[Tile]:
    """`tile` with one number a step away: num_stages by one, the others halved and doubled, all within limits."""
    found = []
    for name, value in tile.items():
        low, high = LIMITS.get(name, (max(1, start[name] // REACH), start[name] * REACH))
        steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        found += [tile | {name: step} for step in steps if low <= step <= high]
    return found


def rules_of(answers: Mapping[Question, Tile], table: Sequence[Rule]) -> list[Rule]:
    """Rules to put before `table` so that each question gets its answer; none for kernels that the table answers alike.

    A rule holds for sizes up to its question's, down to the next smaller question or to a border in the table, below
    which the table's own answer is repeated.
    """
    found = []
    changed = [question for question, tile in answers.items() if tile != tiles.answer(table, question)]
    for group in dict.fromkeys(question[:3] for question in changed):
        kernel, architecture, itemsize = group
        mine = {question.size: tile for question, tile in answers.items() if question[:3] == group}
        borders = {rule.up_to for rule in table if rule.kernel == kernel and rule.up_to is not None}
        for size in sorted(mine.keys() | {border for border in borders if border < max(mine)}):
            tile = mine[size] if size in mine else tiles.answer(table, Question(*group, size))
            found.append(Rule(kernel, tile, architecture, itemsize, size))
    return found
