"""Prints what was tried in search of the default settings.

    python results/tried.py > results/tried.md

The logs in results/tried are of teacherless runs on the default graph, one seed each, one thread,
mostly stopped by hand when they had shown enough. Their headers have the settings, and what was
changed in the code. The models' answers were left out.
"""
import json
from pathlib import Path

from table import Run, learned_at, print_table

HERE = Path(__file__).resolve().parent

INTRODUCTION = """\
What was tried in search of the default settings. `python results/tried.py` prints this page from
the logs in [tried](tried), which have the machine, too.

All runs are teacherless, on the default graph, with width 64 and one thread. Most were stopped by
hand. The learning rate falls to 0 over the last third of max_iters. The last columns count
thousands of training examples: until the third hop left its plateau (it was right in 40 % of the
graphs), until each hop was right in 95 %, and in the whole run. Differences of a third may be luck.

- **Mamba.** Six layers of width 64 need far fewer examples than three of width 128 do
  ([earlier.md](earlier.md)). Batches of 32 and 64 need about as many examples. Half the states
  (`d_state` 8) make a step cheaper, but the end takes longer. Seed 4 waits with all but the first
  hop right. More layers do not spare it that, a smaller learning rate does: it leaves the wait when
  the rate falls. If the rate falls from the start, it is solved in 1,700 steps. This is the
  default.
- **Transformer.** Its plateau depends on the examples seen, hardly on the size of the batch.
  Positions that start twice as large, fewer heads and fewer training graphs each shorten it. A
  larger learning rate lengthens it. But a short plateau is not yet a short run. With one head the
  first look-up is often learned in one of the last layers (see below), and no layers are left for
  the next. Then the first hop stays at a guess. With four heads and large positions seed 0 needed
  fewer examples than with the default, and seed 1 more. So the default stayed as it was.
"""

SETTINGS = {
    "gpt": ["seed", "n_layer", "n_head", "n_train", "batch_size", "lr", "max_iters"],
    "mamba": ["seed", "n_layer", "d_state", "n_train", "batch_size", "lr", "max_iters"],
}
COLUMNS = [
    "changed in the code", "plateau left", "hop 3", "hop 2", "hop 1", "whole run",
    "nodes right at the end",
]


def thousands(run, step):
    """Training examples seen by this step, as text."""
    if step is None:
        return "-"
    return f"{step * run.config['batch_size'] / 1000:,.0f}"


def plateau_end(run):
    """The first step at which the third hop is right in 40 % of the graphs, or None."""
    for line in run.lines:
        if line["node_accuracy"][3] > 0.4:
            return line["iter"]
    return None


def row(run):
    nodes = " ".join(f"{100 * share:.0f}" for share in run.end["node_accuracy"])
    return [
        *[f"{run.config[name]:g}" for name in SETTINGS[run.config["model"]]],
        run.header["change"] or "-",
        thousands(run, plateau_end(run)),
        thousands(run, learned_at(run, 3)),
        thousands(run, learned_at(run, 2)),
        thousands(run, learned_at(run, 1)),
        thousands(run, run.end["iter"]),
        nodes,
    ]


def order(run):
    """Runs of one change side by side, with few heads and graphs first."""
    settings = [run.config[name] for name in ("n_train", "lr", "seed")]
    return run.header["change"], run.config["n_head"] or 0, *settings


def main():
    runs = [Run(file) for file in sorted((HERE / "tried").glob("*.jsonl"))]
    runs.sort(key=order)
    print(INTRODUCTION)
    for model, title in (("gpt", "Transformer"), ("mamba", "Mamba")):
        print(f"## {title}\n")
        print_table(SETTINGS[model] + COLUMNS, [row(r) for r in runs if r.config["model"] == model])
        print()
    print("## Where a Transformer with one head knows which node\n")
    print("Two of the runs above: one head, positions twice as large, 50,000 and 20,000 graphs.\n")
    print((HERE / "tried" / "probe.md").read_text(), end="")


if __name__ == "__main__":
    main()
