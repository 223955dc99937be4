"""Trains a model to find the path in path-star graphs. Does it learn to plan, or to cheat?

There are four ways to train, the first three from Bachmann & Nagarajan 2024 (figure 1). With a
prefix p, and the path 7 3 9 as the solution to be written:

    teacher forcing (default)   reads  p 7 3     predicts  7 3 9     from the true tokens before
    --teacherless               reads  p $ $     predicts  7 3 9     from the prefix alone
    --reverse                   reads  p 9 3     predicts  9 3 7     from goal to start
    --only_first_hop            reads  p 7       predicts  7 3       and no later node

--teacherless and --reverse can be combined.

Every evaluation keeps two phases apart. In *inference* (`accuracy`, `node_accuracy`) the model
reads its own tokens, or only $ (teacherless). In the *forced* phase (`forced_accuracy`,
`forced_node_accuracy`) it reads the true ones, as in teacher-forced training. Both list the nodes
from start to goal.

    python train.py --model mamba --teacherless
"""
import argparse
import contextlib
import hashlib
import importlib.util
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time

import numpy as np
import torch

from data import (
    PathStar, batch_indices, bounded, datasets, draw_unseen, graph_keys, move_goals,
    non_negative_int, positive_int, run_script, to_text
)

try:
    import fcntl
except ImportError:  # Windows. Two runs in one folder are not noticed there
    fcntl = None

STOP_AT = 0.995      # a run stops at the first evaluation with so many test paths right
SOLVED = 0.99        # from here on, the verdict is: solved
EVAL_BATCH = 128     # test graphs in one pass: few, so that they stay in the cache of a CPU
N_SAMPLES = 8        # test graphs whose answers stand in the log


# ---- Four ways to train


def flip_if_reversed(args, tokens):
    """Turns (n, path_len, ...) from the order of the path to that of writing, or back."""
    return tokens.flip(1) if args.reverse else tokens


def prefixes_and_solutions(args, prefixes, paths):
    """What the model is given (n, prefix_len), and what it has to write (n, solution_len)."""
    solutions = flip_if_reversed(args, torch.from_numpy(paths))
    if args.only_first_hop:
        solutions = solutions[:, :2]
    return torch.from_numpy(prefixes), solutions


def inputs_and_targets(args, star, prefixes, solutions):
    """What the model reads, and the token to predict at each place.

    That is -1, for none, at all places of the prefix but the last.
    -> (n, prefix_len + solution_len - 1) both. Nothing is predicted after the last token.
    """
    fed = torch.full_like(solutions, star.dollar) if args.teacherless else solutions
    inputs = torch.cat([prefixes, fed[:, :-1]], dim=1)
    targets = torch.cat([torch.full_like(prefixes[:, 1:], -1), solutions], dim=1)
    return inputs, targets


# ---- Two phases of evaluation


@torch.no_grad()
def predict(args, star, model, prefixes, solutions):
    """-> the model's answers and its forced predictions, (n, solution_len) both, and the loss

    Answers come from inference: token by token, or all at once from $ (teacherless). The forced
    phase sees the true tokens before each place. Teacherless training has no such phase: None.
    Both are in the order of the path. The loss is that of training, in nats for each token.
    """
    answers, forced, losses = [], [], []
    for prefix, solution in zip(prefixes.split(EVAL_BATCH), solutions.split(EVAL_BATCH)):
        logits, loss = model(*inputs_and_targets(args, star, prefix, solution))
        predicted = logits[:, -solution.size(1):].argmax(dim=2)
        losses.append(loss.item() * len(prefix))
        if args.teacherless:
            answers.append(predicted)
        else:
            forced.append(predicted)
            answers.append(model.generate(prefix, solution.size(1))[:, prefix.size(1):])
    answers = flip_if_reversed(args, torch.cat(answers))
    forced = flip_if_reversed(args, torch.cat(forced)) if forced else None
    return answers, forced, sum(losses) / len(prefixes)


