"""SpeechLM: padding invariance, teacher forcing, sampling, forbidden ids,
and the folder in stock transformers."""
import json
import shutil

import pytest
import safetensors.torch
import torch
import transformers

from conftest import DATA, SPECIALS, byte_tokenizer, noise, tiny_config, tiny_model
from data import BLOCK, InputError, collate
from model import SpeechLM, FrontEnd, Rollout, add_audio_tokens

LENGTHS_S = [0.31, 1.7, 0.1, 2.9, 1.0, 0.987]


def batch_of(model, lengths=LENGTHS_S):
    return collate([noise(s, seed=i) for i, s in enumerate(lengths)], model.front_end)


def given(model, texts):
    return model.front_end.transcripts(texts)


# ---- padding -----------------------------------------------------------------------------------------------
def test_padded_batch_equals_single_clips():
    """Audio embeddings and hidden rows of a mixed batch, each clip alone: 1e-5 in float32."""
    model = tiny_model()
    texts = ["ab", "", "a longer transcript", "x", "hello there", "yes"]
    batch, targets = batch_of(model), given(model, texts)
    with torch.no_grad():
        embeds, _, _ = model.encode(batch)
        hidden, _, _ = model(batch, targets)
    first = 0
    for i, (seconds, text) in enumerate(zip(LENGTHS_S, texts)):
        alone = collate([noise(seconds, seed=i)], model.front_end)
        with torch.no_grad():
            one_embeds, one_hidden = model.encode(alone)[0], model(alone, given(model, [text]))[0]
        n = int(alone.audio_lens)
        torch.testing.assert_close(embeds[:n], one_embeds, rtol=1e-5, atol=1e-5)
        embeds = embeds[n:]
        torch.testing.assert_close(hidden[first:first + len(one_hidden)], one_hidden, rtol=1e-5, atol=1e-5)
        first += len(one_hidden)
    assert first == len(hidden) == sum(len(t) + 1 for t in texts)


def test_embeddings_depend_on_all_of_the_clip_and_nothing_else():
    model = tiny_model()
    batch = batch_of(model, [0.5, 2.0])
    noisy = batch.to("cpu")
    noisy.mel = batch.mel.clone()
    noisy.mel[1] += 1.0
    with torch.no_grad():
        a, b = model.encode(batch)[0], model.encode(noisy)[0]
    n = int(batch.audio_lens[0])
    assert torch.equal(a[:n], b[:n]) and (a[n:] - b[n:]).abs().max() > 0.1


# ---- rows --------------------------------------------------------------------------------------------------
def test_row_mask_scores_the_stop_only_where_the_rollout_stopped():
    ids = torch.full((4, 3), 7)
    mask = Rollout(ids, torch.tensor([0, 2, 3, 3]), torch.tensor([True, True, False, False])).row_mask()
    assert mask.tolist() == [[True, False, False], [True] * 3, [True] * 3, [True] * 3]
    assert Rollout(ids, torch.tensor([1]), torch.tensor([False])).row_mask().tolist() == [
        [True, False, False]]


def test_supervised_ids_of_one_example():
    front_end = FrontEnd(byte_tokenizer())
    targets = front_end.transcripts(["ab", ""])
    a, b = front_end.encode_text("ab")
    assert targets.ids.tolist() == [[a, b, front_end.stop_id],
                                    [front_end.stop_id, front_end.pad_id, front_end.pad_id]]
    assert targets.ids[targets.row_mask()].tolist() == [a, b, front_end.stop_id, front_end.stop_id]
    assert front_end.prompt(12) == (
        front_end.tokenizer.convert_tokens_to_ids(["<|user|>", "<|begin_of_audio|>"])
        + [front_end.audio_id] * 12 + [front_end.tokenizer.convert_tokens_to_ids("<|end_of_audio|>")]
        + front_end.encode_text("Please transcribe this audio.")
        + [front_end.tokenizer.convert_tokens_to_ids("<|assistant|>")])


@pytest.mark.parametrize("text", ["<|im_end|>", "a <|endoftext|> b<|audio|>", "<asr_text>",
                                  "language models are good", "请 transcribe <", ""])
def test_text_is_never_control(text):
    front_end = FrontEnd(byte_tokenizer(extra=["<asr_text>"]))
    ids = front_end.encode_text(text)
    assert all(i < 256 for i in ids) and front_end.decode(ids) == text


def test_tokens_in_a_hidden_row_predict_the_next_one():
    """Row t of a clip comes from the prefix before token t: changing token t changes later rows only."""
    model = tiny_model()
    batch = batch_of(model, [1.0])
    with torch.no_grad():
        a, b = (model(batch, given(model, [text]))[0] for text in ("abcd", "abXd"))
    same = [torch.allclose(x, y, atol=1e-6) for x, y in zip(a, b)]
    assert same == [True, True, True, False, False]


