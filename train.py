"""Trains a model to find the path in path-star graphs. Does it learn to plan, or to cheat?

    python train.py --model mamba --teacherless
    python train.py --model mamba                  the same model, trained as usual: it cheats

After an interruption, the same command with --resume goes on with the run. Several processes, and
as many GPUs if there are any, share it with `torchrun --standalone --nproc_per_node 2 train.py ...`

There are four ways to train. The first three are from Bachmann & Nagarajan 2024 (figure 1). Let p
be a prefix and 7 3 9 its path:

    teacher forcing (default)   reads  p 7 3     predicts  7 3 9     from the true tokens before
    --teacherless               reads  p $ $     predicts  7 3 9     from the prefix alone
    --reverse                   reads  p 9 3     predicts  9 3 7     from goal to start
    --only_first_hop            reads  p 7       predicts  7 3       and no later node

--teacherless and --reverse can be combined. What the model has to write is called the solution, in
the order of writing. Answers and forced predictions are in the order of the path, start to goal.
"""
import argparse
import json
import math
import os
import platform
import re
import shlex
import sys
import time

import numpy as np
import torch
import torch.distributed as dist

from data import (
    PathStar, batch_indices, datasets, move_goals, non_negative_int, positive_int, to_text
)

# The settings that depend on the model.
DEFAULTS = {
    "gpt": {
        "n_layer": 2, "n_loop": 4, "n_embd": 64, "n_head": 1,
        "n_train": 20_000, "batch_size": 64, "lr": 1e-3, "decay_frac": 0.5,
        "max_iters": 1500, "max_iters_teacherless": 4000,
    },
    "mamba": {
        "n_layer": 1, "n_loop": 4, "n_embd": 64, "d_state": 16, "A_init": 0.1,
        "n_train": 100_000, "batch_size": 32, "lr": 6e-3, "decay_frac": 1.0,
        "max_iters": 1200, "max_iters_teacherless": 1200,
    },
}
STOP_AT = 0.995      # a run stops at the first evaluation with this share of test paths right
SOLVED = 0.99        # from here on, the verdict is: solved
EVAL_BATCH = 128     # test graphs evaluated at once: few, so that they stay in the cache of a CPU
N_SAMPLES = 8        # test graphs whose answers stand in the log

# Set by torchrun.
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


# ---- Four ways to train


def flip_if_reversed(args, tokens):
    """Turns (n, path_len, ...) from the order of the path to that of writing, or back."""
    return tokens.flip(1) if args.reverse else tokens


def prefixes_and_solutions(args, prefixes, paths):
    """-> what the model is given (n, prefix_len), and what it has to write (n, solution_len)"""
    solutions = flip_if_reversed(args, torch.from_numpy(paths))
    if args.only_first_hop:
        solutions = solutions[:, :2]
    return torch.from_numpy(prefixes), solutions


def inputs_and_targets(star, prefixes, solutions, teacherless):
    """-> what the model reads, and the token it has to predict at each place, or -1 for none

    Both are (n, prefix_len + solution_len - 1). The prefix `8,7|7,3|3,9/7,9=` with the path 7 3 9:

        inputs, teacher-forced   8 7 | 7 3 | 3 9 / 7 9 = 7 3
        inputs, teacherless      8 7 | 7 3 | 3 9 / 7 9 = $ $
        targets                  . . . . . . . . . . . 7 3 9         . is -1
    """
    given = torch.full_like(solutions, star.dollar) if teacherless else solutions
    inputs = torch.cat([prefixes, given[:, :-1]], dim=1)
    targets = torch.cat([torch.full_like(prefixes[:, 1:], -1), solutions], dim=1)
    return inputs, targets


# ---- Two phases of evaluation, kept apart
#
# In *inference* (`accuracy`, `node_accuracy`) the model reads its own tokens, or only $ after the
# prefix if it is teacherless. In the *forced* phase (`forced_accuracy`, `forced_node_accuracy`) it
# reads the true tokens, as in teacher-forced training.


