"""TappedEncoder, without an edit, against `output_hidden_states`; its inputs, modes and hooks."""

from __future__ import annotations

import threading

import pytest
import torch
import transformers
from encoder_cases import ALL_TAPS, MASKED, VARIANTS, OpLog, length_mask, ragged_lengths
from tiny_encoders import BASE_VARIANT, TINY, make_input

from mmtransfer.encoders import DESCRIPTIONS, Encoder, TappedEncoder

RELEASE = tuple(int(number) for number in transformers.__version__.split(".")[:2])


def hidden_states(encoder, inputs, mask=None):
    """The states that transformers itself reports, `(B, T, C)` each, the embeddings first.

    Releases before 5.16 report some last states after the final norm, later ones before: as these.
    """
    # PyTorch's attention takes another path, with other rounding, while its weights require gradients.
    encoder.eval().requires_grad_(False)
    parts, outputs = Encoder(encoder), []
    hook = parts.layers[-1].register_forward_hook(lambda _m, _a, output: outputs.append(output))
    with torch.no_grad():
        states = encoder(inputs, attention_mask=mask, output_hidden_states=True).hidden_states
    hook.remove()
    assert len(states) == 5
    if parts.description.last_state_normed or RELEASE >= (5, 16):
        return states
    last = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    return (*states[:-1], last)


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_taps_are_the_hidden_states(model_type, changes):
    model = TINY[model_type].build(**changes)
    inputs = make_input(model_type)
    expected = hidden_states(Encoder(model).model, inputs)
    taps = TappedEncoder(model, ALL_TAPS)(inputs)
    assert taps.features.shape == (taps.lengths.sum(), 5, 16)
    for slot, state in enumerate(expected):
        torch.testing.assert_close(taps.scatter(taps.features[:, slot]), state, rtol=0, atol=0)
    assert taps.lengths.tolist() == [expected[0].shape[1]] * 3


@pytest.mark.parametrize("model_type", MASKED)
def test_padded_frames_are_dropped(model_type):
    model, lengths = TINY[model_type].build(), ragged_lengths(model_type)
    encoder, inputs = Encoder(model).model, make_input(model_type)
    expected = hidden_states(encoder, inputs, length_mask(lengths))
    taps = TappedEncoder(model, ALL_TAPS)(inputs, lengths)
    assert taps.lengths.tolist() == Encoder(model).frame_lengths(lengths).tolist()
    assert taps.features.shape[0] == taps.lengths.sum() < expected[0].shape[:2].numel()
    for slot, state in enumerate(expected):
        for row, length in enumerate(taps.lengths.tolist()):
            utterance = taps.split()[row][:, slot]
            torch.testing.assert_close(utterance, state[row, :length], rtol=0, atol=0)


@pytest.mark.parametrize("taps", [(3, 1), (-1, -3), (1, "embeddings", 2)])
def test_slots_follow_the_order_asked_for(taps):
    model, inputs = TINY["wav2vec2"].build(), make_input("wav2vec2")
    states = hidden_states(model, inputs)
    features = TappedEncoder(model, taps)(inputs).features
    for slot, tap in enumerate(taps):
        state = states[0] if tap == "embeddings" else states[1:][tap]
        assert torch.equal(features[:, slot], state.flatten(0, 1))


@pytest.mark.parametrize("model_type", TINY)
@pytest.mark.parametrize(("taps", "ran"), [((1, 0), [0, 1]), (("embeddings",), []), ((-1,), [0, 1, 2, 3])])
def test_nothing_runs_after_the_last_tap(model_type, taps, ran):
    model = TINY[model_type].build(head=True)
    frozen = TappedEncoder(model, taps)
    calls = []
    for index, layer in enumerate(frozen.parts.all_layers):
        # The attention is the first thing in a layer that computes.
        attention = layer.get_submodule(frozen.description.layer_attention)
        attention.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    norm = frozen.parts.final_norm
    if norm is not None:
        norm.register_forward_pre_hook(lambda *_: calls.append("norm"))
    model.register_forward_pre_hook(lambda *_: calls.append("head"))
    frozen(make_input(model_type))
    normed = frozen.description.last_state_normed and taps == (-1,)
    assert calls == ran + ["norm"] * normed


@pytest.mark.parametrize("model_type", MASKED)
def test_an_utterance_alone_and_in_a_padded_batch(model_type):
    """Equal where the table says that the model permits it, and only there."""
    frozen = TappedEncoder(TINY[model_type].build(), ALL_TAPS)
    lengths, inputs = ragged_lengths(model_type), make_input(model_type)
    together = frozen(inputs, lengths).split()
    alone = [frozen(inputs[row : row + 1, :length]).features for row, length in enumerate(lengths.tolist())]
    assert torch.equal(together[0], alone[0]) or torch.allclose(together[0], alone[0], atol=1e-5)
    worst = max(float((ours - theirs).abs().max()) for ours, theirs in zip(together, alone, strict=True))
    if frozen.description.padding == "leaks":
        assert worst > 1e-3
    else:
        assert worst < 2e-5


