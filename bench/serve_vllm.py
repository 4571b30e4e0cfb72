"""Our base and heads in vLLM: its greedy text against ours, and what its speculative decoding counted.

    pip install -r bench/requirements-vllm.txt
    python bench/serve_vllm.py --base data/base --heads data/heads --out out/served

vLLM takes the heads' first guesses as a chain, not as a tree. It expects the LM head that the heads share in their own directory, and of a
truncated vocabulary it takes the token_map for a weight that was forgotten (0.32), so that these heads guess among all tokens there.
--out is the heads' directory so changed, and may be served: vllm serve BASE --speculative-config '{"model": OUT, ...}'.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT_ONLY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT_ONLY))

from bench.results import held_out_prompts, held_out_turns
from data.command import OneLineParser, add_options, option, run
from data.difference import first_difference, gap_at
from data.machine import check_out
from data.tokenizer import SHIPPED_BASE, disk_dtype, load_base
from medusa import (
    ROOT_ONLY as NO_TREE,
    MedusaHeads,
    Sampling,
    check_compatible,
    generate,
    medusa_generate,
)
from model import GPT, read_json, read_safetensors, write_json, write_safetensors
from tree import cartesian_tree


@dataclass(frozen=True)
class Config:
    base: str = option(SHIPPED_BASE, "directory of the base model")
    heads: str = option("data/heads", "directory of the heads")
    out: str = option("out/served", "directory to write, which vLLM opens")
    turns: list[str] = option(
        [],
        "files of user turns: a chat model answers held-out ones, in place of prompts of the corpus",
    )
    prompts: int = option(20, "held-out prompts")
    prompt_tokens: int = option(64, "tokens of a prompt")
    new_tokens: int = option(96, "tokens to decode")


def write_served(base, heads, out) -> None:
    """The heads' directory, and in it the LM head that they share, whole, under the name that vLLM looks for."""
    model, loaded = GPT.from_pretrained(base, disk_dtype(base)), MedusaHeads.from_pretrained(heads)
    check_compatible(model, loaded, NO_TREE)
    state, settings = (
        read_safetensors(Path(heads) / "model.safetensors"),
        read_json(Path(heads) / "config.json"),
    )
    state.pop("token_map", None)
    if loaded.config.original_lm_head:
        state["lm_heads.0.weight"] = model.lm_head.weight.detach()
    write_safetensors(Path(out) / "model.safetensors", state)
    write_json(
        Path(out) / "config.json", settings | {"truncated_vocab_size": loaded.config.vocab_size}
    )


def import_vllm():
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    try:
        import vllm

        return vllm
    except ImportError as error:
        raise ValueError(
            f"vllm cannot be imported: {error}; pip install -r bench/requirements-vllm.txt, in an environment of its own"
        ) from None


def run_vllm(
    vllm, config: Config, prompts: list[list[int]], K: int, ends: tuple[int, ...]
) -> tuple[list[list[int]], dict]:
    """vLLM's greedy texts, and its counters: {name: value, or one for each position of a draft}."""
    speculation = {"method": "medusa", "model": config.out, "num_speculative_tokens": K}
    llm = vllm.LLM(
        config.base,
        skip_tokenizer_init=True,
        dtype="float32",
        speculative_config=speculation,
        disable_log_stats=False,
        max_num_seqs=1,
    )
    asked = vllm.SamplingParams(
        temperature=0, max_tokens=config.new_tokens, stop_token_ids=list(ends), detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked)
    counters = {
        metric.name: getattr(metric, "values", getattr(metric, "value", None))
        for metric in llm.get_metrics()
        if "spec_decode" in metric.name
    }
    return [list(output.outputs[0].token_ids) for output in outputs], counters


def accepted_by_position(steps: list[list[int]], K: int) -> list[int]:
    """Of a chain of K guesses, how often each was accepted: a step of n tokens has accepted n - 1."""
    return [sum(len(emitted) > depth for emitted in steps) for depth in range(1, K + 1)]


def main() -> None:
    parser = OneLineParser(description=__doc__)
    add_options(parser, Config)
    config = Config(**vars(parser.parse_args()))
    check_out(config.out)
    if Path(config.out).resolve() in (Path(config.base).resolve(), Path(config.heads).resolve()):
        raise ValueError(
            f"--out {config.out} would overwrite what is to be served: name another directory"
        )
    vllm = import_vllm()
    write_served(config.base, config.heads, config.out)
    tokenizer, model = load_base(config.base)
    heads = MedusaHeads.from_pretrained(config.out)
    K = heads.config.num_heads
    prompts = (
        held_out_turns(config, tokenizer)
        if config.turns
        else held_out_prompts(tokenizer, config.prompts, config.prompt_tokens)
    )
    ours = [
        [token for step in generate(model, prompt, config.new_tokens) for token in step]
        for prompt in prompts
    ]
    chain = cartesian_tree([1] * K)
    steps = [
        emitted
        for prompt in prompts
        for emitted in list(medusa_generate(model, heads, chain, prompt, config.new_tokens))[1:]
    ]
    theirs, counters = run_vllm(vllm, config, prompts, K, model.config.eos_ids)
    for number, (a, b) in enumerate(zip(ours, theirs)):
        if (at := first_difference(a, b)) is not None:
            apart = (
                gap_at(model, prompts[number], b, a, at, Sampling(), 0)
                if at < min(len(a), len(b))
                else float("nan")
            )
            print(
                f"prompt {number}: vLLM's text differs from token {at + 1} on, where the two logits were {apart:.1e} apart"
            )
    print(
        f"greedy text of vLLM equals ours on {sum(a == b for a, b in zip(ours, theirs))} of {len(prompts)} prompts"
    )
    for name, value in counters.items():
        print(f"{name.removeprefix('vllm:'):<40} {value}")
    print(
        f"{'ours, the same chain: steps, accepted':<40} {len(steps)}, {accepted_by_position(steps, K)}"
    )


if __name__ == "__main__":
    run(main)