# ---- sampling ----------------------------------------------------------------------------------------------
def test_sample_equals_step_by_step_full_forward():
    """Greedy ids and every step's top-k ids,
    from full forwards of one clip at a time on the growing prefix."""
    model, k, cap = tiny_model(3), 5, 12
    rollout = model.sample(batch_of(model), cap, k=k)
    for i, seconds in enumerate(LENGTHS_S):
        alone, prefix = collate([noise(seconds, seed=i)], model.front_end), []
        for t in range(cap):
            ids = torch.tensor([prefix + [model.front_end.pad_id]])
            with torch.no_grad():
                hidden, _, _ = model(alone, Rollout(ids, torch.tensor([t + 1]), torch.tensor([False])))
                logits = model.head(hidden[t]).masked_fill(model.forbidden, -torch.inf)
            assert rollout.topk_ids[i, t].tolist() == logits.topk(k).indices.tolist()
            prefix.append(int(logits.argmax()))
            if prefix[-1] == model.front_end.stop_id:
                break
        stopped = prefix[-1] == model.front_end.stop_id
        assert rollout.ids[i, :len(prefix)].tolist() == prefix and bool(rollout.stopped[i]) == stopped
        assert int(rollout.lens[i]) == len(prefix) - stopped
        assert ((rollout.ids[i, len(prefix):] == model.front_end.pad_id).all()
                and (rollout.topk_ids[i, len(prefix):] == -1).all())


def test_stop_in_the_support_exactly_where_the_rollout_stopped():
    """A head whose stop row follows the mean hidden state: some rows stop by themselves,
    others run into the cap."""
    model = tiny_model(1, tied=False)
    batch = batch_of(model, [0.4, 0.9, 1.3, 2.1, 0.2, 1.1, 1.9, 0.6])
    with torch.no_grad():
        for scale in torch.linspace(0, 30, 61):
            model.head.weight[model.front_end.stop_id] = scale / 10
            rollout = model.sample(batch, 10, k=4)
            if 0 < rollout.stopped.sum() < len(rollout.stopped):
                break
    assert 0 < rollout.stopped.sum() < len(rollout.stopped)
    mask = rollout.row_mask()
    for b in range(len(mask)):
        scored = rollout.ids[b][mask[b]].tolist()
        if rollout.stopped[b]:
            assert scored[-1] == model.front_end.stop_id and scored.count(model.front_end.stop_id) == 1
            assert model.front_end.stop_id in rollout.topk_ids[b, len(scored) - 1].tolist()
        else:
            assert len(scored) == 10 and model.front_end.stop_id not in scored


def dominant(model, token_id):
    """Makes the head prefer token_id everywhere: its row is every hidden state's own direction,
    by a norm's bias-free trick."""
    with torch.no_grad():
        model.lm.norm.weight.zero_()
        model.lm.norm.weight[0] = 1.0
        model.head.weight.zero_()
        model.head.weight[token_id, 0] = 5.0
    return model


def test_immediate_stop_is_one_scored_row():
    model = tiny_model(0, tied=False)
    batch = batch_of(model, [0.5, 1.0])
    with torch.no_grad():         # every other row scores 0; the stop row must beat 0, whatever the sign
        sign = model.lm(inputs_embeds=model.embed_prompt(batch, model.encode(batch)[0]),
                        attention_mask=batch.prompt_mask).last_hidden_state[:, -1, 0].sign()
    dominant(model, model.front_end.stop_id)
    model.head.weight.data *= sign[0] if (sign == sign[0]).all() else 0
    assert (sign == sign[0]).all()
    rollout = model.sample(batch, 10)
    assert (rollout.lens.tolist() == [0, 0] and rollout.stopped.tolist() == [True, True]
            and rollout.ids.shape == (2, 1))
    assert model(batch, rollout)[0].shape[0] == 2


