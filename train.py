"""Trains a model to find the path in path-star graphs, and shows whether it learned to plan or to cheat.

Three ways to train (Bachmann & Nagarajan 2024, figure 1), one loop. With a prefix p and a target path 7 3 9:

    teacher forcing (default)   input  p 7 3     to predict  7 3 9     each token from the true ones before it
    --teacherless               input  p $ $     to predict  7 3 9     each token from the prefix alone
    --reverse                   input  p 9 3     to predict  9 3 7     the path written from goal to start

Two phases are kept apart in every evaluation: *inference* (`accuracy`, `node_accuracy`), where the model reads its own
tokens, and the *forced* pass (`forced_accuracy`, `forced_node_accuracy`), where it reads the true ones as in training.

    python train.py --model mamba --teacherless
"""
import argparse
import dataclasses
import importlib
import json
import os
import platform
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from data import Flags, PathStar, batch_indices, datasets, draw_unseen, keys, verdict

MODELS = {"gpt": "GPT", "mamba": "Mamba"}  # name: class, in model_<name>.py, with its settings in <class>Config
FIELDS = {"n_layer": "n_layer", "n_embd": "n_embd", "d_model": "n_embd", "n_head": "n_head", "d_state": "d_state"}
                                           # field of a model's config: the flag that sets it
SOLVED = 0.995                             # the accuracy at which a run stops
SIGNALS = []                               # Ctrl-C and the like, as they come in


def make_flags():
    """-> the parser, which returns only the flags that were given; and all defaults, a dict where they depend on the model."""
    flags, defaults = Flags(__doc__), {}

    def add(name, default, text, **options):
        if default is False:
            options["action"] = "store_true"
        elif "type" not in options:
            options["type"] = type(next(iter(default.values())) if isinstance(default, dict) else default)
        shown = ", ".join(f"{model} {value}" for model, value in default.items()) if isinstance(default, dict) else default
        group.add_argument(f"--{name}", default=argparse.SUPPRESS, help=f"{text} (default: {shown})", **options)
        defaults[name] = default

    group = flags.add_argument_group("objective")
    add("teacherless", False, "predict all target tokens from the prefix alone, $ in their place in the input")
    add("reverse", False, "write the path from goal to start")
    add("only_first_hop", False, "put the loss on the first hop alone; accuracy is then that of the first hop")
    group = flags.add_argument_group("task")
    add("deg", 2, "arms of a graph")
    add("path_len", 5, "nodes on a path, the start included")
    add("num_nodes", 10, "names to draw from; with files, by default as many as occur")
    add("n_train", {"gpt": 20000, "mamba": 100000}, "training graphs, or lines of --train_file (all); 0: always fresh ones")
    add("n_test", 1000, "test graphs, or lines of --test_file (all by default)")
    add("train_file", None, "training graphs in text form", type=str)
    add("test_file", None, "test graphs in text form", type=str)
    group = flags.add_argument_group("model")
    add("model", "gpt", "architecture", choices=MODELS)
    add("n_layer", {"gpt": 6, "mamba": 3}, "layers")
    add("n_embd", {"gpt": 64, "mamba": 128}, "width")
    add("n_head", {"gpt": 4}, "attention heads")
    add("d_state", {"mamba": 16}, "numbers of state per channel")
    group = flags.add_argument_group("optimization")
    add("batch_size", 128, "examples a step, over all processes")
    add("max_iters", {"gpt": 2000, "gpt --teacherless": 6000, "mamba": 1000, "mamba --teacherless": 3000},
        f"steps at most; a run stops when accuracy reaches {SOLVED}")
    add("lr", {"gpt": 1e-3, "mamba": 2e-3}, "learning rate after the warm-up; over the last third of max_iters it falls to 0")
    add("weight_decay", 0.01, "AdamW's, on matrices")
    add("warmup_iters", 100, "steps over which the learning rate rises from 0")
    group = flags.add_argument_group("run")
    add("eval_interval", 100, "steps between evaluations")
    add("seed", 0, "of weights and data")
    add("device", "auto", "cpu, cuda, ... (auto: cuda where there is one)")
    add("dtype", "auto", "of the forward pass (auto: bfloat16 on a GPU)", choices=("auto", "float32", "bfloat16"))
    add("compile", False, "compile the training step's model with torch.compile")
    add("out_dir", None, "where log.jsonl and ckpt.pt go, by default out/ and a name made of the flags", type=str)
    add("resume", False, "go on with the run in out_dir, with the flags recorded there")
    add("overwrite", False, "start over where out_dir holds a run already")
    return flags, defaults


