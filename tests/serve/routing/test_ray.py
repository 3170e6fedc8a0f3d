"""Replicas on Ray Serve answer as an engine here would; a killed one fails its own streams and is replaced."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from gristmill.core import RequestOutput, SamplingParams
from gristmill.engine.async_engine import EngineClosed
from gristmill.engine.llm import LLM
from gristmill.errors import GristmillError, MissingExtra, RequestError
from gristmill.serve.routing.ray_replica import RayCluster
from gristmill.serve.routing.routed import RoutedModel
from gristmill.serve.routing.start import start_workers
from serve.routing.test_process import LONG, OPTIONS, SAMPLED, Spy, kill_and_recover, read
from serve.tiny import save_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments:DeprecationWarning")  # in ray.serve


def test_without_ray_the_install_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gristmill.serve.routing.ray_replica.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"gristmill\[ray\]"):
        RayCluster()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(directory: Path) -> Iterator[RoutedModel]:
    if find_spec("ray") is None:  # not imported here: what it reads of the environment is set by RayCluster
        pytest.skip("ray[serve] is not installed")
    model = start_workers(str(directory), OPTIONS, workers=2, on="ray", name="tiny", threads=1)
    yield model
    model.engine.close()


@pytest.mark.peer
def test_replicas_answer_refuse_and_forget(directory: Path, model: RoutedModel) -> None:
    prompts, engine = [f"prompt {number}" for number in range(6)], model.engine
    engine.balancer = spy = Spy()

    async def main() -> list[RequestOutput]:
        streams = await asyncio.gather(*(engine.submit(prompt, SAMPLED) for prompt in prompts))
        assert set(spy.chosen) == {0, 1}, "a replica was idle beside a queue"
        outputs = await asyncio.gather(*map(read, streams))
        with pytest.raises(RequestError) as refused:
            await engine.submit("x" * 400, SAMPLED)
        assert (refused.value.field, refused.value.code) == ("prompt", "context_length_exceeded")
        left = await engine.submit("x", LONG)
        await anext(left)
        left.leave()
        return outputs

    for here, there in zip(LLM(directory, **OPTIONS).generate(prompts, SAMPLED), asyncio.run(main()), strict=True):
        assert [one.token_ids for one in here.outputs] == [one.token_ids for one in there.outputs]
    assert [load.outstanding for load in engine.loads] == [0.0, 0.0]
    assert model.embed(["one"]).shape == (1, 32)
    with pytest.raises(RequestError):
        model.embed(["x" * 400])


@pytest.mark.peer
def test_a_cluster_of_this_machine_listens_on_loopback_and_tells_nobody(model: RoutedModel) -> None:
    import ray
    from ray._common.usage.usage_lib import usage_stats_enabled

    assert [node["NodeManagerAddress"] for node in ray.nodes()] == ["127.0.0.1"]
    assert not usage_stats_enabled()


@pytest.mark.peer
def test_a_killed_replica_is_replaced_and_the_others_go_on(model: RoutedModel) -> None:
    asyncio.run(asyncio.wait_for(kill_and_recover(model), 120))


@pytest.mark.peer
def test_the_end_is_told_and_a_model_that_does_not_load_too(directory: Path, model: RoutedModel) -> None:
    async def cut() -> None:
        stream = await model.engine.submit("x", SamplingParams(max_tokens=200, ignore_eos=True))
        await asyncio.to_thread(model.engine.close)
        with pytest.raises(EngineClosed):
            await read(stream)

    asyncio.run(cut())
    with pytest.raises(GristmillError, match="could not begin"):
        start_workers(str(directory / "nowhere"), {}, workers=1, on="ray", threads=1)
