"""Runs the recorded experiments again, or for the first time, and compares what comes out with the record.

    python results/reproduce.py                          all, one after the other; goes on where it was interrupted
    python results/reproduce.py mamba-teacherless-seed0  one of them
    python results/reproduce.py --list                   their names, commands and recorded minutes
    python results/reproduce.py --record ...             keep the logs beside this file, as <name>.jsonl

The runs go to out/reproduce/<name>. What is compared is every figure of every log line but the time; another machine, number of
threads or version of PyTorch rounds differently, and a run that waits on a plateau then leaves it at another step.
"""
import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from train import SOLVED  # noqa: E402

OBJECTIVES = {"teacher_forced": (), "teacherless": ("--teacherless",), "reverse": ("--reverse",),
              "first_hop": ("--only_first_hop",)}
GRID_STEPS = 3000                          # the same for both models and objectives


def experiments():
    """-> {name: flags of train.py}"""
    runs = {f"{model}-{objective}-seed{seed}": ("--model", model, *flags, "--seed", str(seed))
            for model in ("gpt", "mamba") for objective, flags in OBJECTIVES.items() for seed in range(3)}
    for model, seed, steps in (("gpt", 2, 13000), ("mamba", 1, 5000)):   # five times what that seed needs teacherless
        runs[f"{model}-teacher_forced-long-seed{seed}"] = ("--model", model, "--seed", str(seed), "--max_iters", str(steps))
    for deg, path_len in ((2, 3), (2, 4), (2, 6), (3, 5), (5, 5)):       # with (2, 5) above: how the failure grows
        for model in ("gpt", "mamba"):
            size = ("--deg", deg, "--path_len", path_len, "--num_nodes", max(10, deg * (path_len - 1) + 2),
                    "--max_iters", GRID_STEPS)
            for objective in ("teacher_forced", "teacherless"):
                name = f"{model}-{objective}-deg{deg}-len{path_len}-seed0"
                runs[name] = ("--model", model, *OBJECTIVES[objective], *map(str, size))
    return runs


def read(file):
    """-> the lines of a log, without its header and without times; None if there is no finished log"""
    if not file.exists():
        return None
    header, *lines = map(json.loads, file.read_text().splitlines())
    finished = lines and (lines[-1]["iter"] == header["config"]["max_iters"] or lines[-1]["accuracy"] >= SOLVED)
    return [{**line, "elapsed_s": None} for line in lines] if finished else None


def minutes(file):
    return json.loads(file.read_text().splitlines()[-1])["elapsed_s"] / 60 if file.exists() else None


def main():
    flags = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flags.add_argument("names", nargs="*", help="which experiments; all by default")
    flags.add_argument("--list", action="store_true", help="print names and commands only")
    flags.add_argument("--record", action="store_true", help="keep the logs beside this file")
    args = flags.parse_args()
    runs = experiments()
    for name in args.names:
        if name not in runs:
            flags.error(f"there is no experiment {name}: --list names them")
    todo = {name: runs[name] for name in args.names or runs}
    for number, (name, options) in enumerate(todo.items()):
        record, folder = HERE / f"{name}.jsonl", HERE.parent / "out" / "reproduce" / name
        known = [minutes(HERE / f"{other}.jsonl") for other in list(todo)[number:]]
        if args.list:
            print(f"{name:44} python train.py {' '.join(options)}" + (f"   {known[0]:.1f} min" if known[0] else ""))
            continue
        if read(folder / "log.jsonl") is None:
            left = sum(time for time in known if time)
            print(f"{name}, {number + 1} of {len(todo)}; {left:.0f} minutes left for those that are recorded", flush=True)
            given = ["--resume"] if (folder / "log.jsonl").exists() else options
            subprocess.run([sys.executable, "train.py", "--out_dir", folder.relative_to(HERE.parent), *given],
                           check=True, cwd=HERE.parent)
        new, old = read(folder / "log.jsonl"), read(record)
        if args.record:
            shutil.copy(folder / "log.jsonl", record)
        ends = [f"{lines[-1]['accuracy']:.1%} at step {lines[-1]['iter']}" for lines in (new, old) if lines]
        beside = "is the same" if old == new else f"has {ends[1]}" if old else "is new"
        print(f"{name}: accuracy {ends[0]}; the record {beside}")


if __name__ == "__main__":
    main()
