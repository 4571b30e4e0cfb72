"""Laws of training: the base never moves, head k learns token t+k+1, distilled text is the base's own, and a stopped run goes on."""

import json
import math
import shutil
from collections import Counter, defaultdict
from dataclasses import MISSING, dataclass, fields, replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

import data.calibration
import data.distilled
import data.perplexity
import data.shards
import train
from data.calibration import (
    CALIBRATION_TEMPERATURES,
    calibrate,
    head_ranks,
    noise_given_tokens,
    read_calibration,
    read_prefixes,
)
from data.checkpoint import checkpoint_path
from data.corpus import documents, packed, windows
from data.distilled import DistillConfig, distill, distilled_rows, sample_rows
from data.machine import pick_device, pick_precision
from data.perplexity import bits_per_byte, perplexity
from data.rows import rows_to_train
from data.shards import read_shards
from data.states import KeptStates
from data.tokenizer import load_base, train_tokenizer
from medusa import MedusaConfig, MedusaHeads, Sampling, check_compatible, draw, generate
from model import GPT, ModelConfig, read_json, read_safetensors, write_json, write_safetensors
from strategies import (
    CPU,
    base_config,
    chi_square,
    contents,
    distilling,
    markov_gpt,
    properties,
    random_gpt,
    random_heads,
    rate,
    rng,
    small_tokenizer,
    source,
    text_distribution,
    training,
    write_shard,
)
from train import (
    MODES,
    BaseConfig,
    Medusa1Config,
    Medusa2Config,
    OneLineParser,
    TrainConfig,
    add_options,
    learning_rate,
    train_base,
    train_loop,
    train_medusa,
)
from tree import calibrated_tree, replay

pytestmark = pytest.mark.usefixtures("own_cache")


# ---- the command line ----


def parser_of(config: type) -> OneLineParser:
    parser = OneLineParser(prog="train.py")
    add_options(parser, config)
    return parser


def other(field):
    """A value that is not the default, of the same type."""
    default = field.default if field.default is not MISSING else field.default_factory()
    if "choices" in field.metadata:
        return next(choice for choice in field.metadata["choices"] if choice != default)
    if isinstance(default, float):
        return default / 2
    return (
        not default
        if isinstance(default, bool)
        else ["a", "b c"]
        if isinstance(default, list)
        else default + type(default)(3)
    )


EVERY_MODE = pytest.mark.parametrize("config", [*MODES.values(), TrainConfig])
EVERY_FLAG = pytest.mark.parametrize(
    "config, field", [(config, field) for config in MODES.values() for field in fields(config)]
)


@EVERY_MODE
def test_the_defaults_of_the_flags_are_those_of_the_dataclass(config):
    assert config(**vars(parser_of(config).parse_args([]))) == config()


@EVERY_FLAG
def test_every_field_is_a_flag_and_sets_that_field_alone(config, field):
    flag, value = "--" + field.name.replace("_", "-"), other(field)
    if isinstance(value, bool):
        arguments = [flag if value else flag.replace("--", "--no-", 1)]
    else:
        arguments = [flag, *value] if isinstance(value, list) else [flag, str(value)]
    more = (
        {"batch": 8}
        if field.name == "accumulate"
        else {"data": "corpus"}
        if field.name == "context" and config is not BaseConfig
        else {}
    )
    arguments += [f"--{name}={choice}" for name, choice in more.items()]
    chosen = config(**vars(parser_of(config).parse_args(arguments)))
    assert chosen == replace(config(), **{field.name: value}, **more) and type(
        getattr(chosen, field.name)
    ) is type(value)


def test_a_boolean_flag_has_a_form_for_yes_and_one_for_no():
    parser = parser_of(Medusa1Config)
    assert parser.parse_args(["--original-lm-head"]).original_lm_head is True
    assert parser.parse_args(["--no-original-lm-head"]).original_lm_head is False


@EVERY_MODE
def test_help_names_every_flag_its_meaning_and_its_default(config):
    words = " ".join(parser_of(config).format_help().split())
    for field in fields(config):
        default = field.default if field.default is not MISSING else field.default_factory()
        assert f"--{field.name.replace('_', '-')}" in words.replace("- ", "-")
        says = field.metadata["help"] + ("" if default in ("", []) else f" (default: {default})")
        assert says.replace(" ", "") in words.replace(" ", "")


@pytest.fixture
def command(monkeypatch):
    """Calls train.py's main with these arguments; the modes only tell what they were asked to do."""
    asked = []
    monkeypatch.setattr(train, "train_base", lambda config: asked.append(("base", config)))
    monkeypatch.setattr(
        train, "distill", lambda config: asked.append(("distill", config)) or "a/directory"
    )
    monkeypatch.setattr(
        train,
        "train_medusa",
        lambda config: asked.append(
            ("medusa2" if type(config) is Medusa2Config else "medusa1", config)
        ),
    )

    def call(*arguments):
        asked.clear()
        monkeypatch.setattr("sys.argv", ["some/train.py", *arguments])
        train.run(train.main)
        return asked

    return call


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_gets_its_own_config(mode, command, capsys):
    assert command("--mode", mode) == [(mode, MODES[mode]())]
    assert command("--seed", "5", f"--mode={mode}", "--out", "x") == [
        (mode, MODES[mode](seed=5, out="x"))
    ]
    assert capsys.readouterr().out.count("a/directory") == 2 * (mode == "distill")


def test_without_a_mode_heads_are_trained(command):
    assert command("--decay", "0.5", "--no-original-lm-head") == [
        ("medusa1", Medusa1Config(decay=0.5, original_lm_head=False))
    ]


BAD_USAGE = [
    (["--nonsense"], "--nonsense"),
    (["--mode", "nonsense"], "--mode"),
    (["--steps", "many"], "--steps"),
    (["--steps", "1.5"], "--steps"),
    (["--lr", "fast"], "--lr"),
    (["--lr", "0"], "--lr"),
    (["--clip", "-1"], "--clip"),
    (["--lr", "nan"], "--lr"),
    (["--data", "both"], "--data"),
    (["--precision", "float16"], "--precision"),
    (["--text"], "--text"),
    (["--original-lm-head=maybe"], "--original-lm-head"),
    (["stray"], "stray"),
    (["--mode", "distill", "--steps", "3"], "--steps"),
    (["--mode", "base", "--shards", "3"], "--shards"),
    (["--mode", "distill", "--top-p", "0"], "top_p"),
    (["--mode", "distill", "--temperature", "-1"], "temperature"),
    (["--mode", "distill", "--rows", "0"], "rows"),
    (["--num-heads", "0"], "num_heads"),
    (["--steps", "0"], "steps"),
    (["--batch", "-3"], "batch"),
    (["--warmup", "0"], "warmup"),
    (["--save-every", "0"], "save_every"),
    (["--accumulate", "0"], "accumulate"),
    (["--lora"], "--lora"),
    (["--mode", "medusa2", "--lr-ratio", "0"], "--lr-ratio"),
    (["--mode", "medusa2", "--lr-ratio", "nan"], "--lr-ratio"),
    (["--mode", "medusa2", "--lambda-0", "-0.1"], "--lambda-0"),
    (["--mode", "medusa2", "--heads-steps", "-1"], "--heads-steps"),
    (["--mode", "medusa2", "--base-loss", "mse"], "--base-loss"),
    (["--mode", "medusa1", "--context", "9"], "--context"),
]


@pytest.mark.parametrize("arguments, says", BAD_USAGE)
def test_bad_usage_ends_in_one_line_that_names_it_and_exit_code_2(arguments, says, command, capsys):
    with pytest.raises(SystemExit) as stop:
        command(*arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out
    assert err.count("\n") == 1 and err.startswith("train.py: error: ") and says in err


@pytest.mark.parametrize(
    "error",
    [
        ValueError("bad\nvalue  here"),
        FileNotFoundError("bad value here"),
        UnicodeError("bad value here"),
    ],
)
def test_what_the_user_can_mend_ends_in_one_line_and_exit_code_2(error, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["a/script.py"])

    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        train.run(main)
    assert stop.value.code == 2 and capsys.readouterr().err == "script.py: error: bad value here\n"


@pytest.mark.parametrize("error, ends", [(KeyboardInterrupt(), 130), (SystemExit(7), 7)])
def test_an_interrupt_ends_in_130_and_an_exit_in_its_own_code(error, ends, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        train.run(main)
    assert stop.value.code == ends and capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "error", [RuntimeError, TypeError, AssertionError, KeyError, ZeroDivisionError]
)
def test_a_fault_of_ours_is_not_hidden(error):
    def main():
        raise error("ours")

    with pytest.raises(error, match="ours"):
        train.run(main)


def test_a_compiler_that_is_missing_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["a/sample.py"])

    def main():
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found in\n(None, 'g++')")

    with pytest.raises(SystemExit) as stop:
        train.run(main)
    err = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and err.count("\n") == 1
        and err.startswith("sample.py: error: --compile needs a C++ compiler")
    )


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."), RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), None
])  # fmt: skip
def test_memory_that_runs_out_is_one_line_that_says_what_needs_less(error, capsys, monkeypatch):
    """None: what the CPU really says."""
    monkeypatch.setattr("sys.argv", ["a/train.py"])

    def main():
        if error:
            raise error
        torch.empty(1 << 50)

    with pytest.raises(SystemExit) as stop:
        train.run(main)
    err = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and err.count("\n") == 1
        and err.startswith("train.py: error: out of memory: ")
    )
    assert all(flag in err for flag in ("--batch", "--accumulate", "--context"))


