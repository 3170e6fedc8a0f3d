"""The container files name what is there: files, options of the command, and metrics of the server."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from gristmill import LLM
from gristmill.cli import VERBS, keys, serve
from gristmill.cli.options import parse
from gristmill.serve.access.protection import Protection
from serve.guarded import guarded, served
from serve.tiny import save_tiny_model

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
FUNCTIONS = {"sum", "rate", "by", "histogram_quantile"}


def instructions() -> list[tuple[str, str]]:
    """(INSTRUCTION, the rest) of the Dockerfile, with continued lines joined."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text()).replace("\\\n", " ")
    pairs = [line.partition(" ") for line in text.splitlines() if line.strip()]
    return [(name, rest.strip()) for name, _, rest in pairs]


def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return document


def parsed(words: list[str]) -> Any:
    """The options of a `gristmill` command as its verb reads them."""
    assert words[0] in VERBS
    return parse({"serve": serve, "keys": keys}[words[0]].Config, f"gristmill {words[0]}", words[1:])


def test_what_the_image_copies_is_there_and_not_ignored() -> None:
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    sources: list[str] = []
    for name, rest in instructions():
        if name == "COPY" and not rest.startswith("--from"):
            sources += shlex.split(rest)[:-1]
    assert "src" in sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignore, source


def test_the_image_does_not_run_as_root_and_its_command_is_one() -> None:
    found = dict(instructions())
    assert found["USER"] == "gristmill"
    assert json.loads(found["ENTRYPOINT"]) == ["gristmill"]
    config = parsed(json.loads(found["CMD"]))
    assert (config.host, config.port) == ("0.0.0.0", int(found["EXPOSE"]))
    check = json.loads(found["HEALTHCHECK"][found["HEALTHCHECK"].index("[") :])
    compile(check[2], "healthcheck", "exec")
    assert f"127.0.0.1:{config.port}/health" in check[2]


def test_extras_of_the_image_are_ours() -> None:
    import tomllib

    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (extras,) = re.findall(r"\.\[([\w,]+)\]", (DEPLOY / "Dockerfile").read_text())
    assert set(extras.split(",")) <= set(known)


def test_compose_starts_the_server_with_options_that_it_has() -> None:
    server = compose()["services"]["server"]
    config = parsed(server["command"])
    assert str(config.keys) == "/data/keys.json"
    assert config.metrics_open
    assert int(server["stop_grace_period"].removesuffix("s")) > config.drain_seconds
    (command,) = re.findall(r"docker compose run --rm server (keys .*?) +#", (DEPLOY / "compose.yaml").read_text())
    assert parsed(command.split()).file == config.keys


def test_compose_publishes_on_loopback_only_and_mounts_files_that_exist() -> None:
    document = compose()
    for service in document["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in document["volumes"] or (DEPLOY / source).is_file(), source
        assert "build" in service or ":latest" not in service["image"]
    assert (DEPLOY / document["services"]["server"]["build"]["context"]).resolve() == ROOT


def test_prometheus_grafana_and_the_server_point_at_each_other() -> None:
    services = compose()["services"]
    scrape = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    host, _, port = scrape[0]["static_configs"][0]["targets"][0].partition(":")
    assert parsed(services[host]["command"]).port == int(port)
    (source,) = yaml.safe_load((DEPLOY / "grafana/datasources.yaml").read_text())["datasources"]
    assert re.fullmatch(r"http://(\w+):9090", source["url"])[1] in services  # type: ignore[index]
    dashboard = json.loads((DEPLOY / "grafana/gristmill.json").read_text())
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {source["uid"]}
    (provider,) = yaml.safe_load((DEPLOY / "grafana/dashboards.yaml").read_text())["providers"]
    assert any(f":{provider['options']['path']}/" in volume for volume in services["grafana"]["volumes"])


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Names of all samples of a server that has answered, with their labels."""
    llm = LLM(str(save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")))
    llm.model_name = "tiny"
    found: dict[str, set[str]] = {}
    with served(guarded(Protection(), [llm])) as http:
        http.post("/say/tiny")
        for family in text_string_to_metric_families(http.get("/metrics").text):
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_every_query_of_the_dashboard_names_a_metric_that_is_there(samples: dict[str, set[str]]) -> None:
    panels = json.loads((DEPLOY / "grafana/gristmill.json").read_text())["panels"]
    queries = [(panel["title"], target) for panel in panels for target in panel["targets"]]
    assert len(queries) > 15
    for title, target in queries:
        expression = target["expr"].replace("[$__rate_interval]", "")
        labels = [label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")]
        names = set(re.findall(r"[a-zA-Z_]\w*", re.sub(r"by \([^)]*\)", "", expression))) - FUNCTIONS
        assert names, title
        for name in names:
            assert name in samples, f"{title}: {name}"
            assert set(labels) <= samples[name], f"{title}: {name} has no {labels}"
            shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert shown <= (set(labels) if labels else samples[name]), f"{title}: {shown}"
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)
