"""Prints the page on the cures: python results/cures.py > results/cures/README.md

    python results/cures.py --measure

The first command reads the logs in results/cures, and those of the default teacherless runs. The
second measures what a step costs with each objective, and writes results/cures/cost.json.
"""
import argparse
import json
import shutil
import statistics
import subprocess
from pathlib import Path

from reproduce import CURED, CURES, code_for, command, read_log
from table import MODELS, Run, print_table, spread
from train import SOLVED

HERE = Path(__file__).resolve().parent
COST = HERE / "cures" / "cost.json"
ROUNDS = 3                      # of all objectives, one after the other
COST_STEPS = 30                 # of a run; the first half is not counted

INTRODUCTION = """\
# The cures, as patches

Each file here changes `train.py` so that the model learns from another objective. The patch is the
explanation: its docstring has the loss as an equation, with the source. Apply one and train:

    git apply results/cures/token_order.patch
    python train.py --model mamba --out_dir out/token_order
    git apply -R results/cures/token_order.patch

| patch | beside the next token, the model predicts |
|---|---|
| [look_ahead](look_ahead.patch) | the three tokens after it, with a head for each |
| [token_order](token_order.patch) | how soon each token will come, with a head |
| [bag_of_words](bag_of_words.patch) | which tokens will still come, with a head |
| [next_latent](next_latent.patch) | its own next three hidden states, with a small network |
| [half_and_half](half_and_half.patch) | all tokens from `$`, in a second pass of the same model |

Inference drops the heads and the network, and writes one token at a time. Only half and half, which
goes with `--teacherless`, writes all tokens at once.

The tests hold each loss to its equation, on small models.

## Side by side

All objectives had the same data, models and number of steps at most. Only the Transformer's
teacherless runs on G(2,5) had 8,000 instead of 6,000, and one took more than 6,000. The first table
has the runs that were solved, with 99 % of the paths right, and the examples until then (the
median). `python results/reproduce.py --list` has the command of each run, and `python
results/cures.py` prints this page from the logs.
"""
DETAILS = """
*Paths right* and *first hop* are those at the end of the runs, *at most* is the number of examples
at which a run ends if it is not solved before. *A step* is its time, relative to that of next-token
training, on the default graph and a CPU: the median of three measurements. They differ by up to
{difference:.1f}, so differences of 0.2 and less mean nothing.
"""
CONCLUSION = """
![examples until solved, for each objective](../figures/cures.svg)

What they suggest; the reasons are guesses, and were not tested:

- Once the model reads the true first hop, each later node is a look-up, and its loss teaches no
  plan. What helps is to ask for the later nodes at positions that have not read it. Teacherless
  training does so everywhere. The look-ahead heads and the bag of words do at the position that
  predicts the first hop, and at those before. Both models learn to plan from all three. With heads
  and with the bag, the Transformer does so sooner than teacherless, for each of three seeds. The
  Mamba does for two of three seeds, and takes as long for the third.
- Token order asks that position for the later nodes, too, but its target gives the one before the
  goal a share of 9 %, and the next one 64 %. The Transformer learns to plan from it, but needs more
  examples than with the heads or the bag. The Mamba ends with the cheat, after a sixth of the
  Transformer's examples.
- The network of next latent reads the true next nodes, so it need not know the arm in advance. No
  run was solved. Two of six on the default graph had left the cheat at their ends: a Mamba with
  67 % of the first hops right, still rising, and a Transformer with 72 %, no longer rising. One
  Transformer had learned no hop. In another form of the patch, which compares predictions in the
  prompt as well and looks four steps ahead, none of four such runs left the cheat
  ([tried.md](../tried.md)).
- Half and half shortens the Transformer's plateau. It lengthens the Mamba's, and brings it to all
  hops but the first, and one seed to 98.9 % of the paths.
- With five arms, only a Mamba with look-ahead heads was solved, and the other two seeds of it end
  with 95 and 85 % of the paths right. Three other Mambas end within the cascade: with next latent,
  the bag of words and teacherless, the node before the goal is right in 99, 98 and 58 % of the
  graphs. Both models end with the cheat for next token and token order. The Transformer has learned
  no hop with the other objectives. Its training loss falls all the same: teacherless to 0.41, where
  guesses among the 15 inner nodes would cost 1.62. It learns its 20,000 graphs by heart. The Mamba
  has 100,000.

Where this differs from the papers. Token order and next latent solve G(5,5) there, with models of 8
and 12 layers of width 384, and with 300,000 graphs in batches of 4,096 or 200,000 in batches of
512, 10 to 30 million examples in all. The models here have 6 layers of width 64 and saw less than a
tenth of that. Look-ahead heads do not solve G(5,5) there (19.5 % with token order's set-up). Those
were Transformers. A Mamba here does, with 22 names instead of 30 or 100, a smaller task. The
papers of token order and next latent also use other learning rates, and that of next latent a
weight decay of 0.1, and embeddings that are not tied to the lm_head. The hybrid of teacherless and
teacher-forced losses was made for other tasks, and writes one token at a time.
"""
COLUMNS = [
    "graph", "model", "objective", "solved", "paths right", "first hop", "examples", "at most",
    "a step",
]


