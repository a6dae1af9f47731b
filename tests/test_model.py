"""SpeechLM: prompts and ids, padding, teacher forcing, sampling, and model folders of both kinds."""

import json

import pytest
import safetensors.torch
import torch
import transformers
from conftest import (
    QWEN_SPECIALS,
    SPECIALS,
    batch_of,
    byte_tokenizer,
    change_json,
    glm_asr_nano_folder,
    noise,
    qwen3_asr_folder,
    tiny_model,
    write_weights,
)
from runs import weights_of
from torch.testing import assert_close

import data
import model as m

LENGTHS_S = [0.31, 1.7, 0.1, 2.9, 1.0, 0.987]


# ---- prompts and ids ---------------------------------------------------------------------------------------


def test_ids_of_transcripts_and_of_the_prompt():
    front_end = m.FrontEnd(byte_tokenizer())
    ids_of = front_end.tokenizer.convert_tokens_to_ids
    a, b, c = front_end.encode_text("abc")
    stop, pad = front_end.stop_id, front_end.pad_id
    transcripts = front_end.transcripts(["ab", ""])
    assert transcripts.ids.tolist() == [[a, b, stop], [stop, pad, pad]]
    assert transcripts.ids[transcripts.row_mask()].tolist() == [a, b, stop, stop]
    cut = front_end.transcripts(["ab", "c"], stopped=[False, True])
    assert cut.ids[cut.row_mask()].tolist() == [a, b, c, stop]
    head = ids_of(["<|user|>", "<|begin_of_audio|>"]) + 12 * ids_of(["<|audio|>"])
    tail = front_end.encode_text("Please transcribe this audio.") + ids_of(["<|assistant|>"])
    assert front_end.prompt(12) == head + ids_of(["<|end_of_audio|>"]) + tail


@pytest.mark.parametrize(
    "text", ["<|im_end|>", "a <|endoftext|> b<|audio|>", "<asr_text>", "请 transcribe <", ""]
)
def test_text_is_never_control(text):
    front_end = m.FrontEnd(byte_tokenizer(extra=["<asr_text>"]))
    ids = front_end.encode_text(text)
    assert all(i < 256 for i in ids) and front_end.decode(ids) == text


# ---- padding and rows --------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_clip_in_a_batch_is_the_clip_alone():
    """Audio embeddings and hidden rows."""
    speech_lm = tiny_model()
    texts = ["ab", "", "a longer transcript", "x", "hello there", "yes"]
    batch = batch_of(speech_lm, LENGTHS_S)
    embeds = speech_lm.encode(batch).split(batch.audio_lens.tolist())
    hidden = speech_lm(batch, speech_lm.front_end.transcripts(texts)).split([len(text) + 1 for text in texts])
    for i, (seconds, text) in enumerate(zip(LENGTHS_S, texts)):
        alone = data.collate([noise(seconds, seed=i)], speech_lm.front_end, [None])
        largest = float(embeds[i].abs().max())
        assert_close(embeds[i], speech_lm.encode(alone), rtol=0, atol=2e-6 * largest)
        hidden_alone = speech_lm(alone, speech_lm.front_end.transcripts([text]))
        assert_close(hidden[i], hidden_alone, rtol=0, atol=1e-5)
    assert torch.stack([x[0] for x in embeds]).std(dim=0).min() > 0.1


@pytest.mark.parametrize("kind", ["glmasr", "qwen3_asr"])
def test_recomputed_activations_are_the_same_bits(tmp_path, kind):
    """Hidden rows and all gradients, and each layer of encoder and LM does run twice."""
    speech_lm = m.SpeechLM.from_pretrained(folder_of(kind, tmp_path / "m")).train()
    batch = batch_of(speech_lm, LENGTHS_S, ["en"] * 6)
    layers = [*speech_lm.encoder.layers, *speech_lm.lm.layers]
    calls = []
    for layer in layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(module), with_kwargs=True
        )
    results = []
    for n_calls in (1, 2):
        calls.clear()
        speech_lm.zero_grad()
        rows = speech_lm(batch, speech_lm.front_end.transcripts(["abc"] * 6))
        rows.square().sum().backward()
        assert [calls.count(layer.self_attn) for layer in layers] == [n_calls] * len(layers)
        results.append([rows, *[parameter.grad for parameter in speech_lm.parameters()]])
        speech_lm.recompute_activations()
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*results, strict=True))


