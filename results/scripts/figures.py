"""Draws the figures in results/figures from the logs in results/logs. It needs matplotlib.

    python results/scripts/figures.py
"""
import argparse

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from tables import LOGS, MODELS, OBJECTIVES, RESULTS, cure_runs, read_log, read_logs, size
from data import PathStar, draw, edges_of, find_arms            # tables.py makes it importable

FOLDER = RESULTS / "figures"

# These colours differ for the colour-blind, too, and can be read on white and on black. Blue is
# right and orange wrong, and no line has these two.
BLUE = "#2F86C5"
ORANGE = "#D55E00"
PURPLE = "#B650A0"
GREEN = "#009E73"
OCHRE = "#A8860B"
GREY = "#808080"
HOPS = ((PURPLE, "-"), (GREEN, "--"), (OCHRE, "-."), (PURPLE, ":"))    # hop 1, hop 2, ...
GOAL = (GREY, ":")
SETTINGS = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "lines.linewidth": 1.6, "savefig.transparent": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "pathstar",  # the same logs give the same file, to the byte
}
for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"):
    SETTINGS[name] = GREY


def save(figure, name):
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def draw_nodes(name, panels, key, ylabel):
    """How often each node is right, over the training of two runs: panels is {title: record}."""
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.6), sharey=True, layout="constrained")
    for (title, record), ax in zip(panels.items(), axes):
        log = read_log(LOGS / f"{record}.jsonl")
        examples = [line["examples"] for line in log.lines]
        n_hops = log.config["path_len"] - 2
        labels = [f"hop {i}" for i in range(1, n_hops + 1)] + ["goal"]
        styles = [*HOPS[:n_hops], GOAL]
        for place, (label, (color, style)) in enumerate(zip(labels, styles), start=1):
            shares = [line[key][place] for line in log.lines]
            ax.plot(examples, shares, style, color=color, label=label)
        ax.set_title(title)
        ax.set_xlabel("training examples")
        ax.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:.0f}k")
        ax.axhline(0.5, color=GREY, lw=0.8, ls=":")
        ax.set_ylim(-0.03, 1.03)
        ax.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, 0))
    axes[0].set_ylabel(ylabel)
    axes[1].legend(loc="lower right", fontsize=8, labelspacing=0.3)
    save(figure, name)


def examples_of(log):
    """Until solved, or until the end. Those of the runs before count, too."""
    own = (log.solved_line or log.end)["examples"]
    return own + (examples_of(log.before) if log.before else 0)


def kind_of(log):
    """What a teacherless run is called in the legend, and how its mark looks, solved or not."""
    kind, marker = log.model, "o"
    color, color_after = (PURPLE, GREY) if log.model == "Transformer" else (GREEN, OCHRE)
    if log.file.parent.name in ("loops", "passes"):
        kind, marker = f"{kind}, other layers or passes", "s"
    if log.before:
        kind, marker, color = f"{kind}, after another run", "^", color_after
    if log.config["reverse"]:
        kind, marker = f"{kind}, goal first", "v"
    return kind, dict(marker=marker, color=color, mfc="none", markersize=6, ls="")


def draw_graphs():
    """The examples that teacherless models need, over the path's length and the number of arms.

    All runs on graphs of two arms or of five nodes are in it. Those with more than twice as many
    names as nodes stand to the left of the others, and are filled.
    """
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.9), layout="constrained")
    logs = read_logs("default", "loops", "passes", "controls", "graphs", "names50")
    logs = [log for log in logs if log.config["teacherless"]]
    kinds = {}
    panels = [
        ("path_len", "nodes of the path, two arms", "deg", 2),
        ("deg", "arms, five nodes", "path_len", 5),
    ]
    for ax, (name, label, fixed, value) in zip(axes, panels):
        shown = [log for log in logs if log.config[fixed] == value]
        values = sorted({log.config[name] for log in shown})
        for log in shown:
            kind, style = kind_of(log)
            kinds[kind] = style
            deg, path_len, num_nodes = size(log)
            shift = 0.06 if log.model == "Mamba" else 0.26
            cross = "x"
            if num_nodes > 2 * (deg * (path_len - 1) + 1):
                style, shift, cross = style | {"mfc": style["color"]}, shift - 0.32, "X"
            if not log.solved_line:
                style = style | {"marker": cross}
            ax.plot(values.index(log.config[name]) + shift, examples_of(log), **style)
        ax.set_xticks(range(len(values)), values)
        ax.set_xlabel(label)
        ax.margins(x=0.1)
        ax.set_yscale("log")
        ax.set_ylim(1e4, 1e6)
        ax.set_yticks([1e4, 1e5, 1e6], ["10k", "100k", "1,000k"])
    axes[0].set_ylabel("training examples until\nsolved (crosses: not solved)")
    for kind in sorted(kinds):
        axes[0].plot([], [], label=kind, **kinds[kind])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncol=2)
    save(figure, "graphs")


