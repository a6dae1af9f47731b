"""Qwen3-ASR beside stock transformers, prompt languages, self-check, optimizer, checkpoints."""

import dataclasses
import os
import types

import pytest
import torch
import transformers
from conftest import (
    QWEN3_ASR_TOKENS,
    batch_of,
    change_json,
    noise,
    qwen3_asr_folder,
    qwen3_tokenizer,
    tiny_model,
)
from torch.testing import assert_close
from transformers.models.qwen3_asr.processing_qwen3_asr import LANGUAGE_CODE_TO_NAME

import data
import model as m

LENGTHS_S = [0.3, 0.49, 0.5, 0.99, 1.0, 1.01, 2.6, 7.9, 8.05, 16.1, 30.0]
CODES = "en zh yue de ja ko ru th el fil mk".split()  # as many


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A folder in stock transformers and in ours: (stock, processor, speech_lm)."""
    return load_both(qwen3_asr_folder(tmp_path_factory.mktemp("qwen") / "Qwen3-ASR-1.7B-hf"))


def load_both(folder):
    stock_class = transformers.Qwen3ASRForConditionalGeneration
    stock = stock_class.from_pretrained(folder, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    return stock, processor, m.SpeechLM.from_pretrained(folder).eval()


def request(processor, wave, code):
    return processor.apply_transcription_request(wave.numpy(), language=LANGUAGE_CODE_TO_NAME[code])


@torch.no_grad()
def assert_stock_logits(ours, stock, processor, wave, code, ids):
    """Ours (T, V) are those that predict `ids` from stock's own features, prompt and forward."""
    inputs = request(processor, wave, code)
    S = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids])], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    logits = stock(**inputs).logits[0, S - 1 : -1]
    assert_close(ours, logits, rtol=0, atol=1e-4 * float(logits.abs().max()))


# ---- Qwen3-ASR: ours is stock ------------------------------------------------------------------------------


def test_qwen3_asr_prompts_and_audio_tokens_are_the_processors(qwen):
    _, processor, speech_lm = qwen
    front_end = speech_lm.front_end
    known = {50: 7, 99: 13, 100: 13, 101: 14, 108: 14, 109: 15, 200: 26, 3000: 390}
    assert {n: front_end.n_audio_tokens(160 * n) for n in known} == known
    for n_samples in (100, 7999, 8000, 8159, 15999, 16000, 16001, 16159, 16160, 40123):
        ids = request(processor, noise(2.6)[:n_samples], "en")["input_ids"]
        assert int((ids == processor.audio_token_id).sum()) == front_end.n_audio_tokens(n_samples), n_samples
    for code in LANGUAGE_CODE_TO_NAME:
        ids = request(processor, noise(0.5), code)["input_ids"][0].tolist()
        assert front_end.prompt(7, code) == ids, code
    assert len(speech_lm.forbidden) == len(processor.tokenizer) + 7  # rows without a token are forbidden too
    assert (~speech_lm.forbidden).nonzero()[:, 0].tolist() == [*range(256), front_end.stop_id]


def test_qwen3_asr_logits_of_a_mixed_batch_equal_stock_clip_by_clip(qwen):
    stock, processor, speech_lm = qwen
    texts = ["a", "", "two words", "今天", "x" * 40, "yes", "", "a longer transcript of it", "no", "b", "end"]
    targets = speech_lm.front_end.transcripts(texts)
    with torch.no_grad():
        hidden = speech_lm(batch_of(speech_lm, LENGTHS_S, CODES), targets)
        logits = speech_lm.head(hidden).split((targets.lens + 1).tolist())
    for b, (seconds, code) in enumerate(zip(LENGTHS_S, CODES)):
        ids = targets.ids[b, : int(targets.lens[b]) + 1].tolist()
        assert_stock_logits(logits[b], stock, processor, noise(seconds, seed=b), code, ids)
    firsts = torch.stack([rows[0] for rows in logits])
    assert torch.pdist(firsts).min() > 1e-2 * firsts.abs().max()  # else the wrong audio would not be noticed


