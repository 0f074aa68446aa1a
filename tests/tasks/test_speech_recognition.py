import json

import numpy as np
import pytest
import soundfile
import torch

from formarium import create, predict
from formarium.errors import BadInput, UnknownName
from formarium.task import task as task_of
from formarium.tasks import sound
from formarium.tasks.speech_recognition.data import Spoken, write_folder
from formarium.tasks.speech_recognition.draw import confusions
from formarium.tasks.speech_recognition.metrics import rates
from formarium.tasks.speech_recognition.model import Transcripts
from formarium.tasks.speech_recognition.vocabulary import ENGLISH, chosen, decode, encode, kind, normalised, symbols_of
from formarium.tasks.spoken import Synthesiser

TASK = task_of("speech-recognition")
PREPARE = TASK.transform({"rate": 16000, "mels": 80})


def tone(seconds=0.5, rate=16000, hertz=440):
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def put(folder, name, text, audio=None, rate=16000):
    folder.mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / name, tone(rate=rate) if audio is None else audio, rate)
    if text is not None:
        (folder / name).with_suffix(".txt").write_text(text, encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    for i, text in enumerate(("one two", "Three, four!", "five", "don\u2019t", "nine")):
        put(tmp_path / "speech", f"{i}.{'flac' if i % 2 else 'wav'}", text)
    return tmp_path / "speech"


def prepared(sample):
    return PREPARE(sample, np.random.default_rng(0))


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# text and tokens ----------------------------------------------------------------------------------------------------


def test_text_is_normalised():
    assert normalised("  Hello, WORLD \u2014\ndon\u2019t (stop)! ") == "hello world don't stop"


@pytest.mark.parametrize(
    ("symbols", "how", "tokens"),
    [
        (("<blank>", "a", "b", " "), "characters", [1, 3, 2, 2]),
        (("<blank>", "a", "bb"), "words", [1, 2]),
        (("<blank>", "▁a", "▁b", "b"), "pieces", [1, 2, 3]),
    ],
)
def test_vocabularies_cut_text_and_put_it_together(symbols, how, tokens):
    assert kind(symbols) == how
    assert encode("a bb", symbols) == tokens and decode(tokens, symbols) == "a bb"


def test_vocabulary_options():
    assert chosen("auto", ["ab c"]) == ("<blank>", " ", "a", "b", "c")
    assert chosen("words", ["b a", "c a"]) == ("<blank>", "a", "b", "c")
    assert chosen(["x", "y"], []) == chosen(["<blank>", "x", "y"], []) == ("<blank>", "x", "y")
    assert symbols_of(29) == ENGLISH and symbols_of(3)[2] == "<2>"
    with pytest.raises(BadInput, match="english, auto, words"):
        chosen("german", [])


# reading ------------------------------------------------------------------------------------------------------------


def test_a_folder_of_sound_and_text_is_split_by_the_seed(folder):
    data = TASK.read(folder)
    assert data.model_args == {"vocabulary_size": 29, "vocabulary": ENGLISH} and data.notes == []
    assert [len(data.splits[s]) for s in ("train", "val")] == [4, 1]
    assert data.splits["val"].paths == TASK.read(folder).splits["val"].paths
    texts = {*data.splits["train"].texts, *data.splits["val"].texts}
    assert texts == {"one two", "three four", "five", "don't", "nine"}
    assert data.splits["train"][0]["tokens"] == encode(data.splits["train"].texts[0], ENGLISH)


def test_given_splits_stay(tmp_path):
    for split in ("train", "dev"):
        for i in range(2):
            put(tmp_path / split, f"{split}{i}.wav", "yes")
    data = TASK.read(tmp_path)
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 2, "val": 2}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_manifests(folder, suffix):
    rows = [("0.wav", "one, two", "train"), ("1.flac", "three", "train"), ("2.wav", "five", "test")]
    path = folder / f"list{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"audio_filepath": a, "text": t, "split": s}) for a, t, s in rows))
    else:
        d = "," if suffix == ".csv" else "\t"
        quoted = [[f'"{c}"' for c in row] for row in rows]
        path.write_text("\n".join(d.join(r) for r in [["path", "sentence", "split"], *quoted]))
    for where in (path, folder):
        data = TASK.read(where)
        assert data.splits["train"].texts == ["one two", "three"] and data.splits["test"].texts == data.splits["val"].texts == ["five"]
    assert data.splits["train"][0]["id"] == "0.wav"


def test_librispeech_transcripts(tmp_path):
    for i in range(3):
        put(tmp_path / "84" / "121", f"84-121-{i}.flac", None)
    (tmp_path / "84" / "121" / "84-121.trans.txt").write_text("84-121-0 GO ON\n84-121-1 I SEE\n84-121-2 NO\n")
    data = TASK.read(tmp_path)
    assert {*data.splits["train"].texts, *data.splits["val"].texts} == {"go on", "i see", "no"}


