"""Our base and heads in vLLM: its greedy text against ours, and what its decoding counted.

    pip install -r bench/requirements-vllm.txt        # in an environment of its own
    python bench/serve_vllm.py --base data/base --heads data/heads --out out/served

vLLM takes the heads' first guesses as a chain, not as a tree. It expects the LM head that the heads
share in their own directory, and refuses a token_map (0.32), so that these heads guess among all
tokens there. --out is so changed: vllm serve BASE --speculative-config '{"model": OUT, ...}'.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.results import held_out_prompts, held_out_turns
from data.command import check_out, option, parsed, run
from data.tokenizer import SHIPPED_BASE, disk_dtype, load_base
from medusa import GREEDY, MedusaHeads, check_compatible
from model import GPT, check, read_json, read_safetensors, write_json, write_safetensors
from sample import decode, first_difference
from tree import ROOT_ONLY, cartesian_tree


@dataclass(frozen=True)
class Config:
    base: str = option(SHIPPED_BASE, "directory of the base model")
    heads: str = option("data/heads", "directory of the heads")
    out: str = option("out/served", "directory to write, which vLLM opens")
    turns: list[str] = option([], "files of user turns, to answer in place of prompts")
    prompts: int = option(20, "held-out prompts")
    prompt_tokens: int = option(64, "tokens of a prompt")
    new_tokens: int = option(96, "tokens to decode")


def write_served(base, heads, out) -> None:
    """The heads' directory with the LM head that they share, under the name that vLLM looks for."""
    model, loaded = GPT.from_pretrained(base, disk_dtype(base)), MedusaHeads.from_pretrained(heads)
    check_compatible(model, loaded)
    check(not loaded.config.sequential, f"{heads}: sequential heads, which vLLM does not know")
    state = read_safetensors(Path(heads) / "model.safetensors")
    settings = read_json(Path(heads) / "config.json")
    settings["truncated_vocab_size"] = loaded.config.vocab_size
    state.pop("token_map", None)
    if loaded.config.original_lm_head:
        state["lm_heads.0.weight"] = model.lm_head.weight.detach()
    write_safetensors(Path(out) / "model.safetensors", state)
    write_json(Path(out) / "config.json", settings)


def import_vllm():
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    try:
        import vllm

        return vllm
    except ImportError as error:
        advice = "pip install -r bench/requirements-vllm.txt, in an environment of its own"
        raise ValueError(f"vllm cannot be imported: {error}; {advice}") from None


def run_vllm(vllm, config: Config, prompts: list[list[int]], K: int, eos_ids) -> tuple[list, dict]:
    """vLLM's greedy texts, and its counters: {name: value, or one for each position of a draft}."""
    speculation = {"method": "medusa", "model": config.out, "num_speculative_tokens": K}
    flags = {"skip_tokenizer_init": True, "dtype": "float32", "disable_log_stats": False}
    llm = vllm.LLM(config.base, speculative_config=speculation, max_num_seqs=1, **flags)
    flags = {"max_tokens": config.new_tokens, "stop_token_ids": list(eos_ids), "detokenize": False}
    asked = vllm.SamplingParams(temperature=0, **flags)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked)
    counters = {}
    for metric in llm.get_metrics():
        if "spec_decode" in metric.name:
            counters[metric.name] = getattr(metric, "values", getattr(metric, "value", None))
    return [list(output.outputs[0].token_ids) for output in outputs], counters


def main() -> None:
    config = parsed(Config, description=__doc__)
    check_out(config.out)
    if Path(config.out).resolve() in (Path(config.base).resolve(), Path(config.heads).resolve()):
        raise ValueError(f"--out {config.out} would overwrite its input: name another directory")
    vllm = import_vllm()
    write_served(config.base, config.heads, config.out)
    tokenizer, model = load_base(config.base)
    heads, n = MedusaHeads.from_pretrained(config.out), config.new_tokens
    K = heads.config.num_heads
    if config.turns:
        prompts = held_out_turns(config, tokenizer, model)
    else:
        prompts = held_out_prompts(tokenizer, config.prompts, config.prompt_tokens)

    # Ours, plainly; and by the same chain: a step of n tokens has accepted n - 1 guesses.
    ours, accepted = [], []
    for prompt in prompts:
        plain = decode(model, heads, ROOT_ONLY, prompt, n, GREEDY, 0)
        ours.append([token for step in plain for token in step.emitted])
        steps = list(decode(model, heads, cartesian_tree([1] * K), prompt, n, GREEDY, 0))
        accepted += [len(step.emitted) - 1 for step in steps[1:]]
    theirs, counters = run_vllm(vllm, config, prompts, K, model.config.eos_ids)
    same = 0
    for number, (a, b) in enumerate(zip(ours, theirs)):
        shorter = min(len(a), len(b))
        if a == b:
            same += 1
        elif a[:shorter] == b[:shorter]:
            print(f"prompt {number}: vLLM's text has {len(b)} tokens, and ours {len(a)}")
        else:
            at, gap = first_difference(model, prompts[number], b, a, GREEDY, 0)
            print(f"prompt {number}: differs from token {at + 1} on: two logits {gap:.1e} apart")
    print(f"greedy text of vLLM equals ours on {same} of {len(prompts)} prompts")
    for name, value in counters.items():
        print(f"{name.removeprefix('vllm:'):<40} {value}")
    by_depth = [sum(1 for n in accepted if n >= depth) for depth in range(1, K + 1)]
    print(f"{'ours, the same chain: steps, accepted':<40} {len(accepted)}, {by_depth}")


if __name__ == "__main__":
    run(main)