def summary(args, answers, forced, paths):
    """The shares of right tokens in what `predict` returns, as a dict.

    accuracy: all tokens right. node_accuracy: each token. cheat_accuracy: all tokens after the
    first hop right, forced. The cheat gets them right, without any plan. A reversed path has no
    such cheat.
    """
    paths = torch.from_numpy(paths).to(answers.device)[:, :answers.size(1)]
    right = (answers == paths).double()
    result = {
        "accuracy": right.prod(dim=1).mean().item(),
        "node_accuracy": right.mean(dim=0).tolist(),
        "forced_accuracy": None,
        "forced_node_accuracy": None,
        "cheat_accuracy": None,
    }
    if forced is not None:
        right = (forced == paths).double()
        result["forced_accuracy"] = right.prod(dim=1).mean().item()
        result["forced_node_accuracy"] = right.mean(dim=0).tolist()
        if right.size(1) > 2 and not args.reverse:
            result["cheat_accuracy"] = right[:, 2:].prod(dim=1).mean().item()
    return result


def goal_moved(args, star, model, prefixes, answers):
    """Does the first hop follow the goal, when that moves to another arm and all else stays?

    The prefixes are of two or more arms, answers is what the model wrote for them. Returns the
    share of the graphs in which the first hop `turns` to the new goal's arm, from another node,
    and of those in which it `stays` the same node, as a dict.
    """
    moved_prefixes, moved_paths = move_goals(prefixes)
    given, solutions = prefixes_and_solutions(args, moved_prefixes, moved_paths)
    device = answers.device
    new, _, _ = predict(args, star, model, given.to(device), solutions.to(device))
    to_new_arm = new[:, 1] == torch.from_numpy(moved_paths[:, 1]).to(device)
    stays = new[:, 1] == answers[:, 1]
    return {
        "turns": (to_new_arm & ~stays).double().mean().item(),
        "stays": stays.double().mean().item(),
    }


@torch.no_grad()
def probabilities(args, star, model, prefixes, answers):
    """The probability of every token at each place of the answers, in the order of the path.

    -> (n, solution_len, vocab_size)
    """
    inputs, _ = inputs_and_targets(args, star, prefixes, flip_if_reversed(args, answers))
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
            f"after it are right in {cheat:.1%} of the graphs, by look-up."
        )
    return f"{shown}: neither solved nor the cheat. Not trained enough, or on too few graphs."


def is_over(args, step, accuracy):
    return step == args.max_iters or accuracy >= STOP_AT


def evaluate(args, star, model, test_set, step):
    """-> the figures of an evaluation after so many steps, a dict. At the end also `goal_moved`."""
    model.eval()
    device = next(model.parameters()).device
    prefixes, solutions = prefixes_and_solutions(args, *test_set)
    prefixes, solutions = prefixes.to(device), solutions.to(device)
    answers, forced, loss = predict(args, star, model, prefixes, solutions)
    result = {"test_loss": loss, **summary(args, answers, forced, test_set[1])}
    shown = answers[:N_SAMPLES]
    p = probabilities(args, star, model, prefixes[:N_SAMPLES], shown)
    result["samples"] = []
    for answer, path, p_of_answer in zip(shown.tolist(), test_set[1].tolist(), p):
        p_first_hop = round(p_of_answer[1, path[1]].item(), 4)  # of the right one
        result["samples"].append({"answer": answer, "p_first_hop": p_first_hop})
    result["goal_moved"] = None
    if star.deg > 1 and is_over(args, step, result["accuracy"]):
        result["goal_moved"] = goal_moved(args, star, model, test_set[0], answers)
    return result


# ---- The loop


