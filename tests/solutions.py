"""What students hand in: solutions with one plausible mistake each, and right ones of another form.

WRONG: set -> {name: (words of the message that must name the mistake, text of the reference,
                      what is there instead, and so on in pairs)}
RIGHT: set -> {name: {function: another body}}
"""

NOT_ANCESTORS = "sees nodes that are not its ancestors"
FROM_THE_ROOT = "not the ranks from the root down"
NOT_BELOW = "a rank at depth d is not below widths[d-1]"
NOT_MADE_OF = "does not hold the paths that it was made of"
NOT_IN_WORDS = "the ValueError does not say"
NOT_LM_HEAD = "a new head is not exactly the LM head"
NOT_FORMULA = "is not W2 (h + SiLU(W1 h + b1))"
TARGET = "token t+k+1"
MEAN = "over the targets with loss_mask and only those"
THRESHOLD = "the threshold is not min(epsilon, delta * exp(-H))"
SAMPLE = "its parent's sample"  # told with whichever case was found
PASSED_OVER = "a deeper node was passed over"
NEXT_ROOT = "the next root is not the sample of the last accepted node"
EMITTED = "a step emits the guesses on the path"
NOT_KEPT = "moved down, all at once"
NOT_PLAIN = "not the one that plain decoding gives"
EACH_PREFIX = "once for each prefix"
EXPECTED = "the next root, and each node's chance"
EYE = 'torch.eye(len(self), dtype=torch.bool, device="cpu")'
SQUARE = "len(self), len(self), dtype=torch.bool"
INHERIT = "mask[node] |= mask[parent]"
SIBLINGS = "mask[node, [i for i in range(node) if self.parents[i] == parent]] = True"
DEPTHS = "tuple(len(path) for path in self.paths)"
RANKS = "for rank in range(width)]"
ROOT_CHECK = 'raise ValueError("path []: the root is implied and must not be listed")'
AHEAD = "padded[:, k + 1 : k + 1 + T] for k in range(K + 1)]"
MASKED = "tokens = tokens.masked_fill(~mask, IGNORED)"
STACKED = f"return torch.stack([{AHEAD})"
STACKED_MASKED = f"{STACKED}.masked_fill(~mask, IGNORED)"
COUNTS = "(targets != IGNORED).flatten(1).sum(1) if counts is None else counts"
ENTROPY = "-torch.xlogy(base_probs, base_probs).sum(-1)"
PROBS = "logits_to_probs(logits, sampling)"
TARGETS = "targets = sample(logits, sampling, noise)  #"
PASSES = "[guess == targets[p] for guess, p in zip(guesses[1:], parents)]"
AGAIN = "sample(logits[[p]], sampling, exponential_noise(logits[[p]], None)).item()"
REDRAWN = PASSES.replace("targets[p]", AGAIN)
REACHED = "passes[node] and parent in paths:\n            paths[node] = paths[parent] + [node]"
UNREACHED = "passes[node]:\n            paths[node] = tree.mask[node].nonzero()[:, 0].tolist()"
BEST = "(len(nodes), sum(scores[i] for i in nodes))"
BONUS = "[targets[path[-1]]]"
SCORED = "if noise is None or sampling.typical:"
KEEP = "self.data[..., start : start + len(rows), :] = self.data.index_select(4, index)"
ROOM = "[: end - length]"
AT_EOS = f"truncate_at_eos(emitted{ROOM}, eos_ids)"
ENDS = "if length == end or root in eos_ids:"
KEY = "(-counts[path], len(path), path)"
RANKED = f"return sorted(paths, key=lambda path: {KEY})"
MARGINALS = """from math import prod

    heads = Counter()
    for path in paths:
        heads[len(path), path[-1]] += counts[path]
    share = {node: heads[node] / counts[()] for node in heads}
    worth = {path: prod(share[node] for node in enumerate(path, start=1)) for path in counts}
    return sorted(paths, key=lambda path: (-worth[path], len(path), path))"""
PREFIXES = "counts.update(tuple(ranks[:depth]) for depth in range(len(ranks) + 1))"