def test_written_sample_data_are_read_again(tmp_path):
    spoken = Spoken([tone(), tone(0.3)], 16000, ["one", "two"], ENGLISH, ["a", "b"])
    from formarium.task import Data

    write_folder(Data("d", "speech-recognition", {"train": spoken, "val": spoken}), tmp_path)
    again = TASK.read(tmp_path)
    assert again.splits["val"].texts == ["one", "two"]
    np.testing.assert_allclose(again.splits["val"][1]["audio"], tone(0.3), atol=1e-4)


# bad input ----------------------------------------------------------------------------------------------------------


def test_an_empty_transcript_is_left_out_and_named(folder):
    (folder / "2.txt").write_text(" \n")
    data = TASK.read(folder)
    assert data.notes == ["1 recordings with an empty transcript left out: 2.wav"] and sum(len(d) for d in data.splits.values()) == 4
    with pytest.raises(BadInput) as error:
        TASK.read(folder, strict=True)
    assert "empty transcript: 2.wav" in one_line(error)


def test_characters_outside_the_vocabulary(folder):
    (folder / "0.txt").write_text("zwölf 3")
    with pytest.raises(BadInput) as error:
        TASK.read(folder)
    assert "transcript of 0.wav" in one_line(error) and "'3' 'ö'" in str(error.value) and 'vocabulary="auto"' in str(error.value)
    assert "ö" in TASK.read(folder, vocabulary="auto").names


def test_broken_silent_and_short_files_are_left_out_and_named(folder):
    (folder / "0.wav").write_bytes(b"RIFF not really")
    put(folder, "2.wav", "five", np.zeros(8000, np.float32))
    put(folder, "4.wav", "nine", tone(0.05))
    (note,) = TASK.read(folder).notes
    assert "3 sound files left out" in note and "can't be decoded" in note and "2.wav silent" in note and "4.wav too short" in note
    with pytest.raises(BadInput, match="sound that decodes"):
        TASK.read(folder, strict=True)


@pytest.mark.parametrize(
    ("audio", "said"),
    [
        (np.zeros(16000, np.float32), "expected sound, got silence"),
        (tone(0.05), "at least 0.1 s"),
        (np.zeros(0, np.float32), "no samples"),
        (np.full(16000, np.nan, np.float32), "NaN"),
        (np.full(16000, 300.0, np.float32), r"float samples in \[-1, 1\]"),
        (np.ones(16000, np.int64), "int16"),
    ],
)
def test_sound_that_cannot_be_recognised(audio, said):
    with pytest.raises(BadInput, match=said) as error:
        prepared(TASK.from_memory(audio, 0))
    one_line(error)


