"""CTranslate2 files, whole and damaged, and the Whisper checkpoint that is made from one."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, WhisperConfig, WhisperFeatureExtractor, WhisperModel

from mmtransfer.data import DataError
from mmtransfer.demo import whisper
from mmtransfer.demo.ctranslate2 import read_ctranslate2


def encode_name(name: str) -> bytes:
    raw = name.encode() + b"\0"
    return struct.pack("<H", len(raw)) + raw


def encode_variable(name: str, value: np.ndarray) -> bytes:
    code = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}[value.dtype.name]
    header = struct.pack(f"<B{value.ndim}IBI", value.ndim, *value.shape, code, value.nbytes)
    return encode_name(name) + header + value.tobytes()


def encode_file(
    variables: Sequence[tuple[str, np.ndarray]],
    aliases: Sequence[tuple[str, str]] = (),
    spec: str = "WhisperSpec",
    version: int = 6,
) -> bytes:
    parts = [struct.pack("<I", version), encode_name(spec), struct.pack("<II", 3, len(variables))]
    parts += [encode_variable(name, value) for name, value in variables]
    parts.append(struct.pack("<I", len(aliases)))
    parts += [encode_name(alias) + encode_name(name) for alias, name in aliases]
    return b"".join(parts)


SAMPLE_VARIABLES = [
    ("a/weight", np.arange(6, dtype=np.float32).reshape(2, 3)),
    ("a/bias", np.array([1.5, -2.0], dtype=np.float16)),
    ("heads", np.array(6, dtype=np.int16)),
    ("quantised", np.array([[1, -1]], dtype=np.int8)),
]


class TestReadCTranslate2:
    def test_round_trip(self, tmp_path):
        (tmp_path / "model.bin").write_bytes(encode_file(SAMPLE_VARIABLES, [("b", "a/bias")], "TestSpec"))
        file = read_ctranslate2(tmp_path / "model.bin")
        assert (file.version, file.spec, file.revision, file.aliases) == (6, "TestSpec", 3, {"b": "a/bias"})
        assert list(file.variables) == [*(name for name, _ in SAMPLE_VARIABLES), "b"]
        for name, value in SAMPLE_VARIABLES:
            assert file.variables[name].dtype == value.dtype
            np.testing.assert_array_equal(file.variables[name], value)
        assert file.variables["b"] is file.variables["a/bias"]
        assert not file.variables["a/weight"].flags.writeable

    def test_every_truncation_is_caught(self, tmp_path):
        whole = encode_file(SAMPLE_VARIABLES, [("b", "a/bias")])
        for size in range(len(whole)):
            path = tmp_path / f"{size}.bin"
            path.write_bytes(whole[:size])
            with pytest.raises(DataError, match=rf"{size}\.bin .*fetch it again"):
                read_ctranslate2(path)

    def test_every_flipped_byte_is_read_or_caught(self, tmp_path):
        whole = encode_file(SAMPLE_VARIABLES, [("b", "a/bias")])
        for index in range(len(whole)):
            path = tmp_path / f"{index}.bin"
            path.write_bytes(whole[:index] + bytes([whole[index] ^ 0xFF]) + whole[index + 1 :])
            # Any other exception fails the test; a flipped weight is a valid file.
            with contextlib.suppress(DataError):
                read_ctranslate2(path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "cannot be read as a CTranslate2 model"),
            (encode_file([], version=3), "has version 3, and 4 to 6 are supported"),
            (encode_file(SAMPLE_VARIABLES) + b"x", "has 1 bytes after its last entry"),
            (encode_file([SAMPLE_VARIABLES[0]] * 2), "holds the variable a/weight twice"),
            (encode_file(SAMPLE_VARIABLES, [("b", "c")]), "has the alias b of c"),
            (encode_file(SAMPLE_VARIABLES, [("heads", "a/bias")]), "has the alias heads of a/bias"),
            (encode_file([])[:-8] + b"\xff" * 8, "claims 4294967295 variables, more than its size allows"),
            (
                encode_file([("w", np.zeros(1, np.float32))]).replace(
                    b"\x01\x01\0\0\0\0\x04", b"\x01\xff\xff\xff\xff\0\x04"
                ),
                r"stores 4 bytes for w of shape \(4294967295,\)",
            ),
            (
                encode_file([("w", np.zeros(1, np.int8))]).replace(b"w\0\x01", b"w\0\x63"),
                "claims rank 99 for w",
            ),
            (
                encode_file([("w", np.array(1, np.int8))]).replace(b"w\0\0\x01", b"w\0\0\x09"),
                "has dtype code 9 for w",
            ),
        ],
    )
    def test_impossible_content(self, tmp_path, content, message):
        (tmp_path / "model.bin").write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_ctranslate2(tmp_path / "model.bin")

    def test_missing(self, tmp_path):
        with pytest.raises(DataError, match=r"none\.bin cannot be read"):
            read_ctranslate2(tmp_path / "none.bin")


TINY = {
    "vocab_size": 11,
    "d_model": 8,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 20,
    "num_mel_bins": 5,
    "max_source_positions": 6,
    "max_target_positions": 7,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def fused(state: dict[str, np.ndarray], prefix: str, names: str) -> dict[str, np.ndarray]:
    """Rows of several projections in one, with a zero key bias."""
    weights = [state[f"{prefix}.{name}_proj.weight"] for name in names]
    biases = [
        state.get(f"{prefix}.{name}_proj.bias", np.zeros(len(weights[0]), np.float16)) for name in names
    ]
    return {"weight": np.concatenate(weights), "bias": np.concatenate(biases)}


def whisper_variables(model: WhisperModel) -> dict[str, np.ndarray]:
    """The variables that CTranslate2's converter writes for `model`, in fp16."""
    state = {name: value.to(torch.float16).numpy() for name, value in model.state_dict().items()}
    variables: dict[str, np.ndarray] = {"decoder/embeddings/weight": state["decoder.embed_tokens.weight"]}

    def put(target: str, source: str, names: tuple[str, str] = ("weight", "bias")) -> None:
        for name, parameter in zip(names, ("weight", "bias"), strict=True):
            variables[f"{target}/{name}"] = state[f"{source}.{parameter}"]

    for conv in ("conv1", "conv2"):
        put(f"encoder/{conv}", f"encoder.{conv}")
    for side, layers in (("encoder", 2), ("decoder", 1)):
        put(f"{side}/layer_norm", f"{side}.layer_norm", ("gamma", "beta"))
        variables[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
        for layer in range(layers):
            ours, theirs = f"{side}/layer_{layer}", f"{side}.layers.{layer}"
            for block, norm in (
                ("self_attention", "self_attn"),
                ("attention", "encoder_attn"),
                ("ffn", "final"),
            ):
                if f"{theirs}.{norm}_layer_norm.weight" in state:
                    put(f"{ours}/{block}/layer_norm", f"{theirs}.{norm}_layer_norm", ("gamma", "beta"))
            put(f"{ours}/ffn/linear_0", f"{theirs}.fc1")
            put(f"{ours}/ffn/linear_1", f"{theirs}.fc2")
            blocks = {
                "self_attention/linear_0": ("self_attn", "qkv"),
                "self_attention/linear_1": ("self_attn", "out"),
            }
            if side == "decoder":
                blocks |= {
                    "attention/linear_0": ("encoder_attn", "q"),
                    "attention/linear_1": ("encoder_attn", "kv"),
                }
                blocks["attention/linear_2"] = ("encoder_attn", "out")
            for block, (attention, names) in blocks.items():
                parts = [names] if names == "out" else list(names)
                for name, value in fused(state, f"{theirs}.{attention}", parts).items():
                    variables[f"{ours}/{block}/{name}"] = value
    settings = {
        "activation": 3,
        "alibi": 0,
        "pre_norm": 1,
        "scale_embeddings": 0,
        "start_from_zero_embedding": 0,
    }
    variables |= {f"decoder/{name}": np.array(value, np.int8) for name, value in settings.items()}
    variables |= {"encoder/num_heads": np.array(2, np.int16), "decoder/num_heads": np.array(4, np.int16)}
    variables["decoder/alignment_heads"] = np.array(1, np.int16)
    variables["decoder/alignment_layer"] = np.array(-1, np.int16)
    return variables


TIED = [("decoder/projection/weight", "decoder/embeddings/weight")]


@pytest.fixture(scope="module")
def model() -> WhisperModel:
    torch.manual_seed(0)
    model = WhisperModel(WhisperConfig(**TINY, **TOKENS)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter).to(torch.float16))
    return model