WRONG = {
    1: {
        "sibling visible": (NOT_ANCESTORS, INHERIT, f"{INHERIT}\n            {SIBLINGS}"),
        "causal mask": ("a node sees a sibling", EYE, f"torch.ones({SQUARE}).tril()"),
        "blind to itself": ("does not see itself", EYE, f"torch.zeros({SQUARE})"),
        "parent alone": ("does not see all of its ancestors", INHERIT, "mask[node, parent] = True"),
        "transposed": ("a node sees its own children", "return mask\n", "return mask.T\n"),
        "everything visible": (NOT_ANCESTORS, EYE, f"torch.ones({SQUARE})"),
        "mask of floats": ("one bool for each pair", "return mask\n", "return mask.float()\n"),
        "depth is the index": ("is not its number of steps", DEPTHS, "tuple(range(len(self)))"),
        "depth from one": ("the root is at depth 0", DEPTHS, DEPTHS.replace("path)", "path) + 1")),
        "path upwards": (FROM_THE_ROOT, "paths[parent] + (rank,)", "(rank,) + paths[parent]"),
        "path of indices": (FROM_THE_ROOT, "[parent] + (rank,)", "[parent] + (len(paths),)"),
        "root's rank in the path": ("its path is empty", "list[RankPath] = [()]", "list = [(-1,)]"),
    },
    2: {
        "one guess too many": (NOT_BELOW, RANKS, "for rank in range(width + 1)]"),
        "ranks from one": (NOT_BELOW, RANKS, "for rank in range(1, width + 1)]"),
        "leaves alone": ("is missing", "paths += level", "paths = level"),
        "first width everywhere": ("widths 2 and 3", RANKS, "for rank in range(widths[0])]"),
        "depth first": ("numbered by depth", "path: (len(path), path)):", "path: path):"),
        "prefix unchecked": (NOT_IN_WORDS, "path[:-1] not in index", "False",
                             "index[path[:-1]])", "index.get(path[:-1], 0))"),
        "duplicates dropped": ("no ValueError", "map(tuple, paths),", "set(map(tuple, paths)),"),
        "empty path passed over": ("no ValueError", ROOT_CHECK, "continue"),
        "last node is the parent": (NOT_MADE_OF, "index[path[:-1]])", "len(parents) - 1)"),
        "rank by position": (NOT_MADE_OF, "ranks.append(path[-1])", "ranks.append(len(ranks) - 1)"),
        "widths unchecked": (NOT_IN_WORDS, "len(widths) == 0 or min(widths) < 1", "False"),
    },
    3: {
        "bias random": (NOT_LM_HEAD, "torch.zeros(J, K, 1, D)", "torch.randn(J, K, 1, D)"),
        "shared block": ("share one block of memory", "torch.zeros(J, K, D, D)",
                         "torch.zeros(1, 1, D, D).expand(J, K, D, D)"),
        "private matrices shared": ("share one block", "start.repeat(K, 1, 1)",
                                    "start.expand(K, -1, -1)"),
        "owns the LM head": ("never the base's", "self.lm_heads = None",
                             "self.base = lm_head\n        self.lm_heads = None"),
        "no residual": (NOT_LM_HEAD, "x = x + F.silu(torch", "x = F.silu(torch"),
        "ReLU": (NOT_FORMULA, "x + F.silu(torch", "x + F.relu(torch"),
        "W1 transposed": (NOT_FORMULA, "x, weight.mT)", "x, weight)"),
        "last layer alone": ("such layers in a row", "zip(self.weight, biases):",
                             "zip(self.weight[-1:], biases[-1:]):"),
        "offset k": (TARGET, AHEAD, AHEAD.replace("k + 1 :", "k :").replace("k + 1 +", "k +")),
        "offset k + 2": (TARGET, AHEAD, AHEAD.replace("k + 1", "k + 2"),
                         "F.pad(tokens, (0, K + 1)", "F.pad(tokens, (0, K + 2)"),
        "same offset for all": (TARGET, AHEAD, AHEAD.replace("k + 1", "2")),
        "decay from k = 0": ("k = 1, 2, ... of decay^k", "arange(1, K + 1", "arange(K"),
        "decay of its own": ("== 2.1626", "decay=0.8", "decay=0.9"),
        "mask of the guessing position": (
            "that token's mask is False", MASKED, "pass", STACKED,
            f"mask = mask if mask is not None else tokens == tokens\n    {STACKED_MASKED}"),
        "mask always true": ("that token's mask is False", MASKED, "pass"),
        "mean over all tokens": (MEAN, COUNTS, "torch.full((K,), targets[0].numel())"),
        "one count for all heads": (MEAN, COUNTS, "(targets[0] != IGNORED).sum().expand(K)"),
        "mean over nothing": (MEAN, "count.clamp(min=1)\n\n\n"
                              "def medusa_loss", "count\n\n\ndef medusa_loss"),
    },
    4: {
        "epsilon and delta swapped": (THRESHOLD, "torch.clamp(delta *",
                                      "torch.clamp(epsilon *", "max=epsilon)", "max=delta)"),
        "entropy in bits": (THRESHOLD, ENTROPY, f"{ENTROPY} / math.log(2)"),
        "entropy with its sign lost": (THRESHOLD, "torch.exp(-entropy)", "torch.exp(entropy)"),
        "maximum for minimum": (THRESHOLD, "max=epsilon)", "min=epsilon)"),
        "0 log 0": (THRESHOLD, ENTROPY, "-(base_probs * base_probs.log()).sum(-1)"),
        "argmax root": (NEXT_ROOT, TARGETS, "targets = logits.argmax(-1)  #"),
        "root sampled at the root": (NEXT_ROOT, BONUS, "[targets[0]]"),
        "probability at the child": (
            "after the guess itself", "[parents, tok", "[range(1, len(tree)), tok"),
        "threshold at the child": ("the child's own", "epsilon)[parents]", "epsilon)[1:]"),
        "sum for product": (
            "of equally deep", BEST, BEST.replace("scores[i]", "math.exp(scores[i])")),
        "argmax not alone at 0": ("pass at its parent", f"base_probs = {PROBS}",
                                  "base_probs = logits.softmax(-1)"),
        "last token decides": ("of equally deep", BEST, "(len(nodes), scores[nodes[-1]])"),
        "most likely before deepest": (PASSED_OVER, BEST, "sum(scores[i] for i in nodes)"),
        "parent's rejection forgotten": ("although its parent was not", REACHED, UNREACHED),
        "race lost": (NEXT_ROOT, "sampling) / noise).", "sampling) * noise)."),
        "epsilon of the default": ("epsilon was the default", "probs, sampling.epsilon", "probs"),
    },
    5: {
        "redraw for each child": ("one sample a node", PASSES, REDRAWN),
        "the child's own": (
            SAMPLE, PASSES, "[*map(int.__eq__, guesses, targets)][1:]"),
        "padding 0 accepted": ("that does not pass at its parent", PASSES,
                               PASSES.replace("== targets[p]", "in (0, targets[p])")),
        "argmax for a sample": (SAMPLE, TARGETS, "targets = logits.argmax(-1)  #"),
        "next root at the root": (NEXT_ROOT, BONUS, "[targets[0]]"),
        "nothing accepted": (PASSED_OVER, BEST, f"(-{BEST[1:]}"),
        "first root again": (EMITTED, "for node in path[1:]]", "for node in path]"),
        "no next root": (EMITTED, f" + {BONUS}", ""),
        "top-k forgotten": (SAMPLE, TARGETS,
                            "targets = sample(logits, Sampling(sampling.temperature), noise)  #"),
        "guesses without the noise": ("the same noise", SCORED, "if True:"),
        "guesses without the temperature": (
            "at the temperature", "/ sampling.temperature - noise.log()", "- noise.log()"),
        "noise for typical too": ("without noise", SCORED, "if noise is None:"),
        "noise of other tokens": ("the same noise", "noise[..., token_map]",
                                  "noise[..., : len(token_map)]"),
    },
    6: {
        "product of marginals": ("do not multiply marginals", RANKED, MARGINALS),
        "ties to the longer": ("its prefix", KEY, KEY.replace("len", "-len")),
        "ties to the higher ranks": ("lower ranks", KEY,
                                     KEY.replace(" path)", " [-rank for rank in path])")),
        "shortest first": ("another tree of this size", KEY, "(len(path), -counts[path], path)"),
        "root not counted": ("n_nodes counts the root", "[: n_nodes - 1]", "[:n_nodes]"),
        "rarest first": ("its prefix", KEY, KEY.replace("-", "")),
        "no empty prefix": ("the empty prefix counts once", PREFIXES,
                            PREFIXES.replace("len", "1, len")),
        "whole rows missing": (EACH_PREFIX, PREFIXES, PREFIXES.replace(" + 1", "")),
        "whole rows alone": (EACH_PREFIX, PREFIXES, "counts.update([(), ranks])"),
        "next root forgotten": (EXPECTED, "in tree.paths) / counts", "in tree.paths[1:]) / counts"),
        "divided by all prefixes": (EXPECTED, "/ counts[()]", "/ sum(counts.values())"),
        "too few nodes unchecked": (NOT_IN_WORDS, "n_nodes < 2 or len(counts) < 2", "False"),
    },
    7: {
        "rows not moved": (NOT_KEPT, KEEP, "pass"),
        "rows from the cache's start": (NOT_KEPT, "data.device) + start", "data.device)"),
        "length to the last row": ("the length is not that", "length = start + len(rows)",
                                   "length = start + max(rows, default=-1) + 1"),
        "position by index": (NOT_PLAIN, "buffers.depths +", "torch.arange(len(tokens)) +"),
        "position one too far": (NOT_PLAIN, "(buffers.depths + past)", "(buffers.depths + length)"),
        "no mask": (NOT_PLAIN, "buffers.mask(past), cache)[0]", "None, cache)[0]"),
        "EOS kept": ("EOS were kept", AT_EOS, f"emitted{ROOM}"),
        "EOS does not end": ("after EOS", ENDS, "if length == end:"),
        "steps counted for tokens": ("tokens are counted and not steps", "while True:",
                                     "for _ in range(max_new_tokens):", ENDS, ENDS[:3] + ENDS[20:]),
        "beyond the context": ("positions are past + depth", ".clamp(max=last_position)", ""),
        "beyond the end": ("after the end is cut off", AT_EOS, AT_EOS.replace(ROOM, "")),
        "heads at every node": ("ran at several nodes", "        tokens = propose(",
            "        heads(hidden.repeat(2), lm_head)\n        tokens = propose("),
        "heads at the last node": (
            "head k does not fill depth k", "states[path[-1]]", "states[-1]"),
        "cache without room for a tree": (
            "up to its end, then a tree", "new_cache(end + len(tree))", "new_cache(end)"),
        "noise by index": (
            "the noise of its depth", "noise.at(tree.depths)", "noise.at(range(len(tree)))"),
        "heads' LM head for the base's": (
            NOT_PLAIN, "model.lm_head, heads.truncated(model.lm_head)",
            "heads.truncated(model.lm_head), model.lm_head"),
        "heads not checked": (
            "first of all, check_compatible", "check_compatible(model, heads, tree)\n    length",
            "length"),
        "one end token": ("after EOS", ENDS, ENDS.replace("in eos_ids", "in eos_ids[:1]")),
        "heads at the root": ("head k does not fill depth k", "states[path[-1]]", "states[0]"),
        "rows of the tree not committed": (NOT_PLAIN, "cache.keep(past, path)\n",
                                           "cache.length = past + len(path)\n"),
        "noise not advanced": ("advances with the text", "noise.advance(len(emitted))", "pass"),
        "root forgotten": ("root in the past", "past = length - 1", "past = length"),
    },
}  # fmt: skip

