"""Every tensor follows device and dtype of the model that it meets, whatever the defaults are.

Two defaults are a second device: `meta`, where a tensor has no numbers, so that one that gets there
by mistake ends the run; and float64. The skips say which accelerators were not at hand.
"""

import pytest
import torch

from medusa import MedusaConfig, MedusaHeads, Sampling, TreeBuffers, generate, medusa_generate
from model import GPT, ModelConfig
from sample import first_difference
from strategies import default_dtype, random_gpt, random_heads, rng, text_of
from train import Batch, TrainConfig, calibrate, make_batch, medusa2_loss, perplexity, sample_rows
from tree import ROOT_ONLY, cartesian_tree

TREE = cartesian_tree((3, 2))
RULES = [Sampling(), Sampling(0.8), Sampling(0.8, 3, 0.9), Sampling(0.8, typical=True, epsilon=0.2)]


def texts(model: GPT, heads: MedusaHeads, sampling: Sampling, n: int = 16) -> list[list[int]]:
    """n tokens after one prompt, from one seed: through a tree, and plainly."""
    device, prompt = model.lm_head.weight.device, [1, 2, 3]
    first, second = (torch.Generator(device).manual_seed(0) for _ in range(2))
    tree_steps = medusa_generate(model, heads, TREE, prompt, n, sampling, first)
    return [text_of(steps) for steps in (tree_steps, generate(model, prompt, n, sampling, second))]


def small(dtype=torch.float32, private=False, truncated=0) -> tuple[GPT, MedusaHeads]:
    model = random_gpt(3, vocab_size=6, eos=None).to(dtype)
    return model, random_heads(model, 2, 1, private=private, truncated=truncated).to(dtype)


def batch_on(device, heads: MedusaHeads) -> Batch:
    """All tokens of four rows."""
    rows = torch.randint(6, (4, 12), generator=rng(0)), torch.ones(4, 12, dtype=torch.bool)
    return make_batch(TrainConfig(batch=4), rows, heads, torch.device(device), 0)


def gradients(model: GPT, heads: MedusaHeads, batch: Batch) -> list[torch.Tensor]:
    """The metrics of Medusa-2's loss, and the gradient of every parameter."""
    loss, metrics = medusa2_loss(model, heads, batch, 0.2)
    parameters = [p for p in (*model.parameters(), *heads.parameters()) if p.requires_grad]
    return [metrics, *torch.autograd.grad(loss, parameters)]


def test_training_measuring_and_sampling_follow_the_models_device():
    (model, heads), (_, short) = small(), small(truncated=4)
    batch, tokens = batch_on("cpu", heads), torch.randint(6, (4, 12), generator=rng(0))
    held_out = {t: (tokens, torch.ones_like(tokens, dtype=torch.bool)) for t in ("0.0", "0.7")}

    def all_of_it():
        rows = sample_rows(model, [[1], [2, 3]], 8, Sampling(0.7), rng(0))
        numbers = calibrate(model, short, held_out), perplexity(model, tokens.flatten())
        return [*gradients(model, heads, batch), *rows], numbers

    expected = all_of_it()
    with torch.device("meta"):
        found = all_of_it()
    assert all(map(torch.equal, found[0], expected[0])) and found[1] == expected[1]


@pytest.mark.parametrize("sampling", RULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_follows_the_models_device_and_dtype(dtype, sampling):
    """In half precision a tree and plain decoding may part at a near-tie: each is its own rival."""
    model, heads = small(dtype)
    expected = texts(model, heads, sampling)
    with torch.device("meta"):
        assert texts(model, heads, sampling) == expected
    with default_dtype(torch.float64), torch.no_grad():
        assert texts(model, heads, sampling) == expected
        cache = model.new_cache(4)
        hidden = model(torch.tensor([[1, 2]]), cache=cache)
        logits = model.lm_head(hidden), heads(hidden, model.lm_head)
    assert {tensor.dtype for tensor in (hidden, cache.data, *logits)} == {dtype}


def test_the_mask_of_a_tree_begins_at_an_aligned_address():
    """CUDA's attention reads 16 bytes at once, whatever the length of the past."""
    for tree in (ROOT_ONLY, TREE):
        buffers = TreeBuffers(tree, 40, torch.empty(0, dtype=torch.bfloat16))
        for mask in map(buffers.mask, range(41)):
            assert mask.is_contiguous() and mask.data_ptr() % 16 == 0


def accelerator(name: str, available: bool):
    missing = pytest.mark.skipif(not available, reason=f"no {name.upper()} device: not run on one")
    return pytest.param(name, marks=[getattr(pytest.mark, name), missing])


has_mps = torch.backends.mps.is_available()
ELSEWHERE = [accelerator("cuda", torch.cuda.is_available()), accelerator("mps", has_mps)]


@pytest.mark.parametrize("device", ELSEWHERE)
@pytest.mark.parametrize("sampling", RULES[:3], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads, n", [(2, 50), (4, 51), (4, 44)])
def test_a_tree_writes_the_plain_text_on_an_accelerator(kv_heads, n, dtype, device, sampling):
    """With groups and without; in half precision the two texts may part at a near-tie."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(64, 32, 48, 2, 4, kv_heads, 64, eos_token_id=None)).to(device, dtype)
    heads = MedusaHeads(MedusaConfig(32, 64, 2)).to(device, dtype)
    tree_text, plain = texts(model, heads, sampling, n)
    assert len(tree_text) == n and (tree_text == plain or dtype != torch.float32)
    parted = first_difference(model, [1, 2, 3], tree_text, plain, sampling, 0)
    assert parted is None or parted[1] < 0.05


@pytest.mark.parametrize("device", ELSEWHERE)
def test_gradients_on_an_accelerator_are_those_of_the_cpu(device):
    found = []
    for place in ("cpu", device):
        model, heads = (part.float().to(place) for part in small())
        found.append([t.cpu() for t in gradients(model, heads, batch_on(place, heads))])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(*found))
