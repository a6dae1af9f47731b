"""SpeechLM: padding, teacher forcing, sampling, the fast decoder, and the folder in stock transformers."""

import json
import shutil

import pytest
import safetensors.torch
import torch
import transformers
from conftest import QWEN_SPECIALS, SPECIALS, byte_tokenizer, noise, qwen3_tokenizer, tiny_model
from torch import nn
from torch.testing import assert_close

import model as m
from data import BLOCK, InputError, collate
from model import FrontEnd, Rollout, SpeechLM
from prepare.student import add_audio_tokens

LENGTHS_S = [0.31, 1.7, 0.1, 2.9, 1.0, 0.987]


def batch_of(model, lengths=LENGTHS_S):
    waves = [noise(seconds, seed=i) for i, seconds in enumerate(lengths)]
    return collate(waves, model.front_end, [None] * len(waves))


# ---- padding and rows --------------------------------------------------------------------------------------


@torch.no_grad()
def test_padded_batch_equals_single_clips():
    """Audio embeddings and hidden rows of a mixed batch, and of each clip alone."""
    model = tiny_model()
    texts = ["ab", "", "a longer transcript", "x", "hello there", "yes"]
    batch = batch_of(model)
    embeds = model.encode(batch).split(batch.audio_lens.tolist())
    hidden = model(batch, model.front_end.transcripts(texts)).split([len(text) + 1 for text in texts])
    for i, (seconds, text) in enumerate(zip(LENGTHS_S, texts)):
        alone = collate([noise(seconds, seed=i)], model.front_end, [None])
        largest = float(embeds[i].abs().max())
        assert_close(embeds[i], model.encode(alone), rtol=0, atol=2e-6 * largest)
        hidden_alone = model(alone, model.front_end.transcripts([text]))
        assert_close(hidden[i], hidden_alone, rtol=0, atol=1e-5)
    assert torch.stack([x[0] for x in embeds]).std(dim=0).min() > 0.1


def test_row_mask_scores_the_stop_only_where_the_rollout_stopped():
    stopped = torch.tensor([True, True, False, False])
    mask = Rollout(torch.full((4, 3), 7), torch.tensor([0, 2, 3, 2]), stopped).row_mask()
    assert mask.int().tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 1], [1, 1, 0]]


def test_supervised_ids_of_one_example():
    front_end = FrontEnd(byte_tokenizer())
    ids_of = front_end.tokenizer.convert_tokens_to_ids
    targets = front_end.transcripts(["ab", ""])
    a, b = front_end.encode_text("ab")
    stop, pad = front_end.stop_id, front_end.pad_id
    assert targets.ids.tolist() == [[a, b, stop], [stop, pad, pad]]
    assert targets.ids[targets.row_mask()].tolist() == [a, b, stop, stop]
    cut = front_end.transcripts(["ab", "c"], stopped=[False, True])
    assert cut.row_mask().tolist() == [[True, True, False], [True, True, False]]
    head = ids_of(["<|user|>", "<|begin_of_audio|>"]) + 12 * ids_of(["<|audio|>"])
    tail = front_end.encode_text("Please transcribe this audio.") + ids_of(["<|assistant|>"])
    assert front_end.prompt(12) == head + ids_of(["<|end_of_audio|>"]) + tail


@pytest.mark.parametrize(
    "text", ["<|im_end|>", "a <|endoftext|> b<|audio|>", "<asr_text>", "请 transcribe <", ""]
)
def test_text_is_never_control(text):
    front_end = FrontEnd(byte_tokenizer(extra=["<asr_text>"]))
    ids = front_end.encode_text(text)
    assert all(i < 256 for i in ids) and front_end.decode(ids) == text


def test_recomputed_activations_change_no_gradient():
    """Each layer of encoder and LM runs twice, and the gradients are the same."""
    model = tiny_model().train()
    batch = batch_of(model)
    attentions = [layer.self_attn for layer in (*model.encoder.layers, *model.lm.layers)]
    calls = []
    for attention in attentions:
        attention.register_forward_pre_hook(lambda module, args: calls.append(module))
    gradients = []
    for n_calls in (1, 2):
        calls.clear()
        model(batch, model.front_end.transcripts(["abc"] * 6)).square().sum().backward()
        assert all(calls.count(attention) == n_calls for attention in attentions)
        gradients.append([parameter.grad for parameter in model.parameters()])
        model.zero_grad()
        model.recompute_activations()
    assert_close(*gradients, rtol=1e-6, atol=1e-6)


