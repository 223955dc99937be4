"""Draws the figures in results/figures from the logs in results/logs. It needs matplotlib.

    python results/figures.py
"""
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from cures import cells, examples_until_solved, logs_of  # noqa: E402
from data import PathStar, draw, edges_of, find_arms  # noqa: E402
from reproduce import CURES, read_log  # noqa: E402
from table import MODELS  # noqa: E402
from train import SOLVED, STOP_AT  # noqa: E402

BLUE = "#0072B2"        # these colours differ for the colour-blind, too
ORANGE = "#E69F00"
GREEN = "#009E73"
RED = "#D55E00"
GREY = "#777777"
DEFAULT_TASK = {"deg": 2, "path_len": 5, "n_layer": 6}
SETTINGS = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "pathstar",  # the same logs give the same file, to the byte
}


def records(**settings):
    """The recorded runs with these settings -> [(config, {figure: its values over the run})]"""
    found = []
    for file in sorted((HERE / "logs").glob("*.jsonl")):
        header, lines = read_log(file)
        config = header["config"]
        if all(config[name] == value for name, value in settings.items()):
            values = {key: [line[key] for line in lines] for key in lines[0]}
            found.append((config, values))
    return found


def save(figure, name):
    folder = HERE / "figures"
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def percent_axis(ax):
    ax.set_ylim(-0.03, 1.03)
    ax.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, 0))


def panel_for_each_model(title, height):
    """-> a figure, and {model: its axes}, for accuracies over the training examples"""
    figure, axes = plt.subplots(1, 2, figsize=(7.2, height), sharey=True, layout="constrained")
    panels = dict(zip(MODELS, axes))
    for model, ax in panels.items():
        ax.set_title(MODELS[model] + title)
        ax.set_xlabel("training examples")
        ax.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:.0f}k")
        percent_axis(ax)
    return figure, panels


def draw_accuracy():
    """Path accuracy over training, of all recorded runs on the default graph."""
    figure, panels = panel_for_each_model("", height=2.9)
    objectives = (
        ("teacher-forced", {"teacherless": False, "reverse": False}, RED, "-"),
        ("teacherless", {"teacherless": True, "reverse": False}, BLUE, "-"),
        ("reversed", {"teacherless": False, "reverse": True}, GREEN, "--"),
    )
    for model, ax in panels.items():
        task = DEFAULT_TASK | {"model": model, "only_first_hop": False}
        for label, flags, color, style in objectives:
            for _, log in records(**task, **flags):
                ax.plot(log["examples"], log["accuracy"], style, color=color, alpha=0.8,
                        label=label)
                label = None  # one entry in the legend
        # The longest teacher-forced runs go on far beyond the end of this axis.
        longest = max(log["examples"][-1] for _, log in records(**task, teacherless=True))
        ax.set_xlim(-0.02 * longest, 1.05 * longest)
        ax.axhline(0.5, color=GREY, lw=0.8, ls=":")
    panels["mamba"].annotate(
        "guessing an arm", (1, 0.5), (-2, -10), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right", color=GREY, fontsize=8
    )
    panels["gpt"].set_ylabel("paths right")
    figure.legend(*panels["gpt"].get_legend_handles_labels(), loc="outside upper center", ncol=3)
    save(figure, "accuracy")


def draw_nodes(name, key, title, ylabel, **flags):
    """The accuracy of each node over training, of one run for each model.

    It is the run with the smallest seed. Of the teacherless runs, it must be one that was solved.
    """
    figure, panels = panel_for_each_model(f", {title}", height=2.6)
    nodes = (
        (1, "first hop", RED, "-"),
        (2, "node 3", ORANGE, "--"),
        (3, "node 4", GREEN, "-."),
        (4, "goal", BLUE, ":"),
    )
    for model, ax in panels.items():
        runs = records(model=model, only_first_hop=False, **DEFAULT_TASK, **flags)
        if flags["teacherless"]:
            runs = [(config, log) for config, log in runs if log["accuracy"][-1] >= STOP_AT]
        _, log = min(runs, key=lambda run: run[0]["seed"])
        for place, label, color, style in nodes:
            shares = [shares[place] for shares in log[key]]
            ax.plot(log["examples"], shares, style, color=color, label=label)
        ax.axhline(0.5, color=GREY, lw=0.8, ls=":")
    panels["gpt"].set_ylabel(ylabel)
    panels["mamba"].legend(loc="lower right", fontsize=8, labelspacing=0.3)
    save(figure, name)