@torch.no_grad()
def predict(args, star, model, prefixes, solutions):
    """-> the model's answers and its forced predictions, (n, solution_len) both, and the loss

    Answers are written token by token, or all at once from $ (teacherless). Teacherless training
    has no forced phase, so its predictions are None. The loss is that of training, in nats a token.
    """
    answers, forced, total_loss = [], [], 0.0
    for prefix, solution in zip(prefixes.split(EVAL_BATCH), solutions.split(EVAL_BATCH)):
        logits, loss = model(*inputs_and_targets(star, prefix, solution, args.teacherless))
        predicted = logits[:, -solution.size(1):].argmax(dim=2)
        total_loss += loss.item() * len(prefix)
        if args.teacherless:
            answers.append(predicted)
        else:
            forced.append(predicted)
            answers.append(model.generate(prefix, solution.size(1))[:, prefix.size(1):])
    answers = flip_if_reversed(args, torch.cat(answers))
    forced = flip_if_reversed(args, torch.cat(forced)) if forced else None
    return answers, forced, total_loss / len(prefixes)


def evaluate(args, star, model, prefixes, paths):
    """Asks the model for paths -> the shares of right tokens, a dict; the answers; the forced ones

    prefixes (n, prefix_len) and paths (n, path_len) are arrays as in data.py, answers and forced
    predictions as from `predict`. `cheat_accuracy` is the share of graphs in which all tokens after
    the first hop are right when forced: the cheat gets them right, without any plan. A reversed
    path has no such cheat.
    """
    device = next(model.parameters()).device
    given, solutions = prefixes_and_solutions(args, prefixes, paths)
    answers, forced, loss = predict(args, star, model, given.to(device), solutions.to(device))
    paths = torch.from_numpy(paths).to(device)[:, :answers.size(1)]
    right = (answers == paths).double()
    result = {"test_loss": loss}
    result["accuracy"] = right.prod(dim=1).mean().item()
    result["node_accuracy"] = right.mean(dim=0).tolist()
    result.update(forced_accuracy=None, forced_node_accuracy=None, cheat_accuracy=None)
    if forced is not None:
        right = (forced == paths).double()
        result["forced_accuracy"] = right.prod(dim=1).mean().item()
        result["forced_node_accuracy"] = right.mean(dim=0).tolist()
        if right.size(1) > 2 and not args.reverse:
            result["cheat_accuracy"] = right[:, 2:].prod(dim=1).mean().item()
    return result, answers, forced


def goal_moved(args, star, model, prefixes, answers):
    """Does the first hop follow the goal, when the goal moves to another arm and all else stays?

    prefixes (n, prefix_len) are graphs, answers what the model wrote for them -> a dict: the share
    of the graphs in which the first hop `turns` to the new goal's arm, and of those in which it
    `stays` the same node. None if the graphs have one arm.
    """
    if star.deg == 1:
        return None
    moved_prefixes, moved_paths = move_goals(prefixes)
    _, new, _ = evaluate(args, star, model, moved_prefixes, moved_paths)
    to_new_arm = new[:, 1] == torch.from_numpy(moved_paths[:, 1]).to(new.device)
    stays = new[:, 1] == answers[:, 1]
    return {
        "turns": (to_new_arm & ~stays).double().mean().item(),
        "stays": stays.double().mean().item(),
    }


@torch.no_grad()
def probabilities(args, star, model, prefixes, answers):
    """The probability of every token at each place of the answers, in the order of the path.

    prefixes (n, prefix_len), an array; answers as from `predict` -> (n, solution_len, vocab_size)
    """
    prefixes = torch.from_numpy(prefixes).to(answers.device)
    written = flip_if_reversed(args, answers)
    inputs, _ = inputs_and_targets(star, prefixes, written, args.teacherless)
    logits, _ = model(inputs)
    return flip_if_reversed(args, logits[:, -answers.size(1):].float().softmax(dim=2))


def is_guess(share, args, n_test):
    """Whether a share of right first hops is that of a guesser, within four standard errors."""
    chance = 1 / args.deg
    margin = 4 * math.sqrt(chance * (1 - chance) / n_test)
    # With many arms the margin alone would include 0, the share of a model that knows no node.
    return abs(share - chance) < min(margin, chance / 2)