# ---- sampling ----------------------------------------------------------------------------------------------


def likely_stop(model, batch, cap):
    """Scales the stop token's row of the head until some rollouts stop and others meet the cap."""
    row = model.head.weight[model.front_end.stop_id]
    for _ in range(60):
        rollout = model.sample(batch, cap, k=4)
        if 0 < rollout.stopped.sum() < len(rollout.stopped) and rollout.lens[rollout.stopped].max() > 2:
            return
        row.data *= 1.1
    raise AssertionError("no scale gives both")


@torch.no_grad()
def test_sample_equals_step_by_step_full_forward():
    """Greedy ids and each step's top-k, from full forwards of one clip at a time on the growing prefix.

    Some rollouts stop by themselves, with the stop token in the support; others meet the cap.
    """
    model = tiny_model(1, tied=False)
    k, cap, stop = 5, 10, model.front_end.stop_id
    batch = batch_of(model)
    likely_stop(model, batch, cap)
    rollout = model.sample(batch, cap, k=k)
    for i, seconds in enumerate(LENGTHS_S):
        alone = collate([noise(seconds, seed=i)], model.front_end, [None])
        prefix = []
        while len(prefix) < cap and stop not in prefix:
            ids = torch.tensor([[*prefix, model.front_end.pad_id]])
            hidden = model(alone, Rollout(ids, torch.tensor([len(prefix) + 1]), torch.tensor([False])))
            logits = model.head(hidden[-1]).masked_fill(model.forbidden, -torch.inf)
            assert rollout.topk_ids[i, len(prefix)].tolist() == logits.topk(k).indices.tolist()
            prefix.append(int(logits.argmax()))
        assert rollout.ids[i, : len(prefix)].tolist() == prefix
        assert rollout.stopped[i] == (stop in prefix)
        assert rollout.lens[i] + rollout.stopped[i] == len(prefix)
        assert (rollout.ids[i, len(prefix) :] == model.front_end.pad_id).all()
        assert (rollout.topk_ids[i, len(prefix) :] == -1).all()
    assert 0 < rollout.stopped.sum() < len(LENGTHS_S)


def test_immediate_stop_is_one_scored_row():
    model = tiny_model()
    stop = model.front_end.stop_id
    batch = batch_of(model, [0.5, 1.0])
    all_but_stop = torch.arange(len(model.forbidden)) != stop
    rollout = model.sample(batch, 10, k=4, forbidden=all_but_stop)
    assert rollout.lens.tolist() == [0, 0] and rollout.stopped.tolist() == [True, True]
    assert rollout.ids.tolist() == [[stop]] * 2 and rollout.topk_ids.tolist() == [[[stop, -1, -1, -1]]] * 2
    assert len(model(batch, rollout)) == 2


