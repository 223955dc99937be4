"""The path-star task (Bachmann & Nagarajan 2024, arXiv 2403.06963, figure 1).

A path-star graph G(deg, path_len) has a start node with `deg` arms. An arm is a path of `path_len`
nodes from the start, which they share, to an end. The nodes have different names, drawn from 0 ..
num_nodes - 1. The last node of one arm is the goal. The task: given the edges in random order, the
start and the goal, write the path from start to goal.

As text, one graph a line:  32,3|16,12|3,19|32,34|34,6|6,16|19,47|47,28/32,12=32,34,6,16,12

As tokens: node k is k, `|` is num_nodes, `=` is num_nodes + 1, `/` is num_nodes + 2. Commas are
not tokens. `$` is num_nodes + 3, and stands in for target tokens in the teacherless way. The prefix
ends with `=` and has 3 * deg * (path_len - 1) + 3 tokens. The path follows, with path_len tokens.

Random numbers come from default_rng([seed, k]): k = 0 draws training graphs, 1 test graphs, 2 the
order of an epoch, 3 the graphs that this file prints, 4 those of sample.py.

    python data.py --deg 2 --path_len 5 --num_nodes 10 -n 3 --seed 0        prints three graphs
"""
import argparse
import functools
import math
import re
import signal

import numpy as np

MAX_NODES = 100_000  # a limit, because drawing a graph shuffles all names


class PathStar:
    """The sizes of a path-star graph, and its token ids.

    Raises ValueError where no such graph exists.
    """

    def __init__(self, deg, path_len, num_nodes):
        if deg < 1 or path_len < 2:
            raise ValueError(f"deg must be at least 1 and path_len 2, got {deg} and {path_len}")
        self.deg = deg
        self.path_len = path_len
        self.num_nodes = num_nodes
        self.n_edges = deg * (path_len - 1)
        if not self.n_edges + 1 <= num_nodes <= MAX_NODES:
            raise ValueError(
                f"num_nodes must be from {self.n_edges + 1}, the nodes of a graph with deg {deg} "
                f"and path_len {path_len}, to {MAX_NODES}, got {num_nodes}"
            )
        self.prefix_len = 3 * self.n_edges + 3
        self.pipe = num_nodes
        self.equals = num_nodes + 1
        self.slash = num_nodes + 2
        self.dollar = num_nodes + 3
        self.vocab_size = num_nodes + 4

    def __str__(self):
        return f"G({self.deg},{self.path_len}) with {self.num_nodes} names"

    def count(self):
        """The number of different graphs, whatever the order in which their edges are listed."""
        names = math.perm(self.num_nodes, self.n_edges + 1)
        # The order of the arms makes no difference either. The end of each of them can be the goal.
        return names // math.factorial(self.deg) * self.deg


# ---- Drawing graphs


def draw(star, n, rng):
    """Draws n graphs independently -> prefixes (n, prefix_len), paths (n, path_len), int64"""
    every_name = np.tile(np.arange(star.num_nodes), (n, 1))
    names = rng.permuted(every_name, axis=1)[:, :star.n_edges + 1]
    start = names[:, :1]
    arms = names[:, 1:].reshape(n, star.deg, star.path_len - 1)
    starts = np.broadcast_to(start[:, None], (n, star.deg, 1))
    tails = np.concatenate([starts, arms[:, :, :-1]], axis=2)   # an edge leads from its tail
    heads = arms                                                # to its head
    edges = np.stack([tails, heads], axis=3).reshape(n, star.n_edges, 2)
    order = rng.permuted(np.tile(np.arange(star.n_edges), (n, 1)), axis=1)
    edges = np.take_along_axis(edges, order[:, :, None], axis=1)
    # The goal is always on the first arm. No harm, because names and edges are in random order.
    paths = np.concatenate([start, arms[:, 0]], axis=1)
    return prefix_tokens(star, edges, paths), paths


def prefix_tokens(star, edges, paths):
    """edges (n, n_edges, 2), paths (n, path_len) -> prefixes (n, prefix_len)"""
    prefixes = np.full((len(paths), star.prefix_len), star.pipe)
    prefixes[:, 0:-3:3] = edges[:, :, 0]
    prefixes[:, 1:-3:3] = edges[:, :, 1]
    prefixes[:, -4] = star.slash
    prefixes[:, -3] = paths[:, 0]
    prefixes[:, -2] = paths[:, -1]
    prefixes[:, -1] = star.equals
    return prefixes


def edges_of(prefix):
    """The tokens of a prefix, a list -> its edges [(tail, head), ...]"""
    return list(zip(prefix[0:-3:3], prefix[1:-3:3]))


def find_arms(edges, start):
    """The edges [(tail, head), ...] of a graph -> its arms [[start, ..., end], ...]"""
    after = {tail: head for tail, head in edges if tail != start}
    arms = []
    for tail, head in edges:
        if tail == start:
            arm = [start, head]
            while arm[-1] in after:
                arm.append(after.pop(arm[-1]))
            arms.append(arm)
    return arms


def move_goals(prefixes):
    """Moves each goal to the end of another arm.

    prefixes (n, prefix_len) of graphs with two or more arms -> prefixes that differ in the goal
    alone, and the paths to it (n, path_len)
    """
    moved = prefixes.copy()
    paths = []
    for prefix in moved:
        *_, start, goal, _ = prefix.tolist()
        arms = find_arms(edges_of(prefix.tolist()), start)
        ends = [arm[-1] for arm in arms]
        arm = arms[(ends.index(goal) + 1) % len(arms)]
        prefix[-2] = arm[-1]
        paths.append(arm)
    return moved, np.array(paths)