def test_missing_and_useless_paths(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("hello")
    put(tmp_path / "bare", "a.wav", None)
    for path, said in [("none", "no such path"), ("empty", "no sound files"), ("bare", "none with a transcript"), ("a.txt", "manifest")]:
        with pytest.raises(BadInput, match=said):
            TASK.read(tmp_path / path)
    with pytest.raises(BadInput, match="none in it"):
        TASK.inputs([tmp_path / "empty"])
    (tmp_path / "list.csv").write_text("name,words\na,b\n")
    with pytest.raises(BadInput, match="columns path"):
        TASK.read(tmp_path / "list.csv")


def test_an_unreadable_file_is_one_line_among_the_others(tmp_path):
    put(tmp_path, "a.wav", None)
    (tmp_path / "b.wav").write_bytes(b"noise")
    rows = predict(create("squeezeformer_micro"), tmp_path)
    assert "text" in rows[0] and "expected a sound file" in rows[1]["error"] and "\n" not in rows[1]["error"]


# other rates, channels ----------------------------------------------------------------------------------------------


def test_another_rate_is_resampled_with_a_note_and_sounds_the_same():
    base = prepared({"audio": tone(), "rate": 16000, "id": "a"})
    for rate in (8000, 22050, 44100, 48000):
        other = prepared({"audio": tone(rate=rate), "rate": rate, "id": "a"})
        assert other["notes"] == f"resampled from {rate} to 16000 Hz" and abs(other["seconds"] - 0.5) < 1e-3
        assert abs(len(other["features"]) - len(base["features"])) <= 1
        assert other["features"][20].argmax() == base["features"][20].argmax()
    assert base["notes"] == ""


def test_two_channels_are_averaged_with_a_note(tmp_path):
    soundfile.write(tmp_path / "stereo.wav", np.stack([tone(), 0 * tone()], 1), 16000)
    clip = sound.load(tmp_path / "stereo.wav")
    np.testing.assert_allclose(clip.audio, tone() / 2, atol=1e-4)
    assert clip.notes == ("2 channels averaged to one",)
    (row,) = predict(create("squeezeformer_micro"), tmp_path / "stereo.wav")
    assert row["note"] == "2 channels averaged to one"


def test_different_rates_in_a_folder_are_noted(folder):
    put(folder, "9.wav", "ten", rate=8000)
    assert TASK.read(folder).notes == ["sound at different rates (8000 Hz, 16000 Hz); all is resampled to the model's"]


# batches, scores, output --------------------------------------------------------------------------------------------


def test_collate_pads_and_training_masks():
    samples = [
        prepared({"audio": tone(s), "rate": 16000, "text": t, "tokens": encode(t, ENGLISH), "id": t}) for s, t in ((0.5, "one"), (0.3, "a"))
    ]
    batch = TASK.collate(samples)
    assert batch["features"].shape == (2, 51, 80) and batch["length"].tolist() == [51, 31] and batch["features"][1, 31:].abs().sum() == 0
    assert batch["token_length"].tolist() == [3, 1] and batch["tokens"][1].tolist() == [3, 0, 0]
    recipe = {"time_masks": 2, "time_mask_share": 0.2, "frequency_masks": 2, "frequency_mask_width": 27, "speed": 0.1}
    augmented = TASK.transform({"mels": 80}, recipe)({"audio": tone(), "rate": 16000, "id": "a"}, np.random.default_rng(1))
    assert (augmented["features"] == 0).any() and 45 <= len(augmented["features"]) <= 57


def test_word_error_rate():
    found, per_sample = rates(["a b c", "x"], ["a b d", "x y"])
    assert found == {"wer": pytest.approx(2 / 5), "cer": pytest.approx(3 / 8), "exact": 0.0} and per_sample["exact"] == [0.0, 0.0]
    assert rates(["", "b"], ["a", "b"])[0]["wer"] == 0.5


def test_the_baseline_says_the_most_frequent_transcript():
    train = Spoken([tone()] * 3, 16000, ["no", "no", "yes"], ENGLISH, ["a"] * 3)
    val = Spoken([tone()] * 2, 16000, ["no", "yes"], ENGLISH, ["a"] * 2)
    from formarium.task import Data

    name, found = TASK.baseline(Data("d", "speech-recognition", {"train": train, "val": val}))
    assert name == "the most frequent transcript" and found["wer"] == 0.5


def said(*texts):
    n = len(texts)
    return Transcripts([*texts], [[1]] * n, torch.zeros(n), torch.full((n, 12, 29), 1 / 29), torch.full((n,), 12))


def test_rows_files_and_pictures(tmp_path):
    batch = TASK.collate([prepared({"audio": tone(), "rate": 16000, "text": t, "tokens": [1], "id": f"x/{t}.wav"}) for t in ("one", "two")])
    prediction = said("one", "ten")
    rows = TASK.rows(prediction, batch, [])
    assert [r["text"] for r in rows] == ["one", "ten"] and rows[0]["seconds"] == 0.5 and "note" not in rows[0]
    paths = TASK.write(prediction, batch, tmp_path)
    assert [p.name for p in paths] == ["x_one.txt", "x_one.json", "x_two.txt", "x_two.json"] and paths[0].read_text() == "one\n"
    sheet = np.asarray(TASK.draw(prediction, batch))
    assert sheet.ndim == 3 and len(np.unique(sheet.reshape(-1, 3), axis=0)) > 50
    assert confusions(["ten b"], ["two b c"]) == {("two", "ten"): 1, ("c", ""): 1}
    assert [*TASK.details([prediction], [batch], [])] == ["Words taken for others"] and TASK.details(
        [said("one", "two")], [batch], []
    ) == {}


def test_what_is_one_recording():
    assert TASK.is_single(tone()) and TASK.is_single(np.zeros((100, 2))) and TASK.is_single({"audio": tone()})
    assert not TASK.is_single([tone()])
    assert len(predict(create("squeezeformer_micro"), [tone(), {"audio": tone(rate=8000), "rate": 8000}])) == 2


# sample data --------------------------------------------------------------------------------------------------------


def test_the_synthesiser_says_the_same_from_the_same_seed():
    def hear(seed):
        with Synthesiser(seed) as voice:
            return [voice.say(t, v) for t, v in (("one", "en-us+f1"), ("two three", "en+m3"))]

    first, again = hear(0), hear(0)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert 0.2 < len(first[0]) / 16000 < 1.0 and 0.05 < np.abs(first[0]).max() <= 1 and len(first[1]) > len(first[0])
    with pytest.raises(UnknownName), Synthesiser() as voice:
        voice.say("one", "klingon-voice")


@pytest.mark.slow
def test_spoken_digits():
    data = TASK.sample("digits")
    train, val = data.splits["train"], data.splits["val"]
    assert len(train) == 400 and len(val) == 100 and all(1 <= len(t.split()) <= 3 for t in train.texts)
    assert all(0.2 < len(a) / train.rate < 4 and np.abs(a).max() > 0.01 for a in train.audio)
    assert TASK.baseline(data)[1]["wer"] > 0.7


def test_unknown_sample():
    with pytest.raises(UnknownName, match="digits"):
        TASK.sample("digit")
