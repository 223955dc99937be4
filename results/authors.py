"""Trains the paper authors' Transformer and ours side by side, from the same weights, and prints results/authors.md.

    pip install transformers tqdm pandas
    git clone https://github.com/gregorbachmann/Next-Token-Failures
    python results/authors.py Next-Token-Failures > results/authors.md

The settings are those of the command in their README: deg 2, path length 5, 50 names, 6 layers, width 384, 6 heads, batch 256,
learning rate 1e-4. Both read the same file, in their format, each with its own tokenizer. A step of theirs is the body of their
training loop; a step of ours is that of train.py, without the clipping of gradients, which theirs does not do.
"""
import contextlib
import datetime
import io
import platform
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
from data import PathStar, batch_indices, datasets, draw, text  # noqa: E402
from model_gpt import GPT, GPTConfig  # noqa: E402
from train import loss_targets, make_optimizer, model_input, prompts_and_targets  # noqa: E402

STEPS, BATCH, LR = 30, 256, 1e-4
RENAMED = {"embed_tokens": "transformer.wte", "pos_encoding": "transformer.wpe", "final_layernorm": "transformer.ln_f",
           "layers": "transformer.h", "attn.proj": "attn.c_proj", "mlp.expand": "mlp.c_fc", "mlp.proj": "mlp.c_proj"}


def mapped(theirs):
    """Their state dict under our names: queries, keys and values stacked into one matrix."""
    ours = {}
    for name, value in theirs.items():
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        if "_linear" not in name:
            ours[name] = value
    for name in [name for name in theirs if "queries_linear" in name]:
        parts = [theirs[name.replace("queries", part)] for part in ("queries", "keys", "values")]
        ours[name.replace("layers", "transformer.h").replace("queries_linear", "c_attn")] = torch.cat(parts)
    return ours


def main(checkout):
    torch.manual_seed(0)
    star = PathStar(2, 5, 50)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):   # theirs prints
        file = Path(folder) / "train.txt"
        file.write_text("\n".join(text(star, *draw(star, STEPS * BATCH, np.random.default_rng(0)))) + "\n")
        _, (prefixes, paths), *_ = datasets(num_nodes=50, n_test=1, train_file=file)
        del sys.modules["data"]                                      # they have one, too
        sys.path.insert(0, checkout)
        from data.graphs import Graphs
        from models import get_model
        from tokenizing import get_tokenizer
        from utils.training_utils import get_lr
        args = types.SimpleNamespace(model="gpt", num_nodes=50, n_layer=6, n_head=6, n_embd=384, use_flash=False)
        tokenizer = get_tokenizer(args)

        data = Graphs(tokenizer, STEPS * BATCH, file, "cpu", teacherless_token=None)
        args.block_size, args.vocab_size, args.teacherless_token = data.num_tokens, tokenizer.vocab_size, None
        theirs = get_model(args)
        ours = GPT(GPTConfig(block_size=data.num_tokens, vocab_size=star.vocab_size, n_layer=6, n_head=6, n_embd=384))
        ours.load_state_dict(mapped(theirs.state_dict()))
        their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=LR, weight_decay=0.0)
        our_optimizer = make_optimizer(ours, {"lr": LR, "weight_decay": 0.0}, torch.device("cpu"))
        prompts, targets = prompts_and_targets({"only_first_hop": False, "reverse": False}, prefixes, paths)
        inputs, wanted = model_input(prompts, targets), loss_targets(prompts, targets)
        losses, seconds = [], {"ours": [], "theirs": []}
        for it in range(STEPS):
            lr = get_lr(it + 1, LR, 100, 10 ** 6, 1e-5)          # theirs; their first step has a learning rate of 0
            index = batch_indices(len(inputs), BATCH, 0, it).tolist()
            x, y = (torch.stack(part) for part in zip(*(data[i] for i in index)))
            assert torch.equal(x, inputs[index]) and torch.equal(y, wanted[index]), "the batches differ"
            for optimizer in (their_optimizer, our_optimizer):
                for group in optimizer.param_groups:
                    group["lr"] = lr
            start = time.perf_counter()
            _, loss, _ = theirs(x, y)
            their_loss = loss.item()
            loss.backward()
            their_optimizer.step()
            their_optimizer.zero_grad(set_to_none=True)
            between = time.perf_counter()
            _, loss = ours(inputs[index], wanted[index])
            our_optimizer.zero_grad(set_to_none=True)
            loss.backward()
            our_optimizer.step()
            seconds["ours"].append(time.perf_counter() - between)
            seconds["theirs"].append(between - start)
            losses.append((their_loss, loss.item()))
    return losses, {name: statistics.median(times) for name, times in seconds.items()}


if __name__ == "__main__":
    losses, seconds = main(sys.argv[1])
    ratio = seconds["theirs"] / seconds["ours"]
    apart = max(abs(theirs - ours) / theirs for theirs, ours in losses)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"""Made by `python results/authors.py Next-Token-Failures` on {datetime.date.today()}: {machine}, seed 0. What is
compared, and how, is in the docstring of `authors.py`.

A step takes theirs {seconds["theirs"] * 1e3:.0f} ms and ours {seconds["ours"] * 1e3:.0f} ms (medians, taking turns):
{ratio:.2f} times as long. The losses, in float32, differ by {apart:.1e} of the loss at most:

| step | theirs | ours |
|---|---|---|""")
    for it, (theirs, ours) in enumerate(losses):
        print(f"| {it + 1} | {theirs:.7f} | {ours:.7f} |")