def verdict(result, args, n_test):
    """What an evaluation on n_test graphs shows, in a sentence."""
    shown = f"accuracy {result['accuracy']:.1%}, where guessing an arm gives {1 / args.deg:.1%}"
    first_hop = result["node_accuracy"][1]
    if n_test < 100:
        return f"{shown}: too few graphs ({n_test}) to say what was learned."
    if args.deg == 1:
        return f"{shown}: with one arm there is nothing to choose."
    if result["accuracy"] >= SOLVED:
        found = "first hop" if args.only_first_hop else "path"
        return f"{shown}: solved, the model finds the {found}."
    if args.only_first_hop and is_guess(first_hop, args, n_test):
        return f"{shown}: the first hop alone is not learned (the indecipherable token)."
    cheat = result["cheat_accuracy"]
    if cheat is not None and cheat >= 0.98 and is_guess(first_hop, args, n_test):
        return (
            f"{shown}: the Clever Hans cheat. The first hop is a guess. Given the true nodes, all "
            f"after it are right in {cheat:.1%} of the graphs."
        )
    return f"{shown}: neither solved nor the cheat so far."


# ---- Model and optimizer


def build_model(args, star):
    """Raises ValueError for sizes that do not fit together, or a missing file of the model."""
    try:  # imported here, so that one model's files are enough for a run
        if args.model == "gpt":
            from model_gpt import GPT, GPTConfig
            return GPT(GPTConfig(
                block_size=star.prefix_len + star.path_len - 1, vocab_size=star.vocab_size,
                n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd, n_loop=args.n_loop
            ))
        from model_mamba import Mamba, MambaConfig
        return Mamba(MambaConfig(
            vocab_size=star.vocab_size, n_layer=args.n_layer, d_model=args.n_embd,
            d_state=args.d_state, n_loop=args.n_loop, A_init=args.A_init
        ))
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name}.py is missing") from None


def make_optimizer(model, args):
    """AdamW. Weight decay is on weights of two or more dimensions, but not on Mamba's A_log."""
    decayed = {"params": [], "weight_decay": args.weight_decay}
    others = {"params": [], "weight_decay": 0.0}
    for name, p in model.named_parameters():
        group = decayed if p.dim() >= 2 and not name.endswith("A_log") else others
        group["params"].append(p)
    return torch.optim.AdamW([decayed, others], lr=args.lr, fused=args.device == "cuda")


def learning_rate(args, step):
    """Rises over the first warmup_iters steps, and falls to 0 over the last part, decay_frac, of
    max_iters. If the two overlap, the rate never gets as high as lr.
    """
    rise = (step + 1) / (args.warmup_iters + 1)
    fall = (1 - step / args.max_iters) / args.decay_frac
    return args.lr * min(1.0, rise, fall)


# ---- Log and checkpoint


def make_header(args, test_set):
    """The first line of a log: how the run was started, on what graphs, with what, and where."""
    config = dict(vars(args))
    for name in ("out_dir", "overwrite", "resume", "device"):
        del config[name]
    cpu = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            cpu = re.search("model name.*: (.*)|$", file.read())[1] or cpu
    instructions = torch.backends.cpu.get_cpu_capability()
    machine = f"{platform.system()}, {cpu}, {instructions}, {torch.get_num_threads()} threads"
    if args.device == "cuda":
        machine += f", {torch.cuda.get_device_name()}"
    python, pytorch = platform.python_version(), str(torch.__version__)
    graphs = zip(test_set[0][:N_SAMPLES].tolist(), test_set[1][:N_SAMPLES].tolist())
    return {
        "command": shlex.join(["python", "train.py", *sys.argv[1:]]),
        "config": config,
        "graphs": [to_text(prefix, path) for prefix, path in graphs],
        "versions": {"python": python, "torch": pytorch, "numpy": np.__version__},
        "machine": machine,
    }