@pytest.mark.parametrize("is_fast", [True, False])
def test_caps_are_exact_and_by_seconds(monkeypatch, is_fast):
    """min(max_new_tokens, ⌊seconds · r⌋ + 16); once the last clip is through, no further step is computed."""
    monkeypatch.setattr(m, "may_copy_weights", lambda model: is_fast)
    model = tiny_model()
    no_stop = model.forbidden.clone()
    no_stop[model.front_end.stop_id] = True
    batch = batch_of(model, [0.5, 2.24, 1.0])
    rollout = model.sample(batch, 21, forbidden=no_stop)
    assert rollout.lens.tolist() == [21] * 3 and rollout.stopped.tolist() == [False] * 3
    assert rollout.row_mask().all()
    rollout = model.sample(batch, 23, forbidden=no_stop, tokens_per_second=4)
    assert rollout.lens.tolist() == [18, 23, 20] and rollout.ids.shape == (3, 23)
    assert rollout.row_mask().sum(1).tolist() == [18, 23, 20]
    assert model.sample(batch, 33, forbidden=no_stop, tokens_per_second=0).lens.tolist() == [33] * 3
    steps = []
    for name, module in ((m.FastDecoder, "step"), (model.lm, "forward")):
        plain = getattr(name, module)
        monkeypatch.setattr(name, module, lambda *a, plain=plain, **k: steps.append(1) or plain(*a, **k))
    model.sample(batch, 64, forbidden=no_stop, tokens_per_second=4)
    assert len(steps) == (1 + 24 if is_fast else 24)  # the prefill, then up to 24 tokens, in fours where fast


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@torch.no_grad()
def test_forbidden_ids_are_never_sampled_nor_in_the_top_k(temperature):
    """All control tokens are made the likeliest by far; only the stop token may be written."""
    model = tiny_model(2, tied=False)
    specials = model.front_end.tokenizer.convert_tokens_to_ids(SPECIALS)
    specials.remove(model.front_end.stop_id)
    batch = batch_of(model)
    model.head.weight[specials] *= 50
    raw = model.head(model(batch, model.front_end.transcripts(["abc"] * 6)))
    assert (raw.argmax(1)[:, None] == torch.tensor(specials)).any(1).float().mean() > 0.5
    rollout = model.sample(batch, 16, temperature=temperature, k=32)
    written = rollout.ids[rollout.row_mask()]
    assert not model.forbidden[written].any()
    assert not model.forbidden[rollout.topk_ids[rollout.topk_ids >= 0]].any()
    assert model.forbidden.nonzero()[:, 0].tolist() == sorted(specials)


def test_k_above_the_vocabulary_gives_minus_one():
    model = tiny_model()
    topk_ids = model.sample(batch_of(model, [0.5]), 2, k=10_000).topk_ids
    allowed = (~model.forbidden).nonzero()[:, 0].tolist()
    assert sorted(topk_ids[0, 0].tolist()) == [-1] * int(model.forbidden.sum()) + allowed


@torch.no_grad()
def test_sampling_is_a_function_of_its_uniforms_and_follows_the_distribution():
    model, n = tiny_model(4), 500
    uniforms = torch.rand(2, 8, generator=torch.Generator().manual_seed(0))
    together = model.sample(batch_of(model, [0.8, 1.4]), 8, temperature=0.8, uniforms=uniforms)
    alone = model.sample(batch_of(model, [0.8]), 8, temperature=0.8, uniforms=uniforms[:1])
    length = int(alone.lens[0])
    assert together.lens[0] == length and torch.equal(together.ids[0, :length], alone.ids[0, :length])
    many = collate([noise(0.2)] * n, model.front_end, [None] * n)
    evenly_spread = ((torch.arange(n) + 0.5) / n)[:, None]
    first = model.sample(many, 1, temperature=0.8, uniforms=evenly_spread).ids[:, 0]
    hidden = model(batch_of(model, [0.2]), model.front_end.transcripts([""]))
    logits = model.head(hidden[0]).masked_fill(model.forbidden, -torch.inf)
    expected = (logits / 0.8).softmax(0)
    shares = torch.bincount(first, minlength=len(logits)) / n
    assert (expected - shares).abs().max() <= 1.01 / n and 0.05 < expected.max() < 0.99


# ---- the fast decoder --------------------------------------------------------------------------------------