@pytest.mark.parametrize("config, names", [
    (Medusa1Config, ("steps", "batch", "warmup", "save_every", "num_heads", "num_hidden_layers")),
    (BaseConfig, ("steps", "batch", "accumulate", "context", "warmup")),
    (DistillConfig, ("rows", "prompt_tokens", "new_tokens")),
])  # fmt: skip
@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_sizes_below_one_are_refused_by_name(config, names, size):
    for name in names:
        config(**{name: 1})
        with pytest.raises(ValueError, match=name):
            config(**{name: size})


@pytest.mark.parametrize("name", ["nonsense", "cpu0", "", "fpga", "hpu", "meta"])
def test_a_device_that_cannot_be_used_is_refused_by_name(name):
    """`meta` holds no numbers, so nothing can be trained there."""
    with pytest.raises(ValueError) as error:
        pick_device(name)
    assert f"--device {name} " in str(error.value) and "\n" not in str(error.value)


def test_the_cpu_can_always_be_picked():
    assert pick_device("cpu") == torch.device("cpu") and isinstance(
        pick_device("auto"), torch.device
    )


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_of_several_processes_has_a_gpu_of_its_own(name, monkeypatch):
    """There is none here: the refusal says which was meant."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "93")
    with pytest.raises(ValueError, match="--device cuda:93 "):
        pick_device(name)


def test_precision_is_what_was_asked_for():
    for name in ("float32", "bfloat16"):
        assert pick_precision(name, torch.device("cpu")) == getattr(torch, name)
    assert [pick_precision("auto", torch.device(name)) for name in ("cpu", "mps", "cuda")] == [
        torch.float32,
        torch.float32,
        torch.bfloat16,
    ]


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.save(tmp_path)
    for more in (0, 1, -1):
        GPT(ModelConfig(tokenizer.vocab_size + more, 8, 8, 1, 1, 1, 16)).save_pretrained(tmp_path)
        if more >= 0:
            loaded, model = load_base(tmp_path)
            assert (
                loaded.model == tokenizer.model
                and model.config.vocab_size == tokenizer.vocab_size + more
            )
    with pytest.raises(ValueError, match=f"{tmp_path}.*290.*289"):
        load_base(tmp_path)


# ---- optimisation ----


@properties
@given(st.integers(1, 200), st.integers(1, 250), st.floats(1e-5, 10))
def test_learning_rate_equals_the_formula(steps, warmup, lr):
    rates = [learning_rate(step, lr, warmup, steps) for step in range(steps)]
    for step, value in enumerate(rates):
        assert math.isclose(value, rate(step, lr, warmup, steps), rel_tol=1e-9)
        assert 0 < value <= lr


def test_learning_rate_rises_to_its_peak_along_a_line_and_falls_to_0_along_a_cosine():
    rates = [learning_rate(step, 2.0, 10, 10_000) for step in range(10_000)]
    assert rates[:10] == pytest.approx([0.2 * n for n in range(1, 11)], rel=1e-5)
    assert max(rates) == rates[9] and rates[5000] == pytest.approx(1.0) and rates[-1] < 1e-6
    assert all(later < earlier for earlier, later in zip(rates[9:], rates[10:]))
    assert learning_rate(0, 2.0, 1, 10_000) == 2.0


@pytest.mark.parametrize(
    "shape, matrix",
    [
        ((3,), False),
        ((1, 3), False),
        ((2, 3), True),
        ((4, 1, 3), False),
        ((4, 2, 3), True),
        ((2, 4, 1, 3), False),
    ],
)
def test_weight_decay_is_for_what_has_rows(shape, matrix):
    assert train.is_matrix(nn.Parameter(torch.zeros(shape))) == matrix


def is_matrix(name: str) -> bool:
    return not name.endswith(("norm.weight", "bias"))


@dataclass(frozen=True)
class FitConfig(TrainConfig):
    out: str = ""


def a_fit(out, **more) -> TrainConfig:
    return FitConfig(**CPU, out=str(out), **more)


def fitted(config: TrainConfig, parts: dict[str, nn.Module], add_gradients, rates=None) -> None:
    """fit, where add_gradients(step) may return the figures; K is 1."""
    rows = torch.zeros(config.batch, 3, dtype=torch.long)

    def step_on_rows(step, tokens, mask, counts):
        figures = add_gradients(step)
        return torch.zeros(3) if figures is None else figures

    rates = rates or (
        lambda step: dict.fromkeys(parts, rate(step, config.lr, config.warmup, config.steps))
    )
    named = {part: dict(module.named_parameters()) for part, module in parts.items()}
    train_loop(
        config,
        config.steps,
        lambda step: (rows, rows == 0),
        step_on_rows,
        named,
        rates,
        1,
        torch.device("cpu"),
        "",
    )


def add(gradients: dict, module: nn.Module) -> None:
    for name, weight in module.named_parameters():
        weight.grad = gradients[name].clone()


@settings(properties, max_examples=40)
@given(
    st.integers(1, 3),
    st.integers(1, 2),
    st.booleans(),
    st.integers(1, 6),
    st.floats(0.01, 20),
    st.floats(0, 0.5),
    st.floats(1e-3, 0.1),
    st.integers(0, 999),
)
def test_fit_is_adamw_with_gradients_clipped_part_by_part_and_decay_of_matrices_alone(
    tmp_path_factory, K, J, shared, steps, clip, decay, lr, seed
):
    """Written out, parameter by parameter; the base is four times slower than the heads."""
    generator = rng(seed)
    parts = {
        "heads": MedusaHeads(MedusaConfig(3, 4, K, J, shared)).double(),
        "base": random_gpt(seed),
    }
    ours = {}
    for part, module in parts.items():
        for name, weight in module.named_parameters():
            weight.data = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            ours[part, name] = [
                weight.detach().clone(),
                torch.zeros_like(weight),
                torch.zeros_like(weight),
            ]
    sizes = 10.0 ** torch.randint(-2, 3, (steps,), generator=generator)
    gradients = [
        {
            at: size * torch.randn(w.shape, generator=generator, dtype=torch.float64)
            for at, (w, _, _) in ours.items()
        }
        for size in sizes
    ]
    config = a_fit(
        tmp_path_factory.mktemp("run"), steps=steps, warmup=2, lr=lr, clip=clip, weight_decay=decay
    )
    slower = {"heads": 1, "base": 4}

    def add_gradients(step):
        for part, module in parts.items():
            add(
                {name: gradients[step][part, name] for name, _ in module.named_parameters()}, module
            )

    fitted(
        config,
        parts,
        add_gradients,
        lambda step: {part: rate(step, lr, 2, steps) / slower[part] for part in parts},
    )
    for step, gradient in enumerate(gradients):
        norms = {
            part: math.sqrt(sum((g**2).sum().item() for at, g in gradient.items() if at[0] == part))
            for part in parts
        }
        for (part, name), (weight, mean, square) in ours.items():
            g = gradient[part, name] * min(1, clip / norms[part])
            mean.mul_(0.9).add_(0.1 * g)
            square.mul_(0.95).add_(0.05 * g**2)
            now = rate(step, lr, 2, steps) / slower[part]
            if is_matrix(name):
                weight.mul_(1 - now * decay)
            weight.sub_(
                now
                * mean
                / (1 - 0.9 ** (step + 1))
                / ((square / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
            )
    for part, module in parts.items():
        for name, weight in module.named_parameters():
            torch.testing.assert_close(weight.detach(), ours[part, name][0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [
    lambda: GPT(ModelConfig(6, 4, 4, 2, 2, 1, 8, tie_word_embeddings=False)), lambda: GPT(ModelConfig(6, 4, 4, 1, 1, 1, 8)),
    lambda: MedusaHeads(MedusaConfig(4, 6, 1, 1)), lambda: MedusaHeads(MedusaConfig(4, 6, 3, 2, False)),
])  # fmt: skip
def test_where_the_gradient_is_zero_matrices_decay_and_gains_and_biases_stay(make, tmp_path):
    module = make()
    for weight in module.parameters():
        nn.init.ones_(weight)
    config = a_fit(tmp_path, steps=3, warmup=1, lr=0.1, weight_decay=0.5)
    fitted(
        config,
        {"it": module},
        lambda step: add(
            {name: torch.zeros_like(w) for name, w in module.named_parameters()}, module
        ),
    )
    left = math.prod(1 - 0.5 * rate(step, 0.1, 1, 3) for step in range(3))
    for name, weight in module.named_parameters():
        torch.testing.assert_close(
            weight.detach(), torch.full_like(weight, left if is_matrix(name) else 1.0), msg=name
        )


def test_a_parameter_without_a_gradient_is_left_alone(tmp_path):
    """As the base is in the first stage of Medusa-2: it does not even decay, and its moments are not begun."""
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    before = [weight.detach().clone() for weight in one.parameters()]
    ones = {name: torch.ones_like(weight) for name, weight in two.named_parameters()}
    fitted(
        a_fit(tmp_path, steps=3, warmup=1, weight_decay=0.5),
        {"one": one, "two": two},
        lambda step: add(ones, two),
    )
    assert all(torch.equal(*pair) for pair in zip(before, one.parameters()))
    assert {
        key
        for key in read_safetensors(tmp_path / "checkpoint.safetensors")
        if key.startswith("one")
    } == {"one.weight|value", "one.bias|value"}


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_loss_that_is_no_number_stops_at_its_step_before_it_moves_a_weight(loss, bad, tmp_path):
    """And the checkpoint before it stays what it was."""
    module = nn.Linear(2, 2)
    seen = []

    def add_gradients(step):
        seen.append(module.weight.detach().clone())
        add({name: weight.detach().clone() for name, weight in module.named_parameters()}, module)
        return torch.tensor([1.0, loss if step == bad else 2.0, 0.0])

    with pytest.raises(ValueError, match=rf"loss is \[1.0, {loss}\] at step {bad},"):
        fitted(a_fit(tmp_path, steps=5, warmup=1, save_every=1), {"it": module}, add_gradients)
    assert len(seen) == bad + 1 and torch.equal(module.weight, seen[-1])
    assert bad == 0 or not torch.equal(seen[0], seen[-1])
    if bad:
        assert torch.equal(
            read_safetensors(tmp_path / "checkpoint.safetensors")["it.weight|value"], seen[-1]
        )
        assert len((tmp_path / "log.jsonl").read_text().splitlines()) == bad
    else:
        assert contents(tmp_path) == {}


def test_a_gradient_that_is_no_number_stops_too(tmp_path):
    module = nn.Linear(2, 2)
    before = module.weight.detach().clone()
    nan = {name: torch.full_like(weight, math.nan) for name, weight in module.named_parameters()}
    with pytest.raises(
        ValueError, match=r"loss is \[0.0, 0.0\] at step 0, the gradient's norm {'it': nan}"
    ):
        fitted(a_fit(tmp_path, steps=1, warmup=1), {"it": module}, lambda step: add(nan, module))
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize("batch, accumulate", [(5, 1), (5, 2), (5, 5), (4, 3)])
def test_the_rows_of_a_step_are_dealt_out_once_in_parts_and_its_figures_are_their_sum(
    batch, accumulate, tmp_path
):
    """And the counts are those of the whole batch, in every part."""
    module, seen = nn.Linear(2, 2), []
    rows, mask = (
        torch.arange(3 * batch).view(batch, 3),
        torch.rand(batch, 3, generator=rng(batch)) < 0.5,
    )

    def step_on_rows(step, tokens, part_mask, counts):
        assert counts.tolist() == [mask[:, 1:].sum(), mask[:, 2:].sum()]
        add({name: torch.ones_like(weight) for name, weight in module.named_parameters()}, module)
        seen.append((tokens, part_mask))
        return torch.tensor([1.0, tokens[0, 0], 0.5])

    parts = {"it": dict(module.named_parameters())}
    config = a_fit(tmp_path, steps=1, warmup=1, batch=batch, accumulate=accumulate)
    train_loop(
        config,
        1,
        lambda step: (rows, mask),
        step_on_rows,
        parts,
        lambda step: {"it": 0.1},
        1,
        torch.device("cpu"),
        "",
    )
    assert (
        len(seen) == accumulate
        and max(len(tokens) for tokens, _ in seen) - min(len(tokens) for tokens, _ in seen) <= 1
    )
    assert torch.equal(torch.cat([tokens for tokens, _ in seen]), rows) and torch.equal(
        torch.cat([part for _, part in seen]), mask
    )
    record = json.loads((tmp_path / "log.jsonl").read_text())
    assert (
        record["base"] == accumulate
        and record["heads"] == [sum(tokens[0, 0] for tokens, _ in seen)]
        and record["top1"] == [accumulate / 2]
    )


def test_the_log_has_a_line_for_every_step_with_all_that_was_measured(base, text, shards, tmp_path):
    train_medusa(
        training(
            base,
            text,
            tmp_path / "out",
            distilled=shards,
            steps=5,
            save_every=2,
            lr=0.01,
            warmup=2,
            clip=0.5,
        )
    )
    records = [
        json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    ]
    assert [record["step"] for record in records] == list(range(5))
    for step, record in enumerate(records):
        assert (
            record.keys() == {"step", "base", "heads", "top1", "lr", "norm"}
            and record["base"] == 0.0
        )
        assert len(record["heads"]) == len(record["top1"]) == 2 and all(
            loss > 0 for loss in record["heads"]
        )
        assert all(0 <= share <= 1 for share in record["top1"]) and record["norm"]["heads"] > 0
        assert (
            math.isclose(record["lr"]["heads"], rate(step, 0.01, 2, 5))
            and record["lr"]["base"] == 0.0
        )


def test_the_bar_shows_the_losses_of_base_and_heads(base, text, shards, tmp_path, monkeypatch):
    shown = []

    class Bar(list):
        def set_postfix(self, **figures):
            shown.append(figures)

    monkeypatch.setattr(train, "tqdm", lambda steps, **more: Bar(steps))
    train_medusa(
        training(
            base,
            text,
            tmp_path / "out",
            Medusa2Config,
            distilled=shards,
            data="corpus",
            heads_steps=1,
            steps=2,
        )
    )
    records = [
        json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    ]
    assert shown == [
        {
            "base": f"{record['base']:.2f}",
            "heads": " ".join(f"{loss:.2f}" for loss in record["heads"]),
        }
        for record in records
    ]
    assert records[-1]["base"] > 0.1


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_matmuls_run_in_the_precision_and_weights_stay_in_float32(
    precision, base, text, shards, tmp_path, monkeypatch
):
    seen, loss = [], train.medusa_loss

    def recording(logits, *rest):
        seen.append(logits.dtype)
        return loss(logits, *rest)

    monkeypatch.setattr(train, "medusa_loss", recording)
    train_medusa(training(base, text, tmp_path / "out", distilled=shards, precision=precision))
    assert seen == [getattr(torch, precision)] * 4
    assert {t.dtype for t in read_safetensors(tmp_path / "out" / "model.safetensors").values()} == {
        torch.float32
    }


# ---- windows, and the compression of a text ----


@settings(properties, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 20), st.integers(0, 9))
def test_every_window_is_a_piece_of_the_text_and_every_piece_is_drawn(length, more, seed):
    tokens = torch.arange(100, 100 + length + more, dtype=torch.int32)
    rows = windows(tokens, 600, length, rng(seed))
    assert rows.shape == (600, length) and rows.dtype == torch.long
    assert {tuple(row) for row in rows.tolist()} == {
        tuple(range(start, start + length)) for start in range(100, 100 + more + 1)
    }
    assert torch.equal(rows, windows(tokens, 600, length, rng(seed)))


def test_a_text_shorter_than_a_window_is_refused_and_one_as_long_is_the_window():
    for length in (0, 3):
        with pytest.raises(ValueError, match=f"{length} tokens.*4"):
            windows(torch.arange(length), 1, 4, rng(0))
    assert windows(torch.arange(4), 2, 4, rng(0)).tolist() == [[0, 1, 2, 3]] * 2


def nats(logits, token) -> float:
    return -F.log_softmax(logits, -1)[token].item()


@settings(properties, max_examples=40)
@given(st.integers(2, 9), st.integers(2, 30), st.integers(1, 50), st.integers(0, 999))
def test_bits_per_byte_scores_every_token_once_with_at_least_half_a_context_before_it(
    context, length, n_bytes, seed
):
    """Token t sees the text from the earliest multiple of half a context from which the context still reaches it."""
    model = random_gpt(seed, context=context)
    tokens = torch.randint(5, (length,), generator=rng(seed), dtype=torch.int32)
    total = 0.0
    with torch.no_grad():
        for t in range(1, length):
            start = next(start for start in range(0, t, context // 2) if t - start <= context)
            total += nats(model.lm_head(model(tokens[None, start:t].long()))[0, -1], tokens[t])
    assert math.isclose(
        bits_per_byte(model, tokens, n_bytes), total / math.log(2) / n_bytes, rel_tol=1e-9
    )


@settings(properties, max_examples=50)
@given(st.integers(2, 9), st.integers(1, 60), st.integers(0, 999))
def test_bits_per_byte_of_a_base_that_looks_at_one_token_is_a_sum_over_neighbours(
    context, length, seed
):
    logits = torch.randn(4, 4, generator=rng(seed), dtype=torch.float64)
    tokens = torch.randint(4, (length,), generator=rng(seed))
    total = sum(nats(logits[before], token) for before, token in zip(tokens, tokens[1:]))
    assert math.isclose(
        bits_per_byte(markov_gpt(logits, context), tokens, 7), total / math.log(2) / 7, rel_tol=1e-9
    )


def test_bits_per_byte_of_a_text_that_fits_the_context_comes_from_one_forward():
    model = random_gpt(3, context=12)
    tokens = torch.randint(5, (13,), generator=rng(0))
    with torch.no_grad():
        logits = model.lm_head(model(tokens[None, :-1]))[0]
    total = sum(nats(logits[t], tokens[t + 1]) for t in range(12))
    assert math.isclose(bits_per_byte(model, tokens, 10), total / math.log(2) / 10, rel_tol=1e-9)


def test_bits_per_byte_holds_for_a_context_of_one_token():
    logits = torch.randn(4, 4, generator=rng(0), dtype=torch.float64)
    tokens = torch.randint(4, (9,), generator=rng(0))
    total = sum(nats(logits[before], token) for before, token in zip(tokens, tokens[1:]))
    assert math.isclose(
        bits_per_byte(markov_gpt(logits, 1), tokens, 7), total / math.log(2) / 7, rel_tol=1e-9
    )


def test_perplexity_is_that_of_a_token_at_the_beginning_of_the_text(monkeypatch):
    model, tokens = random_gpt(3, context=12), torch.randint(5, (13,), generator=rng(0))
    with torch.no_grad():
        logits = model.lm_head(model(tokens[None, :-1]))[0]
    mean = sum(nats(logits[t], tokens[t + 1]) for t in range(12)) / 12
    assert math.isclose(perplexity(model, tokens), math.exp(mean), rel_tol=1e-9)
    monkeypatch.setattr(data.perplexity, "PERPLEXITY_TOKENS", 13)
    assert math.isclose(
        perplexity(model, torch.cat((tokens, tokens))), math.exp(mean), rel_tol=1e-9
    )


# ---- the base ----


def test_a_new_base_opens_again_repeats_with_its_seed_and_never_sees_the_validation_text(
    tmp_path, text, monkeypatch, capsys
):
    sources = []
    monkeypatch.setattr(
        train, "windows", lambda tokens, *args: sources.append(tokens) or windows(tokens, *args)
    )
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        train_base(base_config(tmp_path, text, name, seed=seed))
    one, two, three = (contents(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two and one["model.safetensors"] != three["model.safetensors"]
    assert one.keys() == {"config.json", "model.safetensors", "tokenizer.model", "log.jsonl"}
    tokenizer, model = load_base(tmp_path / "one")
    assert tokenizer.model == train_tokenizer(documents(False, text), 290).model
    assert (
        all(torch.equal(tokens, packed(documents(False, text), tokenizer)) for tokens in sources)
        and len(sources) == 12
    )
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.vocab_size) == (
        tokenizer.bos,
        tokenizer.eos,
        290,
    )
    held_out = documents(True, text)
    bits = bits_per_byte(
        model, packed(held_out, tokenizer), sum(len(document.encode()) for document in held_out)
    )
    assert f"one: {bits:.3f} bits per byte on held-out text" in capsys.readouterr().out


@pytest.mark.parametrize("mtp_weight, step", [(0.0, 2), (1.0, 0), (1.0, 2), (0.3, 3)])
def test_the_loss_of_the_base_is_cross_entropy_and_the_ramped_loss_of_heads_trained_along(
    mtp_weight, step, tmp_path, text, monkeypatch
):
    """New heads give the base's own logits, so every term, and its gradient, can be written down from these."""
    models = []

    def one_step(config, steps, rows_of_step, step_on_rows, parts, rates, K, device, inputs):
        rows, mask = rows_of_step(step)
        assert (
            steps == 4
            and rows.shape == (2, 16)
            and mask.all()
            and rates(step) == dict.fromkeys(parts, rate(step, config.lr, 1, 4))
        )
        counts = torch.tensor([mask[:, ahead:].sum() for ahead in range(1, K + 2)])
        figures = step_on_rows(step, rows, mask, counts)
        grads = {name: weight.grad.clone() for name, weight in parts["base"].items()}
        model = models[0].requires_grad_().zero_grad() or models[0]
        logits = model.lm_head(model(rows[:, :-1])).log_softmax(-1)  # (2, 15, V)
        means = [-logits[:, : 16 - k].gather(-1, rows[:, k:, None]).mean() for k in range(1, K + 2)]
        weight = mtp_weight * math.sin(math.pi / 2 * step / 4)
        (
            means[0] + weight * sum(0.8**k * mean for k, mean in enumerate(means[1:], start=1))
        ).backward()
        torch.testing.assert_close(
            figures[: K + 1],
            torch.stack([means[0], *(mean * (weight > 0) for mean in means[1:])]).detach(),
        )
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad, msg=name)
        Path(config.out).mkdir()
        checkpoint_path(config).touch()

    monkeypatch.setattr(
        train,
        "GPT",
        type(
            "Kept",
            (GPT,),
            {"__init__": lambda self, config: (GPT.__init__(self, config), models.append(self))[0]},
        ),
    )
    monkeypatch.setattr(train, "train_loop", one_step)
    train_base(base_config(tmp_path, text, context=15, mtp_weight=mtp_weight))
    assert models


