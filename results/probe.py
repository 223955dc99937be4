"""Where in the stack a teacherless model knows which node: linear probes, as Markdown.

    python results/reproduce.py gpt-teacherless-seed2 mamba-teacherless-seed1
    python results/probe.py out/reproduce/gpt-teacherless-seed2 out/reproduce/mamba-teacherless-seed1 > results/probe.md

A cell is the share of 2,000 new graphs in which the node of its row can be read off the residual stream after a layer, by a
least-squares map fitted on 4,000 others, at the position of its column: the one that is to predict "start" (the prompt's last
token), "hop 1" (the first $), and so on. Nothing tells the model to hold a node where it does not have to predict it.
"""
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from data import draw  # noqa: E402
from train import load_run, model_input, prompts_and_targets  # noqa: E402


@torch.no_grad()
def layers(model, idx):
    """The residual stream after each layer, (B, T, width) each."""
    after = []
    for block in model.transformer.h if hasattr(model, "transformer") else model.backbone.layers:
        block.register_forward_hook(lambda module, given, x: after.append(x))
    model(idx)
    return after


print("Made by `python results/probe.py " + " ".join(sys.argv[1:]) + "`; how, is in its docstring.\n")
for folder in sys.argv[1:]:
    ckpt, star, model = load_run(folder)
    if not ckpt["config"]["teacherless"] or ckpt["config"]["reverse"]:
        sys.exit(f"probe.py: {folder} was not trained by --teacherless, from start to goal")
    prompts, targets = prompts_and_targets(ckpt["config"], *draw(star, 6000, np.random.default_rng(99)))
    names = ["start", *(f"hop {i}" for i in range(1, star.path_len - 1)), "goal"]
    config, accuracy = ckpt["config"], ckpt["result"]["accuracy"]
    print(f"{config['model']}, seed {config['seed']}, step {ckpt['iter']}, accuracy {accuracy:.1%}\n")
    print("| after layer | node | " + " | ".join(f"at {name}" for name in names[:-1]) + " |\n|" + "---|" * (1 + len(names)))
    for number, x in enumerate(layers(model, model_input(prompts, targets, star.dollar)), 1):
        x = F.pad(x[:, prompts.size(1) - 1:], (0, 1), value=1.0)     # (6000, path_len, width + 1), from the prompt's end on
        for node in range(1, star.path_len - 1):
            shares = []
            for at in range(star.path_len - 1):
                wanted = F.one_hot(targets[:, node], star.vocab_size).to(x.dtype)
                weight = torch.linalg.lstsq(x[:4000, at], wanted[:4000]).solution
                right = (x[4000:, at] @ weight).argmax(dim=1) == targets[4000:, node]
                shares.append(f"{right.double().mean().item():.0%}")
            print(f"| {number} | {names[node]} | " + " | ".join(shares) + " |")
    print()
