"""The path-star task (Bachmann & Nagarajan 2024, arXiv 2403.06963, figure 1): graphs, their tokens, their text form.

A path-star graph G(deg, path_len) has one start node, from which `deg` arms go out. Following an arm gives a path of
`path_len` nodes, the start included. Nodes carry names drawn from 0 .. num_nodes - 1 without repetition. One arm's last
node is the goal. Given the edges in random order, the start and the goal, the task is to write the path start -> goal.

As text, one graph a line:  32,3|16,12|3,19|32,34|34,6|6,16|19,47|47,28/32,12=32,34,6,16,12
As tokens: node k is k; | is num_nodes, = is num_nodes + 1, / is num_nodes + 2, and $, which stands in for a target token
in teacherless training, is num_nodes + 3. Commas are not tokens. So the prefix (up to and with =) has
3 deg (path_len - 1) + 3 tokens and the target path_len tokens.

    python data.py --deg 2 --path_len 5 --num_nodes 50 -n 3 --seed 0        prints three graphs
"""
import argparse
import functools
import itertools
import math
import re
import sys
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PathStar:
    """The sizes of a path-star graph, and with them the token ids. Raises ValueError where no such graph exists."""
    deg: int
    path_len: int
    num_nodes: int

    def __post_init__(self):
        if self.deg < 1 or self.path_len < 2:
            raise ValueError(f"deg must be at least 1 and path_len at least 2, got {self.deg} and {self.path_len}")
        if self.num_nodes < self.n_edges + 1:
            raise ValueError(f"num_nodes must be at least {self.n_edges + 1}, the nodes of a graph with deg {self.deg} "
                             f"and path_len {self.path_len}, got {self.num_nodes}")

    n_edges = property(lambda self: self.deg * (self.path_len - 1))
    prefix_len = property(lambda self: 3 * self.n_edges + 3)
    pipe = property(lambda self: self.num_nodes)
    equals = property(lambda self: self.num_nodes + 1)
    slash = property(lambda self: self.num_nodes + 2)
    dollar = property(lambda self: self.num_nodes + 3)
    vocab_size = property(lambda self: self.num_nodes + 4)

    def __str__(self):
        return f"G({self.deg},{self.path_len}) with {self.num_nodes} names"

    def count(self):
        """How many different prefixes there are: names, order of the edges, and which arm's end is the goal."""
        names = math.perm(self.num_nodes, self.n_edges + 1) // math.factorial(self.deg)  # the arms have no order
        return names * math.factorial(self.n_edges) * self.deg


def draw_distinct(rng, n, high, k):
    """n rows of k different numbers below `high`, all equally likely: k steps of a Fisher-Yates shuffle of all rows at once."""
    deck, row = np.tile(np.arange(high, dtype=np.int32), (n, 1)), np.arange(n)
    for i in range(k):
        j = rng.integers(i, high, size=n)
        deck[row, i], deck[row, j] = deck[row, j], deck[row, i]
    return deck[:, :k]


