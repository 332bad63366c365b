"""A recording is read whole, mono and at the upstream's rate, or refused in one line that names it."""

import math
import os
import struct
import sys

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from s3prl_metaperser.audio import HIGHEST_RATE, LOWEST_RATE, fault_of, read_audio
from s3prl_metaperser.errors import MetaPerSERError


def tone(rate, seconds=0.5, frequency=440.0):
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)


def test_samples_come_back_as_they_were_written(tmp_path):
    samples = np.array([0.0, 0.5, -0.25, 0.125], dtype=np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="PCM_16")
    audio = read_audio(tmp_path / "a.wav")
    assert audio.dtype == torch.float32
    assert audio.tolist() == samples.tolist()


def test_channels_are_averaged(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.array([[0.5, -0.5], [0.5, 0.25]]), 16_000, subtype="FLOAT")
    assert read_audio(tmp_path / "a.wav").tolist() == [0.0, 0.375]


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_any_rate_is_resampled(tmp_path, rate):
    soundfile.write(tmp_path / "a.flac", tone(rate), rate)
    audio = read_audio(tmp_path / "a.flac").numpy()
    assert len(audio) == 8_000
    assert np.abs(audio - tone(16_000))[500:-500].max() < 0.01


def test_resampling_is_torchaudios(tmp_path):
    for rate in (22_050, 11_025, 22_050):
        soundfile.write(tmp_path / "a.wav", tone(rate), rate, subtype="FLOAT")
        samples = torch.from_numpy(tone(rate).astype(np.float32))
        assert torch.equal(read_audio(tmp_path / "a.wav"), torchaudio.functional.resample(samples, rate, 16_000))


@pytest.mark.parametrize("rate", [4_001, 44_101, 96_001])
def test_a_rate_without_a_common_divisor_costs_no_table_of_it(tmp_path, rate):
    """A table of 16,000 by 44,101 numbers takes 5 GB and two minutes; beside it, ``tone`` says what is right."""
    soundfile.write(tmp_path / "a.wav", tone(rate), rate, subtype="FLOAT")
    audio = read_audio(tmp_path / "a.wav").numpy()
    assert len(audio) == math.ceil(int(rate * 0.5) * 16_000 / rate)
    assert audio.dtype == np.float32
    assert np.abs(audio - tone(16_000)[: len(audio)])[500:-500].max() < 0.01


@pytest.mark.parametrize("rate", [1, LOWEST_RATE - 1, HIGHEST_RATE + 1, 1_000_003, 2_000_000_000])
def test_a_rate_that_no_speech_is_recorded_with_is_refused_by_its_header(tmp_path, rate):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(100_000), rate)
    said = f"{path}: has {rate:,} samples a second; expected 4,000 to 192,000"
    with pytest.raises(MetaPerSERError, match="samples a second") as caught:
        read_audio(path)
    assert str(caught.value) == fault_of(path) == said


def test_a_rate_can_be_asked_for(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(16_000), 16_000)
    assert len(read_audio(tmp_path / "a.wav", sample_rate=8_000)) == 4_000


def cut_off(path):
    soundfile.write(path, tone(16_000), 16_000, subtype="PCM_16")
    path.write_bytes(path.read_bytes()[:1_000])


def cut_off_behind_another_chunk(path):
    data = struct.pack("<2000h", *range(2000))
    chunks = b"fmt " + struct.pack("<IHHIIHH", 16, 1, 1, 16_000, 32_000, 2, 16)
    chunks += b"LIST" + struct.pack("<I", 5) + b"abcde\0" + b"data" + struct.pack("<I", len(data)) + data
    path.write_bytes((b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks)[:-100])


def cut_off_flac(path):
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 32_000), 16_000, format="FLAC")
    path.write_bytes(path.read_bytes()[:30_000])


def through_a_pipe(path):
    """Write a flac that does not know how many samples it holds, 36 bits of its header."""
    soundfile.write(path, tone(16_000), 16_000, format="FLAC")
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    path.write_bytes(bytes(data))


def holding(value):
    def write(path):
        soundfile.write(path, np.append(np.zeros(999), value), 16_000, subtype="FLOAT")

    return write


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: path.write_bytes(b""), "0 bytes"),
        (lambda path: path.write_text("hello, I am text"), "is not a readable recording"),
        (lambda path: path.write_bytes(b"RIFF"), "is not a readable recording"),
        (lambda path: soundfile.write(path, np.zeros(0), 16_000), "holds no samples"),
        (cut_off, "is cut off: 15,044 bytes"),
        (cut_off_behind_another_chunk, "is cut off: 100 bytes"),
        (cut_off_flac, "clip.wav"),
        (through_a_pipe, "does not say how long it is"),
        (holding(math.nan), "not finite"),
        (holding(math.inf), "not finite"),
        (holding(-32768), "holds samples of up to 32,768; expected samples from -1 to 1"),
        (lambda path: soundfile.write(path, np.full((999, 2), 3e38), 16_000, subtype="FLOAT"), "not finite"),
    ],
)
def test_what_is_no_whole_recording_is_refused_by_name(tmp_path, make, expected):
    path = tmp_path / "clip.wav"
    make(path)
    with pytest.raises(MetaPerSERError) as caught:
        read_audio(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert expected in message
    assert "\n" not in message
    # Samples are not looked at before they are needed.
    is_in_the_samples = expected in ("clip.wav", "not finite") or expected.startswith("holds samples of")
    assert fault_of(path) == (None if is_in_the_samples else message)


def test_a_recording_in_floating_point_may_exceed_one(tmp_path):
    holding(1.5)(tmp_path / "clip.wav")
    assert read_audio(tmp_path / "clip.wav").max() == 1.5


def test_samples_without_a_header_are_no_recording(tmp_path):
    path = tmp_path / "clip.raw"
    path.write_bytes(bytes(64_000))
    with pytest.raises(MetaPerSERError, match="is not a readable recording"):
        read_audio(path)
    assert "is not a readable recording" in str(fault_of(path))


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems do not take such a name")
def test_a_name_that_is_not_utf8_can_be_read_but_not_told_of(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.wav")
    soundfile.write(tmp_path / "a.wav", tone(16_000), 16_000)
    (tmp_path / "a.wav").rename(path)
    assert len(read_audio(path)) == 8_000
    assert "not UTF-8" in str(fault_of(path))


def test_a_name_that_is_too_long_is_none(tmp_path):
    with pytest.raises(MetaPerSERError, match="cannot be read"):
        read_audio(tmp_path / ("a" * 300))


def test_a_size_that_a_pipe_could_not_know_is_no_cut(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(16_000), 16_000, subtype="PCM_16")
    data = bytearray(path.read_bytes())
    place = data.index(b"data") + 4
    data[place : place + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(bytes(data))
    assert len(read_audio(path)) == 8_000