@pytest.mark.parametrize("vocab_size", [100, 5000])
def test_a_vocabulary_that_does_not_suit_the_text_is_refused(vocab_size, tmp_path, text):
    with pytest.raises(ValueError, match="(?i)vocab"):
        train_base(base_config(tmp_path, text, vocab_size=vocab_size))


# ---- text that the base writes itself ----


@st.composite
def prompts_of_a_base(draw):
    """Prompts of 1 to 6 tokens, EOS among them, and the length of the rows."""
    vocab_size = draw(st.integers(2, 5))
    model = random_gpt(
        draw(st.integers(0, 999)), vocab_size, 16, eos=draw(st.integers(0, vocab_size - 1))
    )
    prompts = draw(
        st.lists(
            st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=6), min_size=1, max_size=6
        )
    )
    return model, prompts, max(map(len, prompts)) + draw(st.integers(1, 10))


def flat(steps) -> list[int]:
    return [token for emitted in steps for token in emitted]


@settings(properties, max_examples=60)
@given(prompts_of_a_base())
def test_greedy_rows_are_what_plain_decoding_gives_prompt_by_prompt(case):
    """However long the other prompts are, and whichever rows have left the batch. Loss stands on the sampled tokens, EOS included, and nowhere else."""
    model, prompts, length = case
    tokens, loss_mask = sample_rows(model, prompts, length, Sampling(), rng(0))
    assert (
        tokens.shape == loss_mask.shape == (len(prompts), length) and loss_mask.dtype == torch.bool
    )
    for prompt, row, loss in zip(prompts, tokens, loss_mask):
        new = flat(generate(model, prompt, length - len(prompt)))
        assert row[: len(prompt) + len(new)].tolist() == prompt + new
        assert loss.nonzero().flatten().tolist() == list(range(len(prompt), len(prompt) + len(new)))


