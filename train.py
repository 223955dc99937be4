"""Trains a model to find the path in path-star graphs. Does it learn to plan, or to cheat?

There are three ways to train (Bachmann & Nagarajan 2024, figure 1). With a prefix p and the target
path 7 3 9:

    teacher forcing (default)   input  p 7 3     to predict  7 3 9     from the true tokens before
    --teacherless               input  p $ $     to predict  7 3 9     from the prefix alone
    --reverse                   input  p 9 3     to predict  9 3 7     from goal to start

Every evaluation keeps two phases apart. In *inference* (`accuracy`, `node_accuracy`) the model
reads its own tokens, or only $ (teacherless). In the *forced* phase (`forced_accuracy`,
`forced_node_accuracy`) it reads the true ones, as in teacher-forced training.

    python train.py --model mamba --teacherless
"""
import argparse
import json
import math
import os
import platform
import shlex
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from data import (
    PathStar, batch_indices, datasets, draw_unseen, keys, non_negative_int, positive_int
)

# ---- Settings

SOLVED = 0.99        # the accuracy from which the verdict is: solved
STOP_AT = 0.995      # the accuracy at which a run stops
EVAL_BATCH = 128     # test graphs in one pass: few, so that they stay in the cache of a CPU
N_SAMPLES = 8        # test graphs whose answers stand in the log
RANK = int(os.environ.get("RANK", 0))              # of this process; torchrun sets it
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # the number of processes; torchrun sets it

DEFAULTS = {
    "gpt": {
        "n_layer": 6, "n_embd": 64, "n_head": 4,
        "n_train": 20_000, "batch_size": 128, "lr": 1e-3, "decay_frac": 1 / 3,
    },
    "mamba": {
        "n_layer": 6, "n_embd": 64, "d_state": 16,
        "n_train": 100_000, "batch_size": 64, "lr": 6e-3, "decay_frac": 1.0,
    },
}
MAX_ITERS = {
    "gpt": {"teacherless": 8000, "others": 1000},
    "mamba": {"teacherless": 2000, "others": 1000},
}


