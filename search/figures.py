"""Figures as SVG text: charts with axes, bars, intervals and expression trees, for a page that needs nothing else.

A figure is drawn 360 units wide, that of a phone, and scales from there, so its text stays readable; colours and
strokes are left to the page's style sheet, by class. Whatever comes from outside goes through `escape`.
"""

import html
import itertools
import math
from collections.abc import Iterable, Sequence

from effbert.kernels.expression import LINEAR, Expression, Node

WIDTH = 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 24, 40
_UNITS = ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"), (0, 1, ""))  # from, unit, suffix
_NODE_WIDTH, _NODE_HEIGHT, _ROW, _GAP, _STACK = 84, 24, 42, 10, 6
# What XML allows beside tab and line ends begins at the space.
_CONTROLS = dict.fromkeys([*range(9), 11, 12, *range(14, 32), 0xFFFE, 0xFFFF])

Point = tuple[float, float]


def escape(text: object) -> str:
    """Text for HTML and XML, in content and in attributes; characters that XML does not have are left out."""
    return html.escape(str(text).translate(_CONTROLS).encode("utf-8", "replace").decode())


def tag(name: str, *content: str, **attributes: object) -> str:
    """An element around markup; attributes are escaped, `class_` is class, other underscores are hyphens."""
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"' for key, value in attributes.items())
    return f"<{name}{written}>{''.join(content)}</{name}>"


