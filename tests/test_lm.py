"""The Qwen LM: stock transformers' hidden rows and gradients bit for bit, and its greedy text."""

import pytest
import torch
import transformers
from conftest import add_random_lora, batch_of, tiny_model
from torch import nn

import data
import model as m

SIZES = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}


def text_config(model_type, n_key_heads, tied=True, **more):
    config_class = transformers.CONFIG_MAPPING[model_type]
    return config_class(
        **SIZES,
        num_key_value_heads=n_key_heads,
        head_dim=12 if model_type == "qwen2" else 20,  # Qwen3's need not be hidden_size / heads
        vocab_size=160,
        initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=tied,
        **more,
    )


def stock_and_ours(model_type, n_key_heads, tied):
    """Stock's causal LM with random weights, norms and biases too, and ours with the same."""
    torch.manual_seed(n_key_heads)
    config = text_config(model_type, n_key_heads, tied)
    stock = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in stock.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    ours = m.QwenLM(config).eval()
    ours.load_state_dict(stock.model.state_dict())
    return stock, ours


def padded_batch():
    """Embeddings (B, L, H) and their mask: one row without padding, two with padding on the left."""
    mask = torch.ones(3, 29, dtype=torch.bool)
    mask[0, :9] = False
    mask[2, :3] = False
    return torch.randn(3, 29, SIZES["hidden_size"], generator=torch.Generator().manual_seed(0)), mask


def hidden_rows(lm, embeds, mask):
    return lm(embeds, lm.rotary(m.positions_of(mask), embeds.dtype), m.causal_mask(mask))[mask]


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize("n_key_heads", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_hidden_rows_and_gradients_are_stocks(model_type, n_key_heads, tied):
    """Bit for bit; of the gradients those of Qwen3's head norms to 1e-6."""
    stock, ours = stock_and_ours(model_type, n_key_heads, tied)
    embeds, mask = padded_batch()
    rows = stock.model(inputs_embeds=embeds, attention_mask=mask, position_ids=m.positions_of(mask))
    rows = rows.last_hidden_state[mask]
    assert stock.model.state_dict().keys() == ours.state_dict().keys()
    rows.square().sum().backward()
    own_rows = hidden_rows(ours, embeds, mask)
    assert torch.equal(own_rows, rows)
    own_rows.square().sum().backward()
    for name, parameter in stock.model.named_parameters():
        if name == "embed_tokens.weight":
            continue  # its rows were given
        gradient = ours.get_parameter(name).grad
        if "q_norm" in name or "k_norm" in name:
            assert torch.allclose(gradient, parameter.grad, rtol=1e-6, atol=1e-6 * gradient.abs().max())
        else:
            assert torch.equal(gradient, parameter.grad), name


def put_hook(speech_lm):
    speech_lm.lm.layers[0].mlp.register_forward_hook(lambda module, inputs, output: -2 * output)


class Doubled(nn.Linear):
    def forward(self, x):
        return -2 * super().forward(x)


def put_class(projection):
    def put(speech_lm):
        layer = speech_lm.lm.layers[0]
        module = getattr(layer.self_attn, projection, None) or getattr(layer.mlp, projection)
        module.__class__ = Doubled

    return put


CLASSES = {f"class of {name}": put_class(name) for name in m.PROJECTIONS}
PUTS = {"hook": put_hook, "LoRA": add_random_lora, **CLASSES}


@pytest.mark.parametrize("how", PUTS)
@torch.no_grad()
def test_what_sits_on_the_lm_changes_what_is_written_and_what_is_scored(how):
    speech_lm = tiny_model(3, tied=False)
    batch = batch_of(speech_lm, [0.3, 1.7, 1.0, 2.2])
    bare = speech_lm.sample(batch, 16)
    bare_rows = speech_lm(batch, bare)
    PUTS[how](speech_lm)
    rollout = speech_lm.sample(batch, 16)
    assert rollout.ids.tolist() != bare.ids.tolist()
    assert not torch.allclose(speech_lm(batch, bare), bare_rows, atol=1e-3)
    logits = speech_lm.head(speech_lm(batch, rollout)).masked_fill(speech_lm.forbidden, -torch.inf)
    assert logits.argmax(dim=1).tolist() == rollout.ids[rollout.row_mask()].tolist()


@torch.no_grad()
def test_in_bf16_what_is_written_is_what_is_scored():
    """To the rounding of bf16. Computed in bf16 by autocast; the residual stream stays float32."""
    speech_lm = tiny_model()
    batch = batch_of(speech_lm, [0.4, 1.3])
    speech_lm.bf16 = True
    rollout = speech_lm.sample(batch, 16)
    rows = speech_lm(batch, rollout)
    logits = speech_lm.head(rows)[:, ~speech_lm.forbidden]  # the ids of text are the first
    written = logits.gather(1, rollout.ids[rollout.row_mask()][:, None])
    assert (logits.amax(dim=1) - written[:, 0]).max() < 0.02 * logits.abs().max()
    speech_lm.bf16 = False
    difference = (rows - speech_lm(batch, rollout)).abs().max()
    assert rows.dtype == torch.float32 and 0 < difference < 0.05 * rows.abs().max()


REFUSED = {
    "rope_type": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}},
    "layer_types": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "hidden_act": {"hidden_act": "gelu"},
}


@pytest.mark.parametrize("key", REFUSED)
def test_an_lm_that_is_not_built_is_refused_by_its_key(key):
    config = text_config("qwen3", 2)
    config.__dict__.update(REFUSED[key])
    with pytest.raises(data.InputError, match=f"text_config: {key} is"):
        m.QwenLM(config)