def model_class(name):
    """-> the model's class, its config's class, and the names of the config's fields"""
    module = importlib.import_module(f"model_{name}")
    Config = getattr(module, MODELS[name] + "Config")
    return getattr(module, MODELS[name]), Config, {field.name for field in dataclasses.fields(Config)}


def resolve(given, defaults):
    """The flags that were given, and defaults for the rest. Raises ValueError for a combination that makes no sense."""
    name = given.get("model", defaults["model"])
    which = f"{name} --teacherless" if given.get("teacherless") else name
    config = {flag: d.get(which, d.get(name, [*d.values()][0])) if isinstance(d, dict) else d for flag, d in defaults.items()}
    settings = [FIELDS[field] for field in FIELDS if field in model_class(name)[2]]
    for flag in set(FIELDS.values()) - set(settings):
        if flag in given:
            raise ValueError(f"--{flag} is not a setting of --model {name}, which has --" + " --".join(settings))
        config[flag] = None
    for file, number in (("train_file", "n_train"), ("test_file", "n_test")):
        if file in given:
            config.update({number: None, "deg": None, "path_len": None, "num_nodes": None})
    config.update(given)
    for flag, value in config.items():
        may_be_0 = flag in ("n_train", "weight_decay", "warmup_iters", "seed")
        if type(value) in (int, float) and not (0 < value < float("inf") or may_be_0 and value == 0):
            raise ValueError(f"--{flag} must {'not be negative' if may_be_0 else 'be positive'}, got {value}")
    if config["only_first_hop"] and (config["teacherless"] or config["reverse"]):
        raise ValueError("--only_first_hop predicts one token, from the prefix and the start: it goes neither with "
                         "--teacherless (nothing is fed in that could be hidden) nor with --reverse (the hop comes last)")
    if config["train_file"] and config["n_train"] == 0:
        raise ValueError("--n_train 0 draws a fresh graph for every example: leave --train_file away, or ask for more")
    return config


def out_dir_of(config, given):
    """A folder's name that tells runs apart: model, objective, graph, seed, and what was given that makes another run."""
    objective = "-".join(o for o in ("teacherless", "reverse", "only_first_hop") if config[o]) or "teacher_forced"
    graph = f"deg{config['deg']}-len{config['path_len']}-names{config['num_nodes']}"
    others = "n_train train_file n_layer n_embd n_head d_state batch_size lr weight_decay warmup_iters".split()
    more = "".join(f"-{flag}{os.path.basename(str(given[flag]))}" for flag in others if flag in given)
    return os.path.join("out", f"{config['model']}-{objective}-{graph}-seed{config['seed']}{more}")


def build_model(config, star):
    model, Config, fields = model_class(config["model"])
    settings = {field: config[flag] for field, flag in FIELDS.items()} | {
        "vocab_size": star.vocab_size, "block_size": star.prefix_len + star.path_len - 1}  # the last target is never read
    return model(Config(**{field: value for field, value in settings.items() if field in fields}))


def load_run(out_dir):
    """-> the checkpoint in out_dir, its PathStar and model. Raises OSError where there is none, ValueError for another's."""
    file = os.path.join(out_dir, "ckpt.pt")
    open(file, "rb").close()
    try:                                   # whatever a stranger's file makes go wrong, this is what is wrong with it
        ckpt = torch.load(file, map_location="cpu", weights_only=True)
        star = PathStar(*(ckpt["config"][flag] for flag in ("deg", "path_len", "num_nodes")))
        model = build_model(ckpt["config"], star)
        model.load_state_dict(ckpt["model"])
        make_optimizer(model, ckpt["config"], torch.device("cpu")).load_state_dict(ckpt["optimizer"])
        ckpt["iter"], ckpt["elapsed_s"], ckpt["result"], ckpt["losses"]
    except Exception as error:
        raise ValueError(f"{file} does not hold a run of train.py: {type(error).__name__} {str(error)[:200]}") from None
    return ckpt, star, model


def save(ckpt, out_dir):
    file = os.path.join(out_dir, "ckpt.pt")
    torch.save(ckpt, file + ".tmp")        # never half a checkpoint: the old one stays until the new one is whole
    os.replace(file + ".tmp", file)


