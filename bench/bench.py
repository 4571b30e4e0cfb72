"""Measurements of this machine: python bench/bench.py SUBCOMMAND

Each is the module of its name (train: training.py). It writes bench/results/NAME.json and .md after
each of its sections. Started again it measures what is missing there; results of other settings,
weights or machines are not touched. Needs bench/requirements.txt. bench/plot.py draws the figures.
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