def test_qwen3_asr_greedy_sample_equals_stock_generate(qwen):
    """Over five letters and the stop token, where some rollouts stop by themselves."""
    stock, processor, speech_lm = qwen
    stop = speech_lm.front_end.stop_id
    forbidden = torch.ones_like(speech_lm.forbidden)
    forbidden[[*speech_lm.front_end.encode_text("abcde"), stop]] = False
    flags = {"eos_token_id": stop, "suppress_tokens": forbidden.nonzero()[:, 0].tolist()}
    lengths = [0.3, 1.01, 2.6, 0.7, 5.0]
    rollout = speech_lm.sample(batch_of(speech_lm, lengths, ["en"] * 5), 16, forbidden=forbidden)
    for b, seconds in enumerate(lengths):
        inputs = request(processor, noise(seconds, seed=b), "en")
        ids = stock.generate(**inputs, do_sample=False, max_new_tokens=16, **flags)
        ids = ids[0, inputs["input_ids"].shape[1] :].tolist()
        assert rollout.ids[b][rollout.row_mask()[b]].tolist() == ids
        assert rollout.stopped[b] == (ids[-1] == stop)
    assert rollout.stopped.any()


@pytest.mark.slow
def test_qwen3_asr_with_the_released_ids(tmp_path):
    """The real tokenizer and 151,936 rows: ids, prompt, forbidden ids."""
    tokenizer = qwen3_tokenizer(QWEN3_ASR_TOKENS)
    speech_lm = m.SpeechLM.from_pretrained(qwen3_asr_folder(tmp_path, tokenizer, hidden=16, rows=151_936))
    head = [151644, 8948, 198, 151645, 198, 151644, 872, 198, 151669]
    tail = [151670, 151645, 198, 151644, 77091, 198, 11528, 8453, 151704]
    assert speech_lm.front_end.prompt(13, "zh") == head + 13 * [151676] + tail
    assert (~speech_lm.forbidden).nonzero()[:, 0].tolist() == [*range(151643), 151645]


def test_qwen3_asr_saved_folder_is_stock(qwen, tmp_path):
    """Also where the folder has sampling flags beside greedy decoding, as folders on the hub may."""
    stock, processor, speech_lm = qwen
    speech_lm.save_pretrained(tmp_path / "saved")
    change_json(tmp_path / "saved" / "generation_config.json", do_sample=False, temperature=1e-6)
    m.SpeechLM.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "again")
    again, again_processor, _ = load_both(tmp_path / "again")
    state = again.state_dict()
    assert state.keys() == stock.state_dict().keys()
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert again.generation_config.eos_token_id == stock.generation_config.eos_token_id == [256, 258]
    flags = {"audio": noise(1.3).numpy(), "language": "ja", "prompt": "names"}
    expected = processor.apply_transcription_request(**flags)
    inputs = again_processor.apply_transcription_request(**flags)
    assert all(torch.equal(inputs[key], expected[key]) for key in expected)


# ---- languages of prompts ----------------------------------------------------------------------------------


def test_language_of_the_manifest_then_of_a_deciding_script_then_the_default(qwen):
    """A clip's context stays."""
    speech_lm = qwen[2]
    codes = ["de", None, None, "en", None]
    contexts = ["names", "names", None, None, None]
    batch = data.collate([noise(0.5)] * 5, speech_lm.front_end, codes, "fr", contexts)
    named = speech_lm.with_script_languages(batch, ["今天", "안녕", "hello", "今天", "<|im_end|> καλά"], "fr")
    for prompts, codes in ((batch, "de fr fr en fr"), (named, "de ko fr en el")):
        for ids, mask, code, context in zip(prompts.prompt_ids, prompts.prompt_mask, codes.split(), contexts):
            assert ids[mask].tolist() == speech_lm.front_end.prompt(7, code, context)
    all_named = batch_of(speech_lm, [0.5], ["de"])
    assert speech_lm.with_script_languages(all_named, ["今天"], None) is all_named


