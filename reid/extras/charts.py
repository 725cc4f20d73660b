"""The charts of the report: matplotlib figures without its global state, legible on a phone."""

from matplotlib import rc_context
from matplotlib.figure import Figure

from reid.extras.pictures import COLOURS, FAINT, INK

SERIES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")  # Okabe and Ito's, apart for every kind of colour vision
MARKS = ("o", "s", "^", "D")
MAX_CELLS = 12  # cameras up to which the cells of a matrix carry their number
STYLE = {"font.size": 11, "axes.edgecolor": "#d8dee4", "axes.labelcolor": FAINT, "xtick.color": FAINT, "ytick.color": FAINT,
         "axes.spines.top": False, "axes.spines.right": False, "text.color": INK, "legend.frameon": False, "xtick.minor.size": 0,
         "grid.color": "#eef0f2", "axes.axisbelow": True, "text.parse_math": False}


def draw_charts(folder, results, roc, cameras, threshold):
    """Writes cmc.png, roc.png, scores.png and, for a CameraTable, cameras-rank1.png and cameras-map.png into `folder`."""
    with rc_context(STYLE):
        _cmc(results).savefig(folder / "cmc.png")
        _roc(roc).savefig(folder / "roc.png")
        _scores(roc, threshold).savefig(folder / "scores.png")
        if cameras is not None:
            _matrix(cameras, cameras.rank1).savefig(folder / "cameras-rank1.png")
            _matrix(cameras, cameras.mAP).savefig(folder / "cameras-map.png")


def _axes(x, y, size=(5, 3.4)):
    figure = Figure(size, dpi=200, layout="constrained")
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    axes.grid(True)
    return figure, axes


def _cmc(results):
    figure, axes = _axes("k", "a match within the first k (%)")
    for number, (name, result) in enumerate(results.items()):
        axes.plot(range(1, len(result.cmc) + 1), (100 * result.cmc).tolist(), MARKS[number % 4] + "-", color=SERIES[number % 4],
                  label=name, markersize=4)
    axes.set_xticks([1, 5, 10, 15, 20])
    axes.set_ylim(top=100.5)
    axes.legend(loc="lower right")
    return figure


def _roc(roc):
    figure, axes = _axes("false-match rate", "same person found (%)")
    rates, found = ((histogram.flip(0).cumsum(0) / histogram.sum()).tolist()
                    for histogram in (roc.different_histogram, roc.same_histogram))
    axes.plot(rates, [100 * share for share in found], color=SERIES[0])
    for rate, share in roc.tpr.items():
        axes.plot(rate, 100 * share, "o", color=SERIES[0])
        axes.annotate(f"{100 * share:.1f}", (rate, 100 * share), (7, -13), textcoords="offset points")
    axes.set(xscale="log", xlim=(max(min(roc.tpr) / 10, 1 / roc.different_pairs), 1.3), ylim=(0, 103))
    axes.xaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
    return figure


def _scores(roc, threshold):
    figure, axes = _axes("cosine", "share of the pairs")
    edges = roc.edges.tolist()
    kinds = ((roc.different_histogram, "different people", "wrong"), (roc.same_histogram, "same person", "right"))
    for histogram, name, kind in kinds:
        axes.stairs((histogram / histogram.sum()).tolist(), edges, fill=True, color=COLOURS[kind], alpha=0.5, label=name)
    axes.axvline(threshold, color=INK, linestyle="--", linewidth=1.2, label=f"threshold {threshold:.3f}")
    used = (roc.different_histogram + roc.same_histogram).nonzero()[:, 0]
    axes.set_xlim(float(roc.edges[used[0]]) - 0.02, float(roc.edges[used[-1] + 1]) + 0.02)
    axes.set_yticks([])
    axes.legend()
    return figure


def _matrix(cameras, values):
    """Query cameras x gallery cameras in percent; grey where no query is valid."""
    figure, axes = _axes("camera of the gallery", "camera of the query", (5, 4))
    axes.grid(False)
    axes.set_facecolor("#eef0f2")
    known = 100 * values[values.isfinite()]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0, 100)
    axes.imshow((100 * values).tolist(), cmap="Blues", vmin=low - 10, vmax=high + 10)
    names = ["?" if camera < 0 else str(camera) for camera in cameras.cameras]
    step = max(1, len(names) // 20)
    axes.set_xticks(range(0, len(names), step), names[::step])
    axes.set_yticks(range(0, len(names), step), names[::step])
    if len(names) <= MAX_CELLS:
        for row, line in enumerate((100 * values).tolist()):
            for column, value in enumerate(line):
                if value == value:
                    colour = "white" if value > (low + high) / 2 + 3 else INK
                    axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour)
    return figure