def prompts_and_targets(config, prefixes, paths):
    """The tokens that inference starts from (n, prompt_len), and those to be written after them (n, target_len)."""
    prefixes, paths = torch.from_numpy(prefixes), torch.from_numpy(paths)
    if config["only_first_hop"]:
        return torch.cat([prefixes, paths[:, :1]], dim=1), paths[:, 1:2]
    return prefixes, paths.flip(1) if config["reverse"] else paths


def model_input(prompts, targets, dollar=None):
    """The prompts and, behind them, the targets but the last: the true ones (teacher forcing), or `dollar` in their place."""
    return torch.cat([prompts, targets[:, :-1] if dollar is None else torch.full_like(targets[:, :-1], dollar)], dim=1)


def loss_targets(prompts, targets):
    """What each position of the input is to predict: -1, nothing, within the prompt."""
    return torch.cat([torch.full_like(prompts[:, 1:], -1), targets], dim=1)


@torch.no_grad()
def predict(model, prompts, targets, dollar, at_once=1000):
    """-> two (n, target_len) tensors of predicted tokens: by the model's own inference, and forced.

    Inference sees the prompts only: greedy and one token at a time, or, where dollar is not None (teacherless), all tokens
    in one pass. The forced pass sees the true tokens before each one; teacherless there is none, and it is None.
    """
    own, forced = [], []
    for prompt, target in zip(prompts.split(at_once), targets.split(at_once)):
        if dollar is not None:
            own.append(model(model_input(prompt, target, dollar), all_logits=True)[0][:, prompt.size(1) - 1:].argmax(dim=2))
            continue
        cache = model.new_cache()                                    # both phases continue from the prompt, each from a copy
        first, fed = model(prompt, cache=cache)[0].argmax(dim=2), target[:, :-1]
        own.append(model.generate(first, fed.size(1), [dict(layer) for layer in cache]))
        later = [model(fed, cache=cache, all_logits=True)[0].argmax(dim=2)] if fed.size(1) else []
        forced.append(torch.cat([first, *later], dim=1))
    return torch.cat(own), torch.cat(forced) if forced else None


def summary(own, forced, targets):
    """The shares of right answers in what `predict` returned: whole, by token, and the cheat (after the first hop, forced)."""
    result = {"cheat_accuracy": None}
    for phase, tokens in (("", own), ("forced_", forced)):
        right = None if tokens is None else (tokens == targets).double()
        result[phase + "accuracy"] = None if right is None else right.prod(dim=1).mean().item()
        result[phase + "node_accuracy"] = None if right is None else right.mean(dim=0).tolist()
        if phase and targets.size(1) > 2 and right is not None:
            result["cheat_accuracy"] = right[:, 2:].prod(dim=1).mean().item()
    return result


def report(line, config):
    """A log line to read."""
    def percent(what, shares):
        return f" | {what} " + " ".join(f"{100 * share:.0f}" for share in shares) if shares else ""
    loss = f" | loss {line['train_loss']:.4f}" if line["train_loss"] is not None else ""
    left = int((config["max_iters"] - line["iter"]) * line["elapsed_s"] / max(1, line["iter"]))
    return (f"iter {line['iter']:5}{loss} | accuracy {line['accuracy']:6.1%} (guessing: {1 / config['deg']:.0%})"
            + percent("nodes", line["node_accuracy"]) + percent("forced", line["forced_node_accuracy"])
            + f" | {left // 60}:{left % 60:02} left" * (line["iter"] > 0))