def test_cap_is_exact_and_by_seconds():
    model = tiny_model()
    no_stop = model.forbidden.clone()
    no_stop[model.front_end.stop_id] = True
    batch = batch_of(model, [0.5, 2.0, 1.0])
    rollout = model.sample(batch, 21, forbidden=no_stop)
    assert (rollout.lens.tolist() == [21] * 3 and rollout.stopped.tolist() == [False] * 3
            and rollout.row_mask().all())
    rollout = model.sample(batch, 30, forbidden=no_stop, tokens_per_second=4)
    assert rollout.lens.tolist() == [18, 24, 20] and rollout.ids.shape == (3, 24)
    assert rollout.row_mask().sum(1).tolist() == [18, 24, 20]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forbidden_ids_are_never_sampled_nor_in_the_top_k(temperature):
    """All control tokens are made the likeliest by far; only the stop token may be written."""
    model = tiny_model(2, tied=False)
    specials = [i for i in model.front_end.tokenizer.convert_tokens_to_ids(SPECIALS)
                if i != model.front_end.stop_id]
    batch = batch_of(model)
    with torch.no_grad():
        model.head.weight[specials] *= 50
        raw = model.head(model(batch, given(model, ["abc"] * 6))[0])
    assert (raw.argmax(1)[:, None] == torch.tensor(specials)).any(1).float().mean() > 0.5
    rollout = model.sample(batch, 16, temperature=temperature, k=32)
    written = rollout.ids[rollout.row_mask()]
    assert (not model.forbidden[written].any()
            and not model.forbidden[rollout.topk_ids[rollout.topk_ids >= 0]].any())
    assert (model.forbidden[specials].all() and not model.forbidden[model.front_end.stop_id]
            and not model.forbidden[:256].any())


def test_k_above_the_vocabulary_gives_minus_one():
    model = tiny_model()
    rollout = model.sample(batch_of(model, [0.5]), 2, k=10_000)
    assert rollout.topk_ids.shape[2] == len(model.forbidden)
    assert sorted(rollout.topk_ids[0, 0].tolist()) == (
        [-1] * int(model.forbidden.sum()) + (~model.forbidden).nonzero()[:, 0].tolist())


def test_sampling_is_a_function_of_its_uniforms_and_follows_the_distribution():
    model, n = tiny_model(4), 500
    batch = batch_of(model, [0.8, 1.4])
    draws = torch.rand(2, 8, generator=torch.Generator().manual_seed(0))
    together = model.sample(batch, 8, temperature=0.8, uniforms=draws)
    alone = model.sample(batch_of(model, [0.8]), 8, temperature=0.8, uniforms=draws[:1])
    m = int(alone.lens[0])
    assert together.ids[0, :m].tolist() == alone.ids[0, :m].tolist() and int(together.lens[0]) == m
    many = collate([noise(0.2)] * n, model.front_end)
    first = model.sample(many, 1, temperature=0.8, uniforms=((torch.arange(n) + 0.5) / n)[:, None]).ids[:, 0]
    with torch.no_grad():
        logits = model.head(model(batch_of(model, [0.2]), given(model, [""]))[0])[0].masked_fill(
            model.forbidden, -torch.inf)
    want, got = (logits / 0.8).softmax(0), torch.bincount(first, minlength=len(logits)) / n
    # evenly spread draws: exact to one count
    assert (want - got).abs().max() <= 1.01 / n and 0.1 < want.max() < 0.99


# ---- folders -----------------------------------------------------------------------------------------------
def stock_inputs(processor, wave):
    return processor.apply_transcription_request(
        wave.numpy(), processor_kwargs=dict(audio_kwargs=dict(padding="longest", pad_to_multiple_of=BLOCK)))


