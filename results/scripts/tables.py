"""Fills the tables of the pages from the logs.

    python results/tables.py

A table stands between <!-- table NAME --> and <!-- end of table -->. All other text is left alone.
The other scripts read logs with `read_log` and `read_logs` of this file.
"""
import argparse
import json
import re
import shlex
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
LOGS = HERE / "logs"
sys.path.insert(0, str(HERE.parent))
from data import run_script  # noqa: E402
from train import SOLVED  # noqa: E402

PAGES = [HERE.parent / "README.md", HERE / "README.md", HERE / "cures" / "README.md"]
MODELS = {"gpt": "Transformer", "mamba": "Mamba", "gru": "GRU"}
OBJECTIVES = [
    "teacher-forced", "first hop only", "reversed", "teacherless", "teacherless, reversed"
]
PATCHES = [
    "half_and_half", "look_ahead", "token_order", "bag_of_words", "next_latent", "belief_state"
]
CURES = ["teacher-forced", "teacherless", *[name.replace("_", " ") for name in PATCHES]]


# ---- Reading logs


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
        parser = argparse.ArgumentParser(allow_abbrev=False)
        parser.add_argument("--out_dir")
        parser.add_argument("--overwrite", action="store_true")
        return parser.parse_known_args(words)[1]

    @property
    def command(self):
        """The command without --seed and --out_dir, which runs of several seeds have in common."""
        parser = argparse.ArgumentParser(allow_abbrev=False)
        parser.add_argument("--seed")
        _, flags = parser.parse_known_args(self.flags)
        return shlex.join(["python", "train.py", *flags])

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
        init_from = self.config.get("init_from")
        if init_from is None:
            return None
        return read_log(LOGS / f"{Path(init_from).relative_to('out/reproduce')}.jsonl")

    @property
    def solved_line(self):
        """The first evaluation with 99 % of the paths right, or None."""
        for line in self.lines:
            if line["accuracy"] >= SOLVED:
                return line
        return None


