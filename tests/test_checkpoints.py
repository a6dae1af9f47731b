"""Qwen3-ASR beside stock transformers, prompt languages, refusals, self-check, optimizer, checkpoints."""

import dataclasses
import io
import json
import math
import os
import pickle
import sys
import types

import huggingface_hub.constants
import pytest
import torch
import transformers
from conftest import (
    QWEN3_ASR_TEMPLATE,
    QWEN3_ASR_TOKENS,
    ark_folder,
    glm_asr_nano_folder,
    noise,
    qwen3_asr_folder,
    qwen3_lm_folder,
    qwen3_tokenizer,
    thinker_folder,
    tiny_model,
)
from torch.testing import assert_close

import model as m
from data import LANGUAGES, InputError, collate, complete_steps
from model import Qwen3ASR, SpeechLM, self_check

LENGTHS_S = [0.3, 0.49, 0.5, 0.99, 1.0, 1.01, 2.6, 7.9, 8.05, 16.1, 30.0]
CODES = "en zh yue de ja ko ru th el fil mk".split()  # as many


def load_both(folder):
    """A folder in stock transformers and in ours: (stock, processor, model)."""
    stock_class = transformers.Qwen3ASRForConditionalGeneration
    stock = stock_class.from_pretrained(folder, dtype=torch.float32).eval()
    return stock, transformers.AutoProcessor.from_pretrained(folder), SpeechLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return load_both(qwen3_asr_folder(tmp_path_factory.mktemp("qwen") / "Qwen3-ASR-1.7B-hf"))


def request(processor, wave, code):
    return processor.apply_transcription_request(wave.numpy(), language=LANGUAGES[code])


@torch.no_grad()
def stock_logits(stock, processor, wave, code, ids):
    """Logits (T, V) that predict `ids`, from stock's own features, prompt and forward, one clip alone."""
    inputs = request(processor, wave, code)
    S = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids])], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return stock(**inputs).logits[0, S - 1 : -1]


def assert_relative(ours, expected, tolerance=1e-4):
    assert ours.shape == expected.shape
    assert float((ours - expected).abs().max()) <= tolerance * float(expected.abs().max())


def error_of(call, *args, **kwargs):
    """The one line of the InputError that `call` must raise."""
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def clips_of(lengths):
    return [noise(seconds, seed=i) for i, seconds in enumerate(lengths)]


# ---- Qwen3-ASR: ours is stock ------------------------------------------------------------------------------


