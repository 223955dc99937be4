"""Trains models of the paper's size on a GPU: several at once, until the minutes are over.

    python results/paper.py --minutes 9              in the order of --list
    python results/paper.py --minutes 9 deg5-len5    those with this in their names
    python results/paper.py --list                   names and commands
    python results/paper.py --estimate               what a step needs, counted without running it

The same command goes on with the runs from their last evaluations.

The sizes are those of Bachmann & Nagarajan 2024: 12 layers, width 384, 6 heads, 200,000 training
graphs, batch 256, 50 names or as many as a graph needs. The Mamba has the same depth and width, and
once width 784, as in the authors' later paper on G(2,5). Its states have 16 numbers.

Runs go to out/paper/NAME. Their logs, finished or not, are copied to results/logs/paper/NAME.jsonl.
`python results/table.py results/logs/paper` makes the table.
"""
import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from reproduce import OBJECTIVES, command, is_finished

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
sys.path.insert(0, str(PROJECT))
import scan_kernel  # noqa: E402
from data import PathStar  # noqa: E402
from train import build_model, fill_in_defaults, make_parser  # noqa: E402

MODELS = {
    "gpt": "--model gpt --n_layer 12 --n_embd 384 --n_head 6 --lr 5e-4",
    "mamba": "--model mamba --n_layer 12 --n_embd 384 --lr 1e-3",
    "mamba784": "--model mamba --n_layer 12 --n_embd 784 --lr 1e-3",
}
COMMON = (
    "--n_train 200000 --n_test 2000 --batch_size 256 --warmup_iters 500 --eval_interval 500"
)
STEPS = {                                                       # 20,000 are 25 epochs
    "teacher_forced": 20_000,
    "teacherless": 40_000,
    "reverse": 20_000,
    "first_hop": 20_000,
}
LARGER = [(5, 5), (2, 10), (10, 5), (20, 5)]                    # (deg, path_len)
MATRIX_RATE = 788e12    # FLOP a second of large bfloat16 products on an H200
SCAN_SECONDS = 31e-12   # of a scan, both passes, per channel and time step, from the
                        # counts of its machine code (speed.md)


def flags_of(model, objective, deg, path_len, seed):
    """-> the flags of train.py for a run, as a list"""
    num_nodes = max(50, deg * (path_len - 1) + 1)
    size = f"--deg {deg} --path_len {path_len} --num_nodes {num_nodes}"
    length = f"--max_iters {STEPS[objective]} --seed {seed}"
    words = [MODELS[model], *OBJECTIVES[objective], size, COMMON, length]
    return " ".join(words).split()


def experiments():
    """-> {name: flags of train.py}, what matters most first"""
    both = ("gpt", "mamba")
    main_objectives = ("teacherless", "teacher_forced", "reverse")
    runs = {}

    def add(model, objective, deg, path_len, seed):
        name = f"{model}-{objective}-deg{deg}-len{path_len}-seed{seed}"
        runs[name] = flags_of(model, objective, deg, path_len, seed)

    for seed in range(3):
        for objective in main_objectives:
            for model in both:
                add(model, objective, 2, 5, seed)
    for deg, path_len in LARGER:
        for model in both:
            add(model, "teacherless", deg, path_len, 0)
    for model in both:
        add(model, "first_hop", 2, 5, 0)
    for objective in main_objectives:
        add("mamba784", objective, 2, 5, 0)
    for deg, path_len in LARGER:
        for objective in ("teacher_forced", "reverse", "first_hop"):
            for model in both:
                add(model, objective, deg, path_len, 0)
    return runs


def print_last_line(name, file):
    lines = file.read_text().splitlines()
    print(f"{name}: {lines[-1] if lines else 'stopped before its first evaluation'}", flush=True)


