"""Would the tests notice? Faults are put into the code one at a time, and its tests run: python bench/mutants.py tree.py --sample 200

Faults are those of cosmic-ray's operators (numbers, comparisons, arithmetic, conditions, loops, decorators), without those that change
annotations alone. Each runs in a child of its own, in a copy of the repository, until the first test fails. Results are added to
bench/results/mutants.json after every module, which Ctrl-C ends early; survivors stand there with the line that nobody missed. Needs bench/requirements-mutants.txt.
"""

import ast
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import hypothesis  # imported here once, as the others are, not in every child
import pytest
import torch
import torch._dynamo  # noqa: F401
from tqdm import tqdm

from bench.child import in_a_child
from bench.figures import machine
from data.command import OneLineParser, run
from data.packages import optional
from model import read_json, write_json

TESTS = {  # the tests that know a module, those that fail soonest first
    "tree.py": ["test_tree.py"],
    "model.py": ["test_model.py", "test_llamas.py", "test_medusa.py"],
    "medusa.py": ["test_medusa.py", "test_medusa2.py", "test_train.py"],
    "train.py": ["test_medusa2.py", "test_train.py", "test_checkpoint.py"],
    "data/checkpoint.py": ["test_checkpoint.py"],
}
ONLY = {
    "train.py": (
        "learning_rate",
        "sine_ramp",
        "targets_ahead",
        "backpropagate",
        "is_matrix",
        "adamw",
        "train_loop",
        "schedule",
    )
}  # functions; of the others all
PAIRS = """Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul Mod_Mul Pow_Mul BitOr_BitAnd BitAnd_BitOr LShift_RShift RShift_LShift
Eq_NotEq NotEq_Eq Lt_LtE Lt_Gt LtE_Lt LtE_Gt Gt_GtE Gt_Lt GtE_Gt GtE_Lt Is_IsNot IsNot_Is In_NotIn NotIn_In Delete_Not Delete_USub Delete_Invert""".split()
PLAIN = """AddNot ReplaceTrueWithFalse ReplaceFalseWithTrue ReplaceAndWithOr ReplaceOrWithAnd ReplaceBreakWithContinue ReplaceContinueWithBreak
NumberReplacer RemoveDecorator ZeroIterationForLoop""".split()
SECONDS = 120  # a test that runs longer has met something endless
PHASES = (
    hypothesis.Phase.explicit,
    hypothesis.Phase.generate,
)  # a failure is enough, it need not be made small
EQUIVALENT = {  # (module, line with the fault, less its comment): why no test can tell
    ("tree.py", "ranked = log_probs.topk(min(n_nodes + 1, log_probs.shape[-1])).values.tolist()"): "two guesses more of each head than a tree of this size can hold",
    ("tree.py", "ranked = log_probs.topk(min(n_nodes - 0, log_probs.shape[-1])).values.tolist()"): "one guess more of each head than a tree of this size can hold",
    ("tree.py", "ranked = log_probs.topk(min(n_nodes - 1, log_probs.shape[1])).values.tolist()"): "of (K, V) the last dimension is the second",
    ("tree.py", "if (rank := path[-1] + 1) < len(ranked[ -1]):"): "every head has equally many guesses",
    ("model.py", "if mask is None and start > -1 and T > 1:"): "at the start of a text this mask is the causal one, only slower",
    ("model.py", "if mask is None and start >= 0 and T > 1:"): "at the start of a text this mask is the causal one, only slower",
    ("model.py", "if mask is None and start > 0 and T > 0:"): "a mask of one row, all true, hides nothing",
    ("model.py", "if mask is None and start > 0 and T >= 1:"): "a mask of one row, all true, hides nothing",
    ("model.py", 'raise ValueError(f"{path}: {missing[ -1]} is missing")'): "of several missing fields any may be named",
    ("model.py", "LARGE = 1 << 17"): "a matter of speed",
    ("model.py", "cos = torch.cat((angle.cos(), angle.cos()), dim=1)"): "of two dimensions the last is the second",
    ("model.py", "module.packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), 9)"): "a matter of speed",
    ("medusa.py", "self.like = at_least_float32(like[0, : -1]).new_empty(like.shape[0])"): "only its dtype and device are taken",
    ("medusa.py", "return (probs / noise).argmax(1)"): "of (n, V) the last dimension is the second",
    ("medusa.py", "draws = logits.argmax(1) if sampling.temperature == 0 else draw(base_probs, noise)"): "of (N, V) the last dimension is the second",
    ("medusa.py", "if 0 < sampling.top_k <= logits.shape[-1]:"): "then nothing is left out",
    ("medusa.py", "self.like = at_least_float32(like[ -1, :0]).new_empty(like.shape[0])"): "only its dtype and device are taken",
    ("medusa.py", "reached = {0: ([0], 1.0)}"): "every path begins there",
    ("medusa.py", "states = model(tokens[None], cache=cache)[ -1, -1:]"): "of a batch of one the last row is the first",
    ("medusa.py", "return logits if noise is None or sampling.typical else scale_logits(logits, sampling.temperature).softmax(1) / noise"): "of (K, V) the last dimension is the second",
    ("medusa.py", "reached = {0: ([0], -1.0)}"): "every path begins there",
    ("medusa.py", "if plan.depth > end - length - 2:"): "a tree that is cut at its own depth is itself",
    ("medusa.py", "if sampling.temperature > -1 or sampling.typical:"): "greedy decoding does not look at what it computes then",
    ("medusa.py", "noise.advance( 2)"): "plain decoding has looked one position ahead, and no further",
    ("train.py", "used[ -1, 0] |= ~used.any()"): "any position without a target will do",
    ("train.py", 'bar = tqdm(range(first, steps), desc="training", unit="step", mininterval= 2, initial=first, total=steps, disable=process > 0)'): "a matter of looks",
    ("medusa.py", 'parts |= {f"blocks.{k}.layers.{j}.bias": self.bias.detach()[j, k, -1] for k in range(K) for j in range(J)}'): "of a dimension of one the last entry is the first",
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    line: int
    before: str
    after: str
    code: str


def equivalent(module: str, line: str) -> str:
    """Why no test can tell; nothing if one should."""
    return EQUIVALENT.get((module, line.partition("  # ")[0]), "")


class Bare(ast.NodeTransformer):
    """Code without annotations and docstrings."""

    def visit_AnnAssign(self, node):
        return ast.Assign([node.target], node.value or ast.Constant(None))

    def visit_arg(self, node):
        return ast.arg(node.arg)

    def visit_FunctionDef(self, node):
        node.returns = None
        return self.generic_visit(node)


def bare(code: str) -> str:
    return ast.dump(Bare().visit(ast.parse(code)))


def mutants(code: str) -> list[Mutant]:
    """All faults of the chosen operators that change what runs."""
    plugins, mutating = (
        optional(f"cosmic_ray.{name}", "bench/mutants.py", "bench/requirements-mutants.txt")
        for name in ("plugins", "mutating")
    )
    chosen = [
        name
        for name in plugins.operator_names()
        if name.rpartition("/")[2] in PLAIN or name.partition("Operator_")[2] in PAIRS
    ]
    found, seen = [], {bare(code)}
    for name in chosen:
        operator, occurrence = plugins.get_operator(name)(), 0
        while (mutated := mutating.mutate_code(code, operator, occurrence)) is not None:
            occurrence += 1
            try:
                key = bare(mutated)
            except SyntaxError:  # no program
                continue
            if key not in seen:
                seen.add(key)
                pairs = zip(code.splitlines(), mutated.splitlines())
                line, before, after = next(
                    (i, *pair) for i, pair in enumerate(pairs, start=1) if pair[0] != pair[1]
                )
                found.append(Mutant(line, before.strip(), after.strip(), mutated))
    return found


class Hurry:
    """Tests that were quick without a fault come first; one that takes too long ends the process."""

    def __init__(self, times: Path):
        """times: the seconds of each test, written by the first run."""
        self.times, self.seconds = times, Counter()

    def pytest_collection_modifyitems(self, items):
        if self.times.exists():
            seconds = read_json(self.times)
            items.sort(key=lambda item: seconds[item.nodeid])

    def pytest_runtest_setup(self):
        signal.alarm(SECONDS)

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration

    def pytest_sessionfinish(self):
        if not self.times.exists():
            write_json(self.times, self.seconds)


def passes(tests: list[str], copy: Path) -> int:
    """Run the tests on the modules of the copy, not on those that this process has imported."""
    os.chdir(copy)
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    files = {name: str(getattr(module, "__file__", "")) for name, module in sys.modules.items()}
    for name, file in files.items():
        if str(ROOT) in file and "site-packages" not in file:
            del sys.modules[name]
    sys.dont_write_bytecode = True
    hypothesis.settings.register_profile("mutants", phases=PHASES, report_multiple_bugs=False)
    hypothesis.settings.load_profile("mutants")
    sys.argv = ["pytest"]
    return pytest.main(
        ["-x", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in tests)],
        [Hurry(copy.parent / "times.json")],
    )


