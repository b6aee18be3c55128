"""Multi-head attention whose heads can be cut.

`nn.MultiheadAttention` takes a head's width for the model's width divided by the number of heads,
so it cannot have fewer heads than it was made with. Here a head keeps its width.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class HeadAttention(nn.MultiheadAttention):
    """As `nn.MultiheadAttention`, with the same parameters, for any number of heads.

    Vaswani et al., "Attention Is All You Need", 2017. Heads can be cut: Michel et al., "Are
    Sixteen Heads Really Better than One?", 2019.
    """

    def forward(  # noqa: PLR0917  (the arguments are those of the layer that it stands for)
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The mean of the values, weighted per head by softmax(q k / sqrt(width)), projected.

        Args:
            query: (n, queries, width), or (queries, n, width) without `batch_first`, or without n.
            key: (n, keys, kdim), likewise.
            value: (n, keys, vdim), likewise.
            key_padding_mask: (n, keys), true or -inf where a key does not count.
            need_weights: Return the weights too.
            attn_mask: (queries, keys) or (n * heads, queries, keys), likewise.
            average_attn_weights: Return their mean over heads.
            is_causal: Ignored, as there: it says of `attn_mask` what that holds.

        Returns:
            (n, queries, width); and (n, queries, keys), or (n, heads, queries, keys), or None.
        """
        batched, first = query.dim() == 3, self.batch_first
        tokens = [x if batched else x.unsqueeze(0) for x in (query, key, value)]
        if batched and not first:
            tokens = [x.transpose(0, 1) for x in tokens]
        projected: Iterable[Tensor]
        if query is key is value and self.in_proj_weight is not None:
            projected = functional.linear(tokens[0], self.in_proj_weight, self.in_proj_bias)
            projected = projected.chunk(3, -1)
        else:
            projected = (
                functional.linear(x, weight, bias)
                for x, (weight, bias) in zip(tokens, self._projections(), strict=True)
            )
        q, k, v = (x.reshape(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for x in projected)
        mask = _merged(attn_mask, key_padding_mask, q)
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        weights = torch.softmax(scores if mask is None else scores + mask, -1)
        weights = functional.dropout(weights, self.dropout, self.training)
        out: Tensor = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        if batched and not first:
            out = out.transpose(0, 1)
        if not need_weights:
            return (out if batched else out.squeeze(0)), None
        shown = weights.mean(1) if average_attn_weights else weights
        return (out, shown) if batched else (out.squeeze(0), shown.squeeze(0))

    def _projections(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Weight and bias of queries, keys and values."""
        biases: Any = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if self.in_proj_weight is not None:
            yield from zip(self.in_proj_weight.chunk(3), biases, strict=True)
        else:
            weights: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            yield from zip(weights, biases, strict=True)


def _merged(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
    """Both masks as one that is added to the scores (n, heads, queries, keys)."""
    total = None
    for mask in (attn_mask, padding):
        if mask is None:
            continue
        added = mask
        if mask.dtype == torch.bool:
            added = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))
        if mask is padding:
            added = added.reshape(-1, 1, 1, mask.shape[-1])
        elif mask.dim() == 3:
            added = added.reshape(q.shape[0], -1, *mask.shape[1:])
        total = added if total is None else total + added
    return total


def with_cuttable_heads(model: nn.Module) -> nn.Module:
    """Let every `nn.MultiheadAttention` of a model be a `HeadAttention`; changes it in place.

    Its parameters stay the same objects under the same names. One that adds keys of its own
    (`add_bias_kv`, `add_zero_attn`) stays as it is.
    """
    for layer in model.modules():
        plain = type(layer) is nn.MultiheadAttention
        if plain and layer.bias_k is None and not layer.add_zero_attn:
            layer.__class__ = HeadAttention
            # torch's fused encoder takes only attention as it was made: this says it is not.
            layer._qkv_same_embed_dim = False
    return model