def test_in_bf16_the_fast_decoder_keeps_the_residual_stream_in_float32():
    """As the loop under autocast does, so that rollouts come from the model that is trained."""
    model = tiny_model()
    model.bf16 = True
    batch = batch_of(model)
    token = torch.arange(len(batch.seconds)) + 5
    with torch.no_grad(), model.autocast():
        mask = batch.prompt_mask
        encoded = model.encode(batch)
        embeds = model.embed_prompt(batch, encoded)
        rows = {}
        for kind in ("loop", "fast"):
            output = model.lm(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=m.positions_of(mask),
                use_cache=True,
            )
            new = model.lm.embed_tokens(token)
            if kind == "fast":
                decoder = m.FastDecoder(model.lm, output.past_key_values, mask, 4)
                rows[kind] = decoder.step(new, torch.zeros(1, dtype=torch.long))
                continue
            longer = nn.functional.pad(mask, (0, 1), value=True)
            output = model.lm(
                inputs_embeds=new[:, None],
                attention_mask=longer,
                position_ids=m.positions_of(longer)[:, -1:],
                past_key_values=output.past_key_values,
                use_cache=True,
            )
            rows[kind] = output.last_hidden_state[:, -1]
    assert rows["fast"].dtype == rows["loop"].dtype == torch.float32
    assert (rows["fast"] - rows["loop"]).abs().max() < 0.02 * rows["loop"].abs().max()


def rollout_by(monkeypatch, is_fast, model, *args, **kwargs):
    with monkeypatch.context() as patch:
        patch.setattr(m, "may_copy_weights", lambda model: is_fast)
        return model.sample(*args, **kwargs)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_fast_decoder_equals_the_loop(monkeypatch, model_type, tied, temperature):
    """Tokens and top-k ids; biases and norms are drawn too, or they would not be seen. Without dropout."""
    model = tiny_model(model_type=model_type, tied=tied).train()
    for layer in model.lm.layers:
        layer.self_attn.attention_dropout = 0.5
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.4)
    assert m.may_copy_weights(model)
    model.recompute_activations()
    assert m.may_copy_weights(model)  # it leaves no hook behind
    batch = batch_of(model)
    uniforms = torch.rand(6, 20, generator=torch.Generator().manual_seed(1))
    flags = {"k": 6, "temperature": temperature, "uniforms": uniforms, "tokens_per_second": 2.0}
    fast = rollout_by(monkeypatch, True, model, batch, 20, **flags)
    loop = rollout_by(monkeypatch, False, model, batch, 20, **flags)
    assert torch.equal(fast.ids, loop.ids) and torch.equal(fast.topk_ids, loop.topk_ids)
    assert torch.equal(fast.lens, loop.lens) and torch.equal(fast.stopped, loop.stopped)
    assert len(fast.ids.unique()) > 10 and model.training


class LowRank(nn.Linear):
    """What LoRA does: a linear layer whose forward adds the product of two thin matrices to its weight's."""

    def forward(self, x):
        generator = torch.Generator().manual_seed(0)
        down = torch.randn(2, self.in_features, generator=generator)
        up = torch.randn(self.out_features, 2, generator=generator)
        return super().forward(x) + x @ down.T @ up.T


def change_lm(model, how):
    """Puts something on a module of the LM: "class norm" is a norm of another class."""
    kind, _, place = how.partition(" ")
    layer = model.lm.layers[0]
    places = {"projection": layer.self_attn.v_proj, "output": layer.self_attn.o_proj, "mlp": layer.mlp}
    places |= {"norm": layer.input_layernorm, "layer": layer, "embedding": model.lm.embed_tokens}
    module = {**places, "head": model.lm_head}[place]
    if kind == "LoRA":
        module.__class__ = LowRank
    elif kind == "peft":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False, lora_alpha=64)
        peft.inject_adapter_in_model(config, model.lm)
    elif kind == "class":
        plain = type(module)
        changed = {"forward": lambda self, *args, **kwargs: -2 * plain.forward(self, *args, **kwargs)}
        module.__class__ = type("Changed", (plain,), changed)
    elif kind == "patch":
        bare_forward = module.forward
        module.forward = lambda *args, **kwargs: -2 * bare_forward(*args, **kwargs)
    elif kind == "bias":
        module.bias = nn.Parameter(3 * torch.randn(module.out_features))
    elif kind == "hook":
        module.register_forward_hook(lambda module, args, output: -2 * output)
    elif kind == "pre-hook":
        module.register_forward_pre_hook(lambda module, args: (-args[0],))


CHANGES = (
    "LoRA projection, peft projection, class projection, class norm, class mlp, class layer, "
    "class embedding, class head, patch mlp, bias output, bias head, hook mlp, pre-hook head"
).split(", ")