def cells():
    """-> the recorded (deg, path_len, num_nodes, model), each once"""
    return list(dict.fromkeys(tuple(entry[:4]) for entry in CURED))


def logs_of(model, objective, deg, path_len):
    """The recorded runs, one for each seed."""
    folder, name = HERE / "cures", f"{model}-{objective}-deg{deg}-len{path_len}"
    if objective == "teacherless" and (deg, path_len) == (2, 5):
        folder, name = HERE / "logs", f"{model}-{objective}"     # the default run
    return [Run(file) for file in sorted(folder.glob(f"{name}-seed*.jsonl"))]


def examples_until_solved(run):
    """In thousands, or None."""
    for line in run.lines:
        if line["accuracy"] >= SOLVED:
            return line["examples"] / 1000
    return None


def measure():
    """Trains each objective for a few steps, several times, and writes what a step takes."""
    seconds = {}
    for _ in range(ROUNDS):
        for model in ("gpt", "mamba"):
            for objective, (flags, patch) in CURES.items():
                code = code_for(patch)
                folder = Path("out") / "cost"
                shutil.rmtree(code / folder, ignore_errors=True)
                size = f"--n_train 1000 --n_test 8 --max_iters {COST_STEPS}"
                size += f" --eval_interval {COST_STEPS // 2}"
                given = ["--model", model, *flags, *size.split()]
                subprocess.run(command(code, folder, given), check=True, cwd=code)
                header, lines = read_log(code / folder / "log.jsonl")
                took = (lines[-1]["elapsed_s"] - lines[-2]["elapsed_s"]) / (COST_STEPS // 2)
                seconds.setdefault(model, {}).setdefault(objective, []).append(took)
    cost = {"machine": header["machine"], "versions": header["versions"], "seconds": seconds}
    COST.write_text(json.dumps(cost, indent=1) + "\n")


def costs_of_a_step(model, objective):
    """Relative to next-token training, one for each round."""
    seconds = json.loads(COST.read_text())["seconds"][model]
    return [other / one for one, other in zip(seconds["next_token"], seconds[objective])]


def largest_difference():
    """Between the costs of one model and objective."""
    differences = []
    for model in MODELS:
        for objective in CURES:
            costs = costs_of_a_step(model, objective)
            differences.append(max(costs) - min(costs))
    return max(differences)


def count_solved(runs):
    """-> "2 of 3", and the median of the examples until these were solved, or None"""
    times = [examples_until_solved(run) for run in runs]
    solved = [time for time in times if time is not None]
    examples = f"{statistics.median(solved):.0f}k" if solved else None
    return f"{len(solved)} of {len(runs)}", examples


def print_overview():
    """A row for each objective, a column for each graph and model."""
    columns = ["objective"]
    for deg, path_len, _, model in cells():
        columns.append(f"{MODELS[model]}, G({deg},{path_len})")
    rows = []
    for objective in CURES:
        row = [objective.replace("_", " ")]
        for deg, path_len, _, model in cells():
            runs = logs_of(model, objective, deg, path_len)
            solved, examples = count_solved(runs)
            row.append(solved if examples is None else f"{solved}, {examples}")
        rows.append(row)
    print_table(columns, rows)


def details(graph, model, objective, runs):
    """A row of the second table."""
    ends = [run.end for run in runs]
    solved, examples = count_solved(runs)
    return [
        graph,
        MODELS[model],
        objective.replace("_", " "),
        solved,
        spread([end["accuracy"] for end in ends], "{:.1%}"),
        spread([end["node_accuracy"][1] for end in ends], "{:.1%}"),
        examples or "-",
        f"{runs[0].config['max_iters'] * runs[0].config['batch_size'] / 1000:.0f}k",
        f"{statistics.median(costs_of_a_step(model, objective)):.1f}",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measure", action="store_true", help="measure what a step costs")
    if parser.parse_args().measure:
        measure()
        return
    rows = []
    for deg, path_len, num_nodes, model in cells():
        for objective in CURES:
            runs = logs_of(model, objective, deg, path_len)
            graph = f"G({deg},{path_len}), {num_nodes} names"
            rows.append(details(graph, model, objective, runs))
    print(INTRODUCTION)
    print_overview()
    print(DETAILS.format(difference=largest_difference()))
    print_table(COLUMNS, rows)
    print(CONCLUSION, end="")


if __name__ == "__main__":
    main()