@pytest.mark.parametrize("tied, model_type", [(True, "qwen2"), (False, "qwen3")])
def test_saved_folder_is_stock_transformers(tmp_path, tied, model_type):
    """Equal logits and equal greedy text from stock classes, clip by clip, 0.1 s to 30 s,
    odd lengths included."""
    model = tiny_model(5, tied=tied, model_type=model_type)
    model.save_pretrained(tmp_path)
    net = transformers.GlmAsrForConditionalGeneration.from_pretrained(tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    for n_samples in (1600, 1601, 12_799, 12_801, 16_000, 20_481, 48_000, 112_079, 479_999, 480_000):
        wave = noise(n_samples / 16000, seed=n_samples % 5)[:n_samples]
        batch, inputs = collate([wave], model.front_end), stock_inputs(processor, wave)
        assert inputs["input_ids"].tolist() == batch.prompt_ids.tolist()
        with torch.no_grad():
            logits = model.head(model(batch, given(model, [""]))[0])
            torch.testing.assert_close(logits, net(**inputs).logits[:, -1], rtol=0,
                                       atol=2e-5 * float(logits.abs().max()))
            written = net.generate(**inputs, do_sample=False,
                                   max_new_tokens=8)[0, inputs["input_ids"].shape[1]:]
        rollout = model.sample(batch, 8)
        n = int(rollout.lens[0] + rollout.stopped[0])
        assert (written.tolist()[:n] == rollout.ids[0, :n].tolist()
                and set(written.tolist()[n:]) <= {model.front_end.pad_id})
        assert processor.decode(written, skip_special_tokens=True) == model.front_end.decode(
            rollout.ids[0, :int(rollout.lens[0])].tolist())


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(tmp_path, tied):
    model = tiny_model(6, tied=tied)
    model.save_pretrained(tmp_path)
    again = SpeechLM.from_pretrained(tmp_path)
    names = set(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    assert (("lm_head.weight" in names) == (not tied)
            and "model.audio_tower.layers.0.self_attn.o_proj.weight" in names)
    assert (again.head.weight is again.lm.embed_tokens.weight) == tied
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(model.forbidden, again.forbidden)
    assert (transformers.GenerationConfig.from_pretrained(tmp_path).suppress_tokens
            == model.forbidden.nonzero()[:, 0].tolist())


def test_a_tied_folder_also_loads_with_lm_head_stored(tmp_path):
    model = tiny_model(6)
    model.save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = SpeechLM.from_pretrained(tmp_path)
    assert (again.head.weight is again.lm.embed_tokens.weight
            and torch.equal(again.head.weight, model.head.weight))


def break_folder(folder, how):
    if how == "no folder":
        shutil.rmtree(folder)
    elif how == "no weights":
        (folder / "model.safetensors").unlink()
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "bad config":
        (folder / "config.json").write_text("{")
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink(), (folder / "tokenizer_config.json").unlink()
    elif how == "half weights":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:20_000])
    else:
        config = json.loads((folder / "config.json").read_text())
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        if how == "other model":
            config["model_type"] = "qwen2"
        elif how == "wrong audio token":
            config["audio_token_id"] = 5
        elif how == "tensor missing":
            del weights["model.audio_tower.conv1.weight"]
        elif how == "shape":
            weights["model.audio_tower.conv1.weight"] = torch.zeros(2, 2, 3)
        (folder / "config.json").write_text(json.dumps(config))
        safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("how", [
    "no folder", "no weights", "no config", "bad config", "no tokenizer", "half weights", "other model",
    "wrong audio token", "tensor missing", "shape"])
def test_broken_folders_are_one_clear_line(tmp_path, how):
    folder = tmp_path / "broken"
    tiny_model().save_pretrained(folder)
    break_folder(folder, how)
    with pytest.raises(InputError) as error:
        SpeechLM.from_pretrained(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert how == "wrong audio token" or "broken" in str(error.value)


def test_a_stock_tokenizer_gets_the_audio_tokens():
    core = byte_tokenizer().backend_tokenizer.to_str()
    data = json.loads(core)
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] in SPECIALS[:3]]
    import tokenizers
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(data)), eos_token="<|im_end|>",
        pad_token="<|endoftext|>")
    with pytest.raises(InputError, match=r"lacks the token\(s\) <\|user\|>"):
        FrontEnd(tokenizer)
    assert add_audio_tokens(tokenizer) == 5 and FrontEnd(tokenizer).prompt(1)
    model = SpeechLM.from_config(tiny_config(), tokenizer)
    assert len(model.forbidden) == len(tokenizer) == 264 and model.forbidden.sum() == 7


@pytest.mark.skipif(not (DATA / "qwen3_tokenizer").exists(),
                    reason=f"no tokenizer at {DATA} (set ASR_OPD_DATA)")
def test_the_real_qwen3_tokenizer():
    """The prompt's tokens added: text keeps its ids, control tokens in it stay text, none is written."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(DATA / "qwen3_tokenizer")
    text = "打开 the light <|im_end|> <think> é"
    before = tokenizer("打开 the light", add_special_tokens=False)["input_ids"]
    model = SpeechLM.from_config(tiny_config(), tokenizer)
    ids = model.front_end.encode_text(text)
    assert ids[:len(before)] == before and model.front_end.decode(ids) == text
    assert model.front_end.stop_id == 151645 and model.front_end.pad_id == 151643
    assert not model.forbidden[ids].any() and not model.forbidden[:151643].any()
    assert model.forbidden[151643:].sum() == len(model.forbidden) - 151643 - 1
    rollout = model.sample(batch_of(model, [0.4, 1.0]), 4, temperature=1.0)
    assert not model.forbidden[rollout.ids[rollout.row_mask()]].any()


def test_optimizer_sees_a_tied_matrix_once_and_decays_only_matrices():
    from model import make_optimizer
    model = tiny_model(tied=True)
    decay, rest = make_optimizer(model, 1e-3, 0.005).param_groups
    ids = [id(p) for group in (decay, rest) for p in group["params"]]
    assert len(ids) == len(set(ids)) == len(list(model.parameters()))
    assert (decay["weight_decay"] == 0.005 and rest["weight_decay"] == 0
            and all(p.ndim >= 2 for p in decay["params"]))
    assert id(model.lm.embed_tokens.weight) in {id(p) for p in rest["params"]}
