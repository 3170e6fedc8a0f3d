"""`gristmill bench engine MODEL`: latency, throughput, memory, energy and money of the engine under load."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gristmill.cli.loading import Loading
from gristmill.errors import DataError, RequestError

_TEXT = (
    "A mill by the river ground the grain of three villages. When the water was high the wheel turned all night, and "
    "the miller slept beside it; when it was low he mended sacks and counted what was owed to him. One dry summer the "
    "wheel stood still for nine weeks. The villagers carried their grain over the hill to another mill, which was "
    "driven by the wind, and they came back with flour that was coarser and dearer. In autumn it rained again."
)


@dataclass(frozen=True)
class Config(Loading):
    """gristmill bench engine MODEL: measure the engine under load. The last line of the output is one JSON object."""

    what: Literal["engine"]
    """What is measured: the engine, in this process."""
    model: str
    """Asset name, Hugging Face directory, GGUF file or run directory."""
    policy: Literal["first-come", "shortest", "priority", "deadline", "fair"] = "first-come"
    """Which request goes first."""
    prefill_first: bool = False
    """New prompts before running requests: sooner first tokens, less even ones after."""
    device: str = "cpu"
    """Where the model runs: cpu, cuda or cuda:1."""
    arrivals: Literal["closed", "poisson", "burst"] = "closed"
    """closed: so many requests in flight at all times; poisson: they come at random; burst: several at one moment."""
    concurrency: int | None = None
    """closed: requests in flight; 1 when not given."""
    rate: float | None = None
    """poisson and burst: mean requests per second."""
    burst: int | None = None
    """burst: requests at one moment."""
    sweep: tuple[float, ...] = ()
    """Several concurrencies (closed) or rates, one load after the other."""
    requests: int = 16
    """Requests of each load."""
    prompt_tokens: int = 128
    """Random tokens of each prompt."""
    output_tokens: int = 32
    """Tokens of each answer."""
    shared_prefix: int = 0
    """First tokens of the prompts that are the same in all of them."""
    max_num_seqs: int = 64
    """Most requests that the engine runs at once."""
    seed: int = 0
    """Seed of prompts and arrivals."""
    text: str = ""
    """UTF-8 file whose perplexity is measured; a short text of our own when not given."""
    dollars_per_hour: float | None = None
    """Price of the machine, to tell the cost of a million tokens."""
    watts: float | None = None
    """Power to reckon with where the machine has no meter that can be read."""
    out: str = ""
    """JSON file for the report."""
    plot: str = ""
    """Image of throughput against latency over the loads (.svg, .png or .pdf)."""
    against: str = ""
    """Earlier report to compare with."""

    def levels(self) -> tuple[float, ...]:
        """The concurrencies or rates to measure. Raises RequestError, naming the option, for one that does not apply
        to these arrivals or is missing."""
        closed = self.arrivals == "closed"
        for name, applies in (("rate", not closed), ("concurrency", closed), ("burst", self.arrivals == "burst")):
            if getattr(self, name) is not None and not applies:
                raise RequestError(f"--{name} does not apply to --arrivals {self.arrivals}", field=name)
        if self.arrivals == "burst" and self.burst is None:
            raise RequestError("--arrivals burst needs --burst N", field="burst")
        given = self.concurrency if closed else self.rate
        if self.sweep and given is not None:
            raise RequestError(f"give --sweep or --{'concurrency' if closed else 'rate'}, not both", field="sweep")
        if not self.sweep and not closed and given is None:
            raise RequestError(f"--arrivals {self.arrivals} needs --rate or --sweep", field="rate")
        levels = self.sweep or (1 if given is None else given,)
        if min(levels) <= 0:
            raise RequestError(f"a load must be above 0, got {min(levels)}", field="sweep")
        if closed and any(level != int(level) for level in levels):
            raise RequestError(f"a concurrency must be a whole number, got {list(levels)}", field="sweep")
        return levels


def run(config: Config) -> int:
    """Measure, print a table, write what was asked for. Raises GristmillError for what does not fit."""
    from gristmill.engine.metrics.report import compare_reports
    from gristmill.files import atomic_path, write_json

    kind = Path(config.plot).suffix.removeprefix(".")
    if config.plot and kind not in ("svg", "png", "pdf"):
        raise RequestError(f"--plot must end in .svg, .png or .pdf, got {config.plot}", field="plot")
    earlier = _read_report(Path(config.against)) if config.against else None
    report = _measure(config, _read_text(config.text))
    facts = report.as_dict()
    _show(report)
    if config.out:
        write_json(Path(config.out), facts)
    if config.plot:
        from gristmill.engine.metrics.bench import plot_points

        with atomic_path(Path(config.plot)) as temporary:
            plot_points(report.points, temporary, kind=kind)
    if earlier is not None:
        for name, (before, now) in compare_reports(earlier, facts).items():
            print(f"{name:<24} {_number(before):>12} before {_number(now):>12} now")
    print(json.dumps(facts, allow_nan=False))
    return 0


def _measure(config: Config, text: str) -> Any:
    from gristmill.engine.llm import LLM
    from gristmill.engine.metrics.bench import LoadShape, measure_point, measure_prefill
    from gristmill.engine.metrics.memory import PeakMemory, cache_bytes, weight_bytes
    from gristmill.engine.metrics.report import BenchReport, Memory
    from gristmill.engine.scheduling.policies import policy_named
    from gristmill.evaluate.provenance import provenance

    levels = config.levels()
    shape = LoadShape(
        requests=config.requests,
        prompt_tokens=config.prompt_tokens,
        output_tokens=config.output_tokens,
        shared_prefix=config.shared_prefix,
        seed=config.seed,
    )
    most = min(config.max_num_seqs, int(max(levels)) if config.arrivals == "closed" else config.max_num_seqs)
    peak = PeakMemory(config.device)
    length = config.prompt_tokens + config.output_tokens
    llm = LLM(
        config.model,
        **config.loading,
        device=config.device,
        seed=config.seed,
        policy=policy_named(config.policy, prefill_first=config.prefill_first),
        max_num_seqs=config.max_num_seqs,
        kv_cache_tokens=max(16_384, most * (length + 16)),
    )
    if length > llm.max_model_len:
        raise RequestError(
            f"{config.prompt_tokens} prompt and {config.output_tokens} output tokens exceed the context of "
            f"{llm.max_model_len}",
            field="prompt_tokens",
        )
    conditions = _conditions(config, llm)
    quality = _quality(llm, text, config.text or "our own")
    prefill = measure_prefill(llm.engine, shape, conditions)
    points = [
        measure_point(
            llm.engine,
            shape,
            conditions,
            arrivals=config.arrivals,
            level=level,
            burst=config.burst or 1,
            stream=stream,
        )
        for stream, level in enumerate(levels)
    ]
    memory = Memory(
        weight_bytes(llm.engine.config, conditions.bytes_per_weight),
        cache_bytes(llm.engine.config, length, most, conditions.bytes_per_kv),
        peak.peak(),
    )
    return BenchReport(
        model=config.model,
        options=asdict(config),
        provenance=provenance(config, config.seed),
        machine={"flops": conditions.machine.flops, "bandwidth": conditions.machine.bandwidth},
        quality=quality,
        memory=memory,
        prefill=prefill,
        points=points,
        path=llm.path,
        engine=llm.engine.metrics.snapshot(),
    )


def _conditions(config: Config, llm: Any) -> Any:
    import torch

    from gristmill.engine.metrics.bench import Conditions
    from gristmill.engine.metrics.cost import SampledPower, find_meter
    from gristmill.engine.metrics.roofline import measure_machine

    dtype: torch.dtype = getattr(torch, config.dtype)
    meter, source = find_meter(config.device)
    if config.watts is not None:
        watts, source = config.watts, f"assumed: {config.watts:g} W"
        meter = SampledPower(lambda: watts, source=source)
    quantised = {None: float(dtype.itemsize), "int8": 1.0, "w8a8": 1.0, "int4": 0.5}  # scales left out
    return Conditions(
        config=llm.engine.config,
        machine=measure_machine(config.device, dtype=dtype),
        bytes_per_weight=quantised[config.quantization],
        bytes_per_kv=getattr(torch, _kv_dtype(config)).itemsize,
        seats=config.max_num_seqs,
        meter=meter,
        energy_source=source,
        dollars_per_hour=config.dollars_per_hour,
    )


def _kv_dtype(config: Config) -> str:
    plain = config.quantization is None and config.dtype == "float32"
    return config.kv_cache_dtype or ("float32" if plain else "bfloat16")


def _read_text(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8") if file else _TEXT
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text ({error})") from error


def _quality(llm: Any, text: str, source: str) -> Any:
    """Perplexity of the text, in windows of the context, each after the last token of the one before."""
    from gristmill.engine.metrics.report import Quality
    from gristmill.evaluate.metrics import perplexity

    ids = llm.tokenizer.encode(text)
    if len(ids) < 2:
        raise DataError(f"{source}: has fewer than two tokens, so nothing can be foretold")
    size = llm.max_model_len - 1
    scores = llm.score_many([(ids[at - 1 : at], ids[at : at + size]) for at in range(1, len(ids), size)])
    return Quality(perplexity(-sum(score.logprob for score in scores), len(ids) - 1), len(ids) - 1, source)


def _read_report(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a report ({error})") from error
    if not isinstance(found, dict) or not {"quality", "points", "memory"} <= found.keys():
        raise DataError(f"{path}: is no report of gristmill bench")
    return found


def _show(report: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    machine, memory, prefill = report.machine, report.memory, report.prefill
    console.print(
        f"machine: {machine['flops'] / 1e9:,.0f} GFLOP/s in products, reads {machine['bandwidth'] / 1e9:.1f} GB/s\n"
        f"path: {report.path}\n"
        f"memory: weights {memory.weights / 1e6:,.1f} MB, cache at most {memory.cache / 1e6:,.1f} MB, "
        f"process peak {'not told' if memory.peak is None else f'{memory.peak / 1e6:,.1f} MB'}\n"
        f"perplexity: {report.quality.perplexity:.3f} over {report.quality.tokens} tokens\n"
        f"prefill of one prompt: {1e3 * prefill.seconds:.1f} ms, {prefill.bound}-bound at {prefill.intensity:.0f} FLOP/"
        f"byte, {prefill.share:.0%} of the roofline\n"
        f"energy: {report.points[0].energy.source}"
    )
    table = Table(box=None)
    for name in (report.points[0].load, "tokens/s", "requests/s", "user tokens/s", "TTFT ms p50 p95 p99"):
        table.add_column(name, justify="right")
    for name in ("ITL ms p50 p95 p99", "latency s p50 p95 p99", "busy", "decode bound", "J/token", "$/1M", "errors"):
        table.add_column(name, justify="right")
    for point in report.points:
        s = point.summary
        table.add_row(
            f"{point.level:g}",
            f"{s.output_throughput:,.1f}",
            f"{s.request_throughput:.2f}",
            "-" if s.tokens_per_second is None else f"{s.tokens_per_second.mean:.1f}",
            _three(s.time_to_first_token, 1e3),
            _three(s.inter_token_latency, 1e3),
            _three(s.latency, 1.0),
            f"{point.slots_busy:.0%}",
            "-" if point.decode is None else f"{point.decode.bound} {point.decode.share:.0%}",
            _number(point.energy.joules_per_token),
            _number(point.dollars_per_million_tokens),
            str(point.errors),
        )
    console.print(table)


def _three(values: Any, scale: float) -> str:
    return "-" if values is None else " ".join(f"{scale * x:.4g}" for x in (values.p50, values.p95, values.p99))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
