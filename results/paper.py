"""The paper's sizes, on a GPU: several runs at once until the minutes are over; the same command again goes on with them.

    python results/paper.py --minutes 9              in the order of --list: G(2,5) with both models, then larger graphs
    python results/paper.py --minutes 9 deg5-len5    those with this in their names
    python results/paper.py --list                   names and commands
    python results/paper.py --estimate               what a step of each size needs, counted without running it

Sizes of Bachmann & Nagarajan 2024: 12 layers, width 384, 6 heads, 200,000 training graphs, batch 256, 50 names or as many as
a graph needs; the Mamba has the same depth and width (and the width 784 of the group's later paper for G(2,5)), state 16.
Runs go to out/paper/<name>, their logs are copied to results/paper/<name>.jsonl, finished or not: `python
results/table.py results/paper` makes the table.
"""
import argparse
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from reproduce import OBJECTIVES, read

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import train  # noqa: E402
from data import PathStar  # noqa: E402

MODELS = {"gpt": ("--model", "gpt", "--n_layer", "12", "--n_embd", "384", "--n_head", "6", "--lr", "5e-4"),
          "mamba": ("--model", "mamba", "--n_layer", "12", "--n_embd", "384", "--lr", "1e-3"),
          "mamba784": ("--model", "mamba", "--n_layer", "12", "--n_embd", "784", "--lr", "1e-3")}
STEPS = {"teacher_forced": 20000, "teacherless": 40000, "reverse": 20000, "first_hop": 20000}  # 20,000 are 25 epochs
LARGER = ((5, 5), (2, 10), (10, 5), (20, 5))
RATE, SCAN = 788e12, 31e-12  # of an H200: FLOP/s of large bf16 products; seconds of the scan, forward and backward, per channel
                             # and time step, counted from its machine code (speed.md)


def flags_of(model, objective, deg, path_len, seed):
    names = max(50, deg * (path_len - 1) + 1)
    return (*MODELS[model], *OBJECTIVES[objective], "--deg", str(deg), "--path_len", str(path_len), "--num_nodes", str(names),
            "--n_train", "200000", "--n_test", "2000", "--batch_size", "256", "--max_iters", str(STEPS[objective]),
            "--warmup_iters", "500", "--eval_interval", "500", "--seed", str(seed))


def experiments():
    """-> {name: flags of train.py}, what matters most first"""
    cells = [(model, objective, 2, 5, seed) for seed in range(3) for objective in ("teacherless", "teacher_forced", "reverse")
             for model in ("gpt", "mamba")]
    cells += [(model, "teacherless", *size, 0) for size in LARGER for model in ("gpt", "mamba")]
    cells += [(model, "first_hop", 2, 5, 0) for model in ("gpt", "mamba")]
    cells += [("mamba784", objective, 2, 5, 0) for objective in ("teacherless", "teacher_forced", "reverse")]
    cells += [(model, objective, *size, 0) for size in LARGER for objective in ("teacher_forced", "reverse", "first_hop")
              for model in ("gpt", "mamba")]
    return {"{}-{}-deg{}-len{}-seed{}".format(*cell): flags_of(*cell) for cell in cells}


def run(todo, args):
    """Runs todo {name: flags}, at most args.at_once of them at a time, until they are finished or the minutes are over."""
    out, logs = HERE.parent / "out" / "paper", HERE / "paper"
    out.mkdir(parents=True, exist_ok=True)
    logs.mkdir(exist_ok=True)
    end, running = time.time() + 60 * args.minutes, {}
    waiting = [name for name in todo if read(out / name / "log.jsonl") is None]
    while (waiting or running) and time.time() < end:
        while waiting and len(running) < args.at_once:
            name = waiting.pop(0)
            begun = (out / name / "log.jsonl").exists()
            command = [sys.executable, "train.py", "--out_dir", f"out/paper/{name}", *(["--resume"] if begun else todo[name])]
            with open(out / f"{name}.txt", "a") as screen:
                running[name] = subprocess.Popen(command, cwd=HERE.parent, stdout=screen, stderr=screen)
        time.sleep(1)
        for name in [name for name, process in running.items() if process.poll() is not None]:
            print(name, (out / f"{name}.txt").read_text().splitlines()[-1], sep=": ", flush=True)
            del running[name]
    for process in running.values():                                 # saves and stops; a resumed run is the same to the bit
        process.send_signal(signal.SIGTERM)
    for name, process in running.items():
        process.wait()
        print(name, (out / f"{name}.txt").read_text().splitlines()[-1], sep=": ", flush=True)
    for name in todo:
        if (log := out / name / "log.jsonl").exists():
            shutil.copy(log, logs / f"{name}.jsonl")


def count(name, size):
    """A training step on tensors without memory -> config, star, parameters, FLOPs, bytes kept for the backward pass."""
    flags, defaults = train.make_flags()
    config = train.resolve(vars(flags.parse_args(flags_of(name, "teacher_forced", *size, 0))), defaults)
    star, kept = PathStar(*size, config["num_nodes"]), {}
    keep = lambda x: kept.__setitem__(x.untyped_storage()._cdata, x.untyped_storage().nbytes()) or x
    with torch.device("meta"):
        model = train.build_model(config, star)
        idx = torch.zeros(config["batch_size"], star.prefix_len + star.path_len - 1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                loss = model(idx, idx)[1]
            loss.backward()
    return config, star, sum(p.numel() for p in model.parameters()), counter.get_total_flops(), sum(kept.values())


def estimate():
    """What a step needs: matrix products, scans, and memory."""
    print("| model | graph | parameters | TFLOP a step | ms at the matrix rate | ms of scans "
          "| GB for the backward pass, float32 | GB of weights and optimizer |\n|---|---|---|---|---|---|---|---|")
    for size in ((2, 5), *LARGER):
        for name in MODELS:
            config, star, n, flops, kept = count(name, size)
            tokens = config["batch_size"] * (star.prefix_len + star.path_len - 1)
            scans = tokens * config["n_layer"] * 2 * config["n_embd"] * SCAN if config["model"] == "mamba" else 0
            print(f"| {name} | {star} | {n / 1e6:.1f} M | {flops / 1e12:.2f} | {flops / RATE * 1e3:.1f} | {scans * 1e3:.1f} "
                  f"| {kept / 1e9:.1f} | {16 * n / 1e9:.2f} |", flush=True)


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flags.add_argument("names", nargs="*", help="parts of names: those that have one of them; all by default")
    flags.add_argument("--minutes", type=float, default=9.0)
    flags.add_argument("--at_once", type=int, default=6, help="runs at a time: small models leave a GPU idle between kernels")
    flags.add_argument("--list", action="store_true")
    flags.add_argument("--estimate", action="store_true")
    args = flags.parse_args()
    todo = {name: words for name, words in experiments().items() if not args.names or any(part in name for part in args.names)}
    if args.list:
        for name, words in todo.items():
            print(f"{name:40} python train.py {' '.join(words)}")
    elif args.estimate:
        estimate()
    else:
        run(todo, args)
