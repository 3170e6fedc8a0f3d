"""API keys: made once, kept as hashes, read again when the file changes."""

from __future__ import annotations

import json
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gristmill.cli import keys as verb
from gristmill.cli.options import parse
from gristmill.errors import DataError, GristmillError
from gristmill.serve.access.keys import KeyFile, create_key, hashed, read_keys, revoke_key


def test_the_file_holds_the_hash_and_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    secret = create_key(path, "ann", tokens_per_minute=1000)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert secret not in path.read_text()
    assert json.loads(path.read_text()) == {
        "keys": [{"name": "ann", "sha256": hashed(secret), "tokens_per_minute": 1000}]
    }
    assert len(secret) >= 3 + 256 // 6  # base64 of 256 bits behind the prefix
    assert create_key(path, "bob") != secret
    assert [key.name for key in read_keys(path)] == ["ann", "bob"]


def test_a_secret_finds_its_key_and_nothing_else_does(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    ann, bob = create_key(path, "ann"), create_key(path, "bob")
    file = KeyFile(path)
    found = [file.find(secret) for secret in (ann, bob)]
    assert [key.name if key else None for key in found] == ["ann", "bob"]
    for wrong in ("", "ann", ann[:-1], ann + "x", hashed(ann), "\udcff", "é"):
        assert file.find(wrong) is None


def test_changes_are_seen_at_once(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    ann = create_key(path, "ann")
    file = KeyFile(path)
    bob = create_key(path, "bob")
    assert file.find(bob)
    revoke_key(path, "ann")
    assert file.find(ann) is None
    assert file.named("ann") is None
    assert file.named("bob")


def test_a_broken_or_missing_file_lets_nobody_in_until_it_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    ann = create_key(path, "ann")
    file, whole = KeyFile(path), path.read_text()
    for spoil in (lambda: path.write_text("{"), lambda: path.chmod(0o666), path.unlink):
        spoil()
        for _ in range(2):
            with pytest.raises(DataError):
                file.find(ann)
        path.write_text(whole)
        path.chmod(0o600)
        assert file.find(ann)


def test_an_expired_key_is_none(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    old = create_key(path, "old", expires=datetime.now(UTC) - timedelta(seconds=1))
    new = create_key(path, "new", expires=datetime.now(UTC) + timedelta(hours=1))
    file = KeyFile(path)
    assert file.find(old) is None
    assert file.named("old") is None
    assert file.find(new)


def test_models_are_allowed_with_their_adapters(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    create_key(path, "ann", models=["base", "other:french"])
    (key,) = read_keys(path)
    assert all(map(key.allows, ("base", "base:french", "other:french")))
    assert not any(map(key.allows, ("other", "other:german", "based", "")))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[]", "the file"),
        ('{"keys": [{"name": "a"}]}', "sha256"),
        ('{"keys": [{"name": "a", "sha256": "HASH", "rpm": 3}]}', "rpm"),
        ('{"keys": [{"name": "a b", "sha256": "HASH"}]}', "name"),
        ('{"keys": [{"name": "a", "sha256": "HASH", "expires": "2030-01-01T00:00:00"}]}', "expires"),
        ('{"keys": [{"name": "a", "sha256": "HASH"}, {"name": "b", "sha256": "HASH"}]}', "two keys"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text.replace("HASH", "0" * 64))
    path.chmod(0o600)
    with pytest.raises(DataError, match=told):
        KeyFile(path)


def test_names_are_unique_and_limits_in_range(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    create_key(path, "ann")
    with pytest.raises(GristmillError, match="there is a key 'ann'"):
        create_key(path, "ann")
    with pytest.raises(GristmillError, match="tokens_per_day"):
        create_key(path, "bob", tokens_per_day=0)
    with pytest.raises(GristmillError, match="Did you mean ann"):
        revoke_key(path, "anna")


def test_the_command_makes_lists_and_revokes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.json"

    def run(*words: str) -> str:
        assert verb.run(parse(verb.Config, "gristmill keys", [*words, "--file", str(path)])) == 0
        return capsys.readouterr().out

    secret = run("create", "ann", "--tokens_per_day", "5000", "--models", "[a,b]", "--days", "3", "--admin").strip()
    key = KeyFile(path).find(secret)
    assert key is not None
    assert (key.tokens_per_day, key.models, key.admin) == (5000, ("a", "b"), True)
    assert key.expires is not None
    assert timedelta(days=2) < key.expires - datetime.now(UTC) <= timedelta(days=3)
    listed = run("list")
    assert listed.startswith("ann  tokens_per_day=5000  models=['a', 'b']")
    assert key.sha256 not in listed
    run("revoke", "ann")
    assert run("list") == ""


@pytest.mark.parametrize(
    "words", [["create"], ["revoke"], ["list", "ann"], ["revoke", "ann", "--admin"], ["create", "a", "--days", "0"]]
)
def test_the_command_refuses_what_does_not_go_together(tmp_path: Path, words: list[str]) -> None:
    with pytest.raises(GristmillError):
        verb.run(parse(verb.Config, "gristmill keys", [*words, "--file", str(tmp_path / "keys.json")]))
