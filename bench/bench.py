"""Measurements of this machine: decoding against its rivals, typical acceptance, the cost of a step, training; what they predict; a long life.

    python bench/bench.py decode                                       every way to decode, on the same prompts
    python bench/bench.py decode --only greedy --prompts 50            one section of it, over more prompts
    python bench/bench.py cost && python bench/bench.py predict        predict reads cost.json and decode.json

Every subcommand writes bench/results/NAME.json, .md and .png after each of its sections. Started again it measures what is missing
there; a file that other settings, another machine or other weights gave is not touched. Needs bench/requirements.txt.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import cost, decode, endurance, predict, training, typical
from data.command import OneLineParser, add_options, run

SUBCOMMANDS = {
    "decode": (decode.main, decode.DecodeConfig),
    "typical": (typical.main, typical.TypicalConfig),
    "cost": (cost.main, cost.CostConfig),
    "train": (training.main, training.TrainingConfig),
    "predict": (predict.main, predict.PredictConfig),
    "endurance": (endurance.main, endurance.EnduranceConfig),
}


def main() -> None:
    parser = OneLineParser(description=__doc__)
    chooser = parser.add_subparsers(dest="subcommand", required=True, metavar="|".join(SUBCOMMANDS))
    for name, (_, config) in SUBCOMMANDS.items():
        add_options(chooser.add_parser(name, description=config.__doc__), config)
    arguments = vars(parser.parse_args())
    measure, config = SUBCOMMANDS[arguments.pop("subcommand")]
    measure(config(**arguments))


if __name__ == "__main__":
    run(main)
