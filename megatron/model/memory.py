"""Memory of one GPU in training, from the shape of the model and the layout alone. No torch.

Every figure is in bytes and stands for the largest micro-batch of the run. What is assumed, and what was checked
against what, is in docs/memory.md.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron.config import Config
from megatron.layout import Layout, padded_vocabulary

FP32, BF16 = 4, 2
CONTEXT = 1_500_000_000
"""Assumed: CUDA context, kernels, and the buffers of cuBLAS and NCCL."""
FRAGMENTATION = 0.05
"""Assumed: share of the total that the allocator holds and cannot use."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one GPU at the peak of a step. `loss` and `block` are never there at once: the larger one counts."""

    weights: int
    """fp32."""
    gradients: int
    """fp32; whole on every rank between the micro-batches of stages 0 and 2, which add them up there."""
    optimizer: int
    """The two moments of AdamW, fp32."""
    gathered: int
    """Weights that FSDP2 copies together for use, fp32."""
    copies: int
    """Matrices in bf16 or fp16, made by autocast and kept for the backward pass."""
    activations: int
    """What all blocks keep for the backward pass, and the layers before and after them."""
    loss: int
    """Logits and what the loss makes of them."""
    block: int
    """One block in its backward pass: what it computes again, its gradients, FSDP2's buffers for them."""

    @property
    def total(self) -> int:
        """What tensors take at the peak."""
        kept = sum(getattr(self, f.name) for f in fields(self) if f.name not in ("loss", "block"))
        return kept + max(self.loss, self.block)

    @property
    def overhead(self) -> int:
        """What the context and the allocator take beside them; assumed, not derived."""
        return CONTEXT + int(FRAGMENTATION * self.total)


@dataclass(frozen=True)
class _Share:
    """What one rank holds of the model before data parallel sharding: numbers of parameters."""

    block: int
    block_matrices: int
    root: int
    """Embeddings and the last layer norm."""
    root_matrices: int
    layers: int

    @property
    def all(self) -> int:
        return self.layers * self.block + self.root


