"""Measures this project's speed beside other projects', side by side in one run, and prints results/speed.md.

    pip install transformers==5.* mambapy==1.2.0 tqdm pandas
    git clone https://github.com/karpathy/nanoGPT && git clone https://github.com/gregorbachmann/Next-Token-Failures
    python results/speed.py --nanogpt nanoGPT --authors Next-Token-Failures > results/speed.md

Every number is the median of calls that take turns. --only names the tables to make.
"""
import argparse
import contextlib
import datetime
import importlib.util
import itertools
import json
import logging
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import train
from data import PathStar, draw, text
from model_gpt import GPT, GPTConfig
from model_mamba import Mamba, MambaConfig
from scan_kernel import selective_scan, selective_scan_ref

logging.disable(logging.WARNING)


def take_turns(calls, seconds=4):
    """{name: function} -> {name: median milliseconds of a call}, after one call each to warm up."""
    once = 0
    for call in calls.values():
        call()
        start = time.perf_counter()
        call()
        once += time.perf_counter() - start
    times = {name: [] for name in calls}
    for _ in range(max(3, min(300, int(seconds / once)))):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(t) for name, t in times.items()}


def table(*rows):
    for i, row in enumerate(rows):
        print("| " + " | ".join(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row) + " |")
        if i == 0:
            print("|" + "---|" * len(row))
    print(flush=True)


def mambapy_scan(u, delta, A, B, C, D, z, delta_bias):
    """mambapy's scan (pscan), from the layout that ours has."""
    from mambapy.mamba import MambaBlock
    y = MambaBlock.selective_scan(None, u.mT, F.softplus(delta.mT + delta_bias), A, B.mT, C.mT, D)
    return (y * F.silu(z.mT)).mT


def transformers_scan(u, delta, A, B, C, D, z, delta_bias):
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan
    return mamba_selective_scan(u, delta, A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=True)


def doubling(u, delta, A, B, C, D, z, delta_bias):
    """The scan as an associative one: after round k, a and h are what the 2^k steps up to each t do together."""
    dt, step = F.softplus(delta + delta_bias[:, None]), 1
    a, h = torch.exp(torch.einsum("bdl,dn->bdnl", dt, A)), torch.einsum("bdl,bnl->bdnl", dt * u, B)
    while step < u.shape[2]:
        h, a = h + a * F.pad(h[..., :-step], (step, 0)), a * F.pad(a[..., :-step], (step, 0), value=1.0)
        step *= 2
    return (torch.einsum("bdnl,bnl->bdl", h, C) + D[:, None] * u) * F.silu(z)


def scan_inputs(b, l, d, n):
    torch.manual_seed(0)
    sizes = (b, d, l), (b, d, l), (d, n), (b, n, l), (b, n, l), (d,), (b, d, l), (d,)
    inputs = [torch.randn(size).requires_grad_() for size in sizes]
    inputs[2].data = -n * torch.rand(d, n)
    return inputs


def scans():
    print(f"## The scan, forward + backward, float32, {torch.get_num_threads()} threads\n")
    print("(batch, seqlen, dim, dstate); milliseconds of ours, and how many times as long the others take: mambapy's pscan; "
          "the sequential path of transformers, which indexes the sequence at every step; this project's own plain loop under "
          "autograd, which unbinds it once and is therefore faster; and a parallel scan by doubling.\n")
    rows = [["shape", "ours, ms", "best of the three", "mambapy", "transformers", "our plain loop", "doubling"]]
    for shape in [(1, 1, 16, 1), (1, 4, 16, 4), (1, 16, 16, 4), (1, 64, 64, 16), (64, 1, 256, 16), (4, 128, 128, 16),
                  (1, 512, 512, 16), (128, 27, 128, 16), (256, 17, 256, 16), (8, 512, 256, 16), (4, 2048, 512, 16)]:
        inputs = scan_inputs(*shape)
        calls = {"ours": lambda *x: selective_scan(*x, delta_softplus=True), "mambapy": mambapy_scan,
                 "transformers": transformers_scan, "loop": lambda *x: selective_scan_ref(*x, delta_softplus=True),
                 "doubling": doubling}
        work = np.prod(shape)
        if work > 3e7:                                               # minutes a call
            del calls["doubling"], calls["transformers"]
        elif shape[1] > 256:
            del calls["transformers"]
        both = lambda f: torch.autograd.grad((y := f(*inputs)), inputs, torch.ones_like(y), allow_unused=True)
        ms = take_turns({name: (lambda f=f: both(f)) for name, f in calls.items()})
        ratio = {name: t / ms["ours"] for name, t in ms.items()}
        best = min(r for name, r in ratio.items() if name in ("mambapy", "transformers", "loop"))
        others = [ratio.get(name, "-") for name in ("mambapy", "transformers", "loop", "doubling")]
        rows.append([shape, ms["ours"], best, *others])
    table(*rows)