def test_qwen3_asr_audio_token_counts(qwen):
    """Three convolutions of stride 2 on each piece of 100 mel frames."""
    _, processor, model = qwen
    count = model.front_end.n_audio_tokens
    known = {50: 7, 99: 13, 100: 13, 101: 14, 108: 14, 109: 15, 200: 26, 3000: 390}
    assert {n: count(160 * n) for n in known} == known
    for n_samples in [*range(8000, 64000, 37), 479_999, 480_000]:
        full, rest = divmod(n_samples // 160, 100)
        for _ in range(3):
            rest = (rest + 1) // 2
        assert count(n_samples) == 13 * full + rest, n_samples
    for n_samples in (100, 7999, 8000, 8159, 15999, 16000, 16001, 16159, 16160, 40123):
        ids = request(processor, noise(2.6)[:n_samples], "en")["input_ids"]
        assert int((ids == processor.audio_token_id).sum()) == count(n_samples), n_samples


def test_qwen3_asr_prompts_and_features_are_the_processors(qwen):
    _, processor, model = qwen
    waves = clips_of(LENGTHS_S)
    batch = collate(waves, model.front_end, CODES)
    for b, (wave, code) in enumerate(zip(waves, CODES)):
        inputs = request(processor, wave, code)
        n = int(batch.mel_lens[b])
        assert batch.prompt_ids[b][batch.prompt_mask[b]].tolist() == inputs["input_ids"][0].tolist()
        assert batch.prompt_mask[b].sort().values.equal(batch.prompt_mask[b])  # padding on the left
        assert n == int(inputs["input_features_mask"].sum())
        assert_close(batch.mel[b, :, :n], inputs["input_features"][0, :, :n], rtol=0, atol=1e-4)
        assert batch.mel[b, :, n:].abs().sum() == 0
    assert len(model.forbidden) == len(processor.tokenizer) + 7  # rows without a token are forbidden too
    assert (~model.forbidden).nonzero()[:, 0].tolist() == [*range(256), model.front_end.stop_id]
    for code in LANGUAGES:
        ids = request(processor, noise(0.5), code)["input_ids"][0].tolist()
        assert model.front_end.prompt(7, code) == ids, code


def test_qwen3_asr_logits_of_a_mixed_batch_equal_stock_clip_by_clip(qwen):
    stock, processor, model = qwen
    texts = ["a", "", "two words", "今天", "x" * 40, "yes", "", "a longer transcript of it", "no", "b", "end"]
    waves = clips_of(LENGTHS_S)
    batch = collate(waves, model.front_end, CODES)
    targets = model.front_end.transcripts(texts)
    with torch.no_grad():
        ours = model.head(model(batch, targets)).split([len(text.encode()) + 1 for text in texts])
    firsts = []
    for b, (wave, code) in enumerate(zip(waves, CODES)):
        ids = targets.ids[b, : int(targets.lens[b]) + 1].tolist()
        assert_relative(ours[b], stock_logits(stock, processor, wave, code, ids))
        firsts.append(stock_logits(stock, processor, wave, "en", ids)[0])
    differences = torch.pdist(torch.stack(firsts), p=math.inf)
    assert differences.min() > 1e-2 * firsts[0].abs().max()  # else the wrong audio would not be noticed


@pytest.mark.parametrize("letters", [None, "abcde"])
def test_qwen3_asr_greedy_sample_equals_stock_generate(qwen, letters):
    """Over all text ids, and over five letters and the stop token, where rollouts stop by themselves."""
    stock, processor, model = qwen
    stop = model.front_end.stop_id
    forbidden = model.forbidden
    if letters:
        forbidden = torch.ones_like(forbidden)
        forbidden[[*model.front_end.encode_text(letters), stop]] = False
    flags = {"eos_token_id": stop, "suppress_tokens": forbidden.nonzero()[:, 0].tolist()}
    waves = clips_of([0.3, 1.01, 2.6, 0.7, 5.0])
    rollout = model.sample(collate(waves, model.front_end, ["en"] * 5), 16, forbidden=forbidden)
    written = []
    for b, wave in enumerate(waves):
        inputs = request(processor, wave, "en")
        ids = stock.generate(**inputs, do_sample=False, max_new_tokens=16, **flags)
        ids = ids[0, inputs["input_ids"].shape[1] :].tolist()
        assert rollout.ids[b][rollout.row_mask()[b]].tolist() == ids
        assert rollout.stopped[b] == (ids[-1] == stop)
        written.append(tuple(ids))
    assert len(set(written)) > 1 and bool(rollout.stopped.any()) == bool(letters)


@pytest.mark.slow
def test_qwen3_asr_with_the_released_ids(tmp_path):
    """The real tokenizer and 151,936 rows: ids, prompt, logits, forbidden ids."""
    tokenizer = qwen3_tokenizer(QWEN3_ASR_TOKENS)
    folder = qwen3_asr_folder(tmp_path / "Qwen3-ASR-0.6B-hf", tokenizer, hidden=16, rows=151_936)
    stock = transformers.Qwen3ASRForConditionalGeneration.from_pretrained(folder)
    model = SpeechLM.from_pretrained(folder)
    extractor = transformers.Qwen3ASRFeatureExtractor()
    processor = transformers.Qwen3ASRProcessor(extractor, tokenizer, chat_template=QWEN3_ASR_TEMPLATE)
    wave = noise(0.99, seed=3)
    batch = collate([wave], model.front_end, ["zh"])
    head = [151644, 8948, 198, 151645, 198, 151644, 872, 198, 151669]
    tail = [151670, 151645, 198, 151644, 77091, 198, 11528, 8453, 151704]
    prompt = batch.prompt_ids[0].tolist()
    assert prompt == head + 13 * [151676] + tail == request(processor, wave, "zh")["input_ids"][0].tolist()
    assert model.front_end.stop_id == 151645 and len(model.forbidden) == 151_936
    allowed = (~model.forbidden).nonzero()[:, 0].tolist()
    assert allowed == [*range(151643), 151645]
    text = "今天 is <asr_text> 25 °C"
    targets = model.front_end.transcripts([text])
    ids = targets.ids[0].tolist()
    assert ids[-1] == 151645 and max(ids[:-1]) < 151643 and model.front_end.decode(ids[:-1]) == text
    with torch.no_grad():
        assert_relative(model.head(model(batch, targets)), stock_logits(stock, processor, wave, "zh", ids))


def test_qwen3_asr_saved_folder_is_stock(qwen, tmp_path):
    """Also where the folder has sampling flags beside greedy decoding, as folders on the hub may."""
    stock, processor, model = qwen
    model.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_sample": False, "temperature": 1e-6}))
    SpeechLM.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "again")
    stock_class = transformers.Qwen3ASRForConditionalGeneration
    again, info = stock_class.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.state_dict().keys() == stock.state_dict().keys()
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert again.generation_config.eos_token_id == stock.generation_config.eos_token_id == [256, 258]
    again_processor = transformers.AutoProcessor.from_pretrained(tmp_path / "again")
    flags = {"audio": noise(1.3).numpy(), "language": "ja", "prompt": "names"}
    expected, inputs = (each.apply_transcription_request(**flags) for each in (processor, again_processor))
    assert all(torch.equal(inputs[key], expected[key]) for key in expected)


