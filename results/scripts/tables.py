"""Fills the tables of README.md and results/README.md from the logs.

    python results/scripts/tables.py

A table stands between <!-- table NAME --> and <!-- end of table -->. All other text is left alone.
A table without logs is left empty. The other scripts read logs with `read_log` and `read_logs`.
"""
import argparse
import itertools
import json
import re
import shlex
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent
PROJECT = RESULTS.parent
LOGS = RESULTS / "logs"
PAGES = [PROJECT / "README.md", RESULTS / "README.md"]
sys.path.insert(0, str(PROJECT))
from train import SOLVED  # noqa: E402

MODELS = {"gpt": "Transformer", "mamba": "Mamba", "gru": "GRU"}
PATCHES = [
    "half_and_half", "look_ahead", "token_order", "bag_of_words", "next_latent", "belief_state"
]
OBJECTIVES = [
    "teacher-forced", "first hop only", "reversed", "teacherless", "teacherless, reversed",
    *[patch.replace("_", " ") for patch in PATCHES],
]


@dataclass
class Log:
    file: Path
    header: dict        # the first line
    lines: list         # the others, one for each evaluation

    @property
    def config(self):
        return self.header["config"]

    @property
    def end(self):
        return self.lines[-1]

    @property
    def flags(self):
        """The flags of train.py, without those that say where the run is, a list."""
        words = shlex.split(self.header["command"])[2:]         # behind `python train.py`
        return without(words, "--out_dir", "--overwrite", "--resume")

    @property
    def command(self):
        """The command without --seed and --out_dir, which runs of several seeds have in common."""
        return shlex.join(["python", "train.py", *without(self.flags, "--seed")])

    @property
    def other_flags(self):
        """Those that name the model and change its settings."""
        objective_and_graph = "--teacherless --reverse --deg --path_len --num_nodes".split()
        return shlex.join(without(self.flags, *objective_and_graph, "--seed", "--init_from"))

    @property
    def model(self):
        return MODELS.get(self.config["model"], self.config["model"])

    @property
    def objective(self):
        for patch in PATCHES:
            if patch in self.file.parts:                        # cures/PATCH/...
                return patch.replace("_", " ")
        if self.config["only_first_hop"]:
            return "first hop only"
        if self.config["reverse"]:
            return "teacherless, reversed" if self.config["teacherless"] else "reversed"
        return "teacherless" if self.config["teacherless"] else "teacher-forced"

    @property
    def graph(self):
        return "G({deg},{path_len}), {num_nodes} names".format(**self.config)

    @property
    def before(self):
        """The log of the run whose weights this one began with, or None."""
        init_from = self.config.get("init_from")                # the oldest logs have none
        if init_from is None:
            return None
        return read_log(LOGS / f"{Path(init_from).relative_to('out/reproduce')}.jsonl")

    @property
    def solved_line(self):
        """The first evaluation with 99 % of the paths right, or None."""
        return next((line for line in self.lines if line["accuracy"] >= SOLVED), None)