def steps(args):
    """A step of training at the default sizes: forward, backward, AdamW."""
    print("## A training step, one thread each, default sizes (batch 128, 27 + 4 tokens)\n")
    from mambapy.mamba import Mamba as Mambapy, MambaConfig as MambapyConfig
    from transformers import MambaConfig as TransformersConfig, MambaForCausalLM
    spec = importlib.util.spec_from_file_location("nanogpt", Path(args.nanogpt) / "model.py")
    spec.loader.exec_module(nanogpt := importlib.util.module_from_spec(spec))
    torch.set_num_threads(1)
    star = PathStar(2, 5, 10)
    prefixes, paths = map(torch.from_numpy, draw(star, 128, np.random.default_rng(0)))
    idx, targets = train.model_input(prefixes, paths), train.loss_targets(prefixes, paths)

    def step(model, logits):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

        def call():
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(logits(model).flatten(0, 1), targets.flatten(), ignore_index=-1).backward()
            optimizer.step()
        return call

    first = lambda model: model(idx, targets)[0]
    ms = take_turns({
        "ours": step(Mamba(MambaConfig(vocab_size=14, n_layer=3, d_model=128, d_state=16)), first),
        "transformers": step(MambaForCausalLM(TransformersConfig(
            vocab_size=14, hidden_size=128, state_size=16, num_hidden_layers=3, use_mambapy=False)), lambda m: m(idx).logits),
        "mambapy": step(torch.nn.Sequential(
            torch.nn.Embedding(14, 128), Mambapy(MambapyConfig(d_model=128, n_layers=3, d_state=16)), torch.nn.RMSNorm(128),
            torch.nn.Linear(128, 14, bias=False)), lambda m: m(idx)),
    }, seconds=20)
    table(["Mamba, 3 layers, width 128, d_state 16", "ms", "examples per second", "times as long as ours"],
          *([name, t, f"{128e3 / t:.0f}", t / ms["ours"]] for name, t in ms.items()))
    size = dict(block_size=31, vocab_size=14, n_layer=6, n_head=4, n_embd=64)
    with contextlib.redirect_stdout(None):                           # it prints its size
        theirs, same_gelu = (nanogpt.GPT(nanogpt.GPTConfig(**size, dropout=0.0)) for _ in range(2))
    for block in same_gelu.transformer.h:
        block.mlp.gelu = torch.nn.GELU(approximate="tanh")
    ms = take_turns({"ours": step(GPT(GPTConfig(**size)), first),
                     "ours, attention written out": step(GPT(GPTConfig(**size, fused=False)), first),
                     "nanoGPT": step(theirs, first), "nanoGPT with GPT-2's GELU": step(same_gelu, first)}, seconds=20)
    table(["Transformer, 6 layers, width 64, 4 heads", "ms", "examples per second", "times as long as ours"],
          *([name, t, f"{128e3 / t:.0f}", t / ms["ours"]] for name, t in ms.items()))