def estimate_memory(config: Config, layout: Layout, vocab_size: int) -> MemoryEstimate:
    """Memory of each GPU of `layout`. Raises UserError where tp does not divide the padded vocabulary."""
    model, training, parallel = config.model, config.training, config.parallel
    share = _share(config, layout.tp, vocab_size)
    offload = parallel.optimizer_cpu_offload
    fully_sharded = layout.world_size > 1 or offload
    held = 0 if offload else -(-share.all // layout.shard)
    gradients, gathered = held, 0
    if fully_sharded and parallel.zero_stage == 3:
        gathered = share.root + min(2, share.layers) * share.block
    elif fully_sharded:
        gathered = share.all
        if _micro_batches(config, layout) > 1:
            gradients = share.all
    bytes_each = 2 if training.bf16 or training.fp16 else FP32
    copies = bytes_each if bytes_each < FP32 else 0
    matrices, recomputed = share.layers * share.block_matrices, training.recompute_granularity != "none"
    # Compiled blocks cast their own matrices; for eager ones autocast keeps all copies to the end of the forward pass,
    # which ends in the loss, recomputed or not.
    cached = copies * matrices if recomputed and training.compile == "off" else 0
    logits = largest_micro_batch(config, layout) * (padded_vocabulary(config, vocab_size) // layout.tp)
    return MemoryEstimate(
        weights=FP32 * held,
        gradients=FP32 * gradients,
        optimizer=2 * FP32 * held,
        gathered=FP32 * gathered,
        copies=copies * (share.root_matrices + (0 if recomputed else matrices)),
        activations=model.num_layers * _kept(config, layout, bytes_each) + _outside(config, layout, bytes_each),
        loss=logits * _bytes_a_logit(bytes_each, tp=layout.tp, compiled=training.compile != "off") + cached,
        block=_backward_of_a_block(config, layout, bytes_each)
        + (copies * share.block_matrices if recomputed else 0)
        + ((FP32 + (BF16 if parallel.grad_reduce_in_bf16 else FP32)) * share.block if fully_sharded else 0),
    )


def largest_micro_batch(config: Config, layout: Layout) -> int:
    """Tokens of the largest micro-batch of a rank, over all lengths that the warmup may use.

    The token budget is the same at every length; short sequences only fill it up better.
    """
    full = config.model.seq_length
    multiple = config.seqlen_warmup.seqlen_multiple
    lengths = {full} if config.seqlen_warmup.seqlen_warmup == "none" else {*range(multiple, full, multiple), full}
    return max(_sequences(config, layout, seqlen) * seqlen for seqlen in lengths)


def _sequences(config: Config, layout: Layout, seqlen: int) -> int:
    own, full = config.training.global_batch_size // layout.dp, config.model.seq_length
    if config.seqlen_warmup.seqlen_realisation != "truncate":
        own *= full // seqlen
    return min(config.training.micro_batch_sequences(seqlen, full), own)


def _micro_batches(config: Config, layout: Layout) -> int:
    """Micro-batches of a step at full length, where there are most."""
    return -(-config.training.global_batch_size // (layout.dp * _sequences(config, layout, config.model.seq_length)))


def _share(config: Config, tp: int, vocab_size: int) -> _Share:
    hidden = config.model.hidden_size
    block_matrices = 12 * hidden**2 // tp
    root_matrices = padded_vocabulary(config, vocab_size) * hidden // tp
    return _Share(
        # Biases of the rows' outputs and layer norms are whole on every rank.
        block=block_matrices + 7 * hidden // tp + 6 * hidden,
        block_matrices=block_matrices,
        root=root_matrices + (config.model.positions + 2) * hidden,
        root_matrices=root_matrices,
        layers=config.model.num_layers,
    )


def _rows(config: Config, layout: Layout) -> int:
    """Tokens of the largest micro-batch that a rank holds between the parallel layers."""
    tokens = largest_micro_batch(config, layout)
    return -(-tokens // layout.tp) if config.parallel.sequence_parallel else tokens


def _activations(config: Config, layout: Layout, bytes_each: int) -> int:
    """What autograd keeps of one block where nothing is recomputed."""
    model, tokens = config.model, largest_micro_batch(config, layout)
    hidden = model.hidden_size
    masks = 2 * hidden if model.hidden_dropout else 0
    # The inputs of both layer norms, their means and deviations, one byte an element for each dropout.
    between = _rows(config, layout) * (2 * FP32 * hidden + 4 * FP32 + masks)
    # Inputs of qkv and of the MLP, which every tensor parallel rank has whole.
    inputs = tokens * 2 * hidden * bytes_each
    # q, k, v, the attended values, the log-sum-exp of each head; both sides of the GELU.
    inside = tokens * ((3 + 1 + 8) * hidden * bytes_each + FP32 * model.num_attention_heads) // layout.tp
    return between + inputs + inside + _converted_mask(config, layout, bytes_each)


def _converted_mask(config: Config, layout: Layout, bytes_each: int) -> int:
    """Attention across documents is forbidden by a mask that each block turns into numbers to add."""
    masked = config.data.reset_attention_mask
    return largest_micro_batch(config, layout) * config.model.seq_length * bytes_each if masked else 0


def _kept(config: Config, layout: Layout, bytes_each: int) -> int:
    """What one block keeps from its forward to its backward pass, as --recompute-granularity says."""
    granularity, model, tp = config.training.recompute_granularity, config.model, layout.tp
    if granularity == "none":
        return _activations(config, layout, bytes_each)
    hidden, tokens, rows = model.hidden_size, largest_micro_batch(config, layout), _rows(config, layout)
    own_input = rows * hidden * FP32
    if granularity == "full":
        return own_input
    # Outputs of the matrix products and of attention.
    split = tokens * ((3 + 1 + 4) * hidden * bytes_each + FP32 * model.num_attention_heads) // tp
    products = split + tokens * 2 * hidden * bytes_each
    # What came from other ranks: two reductions, and under sequence parallelism two gathered outputs of layer norms.
    # Each is held twice, as tests/test_memory.py sees.
    reduced = 2 * 2 * rows * hidden * bytes_each if tp > 1 else 0
    gathered = 2 * 2 * tokens * hidden * FP32 if config.parallel.sequence_parallel else 0
    return own_input + products + reduced + gathered


def _outside(config: Config, layout: Layout, bytes_each: int) -> int:
    """What is kept before the first block and after the last: a dropout mask, the last layer norm, its output, and the
    mask of attention that all blocks share."""
    model, tokens = config.model, largest_micro_batch(config, layout)
    mask = 1 if model.hidden_dropout else 0
    rows = _rows(config, layout) * (model.hidden_size * (mask + FP32) + 2 * FP32)
    segments = tokens * model.seq_length if config.data.reset_attention_mask else 0
    return rows + tokens * model.hidden_size * bytes_each + segments


def _backward_of_a_block(config: Config, layout: Layout, bytes_each: int) -> int:
    """What its recomputation brings back, and the gradients at the MLP's second product: of the residual stream, of the
    product's output and of its input, which is four times as wide."""
    tokens, hidden = largest_micro_batch(config, layout), config.model.hidden_size
    again = _activations(config, layout, bytes_each) - _kept(config, layout, bytes_each)
    wide = tokens * 4 * hidden * bytes_each // layout.tp
    return max(again, 0) + _rows(config, layout) * hidden * FP32 + tokens * hidden * bytes_each + wide


def _bytes_a_logit(bytes_each: int, *, tp: int, compiled: bool) -> int:
    """Bytes for each logit of the micro-batch at the peak of the loss."""
    if compiled and tp == 1:
        return bytes_each  # the logits, over which their gradient is written
    if compiled:
        return FP32 + bytes_each  # softmax, over which its gradient is written, and the logits or their gradient
    if tp == 1:
        return 3 * FP32  # log-softmax, the loss's gradient to it, the logits' gradient
    return 4 * FP32 + (bytes_each if bytes_each < FP32 else 0)  # logits, shifted, exponentials, softmax; 16-bit logits
