"""A pretraining run: data, recipe, training, and a model that other programs can load."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gristmill.core import Loader
from gristmill.corpus.shards import check_vocabulary
from gristmill.corpus.workers import Prefetched
from gristmill.errors import DataError, GristmillError
from gristmill.evaluate.provenance import provenance
from gristmill.evaluate.training_report import write_training_report
from gristmill.files import atomic_directory, exclusive
from gristmill.model.encoder_decoder import EncoderDecoder
from gristmill.model.formats.huggingface import save_huggingface
from gristmill.model.moe import Router
from gristmill.objectives.compute import step_flops
from gristmill.objectives.replaced_token import Electra
from gristmill.pretrain import settings
from gristmill.pretrain.config import PretrainConfig
from gristmill.pretrain.data import loaders, prepare_shards, prepare_tokenizer, tokenizer_hash
from gristmill.pretrain.recipes import Recipe, build, check_model
from gristmill.tokens.tokenizer import Tokenizer
from gristmill.train.callbacks import Callback
from gristmill.train.checkpoint import Position
from gristmill.train.loop import train
from gristmill.train.parallel.layout import Parallel
from gristmill.train.watch.activations import ActivationMonitor
from gristmill.train.watch.early_stopping import EarlyStopping
from gristmill.train.watch.live import LiveView
from gristmill.train.watch.monitors import Alarms, MemoryMonitor, SpeedMonitor, WeightMonitor
from gristmill.train.watch.probes import ProbeTasks
from gristmill.train.watch.router_bias import RouterBias
from gristmill.train.watch.tensorboard import TensorBoard
from gristmill.train.world import World, model_tensors


@dataclass(frozen=True)
class Pretrained:
    """What a run leaves: the model as a Hugging Face directory, and how training went."""

    model: Path
    report: Path
    position: Position
    parameters: int
    is_main: bool
    """Whether this process is the one to tell of it."""
    utilisation: float
    """Share of the rows' room that held tokens."""
    epochs: float
    """How often the data were passed over; of a mixture, as many batches as all sources have."""


def pretrain(config: PretrainConfig) -> Pretrained:
    """Run to the end, going on from what the directory holds.

    Raises GristmillError for options, data and checkpoints that do not fit, and as `train` does; KeyboardInterrupt
    when stopped, with a checkpoint on disk.
    """
    check_model(config)
    with _world(config) as world, exclusive(config.directory) if world.is_main else nullcontext():
        if world.is_main:  # the others find the files made
            settings.check(config)
            tokenizer = prepare_tokenizer(config)
            sources = prepare_shards(config, tokenizer)
            settings.record(config)
        world.barrier()
        if not world.is_main:
            tokenizer = prepare_tokenizer(config)
            sources = prepare_shards(config, tokenizer)
        recipe = build(config, tokenizer)
        parameters = sum(weight.numel() for weight in recipe.model.parameters())
        stack = recipe.core.encoder if isinstance(recipe.core, EncoderDecoder) else recipe.core
        for source, _ in sources:
            check_vocabulary(source, stack.config)
        loader, held_out = loaders(config, recipe.objective, sources)
        if config.watch.patience and held_out is None:
            raise DataError("watch.patience needs held-out data, and token shards are taken whole: set it to 0")
        identity = _identity(config, recipe, [source.fingerprint for source, _ in sources])
        recipe.model.to(world.device)
        with Prefetched(loader, workers=config.workers) if config.workers else nullcontext(loader) as ready:
            position = train(
                recipe.model,
                recipe.objective,
                ready,
                config.train,
                config.directory,
                validation=held_out,
                identity=identity,
                description=config.objective,
                callbacks=_callbacks(config, tokenizer, recipe, loader),
                world=world,
                show_progress=not config.watch.live,
            )
        weights = world.whole(recipe.model)
        model, report = config.directory / "export", config.directory / "report.html"
        if world.is_main:
            _export(build(config, tokenizer), weights, tokenizer, model)
            facts = provenance(config, config.seed)
            write_training_report(config.directory, name=f"{config.objective} {config.model}", provenance=facts)
    epochs = position.batches / loader.batches_per_epoch
    return Pretrained(model, report, position, parameters, world.is_main, loader.utilisation, epochs)


@contextmanager
def _world(config: PretrainConfig) -> Iterator[World]:
    """The processes of the run: one, or those of torchrun."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise GristmillError("device cuda: this machine has no CUDA device that PyTorch can use; use --device cpu")
    if config.parallel == Parallel():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise GristmillError(
                "these processes would all train the same model: say how to split the run, as with --parallel.data null"
            )
        yield World(config.device)
        return
    from gristmill.train.parallel.mesh import start, stop
    from gristmill.train.parallel.pipeline import PipelineWorld
    from gristmill.train.parallel.world import DistributedWorld

    mesh = start(config.parallel, config.device)
    world = PipelineWorld(mesh) if mesh.layout.pipeline > 1 else DistributedWorld(mesh)
    try:
        yield world
    finally:
        stop()


def _identity(config: PretrainConfig, recipe: Recipe, fingerprints: list[str]) -> str:
    """Of everything that decides the weights in the end: a checkpoint of another run is refused."""
    text = repr((settings.decisive(config), recipe.core.config, fingerprints, tokenizer_hash(config)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _callbacks(config: PretrainConfig, tokenizer: Tokenizer, recipe: Recipe, loader: Loader) -> list[Callback]:
    watch, found = config.watch, list[Callback]()
    if any(isinstance(part, Router) and part.correction_bias is not None for part in recipe.model.modules()):
        found.append(RouterBias())
    if watch.every:
        found += [WeightMonitor(watch.every), ActivationMonitor(watch.every), MemoryMonitor(), Alarms()]
    if watch.mfu:
        operations = None  # of a single stack the monitor knows them, at each step's lengths
        if isinstance(recipe.model, (EncoderDecoder, Electra)):
            batch = loader.batch(0)
            operations = step_flops(recipe.model, batch) / batch.tokens
        found.append(SpeedMonitor(flops_per_token=operations))
    if watch.probes:
        found.append(ProbeTasks(tokenizer))
    if watch.patience:
        found.append(EarlyStopping(watch.patience))
    if watch.tensorboard:
        found.append(TensorBoard())
    if watch.live:
        found.append(LiveView())
    return found


@torch.no_grad()
def _export(recipe: Recipe, weights: Mapping[str, Tensor], tokenizer: Tokenizer, directory: Path) -> None:
    """Fill a new model with the trained weights, wherever they were, and write it."""
    for name, tensor in model_tensors(recipe.model).items():
        tensor.copy_(weights[name])
    with atomic_directory(directory) as temporary:
        save_huggingface(recipe.core, temporary, stop_token_ids=tokenizer.stop_token_ids)
        tokenizer.save(temporary)
