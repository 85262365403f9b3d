"""The model against Hugging Face's GPT-2 on the same weights: logits, loss and every gradient."""

import math
import shutil
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megatron.config import MODEL_SIZES, ModelConfig, TrainingConfig
from megatron.distributed.parallelize import compile_model, recompute
from megatron.model.flops import parameter_count, training_flops
from megatron.model.gpt2 import GPT2Model, segment_mask
from megatron.model.initialisation import initialise

transformers = pytest.importorskip("transformers")

VOCAB = 300
NO_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on the CPU")


def small(**settings) -> ModelConfig:
    return ModelConfig(
        **{"num_layers": 3, "hidden_size": 48, "num_attention_heads": 4, "seq_length": 64, "hidden_dropout": 0.0,
           "attention_dropout": 0.0} | settings
    )  # fmt: skip


def build(config: ModelConfig, vocab: int = VOCAB, seed: int = 1) -> GPT2Model:
    model = GPT2Model(config, vocab)
    initialise(model, seed)
    return model


def hugging_face(model: GPT2Model) -> "transformers.GPT2LMHeadModel":
    """GPT2LMHeadModel with our weights. Its Conv1D is transposed, and its qkv is laid out (q/k/v, head, dim)."""
    config = model.config
    heads, dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    hf = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=model.vocab_size, n_positions=config.positions, n_embd=config.hidden_size,
            n_layer=config.num_layers, n_head=heads,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager",
        )
    )  # fmt: skip

    def regroup(tensor: torch.Tensor) -> torch.Tensor:
        rest = tensor.shape[1:]
        return tensor.view(heads, 3, dim, *rest).transpose(0, 1).reshape(3 * heads * dim, *rest)

    own = {name: p.detach() for name, p in model.named_parameters()}
    state = {
        "transformer.wte.weight": own["word_embeddings.weight"][: model.vocab_size],
        "transformer.wpe.weight": own["position_embeddings.weight"],
        "transformer.ln_f.weight": own["final_norm.weight"],
        "transformer.ln_f.bias": own["final_norm.bias"],
    }
    for i in range(config.num_layers):
        theirs, ours = f"transformer.h.{i}.", f"blocks.{i}."
        for norm, name in (("ln_1", "attention_norm"), ("ln_2", "mlp_norm")):
            for part in ("weight", "bias"):
                state[f"{theirs}{norm}.{part}"] = own[f"{ours}{name}.{part}"]
        state[f"{theirs}attn.c_attn.weight"] = regroup(own[f"{ours}attention.qkv.weight"]).T
        state[f"{theirs}attn.c_attn.bias"] = regroup(own[f"{ours}attention.qkv.bias"])
        for conv, name in (("attn.c_proj", "attention.output"), ("mlp.c_fc", "mlp.up"), ("mlp.c_proj", "mlp.down")):
            state[f"{theirs}{conv}.weight"] = own[f"{ours}{name}.weight"].T
            state[f"{theirs}{conv}.bias"] = own[f"{ours}{name}.bias"]
    missing, unexpected = hf.load_state_dict({k: v.clone() for k, v in state.items()}, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    hf.tie_weights()
    return hf


def own_gradients_in_their_layout(model: GPT2Model) -> dict[str, torch.Tensor]:
    """Our gradients, carried through the same mapping by standing in for the weights."""
    twin = GPT2Model(model.config, model.vocab_size)
    with torch.no_grad():
        for (_, a), (_, b) in zip(twin.named_parameters(), model.named_parameters(), strict=True):
            a.copy_(b.grad)
    return dict(hugging_face(twin).named_parameters())


@pytest.mark.parametrize("seqlen", [1, 7, 64])
def test_logits_loss_and_all_gradients_equal_hugging_face(seqlen):
    torch.manual_seed(0)
    model = build(small())
    with torch.no_grad():  # biases and norms away from 0 and 1, so that a mix-up shows
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
        model.word_embeddings.weight[VOCAB:] = 0
    hf = hugging_face(model).train()
    model.train()
    tokens = torch.randint(0, VOCAB, (3, seqlen + 1))
    hidden = model(tokens[:, :-1])
    logits = model.logits(hidden).view(3, seqlen, -1)
    expected = hf(tokens[:, :-1]).logits
    torch.testing.assert_close(logits[..., :VOCAB], expected, rtol=1e-5, atol=1e-5)
    assert logits.shape[-1] == 384
    assert (logits[..., VOCAB:] == -math.inf).all()

    losses = model.loss(hidden, tokens[:, 1:].flatten())
    want = F.cross_entropy(expected.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(losses, want, rtol=1e-5, atol=1e-5)
    losses.mean().backward()
    want.mean().backward()
    ours = own_gradients_in_their_layout(model)
    for name, parameter in hf.named_parameters():
        torch.testing.assert_close(ours[name].data, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert (model.word_embeddings.weight.grad[VOCAB:] == 0).all(), "padded rows never learn"


def test_recomputation_changes_nothing():
    tokens = torch.randint(0, VOCAB, (2, 33), generator=torch.Generator().manual_seed(3))
    results = []
    for granularity in ("none", "full", "selective"):
        model = build(small(hidden_dropout=0.3, attention_dropout=0.2)).train()
        recompute(model, granularity, compiled=False)
        torch.manual_seed(5)
        model.loss(model(tokens[:, :-1]), tokens[:, 1:].flatten()).mean().backward()
        results.append([p.grad.clone() for p in model.parameters()])
    for plain, full, selective in zip(*results, strict=True):
        assert torch.equal(plain, full)
        assert torch.equal(plain, selective)


class Operations(TorchDispatchMode):
    """Counts the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        self.counts[operation.overloadpacket.__name__] += 1
        return operation(*arguments, **(keywords or {}))


@pytest.mark.parametrize(
    ("granularity", "products", "activations"), [("none", 0, 0), ("selective", 0, 3), ("full", 3 * 3, 3)]
)
def test_what_is_recomputed(granularity, products, activations):
    """In the backward pass of three blocks: nothing, what is cheap, or everything up to the last product."""
    model = build(small()).train()
    recompute(model, granularity, compiled=False)
    hidden = model(torch.randint(0, VOCAB, (4, 64)))
    with Operations() as operations:
        hidden.sum().backward()
    assert operations.counts["addmm"] == products
    assert operations.counts["gelu"] == activations
    assert operations.counts["_scaled_dot_product_flash_attention_for_cpu"] == (3 if granularity == "full" else 0)
    assert operations.counts["gelu_backward"] == 3


@pytest.mark.parametrize(("granularity", "again"), [("none", 0), ("selective", 0), ("full", 3)])
def test_attention_by_blocks_is_recomputed_only_where_all_is(granularity, again):
    model = build(small()).train()
    recompute(model, granularity, compiled=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model(torch.randint(0, VOCAB, (4, 64)))
    with Operations() as operations:
        hidden.sum().backward()
    assert operations.counts["causal_attention_backward"] == 3
    assert operations.counts["causal_attention"] == again


def test_dropout_acts_in_training_only():
    model = build(small(hidden_dropout=0.5))
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    model = build(small(attention_dropout=0.5)).train()
    assert not torch.equal(model(tokens), model(tokens))


def test_segments_are_independent_documents():
    """Two documents in one sequence, with positions and attention reset, give what each gives alone."""
    model = build(small()).eval()
    a, b = torch.randint(0, VOCAB, (1, 20)), torch.randint(0, VOCAB, (1, 12))
    both = torch.cat([a, b], 1)
    positions = torch.cat([torch.arange(20), torch.arange(12)])[None]
    segments = torch.cat([torch.zeros(20), torch.ones(12)])[None].long()
    torch.testing.assert_close(model(both, positions, segments), torch.cat([model(a), model(b)]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(both)[20:], model(b), atol=1e-3)


def test_segment_mask_by_hand():
    got = segment_mask(torch.tensor([[0, 0, 1, 1]]))[0, 0].int().tolist()
    assert got == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_initial_weights_have_the_stated_scale_and_depend_on_seed_and_name_alone():
    config = small(num_layers=8, hidden_size=128)
    model, same, other = build(config), build(config), build(config, seed=2)
    for (name, p), q, r in zip(model.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        if p.ndim == 2:
            assert not torch.equal(p, r)
            std = 0.02 / math.sqrt(16) if name.endswith(("output.weight", "down.weight")) else 0.02
            assert p[:VOCAB].std().item() == pytest.approx(std, rel=0.05), name
        elif name.endswith("norm.weight"):
            assert (p == 1).all()
        else:
            assert (p == 0).all()
    assert (model.word_embeddings.weight[VOCAB:] == 0).all()
    deeper = build(small(num_layers=9, hidden_size=128))
    assert torch.equal(deeper.blocks[3].attention.qkv.weight, model.blocks[3].attention.qkv.weight)


@pytest.mark.parametrize(("size", "millions"), [("117M", 124.4), ("345M", 354.8), ("774M", 774.0), ("1.5B", 1557.6)])
def test_presets_have_gpt2s_parameters(size, millions):
    layers, hidden, heads = MODEL_SIZES[size]
    config = ModelConfig(num_layers=layers, hidden_size=hidden, num_attention_heads=heads)
    assert round(parameter_count(config, 50257) / 1e6, 1) == millions


def test_parameter_count_and_flops_against_the_model():
    config = small()
    model = GPT2Model(config, 384)
    assert parameter_count(config, 384) == sum(p.numel() for p in model.parameters())
    model.train()
    tokens = torch.randint(0, 384, (2, 64))
    # The counter knows the plain attention kernel, not the CPU's fused one.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        hidden = model(tokens)
        model.loss(hidden, tokens.flatten()).sum().backward()
    ours = training_flops(config, 384, tokens=128, token_seqlen_sum=128 * 64)
    assert ours == counter.get_total_flops()


@NO_COMPILER
def test_any_length_compiles_without_one_compilation_a_length():
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build(small(num_layers=2))
    training = TrainingConfig(train_iters=1, compile="on")
    assert compile_model(model, torch.device("cpu"), training, print)
    eager = build(small(num_layers=2))
    for sequences, seqlen in ((2, 64), (4, 32), (16, 8), (5, 24), (3, 40), (6, 8)):  # 6 x 8 is the hidden size
        tokens = torch.randint(0, VOCAB, (sequences, seqlen + 1))
        labels = tokens[:, 1:].flatten()
        got, want = model.loss(model(tokens[:, :-1]), labels), eager.loss(eager(tokens[:, :-1]), labels)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # a block and the loss


@NO_COMPILER
@pytest.mark.parametrize("granularity", ["none", "selective", "full"])
def test_a_compiled_block_drops_the_same_in_both_passes(granularity):
    """Its gradient, by a directional derivative; with a memory budget the backward pass computes things again."""
    torch._dynamo.reset()
    model = build(small(num_layers=1, hidden_dropout=0.5, attention_dropout=0.5)).train()
    training = TrainingConfig(train_iters=1, compile="on", recompute_granularity=granularity)
    assert compile_model(model, torch.device("cpu"), training, print)
    recompute(model, granularity, compiled=True)
    generator = torch.Generator().manual_seed(0)
    x, direction, weights = (torch.randn(64, 48, generator=generator) for _ in range(3))

    def value(at: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        return (model.blocks[0](at.requires_grad_(), 4, 16, None) * weights).sum()

    value(x).backward()
    by_difference = (value(x.detach() + 1e-2 * direction) - value(x.detach() - 1e-2 * direction)) / 2e-2
    assert float((x.grad * direction).sum()) == pytest.approx(by_difference.item(), rel=1e-3)
