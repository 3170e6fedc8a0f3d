"""For each objective the model it trains: a decoder, an encoder with a head, or an encoder-decoder, in one of the
sizes, and of a shape that other programs can load."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, get_args

from torch import nn

from gristmill.core import Objective
from gristmill.errors import DataError, closest
from gristmill.model.config import EncoderDecoderConfig, ModelConfig
from gristmill.model.encoder import Encoder
from gristmill.model.encoder_decoder import EncoderDecoder
from gristmill.model.heads import HeadConfig, Headed
from gristmill.model.moe import MixtureOfExperts
from gristmill.model.presets import PUBLISHED, Preset, encoder_decoder, preset, published
from gristmill.model.transformer import Transformer
from gristmill.objectives.causal import CausalLM
from gristmill.objectives.denoising import BART, Denoising
from gristmill.objectives.fill_in_middle import FillInMiddle, MiddleTokens
from gristmill.objectives.masked import MaskedLM, Masking
from gristmill.objectives.mass import Mass
from gristmill.objectives.multi_token import MultiToken, MultiTokenModel
from gristmill.objectives.noising import NoiseOptions
from gristmill.objectives.permuted import PermutedLM
from gristmill.objectives.prefix import PrefixLM
from gristmill.objectives.replaced_token import Electra, ReplacedToken
from gristmill.objectives.router import WithRouterLosses
from gristmill.objectives.sequence_pair import Framing
from gristmill.objectives.span_corruption import SpanCorruption
from gristmill.objectives.ul2 import UL2
from gristmill.objectives.vocabulary import EncoderVocabulary, word_continuations
from gristmill.pretrain.config import DECODER, ENCODER, ObjectiveName, PretrainConfig
from gristmill.tokens.tokenizer import Tokenizer
from gristmill.tokens.train import CHATML_SPECIALS

SENTINELS = tuple(f"<extra_id_{number}>" for number in range(100))
FRAME = ("[MASK]", "[CLS]", "[SEP]")
MIDDLE = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
MODES = {"R": "[R]", "S": "[S]", "X": "[X]"}
_ENDS = ".!?"
_EXTRA_HEADS = 1


@dataclass(frozen=True)
class Recipe:
    """An objective and the model it trains; `core` is what is kept of the model when training is over."""

    objective: Objective
    model: nn.Module
    core: Any


def special_tokens(objective: ObjectiveName) -> tuple[str, ...]:
    """The special tokens of a tokenizer trained for an objective."""
    if objective == "fill_in_middle":
        return (*CHATML_SPECIALS, *MIDDLE)
    if objective in DECODER:
        return CHATML_SPECIALS
    if objective in ("span_corruption", "ul2"):
        return (CHATML_SPECIALS[0], *SENTINELS, *(MODES.values() if objective == "ul2" else ()))
    return (CHATML_SPECIALS[0], *FRAME)


def check_model(config: PretrainConfig) -> None:
    """Raise DataError when the objective cannot train the model of that name; before the data are looked at."""
    _decoder_config(config, 1) if config.objective in DECODER else _sizes(config)


def build(config: PretrainConfig, tokenizer: Tokenizer) -> Recipe:
    """The recipe of a run, its weights drawn from the seed.

    Raises DataError when the tokenizer lacks a token that the objective needs, or rows do not fit the model.
    """
    name = config.objective
    recipe = (
        _decoder(config, tokenizer)
        if name in DECODER
        else _encoder(config, tokenizer)
        if name in ENCODER
        else _encoder_decoder(config, tokenizer)
    )
    context = (recipe.core.config.encoder if isinstance(recipe.core, EncoderDecoder) else recipe.core.config).context
    if any(isinstance(part, MixtureOfExperts) for part in recipe.model.modules()):  # or few experts would learn all
        recipe = replace(recipe, objective=WithRouterLosses(recipe.objective))
    extra = getattr(recipe.objective, "extra_tokens", 0)
    if config.row_length + extra > context:
        raise DataError(
            f"rows of {config.row_length} tokens and {extra} that objective {name} adds do not fit the model's context "
            f"of {context}: set row_length to {context - extra} or less"
        )
    return recipe


def _decoder(config: PretrainConfig, tokenizer: Tokenizer) -> Recipe:
    model = Transformer(_decoder_config(config, tokenizer.vocab_size))
    model.initialise(config.seed)
    if config.objective == "multi_token":
        whole = MultiTokenModel(model, _EXTRA_HEADS)
        whole.initialise(config.seed)
        return Recipe(MultiToken(_EXTRA_HEADS), whole, model)
    if config.objective == "prefix":
        return Recipe(PrefixLM(), model, model)
    if config.objective == "fill_in_middle":
        prefix, suffix, middle = (_id(tokenizer, text) for text in MIDDLE)
        return Recipe(FillInMiddle(MiddleTokens(prefix, suffix, middle, _end(tokenizer))), model, model)
    return Recipe(CausalLM(), model, model)


def _encoder(config: PretrainConfig, tokenizer: Tokenizer) -> Recipe:
    vocabulary = _vocabulary(tokenizer)
    name, shape = config.objective, _bert_shape(config, tokenizer.vocab_size)
    masked = HeadConfig(kind="masked_lm", dense="gelu", norm=True)
    if name == "electra":
        quarter = shape.num_attention_heads // 4 or 1
        inner = quarter * shape.head_dim
        small = replace(
            shape,
            hidden_size=inner,
            num_attention_heads=quarter,
            num_key_value_heads=quarter,
            intermediate_size=4 * inner,
            embedding=replace(shape.embedding, size=shape.hidden_size),
        )
        discriminator = Headed(Encoder(shape), HeadConfig(kind="replaced_token", dense="gelu"))
        generator = Headed(Encoder(small), masked)
        discriminator.initialise(config.seed)
        generator.initialise(config.seed + 1)
        return Recipe(ReplacedToken(vocabulary), Electra(generator, discriminator), discriminator)
    model = Headed(Encoder(shape), masked)
    model.initialise(config.seed)
    if name == "permuted":
        return Recipe(PermutedLM(vocabulary, share=1 / 6), model, model)
    unit = {"masked": "token", "whole_word": "word", "spans": "span"}[name]
    return Recipe(MaskedLM(vocabulary, Masking(unit=unit)), model, model)  # type: ignore[arg-type]


def _encoder_decoder(config: PretrainConfig, tokenizer: Tokenizer) -> Recipe:
    end = _end(tokenizer)
    framing = Framing.t5(tokenizer.vocab_size, pad=end, end=end)
    shape = _t5_shape(config, tokenizer.vocab_size, end)
    model = EncoderDecoder(shape)
    model.initialise(config.seed)
    if config.objective in ("span_corruption", "ul2"):
        sentinels = tuple(_id(tokenizer, text) for text in SENTINELS)
        if config.objective == "span_corruption":
            return Recipe(SpanCorruption(framing, sentinels), model, model)
        modes = {mode: _id(tokenizer, text) for mode, text in MODES.items()}
        return Recipe(UL2(framing, sentinels, modes), model, model)  # type: ignore[arg-type]
    vocabulary = _vocabulary(tokenizer)
    if config.objective == "mass":
        return Recipe(Mass(framing, vocabulary), model, model)
    ends = frozenset(
        index
        for index in range(tokenizer.vocab_size)
        if index not in vocabulary.special_ids and (tokenizer.token_of(index) or "").endswith(tuple(_ENDS))
    )
    options = NoiseOptions(mask_id=vocabulary.mask_id, sentence_ends=ends)
    return Recipe(Denoising(framing, BART, options), model, model)


def _decoder_config(config: PretrainConfig, vocab_size: int) -> ModelConfig:
    if config.model in get_args(Preset):
        shape = preset(config.model, vocab_size)  # type: ignore[arg-type]
        return replace(shape, max_position_embeddings=max(shape.max_position_embeddings, config.row_length))
    known = (*get_args(Preset), *PUBLISHED)
    if config.model not in known:
        raise DataError(f"model {config.model!r} is no preset and no published decoder.{closest(config.model, known)}")
    shape = replace(published(config.model), vocab_size=vocab_size)
    if not shape.causal:
        raise DataError(f"objective {config.objective} trains a decoder, and {config.model} is an encoder")
    return shape


def _sizes(config: PretrainConfig) -> ModelConfig:
    if config.model not in get_args(Preset):
        raise DataError(
            f"objective {config.objective} takes a preset for its sizes ({', '.join(get_args(Preset))}), "
            f"got {config.model!r}.{closest(config.model, get_args(Preset))}"
        )
    return preset(config.model)  # type: ignore[arg-type]


def _bert_shape(config: PretrainConfig, vocab_size: int) -> ModelConfig:
    sizes, bert = _sizes(config), published("bert-base")
    return replace(
        bert,
        vocab_size=vocab_size,
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_attention_heads,
        head_dim=sizes.head_dim,
        intermediate_size=4 * sizes.hidden_size,
        max_position_embeddings=max(512, config.row_length + 2),
    )


def _t5_shape(config: PretrainConfig, vocab_size: int, start: int) -> EncoderDecoderConfig:
    """Encoder and decoder have half the layers each, so that the pair is about as large as a decoder."""
    sizes, t5 = _sizes(config), encoder_decoder("t5-small")

    def half(shape: ModelConfig) -> ModelConfig:
        return replace(
            shape,
            vocab_size=vocab_size,
            hidden_size=sizes.hidden_size,
            num_hidden_layers=max(1, sizes.num_hidden_layers // 2),
            num_attention_heads=sizes.num_attention_heads,
            num_key_value_heads=sizes.num_attention_heads,
            head_dim=sizes.head_dim,
            intermediate_size=4 * sizes.hidden_size,
            max_position_embeddings=max(512, 2 * config.row_length),
            logit_scale=None if shape.logit_scale is None else sizes.hidden_size**-0.5,
        )

    return replace(t5, encoder=half(t5.encoder), decoder=half(t5.decoder), decoder_start_token_id=start)


def _vocabulary(tokenizer: Tokenizer) -> EncoderVocabulary:
    if any(name == "mask_token" for name, _ in tokenizer.named_tokens):
        return EncoderVocabulary.of(tokenizer)
    mask, start, end = (_id(tokenizer, text) for text in FRAME)
    return EncoderVocabulary(
        size=tokenizer.vocab_size,
        mask_id=mask,
        cls_id=start,
        sep_id=end,
        special_ids=frozenset(tokenizer.special_tokens.values()),
        continues=word_continuations(tokenizer),
    )


def _id(tokenizer: Tokenizer, text: str) -> int:
    found = tokenizer.id_of(text)
    if found is None:
        raise DataError(
            f"the tokenizer has no token {text}, which this objective needs. Without --tokenizer the run trains one."
        )
    return found


def _end(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer names no eos_token: add one to its tokenizer_config.json")
    return tokenizer.eos_token_id