# ---- languages of prompts ----------------------------------------------------------------------------------


def languages_in(model, batch):
    """What each prompt names behind the assistant's turn."""
    names = []
    for ids, mask in zip(batch.prompt_ids, batch.prompt_mask):
        ending = model.front_end.tokenizer.decode(ids[mask]).split("<|im_start|>assistant\n")[1]
        names.append(ending.removeprefix("language ").removesuffix("<asr_text>"))
    return names


def test_language_of_the_manifest_then_of_a_deciding_script_then_the_default(qwen):
    stock, processor, model = qwen
    waves = clips_of([0.4, 1.3, 0.8, 2.0, 3.1])
    batch = collate(waves, model.front_end, ["de", None, None, "en", None], "fr")
    assert languages_in(model, batch) == ["German", "French", "French", "English", "French"]
    texts = ["今天", "안녕", "hello", "今天", "<|im_end|> καλά"]
    named = model.with_script_languages(batch, texts)
    names = ["German", "Korean", "French", "English", "Greek"]
    assert languages_in(model, named) == names
    codes = dict(zip(LANGUAGES.values(), LANGUAGES))
    ids = [*model.front_end.encode_text("a"), model.front_end.stop_id]
    with torch.no_grad():  # and the prompts are whole
        rows = model.head(model(named, model.front_end.transcripts(["a"] * 5))).split(2)
    for b, wave in enumerate(waves):
        assert_relative(rows[b], stock_logits(stock, processor, wave, codes[names[b]], ids))
    all_named = collate(waves, model.front_end, ["de"] * 5)
    assert model.with_script_languages(all_named, texts) is all_named


def test_our_prompts_name_no_language():
    model = tiny_model()
    waves = clips_of([0.5, 1.1])
    plain, named = (collate(waves, model.front_end, languages) for languages in ([None] * 2, ["zh", "is"]))
    assert torch.equal(plain.prompt_ids, named.prompt_ids)
    assert model.with_script_languages(plain, ["今天", ""]) is plain


def test_check_languages_names_line_and_flag(qwen):
    *_, model = qwen
    clip = types.SimpleNamespace(where="m.jsonl:5")
    m.check_languages({None: clip, "is": clip}, None, tiny_model())
    m.check_languages({None: clip, "zh": clip}, "en", tiny_model(), model)
    message = error_of(m.check_languages, {"en": clip, None: clip}, None, tiny_model(), model)
    assert "m.jsonl:5" in message and "--language" in message
    message = error_of(m.check_languages, {"is": clip}, "en", model)
    assert "m.jsonl:5" in message and '"language" is' in message and "zh" in message
    assert "--language is" in error_of(m.check_languages, {"en": clip}, "is", model)


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["1.7B", "0.6B"])
def test_original_qwen3_asr_is_refused_with_the_name_of_its_conversion(tmp_path, size):
    folder = thinker_folder(tmp_path, f"Qwen3-ASR-{size}")
    for name in (folder, f"Qwen/Qwen3-ASR-{size}"):
        message = error_of(SpeechLM.from_pretrained, name)
        assert f"Qwen/Qwen3-ASR-{size}-hf" in message and "thinker" in message