@pytest.mark.parametrize("how", CHANGES)
@torch.no_grad()
def test_whatever_sits_on_the_lm_takes_part_in_sampling(monkeypatch, how):
    """The rollout is the loop's, its tokens are the likeliest of a forward pass, and not the bare LM's."""
    model = tiny_model(3, tied=False)
    batch = batch_of(model)
    bare = model.sample(batch, 12, k=4)
    change_lm(model, how)
    rollout = model.sample(batch, 12, k=4)
    loop = rollout_by(monkeypatch, False, model, batch, 12, k=4)
    assert torch.equal(rollout.ids, loop.ids) and torch.equal(rollout.topk_ids, loop.topk_ids)
    logits = model.head(model(batch, rollout)).masked_fill(model.forbidden, -torch.inf)
    assert logits.argmax(1).tolist() == rollout.ids[rollout.row_mask()].tolist()
    assert rollout.ids.tolist() != bare.ids.tolist()


# ---- folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied, model_type, n_names", [(True, "qwen2", 66), (False, "qwen3", 65)])
@torch.no_grad()
def test_saved_folder_is_stock_transformers(tmp_path, tied, model_type, n_names):
    """Equal names, logits and greedy text from stock classes, clip by clip, 0.1 to 30 s, odd lengths too."""
    model = tiny_model(5, tied=tied, model_type=model_type)
    model.save_pretrained(tmp_path)
    stock_class = transformers.GlmAsrForConditionalGeneration
    stock, info = stock_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert stock.state_dict().keys() == model.state_dict().keys()
    assert len(dict(stock.named_parameters())) == len(dict(model.named_parameters())) == n_names
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    padding = {"audio_kwargs": {"padding": "longest", "pad_to_multiple_of": BLOCK}}
    for n_samples in (1600, 1601, 12_799, 12_801, 16_000, 20_481, 48_000, 112_079, 479_999, 480_000):
        wave = noise(n_samples / 16000, seed=n_samples % 5)[:n_samples]
        batch = collate([wave], model.front_end, [None])
        inputs = processor.apply_transcription_request(wave.numpy(), processor_kwargs=padding)
        assert inputs["input_ids"].tolist() == batch.prompt_ids.tolist()
        logits = model.head(model(batch, model.front_end.transcripts([""])))
        atol = 2e-5 * float(logits.abs().max())
        assert_close(logits, stock(**inputs).logits[:, -1], rtol=0, atol=atol)
        written = stock.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :].tolist()
        rollout = model.sample(batch, 8)
        n = int(rollout.lens[0] + rollout.stopped[0])
        assert written[:n] == rollout.ids[0, :n].tolist() and set(written[n:]) <= {model.front_end.pad_id}
        assert processor.decode(written, skip_special_tokens=True) == model.front_end.texts(rollout)[0]


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(tmp_path, tied):
    """A tied folder has no lm_head, and loads with one."""
    model = tiny_model(6, tied=tied)
    model.save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in weights) != tied
    for _ in range(2):
        again = SpeechLM.from_pretrained(tmp_path)
        assert (again.head.weight is again.lm.embed_tokens.weight) == tied
        for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
            assert torch.equal(a, b), name
        weights["lm_head.weight"] = model.head.weight.detach().clone()
        safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(model.forbidden, again.forbidden)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert generation.suppress_tokens == model.forbidden.nonzero()[:, 0].tolist()
    half = SpeechLM.from_pretrained(tmp_path, torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.lm.rotary_emb.inv_freq, model.lm.rotary_emb.inv_freq)  # float32, not rounded


class MeanEncoder(nn.Module):
    """Each frame is a linear function of two mel frames."""

    def __init__(self):
        super().__init__()
        self.only = nn.Linear(2 * 128, 32)

    def forward(self, mel, frame_lens):
        return self.only(mel.transpose(1, 2).reshape(len(mel), -1, 2 * 128))