@settings(properties, max_examples=40)
@given(prompts_of_a_base(), st.floats(0.3, 3), st.sampled_from((0.4, 1.0)), st.integers(0, 99))
def test_sampled_rows_keep_their_prompts_end_at_eos_and_repeat_with_their_seed(
    case, temperature, top_p, seed
):
    model, prompts, length = case
    tokens, loss_mask = sample_rows(
        model, prompts, length, Sampling(temperature, top_p=top_p), rng(seed)
    )
    for prompt, row, loss in zip(prompts, tokens.tolist(), loss_mask.tolist()):
        P, new = len(prompt), row[len(prompt) :]
        n = (
            new.index(model.config.eos_token_id) + 1
            if model.config.eos_token_id in new[: sum(loss)]
            else length - P
        )
        assert row[:P] == prompt and loss == [P <= place < P + n for place in range(length)]
    again, loss = sample_rows(model, prompts, length, Sampling(temperature, top_p=top_p), rng(seed))
    assert torch.equal(tokens, again) and torch.equal(loss_mask, loss)


@settings(properties, max_examples=30)
@given(prompts_of_a_base(), st.sampled_from((0.0, 1.0)))
def test_states_kept_while_sampling_are_those_of_the_base_on_the_rows(case, temperature):
    """However the prompts' lengths differ, and whichever rows have left the batch."""
    model, prompts, length = case
    states = torch.full(
        (len(prompts), length - 1, model.config.hidden_size), math.nan, dtype=torch.float64
    )
    tokens, loss_mask = sample_rows(model, prompts, length, Sampling(temperature), rng(0), states)
    for loss, kept, expected in zip(loss_mask, states, model(tokens[:, :-1].clone()).detach()):
        n = int(loss.nonzero().max())
        torch.testing.assert_close(kept[:n], expected[:n], rtol=0, atol=1e-10)


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(1.5, top_p=0.9)])
def test_sampled_rows_follow_the_base_distribution(sampling):
    """Each row on its own, from the distribution behind its own prompt."""
    model, n = random_gpt(11, vocab_size=6, eos=3), 3000
    prompts = [[1, 2], [4, 0]]
    tokens, loss_mask = sample_rows(model, prompts * n, 5, sampling, rng(0))
    for i, prompt in enumerate(prompts):
        counts = Counter(
            tuple(row[loss].tolist()) for row, loss in zip(tokens[i::2], loss_mask[i::2])
        )
        expected = text_distribution(model, prompt, 3, sampling)
        assert len({len(new) for new in expected}) > 1 and chi_square(counts, expected, n) > 0.01
    one, two = (tokens[i::2][:, 2].tolist() for i in (0, 1))
    pairs, parts = Counter(zip(one, two)), (Counter(one), Counter(two))
    product = {(a, b): parts[0][a] * parts[1][b] / n**2 for a in parts[0] for b in parts[1]}
    assert chi_square(pairs, product, n) > 0.01, "neighbouring rows depend on each other"


def test_rows_of_a_base_without_eos_never_end():
    model = random_gpt(2, eos=None)
    tokens, loss_mask = sample_rows(model, [[1], [2]], 6, Sampling(), rng(0))
    assert [row[1:].tolist() for row in tokens] == [
        flat(generate(model, [token], 5)) for token in (1, 2)
    ]
    assert loss_mask.tolist() == [[False] + [True] * 5] * 2


def test_of_held_out_rows_there_are_no_more_than_calibration_needs(base, text, monkeypatch):
    monkeypatch.setattr(data.distilled, "HELD_OUT_ROWS", 2)
    rows = {
        path.name: len(read_safetensors(path)["loss"])
        for path in distill(distilling(base, text, shards=1)).iterdir()
    }
    assert rows == {"train-00000.safetensors": 5} | {
        f"validation-{t}.safetensors": 2 for t in CALIBRATION_TEMPERATURES
    }