def test_a_language_that_no_prompt_names_is_an_error_of_its_line(qwen):
    clips = []
    for number, language in enumerate([None, "is"], start=4):
        clips.append(types.SimpleNamespace(where=f"m.jsonl:{number}", language=language))
    m.check_languages(clips, None, tiny_model())  # whose prompt names none
    with pytest.raises(data.InputError, match='m.jsonl:5: "language" is: .* ar, cs, .*, zh'):
        m.check_languages(clips, "en", tiny_model(), qwen[2])
    with pytest.raises(data.InputError, match='m.jsonl:4: "language" None: give it, or --language'):
        m.check_languages(clips, None, qwen[2])


# ---- self-check --------------------------------------------------------------------------------------------


@pytest.fixture(params=["glmasr", "qwen3_asr"])
def checked(request, tmp_path):
    """A model of each kind, and the further arguments of its self-check."""
    waveforms = [noise(seconds, seed=i) for i, seconds in enumerate((0.5, 1.3, 0.8, 2.2))]
    if request.param == "glmasr":
        return tiny_model(), waveforms, [None] * 4, None
    speech_lm = m.SpeechLM.from_pretrained(qwen3_asr_folder(tmp_path / "m"))
    return speech_lm, waveforms, ["en", "zh", None, "de"], "en"


def test_self_check_passes_and_leaves_the_mode_as_it_was(checked):
    """The figures, from their definitions."""
    speech_lm, *clips = checked
    figures = m.self_check(speech_lm.train(), *clips)
    assert speech_lm.training
    assert figures["agreement"] == 1
    assert 0 <= figures["batch_difference"] < 1e-4
    batch = data.collate(clips[0], speech_lm.front_end, *clips[1:])
    rollout = speech_lm.sample(batch, 32)
    logits = speech_lm.head(speech_lm(batch, rollout))
    tokens = rollout.ids[rollout.row_mask()]
    logp = logits.masked_fill(speech_lm.forbidden, -torch.inf).log_softmax(dim=1)
    nll = -logp.gather(1, tokens[:, None]).mean()
    assert figures["nll"] == pytest.approx(nll.item(), rel=1e-3)


@pytest.mark.parametrize("how", ["rows are shifted", "padding is attended to"])
def test_self_check_stops_where(checked, how, monkeypatch):
    speech_lm, *clips = checked
    forward = speech_lm.forward
    encode = speech_lm.encode

    def shifted(batch, rollout):
        rows = forward(batch, rollout).split((rollout.lens + rollout.stopped).tolist())
        return torch.cat([clip_rows.roll(1, 0) for clip_rows in rows])

    def unmasked(batch):  # as stock GlmAsr
        mel_lens = torch.full_like(batch.mel_lens, batch.mel.shape[2])
        return encode(dataclasses.replace(batch, mel_lens=mel_lens))

    if how == "rows are shifted":
        monkeypatch.setattr(speech_lm, "forward", shifted)
    else:
        monkeypatch.setattr(speech_lm, "encode", unmasked)
    with pytest.raises((data.InputError, AssertionError), match="self-check|audio tokens"):
        m.self_check(speech_lm, *clips)


# ---- optimizer and gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_optimizer_sees_a_tied_matrix_once_and_decays_only_matrices(tied):
    trained = dict(tiny_model(tied=tied).named_parameters())
    decayed, exempt = m.make_optimizer(trained, 1e-3, 0.005).param_groups
    assert decayed["weight_decay"] == 0.005
    assert exempt["weight_decay"] == 0
    assert decayed["betas"] == exempt["betas"] == (0.9, 0.95)
    names = "_proj linear_1 linear_2 fc1 fc2 conv1 conv2".split()
    matrices = tuple(f"{name}.weight" for name in names)
    expected = {id(trained[name]) for name in trained if name.endswith(matrices)}
    assert {id(parameter) for parameter in decayed["params"]} == expected
    every = [*decayed["params"], *exempt["params"]]
    assert len({id(parameter) for parameter in every}) == len(every) == len(trained)