def read_log(file):
    """Raises OSError if there is no such file, ValueError if it is not a log with an evaluation."""
    try:
        header, *lines = [json.loads(line) for line in file.read_text().splitlines()]
        log = Log(file, header, lines)
        log.end["accuracy"], log.config["seed"], log.header["command"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{file} is not a log of train.py ({error!r})") from None
    return log


def read_logs(folder):
    """The logs in a folder of results/logs, sorted by their paths."""
    return [read_log(file) for file in sorted((LOGS / folder).rglob("*.jsonl"))]


def groups(logs, key):
    """-> {key of a log: the logs that have it}, sorted"""
    result = {}
    for log in logs:
        result.setdefault(key(log), []).append(log)
    return dict(sorted(result.items()))


# ---- Cells


def markdown(columns, rows):
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def spread(values, form="{:,.0f}", unit=""):
    """The mean (least - greatest)."""
    mean = form.format(statistics.mean(values)) + unit
    low, high = form.format(min(values)), form.format(max(values))
    return mean if low == high else f"{mean} ({low} - {high})"


def percent(shares):
    return spread([100 * share for share in shares], "{:.1f}", " %")


def solved(logs):
    return f"{sum(log.solved_line is not None for log in logs)} of {len(logs)}" if logs else "-"


def paths_right(logs):
    return percent([log.end["accuracy"] for log in logs])


def steps(logs):
    return spread([log.end["iter"] for log in logs])


def hops(logs):
    """How often each hop between start and goal is right at the end of the runs: their mean."""
    shares = zip(*[log.end["node_accuracy"][1:-1] for log in logs])
    return ", ".join(f"{100 * statistics.mean(hop):.0f}" for hop in shares) + " %"


# ---- The tables, as text


def default_runs():
    """-> the runs of each kind, as lists"""
    def kind(log):
        return log.config["model"], OBJECTIVES.index(log.objective)

    return groups(read_logs("default"), kind).values()


def default_table():
    columns = [
        "command", "solved, seeds 0-4", "solved, seeds 5-9", "paths right", "forced: later nodes",
        "steps until it stopped",
    ]
    rows = []
    for runs in default_runs():
        tuned = [run for run in runs if run.config["seed"] < 5]  # the settings were chosen on them
        fresh = [run for run in runs if run.config["seed"] >= 5]
        later_nodes = "-"
        if runs[0].objective == "teacher-forced":
            later_nodes = percent([run.end["cheat_accuracy"] for run in runs])
        command = f"`{runs[0].command}`"
        rows.append([
            command, solved(tuned), solved(fresh), paths_right(runs), later_nodes, steps(runs)
        ])
    return markdown(columns, rows)


def goal_table():
    rows = []
    for runs in default_runs():
        turns = percent([run.end["goal_moved"]["turns"] for run in runs])
        stays = percent([run.end["goal_moved"]["stays"] for run in runs])
        rows.append([runs[0].model, runs[0].objective, len(runs), turns, stays])
    columns = ["model", "objective", "runs", "first hop turns to the goal", "stays as it was"]
    return markdown(columns, rows)


def long_table():
    columns = ["command", "seed", "first hop right", "steps"]
    rows = []
    for run in read_logs("long"):
        first_hop = percent([run.end["node_accuracy"][1]])
        rows.append([f"`{run.command}`", run.config["seed"], first_hop, steps([run])])
    return markdown(columns, rows)


def loops_table():
    """Teacherless runs on the default graph."""
    def kind(log):
        config = log.config
        return config["model"], config["n_layer"], config["n_loop"], config["A_init"]

    columns = [
        "model", "layers x loops", "A_init", "solved", "paths right", "hops 1, 2, 3",
        "examples until solved", "steps at most",
    ]
    looped = read_logs("loops")
    looped += [log for log in read_logs("default") if log.objective == "teacherless"]
    rows = []
    for (_, n_layer, n_loop, A_init), runs in groups(looped, kind).items():
        rows.append([
            runs[0].model, f"{n_layer} x {n_loop}", A_init or "-", solved(runs),
            paths_right(runs), hops(runs), examples_until_solved(runs),
            f"{runs[0].config['max_iters']:,}",
        ])
    return markdown(columns, rows)


def graphs_table():
    def kind(log):
        config = log.config
        return config["deg"], config["path_len"], config["num_nodes"], log.command

    columns = ["graph", "command", "solved", "paths right", "hops 1, 2, ... at the end", "steps"]
    from_scratch = [log for log in read_logs("graphs") if log.before is None]
    rows = []
    for runs in groups(from_scratch, kind).values():
        command = f"`{runs[0].command}`"
        rows.append(
            [runs[0].graph, command, solved(runs), paths_right(runs), hops(runs), steps(runs)]
        )
    return markdown(columns, rows)


def stages_table():
    """Runs that began with the weights of another run."""
    def kind(log):
        config, other = log.config, log.before.config
        return (
            config["model"], config["reverse"], config["d_state"] or 0,
            config["deg"], config["path_len"], other["deg"], other["path_len"], config["max_iters"],
        )

    columns = [
        "model", "d_state", "objective", "graph", "begins with", "solved", "paths right",
        "hops 1, 2, ... at the end", "steps",
    ]
    later = [log for log in read_logs("graphs") if log.before is not None]
    rows = []
    for runs in groups(later, kind).values():
        first = runs[0]
        rows.append([
            first.model, first.config["d_state"] or "-", first.objective, first.graph,
            first.before.graph.split(", ")[0], solved(runs), paths_right(runs), hops(runs),
            steps(runs),
        ])
    return markdown(columns, rows)


def cure_runs():
    """-> {(graph, model, place of the objective in CURES): runs}

    Beside the runs in cures/ these are teacherless and teacher-forced ones on the same graphs, from
    scratch. Teacher-forced default runs are left out, since those in long/ took more steps.
    """
    runs = read_logs("cures")
    graphs = {log.graph for log in runs}
    for folder, objectives in (
        ("default", ["teacherless"]),
        ("long", ["teacher-forced"]),
        ("graphs", ["teacherless", "teacher-forced"]),
    ):
        for log in read_logs(folder):
            if log.objective in objectives and log.graph in graphs and log.before is None:
                runs.append(log)

    def kind(log):
        return log.graph, log.config["model"], CURES.index(log.objective)

    return groups(runs, kind)


def examples_until_solved(runs):
    """The median in thousands, of those that were solved."""
    examples = [run.solved_line["examples"] / 1000 for run in runs if run.solved_line]
    return f"{statistics.median(examples):.0f}k" if examples else "-"


def cures_table():
    columns = [
        "graph", "model", "objective", "solved", "paths right", "examples until solved",
        "examples at most",
    ]
    rows = []
    for runs in cure_runs().values():
        at_most = [run.config["max_iters"] * run.config["batch_size"] / 1000 for run in runs]
        rows.append([
            runs[0].graph, runs[0].model, runs[0].objective, solved(runs), paths_right(runs),
            examples_until_solved(runs), spread(at_most, "{:.0f}", "k"),
        ])
    return markdown(columns, rows)


def runs_table():
    """Every run."""
    columns = ["log", "seed", "paths right", "at step", "minutes", "commit", "machine"]
    rows = []
    for log in read_logs(""):
        name = log.file.relative_to(LOGS).as_posix()
        machine = "{machine}, Python {versions[python]}, torch {versions[torch]}"
        rows.append([
            f"[{name}](logs/{name})", log.config["seed"], f"{100 * log.end['accuracy']:.1f} %",
            f"{log.end['iter']:,}", f"{log.end['elapsed_s'] / 60:.1f}", log.header["commit"],
            machine.format(**log.header),
        ])
    return markdown(columns, rows)


TABLES = {
    "default": default_table, "goal": goal_table, "long": long_table, "loops": loops_table,
    "graphs": graphs_table, "stages": stages_table, "cures": cures_table, "runs": runs_table,
}


# ---- Pages


def filled(text):
    """The text of a page, with its tables made anew. Raises ValueError for a wrong marker."""
    def table(match):
        if match[1] not in TABLES:
            raise ValueError(f"there is no table {match[1]}, only {', '.join(TABLES)}")
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}<!-- end of table -->"

    pattern = r"<!-- table (\w+) -->\n(?:(?!<!-- ).*\n)*<!-- end of table -->"
    new, n = re.subn(pattern, table, text)
    if n != new.count("<!-- table ") or n != new.count("<!-- end of table -->"):
        raise ValueError("a table's marker lacks the other one")
    return new


def main():
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    for page in PAGES:
        page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    run_script(main)
