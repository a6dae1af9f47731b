"""Model folders as they are published (Qwen3-ASR, ARK-ASR, GLM-ASR, Qwen3), hub names, prompt languages and
the start-up self-check: each against stock transformers or an independent few lines of torch."""
import dataclasses
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers

import eval as evaluation
import opd
import sft
from conftest import (DATA, QWEN3_ASR_TEMPLATE, QWEN3_ASR_TOKENS, QWEN_SPECIALS, ROOT, ark_folder,
                      ark_tensors, byte_tokenizer, glm_asr_nano_folder, noise, qwen3_asr_folder,
                      qwen3_lm_folder, qwen3_tokenizer, thinker_folder, tiny_model)
from data import InputError, collate, language_code, script_language
from model import SpeechLM, align_vocabularies, self_check, teacher_rollout, teacher_support

LENGTHS_S = [0.3, 0.49, 0.5, 0.99, 1.0, 1.01, 2.6, 7.9, 8.05, 16.1, 30.0]
NAMES = ("Chinese English Cantonese Arabic German French Spanish Portuguese Indonesian Italian Korean "
         "Russian Thai Vietnamese Japanese Turkish Hindi Malay Dutch Swedish Danish Finnish Polish Czech "
         "Filipino Persian Greek Romanian Hungarian Macedonian").split()


# ---- shared pieces -----------------------------------------------------------------------------------------
@dataclasses.dataclass
class Pair:
    """A folder in stock transformers and in ours."""
    folder: object
    stock: torch.nn.Module
    processor: object
    model: SpeechLM


def load_pair(folder, processor=None):
    stock = transformers.Qwen3ASRForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return Pair(folder, stock, processor or transformers.AutoProcessor.from_pretrained(folder),
                SpeechLM.from_pretrained(folder).eval())


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return load_pair(qwen3_asr_folder(tmp_path_factory.mktemp("qwen") / "Qwen3-ASR-1.7B-hf"))


def request(pair, wave, language):
    return pair.processor.apply_transcription_request(wave.numpy(), language=language)


def stock_logits(pair, wave, language, ids):
    """Logits (T, V) that predict `ids`, from stock's own features, prompt and forward, one clip alone."""
    inputs = request(pair, wave, language)
    S = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids])], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        return pair.stock(**inputs).logits[0, S - 1:-1]