def test_other_models_are_refused(tmp_path):
    ark = ark_folder(tmp_path / "ark")
    assert f"convert it: python -m prepare.ark {ark} --out DIR" in error_of(SpeechLM.from_pretrained, ark)
    assert "the LM is llama" in error_of(SpeechLM.from_pretrained, glm_asr_nano_folder(tmp_path / "nano"))
    message = error_of(SpeechLM.from_pretrained, qwen3_lm_folder(tmp_path / "lm"))
    assert "'qwen3'" in message and "python -m prepare.student makes one" in message


def test_hub_names_come_from_the_cache_or_say_how_to_get_there(tmp_path, monkeypatch):
    folder = qwen3_asr_folder(tmp_path / "hub" / "models--Qwen--Qwen3-ASR-9B-hf" / "snapshots" / "0123abcd")
    refs = folder.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123abcd")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert isinstance(SpeechLM.from_pretrained("Qwen/Qwen3-ASR-9B-hf"), Qwen3ASR)
    message = error_of(SpeechLM.from_pretrained, "Nobody/no-such-model")
    assert "no such folder" in message and "`hf download Nobody/no-such-model`" in message
    (folder / "model.safetensors").unlink()
    message = error_of(SpeechLM.from_pretrained, "Qwen/Qwen3-ASR-9B-hf")
    assert "Qwen/Qwen3-ASR-9B-hf: is no model folder" in message


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("kind", ["ours", "qwen3_asr"])
def test_no_code_and_no_pickle_of_a_folder_is_run(tmp_path, monkeypatch, kind):
    """Remote code, even where somebody would answer yes, and .bin weights in place of safetensors."""
    folder = tmp_path / "model"
    qwen3_asr_folder(folder) if kind == "qwen3_asr" else tiny_model().save_pretrained(folder)
    ran = tmp_path / "ran"
    (folder / "remote.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    auto_map = {"AutoConfig": "remote.A", "AutoModel": "remote.B", "AutoProcessor": "remote.C"}
    auto_map |= {"AutoTokenizer": ["remote.D", None], "AutoFeatureExtractor": "remote.E"}
    for path in folder.glob("*config.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": auto_map}))
    answers = io.StringIO("y\n" * 20)
    monkeypatch.setattr(sys, "stdin", answers)
    SpeechLM.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert answers.tell() == 0 and not list((tmp_path / "saved").glob("*.py"))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(ran)))
    assert str(folder) in error_of(SpeechLM.from_pretrained, folder)
    assert not ran.exists()


# ---- self-check --------------------------------------------------------------------------------------------


@pytest.fixture(params=["ours", "qwen3_asr"])
def checked(request, tmp_path):
    """A model of each kind, clips of mixed length, their languages, and the default one."""
    waves = clips_of([0.5, 1.3, 0.8, 2.2])
    if request.param == "ours":
        return tiny_model(), waves, [None] * 4, None
    model = SpeechLM.from_pretrained(qwen3_asr_folder(tmp_path / "m"))
    return model, waves, ["en", "zh", None, "de"], "en"


def test_self_check_passes_in_eval_mode_and_leaves_the_mode_as_it_was(checked):
    """Dropout, which a checkpoint's config may carry, is off. The figures, from their definitions."""
    model, *clips = checked
    for layer in model.lm.layers:
        layer.self_attn.attention_dropout = 0.5
    figures = self_check(model.train(), *clips)
    assert model.training
    assert figures["agreement"] == 1 and 0 <= figures["batch_difference"] < 1e-4
    model.eval()
    batch = collate(clips[0], model.front_end, *clips[1:])
    rollout = model.sample(batch, 32)
    with torch.no_grad():
        logits = model.head(model(batch, rollout))
    tokens = rollout.ids[rollout.row_mask()]
    logp = logits.masked_fill(model.forbidden, -torch.inf).log_softmax(1)
    assert figures["nll"] == pytest.approx(-float(logp.gather(1, tokens[:, None]).mean()), rel=1e-3)
    stops = logits.softmax(1)[tokens == model.front_end.stop_id, model.front_end.pad_id]
    assert figures["endoftext"] == pytest.approx(float(stops.mean()) if len(stops) else 0.0, rel=1e-3)


