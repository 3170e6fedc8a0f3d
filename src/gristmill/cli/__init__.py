"""The command line: one module per verb, imported only when that verb is called.

A verb module has a frozen dataclass `Config` (its options; the docstrings are the help) and `run(config) -> int`.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from gristmill.errors import GristmillError, closest

VERBS = {
    "quickstart": "train, fine-tune, evaluate and export a small model from raw text, resumable",
    "pretrain": "train a model on text with any objective: decoder, encoder or encoder-decoder",
    "plan": "tell size, time, money and memory of a training run, or test the scaling law on a ladder of small ones",
    "generate": "complete a prompt",
    "batch": "answer a file of prompts, resumable",
    "chat": "talk to a model in the terminal",
    "serve": "serve models over the OpenAI HTTP interface, with a page",
    "keys": "make, list and revoke the API keys of a server",
    "import": "write a checkpoint from elsewhere as a directory of ours, verified against its original",
    "export": "write a model for other programs: a Hugging Face directory with a model card, or a GGUF file",
    "bench": "measure the engine under load: latency, throughput, memory, energy, money, and what binds",
    "quantize": "write a model with weights of eight or four bits, and tell what that costs",
    "inspect": "tell what a model is and what it costs, from the headers of its files",
    "assets": "list, fetch and verify models and data sets",
    "tokens": "show how a conversation is tokenised and which tokens are trained",
}
_MODULES = {"import": "import_model", "inspect": "inspect_model"}  # Python keeps the one name, its library the other


def module_of(verb: str) -> str:
    """The module of a verb."""
    return f"gristmill.cli.{_MODULES.get(verb, verb)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns its exit code. Errors of ours end with one line on stderr and code 1."""
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()  # a reader that has gone shows here, and not when Python ends
    except GristmillError as error:
        print(f"gristmill: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ngristmill: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would complain while it ends
        return 141


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    verb = arguments[0]
    if verb == "--version":
        from gristmill import __version__

        print(__version__)
        return 0
    if verb not in VERBS:
        print(f"gristmill: unknown command {verb!r}.{closest(verb, VERBS)}", file=sys.stderr)
        return 2
    from gristmill.cli.options import parse

    # OpenMP threads that wait by spinning stall each other on a busy machine: waiting briefly and then sleeping costs
    # nothing on an idle one (docs/log.md). Must be set before torch loads.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    module = import_module(module_of(verb))
    return int(module.run(parse(module.Config, f"gristmill {verb}", arguments[1:])))


def _help() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {purpose}" for verb, purpose in VERBS.items()]
    return "\n".join(["usage: gristmill COMMAND [options]   (gristmill COMMAND --help tells its options)", "", *lines])