@pytest.mark.parametrize("model_type", [n for n in MASKED if DESCRIPTIONS[n].padding != "leaks"])
def test_values_in_the_padding_do_not_matter(model_type):
    frozen, lengths = TappedEncoder(TINY[model_type].build(), (0, 3)), ragged_lengths(model_type)
    clean, dirty = make_input(model_type), make_input(model_type)
    for row, length in enumerate(lengths.tolist()):
        dirty[row, length:] = 7
    torch.testing.assert_close(frozen(clean, lengths).features, frozen(dirty, lengths).features)


def test_group_norm_stem_sees_the_padding():
    frozen = TappedEncoder(TINY["wav2vec2"].build(**BASE_VARIANT), (3,))
    inputs, lengths = make_input("wav2vec2"), ragged_lengths("wav2vec2")
    short = frozen(inputs[2:, : lengths[2]]).features
    assert not torch.allclose(frozen(inputs, lengths).split()[2], short, atol=1e-3)


def test_spectrogram_transformer_ignores_lengths():
    frozen, inputs = (
        TappedEncoder(TINY["audio-spectrogram-transformer"].build(), (1,)),
        make_input("audio-spectrogram-transformer"),
    )
    plain = frozen(inputs)
    assert torch.equal(frozen(inputs, torch.tensor([16000, 5, 7])).features, plain.features)
    assert plain.index is None
    assert plain.lengths.tolist() == [plain.steps] * 3


class TestWhisper:
    def test_short_input_is_the_model_with_fewer_positions(self):
        """The same weights in a model whose window is exactly the input must agree."""
        model = TINY["whisper"].build()
        small = TINY["whisper"].build(max_source_positions=13)
        weights = {
            name: tensor[:13] if name == "encoder.embed_positions.weight" else tensor
            for name, tensor in model.state_dict().items()
        }
        small.load_state_dict(weights)
        inputs = make_input("whisper", size=26)
        expected = hidden_states(small.encoder, inputs)
        before = model.encoder.embed_positions.weight.clone()
        taps = TappedEncoder(model, ALL_TAPS)(inputs)
        for slot, state in enumerate(expected):
            torch.testing.assert_close(taps.scatter(taps.features[:, slot]), state)
        assert torch.equal(model.encoder.embed_positions.weight, before)
        assert model.config.max_source_positions == 30

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_short_inputs_mask_padding(self, attention):
        model = TINY["whisper"].build()
        model.set_attn_implementation(attention)
        frozen = TappedEncoder(model, ALL_TAPS)
        inputs, lengths = make_input("whisper", size=40), [40, 27, 14]
        for row, length in enumerate(lengths):
            inputs[row, :, length:] = 50.0
        taps = frozen(inputs, torch.tensor(lengths))
        assert taps.lengths.tolist() == [20, 14, 7]
        for row, (length, together) in enumerate(zip(lengths, taps.split(), strict=True)):
            alone = frozen(inputs[row : row + 1, :, :length]).features
            torch.testing.assert_close(together, alone, rtol=1e-4, atol=2e-5)

    def test_full_window_attends_to_padding_and_drops_it(self):
        model, inputs = TINY["whisper"].build(), make_input("whisper")
        states = hidden_states(model.encoder, inputs)
        taps = TappedEncoder(model, (0, 3))(inputs, torch.tensor([60, 31, 4]))
        assert taps.lengths.tolist() == [30, 16, 2]
        for row, utterance in enumerate(taps.split()):
            assert torch.equal(utterance[:, 1], states[4][row, : len(utterance)])

    def test_too_long(self):
        with pytest.raises(ValueError, match="expects the mel input features to be of length 60"):
            TappedEncoder(TINY["whisper"].build(), (0,))(make_input("whisper", size=62))


