"""Draws the figures from the logs beside this file: python results/plot.py (needs matplotlib)"""
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from data import PathStar, draw  # noqa: E402
from reproduce import GRID_STEPS  # noqa: E402

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#777777"  # told apart by the colour-blind, too
NODES = [(GREY, "-"), (RED, "-"), (ORANGE, "--"), (GREEN, "-."), (BLUE, ":")]             # start, first hop, ..., goal
NAMES = {"gpt": "Transformer", "mamba": "Mamba"}
plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
                     "svg.hashsalt": "pathstar", "lines.linewidth": 1.6, "svg.fonttype": "none"})


def records(**wanted):
    """The recorded runs whose flags have these values -> [(config, {figure: its values over the run})]"""
    found = []
    for file in sorted(HERE.glob("*.jsonl")):
        header, *lines = map(json.loads, file.read_text().splitlines())
        if all(header["config"][flag] == value for flag, value in wanted.items()):
            found.append((header["config"], {key: [line[key] for line in lines] for key in lines[0]}))
    return found


def save(figure, name):
    figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def panels(title_of, height=2.6):
    figure, axes = plt.subplots(1, 2, figsize=(7.2, height), sharey=True, layout="constrained")
    for ax, model in zip(axes, NAMES):
        ax.set(title=title_of(NAMES[model]), xlabel="training examples", ylim=(-0.03, 1.03))
        ax.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, 0))
        ax.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x / 1000:.0f}k"))
    return figure, list(zip(axes, NAMES))


def accuracy():
    """Path accuracy over the examples seen, every recorded run on the default graph."""
    figure, axes = panels(str, height=2.9)
    for ax, model in axes:
        for label, color, style, teacherless, reverse in (("teacher-forced", RED, "-", False, False),
                                                          ("teacherless", BLUE, "-", True, False),
                                                          ("reversed", GREEN, "--", False, True)):
            for i, (_, log) in enumerate(records(model=model, deg=2, path_len=5, only_first_hop=False,
                                                 teacherless=teacherless, reverse=reverse)):
                ax.plot(log["examples"], log["accuracy"], style, color=color, alpha=0.8,
                        label=label if model == "gpt" and i == 0 else None)
        longest = max(log["examples"][-1] for _, log in records(model=model, deg=2, path_len=5, teacherless=True))
        ax.set_xlim(-0.02 * longest, 1.05 * longest)                 # the longest teacher-forced runs go on far beyond
        ax.axhline(0.5, color=GREY, lw=0.8, ls=":")
    axes[1][0].annotate("guessing an arm", (1, 0.5), (-2, -10), xycoords=("axes fraction", "data"), textcoords="offset points",
                        ha="right", color=GREY, fontsize=8)
    axes[0][0].set_ylabel("paths right")
    figure.legend(loc="outside upper center", ncol=3)
    save(figure, "accuracy")


def nodes(name, key, flags, title, ylabel):
    """One figure of accuracy per node over training, of the recorded run with the smallest seed."""
    figure, axes = panels(lambda model: f"{model}, {title}")
    for ax, model in axes:
        runs = sorted(records(model=model, deg=2, path_len=5, only_first_hop=False, **flags), key=lambda run: run[0]["seed"])
        solved = [run for run in runs if run[1]["accuracy"][-1] >= 0.995] if flags["teacherless"] else runs
        config, log = solved[0]
        last = config["path_len"] - 1
        for i, (color, style) in list(enumerate(NODES))[1:]:
            label = {1: "first hop", last: "goal"}.get(i, f"node {i + 1}")
            ax.plot(log["examples"], [shares[i] for shares in log[key]], style, color=color, label=label)
        ax.axhline(0.5, color=GREY, lw=0.8, ls=":")
    axes[0][0].set_ylabel(ylabel)
    axes[1][0].legend(loc="lower right", fontsize=8, labelspacing=0.3)
    save(figure, name)


