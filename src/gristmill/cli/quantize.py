"""gristmill quantize: a model with weights of eight or four bits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gristmill.errors import RequestError

if TYPE_CHECKING:
    from gristmill.model.quantised.compare import Comparison
    from gristmill.model.quantised.quantise import QuantisationReport
    from gristmill.tokens.tokenizer import Tokenizer

WINDOW = 512
"""Tokens of a calibration sequence and of a compared one."""
_EVERY = 20
"""Of the default text every 20th article is compared on, and every 20th calibrates; no article does both."""


@dataclass(frozen=True)
class Config:
    """Write a decoder with quantised weights: a directory that every command reads, and quantisation.json in it, which
    tells sizes and errors."""

    model: str
    """Asset name, Hugging Face directory, GGUF file or run directory."""
    target: str
    """The directory to write; must not be there yet, or be empty."""
    scheme: Literal["int8", "w8a8", "int4"] = "int8"
    """int8 and int4: weights alone; w8a8: activations too, one scale per token."""
    method: Literal["round", "gptq", "awq"] = "round"
    """round: to nearest; gptq and awq: by what the layers read on the calibration text."""
    group_size: Literal[32, 64, 128] = 32
    """int4: inputs that share a scale; layers that it does not divide get eight bits."""
    by_activation: bool = True
    """gptq: columns with large inputs first, scales of the original weights; false: in order, scales as they come."""
    head: bool = True
    """Quantise the output head, to eight bits in any scheme."""
    embedding: bool = True
    """Quantise the embedding, to eight bits in any scheme; a tied head shares it."""
    calibration: str | None = None
    """gptq and awq: a text file; when not given, every 20th Wikipedia summary."""
    calibration_tokens: int = 16_384
    """Most tokens of it that are read."""
    verify: bool = False
    """Compare what was written with the model on held-out text: perplexity, logits, greedy choices."""
    text: str | None = None
    """verify: a text file; when not given, Wikipedia summaries that do not calibrate."""
    text_tokens: int = 16_384
    """verify: most tokens of it that are read."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of what is not quantised, and while quantising of the whole model."""