class TestFrozen:
    def test_no_graph_and_no_gradient(self):
        model = TINY["wav2vec2"].build()
        frozen = TappedEncoder(model, (1, 3))
        assert not any(parameter.requires_grad for parameter in model.parameters())
        # Someone may thaw it by accident: still no graph.
        model.requires_grad_(True)
        taps = frozen(make_input("wav2vec2").requires_grad_(True))
        assert not taps.features.requires_grad
        assert not taps.features.is_inference()
        weight = torch.ones(16, requires_grad=True)
        (taps.features * weight).sum().backward()
        assert all(parameter.grad is None for parameter in model.parameters())

    @pytest.mark.parametrize("model_type", ["wav2vec2", "wav2vec2-bert", "whisper", "bert"])
    def test_always_in_eval_mode(self, model_type):
        model, inputs = TINY[model_type].build(), make_input(model_type)
        expected = TappedEncoder(model, (0, 3))(inputs).features
        parent = torch.nn.ModuleDict({"encoder": TappedEncoder(model, (0, 3))})
        parent.train()
        assert parent.training
        assert not any(module.training for module in parent["encoder"].modules())
        model.train()
        assert torch.equal(parent["encoder"](inputs).features, expected)
        assert not Encoder(model).model.training

    def test_dtype_casts_the_encoder_and_ignores_autocast(self):
        model, inputs = TINY["wav2vec2"].build(), make_input("wav2vec2")
        frozen = TappedEncoder(model, ("embeddings", 0, 3), dtype=torch.bfloat16)
        assert frozen.dtype == torch.bfloat16
        plain = frozen(inputs).features
        assert plain.dtype == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.float16):
            assert torch.equal(frozen(inputs).features, plain)

    def test_autocast_of_the_caller_applies_without_dtype(self):
        frozen = TappedEncoder(TINY["wav2vec2"].build(), ALL_TAPS)
        inputs, lengths = make_input("wav2vec2"), ragged_lengths("wav2vec2")
        exact = frozen(inputs, lengths).features
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = frozen(inputs, lengths).features
        assert not torch.equal(cast.float(), exact)
        torch.testing.assert_close(cast.float(), exact, rtol=0.1, atol=0.1)


class TestMechanism:
    def test_taps_are_written_in_place(self):
        """One tensor of the buffer's size is made, and the layers are selected straight into it."""
        frozen = TappedEncoder(TINY["wav2vec2"].build(), (0, 2, 3))
        inputs, lengths = make_input("wav2vec2"), ragged_lengths("wav2vec2")
        frames = int(frozen.parts.frame_lengths(lengths).sum())
        with OpLog() as log:
            features = frozen(inputs, lengths).features
        assert features.is_contiguous()
        made = [name for name, shape in log.calls if torch.Size(shape).numel() == frames * 3 * 16]
        assert made == ["aten.new_empty.default"]
        assert log.calls.count(("aten.index_select.out", (frames, 16))) == 3

    def test_hooks_go_away_even_after_an_error(self):
        model = TINY["wav2vec2"].build()
        frozen = TappedEncoder(model, (0, 3))
        inputs = make_input("wav2vec2")
        hooks = [layer._forward_hooks for layer in frozen.parts.all_layers]
        before = [dict(hook) for hook in hooks]
        expected = frozen(inputs).features
        assert [dict(hook) for hook in hooks] == before

        def fail(*_):
            raise KeyError("broken layer")

        handle = frozen.parts.all_layers[2].register_forward_hook(fail)
        with pytest.raises(KeyError, match="broken layer"):
            frozen(inputs)
        handle.remove()
        assert [dict(hook) for hook in hooks] == before
        assert torch.equal(frozen(inputs).features, expected)
        model(inputs, output_hidden_states=True)

    def test_threads_share_a_model(self):
        model = TINY["wav2vec2"].build()
        encoders = [TappedEncoder(model, taps) for taps in [(0, 3), (3,), (1, 2), (2, 0)]]
        inputs = [make_input("wav2vec2", batch=1 + i, size=90 + 30 * i) for i in range(4)]
        expected = [frozen(x).features for frozen, x in zip(encoders, inputs, strict=True)]
        results: list[list[bool]] = [[] for _ in encoders]

        def work(index):
            for _ in range(10):
                results[index].append(torch.equal(encoders[index](inputs[index]).features, expected[index]))

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [[True] * 10] * 4

    def test_works_inside_a_compiled_function(self):
        frozen, inputs = TappedEncoder(TINY["wav2vec2"].build(), (1,)), make_input("wav2vec2")
        compiled = torch.compile(lambda x: 2 * frozen(x).features, backend="eager")
        assert torch.equal(compiled(inputs), 2 * frozen(inputs).features)


