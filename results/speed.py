"""Measures this project's speed beside others', in one run, and prints results/speed.md.

    pip install transformers==5.* mambapy==1.2.0 tqdm pandas
    git clone https://github.com/karpathy/nanoGPT
    git clone https://github.com/gregorbachmann/Next-Token-Failures
    python results/speed.py --nanogpt nanoGPT --authors Next-Token-Failures > results/speed.md

Every time is the median of calls that take turns. --only names the tables to make. One of them,
gpu_training, needs a GPU and is made only if it is named.
"""
import argparse
import contextlib
import datetime
import importlib.util
import io
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
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import scan_speed
from authors import write_graphs

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
import scan_kernel  # noqa: E402
import train  # noqa: E402
from data import PathStar, draw  # noqa: E402
from model_gpt import GPT, GPTConfig  # noqa: E402
from model_mamba import Mamba, MambaConfig  # noqa: E402


GPT_DEFAULTS = train.DEFAULTS["gpt"]
MAMBA_DEFAULTS = train.DEFAULTS["mamba"]


def default_gpt(block_size, vocab_size, **more):
    size = {name: GPT_DEFAULTS[name] for name in ("n_layer", "n_head", "n_embd")}
    return GPT(GPTConfig(block_size, vocab_size, **size, **more))


def default_mamba(vocab_size):
    sizes = [MAMBA_DEFAULTS[name] for name in ("n_layer", "n_embd", "d_state")]
    return Mamba(MambaConfig(vocab_size, *sizes))


def take_turns(calls, seconds):
    """Calls the functions in turn, for about as many seconds -> {name: median milliseconds}"""
    once = 0.0
    for call in calls.values():
        call()  # to warm up
        start = time.perf_counter()
        call()
        once += time.perf_counter() - start
    rounds = max(3, min(300, int(seconds / once)))
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(measured) for name, measured in times.items()}


def print_table(columns, rows):
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        cells = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row]
        print("| " + " | ".join(cells) + " |")
    print(flush=True)


# ---- The scan

SCAN_SIZES = [
    (1, 1, 16, 1), (1, 4, 16, 4), (1, 16, 16, 4), (1, 64, 64, 16), (64, 1, 256, 16),
    (4, 128, 128, 16), (1, 512, 512, 16), (128, 27, 128, 16), (256, 17, 256, 16),
    (8, 512, 256, 16), (4, 2048, 512, 16),
]
SCANS_TEXT = """\
The shape is (batch, seqlen, dim, dstate). Then come milliseconds of ours, and how many times as
long the others take:

- mambapy: its pscan.
- transformers: its sequential path, which indexes the sequence at every step.
- our plain loop under autograd. It takes the sequence apart once, and is therefore faster.
- doubling: a parallel scan.
"""


def mambapy_scan(u, delta, A, B, C, D, z, delta_bias):
    """mambapy's pscan, from our layout and back."""
    from mambapy.mamba import MambaBlock
    dt = F.softplus(delta.mT + delta_bias)
    y = MambaBlock.selective_scan(None, u.mT, dt, A, B.mT, C.mT, D)
    return (y * F.silu(z.mT)).mT


def transformers_scan(u, delta, A, B, C, D, z, delta_bias):
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan
    return mamba_selective_scan(
        u, delta, A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=True
    )


def print_scans(args):
    print(f"## The scan, forward + backward, float32, {torch.get_num_threads()} threads\n")
    print(SCANS_TEXT)
    columns = [
        "shape", "ours, ms", "best of the three", "mambapy", "transformers", "our plain loop",
        "doubling",
    ]
    rows = []
    for size in SCAN_SIZES:
        inputs = scan_speed.scan_inputs(*size)
        scans = {"ours": scan_speed.ours, "mambapy": mambapy_scan, "loop": scan_speed.plain_loop}
        work = np.prod(size)
        if work <= 3e7:  # else a call takes minutes
            scans["doubling"] = scan_speed.doubling
            if size[1] <= 256:
                scans["transformers"] = transformers_scan
        calls = {}
        for name, scan in scans.items():
            calls[name] = partial(scan_speed.forward_and_backward, scan, inputs)
        ms = take_turns(calls, seconds=4)
        ratios = {name: t / ms["ours"] for name, t in ms.items()}
        three = [ratios.get(name, "-") for name in ("mambapy", "transformers", "loop")]
        best = min(ratio for ratio in three if ratio != "-")
        rows.append([size, ms["ours"], best, *three, ratios.get("doubling", "-")])
    print_table(columns, rows)