def positive_float(text):
    """For argparse: raises ArgumentTypeError unless the text is a finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return value


def non_negative_float(text):
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be finite and not negative, got {text}")
    return value


def make_parser():
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # an error is one line then
        description=__doc__,
        epilog=f"defaults that depend on the model: {DEFAULTS}\nmax_iters: {MAX_ITERS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("objective").add_argument
    add("--teacherless", action="store_true", help="feed $ in place of all target tokens")
    add("--reverse", action="store_true", help="write the path from goal to start")
    add("--only_first_hop", action="store_true", help="end the path after the first hop")

    add = parser.add_argument_group("task (files determine the sizes of their graphs)").add_argument
    add("--deg", type=positive_int, help="arms of a graph (2)")
    add("--path_len", type=positive_int, help="nodes on a path, with the start (5)")
    add("--num_nodes", type=positive_int, help="names to draw from (10)")
    add("--n_train", type=non_negative_int, help="training graphs; 0: fresh ones in every step")
    add("--n_test", type=positive_int, help="test graphs (1000)")
    add("--train_file", help="take the training graphs from this file, in text form")
    add("--test_file", help="take the test graphs from this file, in text form")

    add = parser.add_argument_group("model").add_argument
    add("--model", choices=DEFAULTS, default="gpt", help="architecture (%(default)s)")
    add("--n_layer", type=positive_int, help="layers")
    add("--n_embd", type=positive_int, help="width")
    add("--n_head", type=positive_int, help="attention heads")
    add("--d_state", type=positive_int, help="numbers of state per channel")

    add = parser.add_argument_group("optimization").add_argument
    add("--batch_size", type=positive_int, help="examples in a step")
    add("--max_iters", type=positive_int, help="steps at most")
    add("--lr", type=positive_float, help="peak learning rate")
    add("--decay_frac", type=positive_float,
        help="the part of the run, at its end, in which the learning rate falls to 0")
    add("--weight_decay", type=non_negative_float, default=0.01, help="AdamW's (%(default)s)")
    add("--warmup_iters", type=non_negative_int, default=100, help="steps to peak (%(default)s)")

    add = parser.add_argument_group("run").add_argument
    add("--eval_interval", type=positive_int, default=100, help="in steps (%(default)s)")
    add("--seed", type=non_negative_int, default=0, help="of weights and data (%(default)s)")
    add("--device", default="auto", help="cpu, cuda, ... (auto: cuda if there is a GPU)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of the forward pass (auto: bfloat16 on a GPU)")
    add("--compile", action="store_true", help="use torch.compile for the training steps")
    add("--out_dir", help="folder for log.jsonl and ckpt.pt (out/ and a name)")
    add("--overwrite", action="store_true", help="start over if there is a run in out_dir")
    add("--resume", metavar="OUT_DIR", help="go on with a run; goes with --max_iters only")
    return parser


def fill_in_defaults(args):
    """Sets flags that were not given. Raises ValueError for flags that contradict each other."""
    if args.only_first_hop and (args.teacherless or args.reverse):
        raise ValueError("--only_first_hop goes with neither --teacherless nor --reverse")
    if args.train_file is not None and args.n_train == 0:
        raise ValueError("--n_train 0 draws fresh graphs in every step: omit --train_file")
    defaults = dict(DEFAULTS[args.model])
    for name in ("n_head", "d_state"):
        if name not in defaults and getattr(args, name) is not None:
            raise ValueError(f"--{name} is not a setting of --model {args.model}")
    defaults["n_test"] = 1000
    defaults["max_iters"] = MAX_ITERS[args.model]["teacherless" if args.teacherless else "others"]
    if args.train_file is None and args.test_file is None:
        defaults.update(deg=2, path_len=5, num_nodes=10)
    if args.train_file is not None:
        del defaults["n_train"]  # all graphs of the file
    if args.test_file is not None:
        del defaults["n_test"]
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def new_out_dir(args):
    """The folder of a new run. Raises ValueError if there is a run in it already."""
    flags = [name for name in ("teacherless", "reverse", "only_first_hop") if getattr(args, name)]
    objective = "-".join(flags) or "teacher_forced"
    name = f"{args.model}-{objective}-deg{args.deg}-len{args.path_len}-seed{args.seed}"
    out_dir = args.out_dir or os.path.join("out", name)
    for file in ("ckpt.pt", "log.jsonl"):
        if os.path.exists(os.path.join(out_dir, file)) and not args.overwrite:
            raise ValueError(
                f"there is a run in {out_dir}: --resume {out_dir} goes on with it, --overwrite "
                "starts over, --out_dir takes another folder"
            )
    return out_dir


# ---- Three ways to train


def prompts_and_targets(args, prefixes, paths):
    """What the model is given (n, prefix_len), and what it has to write (n, target_len)."""
    prompts = torch.from_numpy(prefixes)
    targets = torch.from_numpy(paths)
    if args.reverse:
        targets = targets.flip(1)
    if args.only_first_hop:
        targets = targets[:, :2]
    return prompts, targets


def model_input(prompts, fed):
    """The prompts, then all tokens of `fed` but the last, as nothing is predicted after it.

    `fed` is the targets themselves (teacher forcing), or as many $ (teacherless).
    """
    return torch.cat([prompts, fed[:, :-1]], dim=1)


def loss_targets(prompts, targets):
    """The token that each position of the input has to predict: -1, for none, in the prompt."""
    return torch.cat([torch.full_like(prompts[:, 1:], -1), targets], dim=1)


def training_tokens(args, star, prefixes, paths):
    """-> the model's inputs and loss targets, (n, prefix_len + target_len - 1) both"""
    prompts, targets = prompts_and_targets(args, prefixes, paths)
    fed = torch.full_like(targets, star.dollar) if args.teacherless else targets
    return model_input(prompts, fed), loss_targets(prompts, targets)


# ---- Two phases of evaluation


def predict_in_one_pass(model, prompts, fed):
    """-> the tokens predicted at the places of the targets (n, target_len)"""
    logits, _ = model(model_input(prompts, fed))
    return logits[:, -fed.size(1):].argmax(dim=2)


@torch.no_grad()
def predict(model, prompts, targets, dollar=None):
    """-> the model's answers and its forced predictions, (n, target_len) both

    Inference sees the prompts only. It writes one token at a time, or, with the token `dollar`
    (teacherless), all tokens at once. The forced phase sees the true tokens before each target.
    Teacherless training has no such phase: None.
    """
    answers, forced = [], []
    for prompt, target in zip(prompts.split(EVAL_BATCH), targets.split(EVAL_BATCH)):
        if dollar is None:
            answers.append(model.generate(prompt, target.size(1))[:, prompt.size(1):])
            forced.append(predict_in_one_pass(model, prompt, target))
        else:
            answers.append(predict_in_one_pass(model, prompt, torch.full_like(target, dollar)))
    return torch.cat(answers), torch.cat(forced) if forced else None