def test_distilled_rows_are_windows_of_their_side_and_what_the_base_writes_behind_them(base, text):
    directory = distill(distilling(base, text, seed=2))
    tokenizer, model = load_base(base)
    names = {f"train-{i:05d}.safetensors" for i in range(3)} | {
        f"validation-{t}.safetensors" for t in (0.0, 0.7, 1.0)
    }
    assert {path.name for path in directory.iterdir()} == names
    sides = [
        " " + " ".join(map(str, packed(documents(side, text), tokenizer).tolist())) + " "
        for side in (False, True)
    ]
    held_out_prompts = []
    for name in names:
        shard = read_safetensors(directory / name)
        assert (
            shard["tokens"].shape == shard["loss"].shape == (5, 10)
            and shard["loss"].dtype == torch.bool
        )
        assert not shard["loss"][:, :4].any() and shard["loss"][:, 4].all()
        for row in shard["tokens"].tolist():
            assert " " + " ".join(map(str, row[:4])) + " " in sides[name.startswith("validation")]
        if name.startswith("validation"):
            held_out_prompts.append(shard["tokens"][:, :4].tolist())
    assert held_out_prompts[0] == held_out_prompts[1] == held_out_prompts[2], (
        "the temperatures are measured on the same prompts"
    )
    greedy = read_safetensors(directory / "validation-0.0.safetensors")
    for row, loss in zip(greedy["tokens"], greedy["loss"]):
        assert row[loss].tolist() == flat(generate(model, row[:4].tolist(), 6))


def test_no_shard_repeats_another_and_another_seed_repeats_none(base, text, tmp_path):
    shards = []
    for seed in (0, 1):
        directory = distill(
            distilling(base, text, seed=seed, rows=8, out=str(tmp_path / str(seed)))
        )
        shards += [read_safetensors(path)["tokens"] for path in directory.glob("train-*")]
        shards += [
            read_safetensors(directory / f"validation-{t}.safetensors")["tokens"]
            for t in (0.7, 1.0)
        ]
    for what in (slice(4), slice(4, None)):
        seen = [tuple(shard[:, what].flatten().tolist()) for shard in shards]
        assert len(set(seen)) == len(seen) - (2 if what == slice(4) else 0), (
            "only the two validation shards of a seed share their prompts"
        )


def test_a_temperature_and_a_nucleus_shape_the_training_rows(base, text, tmp_path):
    """The validation rows have temperatures of their own. Greedy rows, and rows of a nucleus of one token, are the same."""
    greedy, narrow, wide = (
        {path.name: read_safetensors(path)["tokens"].tolist() for path in directory.iterdir()}
        for directory in (
            distill(
                distilling(
                    base, text, out=str(tmp_path / name), temperature=temperature, top_p=top_p
                )
            )
            for name, temperature, top_p in (("a", 0.0, 1.0), ("b", 1.0, 1e-9), ("c", 1.0, 1.0))
        )
    )
    name = "train-00001.safetensors"
    assert greedy[name] == narrow[name] != wide[name]
    assert all(greedy[name] == wide[name] for name in greedy if name.startswith("validation"))


@pytest.fixture
def whole(base, text, tmp_path):
    """An uninterrupted run's shards."""
    return contents(distill(distilling(base, text, out=str(tmp_path / "whole"))))


@pytest.mark.parametrize("lost", [{0}, {1, 2}, {3}, {4, 5}, {0, 3, 5}, set(), set(range(6))])
def test_shards_that_are_lost_are_made_again_and_the_others_are_kept(
    lost, base, text, whole, tmp_path
):
    directory = tmp_path / "whole"
    for i in lost:
        (directory / sorted(whole)[i]).unlink()
    kept = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    distill(distilling(base, text, out=str(directory)))
    assert contents(directory) == whole
    assert all((directory / name).stat().st_mtime_ns == made for name, made in kept.items())


@pytest.mark.parametrize("shards", [1, 2])
def test_more_shards_later_are_the_shards_of_one_run(shards, base, text, whole, tmp_path):
    distill(distilling(base, text, out=str(tmp_path / "later"), shards=shards))
    assert len(contents(tmp_path / "later")) == 3 + shards
    distill(distilling(base, text, out=str(tmp_path / "later")))
    assert contents(tmp_path / "later") == whole


@pytest.mark.parametrize("stop", range(6))
def test_a_run_that_is_stopped_goes_on_to_the_same_shards(
    stop, base, text, whole, tmp_path, monkeypatch
):
    written = []

    def stopping(path, *rest):
        if len(written) == stop:
            raise KeyboardInterrupt
        written.append(path)
        write_safetensors(path, *rest)

    config = distilling(base, text, out=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data.shards, "write_safetensors", stopping)
        distill(config)
    assert len(contents(tmp_path / "stopped")) == stop
    distill(config)
    assert contents(tmp_path / "stopped") == whole


@pytest.mark.parametrize("processes", [2, 6])
def test_several_processes_share_the_shards_and_wait_for_each_other(
    processes, base, text, whole, tmp_path, monkeypatch
):
    """The last one, which keeps states too, is the first to write."""
    directory, waited = tmp_path / "shared", []
    monkeypatch.setattr(
        data.distilled.dist, "barrier", lambda: waited.append(len(contents(directory)))
    )
    for process in reversed(range(processes)):
        monkeypatch.setattr(data.distilled, "rank_and_world_size", lambda: (process, processes))
        distill(distilling(base, text, out=str(directory), states=process == processes - 1))
    assert {
        name: there for name, there in contents(directory).items() if "states" not in name
    } == whole
    assert waited == {2: [5, 8], 6: [2, 3, 4, 5, 6, 7]}[processes], (
        "it waits when its own are written"
    )


@pytest.mark.parametrize("change", ["config", "weights", "garbage", "settings", "text"])
def test_shards_of_another_base_or_making_are_never_taken_for_ones_own(
    change, base, text, tmp_path
):
    config = distilling(base, text, out=str(tmp_path / "rows"))
    distill(config)
    if change == "config":
        write_json(base / "config.json", read_json(base / "config.json") | {"rope_theta": 77.0})
    elif change == "weights":
        state = read_safetensors(base / "model.safetensors")
        write_safetensors(
            base / "model.safetensors",
            state | {"model.norm.weight": 2 * state["model.norm.weight"]},
        )
    elif change == "garbage":
        (tmp_path / "rows" / "train-00000.safetensors").write_bytes(b"garbage")
    elif change == "settings":
        config = replace(config, temperature=0.9)
    else:
        Path(text[0]).write_text(2 * Path(text[0]).read_text("utf-8"), "utf-8")
    before = contents(tmp_path / "rows")
    with pytest.raises(
        ValueError, match="was written by another base, from other text or with other settings"
    ):
        distill(config)
    assert contents(tmp_path / "rows") == before


def test_a_base_is_not_overwritten_by_heads_nor_heads_by_a_base(base, text, shards, tmp_path):
    shutil.copytree(base, tmp_path / "copy")
    train_medusa(training(base, text, tmp_path / "heads", distilled=shards))
    for directory, go, config in (
        (
            tmp_path / "copy",
            train_medusa,
            training(base, text, tmp_path / "copy", distilled=shards),
        ),
        (tmp_path / "heads", train.train_base, base_config(tmp_path, text, "heads")),
    ):
        before = contents(directory)
        with pytest.raises(ValueError, match=f"--out {directory} holds "):
            go(config)
        assert contents(directory) == before


def test_rows_that_are_named_must_be_of_the_base_that_is_named(base, text, tmp_path):
    """Rows that do not say who wrote them are one's own business."""
    shards = distill(distilling(base, text, out=str(tmp_path / "rows"), new_tokens=10))
    config = training(base, text, tmp_path / "heads", distilled=str(shards))
    assert distilled_rows(config) == shards
    write_json(base / "config.json", read_json(base / "config.json") | {"rope_theta": 77.0})
    with pytest.raises(ValueError, match="was not written by the base in"):
        train_medusa(config)
    assert not (tmp_path / "heads").exists()
    for path in shards.iterdir():
        write_safetensors(path, read_safetensors(path))
    assert distilled_rows(config) == shards


def test_the_shipped_rows_serve_the_base_that_wrote_them_and_no_other(base, text, monkeypatch):
    made = []
    monkeypatch.setattr(
        data.distilled, "distill", lambda config: made.append(config) or Path("made")
    )
    shipped = Path(__file__).parent.parent / "data"
    monkeypatch.setattr(data.distilled, "SHIPPED_ROWS", shipped / "distilled")
    assert (
        distilled_rows(Medusa1Config(base=str(shipped / "base"))) == shipped / "distilled"
        and not made
    )
    for config in (
        Medusa1Config(base=str(base)),
        Medusa1Config(base=str(shipped / "base"), text=text),
    ):
        assert (
            distilled_rows(config) == Path("made")
            and made[-1].base == config.base
            and made[-1].text == config.text
        )


SHAPING = {
    "seed": 9,
    "chat": True,
    "rows": 6,
    "prompt_tokens": 5,
    "new_tokens": 7,
    "temperature": 0.9,
    "top_p": 0.8,
}
OTHERS = {"device": "auto", "precision": "bfloat16", "shards": 2, "states": True}


def test_every_setting_is_known_to_shape_the_rows_or_not_to():
    assert {field.name for field in fields(DistillConfig)} == SHAPING.keys() | OTHERS.keys() | {
        "base",
        "out",
        "text",
    }