def survives(mutant: Mutant, module: str, copy: Path) -> bool:
    """Do all tests pass with this fault?"""
    path = copy / module
    whole = path.read_bytes()
    path.write_text(mutant.code, encoding="utf-8")
    code = in_a_child(partial(passes, TESTS[module], copy), math.inf)
    path.write_bytes(whole)
    return code == 0


def copy_of_the_repository(folder: str) -> Path:
    copy = Path(folder) / "copy"
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    for name in names:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    return copy


def looked_at(module: str) -> list[Mutant]:
    code = (ROOT / module).read_text(encoding="utf-8")
    spans = [
        range(node.lineno, node.end_lineno + 1)
        for node in ast.parse(code).body
        if getattr(node, "name", "") in ONLY.get(module, ())
    ]
    return [
        mutant
        for mutant in mutants(code)
        if not spans or any(mutant.line in span for span in spans)
    ]


def measure(module: str, sample: int) -> dict:
    every = looked_at(module)
    chosen = random.Random(0).sample(every, len(every))[
        :sample
    ]  # a smaller sample is a part of a larger one
    tried, survivors = 0, []
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of_the_repository(folder)
        if not survives(
            Mutant(0, "", "", (copy / module).read_text(encoding="utf-8")), module, copy
        ):
            raise ValueError(f"{module}: its tests fail without any fault")
        with suppress(KeyboardInterrupt):
            for mutant in tqdm(chosen, desc=module, unit="mutant", miniters=1):
                alive = survives(mutant, module, copy)
                tried += 1
                if alive:
                    survivors.append(mutant)
                    tqdm.write(f"{module}:{mutant.line}\n  - {mutant.before}\n  + {mutant.after}")
    shown = [
        {
            "line": m.line,
            "before": m.before,
            "after": m.after,
            "equivalent": equivalent(module, m.after),
        }
        for m in survivors
    ]
    killed, counted = (
        tried - len(survivors),
        tried - sum(survivor["equivalent"] != "" for survivor in shown),
    )
    return {
        "mutants": len(every),
        "tried": tried,
        "killed": killed,
        "share killed": killed / max(counted, 1),
        "survivors": shown,
    }


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument(
        "modules", nargs="*", choices=[*TESTS, []], help="modules to put faults in; default: all"
    )
    parser.add_argument(
        "--sample",
        type=int,
        default=100_000,
        help="faults to try in each, drawn at random; default: all",
    )
    parser.add_argument(
        "--out", default=str(ROOT / "bench/results/mutants.json"), help="file of the results"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out = Path(arguments.out)
    for module in arguments.modules or TESTS:
        result = measure(module, arguments.sample)
        content = read_json(out) if out.exists() else {}
        about = {
            "machine": machine(),
            "date": date.today().isoformat(),
            "command": f"python bench/mutants.py {module} --sample {result['tried']}",
        }
        write_json(out, content | {module: about | result})
        print(
            json.dumps(
                {module: {name: value for name, value in result.items() if name != "survivors"}}
            )
        )


if __name__ == "__main__":
    run(main)