class TestInputs:
    def test_mask_is_lengths(self):
        frozen, lengths = TappedEncoder(TINY["hubert"].build(), (3,)), ragged_lengths("hubert")
        inputs = make_input("hubert")
        by_mask = frozen(input_values=inputs, attention_mask=length_mask(lengths))
        by_lengths = frozen(inputs, lengths.to(torch.int32))
        assert torch.equal(by_mask.features, by_lengths.features)
        assert by_mask.lengths.tolist() == by_lengths.lengths.tolist()
        assert by_mask.lengths.dtype == torch.int64
        wins = frozen(inputs, torch.tensor([1, 1, 1]), attention_mask=length_mask(lengths))
        assert torch.equal(wins.features, by_lengths.features)

    @pytest.mark.parametrize("model_type", ["wav2vec2", "wav2vec2-bert", "bert", "whisper"])
    def test_utterances_without_a_frame(self, model_type):
        frozen = TappedEncoder(TINY[model_type].build(), (0, 3))
        size = 40 if model_type == "whisper" else None
        inputs = make_input(model_type, size=size)
        full = inputs.shape[frozen.description.time_dim]
        taps = frozen(inputs, torch.tensor([0, full, 0]))
        assert taps.lengths.tolist() == [0, taps.steps, 0]
        torch.testing.assert_close(taps.features, frozen(inputs[1:2]).features, rtol=1e-4, atol=1e-5)
        nothing = frozen(inputs, torch.zeros(3, dtype=torch.int64))
        assert nothing.features.shape == (0, 2, 16)
        assert nothing.scatter(nothing.features[:, 0]).shape == (3, nothing.steps, 16)

    def test_one_short_frame_beside_too_short_ones(self):
        """transformers' own frame mask indexes out of range for these lengths."""
        frozen = TappedEncoder(TINY["wav2vec2"].build(), (3,))
        least = frozen.parts.minimum_length
        taps = frozen(make_input("wav2vec2", size=least), torch.tensor([least, least - 1, 1]))
        assert taps.lengths.tolist() == [1, 0, 0]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                {"input_features": "x"},
                "main input of wav2vec2 is called 'input_values', got 'input_features'",
            ),
            ({}, "give the main input once"),
            ({"inputs": "x", "input_values": "x"}, "give the main input once"),
            ({"inputs": torch.zeros(3)}, "must have 2 dimensions"),
            ({"inputs": torch.zeros(3, 5)}, "at least 16 long"),
            ({"inputs": "x", "lengths": torch.tensor([120, 5])}, "one entry per utterance"),
            ({"inputs": "x", "lengths": torch.tensor([121, 5, 5])}, r"within \[0, 120\]"),
            ({"inputs": "x", "lengths": torch.tensor([-1, 5, 5])}, r"within \[0, 120\]"),
            ({"inputs": "x", "lengths": torch.ones(3, 1, dtype=torch.int64)}, r"lengths must be \(B,\)"),
            ({"inputs": "x", "attention_mask": torch.ones(3, 7)}, "attention_mask must be"),
            ({"inputs": "x", "attention_mask": length_mask(torch.full((3,), 120)).triu(1)}, "right-padded"),
        ],
    )
    def test_value_errors(self, arguments, message):
        inputs = make_input("wav2vec2")
        arguments = {key: inputs if isinstance(value, str) else value for key, value in arguments.items()}
        with pytest.raises(ValueError, match=message):
            TappedEncoder(TINY["wav2vec2"].build(), (0,))(**arguments)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"inputs": [1.0]}, "input_values must be a tensor, got list"),
            ({"inputs": torch.zeros(1, 99), "lengths": [99]}, "lengths must be a tensor, got list"),
            ({"inputs": torch.zeros(1, 99), "lengths": torch.tensor([0.5])}, "integer dtype"),
        ],
    )
    def test_type_errors(self, arguments, message):
        with pytest.raises(TypeError, match=message):
            TappedEncoder(TINY["wav2vec2"].build(), (0,))(**arguments)


class TestConstruction:
    @pytest.mark.parametrize("taps", [(4,), (-5,), (True,), (1.0,), ("last",), ()])
    def test_unknown_taps(self, taps):
        with pytest.raises(ValueError, match=r"layer indices in \[-4, 3\] or 'embeddings'"):
            TappedEncoder(TINY["bert"].build(), taps)

    @pytest.mark.parametrize("taps", [(1, 1), (3, -1), ("embeddings", "embeddings")])
    def test_repeated_taps(self, taps):
        with pytest.raises(ValueError, match="distinct"):
            TappedEncoder(TINY["bert"].build(), taps)

    def test_meta_device(self):
        with pytest.raises(ValueError, match="meta device"):
            TappedEncoder(TINY["bert"].build().to("meta"), (0,))

    def test_dtype(self):
        with pytest.raises(ValueError, match="floating dtype"):
            TappedEncoder(TINY["bert"].build(), (0,), dtype=torch.int8)

    def test_models_without_a_row(self):
        model = TINY["bert"].build()
        model.config.model_type = "sew"
        with pytest.raises(ValueError, match="pass a ModelDescription"):
            TappedEncoder(model, (0,))


@pytest.mark.parametrize("model_type", ["wav2vec2", "whisper"])
def test_layer_drop_has_no_effect_in_training(model_type):
    name = "encoder_layerdrop" if model_type == "whisper" else "layerdrop"
    model, inputs = TINY[model_type].build(**{name: 0.9}), make_input(model_type)
    tapped = TappedEncoder(model, ALL_TAPS).train()
    expected = tapped(inputs).features
    tapped.model.train()
    for _ in range(3):
        assert torch.equal(tapped(inputs).features, expected)
