"""The report's plots: what is worth drawing of a training, and small SVGs whose colours the page decides."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from posttrain.evaluation import Figure
from posttrain.pipeline.table import amount, dig, figure, is_share, known, number, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

    from posttrain.pipeline.frontier import Frontier
    from posttrain.pipeline.tuning import Panel

# What is logged, its title and its unit (`%` begins that of a share), in the order of the page. The rest goes by its own name.
LOGGED = {
    "nll": ("Loss", "nats per trained token"),
    "reward": ("Reward", "mean score of the samples"),
    "accuracy": ("Better answer preferred", "% of pairs"),
    "margin": ("Margin of log-ratios", "nats, chosen over rejected"),
    "gap": ("Gap of the scores", "chosen over rejected"),
    "chosen_ratio": ("Chosen against the reference", "nats an answer"),
    "rejected_ratio": ("Rejected against the reference", "nats an answer"),
    "chosen_logp": ("log p of the chosen", "nats an answer"),
    "rejected_logp": ("log p of the rejected", "nats an answer"),
    "entropy": ("Entropy of the samples", "nats per token"),
    "length": ("Length of the samples", "tokens"),
    "cut_off": ("Samples cut off", "% of samples"),
    "mixed_groups": ("Groups of mixed outcome", "% of groups"),
    "ungraded": ("Not graded", "% of samples"),
    "kl": ("KL to the reference", "nats per token"),
    "ratio": ("Ratio policy / sampler", "mean over tokens"),
    "clip_fraction": ("Clipped", "% of tokens"),
    "mismatch": ("Trainer against sampler", "mean |difference| of log p"),
}
MACHINE = {"grad_norm": ("Gradient norm", "before clipping"), "lr": ("Learning rate", "rate")}
VALIDATED = {
    "accuracy": "% of rows", "loss": "mean", "pass@1": "% of samples", "ended": "% of samples", "nll": "nats per token",
    "length": "tokens",
}  # fmt: skip
FIRST = ("pass@1", "greedy", "nll", "score")  # of the validation metrics
NOT_DRAWN = {"step", "tokens", "validation", "time"}

INK, MUTED, GRID, LINE, MARK = "#010101", "#020202", "#030303", "#040404", "#050505"  # stand for the page's colours
SERIES = tuple(f"#0606{index:02d}" for index in range(6))  # of the methods of a frontier
SIGNS = ("o", "s", "^", "D", "v", "P")
PAGE = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", LINE: "var(--line)", MARK: "var(--mark)"}
PAGE |= {colour: f"var(--series{index})" for index, colour in enumerate(SERIES)}
POINTS = 300  # at most so many are drawn of a curve
WINDOWS = 25  # a running mean is over about a 25th of a curve
NOISY = 50  # from so many points a running mean is drawn
FOREIGN = (  # what matplotlib writes that is wrong inside of a page, and what takes its place
    (r"<metadata>.*?</metadata>|<style.*?</style>|<clipPath.*?</clipPath>|<defs>\s*</defs>", ""),
    (r"""(<g) id="[^"]*"|( )clip-path="url\([^"]*\)" ?| xlink:type="[^"]*\"""", r"\1\2"),
    (r"<defs>\s*</defs>", ""),
    (r"xlink:href", "href"),
    (r"font-family: [^;\"]*; ?", ""),
    (r' transform="rotate\(-?0 [^"]*"', ""),
)
STYLE: Any = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 8, "axes.unicode_minus": True, "path.simplify": False,
}  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """A quantity over the updates. `weight`: what a running mean weighs the points with. `bands`: its intervals, where known."""

    title: str
    unit: str
    steps: tuple[float, ...]
    values: tuple[float, ...]
    weight: tuple[float, ...] = ()
    bands: tuple[tuple[float, float], ...] = ()
    validated: bool = False
    exact: bool = False  # set, not measured: there is nothing to smooth

    @property
    def percent(self) -> bool:
        return self.unit.startswith("%")

    @property
    def noisy(self) -> bool:
        return not (self.validated or self.exact) and len(self.steps) >= NOISY

    @property
    def constant(self) -> bool:
        """It never changed by more than rounding: a number says it better than a plot."""
        size = max(map(abs, self.values), default=0.0)
        return len(self.steps) > 1 and not self.validated and max(self.values) - min(self.values) <= 1e-4 * size

    def smooth(self) -> tuple[float, ...]:
        """The mean over the updates around each, of sums and not of means where the points have weights."""
        if not self.noisy:
            return self.values
        half = max(1, len(self.values) // WINDOWS // 2)
        weight = self.weight or (1.0,) * len(self.values)
        means = []
        for place in range(len(self.values)):
            part = slice(max(0, place - half), place + half + 1)
            total = math.fsum(value * each for value, each in zip(self.values[part], weight[part], strict=True))
            means.append(total / math.fsum(weight[part]))
        return tuple(means)

    def text(self, value: float) -> str:
        if self.percent:
            return f"{100 * value:.1f}%"
        return amount(value) if value == 0 or abs(value) >= 0.001 else plain(value)

    def with_unit(self, value: float) -> str:
        if self.percent:
            return self.text(value).rstrip("%") + self.unit
        return self.text(value) + (f" {self.unit}" if self.unit and not self.exact else "")

    @property
    def span(self) -> str:
        """`0.40 → 0.62`: where it began and where it ended (of the running mean, where there is one)."""
        smooth = self.smooth()
        return f"{self.text(smooth[0])} → {self.text(smooth[-1])}" if len(smooth) > 1 else self.text(smooth[-1])


def curves(rows: Sequence[dict[str, Any]]) -> tuple[list[Curve], list[str]]:
    """(what is drawn of metrics.jsonl, a line for each quantity that never changed)."""
    rows = [row for row in rows if number(row.get("step")) is not None]
    names = list(dict.fromkeys(name for row in rows for name in row if name not in NOT_DRAWN))
    losses = [name for name in names if name.startswith("loss/") and name.removeprefix("loss/") not in names]
    other = [name for name in names if name not in LOGGED and name not in MACHINE and not name.startswith("loss/")]
    found = [_logged(rows, name) for name in ("nll", *losses, "reward")]
    found += _validated(rows)
    found += [_logged(rows, name) for name in (*LOGGED, *other, *MACHINE) if name not in {"nll", "reward"}]
    found.append(_speed(rows))
    drawn = [curve for curve in found if curve.steps]
    constant = [curve for curve in drawn if curve.constant]
    lines = [f"{curve.title} {curve.with_unit(curve.values[0])}" for curve in constant]
    return [curve for curve in drawn if curve not in constant], lines


def _logged(rows: Sequence[dict[str, Any]], name: str) -> Curve:
    title, unit = {**LOGGED, **MACHINE}.get(name, (name, ""))
    if name.startswith("loss/"):
        title, unit = f"Loss ({name.removeprefix('loss/')})", "mean of the update"
    pairs = [(row["step"], value) for row in rows if (value := number(row.get(name))) is not None]
    steps, values = tuple(float(step) for step, _ in pairs), tuple(value for _, value in pairs)
    return Curve(title, unit, steps, values, exact=name == "lr")


def _validated(rows: Sequence[dict[str, Any]]) -> list[Curve]:
    """One curve for each validation metric, those that decide first. A score that is pass@1 again is left out."""
    points: dict[str, list[tuple[float, Figure]]] = {}
    for row in rows:
        metrics = row.get("validation")
        for name, value in metrics.items() if isinstance(metrics, dict) else ():
            each = figure(value)
            if each is not None and known(each.value):
                points.setdefault(str(name), []).append((float(row["step"]), each))
    right = [(step, each.value) for step, each in points.get("pass@1", [])]
    if right and right == [(step, each.value) for step, each in points.get("score", [])]:
        del points["score"]
    ordered = [name for name in FIRST if name in points] + [name for name in points if name not in FIRST]
    found = []
    for name in ordered:
        unit = VALIDATED.get(name, "% of problems" if is_share(name) else "")
        steps, figures = zip(*points[name], strict=True)
        whole = [known(each.low) and known(each.high) for each in figures]
        bands = tuple((each.low, each.high) if there else (each.value,) * 2 for each, there in zip(figures, whole, strict=True))
        values = tuple(each.value for each in figures)
        found.append(Curve(f"Validation: {name}", unit, steps, values, bands=bands if any(whole) else (), validated=True))
    return found


def _speed(rows: Sequence[dict[str, Any]]) -> Curve:
    """Tokens a second. Validations are no part of the seconds that a row has."""
    points = []
    for row in rows:
        tokens, seconds = number(row.get("tokens")), number(dig(row, "time", "seconds"))
        if tokens is not None and seconds is not None and seconds > 0:
            points.append((float(row["step"]), tokens / seconds, seconds))
    steps, values, weight = zip(*points, strict=True) if points else ((), (), ())
    return Curve("Speed", "tokens per second", steps, values, weight)


def curve_svg(curve: Curve, best: int | None = None, place: str = "") -> str:
    """A small plot: each update faint and the running mean strong, or points with their interval bands; the best step marked."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        canvas, axes = _axes(3.1, 1.75, left=0.44, right=0.1, bottom=0.36, top=0.24)
        if curve.bands:
            low, high = zip(*curve.bands, strict=True)
            axes.fill_between(curve.steps, low, high, color=LINE, alpha=0.18, linewidth=0, clip_on=False)
        if curve.noisy:
            axes.plot(*_thin(curve.steps, curve.values), color=LINE, alpha=0.3, linewidth=0.6, clip_on=False)
        dots: dict[str, Any] = {"marker": "o", "markersize": 2.6} if curve.validated or len(curve.steps) == 1 else {}
        axes.plot(*_thin(curve.steps, curve.smooth()), color=LINE, linewidth=1.4, clip_on=False, solid_joinstyle="round", **dots)
        if curve.percent:  # of a small share the small numbers, of a large one all of it
            highest = max([high for _, high in curve.bands] or curve.values)
            axes.set_ylim(0, min(1.0, highest * 1.1) or 1.0)
        _scales(axes, curve.percent)
        _mark_best(axes, curve, best)
        axes.set_xlabel("update", color=MUTED, fontsize=7.5, loc="right", labelpad=1)
        axes.set_title(curve.unit, color=MUTED, fontsize=7.5, loc="left", pad=6)
        return svg_of(canvas, f"{place} {curve.title}")


def _mark_best(axes: "Axes", curve: Curve, best: int | None) -> None:
    if best is None or not curve.steps or not min(curve.steps) <= best <= max(curve.steps):
        return
    axes.axvline(best, color=MARK, linewidth=0.9, dashes=(3, 2), zorder=1, clip_on=False)
    if curve.validated and best in curve.steps:
        axes.plot([best], [curve.values[curve.steps.index(best)]], "o", color=MARK, markersize=4.5, clip_on=False)


def intervals_svg(names: Sequence[str], figures: Sequence[Figure], metric: str, place: str = "intervals") -> str:
    """A dot with its interval for each evaluation, the first on top."""
    from matplotlib import rc_context

    percent = is_share(metric)
    with rc_context(STYLE):
        canvas, axes = _axes(4.4, 0.5 + 0.27 * len(names), left=0.2, right=0.55, bottom=0.36, top=0.1, left_names=names)
        for row, each in enumerate(figures):
            if not known(each.value):
                axes.text(0, row, "n/a", color=MUTED, va="center")
                continue
            if known(each.low) and known(each.high):
                axes.plot([each.low, each.high], [row, row], color=LINE, linewidth=2, solid_capstyle="butt", clip_on=False)
            axes.plot([each.value], [row], "o", color=LINE, markersize=5.5, clip_on=False)
            text = f"{100 * each.value:.1f}%" if percent else amount(each.value)
            right = each.high if known(each.high) else each.value
            axes.annotate(text, (right, row), (6, 0), textcoords="offset points", color=INK, va="center_baseline", fontsize=8)
        axes.set_ylim(len(names) - 0.5, -0.5)
        ends = [end for each in figures for end in (each.value, each.high) if known(end)]
        if percent:
            axes.set_xlim(0, min(1.0, 1.05 * max(ends, default=1.0)) or 1.0)
        _scales(axes, percent, horizontal=True)
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(axis="y", labelcolor=INK, labelsize=8.5)
        axes.set_xlabel(f"{metric}, 95% interval", color=MUTED, fontsize=7.5, loc="right", labelpad=1)
        return svg_of(canvas, f"{place} {metric}")


def frontier_svg(frontier: "Frontier", place: str) -> str:
    """Score against KL with both intervals: a line for each method, a mark for each of its strengths."""
    from matplotlib import rc_context
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    with rc_context(STYLE):
        canvas, axes = _axes(6.6, 3.9, left=0.55, right=1.25, bottom=0.45, top=0.2)
        ends = []
        for index, (name, points) in enumerate(frontier.series.items()):
            colour, sign = SERIES[index % len(SERIES)], SIGNS[index % len(SIGNS)]
            kl, score = [each.kl.value for each in points], [each.score.value for each in points]
            axes.plot(kl, score, color=colour, linewidth=1.2, zorder=2)
            for each in points:
                for figure, across in ((each.score, False), (each.kl, True)):
                    if known(figure.low) and known(figure.high):
                        span = [figure.low, figure.high]
                        xs, ys = (span, [each.score.value] * 2) if across else ([each.kl.value] * 2, span)
                        axes.plot(xs, ys, color=colour, linewidth=0.8, alpha=0.55, zorder=1)
            axes.plot(kl, score, sign, color=colour, markersize=5.5, zorder=3)
            ends.append((score[-1], kl[-1], name, colour))
        _scales(axes, percent=False)
        axes.xaxis.set_major_locator(MaxNLocator(7))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        _names_beside(axes, ends)
        axes.set_xlabel("KL to the start, nats an answer", color=MUTED, fontsize=7.5, loc="right", labelpad=1)
        axes.set_title("score", color=MUTED, fontsize=7.5, loc="left", pad=6)
        return svg_of(canvas, f"{place} frontier")


def tuners_svg(panel: "Panel", place: str) -> str:
    """A figure of each tuner against the parameters that it moves; a dashed line where all began."""
    from matplotlib import rc_context
    from matplotlib.ticker import FuncFormatter, LogLocator

    with rc_context(STYLE):
        canvas, axes = _axes(6.6, 3.6, left=0.55, right=1.25, bottom=0.45, top=0.2)
        for _, moved, each in panel.points:
            if known(each.low) and known(each.high):
                axes.plot([moved, moved], [each.low, each.high], color=MARK, linewidth=0.8, alpha=0.55, zorder=1)
            axes.plot([moved], [each.value], "o", color=MARK, markersize=5.5, zorder=3)
        if panel.start is not None:
            axes.axhline(panel.start.value, color=LINE, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        axes.set_xscale("log")
        _scales(axes, is_share(panel.metric))
        axes.xaxis.set_major_locator(LogLocator(10))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.minorticks_off()
        _names_beside(axes, [(each.value, moved, name, MARK) for name, moved, each in panel.points])
        axes.set_xlabel("parameters that move", color=MUTED, fontsize=7.5, loc="right", labelpad=1)
        axes.set_title(panel.metric, color=MUTED, fontsize=7.5, loc="left", pad=6)
        return svg_of(canvas, f"{place} tuners")


def _names_beside(axes: "Axes", ends: Sequence[tuple[float, float, str, str]]) -> None:
    """(height, along, name, colour): names at the right, each with a line to its point, none over another."""
    low, high = axes.get_ylim()
    gap = (high - low) * min(0.055, 0.98 / max(1, len(ends)))
    places: list[float] = []
    for height, _, _, _ in sorted(ends):
        places.append(max([height, *(place + gap for place in places[-1:])]))
    over = max(0.0, places[-1] - high) if places else 0.0  # too many at the top: all that touch one another move down
    for index in range(len(places) - 1, -1, -1):
        ceiling = places[index + 1] - gap if index + 1 < len(places) else places[index] - over
        places[index] = min(places[index], ceiling)
    for (height, along, name, colour), place in zip(sorted(ends), places, strict=True):
        axes.annotate(
            name, (along, height), xytext=(1.02, (place - low) / (high - low)), textcoords="axes fraction", color=colour,
            va="center", fontsize=8.5, fontweight="bold",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.5, "shrinkA": 2, "shrinkB": 4},
        )  # fmt: skip


def _axes(
    width: float, height: float, left: float, right: float, bottom: float, top: float, left_names: Sequence[str] = ()
) -> "tuple[Canvas, Axes]":
    """An empty plot with margins in inches; `left_names` are given room."""
    from matplotlib.figure import Figure as Canvas

    left += 0.068 * max(map(len, left_names), default=0)
    canvas = Canvas(figsize=(width, height))
    axes = canvas.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height))
    canvas.patch.set_visible(False)
    axes.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)
    return canvas, axes