def save(out_dir, model, optimizer, header, lines):
    """Writes ckpt.pt, with the log in it, and log.jsonl, each beside the old file before it takes
    its place. So there is a whole checkpoint at every moment.
    """
    ckpt = {"header": header, "lines": lines}
    ckpt.update(model=model.state_dict(), optimizer=optimizer.state_dict())
    path = os.path.join(out_dir, "ckpt.pt")
    torch.save(ckpt, path + ".tmp")
    os.replace(path + ".tmp", path)
    path = os.path.join(out_dir, "log.jsonl")
    with open(path + ".tmp", "w") as file:
        for line in (header, *lines):
            print(json.dumps(line), file=file)
    os.replace(path + ".tmp", path)


def load_checkpoint(out_dir):
    """-> the checkpoint of a run, a dict; its settings; its PathStar; its model, on the CPU

    Raises ValueError if ckpt.pt is missing or does not fit this train.py. Loading runs no code.
    """
    path = os.path.join(out_dir, "ckpt.pt")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        args = argparse.Namespace(**ckpt["header"]["config"])
        star = PathStar(args.deg, args.path_len, args.num_nodes)
        model = build_model(args, star)
        model.load_state_dict(ckpt["model"])
    except Exception as error:  # what a damaged file raises depends on the damage
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a checkpoint of this train.py: {reason}") from None
    return ckpt, args, star, model.eval()


def refuse_difference(flag, names, here, there):
    """Raises ValueError unless these settings of this run, a dict, and of that one are the same."""
    for name in names:
        if here.get(name) != there.get(name):
            raise ValueError(f"{flag}: that run has {name} {there.get(name)}, not {here.get(name)}")


def start_from(model, args):
    """Gives a new model the weights of another run, for --init_from.

    Raises ValueError if the other run had other names, another model apart from n_loop, or another
    seed or n_test, because its training graphs might then be among the test graphs.
    """
    _, other, _, other_model = load_checkpoint(args.init_from)
    same = "model n_layer n_embd n_head d_state A_init num_nodes seed n_test"
    if args.model == "gpt":
        same += " deg path_len"  # it has a weight for each position
    refuse_difference("--init_from", same.split(), vars(args), vars(other))
    model.load_state_dict(other_model.state_dict())


# ---- The loop


def progress(line, args):
    """A line of the log, to read."""
    text = f"iter {line['iter']:5}"
    if line["train_loss"] is not None:
        text += f" | loss {line['train_loss']:.4f}"
    text += f" | accuracy {line['accuracy']:6.1%} (guessing: {1 / args.deg:.0%})"
    for name, key in (("nodes", "node_accuracy"), ("forced", "forced_node_accuracy")):
        if line[key] is not None:
            text += f" | {name} " + " ".join(f"{100 * share:.0f}" for share in line[key])
    if line["iter"] > 0:
        left = int(line["elapsed_s"] / line["iter"] * (args.max_iters - line["iter"]))
        text += f" | {left // 60}:{left % 60:02} left"
    return text


def is_over(args, line):
    return line["iter"] == args.max_iters or line["accuracy"] >= STOP_AT


def log_line(args, star, model, test_set, step, train_loss):
    """Evaluates the model -> a line of the log, a dict. At the end of a run also `goal_moved`."""
    prefixes, paths = test_set
    result, answers, _ = evaluate(args, star, model, prefixes, paths)
    line = {"iter": step, "examples": step * args.batch_size, "train_loss": train_loss}
    line.update(lr=learning_rate(args, step), **result, samples=[], goal_moved=None)
    shown = answers[:N_SAMPLES]
    p = probabilities(args, star, model, prefixes[:N_SAMPLES], shown)
    for answer, path, p_of_answer in zip(shown.tolist(), paths.tolist(), p):
        p_first_hop = round(p_of_answer[1, path[1]].item(), 4)  # of the right one
        line["samples"].append({"answer": answer, "p_first_hop": p_first_hop})
    if is_over(args, line):
        line["goal_moved"] = goal_moved(args, star, model, prefixes, answers)
    return line