def from_start(args, written):
    """What the model writes (n, target_len, ...), in the order from start to goal."""
    return written.flip(1) if args.reverse else written


@torch.no_grad()
def probabilities(args, model, prompts, answers, dollar=None):
    """What the model gives each token at each place of its answers, from start to goal.

    -> (n, target_len, vocab_size). Inference read its own tokens, or `dollar`: so does this pass.
    """
    fed = answers if dollar is None else torch.full_like(answers, dollar)
    logits, _ = model(model_input(prompts, fed))
    return from_start(args, logits[:, -fed.size(1):].float().softmax(dim=2))


def samples(args, model, prompts, answers, paths, dollar=None):
    """-> [{"answer": its nodes from start to goal, "first_hop": the probability of the right one}]
    """
    p = probabilities(args, model, prompts, answers, dollar)
    result = []
    for i, answer in enumerate(from_start(args, answers).tolist()):
        result.append({"answer": answer, "first_hop": round(p[i, 1, paths[i, 1]].item(), 4)})
    return result


def summary(answers, forced, targets):
    """The shares of right answers in what `predict` returns, as a dict.

    accuracy: all tokens right. node_accuracy: each token, in the order of writing. cheat_accuracy:
    all tokens after the second right, forced. Unless the path is reversed, these are the nodes
    after the first hop. The cheat gets them right, without any plan.
    """
    right = (answers == targets).double()
    result = {
        "accuracy": right.prod(dim=1).mean().item(),
        "node_accuracy": right.mean(dim=0).tolist(),
        "forced_accuracy": None,
        "forced_node_accuracy": None,
        "cheat_accuracy": None,
    }
    if forced is not None:
        right = (forced == targets).double()
        result["forced_accuracy"] = right.prod(dim=1).mean().item()
        result["forced_node_accuracy"] = right.mean(dim=0).tolist()
        if right.size(1) > 2:
            result["cheat_accuracy"] = right[:, 2:].prod(dim=1).mean().item()
    return result


def verdict(result, args, n_test):
    """What an evaluation on n_test graphs shows, in a sentence."""
    accuracy = result["accuracy"]
    chance = 1 / args.deg
    # Four standard errors of the accuracy of a guesser, and a little more. With many arms this
    # would reach down to 0, where a model is that has learned nothing.
    margin = min(0.02 + 4 * math.sqrt(chance * (1 - chance) / n_test), chance / 2)
    shown = f"accuracy {accuracy:.1%}, where guessing an arm gives {chance:.1%}"
    if n_test < 100:
        return f"{shown}: too few graphs ({n_test}) to say what was learned."
    if accuracy >= SOLVED:
        found = "first hop" if args.only_first_hop else "path"
        return f"{shown}: solved, the model finds the {found}."
    if args.only_first_hop and abs(accuracy - chance) < margin:
        return f"{shown}: the first hop alone is not learned (the indecipherable token)."
    nodes = result["forced_node_accuracy"]
    if nodes is not None and len(nodes) > 2 and not args.reverse:
        first_hop, later = nodes[1], min(nodes[2:])
        if abs(first_hop - chance) < margin and later >= 0.99:
            return (
                f"{shown}: the Clever Hans cheat. Given the true nodes before, the first hop is "
                f"right {first_hop:.1%} of the time, a guess; the worst later node {later:.1%}, a "
                "look-up."
            )
    return f"{shown}: neither solved nor the cheat. Not trained enough, or on too few graphs."


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


# ---- Model, optimizer, checkpoint


def build_model(args, star):
    if args.model == "gpt":
        from model_gpt import GPT, GPTConfig  # here, so that one model's file is enough for a run
        longest = star.prefix_len + star.path_len - 1
        return GPT(GPTConfig(longest, star.vocab_size, args.n_layer, args.n_head, args.n_embd))
    from model_mamba import Mamba, MambaConfig
    return Mamba(MambaConfig(star.vocab_size, args.n_layer, args.n_embd, args.d_state))


def make_optimizer(model, args, device):
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
    return torch.optim.AdamW(groups, lr=args.lr, fused=device.type == "cuda")


def learning_rate(args, step):
    """Rises over the first warmup_iters steps, and falls to 0 over the last part of max_iters.

    decay_frac is the size of that part. The rate leaps up where a run goes on with a larger
    max_iters than before.
    """
    rise = (step + 1) / (args.warmup_iters + 1)
    fall = (1 - step / args.max_iters) / args.decay_frac
    return args.lr * min(1.0, rise, fall)