def without(words, *flags):
    """A command line without some of its flags and their values."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in flags:
        parser.add_argument(flag, nargs="?")
    return parser.parse_known_args(words)[1]


def read_log(file):
    header, *lines = [json.loads(line) for line in Path(file).read_text().splitlines()]
    return Log(Path(file), header, lines)


def read_logs(*folders, only=OBJECTIVES):
    """The logs in folders of results/logs with one of these objectives, sorted by their paths."""
    files = [file for folder in folders for file in sorted((LOGS / folder).rglob("*.jsonl"))]
    return [log for log in map(read_log, files) if log.objective in only]


def size(log):
    return log.config["deg"], log.config["path_len"], log.config["num_nodes"]


def cure_runs():
    """Those in cures/, and on the same graph teacherless ones and long teacher-forced ones."""
    runs = read_logs("default", only=["teacherless"]) + read_logs("long", only=["teacher-forced"])
    return [log for log in runs + read_logs("cures") if log.graph == "G(2,5), 10 names"]


def spread(values, form="{:,.0f}", unit=""):
    """The mean (least - greatest)."""
    mean = form.format(statistics.mean(values)) + unit
    low, high = form.format(min(values)), form.format(max(values))
    return mean if low == high else f"{mean} ({low} - {high})"


def percent(shares):
    return spread([100 * share for share in shares], "{:.1f}", " %")


def solved(runs):
    return f"{sum(run.solved_line is not None for run in runs)} of {len(runs)}" if runs else "-"


def at_end(name, form=percent):
    return lambda runs: form([run.end[name] for run in runs])


def later_nodes(runs):
    """How often all nodes after the first hop are right, given the true ones before."""
    return at_end("cheat_accuracy")(runs) if runs[0].objective == "teacher-forced" else "-"


def hops(runs):
    """How often each hop between start and goal is right at the end of the runs: their mean."""
    shares = zip(*[run.end["node_accuracy"][1:-1] for run in runs])
    return ", ".join(f"{100 * statistics.mean(hop):.0f}" for hop in shares) + " %"


def examples_until_solved(runs):
    """The median in thousands, of those that were solved."""
    examples = [run.solved_line["examples"] / 1000 for run in runs if run.solved_line]
    return f"{statistics.median(examples):.0f}k" if examples else "-"


def begins_with(runs):
    """What was different in the run whose weights these began with."""
    run, before = runs[0], runs[0].before
    if before is None:
        return "-"
    pairs = [(before.graph, run.graph), (before.objective, run.objective)]
    return ", ".join(other for other, own in pairs if other != own) or "the same"


CELLS = {               # what stands in the column with this head, for the runs of a row
    "at step 0": lambda runs: percent([run.lines[0]["accuracy"] for run in runs]),
    "begins with": begins_with,
    "command": lambda runs: f"`{runs[0].command}`",
    "examples until solved": examples_until_solved,
    "first hop right": lambda runs: percent([run.end["node_accuracy"][1] for run in runs]),
    "forced: later nodes": later_nodes,
    "graph": lambda runs: runs[0].graph,
    "hops 1, 2, ...": hops,
    "model": lambda runs: runs[0].model,
    "objective": lambda runs: runs[0].objective,
    "other flags": lambda runs: f"`{runs[0].other_flags}`",
    "paths right": at_end("accuracy"),
    "solved": solved,
    "solved, seeds 0-4": lambda runs: solved([run for run in runs if run.config["seed"] < 5]),
    "solved, seeds 5-9": lambda runs: solved([run for run in runs if run.config["seed"] >= 5]),
    "steps at most": lambda runs: spread([run.config["max_iters"] for run in runs]),
    "steps until it stopped": at_end("iter", form=spread),
    "training graphs": lambda runs: f"{runs[0].config['n_train']:,}",
    "test loss": at_end("test_loss", form=partial(spread, form="{:.3f}")),
    "training loss": at_end("train_loss", form=partial(spread, form="{:.3f}")),
}


# name: runs, what those in one row have in common, heads of the columns
TABLES = {
    "default": (
        lambda: read_logs("default"), "model objective",
        "command | solved, seeds 0-4 | solved, seeds 5-9 | paths right | forced: later nodes | "
        "steps until it stopped"
    ),
    "long": (
        lambda: read_logs("long", "controls", "graphs", "names50", only=OBJECTIVES[:2]),
        "objective size model folder",
        "objective | graph | model | training graphs | steps at most | solved | first hop right | "
        "forced: later nodes | training loss | test loss"
    ),
    "loops": (
        lambda: read_logs("default", "loops", "passes", "controls", only=["teacherless"]),
        "model n_layer n_loop other_flags",
        "other flags | solved | paths right | hops 1, 2, ... | examples until solved"
    ),
    "names50": (
        lambda: read_logs("names50", only=OBJECTIVES[2:]),
        "size objective before other_flags",
        "graph | objective | begins with | other flags | at step 0 | solved | paths right | "
        "hops 1, 2, ... | examples until solved"
    ),
    "cures": (
        cure_runs, "objective",
        "objective | Transformer: solved | Transformer: paths right | Transformer: examples until "
        "solved | Mamba: solved | Mamba: paths right | Mamba: examples until solved"
    ),
}


def key(log, names):
    """What runs in one row have in common. The rows are sorted by it."""
    special = {
        "size": size(log), "objective": OBJECTIVES.index(log.objective),
        "other_flags": log.other_flags,
        "folder": log.file.parent.name,
        "before": size(log.before) if log.before else (),
    }
    return [special.get(name, log.config.get(name)) for name in names.split()]


def markdown(columns, rows):
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def cell(column, runs):
    model, _, name = column.partition(": ")
    if model in MODELS.values():
        return CELLS[name]([run for run in runs if run.model == model])
    return CELLS[column](runs)


def rows_of(name):
    """A row for all runs that have the same key."""
    runs, common, columns = TABLES[name]
    logs = sorted(runs(), key=lambda log: key(log, common))
    rows = [columns.split(" | ")]
    for _, group in itertools.groupby(logs, lambda log: key(log, common)):
        group = list(group)
        rows.append([cell(column, group) for column in rows[0]])
    return rows


def graphs_rows():
    """A row for each graph: how many paths are right at the end of each teacherless run."""
    columns = ["Mamba", "Mamba, goal first", "Transformer", "Transformer, goal first"]
    logs = read_logs("graphs", only=["teacherless", "teacherless, reversed"])
    rows = [["graph", *columns]]
    for _, group in itertools.groupby(sorted(logs, key=size), size):
        cells = {column: {} for column in columns}
        for log in group:
            column = log.model + ", goal first" * log.config["reverse"]
            after = f"after {log.before.graph.split(', ')[0]}: " if log.before else ""
            cells[column].setdefault(after, []).append(f"{100 * log.end['accuracy']:.1f}")
        cells = [
            "; ".join(f"{after}{', '.join(shares)}" for after, shares in sorted(cell.items()))
            for cell in cells.values()
        ]
        rows.append([log.graph, *cells])
    return rows


def table(name):
    """A table as text, empty if it has no runs."""
    columns, *rows = graphs_rows() if name == "graphs" else rows_of(name)
    return markdown(columns, rows) if rows else ""


def filled(text):
    """The text of a page with its tables made anew."""
    def fill(found):
        return f"<!-- table {found[1]} -->\n{table(found[1])}<!-- end of table -->"

    pattern = r"<!-- table (\w+) -->\n(?:(?!<!-- ).*\n)*<!-- end of table -->"
    return re.sub(pattern, fill, text)


def main():
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    for page in PAGES:
        page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    main()
