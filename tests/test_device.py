"""Laws of devices and dtypes: every tensor follows those of the model that it meets, whatever the defaults of the process say.

Two defaults stand in for a second device: `meta`, on which a tensor has no numbers, so that one that lands there by mistake ends the run;
and float64 beside a float32 model. Where a CUDA or MPS device is at hand the decoding laws run on it; the skips say where they did not.
"""

import pytest
import torch

from data.calibration import calibrate
from data.difference import first_difference, gap_at
from data.distilled import sample_rows
from data.perplexity import perplexity
from medusa import (
    ROOT_ONLY,
    MedusaConfig,
    MedusaHeads,
    Sampling,
    TreeBuffers,
    generate,
    medusa_generate,
)
from model import GPT, ModelConfig
from strategies import random_gpt, random_heads, rng
from train import backpropagate
from tree import cartesian_tree

TREE = cartesian_tree((3, 2))
RULES = [
    Sampling(),
    Sampling(0.8),
    Sampling(0.8, top_k=3, top_p=0.9),
    Sampling(0.8, typical=True, epsilon=0.2),
]


def texts(model: GPT, heads: MedusaHeads, sampling: Sampling, n: int = 16) -> list[list[int]]:
    """What a tree and plain decoding write behind one prompt, from one seed: n tokens."""
    device = model.lm_head.weight.device
    ways = (medusa_generate, (heads, TREE)), (generate, ())
    return [
        [
            t
            for step in way(
                model, *guessing, [1, 2, 3], n, sampling, torch.Generator(device).manual_seed(0)
            )
            for t in step
        ]
        for way, guessing in ways
    ]


@pytest.fixture
def elsewhere():
    """A default device on which nothing can be computed."""
    with torch.device("meta"):
        yield


@pytest.fixture
def wider():
    """A default dtype that is not the model's."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small(dtype=torch.float32, private: bool = False) -> tuple[GPT, MedusaHeads]:
    model = random_gpt(3, vocab_size=6, eos=None).to(dtype)
    return model, random_heads(model, 2, 1, private=private).to(dtype)


@pytest.mark.parametrize("sampling", RULES, ids=str)
def test_decoding_follows_the_models_device(sampling, request):
    model, heads = small()
    expected = texts(model, heads, sampling)
    request.getfixturevalue("elsewhere")
    assert texts(model, heads, sampling) == expected


def test_training_measuring_and_sampling_follow_the_models_device(request):
    model, heads = small()
    tokens, mask = torch.randint(6, (4, 12), generator=rng(0)), torch.ones(4, 12, dtype=torch.bool)
    counts = torch.tensor([mask[:, ahead:].sum() for ahead in (1, 2, 3)])

    def all_of_it():
        figures = backpropagate(model, heads, tokens, mask, counts, (1.0, 0.2))
        gradients = [
            p.grad.clone() for p in (*model.parameters(), *heads.parameters()) if p.grad is not None
        ]
        model.zero_grad(), heads.zero_grad()
        rows = sample_rows(model, [[1], [2, 3]], 8, Sampling(0.7), rng(0))
        return (
            [figures, *gradients, *rows],
            calibrate(model, heads, {"0.0": (tokens, mask), "0.7": (tokens, mask)}),
            perplexity(model, tokens.flatten()),
        )

    expected = all_of_it()
    request.getfixturevalue("elsewhere")
    found = all_of_it()
    assert len(found[0]) == len(expected[0]) and all(
        torch.equal(a, b) for a, b in zip(found[0], expected[0])
    )
    assert found[1:] == expected[1:]


@pytest.mark.parametrize("sampling", RULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_follows_the_models_dtype(dtype, sampling, request):
    """In half precision a tree and plain decoding may part at a near-tie, so each is held against itself."""
    model, heads = small(dtype)
    expected = texts(model, heads, sampling)
    request.getfixturevalue("wider")
    assert texts(model, heads, sampling) == expected
    cache = model.new_cache(4)
    with torch.no_grad():
        hidden = model(torch.tensor([[1, 2]]), cache=cache)
        assert {
            hidden.dtype,
            cache.data.dtype,
            model.lm_head(hidden).dtype,
            heads(hidden, model.lm_head).dtype,
        } == {dtype}


@torch.no_grad()
@pytest.mark.parametrize("private", [False, True])
def test_shapes_alone_go_through_model_and_heads(private):
    """On `meta`, as a tool that plans a model's memory runs it."""
    model, heads = (part.to("meta") for part in small(private=private))
    cache = model.new_cache(8, batch=2)
    hidden = model(torch.zeros(2, 3, dtype=torch.long, device="meta"), cache=cache)
    assert (
        hidden.is_meta and hidden.shape == (2, 3, model.config.hidden_size) and cache.data.is_meta
    )
    assert heads(hidden, model.lm_head).shape == (2, 2, 3, 6)


ELSEWHERE = [
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(
                not torch.cuda.is_available(), reason="no CUDA device: not run on one"
            ),
        ],
    ),
    pytest.param(
        "mps",
        marks=[
            pytest.mark.mps,
            pytest.mark.skipif(
                not torch.backends.mps.is_available(), reason="no MPS device: not run on one"
            ),
        ],
    ),
]


@pytest.mark.parametrize("device", ELSEWHERE)
@pytest.mark.parametrize("sampling", RULES[:3], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads, n", [(2, 50), (4, 51), (4, 44)])
def test_a_tree_writes_the_plain_text_on_an_accelerator(kv_heads, n, dtype, device, sampling):
    """With groups and without; and such lengths that rows of the mask of a tree, or of a last step of one node, are a multiple of 16 apart. In half
    precision the two texts may part at a near-tie."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(64, 32, 48, 2, 4, kv_heads, 64, eos_token_id=None)).to(device, dtype)
    heads = MedusaHeads(MedusaConfig(32, 64, 2)).to(device, dtype)
    tree_text, plain_text = texts(model, heads, sampling, n)
    at = first_difference(tree_text, plain_text)
    assert len(tree_text) == n and (
        at is None
        or dtype != torch.float32
        and gap_at(model, [1, 2, 3], tree_text, plain_text, at, sampling, 0) < 0.05
    )


def test_the_mask_of_a_tree_begins_at_an_aligned_address_whatever_stands_before_it():
    """CUDA's attention reads 16 bytes at once."""
    for tree in (ROOT_ONLY, TREE):
        plan = TreeBuffers(tree, 40, torch.empty(0, dtype=torch.bfloat16))
        assert all(
            plan.mask(past).is_contiguous() and plan.mask(past).data_ptr() % 16 == 0
            for past in range(41)
        )


@pytest.mark.parametrize("device", ELSEWHERE)
def test_gradients_on_an_accelerator_are_those_of_the_cpu(device):
    tokens, mask = torch.randint(6, (4, 12), generator=rng(0)), torch.ones(4, 12, dtype=torch.bool)
    counts = torch.tensor([mask[:, ahead:].sum() for ahead in (1, 2, 3)])
    found = []
    for place in ("cpu", device):
        model, heads = (part.float().to(place) for part in small())
        figures = backpropagate(
            model, heads, tokens.to(place), mask.to(place), counts.to(place), (1.0, 0.2)
        )
        found.append(
            [
                figures.cpu(),
                *(
                    p.grad.cpu()
                    for p in (*model.parameters(), *heads.parameters())
                    if p.grad is not None
                ),
            ]
        )
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(*found))