def test_a_replaced_encoder_is_what_trains_and_what_is_saved(tmp_path):
    model = tiny_model().train()
    model.model["audio_tower"] = MeanEncoder()
    before = model.encoder.only.weight.detach().clone()
    optimizer = m.make_optimizer(dict(model.named_parameters()), 1e-2, 0.0)
    model(batch_of(model), model.front_end.transcripts(["abc"] * 6)).square().sum().backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert sum("audio_tower" in name for name in weights) == 2  # its weight and its bias
    saved = weights["model.audio_tower.only.weight"]
    assert torch.equal(saved, model.encoder.only.weight) and (saved != before).any()


def change_json(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_weights(path, **tensors):
    """Replaces or adds tensors of the encoder; None removes one."""
    weights = safetensors.torch.load_file(path)
    for name, tensor in tensors.items():
        weights.pop(f"model.audio_tower.{name}.bias", None)
        if tensor is not None:
            weights[f"model.audio_tower.{name}.bias"] = tensor
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})


BROKEN = {  # what is done to (folder, config.json, model.safetensors), and what the one line says
    "not a directory": lambda folder, config, weights: shutil.rmtree(folder),
    "is no model folder: config.json": lambda folder, config, weights: config.write_text("{"),
    "No such file or directory": lambda folder, config, weights: config.unlink(),
    "is no model folder": lambda folder, config, weights: weights.write_bytes(weights.read_bytes()[:20_000]),
    "weights and config.json do not match": lambda folder, config, weights: weights.unlink(),
    "model.audio_tower.conv1.bias": lambda folder, config, weights: change_weights(weights, conv1=None),
    "model.audio_tower.conv3.bias": lambda folder, config, weights: change_weights(
        weights, conv3=torch.ones(2)
    ),
    "model.audio_tower.conv2.bias": lambda folder, config, weights: change_weights(
        weights, conv2=torch.ones(2)
    ),
    "conv1.bias holds NaN": lambda folder, config, weights: change_weights(
        weights, conv1=torch.ones(32) / 0 * 0
    ),
    "prepare.student makes one": lambda folder, config, weights: change_json(config, model_type="qwen2"),
    "do not match: audio token 5": lambda folder, config, weights: change_json(config, audio_token_id=5),
    "expected int": lambda folder, config, weights: change_json(config, text_config={"hidden_size": "many"}),
    "tokenizer": lambda folder, config, weights: [path.unlink() for path in folder.glob("tokenizer*")],
}


@pytest.mark.parametrize("reason", BROKEN)
def test_broken_folders_are_one_clear_line(tmp_path, reason):
    folder = tmp_path / "broken"
    tiny_model().save_pretrained(folder)
    BROKEN[reason](folder, folder / "config.json", folder / "model.safetensors")
    with pytest.raises(InputError) as error:
        SpeechLM.from_pretrained(folder)
    message = str(error.value)
    assert reason in message and "broken" in message
    assert "\n" not in message and len(message) < 600


def test_a_tokenizer_without_the_prompts_tokens_is_an_error():
    with pytest.raises(InputError, match=r"lacks the token\(s\) <\|user\|> <\|begin_of_audio\|> <\|audio\|>"):
        FrontEnd(byte_tokenizer(specials=QWEN_SPECIALS))


@pytest.mark.slow
@torch.no_grad()
def test_the_real_qwen3_tokenizer():
    """The prompt's tokens added: text keeps its ids, control tokens in it stay text, none is written."""
    tokenizer = qwen3_tokenizer()
    text = "打开 the light <|im_end|> <think> é"
    before = tokenizer("打开 the light", add_special_tokens=False)["input_ids"]
    add_audio_tokens(tokenizer)
    model = tiny_model(tokenizer=tokenizer)
    ids = model.front_end.encode_text(text)
    assert ids[: len(before)] == before and model.front_end.decode(ids) == text
    assert model.front_end.stop_id == 151645 and model.front_end.pad_id == 151643
    assert not model.forbidden[ids].any() and not model.forbidden[:151643].any()
    assert model.forbidden[151643:].sum() == len(model.forbidden) - 151643 - 1
    rollout = model.sample(batch_of(model, [0.4, 1.0]), 4, temperature=1.0)
    assert not model.forbidden[rollout.ids[rollout.row_mask()]].any()
