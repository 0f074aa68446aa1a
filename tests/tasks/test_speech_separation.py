import numpy as np
import pytest
import soundfile
import torch

from formarium import create, predict
from formarium.errors import BadInput, UnknownName
from formarium.task import Data
from formarium.task import task as task_of
from formarium.tasks.speech_separation.data import Mixed, Remix, write_folder
from formarium.tasks.speech_separation.model import Voices

TASK = task_of("speech-separation")


def tone(seconds=0.3, rate=8000, hertz=200.0):
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def pairs(count=5, speakers=2, seconds=0.3):
    rng = np.random.default_rng(0)
    sources = np.stack([[tone(seconds, hertz=rng.uniform(100, 900)) for _ in range(speakers)] for _ in range(count)])
    return Mixed(sources, 8000, [f"{i}" for i in range(count)])


@pytest.fixture
def folder(tmp_path):
    write_folder(Data("d", "speech-separation", {"train": pairs(4), "val": pairs(2)}), tmp_path)
    return tmp_path


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def prepared(sample, **recipe):
    return TASK.transform({"rate": 8000}, recipe or None)(sample, np.random.default_rng(0))


# reading ------------------------------------------------------------------------------------------------------------


def test_folders_are_read_back(folder):
    data = TASK.read(folder)
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 4, "val": 2} and data.model_args == {"speakers": 2} and not data.notes
    sample = data.splits["train"][1]
    np.testing.assert_allclose(sample["sources"], pairs(4)[1]["sources"], atol=1e-4)
    np.testing.assert_allclose(sample["mixture"], sample["sources"].sum(0), atol=1e-3)


def test_wsj0_names_and_a_folder_without_splits(folder):
    for old, new in (("train", "tr"), ("val", "cv")):
        (folder / old).rename(folder / new)
    assert [*TASK.read(folder).splits] == ["val", "train"]
    alone = TASK.read(folder / "tr")
    assert {k: len(v) for k, v in alone.splits.items()} == {"train": 3, "val": 1}


def test_three_speakers(tmp_path):
    write_folder(Data("d", "speech-separation", {"train": pairs(2, 3), "val": pairs(1, 3)}), tmp_path)
    assert TASK.read(tmp_path).model_args == {"speakers": 3}


# bad input ----------------------------------------------------------------------------------------------------------


def test_what_is_missing_is_named(folder, tmp_path):
    (folder / "train" / "s2" / "00001.wav").unlink()
    assert TASK.read(folder).notes == ["1 mixtures without all their sources left out: 00001.wav"]
    with pytest.raises(BadInput) as error:
        TASK.read(folder, strict=True)
    assert "00001.wav" in one_line(error)
    with pytest.raises(BadInput, match="no such path"):
        TASK.read(folder / "nowhere")
    with pytest.raises(BadInput, match="folders mix, s1 and s2"):
        TASK.read(folder / "train" / "mix")


def test_broken_and_silent_files_are_left_out_and_named(folder):
    (folder / "train" / "s1" / "00000.wav").write_bytes(b"nothing")
    soundfile.write(folder / "train" / "s2" / "00002.wav", np.zeros(2400), 8000)
    data = TASK.read(folder)
    assert len(data.splits["train"]) == 2 and "00000.wav can't be decoded" in data.notes[0] and "00002.wav silent" in data.notes[0]


def test_sources_must_fit_their_mixture(folder):
    soundfile.write(folder / "train" / "s1" / "00000.wav", tone(0.2), 8000)
    soundfile.write(folder / "train" / "s2" / "00001.wav", tone(rate=16000), 16000)
    dataset = TASK.read(folder).splits["train"]
    for index, said in ((0, "2400 samples, as in the mixture"), (1, "8000 Hz, the mixture's rate")):
        with pytest.raises(BadInput, match=said) as error:
            dataset[index]
        one_line(error)


@pytest.mark.parametrize(
    ("audio", "said"),
    [
        (np.zeros(8000, np.float32), "expected sound, got silence"),
        (tone(0.01), "at least 0.05 s"),
        (np.full(8000, np.inf, np.float32), "infinite"),
        (np.zeros((10, 20, 3), np.float32), "channels"),
    ],
)
def test_sound_that_cannot_be_separated(audio, said):
    with pytest.raises(BadInput, match=said) as error:
        prepared(TASK.from_memory(audio, 0))
    one_line(error)


def test_an_unreadable_file_is_one_line_among_the_others(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(), 8000)
    (tmp_path / "b.wav").write_bytes(b"noise")
    rows = predict(create("mossformer_micro"), tmp_path)
    assert len(rows[0]["levels_db"]) == 2 and "expected a sound file" in rows[1]["error"] and "\n" not in rows[1]["error"]