def grid():
    """Path accuracy of all recorded runs after at most GRID_STEPS steps, over length and number of the paths."""
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.9), sharey=True, layout="constrained")
    for ax, vary, fixed, title in ((axes[0], "path_len", {"deg": 2}, "two arms"),
                                   (axes[1], "deg", {"path_len": 5}, "paths of five nodes")):
        for model, dodge, marker in (("gpt", -0.06, "o"), ("mamba", 0.06, "^")):
            for teacherless, color, style in ((False, RED, "-"), (True, BLUE, "--")):
                ends = {}
                for config, log in records(model=model, teacherless=teacherless, reverse=False, only_first_hop=False, **fixed):
                    within = [share for share, seen in zip(log["accuracy"], log["iter"]) if seen <= GRID_STEPS]
                    ends.setdefault(config[vary], []).append(within[-1])
                sizes = sorted(ends)
                label = f"{NAMES[model]}, {'teacherless' if teacherless else 'teacher-forced'}"
                ax.plot([size + dodge for size in sizes], [np.mean(ends[size]) for size in sizes], style, color=color, lw=1.2)
                ax.plot([size + dodge for size in sizes for _ in ends[size]], [end for size in sizes for end in ends[size]],
                        marker, color=color, markersize=5, mfc=color if model == "gpt" else "white", label=label)
        sizes = [2.6, 6.4] if vary == "path_len" else np.linspace(1.7, 5.3, 50)
        ax.plot(sizes, [1 / fixed.get("deg", size) for size in sizes], ":", color=GREY, lw=1)
        ax.set(title=title, xlabel="nodes on a path" if vary == "path_len" else "arms", ylim=(-0.03, 1.03),
               xticks=(3, 4, 5, 6) if vary == "path_len" else (2, 3, 5))
        ax.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, 0))
    axes[0].annotate("guessing an arm", (2.6, 0.5), (0, 3), textcoords="offset points", color=GREY, fontsize=8)
    axes[0].set_ylabel("paths right")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncol=4, fontsize=8, columnspacing=1)
    save(figure, "grid")


def task():
    """A graph, and its tokens in the three ways of training."""
    star = PathStar(2, 5, 10)
    prefix, path = (x[0].tolist() for x in draw(star, 1, np.random.default_rng([1, 3])))
    words = {star.pipe: "|", star.slash: "/", star.equals: "=", star.dollar: "$"}
    edges = dict(zip(prefix[1:-3:3], prefix[0:-3:3]))                # node: the one before it
    wrong = [next(node for node in edges if node not in edges.values() and node != path[-1])]
    while wrong[-1] != path[0]:
        wrong.append(edges[wrong[-1]])
    figure, ax = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
    ax.set(xlim=(-1, 39), ylim=(-7.6, 3.4))
    ax.axis("off")
    for arm, y, color in ((path, 1.2, BLUE), (wrong[::-1], -1.2, GREY)):
        places = [(14, 0)] + [(14 + 4.5 * i, y) for i in range(1, len(arm))]
        for (x0, y0), (x1, y1) in zip(places, places[1:]):
            ax.annotate("", (x1, y1), (x0, y0), arrowprops=dict(arrowstyle="-|>", color=color, shrinkA=9, shrinkB=9, lw=1.5))
        for node, (x, y) in list(zip(arm, places))[1:]:
            ax.text(x, y, node, ha="center", va="center", color="white", weight="bold",
                    bbox=dict(boxstyle="circle,pad=0.35", color=color))
    ax.text(14, 0, path[0], ha="center", va="center", color="white", weight="bold",
            bbox=dict(boxstyle="circle,pad=0.35", color="black"))
    ax.text(12.6, 0, "start", ha="right", va="center")
    ax.text(14 + 4.5 * 4 + 1.3, 1.2, "goal", va="center")
    ax.text(-1, 2.6, "Which arm leads to the goal?", weight="bold")
    rows = (("teacher forcing", path[:-1], path), ("teacherless", [star.dollar] * 4, path),
            ("reversed", path[::-1][:-1], path[::-1]))
    for i, token in enumerate(prefix):
        ax.text(i, -3.2, words.get(token, token), ha="center", family="monospace")
    ax.text(13, -2.4, "the prefix, the same for all: edges / start goal =", ha="center", color=GREY, fontsize=8)
    for row, (name, given, answer) in enumerate(rows):
        y = -4.4 - 1.1 * row
        ax.text(13.5, y, name, ha="right", weight="bold")
        ax.text(15, y, "reads  … =", color=GREY, fontsize=8)
        for i, token in enumerate(given):
            ax.text(20.2 + 1.4 * i, y, words.get(token, token), ha="center", family="monospace")
        ax.text(26.4, y, "and is to write", color=GREY, fontsize=8)
        for i, token in enumerate(answer):
            ax.text(32.6 + 1.4 * i, y, token, ha="center", family="monospace", color=RED if token == path[1] else "black",
                    weight="bold" if token == path[1] else "normal")
    ax.text(39, -7.5, "the first hop: written first, it needs a plan; reversed, it is one more look-up", ha="right",
            color=RED, fontsize=8)
    save(figure, "task")


if __name__ == "__main__":
    accuracy()
    nodes("clever_hans", "forced_node_accuracy", dict(teacherless=False, reverse=False), "teacher-forced",
          "right, given the true\nnodes before")
    nodes("cascade", "node_accuracy", dict(teacherless=True, reverse=False), "teacherless", "right, from the prefix alone")
    grid()
    task()