def choose_device(name):
    """Raises ValueError if the device cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"    # torchrun sets it
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def choose_dtype(name, device):
    if name == "auto":
        name = "float32"
        if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            name = "bfloat16"
    return getattr(torch, name)


def save(out_dir, model, optimizer, log):
    """Writes ckpt.pt, with the log in it, and then log.jsonl from the log.

    Each file is first written beside the old one and then takes its place. So there is a whole
    checkpoint at every moment.
    """
    ckpt = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "log": log}
    path = os.path.join(out_dir, "ckpt.pt")
    try:
        torch.save(ckpt, path + ".tmp")
        os.replace(path + ".tmp", path)
        write_log(out_dir, log)
    except (OSError, RuntimeError) as error:  # PyTorch raises RuntimeError if the disk is full
        sys.exit(f"cannot write to {out_dir}: {error}")


def write_log(out_dir, log):
    path = os.path.join(out_dir, "log.jsonl")
    with open(path + ".tmp", "w") as file:
        for line in log:
            print(json.dumps(line), file=file)
    os.replace(path + ".tmp", path)


def load_checkpoint(out_dir):
    """-> the checkpoint of a run, its flags, its PathStar and its model, on the CPU

    Raises OSError if there is no ckpt.pt in the folder, ValueError if it is not one of train.py.
    No code in the file is run.
    """
    path = os.path.join(out_dir, "ckpt.pt")
    open(path, "rb").close()  # raises OSError if there is no such file, or it may not be read
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        args = argparse.Namespace(**ckpt["log"][0]["config"])
        star = PathStar(args.deg, args.path_len, args.num_nodes)
        model = build_model(args, star)
        model.load_state_dict(ckpt["model"])
    except Exception as error:
        reason = f"{type(error).__name__} {str(error).split('.')[0]}"
        raise ValueError(f"{path} does not hold a run of train.py: {reason}") from None
    return ckpt, args, star, model


def resume(flags):
    """-> the checkpoint of the run to go on with, its flags and its model"""
    given = {word.split("=")[0] for word in sys.argv[1:] if word.startswith("--")}
    others = given - {"--resume", "--max_iters"}
    if others:
        raise ValueError(f"--resume keeps the settings of the run: omit {' '.join(sorted(others))}")
    ckpt, args, _, model = load_checkpoint(flags.resume)
    if "optimizer" not in ckpt or vars(flags).keys() - vars(args).keys():
        raise ValueError(f"the run in {flags.resume} is not one of this version of train.py")
    args.out_dir = flags.resume
    if flags.max_iters is not None:
        args.max_iters = flags.max_iters
    done = ckpt["log"][-1]["iter"]
    if args.max_iters < done:
        raise ValueError(f"--max_iters {args.max_iters} is too few: {done} steps are done")
    return ckpt, args, model


# ---- The run


def log_header(args, device):
    """The first line of a log: how the run was started, with what versions, and where."""
    machine = f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine += f", {torch.cuda.get_device_name(device)}"
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    versions["numpy"] = np.__version__
    command = shlex.join(["python", "train.py", *sys.argv[1:]])
    return {"command": command, "config": vars(args), "versions": versions, "machine": machine}


def mean_loss(losses):
    """The mean over the steps, and over the processes."""
    mean = torch.stack(losses).mean()
    if WORLD_SIZE > 1:
        dist.all_reduce(mean)
    return mean.item() / WORLD_SIZE


def evaluate(args, star, model, test_set, device, autocast):
    """-> the `summary` for the test set, and `samples`, the same dict in every process"""
    shared = [None]
    if RANK == 0:
        prompts, targets = prompts_and_targets(args, *test_set)
        prompts, targets = prompts.to(device), targets.to(device)
        dollar = star.dollar if args.teacherless else None
        _, paths = test_set
        first = slice(N_SAMPLES)
        with autocast:
            answers, forced = predict(model, prompts, targets, dollar)
            shown = samples(args, model, prompts[first], answers[first], paths[first], dollar)
        shared = [{**summary(answers, forced, targets), "samples": shown}]
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(shared)
    return shared[0]


def stop_if_not_finite(args, step, train_loss, model):
    if math.isfinite(train_loss) and all(p.isfinite().all() for p in model.parameters()):
        return
    if RANK == 0:
        print(
            f"the loss or a weight became infinite or NaN before step {step}. The last good "
            f"checkpoint is in {args.out_dir}; a smaller --lr may help", file=sys.stderr
        )
    sys.exit(1)


def train(args, star, train_set, test_set, model, optimizer, device, log):
    """Goes on from the last line of the log to the end of the run."""
    dtype = choose_dtype(args.dtype, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    step_model = torch.compile(model) if args.compile else model
    if WORLD_SIZE > 1:
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
        step_model = DistributedDataParallel(step_model)
    inputs, targets = training_tokens(args, star, *train_set)
    inputs, targets = inputs.to(device), targets.to(device)
    test_keys = set(keys(test_set[0]))

    def get_batch(step):
        """-> inputs and loss targets; of the batch of all processes, every WORLD_SIZE-th row"""
        if args.n_train > 0:
            indices = batch_indices(args.n_train, args.batch_size, args.seed, step)
            indices = torch.from_numpy(indices[RANK::WORLD_SIZE]).to(device)
            return inputs[indices], targets[indices]
        rng = np.random.default_rng([args.seed, 2, step])
        graphs = draw_unseen(star, args.batch_size, rng, test_keys, distinct=False)
        x, y = training_tokens(args, star, *graphs)
        return x[RANK::WORLD_SIZE].to(device), y[RANK::WORLD_SIZE].to(device)

    step = log[-1].get("iter", 0)  # the header has none
    began = time.time() - log[-1].get("elapsed_s", 0.0)
    losses = []
    while True:
        due = step % args.eval_interval == 0 or step == args.max_iters
        if due and log[-1].get("iter") != step:
            train_loss = None
            if step > 0:
                train_loss = mean_loss(losses)
                stop_if_not_finite(args, step, train_loss, model)
                losses = []
            result = evaluate(args, star, model, test_set, device, autocast)
            line = {"iter": step, "examples": step * args.batch_size}
            line["elapsed_s"] = round(time.time() - began, 2)
            line.update(train_loss=train_loss, lr=learning_rate(args, step), **result)
            log.append(line)
            if RANK == 0:
                save(args.out_dir, model, optimizer, log)
                print(progress(line, args), flush=True)
        if step >= args.max_iters or log[-1]["accuracy"] >= STOP_AT:
            break

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
        step += 1

    if WORLD_SIZE > 1:
        dist.barrier()  # no process leaves while another still sends
        del step_model  # it must let go of the group first: else the exit hangs now and then
        dist.destroy_process_group()


def main():
    parser = make_parser()
    args = parser.parse_args()
    ckpt = None
    try:  # whatever is wrong with flags and files shows here, before anything is written
        if args.resume is None:
            fill_in_defaults(args)
        else:
            ckpt, args, model = resume(args)
        star, train_set, test_set = datasets(
            args.deg, args.path_len, args.num_nodes, args.n_train, args.n_test, args.seed,
            args.train_file, args.test_file
        )
        args.deg, args.path_len, args.num_nodes = star.deg, star.path_len, star.num_nodes
        args.n_train, args.n_test = len(train_set[0]), len(test_set[0])
        device = choose_device(args.device)
        if ckpt is None:
            args.out_dir = new_out_dir(args)
            torch.manual_seed(args.seed)
            model = build_model(args, star)
        if args.batch_size % WORLD_SIZE > 0:
            raise ValueError(f"--batch_size must be a multiple of the {WORLD_SIZE} processes")
        model.to(device)
        optimizer = make_optimizer(model, args, device)
        if ckpt is None:
            log = [log_header(args, device)]
            os.makedirs(args.out_dir, exist_ok=True)
        else:
            optimizer.load_state_dict(ckpt["optimizer"])
            log = ckpt["log"]
            log[0]["config"] = vars(args)
            if RANK == 0:
                write_log(args.out_dir, log)  # a killed run may lack its last line
    except (ValueError, KeyError, OSError, RuntimeError, MemoryError, ImportError) as error:
        parser.error(" ".join(str(error).split()))

    if RANK == 0:
        n_params = sum(p.numel() for p in model.parameters())
        run = f"{args.model}, {n_params:,} parameters, {star}, {device} -> {args.out_dir}"
        print(run, flush=True)
    try:
        train(args, star, train_set, test_set, model, optimizer, device, log)
    except KeyboardInterrupt:
        if len(log) == 1:
            sys.exit("interrupted before the first checkpoint")
        sys.exit(f"interrupted. To go on: python train.py --resume {shlex.quote(args.out_dir)}")
    if RANK == 0:
        print(verdict(log[-1], args, args.n_test))


if __name__ == "__main__":
    main()
