"""A Hugging Face checkpoint in our plain decoding and in transformers.generate, in turn, and what a step over N nodes costs there.

    pip install -r tests/requirements-peers.txt
    python bench/peers.py --base out/smollm2

Both decode greedily in float32, from the same weights, through the checkpoint's chat template.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from data.chat import chat_prompt
from data.command import OneLineParser, add_options, option, run
from data.packages import optional
from data.tokenizer import load_base
from medusa import MedusaConfig, MedusaHeads, Sampling, generate
from sample import step_costs
from tree import cartesian_tree

TURNS = ("Explain why the sky is blue.", "List five ways to save water at home.", "Write a Python function that reverses a list.")
HEADS = 4


@dataclass(frozen=True)
class Config:
    base: str = option("out/smollm2", "directory of the base model")
    new_tokens: int = option(64, "tokens to decode behind each prompt")
    rounds: int = option(3, "times that each prompt is decoded by both")


def main() -> None:
    parser = OneLineParser(description=__doc__)
    add_options(parser, Config)
    config = Config(**vars(parser.parse_args()))
    transformers = optional("transformers", "bench/peers.py", "tests/requirements-peers.txt")
    tokenizer, model = load_base(config.base)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(config.base, dtype=torch.float32).eval()
    prompts = [chat_prompt(config.base, tokenizer, [{"role": "user", "content": turn}]) for turn in TURNS]

    def ours_text(prompt: list[int]) -> list[int]:
        return [token for step in generate(model, prompt, config.new_tokens) for token in step]

    def theirs_text(prompt: list[int]) -> list[int]:
        with torch.inference_mode():
            return theirs.generate(torch.tensor([prompt]), max_new_tokens=config.new_tokens, do_sample=False, pad_token_id=tokenizer.eos)[
                0, len(prompt) :
            ].tolist()

    ratios, seconds, same = [], {ours_text: [], theirs_text: []}, 0
    for number in range(len(prompts) * config.rounds):
        prompt, texts, took = prompts[number % len(prompts)], {}, {}
        for way in (ours_text, theirs_text) if number % 2 else (theirs_text, ours_text):
            start = time.perf_counter()
            texts[way] = way(prompt)
            took[way] = time.perf_counter() - start
            seconds[way].append(took[way] / len(texts[way]))
        ratios.append(took[theirs_text] / took[ours_text])
        same += texts[ours_text] == texts[theirs_text]
    print(f"greedy text the same: {same} of {len(ratios)}")
    rates = {name: 1 / statistics.median(seconds[way]) for name, way in (("ours", ours_text), ("transformers", theirs_text))}
    print("tokens/s, prompt included: " + ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items()))
    print(f"ours is {statistics.median(ratios):.2f}x as fast, {min(ratios):.2f} to {max(ratios):.2f}")

    heads = MedusaHeads(MedusaConfig(model.config.hidden_size, model.config.vocab_size, HEADS)).eval()
    costs = step_costs(model, heads, lambda n: cartesian_tree([n - 1]), prompts[0], Sampling())
    print("step cost with 4 heads: " + ", ".join(f"c({n}) = {costs[n] / costs[1]:.2f}" for n in (2, 4, 8, 16, 32)) + f"; a plain step {1000 * costs[1]:.1f} ms")


if __name__ == "__main__":
    run(main)