# ---- A training step


def training_step(model, get_logits, targets):
    """-> a function that takes a step: forward, backward, AdamW"""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step():
        optimizer.zero_grad(set_to_none=True)
        logits = get_logits(model)
        F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1).backward()
        optimizer.step()

    return step


def print_step_times(title, batch_size, ms):
    rows = []
    for name, t in ms.items():
        rows.append([name, t, f"{1e3 * batch_size / t:.0f}", t / ms["ours"]])
    print_table([title, "ms", "examples per second", "times as long as ours"], rows)


def mamba_steps(idx, targets):
    """-> {name: function that takes a step} for Mambas of the default size"""
    from mambapy.mamba import Mamba as MambapyLayers
    from mambapy.mamba import MambaConfig as MambapyConfig
    from transformers import MambaConfig as TransformersConfig
    from transformers import MambaForCausalLM
    n_layer, width, d_state = [MAMBA_DEFAULTS[name] for name in ("n_layer", "n_embd", "d_state")]
    transformers = MambaForCausalLM(TransformersConfig(
        vocab_size=14, hidden_size=width, state_size=d_state, num_hidden_layers=n_layer,
        use_mambapy=False
    ))
    mambapy = torch.nn.Sequential(
        torch.nn.Embedding(14, width),
        MambapyLayers(MambapyConfig(d_model=width, n_layers=n_layer, d_state=d_state)),
        torch.nn.RMSNorm(width),
        torch.nn.Linear(width, 14, bias=False),
    )
    return {
        "ours": training_step(default_mamba(14), lambda model: model(idx)[0], targets),
        "transformers": training_step(transformers, lambda model: model(idx).logits, targets),
        "mambapy": training_step(mambapy, lambda model: model(idx), targets),
    }


def gpt_steps(idx, targets, checkout):
    """-> {name: function that takes a step} for Transformers of the default size"""
    spec = importlib.util.spec_from_file_location("nanogpt", Path(checkout) / "model.py")
    nanogpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    size = {name: GPT_DEFAULTS[name] for name in ("n_layer", "n_head", "n_embd")}
    with contextlib.redirect_stdout(io.StringIO()):             # it prints its size
        theirs = nanogpt.GPT(nanogpt.GPTConfig(31, 14, **size, dropout=0.0))

    def get_logits(model):
        return model(idx, targets)[0]  # without targets, nanoGPT gives the last logits only

    return {
        "ours": training_step(default_gpt(31, 14), get_logits, targets),
        "ours, attention written out":
            training_step(default_gpt(31, 14, fused=False), get_logits, targets),
        "nanoGPT": training_step(theirs, get_logits, targets),
    }


def batch_of(n):
    """-> inputs and loss targets of n graphs, teacher-forced"""
    graphs = draw(PathStar(2, 5, 10), n, np.random.default_rng(0))
    prompts, targets = [torch.from_numpy(tokens) for tokens in graphs]
    return train.model_input(prompts, targets), train.loss_targets(prompts, targets)


