"""Makes recorded runs again, and compares what comes out with the records.

    python results/reproduce.py default/mamba-teacherless-seed0     one record
    python results/reproduce.py default/ 'cures/*/gpt-deg2*'        all whose names begin so
    python results/reproduce.py --list                              names, minutes and commands
    python results/reproduce.py --record default/                   keeps the logs as the records
    python results/reproduce.py --commands FILE --at_once 16        new runs, 16 at a time

The name of a run is that of its log in results/logs. A record has its command in its first line;
new runs have theirs in a file, with lines NAME: python train.py ... Runs go to out/reproduce/NAME,
and go on where they were interrupted. One that is finished there is only compared: delete its
folder to make it again. A run in cures/X/ is made in a copy of the code, in
out/patched/X, with results/cures/X.patch if there is one. So is a run in exercises/X/. All figures
but times are compared. A run with --init_from needs the run that this names to be made before.

Another machine, number of threads or version of PyTorch rounds differently. A run that waits on a
plateau then leaves it at another step.
"""
import argparse
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
sys.path.insert(0, str(PROJECT))
from data import positive_int, run_script  # noqa: E402
from tables import LOGS, read_log  # noqa: E402
from train import STOP_AT  # noqa: E402

OUT = Path("out") / "reproduce"         # in the project


# ---- Which runs


def record_of(name):
    return LOGS / f"{name}.jsonl"


def recorded_flags(patterns):
    """-> {name: flags of train.py} of the records. Raises ValueError if a pattern has none."""
    names = [file.relative_to(LOGS).with_suffix("").as_posix() for file in LOGS.rglob("*.jsonl")]
    chosen = {}
    for pattern in patterns:
        found = [name for name in names if name == pattern]
        found = found or [name for name in names if fnmatchcase(name, f"{pattern}*")]
        if not found:
            raise ValueError(f"there is no record {pattern}: --list names them")
        for name in sorted(found):
            log = read_log(record_of(name))
            if "&&" in log.flags or "--resume" in log.flags:
                raise ValueError(f"{name} was extended, one command does not make it again")
            chosen[name] = log.flags
    return chosen


def read_commands(file):
    """-> {name: flags of train.py} of a file with lines NAME: python train.py ..."""
    runs = {}
    for line in Path(file).read_text().splitlines():
        name, colon, command = line.partition(":")
        words = shlex.split(command)
        if not line.strip():
            continue
        if words[:2] != ["python", "train.py"] or ".." in name or name.startswith("/"):
            raise ValueError(f"{file}: {line[:60]!r} is not of the form NAME: python train.py ...")
        runs[name.strip()] = words[2:]
    return runs


# ---- Making them


def patch_of(name):
    """The patch of a run in cures/X/ or exercises/X/, or None."""
    folder, *rest = name.split("/")
    if folder not in ("cures", "exercises"):
        return None
    patch = HERE / folder / f"{rest[0]}.patch"
    return patch if patch.exists() else None


def code_of(name):
    """The folder with the code of a run: the project, or a new copy of it with a patch."""
    patch = patch_of(name)
    if patch is None:
        return PROJECT
    copy = PROJECT / "out" / "patched" / patch.stem
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    for file in PROJECT.glob("*.py"):
        if file.name != "test_all.py":                          # else pytest would find it
            shutil.copy(file, copy)
    command = ["patch", "-p1", "-i", str(patch)]
    if subprocess.run(command, cwd=copy, stdout=subprocess.DEVNULL).returncode != 0:
        raise ValueError(f"{patch.name} does not fit the code")
    return copy


def is_finished(name, flags):
    """Whether a run was made before. Raises ValueError if there is another one in its place."""
    file = PROJECT / OUT / name / "log.jsonl"
    if not file.exists():
        return False
    log = read_log(file)
    if log.flags != flags:
        raise ValueError(f"there is a run with other flags in {OUT / name}: delete it first")
    return log.end["iter"] == log.config["max_iters"] or log.end["accuracy"] >= STOP_AT


def make(name, flags, code, to_file):
    """Trains a run to its end -> whether it worked. With `to_file` it prints to screen.txt."""
    if is_finished(name, flags):
        return True
    folder = OUT / name
    command = [sys.executable, str(code / "train.py")]
    if (PROJECT / folder / "ckpt.pt").exists():
        command += ["--resume", str(folder)]
    else:
        command += [*flags, "--out_dir", str(folder)]
    if not to_file:
        print(f"{name}: python train.py {shlex.join(flags)}", flush=True)
        return subprocess.run(command, cwd=PROJECT).returncode == 0
    (PROJECT / folder).mkdir(parents=True, exist_ok=True)
    env = {"OMP_NUM_THREADS": "1"} | os.environ                 # a thread each
    with open(PROJECT / folder / "screen.txt", "a") as file:
        done = subprocess.run(command, cwd=PROJECT, env=env, stdout=file, stderr=file)
    return done.returncode == 0


# ---- Comparing


def figures(log):
    """The lines of a log without times."""
    return [{key: line[key] for key in line.keys() - {"elapsed_s"}} for line in log.lines]


def end_of(log):
    return f"{log.end['accuracy']:.1%} at step {log.end['iter']:,}"


def compare(log, record):
    """How a new log compares with the record, if there is one: a sentence."""
    if not record.exists():
        return "there is no record"
    old = read_log(record)
    if log.header["data"] != old.header["data"]:
        return f"the record, on other graphs, has {end_of(old)}"
    if figures(log) == figures(old):
        return "the record is the same"
    return f"the record differs, it has {end_of(old)}"


def report(name, keep):
    """Prints how a run compares, and keeps its log as the record if that is asked for."""
    file = PROJECT / OUT / name / "log.jsonl"
    log = read_log(file)
    made_by = log.header["commit"] or "code without a commit"
    print(f"{name}: {end_of(log)}, by {made_by}; {compare(log, record_of(name))}", flush=True)
    if keep:
        record_of(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, record_of(name))


def print_list(runs):
    for name in runs:
        log = read_log(record_of(name))
        command = shlex.join(["python", "train.py", *log.flags])
        patch = patch_of(name)
        patched = f", with {patch.name}" if patch else ""
        print(f"{name:44} {log.end['elapsed_s'] / 60:5.1f} min  {command}{patched}")


def main():
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # an error is one line then
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="records: names, beginnings of names, or globs")
    parser.add_argument("--list", action="store_true", help="only print which they are")
    parser.add_argument("--record", action="store_true", help="keep the logs as the new records")
    parser.add_argument("--commands", metavar="FILE", help="make the runs of this file, too")
    parser.add_argument("--at_once", type=positive_int, default=1, metavar="N",
                        help="so many at a time, a thread each; their output is in screen.txt")
    args = parser.parse_args()
    try:
        runs = recorded_flags(args.names or ([""] if args.list else []))
        if args.list:
            print_list(runs)
            return
        if args.commands is not None:
            runs |= read_commands(args.commands)
        if not runs:
            raise ValueError("which runs? --list names the records")
        for name, flags in runs.items():
            is_finished(name, flags)                            # refuses before anything is made
        codes = {name: code_of(name) for name in runs}
    except (OSError, ValueError) as error:
        parser.error(str(error))

    failed = []
    with ThreadPoolExecutor(args.at_once) as pool:
        def start(name):
            return make(name, runs[name], codes[name], to_file=args.at_once > 1)

        for name, worked in zip(runs, pool.map(start, runs)):
            if worked:
                report(name, args.record)
            else:
                failed.append(name)
                print(f"{name} failed", file=sys.stderr)
    sys.exit(len(failed) > 0)


if __name__ == "__main__":
    run_script(main)
