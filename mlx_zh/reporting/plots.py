"""The charts as PNG files, in Chinese where the machine has a Chinese font, else in English."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_zh.reporting.charts import Curves, Dots, Series, all_curves, exam_charts
from mlx_zh.reporting.findings import Findings
from mlx_zh.reporting.messages import Text, say
from mlx_zh.system.storage import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#1f6fc4", "#d9690b", "#1c8a4b", "#b8319b")

# Font families with Simplified Chinese on macOS, Linux and Windows.
CJK_FONTS = (
    "PingFang SC",
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "Hiragino Sans GB",
    "Heiti SC",
    "STHeiti",
    "Microsoft YaHei",
    "SimHei",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Noto Sans CJK JP",  # Debian's fonts-noto-cjk registers its collection under its first face
    "Noto Sans CJK TC",
    "Arial Unicode MS",
    "Droid Sans Fallback",
)


def cjk_font() -> str | None:
    """The first family of `CJK_FONTS` that this machine has; None without any."""
    from matplotlib import font_manager

    present = set(font_manager.get_font_names())
    return next((name for name in CJK_FONTS if name in present), None)


def write_plots(findings: Findings, folder: Path) -> list[Path]:
    """Draw every chart of the findings as `folder/KEY.png`; returns the paths. Raises StorageError."""
    from matplotlib import rc_context

    font = cjk_font()
    wording: Callable[[Text], str] = (lambda text: text.zh) if font else (lambda text: text.en)
    families = [font, "DejaVu Sans"] if font else ["DejaVu Sans"]
    paths = []
    settings: Any = {"font.family": families, "axes.unicode_minus": False, "text.parse_math": False}
    charts: list[Dots | Curves] = [*exam_charts(findings), *all_curves(findings)]
    with rc_context(settings):
        for chart in charts:
            figure = _dots(chart, wording) if isinstance(chart, Dots) else _curves(chart, wording)
            path = folder / f"{chart.key}.png"
            with written_whole(path) as file:
                figure.savefig(file, format="png", dpi=144)
            paths.append(path)
    return paths


def _figure(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(6.4, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, linewidth=0.6)
    return figure, axes


def _curves(chart: Curves, wording: Callable[[Text], str]) -> Figure:
    figure, axes = _figure(3.8)
    scale = 100 if chart.percent else 1
    for series in chart.series:
        steps, values = zip(*series.points, strict=True)
        axes.plot(steps, [v * scale for v in values], label=wording(series.name), **_style(series))
    axes.set_title(wording(chart.title), fontsize=11)
    axes.set_xlabel(wording(say("step")))
    axes.set_ylabel(wording(chart.axis))
    axes.legend(frameon=False, fontsize=8)
    return figure


def _style(series: Series) -> dict[str, Any]:
    color = COLORS[series.color]
    lone = len(series.points) == 1
    if series.kind == "raw":
        return {"color": color, "alpha": 0.4, "linewidth": 1, "marker": "o" if lone else None}
    if series.kind == "marks":
        return {"color": color, "linewidth": 1.2, "marker": "o", "markersize": 4}
    return {"color": color, "linewidth": 1.8, "marker": "o" if lone else None}


def _dots(chart: Dots, wording: Callable[[Text], str]) -> Figure:
    figure, axes = _figure(1.3 + 0.22 * sum(len(spans) + 0.8 for _, spans in chart.rows))
    if chart.band:
        axes.axvspan(100 * chart.band[0], 100 * chart.band[1], color="#8e97a4", alpha=0.2, linewidth=0)
    lane, positions, labelled = 0.0, [], set[int]()
    for _, spans in chart.rows:
        positions.append(-(lane + (len(spans) - 1) / 2))
        for model, span in enumerate(spans):
            if span:
                errors = [[100 * (span.value - span.low)], [100 * (span.high - span.value)]]
                label = None if model in labelled else wording(chart.models[model])
                labelled.add(model)
                style: dict[str, Any] = {"fmt": "o", "markersize": 4, "capsize": 2, "linewidth": 1.2}
                axes.errorbar(100 * span.value, -lane, xerr=errors, color=COLORS[model % 4], label=label, **style)
            lane += 1
        lane += 0.8
    axes.grid(visible=False, axis="y")
    axes.set_yticks(positions, [wording(name) for name, _ in chart.rows])
    axes.set_title(f"{wording(chart.title)} (%)", fontsize=11)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