# ---- sampling ----------------------------------------------------------------------------------------------


def make_stop_likely(speech_lm, batch, cap):
    """Scales the stop token's row of the head until some rollouts stop and others meet the cap."""
    row = speech_lm.head.weight[speech_lm.front_end.stop_id]
    for _ in range(60):
        rollout = speech_lm.sample(batch, cap)
        if 0 < rollout.stopped.sum() < len(rollout.stopped) and rollout.lens[rollout.stopped].max() > 2:
            return
        row.data *= 1.1
    raise AssertionError("no scale gives both")


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_greedy_rollouts_are_those_of_stock_generate_and_of_teacher_forcing(tmp_path, model_type, tied):
    """In a padded batch. Some stop by themselves, and the stop token leads S_t there; others are cut."""
    speech_lm = tiny_model(1, model_type=model_type, tied=tied)
    cap, stop = 10, speech_lm.front_end.stop_id
    batch = batch_of(speech_lm, LENGTHS_S)
    make_stop_likely(speech_lm, batch, cap)
    speech_lm.save_pretrained(tmp_path)
    stock = transformers.GlmAsrForConditionalGeneration.from_pretrained(tmp_path)
    embeds = speech_lm.embed_prompt(batch, speech_lm.encode(batch))
    ids = stock.generate(inputs_embeds=embeds, attention_mask=batch.prompt_mask, max_new_tokens=cap)
    rollout = speech_lm.sample(batch, cap)
    assert rollout.ids.tolist() == ids.tolist()  # with padding behind the stop tokens
    assert rollout.stopped.tolist() == (ids == stop).any(dim=1).tolist()
    assert rollout.lens.tolist() == (ids < 256).sum(dim=1).tolist()
    student_topk = m.topk_ids(speech_lm, speech_lm(batch, rollout), speech_lm.forbidden, 4)
    assert student_topk[:, 0].tolist() == rollout.ids[rollout.row_mask()].tolist()
    assert (student_topk[:, 0] == stop).sum() == rollout.stopped.sum()


def test_immediate_stop_is_one_scored_row():
    speech_lm = tiny_model()
    stop = speech_lm.front_end.stop_id
    batch = batch_of(speech_lm, [0.5, 1.0])
    rollout = speech_lm.sample(batch, 10, forbidden=torch.arange(len(speech_lm.forbidden)) != stop)
    assert rollout.lens.tolist() == [0, 0] and rollout.stopped.tolist() == [True, True]
    assert rollout.ids.tolist() == [[stop]] * 2
    assert len(speech_lm(batch, rollout)) == 2


@pytest.mark.parametrize(
    "max_new_tokens, tokens_per_second, lens",
    [(21, 25.0, [21, 21, 21]), (23, 4.0, [18, 23, 20]), (64, 4.0, [18, 24, 20]), (33, 0.0, [33, 33, 33])],
)
def test_caps_are_exact_and_by_seconds(max_new_tokens, tokens_per_second, lens):
    """min(max_new_tokens, ⌊seconds · r⌋ + 16)"""
    speech_lm = tiny_model()
    no_stop = speech_lm.forbidden.clone()
    no_stop[speech_lm.front_end.stop_id] = True
    batch = batch_of(speech_lm, [0.5, 2.24, 1.0])
    rollout = speech_lm.sample(batch, max_new_tokens, forbidden=no_stop, tokens_per_second=tokens_per_second)
    assert rollout.row_mask().sum(dim=1).tolist() == lens
    assert not rollout.stopped.any()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@torch.no_grad()