def make_optimizer(model, config, device):
    decayed, other = [], []
    for p in model.parameters():
        (decayed if p.dim() >= 2 and not getattr(p, "_no_weight_decay", False) else other).append(p)
    groups = [{"params": decayed, "weight_decay": config["weight_decay"]}, {"params": other, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config["lr"], fused=device.type == "cuda")


def setup(given, defaults, rank, world):
    """Everything that can be wrong, before anything is written -> config, checkpoint or None, data, model, device, dtype."""
    config, ckpt = resolve(given, defaults), None
    if config["resume"]:
        if config["out_dir"] is None and config["deg"] is None:
            raise ValueError("--resume needs --out_dir where the graphs come from files")
        out_dir = config["out_dir"] or out_dir_of(config, given)
        try:
            ckpt, _, model = load_run(out_dir)
            recorded = ckpt["config"]
        except FileNotFoundError:          # killed before its first checkpoint
            with open(os.path.join(out_dir, "log.jsonl")) as f:
                recorded = json.loads(f.readline())["config"]
        for flag in given.keys() - {"resume", "out_dir", "max_iters"}:
            if given[flag] != recorded.get(flag):
                raise ValueError(f"--{flag} {given[flag]} contradicts the run to resume, which has {recorded.get(flag)}")
        config = recorded | {"out_dir": out_dir, "max_iters": given.get("max_iters", recorded["max_iters"])}
    star, train, test, warnings = datasets(**{name: config[name] for name in (
        "deg", "path_len", "num_nodes", "n_train", "n_test", "seed", "train_file", "test_file")})
    config.update(deg=star.deg, path_len=star.path_len, num_nodes=star.num_nodes, n_train=len(train[0]), n_test=len(test[0]))
    config["out_dir"] = config["out_dir"] or out_dir_of(config, given)
    held = any(os.path.exists(os.path.join(config["out_dir"], file)) for file in ("log.jsonl", "ckpt.pt"))
    if held and not given.get("resume") and not config["overwrite"] and rank == 0:
        raise ValueError(f"{config['out_dir']} holds a run already: --resume goes on with it, --overwrite starts over")
    if config["batch_size"] % world:
        raise ValueError(f"--batch_size {config['batch_size']} must be a multiple of the {world} processes")
    name = config["device"] if config["device"] != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = getattr(torch, config["dtype"] if config["dtype"] != "auto" else "bfloat16" if bf16 else "float32")
    torch.manual_seed(config["seed"])
    model = model if ckpt else build_model(config, star)
    return config, ckpt, star, train, test, warnings, model.to(device), device, dtype


def open_log(config, ckpt, device):
    """The log, ready for the next line: new, with the header; or resumed, cut back to what the checkpoint knows."""
    file = os.path.join(config["out_dir"], "log.jsonl")
    if ckpt:
        with open(file) as f:
            header, *lines = f.read().splitlines()
        header = json.dumps(json.loads(header) | {"config": config})      # which may ask for more steps than before
        lines = [header] + [line for line in lines if line.endswith("}") and json.loads(line)["iter"] <= ckpt["iter"]]
    else:
        os.makedirs(config["out_dir"], exist_ok=True)
        gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
        machine = f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads{gpu}"
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        lines = [json.dumps({"config": config, "versions": versions, "machine": machine})]
        if os.path.exists(old := os.path.join(config["out_dir"], "ckpt.pt")):
            os.remove(old)                 # --overwrite
    with open(file + ".tmp", "w") as log:
        print(*lines, sep="\n", file=log)
    os.replace(file + ".tmp", file)
    return open(file, "a", buffering=1)    # a line is in the file once it is printed


def main():
    flags, defaults = make_flags()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets these
    try:
        given = vars(flags.parse_args())
        config, ckpt, star, train, test, warnings, model, device, dtype = setup(given, defaults, rank, world)
        if ckpt and (ckpt["iter"] >= config["max_iters"] or ckpt["result"]["accuracy"] >= SOLVED):
            flags.exit(0, f"finished at step {ckpt['iter']}: {verdict(ckpt['result'], config)}\n" if rank == 0 else None)
        log = open_log(config, ckpt, device) if rank == 0 else None  # the first thing that is written
    except (ValueError, OSError, RuntimeError, MemoryError, OverflowError, ImportError) as error:
        flags.error(str(error))
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    say = lambda *words: print(*words, flush=True) if rank == 0 else None
    for warning in warnings:
        say("warning:", warning)
    dollar = star.dollar if config["teacherless"] else None
    test_prompts, test_targets = (x.to(device) for x in prompts_and_targets(config, *test))
    held_out = set(keys(test[0]))                                    # fresh training graphs must not be test graphs
    if config["n_train"]:                                            # a fixed set is tokenized once and stays on the device
        prompts, targets = prompts_and_targets(config, *train)
        inputs, wanted = model_input(prompts, targets, dollar).to(device), loss_targets(prompts, targets).to(device)

    def batch(it):
        """The inputs and targets (B, T) of step `it`, this process's share of them."""
        if config["n_train"]:
            index = batch_indices(len(inputs), config["batch_size"], config["seed"], it)[rank::world]
            return (x[torch.from_numpy(index).to(device)] for x in (inputs, wanted))
        rng = np.random.default_rng([config["seed"], 2, it])
        prompts, targets = prompts_and_targets(config, *draw_unseen(star, config["batch_size"], rng, held_out, distinct=False))
        return (x[rank::world].to(device) for x in (model_input(prompts, targets, dollar), loss_targets(prompts, targets)))

    optimizer = make_optimizer(model, config, device)
    if ckpt:
        optimizer.load_state_dict(ckpt["optimizer"])
    start, elapsed, result, earlier = (
        (ckpt["iter"], ckpt["elapsed_s"], ckpt["result"], ckpt["losses"]) if ckpt else (0, 0.0, None, torch.zeros(0)))
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    step_model = torch.compile(model) if config["compile"] else model
    if world > 1:
        step_model = DistributedDataParallel(step_model)
        control = dist.new_group(backend="gloo")                     # to agree on stopping without waiting for a GPU
    say(f"{config['model']}, {sum(p.numel() for p in model.parameters()):,} parameters, {star}, {device}, "
        f"{dtype}".replace("torch.", ""), "->", config["out_dir"])

    losses, began, stopped = [], time.time() - elapsed, 0
    for it in range(start, config["max_iters"] + 1):
        evaluate = (it % config["eval_interval"] == 0 or it == config["max_iters"]) and not (ckpt and it == start)
        stop = torch.tensor(max(SIGNALS, default=0))
        if world > 1:
            dist.all_reduce(stop, dist.ReduceOp.MAX, group=control)
        stopped = stop.item()
        lr = config["lr"] * min(1.0, (it + 1) / (config["warmup_iters"] + 1), 3 * (1 - it / config["max_iters"]))
        if evaluate or stopped:
            mean = torch.stack(losses) if losses else torch.zeros(0)                 # of each step since the last time
            if world > 1 and losses:
                dist.all_reduce(mean)
            earlier, losses = torch.cat([earlier, mean.cpu() / world]), []
            finite = *earlier.isfinite().tolist(), all(p.isfinite().all() for p in model.parameters())
            if not all(finite):                                      # the first bad loss, or else the weights after step it
                bad = min(it, it - len(earlier) + finite.index(False) + 1)
                flags.exit(1, f"step {bad} made the loss infinite or NaN: stopped. The last good checkpoint stays in "
                              f"{config['out_dir']}; a smaller --lr may help\n" if rank == 0 else None)
        if evaluate:
            if rank == 0:
                with autocast:
                    result = summary(*predict(model, test_prompts, test_targets, dollar), test_targets)
            if world > 1:
                dist.broadcast_object_list(shared := [result])
                result = shared[0]
            line = {"iter": it, "examples": it * config["batch_size"], "elapsed_s": round(time.time() - began, 2),
                    "train_loss": earlier.mean().item() if len(earlier) else None, "lr": lr, **result}
            earlier = torch.zeros(0)
        if (evaluate or stopped) and rank == 0:
            try:
                if evaluate:
                    print(json.dumps(line), file=log)
                    say(report(line, config))
                save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "config": config, "iter": it,
                      "elapsed_s": time.time() - began, "result": result, "losses": earlier}, config["out_dir"])
            except (OSError, RuntimeError) as error:
                flags.exit(1, f"cannot write to {config['out_dir']}: {error}. The checkpoint before is whole: --resume\n")
        if stopped or it == config["max_iters"] or result["accuracy"] >= SOLVED:
            break
        for group in optimizer.param_groups:
            group["lr"] = lr
        with autocast:
            _, loss = step_model(*batch(it))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    go_on = f"interrupted after step {it}: python train.py --resume --out_dir {config['out_dir']} goes on"
    say(go_on if stopped else verdict(result, config))
    if world > 1:
        dist.barrier()                                               # rank 0 serves the others: it must not leave first
        del step_model          # else DDP ends the group, when main returns, with Python's lock held: now and then a deadlock
        dist.destroy_process_group()
    if stopped:
        sys.exit(128 + stopped)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):                   # the first is heeded after the step, a second kills
        signal.signal(number, lambda number, frame: (SIGNALS.append(number), signal.signal(number, signal.SIG_DFL)))
    main()