def test_cosine_lr():
    values = [m.cosine_lr(step, 10, 2, 1.0) for step in (0, 1, 2, 4, 6, 10)]
    assert values == pytest.approx([0.5, 1.0, 1.0, 0.5 + 0.25 * 2**0.5, 0.5, 0.0])
    assert m.cosine_lr(0, 1, 0, 3.0) == 3.0
    assert m.cosine_lr(4, 5, 5, 1.0) == 1.0


def test_sum_gradients_over_all_buckets(monkeypatch):
    """Two ranks, of which the other has three times this one's gradients; a missing one counts as zeros."""
    trained = {str(n): torch.nn.Parameter(torch.zeros(n, 2)) for n in (3, 1, 2, 9)}
    for parameter in trained.values():
        parameter.grad = torch.rand_like(parameter)
    expected = {name: 4 * parameter.grad for name, parameter in trained.items()}
    trained["none"] = torch.nn.Parameter(torch.zeros(2))
    expected["none"] = torch.zeros(2)
    monkeypatch.setattr(m.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(m.dist, "all_reduce", lambda flat: flat.mul_(4))
    m.sum_gradients(trained, bucket_floats=10)
    assert all(torch.equal(parameter.grad, expected[name]) for name, parameter in trained.items())


# ---- checkpoints (that they hold all of a run: test_resume.py) ---------------------------------------------


@pytest.fixture
def run():
    """A model, all that trains, and its optimizer before any update."""
    speech_lm = tiny_model()
    trained = dict(speech_lm.named_parameters())
    return speech_lm, trained, m.make_optimizer(trained, 1e-2, 0.01)


def test_a_checkpoint_killed_while_written_is_never_picked_up(run, tmp_path, monkeypatch):
    out = str(tmp_path)
    m.save_checkpoint(out, 1, *run, keep=1)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    for place in ("save_file", "os.rename"):  # in the middle of the state, and just before it gets its name
        with monkeypatch.context() as patch:
            patch.setattr(f"model.{place}", killed)
            with pytest.raises(KeyboardInterrupt):
                m.save_checkpoint(out, 2, *run, keep=1)
        (tmp_path / "step-1.bak1").mkdir(exist_ok=True)  # a copy that somebody made
        assert list(data.complete_steps(out)) == [1]
    m.save_checkpoint(out, 3, *run, keep=1)  # clears away what was left
    assert sorted(os.listdir(out)) == ["step-1.bak1", "step-3"]
    m.load_state(os.path.join(out, "step-3"), *run[1:])
    assert not run[2].state  # no update had been made


def test_a_checkpoint_reaches_the_disk_before_it_gets_its_name(run, tmp_path, monkeypatch):
    """All its files and folders; then the folder that holds its name."""
    rename = os.rename
    events = []
    monkeypatch.setattr(os, "fsync", lambda file: events.append(os.readlink(f"/proc/self/fd/{file}")))
    monkeypatch.setattr(os, "rename", lambda *paths: events.append("rename") or rename(*paths))
    m.save_checkpoint(str(tmp_path), 1, *run, keep=1)
    folder = tmp_path / "step-1"
    flushed = [path.replace(".partial", "") for path in events]
    assert sorted(flushed[:-2]) == sorted(map(str, [folder, *folder.rglob("*")]))
    assert flushed[-2:] == ["rename", str(tmp_path)]


def test_no_checkpoint_is_written_where_ranks_differ_by_one_bit(run, tmp_path, monkeypatch):
    """As where a change of the code leaves one rank's gradient out."""
    checksums = []
    monkeypatch.setattr(data, "gather", lambda value: checksums.append(value) or [checksums[0], value])
    m.save_checkpoint(str(tmp_path), 1, *run, keep=9)
    run[0].encoder.conv1.weight.data.view(torch.int32)[0, 0, 0] ^= 1
    with pytest.raises(AssertionError, match="the ranks' weights have come apart"):
        m.save_checkpoint(str(tmp_path), 2, *run, keep=9)
    assert os.listdir(tmp_path) == ["step-1"]