def draw_cures():
    """How many examples each objective needs until the default graph is solved."""
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.6), sharey=True, layout="constrained")
    panels = dict(zip(("gpt", "mamba"), axes))
    runs = [log for log in cure_runs() if log.graph == "G(2,5), 10 names"]
    objectives = [name for name in OBJECTIVES if name in {log.objective for log in runs}]
    for log in runs:
        color, marker = (BLUE, "o") if log.solved_line else (ORANGE, "x")
        place = objectives.index(log.objective)
        style = dict(color=color, mfc="none", markersize=6)
        panels[log.config["model"]].plot(examples_of(log) / 1000, place, marker, **style)
    for model, ax in panels.items():
        ax.set_title(MODELS[model])
        ax.set_xlim(0, 1.08 * ax.dataLim.x1)
        ax.grid(axis="y", color=GREY, alpha=0.3)
        ax.set_xlabel("thousand examples until solved (x: not solved)")
    axes[0].set_yticks(range(len(objectives)), objectives)
    axes[0].invert_yaxis()
    save(figure, "cures")


def draw_arm(ax, arm, y, color):
    """An arm as a row of circles at height y, with arrows between them. It starts at (14, 0)."""
    places = [(14, 0)] + [(14 + 4.5 * i, y) for i in range(1, len(arm))]
    for tail, head in zip(places, places[1:]):
        arrow = dict(arrowstyle="-|>", color=color, shrinkA=9, shrinkB=9, lw=1.5)
        ax.annotate("", head, tail, arrowprops=arrow)
    for node, place in zip(arm, places):
        ax.text(
            *place, node, ha="center", va="center", color="white", weight="bold",
            bbox=dict(boxstyle="circle,pad=0.35", color=color)
        )


def draw_objective(ax, y, name, fed, answer, first_hop):
    """A row of text: what the model reads behind the prefix, and what it has to write."""
    ax.text(13.5, y, name, ha="right", weight="bold")
    ax.text(15, y, "reads  … =", fontsize=8)
    for i, token in enumerate(fed):
        ax.text(20.2 + 1.4 * i, y, token, ha="center", family="monospace")
    ax.text(26.4, y, "and is to write", fontsize=8)
    for i, token in enumerate(answer):
        color, weight = (PURPLE, "bold") if token == first_hop else (GREY, "normal")
        ax.text(32.6 + 1.4 * i, y, token, ha="center", family="monospace", color=color,
                weight=weight)


def draw_task():
    """A graph, that of `python data.py --seed 1`, and its tokens in three ways of training."""
    star = PathStar(2, 5, 10)
    prefixes, paths = draw(star, 1, np.random.default_rng([1, 3]))
    prefix, path = prefixes[0].tolist(), paths[0].tolist()
    other_arm = [arm for arm in find_arms(edges_of(prefix), path[0]) if arm != path][0]

    figure, ax = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    ax.set(xlim=(-1, 39), ylim=(-7.6, 3.6))
    ax.axis("off")
    draw_arm(ax, other_arm, -1.2, GREY)
    draw_arm(ax, path, 1.2, BLUE)
    for i, name in enumerate(["start", "hop 1", "hop 2", "hop 3", "goal"]):
        ax.text(14 + 4.5 * i, 2.4 if i > 0 else 1.2, name, ha="center")
    ax.text(-1, 3.2, "Which arm\nleads to the goal?", va="top", weight="bold")

    words = {star.pipe: "|", star.slash: "/", star.equals: "="}
    for i, token in enumerate(prefix):
        ax.text(i, -3.2, words.get(token, token), ha="center", family="monospace")
    ax.text(
        13, -2.4, "the prefix, the same for all: edges / start goal =", ha="center", fontsize=8
    )
    backwards = path[::-1]
    draw_objective(ax, -4.4, "teacher forcing", path[:-1], path, path[1])
    draw_objective(ax, -5.5, "teacherless", ["$"] * 4, path, path[1])
    draw_objective(ax, -6.6, "reversed", backwards[:-1], backwards, path[1])
    ax.text(
        39, -7.5, "hop 1: before the other hops it needs a plan; after them it is one step back",
        ha="right", color=PURPLE, fontsize=8
    )
    save(figure, "task")


def main():
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    matplotlib.use("svg")
    plt.rcParams.update(SETTINGS)
    forced, free = "right, given the true\nnodes before", "right, from the prefix alone"
    draw_nodes("clever_hans", {
        "Transformer, teacher-forced": "default/gpt-teacher_forced-seed0",
        "Mamba, teacher-forced": "default/mamba-teacher_forced-seed0",
    }, "forced_node_accuracy", forced)
    draw_nodes("cascade", {
        "Transformer, teacherless": "default/gpt-teacherless-seed0",
        "Mamba, teacherless": "default/mamba-teacherless-seed0",
    }, "node_accuracy", free)
    draw_nodes("names", {
        "Mamba, goal first, 10 names": "graphs/mamba-teacherless-reverse-deg2-len5-seed0",
        "Mamba, goal first, 50 names": "names50/mamba-teacherless-reverse-seed0",
    }, "node_accuracy", free)
    written = "right, from the model's\nown tokens"
    draw_nodes("short_plans", {
        "Mamba, teacher-forced, G(2,4)": "controls/mamba-teacher_forced-deg2-len4-seed0",
        "Mamba, teacher-forced, G(2,6)": "controls/mamba-teacher_forced-deg2-len6-seed0",
    }, "node_accuracy", written)
    draw_nodes("escape", {
        "Transformer, seed 1": "controls/gpt-teacher_forced-million-seed1",
        "Transformer, seed 2": "controls/gpt-teacher_forced-million-seed2",
    }, "node_accuracy", written)
    draw_graphs()
    draw_cures()
    draw_task()


if __name__ == "__main__":
    main()