@pytest.mark.parametrize("name", [*SHAPING, *OTHERS])
def test_what_shapes_the_rows_names_their_directory_and_nothing_else_does(
    name, base, text, tmp_path
):
    prompts = packed(documents(False, text), small_tokenizer())
    first = data.distilled.distill_digest(distilling(base, text), prompts)
    value = (SHAPING | OTHERS)[name]
    assert (
        data.distilled.distill_digest(distilling(base, text, **{name: value}), prompts) == first
    ) == (name in OTHERS)
    assert data.distilled.distill_digest(distilling(base, text, out="elsewhere"), prompts) == first


def test_the_shards_lie_in_the_cache_wherever_their_base_lies(base, text, tmp_path):
    directory = distill(distilling(base, text, shards=1, rows=1))
    assert directory.parent == tmp_path / "cache" / "nano-medusa" and directory.name.startswith(
        "distilled-"
    )
    shutil.copytree(base, tmp_path / "copy")
    assert distill(distilling(tmp_path / "copy", text, shards=2, rows=1)) == directory
    assert len(contents(directory)) == 3 + 2


@pytest.mark.parametrize(
    "changed", ["weights", "config", "training text", "validation text", "tokenizer"]
)
def test_another_base_or_another_text_makes_other_shards(changed, base, text):
    first = distill(distilling(base, text, shards=1, rows=1))
    if changed == "weights":
        model = GPT.from_pretrained(base)
        model.norm.weight.data += 0.1
        model.save_pretrained(base)
    elif changed == "config":
        write_json(base / "config.json", read_json(base / "config.json") | {"rope_theta": 5.0})
    elif changed == "tokenizer":
        train_tokenizer([source(7, 50)], 285).save(base)
    else:
        path = Path(text[changed == "validation text"])
        path.write_text(path.read_text() + "x = 1\n")
    assert distill(distilling(base, text, shards=1, rows=1)) != first


def test_rows_longer_than_the_context_are_refused_before_anything_is_written(base, text, tmp_path):
    distill(distilling(base, text, prompt_tokens=30, new_tokens=10, shards=1, rows=1))
    with pytest.raises(ValueError, match="--prompt-tokens.*--new-tokens.*40"):
        distill(
            distilling(base, text, prompt_tokens=31, new_tokens=10, out=str(tmp_path / "never"))
        )
    assert not (tmp_path / "never").exists()


def test_shards_come_back_in_the_order_of_their_names(tmp_path):
    write_shard(
        tmp_path,
        "train-00001.safetensors",
        torch.tensor([[2, 3], [4, 5]], dtype=torch.int32),
        [[False, True], [True, True]],
    )
    write_shard(
        tmp_path,
        "train-00000.safetensors",
        torch.tensor([[0, 1]], dtype=torch.int32),
        [[False, False]],
    )
    write_shard(tmp_path, "validation-0.0.safetensors", torch.tensor([[9, 9]], dtype=torch.int32))
    tokens, loss = read_shards(tmp_path, "train-*.safetensors", 6)
    assert tokens.tolist() == [[0, 1], [2, 3], [4, 5]] and tokens.dtype == torch.long
    assert (
        loss.tolist() == [[False, False], [False, True], [True, True]] and loss.dtype == torch.bool
    )


def test_missing_shards_are_refused_by_name(tmp_path):
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"{directory}.*train-"):
            read_shards(directory, "train-*.safetensors", 6)


MASK = torch.ones(1, 2, dtype=torch.bool)
BAD_SHARDS = {
    "a token beyond the vocabulary": {"tokens": torch.tensor([[0, 6]]), "loss": MASK},
    "a token below 0": {"tokens": torch.tensor([[0, -1]]), "loss": MASK},
    "tokens missing": {"loss": MASK},
    "loss missing": {"tokens": torch.tensor([[0, 1]])},
    "something more": {"tokens": torch.tensor([[0, 1]]), "loss": MASK, "more": torch.ones(1)},
    "no rows": {"tokens": torch.zeros(0, 2, dtype=torch.int32), "loss": MASK[:0]},
    "rows of another length": {
        "tokens": torch.tensor([[0, 1, 2]]),
        "loss": torch.ones(1, 3, dtype=torch.bool),
    },
    "a mask of another shape": {"tokens": torch.tensor([[0, 1]]), "loss": MASK[:, :1]},
    "one row, not a batch": {"tokens": torch.tensor([0, 1]), "loss": MASK[0]},
    "a mask of numbers": {"tokens": torch.tensor([[0, 1]]), "loss": torch.ones(1, 2)},
    "tokens that are no whole numbers": {"tokens": torch.tensor([[0.5, 1]]), "loss": MASK},
    "garbage": None,
}


@pytest.mark.parametrize("what", BAD_SHARDS)
def test_rows_of_another_base_and_malformed_shards_are_refused_by_name(what, tmp_path):
    """Also behind a shard that is good."""
    write_shard(tmp_path, "train-00000.safetensors", torch.tensor([[5, 0]], dtype=torch.int32))
    if BAD_SHARDS[what] is None:
        (tmp_path / "train-00001.safetensors").write_bytes(b"\x80\x04garbage")
    else:
        write_safetensors(tmp_path / "train-00001.safetensors", BAD_SHARDS[what])
    with pytest.raises(ValueError) as error:
        read_shards(tmp_path, "train-*.safetensors", 6)
    assert str(tmp_path) in str(error.value) and "train-" in str(error.value)


def kept(base, text, out) -> Path:
    return distill(distilling(base, text, out=str(out), states=True))


def test_kept_states_change_no_row_and_are_written_again_with_their_shard_if_they_are_lost(
    base, text, tmp_path
):
    plain, rows = (
        contents(distill(distilling(base, text, out=str(tmp_path / "plain")))),
        kept(base, text, tmp_path / "rows"),
    )
    whole = contents(rows)
    assert whole == plain | {
        name: whole[name] for name in (f"states-{i:05d}.safetensors" for i in range(3))
    }
    (rows / "states-00001.safetensors").unlink()
    assert (
        contents(kept(base, text, rows)) == whole
        and contents(kept(base, text, tmp_path / "plain")) == whole
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.distilled, "sample_rows", None)
        kept(base, text, rows)  # all is there


def test_heads_that_learn_from_kept_states_are_those_that_learn_from_the_base_which_is_not_run(
    base, text, tmp_path, monkeypatch
):
    write_json(
        base / "config.json", read_json(base / "config.json") | {"eos_token_id": list(range(60))}
    )  # some rows end early
    rows = kept(base, text, tmp_path / "rows")
    model = GPT.from_pretrained(base)
    told, (tokens, loss_mask) = (
        KeptStates(model, rows),
        read_shards(rows, "train-*.safetensors", 290),
    )
    for T in (1, 4, 7, tokens.shape[1] - 1):
        seen = loss_mask[:, 1:].flip(1).cumsum(1).flip(1)[:, :T] > 0  # a target is still to come
        torch.testing.assert_close(
            told(tokens[:, :T])[seen], model(tokens[:, :T])[seen], rtol=0, atol=0.005
        )
        assert not told(tokens[:, :T])[~seen].any()
    backpropagate, used = train.backpropagate, []
    monkeypatch.setattr(
        train,
        "backpropagate",
        lambda model, *more: used.append(type(model)) or backpropagate(model, *more),
    )
    for name in ("states", "base"):
        train_medusa(training(base, text, tmp_path / "of" / name, distilled=str(rows), lr=0.01))
        for path in rows.glob("states-*"):
            path.unlink()
    assert used == [KeptStates] * 4 + [GPT] * 4
    one, two = (MedusaHeads.from_pretrained(tmp_path / "of" / name) for name in ("states", "base"))
    assert one.weight.abs().max() > 0.01
    torch.testing.assert_close(one.weight, two.weight, rtol=0, atol=0.002)


@pytest.mark.parametrize("lora", [False, True])
def test_a_base_that_learns_is_run_though_its_states_are_kept(
    lora, base, text, tmp_path, monkeypatch
):
    rows, used, backpropagate = kept(base, text, tmp_path / "rows"), [], train.backpropagate
    monkeypatch.setattr(
        train,
        "backpropagate",
        lambda model, *more: used.append(type(model)) or backpropagate(model, *more),
    )
    train_medusa(
        training(
            base,
            text,
            tmp_path / "out",
            Medusa2Config,
            distilled=str(rows),
            heads_steps=2,
            steps=3,
            lr=0.01,
            lora=lora,
        )
    )
    assert used == [KeptStates] * 2 + [GPT] * 3, "the first stage trains heads alone"
    before, after = (
        read_safetensors(folder / "model.safetensors") for folder in (base, tmp_path / "out/base")
    )
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "spoil", ["missing", "garbage", "of another shard", "another width", "no states"]
)
def test_kept_states_that_do_not_belong_to_their_rows_are_refused_by_name(
    spoil, base, text, tmp_path
):
    rows = kept(base, text, tmp_path / "rows")
    path, other = (rows / f"states-0000{i}.safetensors" for i in (1, 2))
    if spoil == "missing":
        path.unlink()
    elif spoil == "garbage":
        path.write_bytes(path.read_bytes()[:-1])
    elif spoil == "of another shard":
        path.write_bytes(other.read_bytes())
    else:
        state = read_safetensors(path)["states"]
        write_safetensors(
            path,
            {"states": state[:, 1:].contiguous()} if spoil == "another width" else {"more": state},
            data.shards.metadata_of(path),
        )
    with pytest.raises(
        ValueError,
        match="states-00001.safetensors (cannot be read|does not belong to).*--mode distill --states",
    ):
        train_medusa(training(base, text, tmp_path / "out", distilled=str(rows)))


