"""What the recorded runs beside this file ended with, as Markdown: python results/table.py > results/README.md

Given a folder, the runs recorded there.
"""
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from train import make_flags, resolve  # noqa: E402

_, defaults = make_flags()


def command(config):
    """The flags that are not at their defaults, but for the seed."""
    default = resolve({flag: config[flag] for flag in ("model", "teacherless")}, defaults)
    default.update({flag: config[flag] for flag in ("out_dir", "overwrite", "seed")}, model="gpt", teacherless=False)
    words = ["python train.py"]
    for flag, value in config.items():
        if value != default[flag]:
            words.append(f"--{flag}" if value is True else f"--{flag} {value}")
    return " ".join(words)


def learned(lines, hop):
    """The step from which a hop is right in 95 % of the graphs, to the end of the run; None if it is not."""
    wrong = [i for i, line in enumerate(lines) if line["node_accuracy"][hop] < 0.95]
    return lines[max(wrong, default=-1) + 1]["iter"] if max(wrong, default=-1) + 1 < len(lines) else None


def spread(values, form):
    """Mean (least - greatest) of what is known."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    low, high, mean = (form.format(value) for value in (min(values), max(values), sum(values) / len(values)))
    return mean if low == high else f"{mean} ({low} - {high})"


runs = {}                                                            # command: its runs
for file in (Path(sys.argv[1]) if sys.argv[1:] else HERE).glob("*.jsonl"):
    header, *lines = map(json.loads, file.read_text().splitlines())
    runs.setdefault(command(header["config"]), []).append((header, lines, file.name))
order = sorted(runs, key=lambda words: ["--deg" in words or "--path_len" in words, "mamba" in words, words])

print("""The recorded runs. A log holds every flag, the versions and the machine in its first line, then one line per evaluation.
This page is the output of `python results/table.py`; `python results/reproduce.py` makes the runs again, `plot.py` the figures.

Mean over the seeds (least - greatest). *Solved*: runs that reached 99 % of the paths. *Forced*: from the true tokens before;
*later nodes* is the cheat accuracy, all nodes after the first hop right at once. *Hops learned at*: the step from which the
first, second, ... hop before the goal was right in 95 % of the graphs at every evaluation, in teacherless training.
*Minutes*: of a core of a machine that did other things, too.

| command, with `--seed` 0, 1, ... | runs | solved | paths right | forced: first hop | later nodes | hops learned at | steps | minutes |
|---|---|---|---|---|---|---|---|---|""")
for words in order:
    ends = [lines[-1] for _, lines, _ in runs[words]]
    config = runs[words][0][0]["config"]
    plain = not config["reverse"] and not config["only_first_hop"]
    hops = "-"
    if config["teacherless"] and plain:
        steps = [[learned(lines, hop) for _, lines, _ in runs[words]] for hop in range(1, config["path_len"] - 1)]
        hops = "; ".join("never" if set(each) == {None} else
                         spread(each, "{:,.0f}") + f", {each.count(None)} never" * (None in each) for each in steps)
    forced = [end["forced_node_accuracy"][1] for end in ends] if plain and not config["teacherless"] else []
    print(f"| `{words}` | {len(ends)} | {sum(end['accuracy'] >= 0.99 for end in ends)} "
          f"| {spread([end['accuracy'] for end in ends], '{:.1%}')} | {spread(forced, '{:.1%}')} "
          f"| {spread([end['cheat_accuracy'] for end in ends] if plain else [], '{:.1%}')} | {hops} "
          f"| {spread([end['iter'] for end in ends], '{:,.0f}')} "
          f"| {spread([end['elapsed_s'] / 60 for end in ends], '{:.1f}')} |")

print("\n| log | seed | paths right | at step | minutes | on |\n|---|---|---|---|---|---|")
for words in order:
    for header, lines, name in sorted(runs[words], key=lambda run: run[0]["config"]["seed"]):
        end, versions = lines[-1], header["versions"]
        print(f"| [{name}]({name}) | {header['config']['seed']} | {end['accuracy']:.1%} | {end['iter']:,} "
              f"| {end['elapsed_s'] / 60:.1f} | {header['machine']}, Python {versions['python']}, torch {versions['torch']} |")