def print_steps(args):
    print("## A training step, one thread each, default sizes (27 + 4 tokens)\n")
    torch.set_num_threads(1)
    idx, loss_targets = batch_of(MAMBA_DEFAULTS["batch_size"])
    ms = take_turns(mamba_steps(idx, loss_targets), seconds=40)
    title = "Mamba, {n_layer} layers, width {n_embd}, d_state {d_state}, batch {batch_size}"
    print_step_times(title.format(**MAMBA_DEFAULTS), len(idx), ms)
    idx, loss_targets = batch_of(GPT_DEFAULTS["batch_size"])
    ms = take_turns(gpt_steps(idx, loss_targets, args.nanogpt), seconds=20)
    title = "Transformer, {n_layer} layers, width {n_embd}, {n_head} heads, batch {batch_size}"
    print_step_times(title.format(**GPT_DEFAULTS), len(idx), ms)


# ---- The training loop of the paper's authors


def read_lines(out_dir):
    """The lines of a run's log, without the header."""
    lines = (Path(out_dir) / "log.jsonl").read_text().splitlines()[1:]
    return [json.loads(line) for line in lines]


def ms_per_step(lines):
    """Milliseconds of a step after the second evaluation, evaluations included."""
    seconds = lines[-1]["elapsed_s"] - lines[1]["elapsed_s"]
    return 1e3 * seconds / (lines[-1]["iter"] - lines[1]["iter"])