def break_model(model, how):
    forward, encode = model.forward, model.encode

    def shifted(batch, rollout):
        rows = forward(batch, rollout).split((rollout.lens + rollout.stopped).tolist())
        return torch.cat([clip_rows.roll(1, 0) for clip_rows in rows])

    def leaking(batch):
        embeds = encode(batch)
        return embeds + 0.3 * (embeds.mean(dim=0, keepdim=True) - embeds)

    def unmasked(batch):
        return encode(
            dataclasses.replace(batch, mel_lens=torch.full_like(batch.mel_lens, batch.mel.shape[2]))
        )

    if how == "rows are shifted":
        model.forward = shifted
    elif how == "batch mates leak":
        model.encode = leaking
    elif how == "padding is attended to":  # as stock GlmAsr does
        model.encode = unmasked
    elif how == "a weight is NaN":
        model.lm.norm.weight.data[0] = torch.nan


@pytest.mark.parametrize(
    "how", ["rows are shifted", "batch mates leak", "padding is attended to", "a weight is NaN"]
)
def test_self_check_stops_where(checked, how):
    model, *clips = checked
    break_model(model, how)
    with pytest.raises((InputError, AssertionError), match="self-check|audio tokens"):
        self_check(model, *clips)


# ---- optimizer and gradients -------------------------------------------------------------------------------


def test_optimizer_sees_a_tied_matrix_once_and_decays_only_matrices():
    for tied in (True, False):
        model = tiny_model(tied=tied)
        trained = dict(model.named_parameters())
        decayed, exempt = m.make_optimizer(trained, 1e-3, 0.005).param_groups
        assert (decayed["weight_decay"], exempt["weight_decay"], decayed["lr"]) == (0.005, 0, 1e-3)
        assert decayed["betas"] == exempt["betas"] == (0.9, 0.95)
        matrices = ("_proj.weight", "linear_1.weight", "linear_2.weight", "fc1.weight", "fc2.weight")
        matrices += ("conv1.weight", "conv2.weight")
        expected = {id(trained[name]) for name in trained if name.endswith(matrices)}
        assert {id(parameter) for parameter in decayed["params"]} == expected
        every = [*decayed["params"], *exempt["params"]]
        assert len({id(p) for p in every}) == len(every) == len(trained)


def test_cosine_lr():
    values = [m.cosine_lr(step, 10, 2, 1.0) for step in (0, 1, 2, 4, 6, 10)]
    assert values == pytest.approx([0.5, 1.0, 1.0, 0.5 + 0.25 * 2**0.5, 0.5, 0.0])
    assert m.cosine_lr(0, 1, 0, 3.0) == 3.0 and m.cosine_lr(4, 5, 5, 1.0) == 1.0