def authors_loop(args, n=150, rounds=3, names=10, batch=128, layers=6, width=64, heads=4):
    """Our training loop and the authors', as they are, on the same graphs: the time per step of the second half."""
    print(f"## The training loop of the paper's authors, one thread each, {layers} layers, width {width}, batch {batch}\n")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "authors"
        shutil.copytree(args.authors, copy)
        (copy / "wandb.py").touch()                                  # imported, not used
        graphs = copy / "data" / "datasets" / "graphs"
        graphs.mkdir(parents=True, exist_ok=True)
        star = PathStar(2, 5, names)
        sizes = ["--n_layer", str(layers), "--n_embd", str(width), "--n_head", str(heads), "--batch_size", str(batch)]
        for part, size in (("train_200000", batch * n), ("test_20000", 1000)):
            lines = text(star, *draw(star, size, np.random.default_rng(size)))
            (graphs / f"deg_2_path_5_nodes_{names}_{part}.txt").write_text("\n".join(lines) + "\n")
        for i in range(rounds):
            out = Path(folder) / f"ours{i}"
            file = graphs / f"deg_2_path_5_nodes_{names}_train_200000.txt"
            subprocess.run([sys.executable, HERE / "train.py", "--train_file", file, "--num_nodes", str(names),
                            "--n_test", "1000", "--max_iters", str(n), "--eval_interval", str(n // 3),
                            "--out_dir", out, *sizes], check=True, env=env, capture_output=True)
            log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()[1:]]
            ours.append((log[-1]["elapsed_s"] - log[1]["elapsed_s"]) / (log[-1]["iter"] - log[1]["iter"]) * 1e3)
            command = [sys.executable, "train.py", *sizes, "--num_nodes", str(names), "--n_train", str(batch * n),
                       "--n_test", "1000", "--epochs", "1"]
            process = subprocess.Popen(command, cwd=copy, env=env, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
            last = {}
            for line in process.stderr:                              # tqdm: 50/150 [00:09<00:18, 5.3it/s]
                for done, minutes, seconds in re.findall(rf"(\d+)/{n} \[(\d+):(\d+)<", line):
                    last.setdefault(int(done), time.perf_counter())
                if n in last:
                    process.kill()
            middle = min(last, key=lambda done: abs(done - n // 3))
            theirs.append((last[n] - last[middle]) / (n - middle) * 1e3)
    our_ms, their_ms = statistics.median(ours), statistics.median(theirs)
    table(["loop", "ms per step", "times as long as ours"],
          [f"ours, with an evaluation every {n // 3} steps", our_ms, 1.0], ["the authors'", their_ms, their_ms / our_ms])


def loop_overhead():
    """Where a default run's time goes: train.main itself, with clocks around what it calls."""
    print("## Where the time of the training loop goes, default sizes\n")
    rows = [["run of 200 steps", "threads", "ms per step", "forward, backward, clipping, AdamW", "the loop around them",
             "evaluation, at the default interval"]]
    for model, threads in itertools.product(("gpt", "mamba"), (1, os.cpu_count())):
        torch.set_num_threads(threads)
        spent = dict(steps=0.0, evaluation=0.0)

        def clocked(function, what):
            def call(*args, **kwargs):
                start = time.perf_counter()
                result = function(*args, **kwargs)
                spent[what] += time.perf_counter() - start
                return result
            return call

        patches = [(torch.Tensor, "backward", "steps"), (torch.optim.AdamW, "step", "steps"),
                   (torch.nn.utils, "clip_grad_norm_", "steps"), (train, "predict", "evaluation"),
                   (train, "save", "evaluation")]
        originals = [getattr(owner, name) for owner, name, _ in patches]
        for owner, name, what in patches:
            setattr(owner, name, clocked(getattr(owner, name), what))
        build = train.build_model

        def build_clocked(*args):
            built = build(*args)
            inner = built.forward
            built.forward = lambda *a, **k: (clocked(inner, "steps") if len(a) == 2 else inner)(*a, **k)
            return built
        train.build_model = build_clocked
        with tempfile.TemporaryDirectory() as folder:
            sys.argv = f"train.py --model {model} --max_iters 200 --eval_interval 100 --out_dir {folder}/o".split()
            sys.stdout, screen = open(os.devnull, "w"), sys.stdout
            train.main()
            sys.stdout = screen
            log = [json.loads(line) for line in Path(folder, "o", "log.jsonl").read_text().splitlines()[1:]]
        train.build_model = build
        for (owner, name, _), original in zip(patches, originals):
            setattr(owner, name, original)
        total = log[-1]["elapsed_s"]                                 # the last of the three evaluations is not in it all
        evaluation = spent["evaluation"] / 3 * 2
        steps_s, loop = spent["steps"], total - spent["steps"] - spent["evaluation"]
        rows.append([f"`--model {model}`", threads, (total - evaluation) / 200 * 1e3, f"{steps_s / total:.1%}",
                     f"{max(loop, 0) / total:.1%}", f"{evaluation / total:.1%}"])
    table(*rows)


def generation():
    print("## Greedy generation, 200 prompts, default models, one thread\n")
    torch.set_num_threads(1)
    rows = [["model", "graph", "tokens per second with the cache", "without it", "ratio"]]
    for star in (PathStar(2, 5, 50), PathStar(20, 5, 100)):
        prompts = torch.from_numpy(draw(star, 200, np.random.default_rng(0))[0])
        length = star.prefix_len + star.path_len
        gpt = GPT(GPTConfig(block_size=length, vocab_size=star.vocab_size, n_layer=6, n_head=4, n_embd=64))
        mamba = Mamba(MambaConfig(vocab_size=star.vocab_size, n_layer=3, d_model=128, d_state=16))
        for name, model in (("gpt", gpt), ("mamba", mamba)):
            @torch.no_grad()
            def recompute():
                idx = prompts
                for _ in range(star.path_len):
                    idx = torch.cat([idx, model(idx)[0].argmax(dim=2)], dim=1)
                return idx
            assert torch.equal(recompute(), model.generate(prompts, star.path_len))
            ms = take_turns({"cache": lambda: model.generate(prompts, star.path_len), "none": recompute})
            tokens = 200 * star.path_len * 1e3
            rows.append([name, star, f"{tokens / ms['cache']:.0f}", f"{tokens / ms['none']:.0f}", ms["none"] / ms["cache"]])
    table(*rows)


def gpu():
    """On a machine with a GPU: python results/speed.py --only gpu gpu_training --authors Next-Token-Failures"""
    import scan_kernel
    print(f"## The scan on {torch.cuda.get_device_name()}\n\n```", flush=True)
    rivals = {"loop": selective_scan_ref, "doubling": lambda *x, delta_softplus: doubling(*x)}
    if importlib.util.find_spec("mamba_ssm"):
        rivals["mamba_ssm"] = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    for shape in ((256, 31, 1568, 16), (8, 2048, 1536, 16), (8, 2048, 3072, 16)):
        for name, rival in rivals.items():                           # apart, as some may not fit into memory
            try:
                scan_kernel.benchmark("cuda", [shape], [torch.float32, torch.bfloat16], {name: rival})
            except torch.OutOfMemoryError:
                print(shape, name, "out of memory", flush=True)
    print("```\n")


def gpu_training(args):
    """On a machine with a GPU: a step of the paper's sizes, with and without --compile, beside what it must take at least."""
    import paper
    rows = [["run", "ms per step", "share of the matrix rate"]]
    for name in paper.MODELS:
        for more in ((), ("--compile",)):
            with tempfile.TemporaryDirectory() as folder:
                subprocess.run([sys.executable, HERE / "train.py", *paper.flags_of(name, "teacher_forced", 2, 5, 0), *more,
                                "--n_train", "51200", "--n_test", "100", "--max_iters", "400", "--eval_interval", "100",
                                "--out_dir", folder + "/out"], check=True)
                log = [json.loads(line) for line in Path(folder, "out", "log.jsonl").read_text().splitlines()[1:]]
            ms = (log[-1]["elapsed_s"] - log[1]["elapsed_s"]) / 300 * 1e3
            rows.append([" ".join((name, *more)), ms, f"{paper.count(name, (2, 5))[3] / paper.RATE / ms * 1e3:.0%}"])
    print(f"## A step of training at the paper's size on {torch.cuda.get_device_name()}, batch 256, G(2,5) with 50 names\n")
    table(*rows)
    if args.authors:
        authors_loop(args, n=600, names=50, batch=256, layers=12, width=384, heads=6)


def compiled():
    """Triton's kernels, compiled here for chips that are not: what the machine code of a time step holds."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    import scan_kernel
    print(f"## The Triton kernels as compiled ahead of time, triton {triton.__version__}, d_state 16\n")
    print("Registers and stack (spills) of a thread, and instructions that a warp issues for one time step of its 32 channels: "
          "in all, exponentials and the like (MUFU), shuffles (SHFL), loads and stores. The last column is what the instructions "
          "allow at best on an H200 (132 multiprocessors, four instructions a clock, 1.98 GHz): picoseconds per channel and step.\n")
    rows = [["kernel", "dtype", "chip", "registers", "stack, bytes", "instructions", "MUFU", "SHFL", "loads, stores",
             "issue limit, ps"]]
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    aligned, ints = [["tt.divisibility", 16]], ("batch", "dim", "seqlen", "dstate")
    constants = dict(SAVE=False, SOFTPLUS=True, CHUNK=scan_kernel.CHUNK, BLOCK_N=16, BLOCK_D=scan_kernel.BLOCK_D)
    for kernel, dtype, chip in [(k, d, c) for k in (scan_kernel.forward_kernel, scan_kernel.backward_kernel)
                                for d in ("bf16", "fp32") for c in (80, 90)]:
        signature, constexprs, attributes = {}, {}, {}
        for i, name in enumerate(kernel.arg_names):
            if name in constants:
                signature[name], constexprs[i,] = "constexpr", constants[name]
            elif name in ints:
                signature[name], attributes[i,] = "i32", aligned if name == "dstate" else []
            elif name in ("dout", "u", "delta", "z", "out", "du", "ddelta", "dz"):  # contiguous (batch, dim, seqlen)
                signature[name], constexprs[i, 3] = (f"*{dtype}", "i32", "i32", "constexpr"), 1
                attributes[i, 0] = attributes[i, 1] = attributes[i, 2] = aligned
            else:
                signature[name], attributes[i,] = "*fp32", aligned
        binary = triton.compile(ASTSource(kernel, signature, constexprs, attributes), target=GPUTarget("cuda", chip, 32),
                                options={"num_warps": scan_kernel.BLOCK_D // 32}).asm["cubin"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary)
            file.flush()
            usage, sass = (subprocess.run([tools / "cuobjdump", flag, file.name], capture_output=True, text=True).stdout
                           for flag in ("--dump-resource-usage", "-sass"))
        code = [(int(at, 16), text.strip()) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
        loops = [[text for at, text in code if int(target[1], 16) <= at <= end] for end, branch in code
                 if (target := re.search(r"BRA\S* .*?(0x[0-9a-f]+)", branch)) and int(target[1], 16) < end]
        loop = max(loops, key=len)
        steps = scan_kernel.CHUNK if kernel is scan_kernel.backward_kernel else 1
        count = lambda *names: sum(any(re.search(rf"\b{name}\b", text) for name in names) for text in loop) / steps
        registers, stack = (re.search(rf"{what}:(\d+)", usage)[1] for what in ("REG", "STACK"))
        rows.append([kernel.__name__, dtype, f"sm_{chip}", registers, stack, f"{len(loop) / steps:.0f}", f"{count('MUFU'):.0f}",
                     f"{count('SHFL'):.0f}", f"{count('LDG', 'STG'):.0f}", len(loop) / steps / 32 / 4 / 132 / 1.98e9 * 1e12])
    table(*rows)


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flags.add_argument("--nanogpt")
    flags.add_argument("--authors")
    flags.add_argument("--only", nargs="*", default=["scans", "steps", "authors", "loop", "generation", "compiled"])
    args = flags.parse_args()
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), platform.machine())
    print(f"# Speed\n\nMade by `python results/speed.py` on {datetime.date.today()}: {cpu}, {os.cpu_count()} cores, Python "
          f"{platform.python_version()}, torch {torch.__version__}. Ratios count; milliseconds depend on the machine and day.\n")
    for name, make in (("scans", scans), ("steps", lambda: steps(args)), ("authors", lambda: authors_loop(args)),
                       ("loop", loop_overhead), ("generation", generation), ("compiled", compiled), ("gpu", gpu),
                       ("gpu_training", lambda: gpu_training(args))):
        if name in args.only:
            make()
