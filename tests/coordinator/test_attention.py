"""Attention with any number of heads against torch's own, with all of them."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fleetprune_coordinator.attention import HeadAttention, with_cuttable_heads
from fleetprune_coordinator.resize import resize
from fleetprune_coordinator.tracing import trace


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_with_all_heads_it_is_torchs(data):
    draw = data.draw
    torch.manual_seed(0)
    own = draw(st.booleans())  # queries, keys and values from the same tokens
    first, batched = draw(st.booleans()), draw(st.booleans())
    widths = {} if own else {"kdim": draw(st.sampled_from([8, 6])), "vdim": 5}
    theirs = nn.MultiheadAttention(8, 4, bias=draw(st.booleans()), batch_first=first, **widths)
    ours = with_cuttable_heads(nn.ModuleList([copy.deepcopy(theirs)])).eval()[0]
    n, queries, keys = 3, 6, 6 if own else 4

    def tokens(length, width):
        x = torch.randn(n, length, width) if batched else torch.randn(length, width)
        return x.transpose(0, 1) if batched and not first else x

    x = tokens(queries, 8)
    given_ = (x, x, x) if own else (x, tokens(keys, theirs.kdim), tokens(keys, theirs.vdim))
    options = {"need_weights": draw(st.booleans()), "average_attn_weights": draw(st.booleans())}
    mask = draw(st.sampled_from(["none", "causal", "added", "per head"]))
    if mask == "causal":
        options["attn_mask"] = torch.ones(queries, keys).triu(1).bool()
    elif mask == "added":
        options["attn_mask"] = torch.randn(queries, keys)
    elif mask == "per head":
        options["attn_mask"] = torch.randn((n if batched else 1) * 4, queries, keys)
    if draw(st.booleans()):
        last = torch.arange(keys).expand(*([n] if batched else []), keys) == keys - 1
        added = torch.zeros(last.shape).masked_fill(last, float("-inf"))
        options["key_padding_mask"] = added if mask in ("added", "per head") else last
    with torch.no_grad():
        want, got = theirs.eval()(*given_, **options), ours(*given_, **options)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
    assert (got[1] is None) == (want[1] is None)
    if want[1] is not None:
        torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-6)


def test_parameters_stay_what_they_are():
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, kdim=4))
    before = dict(model.named_parameters())
    assert with_cuttable_heads(model) is model
    assert all(type(layer) is HeadAttention for layer in model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_keys_of_its_own_are_left_alone(option):
    model = nn.Sequential(nn.MultiheadAttention(8, 2, **{option: True}))
    assert type(with_cuttable_heads(model)[0]) is nn.MultiheadAttention


def test_a_subclass_is_left_alone():
    class Own(nn.MultiheadAttention):
        pass

    assert type(with_cuttable_heads(nn.Sequential(Own(8, 2)))[0]) is Own


def test_torchs_fused_encoder_does_not_get_at_cut_heads():
    """In evaluation, without gradients, it would read the weights itself, as dense ones."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(8, 4, 12, batch_first=True)
            self.fc = nn.Linear(8, 3)

        def forward(self, x):
            return self.fc(self.encoder(x).mean(1))

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 5, 8)
    architecture = trace(model, x[:1])
    assert architecture.groups == {"encoder.self_attn": 4, "encoder.linear1": 12}
    small = resize(model, architecture, {"encoder.self_attn": 3, "encoder.linear1": 12})
    with_gradients = small(x)
    with torch.no_grad():
        torch.testing.assert_close(small(x), with_gradients.detach())
        torch.testing.assert_close(
            resize(model, architecture, architecture.dense)(x), model(x), rtol=1e-5, atol=1e-5
        )


def test_tokens_may_come_before_samples():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc = nn.Linear(5, 8), nn.Linear(8, 3)
            self.attention = nn.MultiheadAttention(8, 4)

        def forward(self, x):
            y = torch.tanh(self.embed(x)).transpose(0, 1)
            return self.fc(torch.relu(self.attention(y, y[:4], y[:4])[0]).mean(0))

    architecture = trace(Net(), torch.randn(1, 6, 5))
    assert architecture.groups == {"embed": 8, "attention": 4, "attention.out_proj": 8}
    # Six queries, four keys and values: not every weight is multiplied equally often.
    spec = architecture.tensor("attention.in_proj_weight")
    assert spec.positions == 0
    assert [product.times for product in architecture.products] == [6 + 4 + 4, 2 * 6 * 4 * 2]