def draw_depth():
    """Teacherless models of several depths, on the default graph.

    Left, the examples that each run took. Right, the hops that are right at its end.
    """
    figure, axes = plt.subplots(2, 2, figsize=(7.2, 4.6), layout="constrained")
    for model, (ax, hops_ax) in zip(MODELS, axes):
        by_depth = {}
        for config, log in records(model=model, deg=2, path_len=5, teacherless=True):
            by_depth.setdefault(config["n_layer"], []).append(log)
        by_depth = dict(sorted(by_depth.items()))
        places = range(len(by_depth))
        for place, logs in zip(places, by_depth.values()):
            for log in logs:
                color, marker = (BLUE, "o") if log["accuracy"][-1] >= SOLVED else (RED, "x")
                ax.plot(place, log["examples"][-1], marker, color=color, mfc="none", markersize=6)
        for hop, color, style in ((1, RED, "-"), (2, ORANGE, "--"), (3, GREEN, "-.")):
            means = []
            for logs in by_depth.values():
                means.append(np.mean([log["node_accuracy"][-1][hop] for log in logs]))
            hops_ax.plot(places, means, style, color=color, marker="o", markersize=4,
                         label=f"hop {hop}")
        ax.set_ylim(0, 1.08 * ax.dataLim.y1)
        ax.set_ylabel("training examples until\nsolved (x: not solved)")
        ax.yaxis.set_major_formatter(lambda x, _: f"{x / 1000:.0f}k")
        hops_ax.axhline(0.5, color=GREY, lw=0.8, ls=":")
        hops_ax.set_ylabel("right at the end")
        percent_axis(hops_ax)
        for panel in (ax, hops_ax):
            panel.set_title(MODELS[model])
            panel.set_xticks(places, by_depth)
            panel.set_xlabel("layers")
    axes[1, 1].legend(loc="lower right", fontsize=8, labelspacing=0.3)
    save(figure, "depth")


def draw_cures():
    """How many examples each objective needs until a graph is solved."""
    graphs = list(dict.fromkeys((deg, path_len) for deg, path_len, _, _ in cells()))
    figure, axes = plt.subplots(
        len(graphs), 2, figsize=(7.2, 2.4 * len(graphs)), sharey=True, layout="constrained"
    )
    for (deg, path_len), panels in zip(graphs, axes):
        for model, ax in zip(MODELS, panels):
            for row, objective in enumerate(CURES):
                for run in logs_of(model, objective, deg, path_len):
                    examples = examples_until_solved(run)
                    if examples is not None:
                        ax.plot(examples, row, "o", color=BLUE, mfc="none", markersize=6)
                    else:
                        ax.plot(run.end["examples"] / 1000, row, "x", color=RED, markersize=6)
            ax.set_title(f"{MODELS[model]}, G({deg},{path_len})")
            ax.set_xlim(0, 1.08 * ax.dataLim.x1)
            ax.grid(axis="y", color=GREY, alpha=0.3)
    for ax in axes[-1]:
        ax.set_xlabel("thousand examples until solved (x: not solved)")
    names = [objective.replace("_", " ") for objective in CURES]
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    save(figure, "cures")


def ends_by_size(size, model, teacherless, fixed):
    """-> {deg or path_len: path accuracies at the end of the runs}"""
    ends = {}
    settings = {"reverse": False, "only_first_hop": False, "teacherless": teacherless}
    for config, log in records(model=model, **settings, **fixed):
        if config["path_len"] == 5 and config["n_layer"] != 6:
            continue                                            # a run of draw_depth
        ends.setdefault(config[size], []).append(log["accuracy"][-1])
    if size == "deg":
        objective = "teacherless" if teacherless else "next_token"
        for run in logs_of(model, objective, 5, 5):             # those of the cures
            ends.setdefault(5, []).append(run.end["accuracy"])
    return dict(sorted(ends.items()))


def draw_grid_panel(ax, size, fixed):
    """One half of the grid: over `size`, "deg" or "path_len", where the other one is fixed."""
    for model, aside, marker in (("gpt", -0.06, "o"), ("mamba", 0.06, "^")):
        for teacherless, color, style in ((False, RED, "-"), (True, BLUE, "--")):
            ends = ends_by_size(size, model, teacherless, fixed)
            means = [np.mean(accuracies) for accuracies in ends.values()]
            ax.plot([x + aside for x in ends], means, style, color=color, lw=1.2)
            xs, ys = [], []
            for x, accuracies in ends.items():
                xs += [x + aside] * len(accuracies)
                ys += accuracies
            objective = "teacherless" if teacherless else "teacher-forced"
            face = color if model == "gpt" else "white"
            ax.plot(xs, ys, marker, color=color, markersize=5, mfc=face,
                    label=f"{MODELS[model]}, {objective}")


