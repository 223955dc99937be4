"""Makes recorded runs again, and compares what comes out with the records.

    python results/scripts/reproduce.py default/mamba-teacherless-seed0     one record
    python results/scripts/reproduce.py default/ 'cures/*/gpt-deg2*'        all that begin so
    python results/scripts/reproduce.py --list                              names and commands
    python results/scripts/reproduce.py --commands FILE --record            new runs, to keep

The name of a run is that of its log in results/logs. A record has its command in its first line;
those of new runs stand in a file with lines NAME: python train.py ...

Runs go to out/reproduce/NAME, and go on where they were interrupted. A run in cures/X/ or
exercises/X/ is made in a copy of the code, in out/patched/NAME, with results/patches/X.patch if
there is one. A run with --init_from begins with the weights of another, so make that one first.
All figures but times are compared.
"""
import argparse
import json
import shlex
import shutil
import signal
import subprocess
import sys
from fnmatch import fnmatchcase
from itertools import zip_longest
from pathlib import Path

from tables import LOGS, PROJECT, RESULTS, read_log

OUT = Path("out") / "reproduce"         # in the project


def recorded_flags(patterns):
    """-> {name: flags of train.py} of the records. Raises ValueError if a pattern has none."""
    names = [file.relative_to(LOGS).with_suffix("").as_posix() for file in LOGS.rglob("*.jsonl")]
    chosen = {}
    for pattern in patterns:
        found = [name for name in names if name == pattern]
        found = found or [name for name in names if fnmatchcase(name, f"{pattern}*")]
        if not found:
            raise ValueError(f"there is no record {pattern}: --list names them")
        chosen |= {name: read_log(LOGS / f"{name}.jsonl").flags for name in sorted(found)}
    return chosen


def read_commands(file):
    """-> {name: flags of train.py} of a file with lines NAME: python train.py ..."""
    runs = {}
    for line in filter(str.strip, Path(file).read_text().splitlines()):
        name, command = line.split(": python train.py ")
        runs[name] = shlex.split(command)
    return runs


def obstacle(name):
    """Why today's train.py can't make a record again, or None."""
    log = read_log(LOGS / f"{name}.jsonl")
    if "&&" in log.flags:
        return "it was made by two commands"
    if log.before and log.before.config["num_nodes"] != log.config["num_nodes"]:
        return f"only commit {log.header['commit']} could begin with the weights for other names"


def patch_of(name):
    """The patch of a run in cures/X/ or exercises/X/, or None."""
    folder, *rest = name.split("/")
    patch = RESULTS / "patches" / f"{rest[0]}.patch" if rest else None
    return patch if folder in ("cures", "exercises") and patch.exists() else None


def code_of(name):
    """The folder with the code of a run: the project, or a new copy of it with a patch."""
    patch = patch_of(name)
    if patch is None:
        return PROJECT
    copy = PROJECT / "out" / "patched" / name
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    for file in PROJECT.glob("*.py"):
        if file.name != "test_all.py":                          # else pytest would find it
            shutil.copy(file, copy)
    subprocess.run(["patch", "-s", "-p1", "-i", patch], cwd=copy, check=True)
    return copy


def make(name, flags):
    """Trains a run to its end -> whether it worked."""
    out_dir = OUT / name
    command = [sys.executable, str(code_of(name) / "train.py"), *flags, "--out_dir", str(out_dir)]
    if (PROJECT / out_dir / "ckpt.pt").exists():
        command.append("--resume")
    elif (PROJECT / out_dir).exists():                          # interrupted before its first one
        command.append("--overwrite")
    print(f"{name}: python train.py {shlex.join(flags)}", flush=True)
    return subprocess.run(command, cwd=PROJECT).returncode == 0


def compare(log, record):
    """How a log compares with the record, if there is one."""
    if not record.exists():
        return "there is no record"
    old = read_log(record)
    if log.header["graphs"] != old.header["graphs"]:
        return "the record has other graphs"
    for line, other in zip_longest(log.lines, old.lines, fillvalue={"iter": -1}):
        for name in line.keys() & other.keys() - {"elapsed_s"}:
            if line[name] != other[name]:
                return f"the record differs from step {max(line['iter'], other['iter']):,} on"
    return "the record is the same"


def commit():
    """The commit of the code, with -dirty if files differ from it. Empty without git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True).stdout.strip()


def keep(name, log, made_by):
    """Keeps a log as the record. Its header gets the commit."""
    header = log.header | {"commit": made_by}
    record = LOGS / f"{name}.jsonl"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text("".join(json.dumps(line) + "\n" for line in (header, *log.lines)))


def print_list(runs):
    for name, flags in runs.items():
        patch, why = patch_of(name), obstacle(name)
        remark = (f", with {patch.name}" if patch else "") + (f" ({why})" if why else "")
        print(f"{name:44} python train.py {shlex.join(flags)}{remark}")


def main():
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # an error is one line then
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="records: names, beginnings of names, or globs")
    parser.add_argument("--list", action="store_true", help="only print which they are")
    parser.add_argument("--commands", metavar="FILE", help="make the runs of this file, too")
    parser.add_argument("--record", action="store_true", help="keep the logs as the records")
    args = parser.parse_args()
    try:
        runs = recorded_flags(args.names or ([""] if args.list else []))
        if args.list:
            print_list(runs)
            return
        obstacles = {name: obstacle(name) for name in runs}
        if args.commands is not None:
            runs |= read_commands(args.commands)
        if not runs:
            raise ValueError("which runs? --list names the records")
    except (OSError, ValueError) as error:
        parser.error(str(error))

    made_by = commit()                                          # before a record changes
    failed = 0
    for name, flags in runs.items():
        if obstacles.get(name):
            print(f"{name} can't be made again: {obstacles[name]}")
        elif make(name, flags):
            log = read_log(PROJECT / OUT / name / "log.jsonl")
            said = compare(log, LOGS / f"{name}.jsonl")
            print(f"{name}: {log.end['accuracy']:.1%} at step {log.end['iter']:,}; {said}")
            if args.record:
                keep(name, log, made_by)
        else:
            failed += 1
            print(f"{name} failed", file=sys.stderr)
    sys.exit(failed > 0)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)           # `--list | head` ends it in silence
    main()