def make_optimizer(model, args):
    """AdamW. Weight decay is on weights of two or more dimensions, but not on Mamba's A_log."""
    decayed, others = [], []
    for p in model.parameters():
        if p.dim() >= 2 and not getattr(p, "_no_weight_decay", False):
            decayed.append(p)
        else:
            others.append(p)
    groups = [
        {"params": decayed, "weight_decay": args.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, fused=decayed[0].is_cuda)


def learning_rate(args, step):
    """Rises over the first warmup_iters steps, and falls to 0 over the last part of max_iters.

    decay_frac is the size of that part. If the two overlap, the rate never gets as high as lr. It
    leaps up where a run goes on with a larger max_iters than before.
    """
    rise = (step + 1) / (args.warmup_iters + 1)
    fall = (1 - step / args.max_iters) / args.decay_frac
    return args.lr * min(1.0, rise, fall)


def fresh_graphs(args, star, step, test_keys):
    """The training graphs of a step, for --n_train 0."""
    rng = np.random.default_rng([args.seed, 2, step])
    return draw_unseen(star, args.batch_size, rng, test_keys, distinct=False)


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


def train(args, star, train_set, test_set, model, optimizer, header, lines):
    """Trains to the end of the run. `lines`, its evaluations so far, grows.

    A run goes on from the last of them.
    """
    device = next(model.parameters()).device
    autocast = torch.autocast(
        device.type, getattr(torch, args.dtype), enabled=args.dtype != "float32"
    )
    step_model = torch.compile(model) if args.compile else model
    inputs, targets = inputs_and_targets(args, star, *prefixes_and_solutions(args, *train_set))
    inputs, targets = inputs.to(device), targets.to(device)
    test_keys = set(graph_keys(star, test_set[0]))
    began = time.time() - (lines[-1]["elapsed_s"] if lines else 0.0)

    def get_batch(step):
        if args.n_train > 0:
            indices = batch_indices(args.n_train, args.batch_size, args.seed, step)
            indices = torch.from_numpy(indices).to(device)
            return inputs[indices], targets[indices]
        graphs = prefixes_and_solutions(args, *fresh_graphs(args, star, step, test_keys))
        x, y = inputs_and_targets(args, star, *graphs)
        return x.to(device), y.to(device)

    def evaluate_and_save(step, train_loss):
        """Adds a line to the log. Ends the run if a loss is not finite."""
        with autocast:
            result = evaluate(args, star, model, test_set, step)
        if not math.isfinite(result["test_loss"] + (train_loss or 0.0)):
            kept = f"The last good checkpoint is in {args.out_dir}" if lines else "Nothing is saved"
            sys.exit(f"the loss is infinite or NaN at step {step}. {kept}; a smaller --lr may help")
        line = {"iter": step, "examples": step * args.batch_size}
        line["elapsed_s"] = round(time.time() - began, 2)
        line.update(train_loss=train_loss, lr=learning_rate(args, step), **result)
        save(args.out_dir, model, optimizer, header, [*lines, line])
        lines.append(line)
        print(progress(line, args), flush=True)

    if not lines:
        evaluate_and_save(0, None)
    while not is_over(args, lines[-1]["iter"], lines[-1]["accuracy"]):
        done = lines[-1]["iter"]
        interval_end = done - done % args.eval_interval + args.eval_interval
        interval_end = min(interval_end, args.max_iters)
        losses = []
        model.train()
        for step in range(done, interval_end):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, step)
            x, y = get_batch(step)
            with autocast:
                _, loss = step_model(x, y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
        evaluate_and_save(interval_end, torch.stack(losses).mean().item())


# ---- Models


def build_model(args, star):
    """Raises ValueError for sizes that do not fit together, and if the model's file is missing."""
    if importlib.util.find_spec(f"model_{args.model}") is None:
        raise ValueError(f"model_{args.model}.py is missing")
    if args.model == "gpt":
        from model_gpt import GPT, GPTConfig  # here, so that one model's file is enough for a run
        return GPT(GPTConfig(
            block_size=star.prefix_len + star.path_len - 1, vocab_size=star.vocab_size,
            n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd, n_loop=args.n_loop
        ))
    from model_mamba import Mamba, MambaConfig
    return Mamba(MambaConfig(
        vocab_size=star.vocab_size, n_layer=args.n_layer, d_model=args.n_embd,
        d_state=args.d_state, n_loop=args.n_loop, A_init=args.A_init
    ))


def choose_device(name):
    """Raises ValueError for cuda where there is no GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU")
    return torch.device(name)


# ---- Log and checkpoint


def command_line():
    return shlex.join(["python", "train.py", *sys.argv[1:]])


def commit():
    """The commit of the code, with -dirty if files differ from it. None without git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def config_of(args):
    """The settings of a run without those that say where it is, a dict."""
    config = dict(vars(args))
    for name in ("out_dir", "overwrite", "resume", "device"):
        del config[name]
    return config


def digest(train_set, test_set):
    """A short hash of all graphs."""
    sha = hashlib.sha256()
    for array in (*train_set, *test_set):
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()[:16]


def make_header(args, train_set, test_set, device):
    """The first line of a log: how the run was started, on what data, with what code, and where."""
    machine = f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine += f", {torch.cuda.get_device_name(device)}"
    graphs = zip(test_set[0][:N_SAMPLES].tolist(), test_set[1][:N_SAMPLES].tolist())
    return {
        "command": command_line(),
        "commit": commit(),
        "config": config_of(args),
        "data": digest(train_set, test_set),
        "graphs": [to_text(prefix, path) for prefix, path in graphs],
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
        },
        "machine": machine,
    }


