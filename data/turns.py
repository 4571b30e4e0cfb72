"""User turns to distil a chat model from: of the PyPI package chatterbot-corpus, and written here from patterns, in varied tasks.

    pip install -r data/requirements.txt
    python -m data.turns --out out/turns.jsonl
    python train.py --mode distill --chat --text out/turns.jsonl --base out/smollm2 --out out/rows

A file of turns has one JSON string a line. A turn is held out by a hash of its words alone.
"""

import json
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

from data.command import OneLineParser, add_options, option, run
from data.machine import check_out
from data.packages import optional, wheel
from model import check_sizes, write_atomically

PACKAGE = "chatterbot-corpus==1.3.3"
TOPICS = """gravity; photosynthesis; the water cycle; inflation; a hash table; recursion; the French Revolution; vaccines; black holes; tides; compound interest;
the immune system; democracy; plate tectonics; electricity; the internet; climate change; supply and demand; machine learning; evolution; friction; volcanoes;
the Roman Empire; jazz; Shakespeare; the human heart; sleep; nuclear energy; earthquakes; rainbows; batteries; bees; the stock market; blockchain; the moon;
antibiotics; glaciers; the printing press; impressionism; the scientific method; osmosis; Newton's laws; the solar system; protein; rust; soil; lightning"""
LISTS = """ways to save water; healthy breakfasts; tips for a job interview; gifts for a friend; books for a long journey; ways to learn a language faster;
things to pack for camping; exercises without equipment; ways to lower an electricity bill; ideas for a birthday party; questions to ask a doctor;
habits of good students; mistakes that new programmers make; vegetables that grow in shade; games for a rainy day; ways to calm down; hobbies for winter;
reasons to ride a bicycle; cities worth a visit in Europe; uses of vinegar at home; tips for public speaking; ways to make new friends"""
SENTENCES = """The meeting is moved to Friday because the manager is ill. | I think we should maybe try to do it again sometime later. |
The movie was good and the actors was good and I liked the music. | Due to the fact that it rained, the game was not able to take place. |
Please send me the report as soon as you can, I need it for tomorrow. | The cat sat on the mat and looked at the birds outside. |
Our new product is better, faster and cheaper than everything else. | He dont know nothing about the plan that they has made. |
We regret to inform you that the train will be late by one hour. | She opened the old box and found a letter from her grandmother."""
STYLES = "in a formal tone; in a friendly tone; in simpler words; as a question; in the past tense; in fewer words; as a headline; without mistakes"
FUNCTIONS = """reverses a list; counts the words in a text; checks whether a number is prime; finds the largest of three numbers; sorts names by length;
removes duplicates from a list; computes a factorial; converts Celsius to Fahrenheit; checks whether a word is a palindrome; merges two dictionaries;
reads a file and prints its lines; finds the common items of two lists; computes an average; draws a triangle of stars; generates Fibonacci numbers"""
LANGUAGES = "Python; JavaScript; C; SQL; Bash; Java"
PASSAGES = """Marie Curie was born in Warsaw in 1867. She moved to Paris to study physics, and won the Nobel Prize twice, in 1903 and in 1911. |
The Amazon is the largest rainforest on Earth. It spreads over nine countries, and about ten percent of all known species live there. |
Tom has a shop near the station. It opens at eight in the morning and closes at six, but on Sundays it stays closed. |
Coffee was first grown in Ethiopia. Traders brought it to Yemen, and from there it spread to Turkey and, in the 17th century, to Europe. |
The library will be closed from 3 to 10 May for repairs. Books that are due in this time may be returned until 17 May. |
Octopuses have three hearts and blue blood. Two of the hearts pump blood to the gills, the third one to the rest of the body. |
Anna bought four apples and six pears. She gave half of the pears to her brother and ate one apple on the way home. |
The bridge was built in 1932. It is 1,149 metres long, and about 200,000 cars cross it every day."""
QUESTIONS = """What is this text about?; Summarize the text in one sentence.; Write a title for the text.; Which numbers are named in the text?;
Who or what is the text about?; Turn the text into three bullet points.; Write a question that the text answers.; Translate the first sentence into French."""
ROLES = "a child; a student; a beginner; an expert; a friend; someone in a hurry"
PATTERNS = (
    "Explain {topic} to {role}.", "What is {topic}?", "Why does {topic} matter?", "Give me three facts about {topic}.", "Write a short poem about {topic}.",
    "What do people often get wrong about {topic}?", "Write a paragraph about {topic} for {role}.", "Compare {topic} and {topic2}.",
    "List {n} {list}.", "What are some {list}?", "Rewrite this {style}: {sentence}", "Can you say this {style}? \"{sentence}\"",
    "Write a {language} function that {function}.", "How do I write {language} code that {function}? Explain it step by step.",
    "What is {a} + {b}?", "What is {a} times {n}? Show your work.", "If I have {a} euros and spend {n}, how much is left?",
    "{passage}\n\n{question}", "Read this and answer. {question}\n\n{passage}", "Write an email to {role} about {topic}.", "Tell me a story about {topic} in {n} sentences.",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    out: str = option("out/turns.jsonl", "file to write")
    written: int = option(3000, "turns written from patterns")
    seed: int = option(0, "seed of the patterns")

    def __post_init__(self):
        check_sizes(self, ["written"])


def items(text: str, separator: str = ";") -> list[str]:
    return [" ".join(item.split()) for item in text.split(separator)]


def written_turns(n: int, seed: int) -> list[str]:
    """n different turns, all patterns equally often tried."""
    choices = {"topic": items(TOPICS), "topic2": items(TOPICS), "list": items(LISTS), "sentence": items(SENTENCES, "|"), "style": items(STYLES)}
    choices |= {"function": items(FUNCTIONS), "language": items(LANGUAGES), "passage": items(PASSAGES, "|"), "question": items(QUESTIONS), "role": items(ROLES)}
    choices |= {"a": list(range(12, 400)), "b": list(range(12, 400)), "n": list(range(2, 12))}
    chance, turns = random.Random(seed), {}
    while len(turns) < n:
        turns[chance.choice(PATTERNS).format(**{name: chance.choice(values) for name, values in choices.items()})] = None
    return list(turns)


def corpus_turns() -> list[str]:
    """What opens the English conversations of chatterbot-corpus."""
    yaml = optional("yaml", PACKAGE)
    turns = {}
    with tempfile.TemporaryDirectory() as folder, wheel(PACKAGE, folder) as files:
        for name in sorted(files.namelist()):
            if "/english/" in name and name.endswith(".yml"):
                for conversation in yaml.safe_load(files.read(name))["conversations"]:
                    turns[str(conversation[0]).strip()] = None
    return [turn for turn in turns if turn]


def main() -> None:
    parser = OneLineParser(prog="data.turns", description=__doc__)
    add_options(parser, Config)
    config = Config(**vars(parser.parse_args()))
    out = Path(config.out)
    check_out(str(out.parent))
    turns = list(dict.fromkeys(corpus_turns() + written_turns(config.written, config.seed)))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda temporary: temporary.write_text("".join(json.dumps(turn) + "\n" for turn in turns), encoding="utf-8"))
    print(f"{out}: {len(turns)} turns")


if __name__ == "__main__":
    run(main)
