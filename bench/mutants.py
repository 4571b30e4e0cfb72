"""Would the tests notice? python bench/mutants.py tree.py --sample 200

Faults are put into the code one at a time, and its tests run until the first fails, each in a child
of its own, in a copy of the repository. Faults are those of cosmic-ray's operators, without those
that change annotations alone. Results are added to bench/results/mutants.json after every module,
which Ctrl-C ends early. Survivors are listed there; why no test can notice one is written there by
hand, as "equivalent", and kept. Needs bench/requirements-mutants.txt.
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
from data.command import OneLineParser, optional, run
from model import read_json, write_json

TESTS = {  # of each module, those that fail soonest first
    "tree.py": ["test_golden.py", "test_tree.py"],
    "model.py": ["test_model.py", "test_llamas.py", "test_medusa.py"],
    "medusa.py": ["test_golden.py", "test_medusa.py", "test_medusa2.py", "test_train.py"],
    "train.py": ["test_medusa2.py", "test_train.py", "test_checkpoint.py"],
}
ONLY = {  # functions; of the other modules all
    "train.py": ["make_batch", "in_chunks", "base_loss", "medusa1_loss", "medusa2_loss"]
    + ["learning_rate", "train_loop"]
}
PAIRS = """Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul Mod_Mul Pow_Mul BitOr_BitAnd BitAnd_BitOr
LShift_RShift RShift_LShift Eq_NotEq NotEq_Eq Lt_LtE Lt_Gt LtE_Lt LtE_Gt Gt_GtE Gt_Lt GtE_Gt GtE_Lt
Is_IsNot IsNot_Is In_NotIn NotIn_In Delete_Not Delete_USub Delete_Invert""".split()
PLAIN = """AddNot ReplaceTrueWithFalse ReplaceFalseWithTrue ReplaceAndWithOr ReplaceOrWithAnd
ReplaceBreakWithContinue ReplaceContinueWithBreak NumberReplacer RemoveDecorator
ZeroIterationForLoop""".split()
SECONDS = 120  # a test that runs longer has met something endless
PHASES = hypothesis.Phase.explicit, hypothesis.Phase.generate  # a failure need not be small


@dataclass(frozen=True)
class Mutant:
    line: int
    before: str
    after: str
    code: str


class Bare(ast.NodeTransformer):
    """Code without annotations."""

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
    needed = "bench/mutants.py", "bench/requirements-mutants.txt"
    plugins = optional("cosmic_ray.plugins", *needed)
    mutating = optional("cosmic_ray.mutating", *needed)
    found, seen = [], {bare(code)}
    for name in plugins.operator_names():
        if name.rpartition("/")[2] not in PLAIN and name.partition("Operator_")[2] not in PAIRS:
            continue
        operator, occurrence = plugins.get_operator(name)(), 0
        while True:
            mutated = mutating.mutate_code(code, operator, occurrence)
            occurrence += 1
            if mutated is None:
                break
            try:
                key = bare(mutated)
            except SyntaxError:  # no program
                continue
            if key in seen:
                continue
            seen.add(key)
            pairs = enumerate(zip(code.splitlines(), mutated.splitlines()), start=1)
            line, (before, after) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
            found.append(Mutant(line, before.strip(), after.strip(), mutated))
    return found


class Hurry:
    """Tests that were quick without a fault come first; one that is too slow ends the process."""

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
    arguments = ["-x", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in tests)]
    return pytest.main(arguments, [Hurry(copy.parent / "times.json")])


def survives(code: str, module: str, copy: Path) -> bool:
    """Do all tests pass with this code in the module's place?"""
    path = copy / module
    whole = path.read_bytes()
    path.write_text(code, encoding="utf-8")
    exit_code = in_a_child(partial(passes, TESTS[module], copy), math.inf)
    path.write_bytes(whole)
    return exit_code == 0


def copy_of_the_repository(folder: str) -> Path:
    copy, command = Path(folder) / "copy", ["git", "ls-files", "-co", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    for name in done.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


def all_faults(module: str) -> list[Mutant]:
    code = (ROOT / module).read_text(encoding="utf-8")
    if module not in ONLY:
        return mutants(code)
    nodes = [node for node in ast.parse(code).body if getattr(node, "name", "") in ONLY[module]]
    lines = {line for node in nodes for line in range(node.lineno, node.end_lineno + 1)}
    return [mutant for mutant in mutants(code) if mutant.line in lines]


def measure(module: str, sample: int, reasons: dict[str, str]) -> dict:
    """reasons: line with the fault -> why no test can notice it."""
    every = all_faults(module)
    # A smaller sample is a part of a larger one.
    chosen = random.Random(0).sample(every, len(every))[:sample]
    tried, survivors = 0, []
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of_the_repository(folder)
        if not survives((copy / module).read_text(encoding="utf-8"), module, copy):
            raise ValueError(f"{module}: its tests fail without any fault")
        with suppress(KeyboardInterrupt):
            for mutant in tqdm(chosen, module, miniters=1):
                alive = survives(mutant.code, module, copy)
                tried += 1
                if alive:
                    shown = {"line": mutant.line, "before": mutant.before, "after": mutant.after}
                    survivors.append(shown | {"equivalent": reasons.get(mutant.after, "")})
                    tqdm.write(f"{module}:{mutant.line}\n  - {mutant.before}\n  + {mutant.after}")
    killed, missed = tried - len(survivors), [s for s in survivors if s["equivalent"] == ""]
    result = {"mutants": len(every), "tried": tried, "killed": killed}
    share = killed / max(killed + len(missed), 1)
    return result | {"share killed": share, "survivors": survivors}


def main() -> None:
    parser = OneLineParser(description=__doc__)
    out, every = ROOT / "bench/results/mutants.json", 100_000
    parser.add_argument("modules", nargs="*", choices=[*TESTS, []], help="default: all")
    parser.add_argument("--sample", type=int, default=every, help="faults to try, default: all")
    parser.add_argument("--out", type=Path, default=out, help="file of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for module in arguments.modules or TESTS:
        content = read_json(arguments.out) if arguments.out.exists() else {}
        known = content.get(module, {"survivors": []})["survivors"]
        reasons = {survivor["after"]: survivor["equivalent"] for survivor in known}
        result = measure(module, arguments.sample, reasons)
        command = f"python bench/mutants.py {module} --sample {result['tried']}"
        about = {"machine": machine(), "date": date.today().isoformat(), "command": command}
        write_json(arguments.out, content | {module: about | result})
        result.pop("survivors")
        print(json.dumps({module: result}))


if __name__ == "__main__":
    run(main)