def draw_grid():
    """Path accuracy at the end of the runs, over the graph's size."""
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.9), sharey=True, layout="constrained")
    left, right = axes
    draw_grid_panel(left, "path_len", {"deg": 2})
    left.plot([2.6, 6.4], [1 / 2, 1 / 2], ":", color=GREY, lw=1)
    left.set(title="two arms", xlabel="nodes on a path", xticks=(3, 4, 5, 6))
    left.set_ylabel("paths right")
    left.annotate(
        "guessing an arm", (2.6, 0.5), (0, 3), textcoords="offset points", color=GREY, fontsize=8
    )
    draw_grid_panel(right, "deg", {"path_len": 5})
    arms = np.linspace(1.7, 5.3, 50)
    right.plot(arms, 1 / arms, ":", color=GREY, lw=1)
    right.set(title="paths of five nodes", xlabel="arms", xticks=(2, 3, 5))
    for ax in axes:
        percent_axis(ax)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside upper center", ncol=2, fontsize=8,
        columnspacing=1
    )
    save(figure, "grid")


def draw_node(ax, node, x, y, color):
    ax.text(
        x, y, node, ha="center", va="center", color="white", weight="bold",
        bbox=dict(boxstyle="circle,pad=0.35", color=color)
    )


def draw_arm(ax, arm, y, color):
    """An arm as a row of circles at height y, with arrows between them. It starts at (14, 0)."""
    places = [(14, 0)] + [(14 + 4.5 * i, y) for i in range(1, len(arm))]
    for tail, head in zip(places, places[1:]):
        arrow = dict(arrowstyle="-|>", color=color, shrinkA=9, shrinkB=9, lw=1.5)
        ax.annotate("", head, tail, arrowprops=arrow)
    for node, (x, height) in list(zip(arm, places))[1:]:
        draw_node(ax, node, x, height, color)


def draw_objective(ax, y, name, fed, answer, first_hop):
    """A row of text: what the model reads behind the prefix, and what it has to write."""
    ax.text(13.5, y, name, ha="right", weight="bold")
    ax.text(15, y, "reads  … =", color=GREY, fontsize=8)
    for i, token in enumerate(fed):
        ax.text(20.2 + 1.4 * i, y, token, ha="center", family="monospace")
    ax.text(26.4, y, "and is to write", color=GREY, fontsize=8)
    for i, token in enumerate(answer):
        color, weight = (RED, "bold") if token == first_hop else ("black", "normal")
        ax.text(32.6 + 1.4 * i, y, token, ha="center", family="monospace", color=color,
                weight=weight)


def draw_task():
    """A graph, and its tokens in the three ways of training."""
    star = PathStar(2, 5, 10)
    prefixes, paths = draw(star, 1, np.random.default_rng([1, 3]))
    prefix, path = prefixes[0].tolist(), paths[0].tolist()
    other_arm = [arm for arm in find_arms(edges_of(prefix), path[0]) if arm != path][0]

    figure, ax = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
    ax.set(xlim=(-1, 39), ylim=(-7.6, 3.4))
    ax.axis("off")
    draw_arm(ax, path, 1.2, BLUE)
    draw_arm(ax, other_arm, -1.2, GREY)
    draw_node(ax, path[0], 14, 0, "black")
    ax.text(12.6, 0, "start", ha="right", va="center")
    ax.text(14 + 4.5 * 4 + 1.3, 1.2, "goal", va="center")
    ax.text(-1, 2.6, "Which arm leads to the goal?", weight="bold")

    words = {star.pipe: "|", star.slash: "/", star.equals: "="}
    for i, token in enumerate(prefix):
        ax.text(i, -3.2, words.get(token, token), ha="center", family="monospace")
    ax.text(
        13, -2.4, "the prefix, the same for all: edges / start goal =", ha="center", color=GREY,
        fontsize=8
    )
    backwards = path[::-1]
    draw_objective(ax, -4.4, "teacher forcing", path[:-1], path, path[1])
    draw_objective(ax, -5.5, "teacherless", ["$"] * 4, path, path[1])
    draw_objective(ax, -6.6, "reversed", backwards[:-1], backwards, path[1])
    ax.text(
        39, -7.5, "the first hop: written first, it needs a plan; reversed, it is one more look-up",
        ha="right", color=RED, fontsize=8
    )
    save(figure, "task")


def main():
    matplotlib.use("svg")
    plt.rcParams.update(SETTINGS)
    draw_accuracy()
    draw_nodes(
        "clever_hans", "forced_node_accuracy", "teacher-forced",
        "right, given the true\nnodes before", teacherless=False, reverse=False
    )
    draw_nodes(
        "cascade", "node_accuracy", "teacherless", "right, from the prefix alone",
        teacherless=True, reverse=False
    )
    draw_depth()
    draw_cures()
    draw_grid()
    draw_task()


if __name__ == "__main__":
    main()