def run(config: Config) -> int:
    """Quantise, write and tell. Raises GristmillError for what is not supported or does not fit."""
    _refuse_foreign_options(config)
    from gristmill.evaluate.provenance import provenance
    from gristmill.files import write_json
    from gristmill.model.convert import refuse_existing
    from gristmill.model.load import load_model
    from gristmill.model.quantised.checkpoint import save_quantised
    from gristmill.model.quantised.quantise import quantise_model
    from gristmill.progress import progress

    target = Path(config.target)
    refuse_existing(target)
    model, tokenizer = load_model(config.model, dtype=config.dtype)
    window = min(WINDOW, model.config.context)
    held_out = _windows(config.text, tokenizer, config.text_tokens, window, 0, "text") if config.verify else []
    calibration = None
    if config.method != "round":
        limit = config.calibration_tokens
        calibration = _windows(config.calibration, tokenizer, limit, window, _EVERY // 2, "calibration")
    with progress(f"quantise to {config.scheme}", _layers(model, config)) as advance:
        report = quantise_model(
            model,
            config.scheme,
            group_size=config.group_size,
            method=config.method,
            calibration=calibration,
            head=config.head,
            embedding=config.embedding,
            by_activation=config.by_activation,
            advance=advance,
        )
    save_quantised(model, tokenizer, target, report)
    del model
    disk = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    facts: dict[str, Any] = {**asdict(report), "bytes_on_disk": disk, "provenance": provenance(config, 0)}
    write_json(target / "quantisation.json", facts)
    _show(report, disk)
    if config.verify:
        comparison = _compare(config, held_out)
        write_json(target / "quantisation.json", facts | {"comparison": asdict(comparison)})
        _show_comparison(comparison, config.text or "Wikipedia summaries")
    return 0


def _refuse_foreign_options(config: Config) -> None:
    defaults = {name: field.default for name, field in Config.__dataclass_fields__.items()}
    foreign = {
        "group_size": config.scheme != "int4",
        "by_activation": config.method != "gptq",
        "calibration": config.method == "round",
        "calibration_tokens": config.method == "round",
        "text": not config.verify,
        "text_tokens": not config.verify,
    }
    for name, idle in foreign.items():
        if idle and getattr(config, name) != defaults[name]:
            needs = {"group_size": "--scheme int4", "by_activation": "--method gptq"}.get(
                name, "--verify" if name.startswith("text") else "--method gptq or awq"
            )
            raise RequestError(f"--{name} applies with {needs} only", field=name)
    for name in ("calibration_tokens", "text_tokens"):
        if getattr(config, name) < 2 * WINDOW:
            raise RequestError(f"--{name} must be at least {2 * WINDOW}", field=name)


def _layers(model: Any, config: Config) -> int:
    from torch import nn

    count = sum(type(layer) is nn.Linear for layer in model.modules())
    return count - (not config.head) + (config.embedding and not (config.head and model.config.tie_word_embeddings))


def _windows(path: str | None, tokenizer: Tokenizer, most: int, window: int, first: int, field: str) -> list[list[int]]:
    """Token ids of a text in whole windows, `most` tokens at most."""
    from gristmill import assets
    from gristmill.corpus.sources import read_text, read_wikipedia_summaries

    if path is None:
        articles = read_wikipedia_summaries(assets.get("wikipedia-summaries"))
        texts = (article.text for number, article in enumerate(articles) if number % _EVERY == first)
    else:
        texts = (document.text for document in read_text(Path(path)))
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text + "\n\n", add_bos=False)
        if len(ids) >= most:
            break
    whole = min(len(ids), most) // window
    if whole < 2:
        raise RequestError(f"--{field}: {len(ids)} tokens of text; at least {2 * window} are needed", field=field)
    return [ids[i * window : (i + 1) * window] for i in range(whole)]


def _compare(config: Config, held_out: list[list[int]]) -> Comparison:
    from gristmill.model.load import load_model
    from gristmill.model.quantised.compare import compare_models
    from gristmill.progress import progress

    before, after = load_model(config.model, dtype=config.dtype)[0], load_model(config.target, dtype=config.dtype)[0]
    with progress("compare", len(held_out)) as advance:
        return compare_models(before, after, held_out, advance)


def _show(report: QuantisationReport, disk: int) -> None:
    saved = 1 - report.bytes_after / report.bytes_before
    print(f"{len(report.layers)} matrices as {report.scheme} by method {report.method}")
    print(f"  in memory  {report.bytes_before / 1e6:,.1f} MB -> {report.bytes_after / 1e6:,.1f} MB ({saved:.1%} less)")
    print(f"  on disk    {disk / 1e6:,.1f} MB")
    worst = max(report.layers, key=lambda layer: layer.output_error or layer.error)
    kind = "weights" if worst.output_error is None else "outputs"
    print(f"  error      at most {worst.output_error or worst.error:.2%} of the {kind} of a layer ({worst.name})")
    if report.in_eight_bits:
        print(f"  8 bits     groups of {report.group_size} do not divide: {', '.join(report.in_eight_bits)}")
    if report.left:
        print(f"  as it was  {', '.join(report.left)}")


def _show_comparison(comparison: Comparison, text: str) -> None:
    c = comparison
    print(f"on {c.tokens:,} tokens of {text}:")
    print(
        f"  perplexity {c.perplexity_before:.3f} -> {c.perplexity_after:.3f} "
        f"({c.added_nats:+.4f} ± {c.standard_error:.4f} nats per token)"
    )
    print(f"  logits     differ by {c.largest_difference:.2f} at most; their standard deviation is {c.spread:.2f}")
    print(f"  greedy     the same choice after {c.greedy_agreement:.1%} of tokens")
    print(
        f"  speed      {c.speed_before:,.0f} -> {c.speed_after:,.0f} tokens/s of the plain forward (no native kernels)"
    )