def train(args, star, train_set, test_set, model, header, ckpt=None):
    """Trains to the end of the run, from a checkpoint on if there is one -> the log's last line"""
    device = torch.device(args.device)
    model.to(device)
    optimizer = make_optimizer(model, args)
    lines = []
    if ckpt is not None:
        optimizer.load_state_dict(ckpt["optimizer"])
        header, lines = ckpt["header"], ckpt["lines"]
        if RANK == 0:
            save(args.out_dir, model, optimizer, header, lines)  # a killed run's log may lack one
    step = lines[-1]["iter"] if lines else 0
    began = time.time() - (lines[-1]["elapsed_s"] if lines else 0.0)
    dtype = getattr(torch, args.dtype)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    step_model = torch.compile(model) if args.compile else model
    if WORLD_SIZE > 1:
        step_model = torch.nn.parallel.DistributedDataParallel(step_model)
    train_prefixes, solutions = prefixes_and_solutions(args, *train_set)
    inputs, targets = inputs_and_targets(star, train_prefixes, solutions, args.teacherless)
    inputs, targets = inputs.to(device), targets.to(device)

    while not lines or not is_over(args, lines[-1]):
        # Train up to the next evaluation. The first one shows the model as it starts.
        stop = min(step + args.eval_interval, args.max_iters) if lines else 0
        losses = []
        while step < stop:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, step)
            indices = batch_indices(args.n_train, args.batch_size, args.seed, step)
            indices = torch.from_numpy(indices[RANK::WORLD_SIZE]).to(device)
            model.train()
            with autocast:
                _, loss = step_model(inputs[indices], targets[indices])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
            step += 1

        train_loss = None
        if losses:
            mean_loss = torch.stack(losses).mean() / WORLD_SIZE
            if WORLD_SIZE > 1:
                dist.all_reduce(mean_loss)                      # the sum over the processes
            train_loss = mean_loss.item()
        new_lines = [None]
        if RANK == 0:
            model.eval()
            with autocast:
                line = log_line(args, star, model, test_set, step, train_loss)
            line["elapsed_s"] = round(time.time() - began, 2)
            if not math.isfinite(line["test_loss"] + (train_loss or 0.0)):
                sys.exit(f"the loss is infinite or NaN at step {step}; a smaller --lr may help")
            new_lines = [line]
            save(args.out_dir, model, optimizer, header, lines + new_lines)
            print(progress(line, args), flush=True)
        if WORLD_SIZE > 1:
            dist.broadcast_object_list(new_lines)               # so that all stop together
        lines += new_lines
    return lines[-1]


# ---- Flags