def test_forbidden_ids_are_never_sampled(temperature):
    """All control tokens are made the likeliest by far; only the stop token may be written."""
    speech_lm = tiny_model(2, tied=False)
    specials = speech_lm.front_end.tokenizer.convert_tokens_to_ids(SPECIALS)
    specials.remove(speech_lm.front_end.stop_id)
    assert speech_lm.forbidden.nonzero()[:, 0].tolist() == sorted(specials)
    batch = batch_of(speech_lm, LENGTHS_S)
    speech_lm.head.weight[specials] *= 50
    hidden = speech_lm(batch, speech_lm.front_end.transcripts(["abc"] * 6))
    likeliest = speech_lm.head(hidden).argmax(dim=1)
    assert speech_lm.forbidden[likeliest].float().mean() > 0.5
    rollout = speech_lm.sample(batch, 16, temperature=temperature)
    assert not speech_lm.forbidden[rollout.ids[rollout.row_mask()]].any()


@torch.no_grad()
def test_sampling_is_a_function_of_its_uniforms_and_follows_the_distribution():
    speech_lm, n = tiny_model(4), 500
    uniforms = torch.rand(2, 8, generator=torch.Generator().manual_seed(0))
    together = speech_lm.sample(batch_of(speech_lm, [0.8, 1.4]), 8, temperature=0.8, uniforms=uniforms)
    alone = speech_lm.sample(batch_of(speech_lm, [0.8]), 8, temperature=0.8, uniforms=uniforms[:1])
    length = int(alone.lens[0])
    assert together.lens[0] == length and torch.equal(together.ids[0, :length], alone.ids[0, :length])
    many = data.collate([noise(0.2)] * n, speech_lm.front_end, [None] * n)
    evenly_spread = ((torch.arange(n) + 0.5) / n)[:, None]
    first = speech_lm.sample(many, 1, temperature=0.8, uniforms=evenly_spread).ids[:, 0]
    hidden = speech_lm(batch_of(speech_lm, [0.2]), speech_lm.front_end.transcripts([""]))
    logits = speech_lm.head(hidden[0]).masked_fill(speech_lm.forbidden, -torch.inf)
    expected = (logits / 0.8).softmax(dim=0)
    shares = torch.bincount(first, minlength=len(logits)) / n
    assert (expected - shares).abs().max() <= 1.01 / n and 0.05 < expected.max() < 0.99


# ---- our folder --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied, model_type, n_names", [(True, "qwen2", 66), (False, "qwen3", 65)])
@torch.no_grad()
def test_saved_folder_is_stock_transformers(tmp_path, tied, model_type, n_names):
    """Equal names, prompts, logits and text from stock classes, clip by clip, 0.1 to 30 s."""
    speech_lm = tiny_model(5, tied=tied, model_type=model_type)
    speech_lm.save_pretrained(tmp_path)
    stock_class = transformers.GlmAsrForConditionalGeneration
    stock, info = stock_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert stock.state_dict().keys() == speech_lm.state_dict().keys()
    assert len(dict(stock.named_parameters())) == len(dict(speech_lm.named_parameters())) == n_names
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    padding = {"audio_kwargs": {"padding": "longest", "pad_to_multiple_of": data.BLOCK}}
    for n_samples in (480_000, 479_999, 112_079, 1600, 1601, 12_799, 12_801, 16_000, 20_481, 48_000):
        wave = noise(n_samples / 16000, seed=n_samples % 5)[:n_samples]
        batch = data.collate([wave], speech_lm.front_end, [None])
        inputs = processor.apply_transcription_request(wave.numpy(), processor_kwargs=padding)
        assert inputs["input_ids"].tolist() == batch.prompt_ids.tolist()
        logits = speech_lm.head(speech_lm(batch, speech_lm.front_end.transcripts([""])))
        atol = 2e-5 * float(logits.abs().max())
        assert_close(logits, stock(**inputs).logits[:, -1], rtol=0, atol=atol)
    written = stock.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    rollout = speech_lm.sample(batch, 8)
    assert processor.decode(written, skip_special_tokens=True) == speech_lm.front_end.texts(rollout)[0]