def run_for(minutes, at_once, runs):
    """Trains the runs {name: flags}, `at_once` of them at a time, until the minutes are over."""
    out = Path("out") / "paper"
    (PROJECT / out).mkdir(parents=True, exist_ok=True)
    waiting = []
    for name in runs:
        if not is_finished(PROJECT / out / name / "log.jsonl"):
            waiting.append(name)
    running = {}
    end = time.time() + 60 * minutes
    while (waiting or running) and time.time() < end:
        while waiting and len(running) < at_once:
            name = waiting.pop(0)
            with open(PROJECT / out / f"{name}.txt", "a") as screen:
                running[name] = subprocess.Popen(
                    command(PROJECT, out / name, runs[name]), cwd=PROJECT,
                    stdout=screen, stderr=screen
                )
        time.sleep(1)
        for name, process in list(running.items()):
            if process.poll() is not None:
                print_last_line(name, PROJECT / out / f"{name}.txt")
                del running[name]
    for name, process in running.items():
        process.terminate()
        process.wait()
        print_last_line(name, PROJECT / out / f"{name}.txt")


def copy_logs(names):
    folder = HERE / "logs" / "paper"
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        log = PROJECT / "out" / "paper" / name / "log.jsonl"
        if log.exists():
            shutil.copy(log, folder / f"{name}.jsonl")


def count(model_name, deg, path_len):
    """Takes a training step of a run with tensors without memory.

    Returns the run's flags, its PathStar, the number of parameters, the FLOP of a step, and the
    bytes kept for the backward pass.
    """
    args = make_parser().parse_args(flags_of(model_name, "teacher_forced", deg, path_len, 0))
    fill_in_defaults(args)
    star = PathStar(args.deg, args.path_len, args.num_nodes)
    kept = {}

    def keep(x):
        storage = x.untyped_storage()
        kept[storage._cdata] = storage.nbytes()                 # shared memory counts once
        return x

    def give_back(x):
        return x

    # Without a GPU the scan takes its CPU path, which keeps fewer states than the kernels.
    chunk = mock.patch.object(scan_kernel, "CPU_CHUNK", scan_kernel.TRITON_CHUNK)
    with torch.device("meta"), chunk:
        model = build_model(args, star)
        length = star.prefix_len + star.path_len - 1
        idx = torch.zeros(args.batch_size, length, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(keep, give_back):
                _, loss = model(idx, idx)
            loss.backward()
    # The counter takes the backward pass of Mamba's depthwise convolution for that of a dense one.
    flop_of = counter.get_flop_counts()["Global"]
    flop = counter.get_total_flops() - flop_of.get(torch.ops.aten.convolution_backward, 0)
    n_params = sum(p.numel() for p in model.parameters())
    return args, star, n_params, flop, sum(kept.values())


def print_estimate():
    """Prints what a step needs: matrix products, scans, and memory."""
    print(
        "| model | graph | parameters | TFLOP a step | ms at the matrix rate | ms of scans "
        "| GB for the backward pass, float32 | GB of weights and optimizer |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for deg, path_len in [(2, 5), *LARGER]:
        for name in MODELS:
            args, star, n_params, flop, kept = count(name, deg, path_len)
            scans = 0.0
            if args.model == "mamba":
                tokens = args.batch_size * (star.prefix_len + star.path_len - 1)
                channels = 2 * args.n_embd
                scans = tokens * args.n_layer * channels * SCAN_SECONDS
            print(
                f"| {name} | {star} | {n_params / 1e6:.1f} M | {flop / 1e12:.2f} "
                f"| {1e3 * flop / MATRIX_RATE:.1f} | {1e3 * scans:.1f} | {kept / 1e9:.1f} "
                f"| {16 * n_params / 1e9:.2f} |", flush=True
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="parts of the names of runs; all by default")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--at_once", type=int, default=6, help="small models leave a GPU idle")
    parser.add_argument("--list", action="store_true", help="print names and commands only")
    parser.add_argument("--estimate", action="store_true", help="print what a step needs")
    args = parser.parse_args()
    runs = {}
    for name, flags in experiments().items():
        if not args.names or any(part in name for part in args.names):
            runs[name] = flags
    if args.list:
        for name, flags in runs.items():
            print(f"{name:40} python train.py {' '.join(flags)}")
    elif args.estimate:
        print_estimate()
    else:
        run_for(args.minutes, args.at_once, runs)
        copy_logs(runs)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # as in `python results/paper.py --list | head`
        sys.stderr.close()