def save(out_dir, model, optimizer, header, lines):
    """Writes ckpt.pt, with the log in it, and then log.jsonl.

    Each file is first written beside the old one and then takes its place. So there is a whole
    checkpoint at every moment.
    """
    ckpt = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    ckpt.update(header=header, lines=lines)
    ckpt_path, log_path = os.path.join(out_dir, "ckpt.pt"), os.path.join(out_dir, "log.jsonl")
    try:
        torch.save(ckpt, ckpt_path + ".tmp")
        os.replace(ckpt_path + ".tmp", ckpt_path)
        with open(log_path + ".tmp", "w") as file:
            for line in (header, *lines):
                print(json.dumps(line, allow_nan=False), file=file)
        os.replace(log_path + ".tmp", log_path)
    except (OSError, RuntimeError) as error:  # PyTorch raises RuntimeError if the disk is full
        sys.exit(f"cannot write to {out_dir}, is the disk full? {error}")


def load_checkpoint(out_dir):
    """-> the checkpoint of a run, its settings, its PathStar and its model, on the CPU

    Raises OSError if there is no ckpt.pt in the folder, ValueError if it is not one of this
    version of train.py. No code in the file is run.
    """
    path = os.path.join(out_dir, "ckpt.pt")
    with open(path, "rb") as file:
        try:
            ckpt = torch.load(file, map_location="cpu", weights_only=True)
            config, weights = dict(ckpt["header"]["config"]), dict(ckpt["model"])
            _ = ckpt["optimizer"], ckpt["header"]["data"], ckpt["lines"][-1]["iter"]
        except Exception as error:  # what a damaged file raises depends on the damage
            raise ValueError(
                f"{path} is not a checkpoint of train.py ({type(error).__name__})"
            ) from None
    try:
        args = settings_of(config)
        star = PathStar(args.deg, args.path_len, args.num_nodes)
    except ValueError as error:
        raise ValueError(f"{path} is not of this version of train.py: {error}") from None
    args.out_dir = out_dir
    model = build_model(args, star)
    load_weights(model, weights, path)
    return ckpt, args, star, model.eval()


def load_weights(model, weights, path):
    """Raises ValueError if the weights, those of the file `path`, do not fit the model."""
    try:
        model.load_state_dict(weights)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} does not fit the model: {reason}") from None