def _scales(axes: "Axes", percent: bool, horizontal: bool = False) -> None:
    """Few ticks, a grid along the values, no tick marks."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.tick_params(bottom=False, left=False, labelcolor=MUTED, labelsize=7.5, pad=2)
    value_axis, other = (axes.xaxis, axes.yaxis) if horizontal else (axes.yaxis, axes.xaxis)
    value_axis.set_major_locator(MaxNLocator(6 if horizontal else 4))
    value_axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%" if percent else _tick(value)))
    other.set_major_locator(MaxNLocator(5, integer=True))
    other.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(axis="x" if horizontal else "y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)


def _tick(value: float) -> str:
    text = f"{value:,.0f}" if abs(value) >= 1000 else plain(value, 4)
    return f"−{text[1:]}" if text.startswith("-") else text


def _thin(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most 2 POINTS of a curve: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(steps) <= 2 * POINTS:
        return list(steps), list(values)
    kept: list[int] = []
    size = len(steps) / POINTS
    for part in range(POINTS):
        places = range(int(part * size), int((part + 1) * size))
        kept += sorted({min(places, key=values.__getitem__), max(places, key=values.__getitem__)})
    return [steps[place] for place in kept], [values[place] for place in kept]


def svg_of(canvas: "Canvas", place: str) -> str:
    """The plot as an <svg> element to stand in a page: no header and no metadata, the page's font and colours, ids of its own.

    `place` must be unique in the page: the ids are made from it.
    """
    from io import StringIO

    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    stream = StringIO()
    with rc_context({**STYLE, "svg.hashsalt": place}):
        FigureCanvasSVG(canvas).print_svg(stream, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    for pattern, replacement in FOREIGN:
        body = re.sub(pattern, replacement, body, flags=re.DOTALL)
    body = re.sub(r' (?:d|x|y)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), body)
    for colour, own in PAGE.items():
        body = body.replace(colour, own)
    width, height = (round(72 * inches) for inches in canvas.get_size_inches())
    body = re.sub(r"\s+", " ", body).strip()
    return f'<svg class="plot" viewBox="0 0 {width} {height}" aria-hidden="true">{body}'