def state(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def error_of(call, *args, **kwargs):
    """The one line of the InputError that `call` must raise."""
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- Qwen3-ASR: ours is stock ------------------------------------------------------------------------------
def audio_tokens(m):
    """Three convolutions of stride 2 on each piece of 100 mel frames."""
    rest = m % 100
    for _ in range(3):
        rest = (rest + 1) // 2
    return 13 * (m // 100) + rest


def test_qwen3_asr_audio_token_counts(qwen):
    front_end = qwen.model.front_end
    counts = {50: 7, 99: 13, 100: 13, 101: 14, 108: 14, 109: 15, 200: 26, 3000: 390}
    assert {m: front_end.n_audio_tokens(160 * m) for m in counts} == counts
    for samples in [*range(8000, 64000, 37), 479_999, 480_000]:
        assert front_end.n_audio_tokens(samples) == audio_tokens(samples // 160), samples
    assert {front_end.n_audio_tokens(samples) for samples in (1, 160, 4800, 7999, 8000)} == {7}
    for samples in (100, 7999, 8000, 8159, 15999, 16000, 16001, 16159, 16160, 40123):
        ids = request(qwen, noise(2.6)[:samples], "en")["input_ids"]
        assert int((ids == qwen.processor.audio_token_id).sum()) == front_end.n_audio_tokens(samples), samples


def test_qwen3_asr_prompts_and_features_are_the_processors(qwen):
    languages = [NAMES[i] for i in range(len(LENGTHS_S))]
    waves = [noise(s, seed=i) for i, s in enumerate(LENGTHS_S)]
    batch = qwen.model.with_languages(collate(waves, qwen.model.front_end, languages))
    for b, (wave, language) in enumerate(zip(waves, languages)):
        inputs, n = request(qwen, wave, language), int(batch.mel_lens[b])
        assert batch.prompt_ids[b][batch.prompt_mask[b]].tolist() == inputs["input_ids"][0].tolist()
        assert batch.prompt_mask[b].sort().values.equal(batch.prompt_mask[b])           # padding on the left
        assert n == int(inputs["input_features_mask"].sum())
        torch.testing.assert_close(batch.mel[b, :, :n], inputs["input_features"][0, :, :n], rtol=0, atol=1e-4)
        assert float(batch.mel[b, :, n:].abs().sum()) == 0


def test_qwen3_asr_logits_of_a_mixed_batch_equal_stock_clip_by_clip(qwen):
    texts = ["a", "", "two words", "今天", "x" * 40, "yes", "", "a longer transcript of it", "no", "b", "end"]
    languages = ["en", "Chinese", "zh-CN", "yue", "German", "en", "ja", "ko", "Russian", "th", "English"]
    waves = [noise(s, seed=i) for i, s in enumerate(LENGTHS_S)]
    batch = qwen.model.with_languages(collate(waves, qwen.model.front_end, languages))
    targets = qwen.model.front_end.transcripts(texts)
    with torch.no_grad():
        ours = qwen.model.head(qwen.model(batch, targets)[0])
    ours, firsts = ours.split([len(text.encode()) + 1 for text in texts]), []
    for b, (wave, language) in enumerate(zip(waves, languages)):
        ids = targets.ids[b, :int(targets.lens[b]) + 1].tolist()
        want = stock_logits(qwen, wave, language_code(language), ids)
        assert ours[b].shape == want.shape
        assert float((ours[b] - want).abs().max()) <= 1e-4 * float(want.abs().max()), LENGTHS_S[b]
        firsts.append(stock_logits(qwen, wave, "en", ids)[0])
    for a in range(len(firsts)):                # else the comparison would not notice the wrong audio
        for b in range(a):
            assert float((firsts[a] - firsts[b]).abs().max()) > 1e-2 * float(firsts[a].abs().max())


@pytest.mark.parametrize("letters", [None, "abcde"])
def test_qwen3_asr_greedy_sample_equals_stock_generate(qwen, letters):
    """Over all text ids, and over five letters and the stop token, where rollouts stop by themselves."""
    front_end, forbidden, seconds = qwen.model.front_end, qwen.model.forbidden, [0.3, 1.01, 2.6, 0.7, 5.0]
    if letters:
        forbidden = torch.ones_like(forbidden)
        forbidden[[*front_end.encode_text(letters), front_end.stop_id]] = False
    waves = [noise(s, seed=i) for i, s in enumerate(seconds)]
    batch = qwen.model.with_languages(collate(waves, front_end, ["en"] * len(waves)))
    rollout, found = qwen.model.sample(batch, 16, forbidden=forbidden), set()
    for b, wave in enumerate(waves):
        inputs = request(qwen, wave, "en")
        ids = qwen.stock.generate(**inputs, do_sample=False, max_new_tokens=16,
                                  eos_token_id=front_end.stop_id,
                                  suppress_tokens=forbidden.nonzero()[:, 0].tolist())
        ids = ids[0, inputs["input_ids"].shape[1]:].tolist()
        n = int(rollout.lens[b]) + int(rollout.stopped[b])
        assert rollout.ids[b, :n].tolist() == ids
        assert bool(rollout.stopped[b]) == (ids[-1] == front_end.stop_id)
        found.add(tuple(ids))
    assert len(found) > 1 and bool(rollout.stopped.any()) == bool(letters)


def test_qwen3_asr_forbidden_ids(qwen):
    """All control tokens and the head's rows beyond the tokenizer, <|endoftext|> too; the stop token not."""
    tokenizer = qwen.processor.tokenizer
    allowed = (~qwen.model.forbidden).nonzero()[:, 0].tolist()
    assert len(qwen.model.forbidden) == qwen.stock.lm_head.out_features == len(tokenizer) + 7
    assert allowed == [*range(256), tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_qwen3_asr_with_the_released_ids(tmp_path):
    """The real tokenizer and 151,936 rows: ids, prompt, logits, forbidden ids, and the language that the
    model itself prefers."""
    tokenizer = qwen3_tokenizer(QWEN3_ASR_TOKENS)
    folder = qwen3_asr_folder(tmp_path / "Qwen3-ASR-0.6B-hf", tokenizer, hidden=16, rows=151_936)
    pair = load_pair(folder, transformers.Qwen3ASRProcessor(
        transformers.Qwen3ASRFeatureExtractor(), tokenizer, chat_template=QWEN3_ASR_TEMPLATE))
    wave = noise(0.99, seed=3)
    front_end, forbidden = pair.model.front_end, pair.model.forbidden
    batch = pair.model.with_languages(collate([wave], front_end, ["zh"]))
    want = [151644, 8948, 198, 151645, 198, 151644, 872, 198, 151669, *[151676] * 13, 151670, 151645, 198,
            151644, 77091, 198, 11528, 8453, 151704]
    assert batch.prompt_ids[0].tolist() == want == request(pair, wave, "zh")["input_ids"][0].tolist()
    assert front_end.stop_id == 151645 and len(forbidden) == 151_936
    assert not forbidden[:151643].any() and forbidden[151643:151645].all() and forbidden[151646:].all()
    text = "今天 is <asr_text> 25 °C"
    targets = front_end.transcripts([text])
    ids = targets.ids[0].tolist()
    assert ids[-1] == 151645 and max(ids[:-1]) < 151643 and front_end.decode(ids[:-1]) == text
    with torch.no_grad():
        ours = pair.model.head(pair.model(batch, targets)[0])
    assert_relative(ours, stock_logits(pair, wave, "zh", ids), 1e-4)
    waves = [noise(s, seed=i) for i, s in enumerate((0.4, 1.3, 2.6))]
    heard = endings(pair.model, pair.model.with_languages(collate(waves, front_end)))
    likeliest = [likeliest_languages(pair, wave) for wave in waves]
    assert heard == [f"language {name}<asr_text>" for name, in likeliest]


def test_qwen3_asr_saved_folder_is_stock(qwen, tmp_path):
    qwen.model.save_pretrained(tmp_path / "saved")
    net, info = transformers.Qwen3ASRForConditionalGeneration.from_pretrained(tmp_path / "saved",
                                                                              output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    want = qwen.stock.state_dict()
    assert net.state_dict().keys() == want.keys()
    assert all(torch.equal(net.state_dict()[name], want[name]) for name in want)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "saved")
    wave = noise(1.3)
    a = processor.apply_transcription_request(wave.numpy(), language="ja", prompt="names")
    b = qwen.processor.apply_transcription_request(wave.numpy(), language="ja", prompt="names")
    assert all(torch.equal(a[key], b[key]) for key in b)
    again = SpeechLM.from_pretrained(tmp_path / "saved")
    assert again.front_end.stop_id == qwen.model.front_end.stop_id
    assert torch.equal(again.forbidden, qwen.model.forbidden)
    assert net.generation_config.eos_token_id == qwen.stock.generation_config.eos_token_id == [256, 258]


# ---- Qwen3-ASR in training ---------------------------------------------------------------------------------
def training_args(clips_dir, out, *more):
    return ["--train", str(clips_dir / "m.jsonl"), "--out", str(out), "--workers", "0", "--steps", "2",
            "--batch-size", "6", "--lr", "1e-3", "--warmup-steps", "0", *map(str, more)]


def opd_metrics(clips_dir, student, teacher, out, *more):
    opd.main(opd.parse_args(training_args(clips_dir, out, "--student", student, "--teacher", teacher,
                                          "--k", 8, "--max-new-tokens", 12, *more)))
    return [json.loads(line) for line in open(out / "metrics.jsonl")]


def assert_trained_qwen(start, trained):
    """`trained` loads as the stock class, and every kind of weight has moved."""
    net, info = transformers.Qwen3ASRForConditionalGeneration.from_pretrained(trained,
                                                                              output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    transformers.AutoProcessor.from_pretrained(trained).apply_transcription_request(noise(0.6).numpy(),
                                                                                    language="en")
    before, after = state(start), state(trained)
    assert before.keys() == after.keys()
    unmoved = [name for name in before if torch.equal(before[name], after[name])]
    assert unmoved == []
    ours = SpeechLM.from_pretrained(trained).net.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in net.state_dict().items())


def test_qwen3_asr_as_student_of_opd(clips_dir, tmp_path, capsys):
    student = qwen3_asr_folder(tmp_path / "student")
    teacher = qwen3_asr_folder(tmp_path / "teacher", seed=1, hidden=48, width=48)
    frozen = (teacher / "model.safetensors").read_bytes()
    lines = opd_metrics(clips_dir, student, teacher, tmp_path / "run", "--eval", clips_dir / "m.jsonl")
    assert len(lines) == 2 and all(line["loss"] > 0 and 8 <= line["vuss"] <= 16 for line in lines)
    assert_trained_qwen(student, tmp_path / "run" / "model")
    assert (teacher / "model.safetensors").read_bytes() == frozen
    shown = capsys.readouterr().out
    assert re.search(r"self-check, teacher: .*\d", shown) and re.search(r"self-check, student: .*\d", shown)


def test_qwen3_asr_as_student_of_sft(clips_dir, tmp_path):
    start = qwen3_asr_folder(tmp_path / "start")
    sft.main(sft.parse_args(training_args(clips_dir, tmp_path / "run", "--model", start)))
    assert_trained_qwen(start, tmp_path / "run" / "model")


def test_qwen3_asr_teaches_an_ark_student(clips_dir, tmp_path):
    """Same bytes, other added tokens and another stop id."""
    tokenizer = byte_tokenizer(specials=[*QWEN3_ASR_TOKENS, *QWEN_SPECIALS])
    teacher = qwen3_asr_folder(tmp_path / "teacher", tokenizer, seed=1)
    tiny_model().save_pretrained(tmp_path / "student")
    lines = opd_metrics(clips_dir, tmp_path / "student", teacher, tmp_path / "run")
    assert len(lines) == 2 and all(line["loss"] > 0 and line["positions"] > 50 for line in lines)
    SpeechLM.from_pretrained(tmp_path / "run" / "model")


def test_the_teachers_prompt_takes_the_language_of_the_rollouts_script(clips_dir, tmp_path, monkeypatch):
    """Without `language` in the manifest; what the student writes is made Russian, the references are not read."""
    import model
    teacher = qwen3_asr_folder(tmp_path / "teacher", byte_tokenizer(specials=[*QWEN3_ASR_TOKENS, *QWEN_SPECIALS]))
    tiny_model().save_pretrained(tmp_path / "student")
    lines = [json.loads(line) for line in open(clips_dir / "m.jsonl")]
    (clips_dir / "m.jsonl").write_text("".join(
        json.dumps({key: value for key, value in line.items() if key != "language"}) + "\n" for line in lines))
    languages, score = [], opd.score_rollout
    monkeypatch.setattr(model.FrontEnd, "texts", lambda self, rollout: ["Привет"] * len(rollout.lens))
    monkeypatch.setattr(opd, "score_rollout", lambda *args: languages.extend(args[3].languages) or score(*args))
    opd_metrics(clips_dir, tmp_path / "student", teacher, tmp_path / "run", "--steps", 1, "--sample-every", 0)
    assert languages == ["ru"] * 6 * 2                                  # the trial of the longest clips, the step


@pytest.mark.parametrize("field,value", [("rms_norm_eps", 1e-5), ("max_position_embeddings", 777)])
def test_ark_config_fields_are_taken_over(field, value, tmp_path):
    text = SpeechLM.from_pretrained(ark_folder(tmp_path / "ark", **{field: value})).net.config.text_config
    assert getattr(text, field) == value


def test_qwen3_asr_teacher_scores_are_stocks(tmp_path):
    """Top-k ids and raw logits on the union, for an Ark student's ids: stock's logits of the same bytes."""
    tokenizer = byte_tokenizer(specials=[*QWEN3_ASR_TOKENS, *QWEN_SPECIALS])
    pair, student = load_pair(qwen3_asr_folder(tmp_path / "t", tokenizer, seed=1)), tiny_model()
    waves, texts, k = [noise(0.4), noise(2.3, seed=1)], ["hello", "今"], 6
    alignment = align_vocabularies(student, pair.model)
    rollout = student.front_end.transcripts(texts)
    batch = pair.model.with_languages(collate(waves, pair.model.front_end, ["en", "zh"]))
    student_topk = torch.randperm(256, generator=torch.Generator().manual_seed(0))[:60].reshape(10, 6)
    student_topk[3, 0], student_topk[4, 1] = student.front_end.stop_id, -1
    with torch.no_grad():
        hidden = pair.model(batch, teacher_rollout(rollout, alignment))[0]
        ids, mask, scores, teacher_topk = teacher_support(pair.model, hidden, student_topk, alignment, k)
    stop, row = tokenizer.convert_tokens_to_ids("<|im_end|>"), 0
    assert stop != student.front_end.stop_id
    to_teacher = {**{i: i for i in range(256)}, student.front_end.stop_id: stop}
    for wave, text, language in zip(waves, texts, ("en", "zh")):
        target = [*pair.model.front_end.encode_text(text), stop]
        for logits in stock_logits(pair, wave, language, target):
            allowed = logits[[*range(256), stop]]
            top = [student.front_end.stop_id if i == 256 else int(i) for i in allowed.topk(k).indices]
            assert teacher_topk[row].tolist() == top
            union = sorted({*top, *student_topk[row].tolist()} - {-1})
            assert ids[row][mask[row]].tolist() == union
            want = logits[[to_teacher[i] for i in union]]
            assert float((scores[row][mask[row]] - want).abs().max()) <= 1e-4 * float(logits.abs().max())
            row += 1
    assert row == 10


# ---- the released ARK-ASR ----------------------------------------------------------------------------------
def rotate_pairs(x):
    """Rotary of interleaved pairs (0, 1), (2, 3), … in the first half of each head: (T, heads, d)."""
    half = x.shape[2] // 2
    angle = torch.arange(len(x))[:, None] / 10_000 ** (torch.arange(0, half, 2) / half)
    z = torch.view_as_complex(x[..., :half].reshape(*x.shape[:2], half // 2, 2).contiguous())
    z = z * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([torch.view_as_real(z).flatten(2), x[..., half:]], dim=2)


def ark_oracle(w, mel, heads=2):
    """Encoder frames (T', D) and audio embeddings (A, H) of one clip's mel (128, F), as the release computes
    them."""
    def linear(name, x):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", torch.zeros(()))

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"])

    audio = "audio_encoder.whisper"
    x = F.gelu(F.conv1d(mel[None], w[f"{audio}.conv1.weight"], w[f"{audio}.conv1.bias"], padding=1))
    x = F.gelu(F.conv1d(x, w[f"{audio}.conv2.weight"], w[f"{audio}.conv2.bias"], stride=2, padding=1))[0].T
    for n in (0, 1):
        name = f"{audio}.layers.{n}"
        h = norm(f"{name}.self_attn_layer_norm", x)
        q, k, v = (linear(f"{name}.self_attn.{p}_proj", h).reshape(len(h), heads, -1) for p in "qkv")
        weights = torch.einsum("qhd,khd->hqk", rotate_pairs(q), rotate_pairs(k)) / q.shape[2] ** 0.5
        mixed = torch.einsum("hqk,khd->qhd", weights.softmax(-1), v).flatten(1)
        x = x + linear(f"{name}.self_attn.out_proj", mixed)
        h = norm(f"{name}.final_layer_norm", x)
        x = x + linear(f"{name}.fc2", F.gelu(linear(f"{name}.fc1", h)))
    frames = norm("audio_encoder.layer_norm", x)
    merged = frames[:len(frames) // 4 * 4].reshape(-1, 4 * frames.shape[1])
    return frames, linear("audio_encoder.adapting.2", F.gelu(linear("audio_encoder.adapting.0", merged)))


def assert_relative(got, want, tolerance=1e-5):
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= tolerance * float(want.abs().max())


def test_ark_encoder_and_adapter_equal_the_release(tmp_path):
    model = SpeechLM.from_pretrained(ark_folder(tmp_path / "ark")).eval()
    w = state(tmp_path / "ark")
    waves = [noise(0.31), noise(3.0, seed=1), noise(1.7, seed=2)]
    batch = collate(waves, model.front_end)
    assert batch.audio_lens.tolist() == [4, 37, 21]
    with torch.no_grad():
        embeds, frames, frame_lens = model.encode(batch)                    # embeds: all clips' rows in order
    embeds = embeds.split(batch.audio_lens.tolist())
    for b in range(3):
        want_frames, want_embeds = ark_oracle(w, batch.mel[b, :, :int(batch.mel_lens[b])])
        assert_relative(frames[b, :int(frame_lens[b])], want_frames)
        assert_relative(embeds[b], want_embeds[:len(embeds[b])])


def test_ark_lm_equals_stock_qwen2(tmp_path):
    """Every LM weight, the RoPE base of the flat config, tied head: logits on random ids."""
    model = SpeechLM.from_pretrained(ark_folder(tmp_path / "ark")).eval()
    w = {name: tensor for name, tensor in state(tmp_path / "ark").items() if name.startswith("model.")}
    net = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=len(w["model.embed_tokens.weight"]), rms_norm_eps=1e-6,
        rope_parameters=dict(rope_type="default", rope_theta=1e6), tie_word_embeddings=True)).eval()
    net.load_state_dict({**w, "lm_head.weight": w["model.embed_tokens.weight"]})
    lm = model.lm.state_dict()
    assert {f"model.{name}" for name in lm} == set(w)
    assert all(torch.equal(lm[name.removeprefix("model.")], tensor) for name, tensor in w.items())
    assert torch.equal(model.head.weight, w["model.embed_tokens.weight"])
    ids = torch.randint(256, (2, 90), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_relative(model.head(model.lm(input_ids=ids).last_hidden_state), net(ids).logits)


def imported(folder):
    return SpeechLM.from_pretrained(folder).net.state_dict()


def assert_same_state(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_ark_files_of_every_kind_give_the_same_model(tmp_path):
    """lm_head stored or not, one file or three shards; bf16 gives the float32 of its values."""
    rows = len(byte_tokenizer()) + 5
    want = imported(ark_folder(tmp_path / "one"))
    assert_same_state(imported(ark_folder(tmp_path / "head", tensors=ark_tensors(rows, lm_head=True))), want)
    assert_same_state(imported(ark_folder(tmp_path / "shards", shards=3)), want)
    half = {name: tensor.bfloat16() for name, tensor in ark_tensors(rows).items()}
    got = imported(ark_folder(tmp_path / "half", tensors=half))
    assert all(tensor.dtype == torch.float32 for tensor in got.values())
    assert_same_state(got, {name: tensor.bfloat16().float() for name, tensor in want.items()})
    kept = SpeechLM.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    assert_same_state({name: tensor.float() for name, tensor in kept.net.state_dict().items()}, got)


@pytest.mark.parametrize("key,native", [
    ("audio_encoder.whisper.layers.1.self_attn.q_proj.bias", "audio_tower.layers.1.self_attn.q_proj.bias"),
    ("audio_encoder.whisper.layers.0.fc2.weight", "audio_tower.layers.0.mlp.fc2.weight"),
    ("audio_encoder.adapting.2.weight", "multi_modal_projector.linear_2.weight"),
    ("audio_encoder.layer_norm.bias", "audio_tower.norm.bias"),
    ("model.layers.0.mlp.up_proj.weight", "language_model.layers.0.mlp.up_proj.weight"),
    ("model.embed_tokens.weight", "language_model.embed_tokens.weight")])
def test_ark_missing_key_is_an_error(tmp_path, key, native):
    tensors = ark_tensors(len(byte_tokenizer()) + 5)
    del tensors[key]
    message = error_of(SpeechLM.from_pretrained, ark_folder(tmp_path / "ark", tensors))
    assert str(tmp_path / "ark") in message and (key in message or native in message)


@pytest.mark.parametrize("key", ["audio_encoder.whisper.layers.2.fc1.weight",
                                 "audio_encoder.whisper.conv3.bias", "audio_encoder.adapting.4.weight",
                                 "model.layers.0.self_attn.q_norm.weight", "speech_head.weight"])
def test_ark_unknown_key_is_an_error(tmp_path, key):
    tensors = {**ark_tensors(len(byte_tokenizer()) + 5), key: torch.ones(3)}
    message = error_of(SpeechLM.from_pretrained, ark_folder(tmp_path / "ark", tensors))
    assert str(tmp_path / "ark") in message and key.split(".")[-2] in message


def test_ark_wrong_shape_and_nan_are_errors(tmp_path):
    tensors = ark_tensors(len(byte_tokenizer()) + 5)
    bad = {**tensors, "audio_encoder.adapting.0.weight": torch.ones(64, 96)}
    error_of(SpeechLM.from_pretrained, ark_folder(tmp_path / "shape", tensors=bad))
    bad = {**tensors, "audio_encoder.whisper.conv1.bias": torch.full((32,), torch.nan)}
    assert "NaN" in error_of(SpeechLM.from_pretrained, ark_folder(tmp_path / "nan", tensors=bad))


def test_ark_saved_folder_is_stock_glmasr(tmp_path):
    model = SpeechLM.from_pretrained(ark_folder(tmp_path / "ark")).eval()
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["model_type"] == "glmasr" and "auto_map" not in config
    net, info = transformers.GlmAsrForConditionalGeneration.from_pretrained(tmp_path / "saved",
                                                                            output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    batch = collate([noise(1.2)], model.front_end)
    with torch.no_grad():
        got = net.model.multi_modal_projector(
            net.model.audio_tower(batch.mel).last_hidden_state.reshape(1, -1, 128))[0]
    assert_relative(got, ark_oracle(state(tmp_path / "ark"), batch.mel[0])[1])
    assert_same_state(imported(tmp_path / "saved"), model.net.state_dict())
    audio = dict(padding="longest", pad_to_multiple_of=1280)
    inputs = transformers.AutoProcessor.from_pretrained(tmp_path / "saved").apply_transcription_request(
        noise(1.2).numpy(), processor_kwargs=dict(audio_kwargs=audio))
    assert inputs["input_ids"][0].tolist() == batch.prompt_ids[0].tolist()
    ids = net.generate(**inputs, max_new_tokens=10)[0, inputs["input_ids"].shape[1]:].tolist()
    rollout = model.sample(batch, 10)
    assert ids == rollout.ids[0].tolist()


def test_ark_with_the_released_ids(tmp_path):
    tensors = ark_tensors(151_936, hidden=16)
    model = SpeechLM.from_pretrained(ark_folder(tmp_path / "ark", tensors, hidden=16, released_ids=True))
    front_end = model.front_end
    prompt = collate([noise(3.0)], front_end).prompt_ids[0].tolist()
    assert prompt[:2] == [151665, 151666] and prompt[2:39] == [151663] * 37 and prompt[39] == 151667
    assert prompt[-1] == 151668 and front_end.decode(prompt[40:-1]) == "Please transcribe this audio."
    assert (front_end.pad_id, front_end.stop_id) == (151643, 151645)
    assert not model.forbidden[:151643].any() and model.forbidden[151646:].all()
    assert model.forbidden[151643:151646].tolist() == [True, True, False]
    assert len(model.forbidden) == model.head.out_features == 151_936
    assert torch.equal(model.lm.embed_tokens.weight, tensors["model.embed_tokens.weight"])


# ---- a new student from parts ------------------------------------------------------------------------------
def assert_parts(model, encoder, lm, lm_tokens):
    """`model` has the encoder and LM of those folders, an adapter of its own, and sound new rows."""
    donor = transformers.GlmAsrForConditionalGeneration.from_pretrained(encoder)
    assert_same_state(dict(model.encoder.state_dict()), dict(donor.model.audio_tower.state_dict()))
    w = state(lm)
    for name, tensor in model.lm.state_dict().items():
        if name != "embed_tokens.weight":
            assert torch.equal(tensor, w[f"model.{name}"]), name
    embed, head = w["model.embed_tokens.weight"], w.get("lm_head.weight", w["model.embed_tokens.weight"])
    tokenizer, names = model.front_end.tokenizer, ["<|audio|>", "<|user|>", "<|begin_of_audio|>",
                                                   "<|end_of_audio|>", "<|assistant|>"]
    new = tokenizer.convert_tokens_to_ids(names)
    assert len(set(new)) == 5 and min(new) >= lm_tokens and len(tokenizer) == lm_tokens + 5
    for matrix, old in ((model.lm.embed_tokens.weight, embed), (model.head.weight, head)):
        assert torch.equal(matrix[:lm_tokens], old[:lm_tokens])
        rows = matrix[new].detach()
        assert rows.isfinite().all() and float(rows.norm(dim=1).min()) > 0.1 * float(
            old[:lm_tokens].norm(dim=1).mean())
        assert float(torch.pdist(rows).min()) > 1e-3 * float(rows.norm(dim=1).mean())
    adapter = model.adapter.linear_1.weight
    assert adapter.shape == (2 * model.lm.config.hidden_size, 4 * model.encoder.config.hidden_size)
    assert adapter.isfinite().all() and float(adapter.detach().std()) > 0
    assert model.lm.config.model_type == "qwen3" and model.lm.config.rope_parameters["rope_theta"] == 1e6


@pytest.mark.parametrize("rows,tied", [(None, True), (259, True), (None, False)])
def test_from_parts(tmp_path, rows, tied):
    """An LM with spare rows, one with a row for each token, one with an untied head."""
    encoder = glm_asr_nano_folder(tmp_path / "GLM-ASR-Nano-2512")
    lm = qwen3_lm_folder(tmp_path / "Qwen3-0.6B", rows=rows, tied=tied)
    model = SpeechLM.from_parts(encoder, lm).eval()
    assert_parts(model, encoder, lm, 259)
    assert (model.head.weight is model.lm.embed_tokens.weight) == tied
    batch = collate([noise(0.5), noise(1.4, seed=1)], model.front_end)
    with torch.no_grad():
        rows = model(batch, model.front_end.transcripts(["ab", "c"]))[0]
    assert rows.shape == (5, 32) and rows.isfinite().all()
    model.save_pretrained(tmp_path / "saved")
    net, info = transformers.GlmAsrForConditionalGeneration.from_pretrained(tmp_path / "saved",
                                                                            output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_state(imported(tmp_path / "saved"), model.net.state_dict())


def test_from_parts_takes_the_encoder_of_the_released_ark(tmp_path):
    lm = qwen3_lm_folder(tmp_path / "lm", hidden=48)
    model = SpeechLM.from_parts(ark_folder(tmp_path / "ark"), lm).eval()
    batch = collate([noise(1.0)], model.front_end)
    with torch.no_grad():
        embeds, frames, _ = model.encode(batch)
    assert_relative(frames[0], ark_oracle(state(tmp_path / "ark"), batch.mel[0])[0])
    assert embeds.shape[-1] == 48


def test_from_parts_refuses_what_does_not_fit(tmp_path):
    encoder, lm = glm_asr_nano_folder(tmp_path / "encoder"), qwen3_lm_folder(tmp_path / "lm")
    assert str(lm) in error_of(SpeechLM.from_parts, lm, lm)                 # no encoder in there
    assert str(encoder) in error_of(SpeechLM.from_parts, encoder, encoder)  # no causal LM in there
    assert "nowhere" in error_of(SpeechLM.from_parts, encoder, tmp_path / "nowhere")


def test_from_parts_is_a_function_of_the_seed(tmp_path):
    """Every rank builds it alone: the drawn rows and the adapter must be the same."""
    encoder, lm = glm_asr_nano_folder(tmp_path / "encoder"), qwen3_lm_folder(tmp_path / "lm", tied=False)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(SpeechLM.from_parts(encoder, lm).net.state_dict())
    assert_same_state(found[0], found[1])
    differ = {name for name in found[0] if not torch.equal(found[0][name], found[2][name])}
    assert differ == {"lm_head.weight", "model.language_model.embed_tokens.weight",
                      *(f"model.multi_modal_projector.linear_{i}.weight" for i in (1, 2))}


def test_sft_from_parts(clips_dir, tmp_path):
    encoder, lm = glm_asr_nano_folder(tmp_path / "encoder"), qwen3_lm_folder(tmp_path / "lm")
    args = training_args(clips_dir, tmp_path / "run", "--encoder", encoder, "--lm", lm)
    sft.main(sft.parse_args(args))
    trained = SpeechLM.from_pretrained(tmp_path / "run" / "model")
    donor = transformers.GlmAsrForConditionalGeneration.from_pretrained(encoder)
    assert trained.lm.config.model_type == "qwen3"
    with torch.no_grad():
        moved = float((trained.encoder.conv1.weight - donor.model.audio_tower.conv1.weight).abs().max())
    assert 0 < moved < 0.01                                         # the donor's weights, two steps on
    error_of(sft.main, sft.parse_args(training_args(clips_dir, tmp_path / "x", "--encoder", encoder)))
    error_of(sft.main, sft.parse_args([*args[:2], "--out", str(tmp_path / "y"), "--encoder", str(encoder),
                                       "--lm", str(lm), "--model", str(tmp_path / "run" / "model")]))


# ---- refusals ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", ["1.7B", "0.6B"])
def test_original_qwen3_asr_is_refused_with_the_name_of_its_conversion(tmp_path, size):
    message = error_of(SpeechLM.from_pretrained, thinker_folder(tmp_path, f"Qwen3-ASR-{size}"))
    assert f"Qwen/Qwen3-ASR-{size}-hf" in message and "thinker" in message


def test_other_models_are_refused(tmp_path):
    assert "llama" in error_of(SpeechLM.from_pretrained, glm_asr_nano_folder(tmp_path / "nano"))
    assert "qwen3" in error_of(SpeechLM.from_pretrained, qwen3_lm_folder(tmp_path / "lm"))
    folder = ark_folder(tmp_path / "merge", merge_factor=2)
    error_of(SpeechLM.from_pretrained, folder)
    (tmp_path / "empty").mkdir()
    assert "empty" in error_of(SpeechLM.from_pretrained, tmp_path / "empty")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    assert "broken" in error_of(SpeechLM.from_pretrained, tmp_path / "broken")


class Trap:
    """Unpickling it makes a file."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def folder_of(kind, folder):
    if kind == "glmasr":
        tiny_model().save_pretrained(folder)
    else:
        dict(qwen3_asr=qwen3_asr_folder, ark=ark_folder, lm=qwen3_lm_folder)[kind](folder)
    return folder


@pytest.mark.parametrize("kind", ["qwen3_asr", "glmasr", "ark"])
def test_pickled_weights_are_never_read(tmp_path, kind):
    """A folder with .bin weights instead of safetensors is refused, and nothing in it runs."""
    folder = folder_of(kind, tmp_path / "model")
    tensors = state(folder)
    os.remove(folder / "model.safetensors")
    assert "safetensors" in error_of(SpeechLM.from_pretrained, folder)
    torch.save(tensors, folder / "pytorch_model.bin")
    assert "safetensors" in error_of(SpeechLM.from_pretrained, folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    error_of(SpeechLM.from_pretrained, folder)
    assert not (tmp_path / "ran").exists()


def write_remote_code(folder, made, **changes):
    """A module that makes the file `made` when imported, named by every auto_map of `folder`.
    changes: {"config": {field: value}, …}, further fields of those files."""
    names = dict(AutoConfig="remote.RemoteConfig", AutoModel="remote.RemoteModel",
                 AutoModelForCausalLM="remote.RemoteModel", AutoProcessor="remote.RemoteProcessor",
                 AutoFeatureExtractor="remote.RemoteExtractor",
                 AutoTokenizer=["remote.RemoteTokenizer", None])
    (folder / "remote.py").write_text(f"open({str(made)!r}, 'w').close()\n")
    for name in ("config", "tokenizer_config", "processor_config"):
        path = folder / f"{name}.json"
        if path.exists():
            config = {**json.loads(path.read_text()), "auto_map": names, **changes.get(name, {})}
            path.write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["ark", "qwen3_asr", "glmasr"])
def test_remote_code_is_ignored(tmp_path, monkeypatch, kind):
    """Not run, even where somebody answers yes to a question, and not asked for by what is saved."""
    folder = folder_of(kind, tmp_path / "model")
    write_remote_code(folder, tmp_path / "ran")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    SpeechLM.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "ran").exists() and not list((tmp_path / "saved").glob("*.py"))
    shutil.copy(folder / "remote.py", tmp_path / "saved")
    transformers.AutoProcessor.from_pretrained(tmp_path / "saved")
    transformers.AutoConfig.from_pretrained(tmp_path / "saved")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["ark", "qwen3_asr", "glmasr", "lm"])
def test_remote_code_for_unknown_classes_is_not_even_offered(tmp_path, monkeypatch, kind):
    """Tokenizer, processor and LM of classes that only the remote code has: an error or the stock class, no
    question whether to run it."""
    folder = folder_of(kind, tmp_path / "model")
    unknown = dict(tokenizer_class="RemoteTokenizer", processor_class="RemoteProcessor")
    changes = dict(config=dict(model_type="remote")) if kind == "lm" else {}
    write_remote_code(folder, tmp_path / "ran", tokenizer_config=unknown, processor_config=unknown, **changes)
    encoder = glm_asr_nano_folder(tmp_path / "encoder")
    answers = io.StringIO("y\n" * 20)
    monkeypatch.setattr(sys, "stdin", answers)
    try:
        SpeechLM.from_parts(encoder, folder) if kind == "lm" else SpeechLM.from_pretrained(folder)
    except InputError as error:
        assert str(folder) in str(error)
    assert answers.tell() == 0 and not (tmp_path / "ran").exists()


# ---- hub names ---------------------------------------------------------------------------------------------
HUB_SCRIPT = """
import json, sys, time
import huggingface_hub.constants
from data import InputError
from model import SpeechLM
for offline in (False, True):
    huggingface_hub.constants.HF_HUB_OFFLINE = offline
    for name in sys.argv[1:]:
        start = time.perf_counter()
        try:
            message = "loaded " + SpeechLM.from_pretrained(name).net.config.model_type
        except InputError as error:
            message = str(error)
        print(json.dumps([name, time.perf_counter() - start, message]))
"""


def put_in_cache(home, name, folder, keep=lambda file: True):
    """`folder` as huggingface_hub lays out a download of `name` below HF_HOME: blobs, a snapshot of links, a
    ref."""
    root, sha = home / "hub" / ("models--" + name.replace("/", "--")), "0123456789abcdef" * 2 + "01234567"
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(sha)
    (root / "snapshots" / sha).mkdir(parents=True)
    for i, file in enumerate(sorted(filter(keep, folder.iterdir()))):
        shutil.copy(file, root / "blobs" / f"{i:040x}")
        os.symlink(f"../../blobs/{i:040x}", root / "snapshots" / sha / file.name)


def test_hub_names(tmp_path):
    """With the hub unreachable, then with HF_HUB_OFFLINE: a name in the cache loads, one that is not says how
    to get it, in under 5 s."""
    home = tmp_path / "home"
    put_in_cache(home, "Qwen/Qwen3-ASR-9.9B-hf", qwen3_asr_folder(tmp_path / "qwen"))
    put_in_cache(home, "someone/ARK-ASR-tiny", ark_folder(tmp_path / "ark", shards=2))
    put_in_cache(home, "Qwen/Qwen3-ASR-1.7B", thinker_folder(tmp_path / "original"))
    put_in_cache(home, "someone/half", tmp_path / "qwen", lambda file: file.suffix != ".safetensors")
    names = ["Qwen/Qwen3-ASR-9.9B-hf", "someone/ARK-ASR-tiny", "Qwen/Qwen3-ASR-1.7B", "someone/half",
             "Nobody/no-such-model"]
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_HOME": str(home), "HF_ENDPOINT": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", HUB_SCRIPT, *names], capture_output=True, text=True,
                          cwd=ROOT, env=env, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == names * 2
    for name, seconds, message in lines:
        assert "\n" not in message and seconds < 5
        if name == "Qwen/Qwen3-ASR-1.7B":
            assert "Qwen/Qwen3-ASR-1.7B-hf" in message
        elif name == "someone/half":
            assert name in message.replace("--", "/") and "safetensors" in message
        elif name == "Nobody/no-such-model":
            assert "hf download Nobody/no-such-model" in message and "folder" in message
        else:
            assert message == ("loaded qwen3_asr" if "Qwen" in name else "loaded glmasr")


# ---- languages ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text,code", [
    ("今天天气很好", "zh"), ("設定三十度", "zh"), ("打开 WiFi", "zh"), ("OK 好", "zh"), ("今日は", "ja"),
    ("カメラ", "ja"), ("ひらがな", "ja"), ("ﾃｽﾄ", "ja"), ("東京へ行く", "ja"), ("안녕하세요", "ko"), ("漢字 안녕", "ko"),
    ("hello world", "en"), ("don't", "en"), ("über", "en"), ("Ｈｅｌｌｏ", "en"), ("Привет, мир", "ru"),
    ("สวัสดีครับ", "th"), ("ภาษาไทย", "th"), ("مرحبا", "ar"), ("Καλημέρα", "el"), ("नमस्ते", "hi"),
    ("Привет ok", "ru"), ("<|im_end|>", None), ("<asr_text>", None), ("<|audio_pad|><|im_end|>", None),
    ("<|im_end|>Привет", "ru"), ("да<|endoftext|><|im_end|>", "ru"), ("<asr_text>好", "zh"),
    ("<asr_text>ก", "th"), ("", None), ("   ", None), ("25 + 3 = 28", None), ("...!?", None), ("，。！", None),
    ("😀", None), ("language", "en"), ("你好<asr_text>", "zh"), ("x<y", "en"), ("3 < 5, да", "ru")])
def test_script_language(text, code):
    assert script_language(text) == code


@pytest.mark.parametrize("name,code", [
    ("Chinese", "zh"), ("zh", "zh"), ("zh-CN", "zh"), ("zh_TW", "zh"), ("zh-Hans-CN", "zh"), ("ZH", "zh"),
    ("mandarin", "zh"), ("yue", "yue"), ("Cantonese", "yue"), ("yue-HK", "yue"), ("English", "en"),
    ("en", "en"), ("en-US", "en"), ("EN_gb", "en"), (" english ", "en"), ("japanese", "ja"), ("Korean", "ko"),
    ("Filipino", "fil"), ("fil", "fil"), ("Persian", "fa"), ("Greek", "el"), ("Malay", "ms"),
    ("Macedonian", "mk"), ("de-AT", "de"), ("pt-BR", "pt"), ("Czech", "cs"), (None, None), ("", None)])
def test_language_code(name, code):
    assert language_code(name) == code


def endings(model, batch):
    """The text of each prompt from the assistant's turn on."""
    texts = [model.front_end.tokenizer.decode(ids[mask])
             for ids, mask in zip(batch.prompt_ids, batch.prompt_mask)]
    return [text.split("<|im_start|>assistant\n")[1] for text in texts]


def test_all_thirty_languages_are_named_as_the_processor_does(qwen):
    batch = qwen.model.with_languages(collate([noise(0.5)] * 30, qwen.model.front_end, NAMES))
    assert endings(qwen.model, batch) == [f"language {name}<asr_text>" for name in NAMES]
    codes = [language_code(name) for name in NAMES]
    assert len(set(codes)) == 30
    batch = qwen.model.with_languages(collate([noise(0.5)] * 30, qwen.model.front_end, codes))
    assert endings(qwen.model, batch) == [f"language {name}<asr_text>" for name in NAMES]


def likeliest_languages(pair, wave):
    """The names that begin with the token which stock finds likeliest after "language ": one, where names
    differ in their first token."""
    prompts = {name: request(pair, wave, name) for name in NAMES}
    ids = [inputs["input_ids"][0].tolist() for inputs in prompts.values()]
    split = len(os.path.commonprefix(ids))
    inputs = prompts["English"]
    inputs["input_ids"], inputs["attention_mask"] = (inputs[key][:, :split] for key in ("input_ids",
                                                                                      "attention_mask"))
    with torch.no_grad():
        logits = pair.stock(**inputs).logits[0, -1]
    best = max(float(logits[row[split]]) for row in ids)
    return [name for name, row in zip(NAMES, ids) if float(logits[row[split]]) == best]


def test_languages_from_manifest_else_script_else_the_model(qwen):
    model, waves = qwen.model, [noise(s, seed=i) for i, s in enumerate((0.4, 1.3, 0.8, 2.0, 3.1))]
    batch = collate(waves, model.front_end, ["German", None, None, "en", None])
    done = model.with_languages(batch, ["今天", "Привет", "<|im_end|>", "今天", "42"])
    names = [ending.removeprefix("language ").removesuffix("<asr_text>") for ending in endings(model, done)]
    assert (names[0], names[1], names[3]) == ("German", "Russian", "English")
    assert names[2] in likeliest_languages(qwen, waves[2]) and names[4] in likeliest_languages(qwen, waves[4])
    done = model.with_languages(collate(waves, model.front_end))
    names = [ending.removeprefix("language ").removesuffix("<asr_text>") for ending in endings(model, done)]
    assert all(name in likeliest_languages(qwen, wave) for name, wave in zip(names, waves))
    again = model.with_languages(done, ["今天"] * 5)                          # known now: nothing to decide
    assert torch.equal(again.prompt_ids, done.prompt_ids) and torch.equal(again.prompt_mask, done.prompt_mask)
    with torch.no_grad():                                                   # and the prompts are whole
        rows = model.head(model(done, model.front_end.transcripts(["a"] * 5))[0])
    ids = [*model.front_end.encode_text("a"), model.front_end.stop_id]
    for b, wave in enumerate(waves):
        assert_relative(rows[2 * b:2 * b + 2], stock_logits(qwen, wave, names[b], ids), 1e-4)


def test_ark_prompts_name_no_language():
    model, waves = tiny_model(), [noise(0.5), noise(1.1, seed=1)]
    plain, named = collate(waves, model.front_end), collate(waves, model.front_end, ["zh", "xx"])
    done = model.with_languages(named, ["今天", ""])
    assert torch.equal(plain.prompt_ids, named.prompt_ids) and torch.equal(done.prompt_ids, plain.prompt_ids)
    assert torch.equal(done.prompt_mask, plain.prompt_mask)


def write_manifest(clips_dir, name, **changes):
    """m.jsonl with fields of line 5 changed."""
    lines = [json.loads(line) for line in open(clips_dir / "m.jsonl")]
    lines[4].update(changes)
    (clips_dir / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return clips_dir / name


def test_a_language_without_a_name_is_an_error_with_its_line(clips_dir, tmp_path):
    manifest = write_manifest(clips_dir, "bad.jsonl", language="tlh")
    qwen3_asr_folder(tmp_path / "teacher")
    tiny_model().save_pretrained(tmp_path / "student")
    args = training_args(clips_dir, tmp_path / "run", "--student", tmp_path / "student", "--teacher",
                         tmp_path / "teacher")
    args[1] = str(manifest)
    for message in (error_of(opd.main, opd.parse_args(args)),
                    error_of(evaluation.main, evaluation.parse_args(
                        ["--model", str(tmp_path / "teacher"), "--data", str(manifest), "--out",
                         str(tmp_path / "scores")]))):
        assert f"{manifest}:5" in message and "tlh" in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    evaluation.main(evaluation.parse_args(["--model", str(tmp_path / "student"), "--data", str(manifest)]))


def test_eval_uses_the_manifests_language(clips_dir, tmp_path):
    """The transcript of every clip is stock's under the language that the manifest names."""
    pair = load_pair(qwen3_asr_folder(tmp_path / "model", seed=2))
    lines = [json.loads(line) for line in open(clips_dir / "m.jsonl")][:3]
    for line, language in zip(lines, ("zh-CN", "German", "en")):
        line["language"] = language
    (clips_dir / "three.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation.main(evaluation.parse_args(["--model", str(tmp_path / "model"), "--data",
                                           str(clips_dir / "three.jsonl"), "--out", str(tmp_path / "scores"),
                                           "--max-new-tokens", "10"]))
    results = [json.loads(line) for line in open(tmp_path / "scores" / "three.jsonl")]
    suppress = pair.model.forbidden.nonzero()[:, 0].tolist()
    for i, (result, language) in enumerate(zip(results, ("Chinese", "German", "English"))):
        inputs = request(pair, noise(0.3 + 0.17 * i, seed=i), language)
        ids = pair.stock.generate(**inputs, do_sample=False, max_new_tokens=10, suppress_tokens=suppress,
                                  eos_token_id=pair.model.front_end.stop_id)
        ids = ids[0, inputs["input_ids"].shape[1]:].tolist()
        assert result["hyp"] == pair.model.front_end.decode([i for i in ids if i < 256])


# ---- self-check --------------------------------------------------------------------------------------------
CHECK_S = [0.5, 1.3, 0.8, 2.2]


@pytest.fixture(params=["ark", "qwen3_asr"])
def either(request, tmp_path):
    """A model of each kind, and clips of mixed length with their languages."""
    waves = [noise(s, seed=i) for i, s in enumerate(CHECK_S)]
    if request.param == "ark":
        return tiny_model(), waves, [None] * 4
    model = SpeechLM.from_pretrained(qwen3_asr_folder(tmp_path / "m")).eval()
    return model, waves, ["en", "zh", None, "German"]


def test_self_check_passes(either):
    model, waves, languages = either
    figures = self_check(model, waves, languages)
    assert {"nll", "agreement", "batch_difference"} <= set(figures)
    assert 0.99 <= figures["agreement"] <= 1 and 0 <= figures["batch_difference"] < 1e-3
    batch = model.with_languages(collate(waves, model.front_end, languages))
    rollout = model.sample(batch, 32)
    with torch.no_grad():
        logits = model.head(model(batch, rollout)[0])
    logp = logits.masked_fill(model.forbidden, -torch.inf).log_softmax(-1)
    nll = -logp[torch.arange(len(logp)), rollout.ids[rollout.row_mask()]].mean()
    assert figures["nll"] == pytest.approx(float(nll), rel=1e-3)


def test_self_check_stops_at_a_shifted_row(either):
    """The row of the next token is taken for this one's: the classic misalignment."""
    model, waves, languages = either
    stock = model.forward

    def shifted(batch, rollout):
        rows, *rest = stock(batch, rollout)
        clips = rows.split((rollout.lens + rollout.stopped).tolist())       # each clip's own rows, one late
        return (torch.cat([clip.roll(1, 0) for clip in clips]), *rest)

    model.forward = shifted
    error_of(self_check, model, waves, languages)


def test_self_check_stops_where_batch_mates_leak(either):
    model, waves, languages = either
    stock = model.encode

    def leaky(batch):
        embeds, *rest = stock(batch)
        return (embeds + 0.3 * (embeds.mean(dim=0, keepdim=True) - embeds), *rest)

    model.encode = leaky
    error_of(self_check, model, waves, languages)


def test_self_check_stops_where_the_encoder_ignores_its_mask():
    """Stock GlmAsr's defect: padding of the batch is attended to."""
    model, waves = tiny_model(), [noise(s, seed=i) for i, s in enumerate(CHECK_S)]
    stock = model.encode
    model.encode = lambda batch: stock(dataclasses.replace(
        batch, mel_lens=torch.full_like(batch.mel_lens, batch.mel.shape[2])))
    error_of(self_check, model, waves, [None] * 4)


def test_self_check_stops_at_nan(either):
    model, waves, languages = either
    with torch.no_grad():
        model.lm.norm.weight[0] = torch.nan
    error_of(self_check, model, waves, languages)


def test_scripts_stop_at_a_failed_self_check(clips_dir, tmp_path, monkeypatch):
    """opd.py checks teacher and student before it makes a step."""
    tiny_model().save_pretrained(tmp_path / "m")
    stock = SpeechLM.forward
    monkeypatch.setattr(SpeechLM, "forward", lambda self, batch, rollout: tuple(
        x.roll(1, 0) if i == 0 else x for i, x in enumerate(stock(self, batch, rollout))))
    error_of(opd_metrics, clips_dir, tmp_path / "m", tmp_path / "m", tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# ---- real recordings, real vocabulary ----------------------------------------------------------------------
@pytest.mark.slow
def test_from_parts_with_the_real_tokenizer(tmp_path):
    """Qwen3's 151,936 rows hold the new tokens: no row is added, the text's ids stay."""
    tokenizer, encoder = qwen3_tokenizer(), glm_asr_nano_folder(tmp_path / "encoder")
    lm = qwen3_lm_folder(tmp_path / "Qwen3-0.6B", tokenizer, hidden=16, rows=151_936)
    model = SpeechLM.from_parts(encoder, lm)
    assert_parts(model, encoder, lm, 151_669)
    assert model.head.out_features == 151_936
    assert model.front_end.encode_text("今天 hello") == tokenizer("今天 hello")["input_ids"]


@pytest.mark.slow
def test_real_vocabulary_run(tmp_path):
    """20 steps of opd.py with 151,936 rows on both sides, Mandarin and English recordings: under 5 minutes
    and 4 GB, and the loss falls."""
    manifests = [DATA / name / "manifest.jsonl" for name in ("aishell_sample", "en_prompts")]
    for manifest in manifests:
        if not manifest.exists():
            pytest.skip(f"no {manifest}: set ASR_OPD_DATA to a folder with aishell_sample and en_prompts")
    qwen3_asr_folder(tmp_path / "teacher", qwen3_tokenizer(QWEN3_ASR_TOKENS), rows=151_936)
    ark_folder(tmp_path / "student", seed=1, released_ids=True)
    done = subprocess.run(
        [sys.executable, str(ROOT / "opd.py"), "--train", *map(str, manifests), "--student",
         str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher"), "--out", str(tmp_path / "run"),
         "--steps", "20", "--batch-size", "8", "--lr", "3e-3", "--warmup-steps", "0", "--workers", "0"],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert len(lines) == 20 and lines[-1]["rss_gb"] < 4
    losses = [line["loss"] for line in lines]
    assert sum(losses[-5:]) < sum(losses[:5])
    saved = SpeechLM.from_pretrained(tmp_path / "run" / "model")
    assert saved.head.out_features == 151_936 and saved.front_end.audio_id == 151_663


def test_self_check_is_in_eval_mode_and_leaves_the_mode_as_it_was():
    """Dropout, which a checkpoint's config may carry, is off."""
    model = tiny_model()
    for layer in model.lm.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    found = self_check(model, [noise(0.5), noise(1.2, seed=1)], [None, None])
    assert found["agreement"] == 1 and found["batch_difference"] < 1e-4 and model.training


def test_sampling_flags_of_a_checkpoint_do_not_stop_it_from_being_saved(tmp_path):
    folder = qwen3_asr_folder(tmp_path / "m")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_sample": False, "temperature": 1e-6}))
    SpeechLM.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    transformers.Qwen3ASRForConditionalGeneration.from_pretrained(tmp_path / "saved")