def test_other_rates_and_two_channels_are_said(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.stack([tone(rate=44100)] * 2, 1), 44100)
    (row,) = predict(create("mossformer_micro"), tmp_path / "a.wav")
    assert row["note"] == "2 channels averaged to one; resampled from 44100 to 8000 Hz" and abs(row["seconds"] - 0.3) < 1e-3


# batches, scores, output --------------------------------------------------------------------------------------------


def test_training_crops_all_alike():
    sample = prepared(pairs()[0], crop=0.1)
    assert sample["mixture"].shape == (800,) and sample["sources"].shape == (2, 800)
    np.testing.assert_allclose(sample["mixture"], sample["sources"].sum(0), atol=1e-6)
    assert prepared(pairs()[0], crop=1.0)["mixture"].shape == (8000,)


def test_recordings_of_different_lengths_go_in_batches_of_their_own():
    with pytest.raises(ValueError):
        TASK.collate([prepared(pairs(seconds=s)[0]) for s in (0.3, 0.2)])
    assert len(predict(create("mossformer_micro"), [tone(0.3), tone(0.2), tone(0.3)])) == 3


def test_remixing_keeps_sums_and_noise():
    batch = TASK.collate([prepared(pairs()[i]) for i in range(5)])
    batch["mixture"] = batch["mixture"] + 0.05
    mixed = Remix(1.0, 3.0)(batch, torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixed["mixture"], mixed["sources"].sum(1) + 0.05)
    assert not torch.allclose(mixed["sources"], batch["sources"])
    gain = mixed["sources"].square().sum(-1) / batch["sources"].square().sum(-1)
    assert (10 * gain.log10()).abs().max() < 3.5
    assert Remix(0.0, 3.0)(batch, torch.Generator()) is batch
    assert TASK.augment_batch({}, {}) is None


def test_scores_against_known_values():
    batch = TASK.collate([prepared(pairs()[i]) for i in range(3)])
    metrics, per_sample = TASK.score([Voices(batch["mixture"][:, None].expand_as(batch["sources"]))], [batch])
    assert metrics["si_sdr_improvement"] == pytest.approx(0, abs=1e-4)
    metrics, per_sample = TASK.score([Voices(batch["sources"].flip(1))], [batch])
    assert metrics["si_sdr_improvement"] > 40 and len(per_sample["si_sdr"]) == 3


def test_the_baseline_is_no_improvement():
    name, metrics = TASK.baseline(Data("d", "speech-separation", {"train": pairs(), "val": pairs(3)}))
    assert name == "the mixture itself" and metrics["si_sdr_improvement"] == 0 and -15 < metrics["si_sdr"] < 15


def test_files_rows_and_pictures(tmp_path):
    batch = TASK.collate([prepared(pairs()[i]) for i in range(2)])
    prediction = Voices(2 * batch["sources"])
    paths = TASK.write(prediction, batch, tmp_path)
    assert [p.name for p in paths] == ["0_speaker1.wav", "0_speaker2.wav", "1_speaker1.wav", "1_speaker2.wav"]
    audio, rate = soundfile.read(paths[0])
    assert rate == 8000
    np.testing.assert_allclose(audio, prediction.sources[0, 0].numpy(), atol=1e-3)
    loud = TASK.write(Voices(10 * batch["sources"]), batch, tmp_path)
    assert np.abs(soundfile.read(loud[0])[0]).max() < 1  # turned down, not clipped
    rows = TASK.rows(prediction, batch, [])
    assert rows[0]["seconds"] == 0.3 and rows[0]["si_sdr"] > 40 and len(rows[0]["levels_db"]) == 2
    sheet = np.asarray(TASK.draw(prediction, batch))
    assert sheet.ndim == 3 and len(np.unique(sheet.reshape(-1, 3), axis=0)) > 50


# sample data --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "speakers"), [("voices", 2), ("three-voices", 3)])
def test_voices(name, speakers):
    data = TASK.sample(name)
    train, val = data.splits["train"], data.splits["val"]
    assert len(train) == 320 and train[0]["sources"].shape == (speakers, 8000) and data.model_args == {"speakers": speakers}
    np.testing.assert_allclose(val[0]["mixture"], val[0]["sources"].sum(0), atol=1e-6)
    assert (train.sources.std(-1) > 0.01).all() and TASK.baseline(data)[1]["si_sdr"] < 1


def test_unknown_sample():
    with pytest.raises(UnknownName, match="voices"):
        TASK.sample("voice")
