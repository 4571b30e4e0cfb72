"""What sample.py is asked for: how to sample, and the prompt. `config` is its SampleConfig; what contradicts itself is refused by the flags' names."""

from pathlib import Path

from medusa import Sampling


def sampling_of(config) -> Sampling:
    """The sampling that the flags ask for; raises ValueError when they contradict each other."""
    if config.accept == "greedy" and config.temperature > 0:
        raise ValueError(
            f"--accept greedy contradicts --temperature {config.temperature}: leave one of them out"
        )
    if config.temperature == 0 and (config.top_k, config.top_p) != (Sampling.top_k, Sampling.top_p):
        raise ValueError("--top-k and --top-p need --temperature above 0: at 0 nothing is drawn")
    if config.accept == "typical" and config.temperature == 0:
        raise ValueError("--accept typical needs --temperature above 0: at 0 it is greedy")
    if config.epsilon != Sampling.epsilon and config.accept != "typical":
        raise ValueError("--epsilon belongs to --accept typical")
    return Sampling(
        config.temperature, config.top_k, config.top_p, config.accept == "typical", config.epsilon
    )


def read_prompt(config) -> str:
    if (config.prompt != type(config).prompt) + bool(config.prompt_file) + bool(config.chat) > 1:
        raise ValueError(
            "--prompt, --prompt-file and --chat contradict each other: leave only one of them"
        )
    source = (
        f"--prompt-file {config.prompt_file}"
        if config.prompt_file
        else "--chat"
        if config.chat
        else "--prompt"
    )
    try:
        data = (
            Path(config.prompt_file).read_bytes()
            if config.prompt_file
            else (config.chat or config.prompt).encode()
        )
        text = data.decode("utf-8")
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"{source} cannot be read as UTF-8 text: {error}; look at the terminal's encoding, or at the file's"
        ) from None
    if not text:
        raise ValueError(f"{source} is empty: give at least one character")
    return text
