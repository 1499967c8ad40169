import functools
import json
import pickle
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from tests.serving import serve
from v4train.data.files import DataFile, Retry, find_files, open_file
from v4train.errors import ConfigError

ONCE = Retry(0, sleep=lambda _: pytest.fail("slept"))


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def find(path, source="jsonl", name=None, split="train", retry=ONCE):
    return find_files(path, source, name=name, split=split, retry=retry)


def names(*args, **kwargs):
    return [file.name for file in find(*args, **kwargs)]


def write(folder: Path, *files: str) -> Path:
    for i, name in enumerate(files):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * i)
    return folder


MIXED = (
    "b/z.jsonl",
    "b/a.JSON",
    "a.ndjson",
    "c.jsonl.gz",
    "b/c.json.zst",
    "d.parquet",
    "e.arrow",
    "f.txt",
    "README.md",
    "g.txt.gz",
    "h.gz",
    ".hidden.jsonl",
    ".cache/h.jsonl",
    "b/dataset_info.json",
    "b/cache-0123456789abcdef.arrow",
)


def test_folder_is_searched_to_any_depth_for_the_source_s_suffixes(tmp_path):
    folder = write(tmp_path, *MIXED)
    found = find(folder)
    assert [(file.name, file.format, file.compression) for file in found] == [
        ("a.ndjson", "jsonl", ""),
        ("b/a.JSON", "jsonl", ""),
        ("b/c.json.zst", "jsonl", "zstd"),
        ("b/z.jsonl", "jsonl", ""),
        ("c.jsonl.gz", "jsonl", "gzip"),
    ]
    assert [file.size for file in found] == [2, 1, 4, 0, 3]
    assert all(Path(file.url).is_absolute() and Path(file.url).exists() for file in found)
    assert names(str(folder) + "/", "parquet") == ["d.parquet"]
    assert names(folder, "arrow") == ["e.arrow"]
    assert pickle.loads(pickle.dumps(found)) == found


def test_files_left_out_of_a_folder_are_logged(tmp_path, caplog):
    caplog.set_level("INFO", "v4train")
    find(write(tmp_path, *MIXED), "parquet")
    assert "12 files left out that aren't parquet by suffix" in caplog.text


def test_globs_lists_and_single_files(tmp_path, monkeypatch):
    folder = write(tmp_path, *MIXED)
    assert names(f"{folder}/**/*.j*") == ["b/c.json.zst", "b/z.jsonl", "c.jsonl.gz"]
    assert names(f"{folder}/b/*") == ["a.JSON", "c.json.zst", "z.jsonl"]
    assert names(f"{folder}/*.jsonl.gz") == ["c.jsonl.gz"]
    assert names([f"{folder}/b", f"{folder}/b/z.jsonl", folder / "a.ndjson"]) == [
        "a.ndjson",
        "b/a.JSON",
        "b/c.json.zst",
        "b/z.jsonl",
    ]
    assert names(folder / ".hidden.jsonl") == [".hidden.jsonl"]
    monkeypatch.chdir(folder)
    assert names("b/../a.ndjson") == ["a.ndjson"] and find("a.ndjson")[0].url == str(folder / "a.ndjson")


def test_names_do_not_move_with_the_folder(tmp_path):
    first = names(write(tmp_path / "one", "x/a.jsonl", "y/b.jsonl"))
    assert first == names(write(tmp_path / "two" / "deeper", "x/a.jsonl", "y/b.jsonl")) == ["x/a.jsonl", "y/b.jsonl"]