# ---- ranks and calibration ----


def ranks_by_hand(model, heads, tokens, loss_mask) -> list[list[int]]:
    """One position at a time: token t+1, the root, and the targets t+2 .. t+K+1 must all be there and carry loss."""
    K, found = heads.config.num_heads, []
    with torch.no_grad():
        for row, loss in zip(tokens, loss_mask.tolist()):
            logits = heads(model(row[None]), model.lm_head)[:, 0]  # (K, T, V)
            for t in range(len(row)):
                if t + K + 1 < len(row) and all(loss[t + 1 : t + K + 2]):
                    found.append(
                        [
                            sum(
                                bool(x > logits[k - 1, t, row[t + k + 1]]) for x in logits[k - 1, t]
                            )
                            for k in range(1, K + 1)
                        ]
                    )
    return found


@st.composite
def measured_rows(draw):
    K, B = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    T = draw(st.integers(K + 2, 9))
    seed = draw(st.integers(0, 999))
    model = random_gpt(seed)
    tokens = torch.randint(5, (B, T), generator=rng(seed))
    mostly = st.sampled_from((True, True, True, False))
    mask = torch.tensor(draw(st.lists(mostly, min_size=B * T, max_size=B * T))).view(B, T)
    return model, random_heads(model, K, seed, private=draw(st.booleans())), tokens, mask


@settings(properties, max_examples=60)
@given(measured_rows())
def test_head_ranks_equal_those_found_one_position_at_a_time(case):
    """A rank is the number of tokens that the head finds likelier than the one that came."""
    model, heads, tokens, mask = case
    ranks = head_ranks(model, heads, tokens, mask)
    assert [row.tolist() for row in ranks] == [
        ranks_by_hand(model, heads, tokens[i : i + 1], mask[i : i + 1]) for i in range(len(tokens))
    ]
    assert all(row.shape[1] == heads.config.num_heads for row in ranks)


@properties
@given(st.integers(2, 6), st.integers(0, 99), st.floats(0.1, 3))
def test_the_noise_of_draws_draws_them_again(V, seed, scale):
    probs = (scale * torch.randn(50, V, generator=rng(seed), dtype=torch.float64)).softmax(-1)
    tokens = torch.randint(V, (50,), generator=rng(seed))
    assert torch.equal(draw(probs, noise_given_tokens(probs, tokens, rng(seed))), tokens)


def test_the_noise_of_draws_is_noise():
    """Over tokens drawn from the distribution it is exponential, whichever token it belongs to, and independent of the others."""
    probs = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).expand(40_000, 3)
    noise = noise_given_tokens(probs, probs.multinomial(1, generator=rng(0))[:, 0], rng(1))
    cells = (1 - (-noise).exp()).mul(3).long()  # (n, 3): in thirds of equal probability
    counts = Counter(map(tuple, cells.tolist()))
    assert chi_square(counts, {cell: 1 / 27 for cell in product(range(3), repeat=3)}, 40_000) > 0.01


def test_sampled_rows_give_heads_that_think_as_the_base_does_rank_0():
    model = markov_gpt(torch.tensor([[0.3, 0.0, 0.2, -0.1]]).expand(4, 4))
    heads = MedusaHeads(MedusaConfig(4, 4, 3)).double()
    tokens = torch.randint(4, (3, 20), generator=rng(0))
    for temperature in (0.5, 1.0):
        assert not torch.cat(
            head_ranks(model, heads, tokens, tokens >= 0, Sampling(temperature))
        ).any()
    assert torch.cat(head_ranks(model, heads, tokens, tokens >= 0)).any()


def test_among_equals_nobody_is_better():
    model = random_gpt(0)
    heads = MedusaHeads(MedusaConfig(8, 5, 2, original_lm_head=False)).double()  # all logits are 0
    tokens = torch.arange(5)[None]
    assert [row.tolist() for row in head_ranks(model, heads, tokens, tokens >= 0)] == [[[0, 0]] * 2]


@settings(properties, max_examples=30)
@given(measured_rows(), st.integers(1, 9), st.integers(2, 6), st.integers(2, 9))
def test_a_calibration_counts_every_prefix_where_a_step_starts_and_comes_back_from_its_file(
    tmp_path_factory, case, limit, n_nodes, reference
):
    model, heads, tokens, mask = case
    mask[0] = True
    rows_of = {"0": (tokens, mask), "0.0": (tokens.flip(1), torch.ones_like(mask))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.calibration, "CALIBRATION_PREFIXES", limit)
        patch.setattr(data.calibration, "CALIBRATION_NODES", reference)
        report = calibrate(model, heads, rows_of)
    path = tmp_path_factory.mktemp("heads") / "calibration.json"
    write_json(path, report)
    assert read_json(path) == report and report.keys() == rows_of.keys()
    for temperature, rows in rows_of.items():
        ranks, result = ranks_by_hand(model, heads, *rows), report[temperature]
        texts = [
            ranks_by_hand(model, heads, row[None], row_mask[None]) for row, row_mask in zip(*rows)
        ]
        starts = replay(texts, calibrated_tree(ranks, reference))
        counts = defaultdict(int)
        for position in starts:
            for depth in range(1, len(position) + 1):
                counts[tuple(position[:depth])] += 1
        common = sorted(counts, key=lambda prefix: (-counts[prefix], len(prefix), prefix))[:limit]
        assert result["steps"] == len(starts)
        assert list(result["prefixes"].items()) == [
            (" ".join(map(str, prefix)), counts[prefix]) for prefix in common
        ]
        for k in range(heads.config.num_heads):
            for name, below in (("top1", 1), ("top5", 5)):
                assert (
                    abs(
                        result[name][k]
                        - sum(position[k] < below for position in ranks) / len(ranks)
                    )
                    < 1e-4
                )
        assert read_prefixes(result) == {prefix: counts[prefix] for prefix in common} | {
            (): len(starts)
        }
        n_nodes = min(n_nodes, limit + 1)
        assert calibrated_tree(read_prefixes(result), n_nodes) == calibrated_tree(starts, n_nodes)


def test_top5_is_not_top1():
    """Ranks 0 to 5 in turn, of logits that stand in the file: one in six is right, and five in six are among the first five."""
    model = markov_gpt(torch.zeros(6, 6), context=16)
    heads = MedusaHeads(MedusaConfig(6, 6, 1, original_lm_head=False)).double()
    heads.lm_heads.data = (
        torch.arange(6, 0, -1, dtype=torch.float64)[None, :, None].expand(1, 6, 6).contiguous()
    )
    tokens = torch.tensor([[0, 0, 0, 1, 2, 3, 4, 5]])
    result = calibrate(model, heads, {"0.0": (tokens, tokens >= 0)})["0.0"]
    assert (result["steps"], result["top1"], result["top5"]) == (
        3,
        [round(1 / 6, 4)],
        [round(5 / 6, 4)],
    )
    assert result["prefixes"] == {"0": 1, "2": 1, "4": 1}, (
        "a tree of all ranks accepts one guess a step"
    )


# ---- medusa1 ----