def start_from(model, star, out_dir):
    """Gives a new model the weights of another run, for --init_from.

    The other run may have had another n_loop, and graphs of another size. Names that it did not
    have keep their own. So do positions of gpt that it did not have, counted from the end of the
    prefix. Raises OSError and ValueError as `load_checkpoint`, and ValueError if the weights do not
    fit.
    """
    _, _, other_star, other = load_checkpoint(out_dir)
    weights = other.state_dict()
    n_names = min(star.num_nodes, other_star.num_nodes)
    longer = star.prefix_len - other_star.prefix_len
    for name, own in model.state_dict().items():
        given = weights.get(name)
        if given is None or given.shape[1:] != own.shape[1:]:
            continue                                            # load_weights refuses it
        rows = own.clone()
        if name == "transformer.wpe.weight":
            positions = torch.arange(len(own)) - longer         # in the other run
            known = (positions >= 0) & (positions < len(given))
            rows[known] = given[positions[known]]
            weights[name] = rows
        elif (len(own), len(given)) == (star.vocab_size, other_star.vocab_size):
            rows[:n_names] = given[:n_names]
            rows[star.num_nodes:] = given[other_star.num_nodes:]
            weights[name] = rows
    load_weights(model, weights, out_dir)


@contextlib.contextmanager
def locked(out_dir):
    """Makes the folder of a run and keeps other processes from training in it.

    A process that dies lets go of its lock. Raises ValueError if another one has it, OSError if
    the folder cannot be made.
    """
    os.makedirs(out_dir, exist_ok=True)
    if fcntl is None:
        yield
        return
    lock = os.open(out_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process trains in {out_dir}") from None
        yield
    finally:
        os.close(lock)


# ---- Settings

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
TASK = {"deg": 2, "path_len": 5, "num_nodes": 10}
N_TEST = 1000


def make_parser():
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # an error is one line then
        description=__doc__,
        epilog="defaults that depend on the model:\n" + json.dumps(DEFAULTS, indent=1),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    positive_float = bounded(float, 1e-12)

    add = parser.add_argument_group("objective").add_argument
    add("--teacherless", action="store_true", help="feed $ in place of all target tokens")
    add("--reverse", action="store_true", help="write the path from goal to start")
    add("--only_first_hop", action="store_true", help="end the path after the first hop")

    add = parser.add_argument_group("task (files determine the sizes of their graphs)").add_argument
    add("--deg", type=positive_int, help=f"arms of a graph ({TASK['deg']})")
    add("--path_len", type=positive_int, help=f"nodes of a path ({TASK['path_len']})")
    add("--num_nodes", type=positive_int, help=f"names to draw from ({TASK['num_nodes']})")
    add("--n_train", type=non_negative_int, help="training graphs; 0: fresh ones in every step")
    add("--n_test", type=positive_int, help=f"test graphs ({N_TEST})")
    add("--train_file", help="take the training graphs from this file, in text form")
    add("--test_file", help="take the test graphs from this file, in text form")

    add = parser.add_argument_group("model").add_argument
    add("--model", choices=DEFAULTS, default="gpt", help="architecture (%(default)s)")
    add("--n_layer", type=positive_int, help="layers")
    add("--n_loop", type=positive_int, help="times that the layers are run, with the same weights")
    add("--n_embd", type=positive_int, help="width")
    add("--n_head", type=positive_int, help="attention heads, of gpt")
    add("--d_state", type=positive_int, help="numbers of state per channel, of mamba")
    add("--A_init", type=positive_float, help="A starts at -A_init (1, ..., d_state), of mamba")
    add("--init_from", metavar="OUT_DIR",
        help="start with the weights of another run, whose graphs and n_loop may differ")

    add = parser.add_argument_group("optimization").add_argument
    add("--batch_size", type=positive_int, help="examples in a step")
    add("--max_iters", type=positive_int, help="maximum number of steps")
    add("--lr", type=positive_float, help="highest learning rate")
    add("--decay_frac", type=positive_float,
        help="the part of the run, at its end, in which the learning rate falls to 0")
    add("--weight_decay", type=bounded(float, 0), default=0.01, help="AdamW's (%(default)s)")
    add("--warmup_iters", type=non_negative_int, default=100,
        help="steps in which the learning rate rises (%(default)s)")

    add = parser.add_argument_group("run").add_argument
    add("--eval_interval", type=positive_int, default=100, help="in steps (%(default)s)")
    add("--seed", type=non_negative_int, default=0, help="of weights and data (%(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of the forward pass (auto: bfloat16 on a GPU)")
    add("--compile", action="store_true", help="use torch.compile for the training steps")
    add("--out_dir", help="folder for log.jsonl and ckpt.pt (default: one in out/)")
    add("--overwrite", action="store_true", help="start over if there is a run in out_dir")
    add("--resume", metavar="OUT_DIR", help="go on with a run; with --max_iters, further")
    return parser


def resolve(args):
    """Sets flags that were not given. Raises ValueError for flags that contradict each other."""
    if args.only_first_hop and (args.teacherless or args.reverse):
        raise ValueError("--only_first_hop goes with neither --teacherless nor --reverse")
    if args.train_file is not None and args.n_train == 0:
        raise ValueError("--n_train 0 draws fresh graphs in every step: omit --train_file")
    defaults = dict(DEFAULTS[args.model])
    teacherless_iters = defaults.pop("max_iters_teacherless")
    if args.teacherless:
        defaults["max_iters"] = teacherless_iters
    for name in ("n_loop", "n_head", "d_state", "A_init"):
        if name not in defaults and getattr(args, name) is not None:
            raise ValueError(f"--{name} is not a setting of --model {args.model}")
    if args.train_file is not None:
        del defaults["n_train"]  # all graphs of the file
    if args.test_file is None:
        defaults["n_test"] = N_TEST
    if args.train_file is None and args.test_file is None:
        defaults.update(TASK)
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def objective_of(args):
    flags = [name for name in ("teacherless", "reverse", "only_first_hop") if getattr(args, name)]
    return "-".join(flags) or "teacher_forced"


def default_out_dir(args):
    name = f"{args.model}-{objective_of(args)}-deg{args.deg}-len{args.path_len}-seed{args.seed}"
    return os.path.join("out", name)


def refuse_to_overwrite(out_dir):
    """Raises ValueError if there is a run in the folder."""
    for file in ("ckpt.pt", "log.jsonl"):
        if os.path.exists(os.path.join(out_dir, file)):
            raise ValueError(
                f"there is a run in {out_dir}: --overwrite starts over, --out_dir takes another "
                f"folder, --resume {shlex.quote(out_dir)} goes on from a ckpt.pt"
            )


def settings_of(config):
    """The settings in a log's header. Raises ValueError unless flags can give just these."""
    parser = make_parser()
    if config.keys() != config_of(parser.parse_args([])).keys():
        raise ValueError("its settings are not those of today")
    flags = []
    for name, value in config.items():
        if value is True:
            flags.append(f"--{name}")
        elif value is not None and value is not False:
            flags.append(f"--{name}={value}")

    def refuse(message):
        raise ValueError(message)

    parser.error = refuse
    args = parser.parse_args(flags)
    resolve(args)
    if config_of(args) != config:
        raise ValueError("its settings are not what flags can give")
    return args


def load_run(flags):
    """What --resume needs -> the checkpoint, its settings, its PathStar and its model"""
    given = {word.split("=")[0] for word in sys.argv[1:] if word.startswith("--")}
    others = given - {"--resume", "--max_iters", "--device"}
    if others:
        raise ValueError(f"--resume keeps the settings of the run: omit {' '.join(sorted(others))}")
    ckpt, args, star, model = load_checkpoint(flags.resume)
    args.resume = flags.resume
    args.device = flags.device
    if flags.max_iters is not None:
        done, accuracy = [ckpt["lines"][-1][name] for name in ("iter", "accuracy")]
        if accuracy >= STOP_AT:
            raise ValueError(f"the run was solved at step {done}: omit --max_iters")
        if flags.max_iters <= done:
            raise ValueError(f"--max_iters {flags.max_iters} is too few: {done} steps are done")
        args.max_iters = flags.max_iters
        ckpt["header"]["config"]["max_iters"] = args.max_iters
        ckpt["header"]["command"] += f" && {command_line()}"
    return ckpt, args, star, model


def load_graphs(args, expected_digest=None):
    """-> the PathStar, the training set and the test set of a run. Sets sizes left to files.

    Raises ValueError and OSError as `datasets`, and ValueError for graphs that do not have the
    expected digest.
    """
    star, train_set, test_set = datasets(
        args.deg, args.path_len, args.num_nodes, args.n_train, args.n_test, args.seed,
        args.train_file, args.test_file
    )
    args.deg, args.path_len, args.num_nodes = star.deg, star.path_len, star.num_nodes
    args.n_train, args.n_test = len(train_set[0]), len(test_set[0])
    if expected_digest not in (None, digest(train_set, test_set)):
        raise ValueError("the graphs are not those of the run: a file has changed, or NumPy")
    if 0 < args.n_train < args.batch_size:
        raise ValueError(f"--batch_size {args.batch_size} is more than {args.n_train} graphs")
    return star, train_set, test_set


def run(args, star, train_set, test_set, model, device, ckpt):
    """Starts a run, or goes on with it from its checkpoint, and prints the verdict at its end."""
    model.to(device)
    optimizer = make_optimizer(model, args)
    header, lines = make_header(args, train_set, test_set, device), []
    if ckpt is not None:
        optimizer.load_state_dict(ckpt["optimizer"])
        header, lines = ckpt["header"], ckpt["lines"]
        # A killed run may lack the last line of its log. And a new max_iters is to be kept.
        save(args.out_dir, model, optimizer, header, lines)
    n_params = sum(p.numel() for p in model.parameters())
    print(f"{args.model}, {n_params:,} parameters, {star}, {device} -> {args.out_dir}", flush=True)
    try:
        train(args, star, train_set, test_set, model, optimizer, header, lines)
    except KeyboardInterrupt:
        if not lines:
            sys.exit("interrupted before the first checkpoint")
        sys.exit(f"interrupted. To go on: python train.py --resume {shlex.quote(args.out_dir)}")
    print(verdict(lines[-1], args, args.n_test))


def main():
    parser = make_parser()
    args = parser.parse_args()
    ckpt = None
    with contextlib.ExitStack() as stack:
        try:  # what a user can get wrong shows here, in one line
            if args.resume is not None:
                if os.path.isdir(args.resume):  # else there is no run in it, which load_run says
                    stack.enter_context(locked(args.resume))
                ckpt, args, star, model = load_run(args)
            else:
                resolve(args)
            device = choose_device(args.device)
            if args.dtype == "auto":
                bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
                args.dtype = "bfloat16" if bfloat16 else "float32"
            star, train_set, test_set = load_graphs(args, ckpt and ckpt["header"]["data"])
            if ckpt is None:
                args.out_dir = args.out_dir or default_out_dir(args)
                torch.manual_seed(args.seed)
                model = build_model(args, star)
                if args.init_from is not None:
                    start_from(model, star, args.init_from)
                stack.enter_context(locked(args.out_dir))
                if not args.overwrite:
                    refuse_to_overwrite(args.out_dir)
        except (ValueError, OSError, MemoryError) as error:
            parser.error(str(error) or "not enough memory")
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):
                raise
            parser.error("not enough memory for so large a model")
        run(args, star, train_set, test_set, model, device, ckpt)


if __name__ == "__main__":
    run_script(main)