class TestWhisper:
    @staticmethod
    def convert(
        folder: Path,
        variables: dict[str, np.ndarray],
        aliases: Sequence[tuple[str, str]] = TIED,
        **options: str,
    ) -> WhisperModel:
        (folder / "model.bin").write_bytes(encode_file(sorted(variables.items()), aliases, **options))
        return whisper.convert(read_ctranslate2(folder / "model.bin"), **TOKENS)

    def test_every_parameter_comes_back(self, model, tmp_path):
        converted = self.convert(tmp_path, whisper_variables(model))
        for name, size in TINY.items():
            assert getattr(converted.config, name) == size, name
        expected = model.state_dict()
        assert converted.state_dict().keys() == expected.keys()
        for name, value in converted.state_dict().items():
            assert value.dtype == torch.float32
            assert torch.equal(value, expected[name]), name

    def test_same_outputs_after_saving(self, model, tmp_path):
        self.convert(tmp_path, whisper_variables(model)).save_pretrained(tmp_path / "saved")
        loaded = AutoModel.from_pretrained(tmp_path / "saved").eval()
        inputs = {
            "input_features": torch.randn(2, 5, 12),
            "decoder_input_ids": torch.tensor([[1, 4, 5], [1, 3, 2]]),
        }
        with torch.inference_mode():
            torch.testing.assert_close(loaded(**inputs)[0], model(**inputs)[0], rtol=0, atol=0)

    def test_settings_differ(self, model, tmp_path):
        variables = whisper_variables(model) | {"decoder/pre_norm": np.array(0, np.int8)}
        with pytest.raises(DataError, match="decoder/pre_norm = 0, and only 1 is supported"):
            self.convert(tmp_path, variables)

    def test_setting_missing(self, model, tmp_path):
        variables = whisper_variables(model)
        del variables["decoder/activation"]
        with pytest.raises(DataError, match="lacks decoder/activation"):
            self.convert(tmp_path, variables)

    def test_key_bias(self, model, tmp_path):
        variables = whisper_variables(model)
        variables["encoder/layer_1/self_attention/linear_0/bias"][8] = 0.5
        with pytest.raises(DataError, match="has a key bias in encoder/layer_1/self_attention/linear_0/bias"):
            self.convert(tmp_path, variables)

    @pytest.mark.parametrize(
        "name", ["encoder/conv1/weight", "encoder/layer_1/ffn/linear_1/bias", "decoder/embeddings/weight"]
    )
    def test_weight_missing(self, model, tmp_path, name):
        variables = whisper_variables(model)
        del variables[name]
        aliases = [] if name.startswith("decoder/emb") else TIED
        with pytest.raises(DataError, match=r"model\.bin does not"):
            self.convert(tmp_path, variables, aliases)

    @pytest.mark.parametrize(
        "name", ["encoder/conv3/weight", "encoder/layer_0/ffn/linear_7/weight", "extra/weight"]
    )
    def test_weight_unknown(self, model, tmp_path, name):
        variables = whisper_variables(model) | {name: np.zeros(8, np.float16)}
        with pytest.raises(DataError, match=f"holds the weight {name}, which Whisper does not have"):
            self.convert(tmp_path, variables)

    def test_weight_shape(self, model, tmp_path):
        variables = whisper_variables(model)
        variables["decoder/layer_0/ffn/linear_1/bias"] = np.zeros(9, np.float16)
        with pytest.raises(DataError, match=r"does not describe a complete Whisper model: .*fc2\.bias"):
            self.convert(tmp_path, variables)

    def test_quantised(self, model, tmp_path):
        variables = whisper_variables(model)
        variables["encoder/layer_0/ffn/linear_0/weight"] = np.zeros((12, 8), np.int8)
        with pytest.raises(DataError, match="quantised models cannot be converted"):
            self.convert(tmp_path, variables)

    def test_other_specification(self, model, tmp_path):
        with pytest.raises(DataError, match="holds a TransformerSpec, and only WhisperSpec"):
            self.convert(tmp_path, whisper_variables(model), spec="TransformerSpec")

    def test_fingerprint_rejects_another_model(self):
        torch.manual_seed(0)
        config = WhisperConfig(**(TINY | {"max_source_positions": 1500, "num_mel_bins": 80}), **TOKENS)
        with pytest.raises(DataError, match="answers a test tone with"):
            whisper.check_fingerprint(WhisperModel(config).eval(), WhisperFeatureExtractor())
