"""Prints the recorded runs as two tables, in Markdown: python results/table.py > results/README.md

It reads the logs in results/logs, or in the folder that is its argument. Runs belong together if
their commands differ in --seed and --out_dir only.
"""
import argparse
import json
import os
import shlex
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

INTRODUCTION = """\
The recorded runs. The first line of a log holds the command, all settings, the versions and the
machine. Each later line is one evaluation. `python results/table.py` prints this page,
`python results/reproduce.py` makes the runs again, `python results/figures.py` draws the figures.

The first table has the mean over the seeds (least - greatest).

- *Solved*: runs that reached 99 % of the paths.
- *Forced*: the model reads the true tokens before each place. *Later nodes* is the cheat accuracy:
  all nodes after the first hop are right at once.
- *Hops learned at*: the step from which the first hop (the node after the start), the second, ...
  up to the node before the goal was right in 95 % of the graphs at every evaluation, in teacherless
  training.
- *Minutes*: on one core of a machine that did other things, too, and not always of the same one.
  Most runs with `--dtype float32` were made on a GPU that had fifteen others at the same time. The
  second table says which.

The Transformer's run of 13,000 steps with seed 2 and its runs of 3,000 steps on other graphs were
made with GPT-2's approximate GELU. The Transformer of today has the exact one, so they do not come
out again to the digit. Its runs with `--max_iters 6000` were made when this was the default, and
its run of 14,500 steps when `--n_layer 8` was tried as the default. These flags were added to their
commands since.
"""
GROUP_COLUMNS = [
    "command, with `--seed` 0, 1, ...", "runs", "solved", "paths right", "forced: first hop",
    "later nodes", "hops learned at", "steps", "examples", "minutes",
]
MODELS = {"gpt": "Transformer", "mamba": "Mamba"}
RUN_COLUMNS = ["log", "seed", "paths right", "at step", "minutes", "on"]


class Run:
    def __init__(self, file):
        self.file = file
        header, *self.lines = [json.loads(line) for line in file.read_text().splitlines()]
        self.header = header
        self.config = header["config"]
        self.machine = header["machine"]
        self.versions = header["versions"]
        self.command = command_of_group(header["command"])
        self.end = self.lines[-1]


def command_of_group(command):
    """The command without --seed and --out_dir."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--seed")
    parser.add_argument("--out_dir")
    _, others = parser.parse_known_args(shlex.split(command))
    return shlex.join(others)


def learned_at(run, hop):
    """The step from which a hop is right in 95 % of the graphs, to the end. None: it never is."""
    step = None
    for line in run.lines:
        if line["node_accuracy"][hop] < 0.95:
            step = None
        elif step is None:
            step = line["iter"]
    return step


def spread(values, form):
    """The mean (least - greatest) of those values that are not None."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    mean = form.format(sum(values) / len(values))
    low, high = form.format(min(values)), form.format(max(values))
    return mean if low == high else f"{mean} ({low} - {high})"


def hops_learned(runs):
    """When the runs learned each hop between start and goal, as text."""
    texts = []
    for hop in range(1, runs[0].config["path_len"] - 1):
        steps = [learned_at(run, hop) for run in runs]
        never = steps.count(None)
        if never == len(runs):
            texts.append("never")
        elif never > 0:
            texts.append(spread(steps, "{:,.0f}") + f", {never} never")
        else:
            texts.append(spread(steps, "{:,.0f}"))
    return "; ".join(texts)


def group_row(command, runs):
    """The row of the first table for the runs of one command."""
    ends = [run.end for run in runs]
    config = runs[0].config
    if len(runs) == 1 and config["seed"] > 0:
        command = f"{command} --seed {config['seed']}"
    first_hop = later_nodes = hops = "-"
    if not config["reverse"] and not config["only_first_hop"]:
        if config["teacherless"]:
            hops = hops_learned(runs)
        else:
            first_hop = spread([end["forced_node_accuracy"][1] for end in ends], "{:.1%}")
            later_nodes = spread([end["cheat_accuracy"] for end in ends], "{:.1%}")
    return [
        f"`{command}`",
        len(runs),
        sum(end["accuracy"] >= 0.99 for end in ends),
        spread([end["accuracy"] for end in ends], "{:.1%}"),
        first_hop,
        later_nodes,
        hops,
        spread([end["iter"] for end in ends], "{:,.0f}"),
        spread([end["examples"] / 1000 for end in ends], "{:,.0f}k"),
        spread([end["elapsed_s"] / 60 for end in ends], "{:.1f}"),
    ]


def run_row(run):
    """The row of the second table for one run."""
    python, torch = run.versions["python"], run.versions["torch"]
    return [
        f"[{run.file.name}]({os.path.relpath(run.file, HERE)})",
        run.config["seed"],
        f"{run.end['accuracy']:.1%}",
        f"{run.end['iter']:,}",
        f"{run.end['elapsed_s'] / 60:.1f}",
        f"{run.machine}, Python {python}, torch {torch}",
    ]


def print_table(columns, rows):
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")


def group_order(command):
    """Sorts the default graph and depth before others, and the Transformer before the Mamba."""
    other = any(flag in command for flag in ("--deg", "--path_len", "--n_layer"))
    return other, "mamba" in command, command


def main():
    folder = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else HERE / "logs"
    groups = {}
    for file in folder.glob("*.jsonl"):
        run = Run(file)
        groups.setdefault(run.command, []).append(run)
    if not groups:
        sys.exit(f"table.py: there are no logs in {folder}")
    group_rows, run_rows = [], []
    for command in sorted(groups, key=group_order):
        runs = sorted(groups[command], key=lambda run: run.config["seed"])
        group_rows.append(group_row(command, runs))
        run_rows += [run_row(run) for run in runs]
    print(INTRODUCTION)
    print_table(GROUP_COLUMNS, group_rows)
    print()
    print_table(RUN_COLUMNS, run_rows)


if __name__ == "__main__":
    main()
