"""Attention on a CPU by blocks against PyTorch's own, at each length: python benchmarks/bench_attention.py

Forward and backward passes over as many tokens at every length, in bf16, as the model does them: from one fused
projection to rows for the next one. In turn, in one process, which keeps freed memory for both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import measure
import torch
import torch.nn.functional as F
from flags import make_parser
from torch import Tensor

from megatron.errors import UserError, run
from megatron.flags import positive
from megatron.model.cpu import causal_attention, keep_freed_memory

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> int:
    parser = make_parser(__doc__, repeats=9)
    parser.add_argument("--tokens", type=positive, default=4096, help="at every length")
    parser.add_argument("--num-attention-heads", type=positive, default=5)
    parser.add_argument("--head-dim", type=positive, default=64)
    parser.add_argument("--lengths", type=positive, nargs="+", default=[8, 16, 32, 64, 128, 256, 512, 1024])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    arguments = parser.parse_args()
    keep_freed_memory()
    rows: list[list[object]] = []
    for length in arguments.lengths:
        if arguments.tokens % length:
            raise UserError(f"--lengths {length} must divide --tokens {arguments.tokens}")
        shape = arguments.tokens // length, length, arguments.num_attention_heads, 3, arguments.head_dim
        qkv = torch.randn(shape, dtype=getattr(torch, arguments.dtype), requires_grad=True)
        ways = {
            "ours": partial(there_and_back, causal_attention, qkv),
            "PyTorch": partial(there_and_back, partial(F.scaled_dot_product_attention, is_causal=True), qkv),
        }
        medians = measure.medians(measure.in_turn(ways, arguments.repeats, warmups=2))
        rows.append([str(length), *(1000 * took for took in medians.values()), medians["PyTorch"] / medians["ours"]])
    print(
        f"{arguments.tokens:,} tokens, {arguments.num_attention_heads} heads of {arguments.head_dim}, "
        f"{arguments.dtype}, medians of {arguments.repeats}"
    )
    measure.print_table(["seqlen", "ours, ms", "PyTorch, ms", "PyTorch / ours"], rows)
    measure.finish(
        arguments.output, {"arguments": vars(arguments), "rows": rows, "ratio": {row[0]: row[3] for row in rows}}
    )
    return 0


def there_and_back(attend: Attend, qkv: Tensor) -> None:
    """Forward and backward from [sequences, seqlen, heads, 3, dim]."""
    qkv.grad = None
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(3))
    out = attend(q, k, v).transpose(1, 2).flatten(2)
    out.backward(torch.ones_like(out))


if __name__ == "__main__":
    run(main)