def test_sum_gradients_in_buckets_of_one_order(monkeypatch):
    """Two ranks, of which the other has three times this one's gradients; a missing one counts as zeros."""
    trained = {str(n): torch.nn.Parameter(torch.zeros(n, 2)) for n in (3, 1, 2, 9)}
    trained["none"] = torch.nn.Parameter(torch.zeros(2))
    gradients = {name: torch.randn_like(parameter) for name, parameter in trained.items()}
    for name in trained.keys() - {"none"}:
        trained[name].grad = gradients[name].clone()
    gradients["none"].zero_()
    m.sum_gradients(trained)
    for name, parameter in trained.items():  # alone: as they are
        assert torch.equal(parameter.grad, gradients[name])
    sizes = []

    def all_reduce(flat):
        sizes.append(len(flat))
        flat.mul_(4)

    monkeypatch.setattr(m.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(m.dist, "all_reduce", all_reduce)
    m.sum_gradients(trained, bucket_floats=10)
    assert sizes == [8, 4, 18, 2]
    for name, parameter in trained.items():
        assert torch.equal(parameter.grad, 4 * gradients[name])


def test_check_replicas_sees_one_bit(monkeypatch):
    model = tiny_model()
    trained = dict(model.named_parameters())
    seen = []
    monkeypatch.setattr(m, "gather", lambda value: seen.append(value) or [seen[0], value])
    m.check_replicas(trained)
    m.check_replicas(trained)
    weight = model.encoder.conv1.weight.data.view(torch.int32)
    weight[0, 0, 0] ^= 1
    with pytest.raises(AssertionError, match="the ranks' weights have come apart"):
        m.check_replicas(trained)


# ---- checkpoints -------------------------------------------------------------------------------------------


def new_run(seed):
    """A model, a head beside it that trains too, their optimizer."""
    model = tiny_model(seed).train()
    torch.manual_seed(seed)
    head = torch.nn.Linear(32, 5)
    trained = {**dict(model.named_parameters()), "head.weight": head.weight, "head.bias": head.bias}
    return model, head, trained, m.make_optimizer(trained, 1e-2, 0.01)


def make_step(model, head, optimizer):
    batch = collate(clips_of([0.4, 0.9]), model.front_end, [None] * 2)
    head(model(batch, model.front_end.transcripts(["ab", "c"]))).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def test_a_checkpoint_goes_on_bit_for_bit(tmp_path):
    """Weights, moments and the tensors outside the folder; a step later both runs are the same."""
    out = str(tmp_path)
    model, head, trained, optimizer = new_run(0)
    m.save_checkpoint(out, 0, model, trained, optimizer, keep=9)  # before any update: no moments
    m.load_state(os.path.join(out, "step-0"), model, trained, optimizer)
    assert not optimizer.state
    for step in (1, 2):
        make_step(model, head, optimizer)
        m.save_checkpoint(out, step, model, trained, optimizer, keep=2)
    assert list(complete_steps(out)) == [1, 2]  # the last two stay
    folder = complete_steps(out)[2]
    _, head_again, *_ = new_run(1)
    again = SpeechLM.from_pretrained(os.path.join(folder, "model")).train()
    trained_again = dict(again.named_parameters())
    trained_again |= {"head.weight": head_again.weight, "head.bias": head_again.bias}
    optimizer_again = m.make_optimizer(trained_again, 1e-2, 0.01)
    m.load_state(folder, again, trained_again, optimizer_again)
    for _ in range(2):
        for name, parameter in trained.items():
            assert torch.equal(parameter, trained_again[name]), name
        make_step(model, head, optimizer)
        make_step(again, head_again, optimizer_again)
    other = new_run(2)[2]
    other["adapter.weight"] = torch.nn.Parameter(torch.zeros(2, 2))
    message = error_of(m.load_state, folder, again, other, optimizer_again)
    assert folder in message and "adapter.weight" in message


def test_a_checkpoint_killed_while_written_is_never_picked_up(tmp_path, monkeypatch):
    out = str(tmp_path)
    model, _, trained, optimizer = new_run(0)
    m.save_checkpoint(out, 1, model, trained, optimizer, keep=1)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    for place in ("save_file", "os.rename"):  # in the middle of the state, and just before it gets its name
        with monkeypatch.context() as patch:
            patch.setattr(f"model.{place}", killed)
            with pytest.raises(KeyboardInterrupt):
                m.save_checkpoint(out, 2, model, trained, optimizer, keep=1)
        assert list(complete_steps(out)) == [1] and len(os.listdir(out)) == 2
    m.save_checkpoint(out, 3, model, trained, optimizer, keep=1)  # clears away what was left
    assert os.listdir(out) == ["step-3"]


def test_the_finished_model_is_replaced_as_a_whole(tmp_path):
    models = [tiny_model(0), tiny_model(1)]
    for model in models:
        m.save_model(str(tmp_path), model)
    assert os.listdir(tmp_path) == ["model"]
    assert torch.equal(SpeechLM.from_pretrained(tmp_path / "model").head.weight, models[1].head.weight)