# ---- Training and test sets


def graph_keys(star, prefixes):
    """prefixes (n, prefix_len) -> n bytes objects, equal for prefixes of the same graph

    A key holds the edges as a set, the start and the goal, so the order of the edges does not
    matter.
    """
    edges = np.sort(prefixes[:, 0:-3:3] * star.num_nodes + prefixes[:, 1:-3:3], axis=1)
    rows = np.concatenate([edges, prefixes[:, -3:-1]], axis=1)
    return [row.tobytes() for row in rows]


def draw_unseen(star, n, rng, seen):
    """Draws n different graphs whose keys are not in the set `seen` -> prefixes, paths

    Raises ValueError if there are too few.
    """
    if len(seen) + n > star.count():
        raise ValueError(
            f"there are only {star.count()} different graphs {star}, not {len(seen) + n}"
        )
    at_once = max(1, (1 << 18) // star.num_nodes)               # so that they stay in the cache
    seen = set(seen)
    parts = []
    missing = n
    while missing > 0:
        prefixes, paths = draw(star, min(missing, at_once), rng)
        new = []
        for i, key in enumerate(graph_keys(star, prefixes)):
            if key not in seen:
                new.append(i)
                seen.add(key)
        parts.append((prefixes[new], paths[new]))
        missing -= len(new)
    prefixes, paths = zip(*parts)
    return np.concatenate(prefixes), np.concatenate(paths)


def datasets(star, n_train, n_test, seed):
    """Draws a training set and a test set that share no graph -> (prefixes, paths) of each

    Raises ValueError if there are too few different graphs.
    """
    test_set = draw_unseen(star, n_test, np.random.default_rng([seed, 1]), set())
    test_keys = set(graph_keys(star, test_set[0]))
    train_set = draw_unseen(star, n_train, np.random.default_rng([seed, 0]), test_keys)
    return train_set, test_set


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    return np.random.default_rng([seed, 2, epoch]).permutation(n)


def batch_indices(n, batch_size, seed, step):
    """-> (batch_size,): which of n training graphs a step sees

    Epochs follow each other without a gap, each in an order of its own. The batch depends on seed
    and step alone, so a resumed run sees the same batches.
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    indices = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(places // n):
        inside = places // n == epoch
        indices[inside] = epoch_order(n, seed, epoch)[places[inside] % n]
    return indices


# ---- Graphs as text

NODE = "[0-9]{1,9}"
EDGE = f"{NODE},{NODE}"
LINE = re.compile(rf"({EDGE}(?:\|{EDGE})*)/({NODE}),({NODE})=({NODE}(?:,{NODE})*)?")


def to_text(prefix, path=()):
    """The tokens of a prefix and a path, lists -> the text form. Without a path it ends with `=`"""
    edges = "|".join(f"{tail},{head}" for tail, head in edges_of(prefix))
    start, goal = prefix[-3], prefix[-2]
    return f"{edges}/{start},{goal}=" + ",".join(map(str, path))


def from_text(star, line):
    """The text form, with the path or without -> a prefix (prefix_len,) and its path (path_len,)

    Raises ValueError for a line that is not a path-star graph of these sizes, or has a wrong path.
    """
    match = LINE.fullmatch(line.strip())
    if not match:
        raise ValueError(f"{line[:60]!r} is not of the form a,b|c,d|.../start,goal=start,...,goal")
    edges = []
    for edge in match[1].split("|"):
        tail, head = edge.split(",")
        edges.append((int(tail), int(head)))
    start, goal = int(match[2]), int(match[3])
    nodes = [start] + [head for _, head in edges]
    if len(set(nodes)) < len(nodes):
        raise ValueError("not a star: an edge leads to the start, or two lead to the same node")
    arms = find_arms(edges, start)
    if sum(len(arm) - 1 for arm in arms) < len(edges):
        raise ValueError(f"not a star: some edges are on no arm of the start {start}")
    if len(arms) != star.deg or any(len(arm) != star.path_len for arm in arms):
        raise ValueError(f"not a graph G({star.deg},{star.path_len})")
    if max(nodes) >= star.num_nodes:
        raise ValueError(f"node {max(nodes)}: names go up to {star.num_nodes - 1}")
    paths = [arm for arm in arms if arm[-1] == goal]
    if not paths:
        raise ValueError(f"the goal {goal} is not the end of an arm")
    if match[4] is not None and match[4] != ",".join(map(str, paths[0])):
        raise ValueError(f"the path {match[4]} is not the arm from {start} to {goal}")
    paths = np.array(paths)
    return prefix_tokens(star, np.array([edges]), paths)[0], paths[0]


# ---- Command line


def non_negative_int(text):
    """A type for argparse's flags."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return value


def positive_int(text):
    """A type for argparse's flags."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def main():
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # an error is one line then
        description="Prints path-star graphs, drawn independently, one a line.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--deg", type=positive_int, default=2, help="arms of a graph")
    parser.add_argument("--path_len", type=positive_int, default=5, help="nodes on a path")
    parser.add_argument("--num_nodes", type=positive_int, default=10, help="names to draw from")
    parser.add_argument("-n", type=positive_int, default=1, help="number of graphs")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of the random numbers")
    args = parser.parse_args()
    try:
        star = PathStar(args.deg, args.path_len, args.num_nodes)
    except ValueError as error:
        parser.error(str(error))
    rng = np.random.default_rng([args.seed, 3])
    for _ in range(args.n):
        prefixes, paths = draw(star, 1, rng)
        print(to_text(prefixes[0].tolist(), paths[0].tolist()))


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)           # `| head` ends it in silence
    main()