def time_our_loop(n, flags, train_file, out_dir, env):
    """Trains n steps with train.py -> milliseconds of a step after the first third"""
    command = [sys.executable, PROJECT / "train.py", *flags, "--train_file", train_file]
    command += ["--n_test", "1000", "--max_iters", str(n), "--eval_interval", str(n // 3)]
    command += ["--out_dir", out_dir]
    subprocess.run(command, check=True, env=env, capture_output=True)
    return ms_per_step(read_lines(out_dir))


def time_their_loop(n, flags, batch, checkout, env):
    """Trains n steps with the authors' train.py -> milliseconds of a step after the first third"""
    command = [sys.executable, "train.py", *flags, "--n_train", str(n * batch)]
    command += ["--n_test", "1000", "--epochs", "1"]
    process = subprocess.Popen(
        command, cwd=checkout, env=env, text=True, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL
    )
    seen = {}                                                   # {step: when it was done}
    line = ""
    for line in process.stderr:                                 # 50/150 [00:09<00:18, 5.3it/s]
        for step in re.findall(rf"(\d+)/{n} \[\d+:\d+<", line):
            seen.setdefault(int(step), time.perf_counter())
        if n in seen:
            process.kill()                                      # before it evaluates
    process.wait()
    if n not in seen:
        sys.exit(f"speed.py: the authors' train.py failed: {line.strip()}")
    first = min(seen, key=lambda step: abs(step - n // 3))
    return 1e3 * (seen[n] - seen[first]) / (n - first)


def print_authors_loop(args):
    print("## The training loop of the paper's authors, one thread each, our default size\n")
    print_loops(args.authors, n=150, num_nodes=10, batch=128, n_layer=6, n_embd=64, n_head=4)


def print_loops(checkout, n, num_nodes, batch, n_layer, n_embd, n_head):
    """Prints the times of our loop and the authors', as they are, on the same graphs."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    flags = f"--n_layer {n_layer} --n_embd {n_embd} --n_head {n_head}".split()
    flags += f"--batch_size {batch} --num_nodes {num_nodes}".split()
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "authors"
        shutil.copytree(checkout, copy)
        (copy / "wandb.py").touch()                             # imported, not used
        graphs = copy / "data" / "datasets" / "graphs"
        graphs.mkdir(parents=True, exist_ok=True)
        star = PathStar(2, 5, num_nodes)
        name = f"deg_2_path_5_nodes_{num_nodes}"
        train_file = graphs / f"{name}_train_200000.txt"
        write_graphs(train_file, star, n * batch, seed=0)
        write_graphs(graphs / f"{name}_test_20000.txt", star, 1000, seed=1)
        for i in range(3):
            ours.append(time_our_loop(n, flags, train_file, Path(folder) / f"ours{i}", env))
            theirs.append(time_their_loop(n, flags, batch, copy, env))
    our_ms, their_ms = statistics.median(ours), statistics.median(theirs)
    rows = [
        [f"ours, with an evaluation every {n // 3} steps", our_ms, 1.0],
        ["the authors'", their_ms, their_ms / our_ms],
    ]
    print_table(["loop", "ms per step", "times as long as ours"], rows)


# ---- Where the time of our training loop goes


class Clock:
    """Adds up the seconds spent in functions. One that is called by another does not count."""

    def __init__(self):
        self.seconds = {"step": 0.0, "evaluation": 0.0}
        self.running = False
        self.first_start = None
        self.last_end = None

    def watch(self, owner, name, kind):
        """-> a context in which calls of owner.name count as `kind`"""
        function = getattr(owner, name)

        def call(*args, **kwargs):
            if self.running:
                return function(*args, **kwargs)
            self.running = True
            start = time.perf_counter()
            result = function(*args, **kwargs)
            end = time.perf_counter()
            self.running = False
            self.seconds[kind] += end - start
            self.last_end = end
            if self.first_start is None:
                self.first_start = start
            return result

        return mock.patch.object(owner, name, call)


def clock_run(model, threads):
    """Runs train.py with clocks -> the row of the table"""
    steps, interval = 200, 100
    torch.set_num_threads(threads)
    clock = Clock()
    with contextlib.ExitStack() as patches:
        folder = patches.enter_context(tempfile.TemporaryDirectory())
        command = f"train.py --model {model} --max_iters {steps} --eval_interval {interval}"
        argv = [*command.split(), "--out_dir", folder]
        patches.enter_context(mock.patch.object(sys, "argv", argv))
        patches.enter_context(contextlib.redirect_stdout(io.StringIO()))
        for owner, name, kind in (
            (GPT if model == "gpt" else Mamba, "forward", "step"),
            (torch.Tensor, "backward", "step"),
            (torch.nn.utils, "clip_grad_norm_", "step"),
            (torch.optim.AdamW, "step", "step"),
            (train, "evaluate", "evaluation"),
            (train, "save", "evaluation"),
        ):
            patches.enter_context(clock.watch(owner, name, kind))
        train.main()
        n_evaluations = len(read_lines(folder))
    step = clock.seconds["step"] / steps
    evaluation = clock.seconds["evaluation"] / n_evaluations / interval     # for each step
    everything = clock.last_end - clock.first_start
    loop = (everything - clock.seconds["step"] - clock.seconds["evaluation"]) / steps
    total = step + loop + evaluation
    shares = [f"{part / total:.1%}" for part in (step, loop, evaluation)]
    return [f"`--model {model}`", threads, 1e3 * (step + loop), *shares]


def print_loop_overhead(args):
    print("## Where the time of the training loop goes, default sizes\n")
    columns = [
        "run of 200 steps", "threads", "ms per step", "forward, backward, clipping, AdamW",
        "the loop around them", "evaluation, at the default interval",
    ]
    rows = []
    for model in ("gpt", "mamba"):
        for threads in (1, os.cpu_count()):
            rows.append(clock_run(model, threads))
    print_table(columns, rows)


# ---- Generation


@torch.no_grad()
def generate_without_cache(model, idx, max_new_tokens):
    for _ in range(max_new_tokens):
        logits, _ = model(idx)
        idx = torch.cat([idx, logits[:, -1:].argmax(dim=2)], dim=1)
    return idx


def print_generation(args):
    print("## Greedy generation, 200 prompts, default models, one thread\n")
    torch.set_num_threads(1)
    rows = []
    for star in (PathStar(2, 5, 50), PathStar(20, 5, 100)):
        prefixes, _ = draw(star, 200, np.random.default_rng(0))
        prompts = torch.from_numpy(prefixes)
        longest = star.prefix_len + star.path_len
        models = {
            "gpt": default_gpt(longest, star.vocab_size),
            "mamba": default_mamba(star.vocab_size),
        }
        for name, model in models.items():
            calls = {
                "cache": partial(model.generate, prompts, star.path_len),
                "no cache": partial(generate_without_cache, model, prompts, star.path_len),
            }
            if not torch.equal(calls["cache"](), calls["no cache"]()):
                sys.exit(f"speed.py: {name} generates other tokens with the cache than without")
            ms = take_turns(calls, seconds=4)
            tokens = 1e3 * 200 * star.path_len
            rows.append([
                name, star, f"{tokens / ms['cache']:.0f}", f"{tokens / ms['no cache']:.0f}",
                ms["no cache"] / ms["cache"],
            ])
    columns = ["model", "graph", "tokens per second with the cache", "without it", "ratio"]
    print_table(columns, rows)


# ---- The Triton kernels, compiled for GPUs that need not be here

STATES = {"initial_state", "dlast_state", "dinitial_state"}
IN_DTYPE_OF_U = {"u", "delta", "z", "out", "dout", "du", "ddelta", "dz"}
COMPILED_TEXT = """\
- States: whether the kernel gets an initial state and the gradient of the last state. Training
  uses neither.
- Registers, stack: of a thread.
- Instructions: what a warp issues for one time step of its 32 channels. Of these are MUFU
  exponentials, reciprocals and the like, SHFL shuffles, LDG and STG loads and stores of memory,
  LDL and STL those of spilled registers.
- Issue limit: the least time that so many instructions take on an H200 (132 multiprocessors, four
  instructions a clock, 1.98 GHz), in picoseconds per channel and step.
"""


def compile_kernel(kernel, dtype, chip, absent):
    """-> machine code, as bytes; the arguments in the set `absent` are None"""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    constants = {
        "SOFTPLUS": True,
        "CHUNK": scan_kernel.TRITON_CHUNK,
        "BLOCK_N": 16,
        "BLOCK_D": scan_kernel.BLOCK_D,
    }
    constants.update({name: None for name in absent})
    types, values, attributes = {}, {}, {}
    multiple_of_16 = [["tt.divisibility", 16]]
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name] = "constexpr"
            values[i,] = constants[name]
        elif name in ("dim", "seqlen", "dstate"):
            types[name] = "i32"
            attributes[i,] = multiple_of_16 if name == "dstate" else []
        else:
            types[name] = f"*{dtype}" if name in IN_DTYPE_OF_U else "*fp32"
            attributes[i,] = multiple_of_16
    compiled = triton.compile(
        ASTSource(kernel, types, values, attributes), target=GPUTarget("cuda", chip, 32),
        options={"num_warps": 1}
    )
    return compiled.asm["cubin"]


def cuobjdump(machine_code, flag):
    """The output of NVIDIA's tool, which comes with Triton."""
    import triton
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True).stdout


def longest_loop(assembly):
    """The instructions of the longest loop, a list. A loop ends with a branch back to its start."""
    code = []
    for address, instruction in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", assembly):
        code.append((int(address, 16), instruction))
    longest = []
    for end, instruction in code:
        branch = re.search(r"BRA\S* .*?0x([0-9a-f]+)", instruction)
        if branch is not None:
            start = int(branch[1], 16)
            loop = [other for address, other in code if start <= address <= end]
            longest = max(longest, loop, key=len)
    return longest


def compiled_row(kernel, with_states, dtype, chip):
    absent = {"chunk_states"} if kernel is scan_kernel.forward_kernel else set()
    if not with_states:
        absent |= STATES & set(kernel.arg_names)
    machine_code = compile_kernel(kernel, dtype, chip, absent)
    usage = cuobjdump(machine_code, "--dump-resource-usage")
    registers = re.search(r"REG:(\d+)", usage)[1]
    stack = re.search(r"STACK:(\d+)", usage)[1]
    loop = longest_loop(cuobjdump(machine_code, "-sass"))
    # The backward kernel takes a chunk in each round of its loop.
    steps = scan_kernel.TRITON_CHUNK if kernel is scan_kernel.backward_kernel else 1

    def count(*names):
        pattern = re.compile(rf"\b({'|'.join(names)})\b")
        return sum(pattern.search(instruction) is not None for instruction in loop) / steps

    issued = len(loop) / steps
    limit = issued / 32 / (132 * 4 * 1.98e9)                    # seconds
    return [
        kernel.__name__, "yes" if with_states else "no", dtype, f"sm_{chip}", registers, stack,
        f"{issued:.0f}", f"{count('MUFU'):.0f}", f"{count('SHFL'):.0f}",
        f"{count('LDG', 'STG'):.0f}", f"{count('LDL'):.1f}", f"{count('STL'):.1f}", 1e12 * limit,
    ]


def print_compiled(args):
    import triton
    print(
        f"## The Triton kernels as compiled ahead of time, triton {triton.__version__}, "
        "d_state 16\n"
    )
    print(COMPILED_TEXT)
    columns = [
        "kernel", "states", "dtype", "chip", "registers", "stack, bytes", "instructions", "MUFU",
        "SHFL", "LDG, STG", "LDL", "STL", "issue limit, ps",
    ]
    rows = []
    for kernel in (scan_kernel.forward_kernel, scan_kernel.backward_kernel):
        for with_states in (False, True):
            for dtype in ("bf16", "fp32"):
                for chip in (80, 90):
                    rows.append(compiled_row(kernel, with_states, dtype, chip))
    print_table(columns, rows)


# ---- Training at the paper's size, on a GPU


def print_gpu_training(args):
    import paper
    gpu = torch.cuda.get_device_name()
    rows = []
    for name in paper.MODELS:
        for more in ([], ["--compile"]):
            flags = paper.flags_of(name, "teacher_forced", 2, 5, 0) + more
            flags += "--n_train 51200 --n_test 100 --max_iters 400 --eval_interval 100".split()
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, PROJECT / "train.py", *flags, "--out_dir", folder]
                subprocess.run(command, check=True, stdout=sys.stderr)
                ms = ms_per_step(read_lines(folder))
            _, _, _, flop, _ = paper.count(name, 2, 5)
            share = 1e3 * flop / paper.MATRIX_RATE / ms
            rows.append([" ".join([name, *more]), ms, f"{share:.0%}"])
    print(f"## A training step at the paper's size on {gpu}, batch 256, G(2,5) with 50 names\n")
    print_table(["run", "ms per step", "share of the matrix rate"], rows)
    if args.authors is not None:
        print(f"## The training loop of the paper's authors at the paper's size on {gpu}\n")
        print_loops(
            args.authors, n=600, num_nodes=50, batch=256, n_layer=12, n_embd=384, n_head=6
        )


TABLES = {
    "scans": print_scans,
    "steps": print_steps,
    "authors": print_authors_loop,
    "loop": print_loop_overhead,
    "generation": print_generation,
    "compiled": print_compiled,
    "gpu_training": print_gpu_training,
}


def cpu_name():
    file = Path("/proc/cpuinfo")
    if file.exists():
        for line in file.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nanogpt", help="checkout of nanoGPT, for the table `steps`")
    parser.add_argument("--authors", help="checkout of the authors' code, for `authors`")
    default = [name for name in TABLES if name != "gpu_training"]
    parser.add_argument("--only", nargs="+", choices=TABLES, default=default)
    args = parser.parse_args()
    if "steps" in args.only and args.nanogpt is None:
        parser.error("the table `steps` needs --nanogpt")
    if "authors" in args.only and args.authors is None:
        parser.error("the table `authors` needs --authors")
    logging.disable(logging.WARNING)
    print(
        f"# Speed\n\nMade by `python results/speed.py` on {datetime.date.today()}: {cpu_name()}, "
        f"{os.cpu_count()} cores, Python {platform.python_version()},\ntorch {torch.__version__}. "
        "Ratios count. Milliseconds depend on the machine and the day.\n"
    )
    for name in args.only:
        TABLES[name](args)


if __name__ == "__main__":
    main()
