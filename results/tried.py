"""Prints what was tried in search of the default settings, and on larger graphs.

    python results/tried.py > results/tried.md

The logs in results/tried are of runs that were mostly stopped by hand when they had shown enough.
Their headers have the settings, and what was changed in the code. The models' answers were left out
of those on the default graph.
"""
import json
from pathlib import Path

from table import MODELS, Run, learned_at, print_table

HERE = Path(__file__).resolve().parent

INTRODUCTION = """\
What was tried in search of the default settings, and on larger graphs. `python results/tried.py`
prints this page from the logs in [tried](tried), which have the machine, too.

All runs have width 64 and one thread. Those of the first two tables are teacherless, on the default
graph. Most were stopped by hand. The learning rate falls to 0 over the last third of max_iters, but
where the column of changes says more. The last columns count thousands of training examples: until
the third hop left its plateau (it was right in 40 % of the graphs), until each hop was right in
95 %, and in the whole run. Nearly all are of a single seed, and differences of a third may be luck.
A run without an end of the plateau was stopped before it. Most runs of the Transformer had GPT-2's
GELU, by a tanh.

- **Mamba.** Batches of 32 and 64 needed about as many examples, with different learning rates. Half
  the states (`d_state` 8) made a step cheaper, but the end took longer. Seed 4 waits with all but
  the first hop right. With eight layers it still did after 1,200 steps. With six it left the wait
  while the learning rate fell. With a rate that falls from the start, it was solved in 1,700 steps.
  This is the default, chosen for this seed.
- **Transformer, batches and learning rate.** The plateau of four heads took more than 300,000
  examples in batches of 32. The recorded runs, in batches of 128, have theirs behind them after
  190,000 to 280,000. None of the runs at 2e-3 left it. Muon looked like AdamW until it was stopped,
  still on the plateau.
- **Transformer, heads.** The runs with fewer heads left the plateau sooner. But a short plateau is
  not yet a short run. With one or two heads most stood with the first hop at a guess when they were
  stopped. In two of them the first look-up is only complete after the last layer (see below), so no
  layer may be left for the next: a guess, not tested. Wider heads looked like heads of 16 until
  they were stopped, still on the plateau.
- **Transformer, positions.** The runs with larger positions left the plateau sooner, too. With four
  heads, seed 0 then needed fewer examples than the default. Seed 1 had 98.9 % of the paths after
  4,000 steps. With eight layers, seed 0 was solved as well, but seed 1 was stopped on the plateau
  after 230,000 examples. So larger positions may be better. They are not the default, as they were
  not tried with five seeds.
- **Transformer, steps.** With 4,000 steps at most, seed 1 had 73 % of the first hops when it was
  stopped, with 500 steps to go. With 5,000, seeds 1 and 4 ended with 96 %. With 6,000, seed 4 was
  solved and seed 1 ended with 98 %. With 8,000 both are solved ([README.md](README.md)). So this is
  the default.
- **Transformer, layers.** With eight layers and 6,000 steps all five seeds were solved, too
  ([README.md](README.md)). But [reversed](tried/gpt-reverse-l8-seed2.jsonl), seed 2 is still on a
  plateau after 2,000 steps, and [teacher-forced](tried/gpt-teacher_forced-l8-seed2.jsonl) it ends
  while it leaves one. With six layers, 1,000 steps are enough for both. So the default is six.
- **Transformer, graphs.** At their ends, seeds 1 and 4 get the graphs that they train on right more
  often than new ones. But with five times the graphs seed 1 was still on the plateau after 320,000
  examples, where it had left it after 230,000. To see the same graphs again seems to help it at
  first.
"""

SETTINGS = {
    "gpt": ["seed", "n_layer", "n_head", "n_train", "batch_size", "lr", "max_iters"],
    "mamba": ["seed", "n_layer", "d_state", "n_train", "batch_size", "lr", "max_iters"],
}
LARGER_GRAPHS = """\
## Larger graphs

None of these runs was solved. Two of the graphs are, in [README.md](README.md): three arms, and six
nodes with one seed of three. The run with three arms has 3,000 steps at most, and its learning
rate, which falls from the start, was at 0 before the first hop was learned. With 8,000 at most
three of three seeds solve it.

On six nodes, with eight layers, the Mamba was not solved in 4,000 to 8,000 steps. The run of 12,000
is the one of 8,000, resumed, with a learning rate that rose to 2e-3 again. One run with twelve
layers, and 6,000 steps at most, guessed at the first hop from step 600 to 1,800. It was then
resumed with 3,200 steps in all, which cut the learning rate from 4.2e-3 to 2.6e-3. After 100 more
steps it had 68 % of the first hops. Resumed once more at step 2,600, with 4,500 steps in all, it
ended with 97 %. But a run at lr 3e-3 still guessed at step 2,900, when it was stopped. In
README.md, seed 0 is solved with 5,000 steps at most, and the same settings fail with two other
seeds.

The other runs were stopped before their last step, when the time on the GPU was over. The Mamba on
eight nodes begins at the wrong end: it names a neighbour of the start, and has not learned a
look-up from the goal.
"""
NEXT_LATENT = """
## Next latent, in another form

In these runs, [the patch](cures/next_latent.patch) compared the next-token distributions at the
positions of the prompt, too, and looked four steps ahead. The paper leaves the prompt out, and its
last step is the third. So they are not runs of the paper's method. With five arms the Mamba's loss
rises after 600 steps.
"""
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


def is_default_graph(run):
    return (run.config["deg"], run.config["path_len"]) == (2, 5)


def is_of_next_latent(run):
    return "next_latent" in run.file.stem


def short_row(run):
    config = run.config
    return [
        config["model"],
        f"G({config['deg']},{config['path_len']}), {config['num_nodes']} names",
        *[f"{config[name]:g}" for name in ("n_layer", "seed", "lr", "max_iters")],
        f"{run.end['iter']:,}",
        thousands(run, run.end["iter"]),
        " ".join(f"{100 * share:.0f}" for share in run.end["node_accuracy"]),
        f"{run.end['accuracy']:.1%}",
    ]


def order(run):
    """Runs of one change side by side, with few heads and graphs first."""
    settings = [run.config[name] for name in ("n_train", "lr", "seed")]
    return run.header["change"], run.config["n_head"] or 0, *settings


def main():
    all_runs = [Run(file) for file in sorted((HERE / "tried").glob("*.jsonl"))]
    latent = [run for run in all_runs if is_of_next_latent(run)]
    others = [run for run in all_runs if not is_of_next_latent(run)]
    runs = [run for run in others if is_default_graph(run) and run.config["teacherless"]]
    runs = sorted(runs, key=order)
    print(INTRODUCTION)
    for model, title in MODELS.items():
        print(f"## {title}\n")
        rows = [row(run) for run in runs if run.config["model"] == model]
        print_table(SETTINGS[model] + COLUMNS, rows)
        print()
    print(LARGER_GRAPHS)
    columns = [
        "model", "graph", "n_layer", "seed", "lr", "max_iters", "steps", "thousands of examples",
        "nodes right at the end", "paths right",
    ]
    print_table(columns, [short_row(run) for run in others if not is_default_graph(run)])
    print(NEXT_LATENT)
    print_table(columns, [short_row(run) for run in latent])
    print()
    print("## Where a Transformer with one head knows which node\n")
    print("Two of the runs above: one head, positions twice as large, 50,000 and 20,000 graphs.\n")
    print((HERE / "tried" / "probe.md").read_text(), end="")


if __name__ == "__main__":
    main()