def draw(star, n, rng):
    """n graphs drawn independently -> prefixes (n, prefix_len), paths (n, path_len), int64 token ids."""
    prefixes, paths = np.empty((n, star.prefix_len), np.int64), np.empty((n, star.path_len), np.int64)
    at_once = max(1, (1 << 18) // star.num_nodes)                    # so that the decks stay in cache
    for i in range(0, n, at_once):
        part = slice(i, min(i + at_once, n))
        size = part.stop - i
        names = draw_distinct(rng, size, star.num_nodes, star.n_edges + 1)      # the start's, then arm after arm
        order = draw_distinct(rng, size, star.n_edges, star.n_edges)            # edge k enters names[k + 1], from names[k]
        before = np.where(order % (star.path_len - 1) == 0, 0, order)           # or, where an arm begins, from the start
        tails, heads = (np.take_along_axis(names, places, axis=1) for places in (before, order + 1))
        # the arms are alike, so the goal may always be on the first: which names and edges it has is random already
        paths[part] = names[:, :star.path_len]
        prefixes[part] = assemble(star, tails, heads, paths[part])
    return prefixes, paths


def assemble(star, tails, heads, paths):
    """Edges from tails to heads (n, n_edges), paths (n, path_len) -> prefixes (n, prefix_len)"""
    prefixes = np.full((len(paths), star.prefix_len), star.pipe)
    prefixes[:, 0:-3:3], prefixes[:, 1:-3:3] = tails, heads
    prefixes[:, -4], prefixes[:, -1] = star.slash, star.equals
    prefixes[:, -3], prefixes[:, -2] = paths[:, 0], paths[:, -1]
    return prefixes


LINE = re.compile("(a,a(?:[|]a,a)*)/(a),(a)=(a(?:,a)*)?".replace("a", "[0-9]{1,9}"))


def walk_arms(edges, start):
    """The arms of a graph with these edges [(a, b), ...] -> a list of arms, each the list of its nodes from the start on."""
    arms, after = [[start, b] for a, b in edges if a == start], {a: b for a, b in edges if a != start}
    for arm in arms:
        while arm[-1] in after:
            arm.append(after.pop(arm[-1]))
    return arms


def parse_line(line, deg=None, path_len=None, num_nodes=None):
    """A graph in text form, its path left out or not -> its edges [(a, b), ...] and its path [start, ..., goal].

    Raises ValueError that says what is wrong if it is anything but a path-star graph with the right path, or if it is of
    another size than the one that is given.
    """
    match = LINE.fullmatch(line)
    if not match:
        raise ValueError(f"{line[:60]!r} is not of the form a,b|c,d|.../start,goal=start,...,goal")
    edges = [tuple(map(int, edge.split(","))) for edge in match[1].split("|")]
    start, goal = int(match[2]), int(match[3])
    entered = [start] + [b for _, b in edges]
    arms = walk_arms(edges, start)
    if not arms:
        raise ValueError(f"not a star: no edge leaves the start {start}")
    if len(set(entered)) < len(entered):
        raise ValueError(f"not a star: node {max(entered, key=entered.count)} is repeated")
    if sum(len(arm) - 1 for arm in arms) < len(edges):
        raise ValueError("not a star: some edges are on no arm")
    if len({len(arm) for arm in arms}) > 1:
        raise ValueError("not a star: its arms differ in length")
    path = next((arm for arm in arms if arm[-1] == goal), None)
    if path is None:
        raise ValueError(f"the goal {goal} is not the end of an arm")
    if match[4] is not None and [int(node) for node in match[4].split(",")] != path:
        raise ValueError(f"the path {match[4]} is not in the graph as the arm from {start} to {goal}")
    if deg not in (None, len(arms)) or path_len not in (None, len(path)):
        raise ValueError(f"a graph with deg {len(arms)} and path_len {len(path)}, where deg {deg or len(arms)} and path_len "
                         f"{path_len or len(path)} are expected")
    if num_nodes is not None and max(entered) >= num_nodes:
        raise ValueError(f"node {max(entered)} is out of range: names go from 0 to num_nodes - 1 = {num_nodes - 1}")
    return edges, path


def read_graphs(file, limit=None, deg=None, path_len=None, num_nodes=None):
    """The first `limit` graphs (None: all) of a file in text form -> edges (n, n_edges, 2), paths (n, path_len).

    Raises ValueError with file name and line number at the first line that is not a graph of the size that is given, or
    of the first one's deg and path_len, with its path written out.
    """
    edges, paths = [], []
    with open(file, errors="replace") as f:
        for number, line in enumerate(itertools.islice(f, limit), 1):
            try:
                e, path = parse_line(line.strip(), deg, path_len, num_nodes)
                if line.strip().endswith("="):
                    raise ValueError("the path is missing")
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: {error}") from None
            edges.append(e)
            paths.append(path)
            deg, path_len = len(e) // (len(path) - 1), len(path)
    if not paths:
        raise ValueError(f"{file} is empty: expected one graph a line, like 0,1|2,3|1,4|0,2/0,4=0,1,4")
    if limit is not None and len(paths) < limit:
        raise ValueError(f"{file} has {len(paths)} graphs, fewer than the {limit} asked for")
    return np.array(edges), np.array(paths)


def text(star, prefixes, paths=None):
    """Yields the text form, a line (without its end) for each row of tokens; without paths it ends with =."""
    form = "|".join(["%d,%d"] * star.n_edges) + "/%d,%d=" + ",".join(["%d"] * (0 if paths is None else star.path_len))
    numbers = np.delete(prefixes, np.s_[2:-3:3], axis=1)[:, :-1]
    for row in numbers if paths is None else np.concatenate([numbers, paths], axis=1):
        yield form % tuple(row.tolist())


def keys(prefixes):
    """One bytes object a row, to look prefixes up by."""
    return [row.tobytes() for row in prefixes.astype(np.int32)]


def draw_unseen(star, n, rng, seen, distinct=True):
    """n graphs whose prefixes have no key in the set `seen`; if `distinct`, no two of them alike either."""
    found, parts = set(seen) if distinct else seen, [draw(star, 0, rng)]
    while n:
        prefixes, paths = draw(star, n, rng)
        new = []
        for i, key in enumerate(keys(prefixes)):
            if key not in found:
                new.append(i)
                if distinct:
                    found.add(key)
        parts.append((prefixes[new], paths[new]))
        n -= len(new)
    return tuple(map(np.concatenate, zip(*parts)))


def datasets(deg=None, path_len=None, num_nodes=None, n_train=None, n_test=None, seed=0, train_file=None, test_file=None):
    """Reads or draws a training and a test set.

    Of a file: its first n graphs (None: all). Otherwise n graphs drawn from the seed, no two alike, and none in the other
    set; with n_train = 0 no training set, to be drawn fresh by `draw_unseen`. Files determine deg, path_len and, where it
    is None, num_nodes.

    Returns the PathStar; (prefixes, paths) of the training set and of the test set; and warnings, a list of strings.
    Raises ValueError for a malformed file (OSError for a missing one), contradictions and too small a space of graphs.
    """
    files = {}
    for name, file, n in (("train", train_file, n_train), ("test", test_file, n_test)):
        if file is not None:
            edges, paths = files[name] = read_graphs(file, n, deg, path_len, num_nodes)
            deg, path_len = edges.shape[1] // (paths.shape[1] - 1), paths.shape[1]
    if num_nodes is None:
        num_nodes = max(edges.max() for edges, _ in files.values()).item() + 1
    star = PathStar(deg, path_len, num_nodes)
    sets = {name: (assemble(star, edges[:, :, 0], edges[:, :, 1], paths), paths) for name, (edges, paths) in files.items()}
    warnings, seen = [], {}
    for name, (prefixes, _) in sets.items():
        seen[name] = set(keys(prefixes))
        if len(seen[name]) < len(prefixes):
            warnings.append(f"{len(prefixes) - len(seen[name])} lines of the {name} file repeat a graph")
    if len(sets) == 2 and (overlap := sum(key in seen["train"] for key in keys(sets["test"][0]))):
        warnings.append(f"{overlap} of the {len(sets['test'][0])} test graphs occur in the training file too")
    drawn = {"train": n_train, "test": n_test}
    needed = sum(len(seen[name]) if name in seen else drawn[name] or 1 for name in drawn)
    if len(sets) < 2 and needed > star.count():
        raise ValueError(f"there are only {star.count()} different graphs {star}, but {needed} are asked for")
    for stream, name, other in ((1, "test", "train"), (0, "train", "test")):
        if name not in sets:
            sets[name] = draw_unseen(star, drawn[name], np.random.default_rng([seed, stream]), seen.get(other, ()))
            seen[name] = set(keys(sets[name][0]))
    return star, sets["train"], sets["test"], warnings


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    return np.random.default_rng([seed, 2, epoch]).permutation(n)


def batch_indices(n, batch_size, seed, it):
    """Which of n training graphs step `it` sees: an endless row of shuffled epochs, a function of the step alone."""
    epochs, places = np.divmod(np.arange(it * batch_size, (it + 1) * batch_size), n)
    return np.concatenate([epoch_order(n, seed, epoch)[places[epochs == epoch]] for epoch in np.unique(epochs)])


def verdict(result, config):
    """One sentence on what an evaluation shows."""
    accuracy, chance, forced = result["accuracy"], 1 / config["deg"], result["forced_node_accuracy"]
    seen = f"accuracy {accuracy:.1%}, where guessing an arm gives {chance:.1%}"
    margin = 0.02 + 4 * (chance * (1 - chance) / config["n_test"]) ** 0.5    # four standard errors of a guesser's accuracy
    if accuracy >= 0.99:
        return f"{seen}: solved, the model finds the {'first hop' if config['only_first_hop'] else 'path'}."
    if config["only_first_hop"] and abs(accuracy - chance) < margin:
        return f"{seen}: the first hop alone is not learned, the model guesses (the indecipherable token)."
    if forced and len(forced) > 2 and not config["reverse"] and min(forced[2:]) >= 0.99 and abs(forced[1] - chance) < margin:
        return (f"{seen}: the Clever Hans cheat. Given the true nodes before, the first hop is right {forced[1]:.1%} of the "
                f"time, a guess, but the worst of the later nodes {min(forced[2:]):.1%}, a look-up.")
    return f"{seen}: neither solved nor the cheat. Not trained enough, or not on enough graphs."


class Flags(argparse.ArgumentParser):
    """argparse, but what is wrong is said in one line, and help shows the defaults."""

    def __init__(self, doc):
        super().__init__(description=doc.split("\n")[0], allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def main():
    flags = Flags("Prints path-star graphs, drawn independently, one a line.")
    flags.add_argument("--deg", type=int, default=2, help="arms of a graph")
    flags.add_argument("--path_len", type=int, default=5, help="nodes on a path, the start included")
    flags.add_argument("--num_nodes", type=int, default=50, help="names to draw from")
    flags.add_argument("-n", type=int, default=1, help="how many graphs")
    flags.add_argument("--seed", type=int, default=0, help="of the random numbers")
    args = flags.parse_args()
    if args.n < 0 or args.seed < 0:
        flags.error(f"-n and --seed must not be negative, got {args.n} and {args.seed}")
    try:
        star = PathStar(args.deg, args.path_len, args.num_nodes)
        rng = np.random.default_rng([args.seed, 3])                  # which no run of train.py draws from
        for first in range(0, args.n, 100_000):
            print(*text(star, *draw(star, min(100_000, args.n - first), rng)), sep="\n", flush=True)
    except BrokenPipeError:                                          # the reader, `head` say, has seen enough
        sys.stderr.close()
    except (ValueError, MemoryError) as error:
        flags.error(str(error))


if __name__ == "__main__":
    main()