# ---- folders of both kinds ---------------------------------------------------------------------------------

STOCK = {
    "glmasr": transformers.GlmAsrForConditionalGeneration,
    "qwen3_asr": transformers.Qwen3ASRForConditionalGeneration,
}
KINDS = pytest.mark.parametrize("kind", STOCK)
EMBEDDINGS = "model.language_model.embed_tokens.weight"


def folder_of(kind, path):
    """A model folder of that kind with random weights. → path"""
    if kind == "qwen3_asr":
        return qwen3_asr_folder(path)
    tiny_model().save_pretrained(path)
    return path


def assert_same_tensors(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


@KINDS
@pytest.mark.parametrize("shards", [1, 3])
def test_what_lies_beside_the_weights_is_not_read(tmp_path, kind, shards):
    """A backup, an older split with or without its index, a consolidated file: stock reads none either."""
    folder = folder_of(kind, tmp_path / "m")
    weights = weights_of(folder)
    older = {name: tensor + 1 for name, tensor in weights.items()}
    if shards == 1:
        write_weights(folder, older, shards=2)  # with its index
    else:
        (folder / "model.safetensors").unlink()
        write_weights(folder, older, shards=2)
        write_weights(folder, weights, shards)
    for name in ("backup", "consolidated", "model-old", "zz"):
        safetensors.torch.save_file(older, folder / f"{name}.safetensors", metadata={"format": "pt"})
    speech_lm = m.SpeechLM.from_pretrained(folder)
    assert_same_tensors(speech_lm.state_dict(), STOCK[kind].from_pretrained(folder).state_dict())
    assert torch.equal(speech_lm.lm.embed_tokens.weight, weights[EMBEDDINGS])


@KINDS
@pytest.mark.parametrize("head", ["absent", "equal", "its own"])
def test_what_is_tied_follows_the_tensors(tmp_path, kind, head):
    """Under a flag that says tied: a head of its own is kept through loading and saving, as in stock."""
    folder = folder_of(kind, tmp_path / "m")
    weights = weights_of(folder)
    weights["lm_head.weight"] = weights[EMBEDDINGS] + (head == "its own")
    on_disk = {name: weights[name] for name in weights if head != "absent" or name != "lm_head.weight"}
    write_weights(folder, on_disk)
    speech_lm = m.SpeechLM.from_pretrained(folder)
    speech_lm.save_pretrained(tmp_path / "saved")
    again = m.SpeechLM.from_pretrained(tmp_path / "saved")
    is_tied = head != "its own"
    assert data.read_json(tmp_path / "saved" / "config.json")["tie_word_embeddings"] == is_tied
    assert ("lm_head.weight" in weights_of(tmp_path / "saved")) != is_tied
    assert (again.head.weight is again.lm.embed_tokens.weight) == is_tied
    stock = [STOCK[kind].from_pretrained(path) for path in (folder, tmp_path / "saved")]
    for loaded in (speech_lm, again, *stock):
        assert_same_tensors(loaded.state_dict(), weights)
    half = m.SpeechLM.from_pretrained(folder, torch.bfloat16)
    assert_same_tensors(half.state_dict(), {name: tensor.bfloat16() for name, tensor in weights.items()})


@KINDS
def test_weights_that_are_none_are_one_line(tmp_path, kind):
    """A pointer of git lfs in a split, and a pytorch_model.bin alone."""
    folder = folder_of(kind, tmp_path / "m")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * 'a'}\nsize 123\n"
    write_weights(folder, weights_of(folder), shards=2)
    (folder / "model.safetensors").unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()
    (folder / "model-00002-of-00002.safetensors").write_text(pointer)
    message = error_of(folder)
    assert "model-00002-of-00002.safetensors" in message and "git lfs pull" in message
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "no model.safetensors and no index of its parts" in error_of(folder)


