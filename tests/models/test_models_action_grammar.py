"""Decoding of pi0-FAST held to what can be turned into actions."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny_recipe
from openpi.models.fast_codec import _BYTE_OF_CHARACTER, UndecodableActionsError, fit_codec, load_codec
from openpi.models.model import Observation
from openpi.models.tokenizer import BinningTokenizer, FASTTokenizer
from openpi.shared.tree import flatten, unflatten
from openpi.training.config import config_names, get_config

HORIZON, DIM = 7, 3


@pytest.fixture(scope="module", params=["published", "own"])
def tokenizer(golden: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FASTTokenizer:
    """With a codec like the published one, and one that was trained here (every byte is in its vocabulary)."""
    folder = golden / "tokenizers"
    if request.param == "own":
        own = tmp_path_factory.mktemp("codec")
        rng = np.random.default_rng(0)
        fit_codec(np.sin(rng.uniform(0, 6, (50, 1, DIM)) + np.arange(HORIZON)[:, None] / 3), vocab_size=256).save(own)
        return FASTTokenizer(64, fast_tokenizer_path=own, model_path=folder / "tiny_paligemma_tokenizer.model")
    return FASTTokenizer(64, fast_tokenizer_path=folder / "fast", model_path=folder / "tiny_paligemma_tokenizer.model")


def write(tokenizer: FASTTokenizer, seed: int, *, batch: int = 4, steps: int = 60) -> np.ndarray:
    """What a model without any idea writes under the grammar: int[batch, steps]."""
    grammar = tokenizer.grammar(HORIZON, DIM)
    vocabulary = 1105
    state = grammar.start(batch)

    @jax.jit
    def step(state, key):
        logits = 5 * jax.random.normal(key, (batch, vocabulary))
        token = jnp.argmax(grammar.constrain(state, logits), axis=-1)
        return grammar.advance(state, token), token

    rows = []
    for key in jax.random.split(jax.random.key(seed), steps):
        state, token = step(state, key)
        rows.append(token)
    return np.stack(rows, axis=1)


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_written_under_the_grammar_is_a_chunk(tokenizer: FASTTokenizer, seed: int) -> None:
    for tokens in write(tokenizer, seed):
        actions = tokenizer.decode_actions(tokens, HORIZON, DIM)
        assert actions.shape == (HORIZON, DIM)
        assert np.abs(actions).max() < 256, "no coefficient beyond what the codec was trained on"
        assert tokens[-1] == 1, "a finished sample repeats the end of the sequence"


def test_the_grammar_lets_pass_what_the_codec_writes(tokenizer: FASTTokenizer) -> None:
    actions = np.sin(np.arange(HORIZON)[:, None] / 3 + np.arange(DIM))
    tokens, _, _, is_target = tokenizer.tokenize("pick up the cup", np.zeros(2), actions)
    grammar = tokenizer.grammar(HORIZON, DIM)
    state = grammar.start(1)
    for token in tokens[is_target]:
        logits = grammar.constrain(state, jnp.zeros((1, 1105)))
        assert np.isfinite(logits[0, token])
        state = grammar.advance(state, jnp.array([token]))


def test_the_table_of_ids_agrees_with_the_decoder(golden: Path) -> None:
    codec = load_codec(golden / "tokenizers" / "fast")
    table = codec.id_table()
    rng = np.random.default_rng(0)
    checked = 0
    for _ in range(300):
        ids = rng.integers(0, codec.bpe.get_vocab_size(), rng.integers(1, 6))
        missing = 0
        for i in ids:
            missing = -1 if missing < 0 else int(table.missing_bytes_after[missing, i])
        text = codec.bpe.decode(ids.tolist(), skip_special_tokens=False)
        assert (missing == 0) == ("\N{REPLACEMENT CHARACTER}" not in text)
        if missing == 0:
            assert len(text) == table.num_characters[ids].sum()
            checked += 1
    assert checked > 20


@pytest.fixture(scope="module")
def model(golden: Path):
    """A pi0-FAST of random weights, which knows nothing of actions."""
    config = tiny_recipe.fast.model
    rng = np.random.default_rng(3)
    flat = flatten(config.abstract_params())
    # What is attended to has to count: the output of attention is made large.
    scales = {path: 10 if "attn_vec_einsum" in path else 0.3 for path in flat}
    return config.load(unflatten({path: rng.normal(0, scales[path], flat[path].shape) for path in flat}))


def seen(model, tokenizer: FASTTokenizer, masked: tuple[str, ...] = (), cameras=("a", "b", "c")) -> Observation:
    """Two samples whose prompts differ in length; cameras `masked` are there and not real."""
    rng = np.random.default_rng(0)
    images = {key: rng.uniform(-1, 1, (2, *model.config.image_resolution, 3)).astype(np.float32) for key in "abc"}
    rows = [tokenizer.tokenize(prompt, np.zeros(2), None) for prompt in ("up", "pick up the cup and put it down")]
    tokens, mask, ar_mask, loss_mask = (jnp.asarray(np.stack(values)) for values in zip(*rows, strict=True))
    return Observation(
        images={key: jnp.asarray(images[key]) for key in cameras},
        image_masks={key: jnp.full(2, key not in masked) for key in cameras},
        state=jnp.zeros((2, 2)),
        tokenized_prompt=tokens.astype(jnp.int32),
        tokenized_prompt_mask=mask,
        token_ar_mask=ar_mask.astype(jnp.int32),
        token_loss_mask=loss_mask,
    )


def test_a_model_held_to_the_grammar_writes_chunks_that_end_at_different_tokens(model, tokenizer):
    options = {"max_decoding_steps": 48, "temperature": 20.0, "grammar": tokenizer.grammar(HORIZON, DIM)}
    sample = jax.jit(lambda key, observation: model.sample_actions(key, observation, **options))
    lengths = set()
    for seed in range(3):
        tokens = sample(jax.random.key(seed), seen(model, tokenizer))
        for row in np.asarray(tokens).astype(int):
            assert tokenizer.decode_actions(row, HORIZON, DIM).shape == (HORIZON, DIM)
            lengths.add(int(np.argmax(row == 1)))
    assert len(lengths) > 1


def test_a_masked_camera_changes_nothing_when_slots_are_exact(model, tokenizer):
    sample = jax.jit(
        lambda observation, exact_slots: model.sample_actions(
            jax.random.key(0), observation, max_decoding_steps=16, exact_slots=exact_slots
        ),
        static_argnums=1,
    )
    without = sample(seen(model, tokenizer, cameras=("a", "c")), False)
    masked = seen(model, tokenizer, masked=("b",))
    np.testing.assert_array_equal(sample(masked, True), without)
    as_published = sample(masked, False)
    assert (np.asarray(as_published) != np.asarray(without)).any(), "counted from the end, a real token is lost"


def test_what_is_no_chunk_is_refused_and_never_silently_zero(tokenizer: FASTTokenizer) -> None:
    tokens, *_ = tokenizer.tokenize("pick up the cup", np.zeros(2), np.zeros((HORIZON + 1, DIM)))
    with pytest.raises(UndecodableActionsError, match=r"24 coefficients; 7 x 3 actions have 21"):
        tokenizer.decode_actions(tokens, HORIZON, DIM)
    with pytest.raises(UndecodableActionsError, match=r"no 'Action: '"):
        tokenizer.decode_actions(np.zeros(5, np.int64), HORIZON, DIM)


def test_coefficients_that_no_training_could_have_seen_are_refused():
    codec = fit_codec(np.sin(np.arange(40.0)).reshape(4, 5, 2), vocab_size=256)
    alphabet = codec.bpe.get_vocab()
    pieces = {byte: piece for piece, byte in _BYTE_OF_CHARACTER.items()}
    ids = [alphabet[pieces[byte]] for byte in b"\xf4\x8f\xbf\xbf"] + codec.bpe.encode("a" * 9).ids
    with pytest.raises(UndecodableActionsError, match="beyond the codec's largest"):
        codec.decode(ids, 5, 2)
    table = codec.id_table()
    for lead in (0xC0, 0xED, 0xF4):
        assert table.missing_bytes_after[0, alphabet[pieces[lead]]] == -1


def test_text_is_no_bin(golden: Path):
    binning = BinningTokenizer(64, model_path=golden / "tokenizers" / "tiny_paligemma_tokenizer.model")
    text = binning._text._model.encode("Action: pick up the cup and the bowl")
    with pytest.raises(UndecodableActionsError, match="are no bins 0 to 255"):
        binning.decode_actions(np.array(text), 2, 1)


@pytest.mark.parametrize("name", config_names())
def test_every_registered_model_can_be_a_static_argument(name: str):
    hash(get_config(name).model)
