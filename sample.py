"""Shows what a trained model does: its answers to a few graphs, and how often it is right on many.

    python sample.py --out_dir out/...                     on graphs that the run has never seen
    python sample.py --out_dir out/... --file graphs.txt   on graphs in text form, see data.py
    python sample.py --out_dir out/... --graph "0,1|2,3|1,4|0,2/0,4="

For each graph it prints
- the arms, with the probability that the model gives to setting out on each (a reversed model has
  by then written the later nodes);
- the model's answer, with the nodes that are not on the path in brackets;
- what it predicts when it is forced, that is, when it reads the true nodes before each place;
- what it would answer after pass 1, 2, ... of its layers, if it is a looped model.

Then it prints the shares of right answers, and asks one more question: when the goal moves to the
end of another arm, and nothing else changes, does the first hop follow it?
"""
import argparse
import json
import signal

import numpy as np

from data import (
    datasets, draw_unseen, edges_of, find_arms, from_text, graph_keys, non_negative_int,
    positive_int
)
from train import evaluate, goal_moved, load_checkpoint, objective_of, probabilities, verdict


def unseen_graphs(n, seed, args, star):
    """Draws graphs that the run has neither trained nor been tested on."""
    train_set, test_set = datasets(star, args.n_train, args.n_test, args.seed)
    seen = set(graph_keys(star, train_set[0])) | set(graph_keys(star, test_set[0]))
    return draw_unseen(star, n, np.random.default_rng([seed, 4]), seen)


def get_graphs(flags, args, star):
    """The graphs that the flags ask for -> prefixes (n, prefix_len), paths (n, path_len)

    Raises ValueError, with the number of the line, for text that is no such graph.
    """
    if flags.graph is not None:
        source, lines = "--graph", [flags.graph]
    elif flags.file is not None:
        with open(flags.file, encoding="utf-8-sig") as file:
            source, lines = flags.file, file.readlines()
    else:
        return unseen_graphs(flags.num_graphs, flags.seed, args, star)
    graphs = []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                graphs.append(from_text(star, line))
        except ValueError as error:
            raise ValueError(f"{source}, line {number}: {error}") from None
    if not graphs:
        raise ValueError(f"{source} has no graph")
    prefixes, paths = zip(*graphs[:flags.num_graphs])
    return np.array(prefixes), np.array(paths)


def is_arm(answer, arms):
    """Whether the answer walks one of the arms, right or wrong."""
    return any(answer == arm[:len(answer)] for arm in arms)


def print_nodes(label, nodes, path):
    """Prints nodes in a row. Those that are not on the path are in brackets."""
    texts = []
    for node, right in zip(nodes, path):
        texts.append(f"{node:5}" if node == right else f"{f'[{node}]':>5}")
    print(f"{label:>12}" + " ->".join(texts))


def show(graph):
    """Prints a graph, a dict as in the output of --json."""
    path = graph["path"]
    print("P(first hop)")
    for arm, p in zip(graph["arms"], graph["p_first_hop"]):
        nodes = " ->".join(f"{node:5}" for node in arm)
        print(f"{p:12.1%}{nodes}" + ("   to the goal" if arm == path else ""))
    print_nodes("answer", graph["answer"], path)
    if graph["forced"] is not None:
        print_nodes("forced", graph["forced"], path)
    for i, answer in enumerate(graph["passes"], start=1):
        print_nodes(f"pass {i}", answer, path)
    print()


def print_shares(label, of_nodes, of_paths):
    print(f"{label:22}" + "".join(f"{share:10.1%}" for share in [*of_nodes, of_paths]))


def print_result(result, names, args, star):
    n, model = result["num_graphs"], f"{args.model}, {objective_of(args)}"
    print(f"{model}, on {n} graphs {star} (guessing an arm: {1 / star.deg:.1%})")
    print(f"{'':22}" + "".join(f"{name:>10}" for name in [*names, "all"]))
    own = "from $ alone" if args.teacherless else "from its own tokens"
    print_shares(own, result["node_accuracy"], result["accuracy"])
    if result["forced_accuracy"] is not None:
        of_nodes, of_paths = result["forced_node_accuracy"], result["forced_accuracy"]
        print_shares("from the true tokens", of_nodes, of_paths)
    for i, each in enumerate(result["passes"], start=1):
        print_shares(f"after pass {i}", each["node_accuracy"], each["accuracy"])
    print(f"{result['real_arm']:.1%} of the answers walk a real arm, right or wrong")
    if result["goal_moved"] is not None:
        turns, stays = result["goal_moved"]["turns"], result["goal_moved"]["stays"]
        print(f"goal moved to another arm: the first hop turns there in {turns:.1%}, ", end="")
        print(f"stays as it was in {stays:.1%}")
    print(result["verdict"])


def make_parser():
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # an error is one line then
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out_dir", required=True, help="folder of the run")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--file", help="take the graphs from this file")
    source.add_argument("--graph", help="take this graph: its edges, start and goal")
    add("--num_graphs", type=positive_int, default=1000, help="graphs to judge the model on")
    add("--show", type=non_negative_int, default=3, help="graphs to print")
    add("--seed", type=non_negative_int, default=0, help="of the graphs drawn")
    add("--json", action="store_true", help="print one JSON object instead")
    return parser


def main():
    parser = make_parser()
    flags = parser.parse_args()
    try:
        _, args, star, model = load_checkpoint(flags.out_dir)
        prefixes, paths = get_graphs(flags, args, star)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    passes = []
    for n_loop in range(1, args.n_loop + 1):
        model.config.n_loop = n_loop        # the final norm and the head can read every pass
        result, answers, forced = evaluate(args, star, model, prefixes, paths)
        passes.append((result, answers))
    if args.n_loop == 1:
        passes = []                         # an ordinary stack has nothing to show
    result["passes"] = [dict(each) for each, _ in passes]
    result["num_graphs"] = len(paths)
    result["verdict"] = verdict(result, args, len(paths))
    result["goal_moved"] = goal_moved(args, star, model, prefixes, answers)
    p = probabilities(args, star, model, prefixes[:flags.show], answers[:flags.show])
    graphs, real_arms = [], 0
    for i, (prefix, path, answer) in enumerate(zip(prefixes, paths.tolist(), answers.tolist())):
        arms = find_arms(edges_of(prefix.tolist()), path[0])
        real_arms += is_arm(answer, arms)
        if i < flags.show:
            graphs.append({
                "path": path,
                "arms": arms,
                "p_first_hop": [p[i, 1, arm[1]].item() for arm in arms],
                "answer": answer,
                "forced": None if forced is None else forced[i].tolist(),
                "passes": [each[i].tolist() for _, each in passes],
            })
    result["real_arm"] = real_arms / len(paths)
    if flags.json:
        print(json.dumps({**result, "graphs": graphs}))
        return
    hops = ["first hop", *[f"hop {i}" for i in range(2, star.path_len - 1)]]
    names = ["start", *hops, "goal"][:answers.size(1)]
    for graph in graphs:
        show(graph)
    print_result(result, names, args, star)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)           # `| head` ends it in silence
    main()
