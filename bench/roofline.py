"""The least time of a step: what it must read over the bandwidth, or compute over the FLOP rate.

Counted are the matrices of the model, each read once, the rows of the cache, and two operations a
multiplication. N rows (nodes of a tree), S tokens in the cache; width: bytes of a number.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from medusa import MedusaConfig
from model import ModelConfig


@dataclass(frozen=True)
class Device:
    bandwidth: float  # bytes a second
    flops: float  # operations a second

    def seconds(self, n_bytes: float, operations: float) -> float:
        return max(n_bytes / self.bandwidth, operations / self.flops)


def matrices(config: ModelConfig) -> int:
    """Numbers in the matrices that every token is multiplied with, the LM head among them."""
    D, L = config.hidden_size, config.num_hidden_layers
    # Queries and output, keys and values.
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads)
    attention = D * heads * config.head_dim
    return L * (attention + 3 * D * config.intermediate_size) + config.vocab_size * D


def backbone_work(config: ModelConfig, N: int, S: int, width: int) -> tuple[int, int]:
    """Bytes and operations of the model over N rows after S: matrices, and keys and values, once;
    2 N matrices, and attention's 4 N (S + N) L of all heads' widths."""
    L, all_heads = config.num_hidden_layers, config.num_attention_heads * config.head_dim
    cached = 2 * L * config.num_key_value_heads * config.head_dim * (S + N)
    operations = 2 * N * matrices(config) + 4 * N * (S + N) * all_heads * L
    return width * (matrices(config) + cached), operations


def heads_work(config: MedusaConfig, width: int) -> tuple[int, int]:
    """Bytes and operations of K heads at one position. A shared LM head is read once."""
    layers = config.num_heads * config.num_hidden_layers * config.hidden_size**2
    lm_head = config.truncated_vocab_size * config.hidden_size
    lm_heads = 1 if config.original_lm_head else config.num_heads
    return width * (layers + lm_head * lm_heads), 2 * (layers + config.num_heads * lm_head)


def plain_seconds(device: Device, model: ModelConfig, S: int, width: int) -> float:
    return device.seconds(*backbone_work(model, 1, S, width))


def tree_seconds(
    device: Device, model: ModelConfig, heads: MedusaConfig, N: int, S: int, width: int
) -> float:
    """Heads, then the tree: the one waits for the other."""
    backbone = device.seconds(*backbone_work(model, N, S, width))
    return device.seconds(*heads_work(heads, width)) + backbone


# ---- what this machine reaches ----


def fastest(work: Callable[[], object], rounds: int = 7) -> float:
    """Seconds of the fastest round: a roof is what can be reached, not what is usual."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def measured_bandwidth(n_bytes: int) -> float:
    """Bytes a second: the better of reading so many and of copying them, which moves them twice."""
    source = torch.ones(n_bytes // 4)
    target = torch.zeros_like(source)
    return max(n_bytes / fastest(source.sum), 2 * n_bytes / fastest(lambda: target.copy_(source)))


def measured_flops(n: int = 1536) -> float:
    """Operations a second of a product of two n x n matrices in float32."""
    a, b = torch.ones(n, n), torch.ones(n, n)
    return 2 * n**3 / fastest(lambda: a @ b)