def error_of(name):
    """The one line of the InputError with which a folder or hub name is refused."""
    with pytest.raises(data.InputError) as caught:
        m.SpeechLM.from_pretrained(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@KINDS
def test_a_tensor_that_is_missing_is_named(tmp_path, kind):
    """Stock transformers would draw it."""
    folder = folder_of(kind, tmp_path / "m")
    weights = weights_of(folder)
    del weights["model.language_model.norm.weight"]
    write_weights(folder, weights)
    with pytest.raises((RuntimeError, data.InputError), match=r"model\.language_model\.norm"):
        m.SpeechLM.from_pretrained(folder)


@pytest.mark.parametrize("kind, name", [("qwen3_asr", "chat_template.jinja"), ("glmasr", "tokenizer.json")])
def test_a_file_that_is_missing_is_named_with_where_to_copy_it_from(tmp_path, kind, name):
    folder = folder_of(kind, tmp_path / "m")
    (folder / name).unlink()
    assert f"m has no {name}; copy it from the model's source" in error_of(folder)


def with_nan(folder):
    weights = weights_of(folder)
    weights["model.audio_tower.conv1.bias"][3] = torch.nan
    write_weights(folder, weights)


def with_old_rope(folder):
    """As transformers 4 wrote it."""
    config = json.loads((folder / "config.json").read_text())
    del config["text_config"]["rope_parameters"]
    config["text_config"]["rope_theta"] = 1e6
    (folder / "config.json").write_text(json.dumps(config))


REFUSED = {  # what is done to a folder of ours, and what the one line says
    "m is no model folder: it has no config.json": lambda folder: (folder / "config.json").unlink(),
    "model.audio_tower.conv1.bias holds NaN": with_nan,
    'write "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}': with_old_rope,
    "model_type is 'qwen3'; python -m prepare.student makes": {"model_type": "qwen3"},
    "m is a released ARK-ASR; run python -m prepare.ark": {"model_type": "arkasr", "whisper_config": {}},
    "take its -hf form, as Qwen/Qwen3-ASR-1.7B-hf": {"model_type": "qwen3_asr", "thinker_config": {}},
    "model and tokenizer differ: audio token 5": {"audio_token_id": 5},
    "model_type is 'llama'; the LM is Qwen2 or Qwen3": glm_asr_nano_folder,
    "m is a run without a finished model; give one of its": {"script": "opd.py"},
    "m holds LoRA's matrices alone": lambda folder: (folder / "adapter_config.json").write_text("{}"),
    "no token(s) <|user|> <|begin_of_audio|> <|audio|> ": (
        lambda folder: byte_tokenizer(specials=QWEN_SPECIALS).save_pretrained(folder)
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_no_model_of_ours_is_one_line(tmp_path, reason):
    folder = folder_of("glmasr", tmp_path / "m")
    change = REFUSED[reason]
    if isinstance(change, dict):
        change_json(folder / "config.json", **change)
    else:
        change(folder)
    assert reason in error_of(folder)


@KINDS
def test_no_remote_code_of_a_folder_is_run(tmp_path, monkeypatch, kind):
    """Nor is it named in the folder that is saved."""
    monkeypatch.setattr("builtins.input", lambda prompt="": pytest.fail("asked whether to run remote code"))
    folder = folder_of(kind, tmp_path / "m")
    (folder / "remote.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    auto_map = {"AutoConfig": "remote.A", "AutoModel": "remote.B", "AutoProcessor": "remote.C"}
    auto_map |= {"AutoTokenizer": ["remote.D", None], "AutoFeatureExtractor": "remote.E"}
    for path in folder.glob("*config.json"):
        change_json(path, auto_map=auto_map)
    m.SpeechLM.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "ran").exists() and not list((tmp_path / "saved").glob("*.py"))