@pytest.mark.parametrize("path", [None, "", [], "nowhere", "nowhere/*.jsonl", "README.md", "empty", "x://host/a.jsonl"])
def test_nothing_found_names_the_entry(tmp_path, path, monkeypatch):
    write(tmp_path, "README.md", "empty/notes.md", "good.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as raised:
        find(path)
    assert raised.value.key == "data.path" and "\n" not in str(raised.value)
    if path:
        with pytest.raises(ConfigError, match=f"^data.path={path.replace('*', '.')}: "):
            find(["good.jsonl", path])


def test_a_named_file_must_have_a_suffix_of_the_source(tmp_path):
    write(tmp_path, "a.parquet", "b.jsonl")
    with pytest.raises(
        ConfigError, match="a.parquet has no suffix that data.source=jsonl reads; name files that end in"
    ):
        find(tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="b.jsonl has no suffix that data.source=arrow reads; .* .arrow$"):
        find(tmp_path / "b.jsonl", "arrow")
    with pytest.raises(ConfigError, match="data.source=stdlib: no source of files"):
        find(tmp_path, "stdlib")


def test_addresses_of_files_and_folders():
    page = (
        '<a href="../">up</a> <a href="?C=N">sort</a> <a href="b%20c.jsonl.gz">x</a> <A HREF="/data/a.parquet">y</A>'
        '<a href="readme.md">z</a> <a href="sub/">s</a> <a href="http://elsewhere/d.jsonl">e</a> <a name="top">'
        '<a href="t.txt#l">t</a> <a href=".hidden.jsonl">h</a> <a href="b%20c.jsonl.gz">twice</a>'
    )
    files = {"data/": page.encode(), "data/a.parquet": b"123", "data/b%20c.jsonl.gz": b"4567"}
    with serve(files) as served:
        found = find(served.url + "data/", "hub")
        assert [(file.name, file.format, file.compression) for file in found] == [
            ("a.parquet", "parquet", ""),
            ("b c.jsonl.gz", "jsonl", "gzip"),
            ("t.txt", "text", ""),
        ]
        assert found[1].url == served.url + "data/b%20c.jsonl.gz"
        assert names(served.url + "data/") == ["b c.jsonl.gz"]
        single = find([served.url + "data/a.parquet?key=1", served.url + "data/b%20c.jsonl.gz"], "hub")
        assert [(file.name, file.size) for file in single] == [("a.parquet", 3), ("b c.jsonl.gz", 4)]
        with open_file(single[0], ONCE) as file:
            assert file.read() == b"123"


def test_pages_of_pythons_own_server(tmp_path):
    write(tmp_path, "b/é 1.jsonl", "b/2.jsonl.gz", "b/notes.md", "b/c/3.jsonl")
    handler = functools.partial(Silent, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        found = find(f"{address}/b/")
        assert [file.name for file in found] == ["2.jsonl.gz", "é 1.jsonl"]
        for file in found:
            with open_file(file, ONCE) as content:
                assert content.read() == (tmp_path / "b" / file.name).read_bytes()
        with pytest.raises(ConfigError, match="no jsonl file in it"):
            find(address)
        with pytest.raises(ConfigError, match="b has no suffix .* a folder's address ends in /$"):
            find(f"{address}/b")
        server.shutdown()


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass


def test_addresses_retry_and_fail_with_the_entry_and_the_cause():
    waits = []
    with serve({"data/a.jsonl": b"{}", "data/": b"nothing here"}, faults=[503, 503]) as served:
        assert names(served.url + "data/a.jsonl", retry=Retry(2, sleep=waits.append)) == ["a.jsonl"]
        assert len(waits) == 2
        for missing, cause in (("data/b.jsonl", "HTTP 404"), ("nowhere/", "HTTP 404"), ("data/", "no jsonl file")):
            with pytest.raises(ConfigError, match=f"^data.path={served.url}{missing}: .*{cause}"):
                find(served.url + missing)
        served.faults = [500]
        with pytest.raises(ConfigError, match=f"^data.path={served.url}data/a.jsonl: .*HTTP 500"):
            find(served.url + "data/a.jsonl")


def rows(count):
    return Dataset.from_dict({"text": [f"text {i}" for i in range(count)]})


def test_dataset_folder_by_split(tmp_path, caplog):
    caplog.set_level("INFO", "v4train")
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        rows(3).to_parquet(tmp_path / "data" / f"{name}.parquet")
    (tmp_path / "README.md").write_text("# about")
    found = find(tmp_path, "hub")
    assert [file.name for file in found] == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert found[0].size == Path(found[0].url).stat().st_size and found[0].format == "parquet"
    assert "1 files of other splits, configs or formats left out" in caplog.text
    assert names(tmp_path, "hub", split="test") == ["test-00000-of-00001.parquet"]
    with pytest.raises(ConfigError, match="data.split=dev: .* has no such split; one of .*train.*test"):
        find(tmp_path, "hub", split="dev")


def test_dataset_folder_with_configs(tmp_path):
    for language in ("de", "fr"):
        (tmp_path / language).mkdir()
        (tmp_path / language / "part.jsonl").write_text(json.dumps({"text": language}) + "\n")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("de", "fr"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    (file,) = find(tmp_path, "hub", name="fr")
    assert Path(file.url) == tmp_path / "fr" / "part.jsonl" and file.format == "jsonl"
    for name in (None, "it"):
        with pytest.raises(ConfigError, match=f"data.name={name}: .*de.*fr"):
            find(tmp_path, "hub", name=name)


def test_dataset_folder_of_text_files(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (file,) = find(tmp_path, "hub")
    assert (file.name, file.format, file.size) == ("a.txt", "text", 3)


def test_saved_datasets(tmp_path):
    rows(4).save_to_disk(tmp_path / "single", num_shards=2)
    write(tmp_path / "single", "cache-0123456789abcdef.arrow")
    shards = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert names(tmp_path / "single", "hub") == names(tmp_path / "single", "arrow") == shards
    DatasetDict(train=rows(4), test=rows(2)).save_to_disk(tmp_path / "both")
    (file,) = find(tmp_path / "both", "hub", split="test")
    assert Path(file.url).parent == tmp_path / "both" / "test" and file.format == "arrow"
    with pytest.raises(ConfigError, match="data.split=dev: .* one of train, test"):
        find(tmp_path / "both", "hub", split="dev")


def test_folder_without_data_and_hub_name_without_network(tmp_path):
    write(tmp_path, "notes.md")
    with pytest.raises(ConfigError, match=f"^data.path={tmp_path}: "):
        find(tmp_path, "hub")
    with pytest.raises(ConfigError, match="^data.path=some-one/some-thing: ") as raised:
        find("some-one/some-thing", "hub")
    assert "\n" not in str(raised.value)


def test_dataset_that_is_a_script(monkeypatch):
    def refuse(*_):
        raise RuntimeError("Dataset scripts are no longer supported, but found\nname.py")

    monkeypatch.setattr("datasets.load_dataset_builder", refuse)
    with pytest.raises(ConfigError, match="^data.path=org/name: .* no longer supported, but found name.py; "):
        find("org/name", "hub")


def test_a_missing_file_is_not_looked_for_on_the_hub(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *_: pytest.fail("asked the Hub"))
    with pytest.raises(ConfigError, match="^data.path=data/train.jsonl: no such file"):
        find("data/train.jsonl", "hub")


def test_hub_names_become_addresses(monkeypatch):
    sha = "0" * 40

    class Builder:
        class config:
            data_files = {"train": [f"hf://datasets/org/name@{sha}/data/{i} x.parquet" for i in (1, 0)]}

    monkeypatch.setattr("datasets.load_dataset_builder", lambda path, name: Builder)
    found = find("org/name", "hub")
    assert [(file.name, file.url) for file in found] == [
        (f"{i} x.parquet", f"https://huggingface.co/datasets/org/name/resolve/{sha}/data/{i}%20x.parquet")
        for i in (0, 1)
    ]


def test_local_files_open_plainly(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"0123456789")
    with open_file(find(tmp_path)[0], ONCE) as file:
        file.seek(4)
        assert file.read(3) == b"456" and file.seekable()
    with pytest.raises(FileNotFoundError):
        open_file(DataFile(str(tmp_path / "b.jsonl"), "b.jsonl", None, "jsonl", ""), ONCE)