def make_parser():
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # an error is one line then
        description=__doc__,
        epilog="defaults that depend on the model:\n" + json.dumps(DEFAULTS, indent=1),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("objective").add_argument
    add("--teacherless", action="store_true", help="feed $ in place of all target tokens")
    add("--reverse", action="store_true", help="write the path from goal to start")
    add("--only_first_hop", action="store_true", help="end the path after the first hop")

    add = parser.add_argument_group("task").add_argument
    add("--deg", type=positive_int, default=2, help="arms of a graph (%(default)s)")
    add("--path_len", type=positive_int, default=5, help="nodes of a path (%(default)s)")
    add("--num_nodes", type=positive_int, default=10, help="names to draw from (%(default)s)")
    add("--n_train", type=positive_int, help="training graphs")
    add("--n_test", type=positive_int, default=1000, help="test graphs (%(default)s)")

    add = parser.add_argument_group("model").add_argument
    add("--model", choices=DEFAULTS, default="gpt", help="architecture (%(default)s)")
    add("--n_layer", type=positive_int, help="layers")
    add("--n_loop", type=positive_int, help="passes through the layers, with the same weights")
    add("--n_embd", type=positive_int, help="width")
    add("--n_head", type=positive_int, help="attention heads, of gpt")
    add("--d_state", type=positive_int, help="numbers of state per channel, of mamba")
    add("--A_init", type=float, help="A starts at -A_init (1, ..., d_state), of mamba")
    add("--init_from", metavar="OUT_DIR", help="start with the weights of another run")

    add = parser.add_argument_group("optimization").add_argument
    add("--batch_size", type=positive_int, help="examples in a step")
    add("--max_iters", type=positive_int, help="maximum number of steps")
    add("--lr", type=float, help="highest learning rate")
    add("--decay_frac", type=float, help="part of the run in which the rate falls to 0")
    add("--weight_decay", type=float, default=0.01, help="AdamW's (%(default)s)")
    add("--warmup_iters", type=non_negative_int, default=100, help="steps of rise (%(default)s)")

    add = parser.add_argument_group("run").add_argument
    add("--eval_interval", type=positive_int, default=100, help="in steps (%(default)s)")
    add("--seed", type=non_negative_int, default=0, help="of weights and data (%(default)s)")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--device", choices=devices, default=devices[0], help="(%(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU that has it")
    add("--compile", action="store_true", help="use torch.compile for the training steps")
    add("--out_dir", help="folder for log.jsonl and ckpt.pt (default: one in out/)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="go on with the run in out_dir")
    add("--overwrite", action="store_true", help="start over if there is a run in out_dir")
    return parser


def objective_of(args):
    flags = [name for name in ("teacherless", "reverse", "only_first_hop") if getattr(args, name)]
    return "-".join(flags) or "teacher_forced"


def resolve(args):
    """Sets flags that were not given. Raises ValueError for flags that contradict each other."""
    if args.only_first_hop and (args.teacherless or args.reverse):
        raise ValueError("--only_first_hop goes with neither --teacherless nor --reverse")
    defaults = dict(DEFAULTS[args.model])
    teacherless_iters = defaults.pop("max_iters_teacherless")
    if args.teacherless:
        defaults["max_iters"] = teacherless_iters
    for name in ("n_head", "d_state", "A_init"):
        if name not in defaults and getattr(args, name) is not None:
            raise ValueError(f"--{name} is not a setting of --model {args.model}")
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("lr", "decay_frac", "A_init"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} must be above 0")
    if args.decay_frac > 1:
        raise ValueError("--decay_frac must be at most 1")
    if args.batch_size % WORLD_SIZE:
        raise ValueError(f"{WORLD_SIZE} processes can't share --batch_size {args.batch_size}")
    if args.dtype is None:
        args.dtype = "float32"
        if args.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            args.dtype = "bfloat16"
    if args.out_dir is None:
        name = f"{args.model}-{objective_of(args)}-deg{args.deg}-len{args.path_len}-seed{args.seed}"
        args.out_dir = os.path.join("out", name)


def main():
    parser = make_parser()
    args = parser.parse_args()
    ckpt = None
    try:  # what a user can get wrong shows here, in one line
        resolve(args)
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        star = PathStar(args.deg, args.path_len, args.num_nodes)
        train_set, test_set = datasets(star, args.n_train, args.n_test, args.seed)
        header = make_header(args, test_set)
        torch.manual_seed(args.seed)
        model = build_model(args, star)
        if args.resume:
            ckpt, _, _, model = load_checkpoint(args.out_dir)
            there = ckpt["header"]
            refuse_difference("--resume", header["config"], header["config"], there["config"])
            refuse_difference("--resume", ["graphs"], header, there)
        elif args.init_from is not None:
            start_from(model, args)
        if RANK == 0 and not args.resume:
            os.makedirs(args.out_dir, exist_ok=args.overwrite)
    except FileExistsError:
        parser.error(f"{args.out_dir} is there: --resume goes on with it, --overwrite starts over")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if WORLD_SIZE > 1:
        dist.init_process_group()
    if RANK == 0:
        n_params = sum(p.numel() for p in model.parameters())
        print(f"{args.model}, {n_params:,} parameters, {star}, {args.device} -> {args.out_dir}")
    try:
        last = train(args, star, train_set, test_set, model, header, ckpt)
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on with --resume (and without --overwrite)")
    if RANK == 0:
        print(verdict(last, args, args.n_test))
    if WORLD_SIZE > 1:
        dist.barrier()                                          # none may leave before the others
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