def figure(
    name: str, title: str, description: str, height: float, *content: str, width: float = WIDTH, **attributes: object
) -> str:
    """An SVG picture with its title and description; `name` must be the only one of its kind on the page."""
    return tag(
        "svg",
        tag("title", escape(title), id=f"{name}-title"),
        tag("desc", escape(description), id=f"{name}-desc"),
        *content,
        viewBox=f"0 0 {_value(width)} {_value(height)}",
        xmlns="http://www.w3.org/2000/svg",
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
        **attributes,
    )


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """About `count` round numbers from low to high, both included where they are round; whole: no fractions."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """The numbers with as many decimals as tell them apart, in thousands, millions, ... where they are large."""
    size = max(map(abs, values), default=0)
    unit, suffix = next((unit, suffix) for least, unit, suffix in _UNITS if size >= least)
    steps = [abs(b - a) / unit for a, b in itertools.pairwise(values) if b != a]
    alone = 2 if any(value / unit % 1 for value in values) else 0
    decimals = max(0, -math.floor(math.log10(min(steps)) + 1e-9)) if steps else alone
    return [f"{value / unit:.{decimals}f}{suffix}" for value in values]


class Chart:
    """A plane with two axes, which dots, lines and labels are put on, and then `svg`.

    xs, ys: all values that must have a place. whole: x counts things, so that its axis has no fractions. x_names: names
    for the places 0, 1, ... on the x axis instead of numbers.
    """

    def __init__(
        self,
        xs: Iterable[float],
        ys: Iterable[float],
        x_label: str,
        y_label: str,
        whole: bool = False,
        x_names: Sequence[str] = (),
        height: float = 230,
    ):
        self.height, self._content, self._labels = height, [], []
        xs = list(map(float, range(len(x_names)) if x_names else xs))
        self._x = (-0.5, len(xs) - 0.5) if x_names else _widened(xs)
        self._y = _widened(ys)
        across = xs if x_names else ticks(min(xs), max(xs), 5, True) if whole else ticks(*self._x)
        self._axes = self._drawn_axes(x_label, y_label, across, x_names or tick_labels(across))

    def at(self, point: Point) -> Point:
        """A point in units of the picture."""
        (x, y), (left, right), (low, high) = point, self._x, self._y
        return (
            _LEFT + (x - left) / (right - left) * (WIDTH - _LEFT - _RIGHT),
            self.height - _BOTTOM - (y - low) / (high - low) * (self.height - _TOP - _BOTTOM),
        )

    def dots(self, points: Sequence[Point], kind: str, titles: Sequence[str] = (), radius: float = 2.6) -> None:
        """A circle for each point, in a group of class `kind`; titles are shown under the pointer."""
        hints = [tag("title", escape(title)) for title in titles] or [""] * len(points)
        circles = []
        for point, hint in zip(points, hints, strict=True):
            x, y = self.at(point)
            circles.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}">{hint}</circle>')
        self._group(kind, circles)

    def crosses(self, xs: Sequence[float], kind: str, titles: Sequence[str]) -> None:
        """A cross on the x axis for each thing that has no y."""
        crosses, y = [], self.height - _BOTTOM - 5
        for x, title in zip(xs, titles, strict=True):
            x, _ = self.at((x, 0))
            path = f"M{x - 3:.1f} {y - 3:.1f}l6 6m0 -6l-6 6"
            crosses.append(tag("path", tag("title", escape(title)), d=path))
        self._group(kind, crosses)

    def lines(self, lines: Iterable[Sequence[Point]], kind: str) -> None:
        """A line through each sequence of points, in a group of class `kind`."""
        drawn = []
        for points in lines:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(self.at, points))
            drawn.append(f'<polyline points="{path}"/>')
        self._group(kind, drawn)

    def label(self, point: Point, text: str) -> None:
        """Text above a point, left out where another label is in its way already."""
        x, y = self.at(point)
        half = 3.4 * len(text)
        x, y = min(max(x, _LEFT + half), WIDTH - _RIGHT - half), y - 7
        if all(
            abs(x - other_x) > half + other_half + 3 or abs(y - other_y) > 12
            for other_x, other_y, other_half in self._labels
        ):
            self._labels.append((x, y, half))
            self._content.append(_text(x, y, text, "mark", "middle"))

    def svg(self, name: str, title: str, description: str) -> str:
        """The picture."""
        return figure(name, title, description, self.height, self._axes, *self._content)

    def _group(self, kind: str, content: list[str]) -> None:
        if content:
            self._content.append(tag("g", *content, class_=kind))

    def _drawn_axes(self, x_label: str, y_label: str, across: Sequence[float], names: Sequence[str]) -> str:
        left, right, bottom = _LEFT, WIDTH - _RIGHT, self.height - _BOTTOM
        up = ticks(*self._y)
        parts = [f'<path class="axis" d="M{left} {_TOP}V{bottom}H{right}"/>']
        for value, text in zip(up, tick_labels(up), strict=True):
            _, y = self.at((self._x[0], value))
            parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
            parts.append(_text(left - 5, y + 3.5, text, "tick", "end"))
        for value, text in zip(across, names, strict=True):
            x, _ = self.at((value, self._y[0]))
            parts.append(f'<path class="axis" d="M{x:.1f} {bottom}v4"/>')
            parts.append(_text(x, bottom + 15, text, "tick", "middle"))
        middle = (_TOP + bottom) / 2
        parts.append(_text((left + right) / 2, self.height - 6, x_label, "name", "middle"))
        parts.append(
            tag(
                "text",
                escape(y_label),
                class_="name",
                text_anchor="middle",
                transform=f"translate(10 {middle}) rotate(-90)",
            )
        )
        return "".join(parts)


def best_so_far(points: Iterable[Point]) -> list[Point]:
    """The corners of the stairs that rise wherever y is above all y before it."""
    stairs: list[Point] = []
    for x, y in points:
        level = stairs[-1][1] if stairs else y
        stairs += [(x, level)] if y <= level else [(x, level), (x, y)]
    return stairs


def bars(name: str, title: str, description: str, rows: Sequence[tuple[str, str, Sequence[tuple[float, str]]]]) -> str:
    """Horizontal bars on one scale: a row has a label, its value as text, and parts of (length, class) end to end."""
    longest = max((sum(length for length, _ in parts) for _, _, parts in rows), default=0) or 1
    content = []
    for index, (label, value, parts) in enumerate(rows):
        y, x = 34 * index, 0.0
        content += [_text(0, y + 12, label, "name", "start"), _text(WIDTH, y + 12, value, "tick", "end")]
        for length, kind in parts:
            width = length / longest * WIDTH
            content.append(
                f'<rect class="bar {escape(kind)}" x="{x:.1f}" y="{y + 17}" width="{width:.1f}" height="9"/>'
            )
            x += width
    return figure(name, title, description, 34 * len(rows), *content)


def intervals(
    name: str,
    title: str,
    description: str,
    rows: Sequence[tuple[str, float, float, float]],
    axis: str,
    bounds: tuple[float, float] | None = None,
    strong: str = "",
) -> str:
    """Estimates with their intervals on one scale: a row has a label, the estimate, and the interval's two ends.

    bounds: the scale's ends, else those of the rows. strong: the label of a row that stands out.
    """
    low, high = bounds or _widened([value for _, *values in rows for value in values])
    height = 34 * len(rows) + 44
    content = []

    def at(value: float) -> float:
        return 14 + (value - low) / (high - low) * (WIDTH - 28)

    marks = ticks(low, high, 5)
    for value, text in zip(marks, tick_labels(marks), strict=True):
        content.append(f'<path class="grid" d="M{at(value):.1f} 4V{height - 36}"/>')
        content.append(_text(at(value), height - 23, text, "tick", "middle"))
    for index, (label, value, first, last) in enumerate(rows):
        y = 34 * index + 26
        row = (
            _text(0, y - 11, label, "name", "start"),
            f'<path class="interval" d="M{at(first):.1f} {y}H{at(last):.1f}"/>',
            f'<circle class="estimate" cx="{at(value):.1f}" cy="{y}" r="4"/>',
        )
        content.append(tag("g", *row, class_="strong" if label == strong else "row"))
    content.append(_text(WIDTH / 2, height - 5, axis, "name", "middle"))
    return figure(name, title, description, height, *content)


def tree(name: str, title: str, description: str, expression: Expression, hidden: int, inner: int) -> str:
    """An expression as a tree, its result above and its inputs below; a linear names its weight and its widths.

    It is drawn on as many sheets as the layer has stacks. hidden, inner: the widths outside and inside of the MLP.
    """
    places = _placed(expression.root)
    depth = max(y for _, y in places.values()) + 1
    breadth = max(x for x, _ in places.values()) + 1
    stacks = expression.structure.stacks if expression.structure else 1
    width, height = breadth * (_NODE_WIDTH + _GAP) + 14, depth * _ROW + 6
    back = (stacks - 1) * _STACK
    margin = max(0.0, (WIDTH * 0.75 - width - back) / 2)
    sheets = [
        f'<rect class="sheet" x="{margin + shift * _STACK:.1f}" y="{back - shift * _STACK}" '
        f'width="{width}" height="{height}" rx="8"/>'
        for shift in reversed(range(stacks))
    ]

    def centre(path: tuple[int, ...]) -> Point:
        x, y = places[path]
        return margin + 12 + x * (_NODE_WIDTH + _GAP) + _NODE_WIDTH / 2, back + 12 + y * _ROW + _NODE_HEIGHT / 2

    edges, nodes = [], []
    for path, node in _walk(expression.root):
        x, y = centre(path)
        if path:
            above = centre(path[:-1])
            edges.append(
                f'<path class="edge" d="M{x:.1f} {y - _NODE_HEIGHT / 2:.1f}'
                f'L{above[0]:.1f} {above[1] + _NODE_HEIGHT / 2:.1f}"/>'
            )
        nodes.append(_node(node, x, y, hidden, inner))
    full = width + back + 2 * margin + 2
    content = (*sheets, *edges, *nodes)
    return figure(name, title, description, height + back + 2, *content, width=full, style=f"max-width:{full:.0f}px")


def _node(node: Node, x: float, y: float, hidden: int, inner: int) -> str:
    text, hint, kind = node.op, node.op, "leaf" if not node.args else "op"
    if node.op == LINEAR:
        first = node.args[1].op == "wb1"
        takes, gives = (hidden, inner) if first else (inner, hidden)
        text, kind = f"W{1 if first else 2}  {takes}→{gives}", LINEAR
        hint = f"linear, {takes} to {gives} channels"
    box = (
        f'<rect x="{x - _NODE_WIDTH / 2:.1f}" y="{y - _NODE_HEIGHT / 2:.1f}" width="{_NODE_WIDTH}" '
        f'height="{_NODE_HEIGHT}" rx="6"/>'
    )
    return tag("g", tag("title", escape(hint)), box, _text(x, y + 4, text, "name", "middle"), class_=f"node {kind}")


def _walk(node: Node, path: tuple[int, ...] = ()):
    """Every node with its path from the root; a linear's weight belongs to the linear and is no node of its own."""
    yield path, node
    for index, arg in enumerate(node.args[:1] if node.op == LINEAR else node.args):
        yield from _walk(arg, (*path, index))


def _placed(root: Node) -> dict[tuple[int, ...], Point]:
    """Column and row of every node by its path: leaves side by side, all others amid the nodes below them."""
    places: dict[tuple[int, ...], Point] = {}
    columns = itertools.count()
    for path, _ in reversed(list(_walk(root))):
        below = [places[(*path, index)][0] for index in range(2) if (*path, index) in places]
        places[path] = (sum(below) / len(below) if below else -next(columns), len(path))
    last = min(x for x, _ in places.values())
    return {path: (x - last, y) for path, (x, y) in places.items()}


def _text(x: float, y: float, text: str, kind: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{_value(x)}" y="{_value(y)}" text-anchor="{anchor}">{escape(text)}</text>'


def _value(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else escape(value)


def _widened(values: Iterable[float]) -> tuple[float, float]:
    """From a little below the smallest to a little above the largest."""
    values = list(values)
    low, high = min(values), max(values)
    spread, size = high - low, max(abs(low), abs(high))
    margin = 0.07 * spread if spread > 1e-9 * size else 0.05 * size or 1.0  # what rounding alone tells apart is one
    return low - margin, high + margin
