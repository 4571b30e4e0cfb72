"""What students hand in: solutions with one plausible mistake each, and right ones that are written otherwise. All are made of the project's own text.

WRONG: set -> {name: (file, {text of the reference: what stands there instead}, words of the message that must name the mistake)}
RIGHT: set -> {name: {function: another body}}
"""

NOT_PLAIN = "not the one that plain decoding gives"
MEAN = "over the targets that carry loss and only those"
FORMULA = "the threshold is not min(epsilon, delta * exp(-H))"
WIDTHS_CHECK = """    if not widths or any(width < 1 for width in widths):
        raise ValueError(f"widths {list(widths)}: at least one, and each at least 1")
"""
PREFIX_CHECK = """        if path[:-1] not in index:
            raise ValueError(f"path {list(path)}: its prefix {list(path[:-1])} is missing")
"""
ROOT_CHECK = """        if not path:
            raise ValueError("path []: the root is implied and must not be listed")
"""
GUESSES_CHECK = """    if n_nodes < 2 or len(counts) < 2:
        raise ValueError(f"n_nodes = {n_nodes}, {len(counts)} prefixes: a calibrated tree needs at least one node below the root")
"""
RANKED = "return sorted((path for path in counts if path), key=lambda path: (-counts[path], len(path), path))"
MARGINALS = """heads = Counter()
    for path in counts:
        if path:
            heads[len(path), path[-1]] += counts[path]
    worth = {path: math.prod(heads[d, rank] / counts[()] for d, rank in enumerate(path, start=1)) for path in counts}
    return sorted((path for path in counts if path), key=lambda path: (-worth[path], len(path), path))"""
EYE = 'torch.eye(len(self), dtype=torch.bool, device="cpu")'
INHERIT = "mask[node] |= mask[parent]"
DRAWS = "draws = logits.argmax(-1) if sampling.temperature == 0 else draw(base_probs, noise)"
PASSES = "passes = [guess == drawn[parent] for guess, parent in zip(guesses, tree.parents)]"
REDRAW = """passes = [
            guess == (draw(base_probs[parent : parent + 1], torch.empty_like(base_probs[:1]).exponential_()).item() if sampling.temperature else drawn[parent])
            for guess, parent in zip(guesses, (0, *tree.parents[1:]))
        ]"""
CARRIES = "carries = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask[:, ahead : ahead + n]"
COUNT = "(carries.sum() if count is None else count).clamp(min=1)"
KEEP = "self.data[..., start : start + len(rows), :] = self.data.index_select(4, index)"
THRESHOLD = "torch.clamp((math.sqrt(epsilon) if delta is None else delta) * torch.exp(-entropy), max=epsilon)"
BONUS = "[guesses[node] for node in path[1:]] + [drawn[path[-1]]]"
LONGER = "reached[node] = [*reached[parent][0], node], reached[parent][1] + scores[node]"