@pytest.mark.parametrize("data", ["distilled", "corpus"])
@pytest.mark.parametrize(
    "shared, precision", [(True, "float32"), (False, "float32"), (True, "bfloat16")]
)
def test_training_heads_leaves_the_base_bit_for_bit_and_repeats_with_its_seed(
    data, shared, precision, base, text, shards, tmp_path, monkeypatch
):
    before, used = contents(base), []
    monkeypatch.setattr(
        train, "load_base", lambda *args, **more: used.append(load_base(*args, **more)) or used[-1]
    )
    more = {"data": data, "original_lm_head": shared, "precision": precision, "distilled": shards}
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        train_medusa(training(base, text, tmp_path / name, seed=seed, **more))
    assert contents(base) == before
    model = GPT.from_pretrained(base, getattr(torch, precision))
    for _, trained in used:
        state = trained.state_dict()
        assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
        assert all(weight.grad is None for weight in trained.parameters())
    one, two, three = (contents(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two and one["model.safetensors"] != three["model.safetensors"]
    assert one.keys() == {"config.json", "model.safetensors", "calibration.json", "log.jsonl"}

    heads = MedusaHeads.from_pretrained(tmp_path / "one")
    assert heads.config == MedusaConfig(16, 290, 2, MedusaConfig.num_hidden_layers, shared)
    assert all(weight.abs().max() > 0 for weight in heads.parameters())
    held_out = {
        str(t): read_shards(Path(shards), f"validation-{t}.safetensors", 290)
        for t in CALIBRATION_TEMPERATURES
    }
    assert json.loads(one["calibration.json"]) == calibrate(model, heads, held_out), (
        "the calibration is that of the heads beside it"
    )


def test_an_epoch_shows_every_row_once_and_a_batch_stands_by_length(base, text, tmp_path):
    rows, ends = (
        torch.randint(290, (15, 9), generator=rng(0)),
        torch.randint(3, 9, (15,), generator=rng(1)).tolist(),
    )
    loss_mask = torch.stack([(torch.arange(9) > 1) & (torch.arange(9) <= end) for end in ends])
    write_shard(tmp_path, "train-00000.safetensors", rows, loss_mask)
    rows_of_step, _, _ = rows_to_train(
        training(base, text, tmp_path / "out", batch=3),
        tmp_path,
        small_tokenizer(),
        GPT.from_pretrained(base),
    )
    seen = []
    for step in range(2 * len(rows) // 3):
        tokens, mask = rows_of_step(step)
        found = [
            next(
                i
                for i, (row, carry) in enumerate(zip(rows, loss_mask))
                if row.equal(a) and carry.equal(b)
            )
            for a, b in zip(tokens, mask)
        ]
        assert [ends[i] for i in found] == sorted(ends[i] for i in found)
        seen += found
    first, second = seen[: len(rows)], seen[len(rows) :]
    assert sorted(first) == sorted(second) == list(range(len(rows))) and first != second


def test_a_truncated_vocabulary_is_that_of_the_most_frequent_targets(base, text, shards, tmp_path):
    train_medusa(training(base, text, tmp_path / "out", distilled=shards, truncated_vocab_size=20))
    heads = MedusaHeads.from_pretrained(tmp_path / "out")
    rows, loss_mask = read_shards(Path(shards), "train-*.safetensors", 290)
    counts = Counter(rows[loss_mask].tolist())
    taken = heads.token_map.tolist()
    assert heads.config.truncated_vocab_size == len(taken) == 20
    assert min(counts[token] for token in taken) >= max(
        counts[token] for token in range(290) if token not in taken
    )
    sizes = [len(calibrated_tree(read_calibration(tmp_path / "out", 0.0)[0], n)) for n in (8, 64)]
    for n in sizes:
        check_compatible(
            GPT.from_pretrained(base),
            heads,
            calibrated_tree(read_calibration(tmp_path / "out", 0.0)[0], n),
        )
    assert sizes[0] == 8


def block_rows(offset: int, B: int, blocks: int, seed: int):
    """Blocks of random tokens, each followed by its translation: a token tells the one `offset` ahead, and no other. Loss on translations."""
    first = torch.randint(6, (B, blocks, offset), generator=rng(seed))
    tokens = torch.cat((first, (first * 5 + 2) % 6), dim=2).flatten(1)  # (B, T)
    loss = torch.cat((torch.zeros_like(first), torch.ones_like(first)), dim=2).flatten(1).bool()
    return tokens.int(), loss


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 5])
def test_training_teaches_head_k_the_token_k_plus_1_ahead_and_nothing_else(offset, text, tmp_path):
    """Of three heads, head offset - 1 learns it; at offsets 1 and 5 there is no such head and none may. The base's state is the token."""
    model = GPT(ModelConfig(290, 8, 4, 1, 1, 1, 60, tie_word_embeddings=False))
    with torch.no_grad():
        for layer in (
            model.layers[0].self_attn.o_proj,
            model.layers[0].mlp.down_proj,
            model.embed_tokens,
            model.lm_head,
        ):
            layer.weight.zero_()
        model.embed_tokens.weight[:8] = torch.eye(8)
    model.save_pretrained(tmp_path / "base")
    small_tokenizer().save(tmp_path / "base")
    for i in range(3):
        write_shard(
            tmp_path / "shards",
            f"train-{i}.safetensors",
            *block_rows(offset, 16, 50 // (2 * offset), 10 * offset + i),
        )
    held_out, loss = block_rows(offset, 16, 50 // (2 * offset), 1000 + offset)
    for t in CALIBRATION_TEMPERATURES:
        write_shard(tmp_path / "shards", f"validation-{t}.safetensors", held_out)
    more = {
        "distilled": str(tmp_path / "shards"),
        "original_lm_head": False,
        "num_heads": 3,
        "lr": 0.2,
        "clip": 100.0,
        "weight_decay": 0.0,
    }
    train_medusa(
        training(tmp_path / "base", text, tmp_path / "heads", steps=50, batch=16, warmup=3, **more)
    )

    heads = MedusaHeads.from_pretrained(tmp_path / "heads")
    with torch.no_grad():
        guesses = heads(model(held_out.long()), model.lm_head).argmax(-1)  # (3, B, T)
    top1 = read_json(tmp_path / "heads" / "calibration.json")["0.0"]["top1"]
    for k in (1, 2, 3):
        places = [
            (b, t)
            for b in range(16)
            for t in range(held_out.shape[1] - k - 1)
            if loss[b, t + k + 1]
        ]
        right = sum(
            guesses[k - 1, b, t].item() == held_out[b, t + k + 1].item() for b, t in places
        ) / len(places)
        assert right > 0.95 if k + 1 == offset else right < 0.4, f"head {k}"
        assert top1[k - 1] > 0.45 if k + 1 == offset else top1[k - 1] < 0.4, f"head {k}"


def recorded(monkeypatch) -> list:
    """What every step is taken on: (tokens, mask, decay)."""
    seen, step = [], train.backpropagate

    def recording(model, heads, tokens, mask, counts, weights, decay, teacher):
        assert weights == (0.0, 1.0) and counts.tolist() == [
            mask[:, ahead:].sum() for ahead in range(1, heads.config.num_heads + 2)
        ]
        seen.append((tokens, mask, decay))
        return step(model, heads, tokens, mask, counts, weights, decay)

    monkeypatch.setattr(train, "backpropagate", recording)
    return seen


def test_every_row_is_trained_on_once_with_its_own_mask_before_any_comes_again(
    base, text, shards, tmp_path, monkeypatch
):
    seen = recorded(monkeypatch)
    for path in Path(shards).glob("train-*"):
        tokens = read_safetensors(path)["tokens"]
        write_shard(
            path.parent,
            path.name,
            tokens,
            torch.rand(tokens.shape, generator=rng(int(path.stem[-1]))) < 0.5,
        )
    rows, loss = read_shards(Path(shards), "train-*.safetensors", 290)
    train_medusa(
        training(base, text, tmp_path / "heads", distilled=shards, steps=10, batch=3, decay=0.7)
    )  # 30 of 15 rows

    def pairs(batches) -> list:
        return [
            (row.tolist(), mask.tolist())
            for tokens, masks in batches
            for row, mask in zip(tokens, masks)
        ]

    first, second = (
        pairs([(tokens, masks) for tokens, masks, _ in part]) for part in (seen[:5], seen[5:])
    )
    assert sorted(first) == sorted(second) == sorted(pairs([(rows, loss)])) and first != second
    assert {decay for _, _, decay in seen} == {0.7}


def test_training_on_the_corpus_takes_windows_of_the_training_text_alone(
    base, text, shards, tmp_path, monkeypatch
):
    seen = recorded(monkeypatch)
    train_medusa(training(base, text, tmp_path / "heads", distilled=shards, data="corpus"))
    corpus = (
        " " + " ".join(map(str, packed(documents(False, text), small_tokenizer()).tolist())) + " "
    )
    assert len(seen) == 4 and all(tokens.shape == (3, 9) and mask.all() for tokens, mask, _ in seen)
    assert all(
        " " + " ".join(map(str, row)) + " " in corpus
        for tokens, _, _ in seen
        for row in tokens.tolist()
    )


def test_without_distilled_text_the_defaults_are_distilled_from_this_base(
    base, text, shards, tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(
        data.distilled, "distill", lambda config: asked.append(config) or Path(shards)
    )
    train_medusa(training(base, text, tmp_path / "heads", seed=5))
    assert asked == [DistillConfig(base=str(base), text=text, seed=5, **CPU)]
    train_medusa(training(base, text, tmp_path / "heads", distilled=shards))
    assert len(asked) == 1


@pytest.mark.parametrize(
    "length, gap", [(1, None), (3, None), (5, None), (6, None), (9, 5), (6, 1), (6, 0)]
)
def test_rows_in_which_nothing_can_be_measured_are_refused_by_name(
    length, gap, base, text, tmp_path
):
    """Behind a position, four heads and the root need five tokens in a row that carry loss. The refusal must not cost a training first."""
    for name in ("train-0", "validation-0.0", "validation-0.7", "validation-1.0"):
        loss = torch.ones(3, length, dtype=torch.bool)
        if gap is not None:
            loss[:, gap] = False
        write_shard(
            tmp_path / "shards",
            f"{name}.safetensors",
            torch.ones(3, length, dtype=torch.int32),
            loss,
        )
    config = training(
        base, text, tmp_path / "heads", distilled=str(tmp_path / "shards"), num_heads=4
    )
    if length == 6 and gap != 1:
        train_medusa(config)
        return
    with pytest.raises(ValueError, match="shards"):
        train_medusa(config)
    assert not (tmp_path / "heads" / "calibration.json").exists()


def test_the_report_names_every_accuracy_and_what_comes_next(base, text, shards, tmp_path, capsys):
    train_medusa(training(base, text, tmp_path / "heads", distilled=shards))
    out = capsys.readouterr().out
    for temperature, result in read_json(tmp_path / "heads" / "calibration.json").items():
        line = next(
            line for line in out.splitlines() if line.startswith(f"temperature {temperature},")
        )
        assert all(
            f"head {k}: {a:.1%} / {b:.1%}" in line
            for k, (a, b) in enumerate(zip(result["top1"], result["top5"]), start=1)
        )
        counts = read_prefixes(result)
        for n in (4, 8):
            tokens = (
                1
                + sum(
                    sorted((count for path, count in counts.items() if path), reverse=True)[: n - 1]
                )
                / counts[()]
            )
            assert f"{tokens:.2f} with {n} nodes" in out
    assert f"python sample.py --base {base} --heads {tmp_path / 'heads'}" in out
