"""Runs the recorded experiments again, and compares what comes out with the record.

    python results/reproduce.py                           all, one after the other
    python results/reproduce.py mamba-teacherless-seed0   one of them
    python results/reproduce.py --list                    names, commands and recorded minutes
    python results/reproduce.py --record ...              keeps the logs as the new record

The runs go to out/reproduce/NAME. Those of a cure (results/cures) are made in a copy of the code
with the cure's patch, in out/patched. The same command goes on where it was interrupted. Of each
line of the log, all figures are compared but the time, and those that only one of both logs has.

Another machine, number of threads or version of PyTorch rounds differently. A run that waits on a
plateau then leaves it at another step.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
sys.path.insert(0, str(PROJECT))
from train import STOP_AT  # noqa: E402

OBJECTIVES = {
    "teacher_forced": [],
    "teacherless": ["--teacherless"],
    "reverse": ["--reverse"],
    "first_hop": ["--only_first_hop"],
}
SEEDS = range(5)
LONG_RUNS = [                       # model, objective, seed, steps, further flags
    ("gpt", "teacher_forced", 1, 14500, "--n_layer 8"),
    ("gpt", "teacher_forced", 2, 13000, ""),
    ("mamba", "teacher_forced", 0, 5000, ""),
    ("mamba", "teacher_forced", 1, 6500, ""),
    ("mamba", "first_hop", 0, 5000, ""),
]
FLOAT32 = "--dtype float32"         # as on a CPU; most runs with this were made on a GPU
TRANSFORMER_ON_FURTHER_GRAPHS = [(2, 3), (2, 4), (2, 6), (3, 5), (5, 5)]   # (deg, path_len)
MAMBA_ON_FURTHER_GRAPHS = {         # beside --model mamba
    "mamba-teacher_forced-deg2-len3-seed0": "--deg 2 --path_len 3 --num_nodes 10",
    "mamba-teacherless-deg2-len3-seed0": "--teacherless --deg 2 --path_len 3 --num_nodes 10",
    "mamba-teacher_forced-deg2-len4-seed0":
        "--deg 2 --path_len 4 --num_nodes 10 --max_iters 3000",
    "mamba-teacherless-deg2-len4-seed0": "--teacherless --deg 2 --path_len 4 --num_nodes 10",
    "mamba-teacher_forced-deg2-len6-seed0": "--deg 2 --path_len 6 --num_nodes 12 --n_layer 12",
    "mamba-teacher_forced-deg3-len5-seed0": "--deg 3 --path_len 5 --num_nodes 14 --n_layer 6",
}
for seed in range(3):
    MAMBA_ON_FURTHER_GRAPHS[f"mamba-teacherless-deg2-len6-seed{seed}"] = (
        "--teacherless --deg 2 --path_len 6 --num_nodes 12 --n_layer 12 --max_iters 5000 "
        f"--seed {seed}"
    )
    MAMBA_ON_FURTHER_GRAPHS[f"mamba-teacherless-deg3-len5-seed{seed}"] = (
        "--teacherless --deg 3 --path_len 5 --num_nodes 14 --n_layer 6 --max_iters 8000 "
        f"--seed {seed} {FLOAT32}"
    )
DEPTHS = [                          # model, layers, seeds, further flags
    ("mamba", (2, 3, 4), range(3), ""),
    ("mamba", (8,), range(1), ""),
    ("gpt", (2, 3, 4), range(3), f"--max_iters 6000 {FLOAT32}"),
    ("gpt", (8,), range(5), f"--max_iters 6000 {FLOAT32}"),
]
CURES = {                                              # the flags of train.py, and the patch
    "next_token": ([], None),
    "teacherless": (["--teacherless"], None),
    "half_and_half": (["--teacherless"], "half_and_half"),
    "look_ahead": ([], "look_ahead"),
    "token_order": ([], "token_order"),
    "bag_of_words": ([], "bag_of_words"),
    "next_latent": ([], "next_latent"),
}
ALL = tuple(CURES)
CURED = [       # deg, path_len, num_nodes, model, steps at most, objectives, seeds, further flags
    (2, 5, 10, "gpt", 6000, ALL, range(3), FLOAT32),
    (2, 5, 10, "mamba", 2000, ALL, range(3), ""),
    (5, 5, 22, "gpt", 6000, ALL, range(1), FLOAT32),
    (5, 5, 22, "mamba", 6000, ALL, range(1), FLOAT32),
    (5, 5, 22, "mamba", 6000, ["look_ahead"], range(1, 3), FLOAT32),
]


def experiments():
    """-> {name: flags of train.py}"""
    runs = {}
    for model in ("gpt", "mamba"):
        for objective, flags in OBJECTIVES.items():
            for seed in SEEDS:
                name = f"{model}-{objective}-seed{seed}"
                runs[name] = ["--model", model, *flags, "--seed", str(seed)]

    # Five times the steps that the seed needs teacherless.
    for model, objective, seed, steps, more in LONG_RUNS:
        name = f"{model}-{objective}-long-seed{seed}"
        size = f"--seed {seed} --max_iters {steps} {more}"
        runs[name] = ["--model", model, *OBJECTIVES[objective], *size.split()]

    for name, flags in MAMBA_ON_FURTHER_GRAPHS.items():
        runs[name] = ["--model", "mamba", *flags.split()]
    for deg, path_len in TRANSFORMER_ON_FURTHER_GRAPHS:
        num_nodes = max(10, deg * (path_len - 1) + 2)
        size = f"--deg {deg} --path_len {path_len} --num_nodes {num_nodes}".split()
        for objective in ("teacher_forced", "teacherless"):
            name = f"gpt-{objective}-deg{deg}-len{path_len}-seed0"
            flags = ["--model", "gpt", *OBJECTIVES[objective], *size]
            runs[name] = [*flags, "--max_iters", "3000"]

    # Teacherless models of several depths. The default depth is among the runs above.
    for model, depths, seeds, more in DEPTHS:
        for n_layer in depths:
            for seed in seeds:
                name = f"{model}-teacherless-len5-layers{n_layer}-seed{seed}"
                size = f"--path_len 5 --n_layer {n_layer} --seed {seed} {more}"
                runs[name] = ["--model", model, "--teacherless", *size.split()]
    return runs


def cures():
    """-> {name: (flags of train.py, patch or None)}"""
    runs = {}
    for deg, path_len, num_nodes, model, steps, objectives, seeds, more in CURED:
        size = f"--deg {deg} --path_len {path_len} --num_nodes {num_nodes} --max_iters {steps}"
        for objective in objectives:
            flags, patch = CURES[objective]
            if objective == "teacherless" and (deg, path_len) == (2, 5):
                continue                    # the default runs
            for seed in seeds:
                name = f"cures/{model}-{objective}-deg{deg}-len{path_len}-seed{seed}"
                flags_of_run = ["--model", model, *flags, *size.split(), "--seed", str(seed)]
                runs[name] = (flags_of_run + more.split(), patch)
    return runs


def code_for(patch):
    """The folder with the train.py of a run: the project, or a copy of it with the patch."""
    if patch is None:
        return PROJECT
    copy = PROJECT / "out" / "patched" / patch
    copy.mkdir(parents=True, exist_ok=True)
    for file in PROJECT.glob("*.py"):
        if file.name != "test_all.py":      # else pytest would find the copy
            shutil.copy(file, copy)
    # Else git finds the project around the copy, where the patch has nothing to do.
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(copy.parent)}
    apply = ["git", "apply", str(HERE / "cures" / f"{patch}.patch")]
    subprocess.run(apply, check=True, cwd=copy, env=env)
    return copy


def command(code, folder, flags):
    """The command that starts the run in this folder, or goes on with it from its checkpoint."""
    python = [sys.executable, "train.py"]
    if (code / folder / "ckpt.pt").exists():
        return [*python, "--resume", str(folder)]
    return [*python, "--out_dir", str(folder), *flags]


def read_log(file):
    """-> the header of a log, and its lines"""
    header, *lines = [json.loads(line) for line in file.read_text().splitlines()]
    return header, lines


def is_finished(file):
    """Whether this is the log of a run that came to its end."""
    if not file.exists():
        return False
    header, lines = read_log(file)
    end = lines[-1]
    return end["iter"] == header["config"]["max_iters"] or end["accuracy"] >= STOP_AT


def minutes(file):
    """What the run took; 0 if there is no log."""
    if not file.exists():
        return 0
    _, lines = read_log(file)
    return lines[-1]["elapsed_s"] / 60


def same_figures(file, other):
    """Whether two logs have the same lines. The docstring of this file says what is compared."""
    _, lines = read_log(file)
    _, other_lines = read_log(other)
    if len(lines) != len(other_lines):
        return False
    for line, other_line in zip(lines, other_lines):
        for key in (line.keys() & other_line.keys()) - {"elapsed_s"}:
            if line[key] != other_line[key]:
                return False
    return True


def end(file):
    _, lines = read_log(file)
    return f"{lines[-1]['accuracy']:.1%} at step {lines[-1]['iter']}"


def compare(name, log, record):
    """Prints how the log compares with the record."""
    if not record.exists():
        verdict = "there is no record"
    elif same_figures(log, record):
        verdict = "the record is the same"
    else:
        verdict = f"the record differs, with {end(record)}"
    print(f"{name}: accuracy {end(log)}; {verdict}", flush=True)


def record_of(name):
    if name.startswith("cures/"):
        return HERE / f"{name}.jsonl"
    return HERE / "logs" / f"{name}.jsonl"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="which experiments; all by default")
    parser.add_argument("--list", action="store_true", help="print names and commands only")
    parser.add_argument("--record", action="store_true", help="keep the logs as the new record")
    args = parser.parse_args()
    runs = {name: (flags, None) for name, flags in experiments().items()} | cures()
    for name in args.names:
        if name not in runs:
            parser.error(f"there is no experiment {name}: --list names them")
    names = args.names or list(runs)

    if args.list:
        for name in names:
            took = minutes(record_of(name))
            shown = f"   {took:.1f} min" if took > 0 else ""
            flags, patch = runs[name]
            with_patch = f"   with {patch}.patch" if patch else ""
            print(f"{name:44} python train.py {' '.join(flags)}{with_patch}{shown}")
        return

    for i, name in enumerate(names):
        flags, patch = runs[name]
        code = code_for(patch)
        folder = Path("out") / "reproduce" / name
        log = code / folder / "log.jsonl"
        if not is_finished(log):
            left = sum(minutes(record_of(other)) for other in names[i:])
            print(f"{name}, {i + 1} of {len(names)}; the records took {left:.0f} minutes from here")
            sys.stdout.flush()
            subprocess.run(command(code, folder, flags), check=True, cwd=code)
        compare(name, log, record_of(name))
        if args.record:
            record_of(name).parent.mkdir(exist_ok=True)
            shutil.copy(log, record_of(name))


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # as in `python results/reproduce.py --list | head`
        sys.stderr.close()