WRONG = {
    1: {
        "sibling visible": ("tree.py", {INHERIT: INHERIT + "\n            mask[node, [i for i in range(node) if self.parents[i] == parent]] = True"}, "sees nodes that are not its ancestors"),
        "causal mask": ("tree.py", {EYE: "torch.ones(len(self), len(self), dtype=torch.bool).tril()"}, "a node sees a sibling"),
        "blind to itself": ("tree.py", {EYE: "torch.zeros(len(self), len(self), dtype=torch.bool)"}, "does not see itself"),
        "parent alone": ("tree.py", {INHERIT: "mask[node, parent] = True"}, "does not see all of its ancestors"),
        "transposed": ("tree.py", {"        return mask\n": "        return mask.T\n"}, "a node sees its own children"),
        "everything visible": ("tree.py", {EYE: "torch.ones(len(self), len(self), dtype=torch.bool)"}, "sees nodes that are not its ancestors"),
        "mask of floats": ("tree.py", {"        return mask\n": "        return mask.float()\n"}, "the mask is one bool for each pair"),
        "depth is the index": ("tree.py", {"tuple(len(path) for path in self.paths)": "tuple(range(len(self)))"}, "is not its number of steps from the root"),
        "depth from one": ("tree.py", {"tuple(len(path) for path in self.paths)": "tuple(len(path) + 1 for path in self.paths)"}, "the root is at depth 0"),
        "path upwards": ("tree.py", {"paths[parent] + (rank,)": "(rank,) + paths[parent]"}, "not the ranks from the root down"),
        "path of indices": ("tree.py", {"paths[parent] + (rank,)": "paths[parent] + (len(paths),)"}, "not the ranks from the root down"),
        "root's rank in the path": ("tree.py", {"        paths: list[Ranks] = [()]\n": "        paths: list[Path] = [(-1,)]\n"}, "its path is empty"),
    },
    2: {
        "one guess too many": ("tree.py", {"for rank in range(width)]": "for rank in range(width + 1)]"}, "a rank at depth d is not below widths[d-1]"),
        "ranks from one": ("tree.py", {"for rank in range(width)]": "for rank in range(1, width + 1)]"}, "a rank at depth d is not below widths[d-1]"),
        "leaves alone": ("tree.py", {"paths += level": "paths = level"}, "is missing"),
        "first width everywhere": ("tree.py", {"for rank in range(width)]": "for rank in range(widths[0])]"}, "widths 2 and 3"),
        "depth first": ("tree.py", {"key=lambda path: (len(path), path)):": "key=lambda path: path):"}, "nodes stand by depth"),
        "prefix unchecked": ("tree.py", {PREFIX_CHECK: "", "index[path[:-1]])": "index.get(path[:-1], 0))"}, "the ValueError does not say"),
        "duplicates dropped": ("tree.py", {"paths = [tuple(path) for path in paths]": "paths = list({tuple(path) for path in paths})"}, "no ValueError"),
        "empty path passed over": ("tree.py", {ROOT_CHECK: "        if not path:\n            continue\n"}, "no ValueError"),
        "last node is the parent": ("tree.py", {"parents.append(index[path[:-1]])": "parents.append(len(parents) - 1)"}, "does not hold the paths that it was made of"),
        "rank by position": ("tree.py", {"ranks.append(path[-1])": "ranks.append(len(ranks) - 1)"}, "does not hold the paths that it was made of"),
        "widths unchecked": ("tree.py", {WIDTHS_CHECK: ""}, "the ValueError does not say"),
    },
    3: {
        "bias random": ("medusa.py", {"nn.Parameter(torch.zeros(J, K, 1, D))": "nn.Parameter(torch.randn(J, K, 1, D))"}, "a new head is not exactly the LM head"),
        "shared block": ("medusa.py", {"torch.zeros(J, K, D, D)": "torch.zeros(1, 1, D, D).expand(J, K, D, D)"}, "share one block of memory"),
        "private matrices shared": ("medusa.py", {"start.repeat(K, 1, 1)": "start.expand(K, -1, -1)"}, "share one"),
        "owns the LM head": ("medusa.py", {"        self.lm_heads = None\n": "        self.lm_heads = None\n        self.base = lm_head\n"}, "never the base's"),
        "no residual": ("medusa.py", {"x = x + F.silu(": "x = F.silu("}, "a new head is not exactly the LM head"),
        "ReLU": ("medusa.py", {"x + F.silu(": "x + F.relu("}, "is not W2 (h + SiLU(W1 h + b1))"),
        "W1 transposed": ("medusa.py", {"weight.mT)": "weight)"}, "is not W2 (h + SiLU(W1 h + b1))"),
        "last layer alone": ("medusa.py", {"zip(self.weight, self.bias):": "zip(self.weight[-1:], self.bias[-1:]):"}, "such layers one behind the other"),
        "offset k": ("medusa.py", {"tokens, mask, k + 1,": "tokens, mask, k,"}, "token t+k+1"),
        "offset k + 2": ("medusa.py", {"tokens, mask, k + 1,": "tokens, mask, k + 2,"}, "token t+k+1"),
        "same offset for all": ("medusa.py", {"tokens, mask, k + 1,": "tokens, mask, 2,"}, "token t+k+1"),
        "decay from k = 0": ("medusa.py", {"decay**k for k in range(1, len(losses) + 1)": "decay**k for k in range(len(losses))"}, "head k weighs 0.8^k, k from 1"),
        "decay of its own": ("medusa.py", {"DECAY = 0.8": "DECAY = 0.9"}, "head k weighs 0.8^k"),
        "mask of the guessing position": ("medusa.py", {"mask[:, ahead : ahead + n]": "mask[:, :n]"}, MEAN),
        "mask always true": ("medusa.py", {CARRIES: "carries = torch.ones_like(targets, dtype=torch.bool)"}, "a target whose mask is False changes the loss"),
        "mean over all tokens": ("medusa.py", {COUNT: "max(carries.numel(), 1)"}, MEAN),
        "one count for all heads": ("medusa.py", {COUNT: "max(tokens.shape[0] * (tokens.shape[1] - 2), 1)"}, MEAN),
        "mean over nothing": ("medusa.py", {COUNT: "(carries.sum() if count is None else count)"}, "without targets the loss is not finite"),
    },
    4: {
        "epsilon and delta swapped": ("medusa.py", {THRESHOLD: "torch.clamp(epsilon * torch.exp(-entropy), max=math.sqrt(epsilon) if delta is None else delta)"}, "not the other way round"),
        "entropy in bits": ("medusa.py", {"-torch.xlogy(base_probs, base_probs).sum(-1)": "-torch.xlogy(base_probs, base_probs).sum(-1) / math.log(2)"}, FORMULA),
        "entropy with its sign lost": ("medusa.py", {"torch.exp(-entropy)": "torch.exp(entropy)"}, FORMULA),
        "maximum for minimum": ("medusa.py", {"torch.exp(-entropy), max=epsilon)": "torch.exp(-entropy), min=epsilon)"}, FORMULA),
        "0 log 0": ("medusa.py", {"torch.xlogy(base_probs, base_probs)": "(base_probs * base_probs.log())"}, FORMULA),
        "argmax root": ("medusa.py", {DRAWS: "draws = logits.argmax(-1)"}, "it is not the argmax"),
        "root drawn at the root": ("medusa.py", {"+ [drawn[path[-1]]]": "+ [drawn[0]]"}, "the next root is not drawn"),
        "probability at the child": ("medusa.py", {"base_probs[parents, tokens]": "base_probs.gather(1, tokens[:, None])[:, 0]"}, "pass the rule at their parents"),
        "threshold at the child": ("medusa.py", {"sampling.epsilon)[parents])": "sampling.epsilon))"}, "pass the rule at their parents"),
        "last token decides": ("medusa.py", {"reached[parent][1] + scores[node]": "scores[node]"}, "whose tokens together are likeliest wins"),
        "likeliest before deepest": ("medusa.py", {"(len(found[0]), found[1]))": "found[1])"}, "a deeper node was passed over"),
        "parent's rejection forgotten": ("medusa.py", {
            "if passes[node] and parent in reached:": "if passes[node]:",
            LONGER: "reached[node] = tree.mask[node].nonzero()[:, 0].tolist(), reached.get(parent, ([], 0.0))[1] + scores[node]",
        }, "that does not pass the rule"),
        "race lost": ("medusa.py", {"(probs / noise).argmax(-1)": "(probs * noise).argmax(-1)"}, "tokens are not drawn with their probabilities"),
        "epsilon of the default": ("medusa.py", {"typical_threshold(base_probs, sampling.epsilon)": "typical_threshold(base_probs)"}, "rejected although the threshold is next to 0"),
    },
    5: {
        "redraw for each child": ("medusa.py", {PASSES: REDRAW}, "one draw for each node, for all its children"),
        "the child's own draw": ("medusa.py", {PASSES: "passes = [guess == own for guess, own in zip(guesses, drawn)]"}, "pass the rule"),
        "padding 0 accepted": ("medusa.py", {PASSES: PASSES.replace("guess == drawn[parent]", "guess in (0, drawn[parent])")}, "that does not pass the rule at its parent"),
        "argmax for a draw": ("medusa.py", {DRAWS: "draws = logits.argmax(-1)"}, "the next root is not the draw of the last accepted node"),
        "next root at the root": ("medusa.py", {"+ [drawn[path[-1]]]": "+ [drawn[0]]"}, "the next root is not the draw of the last accepted node"),
        "nothing accepted": ("medusa.py", {"(len(found[0]), found[1]))": "(-len(found[0]), found[1]))"}, "a deeper node was passed over"),
        "first root again": ("medusa.py", {BONUS: BONUS.replace("path[1:]", "path")}, "a step earns the guesses on the path"),
        "no next root": ("medusa.py", {BONUS: "[guesses[node] for node in path[1:]]"}, "a step earns the guesses on the path"),
        "top-k forgotten": ("medusa.py", {"base_probs = logits_to_probs(logits, sampling)  #": "base_probs = logits_to_probs(logits, Sampling(sampling.temperature))  #"}, "texts do not come with the base model's probabilities"),
        "guesses without the noise": ("medusa.py", {"return logits if noise is None or sampling.typical else": "return logits if True else"}, "rank by their race with the same noise"),
        "guesses without the temperature": ("medusa.py", {"scale_logits(logits, sampling.temperature).softmax(-1) / noise": "logits.softmax(-1) / noise"}, "at the temperature"),
        "noise for typical too": ("medusa.py", {"if noise is None or sampling.typical else": "if noise is None else"}, "the noise is not theirs"),
    },
    6: {
        "rows not moved": ("model.py", {KEEP: "pass"}, "is not the one that was to be kept there"),
        "rows from the cache's start": ("model.py", {"device=self.data.device) + start": "device=self.data.device)"}, "is not the one that was to be kept there"),
        "length to the last row": ("model.py", {"self.length = start + len(rows)": "self.length = start + max(rows, default=-1) + 1"}, "the length is not that of the past and the kept rows"),
        "views left behind": ("model.py", {KEEP: "self.data = torch.cat((self.data[..., :start, :], self.data.index_select(4, index), self.data[..., start + len(rows) :, :]), dim=4)"},
                              "layers no longer look at the data"),
        "position by index": ("medusa.py", {"plan.depths + past": "torch.arange(len(tokens)) + past"}, NOT_PLAIN),
        "position one too far": ("medusa.py", {"plan.depths + past": "plan.depths + past + 1"}, "it can earn nothing"),
        "no mask": ("medusa.py", {"plan.mask(past), cache)[0]": "None, cache)[0]"}, NOT_PLAIN),
        "EOS kept": ("medusa.py", {"emitted := truncate_at_eos(emitted, ends)": "emitted"}, "tokens behind EOS were kept"),
        "EOS does not end": ("medusa.py", {"if length == end or emitted[-1] in ends:": "if length == end:"}, "behind EOS"),
        "steps counted for tokens": ("medusa.py", {"    while length < end:\n": "    for _ in range(max_new_tokens):\n",
                                                   "if length == end or emitted[-1]": "if emitted[-1]"}, "tokens are counted and not steps"),
        "no room at the end": ("medusa.py", {"if plan.depth > end - length - 1:": "if False:"}, "it can earn nothing"),
        "cut too early": ("medusa.py", {"if plan.depth > end - length - 1:": "if plan.depth > max(end - length - 2, 0):",
                                        "tree.cut(end - length - 1)": "tree.cut(max(end - length - 2, 0))"}, "and no further"),
        "heads at every node": ("medusa.py", {"        tokens = propose(": "        [heads(state, lm_head) for state in states]\n        tokens = propose("}, "the heads run once a step"),
        "heads at the root": ("medusa.py", {"states[path[-1]], emitted[-1]": "states[0], emitted[-1]"}, "head k does not fill depth k"),
        "rows of the tree not committed": ("medusa.py", {"        cache.keep(past, path)  #": "        cache.length = past + len(path)  #"}, NOT_PLAIN),
        "noise stands still": ("medusa.py", {"        noise.advance(len(emitted))\n": ""}, NOT_PLAIN),
        "root forgotten": ("medusa.py", {"        past = length - 1  #": "        past = length  #"}, "without the root in the past"),
    },
    7: {
        "product of marginals": ("tree.py", {RANKED: MARGINALS, "import torch\n": "import math\n\nimport torch\n"}, "do not multiply marginals"),
        "ties to the longer": ("tree.py", {"(-counts[path], len(path), path)": "(-counts[path], -len(path), path)"}, "its prefix"),
        "ties to the higher ranks": ("tree.py", {"(-counts[path], len(path), path)": "(-counts[path], len(path), tuple(-rank for rank in path))"}, "lower ranks"),
        "shortest first": ("tree.py", {"(-counts[path], len(path), path)": "(len(path), -counts[path], path)"}, "another tree of this size"),
        "root not counted": ("tree.py", {"[: n_nodes - 1]": "[:n_nodes]"}, "n_nodes counts the root"),
        "rarest first": ("tree.py", {"(-counts[path], len(path), path)": "(counts[path], len(path), path)"}, "its prefix"),
        "no empty prefix": ("tree.py", {"for depth in range(len(ranks) + 1)": "for depth in range(1, len(ranks) + 1)"}, "the empty prefix stands once"),
        "whole rows missing": ("tree.py", {"for depth in range(len(ranks) + 1)": "for depth in range(len(ranks))"}, "once for each prefix"),
        "whole rows alone": ("tree.py", {"counts.update(ranks[:depth] for depth in range(len(ranks) + 1))": "counts.update([(), ranks])"}, "once for each prefix"),
        "next root forgotten": ("tree.py", {"for path in tree.paths) / counts[()]": "for path in tree.paths[1:]) / counts[()]"}, "the next root, and each node's chance"),
        "divided by all prefixes": ("tree.py", {"/ counts[()]": "/ sum(counts.values())"}, "the next root, and each node's chance"),
        "too few nodes unchecked": ("tree.py", {GUESSES_CHECK: ""}, "the ValueError does not say"),
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
        def depth(node):
            return 1 + depth(self.parents[node]) if node else 0

        return tuple(map(depth, range(len(self))))
'''},
        "numpy": {"tree.Tree.mask": '''
        import numpy as np

        mask = np.zeros((len(self), len(self)), dtype=bool)
        for node in range(len(self)):
            above = node
            while above != -1:
                mask[node, above] = True
                above = self.parents[above]
        return torch.from_numpy(mask)
'''},
    },
    2: {
        "product": {"tree.cartesian_tree": '''
    from itertools import product

    widths = list(widths)
    if not widths or min(widths) < 1:
        raise ValueError(f"bad widths {widths}")
    return tree_from_paths([path for d in range(1, len(widths) + 1) for path in product(*map(range, widths[:d]))])
'''},
        "recursive, by search": {"tree.cartesian_tree": '''
    widths = list(widths)
    if not widths or min(widths) < 1:
        raise ValueError(f"bad widths {widths}")

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
            raise ValueError(f"path {list(path)} hangs in the air")
    return Tree((-1, *(nodes.index(path[:-1]) for path in nodes[1:])), (-1, *(path[-1] for path in nodes[1:])))
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
        "target by target": {"medusa.medusa_loss": '''
        losses = []
        T = tokens.shape[1]
        for k in range(1, logits.shape[0] + 1):
            terms = [
                -at_least_float32(logits[k - 1, b, t]).log_softmax(-1)[tokens[b, t + k + 1]]
                for b in range(tokens.shape[0])
                for t in range(min(T - k - 1, logits.shape[2]))
                if mask is None or mask[b, t + k + 1]
            ]
            losses.append(torch.stack(terms).mean() if terms else at_least_float32(logits[k - 1].flatten()[:0]).sum())
        losses = torch.stack(losses)
        return sum(decay**k * loss for k, loss in enumerate(losses, start=1)), losses
'''},
    },
    4: {
        "token by token": {"medusa.typical_threshold": '''
    delta = math.sqrt(epsilon) if delta is None else delta
    rows = base_probs.reshape(-1, base_probs.shape[-1])
    found = [min(epsilon, delta * math.exp(sum(p * math.log(p) for p in row if p > 0))) for row in rows.tolist()]
    return torch.tensor(found, dtype=base_probs.dtype).view(base_probs.shape[:-1])
''', "medusa.draw": '''
    return (noise / probs).argmin(-1)
'''},
        "recursive": {"medusa.accept": '''
    base_probs = logits_to_probs(logits, sampling)
    least = typical_threshold(base_probs, sampling.epsilon)

    def best(node):
        found = (0, 0.0, [node])
        for child in range(node + 1, len(tree)):
            if tree.parents[child] == node and base_probs[node, tokens[child]] > least[node]:
                depth, score, path = best(child)
                found = max(found, (depth + 1, score + base_probs[node, tokens[child]].log().item(), [node, *path]))
        return found

    path = best(0)[2]
    return path, tokens[path[1:]].tolist() + draw(base_probs[path[-1:]], noise[path[-1:]]).tolist()
'''},
    },
    5: {
        "downwards": {"medusa.accept": '''
    path, emitted = [0], []
    while True:
        at = path[-1]
        if sampling.temperature == 0:
            token = logits[at].argmax().item()
        else:
            token = draw(logits_to_probs(logits[at : at + 1], sampling), noise[at : at + 1]).item()
        emitted.append(token)
        child = [node for node in range(len(tree)) if tree.parents[node] == at and tokens[node].item() == token]
        if not child:
            return path, emitted
        path.append(child[0])
'''},
        "vectorised": {"medusa.accept": '''
    draws = logits.argmax(-1) if sampling.temperature == 0 else draw(logits_to_probs(logits, sampling), noise)
    parents = torch.tensor(tree.parents)
    passes = (tokens == draws[parents]).index_fill(0, torch.tensor([0]), True)
    accepted = (passes | ~tree.mask).all(1)  # all that a node sees has passed
    last = max(accepted.nonzero().flatten().tolist(), key=tree.depths.__getitem__)
    path = tree.mask[last].nonzero().flatten()
    return path.tolist(), draws[path].tolist()
''', "medusa.gumbel_scores": '''
    if sampling.typical or noise is None:
        return logits
    return scale_logits(logits, sampling.temperature).log_softmax(-1) - noise.log()
'''},
    },
    6: {
        "row by row": {"model.KVCache.keep": '''
        for to, row in enumerate(rows):
            self.data[..., start + to, :] = self.data[..., start + row, :].clone()
        self.length = start + len(rows)
'''},
        "another loop": {"medusa.medusa_generate": '''
    check_compatible(model, heads, tree)
    end, text, ends = max_length(model, prompt, max_new_tokens), list(prompt), model.config.eos_ids
    cache, noise = model.new_cache(end + len(tree)), SharedGumbelNoise(model.lm_head.weight, sampling, generator)
    used, tokens, states = ROOT_ONLY, torch.tensor(text[-1:]), model(torch.tensor([text]), cache=cache)[0, -1:]
    while len(text) < end:
        path, earned = accept(used, tokens, model.lm_head(states), sampling, noise.at(used.depths))
        if used is not ROOT_ONLY:
            cache.keep(len(text) - 1, path)
        for place, token in enumerate(earned):
            if token in ends:
                earned = earned[: place + 1]
                break
        yield earned
        text += earned
        noise.advance(len(earned))
        if text[-1] in ends or len(text) == end:
            return
        used = tree.cut(min(max(tree.depths), end - len(text) - 1))
        if used == ROOT_ONLY:
            used = Tree((-1,), (-1,))
        past, plan = len(text) - 1, Plan(used, end, model.lm_head.weight)
        tokens = propose(heads, model.lm_head, states[path[-1]], text[-1], plan, sampling, noise)
        mask = torch.cat((torch.ones(len(used), past, dtype=torch.bool), used.mask), dim=1)
        states = model(tokens[None], torch.tensor(used.depths) + past, mask, cache)[0]
'''},
    },
    7: {
        "best first": {"tree.calibrated_tree": '''
    counts = rank_paths if isinstance(rank_paths, Counter) else prefix_counts(rank_paths)
    if n_nodes < 2 or len(counts) < 2:
        raise ValueError(f"n_nodes = {n_nodes}: too few")
    chosen = [()]
    while len(chosen) < n_nodes:
        open_paths = [path for path in counts if path and path not in chosen and path[:-1] in chosen]
        if not open_paths:
            break
        chosen.append(min(open_paths, key=lambda path: (-counts[path], len(path), path)))
    return tree_from_paths(chosen[1:])
'''},
        "heap": {"tree.ranked_prefixes": '''
    import heapq

    heap = [(-count, len(path), path) for path, count in counts.items() if path]
    heapq.heapify(heap)
    return [heapq.heappop(heap)[2] for _ in range(len(heap))]
''', "tree.prefix_counts": '''
    counts = Counter()
    for ranks in rank_paths:
        prefix = ()
        counts[prefix] += 1
        for rank in ranks:
            prefix += (rank,)
            counts[prefix] += 1
    return counts
''', "tree.expected_tokens": '''
    return 1 + sum(counts[path] / counts[()] for path in tree.paths[1:])
'''},
    },
}  # fmt: skip