RIGHT = {
    1: {
        "matrix powers": {"tree.Tree.mask": '''
        n = len(self)
        step = torch.eye(n)
        for node in range(1, n):
            step[node, self.parents[node]] = 1
        return torch.linalg.matrix_power(step, n) > 0
'''},
        "recursive": {"tree.Tree.paths": '''
        def climb(node):
            return climb(self.parents[node]) + (self.ranks[node],) if node else ()
        return tuple(climb(node) for node in range(len(self)))
''', "tree.Tree.depths": '''
        return tuple(int(row.sum()) - 1 for row in self.mask)
'''},
        "numpy": {"tree.Tree.mask": '''
        import numpy as np
        mask = np.eye(len(self), dtype=bool)
        for node in range(1, len(self)):
            mask[node] |= mask[self.parents[node]]
        return torch.from_numpy(mask)
'''},
    },
    2: {
        "product": {"tree.cartesian_tree": '''
    from itertools import product
    levels = [list(map(range, widths[:depth])) for depth in range(1, len(widths) + 1)]
    if not levels or min(widths) < 1:
        raise ValueError(f"bad widths {list(widths)}")
    return tree_from_paths([path for level in levels for path in product(*level)])
'''},
        "recursive, by search": {"tree.cartesian_tree": '''
    if not widths or min(widths) < 1:
        raise ValueError(f"bad widths {list(widths)}")
    def below(path):
        for rank in range(widths[len(path)]):
            yield path + (rank,)
            if len(path) + 1 < len(widths):
                yield from below(path + (rank,))
    return tree_from_paths(below(()))
''', "tree.tree_from_paths": '''
    nodes = sorted(map(tuple, paths), key=lambda path: (len(path), path))
    if not nodes:
        raise ValueError("no paths")
    if () in nodes:
        raise ValueError("path []: the root is implied")
    nodes = [(), *nodes]
    for path in nodes[1:]:
        if path[:-1] not in nodes:
            raise ValueError(f"path {list(path)}: its prefix {list(path[:-1])} is missing")
    parents = [nodes.index(path[:-1]) for path in nodes[1:]]
    return Tree((-1, *parents), (-1, *(path[-1] for path in nodes[1:])))
'''},
    },
    3: {
        "head by head": {"medusa.MedusaHeads.forward": '''
        logits = []
        for k in range(self.config.num_heads):
            x = hidden
            for j in range(self.config.num_hidden_layers):
                x = x + F.silu(F.linear(x, self.weight[j, k], self.bias[j, k, 0]))
            logits.append(lm_head(x) if self.lm_heads is None else F.linear(x, self.lm_heads[k]))
        return torch.stack(logits)
'''},
        "target by target": {"medusa.targets_ahead": '''
    ahead = torch.full((K + 1, *tokens.shape), IGNORED)
    for k, row, t in torch.cartesian_prod(*map(torch.arange, ahead.shape)).tolist():
        at = t + k + 1
        if at < tokens.shape[1] and (mask is None or mask[row, at]):
            ahead[k, row, t] = tokens[row, at]
    return ahead
''', "medusa.medusa_loss": '''
    losses = []
    for k in range(len(logits)):
        rows = at_least_float32(logits[k]).flatten(0, -2).log_softmax(-1)
        terms = [-row[i] for row, i in zip(rows, targets[k].flatten().tolist()) if i != IGNORED]
        count = len(terms) if counts is None else counts[k].item()
        losses.append(sum(terms, start=rows[:0].sum()) / max(count, 1))
    return sum(decay**k * loss for k, loss in enumerate(losses, start=1)), torch.stack(losses)
'''},
    },
    4: {
        "token by token": {"medusa.typical_threshold": '''
    delta = math.sqrt(epsilon) if delta is None else delta
    found = []
    for row in base_probs.reshape(-1, base_probs.shape[-1]).tolist():
        found.append(min(epsilon, delta * math.exp(sum(p * math.log(p) for p in row if p > 0))))
    return torch.tensor(found, dtype=base_probs.dtype).view(base_probs.shape[:-1])
''', "medusa.sample": '''
    if sampling.temperature == 0:
        return logits.argmax(-1)
    return (noise / logits_to_probs(logits, sampling)).argmin(-1)
'''},
        "recursive": {"medusa.accept": '''
    base_probs = logits_to_probs(logits, sampling)
    least = typical_threshold(base_probs, sampling.epsilon)
    def best(node):
        found = (0, 0.0, [node])
        for child in range(node + 1, len(tree)):
            prob = base_probs[node, tokens[child]]
            if tree.parents[child] == node and prob > least[node]:
                depth, score, path = best(child)
                found = max(found, (depth + 1, score + prob.log().item(), [node, *path]))
        return found
    path = best(0)[2]
    root = sample(logits[path[-1:]], sampling, noise[path[-1:]])
    return path, tokens[path[1:]].tolist() + root.tolist()
'''},
    },
    5: {
        "downwards": {"medusa.accept": '''
    path, emitted = [0], []
    while True:
        at = path[-1]
        here = None if noise is None else noise[at : at + 1]
        emitted += sample(logits[at : at + 1], sampling, here).tolist()
        children = [node for node in range(len(tree)) if tree.parents[node] == at]
        right = [node for node in children if tokens[node].item() == emitted[-1]]
        if not right:
            return path, emitted
        path += right
''', "medusa.gumbel_scores": '''
    if sampling.typical or noise is None:
        return logits
    noise = noise if token_map is None else noise[..., token_map]
    return (logits / sampling.temperature).log_softmax(-1) - noise.log()
'''},
        "every node's whole path": {"medusa.accept": '''
    targets, best = sample(logits, sampling, noise), []
    for row in tree.mask:
        path = row.nonzero()[:, 0].tolist()
        if len(path) > len(best) and torch.equal(tokens[path[1:]], targets[path[:-1]]):
            best = path
    return best, tokens[best[1:]].tolist() + targets[best[-1:]].tolist()
'''},
    },
    6: {
        "best first": {"tree.calibrated_tree": '''
    counts = rank_paths if isinstance(rank_paths, Counter) else prefix_counts(rank_paths)
    if n_nodes < 2 or len(counts) < 2:
        raise ValueError(f"n_nodes = {n_nodes}: too few")
    chosen, more = [()], True
    while len(chosen) < n_nodes and more:
        more = [path for path in counts if path not in chosen and path[:-1] in chosen]
        chosen += sorted(more, key=lambda path: (-counts[path], len(path), path))[:1]
    return tree_from_paths(chosen[1:])
'''},
        "heap": {"tree.ranked_prefixes": '''
    import heapq
    heap = [(-count, len(path), path) for path, count in counts.items() if path]
    return [path for *_, path in heapq.nsmallest(len(heap), heap)]
''', "tree.prefix_counts": '''
    counts = Counter()
    for ranks in rank_paths:
        for depth in range(len(ranks) + 1):
            counts[tuple(ranks)[:depth]] += 1
    return counts
''', "tree.expected_tokens": '''
    return 1 + sum(counts[path] / counts[()] for path in tree.paths[1:])
'''},
    },
    7: {
        "row by row": {"model.KVCache.keep": '''
        for to, row in enumerate(rows):
            self.data[..., start + to, :] = self.data[..., start + row, :].clone()
        self.length = start + len(rows)
'''},
        "another loop": {"medusa.medusa_generate": '''
    check_compatible(model, heads, tree)
    end, text = max_length(model, prompt, max_new_tokens), list(prompt)
    cache, noise = model.new_cache(end + len(tree)), SharedGumbelNoise(model, sampling, generator)
    nodes, tokens = ROOT_ONLY, torch.tensor(text[-1:])
    states = model(torch.tensor([text]), cache=cache)[0, -1:]
    hidden = states[0]
    while len(text) < end:
        logits, noise_now = model.lm_head(states), noise.at(nodes.depths)
        path, new = accept(nodes, tokens, logits, sampling, noise_now)
        if len(text) > len(prompt):
            cache.keep(len(text) - 1, path)
        new = truncate_at_eos(new[: end - len(text)], model.config.eos_ids)
        yield Step(new, nodes, tokens, path, hidden, logits, noise_now)
        text += new
        noise.advance(len(new))
        if text[-1] in model.config.eos_ids or len(text) == end:
            return
        nodes, hidden = tree, states[path[-1]]
        past, buffers = len(text) - 1, TreeBuffers(nodes, end, model.lm_head.weight)
        lm_head = heads.truncated(model.lm_head)
        tokens = propose(None, heads, lm_head, hidden, text[-1], buffers, noise)
        mask = torch.cat((torch.ones(len(nodes), past, dtype=torch.bool), nodes.mask), dim=1)
        positions = [min(past + depth, end - 1) for depth in nodes.depths]
        states = model(tokens[None], torch.tensor(positions), mask, cache)[0]
'''},
    },
}  # fmt: skip
