"""Paths of the parts of transformers' encoders: one table, data only.

`encoders.Encoder` reads it. Paths are dotted attribute paths. tests/methods/test_encoders.py builds a tiny
model of every type and checks the table against transformers 5.17; a new model type needs an entry here and
a configuration there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class ModelDescription:
    """One model type; paths named `layer_*` start at an encoder layer, the others at the encoder.

    Attributes:
        model_type: `config.model_type`.
        encoder: candidate paths from a model to its encoder, tried in order; "" is the model itself.
        layers: path to the ModuleList of layers.
        hidden_size: config attribute of the width.
        main_input: name of the encoder's input.
        input_dims: number of dimensions of the main input, the batch first.
        time_dim: the dimension of the main input that `lengths` counts along.
        input_sizes: dimensions of the main input, each with the config attribute of its size.
        frames: how positions of the main input become frames of the layers: "conv" (the convolutions of
            `config.conv_kernel` and `config.conv_stride`), "halved" (one convolution of stride 2), "same", or
            "fixed" (every input has the same length and all its frames count).
        takes_mask: whether the encoder honours `attention_mask`, of the size of the main input's time axis.
        padding: whether a padded batch changes the valid frames of an utterance: "exact" (it does not),
            "layer_norm_stem" (it does not if `config.feat_extract_norm` is "layer"; a group norm takes its
            statistics over the padding too), "leaks" (a convolution over frames mixes padding in).
        final_norm: path of the norm that follows the last layer, or None.
        final_norm_if: config attribute that says whether `final_norm` comes last; elsewhere it comes first.
        behind_layers: paths of parts (and parameters) that the layers' outputs do not depend on, as the model
            runs outside training, without the final norm.
        last_state_normed: whether the last of `output_hidden_states` has gone through `final_norm`.
        prefix_tokens: learned tokens in front of the frames.
        layer_attention: the self-attention module; it returns a tensor or a tuple led by one.
        layer_query, layer_key, layer_value, layer_attention_output: its linear projections.
        fused: how one module makes the first three, whose paths are then the same: None (it does not), "rows"
            (a weight `(3 D, D)`, as in timm's `qkv` and in `nn.MultiheadAttention`) or "columns" (`(D, 3 D)`,
            the transposed weight of GPT-2).
        layer_mlp: the two linear layers of the (last, where there are two) feed-forward block, in order.
        activation: config attribute that names the activation between the two.
        calls_projections: whether those four are called as modules; elsewhere their weights go into a
            function, and the last one's output is the (first) result of `layer_attention`.
        attention_alone_mixes: whether the tokens of a layer, dimension 1 of its input, meet in its attention
            only, so that others can be put in front of them; False too where time comes before the batch.
        shares_position_bias: whether layers take a bias over pairs of positions from the layer before.
        keeps_keys: whether a call keeps the keys and values of all layers unless it has `use_cache=False`.
    """

    model_type: str
    encoder: tuple[str, ...]
    layers: str
    main_input: Literal["input_values", "input_features", "input_ids", "pixel_values"]
    input_dims: int
    time_dim: int
    frames: Literal["conv", "halved", "same", "fixed"]
    padding: Literal["exact", "layer_norm_stem", "leaks"]
    layer_attention: str
    layer_query: str
    layer_key: str
    layer_value: str
    layer_attention_output: str
    layer_mlp: tuple[str, str]
    hidden_size: str = "hidden_size"
    takes_mask: bool = True
    final_norm: str | None = None
    final_norm_if: str | None = None
    last_state_normed: bool = False
    prefix_tokens: int = 0
    activation: str = "hidden_act"
    behind_layers: tuple[str, ...] = ()
    input_sizes: tuple[tuple[int, str], ...] = ()
    calls_projections: bool = True
    attention_alone_mixes: bool = True
    shares_position_bias: bool = False
    fused: Literal["rows", "columns"] | None = None
    keeps_keys: bool = False


_WAV2VEC2 = ModelDescription(
    model_type="wav2vec2",
    encoder=("wav2vec2", ""),
    layers="encoder.layers",
    main_input="input_values",
    input_dims=2,
    time_dim=1,
    frames="conv",
    padding="layer_norm_stem",
    behind_layers=("masked_spec_embed", "adapter", "intermediate_ffn"),
    final_norm="encoder.layer_norm",
    final_norm_if="do_stable_layer_norm",
    layer_attention="attention",
    layer_query="attention.q_proj",
    layer_key="attention.k_proj",
    layer_value="attention.v_proj",
    layer_attention_output="attention.out_proj",
    layer_mlp=("feed_forward.intermediate_dense", "feed_forward.output_dense"),
)

_CONFORMER = replace(
    _WAV2VEC2,
    model_type="wav2vec2-conformer",
    encoder=("wav2vec2_conformer", ""),
    # The positional convolution is there and is not run.
    behind_layers=(*_WAV2VEC2.behind_layers, "encoder.pos_conv_embed"),
    # The depthwise convolution of each layer is not masked.
    padding="leaks",
    final_norm_if=None,
    layer_attention="self_attn",
    layer_query="self_attn.linear_q",
    layer_key="self_attn.linear_k",
    layer_value="self_attn.linear_v",
    layer_attention_output="self_attn.linear_out",
    layer_mlp=("ffn2.intermediate_dense", "ffn2.output_dense"),
    attention_alone_mixes=False,
)

_AST = ModelDescription(
    model_type="audio-spectrogram-transformer",
    encoder=("audio_spectrogram_transformer", ""),
    layers="layers",
    main_input="input_values",
    input_dims=3,
    time_dim=1,
    input_sizes=((1, "max_length"), (2, "num_mel_bins")),
    frames="fixed",
    takes_mask=False,
    padding="exact",
    final_norm="layernorm",
    behind_layers=("pooler",),
    # The class token and the distillation token.
    prefix_tokens=2,
    layer_attention="attention",
    layer_query="attention.q_proj",
    layer_key="attention.k_proj",
    layer_value="attention.v_proj",
    layer_attention_output="attention.o_proj",
    layer_mlp=("mlp.fc1", "mlp.fc2"),
)

_VIT = replace(
    _AST,
    model_type="vit",
    encoder=("vit", ""),
    main_input="pixel_values",
    input_dims=4,
    time_dim=3,
    input_sizes=((1, "num_channels"), (2, "image_size"), (3, "image_size")),
    prefix_tokens=1,
)

_BERT = ModelDescription(
    model_type="bert",
    encoder=("bert", ""),
    layers="encoder.layer",
    main_input="input_ids",
    input_dims=2,
    time_dim=1,
    frames="same",
    padding="exact",
    behind_layers=("pooler",),
    layer_attention="attention",
    layer_query="attention.self.query",
    layer_key="attention.self.key",
    layer_value="attention.self.value",
    layer_attention_output="attention.output.dense",
    layer_mlp=("intermediate.dense", "output.dense"),
)

_DESCRIPTIONS = (
    _WAV2VEC2,
    replace(_WAV2VEC2, model_type="hubert", encoder=("hubert", "")),
    replace(
        _WAV2VEC2,
        model_type="wavlm",
        encoder=("wavlm", ""),
        calls_projections=False,
        shares_position_bias=True,
    ),
    replace(_WAV2VEC2, model_type="unispeech", encoder=("unispeech", "")),
    replace(_WAV2VEC2, model_type="unispeech-sat", encoder=("unispeech_sat", "")),
    replace(
        _WAV2VEC2,
        model_type="data2vec-audio",
        encoder=("data2vec_audio", ""),
        # The positional convolutions are several layers deep; only the input of the first is zeroed.
        padding="leaks",
        final_norm=None,
        final_norm_if=None,
    ),
    _CONFORMER,
    replace(
        _CONFORMER,
        model_type="wav2vec2-bert",
        encoder=("wav2vec2_bert", ""),
        main_input="input_features",
        input_dims=3,
        input_sizes=((2, "feature_projection_input_dim"),),
        frames="same",
        padding="exact",
        final_norm=None,
    ),
    ModelDescription(
        model_type="whisper",
        encoder=("model.encoder", "encoder", ""),
        layers="layers",
        main_input="input_features",
        input_dims=3,
        time_dim=2,
        input_sizes=((1, "num_mel_bins"),),
        frames="halved",
        takes_mask=False,
        padding="leaks",
        hidden_size="d_model",
        final_norm="layer_norm",
        last_state_normed=True,
        layer_attention="self_attn",
        layer_query="self_attn.q_proj",
        layer_key="self_attn.k_proj",
        layer_value="self_attn.v_proj",
        layer_attention_output="self_attn.out_proj",
        layer_mlp=("fc1", "fc2"),
        activation="activation_function",
    ),
    _AST,
    _VIT,
    replace(_VIT, model_type="deit", encoder=("deit", ""), prefix_tokens=2),
    _BERT,
    replace(_BERT, model_type="electra", encoder=("electra", ""), behind_layers=()),
    replace(_BERT, model_type="roberta", encoder=("roberta", "")),
    replace(_BERT, model_type="xlm-roberta", encoder=("roberta", "")),
    replace(
        _BERT,
        model_type="distilbert",
        encoder=("distilbert", ""),
        layers="transformer.layer",
        hidden_size="dim",
        layer_query="attention.q_lin",
        layer_key="attention.k_lin",
        layer_value="attention.v_lin",
        layer_attention_output="attention.out_lin",
        layer_mlp=("ffn.lin1", "ffn.lin2"),
        activation="activation",
    ),
    ModelDescription(
        model_type="gpt2",
        encoder=("transformer", ""),
        layers="h",
        main_input="input_ids",
        input_dims=2,
        time_dim=1,
        frames="same",
        padding="exact",
        final_norm="ln_f",
        last_state_normed=True,
        layer_attention="attn",
        layer_query="attn.c_attn",
        layer_key="attn.c_attn",
        layer_value="attn.c_attn",
        layer_attention_output="attn.c_proj",
        layer_mlp=("mlp.c_fc", "mlp.c_proj"),
        activation="activation_function",
        # A token sees those before it alone: the tokens of a prompt would not see the text.
        attention_alone_mixes=False,
        fused="columns",
        keeps_keys=True,
    ),
)

DESCRIPTIONS: dict[str, ModelDescription] = {each.model_type: each for each in _DESCRIPTIONS}
